"""Training: both pretraining stages and fine-tuning (paper, sections 3.1 and 3.2) - one script, one step function.

    python train.py --stage 1 --vision-weights vision.pt                        # the painted data set, the tiny model
    torchrun --nproc_per_node 8 train.py --stage 1 --vision-weights vision.pt   # the same optimizer steps on 8 processes
    python train.py --stage 1 --vision-weights ViT-B-16.pt --text-weights chinese-roberta-wwm-ext --data coco-cn    # as in the paper
    python train.py --stage 2 --init runs/stage1/last.pt
    python train.py --recipe small --data /path/to/folder --out runs/own        # fine-tune released weights on your own pictures
    python train.py --recipe coco-cn-base --micro-batch 256                     # fine-tuning as in the paper: the recipes are listed below
    python train.py --stage 2 --data /path/to/folder --out runs/own             # your own pictures, from scratch
    torchrun --nnodes 8 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint host:29500 --max-restarts 3 \\
        train.py --stage 2 --data 'shards/{000000..020000}.tar' --micro-batch 256 …

Stage 1 trains the text tower against the frozen vision tower; stage 2 and fine-tuning train both. --batch-size is the global batch, over
all processes; --micro-batch is what a process holds at a time. Neither the number of processes nor the micro-batch changes the steps that
are taken (dropout masks and rounding apart; for a ResNet that trains, their product counts: BatchNorm sees so many pictures at a time).

The same command run again continues where the run stopped, after any kill, to the same result (bit for bit on CPUs; kernels of GPUs round
differently each time). In --out:

    last.pt                             to continue from; with --keep also step-00001000.pt, …
    best.pt                             highest recall on the valid split
    start.pt                            of a fine-tune: the weights before it
    metrics.jsonl, settings.json        every printed figure; every setting
    bad_samples.jsonl, nonfinite.json   pairs that could not be read; the batch whose loss or gradient was not finite
    features/                           of stage 1: the pictures' embeddings, computed once (features.py)
    lock                                keeps a second run out
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

# What each stage sets when no flag does. The paper gives no figures for the two pretraining stages; the learning rates are those of Chinese
# CLIP (from memory), the batch is a smaller one.
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
_TABLE_2 = {"stage": "finetune", "weight_decay": 0.001,                         # in all of the paper's fine-tuning;
            "positives": "pair", "average": False}                              # its loss is the plain one, and it averages no weights
_BASE, _LARGE = _TABLE_2 | {"init": "cn-clip-vit-b-16"}, _TABLE_2 | {"init": "cn-clip-vit-l-14"}
_PAPER = "the paper's tables 2 and 3"
_PRETRAINING = "arXiv 2211.01335, the batch as published there, learning rate and warmup from memory; the paper itself gives none"
RECIPES = {
    "coco-cn-base":       (_PAPER, _BASE | {"data": "coco-cn", "batch_size": 12800, "lr": 5e-5, "epochs": 13.0, "warmup": 6}),
    "coco-cn-large":      (_PAPER, _LARGE | {"data": "coco-cn", "batch_size": 4096, "lr": 6e-5, "epochs": 7.0, "warmup": 5}),
    "flickr30k-cn-base":  (_PAPER, _BASE | {"data": "flickr30k-cn", "batch_size": 7680, "lr": 5e-5, "epochs": 5.0, "warmup": 20}),
    "flickr30k-cn-large": (_PAPER, _LARGE | {"data": "flickr30k-cn", "batch_size": 4096, "lr": 2e-5, "epochs": 6.0, "warmup": 20}),
    "ap-id": ("the paper's table 2, whose batch is that of one card",
              _BASE | {"data": "ap-id", "batch_size": 128, "lr": 5e-5, "epochs": 200.0, "warmup": 100, "valid_every": 150}),
    "stage1": (_PRETRAINING, {"stage": "1", "batch_size": 32768, "lr": 1e-4, "warmup": 5000, "weight_decay": 0.001}),
    "stage2": (_PRETRAINING, {"stage": "2", "batch_size": 32768, "lr": 2e-5, "warmup": 5000, "weight_decay": 0.001}),
    "small": ("our own measurements on a few thousand pairs, see the README",
              {"stage": "finetune", "init": "cn-clip-vit-b-16", "batch_size": 128, "epochs": 40.0, "warmup": 50, "augment": "photo",
               "patience": 10}),
}
# A batch and a learning rate that fit each other when fine-tuning: for the tiny model by our own measurements, for the others by the
# paper's table 3 (Flickr30K-CN, base).
FITTING = {"tiny": (128, 2e-3), "other models": (7680, 5e-5)}
AVERAGES = [share / 10 for share in range(1, 10)]                               # how far from the start to the end: what --average tries
RANGES = {"batch_size": (2, 1e7), "micro_batch": (1, 1e7), "epochs": (1e-6, 1e6), "max_steps": (0, 1e9), "lr": (0, 1e30),
          "warmup": (0, 1e9), "weight_decay": (0, 1e3), "mask_tokens": (0, 0.99), "patch_dropout": (0, 0.99), "max_bad": (0, 1),
          "seed": (0, 2**31 - 1), "workers": (0, 512), "valid_every": (0, 1e9), "save_every": (0, 1e9), "save_minutes": (0, 1e6),
          "keep": (1, 1e4), "log_every": (1, 1e9), "patience": (0, 1e6)}


def main():
    args = parse_args()
    device, rank, world = start_processes()

    data.all_names(args.data, args.data_root)                                   # is it there? Before weights are downloaded
    last = Path(args.out) / "last.pt"
    source, state = starting_point(args, last)
    config = CONFIGS[args.model] if args.model else checkpoint.config_of(state) if state else CONFIGS["tiny"]

    # data and settings
    train_split = data.open_split(args.data, "train", args.data_root, config.context_length)
    valid_data = args.valid_data or (None if data.is_pattern(args.data) else args.data)             # a pattern is one split, to train on
    valid_split = data.open_split(valid_data, "valid", args.data_root, config.context_length) if valid_data else None
    autocast, precision = precision_of(args.precision, device)
    settings = resolve(args, config, train_split, valid_split, precision, world)
    settings.seen = checkpoint.seen_by(state | {"step": 0} if source == last else state)            # what the weights had seen before this run
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
        best = last.parent / "best.pt"
        return run.say(f"nothing to do: {run.summary(first_step)}. To train on from there: --init {best} with another --out")

    valid_pictures = []                                                         # in stage 1 after the first validation: their embeddings

    def validate(step, share=None):
        if valid_split is not None:
            known = valid_pictures[0] if valid_pictures else None
            embeds = embed_split(model, valid_split, device, autocast, workers=settings.workers, image_embed=known)
            valid_pictures[:] = embeds[:1] if settings.stage == "1" else []     # the vision tower is frozen
            run.validated(step, retrieval_recall(*embeds, valid_split.positives), share)

    def stop_if_asked(step):
        if asked_to_stop(signals):
            run.stop(step, signals)                                             # raises SystemExit

    run.open_folder(first_step)
    signals = catch_signals(rank == 0)
    features = None
    if settings.features:
        features = Features(settings.features, model, train_split, settings.precision)
        features.complete(model, train_split, device, autocast, settings.workers, run.say, lambda: stop_if_asked(first_step))
    if first_step == 0:
        validate(0)
        run.keep_start()
        run.snapshot(0)

    batches = data.Batches(train_split, settings.batch_size, settings.seed, first_step, total, rank, world, settings.micro_batch)
    meter = Meter(first_step, total, settings, len(train_split), device)
    pin = device.type == "cuda"
    loader = data.training_loader(train_split, config.image_size, batches, settings.workers, pin_memory=pin, features=features)
    loader = meter.watched(loader)
    step = first_step                                                           # optimizer steps done
    while not run.ended(step):
        step += 1
        lr = set_lr(optimizer, learning_rate(step - 1, settings.lr, settings.warmup, total))
        # Each micro-batch of this process: its tensors, and its places in the global batch.
        pixels, ids, image_keys, text_keys, bad = zip(*(data.own_memory(next(loader)) for _ in batches.places))
        truth, bad = exchange(image_keys, text_keys, sum(bad, []), settings.positives)
        run.report(step, bad, min(step * settings.batch_size, len(train_split)), len(train_split))
        draws = random_draws(settings, step, ids[0].shape[1])
        micro_batches = [functools.partial(prepare, *micro, draws, settings, device) for micro in zip(pixels, ids, batches.places)]
        # Functions of (seed, step, process, micro-batch), so never stored.
        seeds = [random_seed(settings.seed, step, rank, k) for k in range(len(micro_batches))]
        loss, norm = train_step(model, micro_batches, seeds, truth, gradients, optimizer, scaler, autocast)
        # The batch's pairs are listed only when something was wrong with them.
        pairs = lambda step=step: [train_split.where(k) for _, k in batches.pairs(step - 1, range(settings.batch_size))]
        run.took(step, loss, norm, pairs)

        due = lambda every: step == total or (every and step % every == 0)
        if due(settings.log_every):
            run.look()
            run.log(meter.record(step, lr, model, run))
        if due(settings.valid_every):
            with meter.paused():
                validate(step)
        stopping = asked_to_stop(signals)
        long_ago = run.minutes_since_snapshot() >= (settings.save_minutes or math.inf)
        if due(settings.valid_every) or due(settings.save_every) or long_ago or stopping:
            run.snapshot(step)
        if stopping and not run.ended(step):
            run.stop(step, signals)

    if settings.average:
        for share in AVERAGES:
            run.load_average(share)
            validate(step, share)
            stop_if_asked(step)
        run.load_average(1.0)                                                   # the end
        run.averaged = True
        run.snapshot(step)
    run.say(run.summary(step))


def starting_point(args, last):
    """Where the run starts: its own snapshot `last`, else --init, else the towers of --vision-weights and --text-weights, else random
    weights -> its name, what checkpoint.read gives."""
    towers = [file for file in (args.vision_weights, args.text_weights) if file is not None]
    if last.exists():
        return last, checkpoint.read(last, mapped=False)                        # not mapped: it will be replaced
    if towers:
        return " + ".join(towers), checkpoint.read_towers(args.vision_weights, args.text_weights, CONFIGS.get(args.model))
    if args.init is not None:
        return args.init, checkpoint.read(args.init)
    return "random weights", {}


def train_step(model, micro_batches, seeds, truth, gradients, optimizer, scaler, autocast):
    """One optimizer step on this process's share of the global batch, however many micro-batches it takes
    -> loss of the global batch, norm of its gradient; both on the device, and nothing here waits for it: while it computes this step, the
    next one is prepared.

    micro_batches: functions that give (pixels or image embeddings, ids) of b pairs each. seeds: those of their dropout and patch masks.
    truth: as loss.matches gives it, or None. When loss or gradient are not finite, the model stays as it is.

    Why several micro-batches need two passes (gradient caching, arXiv 2101.06983): by the chain rule

        dloss/dθ = Σ_k  dloss/d(embeddings of k) · d(embeddings of k)/dθ

    The first factor needs the embeddings of all N pairs, but no graph; the second needs a graph, but of b pairs at a time. So each
    micro-batch is embedded without a graph, and once more, alike, when the first factor is known. With one micro-batch the graph of the
    first pass is kept.
    """
    statistics = [(x, x.clone()) for x in model.buffers()]                      # BatchNorm's, which the forward pass changes

    def embed(k, vision=True):                                                  # -> (b, D) or None, (b, D)
        torch.manual_seed(seeds[k])
        pixels, ids = micro_batches[k]()
        with autocast():
            image_embed = None
            if vision:
                image_embed = pixels if pixels.ndim == 2 else model.encode_image(pixels)            # ndim 2: embeddings already
            return image_embed, model.encode_text(ids)

    # 1. embed every micro-batch
    single = len(micro_batches) == 1
    with torch.set_grad_enabled(single):
        image_embeds, text_embeds = zip(*(embed(k) for k in range(len(micro_batches))))

    # 2. the loss, and its gradient at the embeddings, over all processes
    scale = model.logit_scale.exp()
    own_images, own_texts = torch.cat(image_embeds).detach(), torch.cat(text_embeds).detach()       # (B, D) each
    loss, d_image, d_text, d_scale = tiled_loss(own_images, own_texts, scale.detach(), truth)

    # 3. backward through each micro-batch; parameter gradients add up over them and over the processes
    gradients.begin(loss)
    sizes = [len(x) for x in text_embeds]
    for k, (d_i, d_t) in enumerate(zip(d_image.split(sizes), d_text.split(sizes))):
        if single:
            image_embed, text_embed = image_embeds[0], text_embeds[0]
        else:
            with statistics_kept(model):
                image_embed, text_embed = embed(k, vision=not model.vision_frozen)
        roots = [(text_embed, d_t)]                                             # where gradients enter the graph, and which
        if not model.vision_frozen:
            roots += [(image_embed, d_i)]
        if k == len(micro_batches) - 1:
            roots += [(scale, d_scale)]
            gradients.send_when_done()
        torch.autograd.backward([x for x, _ in roots], [scaler.scale(d) for _, d in roots])
        del image_embed, text_embed, roots
    loss = gradients.wait()

    # 4. step, clamp. A step that is not finite must not be taken; but to ask the device whether it is would be to wait for it. So the
    # answer stays there: found_inf = 1 makes the fused AdamW leave weights, moments and step count alone. (An enabled scaler puts its own
    # in this place.)
    scaler.unscale_(optimizer)
    norm = gradients.norm()
    finite = (loss + norm).isfinite()
    optimizer.found_inf = 1 - finite.float()
    scaler.step(optimizer)
    model.clamp_logit_scale()
    for x, before in statistics:
        x.copy_(torch.where(finite, x, before))
    scaler.update()                                                             # fp16: a lower scale after what was not finite
    return loss, norm


class GradientSum:
    """The parameters' gradients, in flat buckets (p.grad are views of them) that are summed over all processes while the backward pass
    still runs; for why the sum, see loss.py.

    A step: begin; a backward pass for each micro-batch, whose gradients add up in the buckets; before the last one send_when_done; in it
    each parameter tells `_done`, and a bucket is sent as soon as it and those before it are complete, in the same order on every process;
    wait. Backward passes go from the last layers to the first, so the buckets hold the parameters in that order. Frozen parameters are in
    none. The loss travels in the first bucket, so it costs no message of its own.
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
            flat = group[0].new_zeros(sum(p.numel() for p in group) + 1, requires_grad=False)       # + 1: for the loss
            for p, part in zip(group, flat[:-1].split([p.numel() for p in group])):
                p.grad = part.view_as(p)                                        # never set it to None again, as optimizer.zero_grad would
                p.register_post_accumulate_grad_hook(functools.partial(self._done, number))
            self.buckets.append(flat)

    def begin(self, loss):
        """Before the first backward pass of a step: all zero. `loss`: this process's share of it."""
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


