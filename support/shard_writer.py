"""Any split -> tar shards, by several processes."""
import fcntl
import io
import json
import multiprocessing
import os
import re
import sys
import tarfile
import warnings
from pathlib import Path

import numpy as np

from support import system
from support.shards import shard_index, split_shards
from support.system import BadInput

# first bytes of an image file -> its kind; others are called tif
KINDS = {b"\xff\xd8": "jpg", b"\x89PNG": "png", b"RIFF": "webp", b"GIF8": "gif", b"BM": "bmp"}


def write_shards(split, folder, name, per_shard=10_000, processes=1, whole=False):
    """Write a split as shards folder/name-000000.tar, …: each image once, with all its captions.

    The bytes of an image do not change; whether it decodes is not tested. The images come in a
    fixed random order, so that every shard is a fair sample. After a kill the next call continues.
    An image that cannot be read is left out with a warning, or with `whole` refused.
    """
    folder = Path(folder)
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise BadInput(f"{split.name}: the split's name becomes a part of file names; give it one "
                       "of letters and digits")
    texts_of = [[] for _ in split.image_ids]
    for text, described in zip(split.texts, split.positives):
        for i in described:
            texts_of[i].append(text)
    order = np.random.default_rng(0).permutation(len(texts_of)).tolist()
    images = [i for i in order if texts_of[i]]
    shards = []
    for start in range(0, len(images), per_shard):
        path = folder / f"{name}-{len(shards):06}.tar"
        shards.append((path, images[start : start + per_shard]))
    plan = {"data": split.fingerprint(), "images": len(images), "per_shard": per_shard}

    lock = reserve(folder, name, json.dumps(plan))
    to_write = sum(len(some) for path, some in shards if not path.exists())
    done = multiprocessing.Value("q")                       # images written, by all helpers
    helpers = []
    for job in [shards[p::processes] for p in range(min(processes, len(shards)))]:
        arguments = split, texts_of, job, done, os.getpid(), whole
        helpers.append(multiprocessing.Process(target=write_some, args=arguments))
        helpers[-1].start()
    with system.progress(f"{folder}: images written", to_write) as progress:
        for helper in helpers:
            while helper.is_alive():
                helper.join(timeout=0.5)
                progress.update(done.value - progress.n)
    os.close(lock)
    if any(helper.exitcode for helper in helpers):
        raise BadInput(f"{folder}: not all shards were written; the line above says why. Run it "
                       "again to go on")
    print(f"{folder}: {name}: {len(images):,} images with {sum(map(len, texts_of)):,} captions in "
          f"{len(shards):,} shard{'s' * (len(shards) > 1)}")


def reserve(folder, name, plan):
    """Note in folder/name.json what its shards are made of -> a lock on the folder.

    Raises BadInput when other shards are there, or another process writes some.
    """
    marker = folder / f"{name}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_ours = marker.exists() and marker.read_bytes() == plan.encode()
        if (marker.exists() or name in split_shards(folder)) and not is_ours:
            raise BadInput(f"{folder}: it holds other shards of {name!r}; name another folder, or "
                           f"delete them and {marker.name}")
        lock = os.open(folder, os.O_RDONLY)                 # the helpers inherit it
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        system.write_text(marker, plan)
    except BlockingIOError:
        raise BadInput(f"{folder}: another process is writing shards there") from None
    except OSError as error:
        raise BadInput(f"{folder}: shards cannot be written there ({error}); make room or name "
                       "another folder") from None
    return lock


def write_some(split, texts_of, shards, done, parent, whole):
    """What one helper process does: its shards, one after the other."""
    system.end_with(parent)
    try:
        for path, images in shards:
            if not path.exists():
                system.write(path, lambda f: fill_shard(f, split, texts_of, images, done, whole))
                shard_index(path)
                print(f"{path}: {len(images):,} images", flush=True)
    except BadInput as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def fill_shard(f, split, texts_of, images, done, whole):
    with tarfile.open(fileobj=f, mode="w") as tar:
        for i in images:
            with done.get_lock():
                done.value += 1
            try:
                encoded = split.image_bytes(i)
            except (BadInput, OSError, ValueError) as error:        # ValueError: base64
                problem = f"{split.name}: image {split.image_ids[i]} cannot be read ({error})"
                if whole:
                    raise BadInput(f"{problem}; replace or remove it") from None
                warnings.warn(f"{problem}; it is left out")
                continue
            kind = next((KINDS[start] for start in KINDS if encoded.startswith(start)), "tif")
            record = {"id": split.image_ids[i], "texts": texts_of[i]}
            record = json.dumps(record, ensure_ascii=False).encode()
            for extension, content in ((kind, encoded), ("json", record)):
                member = tarfile.TarInfo(f"{i:09}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
