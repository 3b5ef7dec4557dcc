"""The original releases of COCO-CN and Flickr30K-CN: captions in text files, apart from the images.

    COCO-CN        lists coco-cn_train.txt, coco-cn_val.txt, coco-cn_test.txt of image ids, and
                   imageid.human-written-caption.txt, lines `ID#number<TAB>caption`
    Flickr30K-CN   a text file for each split, lines `ID#kind#number word:tag word:tag …`

A release is a folder, with these files at any depth, or a .zip, .tar, .tar.gz or .tgz of it.
"""
import errno
import functools
import os
import re
import shutil
import stat
import tarfile
import warnings
import zipfile
from pathlib import Path

import data
from support import system
from support.images import image_files
from support.shards import TarEntry, tar_entries
from support.system import BadInput

CAPTIONS = "imageid.human-written-caption.txt"
LISTS = {"coco-cn_train.txt": "train", "coco-cn_val.txt": "valid", "coco-cn_test.txt": "test"}
MOST_ENTRIES = 10**7                                                # of an archive
FLICKR = re.compile(r"\ufeff?([^#\s]+)#(zh\w*)#(\d+)\s+(\S.*)")     # image, kind, number, words


def unpack(path, folder, remedy):
    """Unpack a zip or tar archive into a folder. All is looked at before anything is written.

    Raises BadInput with `remedy` when it is damaged, encrypted or not safe; OSError: no room.
    """
    try:
        room, total = shutil.disk_usage(folder).free, 0
        for number, (_, _, size, _) in enumerate(entries(path)):
            total += size
            if number == MOST_ENTRIES:
                raise ValueError(f"it has more than {MOST_ENTRIES:,} entries")
            if total > room:
                raise OSError(errno.ENOSPC, f"{path} unpacks to more than the {room:,} bytes free")
        for name, is_folder, _, opened in entries(path):
            try:
                (folder / name if is_folder else (folder / name).parent).mkdir(parents=True, exist_ok=True)
                if not is_folder:
                    with opened() as source, open(folder / name, "xb") as f:
                        shutil.copyfileobj(source, f)
            except (FileExistsError, NotADirectoryError):
                raise ValueError(f"two of its entries are called {name[:60]}") from None
    except Exception as error:                  # damage raises errors of many classes
        # gzip's OSErrors have no number, an absurd offset has EINVAL; others are of the disk
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise BadInput(f"{path}: damaged, encrypted or not safe ({reason}). {remedy}") from None
    os.sync()                                   # the files are on the disk before their folder


def entries(path):
    """(name, whether it is a folder, size, its open method) of each entry of an archive.

    Raises ValueError for a name that leads out or is too long, for a link or device.
    """
    if path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                kind = stat.S_IFMT(entry.external_attr >> 16)               # 0: from Windows
                check_entry(entry.filename, kind in (0, stat.S_IFREG, stat.S_IFDIR))
                opened = functools.partial(archive.open, entry)
                yield entry.filename, entry.is_dir(), entry.file_size, opened
    else:
        with tarfile.open(path, tarinfo=TarEntry) as archive:
            for entry in tar_entries(archive):
                if entry.type != tarfile.XGLTYPE:
                    check_entry(entry.name, entry.isreg() or entry.isdir())
                    opened = functools.partial(archive.extractfile, entry)
                    yield entry.name, entry.isdir(), entry.size, opened


def check_entry(name, is_plain):
    parts = name.replace("\\", "/").split("/")
    if not is_plain:
        wrong = "is a link or device"
    elif name[:1] in "/\\" or ".." in parts or re.match(r"[A-Za-z]:[/\\]", name):
        wrong = "leads out of the folder"
    elif len(parts) > 64 or max(len(os.fsencode(part)) for part in parts) > 255:
        wrong = "has more than 64 parts, or one of more than 255 bytes"
    else:
        return
    raise ValueError(f"its entry {name[:60]} {wrong}")


# ---- captions


def open_release(source, temporary):
    """A release -> ("coco-cn" or "flickr30k-cn", {split: {image id: captions}}).

    An archive is unpacked into `temporary`. Raises BadInput with the file and line that are wrong.
    """
    if not source.exists():
        raise BadInput(f"{source}: there is no such file or folder")
    folder = source
    if not source.is_dir():
        folder = temporary
        folder.mkdir()
        unpack(source, folder, "Get it again")
    files = sorted(path for path in folder.rglob("[!.]*.txt") if path.is_file())    # no ._name
    try:
        if any(path.name in (CAPTIONS, *LISTS) for path in files):
            return "coco-cn", read_coco_cn(folder, files)
        return "flickr30k-cn", read_flickr(folder, files)
    except BadInput as error:
        raise BadInput(str(error).replace(f"{folder}/", f"{source}/")) from None


def rows_of(path, pattern, expected):
    """(match, "file, line n") of every line that is not blank.

    All groups but the last name a line. Raises BadInput where the pattern does not match, or when
    a name repeats.
    """
    seen = set()
    for number, line in system.utf8_lines(path):
        place, line = f"{path}, line {number}", line.strip()
        if not line:
            continue
        match = re.fullmatch(pattern, line)
        if not match:
            raise BadInput(f"{place}: expected {expected}, found {line[:60]}")
        name = match.groups()[:-1]
        if name in seen:
            raise BadInput(f"{place}: {'#'.join(name)} stands above already; names must be unique")
        seen.add(name)
        yield match, place