def exchange(image_keys, text_keys, bad, positives):
    """Before a step, between all processes: lists of the micro-batches' keys -> the truth of the global batch (loss.py, matches; None for
    --positives pair, where as in the paper each pair is its own only match), and all reports of bad pairs."""
    if largest(len(bad)):
        bad = sum(from_all(bad), [])
    if positives == "pair":
        return None, bad
    most = largest(max(keys.shape[1] for keys in image_keys))
    image_keys = torch.cat([F.pad(keys, (0, most - keys.shape[1]), value=-1) for keys in image_keys])           # (B, M)
    return matches(gather(image_keys), gather(torch.cat(text_keys))), bad


def agree(**facts):
    """Stop when the processes do not have the same settings, data, step and weights: on several nodes each must see the same files."""
    first, *others = from_all(facts)
    for rank, other in enumerate(others, 1):
        differ = [f"{name} {other[name]} where process 0 has {first[name]}" for name in first if other[name] != first[name]]
        if differ:
            raise BadInput(f"process {rank} has {'; '.join(differ)}: every node must see the same data, weights and --out "
                           "(a shared file system)")


def random_draws(settings, step, context_length):
    """The random numbers of a step, for the whole batch: for augmentation (N, DRAWS) in -1..1, and for masking tokens (N, L) in 0..1. A
    pair's are those of its place in the batch, so they do not depend on the number of processes."""
    generator = torch.Generator().manual_seed(random_seed(settings.seed, step, -1))
    for_pictures = for_tokens = None
    if data.AUGMENT[settings.augment]:
        for_pictures = 2 * torch.rand(settings.batch_size, data.DRAWS, generator=generator) - 1
    if settings.mask_tokens:
        for_tokens = torch.rand(settings.batch_size, context_length, generator=generator)
    return for_pictures, for_tokens


