"""Recall@1, 5, 10 and their mean (section 4.1.2), in the tables of section 4.2.

    python evaluate.py --ckpt cn-clip-vit-b-16 --data coco-cn                 # table 4, zero-shot
    python evaluate.py --ckpt cn-clip-vit-b-16 runs/ap/best.pt --data ap-id   # table 6
    python evaluate.py --ckpt runs/own/best.pt --data /path/to/folder --report report.html
    python evaluate.py --ckpt runs/own/best.pt --data /path/to/folder --json figures.json
    torchrun --nproc_per_node 8 evaluate.py --ckpt cn-clip-vit-b-16 --data flickr30k-cn

Recall@K is the share of queries with a correct candidate among the K most similar ones. For
text-to-image the captions are the queries and all images of the split the candidates; for
image-to-text the reverse. A query without a correct candidate does not count.

Letters in the shapes: I images, T captions, D width of an embedding; Q queries, C candidates or
classes; B images in a batch, R pixels along a side, L tokens of a caption.
"""
import argparse
import functools
import hashlib
import importlib
import os
import re
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

from support import report, system                  # before torch: see support/__init__.py

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

import checkpoint
import data
from data import data_name
from support.features import Store
from support.images import normalize, reader_loader, to_uint8
from support.processes import (all_gather_objects, precision_of, rank_and_world,
                               start_processes)
from support.shards import is_pattern
from support.system import BadInput, write_json
from support.tables import KS, add_intervals, table
from tokenizer import Tokenizer


# ---- embeddings


class ImageBatches(Dataset):
    """Batch k -> (numbers of the images that can be read, their pixels (B, 3, R, R) uint8 or None,
    {number: reason} of the others)."""

    def __init__(self, read, batches, size):
        self.read, self.batches, self.size = read, batches, size

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, k):
        numbers, pixels, unreadable = [], [], {}
        for i in self.batches[k]:
            try:
                pixels.append(to_uint8(self.read(i), self.size))
                numbers.append(i)
            except BadInput as error:
                unreadable[i] = str(error)
        return numbers, torch.stack(pixels) if pixels else None, unreadable


@torch.no_grad()
def encode_images(model, read, batches, device, autocast, workers=0):
    """Embeds batches of image numbers, in this process alone. Yields (numbers of the images that
    can be read, embeddings (B, D) on the CPU, {number: reason} of the others) for each batch.

    read(i) returns image i or raises BadInput. The model is in evaluation mode.
    """
    images = ImageBatches(read, batches, model.cfg.image_size)
    with system.progress("images embedded", sum(map(len, batches))) as progress:
        for numbers, pixels, unreadable in reader_loader(images, workers, batch_size=None):
            embed = torch.empty(0, model.cfg.embed_dim)
            if numbers:
                pixels = normalize(pixels.to(device).float() / 255)             # (B, 3, R, R)
                with autocast():
                    embed = model.encode_image(pixels).float().cpu()            # (B, D)
            yield numbers, embed, unreadable
            progress.update(len(numbers) + len(unreadable))


def embed_images(model, read, count, device, autocast, batch_size=128, workers=0):
    """Images 0 … count - 1 -> (count, D) on the CPU; all processes share the work.

    Raises BadInput for an image that cannot be read: recall is exact or not given.
    """
    batches = own_batches(count, batch_size)
    rows = []
    for _, embed, unreadable in encode_images(model, read, batches, device, autocast, workers):
        if unreadable:
            raise BadInput(next(iter(unreadable.values())))
        rows.append(embed)
    return all_gather_rows(batches, rows, torch.empty(count, model.cfg.embed_dim))


@torch.no_grad()
def embed_texts(model, ids, autocast, batch_size=128):
    """Token ids (T, L), a NumPy array -> (T, D) on the CPU; all processes share the work.

    The model is in evaluation mode.
    """
    batches = own_batches(len(ids), batch_size)
    rows = []
    with system.progress("texts embedded", sum(map(len, batches))) as progress:
        for batch in batches:
            tokens = torch.from_numpy(ids[batch].astype("int64"))               # (B, L)
            with autocast():
                rows.append(model.encode_text(tokens).float().cpu())            # (B, D)
            progress.update(len(batch))
    return all_gather_rows(batches, rows, torch.empty(len(ids), model.cfg.embed_dim))


def embed_split(model, split, device, autocast, batch_size=128, workers=0, image_embed=None):
    """image_embed (I, D) and text_embed (T, D) of a split, on the CPU; all processes get both.

    image_embed: the embeddings of the images, if they are known already.
    """
    was_training = model.training
    model.eval()
    if image_embed is None:
        image_embed = embed_images(model, split.image, split.image_count(), device, autocast,
                                   batch_size, workers)
    text_embed = embed_texts(model, split.ids, autocast, batch_size)
    model.train(was_training)
    return image_embed, text_embed


