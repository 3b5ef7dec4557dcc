"""Training: both pretraining stages and fine-tuning (paper, sections 3.1 and 3.2) - one script, one step function.

    python train.py --stage 1 --vision-weights vision.pt                        # the painted data set, the tiny model
    torchrun --nproc_per_node 8 train.py --stage 1 --vision-weights vision.pt   # the same optimizer steps on 8 processes
    python train.py --stage 1 --vision-weights ViT-B-16.pt --text-weights chinese-roberta-wwm-ext --data coco-cn    # OpenAI's CLIP and a Chinese RoBERTa
    python train.py --stage 2 --init runs/stage1/last.pt
    python train.py --recipe small --data /path/to/folder --out runs/own        # fine-tune released weights on your own pictures
    python train.py --recipe coco-cn-base --micro-batch 256                     # fine-tuning as in the paper: the recipes are listed below
    python train.py --stage 2 --data /path/to/folder --out runs/own             # your own pictures, from scratch
    torchrun --nnodes 8 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint host:29500 --max-restarts 3 train.py --stage 2 --data 'shards/{000000..020000}.tar' --micro-batch 256 …

Stage 1 trains the text tower against the frozen vision tower; stage 2 and fine-tuning train both. --batch-size is the global batch, over all processes; --micro-batch is what a
process holds at a time. Neither the number of processes nor the micro-batch changes the steps that are taken (dropout masks and rounding apart; for a ResNet that trains, their
product counts: BatchNorm sees so many pictures at a time).

The same command run again continues where the run stopped, after any kill, to the same result (bit for bit on CPUs; kernels of GPUs round differently each time). In --out: last.pt (to continue from; with --keep also step-00001000.pt, …), best.pt
(highest recall on the valid split), of a fine-tune start.pt (the weights before it), metrics.jsonl, settings.json, bad_samples.jsonl (pairs that could not be read), and of stage 1
features/ (the pictures' embeddings, computed once: features.py).
"""
import argparse
import functools
import math
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import checkpoint
import data
import system
from evaluate import embed_split, retrieval_recall
from features import Features
from loss import gather, matches, tiled_loss
from model import CLIP, CONFIGS, statistics_kept, to_device
from processes import from_all, largest, precision_of, start_processes
from run import Meter, Run, asked_to_stop, catch_signals
from system import BadInput
from tokenizer import MASK, SEP

# What each stage sets when no flag does. The paper gives no figures for the two pretraining stages; the learning rates are those of Chinese CLIP (from memory), the batch is a smaller one.
STAGES = {
    "1":        {"lr": 1e-4, "batch_size": 1024, "epochs": 1.0, "warmup": 5000},
    "2":        {"lr": 2e-5, "batch_size": 1024, "epochs": 1.0, "warmup": 5000},
    "finetune": {"lr": None, "batch_size": 128, "epochs": 10.0, "warmup": 100},              # None: fitting_lr
}
# The tiny model learns from nothing, in minutes: steps as large as it bears.
TINY = {
    "1":        {"lr": 1e-3, "batch_size": 256, "epochs": 3.0, "warmup": 20},
    "2":        {"lr": 2e-3, "batch_size": 256, "epochs": 12.0, "warmup": 50},
    "finetune": {"lr": None, "batch_size": 128, "epochs": 20.0, "warmup": 50},
}
# --recipe: where its settings come from, and the settings. Flags override them.
_TABLE_2 = {"stage": "finetune", "weight_decay": 0.001, "positives": "pair", "average": False}      # in all of the paper's fine-tuning; its loss is the plain one, and it averages no weights
_BASE, _LARGE = _TABLE_2 | {"init": "cn-clip-vit-b-16"}, _TABLE_2 | {"init": "cn-clip-vit-l-14"}
_PRETRAINING = "arXiv 2211.01335, the batch as published there, learning rate and warmup from memory; the paper itself gives none"
RECIPES = {
    "coco-cn-base":       ("the paper's tables 2 and 3", _BASE | {"data": "coco-cn", "batch_size": 12800, "lr": 5e-5, "epochs": 13.0, "warmup": 6}),
    "coco-cn-large":      ("the paper's tables 2 and 3", _LARGE | {"data": "coco-cn", "batch_size": 4096, "lr": 6e-5, "epochs": 7.0, "warmup": 5}),
    "flickr30k-cn-base":  ("the paper's tables 2 and 3", _BASE | {"data": "flickr30k-cn", "batch_size": 7680, "lr": 5e-5, "epochs": 5.0, "warmup": 20}),
    "flickr30k-cn-large": ("the paper's tables 2 and 3", _LARGE | {"data": "flickr30k-cn", "batch_size": 4096, "lr": 2e-5, "epochs": 6.0, "warmup": 20}),
    "ap-id":  ("the paper's table 2, whose batch is that of one card", _BASE | {"data": "ap-id", "batch_size": 128, "lr": 5e-5, "epochs": 200.0, "warmup": 100, "valid_every": 150}),
    "stage1": (_PRETRAINING, {"stage": "1", "batch_size": 32768, "lr": 1e-4, "warmup": 5000, "weight_decay": 0.001}),
    "stage2": (_PRETRAINING, {"stage": "2", "batch_size": 32768, "lr": 2e-5, "warmup": 5000, "weight_decay": 0.001}),
    "small":  ("our own measurements on a few thousand pairs, see the README", {"stage": "finetune", "init": "cn-clip-vit-b-16", "batch_size": 128, "epochs": 40.0, "warmup": 50, "augment": "photo", "patience": 10}),
}
# A batch and a learning rate that fit each other when fine-tuning: for the tiny model by our own measurements, for the others by the paper's table 3 (Flickr30K-CN, base).
FITTING = {"tiny": (128, 2e-3), "other models": (7680, 5e-5)}
AVERAGES = [share / 10 for share in range(1, 10)]                               # how far from the start to the end are the weights that --average tries
RANGES = {"batch_size": (2, 1e7), "micro_batch": (1, 1e7), "epochs": (1e-6, 1e6), "max_steps": (0, 1e9), "lr": (0, 1e30), "warmup": (0, 1e9), "weight_decay": (0, 1e3), "mask_tokens": (0, 0.99),
          "patch_dropout": (0, 0.99), "max_bad": (0, 1), "seed": (0, 2**31 - 1), "workers": (0, 512), "valid_every": (0, 1e9), "save_every": (0, 1e9), "save_minutes": (0, 1e6), "keep": (1, 1e4),
          "log_every": (1, 1e9), "patience": (0, 1e6)}