def prepare(pixels, ids, places, draws, settings, device):
    """A micro-batch as read, (b, 3, R, R) uint8 or features (b, D), and (b, L), with its places in the global batch -> on the device
    augmented and normalised pictures, or the features in float32; on the CPU, where the model packs them, captions with some tokens [MASK].
    """
    pixels = pixels.to(device, non_blocking=True).float() / (255 if pixels.ndim == 4 else 1)
    for_pictures, for_tokens = (x if x is None else x[places.start : places.stop] for x in draws)
    if for_pictures is not None:
        pixels = data.augment(pixels, to_device(for_pictures, device), **data.AUGMENT[settings.augment])
    if for_tokens is not None:
        ids = torch.where((for_tokens < settings.mask_tokens) & (ids > SEP), MASK, ids)             # never [PAD], [UNK], [CLS], [SEP]
    return data.normalize(pixels) if pixels.ndim == 4 else pixels, ids


def make_optimizer(model, weight_decay):
    """AdamW over what trains. Matrices and tables decay; vectors (gains, biases, the class token) and the temperature do not. Betas and eps
    as in CLIP: one pair for ViT, one for ResNet. train_step needs the fused kernel: the others know no found_inf."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in params if p.ndim >= 2], "weight_decay": weight_decay},
              {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0}]
    vit = isinstance(model.cfg.vision_layers, int)
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98 if vit else 0.999), eps=1e-6 if vit else 1e-8, fused=True)


def fitting_lr(batch_size, config):
    """A learning rate for fine-tuning with batches of this size. Small batches bear small rates only: with Adam the rate that fits grows
    with the square root of the batch (arXiv 2205.10287), so from FITTING's batch N and rate r it is r sqrt(batch_size / N)."""
    batch, lr = FITTING["tiny" if config == CONFIGS["tiny"] else "other models"]
    return lr * math.sqrt(batch_size / batch)


