"""Pictures and captions on disk -> batches, in an order that is a function of (seed, epoch) alone.

    python data.py coco-cn --data-root data          # what a data set holds: pictures, captions and pairs per split
    python data.py poems --draw poems.png            # look at a painted data set
    python data.py coco-cn --write-shards coco-shards --processes 4        # any layout -> tar shards
    python data.py 'shards/{000000..000020}.tar'     # build the shards' indexes, say how many pairs they hold
    python data.py fetch coco-cn                     # get it from the web; and `convert`, `check`: see prepare.py

The words of this file, each for one thing:

data set       what --data names: a known name, a folder, or a pattern of tar shards
split          a part of it that is used for one purpose: train, valid or test. A `Split` is an object, whatever the layout on disk
picture i      0 … I - 1, its number in the split. Its id (`image_ids[i]`) is what the data set calls it: a number or a path
caption t      0 … T - 1, its number in the split; its key (`text_keys[t]`) is a number that equal sentences share
pair k         0 … len(split) - 1: a caption and a picture that it describes: what training counts, shuffles and samples
sample         what training takes of a pair: its picture, the caption's tokens, and the keys that tell which others match (see collate)
epoch          once through all pairs, in an order of its own
place          where in an order something stands. The epochs' orders follow each other as one endless stream of places
batch          the pairs of one step, of all processes together; a micro-batch is what one process embeds at a time
shard          a tar file with some of the pairs

Read it in the order in which data flows, which is the order of the sections: a `Split` and what each layout makes of it (files with
offsets, folders, shards, painted ones) -> `open_split` finds it -> one picture becomes pixels (`to_uint8`, `training_pixels`,
`augment`) -> pairs become batches (`Batches`, `TrainingPairs`, `collate`). What comes after that is beside the way: writing shards,
folders of classes, the command line.

Four layouts, one interface:

1. Chinese-CLIP: {train,valid,test}_imgs.tsv with lines `id<TAB>base64 picture`, and {split}_texts.jsonl with
   {"text_id": 1, "text": "…", "image_ids": [7]}.
2. A folder of pictures with captions.csv (first line: image,caption) or captions.jsonl ({"image": "a.jpg", "caption": "…"}),
   paths relative to the folder. A picture may stand in several rows. A further column `split` (train, valid, test, …) divides the
   pictures; without it 80 % train, 10 % valid, 10 % test, by a hash of the path.
3. Tar shards (WebDataset), for any number of pictures: files key.jpg (png, webp, …) beside key.txt, the caption, or key.json with
   {"text": "…"}, {"caption": "…"} or {"texts": ["…", "…"]}; named by a pattern such as 'shards/{000000..000020}.tar' or
   'shards/*.tar', or a folder with train-000000.tar, …, valid-000000.tar, ….
4. Painted here, no download (painter.py): `demo`, coloured things in the quarters of a picture, endless; `landscapes` and
   `english-landscapes`, whose captions say what is in them, in Chinese and in English; `poems`, landscapes whose captions are lines of
   classical verse, of the sizes of the paper's own set of poems and pictures.

Pictures are read when a worker needs them; the captions of layouts 1 and 2 are kept in memory, those of shards are not. A pair that
cannot be read is replaced by the next one that can, and reported (`TrainingPairs`).

Letters in the shapes: I pictures, T captions, n pairs, L tokens of a caption; B pairs of a micro-batch, M sentences of a picture, at
most, R pixels along a side, D width of an embedding.
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


# ---------------------------------------------------------------------------------------------------------------- a split


class Split:
    """One split of a data set: T captions, I pictures, and which pictures each caption describes. Training and evaluation know no more of
    the data than this class, so a new layout is a subclass: what it passes to __init__, and picture_bytes, picture_location and files.

    name           for messages, e.g. "COCO-CN/test"
    texts          T captions
    image_ids      I ids
    positives      T lists of picture numbers: positives[t] = the pictures that caption t describes; may be empty (then t is no query)
    pairs          (t, i) of each pair, in the data set's order
    ids            (T, L) uint16 tokens of the captions (the vocabulary has 21,128)
    text_keys      T keys of the captions
    image_keys     I lists of keys: the sentences that describe a picture. Two pairs of a batch match when one's picture has the other's key
    endless        whether each epoch has new pictures (the painted train split): then there are no fixed texts, image_ids, …, but
                   what training asks for

    Training asks for len(), sample(), picture_name(), order(), where() and fingerprint(); with features kept also for words(),
    picture_of(), picture_count() and picture(). Evaluation asks for texts, image_ids, positives, ids and picture().
    """

    endless = False

    def __init__(self, name, texts, image_ids, positives, context_length=52):
        if not texts or not image_ids:
            raise BadInput(f"{name}: the split is empty ({len(image_ids)} pictures, {len(texts)} captions)")
        self.name, self.texts, self.image_ids, self.positives = name, texts, image_ids, positives
        self.ids = Tokenizer(name)(texts, context_length).numpy().astype(np.uint16)
        self.pairs = [(t, i) for t, images in enumerate(positives) for i in images]
        self.text_keys = [sentence_key(text) for text in texts]
        self.image_keys = [[] for _ in image_ids]
        for t, i in self.pairs:
            self.image_keys[i].append(self.text_keys[t])

    def __len__(self):
        return len(self.pairs)

    # What training asks for.

    def order(self, seed, epoch):
        """Which pair stands at each place of an epoch: (n,) a permutation, a function of (seed, epoch) and of nothing else."""
        return np.random.default_rng([seed, epoch]).permutation(len(self))

    def sample(self, epoch, k):
        """Pair k -> (its picture, tokens (L,), keys of all sentences that describe the picture, key of this one). Here all epochs
        are alike.

        The picture is the bytes of its file, so that a worker can decode them in the cheapest way (training_pixels), or of a
        painted set the picture itself. Raises BadInput when the file cannot be read; whether it decodes is seen later.
        """
        with refused_as(self.picture_name(k)):
            return self.picture_bytes(self.picture_of(k)), *self.words(k)

    def words(self, k):
        """What sample() gives of pair k beside the picture, which is not touched."""
        t, i = self.pairs[k]
        return self.ids[t], self.image_keys[i], self.text_keys[t]

    def picture_of(self, k):
        """The number of pair k's picture."""
        return self.pairs[k][1]

    def picture_count(self):
        return len(self.image_ids)

    def fingerprint(self):
        """A short text that changes when the captions, the pictures' ids, their relation or the first sample change: by it a
        resumed run, or kept features, notice that the data are others. (The other samples are not read: that would take as long as
        an epoch.)"""
        digest = hashlib.md5(json.dumps([self.texts, self.image_ids, self.positives], ensure_ascii=False).encode())
        try:
            picture, ids, *_ = self.sample(0, 0)
            digest.update((picture if isinstance(picture, bytes) else picture.tobytes()) + ids.tobytes())
        except (BadInput, IndexError):                                          # unreadable, or there are no pairs
            digest.update(b"none")
        return f"{len(self):,} pairs (hash {digest.hexdigest()[:12]})"

    # What evaluation asks for.

    def picture(self, i) -> Image.Image:
        """Picture i, decoded, RGB. Raises BadInput with its id when it cannot be read."""
        return decoded(lambda: self.picture_bytes(i), f"{self.name}: picture {self.image_ids[i]}")

    # For messages and reports.

    def picture_name(self, k):
        """What a message calls the picture of pair k."""
        return f"{self.name}: picture {self.image_ids[self.picture_of(k)]}"

    def where(self, k):
        """Where pair k lies on disk, for a report: {"file", "offset" in bytes, …} (of the painted set: its number)."""
        t, i = self.pairs[k]
        return self.picture_location(i) | {"caption": self.texts[t]}

    def files(self):
        """The files in which the pictures lie."""
        return []                                                               # of painted ones


