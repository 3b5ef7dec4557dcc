"""Embeddings kept in a folder, so that they are computed once.

    image_embed, text_embed = Store(folder, made_of).load_or_compute(labels, compute)   # evaluate

    features = Features(folder, made_of, count, dim)    # stage 1
    features.complete(encode, say, stop)                # computes what is missing
    features[7]                                         # (D,) float16: the unit vector of image 7
"""
import contextlib
import functools
import hashlib
import itertools
import json
import os
import time
from pathlib import Path

import numpy as np
import torch

from support import system
from support.images import refused_as
from support.processes import all_gather_objects, all_reduce_max, barrier, rank_and_world
from support.system import BadInput

ROWS = 4096                                             # images in a part
BATCH = 128                                             # images at a time: so all parts round alike


class Store:
    """A folder of arrays and features.json, which says what they were made of.

    Arrays of another origin are refused. Each file is written whole or not at all.
    """

    def __init__(self, folder, made_of):
        """made_of: plain values by name, such as the weights' fingerprint and the precision."""
        self.folder, self.about = Path(folder), Path(folder) / "features.json"
        self.made_of = json.loads(json.dumps(made_of))  # as it is read again: tuples become lists
        self.unfinished = f".{os.getpid()}.part"        # two processes may write the same array
        self.rank, self.world_size = rank_and_world()

    def refused(self, reason):
        return BadInput(f"--features {self.folder}: {reason}; delete it or name another folder")

    def read_about(self):
        """The content of features.json. BadInput when it is damaged or says another origin."""
        with refused_as(f"--features {self.about}"):    # damage comes in many kinds
            about = json.loads(self.about.read_text(encoding="utf-8"))
            before = dict(about["made_of"])
        changed = [f"{key} {before.get(key)}, now it is {value}"
                   for key, value in self.made_of.items() if before.get(key) != value]
        if changed:
            raise self.refused(f"made of {'; '.join(changed)}")
        return about

    def make_folder(self):
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self.refused(error.strerror) from None

    def load_or_compute(self, labels, compute):
        """What an earlier call has kept here, or else compute(), which is kept -> [(I, D), (T, D)].

        labels: what the rows are, {"image_ids": names of images, "texts": captions}. All processes
        call it together. BadInput when the folder holds something else, or damaged arrays.
        """
        paths = [self.folder / "image_embed.npy", self.folder / "text_embed.npy"]
        if any(all_gather_objects(self.about.exists())):
            embeds, line = self.load(paths, labels), f"embeddings of {self.folder} used again"
        else:
            if self.rank == 0:
                self.make_folder()                      # before the work: it may be impossible
            embeds, line = compute(), f"embeddings kept in {self.folder}"
            if self.rank == 0:
                for path, x in zip(paths, embeds):
                    system.write(path, lambda f: np.save(f, x.numpy()), part=self.unfinished)
                about = {"made_of": self.made_of, "sha256": sha256_of(paths, embeds), **labels}
                system.write_json(self.about, about, part=self.unfinished)      # last: now complete
            barrier()                                   # other processes may read it now
        if self.rank == 0:
            print(line)
        return embeds

    def load(self, paths, labels):
        """What the folder holds -> [(I, D), (T, D)], checked."""
        about = self.read_about()
        with refused_as(f"--features {self.folder}: an array"):
            embeds = [torch.from_numpy(np.load(path)) for path in paths]
            found = {"sha256": sha256_of(paths, embeds), **labels}
        if any(about.get(key) != value for key, value in found.items()):
            raise self.refused("the .npy files are not those that features.json describes")
        return embeds


def sha256_of(paths, embeds):
    return {path.name: hashlib.sha256(x.contiguous().numpy()).hexdigest()
            for path, x in zip(paths, embeds)}


