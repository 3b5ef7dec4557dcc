"""Find your own images by a Chinese sentence, or by another image: the trained model put to use.

    python -m tools.search --ckpt cn-clip-vit-b-16 --images ~/Pictures "海边的日落"
    python -m tools.search --ckpt cn-clip-vit-b-16 --images ~/Pictures "海边的日落" --html found.html        # a contact sheet for the browser
    python -m tools.search --ckpt runs/own/best.pt --images ~/Pictures --image query.jpg                # images like this one
    python -m tools.search --ckpt runs/own/best.pt --images ~/Pictures                                  # asks for queries, again and again

The first call embeds every image of the folder, at any depth; later ones only what is new or has changed. The index lies in
CE_CLIP_CACHE (default ~/.cache/ce-clip); nothing is written among the images. A image that cannot be read is skipped and
counted.
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

import numpy as np
import torch

import checkpoint
from evaluate import embed_texts, encode_images
from support import report, system
from support.captions import is_text
from support.images import ENDINGS, decoded, image_at, image_files
from support.processes import own_batches, precision_of
from support.system import BadInput
from tokenizer import Tokenizer

SAVE_SECONDS = 60                                                               # between two savings of a growing index


class Index:
    """The embeddings of a folder's images. Which file has which row, and whether it is still the same file: `files` says it.

    files    {path relative to the folder: [size, time of change in ns, why it could not be read, or None]}, in the order of the rows
    embed    (n, D) float16, zeros for what could not be read
    """

    def __init__(self, folder, weights):
        """`weights`: checkpoint.fingerprint of the model. Another model has another index."""
        name = hashlib.md5(os.fsencode(folder.resolve()) + weights.encode()).hexdigest()
        self.folder, self.place = folder, system.cache_folder() / "search" / f"{name}.npz"
        self.files, self.embed = {}, None

    def read(self, width):
        """What an earlier call has left, if its embeddings are `width` = D wide; else the index begins empty."""
        self.embed = np.empty((0, width), np.float16)
        try:
            with np.load(self.place) as content:
                files, embed = json.loads(content["files"].tobytes()), content["embed"]
            if embed.shape != (len(files), width) or embed.dtype != np.float16 or not np.isfinite(embed).all():
                raise ValueError("not an index of these files")
            for size, changed, reason in files.values():
                if not (type(size) is type(changed) is int and (reason is None or isinstance(reason, str))):
                    raise ValueError("not what was written there")
            self.files, self.embed = files, embed
        except FileNotFoundError:
            pass
        except Exception:                                                       # cut short or overwritten, in one of many ways
            print(f"the index {self.place} is damaged; it is made anew", file=sys.stderr)

    def write(self):
        """Keep the index for the next call. Raises BadInput when that cannot be."""
        try:
            self.place.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"{self.place.parent}: the index cannot be kept there ({error.strerror}); "
                           "name another folder in CE_CLIP_CACHE") from None
        files = np.frombuffer(json.dumps(self.files).encode(), np.uint8)
        # of two calls on one folder, each with a part of its own, the later one counts
        system.write(self.place, lambda f: np.savez(f, files=files, embed=self.embed), part=f".{os.getpid()}.part")

    def update(self, encode):
        """Look at the folder again: forget what has gone, embed what is new or has changed, try again what could not be read.

        -> (how many images were new or changed, how many have gone). Raises BadInput when there is none.

        encode(paths) yields (paths, embeddings, {path: reason}).
        """
        # 1. what lies there now: {path: [size, time of change]}
        now, (paths, unread) = {}, image_files(self.folder)
        for path in paths:
            with contextlib.suppress(OSError):                                  # gone this moment, or a link to nowhere
                status = os.stat(self.folder / path)
                now[path] = [status.st_size, status.st_mtime_ns]
        for place, reason in unread.items():                                    # a disk that does not answer: what was there may come back
            print(f"{self.folder / place}: cannot be read ({reason}); what was indexed of it stays", file=sys.stderr)
            inside = place + os.sep
            now |= {path: about[:2] for path, about in self.files.items() if path.startswith(inside) and path not in now}
        if not now:
            raise BadInput(f"{self.folder}: no image to search in; their names end in {', '.join(sorted(ENDINGS))}")

        # 2. what of the index stays. The rest is to do, also what could not be read: a right may have been given, a disk come back
        before, row_of = self.files, {path: row for row, path in enumerate(self.files)}
        same = [path for path in now if self.files.get(path) == [*now[path], None]]
        todo = [path for path in now if self.files.get(path) != [*now[path], None]]
        fresh = sum(self.files.get(path, [])[:2] != now[path] for path in todo)
        gone = len(self.files.keys() - now.keys())
        self.embed = self.embed[[row_of[path] for path in same]]
        self.files = {path: self.files[path] for path in same}
        # 3. embed the rest, saving now and then; an interrupted call goes on from there
        rows, saved = [self.embed], time.time()                                 # rows: to be joined, each (some, D)
        try:
            for paths, embed, unreadable in encode(todo):
                rows += [embed.half().numpy(), np.zeros((len(unreadable), embed.shape[1]), np.float16)]
                self.files |= {path: [*now[path], None] for path in paths}
                self.files |= {path: [*now[path], reason] for path, reason in unreadable.items()}
                if time.time() > saved + SAVE_SECONDS:
                    rows = [np.concatenate(rows)]
                    self.embed = rows[0]
                    self.write()
                    saved = time.time()
        finally:
            self.embed = np.concatenate(rows)[: len(self.files)]                # Ctrl-C may have come after rows grew and before files did
            if self.files != before:
                self.write()
        return fresh, gone

    def unreadable(self):
        """{path: reason}"""
        return {path: reason for path, (*_, reason) in self.files.items() if reason}


def best(query, embed, readable, count):
    """The `count` most similar images of a query -> [(row, cosine similarity), …], best first; equal ones in the order of the rows.

    query (D,), embed (n, D) float32, readable (n,) bool.
    """
    similarity = torch.where(readable, embed @ query, -torch.inf)               # (n,)
    similarity, rows = similarity.sort(descending=True, stable=True)
    count = min(count, int(readable.sum()))
    return list(zip(rows[:count].tolist(), similarity[:count].tolist()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("query", nargs="?", help="a sentence; without one, and without --image, queries are asked for")
    parser.add_argument("--ckpt", required=True, help="a checkpoint: a file, a folder, or the name of released weights (see checkpoint.py)")
    parser.add_argument("--images", required=True, metavar="DIR", help="the folder to search, with everything in it")
    parser.add_argument("--image", metavar="FILE", help="a image to find similar ones of")
    parser.add_argument("--top", type=int, default=10, help="how many images to show (default: 10)")
    parser.add_argument("--html", metavar="FILE.html", help="write them as a contact sheet, too")
    parser.add_argument("--batch-size", type=int, default=64, help="images embedded at a time (default: 64)")
    parser.add_argument("--workers", type=int, default=1, help="processes that read images (default: 1)")
    args = parser.parse_args()
    folder = Path(args.images).expanduser()
    if not args.images or not folder.is_dir():
        raise BadInput(f"--images {args.images}: there is no such folder")
    if args.query is not None and args.image is not None:
        raise BadInput(f"{args.query!r} and --image {args.image}: ask with a sentence or with a image")
    if args.query is not None and not (args.query.strip() and is_text(args.query)):
        raise BadInput("the query is empty or not UTF-8; write a sentence, or leave it out and be asked for one")
    limits = (("--top", args.top, 1, 1000), ("--batch-size", args.batch_size, 1, 100_000), ("--workers", args.workers, 0, 512))
    for flag, value, low, high in limits:
        if not low <= value <= high:
            raise BadInput(f"{flag} {value}: out of range, {low} to {high:,}")
    system.check_place("--html", args.html)
    asked = decoded(Path(args.image).read_bytes, args.image) if args.image is not None else None

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, transform = checkpoint.load(args.ckpt, device)
    autocast, precision = precision_of("auto", device, evaluating=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)                   # as Ctrl-C: what is embedded by then is kept
    tokenizer = Tokenizer("the query")

    def encode(paths):
        read = functools.partial(image_at, paths, folder=folder)
        batches = own_batches(len(paths), args.batch_size)
        for numbers, embed, unreadable in encode_images(model, read, batches, device, autocast, args.workers):
            if not embed.isfinite().all():
                raise BadInput(f"{args.ckpt}: its embeddings hold NaN or infinity: the weights are damaged, or too large for {precision}")
            yield [paths[i] for i in numbers], embed, {paths[i]: reason for i, reason in unreadable.items()}

    index = Index(folder, checkpoint.fingerprint(model))
    index.read(model.cfg.embed_dim)
    fresh, gone = index.update(encode)
    bad = index.unreadable()
    if len(bad) == len(index.files):
        raise BadInput(f"{folder}: no image to search in, for none of the {len(bad):,} can be read; "
                       f"the first: {next(iter(bad.values()))}")
    unread = f" and {len(bad):,} that cannot be read (the first: {next(iter(bad.values()))})" if bad else ""
    print(f"{folder}: {len(index.files) - len(bad):,} images{unread}; {fresh:,} new or changed, {gone:,} gone", file=sys.stderr)
    embed = torch.from_numpy(index.embed).float()                               # (n, D)
    readable = torch.tensor([about[2] is None for about in index.files.values()])                   # (n,)
    paths = list(index.files)

    def show(query, title):                                                     # query (D,)
        found = [(paths[row], similarity) for row, similarity in best(query, embed, readable, args.top)]
        for place, (path, similarity) in enumerate(found, 1):
            print(f"{place:3}  {similarity:.3f}  {system.printable(folder / path)}")
        if args.html is not None:
            note = (f"{len(index.files) - len(bad):,} images in {folder.resolve()}, searched by {args.ckpt}. "
                    "The figures are cosine similarities.")
            read = lambda path: decoded((folder / path).read_bytes, path)
            address = lambda path: (folder / path).resolve().as_uri()
            report.write_sheet(args.html, title, note, found, read, address, asked)
            print(f"wrote {args.html}", file=sys.stderr)

    def by_text(sentence):
        ids = tokenizer([sentence], model.cfg.context_length).numpy()           # (1, L)
        show(embed_texts(model, ids, autocast)[0], sentence)

    if asked is not None:
        with torch.no_grad(), autocast():
            query = model.encode_image(transform(asked)[None].to(device)).float().cpu()
        return show(query[0], args.image)
    if args.query is not None:
        return by_text(args.query)
    if sys.stdin.isatty():
        print("Write what the image shows; Ctrl-D ends.", file=sys.stderr)
    with contextlib.suppress(ImportError):
        import readline                                                         # noqa: F401  arrow keys at the prompt
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")
    while True:
        try:
            sentence = input("find: " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not is_text(sentence):
            print("this is not UTF-8", file=sys.stderr)
        elif sentence:
            by_text(sentence)


if __name__ == "__main__":
    system.run(main)