def main():
    args = parse_args()
    device, rank, world = start_processes()

    data.all_names(args.data, args.data_root)                                   # what is wrong with their names or rows is said before weights are downloaded
    last = Path(args.out) / "last.pt"
    source, state = starting_point(args, last)
    config = CONFIGS[args.model] if args.model else checkpoint.config_of(state) if state else CONFIGS["tiny"]

    # data and settings
    train_split = data.open_split(args.data, "train", args.data_root, config.context_length)
    valid_data = args.valid_data or (None if data.is_pattern(args.data) else args.data)             # a pattern of shards is one split, to train on
    valid_split = data.open_split(valid_data, "valid", args.data_root, config.context_length) if valid_data else None
    autocast, precision = precision_of(args.precision, device)
    settings = resolve(args, config, train_split, valid_split, precision, world)
    total = settings.total_steps

    # model: the same weights on every process
    torch.manual_seed(settings.seed)
    model = CLIP(config)
    if settings.stage == "1":
        model.freeze_vision()
    model.set_grad_checkpointing(settings.grad_checkpointing)
    if settings.compile:
        try:
            model.compile_vision()
        except ValueError as error:
            raise BadInput(f"--compile: {error}") from None
    model.vision.patch_dropout = settings.patch_dropout                         # of a ViT; resolve refuses it for others
    model.to(device).train()
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")     # not enabled, it passes everything through
    optimizer = make_optimizer(model, settings.weight_decay)
    gradients = GradientSum([p for p in model.parameters() if p.requires_grad])

    run = Run(last.parent, vars(settings), rank, model, optimizer, scaler)
    first_step = run.resume(state) if source == last else 0
    if state:
        checkpoint.load_into(model, state, source)
    agree(**vars(settings), device=device.type, first_step=first_step, weights=checkpoint.fingerprint(model))
    run.say(description(settings, model, train_split, valid_split, device, world, first_step, source, state))
    del state
    if run.ended(first_step) and (run.averaged or not settings.average):
        return run.say(f"nothing to do: {run.summary(first_step)}. To train on from there: --init {last.parent / 'best.pt'} with another --out")

    valid_pictures = []                                                         # in stage 1, from the first validation on: their embeddings, which never change

    def validate(step, share=None):
        if valid_split is not None:
            embeds = embed_split(model, valid_split, device, autocast, workers=settings.workers, image_embed=valid_pictures[0] if valid_pictures else None)
            valid_pictures[:] = embeds[:1] if settings.stage == "1" else []
            run.validated(step, retrieval_recall(*embeds, valid_split.positives), share)

    run.open_folder(first_step)
    signals = catch_signals(rank == 0)
    features = None
    if settings.features:
        features = Features(settings.features, model, train_split, settings.precision)
        features.complete(model, train_split, device, autocast, settings.workers, run.say, lambda: asked_to_stop(signals) and run.stop(first_step, signals))
    if first_step == 0:
        validate(0)
        run.keep_start()
        run.snapshot(0)

    batches = data.Batches(train_split, settings.batch_size, settings.seed, first_step, total, rank, world, settings.micro_batch)
    meter = Meter(first_step, total, settings, len(train_split), device)
    loader = meter.watched(data.training_loader(train_split, config.image_size, batches, settings.workers, pin_memory=device.type == "cuda", features=features))
    step = first_step                                                           # optimizer steps done
    while not run.ended(step):
        step += 1
        lr = set_lr(optimizer, learning_rate(step - 1, settings.lr, settings.warmup, total))
        pixels, ids, image_keys, text_keys, bad = zip(*(data.own_memory(next(loader)) for _ in batches.places))     # of each micro-batch
        truth, bad = exchange(image_keys, text_keys, sum(bad, []))
        truth = truth if settings.positives == "all" else None                  # None: as in the paper, each pair is its own only match
        run.report(step, bad, min(step * settings.batch_size, len(train_split)), len(train_split))
        draws = random_draws(settings, step, ids[0].shape[1])
        ready = [functools.partial(prepare, *micro, draws, settings, device) for micro in zip(pixels, ids, batches.places)]
        seeds = [random_seed(settings.seed, step, rank, k) for k in range(len(ready))]              # functions of (seed, step, process, micro-batch), so never stored
        loss, norm = train_step(model, ready, seeds, truth, gradients, optimizer, scaler, autocast)
        run.took(step, loss, norm, lambda step=step: [train_split.where(k) for _, k in batches.pairs(step - 1, range(settings.batch_size))])

        due = lambda every: step == total or (every and step % every == 0)
        if due(settings.log_every):
            run.look()
            run.log(meter.record(step, lr, model, run))
        if due(settings.valid_every):
            with meter.paused():
                validate(step)
        stopping = asked_to_stop(signals)
        if due(settings.valid_every) or due(settings.save_every) or run.minutes_since_snapshot() >= (settings.save_minutes or math.inf) or stopping:
            run.snapshot(step)
        if stopping and not run.ended(step):
            run.stop(step, signals)

    if settings.average:
        for share in AVERAGES:
            run.load_average(share)
            validate(step, share)
            if asked_to_stop(signals):
                run.stop(step, signals)
        run.load_average(1.0)                                                   # the end
        run.averaged = True
        run.snapshot(step)
    run.say(run.summary(step))