def sentence_key(text):
    """A number for a sentence: equal for equal ones (and, by a chance of 1 in 2^56, for two others)."""
    return int.from_bytes(hashlib.md5(text.encode()).digest()[:7], "big")       # 7 bytes fit into an int64


# ---------------------------------------------------------------------------------------------------------------- the Chinese-CLIP layout


class TsvSplit(Split):
    """The layout of the published sets. One file holds all pictures, so of it only the ids and byte offsets are kept."""

    def __init__(self, folder, split, context_length):
        self.path = folder / f"{split}_imgs.tsv"
        index_of = self._read_offsets()
        texts, positives = self._read_texts(folder / f"{split}_texts.jsonl", index_of)
        super().__init__(f"{folder.resolve().name}/{split}", texts, list(index_of), positives, context_length)

    def _read_offsets(self):
        """Sets self.offsets, (start, length) of each picture's base64 text; -> {picture id: number}."""
        self.offsets, index_of, line_of = [], {}, {}
        for number, start, end, line in self._lines():
            if start == end or not line.strip():
                continue
            id_, tab, _ = line.partition(b"\t")
            if not tab or not id_.strip().isdigit():
                raise BadInput(f"{self.path}, line {number}: expected `number<TAB>base64 picture`, found {line[:40]!r}")
            if line_of.setdefault(int(id_), number) != number:
                raise BadInput(f"{self.path}, line {number}: picture id {int(id_)} stands in line {line_of[int(id_)]} already; "
                               f"ids must be unique")
            index_of[int(id_)] = len(index_of)
            self.offsets.append((start + len(id_) + 1, end - start - len(id_) - 1))
        return index_of

    def _read_texts(self, path, index_of):
        """-> the captions, and for each the numbers of its pictures."""
        texts, positives, line_of = [], [], {}
        for number, record in read_jsonl(path):
            text, text_id, image_ids = record.get("text"), record.get("text_id"), record.get("image_ids")
            is_number = type(text_id) is int                                    # True is an int to isinstance
            if not isinstance(text, str) or not is_number or not isinstance(image_ids, list):
                raise BadInput(f'{path}, line {number}: expected {{"text_id": number, "text": "…", "image_ids": [numbers]}}, '
                               f"found {json.dumps(record, ensure_ascii=False)[:80]}")
            check_text(text, path, number)
            if line_of.setdefault(text_id, number) != number:
                raise BadInput(f"{path}, line {number}: text_id {text_id} stands in line {line_of[text_id]} already; ids must be unique")
            for image_id in image_ids:
                if type(image_id) is not int or image_id not in index_of:
                    raise BadInput(f"{path}, line {number}: image_id {image_id!r} is not in {self.path.name}")
            texts.append(text)
            positives.append([index_of[image_id] for image_id in dict.fromkeys(image_ids)])         # dict: an id given twice counts once
        return texts, positives

    def _lines(self):
        """(number, start, end, the line's first 64 bytes) of every line, without reading the file into memory."""
        with open(self.path, "rb") as f:
            if not self.path.stat().st_size:                                    # an empty file cannot be mapped
                return
            mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
            with mapped as m, system.Progress(f"{self.path.name}: MiB indexed", len(m) / 2**20) as progress:
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

    def picture_location(self, i):
        return {"file": str(self.path), "offset": self.offsets[i][0], "picture": self.image_ids[i]}

    def picture_bytes(self, i):
        start, length = self.offsets[i]
        with open(self.path, "rb") as f:
            f.seek(start)
            text = f.read(length)
        standard = text.strip().translate(bytes.maketrans(b"-_", b"+/"))        # published sets use both base64 alphabets
        return base64.b64decode(standard, validate=True)


# ---------------------------------------------------------------------------------------------------------------- a folder with captions


class FolderSplit(Split):
    """A folder of pictures with captions.csv or captions.jsonl: the layout for your own pictures."""

    def __init__(self, folder, split, context_length):
        self.folder = folder
        index_of, described, present = {}, {}, set()                            # path -> picture; caption -> the pictures it describes
        for image, caption, belongs in caption_rows(caption_file(folder)):
            present.add(belongs)
            if belongs == split:
                i = index_of.setdefault(image, len(index_of))
                described.setdefault(caption, {})[i] = None                     # as keys: the same row twice says nothing new
        if not described:
            raise BadInput(f"{folder}: no split {split!r}; it has {', '.join(sorted(present)) or 'no rows at all'}; "
                           f"the column `split` of the captions file names them (train, valid, test)")
        positives = [list(images) for images in described.values()]
        super().__init__(f"{folder.resolve().name}/{split}", list(described), list(index_of), positives, context_length)

    def files(self):
        return [self.folder / image for image in self.image_ids]

    def picture_location(self, i):
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
            difference = "given here but not" if split else "empty here but given"
            raise BadInput(f"{path}, line {number}: `split` is {difference} in the rows above; give it in every row or in none")
        marked = bool(split)
        split = split or hashed_split(image)
        if image not in split_of and not os.path.isfile(path.parent / image):
            raise BadInput(f"{path}, line {number}: there is no picture {path.parent / image}")
        if split_of.setdefault(image, split) != split:
            raise BadInput(f"{path}, line {number}: picture {image} is in the split {split} here and in {split_of[image]} above; "
                           f"a picture belongs to one split")
        yield image, caption.strip(), split


