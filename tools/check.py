"""A look at every image and every caption of a data set, before a training run takes days.

A split is read through once. Of each image it keeps a key of its bytes, a key of its pixels and
256 bits of what it looks like; of each caption a key. Equal keys are repeats, within a split or
in two; bits that hardly differ are images that look alike. (56 bytes an image, 8 a caption.)
"""
import array
import collections
import contextlib
import functools
import hashlib
import itertools
import warnings
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

import data
from data import data_name
from model import Config
from support import system
from support.captions import sentence_key
from support.images import decoded, reader_loader
from support.shards import ShardSplit, captions_in, is_pattern, opened_index, read_at
from support.system import BadInput, printable
from support.tables import TABLE_1, against_paper
from tokenizer import PAD, Tokenizer, UNK

ROOM = Config.context_length - 2            # tokens of a caption that a model reads, beside two marks
ALIKE = 6                                   # of 256 bits; JPEG of quality 60 changes up to 6

# The kinds of findings, in the order of the report …
CLOSED = "splits that cannot be opened, or are cut short"
BROKEN = "images that cannot be read"
LEAKED = "images that are in two splits"
EMPTY = "captions that are empty or cannot be read"
SIMILAR = "images that look alike, in two splits"
TWICE = "images that are in one split twice"
SHARED = "captions that are in two splits"
LONG = f"captions longer than the {ROOM} tokens that are read; the rest is cut off"
UNKNOWN = "captions that are mostly [UNK]: characters that the model does not know"
SILENT = "images without a caption"
BLIND = "captions without an image"
KINDS = (CLOSED, BROKEN, LEAKED, EMPTY, SIMILAR, TWICE, SHARED, LONG, UNKNOWN, SILENT, BLIND)
WRONG = (CLOSED, BROKEN, LEAKED, EMPTY)     # … of which these make a data set not sound


