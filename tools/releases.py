"""The original releases of COCO-CN and Flickr30K-CN: captions in text files, apart from the images.

    COCO-CN        lists coco-cn_train.txt, coco-cn_val.txt, coco-cn_test.txt of image ids, and
                   imageid.human-written-caption.txt, lines `ID#number<TAB>caption`
    Flickr30K-CN   a text file for each split, lines `ID#kind#number word:tag word:tag …`

A release is a folder, with these files at any depth, or a .zip, .tar, .tar.gz or .tgz of it.
"""
import errno
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
from support.images import image_files, leads_out
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
        room = shutil.disk_usage(folder).free
        for _, size, _, _ in entries(path):
            room -= size
            if room < 0:
                raise OSError(errno.ENOSPC, f"{path} unpacks to more than there is room for")
        for name, _, entry, opened in entries(path):
            place = os.path.join(folder, name)
            os.makedirs(os.path.dirname(place), exist_ok=True)
            with opened(entry) as source, open(place, "xb") as f:
                shutil.copyfileobj(source, f)
    except Exception as error:                  # damage raises errors of many classes
        # gzip's OSErrors, those of an absurd offset, of two entries of one name; not of the disk
        of_archive = None, errno.EINVAL, errno.EEXIST, errno.ENOTDIR
        if isinstance(error, OSError) and error.errno not in of_archive:
            raise
        reason = (str(error) or type(error).__name__).replace(f"{folder}/", "")
        raise BadInput(f"{path}: damaged, encrypted or not safe ({reason}). {remedy}") from None
    os.sync()                                   # the files are on the disk before their folder


def entries(path):
    """(name, size, entry, function that opens it) of each file in an archive.

    Raises ValueError for one that is a link or device, leads out, is too deep or one too many.
    """
    is_zip = path.suffix.lower() == ".zip"
    with zipfile.ZipFile(path) if is_zip else tarfile.open(path, tarinfo=TarEntry) as archive:
        for number, entry in enumerate(archive.infolist() if is_zip else tar_entries(archive)):
            if is_zip:
                name, size, is_folder = entry.filename, entry.file_size, entry.is_dir()
                is_plain = not stat.S_ISLNK(entry.external_attr >> 16)
            else:
                name, size, is_folder = entry.name, entry.size, entry.isdir()
                is_plain = entry.isreg() or is_folder
            parts = name.replace("\\", "/").split("/")
            is_out = not parts[0] or ".." in parts or re.match(r"[A-Za-z]:[/\\]", name)
            if is_out or not is_plain:
                raise ValueError(f"its entry {name[:60]} leads out, or is a link or device")
            if len(parts) > 64 or any(len(os.fsencode(part)) > 255 for part in parts):
                raise ValueError(f"its entry {name[:60]} has over 64 folders or 255 bytes in one")
            if number == MOST_ENTRIES:
                raise ValueError(f"it has more than {MOST_ENTRIES:,} entries")
            if not is_folder:
                yield name, size, entry, archive.open if is_zip else archive.extractfile


def open_release(source, temporary):
    """A release -> ("coco-cn" or "flickr30k-cn", {split: {image id: captions}}).

    An archive is unpacked into `temporary`. Raises BadInput with the file and line that are wrong.
    """
    if not (source.is_file() or source.is_dir()):           # reading a pipe would wait
        raise BadInput(f"{source}: there is no such file or folder")
    folder = source if source.is_dir() else temporary
    if folder == temporary:
        folder.mkdir()
        unpack(source, folder, "Get it again")
    files = sorted(path for path in folder.rglob("[!.]*.txt") if path.is_file())    # no ._name
    try:
        if any(path.name in (CAPTIONS, *LISTS) for path in files):
            return "coco-cn", read_coco_cn(folder, files)
        return "flickr30k-cn", read_flickr(folder, files)
    except BadInput as error:
        raise BadInput(str(error).replace(f"{folder}/", f"{source}/")) from None