def starting_point(args, last):
    """Where the run starts: its own snapshot `last`, else --init, else the towers of --vision-weights and --text-weights, else random weights -> its name, what checkpoint.read gives."""
    towers = [file for file in (args.vision_weights, args.text_weights) if file is not None]
    if last.exists():
        return last, checkpoint.read(last, mapped=False)                        # mapped optimizer state would keep the old file on the disk after last.pt is replaced
    if towers:
        return " + ".join(towers), checkpoint.read_towers(args.vision_weights, args.text_weights, CONFIGS.get(args.model))
    if args.init is not None:
        return args.init, checkpoint.read(args.init)
    return "random weights", {}


def train_step(model, ready, seeds, truth, gradients, optimizer, scaler, autocast):
    """One optimizer step on this process's share of the global batch, however many micro-batches it takes -> loss of the global batch, norm of its gradient; on the device, and nothing here
    waits for it: while it computes this step, the next one is prepared.

    ready: for each micro-batch, a function that gives (pixels or image embeddings, ids); seeds: the seed of its dropout and patch masks. With one micro-batch the graph of the forward pass is kept;
    with several each is embedded without, and once more, alike, when the gradient at its embeddings is known (gradient caching, arXiv 2101.06983).
    When loss or gradient are not finite, the model stays as it is.
    """
    statistics = [(x, x.clone()) for x in model.buffers()]                      # BatchNorm's: the forward pass changes them before one knows whether the step counts

    def embed(k, vision=True):
        torch.manual_seed(seeds[k])
        pixels, ids = ready[k]()
        with autocast():
            return (pixels if pixels.ndim == 2 else model.encode_image(pixels)) if vision else None, model.encode_text(ids)         # ndim 2: embeddings already

    # 1. embed every micro-batch
    once = len(ready) == 1
    with torch.set_grad_enabled(once):
        image_embeds, text_embeds = zip(*(embed(k) for k in range(len(ready))))                     # each (b, D)

    # 2. the loss, and its gradient at the embeddings, over all processes
    scale = model.logit_scale.exp()
    loss, d_image, d_text, d_scale = tiled_loss(torch.cat(image_embeds).detach(), torch.cat(text_embeds).detach(), scale.detach(), truth)

    # 3. backward through each micro-batch; parameter gradients add up over them and over the processes
    gradients.zero(loss)
    sizes = [len(x) for x in text_embeds]
    for k, (d_i, d_t) in enumerate(zip(d_image.split(sizes), d_text.split(sizes))):
        if once:
            image_embed, text_embed = image_embeds[0], text_embeds[0]
        else:
            with statistics_kept(model):
                image_embed, text_embed = embed(k, vision=not model.vision_frozen)
        ends = [(text_embed, d_t)]                                              # where gradients enter the graph, and which
        if not model.vision_frozen:
            ends += [(image_embed, d_i)]
        if k == len(ready) - 1:
            ends += [(scale, d_scale)]
            gradients.send_when_done()
        torch.autograd.backward([x for x, _ in ends], [scaler.scale(d) for _, d in ends])
        del image_embed, text_embed, ends
    loss = gradients.wait()

    # 4. step, clamp
    scaler.unscale_(optimizer)
    norm = gradients.norm()
    finite = (loss + norm).isfinite()
    optimizer.found_inf = 1 - finite.float()                                    # 1: the fused kernel leaves weights and moments alone. (An enabled scaler puts its own in this place.)
    scaler.step(optimizer)
    model.clamp_logit_scale()
    for x, before in statistics:
        x.copy_(torch.where(finite, x, before))
    scaler.update()                                                             # under fp16: a lower scale after what was not finite, a higher one after a long while without
    return loss, norm


