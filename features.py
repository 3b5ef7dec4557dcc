"""Embeddings of the training pictures, computed once: with them at hand a step of stage 1 costs the text tower alone.

In stage 1 the vision tower is frozen, so without augmentation each picture has the same embedding in every epoch.

    features = Features("runs/stage1/features", model, split, "fp32")
    features.complete(model, split, …)          # computes what is missing, by all processes together
    features[7]                                 # (D,) float16: the unit vector of picture 7 of the split, NaN when it cannot be read

The folder holds parts 000000.npy, 000001.npy, … with 4,096 rows each, one row for each picture, however many captions it has:
2 D bytes. features.json says what they were made of. A part is written whole or not at all, so after a kill those that are
there stay, and any number of processes goes on; of several runs that share a folder one computes and the others wait for it.
(Not the folder of evaluate.py --features: that has the embeddings of one split's pictures and captions, for other tools.)
"""
import functools
import json
import os
import time
from pathlib import Path

import numpy as np
import torch

import checkpoint
import system
from evaluate import encode_pictures, read_about
from processes import from_all, rank_and_world
from system import is_locked

ROWS = 4096                                                                     # pictures in a part
BATCH = 128                                                                     # pictures at a time: always these, so parts round alike


class Features:
    """One row for each picture of a split. It holds names and sizes alone, so it can be sent to readers; they open the parts."""

    def __init__(self, folder, model, split, precision):
        """`precision`: the name of what the vision tower computes in; features of another one are others."""
        sizes = {name: getattr(model.cfg, name) for name in checkpoint.TOWER_SIZES["vision"]}
        self.folder, self.count, self.dim = Path(folder), split.picture_count(), model.cfg.embed_dim
        self.parts = -(-self.count // ROWS)
        self.rank, self.world = rank_and_world()
        made_of = {"vision tower": checkpoint.fingerprint(model.vision), **sizes,
                   "data": split.fingerprint(), "pictures": self.count, "precision": precision}
        self.made_of = json.loads(json.dumps(made_of))                          # as it is read again: tuples become lists

    def pictures(self, n):
        """The pictures of part n, a range."""
        return range(n * ROWS, min((n + 1) * ROWS, self.count))

    def path(self, n):
        return self.folder / f"{n:06}.npy"

    def __getitem__(self, i):
        """Picture i -> (D,) float16"""
        n = i // ROWS
        part = opened_part(self.path(n), len(self.pictures(n)), self.dim)                           # (rows, D), mapped
        return torch.from_numpy(np.array(part[i % ROWS]))                                           # array: a copy

    def sample(self, split, k):
        """Training pair k as split.sample gives it, but for the features of the picture, (D,) float16, in its place.

        Raises the same BadInput for a pair that cannot be read.
        """
        words, row = split.words(k), self[split.picture_of(k)]
        if row.isnan().any():
            # it could not be read then; now one of these two raises BadInput with the reason: the file, or what is in it
            split.sample(0, k)
            split.picture(split.picture_of(k))
            raise system.BadInput(f"{self.folder}: when the features were computed, the picture could not be read; now it can. "
                                  "Delete the folder, it will be made again")
        return row, *words

    def missing(self):
        """Numbers of the parts that are not there, or damaged; each process looks at its share of them.

        Raises BadInput when the folder holds something else.
        """
        own = range(self.rank, self.parts, self.world)
        if (self.folder / "features.json").exists():
            read_about(self.folder, self.made_of)
        elif any(self.path(n).exists() for n in own):
            raise system.BadInput(f"--features {self.folder}: it has no features.json, so nobody knows what its parts were made of; "
                                  "delete it or name another folder")
        return sorted(sum(from_all([n for n in own if not self.is_sound(n)]), []))

    def is_sound(self, n):
        """Whether part n is there, and each row a unit vector, or NaN throughout."""
        try:
            rows = read_part(self.path(n), len(self.pictures(n)), self.dim)
        except OSError:
            return False
        return bool((are_unit(rows) | np.isnan(rows).all(axis=1)).all())

    def complete(self, model, split, device, autocast, workers, say, stop):
        """Compute what is missing, all processes together; the vision tower is in evaluation mode.

        say(line) prints once for all processes. stop() is called by all of them together, again and again: it raises SystemExit
        when a signal has come. Raises BadInput when the folder cannot be written, or embeddings are not finite.
        """
        computed = 0
        if self.missing():                                                      # else the folder may even be one that cannot be written
            lock = self.alone(say, stop)
            computed = len(todo := self.missing())                              # what another run has left of it
            if self.rank == 0:
                content = json.dumps({"made_of": self.made_of}, ensure_ascii=False, indent=1)
                system.write_text(self.folder / "features.json", content + "\n")
            self.compute(todo[self.rank :: self.world], model, split, device, autocast, workers, stop)
            from_all(None)                                                      # all have written theirs
            if lock:
                lock.close()
        opened_part.cache_clear()                                               # what was opened before may be another file by now
        say(f"features of {self.count:,} pictures in {self.folder}, {2 * self.dim * self.count / 2**20:,.1f} MiB: "
            + (f"{computed:,} of {self.parts:,} part{'s' * (self.parts > 1)} computed" if computed else "used again"))

    def alone(self, say, stop):
        """Wait until no other run computes here -> the lock, which the first process holds for all (the others: None)."""
        lock, waited = None, False
        if self.rank == 0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                lock = open(self.folder / "lock", "w")
            except OSError as error:
                raise system.BadInput(f"--features {self.folder}: {error.strerror}; name another folder, or none") from None
        while not from_all(is_locked(lock))[0]:
            if not waited:
                say(f"{self.folder}: another run computes features there; this one waits for them")
            waited = True
            time.sleep(1)
            stop()
        return lock

    def compute(self, parts, model, split, device, autocast, workers, stop):
        """This process's share: whole parts, by their numbers."""
        batches = []
        for pictures in map(self.pictures, parts):
            batches += [range(start, min(start + BATCH, pictures.stop)) for start in pictures[::BATCH]]
        embedded, rows = encode_pictures(model, split.picture, batches, device, autocast, workers), []
        for k in range(max(from_all(len(batches)))):                            # in step with the others, that none waits long for another
            stop()
            if k >= len(batches):
                continue
            batch, (numbers, embed, _) = batches[k], next(embedded)                                 # embed (pictures that can be read, D)
            if not are_unit(embed.numpy()).all():
                raise system.BadInput(f"{split.name}: the embeddings of pictures {batch.start} to {batch.stop - 1} are not finite; "
                                      "look at the vision tower's weights, or try --precision fp32")
            rows.append(np.full((len(batch), self.dim), np.nan, np.float16))
            rows[-1][[i - batch.start for i in numbers]] = embed.numpy()
            n = batch.start // ROWS
            if batch.stop == self.pictures(n).stop:                             # the part is complete
                system.write(self.path(n), lambda f: np.save(f, np.concatenate(rows)), part=f".{os.getpid()}.part")
                rows = []
        embedded.close()


def are_unit(rows):
    """(N, D) -> (N,): whether a row is a unit vector, but for rounding."""
    return abs(np.linalg.norm(rows.astype(np.float32), axis=1) - 1) < 1e-2


def read_part(path, rows, dim):
    """-> (rows, dim) float16, mapped.

    Raises OSError when it is anything else: BadInput would count as one more picture that cannot be read.
    """
    try:
        part = np.load(path, mmap_mode="r")
        if (part.shape, part.dtype) != ((rows, dim), np.float16):
            raise ValueError(f"{part.dtype} {part.shape}")
        return part
    except Exception as error:                                                  # damage comes in many kinds
        raise OSError(f"{path}: not the features that were there ({type(error).__name__}: {error}); "
                      "run the same command again, it computes them again") from None


opened_part = functools.lru_cache(maxsize=128)(read_part)                       # each is an open file