def rows_of(path, pattern, example):
    """(match, "file, line n") of every line that is not blank.

    Raises BadInput where the pattern does not match, or when all groups but the last repeat.
    """
    seen = set()
    for number, line in system.utf8_lines(path):
        place, line = f"{path}, line {number}", line.strip()
        if line:
            match = re.fullmatch(pattern, line)
            if not match:
                raise BadInput(f"{place}: expected a line like {example}, found {line[:60]}")
            name = "#".join(match.groups()[:-1])
            if name in seen:
                raise BadInput(f"{place}: {name} stands above already; names must be unique")
            seen.add(name)
            yield match, place


def read_coco_cn(folder, files):
    """{split: {image id: captions}}. The lists name the images of each split."""
    names = [path.name for path in files]
    for name in (*LISTS, CAPTIONS):
        if names.count(name) != 1:
            raise BadInput(f"{folder}/: {names.count(name)} files are called {name}; the original "
                           f"COCO-CN has one of each: {', '.join([*LISTS, CAPTIONS])}")
    paths = dict(zip(names, files))
    captions, split_of = {split: {} for split in LISTS.values()}, {}
    for name, split in LISTS.items():
        for match, place in rows_of(paths[name], r"([\w.-]+)()", "COCO_val2014_000000043734"):
            other = split_of.setdefault(match[1], split)
            if other != split:
                raise BadInput(f"{place}: {match[1]} stands in the {other} split already; "
                               "an image belongs to one split")
            captions[split][match[1]] = []
    unlisted = []
    for match, place in rows_of(paths[CAPTIONS], r"([^#\s]+)#(\d+)\t\s*(\S.*)", "ID#0<TAB>caption"):
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
        raise BadInput(f"{folder}/: neither the original COCO-CN ({CAPTIONS}, …) nor Flickr30K-CN "
                       "(lines like 1009692167#zhm#1 在:p 警车:n). Archives in an archive are not "
                       "unpacked; other data sets hold their own images, so leave out --images")
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
            for match, _ in rows_of(path, FLICKR, "1009692167#zhm#1 在:p 警车:n"):
                words = re.sub(r"(?<=\S):[A-Za-z][A-Za-z0-9]*(?!\S)", "", match[4])    # no tags
                captions[split].setdefault(match[1], []).append("".join(words.split()))
    return captions


class Release(data.Split):
    """A split of a release. captions: {image id: captions}; paths: {image id: its file}."""

    def __init__(self, name, captions, paths):
        self.paths = [paths[id_] for id_ in captions]
        texts = [text for some in captions.values() for text in some]
        positives = [[i] for i, some in enumerate(captions.values()) for _ in some]
        super().__init__(name, texts, list(captions), positives)

    def image_bytes(self, i):
        return self.paths[i].read_bytes()


def with_images(captions, folder, skip_missing, allow_outside):
    """{split: {image id: captions}}, a folder with ID.jpg at any depth -> (split, Release) of each.

    `skip_missing` leaves out images that are not there. Raises BadInput, also when an id has two,
    or one is a link out of the folder, unless `allow_outside`.
    """
    paths = {id_: None for images in captions.values() for id_ in images}
    files, unread = image_files(folder)
    for path, error in unread.items():
        raise BadInput(f"{folder / path}: cannot be read ({error})")
    for path in (folder / file for file in files):
        id_ = path.stem
        if id_ in paths and path.suffix.lower() in (".jpg", ".jpeg"):
            is_out = path.is_symlink() and leads_out(os.path.realpath(folder), path)
            if is_out and not allow_outside:
                raise BadInput(f"{path}: it leads out of {folder}; --allow-outside takes it")
            if paths[id_]:
                raise BadInput(f"{path}: {paths[id_]} has the same name; remove one of them")
            paths[id_] = path
    if missing := [id_ for id_ in paths if not paths[id_]]:
        line = f"{len(missing):,} of {len(paths):,} images are not in {folder}: {missing[0]}.jpg, …"
        if not skip_missing:
            raise BadInput(f"{line} Folders that are links are not looked into. "
                           "--skip-missing leaves them and their captions out")
        print(f"left out, with their captions: {line}")
    for split, images in captions.items():
        present = {id_: some for id_, some in images.items() if paths[id_]}
        yield split, Release(split, present, paths)