class Features(Store):
    """The embeddings of a split's images, for stage 1, whose vision tower is frozen.

    A row for each image, however many captions it has; NaN if it cannot be read. The parts
    000000.npy, 000001.npy, … hold 4,096 rows each. After a kill, whole parts are used again, and
    any number of processes computes the rest. Of several runs with one folder, one computes and the
    others wait. The object holds no open files, so it can be sent to readers.
    """

    def __init__(self, folder, made_of, count, dim):
        """count: images. dim: D."""
        super().__init__(folder, made_of)
        self.count, self.dim = count, dim
        self.parts = -(-count // ROWS)

    def images(self, n):
        """The numbers of the images of part n, a range."""
        return range(n * ROWS, min((n + 1) * ROWS, self.count))

    def path(self, n):
        return self.folder / f"{n:06}.npy"

    def __getitem__(self, i):
        """Image i -> (D,) float16."""
        n = i // ROWS
        part = opened_part(self.path(n), len(self.images(n)), self.dim)         # (rows, D), mapped
        return torch.from_numpy(np.array(part[i % ROWS]))                       # a copy

    def sample(self, split, k):
        """What split.sample(k) gives or raises, but with features (D,) float16 for the image."""
        i = split.image_of(k)
        words, row = split.words(k), self[i]
        if row.isnan().any():
            split.sample(k)                             # raises it if the file cannot be read
            split.image(i)                              # raises it if the image does not decode
            raise self.refused("an image could not be read when it was computed, now it can")
        return row, *words

    def missing(self):
        """Numbers of the parts that are missing or damaged; BadInput if of another origin."""
        own = range(self.rank, self.parts, self.world_size)
        if self.about.exists():
            self.read_about()
        elif any(self.path(n).exists() for n in own):
            raise self.refused("it has no features.json, so the origin of its parts is unknown")
        missing = []
        for n in own:
            with contextlib.suppress(OSError):
                rows = read_part(self.path(n), len(self.images(n)), self.dim)
                if (are_unit(rows) | np.isnan(rows).all(axis=1)).all():
                    continue
            missing.append(n)
        return sorted(n for share in all_gather_objects(missing) for n in share)

    def complete(self, encode, say, stop):
        """Compute what is missing. All processes call it together.

        encode(batches), ranges of images, yields for each (numbers of the images that can be read,
        their embeddings (b, D), …). say(line) prints once for all processes. stop() is called by
        all processes together, before each batch; it raises SystemExit after a signal. BadInput
        when the folder cannot be written or embeddings are not finite.
        """
        done = "used again"
        if self.missing():                              # a complete folder may be read-only
            with self.lock(say, stop):
                missing = self.missing()                # another run may have computed some
                if self.rank == 0:
                    system.write_json(self.about, {"made_of": self.made_of}, part=self.unfinished)
                self.compute(missing[self.rank :: self.world_size], encode, stop)
                barrier()                               # all parts are written
            if missing:
                done = f"{len(missing):,} of {self.parts:,} parts computed"
        opened_part.cache_clear()                       # a part may be another file by now
        size = 2 * self.dim * self.count / 2**20
        say(f"features of {self.count:,} images in {self.folder}, {size:,.1f} MiB: {done}")

    def lock(self, say, stop):
        """Wait until no other run computes here -> what is to be closed after the work."""
        for second in itertools.count():
            lock = None
            if self.rank == 0:
                self.make_folder()
                lock = system.lock(self.folder / "lock")
            if all_gather_objects(lock is not None)[0]:
                return lock or contextlib.nullcontext()         # the first process has the lock
            if second == 0:
                say(f"{self.folder}: another run computes features there; this one waits for them")
            time.sleep(1)
            stop()

    def compute(self, parts, encode, stop):
        """Compute and write this process's share of the parts."""
        batches = []
        for n in parts:
            images = self.images(n)
            batches += [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
        most, embedded = all_reduce_max(len(batches)), zip(batches, encode(batches))
        for n in parts:
            rows = np.full((len(self.images(n)), self.dim), np.nan, np.float16)
            for _ in range(0, len(rows), BATCH):
                stop()
                batch, (numbers, embed, _) = next(embedded)                     # embed: (b, D)
                if not are_unit(embed.numpy()).all():
                    raise BadInput(f"{self.folder}: the embeddings of images {batch[0]} to "
                                   f"{batch[-1]} are not finite; check the weights or try "
                                   "--precision fp32")
                rows[[i % ROWS for i in numbers]] = embed.numpy()
            system.write(self.path(n), lambda f: np.save(f, rows), part=self.unfinished)
        for _ in range(len(batches), most):          # all processes call stop() equally often
            stop()


def are_unit(rows):
    """(N, D) -> (N,): which rows are unit vectors, up to rounding."""
    return abs(np.linalg.norm(rows.astype(np.float32), axis=1) - 1) < 1e-2


def read_part(path, rows, dim):
    """A part's rows (rows, dim) float16, mapped.

    OSError when it is damaged: BadInput would count as one more image that cannot be read.
    """
    try:
        part = np.load(path, mmap_mode="r")
        if part.shape != (rows, dim) or part.dtype != np.float16:
            raise ValueError(f"{part.dtype} {part.shape}")
        return part
    except Exception as error:                          # damage comes in many kinds
        raise OSError(f"{path}: not the features that were there ({type(error).__name__}: {error})"
                      "; the same command computes them again") from None


opened_part = functools.lru_cache(maxsize=128)(read_part)               # each is an open file
