"""Any split -> tar shards, by several processes."""
import functools
import io
import json
import re
import tarfile
import warnings
from pathlib import Path

import numpy as np

from support import system
from support.images import reader_loader
from support.shards import shard_index, split_shards
from support.system import BadInput

# first bytes of an image file -> its kind; others are called tif
KINDS = {b"\xff\xd8": "jpg", b"\x89PNG": "png", b"RIFF": "webp", b"GIF8": "gif", b"BM": "bmp"}


def write_shards(split, folder, name, per_shard=10_000, processes=1, whole=False):
    """Write a split as shards folder/name-000000.tar, …: each image once, with all its captions.

    The images keep their bytes, and come in a fixed random order, so that every shard is a fair
    sample. After a kill the next call continues. An image that cannot be read is left out with a
    warning, or with `whole` refused.
    """
    folder = Path(folder)
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise BadInput(f"{name}: the split's name becomes a part of file names; rename it")
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
    plan = {"data": split.fingerprint(), "pictures": len(images), "per_shard": per_shard}  # as ever
    plan, marker = json.dumps(plan), folder / f"{name}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = system.lock(folder / ".lock")                # the file stays: others may wait for it
    except OSError as error:
        raise BadInput(f"{folder}: cannot be written ({error}); name another folder") from None
    if lock is None:
        raise BadInput(f"{folder}: another process is writing shards there")
    with lock:
        is_ours = marker.exists() and marker.read_bytes() == plan.encode()
        if not is_ours and (marker.exists() or name in split_shards(folder)):
            raise BadInput(f"{folder}: it holds other shards of {name!r}; name another folder, or "
                           f"delete them and {marker.name}")
        system.write_text(marker, plan)
        for part in folder.glob(f"{name}-*.part"):          # of a killed process
            part.unlink()
        missing = [(path, some) for path, some in shards if not path.exists()]
        workers = min(processes, len(missing)) if processes > 1 else 0
        loader = reader_loader(missing, workers, timeout=0, batch_size=None,
                               collate_fn=functools.partial(write_shard, split, texts_of, whole))
        with system.progress(f"{folder}: shards written", len(missing)) as progress:
            for path, count in loader:
                print(f"{path}: {count:,} images", flush=True)
                progress.update()
    print(f"{folder}: {name}: {len(images):,} images with {sum(map(len, texts_of)):,} captions in "
          f"{len(shards):,} shard{'s' * (len(shards) > 1)}")


def write_shard(split, texts_of, whole, shard):
    """Write one shard (path, images) and its index -> the path, how many images."""
    path, images = shard

    def fill(f):
        with tarfile.open(fileobj=f, mode="w") as tar:
            for i in images:
                try:
                    encoded = split.image_bytes(i)
                except (BadInput, OSError, ValueError) as error:    # ValueError: base64
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

    system.write(path, fill)
    shard_index(path)
    return path, len(images)
