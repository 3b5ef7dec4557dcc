"""A look at every image and every caption of a data set, before a long training run.

Of each image it keeps a row of LOOK, of each caption a key, 64 bytes together. Equal keys are
repeats. Images whose bits hardly differ look alike.
"""
import array
import collections
import functools
import hashlib
import itertools

import numpy as np
import torch
from PIL import Image

import data
from data import data_name
from model import Config
from support import system
from support.captions import sentence_key
from support.images import decoded, reader_loader, refused_as
from support.shards import ShardSplit, is_pattern
from support.system import BadInput, printable
from support.tables import TABLE_1, against_paper
from tokenizer import PAD, Tokenizer, UNK

ROOM = Config.context_length - 2            # tokens that are read, without [CLS] and [SEP]
ALIKE = 6                                   # of 256 bits; JPEG of quality 60 changes up to 6
LOOK = np.dtype([("number", "<i8"), ("bytes", "u8"), ("pixels", "u8"), ("bits", "u1", 32)])

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
WRONG = KINDS[:4]                           # … of which these make a data set not sound


def check(source, data_root, processes, json_file, allow_outside=False):
    """Look at all of a data set and print what is found -> whether it is sound.

    json_file: the file for all findings, or None.
    """
    found, rows, known = {kind: [] for kind in KINDS}, [], data_name(source)
    splits, looks, keys = {}, {}, {}
    for name in data.all_names(source, data_root):
        title = "all" if is_pattern(source) else name
        try:
            split = data.open_split(source, name, data_root, allow_outside=allow_outside)
            look_over = in_shards if isinstance(split, ShardSplit) else in_memory
            images, texts = look_over(split, title, found)
            its_keys = check_captions(title, texts, found)
            looks[title] = check_images(title, split, images, found, processes)
        except (BadInput, OSError) as error:
            found[CLOSED].append(f"{title}: {error}")
            continue
        splits[title], keys[title] = split, its_keys
        # each image of shards has its own captions, so equal ones are counted once
        captions = len(np.unique(its_keys) if isinstance(split, ShardSplit) else its_keys)
        rows.append({"split": title, "images": len(images), "captions": captions,
                     "pairs": len(split), "table_1": TABLE_1.get(known, {}).get(name)})
        print(f"{title:8} {len(images):8,} images {captions:8,} captions {len(split):8,} pairs"
              + against_paper(known, name, len(split)))
    if not is_pattern(source) and (missing := {"train", "valid", "test"} - set(splits)):
        print(f"note: there is no split {', '.join(sorted(missing))}")
    find_equal_images(splits, looks, found)
    find_equal_captions(splits, keys, found)
    find_similar_images(splits, looks, found)
    for kind, lines in found.items():
        print(f"{'' if kind in WRONG else 'note: '}{kind}: {len(lines):,}")
        print("".join(f"    {line}\n" for line in lines[:10]), end="")
        if len(lines) > 10:
            print(f"    … and {len(lines) - 10:,} more")
    wrong = [f"{len(found[kind]):,} {kind}" for kind in WRONG if found[kind]]
    if json_file is not None:
        system.write_json(json_file, {"data": source, "sound": not wrong, "splits": rows,
                                      "found": found})
    print(f"{source}: not sound: {'; '.join(wrong)}" if wrong else f"{source}: sound")
    return not wrong


# ---- what a split holds. An image's number is its place; in shards that of its first pair.


def in_memory(split, title, found):
    """-> the numbers of a split's images, (name, text) of each caption. Notes what stands alone."""
    described = {i for images in split.positives for i in images}
    for i in sorted(set(range(len(split.image_ids))) - described):
        found[SILENT].append(f"{title}: image {image_name(split, i)}")
    captions = [(f"caption {t}", text) for t, text in enumerate(split.texts, 1)]
    for (name, text), images in zip(captions, split.positives):
        if not images:
            found[BLIND].append(f"{title}: {name}: {quoted(text)}")
    return range(len(split.image_ids)), captions


