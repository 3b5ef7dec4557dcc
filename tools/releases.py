"""tools.releases"""
import contextlib
import errno
import functools
import gzip
import lzma
import os
import re
import shutil
import stat
import struct
import tarfile
import warnings
import zipfile
import zlib
from pathlib import Path

import data
from support import system
from support.images import IMAGE_TYPES, image_files
from support.system import BadInput

# What reading a damaged archive raises.
UNREADABLE = (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError, MemoryError,
              NotImplementedError, struct.error, ValueError, OverflowError)


def is_litter(parts):
    """Whether a path, as its parts, is what macOS leaves in folders and archives: ._name beside name, __MACOSX, .DS_Store."""
    return any(part == "__MACOSX" or part.startswith("._") or part == ".DS_Store" for part in parts)


@contextlib.contextmanager
def opened(path, remedy):
    """An open zip or tar archive (.gz, too). Whatever is wrong with its bytes becomes one line, also later, while it is read."""
    try:
        with (zipfile.ZipFile(path) if path.suffix.lower() == ".zip" else tarfile.open(path)) as archive:
            yield archive
    except (*UNREADABLE, OSError) as error:
        # an OSError of the disk is not the archive's fault. Those of decompression have no number, an absurd offset is invalid
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise BadInput(f"{path}: damaged or cut short ({(str(error) or type(error).__name__).splitlines()[0]}); {remedy}") from None


def entries(archive):
    """(name, size, whether it is a folder, what is wrong with it or "", a function that opens it) of every entry of an open archive."""
    if isinstance(archive, zipfile.ZipFile):
        for entry in archive.infolist():
            kind = stat.S_IFMT(entry.external_attr >> 16)
            wrong = "it is encrypted" if entry.flag_bits & 1 else ""
            if not wrong and kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                wrong = "it is a link or a device"
            yield entry.filename, entry.file_size, entry.is_dir() or kind == stat.S_IFDIR, wrong, functools.partial(archive.open, entry)
    else:
        for entry in archive:
            wrong = "" if entry.isreg() or entry.isdir() else "it is a link or a device"
            yield entry.name, entry.size, entry.isdir(), wrong, functools.partial(archive.extractfile, entry)
        # tarfile takes a damaged header for the end, without a word; but at the end are zeros
        archive.fileobj.seek(archive.offset)
        if any(any(block) for block in iter(lambda: archive.fileobj.read(2**20), b"")):
            raise tarfile.ReadError("after its end there is more")


def files_to_unpack(path, archive):
    """{parts of the path: (size, a function that opens it)} of an archive's files.

    Raises BadInput when one of them is not a plain file, or would land outside of the folder or on another one.
    """
    refused = "nothing was unpacked. Get the archive from where it is published"
    files = {}
    for name, size, is_folder, wrong, open_it in entries(archive):
        parts = tuple(part for part in name.split("/") if part not in ("", "."))
        if name.startswith("/") or re.match("[A-Za-z]:", name) or "\\" in name or ".." in parts or not (parts or is_folder):
            wrong = "its name could lead out of the folder"
        if wrong or parts in files:
            raise BadInput(f"{path}: entry {system.printable(name)}: {wrong or 'it is there twice'}; {refused}")
        if not is_folder and not is_litter(parts):
            files[parts] = size, open_it
    if both := next((parts[:n] for parts in files for n in range(1, len(parts)) if parts[:n] in files), None):
        raise BadInput(f"{path}: entry {system.printable('/'.join(both))} is a file and a folder; {refused}")
    return files


def unpack(path, folder, remedy):
    """Unpack a zip or tar archive into an empty folder. Only names and bytes are taken from it: no rights, no owners, no links.

    `remedy`: what to do about a damaged one, for the BadInput.
    """
    with opened(path, remedy) as archive:
        files = files_to_unpack(path, archive)
        needed, free = sum(size for size, _ in files.values()), shutil.disk_usage(folder).free
        if needed > free:
            raise BadInput(f"{path}: {needed / 2**20:,.0f} MiB when unpacked, and {folder.parent} has room for {free / 2**20:,.0f}; "
                           "make room, or name another place")
        with system.progress(f"{path.name}: MiB unpacked", needed / 2**20) as progress:
            for parts, (size, open_it) in files.items():
                place = folder.joinpath(*parts)
                place.parent.mkdir(parents=True, exist_ok=True)
                with open_it() as source, open(place, "xb") as target:
                    while block := source.read(2**20):
                        target.write(block)
                        progress.update(len(block) / 2**20)
                    if target.tell() != size:
                        raise EOFError(f"{system.printable('/'.join(parts))} has {target.tell():,} of {size:,} bytes")
                    target.flush()
                    os.fsync(target.fileno())


