"""Training: both pretraining stages and fine-tuning (paper, sections 3.1 and 3.2) - one script, one step function.

    python train.py --stage 1 --vision-weights vision.pt                        # the painted data set, the tiny model
    torchrun --nproc_per_node 8 train.py --stage 1 --vision-weights vision.pt   # the same optimizer steps on 8 processes
    python train.py --stage 1 --vision-weights ViT-B-16.pt --text-weights chinese-roberta-wwm-ext --data coco-cn    # OpenAI's CLIP and a Chinese RoBERTa
    python train.py --stage 2 --init runs/stage1/last.pt
    python train.py --stage finetune --data coco-cn --init cn-clip-vit-b-16 --out runs/coco-cn     # released weights
    python train.py --stage 2 --data /path/to/folder --out runs/own             # your own pictures, from scratch

Stage 1 trains the text tower against the frozen vision tower; stage 2 and fine-tuning train both. --batch-size is the global batch, over all processes.
The same command run again continues where the run stopped. In --out: last.pt (to continue from), best.pt (highest recall on the valid split), metrics.jsonl,
settings.json.
"""
import argparse
import contextlib
import fcntl
import json
import math
import os
import resource
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import checkpoint
import data
from evaluate import embed_split, precision_of, retrieval_recall, start_processes
from loss import contrastive_loss
from model import CLIP, CONFIGS
from tokenizer import MASK, SEP

# What each stage sets when no flag does. The paper gives no figures for the two pretraining stages; these are the learning rates of Chinese CLIP.
# Fine-tuning: the paper's table 2, but for its 200 epochs, which were for 2,000 pairs. Other batch sizes want other learning rates.
STAGES = {
    "1":        {"lr": 1e-4, "batch_size": 1024, "epochs": 1.0, "warmup": 5000},
    "2":        {"lr": 2e-5, "batch_size": 1024, "epochs": 1.0, "warmup": 5000},
    "finetune": {"lr": 5e-5, "batch_size": 128, "epochs": 10.0, "warmup": 100},
}
# The tiny model learns from nothing, in minutes: steps as large as it bears.
TINY = {
    "1":        {"lr": 1e-3, "batch_size": 256, "epochs": 3.0, "warmup": 20},
    "2":        {"lr": 2e-3, "batch_size": 256, "epochs": 12.0, "warmup": 50},
    "finetune": {"lr": 5e-4, "batch_size": 256, "epochs": 20.0, "warmup": 50},
}
RANGES = {"batch_size": (2, 1e7), "epochs": (1e-6, 1e6), "max_steps": (0, 1e9), "lr": (0, 1e30), "warmup": (0, 1e9), "weight_decay": (0, 1e3), "mask_tokens": (0, 0.99),
          "seed": (0, 2**31 - 1), "workers": (0, 512), "valid_every": (0, 1e9), "save_every": (0, 1e9), "log_every": (1, 1e9)}
# May differ when a run continues, for they do not change the result. (The data may have moved: captions, picture names and the first picture have a fingerprint.)
FREE = {"out", "data", "data_root", "workers", "log_every", "save_every", "grad_checkpointing"}