def hashed_split(image):
    """80 % train, 10 % valid, 10 % test: a property of the path alone, so adding pictures moves none of the others."""
    digit = hashlib.md5(image.encode()).digest()[0] % 10
    return {0: "valid", 1: "test"}.get(digit, "train")


def is_text(text):
    """Whether it is whole characters. JSON can spell half of one (a lone surrogate), and what is not UTF-8 in names of files becomes such;
    no tokenizer can read them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_text(text, path, number):
    if not is_text(text):
        shown = text.encode("utf-8", "replace").decode()[:60]
        raise BadInput(f"{path}, line {number}: the text holds a broken character (a lone surrogate): {shown}") from None


def read_jsonl(path):
    """(line number, object) of every line that is not blank."""
    for number, line in system.utf8_lines(path):
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:                       # not JSON, or numbers too long or lists too deep
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
            raise BadInput(f"{path}, line 1: expected the column names image,caption (with a comma between them, each once); "
                           f"found {','.join(columns) or 'nothing'}")
        while True:
            start = reader.line_num + 1                                         # a row may go over several lines: a message names the first
            row = next(reader, None)
            if row is None:
                return
            if not any(cell.strip() for cell in row):                           # spreadsheets leave rows of empty cells
                continue
            if len(row) > len(columns):
                raise BadInput(f"{path}, line {start}: more columns than the first line names; "
                               f'put a caption that has commas in "quotes"')
            yield start, dict(zip(columns, row))
    except csv.Error as error:
        raise BadInput(f"{path}, line {start}: not CSV ({error}); every \" must have its partner, a \" inside a caption is written \"\", "
                       f"and lines end as on Windows or Unix") from None


# ---------------------------------------------------------------------------------------------------------------- tar shards

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
LARGEST = 2**28                                                                 # bytes of a picture file: more is a mistake, or an attack
# An index is an int64 table beside its shard, one row per pair, all in bytes, a size of -1 for what is missing:
#     picture's offset, its size, caption's offset, its size, whether that is JSON, which of its captions is meant
# after a first row that tells for which file it was made:
#     version, size of the shard, its time of change (ns), where it is damaged (-1: nowhere), 0, 0
INDEX_VERSION, COLUMNS = 1, 6


class ShardSplit(Split):
    """Tar shards: the layout for more pairs than memory holds. In memory are the shards' names and counts; indexes, pictures and
    captions are read where they are needed. What only an evaluation needs (texts, image_ids, positives, ids) is read from the
    shards at the first use.
    """

    def __init__(self, shards, name, context_length):
        self.shards, self.name, self.context_length = shards, name, context_length
        self.tokenizer = Tokenizer(name)
        counts = self._build_indexes()
        self.starts = np.concatenate([[0], np.cumsum(counts)])                  # shard s holds pairs starts[s] … starts[s+1] - 1
        if not len(self):
            raise BadInput(f"{name}: no pictures with captions in {len(shards)} shard{'s' * (len(shards) > 1)}; expected 0001.jpg, "
                           f"right after it 0001.txt or 0001.json, and so on (the name ends at the first dot)")

    def _build_indexes(self):
        """Make the indexes that are missing -> number of pairs in each shard. Processes of one run start at different shards, so
        they share the work without a word."""
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        counts, self.damaged = {}, []
        first = len(self.shards) * rank // world
        with system.Progress(f"{self.name}: shards indexed", len(self.shards)) as progress:
            for s in [*range(first, len(self.shards)), *range(first)]:
                index = shard_index(self.shards[s])
                counts[s] = len(index) - 1
                if index[0, 3] >= 0:
                    self.damaged.append(self.shards[s])
                    warnings.warn(f"{self.shards[s]}: damaged or cut short at byte {index[0, 3]:,}; what comes after is lost "
                                  f"({counts[s]:,} pairs are there). Replace it")
                progress.add()
        return [counts[s] for s in range(len(self.shards))]

    def __len__(self):
        return int(self.starts[-1])

    # Pairs, for training.

    def order(self, seed, epoch):
        return ShardOrder(np.diff(self.starts), seed, epoch)

    def sample(self, epoch, k):
        words = self.words(k)                                                   # first: it costs less, should it fail
        with refused_as(self.picture_name(k)):
            return self.pair_bytes(k), *words

    def words(self, k):
        which, texts = self._captions(k)
        ids = self.tokenizer([texts[which]], self.context_length)[0].numpy()    # (L,)
        return ids, [sentence_key(text) for text in texts], sentence_key(texts[which])

    def pair_bytes(self, k):
        """The picture of pair k, as it lies in its shard."""
        path, (image, image_size, *_) = self._row(k)
        return read_at(path, image, image_size, "it")

    def _captions(self, k):
        """The captions of pair k's picture -> which of them is meant, all of them. Raises BadInput when they cannot be read."""
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

    def picture_name(self, k):
        return f"{self._location(k)}: the picture"

    def _location(self, k):
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

    def files(self):
        return self.shards

    # Pictures, for evaluation and for kept features. The pairs of one picture follow each other, so its first pair stands for it.

    @functools.cached_property
    def _picture_starts(self):
        """Shard s holds pictures starts[s] … starts[s+1] - 1, in the order in which they lie there."""
        return np.concatenate([[0], np.cumsum([len(first_rows(path)) for path in self.shards])])

    def picture_of(self, k):
        s = int(np.searchsorted(self.starts, k, side="right")) - 1
        begun = np.searchsorted(first_rows(self.shards[s]), k - self.starts[s], side="right")       # pictures of the shard, up to pair k
        return int(self._picture_starts[s] + begun) - 1

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
        """-> ({caption: the pictures that it describes}, ids of the pictures): for evaluation, which needs all of them."""
        if self.damaged:
            raise BadInput(f"{self.damaged[0]}: damaged or cut short, so recall would be that of a part; replace it")
        described = {}
        for k in range(len(self)):
            _, (_, image_size, *_) = self._row(k)
            if image_size < 0:
                raise BadInput(f"{self._location(k)}: a caption without a picture; remove it")
            which, texts = self._captions(k)
            described.setdefault(texts[which], {})[self.picture_of(k)] = None   # as keys: the same caption twice says nothing new
        return described, [self._location(self._first_pair(i)) for i in range(self.picture_count())]

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