CAPTIONS = "imageid.human-written-caption.txt"                                  # of COCO-CN
LISTS = {"coco-cn_train.txt": "train", "coco-cn_val.txt": "valid", "coco-cn_test.txt": "test"}
FLICKR = re.compile(r"\ufeff?([^#\s]+)#(zh\w*)#(\d+)\s+(\S.*)")                 # image # kind of text # number, words with their tags


class Release(data.Split):
    """A split of an original release: texts apart from the images.

    `described`: {image id: (captions, where it is named)}, `paths`: {image id: its file}.
    """

    def __init__(self, name, described, paths):
        pairs = [(text, i) for i, (texts, _) in enumerate(described.values()) for text in texts]
        self.paths = [paths[id_] for id_ in described]
        super().__init__(name, [text for text, _ in pairs], list(described), [[i] for _, i in pairs])

    def image_bytes(self, i):
        return self.paths[i].read_bytes()


def is_release(path):
    """Whether a .tar holds texts alone, or is a shard."""
    with opened(path, "get it again") as archive:
        names = [name.lower() for name, *_ in entries(archive)]
    images = tuple(f".{kind}" for kind in IMAGE_TYPES)
    return any(name.rpartition("/")[2] in LISTS for name in names) or not any(name.endswith(images) for name in names)


def read_release(folder):
    """The texts of an original release, at any depth -> ("coco-cn" or "flickr30k-cn", what each split describes).

    That is {split: {image id: (captions, "file, line n" where it is named first)}}. BadInput when it is no release.
    """
    files = sorted(path for path in folder.rglob("*.txt") if path.is_file() and not is_litter(path.relative_to(folder).parts))
    if any(path.name in (CAPTIONS, *LISTS) for path in files):
        return "coco-cn", read_coco_cn(folder, files)
    texts = {}                                                                  # split -> [(kind, file)]
    for path in files:
        with open(path, "rb") as f:
            first = FLICKR.match(f.readline(2**16).decode(errors="replace"))
        if first:
            # the split: of the names on the path the last that says one
            says = (re.findall("train|val|test", part.lower()) for part in reversed(path.relative_to(folder).parts))
            inside = next((found[-1] for found in says if found), None)
            if inside is None:
                raise BadInput(f"{path}: is it the train, the val or the test split? "
                               "Let the name of the file or of its folder say one of these")
            texts.setdefault(inside.replace("val", "valid"), []).append((first[2], path))
    if not texts:
        raise BadInput(f"{folder}/: neither the original COCO-CN ({', '.join(LISTS)} and {CAPTIONS}), nor that of Flickr30K-CN "
                       "(text files with lines like 1009692167#zhm#1 在:p 警车:n), nor a layout that is read here")
    return "flickr30k-cn", {split: read_flickr(one_text(split, texts[split])) for split in ("train", "valid", "test") if split in texts}


def one_text(split, texts):
    """Which of several texts, [(kind, file), …], of a Flickr30K-CN split to take -> its file.

    Of the test split the one that people wrote (zhm), as everybody who publishes figures does.
    """
    manual = [path for kind, path in texts if kind == "zhm"]
    if len(texts) > 1 and split == "test" and len(manual) == 1:
        print(f"test: of {len(texts)} texts the one that people wrote is taken, {manual[0].name}")
        return manual[0]
    if len(texts) > 1:
        kinds = ", ".join(kind for kind, _ in texts)
        raise BadInput(f"{texts[0][1]}: there is another text of the {split} split, {texts[1][1]} ({kinds}); "
                       "leave only the one that is meant in the folder")
    return texts[0][1]