def main():
    args = parse_args()
    device, rank, world = start_processes()

    # where the run starts: its own snapshot, else --init, else the towers of --vision-weights and --text-weights, else random weights
    last = Path(args.out) / "last.pt"
    towers = [file for file in (args.vision_weights, args.text_weights) if file is not None]
    if last.exists():
        source, state = last, checkpoint.read(last, mapped=False)               # mapped optimizer state would keep the old file on the disk after last.pt is replaced
    elif towers:
        source, state = " + ".join(towers), checkpoint.read_towers(args.vision_weights, args.text_weights, CONFIGS.get(args.model))
    elif args.init is not None:
        source, state = args.init, checkpoint.read(args.init)
    else:
        source, state = "random weights", {}
    config = CONFIGS[args.model] if args.model else checkpoint.config_of(state) if state else CONFIGS["tiny"]

    # data and settings
    train_split, valid_split = (data.open_split(args.data, split, args.data_root, config.context_length) for split in ("train", "valid"))
    autocast, precision = precision_of(args.precision, device)
    settings = resolve(args, config, train_split, valid_split, precision, world)
    total = settings.total_steps

    # model: the same weights on every process
    torch.manual_seed(settings.seed)
    model = CLIP(config)
    if settings.stage == "1":
        model.freeze_vision()
    model.set_grad_checkpointing(settings.grad_checkpointing)
    model.to(device).train()
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")     # not enabled, it passes everything through
    optimizer = make_optimizer(model, settings.weight_decay)

    run = Run(last.parent, vars(settings), rank, model, optimizer, scaler)
    first_step = run.resume(state) if source == last else 0
    if state:
        checkpoint.load_into(model, state, source)
    run.say(description(settings, model, train_split, valid_split, device, world, first_step, source, state))
    del state
    if first_step == total:
        return run.say(f"nothing to do: {run.summary(total)}. To train on from there: --init {last} with another --out")
    validate = lambda step: run.validated(step, retrieval_recall(*embed_split(model, valid_split, device, autocast, workers=settings.workers), valid_split.positives))
    run.start(first_step)
    signals = catch_signals(rank == 0)
    if first_step == 0:
        validate(0)
        run.snapshot(0)

    batches = data.Batches(len(train_split), settings.batch_size, settings.seed, first_step, total, rank, world)
    loader = data.training_loader(train_split, config.image_size, batches, settings.workers, pin_memory=device.type == "cuda")
    meter = Meter(first_step, total, settings.batch_size, device)
    for step, batch in enumerate(loader, first_step + 1):                       # `step` optimizer steps are done at the end of this round
        lr = set_lr(optimizer, learning_rate(step - 1, settings.lr, settings.warmup, total))
        torch.manual_seed(random_seed(settings.seed, step, rank))               # for dropout: a function of (seed, step, process), so never stored
        pixels, ids, image_keys, text_keys = (x.to(device, non_blocking=True) for x in batch)
        pixels, ids = prepare(pixels, ids, settings, step, rank, world)
        meter.losses.append(train_step(model, pixels, ids, image_keys, text_keys, optimizer, scaler, autocast))

        due = lambda every: step == total or (every and step % every == 0)
        if due(settings.log_every):
            run.log(meter.record(step, lr, model))
        if due(settings.valid_every):
            with meter.paused():
                validate(step)
        stopping = summed(torch.tensor(float(len(signals)))) > 0                # a signal to any process stops all of them after the same step
        if due(settings.valid_every) or due(settings.save_every) or stopping:
            run.snapshot(step)
        if stopping and step < total:
            run.say(f"stopped by a signal after step {step}; the same command continues from there")
            sys.exit(128 + (signals or [signal.SIGTERM])[0])
    run.say(run.summary(total))


def train_step(model, pixels, ids, image_keys, text_keys, optimizer, scaler, autocast):
    """One optimizer step on this process's share of the global batch: forward, loss, backward, step, clamp. Returns this process's share of the loss."""
    with autocast():
        image_embed, text_embed, scale = model(pixels, ids)                     # (B, D), (B, D), scalar
    loss = contrastive_loss(image_embed, text_embed, scale, image_keys, text_keys)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    sum_gradients(model)
    scaler.step(optimizer)
    scaler.update()
    model.clamp_logit_scale()
    return loss.detach()


def sum_gradients(model, bucket=2**25):
    """Add up the gradients of all processes (see loss.py for why the sum), in flat buckets of up to 32 M numbers. Frozen parameters have none and send none."""
    if not dist.is_initialized():
        return
    waiting = [p.grad for p in model.parameters() if p.grad is not None]
    while waiting:
        grads, size = [], 0
        while waiting and (not grads or size + waiting[-1].numel() <= bucket):
            grads.append(waiting.pop())
            size += grads[-1].numel()
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        for g, part in zip(grads, flat.split([g.numel() for g in grads])):
            g.copy_(part.view_as(g))