def own_batches(count, batch_size):
    """This process's batches of 0 … count - 1, as ranges.

    The batches do not depend on the number of processes, so neither does the rounding of results.
    """
    rank, world_size = rank_and_world()
    starts = range(0, count, batch_size)[rank::world_size]
    return [range(start, min(start + batch_size, count)) for start in starts]


def all_gather_rows(batches, rows, whole):
    """Fill `whole` with the rows that all processes have computed -> whole, the same on each.

    batches: ranges of own_batches. rows: for each batch its rows of `whole`.
    """
    for some_batches, some_rows in all_gather_objects((batches, rows)):
        for batch, x in zip(some_batches, some_rows):
            whole[batch.start : batch.stop] = x
    return whole


# ---- recall


def best_ranks(queries, candidates, correct, chunk=None):
    """The rank of each query's best correct candidate, from 0; -1 without one -> (Q,) int64.

    queries (Q, D), candidates (C, D): unit vectors; correct: a list of candidates for each query.
    Equal similarities rank in the order of the candidates.

    `chunk` queries are ranked at a time (default: 16 million similarities), so memory does not
    grow with Q. All processes share the chunks.
    """
    chunks = own_batches(len(queries), chunk or max(1, 2**24 // len(candidates)))
    ranks = []
    with system.progress("queries ranked", sum(map(len, chunks))) as progress:
        for rows in chunks:
            some = slice(rows.start, rows.stop)
            ranks.append(ranks_of_chunk(queries[some], candidates, correct[some]))
            progress.update(len(rows))
    return all_gather_rows(chunks, ranks, torch.empty(len(queries), dtype=torch.int64))


def ranks_of_chunk(queries, candidates, correct):
    """best_ranks of queries (q, D), all at once -> (q,) on the CPU."""
    similarity = queries @ candidates.T                                         # (q, C)
    place = torch.arange(len(candidates), device=candidates.device)             # (C,)

    # Lists of one length n: the first correct candidate is repeated, which changes nothing.
    n = max(1, *map(len, correct))
    padded = [[*right, *right[:1] * (n - len(right))] if right else [0] * n for right in correct]
    padded = torch.tensor(padded, device=candidates.device)                     # (q, n)
    scores = similarity.gather(1, padded)                                       # (q, n)
    best = scores.amax(dim=1, keepdim=True)                                     # (q, 1)
    first = padded.where(scores == best, len(place)).amin(dim=1, keepdim=True)  # (q, 1)

    # A candidate ranks before it when it is more similar, or equally similar and earlier.
    # Sums of floats are faster than those of booleans.
    marks = torch.empty_like(similarity)                                        # (q, C)
    ranks = torch.gt(similarity, best, out=marks).sum(dim=1).long()             # (q,)
    equal = torch.eq(similarity, best, out=marks).sum(dim=1)                    # (q,), 1 or more
    tied = (equal > 1).nonzero()[:, 0]
    ranks[tied] += ((similarity[tied] == best[tied]) & (place < first[tied])).sum(dim=1)
    return ranks.cpu().masked_fill(torch.tensor([not right for right in correct]), -1)


class Ranking(NamedTuple):
    """The result of one direction, from which all figures follow."""

    ranks: torch.Tensor                                         # (Q,) of best_ranks
    correct: list                                               # Q lists of candidates
    candidates: int                                             # C

    def counted_ranks(self):
        """Without the queries that have no correct candidate."""
        return self.ranks[self.ranks >= 0]

    def hits_at_1(self):
        """1.0 for each counted query whose first candidate is correct, else 0.0 (NumPy)."""
        return (self.counted_ranks() == 0).double().numpy()

    def recall(self):
        """-> {"R@1", "R@5", "R@10", their mean "MR"; "chance_R@1" and "chance_MR" of a random
        order, all in percent; "queries" that count; "without_answer": those that do not}."""
        ranks = self.counted_ranks()
        result = {f"R@{k}": 100 * (ranks < k).double().mean().item() for k in KS}
        result["MR"] = sum(result.values()) / len(KS)
        chance = chance_recall(self.correct, self.candidates)
        result |= {"chance_R@1": chance[1], "chance_MR": sum(chance.values()) / len(KS)}
        return result | {"queries": len(ranks), "without_answer": len(self.ranks) - len(ranks)}


def chance_recall(correct, candidates):
    """Recall of a random order of the candidates -> {K: percent}.

    correct: a list of correct candidates for each query; candidates: their number C.
    All of K different guesses are wrong with probability Π_{k<K} (wrong - k) / (C - k).
    """
    wrong = np.array([candidates - len(right) for right in correct if right])               # (A,)
    factors = [(wrong - k).clip(0) / max(1, candidates - k) for k in range(max(KS))]
    all_wrong = np.cumprod(factors, axis=0).mean(axis=1).tolist()       # [K - 1], mean of queries
    return {k: 100 * (1 - all_wrong[k - 1]) for k in KS}


def rank_both_ways(image_embed, text_embed, positives, chunk=None):
    """-> {"text_to_image": Ranking, "image_to_text": Ranking}.

    image_embed (I, D), text_embed (T, D): unit vectors; positives: the images of each caption.
    Raises BadInput when an embedding is not finite or no caption has an image.
    """
    if not (image_embed.sum().isfinite() and text_embed.sum().isfinite()):
        raise BadInput("the embeddings hold NaN or infinity: the weights are damaged, training "
                       "diverged (try a lower --lr), or fp16 overflowed (try --precision fp32)")
    if not any(len(images) for images in positives):
        raise BadInput("no caption of the split describes an image of it: there is no recall")
    captions_of_image = [[] for _ in range(len(image_embed))]
    for t, images in enumerate(positives):
        for i in images:
            captions_of_image[i].append(t)
    to_image = best_ranks(text_embed, image_embed, positives, chunk)            # (T,)
    to_text = best_ranks(image_embed, text_embed, captions_of_image, chunk)     # (I,)
    return {"text_to_image": Ranking(to_image, positives, len(image_embed)),
            "image_to_text": Ranking(to_text, captions_of_image, len(text_embed))}


def retrieval_recall(image_embed, text_embed, positives, chunk=None):
    """-> {"text_to_image": see Ranking.recall, "image_to_text": the same}; see rank_both_ways."""
    rankings = rank_both_ways(image_embed, text_embed, positives, chunk)
    return {way: ranking.recall() for way, ranking in rankings.items()}


# ---- zero-shot classification (figure 2); its program is tools/classify.py


def class_embeddings(model, names, templates, autocast, batch_size=128):
    """Figure 2, step 2: a classifier from the names of C classes -> (C, D) unit vectors.

    A class's embedding is the mean over its prompts, templates with the name for "{}".
    """
    prompts = [template.replace("{}", name) for name in names for template in templates]
    ids = Tokenizer("the prompts")(prompts, model.cfg.context_length).numpy()   # (C P, L)
    first_with = {}
    for c, tokens in enumerate(ids.reshape(len(names), -1)):
        other = first_with.setdefault(tokens.tobytes(), c)
        if other != c:
            warnings.warn(f"the prompts of {names[c]} are those of {names[other]}, token by token: "
                          "the model cannot tell them apart")
    embed = embed_texts(model, ids, autocast, batch_size)                       # (C P, D)
    embed = embed.view(len(names), len(templates), -1).mean(dim=1)              # (C, D)
    return F.normalize(embed, dim=1)


def class_probabilities(image_embed, class_embed, scale):
    """Figure 2, step 3: the softmax of the cosine similarities times `scale` = exp(logit_scale).

    image_embed (I, D) or (D,), class_embed (C, D) -> (I, C) or (C,); rows sum to 1.
    """
    return (scale * image_embed @ class_embed.T).softmax(dim=-1)


# ---- the program


def main():
    """Measure each checkpoint on the split, print the table, write --json and --report."""
    args = parse_args()
    device, rank, _ = start_processes()
    name, split_name = data_name(args.data), split_of(args)

    @functools.cache
    def open_split(context_length):                             # once for each context length
        return data.open_split(args.data, split_name, args.data_root, context_length,
                               args.allow_outside)

    records, rankings = [], []                                  # of each checkpoint
    for source in args.ckpt:
        record, split, embeds = embed_with(source, args, open_split, device)
        rankings.append(rank_both_ways(*embeds, split.positives))
        for way, ranking in rankings[-1].items():
            record[way] = ranking.recall()
        add_intervals(record, rankings[-1], rankings[0])
        records.append(record)
    if rank:
        return
    print(table(records, name, split_name))
    if args.json is not None:
        write_json(args.json, {"data": args.data, "split": split_name, "results": records})
        print(f"wrote {args.json}")
    if args.report is not None:
        report.write_retrieval(args.report, name, split_name, records, rankings, split, *embeds)
        print(f"wrote {args.report}")


def embed_with(source, args, open_split, device):
    """One checkpoint -> (its record without recalls, the split, [image_embed, text_embed]).

    The model is freed; the embeddings (I, D), (T, D) stay on the device.
    """
    state = checkpoint.read(source)
    model = checkpoint.model_of(state).to(device)
    split = open_split(model.cfg.context_length)
    autocast, precision = precision_of(args.precision, device, evaluating=True)
    weights = checkpoint.fingerprint(model)
    record = {"ckpt": str(source), "model": checkpoint.name_of(model.cfg),
              "setting": setting_of(state, args.data), "weights": weights,
              "precision": precision, "pairs": len(split)}

    def compute():
        # Round as --features does, so that the figures do not depend on it.
        dtype = torch.float32 if precision == "fp32" else torch.float16
        embeds = embed_split(model, split, device, autocast, args.batch_size, args.workers)
        return [x.to(dtype) for x in embeds]

    if args.features is None:
        embeds = compute()
    else:
        files = [(os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in split.files()]
        made_of = {"weights": weights, "data": split.fingerprint(),
                   "files": hashlib.md5(repr(files).encode()).hexdigest()[:12],
                   "precision": precision, "image_size": model.cfg.image_size,
                   "context_length": model.cfg.context_length, "embed_dim": model.cfg.embed_dim}
        place = file_name(f"{data_name(args.data)}-{split_of(args)}")
        labels = {"image_ids": list(map(str, split.image_ids)), "texts": split.texts}
        store = Store(Path(args.features) / file_name(source) / place, made_of)
        embeds = store.load_or_compute(labels, compute)
    return record, split, [x.to(device).float() for x in embeds]


def setting_of(state, name):
    """"fine-tuned" or "trained" on the data set `name`, as the checkpoint says; "zero-shot"."""
    known = data_name(name) in data.NAMES                       # other folders may share a name
    for seen, stage in reversed(checkpoint.trained_on(state)):
        same_place = known or Path(seen).resolve() == Path(name).resolve()
        if data_name(seen) == data_name(name) and same_place:
            return "fine-tuned" if stage == "finetune" else "trained"
    return "zero-shot"


def split_of(args):
    return "all" if is_pattern(args.data) else args.split or "test"


def file_name(text):
    """A text as the name of a file: runs/own/best.pt -> runs-own-best.pt."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-.")


def parse_args():
    """The flags, checked."""
    parser = shared_flags(argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter))
    parser.add_argument("--data", required=True,
                        help=f"{', '.join(data.NAMES)}, a folder, or a pattern of tar shards")
    parser.add_argument("--data-root", default="data",
                        help="the folder of the named data sets (default: data)")
    parser.add_argument("--features", metavar="DIR",
                        help="keep the embeddings there and use them the next time")
    args = parser.parse_args()
    check_shared(args)
    if args.split and is_pattern(args.data):
        raise BadInput(f"--split {args.split}: a pattern of shards has no splits, it is one")
    folders = list(map(file_name, args.ckpt))
    if args.features is not None and len(set(folders)) < len(folders):
        raise BadInput(f"--features {args.features}: two of the checkpoints would have the same "
                       f"folder there ({', '.join(folders)}); name each once, or rename one")
    return args


def shared_flags(parser):
    """Adds the flags that tools/classify.py has, too."""
    parser.add_argument("--ckpt", nargs="+", required=True,
                        help="checkpoints: files, folders, or names of released weights")
    parser.add_argument("--split", help="(default: test)")
    parser.add_argument("--batch-size", type=int, default=128,
                        help="images or texts embedded at a time (default: 128)")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
                        help="of the towers (default: auto: fp16 on GPUs, bf16 on CPUs that "
                             "have it, else fp32); similarities are always computed in fp32")
    parser.add_argument("--workers", type=int, default=1,
                        help="processes that read images, for each process (default: 1)")
    parser.add_argument("--report", metavar="FILE.html",
                        help="write a page with the table, examples and the worst misses")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--allow-outside", action="store_true",
                        help="read images outside the data's folder, too: paths, links")
    return parser


def check_shared(args):
    """Raises BadInput for values of these flags that cannot work."""
    if not 1 <= args.batch_size <= 1e6 or not 0 <= args.workers <= 512:
        raise BadInput(f"--batch-size {args.batch_size} --workers {args.workers}: "
                       "out of range, 1 to 1e6 and 0 to 512")
    system.check_place("--json", args.json)
    system.check_place("--report", args.report)
    if args.report and args.json and Path(args.report).resolve() == Path(args.json).resolve():
        raise BadInput(f"--report {args.report} --json {args.json}: name two files")


if __name__ == "__main__":
    if "--classify" in sys.argv:            # --classify DIR …: the older name of tools/classify.py
        at = sys.argv.index("--classify")
        sys.argv[1:] = sys.argv[at + 1 : at + 2] + sys.argv[1:at] + sys.argv[at + 2 :]
        system.run(importlib.import_module("tools.classify").main)
    system.run(main)
