"""A look at every image and every caption of a data set, before a long training run.

Of each image it keeps a row of LOOK, of each caption a key, 64 bytes together. Equal keys are
repeats. Images whose bits hardly differ look alike.
"""
import array
import collections
import functools
import hashlib
import itertools
import struct

import numpy as np
import torch
from PIL import Image

import data
from data import data_name
from model import Config
from support import system
from support.captions import sentence_key
from support.images import decoded, reader_loader
from support.shards import ShardSplit, is_pattern
from support.system import BadInput, printable
from support.tables import TABLE_1, against_paper
from tokenizer import PAD, Tokenizer, UNK

ROOM = Config.context_length - 2            # tokens that are read, without [CLS] and [SEP]
ALIKE = 6                                   # of 256 bits; JPEG of quality 60 changes up to 6
LOOK = np.dtype([("number", "u8"), ("bytes", "u8"), ("pixels", "u8"), ("bits", "u1", 32)])

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


def check(source, data_root, processes, json_file):
    """Look at all of a data set and print what is found -> whether it is sound.

    json_file: the file for all findings, or None.
    """
    found, rows, known = {kind: [] for kind in KINDS}, [], data_name(source)
    contents, looks, sentences = {}, {}, {}                         # of each split
    for name in data.all_names(source, data_root):
        title = "all" if is_pattern(source) else name
        try:
            split = data.open_split(source, name, data_root)
            in_shards = isinstance(split, ShardSplit)
            content = InShards(split, title, found) if in_shards else InMemory(split, title, found)
            keys = check_captions(title, content.captions(), found)
            looks[title] = check_images(title, content, found, processes)
        except (BadInput, OSError) as error:
            found[CLOSED].append(f"{title}: {error}")
            continue
        contents[title], sentences[title] = content, keys
        captions = len(np.unique(keys)) if in_shards else len(keys)             # shards repeat them
        rows.append({"split": title, "images": content.count, "captions": captions,
                     "pairs": len(split), "table_1": TABLE_1.get(known, {}).get(name)})
        print(f"{title:8} {content.count:8,} images {captions:8,} captions {len(split):8,} pairs"
              + against_paper(known, name, len(split)))
    if not is_pattern(source) and (missing := {"train", "valid", "test"} - set(contents)):
        print(f"note: there is no split {', '.join(sorted(missing))}")
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
    """What a split holds: `count` images, captions. What stands alone goes to `found`."""

    def __init__(self, split, title, found):
        self.split, self.count, self.texts = split, len(split.image_ids), split.texts
        described = {i for images in split.positives for i in images}
        for i in range(self.count):
            if i not in described:
                found[SILENT].append(f"{title}: image {self.name(i)}")
        for t, images in enumerate(split.positives):
            if not images:
                found[BLIND].append(f"{title}: caption {t + 1}: {quoted(self.texts[t])}")

    def read(self, i):
        return self.split.image_bytes(i)

    def name(self, i):
        return printable(self.split.image_ids[i])

    def captions(self):
        """(name, text) of each caption."""
        for t, text in enumerate(self.texts):
            yield f"caption {t + 1}", text


class InShards:
    """The same of shards. Their captions are not in memory, and repeat for each image."""

    texts = None

    def __init__(self, split, title, found):
        self.split, self.title, self.found = split, title, found
        self.pairs, self.captioned = array.array("q"), array.array("q")         # of each image one
        for k in range(len(split)):
            _, (_, image_size, _, text_size, _, which) = split.row(k)
            if which > 0:                                           # another of its captions
                continue
            if image_size >= 0:
                self.pairs.append(k)
            if text_size >= 0:
                self.captioned.append(k)
            if image_size < 0 or text_size < 0:
                found[BLIND if image_size < 0 else SILENT].append(f"{title}: {self.place(k)}")
        for path in split.damaged:
            found[CLOSED].append(f"{title}: {path}: damaged or cut short; replace it")
        self.count = len(self.pairs)

    def place(self, k):
        """The member of a shard that has pair k."""
        where = self.split.where(k)
        return f"{printable(where['member'])} of {where['file']}"

    def read(self, i):
        return self.split.pair_bytes(self.pairs[i])

    def name(self, i):
        return self.place(self.pairs[i])

    def captions(self):
        for k in self.captioned:
            try:
                texts = self.split.captions(k)[1]
            except BadInput as error:
                self.found[EMPTY].append(f"{self.title}: {error}")
                continue
            for text in texts:
                yield self.place(k), text


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


