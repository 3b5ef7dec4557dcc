"""Recall@1, 5, 10 and their mean in both directions (section 4.1.2), in the tables of section 4.2; and zero-shot classification (figure 2, steps 2 and 3).

    python evaluate.py --ckpt cn-clip-vit-b-16 --data coco-cn                                       # released weights, zero-shot: the paper's table 4 and this row
    python evaluate.py --ckpt cn-clip-vit-b-16 runs/ap/best.pt --data ap-id                         # table 6: before and after fine-tuning, and whether the gain may be chance
    python evaluate.py --ckpt runs/own/best.pt --data /path/to/folder --report report.html          # a page with curves, a sample of queries and the worst misses
    python evaluate.py --ckpt runs/own/best.pt --data /path/to/folder --json figures.json --features features       # embeddings are kept, and not computed again
    python evaluate.py --ckpt cn-clip-vit-b-16 --classify /path/to/classes                          # 猫/1.jpg, 狗/1.jpg, … or the ELEVATER-cn layout
    torchrun --nproc_per_node 8 evaluate.py --ckpt cn-clip-vit-b-16 --data flickr30k-cn             # the same figures

A query is a hit at K if ANY of its correct items is among the K most similar. Text-to-image: every caption asks, all pictures of the split are candidates;
image-to-text: every picture asks, all captions are candidates. Queries without any correct item do not count; how many there were is said.
"""
import argparse
import collections
import functools
import json
import os
import re
import signal
import time
import unicodedata
import uuid
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

import checkpoint
import data
import report
from tokenizer import Tokenizer

KS = (1, 5, 10)

# The paper's published rows (percent): (scale, model, setting, text-to-image R@1 R@5 R@10, image-to-text R@1 R@5 R@10). Tables 4 and 5 are after fine-tuning (section 4.1.4), table 6 before and after it.
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
}
SCALE = {"tiny": "tiny", "rn50": "base-size", "vit-b-32": "base-size", "vit-b-16": "base-size", "vit-l-14": "large-size", "vit-l-14-336": "large-size", "vit-h-14": "large-size"}


# ---------------------------------------------------------------------------------------------------------------- devices and precision