def in_shards(split, title, found):
    """The same of shards, whose captions are read when they are needed."""
    images, captioned = array.array("q"), array.array("q")
    for k in range(len(split)):
        _, (_, image_size, _, text_size, _, which) = split.row(k)
        if which > 0:                                               # another caption of the image
            continue
        if image_size >= 0:
            images.append(k)
        if text_size >= 0:
            captioned.append(k)
        if image_size < 0 or text_size < 0:
            kind = BLIND if image_size < 0 else SILENT
            found[kind].append(f"{title}: {image_name(split, k)}")
    for path in split.damaged:
        found[CLOSED].append(f"{title}: {path}: damaged or cut short; replace it")

    def captions():
        for k in captioned:
            try:
                for text in split.captions(k)[1]:
                    yield image_name(split, k), text
            except BadInput as error:
                found[EMPTY].append(f"{title}: {error}")

    return images, captions()


def image_name(split, number):
    if isinstance(split, ShardSplit):
        where = split.where(number)
        return f"{printable(where['member'])} of {where['file']}"
    return printable(split.image_ids[number])


def quoted(text):
    return printable(text if len(text) <= 40 else text[:40] + "…")


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


def check_images(title, split, images, found, processes):
    """Decode every image, in `processes` processes -> rows of LOOK of those that can be read."""
    kept = bytearray()
    read = split.pair_bytes if isinstance(split, ShardSplit) else split.image_bytes
    loader = reader_loader(images, processes if processes > 1 else 0, batch_size=32,
                           collate_fn=functools.partial(look, read))
    with system.progress(f"{title}: images looked at", len(images)) as progress:
        for (row, reason), number in zip(itertools.chain.from_iterable(loader), images):
            if reason:
                found[BROKEN].append(f"{title}: image {image_name(split, number)}: {reason}")
            kept += row
            progress.update()
    return np.frombuffer(kept, LOOK)


def look(read, numbers):
    """(a row of LOOK, "") of each image; (b"", reason) of one that cannot be read."""
    seen = []
    for number in numbers:
        try:
            with refused_as("it"):
                encoded = read(number)
            image = decoded(lambda: encoded, "it")
        except BadInput as error:
            seen.append((b"", str(error)))
            continue
        # A bit for each of 16 x 16 places: whether it is brighter than its left neighbour.
        grey = image.convert("L").resize((17, 16), Image.Resampling.BOX)
        grey = np.asarray(grey).astype(int)
        brighter = np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes()
        bits = bytes(32) if grey.max() - grey.min() < 16 else brighter          # nearly flat: none
        of_bytes = hashlib.md5(encoded).digest()
        of_pixels = hashlib.md5(repr(image.size).encode() + image.tobytes()).digest()
        seen.append((number.to_bytes(8, "little") + of_bytes[:8] + of_pixels[:8] + bits, ""))
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


def find_equal_images(splits, looks, found):
    """Images with the same pixels, in two splits or in one."""
    for places in repeated({title: rows["pixels"] for title, rows in looks.items()}):
        different = {int(looks[title]["bytes"][at]) for title, at in places}
        how = "the same bytes" if len(different) == 1 else "the same pixels in other bytes"
        names = collections.defaultdict(list)                       # split -> its images
        for title, at in places:
            number = looks[title]["number"][at]
            names[title].append(f"{title} {image_name(splits[title], number)}")
        if len(names) > 1:
            found[LEAKED].append(f"{', '.join(sum(names.values(), []))}: {how}")
        for first, *others in names.values():
            found[TWICE] += [f"{first}, {other}: {how}" for other in others]


def find_equal_captions(splits, keys, found):
    """Captions that are in two splits."""
    for places in repeated(keys):
        if len({title for title, _ in places}) > 1:
            shown = ", ".join(f"{title} caption {t + 1}" for title, t in places[:10])
            shown += ", …" if len(places) > 10 else ""
            title, t = places[0]
            if not isinstance(splits[title], ShardSplit):
                shown = f"{quoted(splits[title].texts[t])}: {shown}"
            found[SHARED].append(shown)


def find_similar_images(splits, looks, found):
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
            name = image_name(splits[other], second["number"][to])
            alike_name = image_name(splits[one], first["number"][alike[0]])
            more = f" and {len(alike) - 1:,} more of {one}" if len(alike) > 1 else ""
            found[SIMILAR].append(f"{other} {name}, {one} {alike_name}{more}")


def signs(rows):
    """(n,) rows of LOOK -> (n, 256) of -1 and 1."""
    return torch.from_numpy(np.unpackbits(rows["bits"], axis=1)).float() * 2 - 1
