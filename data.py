"""Images and captions on disk -> batches, in an order that is a function of (seed, epoch) alone.

    split = open_split("coco-cn", "train")
    batches = Batches(split, batch_size=1024, seed=0, first_step=0, last_step=100)
    for pixels, ids, image_keys, text_keys, bad in training_loader(split, 224, batches, workers=4): …

The words of this file, each for one thing:

data set       what --data names: a known name, a folder, or a pattern of tar shards
split          a part of it that is used for one purpose: train, valid or test. A `Split` is an object, whatever the layout on disk
image i      0 … I - 1, its number in the split. Its id (`image_ids[i]`) is what the data set calls it: a number or a path
caption t      0 … T - 1, its number in the split; its key (`text_keys[t]`) is a number that equal sentences share
pair k         0 … len(split) - 1: a caption and a image that it describes: what training counts, shuffles and samples
sample         what training takes of a pair: its image, the caption's tokens, and the keys that tell which others match (see collate)
epoch          once through all pairs, in an order of its own
place          where in an order something stands. The epochs' orders follow each other as one endless stream of places
batch          the pairs of one step, of all processes together; a micro-batch is what one process embeds at a time
shard          a tar file with some of the pairs

Read it in the order in which data flows, which is the order of the sections: a `Split` and what each layout makes of it (files with
offsets, folders, shards, painted ones) -> `open_split` finds it -> one image becomes pixels (`to_uint8`, `training_pixels`,
`augment`) -> pairs become batches (`Batches`, `TrainingPairs`, `collate`). What comes after that is beside the way: writing shards,
folders of classes, the command line.

Four layouts, one interface:

1. Chinese-CLIP: {train,valid,test}_imgs.tsv with lines `id<TAB>base64 image`, and {split}_texts.jsonl with
   {"text_id": 1, "text": "…", "image_ids": [7]}.
2. A folder of images with captions.csv (first line: image,caption) or captions.jsonl ({"image": "a.jpg", "caption": "…"}),
   paths relative to the folder. A image may stand in several rows. A further column `split` (train, valid, test, …) divides the
   images; without it 80 % train, 10 % valid, 10 % test, by a hash of the path.
3. Tar shards (WebDataset), for any number of images: files key.jpg (png, webp, …) beside key.txt, the caption, or key.json with
   {"text": "…"}, {"caption": "…"} or {"texts": ["…", "…"]}; named by a pattern such as 'shards/{000000..000020}.tar' or
   'shards/*.tar', or a folder with train-000000.tar, …, valid-000000.tar, ….
4. Painted here, no download (painter.py): `demo`, coloured things in the quarters of a image, endless; `landscapes` and
   `english-landscapes`, whose captions say what is in them, in Chinese and in English; `poems`, landscapes whose captions are lines of
   classical verse, of the sizes of the paper's own set of poems and images.

Images are read when a worker needs them; the captions of layouts 1 and 2 are kept in memory, those of shards are not. A pair that
cannot be read is replaced by the next one that can, and reported (`TrainingPairs`).

Letters in the shapes: I images, T captions, n pairs, L tokens of a caption; B pairs of a micro-batch, M sentences of a image, at
most, R pixels along a side, D width of an embedding.
"""
import base64
import hashlib
import json
import math
import mmap
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset, Sampler, default_collate

from support import system
from support.captions import caption_file, caption_rows, check_text, read_jsonl, sentence_key
from support.images import decoded, reader_loader, refused_as, training_pixels
from support.shards import ShardSplit, is_pattern, shards_of, split_shards
from support.system import BadInput
from tokenizer import Tokenizer

PAINTED = ("demo", "landscapes", "english-landscapes", "poems")
# Folder names of the published archives (Hugging Face data set OFA-Sys/chinese-clip-eval) and of the paper's own set, under --data-root.
NAMES = {"coco-cn": "COCO-CN", "flickr30k-cn": "Flickr30k-CN", "muge": "MUGE", "ap-id": "AP-ID",
         **{name: name for name in PAINTED}}


