"""Find your own images by a Chinese sentence or by another image.

    python -m tools.search --ckpt cn-clip-vit-b-16 --images ~/Pictures "海边的日落"
    python -m tools.search --ckpt cn-clip-vit-b-16 --images ~/Pictures "海边的日落" --html found.html
    python -m tools.search --ckpt runs/own/best.pt --images ~/Pictures --image query.jpg
    python -m tools.search --ckpt runs/own/best.pt --images ~/Pictures     # type queries

The first call embeds every image of the folder, at any depth; later calls only what is new or has
changed. The index lies in CE_CLIP_CACHE (default ~/.cache/ce-clip); nothing is written among the
images. An image that cannot be read is skipped and counted.
"""
import argparse
import contextlib
import functools
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

from support import report, system                  # before torch: see support/__init__.py

import numpy as np
import torch

import checkpoint
from evaluate import embed_images, embed_texts, encode_images, own_batches
from support.captions import is_text
from support.images import decoded, image_at, image_files
from support.processes import precision_of
from support.system import BadInput
from tokenizer import Tokenizer

BATCH = 64                                                      # images embedded at a time


class Index:
    """The embeddings of a folder's images, kept for the next call.

    images    {path relative to the folder: (stamp, its embedding (D,) float16)}; a stamp is
              [size, time of change in ns, None] of the file that was embedded
    embed     (n, D) float32, in the order of `images`; after update
    """

    def __init__(self, folder, weights):
        """weights: checkpoint.fingerprint of the model; another model has another index."""
        name = hashlib.md5(os.fsencode(folder.resolve()) + weights.encode()).hexdigest()
        self.folder, self.place = folder, system.cache_folder() / "search" / f"{name}.npz"
        self.images = {}
        try:
            with np.load(self.place) as content:
                stamps, embed = json.loads(content["files"].tobytes()), content["embed"]
            self.images = dict(zip(stamps, zip(stamps.values(), embed, strict=True)))
        except FileNotFoundError:
            pass
        except Exception:                                       # damage comes in many kinds
            print(f"the index {self.place} is damaged; it is made anew", file=sys.stderr)

    def matrix(self):
        return np.stack([row for _, row in self.images.values()])              # (n, D) float16

    def write(self):
        self.place.parent.mkdir(parents=True, exist_ok=True)
        stamps = json.dumps({path: stamp for path, (stamp, _) in self.images.items()})
        content = {"files": np.frombuffer(stamps.encode(), np.uint8), "embed": self.matrix()}
        # Two calls at the same time do not write into one file; the later one counts.
        system.write(self.place, lambda f: np.savez(f, **content), part=f".{os.getpid()}.part")

    def update(self, model, autocast, workers):
        """Embed images that are new or changed, forget those that are gone, and say how many.

        Raises BadInput when there is no image. An interrupted call keeps what it has embedded.
        """
        now, before = stamps_of_images(self.folder), self.images
        dim = model.cfg.embed_dim
        self.images = {path: before[path] for path in now if path in before
                       and before[path][0] == now[path] and before[path][1].shape == (dim,)}
        todo = [path for path in now if path not in self.images]
        gone, unreadable, saved = before.keys() - now.keys(), {}, time.monotonic()
        read = functools.partial(image_at, todo, folder=self.folder)
        batches, device = own_batches(len(todo), BATCH), model.logit_scale.device
        encoded = encode_images(model, read, batches, device, autocast, workers)
        try:
            for numbers, embed, reasons in encoded:
                if not embed.isfinite().all():
                    raise BadInput("the embeddings hold NaN or infinity: damaged weights?")
                for i, row in zip(numbers, embed.half().numpy()):
                    self.images[todo[i]] = now[todo[i]], row
                unreadable |= reasons
                if time.monotonic() > saved + 60:                    # a minute
                    self.write()
                    saved = time.monotonic()
        finally:
            # An empty folder, perhaps of a disk that is not there, does not cost the index.
            if self.images and (gone or len(todo) > len(unreadable)):
                self.write()
        if unreadable:
            first = next(iter(unreadable.values()))
            print(f"{len(unreadable):,} images left out; the first: {first}", file=sys.stderr)
        if not self.images:
            raise BadInput(f"{self.folder}: no image to search in")
        print(f"{self.folder}: {len(self.images):,} images, {len(todo) - len(unreadable):,} new or "
              f"changed, {len(gone):,} gone", file=sys.stderr)
        self.embed = torch.from_numpy(self.matrix()).float()


