"""support.shards"""
import functools
import glob
import hashlib
import itertools
import json
import math
import os
import posixpath
import re
import tarfile
import warnings
from pathlib import Path

import numpy as np

from support import system
from support.captions import sentence_key
from support.images import IMAGE_TYPES, decoded, refused_as
from support.system import BadInput
from tokenizer import Tokenizer

LARGEST = 2**28                                                                 # bytes of a image file: more is a mistake, or an attack

# An index is an int64 table beside its shard, one row per pair, all in bytes, a size of -1 for what is missing:
#     image's offset, its size, caption's offset, its size, whether that is JSON, which of its captions is meant
# after a first row that tells for which file it was made:
#     version, size of the shard, its time of change (ns), where it is damaged (-1: nowhere), 0, 0
INDEX_VERSION, COLUMNS = 1, 6


class ShardSplit:
    """Tar shards: the layout for more pairs than memory holds. In memory are the shards' names and counts; indexes, images and
    captions are read where they are needed. What only an evaluation needs (texts, image_ids, positives, ids) is read from the
    shards at the first use.
    """

    def __init__(self, shards, name, context_length):
        self.shards, self.name, self.context_length = shards, name, context_length
        self.tokenizer = Tokenizer(name)
        counts = self._build_indexes()
        self.starts = np.concatenate([[0], np.cumsum(counts)])                  # shard s holds pairs starts[s] … starts[s+1] - 1
        if not len(self):
            raise BadInput(f"{name}: no images with captions in {len(shards)} shard{'s' * (len(shards) > 1)}; expected 0001.jpg, "
                           f"right after it 0001.txt or 0001.json, and so on (the name ends at the first dot)")

    def _build_indexes(self):
        """Make the indexes that are missing -> number of pairs in each shard. Processes of one run start at different shards, so
        they share the work without a word."""
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        counts, self.damaged = {}, []
        first = len(self.shards) * rank // world
        with system.progress(f"{self.name}: shards indexed", len(self.shards)) as progress:
            for s in [*range(first, len(self.shards)), *range(first)]:
                index = shard_index(self.shards[s])
                counts[s] = len(index) - 1
                if index[0, 3] >= 0:
                    self.damaged.append(self.shards[s])
                    warnings.warn(f"{self.shards[s]}: damaged or cut short at byte {index[0, 3]:,}; what comes after is lost "
                                  f"({counts[s]:,} pairs are there). Replace it")
                progress.update()
        return [counts[s] for s in range(len(self.shards))]

    def __len__(self):
        return int(self.starts[-1])

    # Pairs, for training.

    def order(self, seed, epoch):
        return ShardOrder(np.diff(self.starts), seed, epoch)

    def sample(self, k):
        words = self.words(k)                                                   # first: it costs less, should it fail
        with refused_as(self.image_name(k)):
            return self.pair_bytes(k), *words

    def words(self, k):
        which, texts = self._captions(k)
        ids = self.tokenizer([texts[which]], self.context_length)[0].numpy()    # (L,)
        return ids, [sentence_key(text) for text in texts], sentence_key(texts[which])

    def pair_bytes(self, k):
        """The image of pair k, as it lies in its shard."""
        path, (image, image_size, *_) = self._row(k)
        return read_at(path, image, image_size, "it")

    def _captions(self, k):
        """The captions of pair k's image -> which of them is meant, all of them. Raises BadInput when they cannot be read."""
        path, (_, _, text, text_size, is_json, which) = self._row(k)
        name = self._location(k)
        texts = captions_in(read_at(path, text, text_size, f"{name}: the caption"), is_json, name)
        if which >= len(texts):
            raise BadInput(f"{name}: the caption is not what the index says; delete {path}.index, it will be made again")
        return which, texts

    def _row(self, k):
        """-> pair k's shard and its row of the index."""
        s = int(np.searchsorted(self.starts, k, side="right")) - 1
        index = opened_index(self.shards[s])
        if len(index) - 1 != self.starts[s + 1] - self.starts[s]:
            raise OSError(f"{self.shards[s]}: it was changed while it was being read; run the same command again")
        return self.shards[s], index[k - self.starts[s] + 1].tolist()

    def fingerprint(self):
        counts = np.diff(self.starts)
        shards = [(path.name, os.path.getsize(path), int(n)) for path, n in zip(self.shards, counts)]
        digest = hashlib.md5(json.dumps(shards).encode())
        return f"{len(self):,} pairs in {len(self.shards):,} shards (hash {digest.hexdigest()[:12]})"

    # Messages and reports.

    def image_name(self, k):
        return f"{self._location(k)}: the image"

    def _location(self, k):
        path, (image, image_size, text, *_) = self._row(k)
        return f"{path}, offset {image if image_size >= 0 else text}"

    def where(self, k):
        path, (image, image_size, text, *_) = self._row(k)
        offset = image if image_size >= 0 else text
        header = os.pread(opened_shard(path).fileno(), 100, offset - 512)       # a file's name is the first field of the header before it
        return {"file": str(path), "offset": offset, "member": header.rstrip(b"\0").decode(errors="replace")}

    def incomplete(self):
        """How many pairs lack their image or their caption."""
        return sum(int((opened_index(path)[1:, [1, 3]] < 0).any(axis=1).sum()) for path in self.shards)

    def files(self):
        return self.shards

    # Images, for evaluation and for kept features. The pairs of one image follow each other, so its first pair stands for it.

    @functools.cached_property
    def _image_starts(self):
        """Shard s holds images starts[s] … starts[s+1] - 1, in the order in which they lie there."""
        return np.concatenate([[0], np.cumsum([len(first_rows(path)) for path in self.shards])])

    def image_of(self, k):
        s = int(np.searchsorted(self.starts, k, side="right")) - 1
        begun = np.searchsorted(first_rows(self.shards[s]), k - self.starts[s], side="right")       # images of the shard, up to pair k
        return int(self._image_starts[s] + begun) - 1

    def _first_pair(self, i):
        """The first pair of image i."""
        s = int(np.searchsorted(self._image_starts, i, side="right")) - 1
        return int(self.starts[s] + first_rows(self.shards[s])[i - self._image_starts[s]])

    def image_count(self):
        return int(self._image_starts[-1])

    def image(self, i):
        return decoded(lambda: self.image_bytes(i), self.image_name(self._first_pair(i)))

    def image_bytes(self, i):
        return self.pair_bytes(self._first_pair(i))

    @functools.cached_property
    def _whole(self):
        """-> ({caption: the images that it describes}, ids of the images): for evaluation, which needs all of them."""
        if self.damaged:
            raise BadInput(f"{self.damaged[0]}: damaged or cut short, so recall would be that of a part; replace it")
        described = {}
        for k in range(len(self)):
            _, (_, image_size, *_) = self._row(k)
            if image_size < 0:
                raise BadInput(f"{self._location(k)}: a caption without a image; remove it")
            which, texts = self._captions(k)
            described.setdefault(texts[which], {})[self.image_of(k)] = None   # as keys: the same caption twice says nothing new
        return described, [self._location(self._first_pair(i)) for i in range(self.image_count())]

    texts = functools.cached_property(lambda self: list(self._whole[0]))
    positives = functools.cached_property(lambda self: [list(images) for images in self._whole[0].values()])
    image_ids = functools.cached_property(lambda self: self._whole[1])
    ids = functools.cached_property(lambda self: self.tokenizer(self.texts, self.context_length).numpy().astype(np.uint16))