def learning_rate(step, peak, warmup, total):
    """Of step number `step`, from 0: linear to the peak over `warmup` steps, peak (step + 1) / warmup; then a cosine towards 0,
    peak (1 + cos(π (step - warmup) / (total - warmup))) / 2."""
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


# ---------------------------------------------------------------------------------------- command line


def description(settings, model, train_split, valid_split, device, world, first_step, source, state):
    """The first lines of a run: what trains, on what, with which settings; and what is odd about them."""
    lines, count = [], lambda params: f"{sum(p.numel() for p in params):,}"
    plural = lambda n, one, many: one if n == 1 else many
    if settings.data == "demo":
        lines.append("Training on the painted demo data set. For the real thing pass --data coco-cn, flickr30k-cn or a folder, "
                     "and --model vit-b-16 or another size.")
    if settings.recipe:
        source_of, recipe = RECIPES[settings.recipe]
        shown = lambda names: " ".join(f"{name}={getattr(settings, name)}" for name in names)
        other = [name for name, value in recipe.items() if getattr(settings, name) != value]
        lines.append(f"recipe {settings.recipe} ({source_of}): {shown(name for name in recipe if name not in other)}"
                     + (f"; otherwise than there: {shown(other)}" if other else ""))
    training = count(p for p in model.parameters() if p.requires_grad)
    lines.append(f"stage {settings.stage}: {checkpoint.name_of(model.cfg)}, {count(model.parameters())} parameters, "
                 f"{training} of them train; starts from {source}")
    if state.get("skipped"):
        lines.append(f"left out: {state['skipped']}")
    valid = "no validation, so no best.pt (--valid-data names what to validate on)"
    if valid_split:
        valid = f"{valid_split.name}: {len(valid_split.image_ids):,} pictures, {len(valid_split.texts):,} captions"
    lines.append(f"{train_split.name}: {len(train_split):,} pairs; {valid}")
    lines += remarks(settings, model.cfg, train_split, valid_split, world, source)
    batch = f"{settings.batch_size:,} pairs"
    if settings.micro_batch and settings.micro_batch < settings.batch_size // world:
        batch += f" ({math.ceil(settings.batch_size // world / settings.micro_batch):,} micro-batches a process)"
    lines.append(f"{settings.total_steps:,} {plural(settings.total_steps, 'step', 'steps')} of {batch}; "
                 f"{world} {plural(world, 'process', 'processes')}, {device.type}, {settings.precision}"
                 + (f"; validated every {settings.valid_every:,} {plural(settings.valid_every, 'step', 'steps')}" if valid_split else "")
                 + (f"; continues after step {first_step:,}" if first_step else ""))
    lines.append("settings: " + " ".join(f"{k}={v}" for k, v in vars(settings).items()))
    return "\n".join(lines)