# ---------------------------------------------------------------------------------------------------------------- a split


class Split:
    """One split of a data set: T captions, I images, and which images each caption describes. Training and evaluation know no more of
    the data than this class, so a new layout is a subclass: what it passes to __init__, and image_bytes, image_location and files.

    name           for messages, e.g. "COCO-CN/test"
    texts          T captions
    image_ids      I ids
    positives      T lists of image numbers: positives[t] = the images that caption t describes; may be empty (then t is no query)
    pairs          (t, i) of each pair, in the data set's order
    ids            (T, L) uint16 tokens of the captions (the vocabulary has 21,128)
    text_keys      T keys of the captions
    image_keys     I lists of keys: the sentences that describe a image. Two pairs of a batch match when one's image has the other's key
    endless        whether each epoch has new images (the painted train split): then there are no fixed texts, image_ids, …, but
                   what training asks for

    Training asks for len(), sample(), image_name(), order(), where() and fingerprint(); with features kept also for words(),
    image_of(), image_count() and image(). Evaluation asks for texts, image_ids, positives, ids and image().
    """

    endless = False

    def __init__(self, name, texts, image_ids, positives, context_length=52):
        if not texts or not image_ids:
            raise BadInput(f"{name}: the split is empty ({len(image_ids)} images, {len(texts)} captions)")
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
        """Pair k -> (its image, tokens (L,), keys of all sentences that describe the image, key of this one). Here all epochs
        are alike.

        The image is the bytes of its file, so that a worker can decode them in the cheapest way (training_pixels), or of a
        painted set the image itself. Raises BadInput when the file cannot be read; whether it decodes is seen later.
        """
        with refused_as(self.image_name(k)):
            return self.image_bytes(self.image_of(k)), *self.words(k)

    def words(self, k):
        """What sample() gives of pair k beside the image, which is not touched."""
        t, i = self.pairs[k]
        return self.ids[t], self.image_keys[i], self.text_keys[t]

    def image_of(self, k):
        """The number of pair k's image."""
        return self.pairs[k][1]

    def image_count(self):
        return len(self.image_ids)

    def fingerprint(self):
        """A short text that changes when the captions, the images' ids, their relation or the first sample change: by it a
        resumed run, or kept features, notice that the data are others. (The other samples are not read: that would take as long as
        an epoch.)"""
        digest = hashlib.md5(json.dumps([self.texts, self.image_ids, self.positives], ensure_ascii=False).encode())
        try:
            image, ids, *_ = self.sample(0, 0)
            digest.update((image if isinstance(image, bytes) else image.tobytes()) + ids.tobytes())
        except (BadInput, IndexError):                                          # unreadable, or there are no pairs
            digest.update(b"none")
        return f"{len(self):,} pairs (hash {digest.hexdigest()[:12]})"

    # What evaluation asks for.

    def image(self, i) -> Image.Image:
        """Image i, decoded, RGB. Raises BadInput with its id when it cannot be read."""
        return decoded(lambda: self.image_bytes(i), f"{self.name}: image {self.image_ids[i]}")

    # For messages and reports.

    def image_name(self, k):
        """What a message calls the image of pair k."""
        return f"{self.name}: image {self.image_ids[self.image_of(k)]}"

    def where(self, k):
        """Where pair k lies on disk, for a report: {"file", "offset" in bytes, …} (of the painted set: its number)."""
        t, i = self.pairs[k]
        return self.image_location(i) | {"caption": self.texts[t]}

    def files(self):
        """The files in which the images lie."""
        return []                                                               # of painted ones


# ---------------------------------------------------------------------------------------------------------------- the Chinese-CLIP layout


