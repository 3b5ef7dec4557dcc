"""Retrieval in both directions, as in the paper: Recall@1, 5, 10 and their mean (section 4.1.2), in the tables of section 4.2.

    python evaluate.py --ckpt cn-clip-vit-b-16 --data coco-cn                  # released weights, zero-shot
    python evaluate.py --ckpt runs/finetune/best.pt --data coco-cn
    python evaluate.py --ckpt runs/stage2/best.pt --data demo --json demo.json
    python evaluate.py --ckpt runs/own/best.pt --data /path/to/folder --split test

A query is a hit at K if ANY of its correct items is among the K most similar. Text-to-image: every caption asks, all pictures of the split are candidates;
image-to-text: every picture asks, all captions are candidates. Queries without any correct item do not count; how many there were is said.
"""
import argparse
import functools
import json
import os
import signal
import time
import unicodedata
import uuid
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

import checkpoint
import data

KS = (1, 5, 10)

# The paper's published rows (percent): (scale, model, text-to-image R@1 R@5 R@10, image-to-text R@1 R@5 R@10)
PUBLISHED = {
    "coco-cn": ("Table 4. COCO-CN", [
        ("base-size", "Wukong ViT-B/32", 67.0, 91.4, 96.7, 65.8, 90.3, 96.6),
        ("base-size", "R2D2 ViT-B", 75.1, 94.2, 98.1, 76.1, 95.3, 98.5),
        ("base-size", "CE-CLIP ViT-B/16", 77.0, 97.1, 99.0, 77.4, 96.2, 98.9),
        ("large-size", "Wukong ViT-L/14", 74.0, 94.4, 98.1, 73.3, 94.0, 98.0),
        ("large-size", "R2D2 ViT-L/14", 79.1, 96.5, 98.9, 79.3, 97.1, 98.7),
        ("large-size", "CE-CLIP ViT-L/14", 78.9, 96.3, 99.0, 80.2, 96.7, 99.2)]),
    "flickr30k-cn": ("Table 5. Flickr30K-CN", [
        ("base-size", "Wukong ViT-B/32", 67.6, 89.6, 94.2, 83.9, 97.6, 99.0),
        ("base-size", "R2D2 ViT-B", 78.3, 94.6, 97.0, 92.6, 99.1, 99.8),
        ("base-size", "CE-CLIP ViT-B/16", 79.1, 94.8, 97.4, 93.5, 99.0, 99.5),
        ("large-size", "Wukong ViT-L/14", 77.4, 94.5, 97.0, 92.7, 99.1, 99.6),
        ("large-size", "R2D2 ViT-L/14", 84.4, 96.7, 98.4, 95.6, 98.8, 100.0),
        ("large-size", "CE-CLIP ViT-L/14", 82.7, 96.7, 98.6, 96.1, 99.5, 99.9)]),
    "ap-id": ("Table 6. AP-ID", [
        ("base-size", "CN-CLIP ViT-B/16 before fine-tuning", 81.3, 89.5, 95.9, 84.4, 87.5, 97.3),
        ("base-size", "CN-CLIP ViT-B/16 after fine-tuning", 84.1, 95.3, 98.5, 82.7, 94.4, 97.4)]),
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


def precision_of(name, device):
    """"auto", "fp32", "bf16" or "fp16" -> (a context for the towers' forward pass, the name that auto came to)."""
    if name == "auto":
        name = "bf16" if bf16_is_fast(device) else "fp16" if device.type == "cuda" else "fp32"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    return functools.partial(torch.autocast, device.type, dtype=dtype, enabled=name != "fp32"), name


# ---------------------------------------------------------------------------------------------------------------- recall


def best_ranks(queries, candidates, correct, chunk=1024):
    """For every query the rank (0 = first) of its best-placed correct candidate; -1 for queries without one.

    queries (Q, D), candidates (C, D) unit vectors, correct: Q lists of candidate indices -> (Q,) int64. Equal similarities are ranked in the order of the
    candidates. At most chunk x C similarities exist at a time.
    """
    ranks = torch.full((len(queries),), -1)
    place = torch.arange(len(candidates), device=candidates.device)
    for start in range(0, len(queries), chunk):
        rows = [i for i in range(start, min(start + chunk, len(queries))) if len(correct[i])]
        if not rows:
            continue
        similarity = queries[rows] @ candidates.T                                                   # (q, C)
        most = max(len(correct[i]) for i in rows)
        known = torch.tensor([list(correct[i]) + [correct[i][0]] * (most - len(correct[i])) for i in rows], device=place.device)     # (q, most), repeats as filling
        scores = similarity.gather(1, known)
        best = scores.max(dim=1, keepdim=True).values                                               # (q, 1)
        first = known.masked_fill(scores < best, len(candidates)).min(dim=1, keepdim=True).values   # the first of the best-scored correct ones
        before = (similarity > best) | ((similarity == best) & (place < first))
        ranks[rows] = before.sum(dim=1).cpu()
    return ranks


def recall_of(ranks, correct, candidates):
    """Ranks of best_ranks -> {"R@1", "R@5", "R@10", "MR"} in percent, the R@1 of guessing, the number of queries, and how many had no correct item."""
    asked = ranks[ranks >= 0]
    result = {f"R@{k}": 100 * (asked < k).double().mean().item() for k in KS}
    result["MR"] = sum(result.values()) / len(KS)
    chance = 100 * sum(map(len, correct)) / candidates / len(asked)
    return result | {"chance_R@1": chance, "queries": len(asked), "without_answer": len(ranks) - len(asked)}


def retrieval_recall(image_embed, text_embed, positives, chunk=1024):
    """Recall in both directions.

    image_embed (I, D), text_embed (T, D) unit vectors; positives[t] = indices of the pictures that caption t describes.
    -> {"text_to_image": {"R@1", "R@5", "R@10", "MR", "chance_R@1", "queries", "without_answer"}, "image_to_text": the same}, recalls in percent.
    Raises BadInput when an embedding is not finite or nothing can be asked.
    """
    if not (torch.isfinite(image_embed).all() and torch.isfinite(text_embed).all()):
        raise data.BadInput("the embeddings hold NaN or infinity: the weights are damaged, or training diverged (then a lower --lr helps)")
    if not any(len(images) for images in positives):
        raise data.BadInput("no caption of the split describes a picture of it, so there is no recall to measure")
    captions_of = [[] for _ in range(len(image_embed))]
    for t, images in enumerate(positives):
        for i in images:
            captions_of[i].append(t)
    return {
        "text_to_image": recall_of(best_ranks(text_embed, image_embed, positives, chunk), positives, len(image_embed)),
        "image_to_text": recall_of(best_ranks(image_embed, text_embed, captions_of, chunk), captions_of, len(text_embed)),
    }


# ---------------------------------------------------------------------------------------------------------------- embeddings of a split


class _Pictures(Dataset):
    def __init__(self, split, size, indices):
        self.split, self.size, self.indices = split, size, indices

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, k):
        return data.to_uint8(self.split.picture(self.indices[k]), self.size)


