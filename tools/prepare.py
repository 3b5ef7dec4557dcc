"""Getting the data: published sets from the web, original releases in a layout that is read here, a look through all before training.

    python -m tools.prepare fetch coco-cn                            # or flickr30k-cn: downloaded and unpacked -> data/COCO-CN
    python -m tools.prepare convert coco-cn-version1805v1.1.tar.gz data/COCO-CN --images /path/to/mscoco         # an original release
    python -m tools.prepare convert /path/to/folder my-shards --shards                                    # any layout that is read here
    python -m tools.prepare check coco-cn --processes 4              # every image and caption; exit status 1 when something is wrong

A folder that is made here is there whole or not at all: it is filled beside its place, under its name + .ce-clip-part, and then
renamed. What a killed run left there the next one removes.
"""
import argparse
import base64
import contextlib
import io
import json
import os
import re
import shlex
import sys
from pathlib import Path

from PIL import Image

import data
from data import data_name
from support import system
from support.captions import caption_file
from support.folders import filled_beside
from support.shard_writer import write_shards
from support.shards import ShardSplit, is_pattern, split_shards
from support.system import BadInput
from support.tables import against_paper
from tools.check import check, nothing_is_cut
from tools.releases import is_release, read_release, unpack, with_images

# What the Hugging Face data set OFA-Sys/chinese-clip-eval has, as COCO-CN.zip and Flickr30k-CN.zip.
FETCHED = ("coco-cn", "flickr30k-cn")


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
            raise BadInput(f"{error} (its place is {archive}). Of the original release python -m tools.prepare convert makes the same") from None
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
    print(f"Next: python -m tools.prepare check {name}{place}; then python train.py --recipe {name}-base --micro-batch 256{place}. "
          f"{archive.name} is no longer needed.")


def holds(folder, name):
    """Lines: what each split of a folder holds, beside table 1 of the paper for the set of this name."""
    splits = ((split_name, data.open_split(folder, split_name)) for split_name in data.split_names(folder))
    return [summary(split_name, split) + against_paper(name, split_name, len(split)) for split_name, split in splits]


@nothing_is_cut()
def convert(source, dest, images, shards, skip_missing):
    """Write a data set, in any form, to the new folder `dest`, and say what it holds. The images' bytes stay as they are.

    In the Chinese-CLIP layout, or with `shards` as tar shards. `images`: the folder of an original release's images; with
    `skip_missing` those that are not there are left out. BadInput when that cannot be, and nothing is left at `dest`.
    """
    path, dest, name = Path(source), Path(dest), data_name(source)
    if not source or os.path.lexists(dest) and (dest.is_symlink() or not dest.is_dir() or any(dest.iterdir())):
        raise BadInput(f"{dest} is there already; name a new folder" if source else "convert '': name a data set")
    by_name = path.name.lower().endswith((".zip", ".tgz", ".tar.gz"))
    packed = path.is_file() and (by_name or is_pattern(source) and is_release(path))
    folder = None if packed or is_pattern(source) else data.find(source)
    original = packed or folder and not (caption_file(folder) or any(folder.glob("[!.]*_imgs.tsv")) or split_shards(folder))
    if original and (images is None or not Path(images).is_dir()):
        raise BadInput(f"--images {images}: there is no such folder" if images else
                       f"{source}: an original release has no images, and no other layout was found there; "
                       "name the folder of the images (MSCOCO's, or Flickr30K's) with --images")
    if not original and (images is not None or skip_missing):
        raise BadInput(f"{source}: it holds its own images; --images and --skip-missing are for the original COCO-CN and Flickr30K-CN")
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
            splits = with_images(described, Path(images), skip_missing)
        else:
            splits = ((split_name, data.open_split(source, split_name)) for split_name in data.all_names(source))
        for split_name, split in splits:
            if shards:
                with contextlib.redirect_stdout(io.StringIO()):                 # it would name the folder that is being filled
                    write_shards(split, new, split_name, whole=True)
            else:
                write_tsv(split, new, split_name)
        os.replace(new, dest)
    print("\n".join(holds(dest, name)))
    print(f"Next: python -m tools.prepare check {shlex.quote(str(dest))}")