def read_coco_cn(folder, files):
    """{split: {image id: captions}}. The lists name the images of each split."""
    paths = {}
    for name in (*LISTS, CAPTIONS):
        same = [path for path in files if path.name == name]
        if len(same) != 1:
            raise BadInput(f"{folder}/: {'more than one' if same else 'no'} {name}; the original "
                           f"COCO-CN has one of each: {', '.join([*LISTS, CAPTIONS])}")
        paths[name] = same[0]
    captions, split_of = {split: {} for split in LISTS.values()}, {}
    for name, split in LISTS.items():
        expected = "an image id such as COCO_val2014_000000043734"
        for match, place in rows_of(paths[name], r"([\w.-]+)()", expected):
            other = split_of.setdefault(match[1], split)
            if other != split:
                raise BadInput(f"{place}: {match[1]} stands in the {other} split already; "
                               "an image belongs to one split")
            captions[split][match[1]] = []
    unlisted = []
    pattern, expected = r"([^#\s]+)#(\d+)\t\s*(\S.*)", "`ID#number<TAB>caption`"
    for match, place in rows_of(paths[CAPTIONS], pattern, expected):
        if match[1] in split_of:
            captions[split_of[match[1]]][match[1]].append(match[3])
        else:
            unlisted.append(place)
    if unlisted:
        warnings.warn(f"{len(unlisted):,} captions are left out, because their images are in no "
                      f"list; the first: {Path(unlisted[0]).name}")
    return captions


def read_flickr(folder, files):
    """{split: {image id: captions}}; the words lose their tags.

    The name of a file, or of a folder above it, says the split. Of two texts of the test split the
    one that people wrote (zhm) is taken, as in published figures.
    """
    texts = {"train": [], "valid": [], "test": []}              # split -> [(kind, file)]
    for path in files:
        with open(path, "rb") as f:
            first = FLICKR.match(f.readline(2**16).decode(errors="replace"))
        if first:
            said = re.findall("train|val|test", str(path.relative_to(folder)).lower())
            if not said:
                raise BadInput(f"{path}: is it the train, the val or the test split? "
                               "Let the name of the file or of its folder say one of these")
            texts[said[-1].replace("val", "valid")].append((first[2], path))
    if not any(texts.values()):
        raise BadInput(f"{folder}/: neither the original COCO-CN ({', '.join(LISTS)}, {CAPTIONS}) "
                       "nor Flickr30K-CN (lines like 1009692167#zhm#1 在:p 警车:n); other data sets "
                       "hold their own images, so leave out --images")
    captions = {}
    for split, found in texts.items():
        manual = [(kind, path) for kind, path in found if kind == "zhm"]
        if split == "test" and len(found) > 1 and len(manual) == 1:
            print(f"test: the text that people wrote is taken, {manual[0][1].name}")
            found = manual
        if len(found) > 1:
            raise BadInput(f"{found[0][1]}: there is another text of the {split} split, "
                           f"{found[1][1]}; leave only the one that is meant in the folder")
        for _, path in found:
            captions[split] = {}
            for match, _ in rows_of(path, FLICKR, "a line like 1009692167#zhm#1 在:p 警车:n"):
                # the tag stands after the last colon
                words = [re.sub(r"(?<=.):[A-Za-z][A-Za-z0-9]*$", "", w) for w in match[4].split()]
                captions[split].setdefault(match[1], []).append("".join(words))
    return captions


# ---- with their images


class Release(data.Split):
    """A split of a release. captions: {image id: captions}; paths: {image id: its file}."""

    def __init__(self, name, captions, paths):
        texts, positives = [], []
        for i, some in enumerate(captions.values()):
            texts += some
            positives += [[i]] * len(some)
        self.paths = [paths[id_] for id_ in captions]
        super().__init__(name, texts, list(captions), positives)

    def image_bytes(self, i):
        return self.paths[i].read_bytes()


def with_images(captions, folder, skip_missing):
    """{split: {image id: captions}}, a folder with ID.jpg at any depth -> (split, Release) of each.

    `skip_missing` leaves out images that are not there. Raises BadInput, also when an id has two.
    """
    paths = {id_: None for images in captions.values() for id_ in images}
    files, unread = image_files(folder)
    for path, error in unread.items():
        raise BadInput(f"{folder / path}: cannot be read ({error})")
    for path in (folder / file for file in files):
        id_ = path.stem
        if id_ in paths and path.suffix.lower() in (".jpg", ".jpeg"):
            if paths[id_]:
                raise BadInput(f"{path}: {paths[id_]} has the same name; remove one of them")
            paths[id_] = path
    missing = [id_ for id_, path in paths.items() if path is None]
    if missing:
        line = (f"{len(missing):,} of {len(paths):,} images are not under {folder}, "
                f"the first {missing[0]}.jpg")
        if not skip_missing:
            raise BadInput(f"{line}. Folders that are links are not looked into. "
                           "--skip-missing leaves them and their captions out")
        print(f"left out: {line}, and their captions")
    for split, images in captions.items():
        present = {id_: some for id_, some in images.items() if paths[id_]}
        yield split, Release(split, present, paths)
