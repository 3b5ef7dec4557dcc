"""Recall@1, 5, 10 and their mean in both directions (section 4.1.2), in the tables of section 4.2; and zero-shot classification (figure 2).

    python evaluate.py --ckpt cn-clip-vit-b-16 --data coco-cn                   # released weights, zero-shot: table 4 and this row
    python evaluate.py --ckpt cn-clip-vit-b-16 runs/ap/best.pt --data ap-id     # table 6: before and after; may the gain be chance?
    python evaluate.py --ckpt runs/own/best.pt --data /path/to/folder --report report.html          # curves, some queries, the worst misses
    python evaluate.py --ckpt runs/own/best.pt --data /path/to/folder --json figures.json           # the figures, for other programs
    python evaluate.py --ckpt runs/own/best.pt --data /path/to/folder --features features           # embeddings are kept for next time
    python evaluate.py --ckpt cn-clip-vit-b-16 --classify /path/to/classes      # 猫/1.jpg, 狗/1.jpg, … or the ELEVATER-cn layout
    torchrun --nproc_per_node 8 evaluate.py --ckpt cn-clip-vit-b-16 --data flickr30k-cn             # the same figures from 8 processes

A query is a hit at K if ANY of its correct candidates is among the K most similar. Text-to-image: every caption asks, all pictures of the
split are candidates; image-to-text: every picture asks, all captions are candidates. Queries without any correct candidate do not count;
how many there were is said.

The way of the figures: embed_split (unit vectors) -> best_ranks (how far down the first right answer stands; all else follows from it) ->
Ranking.recall -> bootstrap_interval (how far chance goes) -> a record, the dict of what was measured of one checkpoint -> table, --json,
--report.

Letters in the shapes: I pictures, T captions, D width of an embedding; Q queries, A those of them that have an answer, C candidates or
classes; B pictures in a batch, R pixels along a side, L tokens of a caption.
"""
import argparse
import collections
import functools
import hashlib
import json
import os
import re
import unicodedata
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

import checkpoint
import data
import report
import system
from processes import from_all, from_shares, own_batches, precision_of, rank_and_world, start_processes
from system import BadInput
from tokenizer import Tokenizer

KS = (1, 5, 10)

# The paper's published rows, in percent: (size group, model, setting, text-to-image R@1 R@5 R@10, image-to-text R@1 R@5 R@10).
# Tables 4 and 5 are after fine-tuning (section 4.1.4), table 6 before and after it.
PUBLISHED = {
    "coco-cn": ("Table 4. COCO-CN", [
        ("base-size", "Wukong ViT-B/32", "fine-tuned", 67.0, 91.4, 96.7, 65.8, 90.3, 96.6),
        ("base-size", "R2D2 ViT-B", "fine-tuned", 75.1, 94.2, 98.1, 76.1, 95.3, 98.5),
        ("base-size", "CE-CLIP ViT-B/16", "fine-tuned", 77.0, 97.1, 99.0, 77.4, 96.2, 98.9),
        ("large-size", "Wukong ViT-L/14", "fine-tuned", 74.0, 94.4, 98.1, 73.3, 94.0, 98.0),
        ("large-size", "R2D2 ViT-L/14", "fine-tuned", 79.1, 96.5, 98.9, 79.3, 97.1, 98.7),
        ("large-size", "CE-CLIP ViT-L/14", "fine-tuned", 78.9, 96.3, 99.0, 80.2, 96.7, 99.2)]),
    "flickr30k-cn": ("Table 5. Flickr30K-CN", [
        ("base-size", "Wukong ViT-B/32", "fine-tuned", 67.6, 89.6, 94.2, 83.9, 97.6, 99.0),
        ("base-size", "R2D2 ViT-B", "fine-tuned", 78.3, 94.6, 97.0, 92.6, 99.1, 99.8),
        ("base-size", "CE-CLIP ViT-B/16", "fine-tuned", 79.1, 94.8, 97.4, 93.5, 99.0, 99.5),
        ("large-size", "Wukong ViT-L/14", "fine-tuned", 77.4, 94.5, 97.0, 92.7, 99.1, 99.6),
        ("large-size", "R2D2 ViT-L/14", "fine-tuned", 84.4, 96.7, 98.4, 95.6, 98.8, 100.0),
        ("large-size", "CE-CLIP ViT-L/14", "fine-tuned", 82.7, 96.7, 98.6, 96.1, 99.5, 99.9)]),
    "ap-id": ("Table 6. AP-ID", [
        ("base-size", "CN-CLIP ViT-B/16", "zero-shot", 81.3, 89.5, 95.9, 84.4, 87.5, 97.3),
        ("base-size", "CN-CLIP ViT-B/16", "fine-tuned", 84.1, 95.3, 98.5, 82.7, 94.4, 97.4)]),
    "poems": ("As table 6, on the painted stand-in for AP-ID", []),            # ours
}
# Our models -> the size group (the paper's column "Scale") of whose rows theirs is the next.
SIZE_GROUP = {"tiny": "tiny", "rn50": "base-size", "vit-b-32": "base-size", "vit-b-16": "base-size",
              "vit-l-14": "large-size", "vit-l-14-336": "large-size", "vit-h-14": "large-size"}