def prepare(pixels, ids, settings, step, rank, world):
    """uint8 pictures -> augmented and normalised, some tokens -> [MASK], on the same device.

    The random numbers of a pair depend on (seed, step, its place in the global batch): each process draws those of the whole batch and takes its own.
    """
    generator = torch.Generator().manual_seed(random_seed(settings.seed, step, -1))
    pixels = pixels.float() / 255
    if data.AUGMENT[settings.augment]:
        draws = 2 * torch.rand(settings.batch_size, data.DRAWS, generator=generator) - 1
        pixels = data.augment(pixels, draws.chunk(world)[rank], **data.AUGMENT[settings.augment])
    if settings.mask_tokens:
        draws = torch.rand(settings.batch_size, ids.shape[1], generator=generator).chunk(world)[rank].to(ids.device)
        ids = torch.where((draws < settings.mask_tokens) & (ids > SEP), MASK, ids)                  # never [PAD], [UNK], [CLS], [SEP]
    return data.normalize(pixels), ids


def make_optimizer(model, weight_decay):
    """AdamW over what trains. Matrices and tables decay; vectors (gains, biases, the class token) and the temperature do not. Betas as in CLIP: one pair for ViT, one for ResNet."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in params if p.ndim >= 2], "weight_decay": weight_decay}, {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0}]
    vit = isinstance(model.cfg.vision_layers, int)
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98 if vit else 0.999), eps=1e-6 if vit else 1e-8, fused=True)


def learning_rate(step, peak, warmup, total):
    """Rate of the step after `step` done ones: linear to the peak over `warmup` steps, then a cosine to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def random_seed(seed, step, rank):
    """One number for (seed, step, rank); rank -1 is what all processes share."""
    mixed = ((seed * 1_000_003 + step) * 65_537 + rank + 1) % 2**63
    return int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(mixed)))


# ---------------------------------------------------------------------------------------------------------------- the run's folder


