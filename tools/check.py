"""tools.check"""
import array
import collections
import contextlib
import functools
import hashlib
import itertools
import json
import warnings

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
from support.system import BadInput
from support.tables import TABLE_1, against_paper
from tokenizer import PAD, Tokenizer, UNK


@contextlib.contextmanager
def nothing_is_cut():
    """Without the tokenizer's warning about long captions: here nothing is cut, and `check` says more."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*captions are longer than")
        yield


ROOM = Config.context_length - 2                                                # tokens of a caption that are read, without [CLS] and [SEP]

# So many of 256 bits may differ between images that look alike: a JPEG written again at quality 60 differs by up to 6.
ALIKE = 6

# What is looked for, each kind with what it is called …
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
BLIND = "captions without a image"

# … and whether it is wrong, or only worth knowing. In this order they are told.
KINDS = {CLOSED: True, BROKEN: True, LEAKED: True, EMPTY: True,
         SIMILAR: False, TWICE: False, SHARED: False, LONG: False, UNKNOWN: False, SILENT: False, BLIND: False}


@nothing_is_cut()
def check(name, data_root, processes, json_file):
    """Look at every image and every caption of a data set, print what was found -> whether it is sound.

    Of each image 56 bytes are kept in memory, of each caption 8. json_file: where all that was found is written, or None.
    """
    known, found, rows = data_name(name), {kind: [] for kind in KINDS}, []
    looks, sentences, texts, shown = {}, {}, {}, {}                             # of each split, for find_repeats
    for split_name in data.all_names(name, data_root):
        title = "all" if is_pattern(name) else split_name
        try:
            split = data.open_split(name, split_name, data_root)
            in_shards = isinstance(split, ShardSplit)
            count, read, shown[title], captions = (shard_content if in_shards else content)(split, title, found)
            sentences[title] = check_captions(title, captions, found)
            texts[title] = None if in_shards else split.texts
            looks[title] = check_images(title, count, read, shown[title], found, processes)
        except (BadInput, OSError) as error:
            found[CLOSED].append(f"{title}: {error}")
            continue
        different = np.unique(sentences[title]) if in_shards else sentences[title]                  # a shard has them pair by pair
        row = {"split": title, "images": count, "captions": len(different), "pairs": len(split)}
        rows.append(row | {"table_1": TABLE_1.get(known, {}).get(split_name)})
        print(f"{title:8} {count:8,} images {row['captions']:8,} captions {len(split):8,} pairs{against_paper}")
    for missing in sorted({"train", "valid", "test"} - {row["split"] for row in rows}) if not is_pattern(name) else ():
        print(f"note: there is no split {missing!r}, which {'evaluate.py' if missing == 'test' else 'train.py'} looks for")
    find_repeats(looks, sentences, texts, shown, found)
    for kind, lines in found.items():
        print(f"{'note: ' * (not KINDS[kind])}{kind}: {len(lines):,}")
        print("".join(f"    {line}\n" for line in lines[:10]), end="")
        if len(lines) > 10:
            print(f"    … and {len(lines) - 10:,} more")
    wrong = [f"{len(found[kind]):,} {kind}" for kind, serious in KINDS.items() if serious and found[kind]]
    if json_file is not None:
        content_of_file = {"data": name, "sound": not wrong, "splits": rows, "found": found}
        system.write_text(json_file, json.dumps(content_of_file, ensure_ascii=False, indent=1) + "\n")
    print(f"{name}: not sound: {'; '.join(wrong)}" if wrong else f"{name}: sound")
    return not wrong


def content(split, title, found):
    """-> number of images, read(i) their bytes, shown(i) their names, the captions as (name, text).

    Images and captions that stand alone go to `found`.
    """
    shown = lambda i: system.printable(split.image_ids[i])
    described = {i for images in split.positives for i in images}
    found[SILENT] += [f"{title}: image {shown(i)}" for i in range(len(split.image_ids)) if i not in described]
    found[BLIND] += [f"{title}: caption {t + 1}: {quoted(split.texts[t])}" for t, images in enumerate(split.positives) if not images]
    return len(split.image_ids), split.image_bytes, shown, ((f"caption {t + 1}", text) for t, text in enumerate(split.texts))


def shard_content(split, title, found):
    """The same of shards, whose captions are not kept in memory."""
    numbers = array.array("q")                                                  # of the pairs that have a image, each image once
    for s, path in enumerate(split.shards):
        _, image_size, _, text_size, _, which = opened_index(path)[1:].T
        numbers.extend((np.flatnonzero((image_size >= 0) & (which == 0)) + split.starts[s]).tolist())
        found[SILENT] += [f"{title}: {place_in(split, k + split.starts[s])}" for k in np.flatnonzero(text_size < 0)]
        found[BLIND] += [f"{title}: {place_in(split, k + split.starts[s])}" for k in np.flatnonzero((image_size < 0) & (which == 0))]
    found[CLOSED] += [f"{title}: {path}: damaged or cut short; replace it" for path in split.damaged]
    shown = lambda i: place_in(split, numbers[i])
    return len(numbers), functools.partial(shard_image, split, numbers), shown, shard_captions(split, title, found)


def place_in(split, k):
    """The member of a shard that has pair k, in words."""
    where = split.where(k)
    return f"{system.printable(where['member'])} of {where['file']}"


def shard_image(split, numbers, i):
    return split.pair_bytes(numbers[i])


def shard_captions(split, title, found):
    """(name, text) of each caption, read as they are asked for; what cannot be read goes to `found`."""
    for s, path in enumerate(split.shards):
        for k, (_, _, text, size, is_json, which) in enumerate(opened_index(path)[1:].tolist()):
            if size >= 0 and which == 0:
                name = place_in(split, k + split.starts[s])
                try:
                    for sentence in captions_in(read_at(path, text, size, name), is_json, name):
                        yield name, sentence
                except BadInput as error:
                    found[EMPTY].append(f"{title}: {error}")


def quoted(text):
    return system.printable(text[:40] + "…" * (len(text) > 40))


def check_captions(title, captions, found):
    """Look at (name, text) of each caption -> (T,) the keys of the sentences."""
    tokenizer, keys, captions = Tokenizer(), array.array("Q"), iter(captions)
    while some := list(itertools.islice(captions, 1000)):
        ids = tokenizer([text for _, text in some], ROOM + 3).numpy()           # one more than is read: whoever has that one is too long
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


def look(read, numbers):
    """Of each image a tuple: why it cannot be read or "", a key of its bytes, a key of its pixels, 32 bytes of what it looks like.

    (The last b"" when it is nearly flat.) Runs in the readers.
    """
    seen, key = [], lambda content: int.from_bytes(hashlib.md5(content).digest()[:8], "big")
    for i in numbers:
        encoded = functools.cache(functools.partial(read, i))
        try:
            image = decoded(encoded, "it")
        except BadInput as error:
            seen.append((str(error), 0, 0, b""))
            continue
        # what it looks like: whether each of 16 x 16 places is brighter than its left neighbour
        grey = np.asarray(image.convert("L").resize((17, 16), Image.Resampling.BOX)).astype(int)
        brighter = np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes()
        flat = grey.max() - grey.min() < 16
        seen.append(("", key(encoded()), key(repr(image.size).encode() + image.tobytes()), b"" if flat else brighter))
    return seen


def check_images(title, count, read, shown, found, processes):
    """Decode every image, in `processes` processes; what cannot be read goes to `found`.

    -> of the others (n,) numbers, (n,) keys of the bytes, (n,) keys of the pixels, (n, 32) looks, zeros for nearly flat ones.
    """
    numbers, of_bytes, of_pixels, looks = array.array("Q"), array.array("Q"), array.array("Q"), bytearray()
    workers = processes * (processes > 1)
    loader = reader_loader(range(count), workers, batch_size=32, collate_fn=functools.partial(look, read))
    with system.progress(f"{title}: images looked at", count) as progress:
        for i, (reason, bytes_key, pixels_key, brighter) in enumerate(itertools.chain.from_iterable(loader)):
            if reason:
                found[BROKEN].append(f"{title}: image {shown(i)}: {reason}")
            else:
                numbers.append(i)
                of_bytes.append(bytes_key)
                of_pixels.append(pixels_key)
                looks += brighter or bytes(32)
            progress.update()
    looks = np.frombuffer(bytes(looks), np.uint8).reshape(-1, 32)
    return np.array(numbers, np.int64), np.array(of_bytes, np.uint64), np.array(of_pixels, np.uint64), looks


def repeated(keys):
    """keys {split: (n,)} -> for every key that comes several times its places: [[(split, index), …], …]."""
    names = list(keys) if any(map(len, keys.values())) else []
    if not names:
        return []
    split_of = np.concatenate([np.full(len(keys[name]), n) for n, name in enumerate(names)])        # of all keys, one split after the other
    index = np.concatenate([np.arange(len(keys[name])) for name in names])
    _, group, sizes = np.unique(np.concatenate([keys[name] for name in names]), return_inverse=True, return_counts=True)
    places = collections.defaultdict(list)
    for at in np.flatnonzero(sizes[group] > 1).tolist():
        places[int(group[at])].append((names[split_of[at]], int(index[at])))
    return list(places.values())


def find_repeats(looks, sentences, texts, shown, found):
    """What comes several times goes to `found`: the same images and captions in two splits, images twice in one, and images that
    look alike in two.

    looks: of each split what check_images gives; sentences: what check_captions gives; texts: its captions, or None.
    """
    named = lambda places: ", ".join(f"{split} {shown[split](looks[split][0][at])}" for split, at in places)
    for places in repeated({split: of_pixels for split, (_, _, of_pixels, _) in looks.items()}):
        how = "the same bytes" if len({int(looks[split][1][at]) for split, at in places}) == 1 else "the same pixels in other bytes"
        if len({split for split, _ in places}) > 1:
            found[LEAKED].append(f"{named(places)}: {how}")
        for split in dict(places):
            first, *others = [place for place in places if place[0] == split]
            found[TWICE] += [f"{named([first, other])}: {how}" for other in others]
    for places in repeated(sentences):
        if len({split for split, _ in places}) > 1:
            # the words of those in shards are not in memory
            text = next((f"{quoted(texts[split][t])}: " for split, t in places if texts[split]), "")
            found[SHARED].append(text + ", ".join(f"{split} caption {t + 1}" for split, t in places[:10]) + ", …" * (len(places) > 10))
    # bits as -1 and 1, (n, 32) bytes -> (n, 256): the product of two looks is 256 less twice the number of bits that differ
    signs = lambda bits: torch.from_numpy(np.unpackbits(bits, axis=1)).float() * 2 - 1
    for (one, (_, _, pixels, bits)), (other, (_, _, other_pixels, other_bits)) in itertools.combinations(looks.items(), 2):
        near = collections.defaultdict(list)                                    # image of the second split -> those like it in the first
        for a, b in itertools.product(range(0, len(bits), 4096), range(0, len(other_bits), 4096)):
            products = signs(other_bits[b : b + 4096]) @ signs(bits[a : a + 4096]).T                # (4096, 4096) at most
            alike = products >= 256 - 2 * ALIKE
            for to, at in (alike.nonzero() + torch.tensor([b, a])).tolist():
                if pixels[at] != other_pixels[to] and bits[at].any() and other_bits[to].any():      # the same ones are told above
                    near[to].append(at)
        for to, some in near.items():
            others = f" and {len(some) - 1:,} more of {one}" * (len(some) > 1)
            found[SIMILAR].append(named([(other, to), (one, some[0])]) + others)
