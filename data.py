"""Images and captions on disk -> batches, in an order that depends on (seed, epoch) alone.

    split = open_split("coco-cn", "train")
    batches = Batches(split, batch_size=1024, seed=0, first_step=0, last_step=100)
    for pixels, ids, image_keys, text_keys, bad in training_loader(split, 224, batches, workers=4):

data set     what --data names: a known name, a folder, or a pattern of tar shards
split        its part for one purpose: train, valid or test
image i      0 … I - 1; image_ids[i] is the data set's own id, a number or a path
text t       0 … T - 1; text_keys[t] is a number that equal sentences share
pair k       0 … n - 1: a text and an image that it describes; training shuffles and counts pairs
epoch        all pairs once, in a random order of its own
batch        the pairs of one step, over all processes; place 0 … N - 1: a position in it
micro-batch  what one process embeds at a time

Three layouts of a data set, one interface (Split):

1. Chinese-CLIP: {train,valid,test}_imgs.tsv with lines `id<TAB>base64 image`, and
   {train,valid,test}_texts.jsonl with {"text_id": 1, "text": "…", "image_ids": [7]}.
2. A folder of images with captions.csv (first line: image,caption) or captions.jsonl ({"image":
   "a.jpg", "caption": "…"}), paths relative to the folder. An image may stand in several rows. A
   column `split` divides the images; without it a hash of the path gives 80 % train, 10 % valid,
   10 % test. Painted sets have this layout: python -m tools.prepare paint demo.
3. Tar shards (support/shards.py), for more pairs than memory holds: key.jpg (png, webp, …) beside
   key.txt, the caption, or key.json with "text", "caption" or a list "texts". A pattern names
   them, 'shards/{000000..000020}.tar' or 'shards/*.tar', or a folder with train-000000.tar, ….

Letters in the shapes: I images, T texts, n pairs, L tokens of a text, N pairs of a batch, B pairs
of a micro-batch, M sentences of one image at most, R pixels of a side, D width of an embedding.
"""
import base64
import hashlib
import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, default_collate

from support import images, system
from support.captions import caption_file, caption_rows, check_text, read_jsonl, sentence_key
from support.images import decoded, reader_loader, refused_as, training_pixels
from support.shards import ShardSplit, is_pattern, shards_of, split_shards
from support.system import BadInput
from tokenizer import Tokenizer

# Known data sets -> their folders under --data-root: the names in the published archives (Hugging
# Face's OFA-Sys/chinese-clip-eval), the paper's own set, and those that tools.prepare paints.
PAINTED = ("demo", "landscapes", "english-landscapes", "poems")
NAMES = {"coco-cn": "COCO-CN", "flickr30k-cn": "Flickr30k-CN", "muge": "MUGE", "ap-id": "AP-ID",
         **{name: name for name in PAINTED}}
Transform = images.Transform  # part of this file's interface


# ---- a split