@torch.no_grad()
def embed_split(model, split, device, autocast, batch_size=128, workers=0):
    """image_embed (I, D) and text_embed (T, D) of a split, on the CPU. Under torch.distributed each process embeds its share and all get the whole."""
    was_training = model.training
    model.eval()
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if world > 1 else 0

    mine, my_texts = range(rank, len(split.image_ids), world), range(rank, len(split.texts), world)
    loader = DataLoader(_Pictures(split, model.cfg.image_size, mine), batch_size=batch_size, num_workers=workers, worker_init_fn=data.reader_start())
    images, texts = [torch.empty(0, model.cfg.embed_dim)], [torch.empty(0, model.cfg.embed_dim)]
    for pixels in loader:
        with autocast():
            images.append(model.encode_image(data.normalize(pixels.to(device).float() / 255)).cpu())
    for start in range(0, len(my_texts), batch_size):
        ids = torch.from_numpy(split.ids[my_texts[start : start + batch_size]].astype("int64"))
        with autocast():
            texts.append(model.encode_text(ids.to(device)).cpu())
    model.train(was_training)
    image_embed, text_embed = torch.cat(images), torch.cat(texts)
    if world == 1:
        return image_embed, text_embed
    shares = from_all((list(mine), image_embed, list(my_texts), text_embed))
    image_embed, text_embed = torch.empty(len(split.image_ids), model.cfg.embed_dim), torch.empty(len(split.texts), model.cfg.embed_dim)
    for image_rows, some_images, text_rows, some_texts in shares:
        image_embed[image_rows], text_embed[text_rows] = some_images, some_texts
    return image_embed, text_embed


# ---------------------------------------------------------------------------------------------------------------- the tables