class TsvSplit(Split):
    """The layout of the published sets. One file holds all images, so of it only the ids and byte offsets are kept."""

    def __init__(self, folder, split, context_length):
        self.path = folder / f"{split}_imgs.tsv"
        index_of = self._read_offsets()
        texts, positives = self._read_texts(folder / f"{split}_texts.jsonl", index_of)
        super().__init__(f"{folder.resolve().name}/{split}", texts, list(index_of), positives, context_length)

    def _read_offsets(self):
        """Sets self.offsets, (start, length) of each image's base64 text; -> {image id: number}."""
        self.offsets, index_of, line_of = [], {}, {}
        for number, start, end, line in self._lines():
            if start == end or not line.strip():
                continue
            id_, tab, _ = line.partition(b"\t")
            if not tab or not id_.strip().isdigit():
                raise BadInput(f"{self.path}, line {number}: expected `number<TAB>base64 image`, found {line[:40]!r}")
            if line_of.setdefault(int(id_), number) != number:
                raise BadInput(f"{self.path}, line {number}: image id {int(id_)} stands in line {line_of[int(id_)]} already; "
                               f"ids must be unique")
            index_of[int(id_)] = len(index_of)
            self.offsets.append((start + len(id_) + 1, end - start - len(id_) - 1))
        return index_of

    def _read_texts(self, path, index_of):
        """-> the captions, and for each the numbers of its images."""
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
            with mapped as m, system.progress(f"{self.path.name}: MiB indexed", len(m) / 2**20) as progress:
                start, number = 0, 0
                while start < len(m):
                    end = m.find(b"\n", start)
                    end = len(m) if end < 0 else end
                    number += 1
                    yield number, start, end, m[start : min(end, start + 64)]
                    progress.update((end + 1 - start) / 2**20)
                    start = end + 1

    def files(self):
        return [self.path]

    def image_location(self, i):
        return {"file": str(self.path), "offset": self.offsets[i][0], "image": self.image_ids[i]}

    def image_bytes(self, i):
        start, length = self.offsets[i]
        with open(self.path, "rb") as f:
            f.seek(start)
            text = f.read(length)
        standard = text.strip().translate(bytes.maketrans(b"-_", b"+/"))        # published sets use both base64 alphabets
        return base64.b64decode(standard, validate=True)


# ---------------------------------------------------------------------------------------------------------------- a folder with captions


class FolderSplit(Split):
    """A folder of images with captions.csv or captions.jsonl: the layout for your own images."""

    def __init__(self, folder, split, context_length):
        self.folder = folder
        index_of, described, present = {}, {}, set()                            # path -> image; caption -> the images it describes
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

    def image_location(self, i):
        return {"file": str(self.folder / self.image_ids[i]), "offset": 0, "image": self.image_ids[i]}

    def image_bytes(self, i):
        return (self.folder / self.image_ids[i]).read_bytes()


# ---------------------------------------------------------------------------------------------------------------- finding a data set


def open_split(data, split, data_root="data", context_length=52) -> Split:
    """A split of the data set that `data` names: a known name (NAMES, PAINTED), a folder, or a pattern of tar shards. Raises
    BadInput when there is none."""
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


def data_name(name):
    """A value of --data -> what the set is called: the known name, also for its folder (data/COCO-CN is coco-cn), else the
    folder's own name, or the pattern of shards."""
    folder = name if is_pattern(name) else Path(name).resolve().name
    return next((known for known, its_folder in NAMES.items() if name == known or folder.lower() == its_folder.lower()), folder)


def find(data, data_root="data"):
    """A data set's name or folder -> the folder. Raises BadInput when there is none."""
    folder = Path(data)
    if data in NAMES:
        folder = Path(data_root) / NAMES[data]
        if not folder.is_dir() and data in PAINTED:
            raise BadInput(f"{data}: there is no folder {folder}; paint it: python -m tools.prepare paint {data} {folder}")
        if not folder.is_dir():
            raise BadInput(f"{data}: there is no folder {folder}; unpack the data set there or name another place with --data-root")
    elif not folder.is_dir():
        raise BadInput(f"{data}: neither a folder, nor a pattern of tar shards, nor a known data set ({', '.join(NAMES)})")
    return folder