class Split:
    """One split of a data set: I images, T texts, and which images each text describes.

    name          for messages, e.g. "COCO-CN/test"
    texts         T captions
    image_ids     I ids
    positives     T lists: positives[t] = the images that text t describes; may be empty
    ids           (T, L) uint16, the tokens of the texts (the vocabulary has 21,128)
    pairs         (t, i) of each pair, in the data set's order
    text_keys     T keys (see sentence_key)
    image_keys    I lists: the keys of all sentences that describe an image

    A layout is a subclass with image_bytes, image_location, files; ShardSplit is like one.
    """

    def __init__(self, name, texts, image_ids, positives, context_length=52):
        if not texts or not image_ids:
            raise BadInput(f"{name}: the split is empty "
                           f"({len(image_ids)} images, {len(texts)} captions)")
        self.name, self.texts, self.image_ids, self.positives = name, texts, image_ids, positives
        self.ids = Tokenizer(name)(texts, context_length).numpy().astype(np.uint16)
        self.pairs = [(t, i) for t, found in enumerate(positives) for i in found]
        self.text_keys = [sentence_key(text) for text in texts]
        self.image_keys = [[] for _ in image_ids]
        for t, i in self.pairs:
            self.image_keys[i].append(self.text_keys[t])

    def __len__(self):
        return len(self.pairs)

    def order(self, seed, epoch):
        """(n,) the pairs in the order of an epoch: a permutation that (seed, epoch) determines."""
        return np.random.default_rng([seed, epoch]).permutation(len(self))

    def sample(self, k):
        """Pair k -> the bytes of its image file, tokens (L,), keys of the image, key of the text.

        Raises BadInput when the file cannot be read. Decoding comes later (training_pixels).
        """
        with refused_as(self.image_name(k)):
            return self.image_bytes(self.image_of(k)), *self.words(k)

    def words(self, k):
        """sample without the image: tokens (L,), keys of the image, key of the text."""
        t, i = self.pairs[k]
        return self.ids[t], self.image_keys[i], self.text_keys[t]

    def image_of(self, k):
        """The number of pair k's image."""
        return self.pairs[k][1]

    def image_count(self):
        return len(self.image_ids)

    def image(self, i):
        """Image i, a PIL image, RGB. Raises BadInput with its id when it cannot be read."""
        return decoded(lambda: self.image_bytes(i), f"{self.name}: image {self.image_ids[i]}")

    def image_name(self, k):
        """What a message calls the image of pair k."""
        return f"{self.name}: image {self.image_ids[self.image_of(k)]}"

    def where(self, k):
        """Where pair k is on disk, for a report: {"file", "offset" in bytes, …}."""
        t, i = self.pairs[k]
        return self.image_location(i) | {"caption": self.texts[t]}

    def fingerprint(self):
        """A short text that changes with texts, ids, their relation or the first sample.

        A resumed run compares it, to notice other data. Reading all samples takes an epoch.
        """
        about = json.dumps([self.texts, self.image_ids, self.positives], ensure_ascii=False)
        digest = hashlib.md5(about.encode())
        try:
            image, ids, *_ = self.sample(0)
            digest.update(image + ids.tobytes())
        except (BadInput, IndexError):  # unreadable, or there are no pairs
            digest.update(b"none")
        return f"{len(self):,} pairs (hash {digest.hexdigest()[:12]})"


class TsvSplit(Split):
    """The Chinese-CLIP layout. One file holds all images; memory holds their byte offsets."""

    def __init__(self, folder, split, context_length):
        self.path, texts_path = folder / f"{split}_imgs.tsv", folder / f"{split}_texts.jsonl"
        if not texts_path.is_file():
            raise BadInput(f"{folder}: {texts_path.name} is missing beside {self.path.name}")
        self.offsets = []  # (start, length) of each base64 text
        image_ids = self.read_images()
        texts, positives = self.read_texts(texts_path, image_ids)
        name = f"{folder.resolve().name}/{split}"
        super().__init__(name, texts, image_ids, positives, context_length)

    def read_images(self):
        """-> the ids of the images. Fills self.offsets."""
        line_of, end = {}, 0  # id -> its line
        size = self.path.stat().st_size / 2**20
        with open(self.path, "rb") as f, \
                system.progress(f"{self.path.name}: MiB indexed", size) as progress:
            for number, line in enumerate(iter(partial(f.readline, 2**28), b""), 1):
                start, end = end, end + len(line)
                progress.update(len(line) / 2**20)
                if len(line) == 2**28:
                    raise BadInput(f"{self.path}, line {number}: longer than 256 MiB")
                if not line[:64].strip():  # a blank line
                    continue
                id_, tab, _ = line[:64].partition(b"\t")
                if not tab or not id_.strip().isdigit():
                    raise BadInput(f"{self.path}, line {number}: expected `number<TAB>base64 "
                                   f"image`, found {line[:40]!r}")
                if line_of.setdefault(int(id_), number) != number:
                    raise BadInput(f"{self.path}, line {number}: image id {int(id_)} stands in "
                                   f"line {line_of[int(id_)]} already; ids must be unique")
                start += len(id_) + 1
                self.offsets.append((start, end - start))
        return list(line_of)

    def read_texts(self, path, image_ids):
        """-> the texts, and for each the numbers of its images."""
        index_of = {image_id: i for i, image_id in enumerate(image_ids)}
        texts, positives, line_of = [], [], {}
        for number, record in read_jsonl(path):
            text, text_id, described = map(record.get, ("text", "text_id", "image_ids"))
            if [type(text), type(text_id), type(described)] != [str, int, list]:
                shown = json.dumps(record, ensure_ascii=False)[:80]
                raise BadInput(f'{path}, line {number}: expected {{"text_id": number, "text": "…", '
                               f'"image_ids": [numbers]}}, found {shown}')
            check_text(text, path, number)
            if line_of.setdefault(text_id, number) != number:
                raise BadInput(f"{path}, line {number}: text_id {text_id} stands in line "
                               f"{line_of[text_id]} already; ids must be unique")
            for image_id in described:
                if type(image_id) is not int or image_id not in index_of:
                    raise BadInput(f"{path}, line {number}: image_id {image_id!r} is not in "
                                   f"{self.path.name}")
            texts.append(text)
            positives.append([index_of[image_id] for image_id in dict.fromkeys(described)])
        return texts, positives

    def files(self):
        """The files with the images."""
        return [self.path]

    def image_location(self, i):
        return {"file": str(self.path), "offset": self.offsets[i][0], "image": self.image_ids[i]}

    def image_bytes(self, i):
        start, length = self.offsets[i]
        with open(self.path, "rb") as f:
            f.seek(start)
            text = f.read(length).strip()
        standard = text.translate(bytes.maketrans(b"-_", b"+/"))  # sets use both base64 alphabets
        return base64.b64decode(standard, validate=True)


