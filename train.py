"""Training: both pretraining stages and fine-tuning (paper, sections 3.1 and 3.2) - one script, one step function.

    python train.py --stage 1 --vision-weights vision.pt                        # the painted data set, the tiny model
    torchrun --nproc_per_node 8 train.py --stage 1 --vision-weights vision.pt   # the same optimizer steps on 8 processes
    python train.py --stage 1 --vision-weights ViT-B-16.pt --text-weights chinese-roberta-wwm-ext --data coco-cn    # as in the paper
    python train.py --stage 2 --init runs/stage1/last.pt
    python train.py --recipe small --data /path/to/folder --out runs/own        # fine-tune released weights on your own images
    python train.py --recipe coco-cn-base --micro-batch 256                     # fine-tuning as in the paper: the recipes are listed below
    python train.py --stage 2 --data /path/to/folder --out runs/own             # your own images, from scratch
    torchrun --nnodes 8 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint host:29500 --max-restarts 3 \\
        train.py --stage 2 --data 'shards/{000000..020000}.tar' --micro-batch 256 …

Stage 1 trains the text tower against the frozen vision tower; stage 2 and fine-tuning train both. --batch-size is the global batch, over
all processes; --micro-batch is what a process holds at a time. Neither the number of processes nor the micro-batch changes the steps that
are taken (dropout masks and rounding apart; for a ResNet that trains, their product counts: BatchNorm sees so many images at a time).

The same command run again continues where the run stopped, after any kill, to the same result (bit for bit on CPUs; kernels of GPUs round
differently each time). In --out:

    last.pt                             to continue from; with --keep also step-00001000.pt, …
    best.pt                             highest recall on the valid split
    start.pt                            of a fine-tune: the weights before it
    metrics.jsonl, settings.json        every printed figure; every setting
    bad_samples.jsonl, nonfinite.json   pairs that could not be read; the batch whose loss or gradient was not finite
    features/                           of stage 1: the images' embeddings, computed once (features.py)
    lock                                keeps a second run out
"""
import functools
import math
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import checkpoint
import data
from evaluate import embed_split, encode_images, retrieval_recall
from loss import gather, matches, tiled_loss
from model import CLIP, CONFIGS, statistics_kept, to_device
from support import system
from support.features import Features
from support.images import normalize
from support.processes import all_gather_objects, all_reduce_max, precision_of, start_processes
from support.run import Meter, Run, asked_to_stop, catch_signals
from support.settings import description, parse_args, resolve
from support.shards import is_pattern
from support.system import BadInput
from tokenizer import MASK, SEP

AVERAGES = [share / 10 for share in range(1, 10)]                               # how far from the start to the end: what --average tries


def main():
    args = parse_args(__doc__, [*data.NAMES, *data.PAINTED], list(data.AUGMENT))
    device, rank, world = start_processes()

    data.all_names(args.data, args.data_root)                                   # is it there? Before weights are downloaded
    last = Path(args.out) / "last.pt"
    source, state = starting_point(args, last)
    config = CONFIGS[args.model] if args.model else checkpoint.config_of(state) if state else CONFIGS["tiny"]

    # data and settings
    train_split = data.open_split(args.data, "train", args.data_root, config.context_length)
    valid_data = args.valid_data or (None if is_pattern(args.data) else args.data)             # a pattern is one split, to train on
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

    valid_images = []                                                         # in stage 1 after the first validation: their embeddings

    def validate(step, share=None):
        if valid_split is not None:
            known = valid_images[0] if valid_images else None
            embeds = embed_split(model, valid_split, device, autocast, workers=settings.workers, image_embed=known)
            valid_images[:] = embeds[:1] if settings.stage == "1" else []     # the vision tower is frozen
            run.validated(step, retrieval_recall(*embeds, valid_split.positives), share)

    def stop_if_asked(step):
        if asked_to_stop(signals):
            run.stop(step, signals)                                             # raises SystemExit

    run.open_folder(first_step)
    signals = catch_signals(rank == 0)
    features = None
    if settings.features:
        features = Features(settings.features, model, train_split, settings.precision)
        encode = lambda batches: encode_images(model, train_split.image, batches, device, autocast, settings.workers)
        features.complete(encode, train_split, run.say, lambda: stop_if_asked(first_step))
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
    if all_reduce_max(len(bad)):
        bad = sum(all_gather_objects(bad), [])
    if positives == "pair":
        return None, bad
    most = all_reduce_max(max(keys.shape[1] for keys in image_keys))
    image_keys = torch.cat([F.pad(keys, (0, most - keys.shape[1]), value=-1) for keys in image_keys])           # (B, M)
    return matches(gather(image_keys), gather(torch.cat(text_keys))), bad


def agree(**facts):
    """Stop when the processes do not have the same settings, data, step and weights: on several nodes each must see the same files."""
    first, *others = all_gather_objects(facts)
    for rank, other in enumerate(others, 1):
        differ = [f"{name} {other[name]} where process 0 has {first[name]}" for name in first if other[name] != first[name]]
        if differ:
            raise BadInput(f"process {rank} has {'; '.join(differ)}: every node must see the same data, weights and --out "
                           "(a shared file system)")


def random_draws(settings, step, context_length):
    """The random numbers of a step, for the whole batch: for augmentation (N, DRAWS) in -1..1, and for masking tokens (N, L) in 0..1. A
    pair's are those of its place in the batch, so they do not depend on the number of processes."""
    generator = torch.Generator().manual_seed(random_seed(settings.seed, step, -1))
    for_images = for_tokens = None
    if data.AUGMENT[settings.augment]:
        for_images = 2 * torch.rand(settings.batch_size, data.DRAWS, generator=generator) - 1
    if settings.mask_tokens:
        for_tokens = torch.rand(settings.batch_size, context_length, generator=generator)
    return for_images, for_tokens


def prepare(pixels, ids, places, draws, settings, device):
    """A micro-batch as read, (b, 3, R, R) uint8 or features (b, D), and (b, L), with its places in the global batch -> on the device
    augmented and normalised images, or the features in float32; on the CPU, where the model packs them, captions with some tokens [MASK].
    """
    pixels = pixels.to(device, non_blocking=True).float() / (255 if pixels.ndim == 4 else 1)
    for_images, for_tokens = (x if x is None else x[places.start : places.stop] for x in draws)
    if for_images is not None:
        pixels = data.augment(pixels, to_device(for_images, device), **data.AUGMENT[settings.augment])
    if for_tokens is not None:
        ids = torch.where((for_tokens < settings.mask_tokens) & (ids > SEP), MASK, ids)             # never [PAD], [UNK], [CLS], [SEP]
    return normalize(pixels) if pixels.ndim == 4 else pixels, ids


def make_optimizer(model, weight_decay):
    """AdamW over what trains. Matrices and tables decay; vectors (gains, biases, the class token) and the temperature do not. Betas and eps
    as in CLIP: one pair for ViT, one for ResNet. train_step needs the fused kernel: the others know no found_inf."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in params if p.ndim >= 2], "weight_decay": weight_decay},
              {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0}]
    vit = isinstance(model.cfg.vision_layers, int)
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98 if vit else 0.999), eps=1e-6 if vit else 1e-8, fused=True)


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


if __name__ == "__main__":
    system.run(main)
