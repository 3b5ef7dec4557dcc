"""Getting the data: published sets from the web, original releases in a layout that is read here, a look through all before training.

    python data.py fetch coco-cn                            # or flickr30k-cn: downloaded and unpacked -> data/COCO-CN
    python data.py convert coco-cn-version1805v1.1.tar.gz data/COCO-CN --pictures /path/to/mscoco         # an original release
    python data.py convert /path/to/folder my-shards --shards                                    # any layout that is read here
    python data.py check coco-cn --processes 4              # every picture and caption; exit status 1 when something is wrong

A folder that is made here is there whole or not at all: it is filled beside its place, under its name + .ce-clip-part, and then
renamed. What a killed run left there the next one removes.
"""
import argparse
import array
import base64
import collections
import contextlib
import errno
import fcntl
import functools
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import re
import shlex
import shutil
import stat
import struct
import sys
import tarfile
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

import data
import system
from evaluate import data_name
from model import Config
from system import BadInput
from tokenizer import PAD, UNK, Tokenizer

# What the Hugging Face data set OFA-Sys/chinese-clip-eval has, as COCO-CN.zip and Flickr30k-CN.zip.
FETCHED = ("coco-cn", "flickr30k-cn")


# ---------------------------------------------------------------------------------------------------------------- whole folders or none


@contextlib.contextmanager
def filled_beside(folder):
    """An empty folder beside the place of `folder`, for a `with`. The caller fills it and renames it, or a folder in it.

    In the end it is gone, whatever happens. Other processes that ask wait. BadInput when the disk refuses.
    """
    part, lock = Path(f"{folder.absolute()}.ce-clip-part"), None
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(part.parent, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)                                        # let go when the process dies
        if part.is_dir():
            shutil.rmtree(part)                                                 # of a killed run
        part.mkdir()
        try:
            yield part
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        remedy = "; make room, or name another place" * (error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS))
        raise BadInput(f"{folder}: cannot be made ({str(error)[:300]}){remedy}") from None
    finally:
        if lock is not None:
            os.close(lock)