class FolderSplit(Split):
    """A folder of images with captions.csv or captions.jsonl: the layout for your own images."""

    def __init__(self, folder, split, context_length, allow_outside=False):
        self.folder = folder
        index_of, described, present = {}, {}, set()  # path -> image; text -> {image: None}
        for path, text, its_split in caption_rows(caption_file(folder), allow_outside):
            present.add(its_split)
            if its_split == split:
                i = index_of.setdefault(path, len(index_of))
                described.setdefault(text, {})[i] = None  # a repeated row counts once
        if not described:
            raise BadInput(f"{folder}: no split {split!r}; it has "
                           f"{', '.join(sorted(present)) or 'no rows at all'}; the column `split` "
                           "of the captions file names them (train, valid, test)")
        positives = [list(numbers) for numbers in described.values()]
        name = f"{folder.resolve().name}/{split}"
        super().__init__(name, list(described), list(index_of), positives, context_length)

    def files(self):
        return [self.folder / path for path in self.image_ids]

    def image_location(self, i):
        path = self.image_ids[i]
        return {"file": str(self.folder / path), "offset": 0, "image": path}

    def image_bytes(self, i):
        return (self.folder / self.image_ids[i]).read_bytes()


# ---- finding a data set


def open_split(data, split, data_root="data", context_length=52, allow_outside=False):
    """A split of the data set that `data` names: one of NAMES, a folder, or a pattern of shards.

    allow_outside: a captions file may name images outside its folder. Raises BadInput when the
    split is not there.
    """
    if is_pattern(data):
        return ShardSplit(shards_of(str(data)), str(data), context_length)
    folder = find(data, data_root)
    if caption_file(folder):
        return FolderSplit(folder, split, context_length, allow_outside)
    names = split_names(folder)
    if split not in names:
        raise BadInput(f"{folder}: no split {split!r} ({split}_imgs.tsv or {split}-000000.tar, …); "
                       f"it has {', '.join(names)}")
    if (folder / f"{split}_imgs.tsv").is_file():
        return TsvSplit(folder, split, context_length)
    return ShardSplit(split_shards(folder)[split], f"{folder.resolve().name}/{split}",
                      context_length)


def data_name(data):
    """What a data set is called: data/COCO-CN is coco-cn, other folders have their own name."""
    folder = data if is_pattern(data) else Path(data).resolve().name
    for name, its_folder in NAMES.items():
        if data == name or folder.lower() == its_folder.lower():
            return name
    return folder


def find(data, data_root="data"):
    """A data set's name or folder -> the folder. Raises BadInput when it is not there."""
    folder = Path(data_root) / NAMES[data] if data in NAMES else Path(data)
    if folder.is_dir():
        return folder
    if data not in NAMES:
        raise BadInput(f"{data}: neither a folder, nor a pattern of tar shards, nor a known data "
                       f"set ({', '.join(NAMES)})")
    remedy = "unpack the data set there or name another place with --data-root"
    if data in PAINTED:
        remedy = f"paint it: python -m tools.prepare paint {data} {folder}"
    raise BadInput(f"{data}: there is no folder {folder}; {remedy}")