class ShardOrder:
    """The order of the n pairs of some shards in an epoch, place -> pair: random, and yet the files are read nearly from front to back. A
    permutation, as Split.order makes, would have a disk jump to another shard for each pair, and take 8 bytes of memory for each.

    The shards are shuffled and taken 16 together. These 16 are read through side by side, in windows of about 8,192 pairs: of w
    windows, the first one has the first w-th of each shard, in random order, and so on. So at any time 16 stretches of files are
    being read, and what is kept in memory are the numbers of one window's pairs. A function of (seed, epoch) and the shards' counts
    alone.
    """

    TOGETHER, WINDOW = 16, 8192

    def __init__(self, counts, seed, epoch):
        self.seed, self.epoch = seed, epoch
        starts = np.cumsum(counts) - counts                                     # the first pair of each shard
        shuffled = np.random.default_rng([seed, epoch]).permutation(len(counts))
        self.windows, sizes = [], []                                            # (first pairs of the shards, their counts, w, windows)
        for group in (shuffled[g : g + self.TOGETHER] for g in range(0, len(counts), self.TOGETHER)):
            some, windows = counts[group], max(1, round(counts[group].sum() / self.WINDOW))
            for w in range(windows):
                self.windows.append((starts[group], some, w, windows))
                sizes.append(((w + 1) * some // windows - w * some // windows).sum())
        self.ends = np.cumsum(sizes)                                            # the places of window w end before ends[w]
        self.at, self.pairs = None, None                                        # the window at hand, its pairs in their order

    def __getitem__(self, place):
        at = int(np.searchsorted(self.ends, place, side="right"))
        if at != self.at:
            firsts, counts, w, windows = self.windows[at]
            stretches = [np.arange(first + w * n // windows, first + (w + 1) * n // windows) for first, n in zip(firsts, counts)]
            self.at = at
            self.pairs = np.random.default_rng([self.seed, self.epoch, at]).permutation(np.concatenate(stretches))
        return self.pairs[place - self.ends[at]]                                # from the end: negative


@functools.lru_cache(maxsize=64)
def opened_shard(path):
    return open(path, "rb", buffering=0)                                        # closed when it falls out of the cache


@functools.lru_cache(maxsize=64)
def opened_index(path):
    return shard_index(path, thorough=True)


@functools.lru_cache(maxsize=64)
def first_rows(path):
    """Which pairs of a shard are the first of their image, whose captions follow each other -> one row number for each image."""
    return np.flatnonzero(np.diff(opened_index(path)[1:, 0], prepend=-1))


def read_at(path, offset, size, name):
    """`size` bytes of a file from `offset` on."""
    if size < 0:
        raise BadInput(f"{name} is missing")
    if size > LARGEST:
        raise BadInput(f"{name} has {size:,} bytes, more than the {LARGEST:,} that are read")
    try:
        content = os.pread(opened_shard(path).fileno(), size, offset)
    except OSError as error:
        raise BadInput(f"{name} cannot be read ({error})") from None
    if len(content) < size:
        raise BadInput(f"{name} is cut short")
    return content


def captions_in(content, is_json, name):
    """The captions in the bytes of a .txt (one) or .json ({"texts": […]}, {"text": …} or {"caption": …})."""
    try:
        if is_json:
            record = json.loads(content)
            texts = record["texts"] if isinstance(record.get("texts"), list) else [record.get("text", record.get("caption"))]
            if not all(isinstance(text, str) for text in texts):
                raise ValueError('it needs "text", "caption" or a list "texts"')
        else:
            texts = [content.decode("utf-8-sig")]
        texts = [text.strip() for text in texts if text.strip()]
        if not texts:
            raise ValueError("it is empty")
        "".join(texts).encode()                                                 # raises for half a character
        return texts
    except (ValueError, AttributeError, RecursionError) as error:               # AttributeError: JSON that is no object
        raise BadInput(f"{name}: the caption cannot be read ({error})") from None


def shard_index(path, thorough=False):
    """The index of a shard, its first row included; made when there is none of this file: beside it or, where that cannot be written, under
    CE_CLIP_CACHE. `thorough`: look at all its rows."""
    status = os.stat(path)
    head = [INDEX_VERSION, status.st_size, status.st_mtime_ns]
    digest = hashlib.md5(str(path.resolve()).encode()).hexdigest()
    files = [path.with_name(path.name + ".index"), system.cache_folder() / "index" / f"{digest}.index"]
    for file in files:
        try:
            index = np.load(file, mmap_mode="r")                                # of 20,000 shards only the first rows are looked at now
            of_this_shard = index.dtype == np.int64 and index.ndim == 2 and index.shape[1] == COLUMNS and index[0, :3].tolist() == head
            if of_this_shard and not (thorough and points_outside(index, status.st_size)):
                return index
        except Exception:                                                       # not there, or damaged in one of many ways
            pass
    rows, damaged = scan(path)
    index = np.array([[*head, damaged, 0, 0], *rows], dtype=np.int64)
    for file in files:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            part = f".{os.getpid()}.part"                                       # processes that index the same shard write the same
            system.write(file, lambda f: np.save(f, index), part=part)
            return index
        except (BadInput, OSError):
            pass
    raise BadInput(f"{files[0]}: cannot be written, nor can {files[1]}; set CE_CLIP_CACHE to a folder with room")


def points_outside(index, size):
    """Whether a row of an index means bytes that a shard of this size has not."""
    image, image_size, text, text_size, _, which = index[1:].T
    before, after = np.minimum(np.minimum(image, text), which), np.maximum(image + image_size, text + text_size)
    return bool((before < 0).any() or (after > size).any())


def scan(path):
    """One pass over a shard's headers -> (rows of its index, the byte where it is damaged or cut, or -1).

    The files of a sample follow each other and have the same name up to the first dot.
    """
    rows, damaged, size = [], [-1], os.path.getsize(path)
    for _, members in itertools.groupby(tar_members(path, damaged), key=lambda member: member[0]):
        files = {extension: (offset, length) for _, extension, offset, length in members}
        image = next((files[e] for e in IMAGE_TYPES if e in files), (0, -1))
        kind = next((e for e in ("txt", "json") if e in files), None)
        text = files.get(kind, (0, -1))
        if image[1] < 0 and text[1] < 0:                                        # something else
            continue
        if max(image[0] + image[1], text[0] + text[1]) > size:                  # cut off by the end of the file
            continue
        captions = 1
        if kind == "json":
            try:
                captions = len(captions_in(read_at(path, *text, path), True, path))
            except BadInput:                                                    # one row, so that training meets and reports it
                pass
        rows += [(*image, *text, kind == "json", which) for which in range(captions)]
    return rows, damaged[0]


def tar_members(path, damaged):
    """Yields (name up to the first dot, the rest of it, offset, size) of every file. `damaged`, a list, is a second result:
    damaged[0] becomes the byte where the archive stops to be one."""
    try:
        with tarfile.open(path, "r:") as tar:
            broken = False
            try:
                while (member := tar.next()) is not None:
                    tar.members.clear()                                         # it would remember them all
                    folder, name = posixpath.split(member.name)
                    stem, _, extension = name.partition(".")
                    if member.isreg() and stem:                                 # macOS puts `._name` beside `name`
                        yield posixpath.join(folder, stem), extension.lower(), member.offset_data, member.size
            except (tarfile.TarError, ValueError, OverflowError):               # the last file is cut, or a header makes no sense
                broken = True
            end = min(tar.offset, os.path.getsize(path))
            with open(path, "rb") as f:
                # At its end an archive has zeros, and nothing else up to the end of the file: but tarfile stops at a damaged header without
                # a word, and where another archive follows.
                f.seek(end)
                if broken or f.read(512) != bytes(512) or any(any(block) for block in iter(lambda: f.read(2**16), b"")):
                    damaged[0] = end
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise BadInput(f"{path}: not an uncompressed tar archive ({error}); unpack .gz, .bz2 and the like first, "
                       f"since images are read from anywhere in it") from None


def is_pattern(data):
    """Whether this names tar shards. Such a pattern is one split, whatever it is used for."""
    return str(data).endswith(".tar")


def shards_of(pattern):
    """'a/{000..020}.tar' or 'a/*.tar' -> paths in order; all of them are there."""
    parts = re.split(r"\{(\d+)\.\.(\d+)\}", pattern)                            # text, first, last, text, first, last, …, text
    bounds = list(zip(parts[1::3], parts[2::3]))
    if math.prod(max(0, int(b) - int(a) + 1) for a, b in bounds) > 10**6:
        raise BadInput(f"{pattern}: more than a million shards; is that meant?")
    ranges = [[str(n).zfill(len(a)) for n in range(int(a), int(b) + 1)] for a, b in bounds]
    paths = []
    for numbers in itertools.product(*ranges):
        name = "".join(itertools.chain.from_iterable(itertools.zip_longest(parts[::3], numbers, fillvalue="")))
        is_plain = os.path.exists(name) or not re.search(r"[*?[]", name)        # a file's own name may have a [
        paths += map(Path, [name] if is_plain else sorted(glob.glob(name)))
    if not paths:
        raise BadInput(f"{pattern}: no such shards")
    if missing := [path for path in paths if not path.is_file()]:
        raise BadInput(f"{pattern}: {len(missing):,} of {len(paths):,} shards are missing, the first {missing[0]}")
    return paths


def split_shards(folder):
    """{split: its shards, in order} of a folder that has train-000000.tar, …"""
    shards = {}
    for path in sorted(Path(folder).glob("[!.]*.tar")):
        if match := re.fullmatch(r"(.+)-\d+\.tar", path.name):
            shards.setdefault(match[1], []).append(path)
    return shards
