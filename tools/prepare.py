"""Data sets: get them, convert them, look through them, paint them.

    python -m tools.prepare fetch coco-cn                   # or flickr30k-cn -> data/COCO-CN
    python -m tools.prepare convert coco-cn-version1805v1.1.tar.gz data/COCO-CN --images mscoco
    python -m tools.prepare convert folder my-shards --shards           # any layout -> tar shards
    python -m tools.prepare check coco-cn --processes 4     # exit status 1: something is wrong
    python -m tools.prepare counts coco-cn                  # what each split holds
    python -m tools.prepare shards coco-cn my-shards        # tar shards; continues after a kill
    python -m tools.prepare sheet coco-cn sheet.png         # draw some of the images
    python -m tools.prepare paint landscapes                # -> data/landscapes, for a first try

DATA is a known name, a folder in any layout that data.py reads, or a pattern of tar shards.
A folder that fetch, convert or paint makes is there whole or not at all. Beside it an empty
file .NAME.lock stays, by which a second process waits for the first.
"""
import argparse
import base64
import contextlib
import io
import json
import re
import shlex
import sys
import warnings
from pathlib import Path

from PIL import Image

import data
from data import data_name, open_split
from support import painter, system
from support.images import refused_as
from support.shard_writer import write_shards
from support.shards import ShardSplit, is_pattern
from support.system import BadInput, filled_beside
from support.tables import against_paper
from tools import landscapes
from tools.check import check
from tools.releases import open_release, unpack, with_images

HUB = "OFA-Sys/chinese-clip-eval"               # the data set on the Hugging Face hub that has …
FETCHED = ("coco-cn", "flickr30k-cn")           # … these, as COCO-CN.zip and Flickr30k-CN.zip


def main():
    args = parse_args()
    warnings.filterwarnings("ignore", ".*captions are longer than")         # nothing is cut here
    if args.command == "fetch":
        fetch(args.name, args.data_root)
    elif args.command == "convert":
        convert(args.source, Path(args.dest), args.images, args.shards, args.skip_missing,
                args.data_root, args.allow_outside)
    elif args.command == "check":
        system.check_place("--json", args.json)
        if not check(args.data, args.data_root, args.processes, args.json, args.allow_outside):
            sys.exit(1)
    elif args.command == "counts":
        print("\n".join(counts(args.data, args.data_root, None, args.allow_outside)))
    elif args.command == "shards":
        for name in [args.split] if args.split else data.all_names(args.data, args.data_root):
            split = open_split(args.data, name, args.data_root, allow_outside=args.allow_outside)
            write_shards(split, args.dest, name, processes=args.processes)
        print(f"No image was decoded; python -m tools.prepare check {args.dest} looks at all. "
              f"Train on them with --data {args.dest}")
    elif args.command == "sheet":
        draw_sheet(open_split(args.data, args.split, args.data_root,
                              allow_outside=args.allow_outside), args.file)
    elif args.command == "paint":
        folder = Path(args.folder or Path(args.data_root) / data.NAMES[args.name])
        sets = {"demo": painter.DEMO, **landscapes.SETS}
        painter.write_folder(folder, args.name, sets[args.name])
        print("\n".join([f"{folder}:", *counts(folder)]))