# ---------------------------------------------------------------------------------------------------------------- reading in a shard


@functools.lru_cache(maxsize=64)
def opened_shard(path):
    return open(path, "rb", buffering=0)                                        # closed when it falls out of the cache


@functools.lru_cache(maxsize=64)
def opened_index(path):
    return shard_index(path, thorough=True)


@functools.lru_cache(maxsize=64)
def first_rows(path):
    """Which pairs of a shard are the first of their picture, whose captions follow each other -> one row number for each picture."""
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
        image = next((files[e] for e in PICTURES if e in files), (0, -1))
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
                       f"since pictures are read from anywhere in it") from None


# ---------------------------------------------------------------------------------------------------------------- painted data sets


class Painted(NamedTuple):
    """What PaintedSplit must know of a painted data set: its sizes, and functions of painter.py."""

    sizes: dict                                                                 # pairs in each split
    endless: bool                                                               # whether train has new pictures in each epoch
    draw: Callable                                                              # (rng) -> what is drawn by lot: a scene, or two verses
    describe: Callable                                                          # (it, rng or None) -> its caption
    shown: Callable                                                             # (it) -> the scene that its picture shows
    paint: Callable                                                             # (scene, rng) -> the picture
    split_of: Callable                                                          # (it) -> the split to which it belongs for ever


PAINTED = {
    "demo": Painted({"train": 8192, "valid": 300, "test": 500}, True, painter.random_scene, painter.describe, frozenset,
                    painter.paint, painter.split_of_scene),
    "landscapes": Painted({"train": 2000, "valid": 300, "test": 500}, False, painter.random_landscape, painter.describe_landscape,
                          frozenset, painter.paint_landscape, painter.split_of_landscape),
    "english-landscapes": Painted({"train": 4000, "valid": 300, "test": 500}, False, painter.random_landscape,
                                  painter.describe_in_english, frozenset, painter.paint_landscape, painter.split_of_landscape),
    "poems": Painted(TABLE_1["ap-id"], False, painter.random_poem, painter.poem_caption, painter.scene_of_poem,
                     painter.paint_landscape, painter.split_of_poem),
}


class PaintedSplit(Split):
    """A split of a painted data set: data for a first try, without a download. Pair k is picture k with caption k.

    Where `train` is endless each epoch paints so many new pictures. The others are fixed. In `valid` and `test` what a picture
    shows is never contained in what another shows, so that each caption is true of exactly one; in a fixed `train` no two show the
    same.
    """

    def __init__(self, data, split, context_length=52):
        sizes, endless, self.draw, self.describe, shown, self.paint, self.split_of = PAINTED[data]
        if split not in sizes:
            raise BadInput(f"{data}: no split {split!r}; it has {', '.join(sizes)}")
        self.name, self.seed, size = f"{data}/{split}", f"{data} {split}", sizes[split]
        self.endless = endless and split == "train"
        if self.endless:
            self.tokenizer, self.context_length = Tokenizer(self.name), context_length
            self.texts, self.image_ids, self.positives, self.pairs = [], [], [], range(size)
            return
        rng, texts, self.scenes, seen = random.Random(self.seed), [], [], set()
        while len(texts) < size:
            drawn = self.draw(rng)
            scene = shown(drawn)
            if split == "train":
                alike = scene in seen
            else:
                alike = any(scene <= other or other <= scene for other in self.scenes)
            if self.split_of(drawn) == split and not alike:
                self.scenes.append(scene)
                seen.add(scene)
                texts.append(self.describe(drawn, rng if split == "train" else None))
        super().__init__(self.name, texts, list(range(size)), [[i] for i in range(size)], context_length)

    def sample(self, epoch, k):
        if not self.endless:
            return self.picture(k), *self.words(k)
        number = epoch * len(self) + k                                          # of all pictures that are ever painted
        rng = random.Random(f"{self.seed} {number}")
        scene = self.draw(rng)
        while self.split_of(scene) != "train":
            scene = self.draw(rng)
        ids = self.tokenizer([self.describe(scene, rng)], self.context_length)[0].numpy()
        meaning = sentence_key(self.describe(scene))                            # the same scene in other words has the same key
        return self.paint(scene, rng), ids, [meaning], meaning

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


# ---------------------------------------------------------------------------------------------------------------- finding a data set


def open_split(data, split, data_root="data", context_length=52) -> Split:
    """A split of the data set that `data` names: a known name (NAMES, PAINTED), a folder, or a pattern of tar shards. Raises
    BadInput when there is none."""
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


def split_names(folder):
    """Names of the splits that a folder holds, in any layout."""
    if captions := caption_file(folder):
        names = {split for _, _, split in caption_rows(captions)}
    else:
        names = {path.name.removesuffix("_imgs.tsv") for path in folder.glob("[!.]*_imgs.tsv") if path.is_file()}
    names = names or set(split_shards(folder))
    if not names:
        raise BadInput(f"{folder}: no captions.csv or captions.jsonl with rows beside pictures, nor *_imgs.tsv with *_texts.jsonl "
                       f"(Chinese-CLIP layout), nor train-000000.tar, … (for shards with other names pass a pattern: "
                       f"'{folder}/{{000000..000020}}.tar' or '{folder}/*.tar')")
    usual = ["train", "valid", "test"]
    return [name for name in usual if name in names] + sorted(names - set(usual))


def all_names(data, data_root="data"):
    """Names of the splits of whatever --data can be."""
    if is_pattern(data):
        return ["train"]
    return list(PAINTED[data].sizes) if data in PAINTED else split_names(find(data, data_root))


# ---------------------------------------------------------------------------------------------------------------- a file -> a picture

ORIENTATION = 0x0112                                                            # the EXIF tag that tells how to turn a picture; 1: upright


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


def open_picture(encoded):
    """Bytes of a picture file -> a PIL picture of which only the header has been read."""
    if not encoded:
        raise ValueError("it is empty")
    with warnings.catch_warnings():
        # From 89 million pixels on: a small file can ask for all the memory there is.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(encoded))


def decoded(read, name):
    """read() -> bytes of a picture file -> the picture, RGB. Raises BadInput with its name when it cannot be read."""
    with refused_as(name):
        picture = open_picture(read())
        picture.load()
        return to_rgb(picture)