def split_names(folder):
    """Names of the splits that a folder holds, in any layout."""
    if captions := caption_file(folder):
        names = {split for _, _, split in caption_rows(captions)}
    else:
        names = {path.name.removesuffix("_imgs.tsv") for path in folder.glob("[!.]*_imgs.tsv") if path.is_file()}
    names = names or set(split_shards(folder))
    if not names:
        raise BadInput(f"{folder}: no captions.csv or captions.jsonl with rows beside images, nor *_imgs.tsv with *_texts.jsonl "
                       f"(Chinese-CLIP layout), nor train-000000.tar, … (for shards with other names pass a pattern: "
                       f"'{folder}/{{000000..000020}}.tar' or '{folder}/*.tar')")
    usual = ["train", "valid", "test"]
    return [name for name in usual if name in names] + sorted(names - set(usual))


def all_names(data, data_root="data"):
    """Names of the splits of whatever --data can be."""
    if is_pattern(data):
        return ["train"]
    return split_names(find(data, data_root))


# ---------------------------------------------------------------------------------------------------------------- augmentation

# How far each kind of augmentation may go, both ways. Rotation in degrees, shift and warp in half image sides, the rest as shares
# of 1. `photo` moves little, `drawing` is for icons and drawings. Nothing is ever mirrored: captions say left and right, and signs
# and letters do not survive it.
AUGMENT = {
    "none":    None,
    "photo":   dict(rotate=0, zoom=0.05, stretch=0.03, shift=0.05, warp=0.0, ink=0.1, tint=0.0, saturation=0.1),
    "drawing": dict(rotate=20, zoom=0.25, stretch=0.20, shift=0.12, warp=0.10, ink=0.3, tint=0.2, saturation=0.4),
}
DRAWS = 10 + 2 * 4 * 4                                                          # random numbers that one image uses


def augment(pixels, draws, rotate, zoom, stretch, shift, warp, ink, tint, saturation):
    """Bend, move and colour a batch: pixels (B, 3, R, R) in 0..1, draws (B, DRAWS) uniform in -1..1, then a row of AUGMENT
    -> (B, 3, R, R) in 0..1.

    The random numbers come from outside, so that they can be a function of (seed, step, place in the batch), and not of how many processes
    there are. Outside the image its border goes on.
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
    per_image = lambda draw, most: (1 + most * draw).view(B, 1, 1, 1)
    pixels = 1 - (1 - pixels) * per_image(dark, ink) * (1 + tint * u[7:10].T.view(B, 3, 1, 1))
    grey = pixels.mean(dim=1, keepdim=True)                                     # (B, 1, R, R)
    return (grey + (pixels - grey) * per_image(vivid, saturation)).clamp(0, 1)


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
    """(epoch, k) -> the tensors of one pair: what a DataLoader's workers run. With `features` (features.py) the image is not
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
                image, ids, image_keys, text_key = self.split.sample(epoch, other)
                pixels = training_pixels(image, self.image_size, self.split.image_name(other))
                return pixels, ids, image_keys, text_key, bad
            except BadInput as error:
                bad.append({"pair": other, **self.split.where(other), "reason": str(error)})
        raise BadInput(f"{self.split.name}: {self.tries} pairs in a row cannot be read; the first: {bad[0]['reason']}")


def collate(samples):
    """Samples -> a micro-batch:

    pixels       (B, 3, R, R) uint8, or features (B, D) float16
    ids          (B, L) int64
    image_keys   (B, M) int64, the keys of all sentences of each image, filled up with -1
    text_keys    (B,) int64; caption j describes image i when text_keys[j] is in image_keys[i]
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
    return reader_loader(TrainingPairs(split, image_size, features=features), workers, batch_sampler=batches, collate_fn=collate,
                         pin_memory=pin_memory, prefetch_factor=4 if workers else None)


def own_memory(batch):
    """A batch out of the shared memory through which workers send it, where it would take up open files and room in /dev/shm for as
    long as it is kept."""
    return [x.clone() if isinstance(x, torch.Tensor) and x.is_shared() else x for x in batch]