@contextlib.contextmanager
def nothing_is_cut():
    """Without the tokenizer's warning about long captions: here nothing is cut, and `check` says more."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*captions are longer than")
        yield


# ---------------------------------------------------------------------------------------------------------------- archives

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
        with system.Progress(f"{path.name}: MiB unpacked", needed / 2**20) as progress:
            for parts, (size, open_it) in files.items():
                place = folder.joinpath(*parts)
                place.parent.mkdir(parents=True, exist_ok=True)
                with open_it() as source, open(place, "xb") as target:
                    while block := source.read(2**20):
                        target.write(block)
                        progress.add(len(block) / 2**20)
                    if target.tell() != size:
                        raise EOFError(f"{system.printable('/'.join(parts))} has {target.tell():,} of {size:,} bytes")
                    target.flush()
                    os.fsync(target.fileno())


# ---------------------------------------------------------------------------------------------------------------- fetch


@nothing_is_cut()
def fetch(name, data_root):
    """Download a published set, unpack it to its place under data_root, and say what it holds. What is there already stays as it is."""
    folder = Path(data_root) / data.NAMES[name]
    archive, lines = folder.with_name(folder.name + ".zip"), None
    if folder.exists():
        print(f"{folder} is there already")
    else:
        try:
            system.download(system.hub_url(f"datasets/OFA-Sys/chinese-clip-eval/resolve/main/{archive.name}"), archive)
        except BadInput as error:
            raise BadInput(f"{error} (its place is {archive}). Of the original release python data.py convert makes the same") from None
        with filled_beside(folder) as part:
            if not folder.exists():                                             # else another process, which was waited for, has made it
                unpack(archive, part, "delete it and run this again: it will be downloaded anew")
                found = {path.parent for path in part.rglob("*_imgs.tsv") if path.is_file()}        # with or without a top folder
                if len(found) != 1:
                    raise BadInput(f"{archive}: {len(found)} of its folders have *_imgs.tsv, instead of one; "
                                   f"is it the archive of {name}? Delete it and run this again")
                new = found.pop()
                try:
                    lines = holds(new, name)
                except BadInput as error:
                    raise BadInput(f"{str(error).replace(str(new), str(archive))}. Delete the archive and run this again") from None
                os.replace(new, folder)
        print(f"{folder}: unpacked")
    try:
        print("\n".join(lines or holds(folder, name)))
    except BadInput as error:                                                   # of a folder that was there
        raise BadInput(f"{error}. Or move {folder} and {archive.name} away and run this again") from None
    place = "" if data_root == "data" else f" --data-root {data_root}"
    print(f"Next: python data.py check {name}{place}; then python train.py --recipe {name}-base --micro-batch 256{place}. "
          f"{archive.name} is no longer needed.")


def holds(folder, name):
    """Lines: what each split of a folder holds, beside table 1 of the paper for the set of this name."""
    splits = ((split_name, data.open_split(folder, split_name)) for split_name in data.split_names(folder))
    return [data.summary(split_name, split) + data.against_paper(name, split_name, len(split)) for split_name, split in splits]


# ---------------------------------------------------------------------------------------------------------------- convert

CAPTIONS = "imageid.human-written-caption.txt"                                  # of COCO-CN
LISTS = {"coco-cn_train.txt": "train", "coco-cn_val.txt": "valid", "coco-cn_test.txt": "test"}
FLICKR = re.compile(r"\ufeff?([^#\s]+)#(zh\w*)#(\d+)\s+(\S.*)")                 # picture # kind of text # number, words with their tags


class Release(data.Split):
    """A split of an original release: texts apart from the pictures.

    `described`: {picture id: (captions, where it is named)}, `paths`: {picture id: its file}.
    """

    def __init__(self, name, described, paths):
        pairs = [(text, i) for i, (texts, _) in enumerate(described.values()) for text in texts]
        self.paths = [paths[id_] for id_ in described]
        super().__init__(name, [text for text, _ in pairs], list(described), [[i] for _, i in pairs])

    def picture_bytes(self, i):
        return self.paths[i].read_bytes()


@nothing_is_cut()
def convert(source, dest, pictures, shards, skip_missing):
    """Write a data set, in any form, to the new folder `dest`, and say what it holds. The pictures' bytes stay as they are.

    In the Chinese-CLIP layout, or with `shards` as tar shards. `pictures`: the folder of an original release's pictures; with
    `skip_missing` those that are not there are left out. BadInput when that cannot be, and nothing is left at `dest`.
    """
    path, dest, name = Path(source), Path(dest), data_name(source)
    if not source or os.path.lexists(dest) and (dest.is_symlink() or not dest.is_dir() or any(dest.iterdir())):
        raise BadInput(f"{dest} is there already; name a new folder" if source else "convert '': name a data set")
    by_name = path.name.lower().endswith((".zip", ".tgz", ".tar.gz"))
    packed = path.is_file() and (by_name or data.is_pattern(source) and is_release(path))
    folder = None if packed or data.is_pattern(source) or source in data.PAINTED else data.find(source)
    original = packed or folder and not (data.caption_file(folder) or any(folder.glob("[!.]*_imgs.tsv")) or data.split_shards(folder))
    if original and (pictures is None or not Path(pictures).is_dir()):
        raise BadInput(f"--pictures {pictures}: there is no such folder" if pictures else
                       f"{source}: an original release has no pictures, and no other layout was found there; "
                       "name the folder of the pictures (MSCOCO's, or Flickr30K's) with --pictures")
    if not original and (pictures is not None or skip_missing):
        raise BadInput(f"{source}: it holds its own pictures; --pictures and --skip-missing are for the original COCO-CN and Flickr30K-CN")
    with filled_beside(dest) as part:
        new = part / "new"
        new.mkdir()
        if original:
            if packed:
                folder = part / "unpacked"
                folder.mkdir()
                unpack(path, folder, "get it again")
            try:
                name, described = read_release(folder)
            except BadInput as error:
                raise BadInput(str(error).replace(f"{folder}/", f"{source}/")) from None            # not the temporary folder's name
            splits = with_pictures(described, Path(pictures), skip_missing)
        else:
            splits = ((split_name, data.open_split(source, split_name)) for split_name in data.all_names(source))
        for split_name, split in splits:
            if split.endless:
                continue
            if shards:
                with contextlib.redirect_stdout(io.StringIO()):                 # it would name the folder that is being filled
                    data.write_shards(split, new, split_name, whole=True)
            else:
                write_tsv(split, new, split_name)
        os.replace(new, dest)
    print("\n".join(holds(dest, name)))
    print(f"Next: python data.py check {shlex.quote(str(dest))}")


def is_release(path):
    """Whether a .tar holds texts alone, or is a shard."""
    with opened(path, "get it again") as archive:
        names = [name.lower() for name, *_ in entries(archive)]
    pictures = tuple(f".{kind}" for kind in data.PICTURES)
    return any(name.rpartition("/")[2] in LISTS for name in names) or not any(name.endswith(pictures) for name in names)


def read_release(folder):
    """The texts of an original release, at any depth -> ("coco-cn" or "flickr30k-cn", what each split describes).

    That is {split: {picture id: (captions, "file, line n" where it is named first)}}. BadInput when it is no release.
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
    """The lists name the pictures of each split, the file of captions names their pictures -> as read_release."""
    paths = {name: [path for path in files if path.name == name] for name in (*LISTS, CAPTIONS)}
    if wrong := next((name for name in paths if len(paths[name]) != 1), None):
            how_many = "more than one" if paths[wrong] else "no"
            raise BadInput(f"{folder}/: {how_many} {wrong}; the original COCO-CN has one of each: {', '.join(paths)}")
    described, split_of, strange = {split: {} for split in LISTS.values()}, {}, []
    for name, split in LISTS.items():
        for found, place in rows_of(paths[name][0], r"([\w.-]+)()", "a picture id such as COCO_val2014_000000043734"):
            if split_of.setdefault(found[1], split) != split:
                raise BadInput(f"{place}: {found[1]} stands in the {split_of[found[1]]} split already; a picture belongs to one split")
            described[split][found[1]] = [], place
    for found, place in rows_of(paths[CAPTIONS][0], r"([^#\s]+)#(\d+)\t\s*(\S.*)", "`ID#number<TAB>caption`"):
        if found[1] in split_of:
            described[split_of[found[1]]][found[1]][0].append(found[3])
        else:
            strange.append(place)
    if strange:
        warnings.warn(f"{len(strange):,} captions are left out, for their pictures are in no list; the first: {strange[0]}")
    if silent := [place for pictures in described.values() for texts, place in pictures.values() if not texts]:
        warnings.warn(f"{len(silent):,} pictures have no caption; they are kept as candidates for a search. The first: {silent[0]}")
    return described


