"""The original releases of COCO-CN and Flickr30K-CN: captions in text files, apart from the images.

    COCO-CN        lists coco-cn_train.txt, coco-cn_val.txt, coco-cn_test.txt of image ids, and
                   imageid.human-written-caption.txt, lines `ID#number<TAB>caption`
    Flickr30K-CN   a text file for each split, lines `ID#kind#number word:tag word:tag …`

A release is a folder, with these files at any depth, or a .zip, .tar.gz or .tgz of it.
"""
import contextlib
import errno
import os
import re
import shutil
import struct
import tarfile
import warnings
import zipfile
import zlib
from pathlib import Path

import data
from support import system
from support.images import image_files
from support.system import BadInput

# What damaged archives raise, and encrypted ones (RuntimeError).
UNREADABLE = (OSError, zipfile.BadZipFile, tarfile.TarError, zlib.error, struct.error, EOFError,
              MemoryError, RuntimeError, ValueError, OverflowError)

CAPTIONS = "imageid.human-written-caption.txt"
LISTS = {"coco-cn_train.txt": "train", "coco-cn_val.txt": "valid", "coco-cn_test.txt": "test"}
FLICKR = re.compile(r"\ufeff?([^#\s]+)#(zh\w*)#(\d+)\s+(\S.*)")     # image, kind, number, words


# ---- archives


@contextlib.contextmanager
def opened(path, remedy):
    """An open zip or tar archive. Whatever is wrong with its bytes raises BadInput, also later."""
    is_zip = path.suffix.lower() == ".zip"
    try:
        with zipfile.ZipFile(path) if is_zip else tarfile.open(path) as archive:
            yield archive
    except UNREADABLE as error:
        # gzip's OSErrors have no number, an absurd offset has EINVAL; others are of the disk
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise BadInput(f"{path}: damaged, cut short or encrypted ({reason}). {remedy}") from None


def tar_members(archive):
    """The members of an open tar archive; tarfile.ReadError when it is damaged."""
    members = archive.getmembers()
    # tarfile takes a damaged header for the end. The true end is zeros, and nothing else.
    archive.fileobj.seek(archive.offset)
    while block := archive.fileobj.read(2**20):
        if any(block):
            raise tarfile.ReadError("after its end there is more")
    return members


def is_litter(name):
    """Whether a path is what macOS leaves in folders and archives: ._name, __MACOSX, .DS_Store."""
    parts = Path(name).parts
    return any(part in ("__MACOSX", ".DS_Store") or part.startswith("._") for part in parts)


def unpack(path, folder, remedy):
    """Unpack a zip or tar archive into a folder; zipfile and tarfile keep all files inside it.

    Raises BadInput with `remedy` when it is damaged, when it holds links, or without room for it.
    """
    with opened(path, remedy) as archive:
        if isinstance(archive, zipfile.ZipFile):
            members = [m for m in archive.infolist() if not is_litter(m.filename)]
            needed, options = sum(m.file_size for m in members), {}
        else:
            members = [m for m in tar_members(archive) if not is_litter(m.name)]
            needed, options = sum(m.size for m in members), {"filter": "data"}
            for m in members:
                if not (m.isreg() or m.isdir()):
                    shown = system.printable(m.name)
                    raise BadInput(f"{path}: {shown} is a link or a device; nothing was unpacked")
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise BadInput(f"{path}: {needed / 2**20:,.0f} MiB when unpacked, and {folder.parent} "
                           f"has room for {free / 2**20:,.0f}; make room, or name another place")
        with system.progress(f"{path.name}: files unpacked", len(members)) as progress:
            for m in members:
                archive.extract(m, folder, **options)
                progress.update()
    os.sync()                               # the disk has the files before the folder its name


# ---- captions


def open_release(source, temporary):
    """A folder or an archive, which is unpacked into `temporary` -> what read_release gives."""
    if source.is_dir():
        return read_release(source)
    temporary.mkdir()
    unpack(source, temporary, "Get it again")
    try:
        return read_release(temporary)
    except BadInput as error:
        raise BadInput(str(error).replace(f"{temporary}/", f"{source}/")) from None


def read_release(folder):
    """The captions of a release -> ("coco-cn" or "flickr30k-cn", {split: described}).

    described: {image id: (captions, "file, line n" that names it first)}. Raises BadInput.
    """
    files = [path for path in sorted(folder.rglob("*.txt"))
             if path.is_file() and not is_litter(path.relative_to(folder))]
    if any(path.name in (CAPTIONS, *LISTS) for path in files):
        return "coco-cn", read_coco_cn(folder, files)
    texts = {}                                                  # split -> [(kind, file)]
    for path in files:
        with open(path, "rb") as f:
            first = FLICKR.match(f.readline(2**16).decode(errors="replace"))
        if first:
            texts.setdefault(split_of(path, folder), []).append((first[2], path))
    if not texts:
        raise BadInput(f"{folder}/: neither the original COCO-CN ({', '.join(LISTS)} and "
                       f"{CAPTIONS}), nor that of Flickr30K-CN (text files with lines like "
                       "1009692167#zhm#1 在:p 警车:n), nor a layout that is read here")
    order = [split for split in ("train", "valid", "test") if split in texts]
    return "flickr30k-cn", {split: read_flickr(one_text(split, texts[split])) for split in order}