def remarks(settings, config, train_split, valid_split, world, source):
    """What is odd about a run's settings, a line each."""
    lines, share, pairs = [], settings.batch_size // world, len(train_split)
    if settings.stage == "1" and settings.init is None and settings.vision_weights is None:
        lines.append("note: the frozen vision tower has random weights, from which little can be learned; stage 1 is meant to start from "
                     "a trained one (--vision-weights or --init)")
    if settings.batch_size > pairs:
        lines.append(f"warning: --batch-size {settings.batch_size} is more than the {pairs} training pairs, so every step repeats pairs; "
                     "a smaller one, with more --epochs, learns more")
    if valid_split and len(valid_split.image_ids) < 50:
        lines.append(f"warning: {len(valid_split.image_ids)} pictures in {valid_split.name} are too few to choose a checkpoint well; "
                     "100 or more are better")
    if settings.stage == "finetune" and source == "random weights":
        lines.append("note: there is nothing to fine-tune in random weights; name a checkpoint, for example --init cn-clip-vit-b-16")
    fitting = fitting_lr(settings.batch_size, config)
    if settings.stage == "finetune" and not fitting / 10 <= settings.lr <= 3 * fitting:
        too = "large: it may destroy what the start knows" if settings.lr > fitting else "small: little will be learned"
        fits = round(settings.batch_size * (settings.lr / fitting) ** 2)        # the batch that this rate fits
        larger = ""
        if settings.batch_size < fits <= pairs:
            larger = f"; so does --batch-size {fits} (--micro-batch: what a device holds at a time)"
        lines.append(f"warning: for batches of {settings.batch_size} a learning rate of {settings.lr:g} is {too}; "
                     f"--lr {fitting:.1e} fits{larger}")
    if settings.norm_batch is not None and settings.norm_batch < settings.batch_size:
        lines.append(f"note: BatchNorm in this ResNet sees {settings.norm_batch:,} pictures at a time (--micro-batch x processes), "
                     "not the whole batch; a ViT has none")
    if not settings.micro_batch and share > 1024:
        lines.append(f"note: {share:,} pairs at a time need much memory; --micro-batch 256 needs less and takes the same steps")
    return lines


