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
from evaluate import embed_texts, encode_images
from support.captions import is_text
from support.images import ENDINGS, decoded, image_at, image_files
from support.processes import own_batches, precision_of
from support.system import BadInput
from tokenizer import Tokenizer

SAVE_SECONDS = 60                                               # a growing index is saved so often


class Index:
    """The embeddings of a folder's images.

    files    {path relative to the folder: [size, time of change in ns, why it cannot be read or
             None]}, in the order of the rows
    embed    (n, D) float16, zeros for what cannot be read
    """

    def __init__(self, folder, weights):
        """weights: checkpoint.fingerprint of the model; another model has another index."""
        name = hashlib.md5(os.fsencode(folder.resolve()) + weights.encode()).hexdigest()
        self.folder, self.place = folder, system.cache_folder() / "search" / f"{name}.npz"
        self.files, self.embed = {}, None

    def read(self, width):
        """What an earlier call has left, if its embeddings are `width` = D wide; else nothing."""
        self.embed = np.empty((0, width), np.float16)
        try:
            with np.load(self.place) as content:
                files, embed = json.loads(content["files"].tobytes()), content["embed"]
            sound = embed.shape == (len(files), width) and embed.dtype == np.float16
            for size, changed, reason in files.values():
                sound &= type(size) is type(changed) is int
                sound &= reason is None or isinstance(reason, str)
            if not sound or not np.isfinite(embed).all():
                raise ValueError("not what was written there")
            self.files, self.embed = files, embed
        except FileNotFoundError:
            pass
        except Exception:                                       # damage comes in many kinds
            print(f"the index {self.place} is damaged; it is made anew", file=sys.stderr)

    def write(self):
        """Keep the index for the next call. Raises BadInput when that is impossible."""
        try:
            self.place.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"{self.place.parent}: the index cannot be kept there "
                           f"({error.strerror}); name another folder in CE_CLIP_CACHE") from None
        files = np.frombuffer(json.dumps(self.files).encode(), np.uint8)
        # Two calls at the same time do not write into one file; the later one counts.
        system.write(self.place, lambda f: np.savez(f, files=files, embed=self.embed),
                     part=f".{os.getpid()}.part")

    def update(self, encode):
        """Look at the folder again: forget what is gone, embed what is new, has changed or could
        not be read. -> (how many images are new or changed, how many are gone).

        encode(paths) yields (paths, embeddings, {path: reason}). Raises BadInput without images.
        """
        now = self.look()
        if not now:
            raise BadInput(f"{self.folder}: no image to search in; their names end in "
                           f"{', '.join(sorted(ENDINGS))}")
        before, row_of = self.files, {path: row for row, path in enumerate(self.files)}
        same = [path for path in now if before.get(path) == [*now[path], None]]
        todo = [path for path in now if before.get(path) != [*now[path], None]]
        self.embed = self.embed[[row_of[path] for path in same]]
        self.files = {path: before[path] for path in same}

        rows, saved = [self.embed], time.time()                 # rows: to concatenate
        try:
            for paths, embed, unreadable in encode(todo):
                rows.append(embed.half().numpy())
                rows.append(np.zeros((len(unreadable), embed.shape[1]), np.float16))
                self.files |= {path: [*now[path], None] for path in paths}
                self.files |= {path: [*now[path], reason] for path, reason in unreadable.items()}
                if time.time() > saved + SAVE_SECONDS:
                    rows = [np.concatenate(rows)]
                    self.embed = rows[0]
                    self.write()
                    saved = time.time()
        finally:
            # Ctrl-C may have come after rows grew and before files did.
            self.embed = np.concatenate(rows)[: len(self.files)]
            if self.files != before:
                self.write()
        fresh = sum(before.get(path, [])[:2] != now[path] for path in todo)
        return fresh, len(before.keys() - now.keys())

    def look(self):
        """The images in the folder now: {path: [size, time of change in ns]}."""
        now = {}
        paths, unread = image_files(self.folder)
        for path in paths:
            with contextlib.suppress(OSError):                  # just deleted, or a link to nowhere
                status = os.stat(self.folder / path)
                now[path] = [status.st_size, status.st_mtime_ns]
        for place, reason in unread.items():                    # a disk that does not respond
            print(f"{self.folder / place}: cannot be read ({reason}); what was indexed of it stays",
                  file=sys.stderr)
            for path, (size, changed, _) in self.files.items():
                if path.startswith(place + os.sep):
                    now.setdefault(path, [size, changed])
        return now

    def unreadable(self):
        """{path: reason}"""
        return {path: reason for path, (*_, reason) in self.files.items() if reason}


def best(query, embed, readable, count):
    """The `count` most similar images of a query: [(row, cosine similarity), …], best first.

    query (D,), embed (n, D) float32, readable (n,) bool. Equal ones keep the order of the rows.
    """
    similarity = torch.where(readable, embed @ query, -torch.inf)               # (n,)
    similarity, rows = similarity.sort(descending=True, stable=True)
    count = min(count, int(readable.sum()))
    return list(zip(rows[:count].tolist(), similarity[:count].tolist()))