def rows_of(path, pattern, expected):
    """(what of the line matches the pattern, "file, line n") of every line that is not blank.

    What comes before the last group names the line, and may not come again. BadInput when it does, or when a line is not as
    `expected`.
    """
    seen = set()
    for number, line in system.utf8_lines(path):
        place, found = f"{path}, line {number}", re.fullmatch(pattern, line.strip())
        if not line.strip():
            continue
        if not found:
            raise BadInput(f"{place}: expected {expected}, found {line.strip()[:60]}")
        if found.groups()[:-1] in seen:
            raise BadInput(f"{place}: {'#'.join(found.groups()[:-1])} stands above already; numbers must be unique")
        seen.add(found.groups()[:-1])
        yield found, place


def read_coco_cn(folder, files):
    """The lists name the images of each split, the file of captions names their images -> as read_release."""
    paths = {name: [path for path in files if path.name == name] for name in (*LISTS, CAPTIONS)}
    if wrong := next((name for name in paths if len(paths[name]) != 1), None):
            how_many = "more than one" if paths[wrong] else "no"
            raise BadInput(f"{folder}/: {how_many} {wrong}; the original COCO-CN has one of each: {', '.join(paths)}")
    described, split_of, strange = {split: {} for split in LISTS.values()}, {}, []
    for name, split in LISTS.items():
        for found, place in rows_of(paths[name][0], r"([\w.-]+)()", "a image id such as COCO_val2014_000000043734"):
            if split_of.setdefault(found[1], split) != split:
                raise BadInput(f"{place}: {found[1]} stands in the {split_of[found[1]]} split already; a image belongs to one split")
            described[split][found[1]] = [], place
    for found, place in rows_of(paths[CAPTIONS][0], r"([^#\s]+)#(\d+)\t\s*(\S.*)", "`ID#number<TAB>caption`"):
        if found[1] in split_of:
            described[split_of[found[1]]][found[1]][0].append(found[3])
        else:
            strange.append(place)
    if strange:
        warnings.warn(f"{len(strange):,} captions are left out, for their images are in no list; the first: {strange[0]}")
    if silent := [place for images in described.values() for texts, place in images.values() if not texts]:
        warnings.warn(f"{len(silent):,} images have no caption; they are kept as candidates for a search. The first: {silent[0]}")
    return described


def read_flickr(path):
    """One text file of Flickr30K-CN, whose words have tags -> {image id: (captions, where it is named first)}."""
    described = {}
    for found, place in rows_of(path, FLICKR, "a line like 1009692167#zhm#1 在:p 警车:n"):
        words = [re.sub(r"(?<=.):[A-Za-z][A-Za-z0-9]*$", "", word) for word in found[4].split()]    # the tag stands after the last colon
        described.setdefault(found[1], ([], place))[0].append("".join(words))
    return described


def with_images(described, folder, skip_missing):
    """What read_release found, and the images ID.jpg under a folder, at any depth -> [(split name, Release)]."""
    files, unread = image_files(folder)
    if unread:
        raise BadInput(f"{folder / next(iter(unread))}: cannot be read ({next(iter(unread.values()))})")
    wanted, paths = {id_ for images in described.values() for id_ in images}, {}
    for file in files:
        id_, ending = os.path.splitext(os.path.basename(file))
        if id_ in wanted and ending.lower() in (".jpg", ".jpeg") and paths.setdefault(id_, folder / file) != folder / file:
            raise BadInput(f"{folder / file}: {paths[id_]} has the same name; which is meant? Leave one of them under {folder}")
    missing = [(id_, place) for images in described.values() for id_, (_, place) in images.items() if id_ not in paths]
    if missing:
        line = f"{len(missing):,} of {len(wanted):,} images are not under {folder}, the first {missing[0][0]}.jpg"
        if not skip_missing:
            raise BadInput(f"{line} ({Path(missing[0][1]).name}). Folders that are links are not looked into. "
                           "--skip-missing leaves them and their captions out")
        lost = sum(len(texts) for images in described.values() for id_, (texts, _) in images.items() if id_ not in paths)
        print(f"left out: {line}; {lost:,} captions with them")
    kept = {split: {id_: about for id_, about in images.items() if id_ in paths} for split, images in described.items()}
    return [(split, Release(split, images, paths)) for split, images in kept.items()]