def split_of(path, folder):
    """The split that the name of a file, or else of a folder above it, says."""
    for part in reversed(path.relative_to(folder).parts):
        if said := re.findall("train|val|test", part.lower()):
            return said[-1].replace("val", "valid")
    raise BadInput(f"{path}: is it the train, the val or the test split? "
                   "Let the name of the file or of its folder say one of these")


def one_text(split, texts):
    """The file to take of the texts of a Flickr30K-CN split, [(kind, file), …].

    Of the test split it is the one that people wrote (zhm), as in published figures.
    """
    manual = [path for kind, path in texts if kind == "zhm"]
    if len(texts) == 1:
        return texts[0][1]
    if split == "test" and len(manual) == 1:
        print(f"test: of {len(texts)} texts the one that people wrote is taken, {manual[0].name}")
        return manual[0]
    raise BadInput(f"{texts[0][1]}: there is another text of the {split} split, {texts[1][1]}; "
                   "leave only the one that is meant in the folder")


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
        found = re.fullmatch(pattern, line)
        if not found:
            raise BadInput(f"{place}: expected {expected}, found {line[:60]}")
        name = found.groups()[:-1]
        if name in seen:
            raise BadInput(f"{place}: {'#'.join(name)} stands above already; names must be unique")
        seen.add(name)
        yield found, place


def read_coco_cn(folder, files):
    """{split: described} as in read_release. The lists name the images of each split."""
    paths = {}
    for name in (*LISTS, CAPTIONS):
        same = [path for path in files if path.name == name]
        if len(same) != 1:
            raise BadInput(f"{folder}/: {'more than one' if same else 'no'} {name}; the original "
                           f"COCO-CN has one of each: {', '.join([*LISTS, CAPTIONS])}")
        paths[name] = same[0]
    described, split_of_image = {split: {} for split in LISTS.values()}, {}
    expected = "an image id such as COCO_val2014_000000043734"
    for name, split in LISTS.items():
        for found, place in rows_of(paths[name], r"([\w.-]+)()", expected):
            other = split_of_image.setdefault(found[1], split)
            if other != split:
                raise BadInput(f"{place}: {found[1]} stands in the {other} split already; "
                               "an image belongs to one split")
            described[split][found[1]] = [], place
    unlisted = []
    pattern, expected = r"([^#\s]+)#(\d+)\t\s*(\S.*)", "`ID#number<TAB>caption`"
    for found, place in rows_of(paths[CAPTIONS], pattern, expected):
        if found[1] in split_of_image:
            described[split_of_image[found[1]]][found[1]][0].append(found[3])
        else:
            unlisted.append(place)
    if unlisted:
        warnings.warn(f"{len(unlisted):,} captions are left out, because their images are in no "
                      f"list; the first: {unlisted[0]}")
    return described


def read_flickr(path):
    """A text file of Flickr30K-CN -> described as in read_release; its words lose their tags."""
    described = {}
    for found, place in rows_of(path, FLICKR, "a line like 1009692167#zhm#1 在:p 警车:n"):
        # the tag stands after the last colon
        words = [re.sub(r"(?<=.):[A-Za-z][A-Za-z0-9]*$", "", word) for word in found[4].split()]
        described.setdefault(found[1], ([], place))[0].append("".join(words))
    return described


# ---- with their images


class Release(data.Split):
    """A split of a release. described: as in read_release; paths: {image id: its file}."""

    def __init__(self, name, described, paths):
        texts, positives = [], []
        for i, (captions, _) in enumerate(described.values()):
            texts += captions
            positives += [[i]] * len(captions)
        self.paths = [paths[id_] for id_ in described]
        super().__init__(name, texts, list(described), positives)

    def image_bytes(self, i):
        return self.paths[i].read_bytes()


def with_images(described, folder, skip_missing):
    """{split: described} and the images ID.jpg in a folder, at any depth -> [(split, Release)]."""
    place_of = {}                                               # image id -> where it is named
    for images in described.values():
        place_of |= {id_: place for id_, (_, place) in images.items()}
    paths = image_paths(folder, place_of)
    missing = [id_ for id_ in place_of if id_ not in paths]
    if missing:
        line = (f"{len(missing):,} of {len(place_of):,} images are not under {folder}, "
                f"the first {missing[0]}.jpg")
        if not skip_missing:
            raise BadInput(f"{line} ({Path(place_of[missing[0]]).name}). Folders that are links "
                           "are not looked into. --skip-missing leaves them and their captions out")
        print(f"left out: {line}, and their captions")
    splits = []
    for split, images in described.items():
        kept = {id_: about for id_, about in images.items() if id_ in paths}
        splits.append((split, Release(split, kept, paths)))
    return splits


def image_paths(folder, wanted):
    """{image id: file} of the wanted ids. BadInput when an id has two files."""
    files, unread = image_files(folder)
    for path, error in unread.items():
        raise BadInput(f"{folder / path}: cannot be read ({error})")
    paths = {}
    for file in files:
        id_, ending = os.path.splitext(os.path.basename(file))
        if id_ not in wanted or ending.lower() not in (".jpg", ".jpeg"):
            continue
        if id_ in paths:
            raise BadInput(f"{folder / file}: {paths[id_]} has the same name; which is meant? "
                           f"Leave one of them under {folder}")
        paths[id_] = folder / file
    return paths