class GradientSum:
    """The parameters' gradients, in flat buckets (p.grad are views of them) that are summed over all processes while the backward pass still runs; for why the sum, see loss.py.

    A step: zero; a backward pass for each micro-batch, whose gradients add up in the buckets; before the last one send_when_done; in it each parameter tells `_done`, and a bucket is sent as soon
    as it and those before it are complete, in the same order on every process; wait. Backward passes go from the last layers to the first, so the buckets hold the parameters in that order.
    Frozen parameters are in none. The loss travels in the first bucket.
    """

    def __init__(self, params, most=2**23):
        self.buckets, self.works, self.sending = [], [], False                  # up to `most` numbers (32 MiB) each, one parameter at least
        groups = [[]]
        for p in reversed(params):
            if groups[-1] and sum(q.numel() for q in groups[-1]) + p.numel() > most:
                groups.append([])
            groups[-1].append(p)
        self.sizes = [len(group) for group in groups]
        for number, group in enumerate(groups):
            flat = group[0].new_zeros(sum(p.numel() for p in group) + 1, requires_grad=False)      # the last number: the loss, in the first bucket
            for p, part in zip(group, flat[:-1].split([p.numel() for p in group])):
                p.grad = part.view_as(p)
                p.register_post_accumulate_grad_hook(functools.partial(self._done, number))
            self.buckets.append(flat)

    def zero(self, loss):
        """Before the first backward pass of a step. `loss`: this process's share of it."""
        for flat in self.buckets:
            flat.zero_()
        self.buckets[0][-1] = loss

    def send_when_done(self):
        """The next backward pass is the last one of this step."""
        self.sending, self.waiting = dist.is_initialized(), list(self.sizes)

    def _done(self, number, _):
        if self.sending:
            self.waiting[number] -= 1
            while len(self.works) < len(self.buckets) and self.waiting[len(self.works)] == 0:
                self.works.append(dist.all_reduce(self.buckets[len(self.works)], async_op=True))

    def wait(self):
        """-> the loss, once all sums have arrived."""
        if self.sending:
            for flat in self.buckets[len(self.works):]:                         # of parameters that the loss did not touch
                self.works.append(dist.all_reduce(flat, async_op=True))
            for work in self.works:
                work.wait()
        self.works, self.sending = [], False
        return self.buckets[0][-1].clone()

    def norm(self):
        return torch.stack([flat[:-1].norm() for flat in self.buckets]).norm()