def parse_args():
    parser = argparse.ArgumentParser(prog="python -m tools.prepare", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    root = argparse.ArgumentParser(add_help=False)
    root.add_argument("--data-root", default="data",
                      help="the folder of the known data sets (default: data)")
    outside = argparse.ArgumentParser(add_help=False, parents=[root])
    outside.add_argument("--allow-outside", action="store_true",
                         help="read images outside the data's folder, too: paths, links")
    known = argparse.ArgumentParser(add_help=False, parents=[outside])
    known.add_argument("data", metavar="DATA",
                       help=f"{', '.join(data.NAMES)}, a folder, or a pattern of tar shards")

    def add(name, text, parent=known):
        return commands.add_parser(name, help=text, description=text, parents=[parent])

    one = add("fetch", "download a published data set and unpack it", root)
    one.add_argument("name", choices=FETCHED)
    one = add("convert", "write an original release, or any layout, as Chinese-CLIP's layout or "
              "tar shards", outside)
    one.add_argument("source", help="DATA as for the other commands; or, with --images, an "
                     "original release: a folder, .zip, .tar, .tar.gz or .tgz")
    one.add_argument("dest", help="the folder to make")
    one.add_argument("--images", "--pictures", metavar="DIR",
                     help="the images of an original release: ID.jpg, at any depth")
    one.add_argument("--shards", action="store_true", help="write tar shards")
    one.add_argument("--skip-missing", action="store_true",
                     help="leave out images that are not in --images, and their captions")
    one = add("check", "look at every image and caption; exit status 1 when something is wrong")
    one.add_argument("--processes", type=int, default=1, help="how many read images (default: 1)")
    one.add_argument("--json", metavar="FILE", help="write all findings, not ten of each kind")
    add("counts", "say what each split holds")
    one = add("shards", "write a data set as tar shards; continues after a kill")
    one.add_argument("dest", help="the folder of the shards")
    one.add_argument("--split", help="the only split to write (default: all)")
    one.add_argument("--processes", type=int, default=1, help="how many write (default: 1)")
    one = add("sheet", "draw a sheet of up to 24 images and print a caption of each")
    one.add_argument("file", metavar="FILE.png")
    one.add_argument("--split", default="test", help="(default: test)")
    one = add("paint", "paint a data set for a first try", root)
    one.add_argument("name", choices=data.PAINTED)
    one.add_argument("folder", nargs="?", help="the folder to make (default: data/NAME)")
    args = parser.parse_args()
    if not 1 <= getattr(args, "processes", 1) <= 512:
        raise BadInput(f"--processes {args.processes}: out of range, 1 to 512")
    return args


def fetch(name, data_root):
    """Download a published set, unpack it in data_root, print what it holds.

    A folder that is there stays as it is. A zip beside its place is used instead of the download.
    """
    folder = Path(data_root) / data.NAMES[name]
    archive = folder.with_name(folder.name + ".zip")
    with filled_beside(folder) as part:                     # a second process waits here
        if folder.exists():
            print(f"{folder} is there already")
            return
        if not archive.exists():
            by_hand = (f"put it at {archive}. From the original release python -m tools.prepare "
                       "convert makes the same")
            archive = system.download(HUB, archive.name, by_hand, repo_type="dataset")
        remedy = f"Delete {archive.resolve()} and run this again"
        unpack(archive, part, remedy)
        made = {path.parent for path in part.rglob("[!.]*_imgs.tsv")}       # macOS adds ._names
        if len(made) != 1:
            raise BadInput(f"{archive}: {len(made)} of its folders have *_imgs.tsv, instead of "
                           f"one; is it the archive of {name}? {remedy}")
        made = made.pop()
        try:
            lines = counts(made, name=name)
        except BadInput as error:
            message = str(error).replace(str(made), str(archive))
            raise BadInput(f"{message}. {remedy}") from None
        made.rename(folder)
    print("\n".join([f"{folder}: unpacked. {archive.resolve()} is no longer needed", *lines]))
    root = "" if data_root == "data" else f" --data-root {data_root}"
    print(f"Next: python -m tools.prepare check {name}{root}; "
          f"then python train.py --recipe {name}-base --micro-batch 256{root}")


def convert(source, dest, images, shards, skip_missing, data_root, allow_outside):
    """Write a data set in the Chinese-CLIP layout, or as tar shards, to the new folder `dest`.

    `images`: of an original release, the folder of its images; `skip_missing` leaves out those that
    it lacks. The bytes of images do not change. Raises BadInput, and then nothing is at `dest`.
    """
    taken = dest.exists() and (not dest.is_dir() or any(dest.iterdir()))
    if taken or dest.is_symlink() or dest.is_mount():       # the folder comes by renaming
        raise BadInput(f"{dest} is there already; name a new folder")
    if images is None and source.endswith((".zip", ".tgz", ".gz")):
        raise BadInput(f"{source}: without images; name their folder with --images")
    with filled_beside(dest) as part:
        name, new = data_name(source), part / "new"
        new.mkdir()
        if images is not None:
            name, captions = open_release(Path(source), part / "unpacked")
            splits = with_images(captions, Path(images), skip_missing, allow_outside)
        else:
            splits = ((one, open_split(source, one, data_root, allow_outside=allow_outside))
                      for one in data.all_names(source, data_root))
        for split_name, split in splits:
            if shards:
                with contextlib.redirect_stdout(io.StringIO()):     # it names a temporary folder
                    write_shards(split, new, split_name, whole=True)
            else:
                write_tsv(split, new, split_name)
        new.rename(dest)
    print("\n".join(counts(dest, name=name)))
    print(f"Next: python -m tools.prepare check {shlex.quote(str(dest))}")


def write_tsv(split, folder, name):
    """Write a split in the Chinese-CLIP layout. Raises BadInput when an image cannot be read."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise BadInput(f"{split.name}: the split's name becomes a part of file names; "
                       "give it one of letters and digits")
    ids = numeric_ids(split.image_ids)

    def fill(f):
        with system.progress(f"{name}: images written", len(ids)) as progress:
            for i, number in enumerate(ids):
                with refused_as(f"{split.name}: image {system.printable(split.image_ids[i])}"):
                    encoded = split.image_bytes(i)
                f.write(b"%d\t%s\n" % (number, base64.b64encode(encoded)))
                progress.update()

    system.write(folder / f"{name}_imgs.tsv", fill)
    lines = []
    for t, (text, images) in enumerate(zip(split.texts, split.positives)):
        record = {"text_id": t, "text": text, "image_ids": [ids[i] for i in images]}
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    system.write_text(folder / f"{name}_texts.jsonl", "".join(lines))


def numeric_ids(names):
    """A number for each image: that in its name, if all have one and all differ; else 0, 1, …"""
    found = [re.fullmatch(r"(?:COCO_\w+_)?(\d{1,18})", str(name)) for name in names]
    numbers = [int(match[1]) for match in found if match]   # COCO_val2014_000000043734 -> 43734
    return numbers if len(set(numbers)) == len(names) else list(range(len(names)))


# ---- counts, sheet


def counts(source, data_root="data", name=None, allow_outside=False):
    """A line for each split of a data set: what it holds, beside the paper's table 1.

    `name`: the name of the set in that table, if not that of the source.
    """
    lines = []
    for split_name in data.all_names(source, data_root):
        split = open_split(source, split_name, data_root, allow_outside=allow_outside)
        if isinstance(split, ShardSplit):
            line = (f"{len(split.shards):8,} shards   {len(split):8,} pairs, "
                    f"{split.incomplete():,} of them without image or caption")
        else:
            line = (f"{len(split.image_ids):8,} images {len(split.texts):8,} captions "
                    f"{len(split):8,} pairs")
        title = "all" if is_pattern(source) else split_name
        paper = against_paper(name or data_name(source), split_name, len(split))
        lines.append(f"{title:8} {line}{paper}")
    return lines


def draw_sheet(split, path):
    """Draw up to 24 images that have a caption, evenly out of the split, six in a row."""
    caption_of = {}                                         # image -> its first caption
    for text, images in zip(split.texts, split.positives):
        for i in images:
            caption_of.setdefault(i, text)
    described = sorted(caption_of)
    if not described:
        raise BadInput(f"{split.name}: no caption names an image, so there is nothing to draw")
    count = min(24, len(described))
    sheet = Image.new("RGB", (min(6, count) * 134, -(-count // 6) * 134), "white")
    for n in range(count):
        i = described[n * len(described) // count]
        row, column = divmod(n, 6)
        sheet.paste(split.image(i).resize((128, 128)), (column * 134, row * 134))
        line = f"row {row + 1}, column {column + 1}: image {split.image_ids[i]}: {caption_of[i]}"
        print(system.printable(line))
    try:
        sheet.save(path)
    except (OSError, ValueError, KeyError) as error:        # KeyError: Pillow cannot write the kind
        raise BadInput(f"{path}: cannot be written ({error})") from None
    print(f"wrote {path}")


if __name__ == "__main__":
    system.run(main)