def width(text):
    """Columns that a text takes in a terminal: Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def table(result, name, split, model_name, ckpt):
    """The paper's table for this data set, published rows and the measured one (marked >), or the measured row alone for other data."""
    title, published = PUBLISHED.get(name, (name, []))
    if split != "test":
        published = []
    figures = [result[way][f"R@{k}"] for way in ("text_to_image", "image_to_text") for k in KS]
    measured = (SCALE.get(model_name, "custom"), f"> {model_name} ({ckpt})", *figures)
    rows = [*published, measured]
    order = ["base-size", "large-size", "tiny", "custom"]
    rows.sort(key=lambda row: order.index(row[0]))                              # stable: the measured row ends its own size group
    first, second = (max(width(row[c]) for row in [*rows, ("scale", "model")]) for c in (0, 1))
    pad = lambda text, size: text + " " * (size - width(text))
    line = lambda scale, model, cells: f"{pad(scale, first)}  {pad(model, second)}  " + "  ".join(cells[:4]) + "     " + "  ".join(cells[4:])
    heads = [f"{h:>5}" for h in ("R@1", "R@5", "R@10", "MR")] * 2
    out = [f"{title}, {split} split (%)", " " * (first + second + 4) + f"{'Text-to-Image':^26}     {'Image-to-Text':^26}".rstrip(), line("scale", "model", heads)]
    for scale, model, *r in rows:
        r = [*r[:3], sum(r[:3]) / 3, *r[3:], sum(r[3:]) / 3]
        out.append(line(scale, model, [f"{x:5.1f}" for x in r]))
    t, i = result["text_to_image"], result["image_to_text"]
    out.append(f"> measured here: {t['queries']:,} captions ask, {i['queries']:,} pictures ask. MR is the mean of R@1, R@5 and R@10. Guessing gives R@1 of {t['chance_R@1']:.1f} and {i['chance_R@1']:.1f}.")
    for way, what in ((t, "captions describe no picture of the split"), (i, "pictures have no caption")):
        if way["without_answer"]:
            out.append(f"  {way['without_answer']:,} {what}: no queries, but they stay candidates.")
    return "\n".join(out)


def main():
    parser = argparse.ArgumentParser(description="Recall@K of a checkpoint, in both directions.")
    parser.add_argument("--ckpt", required=True, help="a checkpoint: a file, a folder, or the name of released weights (see checkpoint.py)")
    parser.add_argument("--data", required=True, help=f"{', '.join([*data.NAMES, 'demo'])}, a folder, or a pattern of tar shards (all of it)")
    parser.add_argument("--data-root", default="data", help="where the named data sets lie (default: data)")
    parser.add_argument("--split", help="(default: test)")
    parser.add_argument("--batch-size", type=int, default=128, help="pictures or captions embedded at a time (default: 128)")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="fp32", help="of the towers; recall itself is always computed in fp32 (default: fp32)")
    parser.add_argument("--workers", type=int, default=1, help="processes that read pictures (default: 1)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    args = parser.parse_args()
    if not 1 <= args.batch_size <= 1e6 or not 0 <= args.workers <= 512:
        raise data.BadInput(f"--batch-size {args.batch_size} --workers {args.workers}: out of range, 1 to 1e6 and 0 to 512")
    if args.json is not None and (Path(args.json).is_dir() or not Path(args.json).resolve().parent.is_dir()):
        raise data.BadInput(f"--json {args.json!r}: name a file in a folder that is there")

    if args.split and data.is_pattern(args.data):
        raise data.BadInput(f"--split {args.split}: a pattern of shards has no splits, it is one")
    split_name = "all" if data.is_pattern(args.data) else args.split or "test"

    device, rank, _ = start_processes()
    model, _ = checkpoint.load(args.ckpt, device)
    split = data.open_split(args.data, split_name, args.data_root, model.cfg.context_length)
    if split.endless:
        raise data.BadInput(f"{split.name} is endless: evaluate on valid or test")
    autocast, precision = precision_of(args.precision, device)
    result = retrieval_recall(*embed_split(model, split, device, autocast, args.batch_size, args.workers), split.positives)
    if rank == 0:
        model_name = checkpoint.name_of(model.cfg)
        print(table(result, args.data, split_name, model_name, args.ckpt))
        if args.json is not None:
            report = {"ckpt": str(args.ckpt), "model": model_name, "data": args.data, "split": split_name, "precision": precision, **result}
            data.write_text(args.json, json.dumps(report, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    data.run(main)