def picture_at(paths, i, folder=""):
    """Picture i of some paths, relative to a folder. (A function of the module, so that it can be sent to workers on every system.)"""
    return decoded(Path(folder, paths[i]).read_bytes, system.printable(paths[i]))


def to_rgb(picture):
    """Any PIL picture -> RGB as a person sees it: turned as its EXIF tag says, transparent parts on white, 16-bit grey scaled to 8.
    RGB pictures stay bit for bit."""
    if picture.getexif().get(ORIENTATION, 1) != 1:
        picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):
        picture = Image.fromarray((np.asarray(picture, dtype=np.int64).clip(0, 65535) // 257).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


# ---------------------------------------------------------------------------------------------------------------- a picture -> pixels

# CLIP's statistics of its training pictures, per RGB channel, of values in 0..1
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Transform:
    """The evaluation transform, for a model to hand out with its weights: a PIL picture -> (3, R, R) float32."""

    def __init__(self, size):
        self.size = size

    def __call__(self, picture):
        return normalize(to_uint8(picture, self.size).float() / 255)


def to_uint8(picture, size):
    """The pixels of evaluation: a PIL picture -> (3, size, size) uint8, bicubic with antialias, the whole picture, no crop."""
    picture = to_rgb(picture)                                                   # first: to resize palette indices mixes unrelated colours
    picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def normalize(pixels):
    """(…, 3, R, R) in 0..1 -> what the vision tower expects: (pixels - mean) / std of each channel."""
    mean, std = statistics_on(pixels.device)
    return (pixels - mean) / std


@functools.lru_cache(maxsize=16)
def statistics_on(device):
    """CLIP_MEAN and CLIP_STD, (3, 1, 1) each: sent to a device once, for a copy would wait until it is idle."""
    return [torch.tensor(channels, device=device).view(3, 1, 1) for channels in (CLIP_MEAN, CLIP_STD)]


def training_pixels(picture, size, name):
    """The pixels of training: the bytes of a picture file, or a PIL picture, painted -> (3, size, size) uint8. Raises BadInput with
    its name when it cannot be read.

    Evaluation's figures are compared with those of other programs, so its pixels are Pillow's, bit for bit. Training has no such
    duty, but often waits for its pictures: so it takes faster ways, to pixels that differ by less than anyone sees (of 255, on
    photos: 0.005 on average and 2 at most; decoded at a reduced scale 0.1 to 0.8, and 7).
    """
    if isinstance(picture, Image.Image):
        return to_uint8(picture, size)
    with refused_as(name):
        encoded, picture = picture, open_picture(picture)
        whole = picture.size
        # A large JPEG is decoded at 1/2, 1/4 or 1/8, a part of the work; each side stays twice as long as needed.
        picture.draft(None, (2 * size, 2 * size))
        pixels = None
        if picture.format == "JPEG" and picture.mode in ("RGB", "L") and picture.size == whole:     # not to be reduced
            if picture.getexif().get(ORIENTATION, 1) == 1:
                pixels = jpeg_pixels(encoded)
        if pixels is None:                                                      # every other kind of picture
            picture.load()
            pixels = torch.from_numpy(np.array(to_rgb(picture))).permute(2, 0, 1)                   # (3, H, W)
        return resized(pixels, size)


def resized(pixels, size):
    """What `to_uint8` does, by torch, which takes a third of the time where the processor has AVX2:
    (3, H, W) uint8 that lie in memory as (H, W, 3) -> (3, size, size)."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return to_uint8(Image.fromarray(pixels.permute(1, 2, 0).numpy()), size)
    return F.interpolate(pixels[None], (size, size), mode="bicubic", antialias=True)[0].contiguous()


def jpeg_pixels(encoded):
    """An RGB or grey JPEG -> (3, H, W) uint8, Pillow's bits in less time. None where torchvision cannot: then Pillow decodes it, or
    says what is wrong with the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                         # torch: that bytes are not to be written to; they are not
        try:
            return jpeg_decoder()(torch.frombuffer(encoded, dtype=torch.uint8))
        except Exception:
            return None


@functools.cache
def jpeg_decoder():
    """torchvision's decode_jpeg, or where that is missing or broken a function that decodes nothing.

    Of torchvision only this library is loaded: importing the package would cost each worker three seconds and 90 MB, and its
    function of that name only warns (from 0.29 on, that it will go) before it calls this one.
    """
    try:
        (folder,) = importlib.util.find_spec("torchvision").submodule_search_locations
        torch.ops.load_library(next(Path(folder).glob("image*.so")))            # image.so, from 0.29 on image_stable.so
        return functools.partial(torch.ops.image.decode_jpeg, mode=3)           # 3: ImageReadMode.RGB
    except Exception:                                                           # not there, made for another torch, …
        return lambda _: None


# ---------------------------------------------------------------------------------------------------------------- augmentation

# How far each kind of augmentation may go, both ways. Rotation in degrees, shift and warp in half picture sides, the rest as shares
# of 1. `photo` moves little, `drawing` is for icons and drawings. Nothing is ever mirrored: captions say left and right, and signs
# and letters do not survive it.
AUGMENT = {
    "none":    None,
    "photo":   dict(rotate=0, zoom=0.05, stretch=0.03, shift=0.05, warp=0.0, ink=0.1, tint=0.0, saturation=0.1),
    "drawing": dict(rotate=20, zoom=0.25, stretch=0.20, shift=0.12, warp=0.10, ink=0.3, tint=0.2, saturation=0.4),
}
DRAWS = 10 + 2 * 4 * 4                                                          # random numbers that one picture uses


def augment(pixels, draws, rotate, zoom, stretch, shift, warp, ink, tint, saturation):
    """Bend, move and colour a batch: pixels (B, 3, R, R) in 0..1, draws (B, DRAWS) uniform in -1..1, then a row of AUGMENT
    -> (B, 3, R, R) in 0..1.

    The random numbers come from outside, so that they can be a function of (seed, step, place in the batch), and not of how many processes
    there are. Outside the picture its border goes on.
    """
    B, _, R, _ = pixels.shape
    u = draws.to(pixels.device).T                                               # (DRAWS, B)
    angle, size, aspect, dx, dy, dark, vivid = u[:7]                            # each (B,); u[7:10] are for the tint, u[10:] for the warp
    angle, size, aspect = angle * math.radians(rotate), (size * zoom).exp(), (aspect * stretch).exp()
    x_row = torch.stack([angle.cos() * size * aspect, -angle.sin() * size * aspect, dx * shift], dim=1)                  # (B, 3)
    y_row = torch.stack([angle.sin() * size / aspect, angle.cos() * size / aspect, dy * shift], dim=1)
    grid = F.affine_grid(torch.stack([x_row, y_row], dim=1), pixels.shape, align_corners=False)     # (B, R, R, 2): where each pixel looks
    if warp:                                                                    # a smooth random field: as another hand would draw it
        field = F.interpolate(u[10:].T.reshape(B, 2, 4, 4), (R, R), mode="bicubic", align_corners=True)
        grid = grid + warp * field.permute(0, 2, 3, 1)
    pixels = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)

    # Colours change by the ink, 1 - pixels: white paper stays white, dark parts get lighter or darker, each channel a little differently.
    per_picture = lambda draw, most: (1 + most * draw).view(B, 1, 1, 1)
    pixels = 1 - (1 - pixels) * per_picture(dark, ink) * (1 + tint * u[7:10].T.view(B, 3, 1, 1))
    grey = pixels.mean(dim=1, keepdim=True)                                     # (B, 1, R, R)
    return (grey + (pixels - grey) * per_picture(vivid, saturation)).clamp(0, 1)


# ---------------------------------------------------------------------------------------------------------------- pairs -> batches


def micro_batch_places(batch_size, micro_batch, rank, world):
    """Which places of a batch each micro-batch of this process takes: a list of ranges.

    The batch is cut into parts of world x micro_batch pairs (the last one may be smaller), and each part into `world` equal slices,
    of which process r takes the r-th. So all processes run equally many micro-batches, and what a part holds depends on world x
    micro_batch alone.
    """
    together = world * micro_batch
    places = []
    for start in range(0, batch_size, together):
        size = min(together, batch_size - start) // world                       # of a slice
        places.append(range(start + rank * size, start + (rank + 1) * size))
    return places


class Batches(Sampler):
    """Which pairs each micro-batch takes, as (epoch, k): what a DataLoader asks first.

    The epochs' orders follow each other as one endless stream of places, and step s takes places s N … (s + 1) N - 1 of it
    (N: batch_size). So every pair comes once per epoch, no batch is short, the pairs of a step are the same for any number of processes
    and any micro-batch, and a run resumes at any step.
    """

    def __init__(self, split, batch_size, seed, first_step, last_step, rank=0, world=1, micro_batch=None):
        self.split, self.batch_size, self.seed = split, batch_size, seed
        self.steps = range(first_step, last_step)
        self.places = micro_batch_places(batch_size, micro_batch or batch_size // world, rank, world)
        self.order = {}                                                         # the epoch at hand -> its order

    def __len__(self):
        return len(self.steps) * len(self.places)

    def __iter__(self):
        for step in self.steps:
            for places in self.places:
                yield self.pairs(step, places)

    def pairs(self, step, places):
        """[(epoch, k), …] at some places, a range, of the batch that step `step` (from 0) takes."""
        result = []
        start = step * self.batch_size                                          # of the batch, in the stream of all epochs
        for in_stream in range(start + places.start, start + places.stop):
            epoch, place = divmod(in_stream, len(self.split))
            if epoch not in self.order:
                self.order = {epoch: self.split.order(self.seed, epoch)}
            result.append((epoch, int(self.order[epoch][place])))
        return result


class TrainingPairs(Dataset):
    """(epoch, k) -> the tensors of one pair: what a DataLoader's workers run. With `features` (features.py) the picture is not
    read: its embedding stands in its place.

    In the place of a pair that cannot be read comes the next one that can: as long as reading itself does not fail by chance, a
    function of the data alone.
    """

    def __init__(self, split, image_size, tries=100, features=None):
        self.split, self.image_size, self.tries, self.features = split, image_size, tries, features

    def __getitem__(self, epoch_and_pair):
        """-> pixels (3, R, R) or features (D,), ids (L,), image_keys, a list, text_key, and reports of the pairs that could not be read."""
        epoch, k = epoch_and_pair
        bad = []                                                                # {"pair", "file", "offset", …, "reason"}
        for other in ((k + n) % len(self.split) for n in range(self.tries)):
            try:
                if self.features is not None:
                    return *self.features.sample(self.split, other), bad
                picture, ids, image_keys, text_key = self.split.sample(epoch, other)
                pixels = training_pixels(picture, self.image_size, self.split.picture_name(other))
                return pixels, ids, image_keys, text_key, bad
            except BadInput as error:
                bad.append({"pair": other, **self.split.where(other), "reason": str(error)})
        raise BadInput(f"{self.split.name}: {self.tries} pairs in a row cannot be read; the first: {bad[0]['reason']}")


def collate(samples):
    """Samples -> a micro-batch:

    pixels       (B, 3, R, R) uint8, or features (B, D) float16
    ids          (B, L) int64
    image_keys   (B, M) int64, the keys of all sentences of each picture, filled up with -1
    text_keys    (B,) int64; caption j describes picture i when text_keys[j] is in image_keys[i]
    bad          reports of pairs that could not be read
    """
    pixels, ids, image_keys, text_keys, bad = zip(*samples)
    most = max(map(len, image_keys))
    image_keys = torch.tensor([list(keys) + [-1] * (most - len(keys)) for keys in image_keys])
    # As torch.stack; but in a worker right into the memory that is shared with training, which spares a copy.
    pixels = default_collate(pixels)
    ids = torch.from_numpy(np.stack(ids).astype(np.int64))
    return pixels, ids, image_keys, torch.tensor(text_keys), [report for reports in bad for report in reports]


def training_loader(split, image_size, batches, workers, pin_memory=False, features=None):
    """A DataLoader of micro-batches, each as collate gives it, in the order of `batches` (a Batches)."""
    return DataLoader(TrainingPairs(split, image_size, features=features), batch_sampler=batches, collate_fn=collate, num_workers=workers,
                      pin_memory=pin_memory, prefetch_factor=4 if workers else None, worker_init_fn=system.reader_start(),
                      timeout=system.READER_SECONDS * (workers > 0))


def own_memory(batch):
    """A batch out of the shared memory through which workers send it, where it would take up open files and room in /dev/shm for as
    long as it is kept."""
    return [x.clone() if isinstance(x, torch.Tensor) and x.is_shared() else x for x in batch]


# ---------------------------------------------------------------------------------------------------------------- writing shards


def write_shards(split, folder, name, per_shard=10_000, processes=1, whole=False):
    """Write a split as tar shards folder/name-000000.tar, …: each picture once, its bytes as they are, with all its captions.

    Killed, it goes on where it stopped. What cannot be read from the old files is named and left out, or with `whole` refused; whether a
    picture decodes is not looked at. The pictures come in a fixed random order, so that every shard is a fair sample of the whole.
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
    shards = [(folder / f"{name}-{number:06}.tar", pictures[a : a + per_shard])
              for number, a in enumerate(range(0, len(pictures), per_shard))]
    plan = json.dumps({"data": split.fingerprint(), "pictures": len(pictures), "per_shard": per_shard})

    lock = _reserve(folder, name, plan)
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
    captions = sum(map(len, texts_of))
    print(f"{folder}: {name}: {len(pictures):,} pictures with {captions:,} captions in {len(shards):,} shard{'s' * (len(shards) > 1)}")


def _reserve(folder, name, plan):
    """Note in folder/name.json what its shards are made of -> a lock on the folder. Raises BadInput when other shards are there."""
    marker = folder / f"{name}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_ours = marker.exists() and marker.read_bytes() == plan.encode()
        if (marker.exists() or name in split_shards(folder)) and not is_ours:
            raise BadInput(f"{folder}: it holds other shards of {name!r}; name another folder, or delete them and {marker.name}")
        lock = os.open(folder, os.O_RDONLY)                                     # inherited by the helpers: held until the last one ends
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        system.write_text(marker, plan)
    except BlockingIOError:
        raise BadInput(f"{folder}: another process is writing shards there") from None
    except OSError as error:
        raise BadInput(f"{folder}: shards cannot be written there ({error}); make room or name another folder") from None
    return lock


def _write_some(split, texts_of, shards, done, parent, whole):
    """What one helper process does: its shards, one after the other."""
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
    kind_of = {b"\xff\xd8": "jpg", b"\x89PNG": "png", b"RIFF": "webp", b"GIF8": "gif", b"BM": "bmp"}          # first bytes -> kind
    with tarfile.open(fileobj=f, mode="w") as tar:
        for i in pictures:
            with done.get_lock():
                done.value += 1
            try:
                encoded = split.picture_bytes(i)
            except (BadInput, OSError, ValueError) as error:                    # ValueError: base64
                name = f"{split.name}: picture {split.image_ids[i]}"
                if whole:
                    raise BadInput(f"{name} cannot be read ({error}); replace or remove it") from None
                warnings.warn(f"{name} is left out: it cannot be read ({error})")
                continue
            kind = next((kind for start, kind in kind_of.items() if encoded.startswith(start)), "tif")
            record = json.dumps({"id": split.image_ids[i], "texts": texts_of[i]}, ensure_ascii=False).encode()
            for extension, content in ((kind, encoded), ("json", record)):
                member = tarfile.TarInfo(f"{i:09}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


# ---------------------------------------------------------------------------------------------------------------- pictures without captions

# Pillow alone cannot read heic and heif: better counted than passed over.
ENDINGS = {f".{kind}" for kind in (*PICTURES, "jpe", "jfif", "avif", "jp2", "ppm", "pgm", "ico", "tga", "heic", "heif")}


def picture_files(folder):
    """Every picture under a folder, at any depth, known by the ending of its name -> paths relative to the folder, sorted; and
    {folder: reason} of those in it that cannot be read.

    What is hidden (.trash, ._cat.jpg) is left out, and so are folders that are links.
    """
    found, unread = [], {}
    note = lambda error: unread.update({os.path.relpath(error.filename, folder): error.strerror})
    for where, folders, files in os.walk(folder, onerror=note):
        folders[:] = [name for name in folders if not name.startswith(".")]     # in place: os.walk goes into these
        names = [name for name in files if not name.startswith(".") and os.path.splitext(name)[1].lower() in ENDINGS]
        paths = [os.path.join(where, name) for name in names]
        found += [os.path.relpath(path, folder) for path in paths if os.path.isfile(path)]          # a pipe would be waited for
    return sorted(found), unread


def class_root(folder, split=None):
    """Where the class folders are: folder/split; without a split folder/test, or the folder itself when it has no splits. Raises
    BadInput when they are not there."""
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(f"{folder}: there is no such folder; expected one with a folder for each class: 猫/1.jpg, 狗/1.jpg, …, "
                       f"or test/000, test/001, … beside label_cn.txt")
    # A class may be called "test", too: a split is a folder that holds folders.
    holds_folders = lambda path: path.is_dir() and any(inside.is_dir() for inside in path.iterdir())
    splits = sorted(name for name in {"train", "val", "valid", "test", split or "test"} if holds_folders(folder / name))
    if (split or "test") in splits:
        return folder / (split or "test")
    if split or splits:
        raise BadInput(f"{folder}: no split {split or 'test'!r}; it has {', '.join(splits) or 'none'}")
    return folder


def open_classes(root):
    """Pictures in one folder for each class, for zero-shot classification -> (C class names, I pictures as paths, I class numbers).

    Without label_cn.txt, in `root` or beside it, the folders' names are the classes': root/猫/*.jpg. With it: see _class_numbers.
    """
    folders = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    label_file = next((path for path in (root / "label_cn.txt", root.absolute().parent / "label_cn.txt") if path.is_file()), None)
    if label_file is None:
        names, class_of = [_composed(name) for name in folders], {name: c for c, name in enumerate(folders)}
        if folders and _are_numbers(folders):
            warnings.warn(f"{root}: there is no label_cn.txt, so the folders' numbers are taken for names: {_listed(folders)}")
    else:
        names = _read_labels(label_file)
        class_of = _class_numbers(root, folders, names, label_file)
    if len(set(class_of.values())) < len(class_of) or not all(names) or any(not is_text(name) for name in names):
        raise BadInput(f"{root}: two folders with one name or number, or a name that is empty or not UTF-8 ({_listed(folders)})")

    pictures = []                                                               # (path, class number)
    for name, c in class_of.items():
        files, unread = picture_files(root / name)
        pictures += [(root / name / file, c) for file in files]
        if unread:
            place, reason = next(iter(unread.items()))
            raise BadInput(f"{root / name / place}: cannot be read ({reason}), so the figures would be those of a part")
    if len(names) < 2 or not pictures:
        raise BadInput(f"{root}: {len(names)} classes and {len(pictures)} pictures; "
                       f"expected two or more folders, one for each class, with pictures in them")
    if loose := sorted(path.name for path in root.iterdir() if path.is_file() and path.suffix.lower() in ENDINGS):
        warnings.warn(f"{root}: left out, for they are in no class folder: {len(loose):,} ({_listed(loose)})")
    seen = {c for _, c in pictures}
    if empty := [name for c, name in enumerate(names) if c not in seen]:
        warnings.warn(f"{root}: classes without a picture, which can be guessed all the same: {len(empty):,} ({_listed(empty)})")
    return names, [path for path, _ in pictures], [c for _, c in pictures]


def _read_labels(path):
    """Line i of label_cn.txt names class i, counted from 0 -> the names."""
    names = [_composed(line) for _, line in system.utf8_lines(path)]
    while names and not names[-1]:
        names.pop()
    if not all(names) or not names:
        raise BadInput(f"{path}, line {names.index('') + 1 if names else 1}: empty; each line names one class")
    return names


def _class_numbers(root, folders, names, label_file):
    """Which folder has the pictures of which class -> {folder: class number}, for the three ways in which ELEVATER-cn and ImageNet
    do it: the folders have the classes' names; or numbers, 000, 001, …; or are as many, with other names (n01440764, …), in
    alphabetical order."""
    strange = [name for name in folders if _composed(name) not in names]
    if not strange:
        return {name: names.index(_composed(name)) for name in folders}
    if _are_numbers(folders):
        if beyond := [name for name in folders if int(name) >= len(names)]:
            raise BadInput(f"{root}: the folder {beyond[0]} has no line in {label_file}, "
                           f"whose {len(names)} lines name the classes 0 to {len(names) - 1}")
        return {name: int(name) for name in folders}
    if len(strange) < len(folders):
        raise BadInput(f"{root}: no line of {label_file} names the folders {_listed(strange)}; it does name others")
    if len(folders) != len(names):
        raise BadInput(f"{root}: {len(folders)} folders ({_listed(folders)}) and {len(names)} lines in {label_file}; "
                       f"which belongs to which? Name the folders 000, 001, … or as the lines")
    return {name: c for c, name in enumerate(folders)}


def _composed(name):
    return unicodedata.normalize("NFC", name.strip())                           # a Mac writes é as two characters


def _are_numbers(folders):
    return all(name.isdecimal() and name.isascii() for name in folders)


def _listed(names):
    return system.printable(", ".join(names[:5]) + ", …" * (len(names) > 5))


# ---------------------------------------------------------------------------------------------------------------- command line


def main():
    if sys.argv[1:2] in (["fetch"], ["convert"], ["check"]):
        import prepare                                                          # here, because it builds on this file
        return prepare.main()
    args = parse_args()
    if args.draw:
        return draw_sheet(open_split(args.data, args.split or "test", args.data_root), args.draw)
    names = all_names(args.data, args.data_root)
    if args.write_shards is not None:
        endless = args.data in PAINTED and PAINTED[args.data].endless
        for name in [args.split] if args.split else names[endless:]:            # an endless one has no end to write; the first, train
            write_shards(open_split(args.data, name, args.data_root), args.write_shards, name, args.per_shard, args.processes)
        return print(f"Train on them with --data {args.write_shards}")
    for name in names:
        split = open_split(args.data, name, args.data_root)
        print(summary("all" if is_pattern(args.data) else name, split) + against_paper(args.data, name, len(split)))


def parse_args():
    parser = argparse.ArgumentParser(description="What a data set holds; and any data set as tar shards.",
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="""three further commands, each with its own --help:
  data.py fetch NAME              download a published data set
  data.py convert SOURCE DEST     write an original release, or any layout, as a folder that is read here
  data.py check DATA              look at every picture and every caption
(a folder of such a name: ./check)""")
    parser.add_argument("data", help=f"{', '.join([*NAMES, *PAINTED])}, a folder, "
                                     f"or a pattern of tar shards like 'shards/{{000000..000020}}.tar'")
    parser.add_argument("--data-root", default="data", help="where the named data sets lie (default: data)")
    parser.add_argument("--split", help="the split to --draw (default: test), or the only one to --write-shards of (default: all)")
    parser.add_argument("--draw", metavar="FILE.png", help="write a sheet of up to 24 pictures and print a caption of each")
    parser.add_argument("--write-shards", metavar="DIR", help="write the data set as tar shards")
    parser.add_argument("--per-shard", type=int, default=10_000, help="pictures in a shard (default: 10000)")
    parser.add_argument("--processes", type=int, default=1, help="that write shards side by side (default: 1)")
    args = parser.parse_args()
    if not (1 <= args.per_shard <= 1e7 and 1 <= args.processes <= 512):
        raise BadInput(f"--per-shard {args.per_shard} --processes {args.processes}: out of range, 1 to 1e7 and 1 to 512")
    return args


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
    if not published:
        return ""
    return ", as in the paper's table 1" if published == pairs else f"; the paper's table 1 has {published:,}"

def draw_sheet(split, path):
    """Up to 24 pictures that have a caption, evenly out of the split, six in a row; prints a caption of each."""
    if split.endless:
        raise BadInput(f"{split.name} is endless: draw valid or test")
    caption_of = {}                                                             # each picture's first caption
    for text, images in zip(split.texts, split.positives):
        for i in images:
            caption_of.setdefault(i, text)
    described = sorted(caption_of)
    if not described:
        raise BadInput(f"{split.name}: no caption names a picture, so there is nothing to draw")
    count = min(24, len(described))
    chosen = [described[n * len(described) // count] for n in range(count)]
    cell = lambda n: (n // 6, n % 6)                                            # row, column of the n-th one
    sheet = Image.new("RGB", (min(6, count) * 134, -(-count // 6) * 134), "white")
    for n, i in enumerate(chosen):
        row, column = cell(n)
        sheet.paste(split.picture(i).resize((128, 128)), (column * 134, row * 134))
    try:
        sheet.save(path)
    except (OSError, ValueError, KeyError) as error:                            # KeyError: a format that Pillow reads but cannot write
        raise BadInput(f"--draw {path}: cannot be written ({error})") from None
    for n, i in enumerate(chosen):
        row, column = cell(n)
        print(f"row {row + 1}, column {column + 1}: picture {split.image_ids[i]}: {caption_of[i]}")
    print(f"wrote {path}")


if __name__ == "__main__":
    system.run(main)