def exchange(image_keys, text_keys, bad):
    """Before a step, between all processes: lists of the micro-batches' keys -> the truth of the global batch (loss.py, matches), and all reports of bad pairs."""
    most, reports = largest(max(keys.shape[1] for keys in image_keys)), largest(len(bad))
    image_keys = torch.cat([F.pad(keys, (0, most - keys.shape[1]), value=-1) for keys in image_keys])           # (B, M)
    if reports:
        bad = sum(from_all(bad), [])
    return matches(gather(image_keys), gather(torch.cat(text_keys))), bad


def agree(**facts):
    """Stop when the processes do not have the same settings, data, step and weights: on several nodes each must see the same files."""
    first, *others = from_all(facts)
    for rank, other in enumerate(others, 1):
        differ = [f"{name} {other[name]} where process 0 has {first[name]}" for name in first if other[name] != first[name]]
        if differ:
            raise BadInput(f"process {rank} has {'; '.join(differ)}: every node must see the same data, weights and --out (a shared file system)")


def random_draws(settings, step, context_length):
    """The random numbers of a step, for the whole batch: for augmentation (N, DRAWS) in -1..1, and for masking tokens (N, L) in 0..1. A pair's are those of its place in the
    batch, so they do not depend on the number of processes."""
    generator = torch.Generator().manual_seed(random_seed(settings.seed, step, -1))
    pictures = 2 * torch.rand(settings.batch_size, data.DRAWS, generator=generator) - 1 if data.AUGMENT[settings.augment] else None
    tokens = torch.rand(settings.batch_size, context_length, generator=generator) if settings.mask_tokens else None
    return pictures, tokens


def prepare(pixels, ids, share, draws, settings, device):
    """A micro-batch as read, (b, 3, R, R) uint8 or features (b, D), and (b, L), with its places in the global batch -> on the device augmented and normalised pictures, or the features in
    float32; on the CPU, where the model packs them, captions with some tokens [MASK]."""
    pixels = pixels.to(device, non_blocking=True).float() / (255 if pixels.ndim == 4 else 1)
    for_pictures, for_tokens = (x if x is None else x[share.start : share.stop] for x in draws)
    if for_pictures is not None:
        pixels = data.augment(pixels, to_device(for_pictures, device), **data.AUGMENT[settings.augment])
    if for_tokens is not None:
        ids = torch.where((for_tokens < settings.mask_tokens) & (ids > SEP), MASK, ids)             # never [PAD], [UNK], [CLS], [SEP]
    return data.normalize(pixels) if pixels.ndim == 4 else pixels, ids


def make_optimizer(model, weight_decay):
    """AdamW over what trains. Matrices and tables decay; vectors (gains, biases, the class token) and the temperature do not. Betas as in CLIP: one pair for ViT, one for ResNet."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in params if p.ndim >= 2], "weight_decay": weight_decay}, {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0}]
    vit = isinstance(model.cfg.vision_layers, int)
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98 if vit else 0.999), eps=1e-6 if vit else 1e-8, fused=True)


def fitting_lr(batch_size, config):
    """A learning rate for fine-tuning with batches of this size. Small batches bear small rates only: with Adam the rate that fits grows with the square root of the batch (arXiv
    2205.10287), so from FITTING's batch N and rate r it is r sqrt(batch_size / N)."""
    batch, lr = FITTING["tiny" if config == CONFIGS["tiny"] else "other models"]
    return lr * math.sqrt(batch_size / batch)