def stamps_of_images(folder):
    """{path relative to the folder: [size, time of change in ns, None]} of its images."""
    paths, unread = image_files(folder)
    for place, reason in unread.items():
        print(f"{folder / place}: cannot be read ({reason})", file=sys.stderr)
    stamps = {}
    for path in paths:
        status = os.stat(folder / path)
        stamps[path] = [status.st_size, status.st_mtime_ns, None]
    return stamps


def main():
    args = parse_args()
    image = None if args.image is None else decoded(Path(args.image).read_bytes, args.image)
    signal.signal(signal.SIGTERM, signal.default_int_handler)   # as Ctrl-C: what is embedded stays

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, _ = checkpoint.load(args.ckpt, device)
    autocast, _ = precision_of("auto", device, evaluating=True)
    index = Index(args.images, checkpoint.fingerprint(model))
    index.update(model, autocast, args.workers)
    if image is not None:
        query = embed_images(model, lambda i: image, 1, device, autocast)[0]    # (D,)
        show(query, args.image, index, args, image)
        return
    tokenizer = Tokenizer("the query")
    for sentence in typed_queries() if args.query is None else [args.query]:
        if not is_text(sentence):
            raise BadInput("the query is not UTF-8")
        ids = tokenizer([sentence], model.cfg.context_length).numpy()           # (1, L)
        show(embed_texts(model, ids, autocast)[0], sentence, index, args)


def parse_args():
    parser = argparse.ArgumentParser(prog="python -m tools.search", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("query", nargs="?", help="a sentence; without it or --image, type queries")
    parser.add_argument("--ckpt", required=True, help="a checkpoint or a name of released weights")
    parser.add_argument("--images", required=True, type=Path, metavar="DIR",
                        help="the folder to search, with everything in it")
    parser.add_argument("--image", metavar="FILE", help="an image to find similar ones of")
    parser.add_argument("--top", type=int, default=10, help="images to show (default: 10)")
    parser.add_argument("--html", metavar="FILE.html", help="write them as a contact sheet, too")
    parser.add_argument("--workers", type=int, default=1, help="reading processes (default: 1)")
    args = parser.parse_args()
    if not args.images.is_dir():
        raise BadInput(f"--images {args.images}: there is no such folder")
    if args.query is not None and (args.image is not None or not args.query.strip()):
        raise BadInput("name either a sentence that is not empty, or --image FILE")
    if args.image is not None and not Path(args.image).is_file():
        raise BadInput(f"--image {args.image}: there is no such file")
    if args.top < 1 or args.workers < 0:
        raise BadInput(f"--top {args.top} --workers {args.workers}: expected 1 or more, 0 or more")
    system.check_place("--html", args.html)
    return args


def show(query, title, index, args, query_image=None):
    """Print the images most similar to a query (D,); write the contact sheet of --html."""
    values, rows = (index.embed @ query).sort(descending=True, stable=True)                 # (n,)
    paths, folder = list(index.images), index.folder
    found = [(paths[row], x) for row, x in zip(rows[: args.top].tolist(), values.tolist())]
    for place, (path, similarity) in enumerate(found, 1):
        print(f"{place:3}  {similarity:.3f}  {system.printable(folder / path)}")
    if args.html is not None:
        note = f"Cosine similarities by {args.ckpt}; {len(paths):,} images in {folder.resolve()}."
        report.write_sheet(args.html, title, note, folder, found, query_image)
        print(f"wrote {args.html}", file=sys.stderr)


def typed_queries():
    """Yields the sentences that a person types, or that stdin holds, until its end."""
    sys.stdin.reconfigure(errors="surrogateescape")             # main refuses what is not UTF-8
    prompt = "find (Ctrl-D ends): " if sys.stdin.isatty() else ""
    with contextlib.suppress(ImportError):
        import readline                                         # noqa: F401  arrow keys
    with contextlib.suppress(EOFError):
        while True:
            if sentence := input(prompt).strip():
                yield sentence


if __name__ == "__main__":
    system.run(main)