def read_flickr(path):
    """One text file of Flickr30K-CN, whose words have tags -> {picture id: (captions, where it is named first)}."""
    described = {}
    for found, place in rows_of(path, FLICKR, "a line like 1009692167#zhm#1 在:p 警车:n"):
        words = [re.sub(r"(?<=.):[A-Za-z][A-Za-z0-9]*$", "", word) for word in found[4].split()]    # the tag stands after the last colon
        described.setdefault(found[1], ([], place))[0].append("".join(words))
    return described


def with_pictures(described, folder, skip_missing):
    """What read_release found, and the pictures ID.jpg under a folder, at any depth -> [(split name, Release)]."""
    files, unread = data.picture_files(folder)
    if unread:
        raise BadInput(f"{folder / next(iter(unread))}: cannot be read ({next(iter(unread.values()))})")
    wanted, paths = {id_ for pictures in described.values() for id_ in pictures}, {}
    for file in files:
        id_, ending = os.path.splitext(os.path.basename(file))
        if id_ in wanted and ending.lower() in (".jpg", ".jpeg") and paths.setdefault(id_, folder / file) != folder / file:
            raise BadInput(f"{folder / file}: {paths[id_]} has the same name; which is meant? Leave one of them under {folder}")
    missing = [(id_, place) for pictures in described.values() for id_, (_, place) in pictures.items() if id_ not in paths]
    if missing:
        line = f"{len(missing):,} of {len(wanted):,} pictures are not under {folder}, the first {missing[0][0]}.jpg"
        if not skip_missing:
            raise BadInput(f"{line} ({Path(missing[0][1]).name}). Folders that are links are not looked into. "
                           "--skip-missing leaves them and their captions out")
        lost = sum(len(texts) for pictures in described.values() for id_, (texts, _) in pictures.items() if id_ not in paths)
        print(f"left out: {line}; {lost:,} captions with them")
    kept = {split: {id_: about for id_, about in pictures.items() if id_ in paths} for split, pictures in described.items()}
    return [(split, Release(split, pictures, paths)) for split, pictures in kept.items()]


