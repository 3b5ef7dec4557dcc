"""Tar shards: the layout for more pairs than memory holds.

Memory holds names and counts; indexes, images and captions are read when needed. A shard's index,
an int64 table beside it, has a first row about the shard, then a row for each pair. In bytes:

    version, size of the shard, its time of change (ns), where it is damaged (-1: nowhere), 0, 0
    image's offset, its size (-1: missing), caption's offset, its size, is JSON, which caption of it
"""
import contextlib
import functools
import glob
import hashlib
import itertools
import json
import os
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

INDEX_VERSION, COLUMNS = 1, 6
MOST_CAPTIONS, MOST_BYTES = 10_000, 2**22                   # of one image; of its .txt or .json
PAX_RECORD = re.compile(rb"(\d{1,7}) ([^=]{1,255})=")      # length of the record, key


class ShardSplit:
    """The pairs of some shards, with the interface of data.Split.

    texts, positives, image_ids and ids, which only evaluation needs, are read at the first use.
    """

    def __init__(self, shards, name, context_length):
        self.shards, self.name, self.context_length = shards, name, context_length
        self.tokenizer, self.damaged = Tokenizer(name), []
        counts = [0] * len(shards)
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        first = len(shards) * rank // world_size            # so processes share the indexing
        with system.progress(f"{name}: shards indexed", len(shards)) as progress:
            for s in [*range(first, len(shards)), *range(first)]:
                index = shard_index(shards[s])
                counts[s], damage = len(index) - 1, index[0, 3]
                if damage >= 0:
                    self.damaged.append(shards[s])
                    warnings.warn(f"{shards[s]}: damaged or cut short at byte {damage:,}; what "
                                  f"comes after is lost ({counts[s]:,} pairs are there)")
                progress.update()
        self.starts = np.concatenate([[0], np.cumsum(counts)])      # first pair of each shard; n
        if not len(self):
            raise BadInput(f"{name}: no images with captions in {len(shards)} shards; expected "
                           "0001.jpg, right after it 0001.txt or 0001.json, and so on")

    def __len__(self):
        return int(self.starts[-1])

    def order(self, seed, epoch):
        return ShardOrder(np.diff(self.starts), seed, epoch)

    def sample(self, k):
        words = self.words(k)                               # first, because it costs less to fail
        with refused_as(self.image_name(k)):
            return self.pair_bytes(k), *words

    def words(self, k):
        which, texts = self.captions(k)
        ids = self.tokenizer([texts[which]], self.context_length)[0].numpy()    # (L,)
        return ids, [sentence_key(text) for text in texts], sentence_key(texts[which])

    def pair_bytes(self, k):
        path, (image, size, *_) = self.row(k)
        return read_at(path, image, size)

    def captions(self, k):
        """-> the number of pair k's caption among those of its image, and these."""
        path, (image, image_size, text, size, is_json, which) = self.row(k)
        with refused_as(f"{self.location(k)}: the caption"):
            other = min(image_size, size) >= 0 and stem_at(path, image) != stem_at(path, text)
            texts = [] if other else captions_in(read_at(path, text, size, MOST_BYTES), is_json)
            if which >= len(texts):
                raise ValueError(f"{path}.index has another one; delete that file")
        return which, texts

    def row(self, k):
        """-> pair k's shard and its row of the index."""
        s = int(np.searchsorted(self.starts, k, side="right")) - 1
        index = opened_index(self.shards[s])
        if len(index) - 1 != self.starts[s + 1] - self.starts[s]:
            raise OSError(f"{self.shards[s]}: it was changed meanwhile; run the same command again")
        return self.shards[s], index[k - self.starts[s] + 1].tolist()

    def fingerprint(self):
        counts = np.diff(self.starts).tolist()
        about = [(path.name, os.path.getsize(path), n) for path, n in zip(self.shards, counts)]
        digest = hashlib.md5(json.dumps(about).encode()).hexdigest()
        return f"{len(self):,} pairs in {len(self.shards):,} shards (hash {digest[:12]})"

    def image_name(self, k):
        return f"{self.location(k)}: the image"

    def location(self, k):
        path, (image, image_size, text, *_) = self.row(k)
        return f"{path}, offset {image if image_size >= 0 else text}"

    def where(self, k):
        path, (image, image_size, text, *_) = self.row(k)
        offset = image if image_size >= 0 else text
        name = os.pread(opened_shard(path).fileno(), 100, offset - 512).rstrip(b"\0")
        return {"file": str(path), "offset": offset, "member": name.decode(errors="replace")}

    def incomplete(self):
        """How many pairs lack their image or their caption."""
        sizes = [opened_index(path)[1:, [1, 3]] for path in self.shards]
        return sum(int((some < 0).any(axis=1).sum()) for some in sizes)

    def files(self):
        return self.shards

    # ---- images. The pairs of an image follow each other, so its first pair stands for it.

    @functools.cached_property
    def image_starts(self):
        """The first image of each shard, and at the end the number of images."""
        return np.concatenate([[0], np.cumsum([len(first_rows(path)) for path in self.shards])])

    def image_of(self, k):
        s = int(np.searchsorted(self.starts, k, side="right")) - 1
        up_to_k = np.searchsorted(first_rows(self.shards[s]), k - self.starts[s], side="right")
        return int(self.image_starts[s] + up_to_k) - 1

    def first_pair(self, i):
        s = int(np.searchsorted(self.image_starts, i, side="right")) - 1
        return int(self.starts[s] + first_rows(self.shards[s])[i - self.image_starts[s]])

    def image_count(self):
        return int(self.image_starts[-1])

    def image(self, i):
        return decoded(lambda: self.image_bytes(i), self.image_name(self.first_pair(i)))

    def image_bytes(self, i):
        return self.pair_bytes(self.first_pair(i))

    @functools.cached_property
    def described(self):
        """{caption: {image: None, …}}, in the order of the pairs."""
        if self.damaged:
            raise BadInput(f"{self.damaged[0]}: damaged, so recall would be of a part; replace it")
        described = {}
        for k in range(len(self)):
            _, (_, image_size, *_) = self.row(k)
            if image_size < 0:
                raise BadInput(f"{self.location(k)}: a caption without an image; remove it")
            which, texts = self.captions(k)
            described.setdefault(texts[which], {})[self.image_of(k)] = None     # repeats count once
        return described

    @functools.cached_property
    def texts(self):
        return list(self.described)

    @functools.cached_property
    def positives(self):
        return [list(images) for images in self.described.values()]

    @functools.cached_property
    def image_ids(self):
        return [self.location(self.first_pair(i)) for i in range(self.image_count())]

    @functools.cached_property
    def ids(self):
        return self.tokenizer(self.texts, self.context_length).numpy().astype(np.uint16)