def parse_args(argv=None):
    shown = lambda value: f"{value:g}" if isinstance(value, float) else value
    flag = lambda name, value: f"--no-{name}" if value is False else f"--{name.replace('_', '-')} {shown(value)}"
    row = lambda stage, model, values: f"  {stage:8}  {model:12}" + "".join(f"  {value or 'by batch':>10}" for value in values)
    epilog = [__doc__, "recipes:"]
    for name, (source, sets) in RECIPES.items():
        epilog += [f"  {name:18}  {' '.join(flag(*item) for item in sets.items())}", f"{'':22}({source})"]
    epilog += ["", "defaults:", row("stage", "model", ("--" + name.replace("_", "-") for name in STAGES["1"]))]
    epilog += [row(stage, model, sets[stage].values()) for stage in STAGES for model, sets in (("tiny", TINY), ("other models", STAGES))]
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description="Train CE-CLIP.", epilog="\n".join(epilog), formatter_class=as_written)
    add = parser.add_argument
    add("--stage", choices=list(STAGES), help="1: vision tower frozen; 2: both towers; finetune: both, on your data")
    add("--recipe", choices=list(RECIPES), help="the settings of a table of the paper, or of ours, listed below; flags override them")
    add("--model", help=f"{', '.join(CONFIGS)} (default: that of --init or --vision-weights, else tiny)")
    add("--data",
        help=f"{', '.join([*data.NAMES, *data.PAINTED])}, a folder, or a pattern of tar shards like "
             f"'shards/{{000000..020000}}.tar' (default: demo)")
    add("--valid-data",
        help="what to validate on: the valid split of a name or folder, or all of a pattern (default: that of --data; with a "
             "pattern of shards, nothing)")
    add("--data-root", default="data", help="where the named data sets lie (default: data)")
    add("--init", help="a checkpoint to start from: a file, a folder, or the name of released weights (see checkpoint.py)")
    add("--vision-weights", help="a checkpoint whose vision tower and temperature to start from: OpenAI CLIP or any Chinese CLIP")
    add("--text-weights",
        help="a checkpoint whose text tower to start from: BERT, RoBERTa, RBT3 of Hugging Face or any Chinese CLIP (default: a fresh one)")
    add("--out", help="folder of the run (default: runs/stage1, runs/stage2 or runs/finetune)")
    add("--batch-size", type=int, help="pairs per optimizer step, over all processes")
    add("--micro-batch", type=int,
        help="pairs that a process holds at a time; several make up its share of the batch (default: the whole share)")
    add("--epochs", type=float, help="passes over the training pairs")
    add("--max-steps", type=int, default=0, help="optimizer steps, instead of --epochs")
    add("--lr", type=float, help="peak learning rate (default of finetune: one that fits the batch)")
    add("--warmup", type=int, help="steps to reach it (at most half the run)")
    add("--weight-decay", type=float, default=0.001, help="of matrices and tables (default: %(default)s)")
    add("--augment", choices=list(data.AUGMENT), default="none",
        help="(default: none) photo: small shifts and stretches, mild colours; drawing: bends, turns and recolours")
    add("--positives", choices=("all", "pair"), default="all",
        help="what counts as right in a batch: all captions of a picture and all pictures of a caption (default), or as in "
             "the paper its pair alone")
    add("--features", metavar="DIR", default="auto",
        help="stage 1 without augmentation: where the pictures' embeddings are kept, which are computed once; runs may share "
             "it. none: nowhere (default: OUT/features, when pictures come more than once)")
    add("--mask-tokens", type=float, default=0.0, help="share of a caption's tokens that become [MASK] in training (default: 0)")
    add("--patch-dropout", type=float, default=0.0,
        help="share of a picture's patches that a ViT leaves out in training: less time and memory (default: 0)")
    add("--max-bad", type=float, default=0.01,
        help="share of the pairs that may be unreadable and are replaced; above it the run stops (default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights, order and augmentation (default: 0)")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
        help="auto: bf16 where the hardware has it, else fp16 on GPUs, else fp32")
    add("--grad-checkpointing", action="store_true", help="less memory, about a third more time")
    add("--compile", action="store_true",
        help="torch.compile for the vision tower: for GPUs, and a minute at the start; on CPUs it gains nothing")
    add("--workers", type=int, default=1, help="processes that read pictures, for each training process (default: 1)")
    add("--valid-every", type=int, default=0,
        help="steps between validations (default: a tenth of the run, of a fine-tune a twentieth, more where they would take "
             "much of the time)")
    add("--patience", type=int, default=0, help="stop after so many validations without a higher recall (default: 0, never)")
    add("--average", action=argparse.BooleanOptionalAction,
        help="at the end try averages of the start and the end, too, as the best weights (default: when fine-tuning)")
    add("--save-every", type=int, default=0, help="steps between snapshots, beside those at each validation (default: none)")
    add("--save-minutes", type=float, default=15.0, help="minutes between snapshots, beside those (default: %(default)g; 0: none)")
    add("--keep", type=int, default=1, help="how many of the latest snapshots to keep (default: 1, last.pt)")
    add("--log-every", type=int, default=10, help="steps between lines (default: 10)")
    args = parser.parse_args(argv)
    if args.max_steps and args.epochs is not None:
        raise BadInput(f"--max-steps {args.max_steps} --epochs {args.epochs:g}: pass one of them")
    if args.recipe:                                                             # once more: its values as defaults, so that flags win
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
    """Every setting of the run: the flags that were given, the stage's defaults for the others, and what follows from both. Raises BadInput
    when they cannot be followed."""
    defaults = (TINY if config == CONFIGS["tiny"] else STAGES)[args.stage]
    settings = argparse.Namespace(**{name: defaults.get(name) if value is None else value for name, value in vars(args).items()})
    resnet, pairs = isinstance(config.vision_layers, tuple), len(train_split)
    if settings.batch_size % world:
        fits = max(1, settings.batch_size // world) * world
        raise BadInput(f"--batch-size {settings.batch_size} does not divide by {world} processes; {fits} does")
    if settings.patch_dropout and (args.stage == "1" or resnet):
        why = "the vision tower is frozen" if args.stage == "1" else "a ResNet has none"
        raise BadInput(f"--patch-dropout {settings.patch_dropout}: there are no patches to leave out, for {why}")
    if not pairs:
        raise BadInput(f"{train_split.name}: no caption names a picture, so there are no pairs to train on")
    settings.model, settings.precision = checkpoint.name_of(config), precision
    settings.total_steps = args.max_steps or math.ceil(settings.epochs * pairs / settings.batch_size)
    settings.epochs = None if args.max_steps else settings.epochs
    settings.lr = fitting_lr(settings.batch_size, config) if settings.lr is None else settings.lr
    settings.warmup = min(settings.warmup, settings.total_steps // 2)
    settings.valid_every = args.valid_every or often_enough(settings, valid_split)
    settings.average = bool(valid_split) and args.stage == "finetune" if args.average is None else args.average
    if valid_split is None and (settings.average or settings.patience):
        flag, without = ("average", "--no-average") if settings.average else ("patience", "--patience 0")
        raise BadInput(f"--{flag}: there is no valid split to choose by; --valid-data names one, {without} does without")
    settings.features = features_folder(args, settings, train_split)
    settings.features_kept = True if settings.features else None                # they are rounded, so without them it is another run
    settings.processes = world
    settings.norm_batch = None                                                  # pictures that BatchNorm sees at a time
    if resnet and args.stage != "1":
        settings.norm_batch = min(settings.batch_size, world * (settings.micro_batch or settings.batch_size))
    settings.train_pairs, settings.valid_pairs = train_split.fingerprint(), valid_split.fingerprint() if valid_split else None
    return settings


def often_enough(settings, valid_split):
    """Steps between validations: a tenth of the run, of a fine-tune a twentieth; but not so few that validation takes more than about a
    tenth of the time, where a training pair costs as much as three pictures of the valid split."""
    affordable = len(valid_split.image_ids) * 10 // (3 * settings.batch_size) if valid_split else 0
    return max(1, settings.total_steps // (20 if settings.stage == "finetune" else 10), affordable)


def features_folder(args, settings, train_split):
    """Where the pictures' embeddings are kept; None where they would change or not be used again."""
    changing = None
    if args.stage != "1":
        changing = f"stage {args.stage} trains the vision tower"
    elif args.augment != "none":
        changing = f"--augment {args.augment} changes its pictures"
    elif train_split.endless:
        changing = f"{train_split.name} has new pictures in every epoch"
    if args.features not in ("auto", "none"):
        if changing:
            raise BadInput(f"--features {args.features}: {changing}, so there are no features to keep; leave it out")
        return args.features
    one_pass = (settings.total_steps - 1) * settings.batch_size < train_split.picture_count()       # in which nothing would be saved
    return None if args.features == "none" or changing or one_pass else str(Path(args.out) / "features")


if __name__ == "__main__":
    system.run(main)
