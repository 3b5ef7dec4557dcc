"""Pictures and captions on disk -> batches, in an order that is a function of (seed, epoch) alone.

    python data.py coco-cn --data-root data          # what a data set holds: pictures, captions and pairs per split
    python data.py poems --draw poems.png            # look at a painted data set
    python data.py coco-cn --write-shards coco-shards --processes 4        # any layout -> tar shards
    python data.py 'shards/{000000..000020}.tar'     # build the shards' indexes, say how many pairs they hold
    python data.py fetch coco-cn                     # get it from the web; and `convert`, `check`: see prepare.py

Four layouts, one interface (`Split`): how many captions and pictures, who describes whom, and picture i when it is needed.

1. Chinese-CLIP: {train,valid,test}_imgs.tsv with lines `id<TAB>base64 picture`, and {split}_texts.jsonl with {"text_id": 1, "text": "…", "image_ids": [7]}.
2. A folder of pictures with captions.csv (first line: image,caption) or captions.jsonl ({"image": "a.jpg", "caption": "…"}), paths relative to the folder. A picture may
   stand in several rows. A further column `split` (train, valid, test, …) divides the pictures; without it 80 % train, 10 % valid, 10 % test, by a hash of the path.
3. Tar shards (WebDataset), for any number of pictures: files key.jpg (png, webp, …) beside key.txt, the caption, or key.json with {"text": "…"}, {"caption": "…"} or
   {"texts": ["…", "…"]}; named by a pattern such as 'shards/{000000..000020}.tar' or 'shards/*.tar', or a folder with train-000000.tar, …, valid-000000.tar, ….
4. Painted here, no download (painter.py): `demo`, coloured things in the quarters of a picture, endless; `landscapes` and `english-landscapes`, whose captions say what is in them, in Chinese
   and in English; `poems`, landscapes whose captions are lines of classical verse, of the sizes of the paper's own set of poems and pictures.

A training sample is a (caption, picture) pair. Pictures are read when a worker needs them; the captions of layouts 1 and 2 are kept in memory, those of shards are not.
A pair that cannot be read is replaced by the next one that can, and reported (`TrainingPairs`).
"""
import argparse
import base64
import contextlib
import csv
import fcntl
import functools
import glob
import hashlib
import importlib.util
import io
import itertools
import json
import math
import mmap
import multiprocessing
import os
import posixpath
import random
import re
import sys
import tarfile
import unicodedata
import warnings
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

import painter
import system
from system import BadInput
from tokenizer import Tokenizer

# Folder names of the published archives (Hugging Face data set OFA-Sys/chinese-clip-eval) and of the paper's own set, under --data-root.
NAMES = {"coco-cn": "COCO-CN", "flickr30k-cn": "Flickr30k-CN", "muge": "MUGE", "ap-id": "AP-ID"}
# The paper's table 1: pairs in each split.
TABLE_1 = {"coco-cn":      {"train": 22_980, "valid": 3_185, "test": 1_053},
           "flickr30k-cn": {"train": 148_915, "valid": 5_000, "test": 5_000},
           "ap-id":        {"train": 2_000, "valid": 1_000, "test": 1_000}}


class Painted(NamedTuple):
    """A painted data set: its pairs in each split, whether training is endless; and of painter.py: a random scene, its caption, what its picture shows, how that is painted, its split."""

    sizes: dict
    endless: bool
    draw: Callable
    describe: Callable
    shown: Callable
    paint: Callable
    split_of: Callable


PAINTED = {
    "demo": Painted({"train": 8192, "valid": 300, "test": 500}, True, painter.random_scene, painter.describe, frozenset, painter.paint, painter.split_of_scene),
    "landscapes": Painted({"train": 2000, "valid": 300, "test": 500}, False, painter.random_landscape, painter.describe_landscape, frozenset, painter.paint_landscape, painter.split_of_landscape),
    "english-landscapes": Painted({"train": 4000, "valid": 300, "test": 500}, False, painter.random_landscape, painter.describe_in_english, frozenset, painter.paint_landscape,
                                  painter.split_of_landscape),
    "poems": Painted(TABLE_1["ap-id"], False, painter.random_poem, painter.poem_caption, painter.scene_of_poem, painter.paint_landscape, painter.split_of_poem),
}


# ---------------------------------------------------------------------------------------------------------------- splits: what lies on disk


class Split:
    """One split of a data set: T captions, I pictures, and which pictures each caption describes.

    endless        whether each epoch has new pictures (the painted train split): then there are no fixed texts, image_ids, …: only name, len(), sample(), picture_name() and fingerprint()
    name           for messages, e.g. "COCO-CN/test"
    texts          T captions
    positives      T lists of picture indices: positives[t] = the pictures that caption t describes; may be empty (such a caption is no query)
    image_ids      I names of the pictures, as the data set has them
    ids            (T, L) uint16 tokens of the captions
    text_keys      T numbers, equal for equal sentences
    captions_of    I lists of text keys: all that describe a picture
    pairs          (caption, picture) index pairs, in the data set's order: the training samples

    Training asks for len(), sample(), picture_name(), order(), where() and fingerprint(), with features kept for words(), picture_of(), picture_count() and picture(); evaluation for texts,
    image_ids, positives, ids and picture().
    """

    endless = False

    def __init__(self, name, texts, image_ids, positives, context_length=52):
        if not texts or not image_ids:
            raise BadInput(f"{name}: the split is empty ({len(image_ids)} pictures, {len(texts)} captions)")
        self.name, self.texts, self.image_ids, self.positives = name, texts, image_ids, positives
        self.ids = Tokenizer(name)(texts, context_length).numpy().astype(np.uint16)
        self.pairs = [(t, i) for t, images in enumerate(positives) for i in images]
        self.text_keys = [sentence_key(text) for text in texts]
        self.captions_of = [[] for _ in image_ids]
        for t, i in self.pairs:
            self.captions_of[i].append(self.text_keys[t])

    def __len__(self):
        return len(self.pairs)

    def picture(self, i) -> Image.Image:
        """Picture i, decoded, RGB. Raises BadInput with its id when it cannot be read."""
        return decoded(lambda: self.picture_bytes(i), f"{self.name}: picture {self.image_ids[i]}")

    def words(self, k):
        """What sample() gives of pair k beside the picture, which is not touched."""
        t, i = self.pairs[k]
        return self.ids[t], self.captions_of[i], self.text_keys[t]

    def picture_of(self, k):
        """The number of pair k's picture."""
        return self.pairs[k][1]

    def picture_count(self):
        return len(self.image_ids)

    def where(self, k):
        """Where training pair k lies, for a report: {"file", "offset" in bytes, …} (of the painted set: its number)."""
        return self.picture_place(self.pairs[k][1]) | {"caption": self.texts[self.pairs[k][0]]}

    def files(self):
        """The files in which the pictures lie."""
        return []                                                               # of painted ones

    def fingerprint(self):
        """A short text that changes when the captions, the pictures' names, their relation or the first sample change."""
        digest = hashlib.md5(json.dumps([self.texts, self.image_ids, self.positives], ensure_ascii=False).encode())
        try:
            picture, ids, *_ = self.sample(0, 0)
            digest.update((picture if isinstance(picture, bytes) else picture.tobytes()) + ids.tobytes())
        except (BadInput, IndexError):                                          # unreadable, or there are no pairs
            digest.update(b"none")
        return f"{len(self):,} pairs (hash {digest.hexdigest()[:12]})"

    def order(self, seed, epoch):
        """Which pair stands at each place of an epoch: (n,) a permutation, a function of (seed, epoch) and of nothing else."""
        return np.random.default_rng([seed, epoch]).permutation(len(self))

    def sample(self, epoch, k):
        """Training pair k -> (its picture: the bytes of the file, or of a painted set the picture itself; tokens (L,); keys of all sentences that describe it; key of this one). Raises
        BadInput when the file cannot be read; whether it decodes `training_pixels` will see. Here all epochs are alike."""
        with refused_as(self.picture_name(k)):
            return self.picture_bytes(self.picture_of(k)), *self.words(k)

    def picture_name(self, k):
        """What a message calls the picture of pair k."""
        return f"{self.name}: picture {self.image_ids[self.picture_of(k)]}"


