"""Training: both pretraining stages and fine-tuning (paper, sections 3.1 and 3.2).

    python train.py --stage 1 --vision-weights vision.pt            # demo data, the tiny model
    torchrun --nproc_per_node 8 train.py --stage 1 --vision-weights vision.pt   # the same steps
    python train.py --stage 1 --vision-weights ViT-B-16.pt \\
        --text-weights chinese-roberta-wwm-ext --data coco-cn  # as in the paper
    python train.py --stage 2 --init runs/stage1/last.pt
    python train.py --recipe small --data /path/to/folder --out runs/own    # on your images
    python train.py --recipe coco-cn-base --micro-batch 256         # fine-tune as in the paper
    torchrun --nnodes 8 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint host:29500 \\
        --max-restarts 3 train.py --stage 2 --data 'shards/{000000..020000}.tar' --micro-batch 256

Stage 1 trains the text tower against the frozen vision tower; stage 2 and fine-tuning train both.
--batch-size is the global batch, over all processes; --micro-batch is what one process embeds at a
time. Neither the micro-batch nor the number of processes changes the steps, apart from dropout
masks and rounding. (BatchNorm of a ResNet that trains sees micro-batch x processes images.)

The same command resumes a run that was killed, with the same result: bit for bit on CPUs, while
kernels of GPUs round differently each time. --out holds last.pt, the state to resume from, best.pt,
the weights with the highest recall on the valid split, and what support/run.py lists.
"""
import functools
import math
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from support import painter, system  # before torch: see support/__init__.py

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import checkpoint
import data
from evaluate import embed_split, encode_images, retrieval_recall
from loss import gather, matches, tiled_loss
from model import CLIP, CONFIGS, statistics_kept, to_device
from support.features import Features
from support.images import normalize
from support.meter import Meter
from support.processes import (all_gather_objects, all_reduce_max, precision_of, rank_and_world,
                               start_processes)
from support.run import Run
from support.settings import description, parse_args, resolve
from support.shards import is_pattern
from tokenizer import MASK, SEP