# ---------------------------------------------------------------------------------------------------------------- embeddings


class Pictures(Dataset):
    """Pictures as a DataLoader reads them: number i -> (i, (3, R, R) uint8), or (i, the reason) for one that cannot be read."""

    def __init__(self, read, size):
        self.read, self.size = read, size

    def __getitem__(self, i):
        try:
            return i, data.to_uint8(self.read(i), self.size)
        except BadInput as error:
            return i, str(error)


def _collate(samples):
    """-> numbers of the pictures that could be read, their pixels (B, 3, R, R) or None, {number: reason} of the others."""
    good = [(i, pixels) for i, pixels in samples if isinstance(pixels, torch.Tensor)]
    unreadable = {i: reason for i, reason in samples if isinstance(reason, str)}
    return [i for i, _ in good], torch.stack([pixels for _, pixels in good]) if good else None, unreadable


@torch.no_grad()
def encode_pictures(model, read, batches, device, autocast, workers=0):
    """For each batch, a sequence of picture numbers, yields (numbers, embeddings (B, D) on the CPU, {number: reason} of what
    cannot be read). By this process alone.

    read(i) -> picture i, or raises BadInput. The model is in evaluation mode.
    """
    loader = DataLoader(Pictures(read, model.cfg.image_size), batch_sampler=batches, collate_fn=_collate, num_workers=workers,
                        worker_init_fn=system.reader_start(), timeout=system.READER_SECONDS * (workers > 0))
    with system.Progress("pictures embedded", sum(map(len, batches))) as progress:
        for numbers, pixels, unreadable in loader:
            embed = torch.empty(0, model.cfg.embed_dim)
            if numbers:
                pixels = data.normalize(pixels.to(device).float() / 255)        # (B, 3, R, R)
                with autocast():
                    embed = model.encode_image(pixels).float().cpu()            # (B, D)
            yield numbers, embed, unreadable
            progress.add(len(numbers) + len(unreadable))


@torch.no_grad()
def embed_texts(model, ids, autocast, batch_size=128):
    """Tokens, a NumPy array (T, L) of integers -> (T, D) on the CPU, by all processes together. The model is in evaluation mode."""
    batches = own_batches(len(ids), batch_size)
    rows = []
    with system.Progress("texts embedded", sum(map(len, batches))) as progress:
        for batch in batches:
            tokens = torch.from_numpy(ids[batch].astype("int64"))               # (B, L), left on the CPU: there the model packs them
            with autocast():
                rows.append(model.encode_text(tokens).float().cpu())            # (B, D)
            progress.add(len(batch))
    return from_shares(batches, rows, torch.empty(len(ids), model.cfg.embed_dim))


def embed_pictures(model, read, count, device, autocast, batch_size=128, workers=0):
    """Pictures 0 … count - 1 -> (count, D) on the CPU, by all processes together.

    Raises BadInput for one that cannot be read: recall is exact or not given.
    """
    batches, rows = own_batches(count, batch_size), []
    for _, embed, unreadable in encode_pictures(model, read, batches, device, autocast, workers):
        if unreadable:
            raise BadInput(next(iter(unreadable.values())))
        rows.append(embed)
    return from_shares(batches, rows, torch.empty(count, model.cfg.embed_dim))


def embed_split(model, split, device, autocast, batch_size=128, workers=0, image_embed=None):
    """image_embed (I, D) and text_embed (T, D) of a split, on the CPU; `image_embed`: when the pictures' are known already.

    Under torch.distributed each process embeds its share and all get the whole.
    """
    was_training = model.training
    model.eval()
    if image_embed is None:
        image_embed = embed_pictures(model, split.picture, len(split.image_ids), device, autocast, batch_size, workers)
    text_embed = embed_texts(model, split.ids, autocast, batch_size)
    model.train(was_training)
    return image_embed, text_embed


# ---------------------------------------------------------------------------------------------------------------- embeddings kept on disk

# evaluate.py --features. (That of train.py is another thing: features.py's folder has the pictures of the train split alone, in parts.)

FILES = ("image_embed.npy", "text_embed.npy")


def read_about(folder, made_of):
    """-> what features.json says about a folder of embeddings. Raises BadInput when they were made of something else than `made_of`."""
    try:
        about = json.loads((folder / "features.json").read_text(encoding="utf-8"))
        before = about["made_of"]
        changed = [f"{key} {before.get(key)}, now it is {made_of[key]}" for key in made_of if before.get(key) != made_of[key]]
    except Exception as error:                                                  # damage comes in many kinds
        raise _unusable(folder, error) from None
    if changed:
        raise BadInput(f"--features {folder}: made of {'; '.join(changed)}. Delete it or name another folder")
    return about


def _unusable(folder, error):
    return BadInput(f"--features {folder}: cannot be read ({type(error).__name__}: {error}); delete it or name another folder")