def sentence_key(text):
    """A number for a sentence: equal for equal ones (and, by a chance of 1 in 2^56, for two others)."""
    return int.from_bytes(hashlib.md5(text.encode()).digest()[:7], "big")


@contextlib.contextmanager
def refused_as(name):
    """Whatever goes wrong inside, in reading, decoding or resizing a picture, becomes BadInput with its name."""
    try:
        yield
        return
    except UnidentifiedImageError:
        reason = "not a picture in a format that Pillow reads"
    except Exception as error:                                                  # some forty decoders, each with its own kinds of error
        reason = str(error)
    raise BadInput(f"{name} cannot be read ({reason}); replace or remove it")


def opened(encoded):
    """Bytes of a picture file -> a PIL picture of which only the header has been read."""
    if not encoded:
        raise ValueError("it is empty")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)          # from 89 million pixels on: a small file can ask for all the memory there is
        return Image.open(io.BytesIO(encoded))


def decoded(read, name):
    """read() -> bytes of a picture file -> the picture, RGB. Raises BadInput with its name when it cannot be read."""
    with refused_as(name):
        picture = opened(read())
        picture.load()
        return to_rgb(picture)


def picture_at(paths, i, folder=""):
    """Picture i of some paths, relative to a folder. (A function of the module, so that it can be sent to readers on every system.)"""
    return decoded(Path(folder, paths[i]).read_bytes, system.printable(paths[i]))


class TsvSplit(Split):
    """The Chinese-CLIP layout. Of the picture file only the ids and byte offsets are kept."""

    def __init__(self, folder, split, context_length):
        self.path = folder / f"{split}_imgs.tsv"
        self.offsets, index_of = [], {}                                         # (start, length) of each base64 text; picture id -> index
        line_of = {}
        for number, start, end, line in self._lines():
            if start == end or not line.strip():
                continue
            id_, tab, _ = line.partition(b"\t")
            if not tab or not id_.strip().isdigit():
                raise BadInput(f"{self.path}, line {number}: expected `number<TAB>base64 picture`, found {line[:40]!r}")
            if line_of.setdefault(int(id_), number) != number:
                raise BadInput(f"{self.path}, line {number}: picture id {int(id_)} stands in line {line_of[int(id_)]} already; ids must be unique")
            index_of[int(id_)] = len(index_of)
            self.offsets.append((start + len(id_) + 1, end - start - len(id_) - 1))
        texts, positives, line_of = [], [], {}
        path = folder / f"{split}_texts.jsonl"
        for number, record in read_jsonl(path):
            text, text_id, image_ids = record.get("text"), record.get("text_id"), record.get("image_ids")
            if not isinstance(text, str) or type(text_id) is not int or not isinstance(image_ids, list):                # (True is an int to isinstance)
                raise BadInput(f'{path}, line {number}: expected {{"text_id": number, "text": "…", "image_ids": [numbers]}}, found {json.dumps(record, ensure_ascii=False)[:80]}')
            check_text(text, path, number)
            if line_of.setdefault(text_id, number) != number:
                raise BadInput(f"{path}, line {number}: text_id {text_id} stands in line {line_of[text_id]} already; ids must be unique")
            for image_id in image_ids:
                if type(image_id) is not int or image_id not in index_of:
                    raise BadInput(f"{path}, line {number}: image_id {image_id!r} is not in {self.path.name}")
            texts.append(text)
            positives.append([index_of[image_id] for image_id in dict.fromkeys(image_ids)])
        super().__init__(f"{folder.resolve().name}/{split}", texts, list(index_of), positives, context_length)

    def _lines(self):
        """(number, start, end, the line's first 64 bytes) of every line, without reading the file into memory."""
        with open(self.path, "rb") as f:
            if not self.path.stat().st_size:
                return
            with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as m, system.Progress(f"{self.path.name}: MiB indexed", len(m) / 2**20) as progress:
                start, number = 0, 0
                while start < len(m):
                    end = m.find(b"\n", start)
                    end = len(m) if end < 0 else end
                    number += 1
                    yield number, start, end, m[start : min(end, start + 64)]
                    progress.add((end + 1 - start) / 2**20)
                    start = end + 1

    def files(self):
        return [self.path]

    def picture_place(self, i):
        return {"file": str(self.path), "offset": self.offsets[i][0], "picture": self.image_ids[i]}

    def picture_bytes(self, i):
        with open(self.path, "rb") as f:
            f.seek(self.offsets[i][0])
            text = f.read(self.offsets[i][1])
        return base64.b64decode(text.strip().translate(bytes.maketrans(b"-_", b"+/")), validate=True)   # published sets use both base64 alphabets


class FolderSplit(Split):
    """A folder of pictures with captions.csv or captions.jsonl."""

    def __init__(self, folder, split, context_length):
        self.folder = folder
        index_of, described, present = {}, {}, set()                            # picture -> index; caption -> the pictures it describes
        for image, caption, belongs in caption_rows(caption_file(folder)):
            present.add(belongs)
            if belongs == split:
                described.setdefault(caption, {})[index_of.setdefault(image, len(index_of))] = None                  # as keys: the same row twice says nothing new
        if not described:
            raise BadInput(f"{folder}: no split {split!r}; it has {', '.join(sorted(present)) or 'no rows at all'}; the column `split` of the captions file names them (train, valid, test)")
        super().__init__(f"{folder.resolve().name}/{split}", list(described), list(index_of), [list(images) for images in described.values()], context_length)

    def files(self):
        return [self.folder / image for image in self.image_ids]

    def picture_place(self, i):
        return {"file": str(self.folder / self.image_ids[i]), "offset": 0, "picture": self.image_ids[i]}

    def picture_bytes(self, i):
        return (self.folder / self.image_ids[i]).read_bytes()


def caption_file(folder):
    """The folder's captions.csv or captions.jsonl, or None."""
    present = [folder / name for name in ("captions.csv", "captions.jsonl") if (folder / name).is_file()]
    if len(present) == 2:
        raise BadInput(f"{folder}: it has both captions.csv and captions.jsonl; remove one")
    return present[0] if present else None


def caption_rows(path):
    """(picture, caption, split) of every row of a caption file that is not blank. The pictures are there, each in one split."""
    split_of, marked = {}, None                                                 # picture -> split; whether the rows name one
    for number, row in read_csv(path) if path.suffix == ".csv" else read_jsonl(path):
        image, caption, split = row.get("image"), row.get("caption"), row.get("split") or ""
        if isinstance(caption, str) and not caption.strip():
            raise BadInput(f"{path}, line {number}: the caption is empty; fill it in or delete the row")
        if not all(isinstance(x, str) for x in (image, caption, split)) or not image.strip():
            raise BadInput(f"{path}, line {number}: expected an `image` and a `caption`, found {json.dumps(row, ensure_ascii=False)[:80]}")
        check_text(image + caption + split, path, number)
        image = posixpath.normpath(image.strip().replace("\\", "/"))            # Windows writes paths with backslashes
        split = split.strip().lower()
        if marked not in (None, bool(split)):
            raise BadInput(f"{path}, line {number}: `split` is {'given here but not' if split else 'empty here but given'} in the rows above; give it in every row or in none")
        marked = bool(split)
        split = split or hashed_split(image)
        if image not in split_of and not os.path.isfile(path.parent / image):
            raise BadInput(f"{path}, line {number}: there is no picture {path.parent / image}")
        if split_of.setdefault(image, split) != split:
            raise BadInput(f"{path}, line {number}: picture {image} is in the split {split} here and in {split_of[image]} above; a picture belongs to one split")
        yield image, caption.strip(), split