class Run:
    """What a run leaves on disk: settings.json, metrics.jsonl, last.pt, best.pt. Only the first process writes; every process reads last.pt to continue."""

    def __init__(self, out, settings, rank, model, optimizer, scaler):
        self.out, self.settings, self.first = out, settings, rank == 0
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.best, self.best_step = -1.0, 0                                     # highest score on the valid split so far, and when

    def say(self, line):
        if self.first:
            print(line, flush=True)

    def resume(self, state):
        """Continue from a snapshot (all but the model's weights) -> optimizer steps done. Refuses, with the difference named, when the settings are not the same."""
        try:
            return self._resume(state)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:     # entries of the wrong kind, in as many ways
            raise data.BadInput(f"{self.out / 'last.pt'} is damaged: its entries are not those of a training snapshot ({type(error).__name__}: {error}); choose another --out") from None

    def _resume(self, state):
        last = self.out / "last.pt"
        missing = {"settings", "optimizer", "scaler", "best", "best_step", "step"} - state.keys()
        if missing:
            raise data.BadInput(f"{last} is no training snapshot (it lacks {', '.join(sorted(missing))}), so nothing can continue from it; choose another --out")
        before, now = state["settings"], self.settings
        changed = [f"{name} {before.get(name)}, now it is {now.get(name)}" for name in sorted((before.keys() | now.keys()) - FREE) if before.get(name) != now.get(name)]
        if changed:
            raise data.BadInput(f"{self.out} holds a run with {'; '.join(changed)}. Continue it with the same settings, choose another --out, "
                                f"or start a new run from it: --init {last} --out {self.out}-2")
        self.optimizer.load_state_dict(state["optimizer"])
        for p, moments in self.optimizer.state.items():                         # the fused kernel would write past the end of a moment that is too short
            if not all(moments[name].shape == p.shape and moments[name].isfinite().all() for name in ("exp_avg", "exp_avg_sq")):
                raise ValueError("the optimizer's moments do not fit the parameters")
        self.scaler.load_state_dict(state["scaler"])
        self.best, self.best_step = float(state["best"]), int(state["best_step"])
        if type(state["step"]) is not int or not 0 <= state["step"] <= self.settings["total_steps"]:
            raise ValueError(f"step {state['step']!r}")
        return state["step"]

    def start(self, step):
        """Prepare the folder. What a killed run had logged after its last snapshot goes: those steps come again."""
        if dist.is_initialized():
            dist.barrier()                                                      # everyone has read last.pt before it is written again
        if not self.first:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.out / "lock", "w")                                # held until this process ends, however it ends
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)               # not flock: the readers would inherit it and may outlive a killed run
        except (BlockingIOError, PermissionError):                              # held by another process (which of the two is up to the system)
            raise data.BadInput(f"{self.out}: another run is writing there; choose another --out") from None
        write = lambda name, text: checkpoint.write(self.out / name, lambda f: f.write(text.encode()))
        write("settings.json", json.dumps(self.settings, ensure_ascii=False, indent=1) + "\n")
        path, kept = self.out / "metrics.jsonl", []
        if path.exists() and step:
            kept = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if logged_step(line) <= step]
        write("metrics.jsonl", "".join(line + "\n" for line in kept))

    def log(self, record):
        """One line for the reader, the same figures in metrics.jsonl."""
        total = self.settings["total_steps"]
        if not math.isfinite(record["loss"]):
            raise data.BadInput(f"step {record['step']}: the loss is {record['loss']}; {self.out / 'last.pt'} holds the run before it. A lower --lr or --precision fp32 may help")
        self.say(f"step {record['step']:6}/{total} loss {record['loss']:.4f} lr {record['lr']:.2e} temperature {record['temperature']:.4f} "
                 f"{record['samples_per_s']:.0f} samples/s left {timedelta(seconds=int(record['seconds_left']))} memory {record['memory_mib']:.0f} MiB")
        self._append(record)

    def validated(self, step, recall):
        """Report recall on the valid split; the highest mean over both directions so far becomes best.pt."""
        score = sum(recall[way]["MR"] for way in recall) / 2
        figures = {way: " ".join(f"{k} {recall[way][k]:.1f}" for k in ("R@1", "R@5", "R@10")) for way in recall}
        self.say(f"step {step:6} valid  text-to-image {figures['text_to_image']}   image-to-text {figures['image_to_text']}   mean {score:.2f}"
                 + ("  best so far" if score > self.best else ""))
        self._append({"step": step, "valid": recall, "score": score})
        if score > self.best and self.first:
            checkpoint.save(self.out / "best.pt", self.model, step=step, recall=recall, settings=self.settings)
        if score > self.best:
            self.best, self.best_step = score, step

    def summary(self, total):
        """What the finished run leaves, and whether it learned anything."""
        return (f"finished. {self.out / 'best.pt'}: highest recall on the valid split, after step {self.best_step} of {total}"
                + ("" if self.best_step else " (that is the START: training did not raise the recall)") + f"; {self.out / 'last.pt'}: the last weights")

    def snapshot(self, step):
        """Write last.pt; never with weights that are not numbers, so what is there can always be continued."""
        if self.first:
            if not all(x.isfinite().all() for x in self.model.state_dict().values()):
                raise data.BadInput(f"step {step}: the weights are no longer finite; {self.out / 'last.pt'} holds the run before it. A lower --lr or --precision fp32 may help")
            checkpoint.save(self.out / "last.pt", self.model, step=step, best=self.best, best_step=self.best_step, settings=self.settings,
                            optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict())

    def _append(self, record):
        if self.first:
            with open(self.out / "metrics.jsonl", "a", encoding="utf-8") as f:
                f.write(json.dumps(record) + "\n")


def logged_step(line):
    """The step of a line of metrics.jsonl; infinity for a line that a crash has cut."""
    try:
        return json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return math.inf


class Meter:
    """Loss, speed, time left and memory since the last line."""

    def __init__(self, first_step, total, batch_size, device):
        self.first_step, self.total, self.batch_size, self.device = first_step, total, batch_size, device
        self.begin = self.tick = time.time()
        self.losses = []                                                        # this process's share of the loss, for each step since the last line

    def record(self, step, lr, model):
        loss = summed(torch.stack(self.losses).mean())                          # shares add up to the loss
        now = time.time()
        record = {"step": step, "loss": loss, "lr": lr, "temperature": 1 / model.logit_scale.exp().item(),
                  "samples_per_s": len(self.losses) * self.batch_size / (now - self.tick),
                  "seconds_left": (now - self.begin) / (step - self.first_step) * (self.total - step), "memory_mib": memory_mib(self.device)}
        self.tick, self.losses = now, []
        return record

    @contextlib.contextmanager
    def paused(self):
        """Time that does not count as training speed."""
        start = time.time()
        yield
        self.tick += time.time() - start