def start_processes():
    """-> (device, rank, world). Under torchrun joins the process group: NCCL for tensors on GPUs (one per process), gloo for those on the CPU."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    rank, local_rank, local_world = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    gpus = torch.cuda.device_count()
    device = torch.device("cuda", local_rank) if local_world <= gpus else torch.device("cpu")
    if gpus and device.type == "cpu" and rank == 0:
        print(f"{local_world} processes but {gpus} GPU: running on the CPU. Use --nproc_per_node {gpus} to run on the GPU.")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if rank:
        warnings.simplefilter("ignore")                                         # the first process warns for all
    if world > 1:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            data.end_with(os.getppid(), signal.SIGTERM)                         # should torchrun itself be killed, its processes save and stop
        store, rank, world = next(dist.rendezvous("env://", rank, world))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = fresh_store(store, rank, world)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world)
    return device, rank, world


def fresh_store(store, rank, world, minutes=30):
    """A part of torchrun's store that only living processes share. The store outlives them: after a restart it still holds the addresses of those that died, and the counts of restarts differ
    from node to node (pytorch issue 135712). So process 0 draws a name, and answers everybody's question under that question, which no dead process ever asked.
    """
    name = uuid.uuid4().hex
    if rank:
        store.set(f"question {rank}", name)
        name = store.get(f"answer {name}").decode()                             # waits for it
        store.add(f"{name} heard", 1)
    deadline = time.time() + 60 * minutes
    while rank == 0 and store.add(f"{name} heard", 0) < world - 1:
        for other in range(1, world):
            if store.check([f"question {other}"]):
                store.set(f"answer {store.get(f'question {other}').decode()}", name)
        if time.time() > deadline:
            raise data.BadInput(f"not all of the {world} processes of this run came within {minutes} minutes")
        time.sleep(0.05)
    return dist.PrefixStore(name, store)


def from_all(thing):
    """What each process passes here, in rank order: a list of any objects."""
    things = [thing]
    if dist.is_initialized():
        things *= dist.get_world_size()
        dist.all_gather_object(things, thing)
    return things


def bf16_is_fast(device):
    """Whether this hardware multiplies bfloat16 matrices natively: NVIDIA from Ampere on; CPUs with AMX or AVX-512 BF16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    probes = [getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")]             # private: may go in another torch
    return any(probe() for probe in probes if probe)


def precision_of(name, device, evaluating=False):
    """"auto", "fp32", "bf16" or "fp16" -> (a context for the towers' forward pass, the name that auto came to): the fastest that is safe.

    For training bf16, whose range is that of fp32. For evaluation on a GPU fp16: as fast, and eight times nearer to fp32; should it overflow, the embeddings are not finite and refused.
    """
    if name == "auto":
        name = "fp16" if evaluating and device.type == "cuda" else "bf16" if bf16_is_fast(device) else "fp16" if device.type == "cuda" else "fp32"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    return functools.partial(torch.autocast, device.type, dtype=dtype, enabled=name != "fp32"), name


# ---------------------------------------------------------------------------------------------------------------- embeddings


class Pictures(Dataset):
    """Pictures as a DataLoader reads them: number i -> (i, (3, R, R) uint8), or (i, the reason) for one that cannot be read."""

    def __init__(self, read, size):
        self.read, self.size = read, size

    def __getitem__(self, i):
        try:
            return i, data.to_uint8(self.read(i), self.size)
        except data.BadInput as error:
            return i, str(error)


def _together(samples):
    """-> numbers of the pictures that could be read, their pixels (B, 3, R, R), {number: reason} of the others."""
    good = [(i, pixels) for i, pixels in samples if isinstance(pixels, torch.Tensor)]
    return [i for i, _ in good], torch.stack([pixels for _, pixels in good]) if good else None, {i: reason for i, reason in samples if isinstance(reason, str)}


@torch.no_grad()
def encode_pictures(model, read, batches, device, autocast, workers=0):
    """For each batch, a sequence of picture numbers: (numbers, embeddings (B, D) on the CPU, {number: reason} of what cannot be read). read(i) -> picture i, or raises BadInput."""
    loader = DataLoader(Pictures(read, model.cfg.image_size), batch_sampler=batches, collate_fn=_together, num_workers=workers, worker_init_fn=data.reader_start())
    with data.Progress("pictures embedded", sum(map(len, batches))) as progress:
        for numbers, pixels, unreadable in loader:
            embed = torch.empty(0, model.cfg.embed_dim)
            if numbers:
                with autocast():
                    embed = model.encode_image(data.normalize(pixels.to(device).float() / 255)).float().cpu()
            yield numbers, embed, unreadable
            progress.add(len(numbers) + len(unreadable))


@torch.no_grad()
def encode_texts(model, ids, device, autocast, batch_size=128):
    """Tokens (T, L) -> (T, D) on the CPU, by all processes together."""
    batches = own_batches(len(ids), batch_size)
    rows = []
    with data.Progress("texts embedded", sum(map(len, batches))) as progress:
        for batch in batches:
            with autocast():
                rows.append(model.encode_text(torch.from_numpy(ids[batch].astype("int64")).to(device)).float().cpu())
            progress.add(len(batch))
    return from_shares(batches, rows, torch.empty(len(ids), model.cfg.embed_dim))


def own_batches(count, batch_size):
    """This process's batches of 0 … count - 1, as ranges. They are the same batches on any number of processes, so that rounding is, too."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)][rank::world]


def from_shares(batches, rows, whole):
    """Fill `whole` with the rows that each process has computed for its own batches."""
    for some_batches, some_rows in from_all((batches, rows)):
        for batch, x in zip(some_batches, some_rows):
            whole[batch.start : batch.stop] = x
    return whole


def embed_pictures(model, read, count, device, autocast, batch_size=128, workers=0):
    """Pictures 0 … count - 1 -> (count, D) on the CPU, by all processes together. Raises BadInput for one that cannot be read: recall is exact or not given."""
    batches, rows = own_batches(count, batch_size), []
    for _, embed, unreadable in encode_pictures(model, read, batches, device, autocast, workers):
        if unreadable:
            raise data.BadInput(next(iter(unreadable.values())))
        rows.append(embed)
    return from_shares(batches, rows, torch.empty(count, model.cfg.embed_dim))


def embed_split(model, split, device, autocast, batch_size=128, workers=0):
    """image_embed (I, D) and text_embed (T, D) of a split, on the CPU. Under torch.distributed each process embeds its share and all get the whole."""
    was_training = model.training
    model.eval()
    image_embed = embed_pictures(model, split.picture, len(split.image_ids), device, autocast, batch_size, workers)
    text_embed = encode_texts(model, split.ids, device, autocast, batch_size)
    model.train(was_training)
    return image_embed, text_embed


def kept(folder, made_of, ids, compute):
    """compute() -> (image_embed, text_embed), or what an earlier call has left in `folder`: image_embed.npy, text_embed.npy and features.json, which says what they were made of, and
    whose rows they are. Raises BadInput when they were made of something else.
    """
    folder, names = Path(folder), ("image_embed.npy", "text_embed.npy")
    about = folder / "features.json"
    if not any(from_all(about.exists())):
        image_embed, text_embed = compute()
        if not dist.is_initialized() or dist.get_rank() == 0:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise data.BadInput(f"--features {folder}: {error.strerror}; name another folder") from None
            for name, x in zip(names, (image_embed, text_embed)):
                data.write(folder / name, lambda f: np.save(f, x.numpy()))
            data.write_text(about, json.dumps({"made_of": made_of, **ids}, ensure_ascii=False, indent=1) + "\n")          # last: with it the folder is whole
        from_all(None)                                                          # all wait for it
    try:
        found = json.loads(about.read_text(encoding="utf-8"))
        was = found["made_of"]
        changed = [f"{key} {was.get(key)}, now it is {made_of[key]}" for key in made_of if was.get(key) != made_of[key]]
        features = [np.load(folder / name) for name in names]
        whole = all(x.dtype in (np.float16, np.float32) and x.ndim == 2 and len(x) == len(rows) for x, rows in zip(features, ids.values())) and features[0].shape[1] == features[1].shape[1]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise data.BadInput(f"--features {folder}: cannot be read ({error}); delete it or name another folder") from None
    if changed:
        raise data.BadInput(f"--features {folder}: made of {'; '.join(changed)}. Delete it or name another folder")
    if not whole:
        raise data.BadInput(f"--features {folder}: the .npy files are not those that features.json describes; delete it or name another folder")
    return [torch.from_numpy(x) for x in features]


# ---------------------------------------------------------------------------------------------------------------- recall


def best_ranks(queries, candidates, correct, chunk=None):
    """For every query the rank (0 = first) of its best-placed correct candidate; -1 for queries without one.

    queries (Q, D), candidates (C, D) unit vectors, correct: Q lists of candidate indices -> (Q,) int64. Equal similarities are ranked in the order of the
    candidates. `chunk` queries are compared at a time (default: as many as make 16 million similarities), so memory does not grow with Q. Under torch.distributed each process takes its share of the chunks, all get the whole.
    """
    chunk = chunk or max(1, 2**24 // len(candidates))
    place = torch.arange(len(candidates), device=candidates.device)
    batches, ranks = own_batches(len(queries), chunk), []
    with data.Progress("queries ranked", sum(map(len, batches))) as progress:
        for batch in batches:
            ranks.append(_ranks_of_chunk(queries[batch.start : batch.stop] @ candidates.T, [correct[i] for i in batch], place))
            progress.add(len(batch))
    return from_shares(batches, ranks, torch.empty(len(queries), dtype=torch.int64))


def _ranks_of_chunk(similarity, correct, place):
    """similarity (q, C), correct: q lists, place (C,) = 0 … C - 1 -> (q,)."""
    most = max(1, *map(len, correct))
    known = torch.tensor([[*right, *[right[0] if right else 0] * (most - len(right))] for right in correct], device=place.device)        # (q, most), repeats as filling
    scores = similarity.gather(1, known)
    best = scores.max(dim=1, keepdim=True).values                                                   # (q, 1)
    first = known.masked_fill(scores < best, len(place)).min(dim=1, keepdim=True).values            # the first of the best-scored correct ones
    marks = torch.empty_like(similarity)                                        # 1.0 or 0.0: sums of these take a sixth of the time and memory of sums of booleans
    ranks = torch.gt(similarity, best, out=marks).sum(dim=1).long()
    tied = (torch.ge(similarity, best, out=marks).sum(dim=1) > ranks + 1).nonzero()[:, 0]           # another one scores the same
    ranks[tied] += ((similarity[tied] == best[tied]) & (place < first[tied])).sum(dim=1)
    return ranks.masked_fill(torch.tensor([not right for right in correct], device=place.device), -1).cpu()


def recall_of(ranks, correct, candidates):
    """Ranks of best_ranks -> {"R@1", "R@5", "R@10", "MR"} in percent, the R@1 of guessing, the number of queries, and how many had no correct item."""
    asked = ranks[ranks >= 0]
    result = {f"R@{k}": 100 * (asked < k).double().mean().item() for k in KS}
    result["MR"] = sum(result.values()) / len(KS)
    chance = 100 * sum(map(len, correct)) / candidates / len(asked)
    return result | {"chance_R@1": chance, "queries": len(asked), "without_answer": len(ranks) - len(asked)}


def both_ways(image_embed, text_embed, positives, chunk=None):
    """The ranks from which all else follows -> {"text_to_image": (ranks (T,), positives, I), "image_to_text": (ranks (I,), the captions of each picture, T)}; arguments as below."""
    if not (image_embed.sum().isfinite() and text_embed.sum().isfinite()):
        raise data.BadInput("the embeddings hold NaN or infinity: the weights are damaged, training diverged (then a lower --lr helps), or fp16 has overflown (then --precision fp32 helps)")
    if not any(len(images) for images in positives):
        raise data.BadInput("no caption of the split describes a picture of it, so there is no recall to measure")
    captions_of = [[] for _ in range(len(image_embed))]
    for t, images in enumerate(positives):
        for i in images:
            captions_of[i].append(t)
    return {"text_to_image": (best_ranks(text_embed, image_embed, positives, chunk), positives, len(image_embed)),
            "image_to_text": (best_ranks(image_embed, text_embed, captions_of, chunk), captions_of, len(text_embed))}


def retrieval_recall(image_embed, text_embed, positives, chunk=None):
    """Recall in both directions.

    image_embed (I, D), text_embed (T, D) unit vectors; positives[t] = indices of the pictures that caption t describes.
    -> {"text_to_image": {"R@1", "R@5", "R@10", "MR", "chance_R@1", "queries", "without_answer"}, "image_to_text": the same}, recalls in percent.
    Raises BadInput when an embedding is not finite or nothing can be asked.
    """
    return {way: recall_of(*found) for way, found in both_ways(image_embed, text_embed, positives, chunk).items()}


def resampled(values, groups, draws=1000, seed=0):
    """The mean of `values` (Q,) in percent, as it comes out on other sets of the same kind: (draws,) means over groups drawn with replacement (bootstrap).

    Captions of one picture rise and fall together, so pictures are drawn, not captions: groups (Q,) numbers the picture of each value. The same seed and groups give the same draws,
    so differences between two models are paired.
    """
    _, groups = np.unique(groups, return_inverse=True)
    sums, counts = np.bincount(groups, weights=values), np.bincount(groups)
    rng, means = np.random.default_rng(seed), []
    for _ in range(draws):
        drawn = rng.integers(0, len(sums), len(sums))
        means.append(100 * sums[drawn].sum() / counts[drawn].sum())
    return np.array(means)


def interval(values, groups):
    """-> [low, high] in percent, between which 95 % of the resampled means lie."""
    return np.quantile(resampled(values, groups), (0.025, 0.975)).tolist()


def hits_at_1(way, ranks, correct):
    """-> whether each query that counts was a hit at 1, as 0 or 1, and its picture: for a caption the first that it describes. Both (Q,)."""
    asked = [q for q, rank in enumerate(ranks.tolist()) if rank >= 0]
    return (ranks[asked] == 0).double().numpy(), np.array([correct[q][0] for q in asked] if way == "text_to_image" else asked)


# ---------------------------------------------------------------------------------------------------------------- zero-shot classification

# A class's embedding is the mean over these sentences. They differ in what they say of the picture, not of the class.
TEMPLATES = ("{}", "{}。", "这是{}。", "一张{}的照片。", "一张{}的图片。", "一张清晰的{}照片。", "一张模糊的{}照片。", "一张{}的特写。", "一张{}的黑白照片。", "远处的{}。", "画面里有{}。", "照片中的{}。",
             "许多{}。", "一个{}。", "小小的{}。", "巨大的{}。", "{}的插图。", "{}的素描。", "一幅{}的画。", "卡通风格的{}。")


def read_templates(path):
    """A text file with one template in each line, {} where the class's name goes -> the templates."""
    templates = []
    for number, line in data.utf8_lines(path):
        if line.strip():
            if line.count("{}") != 1:
                raise data.BadInput(f"{path}, line {number}: expected one {{}} where the class's name goes, found {line.strip()[:60]}")
            templates.append(line.strip())
    if not templates:
        raise data.BadInput(f"{path}: no templates; expected lines like 一张{{}}的照片")
    return templates


def class_embeddings(model, names, templates, device, autocast, batch_size=128):
    """The zero-shot classifier (figure 2, step 2): C names -> (C, D), for each the mean of the unit embeddings of its prompts, of length 1 again."""
    prompts = [template.replace("{}", name) for name in names for template in templates]
    ids = Tokenizer("the prompts")(prompts, model.cfg.context_length).numpy()
    embed = encode_texts(model, ids, device, autocast, batch_size).view(len(names), len(templates), -1)
    return F.normalize(embed.mean(dim=1), dim=1)


def class_probabilities(image_embed, class_embed, scale):
    """Figure 2, step 3: cosine similarities times the scale exp(logit_scale), through softmax: (P, D), (C, D) -> (P, C), rows that sum to 1."""
    return (scale * image_embed @ class_embed.T).softmax(dim=1)


def classification_of(image_embed, class_embed, labels, names):
    """A picture belongs to the class whose embedding is most like its own; of equal ones to the first.

    image_embed (P, D), class_embed (C, D) unit vectors, labels: P class indices, names: C texts -> {"top-1", "top-5", "mean_per_class", "top-1_interval", "chance_top-1"} in percent,
    {"pictures", "classes"}, "per_class" of the classes that have pictures, and "confused", the 20 pairs that are most often.
    """
    ranks = best_ranks(image_embed, class_embed, [[label] for label in labels])
    right, labels = (ranks == 0).double().numpy(), np.array(labels)
    counts = np.bincount(labels, minlength=len(names))
    accuracy = 100 * np.bincount(labels, weights=right, minlength=len(names)) / np.maximum(counts, 1)
    guesses = torch.cat([(some @ class_embed.T).argmax(dim=1) for some in image_embed.split(1024)]).tolist()
    taken_for = collections.Counter((label, guess) for label, guess in zip(labels.tolist(), guesses) if label != guess)
    return {"top-1": 100 * right.mean(), "top-5": 100 * (ranks < 5).double().mean().item(), "mean_per_class": accuracy[counts > 0].mean(),
            "top-1_interval": interval(right, np.arange(len(right))), "chance_top-1": 100 / len(names), "pictures": len(labels), "classes": len(names),
            "per_class": [{"class": names[c], "pictures": int(counts[c]), "top-1": accuracy[c]} for c in np.flatnonzero(counts)],
            "confused": [{"class": names[a], "taken_for": names[b], "times": times, "of": int(counts[a])} for (a, b), times in taken_for.most_common(20)]}


# ---------------------------------------------------------------------------------------------------------------- the tables


def data_name(name):
    """A value of --data -> what the set is called: the known name, also for its folder (data/COCO-CN is coco-cn), else the folder's name, or the pattern."""
    folder = Path(name).name if data.is_pattern(name) else Path(name).resolve().name
    return next((known for known, its_folder in data.NAMES.items() if name == known or folder.lower() == its_folder.lower()), folder)


def setting_of(state, name):
    """What a checkpoint has seen of the data set `name`, as far as its file tells: "fine-tuned" or "trained" on it, else "zero-shot"."""
    settings = state.get("settings")
    if not isinstance(settings, dict) or not state.get("step") or data_name(str(settings.get("data"))) != name:
        return "zero-shot"
    return "fine-tuned" if settings.get("stage") == "finetune" else "trained"


def compare_rows(records, name, split):
    """The rows of the paper's table for this data set and split, and those measured here -> (title, [(scale, model, setting, six recalls, half widths of the R@1 or None), …])."""
    title, published = PUBLISHED.get(name, (name, [])) if split == "test" else (name, [])
    rows = [(scale, model, setting, figures, None) for scale, model, setting, *figures in published]
    for record in records:
        ways = record["text_to_image"], record["image_to_text"]
        half = [(way["R@1_interval"][1] - way["R@1_interval"][0]) / 2 for way in ways]
        rows.append((SCALE.get(record["model"], "custom"), f"> {record['model']} ({record['ckpt']})", record["setting"], [way[f"R@{k}"] for way in ways for k in KS], half))
    rows.sort(key=lambda row: ["base-size", "large-size", "tiny", "custom"].index(row[0]))          # stable: a measured row ends its own size group
    return f"{title}, {split} split (%)", rows


def width(text):
    """Columns that a text takes in a terminal: Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def columns(rows):
    """Lines of a table: the cells of each column start below each other."""
    widths = [max(map(width, column)) for column in zip(*rows)]
    return ["  ".join(cell + " " * (size - width(cell)) for cell, size in zip(row, widths)).rstrip() for row in rows]


def table(records, name, split):
    """The paper's table for this data set as text, published rows and the measured ones (marked >)."""
    title, rows = compare_rows(records, name, split)
    lines = [["scale", "model", "setting", *["  R@1", "  R@5", " R@10", "   MR", ""] * 2]]
    for scale, model, setting, figures, half in rows:
        lines.append([scale, model, setting])
        for way in (0, 1):
            recalls = figures[3 * way : 3 * way + 3]
            first, *rest = [f"{x:5.1f}" for x in (*recalls, sum(recalls) / 3)]
            lines[-1] += [first + (f" ±{half[way]:.1f}" if half else ""), *rest, ""]
    head, *body = columns(lines)
    start = [head.find("R@1"), head.rfind("R@1")]
    return "\n".join([title, " " * start[0] + "Text-to-Image" + " " * (start[1] - start[0] - 13) + "Image-to-Text", head, *body, *notes(records, name, split)])


def notes(records, name, split):
    """What a reader of the table must know."""
    ways = {"text_to_image": "captions describe no picture of the split", "image_to_text": "pictures have no caption"}
    t, i = (records[0][way] for way in ways)
    lines = [f"> measured here, towers in {records[0]['precision']}: {t['queries']:,} captions ask, {i['queries']:,} pictures ask. Guessing gives R@1 of {t['chance_R@1']:.1f} and {i['chance_R@1']:.1f}.",
             "MR is the mean of R@1, R@5 and R@10. ±: half of the interval that holds 95 % of the R@1 when the split's pictures are resampled (bootstrap, 1,000 draws).",
             "Setting: what the checkpoint's file tells of its training. Weights of other projects tell nothing and count as zero-shot."]
    published = data.TABLE_1.get(name, {}).get(split)
    if published:
        pairs = records[0]["pairs"]
        lines.append(f"{pairs:,} pairs, as in the paper's table 1." if pairs == published else f"NOTE: {pairs:,} pairs where the paper's table 1 has {published:,}, so the published rows are of another set.")
    lines += [f"{records[0][way]['without_answer']:,} {what}: no queries, but they stay candidates." for way, what in ways.items() if records[0][way]["without_answer"]]
    for record in records[1:]:
        gains = []
        for way, change in record["change_of_R@1"].items():
            low, high = change["interval"]
            gains.append(f"{way.replace('_', '-')} {change['mean']:+.1f} ({low:+.1f} to {high:+.1f}{', which may be chance' if low <= 0 <= high else ''})")
        lines.append(f"R@1 of {record['ckpt']} less that of {records[0]['ckpt']}, with 95 % interval: {', '.join(gains)}.")
    return lines


def class_table(records, name, templates):
    """Zero-shot classification as text."""
    lines = [["model", "top-1", "top-5", "mean per class"]]
    for r in records:
        lines.append([f"> {r['model']} ({r['ckpt']})", f"{r['top-1']:5.1f} ±{(r['top-1_interval'][1] - r['top-1_interval'][0]) / 2:.1f}", f"{r['top-5']:5.1f}", f"{r['mean_per_class']:5.1f}"])
    first, last = records[0], records[-1]
    out = [f"{name}: zero-shot classification (%)", *columns(lines),
           f"> measured here, towers in {first['precision']}: {first['pictures']:,} pictures, {first['classes']:,} classes, {templates} prompt{'s' * (templates > 1)} each. Guessing gives top-1 of {first['chance_top-1']:.1f}."]
    if last["confused"]:
        out.append("most often confused: " + "; ".join(f"{c['class']} taken for {c['taken_for']}, {c['times']} of {c['of']}" for c in last["confused"][:5]))
    return "\n".join(out)


# ---------------------------------------------------------------------------------------------------------------- command line


def retrieve(args, checkpoints, split_name, device, first):
    """Recall of each checkpoint on a split; prints the table, writes what was asked for."""
    opened = functools.cache(lambda context_length: data.open_split(args.data, split_name, args.data_root, context_length))
    name, (autocast, precision) = data_name(args.data), precision_of(args.precision, device, evaluating=True)
    dtype = torch.float32 if precision == "fp32" else torch.float16             # as kept by --features; and without it, so that the figures are the same
    records, ranks, hits = [], [], []
    for source, model, state in checkpoints(device):
        split = opened(model.cfg.context_length)
        if split.endless:
            raise data.BadInput(f"{split.name} is endless: evaluate on valid or test")
        weights, compute = checkpoint.fingerprint(model), lambda: [x.to(dtype) for x in embed_split(model, split, device, autocast, args.batch_size, args.workers)]
        if args.features is None:
            embeds = compute()
        else:
            made_of = {"weights": weights, "data": split.fingerprint(), "split": split_name, "precision": precision, "image_size": model.cfg.image_size, "context_length": model.cfg.context_length}
            ids = {"image_ids": list(map(str, split.image_ids)), "texts": split.texts}
            embeds = kept(Path(args.features) / re.sub(r"[^\w.-]+", "-", str(source)).strip("-."), made_of, ids, compute)
        embeds = [x.to(device).float() for x in embeds]
        found = both_ways(*embeds, split.positives)
        record = {"ckpt": str(source), "model": checkpoint.name_of(model.cfg), "setting": setting_of(state, name), "weights": weights, "precision": precision, "data": args.data,
                  "split": split_name, "pairs": len(split.pairs)} | {way: recall_of(*what) for way, what in found.items()}
        hits.append({way: hits_at_1(way, *what[:2]) for way, what in found.items()})
        for way, (right, pictures) in hits[-1].items():
            record[way]["R@1_interval"] = interval(right, pictures)
        if records:
            changes = {way: (right - hits[0][way][0], pictures) for way, (right, pictures) in hits[-1].items()}
            record["change_of_R@1"] = {way: {"mean": 100 * change.mean(), "interval": interval(change, pictures)} for way, (change, pictures) in changes.items()}
        records.append(record)
        ranks.append({way: what[0] for way, what in found.items()})
    if not first:
        return
    print(table(records, name, split_name))
    if args.report is not None:
        report.write_retrieval(args.report, *compare_rows(records, name, split_name), notes(records, name, split_name), records, ranks, split, embeds, found)
        print(f"wrote {args.report}")
    if args.json is not None:
        data.write_text(args.json, json.dumps({"data": args.data, "split": split_name, "results": records}, ensure_ascii=False, indent=1) + "\n")


def classify(args, checkpoints, split_name, device, first):
    """Zero-shot classification by each checkpoint of a folder of classes; prints the table, writes what was asked for."""
    names, pictures, labels = data.open_classes(args.classify, split_name)
    templates = read_templates(args.templates) if args.templates is not None else TEMPLATES
    autocast, precision = precision_of(args.precision, device, evaluating=True)
    read = lambda i: data.decoded(pictures[i].read_bytes, str(pictures[i]))
    records = []
    for source, model, _ in checkpoints(device):
        class_embed = class_embeddings(model, names, templates, device, autocast, args.batch_size)
        image_embed = embed_pictures(model, read, len(pictures), device, autocast, args.batch_size, args.workers)
        if not (image_embed.isfinite().all() and class_embed.isfinite().all()):
            raise data.BadInput(f"{source}: its embeddings hold NaN or infinity; --precision fp32 may help")
        scale = model.logit_scale.exp().item()
        predictions = []
        for start in range(0, len(pictures), 1024):
            best = class_probabilities(image_embed[start : start + 1024], class_embed, scale).topk(min(5, len(names)))
            predictions += [[[names[c], p] for p, c in zip(*row)] for row in zip(best.values.tolist(), best.indices.tolist())]
        predictions = [{"picture": str(path), "class": names[label], "best": best} for path, label, best in zip(pictures, labels, predictions)]
        records.append({"ckpt": str(source), "model": checkpoint.name_of(model.cfg), "weights": checkpoint.fingerprint(model), "precision": precision}
                       | classification_of(image_embed, class_embed, labels, names) | {"predictions": predictions})
    if not first:
        return
    print(class_table(records, f"{args.classify}, {split_name} split", len(templates)))
    if args.report is not None:
        report.write_classification(args.report, f"{args.classify}, {split_name} split", records, names, read, labels, image_embed, class_embed, scale)
        print(f"wrote {args.report}")
    if args.json is not None:
        data.write_text(args.json, json.dumps({"data": args.classify, "split": split_name, "templates": list(templates), "results": records}, ensure_ascii=False, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", nargs="+", required=True, help="checkpoints: files, folders, or names of released weights (see checkpoint.py); several give one table")
    parser.add_argument("--data", help=f"{', '.join([*data.NAMES, 'demo'])}, a folder, or a pattern of tar shards (all of it)")
    parser.add_argument("--classify", metavar="DIR", help="instead of --data: zero-shot classification of pictures in one folder for each class")
    parser.add_argument("--templates", metavar="FILE", help="prompts for --classify, one a line, {} for the class's name (default: 20 of our own)")
    parser.add_argument("--data-root", default="data", help="where the named data sets lie (default: data)")
    parser.add_argument("--split", help="(default: test)")
    parser.add_argument("--batch-size", type=int, default=128, help="pictures or captions embedded at a time (default: 128)")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
                        help="of the towers; recall itself is always computed in fp32 (default: auto: bf16 where the hardware has it, else fp16 on GPUs, else fp32)")
    parser.add_argument("--workers", type=int, default=1, help="processes that read pictures, for each process (default: 1)")
    parser.add_argument("--features", metavar="DIR", help="keep the embeddings there, and use them the next time (float32 with --precision fp32, else float16)")
    parser.add_argument("--report", metavar="FILE.html", help="write a page with the table, curves, and pictures: a sample of queries and the worst misses")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    args = parser.parse_args()
    if not 1 <= args.batch_size <= 1e6 or not 0 <= args.workers <= 512:
        raise data.BadInput(f"--batch-size {args.batch_size} --workers {args.workers}: out of range, 1 to 1e6 and 0 to 512")
    if (args.data is None) == (args.classify is None):
        raise data.BadInput("--data DATA measures recall, --classify DIR classification: pass one of them")
    if args.classify is not None and args.features is not None:
        raise data.BadInput("--features goes with --data, not with --classify")
    if args.templates is not None and args.classify is None:
        raise data.BadInput("--templates goes with --classify")
    for flag, path in (("--json", args.json), ("--report", args.report)):
        if path is not None and (Path(path).is_dir() or not Path(path).resolve().parent.is_dir()):
            raise data.BadInput(f"{flag} {path!r}: name a file in a folder that is there")
    pattern = args.data is not None and data.is_pattern(args.data)
    if args.split and pattern:
        raise data.BadInput(f"--split {args.split}: a pattern of shards has no splits, it is one")

    device, rank, _ = start_processes()
    (retrieve if args.data is not None else classify)(args, functools.partial(opened_checkpoints, args.ckpt), "all" if pattern else args.split or "test", device, rank == 0)


def opened_checkpoints(sources, device):
    """(source, model in evaluation mode, the file's other entries) of each, one after the other in memory."""
    for source in sources:
        state = checkpoint.read(source)
        yield source, checkpoint.model_of(state, source).to(device), state


if __name__ == "__main__":
    data.run(main)