def split_names(folder):
    """The splits that a folder holds, in any layout. Raises BadInput when it holds none."""
    if captions := caption_file(folder):
        names = {split for _, _, split in caption_rows(captions, allow_outside=True)}
    else:
        paths = [path for path in folder.glob("[!.]*_imgs.tsv") if path.is_file()]
        names = {path.name.removesuffix("_imgs.tsv") for path in paths}
    names = names or set(split_shards(folder))
    if not names:
        raise BadInput(f"{folder}: no captions.csv or captions.jsonl with rows, nor *_imgs.tsv "
                       "with *_texts.jsonl (Chinese-CLIP layout), nor train-000000.tar, … (for "
                       f"shards with other names pass a pattern: '{folder}/*.tar')")
    usual = ["train", "valid", "test"]
    return [name for name in usual if name in names] + sorted(names - set(usual))


def all_names(data, data_root="data"):
    """The names of a data set's splits. A pattern of shards is one split: ["train"]."""
    return ["train"] if is_pattern(data) else split_names(find(data, data_root))


# ---- augmentation

# How far each kind of change may go, both ways: rotation in degrees, shift and warp in halves of a
# side, the rest as shares of 1. `photo` changes little, `drawing` is for icons and drawings.
# Nothing is mirrored: captions say left and right, and signs and letters do not survive it.
AUGMENT = {
    "none": None,
    "photo": dict(rotate=0, zoom=0.05, stretch=0.03, shift=0.05, warp=0.0, ink=0.1, tint=0.0,
                  saturation=0.1),
    "drawing": dict(rotate=20, zoom=0.25, stretch=0.20, shift=0.12, warp=0.10, ink=0.3, tint=0.2,
                    saturation=0.4),
}
DRAWS = 10 + 2 * 4 * 4  # random numbers for an image: 7, 3 of the tint, a 2 x 4 x 4 field


def augment(pixels, draws, rotate, zoom, stretch, shift, warp, ink, tint, saturation):
    """Turn, move, warp and tint images: pixels (B, 3, R, R) in 0..1 -> the same shape and range.

    draws: (B, DRAWS) uniform in -1..1, a function of (seed, step, place in the batch). The other
    arguments are a row of AUGMENT. Beyond the border the border's pixels repeat.
    """
    B, _, R, _ = pixels.shape
    u = draws.to(pixels.device).T  # (DRAWS, B)
    angle, size, aspect, dx, dy, dark, vivid = u[:7]  # (B,) each
    for_tint, for_warp = u[7:10].T, u[10:].T  # (B, 3), (B, 32)

    angle = angle * math.radians(rotate)
    size, aspect = (size * zoom).exp(), (aspect * stretch).exp()
    cos, sin = angle.cos(), angle.sin()
    x_row = torch.stack([cos * size * aspect, -sin * size * aspect, dx * shift], dim=1)  # (B, 3)
    y_row = torch.stack([sin * size / aspect, cos * size / aspect, dy * shift], dim=1)
    affine = torch.stack([x_row, y_row], dim=1)  # (B, 2, 3)
    grid = F.affine_grid(affine, pixels.shape, align_corners=False)  # (B, R, R, 2) source points
    if warp:  # a smooth random field: shaky lines
        field = F.interpolate(for_warp.reshape(B, 2, 4, 4), (R, R), mode="bicubic",
                              align_corners=True)
        grid = grid + warp * field.permute(0, 2, 3, 1)
    pixels = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)

    # Change 1 - pixels, the amount of ink, so white paper stays white.
    dark = (1 + ink * dark).view(B, 1, 1, 1)
    pixels = 1 - (1 - pixels) * dark * (1 + tint * for_tint.view(B, 3, 1, 1))
    grey = pixels.mean(dim=1, keepdim=True)  # (B, 1, R, R)
    vivid = (1 + saturation * vivid).view(B, 1, 1, 1)
    return (grey + (pixels - grey) * vivid).clamp(0, 1)


# ---- pairs -> batches


def micro_batch_places(batch_size, micro_batch, rank, world_size):
    """The places in a batch of each micro-batch of this process: a list of ranges.

    The batch is cut into parts of world_size x micro_batch pairs (the last may be smaller), each
    part into equal slices, one for each process. So all processes run equally many micro-batches,
    and the content of a part depends on world_size x micro_batch alone.
    """
    places, together = [], world_size * micro_batch
    for start in range(0, batch_size, together):
        size = min(together, batch_size - start) // world_size  # of a slice
        places.append(range(start + rank * size, start + (rank + 1) * size))
    return places