def summed(value):
    """The sum of a scalar tensor over all processes, as a number."""
    value = value.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(value)
    return value.item()


def memory_mib(device):
    """Peak memory so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def catch_signals(first):
    """SIGTERM and SIGINT (Ctrl-C) no longer end the process: they fill the list that is returned, and the loop stops after its step. A second one of the same kind ends it at once
    (of the same kind, since Ctrl-C under torchrun brings one of each)."""
    caught = []

    def catch(number, _):
        caught.append(number)
        if first:
            os.write(2, b"stopping after this step; press again to stop at once, without saving\n")
        signal.signal(number, signal.SIG_DFL)

    for s in (signal.SIGTERM, signal.SIGINT):
        signal.signal(s, catch)
    return caught


# ---------------------------------------------------------------------------------------------------------------- command line


def description(settings, model, train_split, valid_split, device, world, first_step, source, state):
    """The first lines of a run: what trains, on what, with which settings."""
    lines, count = [], lambda params: f"{sum(p.numel() for p in params):,}"
    if settings.data == "demo":
        lines.append("Training on the painted demo data set. For the real thing pass --data coco-cn, flickr30k-cn or a folder, and --model vit-b-16 or another size.")
    lines.append(f"stage {settings.stage}: {checkpoint.name_of(model.cfg)}, {count(model.parameters())} parameters, {count(p for p in model.parameters() if p.requires_grad)} of them train; "
                 f"starts from {source}")
    if state.get("skipped"):
        lines.append(f"left out: {state['skipped']}")
    if settings.stage == "1" and settings.init is None and settings.vision_weights is None:
        lines.append("note: the frozen vision tower has random weights, from which little can be learned; stage 1 is meant to start from a trained one (--vision-weights or --init)")
    lines.append(f"{train_split.name}: {len(train_split):,} pairs; {valid_split.name}: {len(valid_split.image_ids):,} pictures, {len(valid_split.texts):,} captions")
    if settings.batch_size > len(train_split):
        lines.append(f"warning: --batch-size {settings.batch_size} is more than the {len(train_split)} training pairs, so every step repeats pairs; a smaller one, with more --epochs, learns more")
    if len(valid_split.image_ids) < 50:
        lines.append(f"warning: {len(valid_split.image_ids)} pictures in {valid_split.name} are too few to choose a checkpoint well; 100 or more are better")
    if settings.stage == "finetune" and source == "random weights":
        lines.append("note: there is nothing to fine-tune in random weights; name a checkpoint, for example --init cn-clip-vit-b-16")
    lines.append(f"{settings.total_steps:,} step{'s' * (settings.total_steps > 1)} of {settings.batch_size:,} pairs; {world} process{'es' * (world > 1)}, {device.type}, {settings.precision}"
                 + (f"; continues after step {first_step:,}" if first_step else ""))
    lines.append("settings: " + " ".join(f"{k}={v}" for k, v in vars(settings).items()))
    return "\n".join(lines)


def parse_args(argv=None):
    row = lambda stage, model, values: f"  {stage:8}  {model:12}" + "".join(f"  {value:>10}" for value in values)
    defaults = "\n".join(["defaults:", row("stage", "model", ("--" + k.replace("_", "-") for k in STAGES["1"]))]
                         + [row(stage, model, sets[stage].values()) for stage in STAGES for model, sets in (("tiny", TINY), ("other models", STAGES))])
    parser = argparse.ArgumentParser(description="Train CE-CLIP.", epilog=f"{__doc__}\n{defaults}", formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=list(STAGES), required=True, help="1: vision tower frozen; 2: both towers; finetune: both, on your data")
    parser.add_argument("--model", help=f"{', '.join(CONFIGS)} (default: that of --init or --vision-weights, else tiny)")
    parser.add_argument("--data", default="demo", help=f"{', '.join([*data.NAMES, 'demo'])}, or a folder (default: demo)")
    parser.add_argument("--data-root", default="data", help="where the named data sets lie (default: data)")
    parser.add_argument("--init", help="a checkpoint to start from: a file, a folder, or the name of released weights (see checkpoint.py)")
    parser.add_argument("--vision-weights", help="a checkpoint whose vision tower and temperature to start from: OpenAI CLIP or any Chinese CLIP")
    parser.add_argument("--text-weights", help="a checkpoint whose text tower to start from: BERT, RoBERTa, RBT3 of Hugging Face or any Chinese CLIP (default: a fresh one)")
    parser.add_argument("--out", help="folder of the run (default: runs/stage1, runs/stage2 or runs/finetune)")
    parser.add_argument("--batch-size", type=int, help="pairs per optimizer step, over all processes")
    parser.add_argument("--epochs", type=float, help="passes over the training pairs")
    parser.add_argument("--max-steps", type=int, default=0, help="optimizer steps, instead of --epochs")
    parser.add_argument("--lr", type=float, help="peak learning rate")
    parser.add_argument("--warmup", type=int, help="steps to reach it (at most half the run)")
    parser.add_argument("--weight-decay", type=float, default=0.001, help="of matrices and tables (default: %(default)s)")
    parser.add_argument("--augment", choices=list(data.AUGMENT), default="none", help="(default: none) photo: small shifts and stretches, mild colours; drawing: bends, turns and recolours")
    parser.add_argument("--mask-tokens", type=float, default=0.0, help="share of a caption's tokens that become [MASK] in training (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation (default: 0)")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="auto: bf16 where the hardware has it, else fp16 on GPUs, else fp32")
    parser.add_argument("--grad-checkpointing", action="store_true", help="less memory, about a third more time")
    parser.add_argument("--workers", type=int, default=1, help="processes that read pictures, for each training process (default: 1)")
    parser.add_argument("--valid-every", type=int, default=0, help="steps between validations (default: a tenth of the run)")
    parser.add_argument("--save-every", type=int, default=0, help="steps between snapshots, beside those at each validation (default: none)")
    parser.add_argument("--log-every", type=int, default=10, help="steps between lines (default: 10)")
    args = parser.parse_args(argv)
    args.out = args.out or ("runs/finetune" if args.stage == "finetune" else f"runs/stage{args.stage}")
    if Path(args.out).exists() and not Path(args.out).is_dir():
        raise data.BadInput(f"--out {args.out}: it is a file; name a folder for the run")
    if args.init is not None and (args.vision_weights is not None or args.text_weights is not None):
        raise data.BadInput(f"--init {args.init}: it brings both towers, so neither --vision-weights nor --text-weights go with it")
    if args.model is not None and args.model not in CONFIGS:
        raise data.BadInput(f"--model {args.model}: not a known model ({', '.join(CONFIGS)})")
    for name, (low, high) in RANGES.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:                      # NaN fails, too
            raise data.BadInput(f"--{name.replace('_', '-')} {value}: out of range, at least {low:g} and at most {high:g}")
    return args


def resolve(args, config, train_split, valid_split, precision, world):
    """Every setting of the run: the flags that were given, the stage's defaults for the others, and what follows from both. Raises BadInput when they cannot be followed."""
    defaults = (TINY if config == CONFIGS["tiny"] else STAGES)[args.stage]
    settings = argparse.Namespace(**{name: defaults.get(name) if value is None else value for name, value in vars(args).items()})
    if settings.batch_size % world:
        raise data.BadInput(f"--batch-size {settings.batch_size} does not divide by {world} processes; {max(1, settings.batch_size // world) * world} does")
    if not len(train_split):
        raise data.BadInput(f"{train_split.name}: no caption names a picture, so there are no pairs to train on")
    settings.model, settings.precision = checkpoint.name_of(config), precision
    settings.total_steps = args.max_steps or math.ceil(settings.epochs * len(train_split) / settings.batch_size)
    settings.epochs = None if args.max_steps else settings.epochs
    settings.valid_every = args.valid_every or max(1, settings.total_steps // 10)
    settings.warmup = min(settings.warmup, settings.total_steps // 2)
    settings.train_data, settings.valid_data = train_split.fingerprint(), valid_split.fingerprint()
    return settings


if __name__ == "__main__":
    data.run(main)