def load_or_compute(folder, made_of, rows_of, compute):
    """What an earlier call has left in `folder`, or else compute(), which is kept there -> (image_embed (I, D), text_embed (T, D)).

    The folder holds the two .npy files and features.json, which says what they were made of (`made_of`) and whose rows they are
    (`rows_of`: {"image_ids": names of the pictures, "texts": captions}). Raises BadInput when they are of something else.
    """
    folder = Path(folder)
    is_main = rank_and_world()[0] == 0
    if any(from_all((folder / "features.json").exists())):                      # any: all processes must go the same way
        embeds = _load(folder, made_of, rows_of)
        if is_main:
            print(f"embeddings of {folder} used again")
        return embeds
    embeds = compute()
    if is_main:
        _keep(folder, made_of, rows_of, embeds)
        print(f"embeddings kept in {folder}")
    from_all(None)                                                              # all wait until they are there
    return embeds


def _sha256_of(embeds):
    return {name: hashlib.sha256(x.contiguous().numpy()).hexdigest() for name, x in zip(FILES, embeds)}


def _load(folder, made_of, rows_of):
    about = read_about(folder, made_of)
    try:
        embeds = [torch.from_numpy(np.load(folder / name)) for name in FILES]
        as_described = about["sha256"] == _sha256_of(embeds) and all(about[key] == rows_of[key] for key in rows_of)
    except Exception as error:                                                  # damage comes in many kinds
        raise _unusable(folder, error) from None
    if not as_described:
        raise BadInput(f"--features {folder}: the .npy files are not those that features.json describes; "
                       f"delete it or name another folder")
    return embeds


def _keep(folder, made_of, rows_of, embeds):
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--features {folder}: {error.strerror}; name another folder") from None
    part = f".{os.getpid()}.part"                                               # two calls at the same time do not write into one file
    for name, x in zip(FILES, embeds):
        system.write(folder / name, lambda f: np.save(f, x.numpy()), part=part)
    about = {"made_of": made_of, "sha256": _sha256_of(embeds), **rows_of}
    text = json.dumps(about, ensure_ascii=False, indent=1) + "\n"
    system.write_text(folder / "features.json", text, part=part)                # last: with it the folder is whole


# ---------------------------------------------------------------------------------------------------------------- recall