def main():
    args = parse_args()
    folder = Path(args.images).expanduser()
    query_image = None
    if args.image is not None:
        query_image = decoded(Path(args.image).read_bytes, args.image)
    signal.signal(signal.SIGTERM, signal.default_int_handler)   # as Ctrl-C: what is embedded stays

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, transform = checkpoint.load(args.ckpt, device)
    autocast, precision = precision_of("auto", device, evaluating=True)
    index = Index(folder, checkpoint.fingerprint(model))
    index.read(model.cfg.embed_dim)
    update(index, model, args, device, autocast, precision)
    tokenizer = Tokenizer("the query")

    def by_text(sentence):
        ids = tokenizer([sentence], model.cfg.context_length).numpy()           # (1, L)
        show(embed_texts(model, ids, autocast)[0], sentence, index, args)

    if query_image is not None:
        with torch.no_grad(), autocast():
            pixels = transform(query_image)[None].to(device)                    # (1, 3, R, R)
            query = model.encode_image(pixels).float().cpu()                    # (1, D)
        show(query[0], args.image, index, args, query_image)
    elif args.query is not None:
        by_text(args.query)
    else:
        for sentence in typed_queries():
            by_text(sentence)


def parse_args():
    parser = argparse.ArgumentParser(prog="python -m tools.search", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("query", nargs="?",
                        help="a sentence; without one, and without --image, type queries")
    parser.add_argument("--ckpt", required=True,
                        help="a checkpoint: a file, a folder, or the name of released weights")
    parser.add_argument("--images", required=True, metavar="DIR",
                        help="the folder to search, with everything in it")
    parser.add_argument("--image", metavar="FILE", help="an image to find similar ones of")
    parser.add_argument("--top", type=int, default=10, help="images to show (default: 10)")
    parser.add_argument("--html", metavar="FILE.html", help="write them as a contact sheet, too")
    parser.add_argument("--batch-size", type=int, default=64, help="images at a time (default: 64)")
    parser.add_argument("--workers", type=int, default=1, help="reading processes (default: 1)")
    args = parser.parse_args()
    if not args.images or not Path(args.images).expanduser().is_dir():
        raise BadInput(f"--images {args.images}: there is no such folder")
    if args.query is not None and args.image is not None:
        raise BadInput(f"{args.query!r} and --image {args.image}: name a sentence or an image")
    if args.query is not None and not (args.query.strip() and is_text(args.query)):
        raise BadInput("the query is empty or not UTF-8; write a sentence, or leave it out")
    limits = {"top": (1, 1000), "batch_size": (1, 100_000), "workers": (0, 512)}
    for name, (low, high) in limits.items():
        flag, value = "--" + name.replace("_", "-"), getattr(args, name)
        if not low <= value <= high:
            raise BadInput(f"{flag} {value}: out of range, {low} to {high:,}")
    system.check_place("--html", args.html)
    return args


def update(index, model, args, device, autocast, precision):
    """Bring the index up to date and say what was done."""
    def encode(paths):
        read = functools.partial(image_at, paths, folder=index.folder)
        batches = own_batches(len(paths), args.batch_size)
        encoded = encode_images(model, read, batches, device, autocast, args.workers)
        for numbers, embed, unreadable in encoded:
            if not embed.isfinite().all():
                raise BadInput(f"{args.ckpt}: its embeddings hold NaN or infinity: the weights "
                               f"are damaged, or too large for {precision}")
            reasons = {paths[i]: reason for i, reason in unreadable.items()}
            yield [paths[i] for i in numbers], embed, reasons

    fresh, gone = index.update(encode)
    bad = index.unreadable()
    count = len(index.files) - len(bad)
    said = ""
    if bad:
        said = f" and {len(bad):,} that cannot be read (the first: {next(iter(bad.values()))})"
    if count == 0:
        raise BadInput(f"{index.folder}: no image to search in, only {said.removeprefix(' and ')}")
    print(f"{index.folder}: {count:,} images{said}; {fresh:,} new or changed, {gone:,} gone",
          file=sys.stderr)


def show(query, title, index, args, query_image=None):
    """Print the best images of a query (D,); write the contact sheet, if --html names one."""
    embed = torch.from_numpy(index.embed).float()                               # (n, D)
    readable = torch.tensor([reason is None for *_, reason in index.files.values()])        # (n,)
    paths, folder = list(index.files), index.folder
    found = [(paths[row], similarity)
             for row, similarity in best(query, embed, readable, args.top)]
    for place, (path, similarity) in enumerate(found, 1):
        print(f"{place:3}  {similarity:.3f}  {system.printable(folder / path)}")
    if args.html is not None:
        note = (f"{int(readable.sum()):,} images in {folder.resolve()}, searched by {args.ckpt}. "
                "The figures are cosine similarities.")
        report.write_sheet(
            args.html, title, note, found, lambda path: image_at([path], 0, folder),
            lambda path: (folder / path).resolve().as_uri(), query_image)
        print(f"wrote {args.html}", file=sys.stderr)


def typed_queries():
    """Yields the sentences that a person types, or that stdin holds, until its end."""
    prompt = "find: " if sys.stdin.isatty() else ""
    if prompt:
        print("Write what the image shows; Ctrl-D ends.", file=sys.stderr)
    with contextlib.suppress(ImportError):
        import readline                                         # noqa: F401  arrow keys
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")
    while True:
        try:
            sentence = input(prompt).strip()
        except EOFError:
            return
        if not is_text(sentence):
            print("this is not UTF-8", file=sys.stderr)
        elif sentence:
            yield sentence


if __name__ == "__main__":
    system.run(main)