def write_tsv(split, folder, name):
    """Write a split in the Chinese-CLIP layout: NAME_imgs.tsv and NAME_texts.jsonl. BadInput when a image cannot be read."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise BadInput(f"{split.name}: the split's name becomes a part of file names; give it one of letters and digits")
    # the number in a image's name is its id, if all have one and no two the same; else they are counted
    numbers = [re.fullmatch(r"(?:COCO_\w+_)?(\d{1,18})", str(id_)) for id_ in split.image_ids]      # COCO_val2014_000000043734 -> 43734
    ids = [int(found[1]) for found in numbers if found]
    ids = ids if len(set(ids)) == len(numbers) else list(range(len(numbers)))

    def fill(f):
        with system.progress(f"{name}: images written", len(ids)) as progress:
            for i, number in enumerate(ids):
                try:
                    encoded = split.image_bytes(i)
                except (OSError, ValueError) as error:                          # ValueError: base64
                    raise BadInput(f"{split.name}: image {system.printable(split.image_ids[i])} cannot be read ({error}); "
                                   "replace or remove it") from None
                f.write(b"%d\t%s\n" % (number, base64.b64encode(encoded)))
                progress.update()

    system.write(folder / f"{name}_imgs.tsv", fill)
    records = ({"text_id": t, "text": text, "image_ids": [ids[i] for i in images]}
               for t, (text, images) in enumerate(zip(split.texts, split.positives)))
    system.write_text(folder / f"{name}_texts.jsonl", "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


# ---------------------------------------------------------------------------------------------------------------- command line


def main():
    args = parse_args()
    if args.command == "fetch":
        fetch(args.name, args.data_root)
    elif args.command == "convert":
        convert(args.source, args.dest, args.images, args.shards, args.skip_missing)
    elif args.command == "check":
        system.check_place("--json", args.json)
        if not check(args.data, args.data_root, args.processes, args.json):
            sys.exit(1)
    elif args.command == "counts":
        counts(args.data, args.data_root)
    elif args.command == "shards":
        shards(args.data, args.dest, args.data_root, args.split, args.per_shard, args.processes)
    elif args.command == "sheet":
        draw_sheet(data.open_split(args.data, args.split, args.data_root), args.file)


def parse_args():
    parser = argparse.ArgumentParser(prog="python -m tools.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    known = f"{', '.join(data.NAMES)}, a folder, or a pattern of tar shards"

    def add(name, text):
        one = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name != "convert":
            one.add_argument("--data-root", default="data", help="where the named data sets lie (default: data)")
        return one

    one = add("fetch", "download a published data set and unpack it")
    one.add_argument("name", choices=FETCHED)
    one = add("convert", "write an original release, or any layout, as a folder in the Chinese-CLIP layout or tar shards")
    one.add_argument("source", help="an original release (a folder, .zip, .tar, .tar.gz or .tgz), a folder in any layout, or a pattern of "
                                    "tar shards")
    one.add_argument("dest", help="the folder to make")
    one.add_argument("--images", "--pictures", metavar="DIR", help="where the images of an original release are, ID.jpg at any depth")
    one.add_argument("--shards", action="store_true", help="write tar shards")
    one.add_argument("--skip-missing", action="store_true", help="leave out images that are not under --images, and their captions")
    one = add("check", "look at every image and every caption; exit status 1 when something is wrong")
    one.add_argument("data", help=known)
    one.add_argument("--processes", type=int, default=1, help="that read images side by side (default: 1)")
    one.add_argument("--json", metavar="FILE", help="write all that was found, not only the first ten of each kind")
    one = add("counts", "say what each split holds")
    one.add_argument("data", help=known)
    one = add("shards", "write a data set as tar shards")
    one.add_argument("data", help=known)
    one.add_argument("dest", help="the folder of the shards")
    one.add_argument("--split", help="the only split to write (default: all)")
    one.add_argument("--per-shard", type=int, default=10_000, help="images in a shard (default: 10000)")
    one.add_argument("--processes", type=int, default=1, help="that write shards side by side (default: 1)")
    one = add("sheet", "draw a sheet of up to 24 images and print a caption of each")
    one.add_argument("data", help=known)
    one.add_argument("file", metavar="FILE.png")
    one.add_argument("--split", default="test", help="(default: test)")
    args = parser.parse_args()
    for name, most in (("per_shard", 1e7), ("processes", 512)):
        value = getattr(args, name, 1)
        if not 1 <= value <= most:
            raise BadInput(f"--{name.replace('_', '-')} {value}: out of range, 1 to {most:g}")
    return args


def counts(name, data_root):
    for split_name in data.all_names(name, data_root):
        split = data.open_split(name, split_name, data_root)
        print(summary("all" if is_pattern(name) else split_name, split) + against_paper(name, split_name, len(split)))


def shards(name, dest, data_root, only, per_shard, processes):
    names = data.all_names(name, data_root)
    for split_name in [only] if only else names:
        write_shards(data.open_split(name, split_name, data_root), dest, split_name, per_shard, processes)
    print(f"Train on them with --data {dest}")


def summary(name, split):
    """A line: what a split holds."""
    if isinstance(split, ShardSplit):
        return f"{name:8} {len(split.shards):8,} shards   {len(split):8,} pairs, {split.incomplete():,} of them without image or caption"
    return f"{name:8} {len(split.image_ids):8,} images {len(split.texts):8,} captions {len(split):8,} pairs"


def draw_sheet(split, path):
    """Up to 24 images that have a caption, evenly out of the split, six in a row; prints a caption of each."""
    caption_of = {}                                                             # each image's first caption
    for text, images in zip(split.texts, split.positives):
        for i in images:
            caption_of.setdefault(i, text)
    described = sorted(caption_of)
    if not described:
        raise BadInput(f"{split.name}: no caption names a image, so there is nothing to draw")
    count = min(24, len(described))
    chosen = [described[n * len(described) // count] for n in range(count)]
    cell = lambda n: (n // 6, n % 6)                                            # row, column of the n-th one
    sheet = Image.new("RGB", (min(6, count) * 134, -(-count // 6) * 134), "white")
    for n, i in enumerate(chosen):
        row, column = cell(n)
        sheet.paste(split.image(i).resize((128, 128)), (column * 134, row * 134))
    try:
        sheet.save(path)
    except (OSError, ValueError, KeyError) as error:                            # KeyError: a format that Pillow reads but cannot write
        raise BadInput(f"--draw {path}: cannot be written ({error})") from None
    for n, i in enumerate(chosen):
        row, column = cell(n)
        print(f"row {row + 1}, column {column + 1}: image {split.image_ids[i]}: {caption_of[i]}")
    print(f"wrote {path}")


if __name__ == "__main__":
    system.run(main)