def learning_rate(step, peak, warmup, total):
    """Rate of the step after `step` done ones: linear to the peak over `warmup` steps, then a cosine to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def random_seed(seed, step, rank, micro=0):
    """One number for (seed, step, rank, micro-batch); rank -1 is what all processes share."""
    return int(np.random.SeedSequence([seed, step, rank + 1, micro]).generate_state(1)[0])


# ---------------------------------------------------------------------------------------------------------------- command line


def description(settings, model, train_split, valid_split, device, world, first_step, source, state):
    """The first lines of a run: what trains, on what, with which settings."""
    lines, count = [], lambda params: f"{sum(p.numel() for p in params):,}"
    if settings.data == "demo":
        lines.append("Training on the painted demo data set. For the real thing pass --data coco-cn, flickr30k-cn or a folder, and --model vit-b-16 or another size.")
    if settings.recipe:
        source_of, recipe = RECIPES[settings.recipe]
        shown = lambda names: " ".join(f"{name}={getattr(settings, name)}" for name in names)
        other = [name for name, value in recipe.items() if getattr(settings, name) != value]
        lines.append(f"recipe {settings.recipe} ({source_of}): {shown(name for name in recipe if name not in other)}" + f"; otherwise than there: {shown(other)}" * bool(other))
    lines.append(f"stage {settings.stage}: {checkpoint.name_of(model.cfg)}, {count(model.parameters())} parameters, {count(p for p in model.parameters() if p.requires_grad)} of them train; "
                 f"starts from {source}")
    if state.get("skipped"):
        lines.append(f"left out: {state['skipped']}")
    if settings.stage == "1" and settings.init is None and settings.vision_weights is None:
        lines.append("note: the frozen vision tower has random weights, from which little can be learned; stage 1 is meant to start from a trained one (--vision-weights or --init)")
    valid = f"{valid_split.name}: {len(valid_split.image_ids):,} pictures, {len(valid_split.texts):,} captions" if valid_split else "no validation, so no best.pt (--valid-data names what to validate on)"
    lines.append(f"{train_split.name}: {len(train_split):,} pairs; {valid}")
    if settings.batch_size > len(train_split):
        lines.append(f"warning: --batch-size {settings.batch_size} is more than the {len(train_split)} training pairs, so every step repeats pairs; a smaller one, with more --epochs, learns more")
    if valid_split and len(valid_split.image_ids) < 50:
        lines.append(f"warning: {len(valid_split.image_ids)} pictures in {valid_split.name} are too few to choose a checkpoint well; 100 or more are better")
    if settings.stage == "finetune" and source == "random weights":
        lines.append("note: there is nothing to fine-tune in random weights; name a checkpoint, for example --init cn-clip-vit-b-16")
    fitting = fitting_lr(settings.batch_size, model.cfg)
    if settings.stage == "finetune" and not fitting / 10 <= settings.lr <= 3 * fitting:
        too = "large: it may destroy what the start knows" if settings.lr > fitting else "small: little will be learned"
        fits = round(settings.batch_size * (settings.lr / fitting) ** 2)
        larger = f"; so does --batch-size {fits} (--micro-batch: what a device holds at a time)" if settings.batch_size < fits <= len(train_split) else ""
        lines.append(f"warning: for batches of {settings.batch_size} a learning rate of {settings.lr:g} is {too}; --lr {fitting:.1e} fits{larger}")
    if settings.norm_batch is not None and settings.norm_batch < settings.batch_size:
        lines.append(f"note: BatchNorm in this ResNet sees {settings.norm_batch:,} pictures at a time (--micro-batch x processes), not the whole batch; a ViT has none")
    share = settings.batch_size // world
    if not settings.micro_batch and share > 1024:
        lines.append(f"note: {share:,} pairs at a time need much memory; --micro-batch 256 needs less and takes the same steps")
    several = f" ({math.ceil(share / settings.micro_batch):,} micro-batches a process)" if settings.micro_batch and settings.micro_batch < share else ""
    lines.append(f"{settings.total_steps:,} step{'s' * (settings.total_steps > 1)} of {settings.batch_size:,} pairs{several}; {world} process{'es' * (world > 1)}, {device.type}, {settings.precision}"
                 + f"; validated every {settings.valid_every:,} step{'s' * (settings.valid_every > 1)}" * bool(valid_split)
                 + (f"; continues after step {first_step:,}" if first_step else ""))
    lines.append("settings: " + " ".join(f"{k}={v}" for k, v in vars(settings).items()))
    return "\n".join(lines)


def parse_args(argv=None):
    row = lambda stage, model, values: f"  {stage:8}  {model:12}" + "".join(f"  {value or 'by batch':>10}" for value in values)
    flag = lambda name, value: f"--no-{name}" if value is False else f"--{name.replace('_', '-')} {value:g}" if isinstance(value, float) else f"--{name.replace('_', '-')} {value}"
    recipes = [f"  {name:18}  {' '.join(flag(*item) for item in sets.items())}\n{'':22}({source})" for name, (source, sets) in RECIPES.items()]
    defaults = "\n".join(["recipes:", *recipes, "\ndefaults:", row("stage", "model", ("--" + k.replace("_", "-") for k in STAGES["1"]))]
                         + [row(stage, model, sets[stage].values()) for stage in STAGES for model, sets in (("tiny", TINY), ("other models", STAGES))])
    parser = argparse.ArgumentParser(description="Train CE-CLIP.", epilog=f"{__doc__}\n{defaults}", formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=list(STAGES), help="1: vision tower frozen; 2: both towers; finetune: both, on your data")
    parser.add_argument("--recipe", choices=list(RECIPES), help="the settings of a table of the paper, or of ours, listed below; flags override them")
    parser.add_argument("--model", help=f"{', '.join(CONFIGS)} (default: that of --init or --vision-weights, else tiny)")
    parser.add_argument("--data", help=f"{', '.join([*data.NAMES, *data.PAINTED])}, a folder, or a pattern of tar shards like 'shards/{{000000..020000}}.tar' (default: demo)")
    parser.add_argument("--valid-data", help="what to validate on: the valid split of a name or folder, or all of a pattern (default: that of --data; with a pattern of shards, nothing)")
    parser.add_argument("--data-root", default="data", help="where the named data sets lie (default: data)")
    parser.add_argument("--init", help="a checkpoint to start from: a file, a folder, or the name of released weights (see checkpoint.py)")
    parser.add_argument("--vision-weights", help="a checkpoint whose vision tower and temperature to start from: OpenAI CLIP or any Chinese CLIP")
    parser.add_argument("--text-weights", help="a checkpoint whose text tower to start from: BERT, RoBERTa, RBT3 of Hugging Face or any Chinese CLIP (default: a fresh one)")
    parser.add_argument("--out", help="folder of the run (default: runs/stage1, runs/stage2 or runs/finetune)")
    parser.add_argument("--batch-size", type=int, help="pairs per optimizer step, over all processes")
    parser.add_argument("--micro-batch", type=int, help="pairs that a process holds at a time; several make up its share of the batch (default: the whole share)")
    parser.add_argument("--epochs", type=float, help="passes over the training pairs")
    parser.add_argument("--max-steps", type=int, default=0, help="optimizer steps, instead of --epochs")
    parser.add_argument("--lr", type=float, help="peak learning rate (default of finetune: one that fits the batch)")
    parser.add_argument("--warmup", type=int, help="steps to reach it (at most half the run)")
    parser.add_argument("--weight-decay", type=float, default=0.001, help="of matrices and tables (default: %(default)s)")
    parser.add_argument("--augment", choices=list(data.AUGMENT), default="none", help="(default: none) photo: small shifts and stretches, mild colours; drawing: bends, turns and recolours")
    parser.add_argument("--positives", choices=("all", "pair"), default="all", help="what counts as right in a batch: all captions of a picture and all pictures of a caption (default), or as in the paper its pair alone")
    parser.add_argument("--features", metavar="DIR", default="auto", help="stage 1 without augmentation: where the pictures' embeddings are kept, which are computed once; runs may share it. none: nowhere (default: OUT/features, when pictures come more than once)")
    parser.add_argument("--mask-tokens", type=float, default=0.0, help="share of a caption's tokens that become [MASK] in training (default: 0)")
    parser.add_argument("--patch-dropout", type=float, default=0.0, help="share of a picture's patches that a ViT leaves out in training: less time and memory (default: 0)")
    parser.add_argument("--max-bad", type=float, default=0.01, help="share of the pairs that may be unreadable and are replaced; above it the run stops (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation (default: 0)")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="auto: bf16 where the hardware has it, else fp16 on GPUs, else fp32")
    parser.add_argument("--grad-checkpointing", action="store_true", help="less memory, about a third more time")
    parser.add_argument("--compile", action="store_true", help="torch.compile for the vision tower: for GPUs, and a minute at the start; on CPUs it gains nothing")
    parser.add_argument("--workers", type=int, default=1, help="processes that read pictures, for each training process (default: 1)")
    parser.add_argument("--valid-every", type=int, default=0, help="steps between validations (default: a tenth of the run, of a fine-tune a twentieth, more where they would take much of the time)")
    parser.add_argument("--patience", type=int, default=0, help="stop after so many validations without a higher recall (default: 0, never)")
    parser.add_argument("--average", action=argparse.BooleanOptionalAction, help="at the end try averages of the start and the end, too, as the best weights (default: when fine-tuning)")
    parser.add_argument("--save-every", type=int, default=0, help="steps between snapshots, beside those at each validation (default: none)")
    parser.add_argument("--save-minutes", type=float, default=15.0, help="minutes between snapshots, beside those (default: %(default)g; 0: none)")
    parser.add_argument("--keep", type=int, default=1, help="how many of the latest snapshots to keep (default: 1, last.pt)")
    parser.add_argument("--log-every", type=int, default=10, help="steps between lines (default: 10)")
    args = parser.parse_args(argv)
    if args.recipe:
        recipe = RECIPES[args.recipe][1]
        towers = args.vision_weights is not None or args.text_weights is not None
        parser.set_defaults(**{name: value for name, value in recipe.items() if not (towers and name == "init")})
        args = parser.parse_args(argv)
    if args.stage is None:
        parser.error("--stage or --recipe is required")
    if args.recipe and args.data is None:
        raise BadInput(f"--recipe {args.recipe}: name the data with --data")
    args.data = args.data or "demo"
    args.out = args.out or ("runs/finetune" if args.stage == "finetune" else f"runs/stage{args.stage}")
    if Path(args.out).exists() and not Path(args.out).is_dir():
        raise BadInput(f"--out {args.out}: it is a file; name a folder for the run")
    if args.init is not None and (args.vision_weights is not None or args.text_weights is not None):
        raise BadInput(f"--init {args.init}: it brings both towers, so neither --vision-weights nor --text-weights go with it")
    if args.features == "":
        raise BadInput("--features '': name a folder, auto or none")
    if args.model is not None and args.model not in CONFIGS:
        raise BadInput(f"--model {args.model}: not a known model ({', '.join(CONFIGS)})")
    for name, (low, high) in RANGES.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:                      # NaN fails, too
            raise BadInput(f"--{name.replace('_', '-')} {value}: out of range, at least {low:g} and at most {high:g}")
    return args


def resolve(args, config, train_split, valid_split, precision, world):
    """Every setting of the run: the flags that were given, the stage's defaults for the others, and what follows from both. Raises BadInput when they cannot be followed."""
    defaults = (TINY if config == CONFIGS["tiny"] else STAGES)[args.stage]
    settings = argparse.Namespace(**{name: defaults.get(name) if value is None else value for name, value in vars(args).items()})
    if settings.batch_size % world:
        raise BadInput(f"--batch-size {settings.batch_size} does not divide by {world} processes; {max(1, settings.batch_size // world) * world} does")
    if settings.patch_dropout and (args.stage == "1" or isinstance(config.vision_layers, tuple)):
        raise BadInput(f"--patch-dropout {settings.patch_dropout}: there are no patches to leave out, for {'the vision tower is frozen' if args.stage == '1' else 'a ResNet has none'}")
    if not len(train_split):
        raise BadInput(f"{train_split.name}: no caption names a picture, so there are no pairs to train on")
    settings.model, settings.precision = checkpoint.name_of(config), precision
    settings.total_steps = args.max_steps or math.ceil(settings.epochs * len(train_split) / settings.batch_size)
    settings.epochs = None if args.max_steps else settings.epochs
    settings.lr = fitting_lr(settings.batch_size, config) if settings.lr is None else settings.lr
    # ten times in a run, in a fine-tune twenty, but not so often that it takes more than about a tenth of the time: a training pair costs as much as three pictures of the valid split
    settings.valid_every = args.valid_every or max(1, settings.total_steps // (20 if args.stage == "finetune" else 10), len(valid_split.image_ids) * 10 // (3 * settings.batch_size) if valid_split else 0)
    settings.average = bool(valid_split) and args.stage == "finetune" if args.average is None else args.average
    if valid_split is None and (settings.average or settings.patience):
        raise BadInput(f"--{'average' if settings.average else 'patience'}: there is no valid split to choose by; --valid-data names one, {'--no-average' if settings.average else '--patience 0'} does without")
    settings.warmup = min(settings.warmup, settings.total_steps // 2)
    changing = (f"stage {args.stage} trains the vision tower" if args.stage != "1" else f"--augment {args.augment} changes its pictures" if args.augment != "none" else
                f"{train_split.name} has new pictures in every epoch" if train_split.endless else None)
    if changing and args.features not in ("auto", "none"):
        raise BadInput(f"--features {args.features}: {changing}, so there are no features to keep; leave it out")
    if args.features == "none" or args.features == "auto" and (changing or (settings.total_steps - 1) * settings.batch_size < train_split.picture_count()):
        settings.features = None                                                # in one pass nothing would be saved
    elif args.features == "auto":
        settings.features = str(Path(args.out) / "features")
    settings.features_kept = True if settings.features else None                # they are rounded, so it is another run without; None, as in runs from before there were any
    settings.processes = world
    settings.norm_batch = min(settings.batch_size, world * (settings.micro_batch or settings.batch_size)) if isinstance(config.vision_layers, tuple) and args.stage != "1" else None
    settings.train_pairs, settings.valid_pairs = train_split.fingerprint(), valid_split.fingerprint() if valid_split else None
    return settings


if __name__ == "__main__":
    system.run(main)
