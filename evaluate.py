"""Recall@1, 5, 10 and their mean in both directions (section 4.1.2), in the tables of section 4.2; and zero-shot classification (figure 2).

    python evaluate.py --ckpt cn-clip-vit-b-16 --data coco-cn                   # released weights, zero-shot: table 4 and this row
    python evaluate.py --ckpt cn-clip-vit-b-16 runs/ap/best.pt --data ap-id     # table 6: before and after; may the gain be chance?
    python evaluate.py --ckpt runs/own/best.pt --data /path/to/folder --report report.html          # curves, some queries, the worst misses
    python evaluate.py --ckpt runs/own/best.pt --data /path/to/folder --json figures.json           # the figures, for other programs
    python evaluate.py --ckpt runs/own/best.pt --data /path/to/folder --features features           # embeddings are kept for next time
    torchrun --nproc_per_node 8 evaluate.py --ckpt cn-clip-vit-b-16 --data flickr30k-cn             # the same figures from 8 processes

A query is a hit at K if ANY of its correct candidates is among the K most similar. Text-to-image: every caption asks, all images of the
split are candidates; image-to-text: every image asks, all captions are candidates. Queries without any correct candidate do not count;
how many there were is said.

The way of the figures: embed_split (unit vectors) -> best_ranks (how far down the first right answer stands; all else follows from it) ->
Ranking.recall -> bootstrap_interval (how far chance goes) -> a record, the dict of what was measured of one checkpoint -> table, --json,
--report.

Letters in the shapes: I images, T captions, D width of an embedding; Q queries, A those of them that have an answer, C candidates or
classes; B images in a batch, R pixels along a side, L tokens of a caption.
"""
import argparse
import functools
import hashlib
import os
import re
import runpy
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

from support import report, system                              # before torch: see support/__init__.py

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

import checkpoint
import data
from data import data_name
from support.features import load_or_compute
from support.images import normalize, reader_loader, to_uint8
from support.processes import all_gather_rows, own_batches, precision_of, start_processes
from support.shards import is_pattern
from support.system import BadInput, write_json
from support.tables import KS, bootstrap_interval, change_of, compare_rows, notes, images_asked, recalls_as_text, table
from tokenizer import Tokenizer


# ---------------------------------------------------------------------------------------------------------------- embeddings


class Images(Dataset):
    """Images as a DataLoader reads them: number i -> (i, (3, R, R) uint8), or (i, the reason) for one that cannot be read."""

    def __init__(self, read, size):
        self.read, self.size = read, size

    def __getitem__(self, i):
        try:
            return i, to_uint8(self.read(i), self.size)
        except BadInput as error:
            return i, str(error)


def _collate(samples):
    """-> numbers of the images that could be read, their pixels (B, 3, R, R) or None, {number: reason} of the others."""
    good = [(i, pixels) for i, pixels in samples if isinstance(pixels, torch.Tensor)]
    unreadable = {i: reason for i, reason in samples if isinstance(reason, str)}
    return [i for i, _ in good], torch.stack([pixels for _, pixels in good]) if good else None, unreadable


@torch.no_grad()
def encode_images(model, read, batches, device, autocast, workers=0):
    """For each batch, a sequence of image numbers, yields (numbers, embeddings (B, D) on the CPU, {number: reason} of what
    cannot be read). By this process alone.

    read(i) -> image i, or raises BadInput. The model is in evaluation mode.
    """
    loader = reader_loader(Images(read, model.cfg.image_size), workers, batch_sampler=batches, collate_fn=_collate)
    with system.progress("images embedded", sum(map(len, batches))) as progress:
        for numbers, pixels, unreadable in loader:
            embed = torch.empty(0, model.cfg.embed_dim)
            if numbers:
                pixels = normalize(pixels.to(device).float() / 255)        # (B, 3, R, R)
                with autocast():
                    embed = model.encode_image(pixels).float().cpu()            # (B, D)
            yield numbers, embed, unreadable
            progress.update(len(numbers) + len(unreadable))


@torch.no_grad()
def embed_texts(model, ids, autocast, batch_size=128):
    """Tokens, a NumPy array (T, L) of integers -> (T, D) on the CPU, by all processes together. The model is in evaluation mode."""
    batches = own_batches(len(ids), batch_size)
    rows = []
    with system.progress("texts embedded", sum(map(len, batches))) as progress:
        for batch in batches:
            tokens = torch.from_numpy(ids[batch].astype("int64"))               # (B, L), left on the CPU: there the model packs them
            with autocast():
                rows.append(model.encode_text(tokens).float().cpu())            # (B, D)
            progress.update(len(batch))
    return all_gather_rows(batches, rows, torch.empty(len(ids), model.cfg.embed_dim))


def embed_images(model, read, count, device, autocast, batch_size=128, workers=0):
    """Images 0 … count - 1 -> (count, D) on the CPU, by all processes together.

    Raises BadInput for one that cannot be read: recall is exact or not given.
    """
    batches, rows = own_batches(count, batch_size), []
    for _, embed, unreadable in encode_images(model, read, batches, device, autocast, workers):
        if unreadable:
            raise BadInput(next(iter(unreadable.values())))
        rows.append(embed)
    return all_gather_rows(batches, rows, torch.empty(count, model.cfg.embed_dim))


