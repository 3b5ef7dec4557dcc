"""Embeddings of the training images, computed once: with them at hand a step of stage 1 costs the text tower alone.

In stage 1 the vision tower is frozen, so without augmentation each image has the same embedding in every epoch.

    features = Features("runs/stage1/features", model, split, "fp32")
    features.complete(model, split, …)          # computes what is missing, by all processes together
    features[7]                                 # (D,) float16: the unit vector of image 7 of the split, NaN when it cannot be read

The folder holds parts 000000.npy, 000001.npy, … with 4,096 rows each, one row for each image, however many captions it has:
2 D bytes. features.json says what they were made of. A part is written whole or not at all, so after a kill those that are
there stay, and any number of processes goes on; of several runs that share a folder one computes and the others wait for it.
(Not the folder of evaluate.py --features: that has the embeddings of one split's images and captions, for other tools.)
"""
import functools
import hashlib
import json
import os
import time
from pathlib import Path

import numpy as np
import torch

from support import system, weights
from support.formats import TOWER_SIZES
from support.processes import all_gather_objects, rank_and_world
from support.system import BadInput, is_locked

ROWS = 4096                                                                     # images in a part
BATCH = 128                                                                     # images at a time: always these, so parts round alike


class Features:
    """One row for each image of a split. It holds names and sizes alone, so it can be sent to readers; they open the parts."""

    def __init__(self, folder, model, split, precision):
        """`precision`: the name of what the vision tower computes in; features of another one are others."""
        sizes = {name: getattr(model.cfg, name) for name in TOWER_SIZES["vision"]}
        self.folder, self.count, self.dim = Path(folder), split.image_count(), model.cfg.embed_dim
        self.parts = -(-self.count // ROWS)
        self.rank, self.world = rank_and_world()
        made_of = {"vision tower": weights.fingerprint(model.vision), **sizes,
                   "data": split.fingerprint(), "images": self.count, "precision": precision}
        self.made_of = json.loads(json.dumps(made_of))                          # as it is read again: tuples become lists

    def images(self, n):
        """The images of part n, a range."""
        return range(n * ROWS, min((n + 1) * ROWS, self.count))

    def path(self, n):
        return self.folder / f"{n:06}.npy"

    def __getitem__(self, i):
        """Image i -> (D,) float16"""
        n = i // ROWS
        part = opened_part(self.path(n), len(self.images(n)), self.dim)                           # (rows, D), mapped
        return torch.from_numpy(np.array(part[i % ROWS]))                                           # array: a copy

    def sample(self, split, k):
        """Training pair k as split.sample gives it, but for the features of the image, (D,) float16, in its place.

        Raises the same BadInput for a pair that cannot be read.
        """
        words, row = split.words(k), self[split.image_of(k)]
        if row.isnan().any():
            # it could not be read then; now one of these two raises BadInput with the reason: the file, or what is in it
            split.sample(0, k)
            split.image(split.image_of(k))
            raise system.BadInput(f"{self.folder}: when the features were computed, the image could not be read; now it can. "
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
        return sorted(sum(all_gather_objects([n for n in own if not self.is_sound(n)]), []))

    def is_sound(self, n):
        """Whether part n is there, and each row a unit vector, or NaN throughout."""
        try:
            rows = read_part(self.path(n), len(self.images(n)), self.dim)
        except OSError:
            return False
        return bool((are_unit(rows) | np.isnan(rows).all(axis=1)).all())

    def complete(self, encode, split, say, stop):
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
            self.compute(todo[self.rank :: self.world], encode, split, stop)
            all_gather_objects(None)                                                      # all have written theirs
            if lock:
                lock.close()
        opened_part.cache_clear()                                               # what was opened before may be another file by now
        say(f"features of {self.count:,} images in {self.folder}, {2 * self.dim * self.count / 2**20:,.1f} MiB: "
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
        while not all_gather_objects(is_locked(lock))[0]:
            if not waited:
                say(f"{self.folder}: another run computes features there; this one waits for them")
            waited = True
            time.sleep(1)
            stop()
        return lock

    def compute(self, parts, encode, split, stop):
        """This process's share: whole parts, by their numbers."""
        batches = []
        for images in map(self.images, parts):
            batches += [range(start, min(start + BATCH, images.stop)) for start in images[::BATCH]]
        embedded, rows = encode(batches), []
        for k in range(max(all_gather_objects(len(batches)))):                            # in step with the others, that none waits long for another
            stop()
            if k >= len(batches):
                continue
            batch, (numbers, embed, _) = batches[k], next(embedded)                                 # embed (images that can be read, D)
            if not are_unit(embed.numpy()).all():
                raise system.BadInput(f"{split.name}: the embeddings of images {batch.start} to {batch.stop - 1} are not finite; "
                                      "look at the vision tower's weights, or try --precision fp32")
            rows.append(np.full((len(batch), self.dim), np.nan, np.float16))
            rows[-1][[i - batch.start for i in numbers]] = embed.numpy()
            n = batch.start // ROWS
            if batch.stop == self.images(n).stop:                             # the part is complete
                system.write(self.path(n), lambda f: np.save(f, np.concatenate(rows)), part=f".{os.getpid()}.part")
                rows = []
        embedded.close()


def are_unit(rows):
    """(N, D) -> (N,): whether a row is a unit vector, but for rounding."""
    return abs(np.linalg.norm(rows.astype(np.float32), axis=1) - 1) < 1e-2


def read_part(path, rows, dim):
    """-> (rows, dim) float16, mapped.

    Raises OSError when it is anything else: BadInput would count as one more image that cannot be read.
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

# evaluate.py --features. (That of train.py is another thing: features.py's folder has the images of the train split alone, in parts.)
FILES = ("image_embed.npy", "text_embed.npy")


def read_about(folder, made_of):
    """-> what features.json says about a folder of embeddings. Raises BadInput when they were made of something else than `made_of`."""
    try:
        about = json.loads((folder / "features.json").read_text(encoding="utf-8"))
        before = about["made_of"]
        changed = [f"{key} {before.get(key)}, now it is {made_of[key]}" for key in made_of if before.get(key) != made_of[key]]
    except Exception as error:                                                  # damage comes in many kinds
        raise _unusable(folder, error) from None
    if changed:
        raise BadInput(f"--features {folder}: made of {'; '.join(changed)}. Delete it or name another folder")
    return about


def _unusable(folder, error):
    return BadInput(f"--features {folder}: cannot be read ({type(error).__name__}: {error}); delete it or name another folder")


def load_or_compute(folder, made_of, rows_of, compute):
    """What an earlier call has left in `folder`, or else compute(), which is kept there -> (image_embed (I, D), text_embed (T, D)).

    The folder holds the two .npy files and features.json, which says what they were made of (`made_of`) and whose rows they are
    (`rows_of`: {"image_ids": names of the images, "texts": captions}). Raises BadInput when they are of something else.
    """
    folder = Path(folder)
    is_main = rank_and_world()[0] == 0
    if any(all_gather_objects((folder / "features.json").exists())):                      # any: all processes must go the same way
        embeds = _load(folder, made_of, rows_of)
        if is_main:
            print(f"embeddings of {folder} used again")
        return embeds
    embeds = compute()
    if is_main:
        _keep(folder, made_of, rows_of, embeds)
        print(f"embeddings kept in {folder}")
    all_gather_objects(None)                                                              # all wait until they are there
    return embeds


def _sha256_of(embeds):
    return {name: hashlib.sha256(x.contiguous().numpy()).hexdigest() for name, x in zip(FILES, embeds)}


def _load(folder, made_of, rows_of):
    about = read_about(folder, made_of)
    try:
        embeds = [torch.from_numpy(np.load(folder / name)) for name in FILES]
        as_described = about["sha256"] == _sha256_of(embeds) and all(about[key] == rows_of[key] for key in rows_of)
    except Exception as error:                                                  # damage comes in many kinds
        raise _unusable(folder, error) from None
    if not as_described:
        raise BadInput(f"--features {folder}: the .npy files are not those that features.json describes; "
                       f"delete it or name another folder")
    return embeds


def _keep(folder, made_of, rows_of, embeds):
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--features {folder}: {error.strerror}; name another folder") from None
    part = f".{os.getpid()}.part"                                               # two calls at the same time do not write into one file
    for name, x in zip(FILES, embeds):
        system.write(folder / name, lambda f: np.save(f, x.numpy()), part=part)
    about = {"made_of": made_of, "sha256": _sha256_of(embeds), **rows_of}
    text = json.dumps(about, ensure_ascii=False, indent=1) + "\n"
    system.write_text(folder / "features.json", text, part=part)                # last: with it the folder is whole