def write_tsv(split, folder, name):
    """Write a split in the Chinese-CLIP layout: NAME_imgs.tsv and NAME_texts.jsonl. BadInput when a picture cannot be read."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise BadInput(f"{split.name}: the split's name becomes a part of file names; give it one of letters and digits")
    # the number in a picture's name is its id, if all have one and no two the same; else they are counted
    numbers = [re.fullmatch(r"(?:COCO_\w+_)?(\d{1,18})", str(id_)) for id_ in split.image_ids]      # COCO_val2014_000000043734 -> 43734
    ids = [int(found[1]) for found in numbers if found]
    ids = ids if len(set(ids)) == len(numbers) else list(range(len(numbers)))

    def fill(f):
        with system.Progress(f"{name}: pictures written", len(ids)) as progress:
            for i, number in enumerate(ids):
                try:
                    encoded = split.picture_bytes(i)
                except (OSError, ValueError) as error:                          # ValueError: base64
                    raise BadInput(f"{split.name}: picture {system.printable(split.image_ids[i])} cannot be read ({error}); "
                                   "replace or remove it") from None
                f.write(b"%d\t%s\n" % (number, base64.b64encode(encoded)))
                progress.add()

    system.write(folder / f"{name}_imgs.tsv", fill)
    records = ({"text_id": t, "text": text, "image_ids": [ids[i] for i in images]}
               for t, (text, images) in enumerate(zip(split.texts, split.positives)))
    system.write_text(folder / f"{name}_texts.jsonl", "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


# ---------------------------------------------------------------------------------------------------------------- check

ROOM = Config.context_length - 2                                                # tokens of a caption that are read, without [CLS] and [SEP]
# So many of 256 bits may differ between pictures that look alike: a JPEG written again at quality 60 differs by up to 6.
ALIKE = 6

# What is looked for, each kind with what it is called …
CLOSED = "splits that cannot be opened, or are cut short"
BROKEN = "pictures that cannot be read"
LEAKED = "pictures that are in two splits"
EMPTY = "captions that are empty or cannot be read"
SIMILAR = "pictures that look alike, in two splits"
TWICE = "pictures that are in one split twice"
SHARED = "captions that are in two splits"
LONG = f"captions longer than the {ROOM} tokens that are read; the rest is cut off"
UNKNOWN = "captions that are mostly [UNK]: characters that the model does not know"
SILENT = "pictures without a caption"
BLIND = "captions without a picture"
# … and whether it is wrong, or only worth knowing. In this order they are told.
KINDS = {CLOSED: True, BROKEN: True, LEAKED: True, EMPTY: True,
         SIMILAR: False, TWICE: False, SHARED: False, LONG: False, UNKNOWN: False, SILENT: False, BLIND: False}


@nothing_is_cut()
def check(name, data_root, processes, json_file):
    """Look at every picture and every caption of a data set, print what was found -> whether it is sound.

    Of each picture 56 bytes are kept in memory, of each caption 8. json_file: where all that was found is written, or None.
    """
    known, found, rows = data_name(name), {kind: [] for kind in KINDS}, []
    looks, sentences, texts, shown = {}, {}, {}, {}                             # of each split, for find_repeats
    for split_name in data.all_names(name, data_root):
        title = "all" if data.is_pattern(name) else split_name
        try:
            split = data.open_split(name, split_name, data_root)
            if split.endless:
                print(f"{title} is endless: not looked through")
                continue
            in_shards = isinstance(split, data.ShardSplit)
            count, read, shown[title], captions = (shard_content if in_shards else content)(split, title, found)
            sentences[title] = check_captions(title, captions, found)
            texts[title] = None if in_shards else split.texts
            looks[title] = check_pictures(title, count, read, shown[title], found, processes)
        except (BadInput, OSError) as error:
            found[CLOSED].append(f"{title}: {error}")
            continue
        different = np.unique(sentences[title]) if in_shards else sentences[title]                  # a shard has them pair by pair
        row = {"split": title, "pictures": count, "captions": len(different), "pairs": len(split)}
        rows.append(row | {"table_1": data.TABLE_1.get(known, {}).get(split_name)})
        against_paper = data.against_paper(known, split_name, len(split))
        print(f"{title:8} {count:8,} pictures {row['captions']:8,} captions {len(split):8,} pairs{against_paper}")
    for missing in sorted({"train", "valid", "test"} - {row["split"] for row in rows}) if not data.is_pattern(name) else ():
        print(f"note: there is no split {missing!r}, which {'evaluate.py' if missing == 'test' else 'train.py'} looks for")
    find_repeats(looks, sentences, texts, shown, found)
    for kind, lines in found.items():
        print(f"{'note: ' * (not KINDS[kind])}{kind}: {len(lines):,}")
        print("".join(f"    {line}\n" for line in lines[:10]), end="")
        if len(lines) > 10:
            print(f"    … and {len(lines) - 10:,} more")
    wrong = [f"{len(found[kind]):,} {kind}" for kind, serious in KINDS.items() if serious and found[kind]]
    if json_file is not None:
        content_of_file = {"data": name, "sound": not wrong, "splits": rows, "found": found}
        system.write_text(json_file, json.dumps(content_of_file, ensure_ascii=False, indent=1) + "\n")
    print(f"{name}: not sound: {'; '.join(wrong)}" if wrong else f"{name}: sound")
    return not wrong


def content(split, title, found):
    """-> number of pictures, read(i) their bytes, shown(i) their names, the captions as (name, text).

    Pictures and captions that stand alone go to `found`.
    """
    shown = lambda i: system.printable(split.image_ids[i])
    described = {i for images in split.positives for i in images}
    found[SILENT] += [f"{title}: picture {shown(i)}" for i in range(len(split.image_ids)) if i not in described]
    found[BLIND] += [f"{title}: caption {t + 1}: {quoted(split.texts[t])}" for t, images in enumerate(split.positives) if not images]
    return len(split.image_ids), split.picture_bytes, shown, ((f"caption {t + 1}", text) for t, text in enumerate(split.texts))


def shard_content(split, title, found):
    """The same of shards, whose captions are not kept in memory."""
    numbers = array.array("q")                                                  # of the pairs that have a picture, each picture once
    for s, path in enumerate(split.shards):
        _, image_size, _, text_size, _, which = data.opened_index(path)[1:].T
        numbers.extend((np.flatnonzero((image_size >= 0) & (which == 0)) + split.starts[s]).tolist())
        found[SILENT] += [f"{title}: {place_in(split, k + split.starts[s])}" for k in np.flatnonzero(text_size < 0)]
        found[BLIND] += [f"{title}: {place_in(split, k + split.starts[s])}" for k in np.flatnonzero((image_size < 0) & (which == 0))]
    found[CLOSED] += [f"{title}: {path}: damaged or cut short; replace it" for path in split.damaged]
    shown = lambda i: place_in(split, numbers[i])
    return len(numbers), functools.partial(shard_picture, split, numbers), shown, shard_captions(split, title, found)


def place_in(split, k):
    """The member of a shard that has pair k, in words."""
    where = split.where(k)
    return f"{system.printable(where['member'])} of {where['file']}"


def shard_picture(split, numbers, i):
    return split.pair_bytes(numbers[i])


def shard_captions(split, title, found):
    """(name, text) of each caption, read as they are asked for; what cannot be read goes to `found`."""
    for s, path in enumerate(split.shards):
        for k, (_, _, text, size, is_json, which) in enumerate(data.opened_index(path)[1:].tolist()):
            if size >= 0 and which == 0:
                name = place_in(split, k + split.starts[s])
                try:
                    for sentence in data.captions_in(data.read_at(path, text, size, name), is_json, name):
                        yield name, sentence
                except BadInput as error:
                    found[EMPTY].append(f"{title}: {error}")


def quoted(text):
    return system.printable(text[:40] + "…" * (len(text) > 40))


def check_captions(title, captions, found):
    """Look at (name, text) of each caption -> (T,) the keys of the sentences."""
    tokenizer, keys, captions = Tokenizer(), array.array("Q"), iter(captions)
    while some := list(itertools.islice(captions, 1000)):
        ids = tokenizer([text for _, text in some], ROOM + 3).numpy()           # one more than is read: whoever has that one is too long
        lengths, unknown = (ids != PAD).sum(1) - 2, (ids == UNK).sum(1)
        for (name, text), length, strange in zip(some, lengths.tolist(), unknown.tolist()):
            keys.append(data.sentence_key(text))
            if length == 0:
                found[EMPTY].append(f"{title}: {name}")
            elif 2 * strange > length:
                found[UNKNOWN].append(f"{title}: {name}: {quoted(text)}")
            if length > ROOM:
                length = int((tokenizer([text], 3 * len(text) + 2) != PAD).sum()) - 2
                found[LONG].append(f"{title}: {name}: {length:,} tokens: {quoted(text)}")
    return np.array(keys, np.uint64)


def look(read, numbers):
    """Of each picture a tuple: why it cannot be read or "", a key of its bytes, a key of its pixels, 32 bytes of what it looks like.

    (The last b"" when it is nearly flat.) Runs in the readers.
    """
    seen, key = [], lambda content: int.from_bytes(hashlib.md5(content).digest()[:8], "big")
    for i in numbers:
        encoded = functools.cache(functools.partial(read, i))
        try:
            picture = data.decoded(encoded, "it")
        except BadInput as error:
            seen.append((str(error), 0, 0, b""))
            continue
        # what it looks like: whether each of 16 x 16 places is brighter than its left neighbour
        grey = np.asarray(picture.convert("L").resize((17, 16), Image.Resampling.BOX)).astype(int)
        brighter = np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes()
        flat = grey.max() - grey.min() < 16
        seen.append(("", key(encoded()), key(repr(picture.size).encode() + picture.tobytes()), b"" if flat else brighter))
    return seen


def check_pictures(title, count, read, shown, found, processes):
    """Decode every picture, in `processes` processes; what cannot be read goes to `found`.

    -> of the others (n,) numbers, (n,) keys of the bytes, (n,) keys of the pixels, (n, 32) looks, zeros for nearly flat ones.
    """
    numbers, of_bytes, of_pixels, looks = array.array("Q"), array.array("Q"), array.array("Q"), bytearray()
    workers = processes * (processes > 1)
    loader = DataLoader(range(count), batch_size=32, collate_fn=functools.partial(look, read), num_workers=workers,
                        worker_init_fn=system.reader_start(), timeout=system.READER_SECONDS * (workers > 0))
    with system.Progress(f"{title}: pictures looked at", count) as progress:
        for i, (reason, bytes_key, pixels_key, brighter) in enumerate(itertools.chain.from_iterable(loader)):
            if reason:
                found[BROKEN].append(f"{title}: picture {shown(i)}: {reason}")
            else:
                numbers.append(i)
                of_bytes.append(bytes_key)
                of_pixels.append(pixels_key)
                looks += brighter or bytes(32)
            progress.add()
    looks = np.frombuffer(bytes(looks), np.uint8).reshape(-1, 32)
    return np.array(numbers, np.int64), np.array(of_bytes, np.uint64), np.array(of_pixels, np.uint64), looks


def repeated(keys):
    """keys {split: (n,)} -> for every key that comes several times its places: [[(split, index), …], …]."""
    names = list(keys) if any(map(len, keys.values())) else []
    if not names:
        return []
    split_of = np.concatenate([np.full(len(keys[name]), n) for n, name in enumerate(names)])        # of all keys, one split after the other
    index = np.concatenate([np.arange(len(keys[name])) for name in names])
    _, group, sizes = np.unique(np.concatenate([keys[name] for name in names]), return_inverse=True, return_counts=True)
    places = collections.defaultdict(list)
    for at in np.flatnonzero(sizes[group] > 1).tolist():
        places[int(group[at])].append((names[split_of[at]], int(index[at])))
    return list(places.values())


def find_repeats(looks, sentences, texts, shown, found):
    """What comes several times goes to `found`: the same pictures and captions in two splits, pictures twice in one, and pictures that
    look alike in two.

    looks: of each split what check_pictures gives; sentences: what check_captions gives; texts: its captions, or None.
    """
    named = lambda places: ", ".join(f"{split} {shown[split](looks[split][0][at])}" for split, at in places)
    for places in repeated({split: of_pixels for split, (_, _, of_pixels, _) in looks.items()}):
        how = "the same bytes" if len({int(looks[split][1][at]) for split, at in places}) == 1 else "the same pixels in other bytes"
        if len({split for split, _ in places}) > 1:
            found[LEAKED].append(f"{named(places)}: {how}")
        for split in dict(places):
            first, *others = [place for place in places if place[0] == split]
            found[TWICE] += [f"{named([first, other])}: {how}" for other in others]
    for places in repeated(sentences):
        if len({split for split, _ in places}) > 1:
            # the words of those in shards are not in memory
            text = next((f"{quoted(texts[split][t])}: " for split, t in places if texts[split]), "")
            found[SHARED].append(text + ", ".join(f"{split} caption {t + 1}" for split, t in places[:10]) + ", …" * (len(places) > 10))
    # bits as -1 and 1, (n, 32) bytes -> (n, 256): the product of two looks is 256 less twice the number of bits that differ
    signs = lambda bits: torch.from_numpy(np.unpackbits(bits, axis=1)).float() * 2 - 1
    for (one, (_, _, pixels, bits)), (other, (_, _, other_pixels, other_bits)) in itertools.combinations(looks.items(), 2):
        near = collections.defaultdict(list)                                    # picture of the second split -> those like it in the first
        for a, b in itertools.product(range(0, len(bits), 4096), range(0, len(other_bits), 4096)):
            products = signs(other_bits[b : b + 4096]) @ signs(bits[a : a + 4096]).T                # (4096, 4096) at most
            alike = products >= 256 - 2 * ALIKE
            for to, at in (alike.nonzero() + torch.tensor([b, a])).tolist():
                if pixels[at] != other_pixels[to] and bits[at].any() and other_bits[to].any():      # the same ones are told above
                    near[to].append(at)
        for to, some in near.items():
            others = f" and {len(some) - 1:,} more of {one}" * (len(some) > 1)
            found[SIMILAR].append(named([(other, to), (one, some[0])]) + others)


# ---------------------------------------------------------------------------------------------------------------- command line


def main():
    """The commands fetch, convert and check of data.py, whose own main hands them to this one."""
    parser = argparse.ArgumentParser(prog="data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("fetch", help="download a published data set and unpack it",
                              description="Download a published data set, unpack it, and say what it holds.")
    one.add_argument("name", choices=FETCHED)
    one.add_argument("--data-root", default="data", help="where the named data sets lie (default: data)")
    one = commands.add_parser(
        "convert", help="write an original release, or any layout, as a folder in the Chinese-CLIP layout or tar shards",
        description="Write the original COCO-CN or Flickr30K-CN release, or any layout that is read here, as a folder in the Chinese-CLIP "
                    "layout or as tar shards.")
    one.add_argument("source", help="an original release (a folder, .zip, .tar, .tar.gz or .tgz), a folder in any layout, or a pattern of "
                                    "tar shards")
    one.add_argument("dest", help="the folder to make")
    one.add_argument("--pictures", metavar="DIR", help="where the pictures of an original release are, ID.jpg at any depth")
    one.add_argument("--shards", action="store_true", help="write tar shards")
    one.add_argument("--skip-missing", action="store_true", help="leave out pictures that are not under --pictures, and their captions")
    one = commands.add_parser(
        "check", help="look at every picture and every caption",
        description="Look at every picture and every caption of a data set. Exit status 1 when pictures or captions cannot be read, "
                    "captions are empty, or a picture is in two splits.")
    one.add_argument("data", help=f"{', '.join([*data.NAMES, *data.PAINTED])}, a folder, or a pattern of tar shards")
    one.add_argument("--data-root", default="data", help="where the named data sets lie (default: data)")
    one.add_argument("--processes", type=int, default=1, help="that read pictures side by side (default: 1)")
    one.add_argument("--json", metavar="FILE", help="write all that was found, not only the first ten of each kind")
    args = parser.parse_args()
    if args.command == "fetch":
        return fetch(args.name, args.data_root)
    if args.command == "convert":
        return convert(args.source, args.dest, args.pictures, args.shards, args.skip_missing)
    if not 1 <= args.processes <= 512:
        raise BadInput(f"--processes {args.processes}: out of range, 1 to 512")
    system.check_place("--json", args.json)
    if not check(args.data, args.data_root, args.processes, args.json):
        sys.exit(1)