def is_text(text):
    """Whether it is whole characters. JSON can spell half of one (a lone surrogate), and what is not UTF-8 in names of files becomes such; no tokenizer can read them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_text(text, path, number):
    if not is_text(text):
        raise BadInput(f"{path}, line {number}: the text holds a broken character (a lone surrogate): {text.encode('utf-8', 'replace').decode()[:60]}") from None


def hashed_split(image):
    """80 % train, 10 % valid, 10 % test: a property of the path alone, so adding pictures moves none of the others."""
    digit = hashlib.md5(image.encode()).digest()[0] % 10
    return {0: "valid", 1: "test"}.get(digit, "train")


def read_jsonl(path):
    """(line number, object) of every line that is not blank."""
    for number, line in system.utf8_lines(path):
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:                       # not JSON, or numbers too long or lists too deep to be meant
                raise BadInput(f"{path}, line {number}: not JSON ({error}): {line.strip()[:60]}") from None
            if not isinstance(record, dict):
                raise BadInput(f"{path}, line {number}: expected an object {{…}}, found {line.strip()[:60]}")
            yield number, record


def read_csv(path):
    """(line number, {column: value}) of every row that is not blank; the first line names the columns, `image` and `caption` among them."""
    reader, start = csv.reader((line for _, line in system.utf8_lines(path)), strict=True), 1
    try:
        columns = [name.strip().lower() for name in next(reader, [])]
        if not {"image", "caption"} <= set(columns) or len(set(columns)) < len(columns):
            raise BadInput(f"{path}, line 1: expected the column names image,caption (with a comma between them, each once); found {','.join(columns) or 'nothing'}")
        while True:
            start = reader.line_num + 1                                         # a row may go over several lines: its first one is the one to look at
            row = next(reader, None)
            if row is None:
                return
            if not any(cell.strip() for cell in row):                           # spreadsheets leave rows of empty cells
                continue
            if len(row) > len(columns):
                raise BadInput(f'{path}, line {start}: more columns than the first line names; put a caption that has commas in "quotes"')
            yield start, dict(zip(columns, row))
    except csv.Error as error:
        raise BadInput(f"{path}, line {start}: not CSV ({error}); every \" must have its partner, a \" inside a caption is written \"\", and lines end as on Windows or Unix") from None


# ---------------------------------------------------------------------------------------------------------------- tar shards

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
LARGEST = 2**28                                                                 # bytes of a picture file: more is a mistake, or an attack
# An index is an int64 table beside its shard, one row per pair, all in bytes, a size of -1 for what is missing:
#     picture's offset, its size, caption's offset, its size, whether that is JSON, which of its captions is meant
# after a first row that tells for which file it was made:
#     version, size of the shard, its time of change (ns), where it is damaged (-1: nowhere), 0, 0
INDEX_VERSION, COLUMNS = 1, 6


class ShardSplit(Split):
    """Tar shards. In memory are the shards' names and counts; indexes, pictures and captions are read where they are needed, so any number of pairs will do.

    What only an evaluation needs (texts, image_ids, positives, ids) is read from the shards at the first use.
    """

    def __init__(self, shards, name, context_length):
        self.shards, self.name, self.context_length = shards, name, context_length
        self.tokenizer = Tokenizer(name)
        counts = self._build_indexes()
        self.starts = np.concatenate([[0], np.cumsum(counts)])                  # (S + 1,): shard s holds pairs starts[s] .. starts[s+1] - 1
        if not len(self):
            raise BadInput(f"{name}: no pictures with captions in {len(shards)} shard{'s' * (len(shards) > 1)}; expected 0001.jpg, right after it 0001.txt or 0001.json, and so on (the name ends at the first dot)")

    def _build_indexes(self):
        """Make the indexes that are missing -> number of pairs in each shard. Processes of one run start at different shards, so they share the work without a word."""
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        counts, self.damaged = {}, []
        first = len(self.shards) * rank // world
        with system.Progress(f"{self.name}: shards indexed", len(self.shards)) as progress:
            for s in [*range(first, len(self.shards)), *range(first)]:
                index = shard_index(self.shards[s])
                counts[s] = len(index) - 1
                if index[0, 3] >= 0:
                    self.damaged.append(self.shards[s])
                    warnings.warn(f"{self.shards[s]}: damaged or cut short at byte {index[0, 3]:,}; what comes after is lost ({counts[s]:,} pairs are there). Replace it")
                progress.add()
        return [counts[s] for s in range(len(self.shards))]

    def __len__(self):
        return int(self.starts[-1])

    def _row(self, k):
        s = int(np.searchsorted(self.starts, k, side="right")) - 1
        index = opened_index(self.shards[s])
        if len(index) - 1 != self.starts[s + 1] - self.starts[s]:
            raise OSError(f"{self.shards[s]}: it was changed while it was being read; run the same command again")
        return self.shards[s], index[k - self.starts[s] + 1].tolist()

    def _place(self, k):
        path, (image, image_size, text, *_) = self._row(k)
        return f"{path}, offset {image if image_size >= 0 else text}"

    def where(self, k):
        path, (image, image_size, text, *_) = self._row(k)
        offset = image if image_size >= 0 else text
        header = os.pread(opened_shard(path).fileno(), 100, offset - 512)       # a file's name is the first field of the header before it
        return {"file": str(path), "offset": offset, "member": header.rstrip(b"\0").decode(errors="replace")}

    def incomplete(self):
        """How many pairs lack their picture or their caption."""
        return sum(int((opened_index(path)[1:, [1, 3]] < 0).any(axis=1).sum()) for path in self.shards)

    def _captions(self, k):
        """The captions of pair k's picture -> which of them is meant, all of them. Raises BadInput when they cannot be read."""
        path, (_, _, text, text_size, is_json, which) = self._row(k)
        name = self._place(k)
        texts = captions_in(read_at(path, text, text_size, f"{name}: the caption"), is_json, name)
        if which >= len(texts):
            raise BadInput(f"{name}: the caption is not what the index says; delete {path}.index, it will be made again")
        return which, texts

    def pair_bytes(self, k):
        """The picture of pair k, as it lies in its shard."""
        path, (image, image_size, *_) = self._row(k)
        return read_at(path, image, image_size, "it")

    def picture_name(self, k):
        return f"{self._place(k)}: the picture"

    def sample(self, epoch, k):
        words = self.words(k)                                                   # first: it costs less, should it fail
        with refused_as(self.picture_name(k)):
            return self.pair_bytes(k), *words

    def words(self, k):
        which, texts = self._captions(k)
        return self.tokenizer([texts[which]], self.context_length)[0].numpy(), [sentence_key(t) for t in texts], sentence_key(texts[which])

    def files(self):
        return self.shards

    def order(self, seed, epoch):
        return ShardOrder(np.diff(self.starts), seed, epoch)

    def fingerprint(self):
        digest = hashlib.md5(json.dumps([(path.name, os.path.getsize(path), int(n)) for path, n in zip(self.shards, np.diff(self.starts))]).encode())
        return f"{len(self):,} pairs in {len(self.shards):,} shards (hash {digest.hexdigest()[:12]})"

    @functools.cached_property
    def _picture_starts(self):
        """(S + 1,): shard s holds pictures starts[s] .. starts[s+1] - 1, in the order in which they lie there."""
        return np.concatenate([[0], np.cumsum([len(first_rows(path)) for path in self.shards])])

    def picture_of(self, k):
        s = int(np.searchsorted(self.starts, k, side="right")) - 1
        return int(self._picture_starts[s] + np.searchsorted(first_rows(self.shards[s]), k - self.starts[s], side="right")) - 1

    def _first_pair(self, i):
        """The first pair of picture i."""
        s = int(np.searchsorted(self._picture_starts, i, side="right")) - 1
        return int(self.starts[s] + first_rows(self.shards[s])[i - self._picture_starts[s]])

    def picture_count(self):
        return int(self._picture_starts[-1])

    def picture(self, i):
        return decoded(lambda: self.picture_bytes(i), self.picture_name(self._first_pair(i)))

    def picture_bytes(self, i):
        return self.pair_bytes(self._first_pair(i))

    @functools.cached_property
    def _whole(self):
        """-> ({caption: the pictures that it describes}, names of the pictures): for evaluation, which needs all of them."""
        if self.damaged:
            raise BadInput(f"{self.damaged[0]}: damaged or cut short, so recall would be that of a part; replace it")
        described = {}
        for k in range(len(self)):
            if self._row(k)[1][1] < 0:
                raise BadInput(f"{self._place(k)}: a caption without a picture; remove it")
            which, texts = self._captions(k)
            described.setdefault(texts[which], {})[self.picture_of(k)] = None                       # as keys: the same caption twice says nothing new
        return described, [self._place(self._first_pair(i)) for i in range(self.picture_count())]

    texts = functools.cached_property(lambda self: list(self._whole[0]))
    positives = functools.cached_property(lambda self: [list(images) for images in self._whole[0].values()])
    image_ids = functools.cached_property(lambda self: self._whole[1])
    ids = functools.cached_property(lambda self: self.tokenizer(self.texts, self.context_length).numpy().astype(np.uint16))