def best_ranks(queries, candidates, correct, chunk=None):
    """For every query the rank (0 = first) of its best-placed correct candidate; -1 for queries without one.

    queries (Q, D), candidates (C, D) unit vectors, correct: Q lists of candidate indices -> (Q,) int64. Equal similarities are
    ranked in the order of the candidates. `chunk` queries are compared at a time (default: as many as make 16 million similarities),
    so memory does not grow with Q. Under torch.distributed each process takes its share of the chunks, and all get the whole.
    """
    chunk = chunk or max(1, 2**24 // len(candidates))
    place = torch.arange(len(candidates), device=candidates.device)             # (C,)
    batches, ranks = own_batches(len(queries), chunk), []
    with system.Progress("queries ranked", sum(map(len, batches))) as progress:
        for batch in batches:
            ranks.append(_ranks_of_chunk(queries[batch.start : batch.stop], candidates, [correct[q] for q in batch], place))
            progress.add(len(batch))
    return from_shares(batches, ranks, torch.empty(len(queries), dtype=torch.int64))


def _ranks_of_chunk(queries, candidates, correct, place):
    """queries (q, D), candidates (C, D), correct: q lists, place (C,) = 0 … C - 1 -> (q,).

    rank = how many candidates are more similar than the best correct one, and how many as similar ones stand before it.
    """
    similarity = queries @ candidates.T                                         # (q, C)
    most = max(1, *map(len, correct))
    fill = lambda right: [*right, *[right[0] if right else 0] * (most - len(right))]                # repeats change nothing
    known = torch.tensor([fill(right) for right in correct], device=place.device)                   # (q, most)
    scores = similarity.gather(1, known)                                        # (q, most)
    best = scores.max(dim=1, keepdim=True).values                               # (q, 1)
    first = known.masked_fill(scores < best, len(place)).min(dim=1, keepdim=True).values            # (q, 1): the first of equally good ones

    # 1.0 or 0.0, not booleans: their sums take a sixth of the time and memory.
    marks = torch.empty_like(similarity)                                        # (q, C)
    ranks = torch.gt(similarity, best, out=marks).sum(dim=1).long()             # (q,)
    as_good = torch.ge(similarity, best, out=marks).sum(dim=1)                  # (q,): rank + 1, or more where others score the same
    tied = (as_good > ranks + 1).nonzero()[:, 0]
    ranks[tied] += ((similarity[tied] == best[tied]) & (place < first[tied])).sum(dim=1)
    return ranks.masked_fill(torch.tensor([not right for right in correct], device=place.device), -1).cpu()


class Ranking(NamedTuple):
    """What one direction comes to, and all that the figures need: embeddings are not looked at again."""

    ranks: torch.Tensor                                                         # (Q,) of best_ranks
    correct: list                                                               # Q lists: the correct candidates of each query
    candidates: int                                                             # C

    def hits_at_1(self):
        """Whether each of the queries that have an answer was a hit at 1, 0 or 1: (A,) float64."""
        return (self.ranks[self.ranks >= 0] == 0).double().numpy()

    def recall(self):
        """-> {"R@1", "R@5", "R@10", "MR", "chance_R@1", "chance_MR", "queries", "without_answer"}: recalls and those of guessing
        in percent, the number of queries that count, and of those that had no correct candidate."""
        asked = self.ranks[self.ranks >= 0]                                     # (A,)
        result = {f"R@{k}": 100 * (asked < k).double().mean().item() for k in KS}
        result["MR"] = sum(result.values()) / len(KS)

        # A guess at K fails when K different candidates are all wrong: Π_{k<K} (wrong - k) / (C - k), of which the mean over the queries.
        wrong = np.array([self.candidates - len(right) for right in self.correct if right])         # (A,)
        factors = [(wrong - k).clip(0) / max(1, self.candidates - k) for k in range(max(KS))]
        misses = np.cumprod(factors, axis=0).mean(axis=1).tolist()              # misses[K - 1]
        chance = {k: 100 * (1 - misses[k - 1]) for k in KS}
        return result | {"chance_R@1": chance[1], "chance_MR": sum(chance.values()) / len(KS),
                         "queries": len(asked), "without_answer": len(self.ranks) - len(asked)}


def rank_both_ways(image_embed, text_embed, positives, chunk=None):
    """-> {"text_to_image": Ranking, "image_to_text": Ranking}.

    image_embed (I, D), text_embed (T, D) unit vectors; positives[t] = indices of the pictures that caption t describes;
    chunk: of best_ranks. Raises BadInput when an embedding is not finite or nothing can be asked.
    """
    if not (image_embed.sum().isfinite() and text_embed.sum().isfinite()):
        raise BadInput("the embeddings hold NaN or infinity: the weights are damaged, training diverged (then a lower --lr helps), "
                       "or fp16 has overflown (then --precision fp32 helps)")
    if not any(len(images) for images in positives):
        raise BadInput("no caption of the split describes a picture of it, so there is no recall to measure")
    captions_of_image = [[] for _ in range(len(image_embed))]                   # the same relation from the other side
    for t, images in enumerate(positives):
        for i in images:
            captions_of_image[i].append(t)
    to_image = best_ranks(text_embed, image_embed, positives, chunk)            # (T,)
    to_text = best_ranks(image_embed, text_embed, captions_of_image, chunk)     # (I,)
    return {"text_to_image": Ranking(to_image, positives, len(image_embed)),
            "image_to_text": Ranking(to_text, captions_of_image, len(text_embed))}


def retrieval_recall(image_embed, text_embed, positives, chunk=None):
    """Recall in both directions -> {"text_to_image": what Ranking.recall gives, "image_to_text": the same}.
    Arguments and errors are those of rank_both_ways."""
    return {way: ranking.recall() for way, ranking in rank_both_ways(image_embed, text_embed, positives, chunk).items()}


# ---------------------------------------------------------------------------------------------------------------- what may be chance


def bootstrap_means(values, groups, draws=1000, seed=0):
    """The mean of `values` (A,) in percent, as it comes out on other sets of the same kind: (draws,) means over groups drawn
    with replacement.

    Captions of one picture rise and fall together, so pictures are drawn, not captions: groups (A,) numbers the picture of each value.
    The same seed and groups give the same draws, so differences between two models are paired.
    """
    _, groups = np.unique(groups, return_inverse=True)                          # numbered without gaps, from 0
    sums, counts = np.bincount(groups, weights=values), np.bincount(groups)     # (groups,)
    rng, means = np.random.default_rng(seed), []
    for _ in range(draws):
        drawn = rng.integers(0, len(sums), len(sums))
        means.append(100 * sums[drawn].sum() / counts[drawn].sum())
    return np.array(means)


def bootstrap_interval(values, groups):
    """-> [low, high] in percent, between which 95 % of the bootstrap's means lie."""
    return np.quantile(bootstrap_means(values, groups), (0.025, 0.975)).tolist()


def half_width(interval):
    """Of an interval [low, high]: what stands behind ±."""
    return (interval[1] - interval[0]) / 2


def change_of(before, after, groups):
    """What another model changes, on the same queries: values (A,) of both -> {"mean", "interval"} in percent points."""
    return {"mean": 100 * (after - before).mean().item(), "interval": bootstrap_interval(after - before, groups)}


def pictures_asked(rankings):
    """{way: Ranking} -> {way: (A,) the picture of each query that has an answer}; a caption's is the first that it describes."""
    captions, pictures = rankings["text_to_image"].correct, rankings["image_to_text"].correct
    return {"text_to_image": np.array([images[0] for images in captions if images]),
            "image_to_text": np.array([i for i, texts in enumerate(pictures) if texts])}


# ---------------------------------------------------------------------------------------------------------------- zero-shot classification

# A class's embedding is the mean over these sentences. They differ in what they say of the picture, not of the class.
TEMPLATES = ("{}", "{}。", "这是{}。", "一张{}的照片。", "一张{}的图片。", "一张清晰的{}照片。", "一张模糊的{}照片。", "一张{}的特写。",
             "一张{}的黑白照片。", "远处的{}。", "画面里有{}。", "照片中的{}。", "许多{}。", "一个{}。", "小小的{}。", "巨大的{}。",
             "{}的插图。", "{}的素描。", "一幅{}的画。", "卡通风格的{}。")


def read_templates(path):
    """A text file with one template in each line, {} where the class's name goes -> the templates."""
    templates = []
    if not Path(path).is_file():
        raise BadInput(f"--templates {path}: there is no such file")
    for number, line in system.utf8_lines(path):
        if line.strip():
            if line.count("{}") != 1:
                raise BadInput(f"{path}, line {number}: expected one {{}} where the class's name goes, found {line.strip()[:60]}")
            templates.append(line.strip())
    if not templates:
        raise BadInput(f"{path}: no templates; expected lines like 一张{{}}的照片")
    return templates


def class_embeddings(model, names, templates, autocast, batch_size=128):
    """The zero-shot classifier (figure 2, step 2): C names -> (C, D).

    A class's embedding is the mean of the unit embeddings of its prompts, of length 1 again.
    """
    prompts = [template.replace("{}", name) for name in names for template in templates]
    ids = Tokenizer("the prompts")(prompts, model.cfg.context_length).numpy()   # (C x templates, L)
    seen = {}
    for c, tokens in enumerate(ids.reshape(len(names), -1)):
        if (other := seen.setdefault(tokens.tobytes(), c)) != c:
            warnings.warn(f"the prompts of {names[c]} are those of {names[other]}, token by token: "
                          f"the model cannot tell the two classes apart, and guesses the first")
    embed = embed_texts(model, ids, autocast, batch_size).view(len(names), len(templates), -1)      # (C, templates, D)
    return F.normalize(embed.mean(dim=1), dim=1)


def class_probabilities(image_embed, class_embed, scale):
    """Figure 2, step 3: softmax of the cosine similarities times the scale exp(logit_scale).

    image_embed (I, D) or (D,), class_embed (C, D) -> (I, C) or (C,), rows that sum to 1.
    """
    return (scale * image_embed @ class_embed.T).softmax(dim=-1)


def classification_of(image_embed, class_embed, labels, names):
    """A picture belongs to the class whose embedding is most like its own; of equal ones to the first.

    image_embed (I, D), class_embed (C, D) unit vectors, labels: I class indices, names: C texts
    -> ({"top-1", "top-5", "mean_per_class", "top-1_interval", "chance_top-1" in percent; "pictures", "classes"; "per_class" of the classes
    that have pictures; "confused", the 20 pairs that are most often}, whether each picture was right (I,) 0 or 1).
    """
    ranks = best_ranks(image_embed, class_embed, [[label] for label in labels])                     # (I,)
    right, labels = (ranks == 0).double().numpy(), np.array(labels)             # (I,), (I,)
    counts = np.bincount(labels, minlength=len(names))                          # (C,)
    accuracy = 100 * np.bincount(labels, weights=right, minlength=len(names)) / np.maximum(counts, 1)                    # (C,)
    figures = {"top-1": 100 * right.mean().item(),
               "top-5": 100 * (ranks < 5).double().mean().item(),
               "mean_per_class": accuracy[counts > 0].mean().item(),
               "top-1_interval": bootstrap_interval(right, np.arange(len(right))),
               "chance_top-1": 100 / len(names), "pictures": len(labels), "classes": len(names)}
    figures["per_class"] = [{"class": names[c], "pictures": int(counts[c]), "top-1": accuracy[c].item()} for c in np.flatnonzero(counts)]

    guesses = torch.cat([(some @ class_embed.T).argmax(dim=1) for some in image_embed.split(1024)]).tolist()
    taken_for = collections.Counter((label, guess) for label, guess in zip(labels.tolist(), guesses) if label != guess)
    figures["confused"] = [{"class": names[a], "taken_for": names[b], "times": times, "of": int(counts[a])}
                           for (a, b), times in taken_for.most_common(20)]
    return figures, right


def predictions(image_embed, class_embed, scale, names):
    """For each picture its five most probable classes, best first, of equal ones the first: I lists of [name, probability]."""
    found = []
    for some in image_embed.split(1024):
        best = class_probabilities(some, class_embed, scale).sort(dim=1, descending=True, stable=True)
        for probabilities, classes in zip(best.values[:, :5].tolist(), best.indices[:, :5].tolist()):
            found.append([[names[c], p] for p, c in zip(probabilities, classes)])
    return found


# ---------------------------------------------------------------------------------------------------------------- the tables


def data_name(name):
    """A value of --data -> what the set is called: the known name, also for its folder (data/COCO-CN is coco-cn), else the
    folder's own name, or the pattern of shards."""
    folder = name if data.is_pattern(name) else Path(name).resolve().name
    return next((known for known, its_folder in data.NAMES.items() if name == known or folder.lower() == its_folder.lower()), folder)


def setting_of(state, name):
    """What a checkpoint has seen of the data set `name` (a value of --data), as far as its file tells:
    "fine-tuned" or "trained" on it, else "zero-shot"."""
    known = data_name(name) in [*data.NAMES, *data.PAINTED]                     # else another folder of that name is another data set
    for seen, stage in reversed(checkpoint.seen_by(state)):
        if data_name(seen) == data_name(name) and (known or Path(seen).resolve() == Path(name).resolve()):
            return "fine-tuned" if stage == "finetune" else "trained"
    return "zero-shot"


def compare_rows(records, name, split):
    """The rows of the paper's table for this data set and split, and those measured here
    -> (title, [(size group, model, setting, six recalls, the two ± of the R@1 or None), …])."""
    title, published = PUBLISHED.get(name, (name, [])) if split == "test" else (name, [])
    rows = [(group, model, setting, figures, None) for group, model, setting, *figures in published]
    for record in records:
        ways = record["text_to_image"], record["image_to_text"]
        figures = [way[f"R@{k}"] for way in ways for k in KS]
        halves = [half_width(way["R@1_interval"]) for way in ways]
        group = SIZE_GROUP.get(record["model"], "custom")
        rows.append((group, f"> {record['model']} ({record['ckpt']})", record["setting"], figures, halves))
    groups = ["base-size", "large-size", "tiny", "custom"]
    rows.sort(key=lambda row: groups.index(row[0]))                             # stable: a measured row ends its own size group
    return f"{title}, {split} split (%)", rows


def recalls_as_text(figures, halves, plus_minus=" ±{:.1f}"):
    """Six recalls, two ± or None -> for each direction the cells R@1, R@5, R@10 and their mean."""
    cells = []
    for way in (0, 1):
        three = figures[3 * way : 3 * way + 3]
        cells.append([f"{x:.1f}" for x in (*three, sum(three) / 3)])
        cells[way][0] += plus_minus.format(halves[way]) if halves else ""
    return cells


def width(text):
    """Columns that a text takes in a terminal: Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def align_columns(rows):
    """Rows of cells -> lines in which the cells of each column start below each other."""
    widths = [max(map(width, column)) for column in zip(*rows)]
    pad = lambda cell, size: cell + " " * (size - width(cell))
    return ["  ".join(map(pad, row, widths)).rstrip() for row in rows]


def table(records, name, split):
    """The paper's table for this data set as text, published rows and the measured ones (marked >)."""
    title, rows = compare_rows(records, name, split)
    lines = [["scale", "model", "setting", *["  R@1", "  R@5", " R@10", "   MR", ""] * 2]]
    for group, model, setting, figures, halves in rows:
        to_image, to_text = recalls_as_text(figures, halves)
        right_set = lambda cells: [" " * (5 - len(cell.split()[0])) + cell for cell in cells]
        lines.append([group, model, setting, *right_set(to_image), "", *right_set(to_text), ""])
    head, *body = align_columns(lines)
    left, right = head.find("R@1"), head.rfind("R@1")
    above = " " * left + "Text-to-Image" + " " * (right - left - 13) + "Image-to-Text"
    return "\n".join([title, above, head, *body, *notes(records, name, split)])


def gain_in_words(what, change):
    """{"mean", "interval"} of change_of -> a sentence's part."""
    low, high = change["interval"]
    return f"{what} {change['mean']:+.1f} ({low:+.1f} to {high:+.1f}{', which may be chance' if low <= 0 <= high else ''})"


def notes(records, name, split):
    """What a reader of the table must know: lines."""
    ways = {"text_to_image": "caption{s} without a picture in the split", "image_to_text": "picture{s} without a caption"}
    first, *others = records
    t, i = (first[way] for way in ways)
    lines = [f"> measured here, towers in {first['precision']}: {t['queries']:,} captions ask, {i['queries']:,} pictures ask. "
             f"Guessing gives text-to-image R@1 {t['chance_R@1']:.1f}, MR {t['chance_MR']:.1f}; "
             f"image-to-text {i['chance_R@1']:.1f}, {i['chance_MR']:.1f}.",
             "MR is the mean of R@1, R@5 and R@10. ±: half of the interval that holds 95 % of the R@1 when the split's pictures are "
             "resampled (bootstrap, 1,000 draws).",
             "Setting: fine-tuned or trained on this data set, as far as the checkpoint's file tells; else zero-shot."]
    published = data.TABLE_1.get(name, {}).get(split)
    if published and published == first["pairs"]:
        lines.append(f"{published:,} pairs, as in the paper's table 1.")
    elif published:
        lines.append(f"NOTE: {first['pairs']:,} pairs where the paper's table 1 has {published:,}, "
                     f"so the published rows are of another set.")
    for way, what in ways.items():
        if missing := first[way]["without_answer"]:
            lines.append(f"{missing:,} {what.format(s='s' * (missing > 1))}: asked nothing, but they stay candidates.")
    for record in others:
        gains = ", ".join(gain_in_words(way.replace("_", "-"), change) for way, change in record["change_of_R@1"].items())
        lines.append(f"R@1 of {record['ckpt']} less that of {first['ckpt']}, with 95 % interval: {gains}.")
    return lines


def class_table(records, title, templates):
    """Zero-shot classification as text; templates: how many prompts each class has."""
    lines = [["model", "top-1", "top-5", "mean per class"]]
    for r in records:
        top_1 = f"{r['top-1']:5.1f} ±{half_width(r['top-1_interval']):.1f}"
        lines.append([f"> {r['model']} ({r['ckpt']})", top_1, f"{r['top-5']:5.1f}", f"{r['mean_per_class']:5.1f}"])
    return "\n".join([title, *align_columns(lines), *class_notes(records, templates)])


def class_notes(records, templates):
    """What a reader of the table must know: lines."""
    first, *others = records
    lines = [f"> measured here, towers in {first['precision']}: {first['pictures']:,} pictures, {first['classes']:,} classes, "
             f"{templates} prompt{'s' * (templates > 1)} each. Guessing gives top-1 of {first['chance_top-1']:.1f}.",
             "±: half of the interval that holds 95 % of the top-1 when the pictures are resampled (bootstrap, 1,000 draws)."]
    for record in others:
        what = f"top-1 of {record['ckpt']} less that of {first['ckpt']}, with 95 % interval:"
        lines.append(f"{gain_in_words(what, record['change_of_top-1'])}.")
    for record in records:
        if record["confused"]:
            pairs = "; ".join(f"{c['class']} taken for {c['taken_for']}, {c['times']} of {c['of']}" for c in record["confused"][:5])
            lines.append(f"most often confused by {record['ckpt']}: {pairs}")
    return lines


# ---------------------------------------------------------------------------------------------------------------- command line


def retrieve(args, device, is_main):
    """Recall of each checkpoint on a split; the main process prints the table and writes what was asked for."""
    if args.features is not None and len(set(map(file_name, args.ckpt))) < len(args.ckpt):
        raise BadInput(f"--features {args.features}: two of the checkpoints would have the same folder there "
                       f"({', '.join(map(file_name, args.ckpt))}); name each once, or rename one")
    split_name = "all" if data.is_pattern(args.data) else args.split or "test"
    name, records, all_rankings = data_name(args.data), [], []

    @functools.cache                                                            # read once for all checkpoints that cut captions alike
    def open_split(context_length):
        return data.open_split(args.data, split_name, args.data_root, context_length)

    for source in args.ckpt:
        record, split, embeds, rankings = retrieve_with(source, args, open_split, split_name, device)
        pictures = pictures_asked(rankings)
        for way in rankings:
            record[way]["R@1_interval"] = bootstrap_interval(rankings[way].hits_at_1(), pictures[way])
        if records:
            hits_of_both = lambda way: (all_rankings[0][way].hits_at_1(), rankings[way].hits_at_1())
            record["change_of_R@1"] = {way: change_of(*hits_of_both(way), pictures[way]) for way in rankings}
        records.append(record)
        all_rankings.append(rankings)

    if not is_main:
        return
    print(table(records, name, split_name))
    write_json(args.json, {"data": args.data, "split": split_name, "results": records})
    if args.report is not None:
        title, rows = compare_rows(records, name, split_name)
        rows = [(group, model, setting, recalls_as_text(figures, halves, " <small>±{:.1f}</small>"))
                for group, model, setting, figures, halves in rows]
        report.write_retrieval(args.report, title, rows, notes(records, name, split_name), records, all_rankings, split, *embeds)
        print(f"wrote {args.report}")


def retrieve_with(source, args, open_split, split_name, device):
    """One checkpoint on a split -> (its record, the split, (image_embed, text_embed), what rank_both_ways gives).
    The model is let go afterwards."""
    state = checkpoint.read(source)
    model = checkpoint.model_of(state, source).to(device)
    split = open_split(model.cfg.context_length)
    if split.endless:
        raise BadInput(f"{split.name} is endless: evaluate on valid or test")
    autocast, precision = precision_of(args.precision, device, evaluating=True)
    weights = checkpoint.fingerprint(model)

    def compute():
        # Rounded as --features keeps them, also without it, so that the figures are the same.
        dtype = torch.float32 if precision == "fp32" else torch.float16
        return [x.to(dtype) for x in embed_split(model, split, device, autocast, args.batch_size, args.workers)]

    if args.features is None:
        embeds = compute()
    else:
        files = [(os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in split.files()]
        made_of = {"weights": weights, "data": split.fingerprint(), "files": hashlib.md5(repr(files).encode()).hexdigest()[:12],
                   "precision": precision, "image_size": model.cfg.image_size, "context_length": model.cfg.context_length,
                   "embed_dim": model.cfg.embed_dim}
        folder = Path(args.features) / file_name(source) / file_name(f"{data_name(args.data)}-{split_name}")
        embeds = load_or_compute(folder, made_of, {"image_ids": list(map(str, split.image_ids)), "texts": split.texts}, compute)
    embeds = [x.to(device).float() for x in embeds]

    rankings = rank_both_ways(*embeds, split.positives)
    record = {"ckpt": str(source), "model": checkpoint.name_of(model.cfg), "setting": setting_of(state, args.data), "weights": weights,
              "precision": precision, "pairs": len(split)}
    return record | {way: ranking.recall() for way, ranking in rankings.items()}, split, embeds, rankings


def file_name(text):
    """A text as a file's name: runs/own/best.pt -> runs-own-best.pt."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-.")


def classify(args, device, is_main):
    """Zero-shot classification by each checkpoint of a folder of classes; the main process prints the table and writes what was
    asked for."""
    root = data.class_root(args.classify, args.split)
    names, pictures, labels = data.open_classes(root)                           # C, I, I
    templates = read_templates(args.templates) if args.templates is not None else TEMPLATES
    read = functools.partial(data.picture_at, pictures)
    records, all_right = [], []
    for source in args.ckpt:
        record, right, embeds = classify_with(source, args, names, pictures, labels, templates, device)
        if records:
            record["change_of_top-1"] = change_of(all_right[0], right, np.arange(len(right)))
        best = predictions(*embeds, names)
        record["predictions"] = [{"picture": str(path), "class": names[c], "best": some} for path, c, some in zip(pictures, labels, best)]
        records.append(record)
        all_right.append(right)

    if not is_main:
        return
    title = f"{root}: zero-shot classification (%)"
    print(class_table(records, title, len(templates)))
    write_json(args.json, {"data": str(root), "templates": list(templates), "results": records})
    if args.report is not None:
        lines = [*class_notes(records, len(templates)), f"prompts: {' '.join(templates)}"]
        image_embed, class_embed, scale = embeds
        report.write_classification(args.report, title, lines, records, names, read, labels,
                                    lambda i: class_probabilities(image_embed[i], class_embed, scale))
        print(f"wrote {args.report}")


def classify_with(source, args, names, pictures, labels, templates, device):
    """One checkpoint -> (its record, whether each picture was right (I,), (image_embed (I, D), class_embed (C, D), scale)).
    The model is let go afterwards."""
    model, _ = checkpoint.load(source, device)
    autocast, precision = precision_of(args.precision, device, evaluating=True)
    class_embed = class_embeddings(model, names, templates, autocast, args.batch_size)
    read = functools.partial(data.picture_at, pictures)
    image_embed = embed_pictures(model, read, len(pictures), device, autocast, args.batch_size, args.workers)
    if not (image_embed.sum().isfinite() and class_embed.sum().isfinite()):
        raise BadInput(f"{source}: its embeddings hold NaN or infinity; --precision fp32 may help")
    figures, right = classification_of(image_embed, class_embed, labels, names)
    record = {"ckpt": str(source), "model": checkpoint.name_of(model.cfg), "weights": checkpoint.fingerprint(model), "precision": precision}
    return record | figures, right, (image_embed, class_embed, model.logit_scale.exp().item())


def write_json(path, content):
    if path is not None:
        system.write_text(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
        print(f"wrote {path}")


def main():
    args = parse_args()
    device, rank, _ = start_processes()
    (retrieve if args.data is not None else classify)(args, device, is_main=rank == 0)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", nargs="+", required=True,
                        help="checkpoints: files, folders, or names of released weights (see checkpoint.py); several give one table")
    parser.add_argument("--data", help=f"{', '.join([*data.NAMES, *data.PAINTED])}, a folder, or a pattern of tar shards (all of it)")
    parser.add_argument("--classify", metavar="DIR",
                        help="instead of --data: zero-shot classification of pictures in one folder for each class")
    parser.add_argument("--templates", metavar="FILE",
                        help="prompts for --classify, one a line, {} for the class's name (default: 20 of our own)")
    parser.add_argument("--data-root", default="data", help="where the named data sets lie (default: data)")
    parser.add_argument("--split", help="(default: test)")
    parser.add_argument("--batch-size", type=int, default=128, help="pictures or captions embedded at a time (default: 128)")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
                        help="of the towers; recall itself is always computed in fp32 "
                             "(default: auto: fp16 on GPUs, on CPUs bf16 where they have it, else fp32)")
    parser.add_argument("--workers", type=int, default=1, help="processes that read pictures, for each process (default: 1)")
    parser.add_argument("--features", metavar="DIR",
                        help="keep the embeddings there, and use them the next time (float32 where the towers ran in fp32, else float16)")
    parser.add_argument("--report", metavar="FILE.html",
                        help="write a page with the table, curves, and pictures: a sample of queries and the worst misses")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    args = parser.parse_args()
    refuse_what_does_not_fit(args)
    return args


def refuse_what_does_not_fit(args):
    """Raises BadInput, before anything is loaded, for flags that contradict each other or cannot be meant."""
    if not 1 <= args.batch_size <= 1e6 or not 0 <= args.workers <= 512:
        raise BadInput(f"--batch-size {args.batch_size} --workers {args.workers}: out of range, 1 to 1e6 and 0 to 512")
    if (args.data is None) == (args.classify is None):
        raise BadInput("--data DATA measures recall, --classify DIR classification: pass one of them")
    if args.classify is not None and args.features is not None:
        raise BadInput("--features goes with --data, not with --classify")
    if args.templates is not None and args.classify is None:
        raise BadInput("--templates goes with --classify")
    system.check_place("--json", args.json)
    system.check_place("--report", args.report)
    if args.report is not None and args.json is not None and Path(args.report).resolve() == Path(args.json).resolve():
        raise BadInput(f"--report {args.report} --json {args.json}: name two files")
    if args.features == "":
        raise BadInput("--features '': name a folder")
    if args.split and args.data is not None and data.is_pattern(args.data):
        raise BadInput(f"--split {args.split}: a pattern of shards has no splits, it is one")


if __name__ == "__main__":
    system.run(main)