def embed_split(model, split, device, autocast, batch_size=128, workers=0, image_embed=None):
    """image_embed (I, D) and text_embed (T, D) of a split, on the CPU; `image_embed`: when the images' are known already.

    Under torch.distributed each process embeds its share and all get the whole.
    """
    was_training = model.training
    model.eval()
    if image_embed is None:
        image_embed = embed_images(model, split.image, len(split.image_ids), device, autocast, batch_size, workers)
    text_embed = embed_texts(model, split.ids, autocast, batch_size)
    model.train(was_training)
    return image_embed, text_embed


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
    with system.progress("queries ranked", sum(map(len, batches))) as progress:
        for batch in batches:
            ranks.append(_ranks_of_chunk(queries[batch.start : batch.stop], candidates, [correct[q] for q in batch], place))
            progress.update(len(batch))
    return all_gather_rows(batches, ranks, torch.empty(len(queries), dtype=torch.int64))


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

    image_embed (I, D), text_embed (T, D) unit vectors; positives[t] = indices of the images that caption t describes;
    chunk: of best_ranks. Raises BadInput when an embedding is not finite or nothing can be asked.
    """
    if not (image_embed.sum().isfinite() and text_embed.sum().isfinite()):
        raise BadInput("the embeddings hold NaN or infinity: the weights are damaged, training diverged (then a lower --lr helps), "
                       "or fp16 has overflown (then --precision fp32 helps)")
    if not any(len(images) for images in positives):
        raise BadInput("no caption of the split describes a image of it, so there is no recall to measure")
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


def setting_of(state, name):
    """What a checkpoint has seen of the data set `name` (a value of --data), as far as its file tells:
    "fine-tuned" or "trained" on it, else "zero-shot"."""
    known = data_name(name) in [*data.NAMES, *data.PAINTED]                     # else another folder of that name is another data set
    for seen, stage in reversed(checkpoint.seen_by(state)):
        if data_name(seen) == data_name(name) and (known or Path(seen).resolve() == Path(name).resolve()):
            return "fine-tuned" if stage == "finetune" else "trained"
    return "zero-shot"


# ---------------------------------------------------------------------------------------------------------------- command line


def retrieve(args, device, is_main):
    """Recall of each checkpoint on a split; the main process prints the table and writes what was asked for."""
    if args.features is not None and len(set(map(file_name, args.ckpt))) < len(args.ckpt):
        raise BadInput(f"--features {args.features}: two of the checkpoints would have the same folder there "
                       f"({', '.join(map(file_name, args.ckpt))}); name each once, or rename one")
    split_name = "all" if is_pattern(args.data) else args.split or "test"
    name, records, all_rankings = data_name(args.data), [], []

    @functools.cache                                                            # read once for all checkpoints that cut captions alike
    def open_split(context_length):
        return data.open_split(args.data, split_name, args.data_root, context_length)

    for source in args.ckpt:
        record, split, embeds, rankings = retrieve_with(source, args, open_split, split_name, device)
        images = images_asked(rankings)
        for way in rankings:
            record[way]["R@1_interval"] = bootstrap_interval(rankings[way].hits_at_1(), images[way])
        if records:
            hits_of_both = lambda way: (all_rankings[0][way].hits_at_1(), rankings[way].hits_at_1())
            record["change_of_R@1"] = {way: change_of(*hits_of_both(way), images[way]) for way in rankings}
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


def main():
    args = parse_args()
    device, rank, _ = start_processes()
    retrieve(args, device, is_main=rank == 0)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", nargs="+", required=True,
                        help="checkpoints: files, folders, or names of released weights (see checkpoint.py); several give one table")
    parser.add_argument("--data", required=True,
                        help=f"{', '.join([*data.NAMES, *data.PAINTED])}, a folder, or a pattern of tar shards (all of it)")
    parser.add_argument("--data-root", default="data", help="where the named data sets lie (default: data)")
    parser.add_argument("--split", help="(default: test)")
    parser.add_argument("--batch-size", type=int, default=128, help="images or captions embedded at a time (default: 128)")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
                        help="of the towers; recall itself is always computed in fp32 "
                             "(default: auto: fp16 on GPUs, on CPUs bf16 where they have it, else fp32)")
    parser.add_argument("--workers", type=int, default=1, help="processes that read images, for each process (default: 1)")
    parser.add_argument("--features", metavar="DIR",
                        help="keep the embeddings there, and use them the next time (float32 where the towers ran in fp32, else float16)")
    parser.add_argument("--report", metavar="FILE.html",
                        help="write a page with the table, curves, and images: a sample of queries and the worst misses")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    args = parser.parse_args()
    refuse_what_does_not_fit(args)
    return args


def refuse_what_does_not_fit(args):
    """Raises BadInput, before anything is loaded, for flags that contradict each other or cannot be meant."""
    if not 1 <= args.batch_size <= 1e6 or not 0 <= args.workers <= 512:
        raise BadInput(f"--batch-size {args.batch_size} --workers {args.workers}: out of range, 1 to 1e6 and 0 to 512")
    system.check_place("--json", args.json)
    system.check_place("--report", args.report)
    if args.report is not None and args.json is not None and Path(args.report).resolve() == Path(args.json).resolve():
        raise BadInput(f"--report {args.report} --json {args.json}: name two files")
    if args.features == "":
        raise BadInput("--features '': name a folder")
    if args.split and is_pattern(args.data):
        raise BadInput(f"--split {args.split}: a pattern of shards has no splits, it is one")


if __name__ == "__main__":
    if "--classify" in sys.argv:                                                # the older name of this program
        sys.argv.remove("--classify")
        runpy.run_module("tools.classify", run_name="__main__")
    system.run(main)