class ShardOrder:
    """The order of the n pairs of some shards in an epoch, place -> pair: random, and yet the files are read nearly from front to back.

    The shards are shuffled and taken 16 together. Those are cut into K windows of about 8,192 pairs: window k has the k-th of K equal stretches of each of the 16 shards, in random
    order. So at any time 16 stretches of files are being read, and what is kept in memory are the numbers of one window's pairs. A function of (seed, epoch) and the shards' counts alone.
    """

    TOGETHER, WINDOW = 16, 8192

    def __init__(self, counts, seed, epoch):
        self.seed, self.epoch = seed, epoch
        starts, shuffled = np.cumsum(counts) - counts, np.random.default_rng([seed, epoch]).permutation(len(counts))
        self.windows, sizes = [], []                                            # (first pairs of the shards, their counts, k, K): window k of K
        for group in (shuffled[g : g + self.TOGETHER] for g in range(0, len(counts), self.TOGETHER)):
            K = max(1, round(counts[group].sum() / self.WINDOW))
            for k in range(K):
                self.windows.append((starts[group], counts[group], k, K))
                sizes.append(((k + 1) * counts[group] // K - k * counts[group] // K).sum())
        self.ends, self.at, self.pairs = np.cumsum(sizes), None, None           # self.pairs: those of window self.at

    def __getitem__(self, place):
        w = int(np.searchsorted(self.ends, place, side="right"))
        if w != self.at:
            firsts, counts, k, K = self.windows[w]
            pairs = np.concatenate([np.arange(first + k * n // K, first + (k + 1) * n // K) for first, n in zip(firsts, counts)])
            self.at, self.pairs = w, np.random.default_rng([self.seed, self.epoch, w]).permutation(pairs)
        return self.pairs[place - self.ends[w]]                                 # from the end: negative


@functools.lru_cache(maxsize=64)
def opened_shard(path):
    return open(path, "rb", buffering=0)                                        # closed when it falls out of the cache


@functools.lru_cache(maxsize=64)
def opened_index(path):
    return shard_index(path, thorough=True)


@functools.lru_cache(maxsize=64)
def first_rows(path):
    """Which pairs of a shard are the first of their picture, whose captions follow each other: (P,) for P pictures."""
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
    """The index of a shard, its first row included; made when there is none of this file: beside it or, where that cannot be written, under CE_CLIP_CACHE. `thorough`: look at all its rows."""
    status = os.stat(path)
    head = [INDEX_VERSION, status.st_size, status.st_mtime_ns]
    cache = system.cache_folder()
    places = [path.with_name(path.name + ".index"), cache / "index" / f"{hashlib.md5(str(path.resolve()).encode()).hexdigest()}.index"]
    for place in places:
        try:
            index = np.load(place, mmap_mode="r")                               # of 20,000 shards only the first rows are looked at now
            if index.dtype == np.int64 and index.ndim == 2 and index.shape[1] == COLUMNS and index[0, :3].tolist() == head and not (thorough and points_outside(index, status.st_size)):
                return index
        except Exception:                                                       # not there, or damaged in one of many ways
            pass
    rows, damaged = scan(path)
    index = np.array([[*head, damaged, 0, 0], *rows], dtype=np.int64)
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            system.write(place, lambda f: np.save(f, index), part=f".{os.getpid()}.part")           # processes that index the same shard write the same
            return index
        except (BadInput, OSError):
            pass
    raise BadInput(f"{places[0]}: cannot be written, nor can {places[1]}; set CE_CLIP_CACHE to a folder with room")


def points_outside(index, size):
    """Whether a row of an index means bytes that a shard of this size has not."""
    image, image_size, text, text_size, _, which = index[1:].T
    return bool((np.minimum(np.minimum(image, text), which) < 0).any() or (np.maximum(image + image_size, text + text_size) > size).any())


def scan(path):
    """One pass over a shard's headers -> (rows of its index, the byte where it is damaged or cut, or -1). Files of a sample follow each other and have the same name up to the first dot."""
    rows, damaged, size = [], [-1], os.path.getsize(path)
    for _, members in itertools.groupby(tar_members(path, damaged), key=lambda member: member[0]):
        files = {extension: (offset, length) for _, extension, offset, length in members}
        image = next((files[e] for e in PICTURES if e in files), (0, -1))
        kind = next((e for e in ("txt", "json") if e in files), None)
        text = files.get(kind, (0, -1))
        if image[1] < 0 and text[1] < 0 or max(image[0] + image[1], text[0] + text[1]) > size:     # neither, or cut off by the end of the file
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
    """(name up to the first dot, the rest of it, offset, size) of every file. `damaged[0]` becomes the byte where the archive stops to be one."""
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
                f.seek(end)                                                     # here are zeros, or it is not the end: tarfile itself stops at a damaged header without a word
                if broken or f.read(512) != bytes(512) or any(any(block) for block in iter(lambda: f.read(2**16), b"")):     # or another archive follows
                    damaged[0] = end
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise BadInput(f"{path}: not an uncompressed tar archive ({error}); unpack .gz, .bz2 and the like first, since pictures are read from anywhere in it") from None


def shards_of(pattern):
    """'a/{000..020}.tar' or 'a/*.tar' -> paths in order; all of them are there."""
    parts = re.split(r"\{(\d+)\.\.(\d+)\}", pattern)
    if math.prod(max(0, int(b) - int(a) + 1) for a, b in zip(parts[1::3], parts[2::3])) > 10**6:
        raise BadInput(f"{pattern}: more than a million shards; is that meant?")
    ranges = [[str(n).zfill(len(a)) for n in range(int(a), int(b) + 1)] for a, b in zip(parts[1::3], parts[2::3])]
    names = ["".join(itertools.chain.from_iterable(itertools.zip_longest(parts[::3], numbers, fillvalue=""))) for numbers in itertools.product(*ranges)]
    paths = [Path(p) for name in names for p in ([name] if os.path.exists(name) or not re.search(r"[*?[]", name) else sorted(glob.glob(name)))]
    missing = [p for p in paths if not p.is_file()]
    if missing or not paths:
        raise BadInput(f"{pattern}: {f'{len(missing):,} of {len(paths):,} shards are missing, the first {missing[0]}' if missing else 'no such shards'}")
    return paths


def write_shards(split, folder, name, per_shard=10_000, processes=1, whole=False):
    """Write a split as tar shards folder/name-000000.tar, …: each picture once, its bytes as they are, with all its captions. Killed, it goes on where it stopped. What cannot be
    read from the old files is named and left out, or with `whole` refused; whether a picture decodes is not looked at.

    The pictures come in a fixed random order, so that every shard is a fair sample of the whole.
    """
    folder = Path(folder)
    if split.endless:
        raise BadInput(f"{split.name} is endless; write valid or test")
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise BadInput(f"{split.name}: the split's name becomes a part of file names; give it one of letters and digits")
    texts_of = [[] for _ in split.image_ids]
    for text, images in zip(split.texts, split.positives):
        for i in images:
            texts_of[i].append(text)
    pictures = [i for i in np.random.default_rng(0).permutation(len(texts_of)).tolist() if texts_of[i]]
    shards = [(folder / f"{name}-{number:06}.tar", pictures[a : a + per_shard]) for number, a in enumerate(range(0, len(pictures), per_shard))]
    plan = json.dumps({"data": split.fingerprint(), "pictures": len(pictures), "per_shard": per_shard})
    marker = folder / f"{name}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (marker.exists() or name in split_shards(folder)) and not (marker.exists() and marker.read_bytes() == plan.encode()):
            raise BadInput(f"{folder}: it holds other shards of {name!r}; name another folder, or delete them and {marker.name}")
        lock = os.open(folder, os.O_RDONLY)                                     # inherited by the helpers: held until the last one ends
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        system.write_text(marker, plan)
    except BlockingIOError:
        raise BadInput(f"{folder}: another process is writing shards there") from None
    except OSError as error:
        raise BadInput(f"{folder}: shards cannot be written there ({error}); make room or name another folder") from None
    jobs = [shards[p::processes] for p in range(min(processes, len(shards)))]
    to_write = sum(len(some) for path, some in shards if not path.exists())
    done = multiprocessing.Value("q")                                           # pictures written, of all helpers
    helpers = [multiprocessing.Process(target=_write_some, args=(split, texts_of, job, done, os.getpid(), whole)) for job in jobs]
    for helper in helpers:
        helper.start()
    with system.Progress(f"{folder}: pictures written", to_write) as progress:
        for helper in helpers:
            while helper.is_alive():
                helper.join(timeout=0.5)
                progress.add(done.value - progress.done)
    os.close(lock)
    if any(helper.exitcode for helper in helpers):
        raise BadInput(f"{folder}: not all shards were written; the line above says why. Run it again to go on")
    print(f"{folder}: {name}: {len(pictures):,} pictures with {sum(map(len, texts_of)):,} captions in {len(shards):,} shard{'s' * (len(shards) > 1)}")


def _write_some(split, texts_of, shards, done, parent, whole):
    system.end_with(parent)
    try:
        for path, pictures in shards:
            if not path.exists():
                system.write(path, lambda f: _fill_shard(f, split, texts_of, pictures, done, whole))
                shard_index(path)
                print(f"{path}: {len(pictures):,} pictures", flush=True)
    except BadInput as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def _fill_shard(f, split, texts_of, pictures, done, whole):
    with tarfile.open(fileobj=f, mode="w") as tar:
        for i in pictures:
            with done.get_lock():
                done.value += 1
            try:
                encoded = split.picture_bytes(i)
            except (BadInput, OSError, ValueError) as error:                    # ValueError: base64
                if whole:
                    raise BadInput(f"{split.name}: picture {split.image_ids[i]} cannot be read ({error}); replace or remove it") from None
                warnings.warn(f"{split.name}: picture {split.image_ids[i]} is left out: it cannot be read ({error})")
                continue
            kind = next((kind for start, kind in ((b"\xff\xd8", "jpg"), (b"\x89PNG", "png"), (b"RIFF", "webp"), (b"GIF8", "gif"), (b"BM", "bmp")) if encoded.startswith(start)), "tif")
            record = json.dumps({"id": split.image_ids[i], "texts": texts_of[i]}, ensure_ascii=False).encode()
            for extension, content in ((kind, encoded), ("json", record)):
                member = tarfile.TarInfo(f"{i:09}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


# ---------------------------------------------------------------------------------------------------------------- finding a data set


def find(data, data_root="data"):
    """A data set's name or folder -> the folder. Raises BadInput when there is none."""
    folder = Path(data)
    if data in NAMES:
        folder = Path(data_root) / NAMES[data]
        if not folder.is_dir():
            raise BadInput(f"{data}: there is no folder {folder}; unpack the data set there or name another place with --data-root")
    elif not folder.is_dir():
        raise BadInput(f"{data}: neither a folder, nor a pattern of tar shards, nor a known data set ({', '.join([*NAMES, *PAINTED])})")
    return folder


def is_pattern(data):
    """Whether this names tar shards. Such a pattern is one split, whatever it is used for."""
    return str(data).endswith(".tar")


def split_shards(folder):
    """{split: its shards, in order} of a folder that has train-000000.tar, …"""
    shards = {}
    for path in sorted(Path(folder).glob("[!.]*.tar")):
        if match := re.fullmatch(r"(.+)-\d+\.tar", path.name):
            shards.setdefault(match[1], []).append(path)
    return shards


def split_names(folder):
    """Names of the splits that a folder holds, in any layout."""
    captions = caption_file(folder)
    names = {split for _, _, split in caption_rows(captions)} if captions else {p.name.removesuffix("_imgs.tsv") for p in folder.glob("[!.]*_imgs.tsv") if p.is_file()}
    names = names or set(split_shards(folder))
    if not names:
        raise BadInput(f"{folder}: no captions.csv or captions.jsonl with rows beside pictures, nor *_imgs.tsv with *_texts.jsonl (Chinese-CLIP layout), nor train-000000.tar, … "
                       f"(for shards with other names pass a pattern: '{folder}/{{000000..000020}}.tar' or '{folder}/*.tar')")
    usual = ["train", "valid", "test"]
    return [name for name in usual if name in names] + sorted(names - set(usual))


def open_split(data, split, data_root="data", context_length=52) -> Split:
    """The split of a data set by name (coco-cn, flickr30k-cn, muge, ap-id, demo, landscapes, poems), folder, or pattern of tar shards. Raises BadInput when there is none."""
    if data in PAINTED:
        return PaintedSplit(data, split, context_length)
    if is_pattern(data):
        return ShardSplit(shards_of(str(data)), str(data), context_length)
    folder = find(data, data_root)
    if caption_file(folder):
        return FolderSplit(folder, split, context_length)
    if split not in split_names(folder):
        raise BadInput(f"{folder}: no split {split!r} ({split}_imgs.tsv or {split}-000000.tar, …); it has {', '.join(split_names(folder))}")
    if not (folder / f"{split}_imgs.tsv").is_file():
        return ShardSplit(split_shards(folder)[split], f"{folder.resolve().name}/{split}", context_length)
    if not (folder / f"{split}_texts.jsonl").is_file():
        raise BadInput(f"{folder}: {split}_texts.jsonl is missing beside {split}_imgs.tsv")
    return TsvSplit(folder, split, context_length)


# ---------------------------------------------------------------------------------------------------------------- pictures without captions

ENDINGS = {f".{kind}" for kind in (*PICTURES, "jpe", "jfif", "avif", "jp2", "ppm", "pgm", "ico", "tga", "heic", "heif")}           # Pillow alone cannot read the last two: better counted than passed over


def picture_files(folder):
    """Every picture under a folder, at any depth, known by the ending of its name -> paths relative to the folder, sorted; and {folder: reason} of those in it that cannot be read.

    What is hidden (.trash, ._cat.jpg) is left out, and so are folders that are links.
    """
    found, unread = [], {}
    for where, folders, files in os.walk(folder, onerror=lambda error: unread.update({os.path.relpath(error.filename, folder): error.strerror})):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [os.path.join(where, name) for name in files if not name.startswith(".") and os.path.splitext(name)[1].lower() in ENDINGS]
        found += [os.path.relpath(path, folder) for path in paths if os.path.isfile(path)]          # a pipe would be waited for
    return sorted(found), unread


def class_root(folder, split=None):
    """Where the class folders are: folder/split; without a split folder/test, or the folder itself when it has no splits. Raises BadInput when they are not there."""
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(f"{folder}: there is no such folder; expected one with a folder for each class: 猫/1.jpg, 狗/1.jpg, …, or test/000, test/001, … beside label_cn.txt")
    holds_folders = lambda path: path.is_dir() and any(inside.is_dir() for inside in path.iterdir())                    # else it is a class of that name
    splits = sorted(name for name in {"train", "val", "valid", "test", split or "test"} if holds_folders(folder / name))
    if (split or "test") in splits:
        return folder / (split or "test")
    if split or splits:
        raise BadInput(f"{folder}: no split {split or 'test'!r}; it has {', '.join(splits) or 'none'}")
    return folder


def open_classes(root):
    """Pictures in one folder for each class, for zero-shot classification -> (C class names, P pictures as paths, P class indices).

    ELEVATER-cn: line i of label_cn.txt beside `root` names class i, counted from 0. Its pictures are in the folder of that name; or in root/000, 001, …; or, in C folders with other
    names (n01440764, …), in the i-th in alphabetical order. Without label_cn.txt the folders' names are the classes': root/猫/*.jpg.
    """
    label_file = next((path for path in (root / "label_cn.txt", root.absolute().parent / "label_cn.txt") if path.is_file()), None)
    shown = lambda names: system.printable(", ".join(names[:5]) + ", …" * (len(names) > 5))
    composed = lambda name: unicodedata.normalize("NFC", name.strip())          # a Mac writes é as two characters
    found = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    numbered = all(name.isdecimal() and name.isascii() for name in found)
    if label_file is None:
        names, class_of = [composed(name) for name in found], {name: i for i, name in enumerate(found)}
        if found and numbered:
            warnings.warn(f"{root}: there is no label_cn.txt, so the folders' numbers are taken for names: {shown(found)}")
    else:
        names = [composed(line) for _, line in system.utf8_lines(label_file)]
        while names and not names[-1]:
            names.pop()
        if not all(names) or not names:
            raise BadInput(f"{label_file}, line {names.index('') + 1 if names else 1}: empty; each line names one class")
        strange = [name for name in found if composed(name) not in names]
        if not strange:
            class_of = {name: names.index(composed(name)) for name in found}
        elif numbered:
            class_of = {name: int(name) for name in found}
            if beyond := [name for name, i in class_of.items() if i >= len(names)]:
                raise BadInput(f"{root}: the folder {beyond[0]} has no line in {label_file}, whose {len(names)} lines name the classes 0 to {len(names) - 1}")
        elif len(strange) < len(found):
            raise BadInput(f"{root}: no line of {label_file} names the folders {shown(strange)}; it does name others")
        elif len(found) == len(names):
            class_of = {name: i for i, name in enumerate(found)}
        else:
            raise BadInput(f"{root}: {len(found)} folders ({shown(found)}) and {len(names)} lines in {label_file}; which belongs to which? Name the folders 000, 001, … or as the lines")
    if len(set(class_of.values())) < len(class_of) or not all(names) or any(not is_text(name) for name in names):
        raise BadInput(f"{root}: two folders with one name or number, or a name that is empty or not UTF-8 ({shown(found)})")
    pictures = []
    for name, i in class_of.items():
        files, unread = picture_files(root / name)
        pictures += [(root / name / file, i) for file in files]
        if unread:
            raise BadInput(f"{root / name / next(iter(unread))}: cannot be read ({next(iter(unread.values()))}), so the figures would be those of a part")
    if len(names) < 2 or not pictures:
        raise BadInput(f"{root}: {len(names)} classes and {len(pictures)} pictures; expected two or more folders, one for each class, with pictures in them")
    if loose := sorted(path.name for path in root.iterdir() if path.is_file() and path.suffix.lower() in ENDINGS):
        warnings.warn(f"{root}: left out, for they are in no class folder: {len(loose):,} ({shown(loose)})")
    if empty := [name for i, name in enumerate(names) if i not in {label for _, label in pictures}]:
        warnings.warn(f"{root}: classes without a picture, which can be guessed all the same: {len(empty):,} ({shown(empty)})")
    return names, [path for path, _ in pictures], [i for _, i in pictures]


# ---------------------------------------------------------------------------------------------------------------- pictures -> tensors

# CLIP's statistics of its training pictures, per RGB channel, of values in 0..1
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def to_rgb(picture):
    """Any PIL picture -> RGB as a person sees it: turned as its EXIF tag says, transparent parts on white, 16-bit grey scaled to 8. RGB pictures stay bit for bit."""
    if picture.getexif().get(0x0112, 1) != 1:                                   # the tag Orientation, 1 = upright
        picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):
        picture = Image.fromarray((np.asarray(picture, dtype=np.int64).clip(0, 65535) // 257).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def to_uint8(picture, size):
    """The pixels of evaluation: a PIL picture -> (3, size, size) uint8, bicubic with antialias, the whole picture, no crop. RGB first: resizing palette indices would mix unrelated colours."""
    picture = to_rgb(picture).resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def training_pixels(picture, size, name):
    """The pixels of training: the bytes of a picture file, or a PIL picture, painted -> (3, size, size) uint8. Raises BadInput with its name when it cannot be read.

    Evaluation's figures are compared with those of other programs, so its pixels are Pillow's, bit for bit. Training has no such duty, but often waits for its pictures: so it takes
    faster ways, to pixels that differ by less than anyone sees (of 255, on photos: 0.005 on average and 2 at most; decoded at a reduced scale 0.1 to 0.8, and 7).
    """
    if isinstance(picture, Image.Image):
        return to_uint8(picture, size)
    with refused_as(name):
        encoded, picture = picture, opened(picture)
        whole = picture.size
        picture.draft(None, (2 * size, 2 * size))                               # a large JPEG is decoded at 1/2, 1/4 or 1/8, a part of the work; each side stays twice as long as needed
        pixels = None
        if picture.format == "JPEG" and picture.size == whole and picture.mode in ("RGB", "L") and picture.getexif().get(0x0112, 1) == 1:
            pixels = jpeg_pixels(encoded)
        if pixels is None:                                                      # every other kind of picture
            picture.load()
            pixels = torch.from_numpy(np.array(to_rgb(picture))).permute(2, 0, 1)
        return resized(pixels, size)


def resized(pixels, size):
    """What `to_uint8` does, by torch, which takes a third of the time where the processor has AVX2: (3, H, W) uint8 that lie in memory as (H, W, 3) -> (3, size, size)."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return to_uint8(Image.fromarray(pixels.permute(1, 2, 0).numpy()), size)
    return F.interpolate(pixels[None], (size, size), mode="bicubic", antialias=True)[0].contiguous()


def jpeg_pixels(encoded):
    """An RGB or grey JPEG -> (3, H, W) uint8, Pillow's bits in less time. None where torchvision cannot: then Pillow decodes it, or says what is wrong with the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                         # torch: that bytes are not to be written to; they are not
        try:
            return jpeg_decoder()(torch.frombuffer(encoded, dtype=torch.uint8))
        except Exception:
            return None


@functools.cache
def jpeg_decoder():
    """torchvision's decode_jpeg, or where that is missing or broken a function that decodes nothing. Of torchvision only this library is loaded: importing the package would cost each
    reader three seconds and 90 MB, and its function of that name only warns (from 0.29 on, that it will go) before it calls this one."""
    try:
        (folder,) = importlib.util.find_spec("torchvision").submodule_search_locations
        torch.ops.load_library(next(Path(folder).glob("image*.so")))            # image.so, from 0.29 on image_stable.so
        return functools.partial(torch.ops.image.decode_jpeg, mode=3)           # 3: ImageReadMode.RGB
    except Exception:                                                           # not there, made for another torch, …
        return lambda _: None


def normalize(pixels):
    """(…, 3, R, R) in 0..1 -> what the vision tower expects."""
    mean, std = statistics_on(pixels.device)
    return (pixels - mean) / std


@functools.lru_cache(maxsize=16)
def statistics_on(device):
    """CLIP_MEAN and CLIP_STD, (3, 1, 1) each: sent to a device once, for a copy would wait until it is idle."""
    return [torch.tensor(channels, device=device).view(3, 1, 1) for channels in (CLIP_MEAN, CLIP_STD)]


class Transform:
    """The evaluation transform: a PIL picture -> (3, R, R) float32."""

    def __init__(self, size):
        self.size = size

    def __call__(self, picture):
        return normalize(to_uint8(picture, self.size).float() / 255)


# How far each kind of augmentation may go, both ways. Rotation in degrees, shift and warp in half picture sides, the rest as
# shares of 1. `photo` moves little, `drawing` is for icons and drawings. Nothing is ever mirrored: captions say left and right, and signs and letters do not survive it.
AUGMENT = {
    "none":    None,
    "photo":   dict(rotate=0, zoom=0.05, stretch=0.03, shift=0.05, warp=0.0, ink=0.1, tint=0.0, saturation=0.1),
    "drawing": dict(rotate=20, zoom=0.25, stretch=0.20, shift=0.12, warp=0.10, ink=0.3, tint=0.2, saturation=0.4),
}
DRAWS = 10 + 2 * 4 * 4                                                          # random numbers that one picture uses


def augment(pixels, draws, rotate, zoom, stretch, shift, warp, ink, tint, saturation):
    """Bend, move and colour a batch: pixels (B, 3, R, R) in 0..1, draws (B, DRAWS) uniform in -1..1, then a row of AUGMENT -> (B, 3, R, R) in 0..1.

    The random numbers come from outside, so that they can be a function of (seed, step, position in the global batch). Outside the picture its border goes on.
    """
    B, _, R, _ = pixels.shape
    angle, size, aspect, dx, dy, dark, vivid, *_ = u = draws.to(pixels.device).T                    # each (B,)
    angle, size, aspect = angle * math.radians(rotate), (size * zoom).exp(), (aspect * stretch).exp()
    x_row = torch.stack([angle.cos() * size * aspect, -angle.sin() * size * aspect, dx * shift], dim=1)
    y_row = torch.stack([angle.sin() * size / aspect, angle.cos() * size / aspect, dy * shift], dim=1)
    grid = F.affine_grid(torch.stack([x_row, y_row], dim=1), pixels.shape, align_corners=False)     # (B, R, R, 2): where each output pixel looks
    if warp:                                                                    # a smooth random field: another hand draws other proportions
        field = F.interpolate(u[10:].T.reshape(B, 2, 4, 4), (R, R), mode="bicubic", align_corners=True)
        grid = grid + warp * field.permute(0, 2, 3, 1)
    pixels = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)

    # Colours change by the ink, 1 - pixels: white paper stays white, dark parts get lighter or darker, each channel a little differently.
    per_picture = lambda draw, most: (1 + most * draw).view(B, 1, 1, 1)
    pixels = 1 - (1 - pixels) * per_picture(dark, ink) * (1 + tint * u[7:10].T.view(B, 3, 1, 1))
    grey = pixels.mean(dim=1, keepdim=True)
    return (grey + (pixels - grey) * per_picture(vivid, saturation)).clamp(0, 1)


# ---------------------------------------------------------------------------------------------------------------- batches for training


def micro_batch_places(batch_size, micro_batch, rank, world):
    """Which places of the global batch each micro-batch of this process takes: a list of ranges.

    The batch is cut into parts of world x micro_batch pairs (the last one may be smaller), and each part into `world` equal slices, of which process r takes the r-th. So all processes
    run equally many micro-batches, and what a part holds depends on the product world x micro_batch alone.
    """
    parts = [(start, min(world * micro_batch, batch_size - start) // world) for start in range(0, batch_size, world * micro_batch)]
    return [range(start + rank * size, start + (rank + 1) * size) for start, size in parts]


class Batches(Sampler):
    """Which pairs each micro-batch takes, as (epoch, pair). The epochs' orders follow each other as one endless stream, and step k takes places k N to (k+1) N - 1 of it. So every
    pair comes once per epoch, no batch is short, the pairs of a step are the same for any number of processes and any micro-batch, and a run resumes at any step.
    """

    def __init__(self, split, batch_size, seed, first_step, last_step, rank=0, world=1, micro_batch=None):
        self.split, self.batch_size, self.seed = split, batch_size, seed
        self.steps, self.places = range(first_step, last_step), micro_batch_places(batch_size, micro_batch or batch_size // world, rank, world)
        self.order = {}                                                         # the epoch at hand -> its order

    def __len__(self):
        return len(self.steps) * len(self.places)

    def __iter__(self):
        for step in self.steps:
            for places in self.places:
                yield self.pairs(step, places)

    def pairs(self, step, places):
        """(epoch, pair) at some places, a range, of the batch that step `step` (from 0) takes."""
        result = []
        for place in range(step * self.batch_size + places.start, step * self.batch_size + places.stop):
            epoch, k = divmod(place, len(self.split))
            if epoch not in self.order:
                self.order = {epoch: self.split.order(self.seed, epoch)}
            result.append((epoch, int(self.order[epoch][k])))
        return result


class TrainingPairs(Dataset):
    """(epoch, pair number) -> tensors of one pair. In the place of one that cannot be read comes the next one that can: as long as reading itself does not fail by chance, a function of
    the data alone. With `features` (features.py) the picture is not read: its embedding stands in its place."""

    def __init__(self, split, image_size, tries=100, features=None):
        self.split, self.image_size, self.tries, self.features = split, image_size, tries, features

    def __getitem__(self, place):
        epoch, k = place
        bad = []                                                                # reports: {"file", "offset", …, "reason"}
        for other in ((k + n) % len(self.split) for n in range(self.tries)):
            try:
                if self.features is not None:
                    return *self.features.sample(self.split, other), bad
                picture, ids, picture_sentences, sentence = self.split.sample(epoch, other)
                return training_pixels(picture, self.image_size, self.split.picture_name(other)), ids, picture_sentences, sentence, bad
            except BadInput as error:
                bad.append({"pair": other, **self.split.where(other), "reason": str(error)})
        raise BadInput(f"{self.split.name}: {self.tries} pairs in a row cannot be read; the first: {bad[0]['reason']}")


def collate(samples):
    """-> pixels (B, 3, R, R) uint8 or features (B, D) float16, ids (B, L) int64, image_keys (B, M) int64: the sentences of each picture, filled up with -1, text_keys (B,), reports of bad pairs."""
    pixels, ids, image_keys, text_keys, bad = zip(*samples)
    most = max(map(len, image_keys))
    image_keys = torch.tensor([list(keys) + [-1] * (most - len(keys)) for keys in image_keys])
    pixels = default_collate(pixels)                                            # as torch.stack; in a reader right into the memory that is shared with training, which spares a copy
    return pixels, torch.from_numpy(np.stack(ids).astype(np.int64)), image_keys, torch.tensor(text_keys), [report for reports in bad for report in reports]


def training_loader(split, image_size, batches, workers, pin_memory=False, features=None):
    return DataLoader(TrainingPairs(split, image_size, features=features), batch_sampler=batches, collate_fn=collate, num_workers=workers, pin_memory=pin_memory,
                      prefetch_factor=4 if workers else None, worker_init_fn=system.reader_start(), timeout=system.READER_SECONDS * (workers > 0))


def own_memory(batch):
    """A batch out of the shared memory through which readers send it, where it would take up open files and room in /dev/shm for as long as it is kept."""
    return [x.clone() if isinstance(x, torch.Tensor) and x.is_shared() else x for x in batch]


# ---------------------------------------------------------------------------------------------------------------- the painted data sets


class PaintedSplit(Split):
    """A split of a painted data set. Where `train` is endless each epoch paints so many new pictures. The others are fixed. In `valid` and `test` what a picture shows is never
    contained in what another shows, so that each caption is true of exactly one; in a fixed `train` no two show the same.
    """

    def __init__(self, data, split, context_length=52):
        sizes, endless, self.draw, self.describe, shown, self.paint, self.split_of = PAINTED[data]
        if split not in sizes:
            raise BadInput(f"{data}: no split {split!r}; it has {', '.join(sizes)}")
        self.name, self.seed, self.endless, size = f"{data}/{split}", f"{data} {split}", endless and split == "train", sizes[split]
        if self.endless:
            self.tokenizer, self.context_length = Tokenizer(self.name), context_length
            self.texts, self.image_ids, self.positives, self.pairs = [], [], [], range(size)
            return
        rng, texts, self.scenes, seen = random.Random(self.seed), [], [], set()
        while len(texts) < size:
            drawn = self.draw(rng)
            scene = shown(drawn)
            alike = scene in seen if split == "train" else any(scene <= other or other <= scene for other in self.scenes)
            if self.split_of(drawn) == split and not alike:
                self.scenes.append(scene)
                seen.add(scene)
                texts.append(self.describe(drawn, rng if split == "train" else None))
        super().__init__(self.name, texts, list(range(size)), [[i] for i in range(size)], context_length)

    def picture(self, i):
        return self.paint(self.scenes[i], random.Random(f"{self.seed} {i}"))

    def picture_bytes(self, i):
        file = io.BytesIO()
        self.picture(i).save(file, "PNG", compress_level=1)                     # fast
        return file.getvalue()

    def where(self, k):
        return {"file": self.name, "offset": k}

    def picture_name(self, k):
        return f"{self.name}: picture {k}"

    def sample(self, epoch, k):
        if not self.endless:                                                    # pair k is picture k with caption k
            return self.picture(k), *self.words(k)
        number = epoch * len(self) + k
        rng = random.Random(f"{self.seed} {number}")
        scene = self.draw(rng)
        while self.split_of(scene) != "train":
            scene = self.draw(rng)
        ids = self.tokenizer([self.describe(scene, rng)], self.context_length)[0].numpy()
        meaning = sentence_key(self.describe(scene))                            # the same scene in other words has the same key
        return self.paint(scene, rng), ids, [meaning], meaning


# ---------------------------------------------------------------------------------------------------------------- command line


def main():
    if sys.argv[1:2] in (["fetch"], ["convert"], ["check"]):
        import prepare                                                          # it builds on this file
        return prepare.main()
    parser = argparse.ArgumentParser(description="What a data set holds; and any data set as tar shards.", formatter_class=argparse.RawDescriptionHelpFormatter, epilog="""three further commands, each with its own --help:
  data.py fetch NAME              download a published data set
  data.py convert SOURCE DEST     write an original release, or any layout, as a folder that is read here
  data.py check DATA              look at every picture and every caption
(a folder of such a name: ./check)""")
    parser.add_argument("data", help=f"{', '.join([*NAMES, *PAINTED])}, a folder, or a pattern of tar shards like 'shards/{{000000..000020}}.tar'")
    parser.add_argument("--data-root", default="data", help="where the named data sets lie (default: data)")
    parser.add_argument("--split", help="the split to --draw (default: test), or the only one to --write-shards of (default: all)")
    parser.add_argument("--draw", metavar="FILE.png", help="write a sheet of up to 24 pictures and print a caption of each")
    parser.add_argument("--write-shards", metavar="DIR", help="write the data set as tar shards")
    parser.add_argument("--per-shard", type=int, default=10_000, help="pictures in a shard (default: 10000)")
    parser.add_argument("--processes", type=int, default=1, help="that write shards side by side (default: 1)")
    args = parser.parse_args()
    if not (1 <= args.per_shard <= 1e7 and 1 <= args.processes <= 512):
        raise BadInput(f"--per-shard {args.per_shard} --processes {args.processes}: out of range, 1 to 1e7 and 1 to 512")
    if args.draw:
        return draw_sheet(open_split(args.data, args.split or "test", args.data_root), args.draw)
    names = all_names(args.data, args.data_root)
    if args.write_shards is not None:
        if not args.write_shards:
            raise BadInput("--write-shards '': name a folder")
        endless = args.data in PAINTED and PAINTED[args.data].endless
        for name in [args.split] if args.split else names[endless:]:            # an endless one has no end to write; the first, train
            write_shards(open_split(args.data, name, args.data_root), args.write_shards, name, args.per_shard, args.processes)
        return print(f"Train on them with --data {args.write_shards}")
    for name in names:
        split = open_split(args.data, name, args.data_root)
        print(summary("all" if is_pattern(args.data) else name, split) + against_paper(args.data, name, len(split)))


def all_names(data, data_root="data"):
    """Names of the splits of whatever --data can be."""
    return ["train"] if is_pattern(data) else list(PAINTED[data][0]) if data in PAINTED else split_names(find(data, data_root))


def summary(name, split):
    """A line: what a split holds."""
    if split.endless:
        return f"{name:8} endless; {len(split):,} pairs an epoch"
    if isinstance(split, ShardSplit):
        return f"{name:8} {len(split.shards):8,} shards   {len(split):8,} pairs, {split.incomplete():,} of them without picture or caption"
    return f"{name:8} {len(split.image_ids):8,} pictures {len(split.texts):8,} captions {len(split):8,} pairs"


def against_paper(name, split_name, pairs):
    """What to add to such a line of a named data set: whether it has as many pairs as in the paper's table 1."""
    published = TABLE_1.get(name, {}).get(split_name)
    return "" if not published else ", as in the paper's table 1" if published == pairs else f"; the paper's table 1 has {published:,}"


def draw_sheet(split, path):
    """Up to 24 pictures that have a caption, evenly out of the split, six in a row; prints a caption of each."""
    if split.endless:
        raise BadInput(f"{split.name} is endless: draw valid or test")
    caption_of = {i: text for text, images in reversed(list(zip(split.texts, split.positives))) for i in images}    # each picture's first caption
    chosen = [i for i in range(len(split.image_ids)) if i in caption_of]
    if not chosen:
        raise BadInput(f"{split.name}: no caption names a picture, so there is nothing to draw")
    count = min(24, len(chosen))
    chosen = [chosen[place * len(chosen) // count] for place in range(count)]
    sheet = Image.new("RGB", (min(6, len(chosen)) * 134, -(-len(chosen) // 6) * 134), "white")
    for place, i in enumerate(chosen):
        sheet.paste(split.picture(i).resize((128, 128)), (place % 6 * 134, place // 6 * 134))
    try:
        sheet.save(path)
    except (OSError, ValueError, KeyError) as error:                            # KeyError: a format that Pillow reads but cannot write
        raise BadInput(f"--draw {path}: cannot be written ({error})") from None
    for place, i in enumerate(chosen):
        print(f"row {place // 6 + 1}, column {place % 6 + 1}: picture {split.image_ids[i]}: {caption_of[i]}")
    print(f"wrote {path}")


if __name__ == "__main__":
    system.run(main)