@contextlib.contextmanager
def nothing_is_cut():
    """Without the tokenizer's warning about long captions: nothing is cut here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*captions are longer than")
        yield


@nothing_is_cut()
def check(source, data_root, processes, json_file):
    """Look at all of a data set and print what is found -> whether it is sound.

    json_file: the file for all findings, or None.
    """
    found, rows = {kind: [] for kind in KINDS}, []
    contents, looks, sentences = {}, {}, {}                         # of each split
    for name in data.all_names(source, data_root):
        title = "all" if is_pattern(source) else name
        try:
            split = data.open_split(source, name, data_root)
            content = (InShards if isinstance(split, ShardSplit) else InMemory)(split, title, found)
            sentences[title] = check_captions(title, content.captions(), found)
            looks[title] = check_images(title, content, found, processes)
        except (BadInput, OSError) as error:
            found[CLOSED].append(f"{title}: {error}")
            continue
        contents[title] = content
        captions = len(np.unique(sentences[title])) if content.by_pair else len(sentences[title])
        published = TABLE_1.get(data_name(source), {}).get(name)
        rows.append({"split": title, "images": content.count, "captions": captions,
                     "pairs": len(split), "table_1": published})
        print(f"{title:8} {content.count:8,} images {captions:8,} captions {len(split):8,} pairs"
              + against_paper(data_name(source), name, len(split)))
    if not is_pattern(source):
        for name, program in (("test", "evaluate.py"), ("train", "train.py"), ("valid", "train.py")):
            if name not in contents:
                print(f"note: there is no split {name!r}, which {program} looks for")
    find_equal_images(looks, contents, found)
    find_equal_captions(sentences, contents, found)
    find_similar_images(looks, contents, found)
    wrong = report(found)
    if json_file is not None:
        system.write_json(json_file, {"data": source, "sound": not wrong, "splits": rows,
                                      "found": found})
    print(f"{source}: not sound: {'; '.join(wrong)}" if wrong else f"{source}: sound")
    return not wrong


def report(found):
    """Print up to ten findings of each kind -> what is wrong, in words."""
    wrong = []
    for kind, lines in found.items():
        print(f"{'' if kind in WRONG else 'note: '}{kind}: {len(lines):,}")
        for line in lines[:10]:
            print(f"    {line}")
        if len(lines) > 10:
            print(f"    … and {len(lines) - 10:,} more")
        if lines and kind in WRONG:
            wrong.append(f"{len(lines):,} {kind}")
    return wrong


def quoted(text):
    return printable(text if len(text) <= 40 else text[:40] + "…")


# ---- what a split holds


class InMemory:
    """A split whose captions are in memory: `count` images, their bytes and names, the captions.

    What stands alone goes to `found`.
    """

    by_pair = False

    def __init__(self, split, title, found):
        self.split, self.count = split, len(split.image_ids)
        described = {i for images in split.positives for i in images}
        for i in range(self.count):
            if i not in described:
                found[SILENT].append(f"{title}: image {self.name(i)}")
        for t, images in enumerate(split.positives):
            if not images:
                found[BLIND].append(f"{title}: caption {t + 1}: {quoted(split.texts[t])}")

    def read(self, i):
        return self.split.image_bytes(i)

    def name(self, i):
        return printable(self.split.image_ids[i])

    def text(self, t):
        return self.split.texts[t]

    def captions(self):
        """(name, text) of each caption."""
        for t, text in enumerate(self.split.texts):
            yield f"caption {t + 1}", text


class InShards:
    """The same of shards: captions are read when they are looked at, once for each pair."""

    by_pair = True

    def __init__(self, split, title, found):
        self.split, self.title, self.found = split, title, found
        self.pairs = array.array("q")                               # of the images, each once
        for s, path in enumerate(split.shards):
            _, image_size, _, text_size, _, which = opened_index(path)[1:].T
            first, start = which == 0, split.starts[s]
            self.pairs.extend((np.flatnonzero((image_size >= 0) & first) + start).tolist())
            for kind, alone in ((SILENT, text_size < 0), (BLIND, (image_size < 0) & first)):
                found[kind] += [f"{title}: {self.place(k + start)}" for k in np.flatnonzero(alone)]
        found[CLOSED] += [f"{title}: {path}: damaged or cut short; replace it"
                          for path in split.damaged]
        self.count = len(self.pairs)

    def place(self, k):
        """The member of a shard that has pair k."""
        where = self.split.where(k)
        return f"{printable(where['member'])} of {where['file']}"

    def read(self, i):
        return self.split.pair_bytes(self.pairs[i])

    def name(self, i):
        return self.place(self.pairs[i])

    def text(self, t):
        return None                                                 # not in memory

    def captions(self):
        for s, path in enumerate(self.split.shards):
            for k, (_, _, text, size, is_json, which) in enumerate(opened_index(path)[1:].tolist()):
                if size < 0 or which != 0:
                    continue
                name = self.place(k + self.split.starts[s])
                try:
                    sentences = captions_in(read_at(path, text, size, name), is_json, name)
                except BadInput as error:
                    self.found[EMPTY].append(f"{self.title}: {error}")
                    continue
                for sentence in sentences:
                    yield name, sentence


# ---- look at each caption and image


def check_captions(title, captions, found):
    """Look at (name, text) of each caption -> (T,) their keys."""
    tokenizer, keys, captions = Tokenizer(), array.array("Q"), iter(captions)
    while some := list(itertools.islice(captions, 1000)):
        ids = tokenizer([text for _, text in some], ROOM + 3)       # one token more than is read
        lengths, unknown = (ids != PAD).sum(1) - 2, (ids == UNK).sum(1)
        for (name, text), length, strange in zip(some, lengths.tolist(), unknown.tolist()):
            keys.append(sentence_key(text))
            if length == 0:
                found[EMPTY].append(f"{title}: {name}")
            elif 2 * strange > length:
                found[UNKNOWN].append(f"{title}: {name}: {quoted(text)}")
            if length > ROOM:
                length = int((tokenizer([text], 3 * len(text) + 2) != PAD).sum()) - 2
                found[LONG].append(f"{title}: {name}: {length:,} tokens: {quoted(text)}")
    return np.array(keys, np.uint64)


class Looks(NamedTuple):
    """What is kept of the n images of a split that can be read."""

    numbers: np.ndarray             # (n,) in the split
    of_bytes: np.ndarray            # (n,) keys
    of_pixels: np.ndarray           # (n,) keys
    bits: np.ndarray                # (n, 32) uint8; all 0: nearly flat


def check_images(title, content, found, processes):
    """Decode every image, in `processes` processes -> Looks. What cannot be read goes to `found`."""
    kept = []
    loader = reader_loader(range(content.count), processes if processes > 1 else 0, batch_size=32,
                           collate_fn=functools.partial(look, content.read))
    with system.progress(f"{title}: images looked at", content.count) as progress:
        for i, (reason, *keys) in enumerate(itertools.chain.from_iterable(loader)):
            if reason:
                found[BROKEN].append(f"{title}: image {content.name(i)}: {reason}")
            else:
                kept.append((i, *keys))
            progress.update()
    numbers, of_bytes, of_pixels, bits = zip(*kept) if kept else ((), (), (), ())
    bits = np.frombuffer(b"".join(bits), np.uint8).reshape(-1, 32)
    return Looks(np.array(numbers, np.int64), np.array(of_bytes, np.uint64),
                 np.array(of_pixels, np.uint64), bits)


def look(read, numbers):
    """Of each image (why it cannot be read or "", key of its bytes, key of its pixels, 32 bytes)."""
    seen = []
    for i in numbers:
        try:
            encoded = functools.cache(functools.partial(read, i))
            image = decoded(encoded, "it")
        except BadInput as error:
            seen.append((str(error), 0, 0, b""))
            continue
        # A bit for each of 16 x 16 places: whether it is brighter than its left neighbour.
        grey = image.convert("L").resize((17, 16), Image.Resampling.BOX)
        grey = np.asarray(grey).astype(int)
        brighter = np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes()
        bits = bytes(32) if grey.max() - grey.min() < 16 else brighter
        pixels = repr(image.size).encode() + image.tobytes()
        seen.append(("", key_of(encoded()), key_of(pixels), bits))
    return seen


def key_of(content):
    return int.from_bytes(hashlib.md5(content).digest()[:8], "big")


# ---- repeats


def repeated(keys):
    """keys {split: (n,)} -> the places [(split, index), …] of each key that comes more than once."""
    if not keys:
        return []
    values, counts = np.unique(np.concatenate(list(keys.values())), return_counts=True)
    places = collections.defaultdict(list)
    for split, of_split in keys.items():
        for at in np.flatnonzero(np.isin(of_split, values[counts > 1])).tolist():
            places[int(of_split[at])].append((split, at))
    return list(places.values())


def find_equal_images(looks, contents, found):
    """Images with the same pixels, in two splits or in one."""
    for places in repeated({split: look.of_pixels for split, look in looks.items()}):
        bytes_keys = {int(looks[split].of_bytes[at]) for split, at in places}
        how = "the same bytes" if len(bytes_keys) == 1 else "the same pixels in other bytes"
        names = [(split, f"{split} {contents[split].name(looks[split].numbers[at])}")
                 for split, at in places]
        splits = dict.fromkeys(split for split, _ in names)
        if len(splits) > 1:
            found[LEAKED].append(f"{', '.join(name for _, name in names)}: {how}")
        for split in splits:
            first, *others = [name for other, name in names if other == split]
            found[TWICE] += [f"{first}, {name}: {how}" for name in others]


def find_equal_captions(sentences, contents, found):
    """Captions that are in two splits."""
    for places in repeated(sentences):
        if len({split for split, _ in places}) == 1:
            continue
        texts = [contents[split].text(t) for split, t in places]
        text = next((f"{quoted(text)}: " for text in texts if text), "")
        shown = ", ".join(f"{split} caption {t + 1}" for split, t in places[:10])
        found[SHARED].append(text + shown + (", …" if len(places) > 10 else ""))


def find_similar_images(looks, contents, found):
    """Images of two splits whose bits hardly differ, but whose pixels do; nearly flat ones aside."""
    for (one, first), (other, second) in itertools.combinations(looks.items(), 2):
        near = collections.defaultdict(list)                        # image of second -> of first
        for a in range(0, len(first.bits), 4096):
            for b in range(0, len(second.bits), 4096):
                # of signs: 256 less twice the number of bits that differ, (4096, 4096) at most
                products = signs(second.bits[b : b + 4096]) @ signs(first.bits[a : a + 4096]).T
                for to, at in (products >= 256 - 2 * ALIKE).nonzero().tolist():
                    near[b + to].append(a + at)
        for to, candidates in near.items():
            alike = [at for at in candidates if first.of_pixels[at] != second.of_pixels[to]
                     and first.bits[at].any() and second.bits[to].any()]
            if alike:
                more = f" and {len(alike) - 1:,} more of {one}" if len(alike) > 1 else ""
                found[SIMILAR].append(f"{other} {contents[other].name(second.numbers[to])}, "
                                      f"{one} {contents[one].name(first.numbers[alike[0]])}{more}")


def signs(bits):
    """(n, 32) bytes -> (n, 256) of -1 and 1."""
    return torch.from_numpy(np.unpackbits(bits, axis=1)).float() * 2 - 1