def check_images(title, content, found, processes):
    """Decode every image, in `processes` processes -> rows of LOOK of those that can be read."""
    kept = bytearray()
    loader = reader_loader(range(content.count), processes if processes > 1 else 0, batch_size=32,
                           collate_fn=functools.partial(look, content.read))
    with system.progress(f"{title}: images looked at", content.count) as progress:
        for i, (row, reason) in enumerate(itertools.chain.from_iterable(loader)):
            if reason:
                found[BROKEN].append(f"{title}: image {content.name(i)}: {reason}")
            kept += row
            progress.update()
    return np.frombuffer(kept, LOOK)


def look(read, numbers):
    """(a row of LOOK, "") of each image; (b"", reason) of one that cannot be read."""
    seen = []
    for i in numbers:
        encoded = functools.cache(functools.partial(read, i))
        try:
            image = decoded(encoded, "it")
        except BadInput as error:
            seen.append((b"", str(error)))
            continue
        # A bit for each of 16 x 16 places: whether it is brighter than its left neighbour.
        grey = image.convert("L").resize((17, 16), Image.Resampling.BOX)
        grey = np.asarray(grey).astype(int)
        brighter = np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes()
        bits = bytes(32) if grey.max() - grey.min() < 16 else brighter          # nearly flat: none
        of_bytes = hashlib.md5(encoded()).digest()
        of_pixels = hashlib.md5(repr(image.size).encode() + image.tobytes()).digest()
        seen.append((struct.pack("=Q8s8s32s", i, of_bytes[:8], of_pixels[:8], bits), ""))
    return seen


# ---- repeats


def repeated(keys):
    """keys {split: (n,)} -> the places [(split, index), …] of each key that is there repeatedly."""
    everything = np.concatenate([np.zeros(0, np.uint64), *keys.values()])
    values, counts = np.unique(everything, return_counts=True)
    places = collections.defaultdict(list)
    for split, of_split in keys.items():
        for at in np.flatnonzero(np.isin(of_split, values[counts > 1])).tolist():
            places[int(of_split[at])].append((split, at))
    return list(places.values())


def find_equal_images(looks, contents, found):
    """Images with the same pixels, in two splits or in one."""
    for places in repeated({split: rows["pixels"] for split, rows in looks.items()}):
        different = {int(looks[split]["bytes"][at]) for split, at in places}
        how = "the same bytes" if len(different) == 1 else "the same pixels in other bytes"
        names = collections.defaultdict(list)                       # split -> its images
        for split, at in places:
            names[split].append(f"{split} {contents[split].name(looks[split]['number'][at])}")
        if len(names) > 1:
            found[LEAKED].append(f"{', '.join(sum(names.values(), []))}: {how}")
        for first, *others in names.values():
            found[TWICE] += [f"{first}, {other}: {how}" for other in others]


def find_equal_captions(sentences, contents, found):
    """Captions that are in two splits."""
    for places in repeated(sentences):
        if len({split for split, _ in places}) > 1:
            texts = [contents[split].texts[t] for split, t in places if contents[split].texts]
            shown = ", ".join(f"{split} caption {t + 1}" for split, t in places[:10])
            found[SHARED].append((f"{quoted(texts[0])}: " if texts else "") + shown
                                 + (", …" if len(places) > 10 else ""))


def find_similar_images(looks, contents, found):
    """Images of two splits whose pixels differ and whose bits hardly do."""
    for (one, first), (other, second) in itertools.combinations(looks.items(), 2):
        near = collections.defaultdict(list)                        # row of second -> of first
        for a, b in itertools.product(range(0, len(first), 4096), range(0, len(second), 4096)):
            # of signs: 256 less twice the number of bits that differ, (4096, 4096) at most
            products = signs(second[b : b + 4096]) @ signs(first[a : a + 4096]).T
            for to, at in (products >= 256 - 2 * ALIKE).nonzero().tolist():
                to, at = b + to, a + at
                flat = not (first["bits"][at].any() and second["bits"][to].any())
                if not flat and first["pixels"][at] != second["pixels"][to]:
                    near[to].append(at)
        for to, alike in near.items():
            more = f" and {len(alike) - 1:,} more of {one}" if len(alike) > 1 else ""
            found[SIMILAR].append(f"{other} {contents[other].name(second['number'][to])}, "
                                  f"{one} {contents[one].name(first['number'][alike[0]])}{more}")


def signs(rows):
    """(n,) rows of LOOK -> (n, 256) of -1 and 1."""
    return torch.from_numpy(np.unpackbits(rows["bits"], axis=1)).float() * 2 - 1