class Batches:
    """The pairs of each micro-batch, lists of numbers k: a DataLoader's batch_sampler.

    The epochs' orders make one stream. Step s (from 0) takes its pairs s N … (s + 1) N - 1. So each
    comes once per epoch, all batches have N pairs, the same for any number of processes and any
    micro-batch, and a run resumes at any step.
    """

    def __init__(self, split, batch_size, seed, first_step, last_step, rank=0, world_size=1,
                 micro_batch=None):
        self.split, self.batch_size, self.seed = split, batch_size, seed
        self.steps = range(first_step, last_step)
        micro_batch = micro_batch or batch_size // world_size
        self.places = micro_batch_places(batch_size, micro_batch, rank, world_size)
        self.epoch, self.order = None, None  # of the last pair

    def __len__(self):
        return len(self.steps) * len(self.places)

    def __iter__(self):
        for step in self.steps:
            for places in self.places:
                yield self.pairs(step, places)

    def pairs(self, step, places):
        """The pairs at some places (a range) of a step's batch."""
        result = []
        for place in places:
            epoch, at = divmod(step * self.batch_size + place, len(self.split))
            if epoch != self.epoch:
                self.epoch, self.order = epoch, self.split.order(self.seed, epoch)
            result.append(int(self.order[at]))
        return result


class TrainingPairs(Dataset):
    """Pair k -> its tensors: what a DataLoader's workers run.

    With `features` (support/features.py) the image's embedding replaces its pixels. The next
    pair replaces one that cannot be read.
    """

    def __init__(self, split, image_size, features=None, tries=100):
        self.split, self.image_size, self.features, self.tries = split, image_size, features, tries

    def __getitem__(self, k):
        """-> pixels (3, R, R) or features (D,), ids (L,), image_keys, text_key, bad.

        bad: reports of pairs that cannot be read, {"pair", "file", "offset", …, "reason"}.
        """
        bad = []
        for other in range(k, k + self.tries):
            other %= len(self.split)
            try:
                if self.features is not None:
                    return *self.features.sample(self.split, other), bad
                image, ids, image_keys, text_key = self.split.sample(other)
                pixels = training_pixels(image, self.image_size, self.split.image_name(other))
                return pixels, ids, image_keys, text_key, bad
            except BadInput as error:
                bad.append({"pair": other, **self.split.where(other), "reason": str(error)})
        raise BadInput(f"{self.split.name}: {self.tries} pairs in a row cannot be read; the first: "
                       f"{bad[0]['reason']}")


def collate(samples):
    """Samples of TrainingPairs -> a micro-batch:

    pixels        (B, 3, R, R) uint8, or features (B, D) float16
    ids           (B, L) int64
    image_keys    (B, M) int64, the keys of all sentences of each image, filled up with -1
    text_keys     (B,) int64; text j describes image i when text_keys[j] is in image_keys[i]
    bad           reports of pairs that cannot be read
    """
    pixels, ids, image_keys, text_keys, reports = zip(*samples)
    # In a worker, default_collate stacks into memory shared with training.
    pixels = default_collate(pixels)
    ids = torch.from_numpy(np.stack(ids).astype(np.int64))
    image_keys = [torch.tensor(keys) for keys in image_keys]
    image_keys = pad_sequence(image_keys, batch_first=True, padding_value=-1)
    return pixels, ids, image_keys, torch.tensor(text_keys), sum(reports, [])


def training_loader(split, image_size, batches, workers, pin_memory=False, features=None):
    """A DataLoader: for each list of numbers k that `batches` yields, collate of those pairs."""
    return reader_loader(TrainingPairs(split, image_size, features), workers,
                         batch_sampler=batches, collate_fn=collate, pin_memory=pin_memory,
                         prefetch_factor=4 if workers else None)


def own_memory(batch):
    """A batch, copied out of the memory that it shares with a worker.

    A batch that stays there takes up open files and room in /dev/shm.
    """
    return [x.clone() if isinstance(x, torch.Tensor) and x.is_shared() else x for x in batch]


if __name__ == "__main__":
    raise SystemExit("error: data.py is no program; see python -m tools.prepare --help")