def main():
    args = parse_args(None, __doc__, list(data.NAMES), list(data.AUGMENT))
    device, rank, world_size = start_processes()
    find_data(args)  # before weights are downloaded
    last = Path(args.out) / "last.pt"
    stamp = system.stamp(last)
    source, state = starting_point(args, last)
    resuming = source == last
    config = checkpoint.config_of(state) if state else CONFIGS["tiny"]
    if args.model:
        config = CONFIGS[args.model]
    options = args.data_root, config.context_length, args.allow_outside
    train_split = data.open_split(args.data, "train", *options)
    valid_data = args.valid_data or (None if is_pattern(args.data) else args.data)
    valid_split = data.open_split(valid_data, "valid", *options) if valid_data else None
    autocast, precision = precision_of(args.precision, device)
    settings = resolve(args, config, train_split, valid_split, precision, world_size)
    before = {"step": 0} if resuming else {}  # without the steps of this run
    settings.seen = checkpoint.trained_on(state | before)

    model = build_model(config, settings).to(device).train()
    optimizer = make_optimizer(model, settings.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")  # else a no-op
    run = Run(last.parent, vars(settings), rank, len(train_split), model, optimizer, scaler)
    first_step = run.resume(state) if resuming else 0
    if state:
        checkpoint.load_into(model, state, source)
    run.agree(device=device.type, first_step=first_step, weights=checkpoint.fingerprint(model))
    run.say(description(settings, model, train_split, valid_split, device, source,
                        state.get("skipped"), first_step))
    del state
    if run.finished(first_step):
        return run.say("nothing to do: " + run.summary(first_step))

    image_embed = None  # of the valid split, kept in stage 1

    def validate(step, share=None):
        nonlocal image_embed
        if valid_split is None:
            return
        image_embed, text_embed = embed_split(model, valid_split, device, autocast,
                                              workers=settings.workers, image_embed=image_embed)
        run.validated(step, retrieval_recall(image_embed, text_embed, valid_split.positives), share)
        if settings.stage != "1":
            image_embed = None  # training changes them

    run.open_folder(first_step, stamp)
    features = None
    if settings.features:
        features = kept_features(run, settings, train_split, first_step, autocast)
    if first_step == 0:
        validate(0)
        run.keep_start()
        run.snapshot(0)
    step = train(run, settings, train_split, features, first_step, autocast, validate)
    if settings.average:
        run.try_averages(step, validate)
    run.say(run.summary(step))


def train(run, settings, split, features, first_step, autocast, validate):
    """Take the steps after `first_step` -> the number of the last one."""
    model, optimizer, total = run.model, run.optimizer, settings.total_steps
    device = model.logit_scale.device
    gradients = GradientSum([p for p in model.parameters() if p.requires_grad])
    batches = data.Batches(split, settings.batch_size, settings.seed, first_step, total,
                           *rank_and_world(), settings.micro_batch)
    meter = Meter(first_step, total, settings.batch_size, device)
    loader = meter.watched(data.training_loader(
        split, model.cfg.image_size, batches, settings.workers,
        pin_memory=device.type == "cuda", features=features))

    def pairs_of(step):
        """Where the pairs of a step's batch come from."""
        pairs = batches.pairs(step - 1, range(settings.batch_size))
        return [split.where(k) for k in pairs]

    step = saved = first_step  # the step of last.pt
    while not run.ended(step):
        head = run.signals.next_of(loader)  # its first micro-batch; None: a signal came
        if run.asked_to_stop():
            if step != saved:
                run.snapshot(step)
            run.stop_if_asked(step)
        step += 1
        lr = learning_rate(step - 1, settings.lr, settings.warmup, total)
        for group in optimizer.param_groups:
            group["lr"] = lr
        micro_batches, truth, bad = read_batch(chain([head], loader), batches.places, step,
                                               settings, model.cfg.context_length)
        run.report(step, bad)
        loss, norm = train_step(model, micro_batches, truth, gradients, optimizer, run.scaler,
                                autocast)
        run.after_step(step, loss, norm, pairs_of)

        if step == total or step % settings.log_every == 0:
            run.log(step, lr, meter)
        validating = step == total or step % settings.valid_every == 0
        if validating:
            with meter.paused():
                validate(step)
        if validating or run.snapshot_due(step):
            run.snapshot(step)
            saved = step
    return step


def train_step(model, micro_batches, truth, gradients, optimizer, scaler, autocast):
    """One optimizer step on this process's share of the global batch -> loss, gradient norm.

    Both are of the global batch and stay on the device. Nothing here waits for the device, so that
    the CPU can prepare the next step. truth: as loss.matches gives it, or None. When loss or
    gradient are not finite (with fp16: the gradient), the model stays as it is.

    Several micro-batches take two passes (gradient caching, arXiv 2101.06983). By the chain rule

        dloss/dθ = Σ_k  dloss/d(embeddings of k) · d(embeddings of k)/dθ

    The first factor needs all N pairs but no graph; the second needs the graph of one micro-batch
    at a time. With a single micro-batch the first pass keeps the graph.
    """
    statistics = [(x, x.clone()) for x in model.buffers()]  # of BatchNorm: forward changes them

    # 1. embed every micro-batch
    image_embeds, text_embeds = [], []
    for micro in micro_batches:
        with torch.set_grad_enabled(len(micro_batches) == 1):
            image_embed, text_embed = embed(model, micro, autocast)
        image_embeds.append(image_embed)
        text_embeds.append(text_embed)

    # 2. the loss and its gradient at the embeddings, over all processes
    scale = model.logit_scale.exp()
    own_images, own_texts = torch.cat(image_embeds).detach(), torch.cat(text_embeds).detach()
    loss, d_images, d_texts, d_scale = tiled_loss(own_images, own_texts, scale.detach(), truth)

    # 3. backward through each micro-batch; gradients add up over micro-batches and processes
    gradients.begin(loss)
    end = 0
    for micro in micro_batches:
        start, end = end, end + len(micro.ids)
        if len(micro_batches) > 1:  # the second pass
            with statistics_kept(model):
                image_embed, text_embed = embed(model, micro, autocast, not model.vision_frozen)
        outputs, d_outputs = [text_embed], [d_texts[start:end]]
        if not model.vision_frozen:
            outputs.append(image_embed)
            d_outputs.append(d_images[start:end])
        if end == len(own_texts):  # the last micro-batch
            outputs.append(scale)
            d_outputs.append(d_scale)
            gradients.last_pass()
        torch.autograd.backward(outputs, [scaler.scale(d) for d in d_outputs])
    loss = gradients.wait()

    # 4. step, clamp. With found_inf = 1 the fused AdamW changes nothing; an `if` would wait for the
    # device. (An enabled scaler replaces found_inf by its own.)
    scaler.unscale_(optimizer)
    norm = gradients.norm()
    finite = (loss + norm).isfinite()
    optimizer.found_inf = 1 - finite.float()
    scaler.step(optimizer)
    model.clamp_logit_scale()
    for x, before in statistics:
        x.copy_(torch.where(finite, x, before))
    scaler.update()  # fp16: lowers the scale after overflow
    return loss, norm


class MicroBatch(NamedTuple):
    """b pairs as they were read, on the CPU: all of a step at once may not fit the device.

    So train_step prepares the images of one micro-batch at a time, when it embeds them.
    """
    pixels: torch.Tensor                                    # (b, 3, R, R) uint8, or features (b, D)
    ids: torch.Tensor                                       # (b, L) int64
    seed: int = 0                                           # of its dropout and patch masks
    draws: torch.Tensor | None = None                       # (b, DRAWS) in -1..1, for data.augment
    augment: str = "none"                                   # a row of data.AUGMENT

    def images(self, device):
        """Augmented, normalised images (b, 3, R, R) on the device, or the features (b, D)."""
        pixels = self.pixels.to(device, non_blocking=True).float()
        if pixels.ndim == 2:
            return pixels
        pixels = pixels / 255
        if self.draws is not None:
            draws = to_device(self.draws, device)
            pixels = data.augment(pixels, draws, **data.AUGMENT[self.augment])
        return normalize(pixels)


def embed(model, micro, autocast, vision=True):
    """-> image embeddings (b, D), or None without `vision`, and text embeddings (b, D)."""
    torch.manual_seed(micro.seed)  # the second pass draws the same masks as the first
    images = micro.images(model.logit_scale.device) if vision else None
    with autocast():
        if vision and images.ndim == 4:  # not features, which are embeddings
            images = model.encode_image(images)
        return images, model.encode_text(micro.ids)


def read_batch(loader, places, step, settings, context_length):
    """This process's share of a step's batch -> micro-batches, truth, reports.

    places: the range of each micro-batch in the global batch. truth: as loss.matches gives it; None
    for --positives pair. reports: the pairs that could not be read, of all processes.
    """
    rank, _ = rank_and_world()
    image_draws, token_draws = random_draws(settings, step, context_length)
    micro_batches, image_keys, text_keys, reports = [], [], [], []
    for number, own_places in enumerate(places):
        rows = slice(own_places.start, own_places.stop)
        pixels, ids, keys_of_images, keys_of_texts, bad = data.own_memory(next(loader))
        if token_draws is not None:  # never mask [PAD], [UNK], [CLS], [SEP]
            masked = (token_draws[rows] < settings.mask_tokens) & (ids > SEP)
            ids = torch.where(masked, MASK, ids)
        draws = None if image_draws is None else image_draws[rows]
        seed = random_seed(settings.seed, step, rank, number)
        micro_batches.append(MicroBatch(pixels, ids, seed, draws, settings.augment))
        image_keys.append(keys_of_images)  # (b, M), M differs
        text_keys.append(keys_of_texts)  # (b,)
        reports += bad
    if all_reduce_max(len(reports)):
        reports = sum(all_gather_objects(reports), [])
    if settings.positives == "pair":
        return micro_batches, None, reports
    most = all_reduce_max(max(keys.shape[1] for keys in image_keys))
    image_keys = [F.pad(keys, (0, most - keys.shape[1]), value=-1) for keys in image_keys]
    truth = matches(gather(torch.cat(image_keys)), gather(torch.cat(text_keys)))
    return micro_batches, truth, reports


def random_draws(settings, step, context_length):
    """Random numbers of a step: (N, DRAWS) in -1..1 to augment, (N, L) in 0..1 to mask tokens.

    Each is None when nothing is augmented, or masked. A pair's numbers are those of its place in
    the batch, whatever the number of processes.
    """
    generator = torch.Generator().manual_seed(random_seed(settings.seed, step, -1))
    for_images = for_tokens = None
    if data.AUGMENT[settings.augment]:
        for_images = 2 * torch.rand(settings.batch_size, data.DRAWS, generator=generator) - 1
    if settings.mask_tokens:
        for_tokens = torch.rand(settings.batch_size, context_length, generator=generator)
    return for_images, for_tokens


def random_seed(seed, step, rank, micro=0):
    """A number for (seed, step, rank, micro-batch); rank -1: shared by all processes."""
    return int(np.random.SeedSequence([seed, step, rank + 1, micro]).generate_state(1)[0])


class GradientSum:
    """The parameters' gradients, summed over processes while the backward pass still runs.

    They stand in flat buckets, of which p.grad are views. In each step: begin; a backward pass for
    each micro-batch, whose gradients add up; before the last one last_pass; then wait. In the last
    pass a bucket is sent when its gradients and the buckets before it are complete. Backward goes
    from the last layer to the first; so do the buckets. The last entry of the first bucket is the
    loss. Why a sum: see loss.py. (DistributedDataParallel rounds its first iteration differently,
    so a resumed run would have other last bits.)
    """

    def __init__(self, params, most=2**23):
        """params: those that train. most: numbers in a bucket (2**23: 32 MiB), or one parameter."""
        self.buckets, self.counts, self.handles, self.sending = [], [], [], False
        groups, size = [], most  # so the first parameter opens a group
        for p in reversed(params):
            if size + p.numel() > most:
                groups.append([])
                size = 0
            groups[-1].append(p)
            size += p.numel()
        for number, group in enumerate(groups):
            sizes = [p.numel() for p in group]
            flat = group[0].new_zeros(sum(sizes) + 1, requires_grad=False)  # + 1: the loss
            for p, part in zip(group, flat[:-1].split(sizes)):
                p.grad = part.view_as(p)  # never set to None, so no zero_grad
                p.register_post_accumulate_grad_hook(functools.partial(self._done, number))
            self.buckets.append(flat)
            self.counts.append(len(group))

    def begin(self, loss):
        """Set all gradients to zero. loss: this process's share."""
        for flat in self.buckets:
            flat.zero_()
        self.buckets[0][-1] = loss

    def last_pass(self):
        """The next backward pass is the last one of the step."""
        self.sending, self.missing = dist.is_initialized(), list(self.counts)

    def _done(self, number, _):
        if self.sending:
            self.missing[number] -= 1
            while len(self.handles) < len(self.buckets) and self.missing[len(self.handles)] == 0:
                self._send()

    def _send(self):
        self.handles.append(dist.all_reduce(self.buckets[len(self.handles)], async_op=True))

    def wait(self):
        """The loss of the global batch, once all sums have arrived."""
        while self.sending and len(self.handles) < len(self.buckets):
            self._send()  # a parameter has no gradient
        for handle in self.handles:
            handle.wait()
        self.handles, self.sending = [], False
        return self.buckets[0][-1].clone()

    def norm(self):
        return torch.nn.utils.get_total_norm([flat[:-1] for flat in self.buckets])


def make_optimizer(model, weight_decay):
    """AdamW over what trains. Matrices and tables decay; vectors and the temperature do not.

    Betas and eps are CLIP's for ViT and for ResNet. Fused: train_step needs found_inf.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in params if p.ndim >= 2], "weight_decay": weight_decay},
              {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0}]
    is_vit = isinstance(model.cfg.vision_layers, int)
    betas, eps = ((0.9, 0.98), 1e-6) if is_vit else ((0.9, 0.999), 1e-8)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)


def learning_rate(step, peak, warmup, total):
    """Learning rate of step number `step`, from 0: linear warmup, then a cosine towards 0.

    peak (step + 1) / warmup, then peak (1 + cos(π (step - warmup) / (total - warmup))) / 2.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2


def find_data(args):
    """Raise BadInput when the data set is not there. The demo is painted on its first use."""
    demo = Path(args.data_root) / "demo"
    if args.data == "demo" and not demo.exists():
        painter.write_folder(demo, "demo", painter.DEMO)  # one process paints, the others wait
    data.all_names(args.data, args.data_root)


def starting_point(args, last):
    """The name of the starting weights, and what checkpoint.read gives of them.

    The run's own snapshot `last`, else the towers of --vision-weights and --text-weights, else
    --init, else random weights ({}).
    """
    if last.exists():
        return last, checkpoint.read(last, mapped=False)  # not mapped: it will be replaced
    towers = args.vision_weights, args.text_weights
    if towers != (None, None):
        names = " + ".join(name for name in towers if name is not None)
        return names, checkpoint.read_towers(*towers, CONFIGS.get(args.model))
    if args.init is not None:
        return args.init, checkpoint.read(args.init)
    return "random weights", {}


def build_model(config, settings):
    """A model with random weights, the same on every process."""
    torch.manual_seed(settings.seed)
    model = CLIP(config)
    if settings.stage == "1":
        model.freeze_vision()
    model.set_grad_checkpointing(settings.grad_checkpointing)
    if settings.compile:
        model.compile_vision()
    model.vision.patch_dropout = settings.patch_dropout
    return model


def kept_features(run, settings, split, first_step, autocast):
    """The training images' embeddings by the frozen tower; computes those that are missing."""
    model, device = run.model, run.model.logit_scale.device
    made_of = checkpoint.vision_facts(model) | {"data": split.fingerprint(),
                                                "precision": settings.precision}
    features = Features(settings.features, made_of, split.image_count(), model.cfg.embed_dim)

    def encode(batches):
        return encode_images(model, split.image, batches, device, autocast, settings.workers)

    features.complete(encode, run.say, lambda: run.stop_if_asked(first_step))
    return features


if __name__ == "__main__":
    system.run(main)