class ShardOrder:
    """The pair at each place of an epoch, as data.Split.order gives it, for shards.

    A permutation of all pairs would not fit in memory, and a disk would jump for each. Instead the
    shards are shuffled and taken 16 together. These are read side by side, nearly from front to
    back, in windows of about 8,192 pairs: of w windows, the first has the first w-th of each shard,
    in random order, and so on. The order depends on (seed, epoch) and the counts alone.
    """

    TOGETHER, WINDOW = 16, 8192

    def __init__(self, counts, seed, epoch):
        self.seed, self.epoch = seed, epoch
        starts = np.cumsum(counts) - counts                 # the first pair of each shard
        shuffled = np.random.default_rng([seed, epoch]).permutation(len(counts))
        self.windows = []                                   # (first pairs, their ends) in 16 shards
        for g in range(0, len(counts), self.TOGETHER):
            group = shuffled[g : g + self.TOGETHER]
            firsts, some = starts[group], counts[group]
            windows = max(1, round(some.sum() / self.WINDOW))
            cuts = [firsts + w * some // windows for w in range(windows + 1)]
            self.windows += zip(cuts, cuts[1:])
        self.ends = np.cumsum([(b - a).sum() for a, b in self.windows])     # w: places < ends[w]
        self.at, self.pairs = None, None                    # one window, its pairs in their order

    def __getitem__(self, place):
        at = int(np.searchsorted(self.ends, place, side="right"))
        if at != self.at:
            pairs = np.concatenate([np.arange(a, b) for a, b in zip(*self.windows[at])])
            rng = np.random.default_rng([self.seed, self.epoch, at])
            self.at, self.pairs = at, rng.permutation(pairs)
        return self.pairs[place - self.ends[at]]            # negative: from the end


# ---- open files; those that fall out of a cache are closed


@functools.lru_cache(maxsize=64)
def opened_shard(path):
    return open(path, "rb", buffering=0)


@functools.lru_cache(maxsize=64)
def opened_index(path):
    return shard_index(path, thorough=True)


@functools.lru_cache(maxsize=64)
def first_rows(path):
    """The first pair of each image of a shard: row numbers."""
    return np.flatnonzero(np.diff(opened_index(path)[1:, 0], prepend=-1))


def stem_at(path, offset):
    """The name in the header before a file, up to its first dot: a sample's files share it."""
    name = os.pread(opened_shard(path).fileno(), 100, offset - 512).partition(b"\0")[0]
    return name.rpartition(b"/")[2].partition(b".")[0]


def read_at(path, offset, size, most=2**28):
    """`size` bytes of a shard from `offset` on. Raises ValueError or OSError."""
    if not 0 <= size <= most:
        raise ValueError("it is missing" if size < 0 else f"it has more than {most // 2**20} MiB")
    content = os.pread(opened_shard(path).fileno(), size, offset)
    if len(content) < size:
        raise ValueError("it is cut short")
    return content


def captions_in(content, is_json):
    """The captions of a .txt (one) or a .json ("texts": […], "text", "caption"), or ValueError."""
    if is_json:
        record = json.loads(content)
        record = record if isinstance(record, dict) else {}
        texts = record.get("texts")
        if not isinstance(texts, list):
            texts = [record.get("text", record.get("caption"))]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError('it needs "text", "caption" or a list "texts"')
    else:
        texts = [content.decode("utf-8-sig")]
    texts = [text.strip() for text in texts if text.strip()]
    if not texts:
        raise ValueError("it is empty")
    if len(texts) > MOST_CAPTIONS:
        raise ValueError(f"it has {len(texts):,} captions, more than {MOST_CAPTIONS:,}")
    "".join(texts).encode()                                 # raises for half a character
    return texts


# ---- indexes


def shard_index(path, thorough=False):
    """The index of a shard with its first row; made when needed. `thorough`: check all rows.

    It is kept beside the shard or, where that cannot be written, under CE_CLIP_CACHE.
    """
    if not path.is_file():
        raise BadInput(f"{path}: not a file that can be read")
    status = os.stat(path)
    head = [INDEX_VERSION, status.st_size, status.st_mtime_ns]
    digest = hashlib.md5(str(path.resolve()).encode()).hexdigest()
    files = [Path(f"{path}.index"), system.cache_folder() / f"index/{digest}.index"]
    for file in filter(Path.is_file, files):                # a pipe would be waited for
        with contextlib.suppress(Exception):                # it is missing, or damaged
            index = np.load(file, mmap_mode="r")            # reads the first row alone
            sound = index.dtype == np.int64 and index.shape[1:] == (COLUMNS,)
            if sound and index[0, :3].tolist() == head and (not thorough or all_inside(index)):
                return index
    rows, damaged = scan(path)
    index = np.array([[*head, damaged, 0, 0], *rows], dtype=np.int64)
    for file in files:
        if file.is_symlink() or system.is_device(file):     # a link leads to any file of the user
            continue
        with contextlib.suppress(BadInput, OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            system.write(file, lambda f: np.save(f, index), part=f".{os.getpid()}.part")
            return index
    raise BadInput(f"{files[0]}: cannot be written, nor can {files[1]}; set CE_CLIP_CACHE to a "
                   "folder with room")


def all_inside(index):
    """Whether all rows of an index mean bytes that its shard, of the size in row 0, has."""
    size, offsets, sizes = index[0, 1], index[1:, [0, 2]], index[1:, [1, 3]]    # image, caption
    inside = (offsets >= 512) & (offsets <= size) & (sizes <= size - offsets) | (sizes < 0)
    return inside.all() and (sizes >= 0).any(axis=1).all() and (index[1:, 5] >= 0).all()


def scan(path):
    """One pass over a shard's headers -> the rows of its index; the byte of the damage, or -1.

    The files of a sample follow each other and have the same name up to the first dot.
    """
    members, rows, is_whole, size = [], [], False, os.path.getsize(path)
    senseless = tarfile.TarError, ValueError, OverflowError, RecursionError
    try:
        tar = tarfile.open(path, "r:", tarinfo=TarEntry)
    except senseless as error:
        raise BadInput(f"{path}: not an uncompressed tar archive ({error}); images are read from "
                       "anywhere in it, so unpack .gz and the like first") from None
    with tar, contextlib.suppress(*senseless):
        for entry in tar_entries(tar):
            folder, _, name = entry.name.rpartition("/")
            stem, _, kind = name.partition(".")
            if entry.isreg() and stem:                      # macOS puts ._name beside name
                place = entry.offset_data, entry.size
                members.append(((folder, stem), kind.lower(), place))
        is_whole = True
    damaged = -1 if is_whole else min(tar.offset, size)
    for _, group in itertools.groupby(members, key=lambda member: member[0]):
        group = list(group)
        files = {kind: place for _, kind, place in group}
        image = next((files[kind] for kind in IMAGE_TYPES if kind in files), (0, -1))
        text = files.get("txt", files.get("json", (0, -1)))
        is_json, captions = "json" in files and "txt" not in files, 1
        if len(files) < len(group):                         # a name twice: which two belong?
            text, is_json = (0, -1), False
        if max(sum(image), sum(text)) > size or max(image[1], text[1]) < 0:
            continue                                        # cut, or files of other kinds
        if is_json:
            with contextlib.suppress(Exception):            # then one row: training reports it
                captions = len(captions_in(read_at(path, *text, MOST_BYTES), True))
        rows += [(*image, *text, is_json, which) for which in range(captions)]
    return rows, damaged


# ---- tar files of strangers


class TarEntry(tarfile.TarInfo):
    """An entry of a tar whose headers are not trusted. Raises ValueError for senseless ones."""

    def _proc_member(self, tar):                            # tarfile calls it for each header
        most = 2**20 if self.type in b"LKxXg" else 2**50    # a long name, or more, of what follows
        if self.type == tarfile.GNUTYPE_SPARSE or not 0 <= self.size <= most:
            raise ValueError(f"a header is of a sparse file, or of {self.size:,} bytes")
        if self.type == tarfile.XGLTYPE:                    # about the whole archive: not used
            return self._proc_builtin(tar)
        return super()._proc_member(tar)

    def _proc_pax(self, tar):
        """Of a pax header only name and size are used. tarfile may take hours to read all."""
        content, at, found = tar.fileobj.read(self._block(self.size)), 0, {}
        while match := PAX_RECORD.match(content, at):
            at += int(match[1])
            found[match[2]] = content[match.end() : at - 1]
            if at <= match.end() or match[2].startswith(b"GNU.sparse"):
                raise ValueError("a pax header is senseless, or of a sparse file")
        entry = self.fromtarfile(tar)
        if b"path" in found:
            entry.name = found[b"path"].decode(errors="surrogateescape").rstrip("/")
        entry.size = int(found.get(b"size", entry.size))
        return entry._proc_member(tar)                      # again: the size decides what follows


def tar_entries(tar):
    """Each entry of an open tar. Raises tarfile.ReadError when it does not end as archives end."""
    for entry in tar:
        tar.members.clear()                                 # it would keep them all
        if entry.type != tarfile.XGLTYPE:
            yield entry
    # The end is zeros alone. tarfile takes a damaged header for it, and the first of two archives.
    tar.fileobj.seek(tar.offset)
    zeros = 0
    while (block := tar.fileobj.read(2**16)) and not block.strip(b"\0") and zeros < 2**28:
        zeros += len(block)
    if block or zeros < 512:
        raise tarfile.ReadError("it is cut short, or after its end there is more")


# ---- names of shards


def is_pattern(data):
    """Whether this names tar shards. A pattern is one split, whatever it is used for."""
    return str(data).endswith(".tar")


def shards_of(pattern):
    """'a/{000..020}.tar' or 'a/*.tar' -> paths in order. Raises BadInput when one is missing."""
    parts = re.split(r"\{(\d{1,18})\.\.(\d{1,18})\}", pattern)    # text, first, last, text, …
    names = [parts[0]]
    for first, last, text in zip(parts[1::3], parts[2::3], parts[3::3]):
        if len(names) * (int(last) - int(first)) > 10**6:
            raise BadInput(f"{pattern}: more than a million shards")
        numbers = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
        names = [name + number + text for name in names for number in numbers]
    paths = []
    for name in names:
        found = [] if os.path.exists(name) else sorted(glob.glob(name))     # a name may have a [
        paths += map(Path, found or [name])
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise BadInput(f"{pattern}: {len(missing):,} of {len(paths):,} shards are missing, the "
                       f"first {missing[0]}")
    return paths


def split_shards(folder):
    """{split: its shards, in order} of a folder that has train-000000.tar, …"""
    shards = {}
    for path in sorted(Path(folder).glob("[!.]*.tar")):
        if match := re.fullmatch(r"(.+)-\d+\.tar", path.name):
            shards.setdefault(match[1], []).append(path)
    return shards
