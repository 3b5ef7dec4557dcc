"""Training: both pretraining stages and fine-tuning (paper, sections 3.1 and 3.2) - one script, one step function.

    python train.py --stage 1                                                   # the painted data set, the tiny model
    torchrun --nproc_per_node 8 train.py --stage 1                              # the same optimizer steps on 8 processes
    python train.py --stage 2 --init runs/stage1/last.pt
    python train.py --stage finetune --data coco-cn --init my.pt --out runs/coco-cn
    python train.py --stage 2 --data /path/to/folder --model vit-b-16           # your own pictures, from scratch

Stage 1 trains the text tower against the frozen vision tower; stage 2 and fine-tuning train both. --batch-size is the global batch, over all processes.
The same command run again continues where the run stopped. In --out: last.pt (to continue from), best.pt (highest recall on the valid split), metrics.jsonl,
settings.json.
"""
import argparse
import contextlib
import json
import math
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import checkpoint
import data
from evaluate import embed_split, plain_warnings, precision_of, retrieval_recall, start_processes
from loss import contrastive_loss
from model import CLIP, CONFIGS
from tokenizer import MASK, SEP

# What each stage sets when no flag does. The paper gives no figures for the two pretraining stages; these are the learning rates of Chinese CLIP.
# Fine-tuning: the paper's table 2 (its 200 epochs are for 2,000 pairs). Other batch sizes want other learning rates.
STAGES = {
    "1":        {"lr": 1e-4, "batch_size": 1024, "epochs": 1.0, "warmup": 5000},
    "2":        {"lr": 2e-5, "batch_size": 1024, "epochs": 1.0, "warmup": 5000},
    "finetune": {"lr": 5e-5, "batch_size": 128, "epochs": 10.0, "warmup": 100},
}
# The tiny model learns from nothing, in minutes: steps as large as it bears.
TINY = {
    "1":        {"lr": 1e-3, "batch_size": 256, "epochs": 3.0, "warmup": 20},
    "2":        {"lr": 2e-3, "batch_size": 256, "epochs": 18.0, "warmup": 50},
    "finetune": {"lr": 5e-4, "batch_size": 256, "epochs": 20.0, "warmup": 50},
}
FREE = ("workers", "log_every", "save_every")                                   # settings that cannot change the result: they may differ when a run continues


def main():
    args = parse_args()
    plain_warnings()
    device, rank, world = start_processes()
    say = print if rank == 0 else (lambda *_, **__: None)
    if args.batch_size % world:
        raise data.BadInput(f"--batch-size {args.batch_size} does not divide by {world} processes; the nearest that does is {args.batch_size // world * world or world}")

    # data
    config = CONFIGS[args.model] if args.model else checkpoint.config_of(checkpoint.read(args.init))
    with warnings_of_one(rank):
        train_split = data.open_split(args.data, "train", args.data_root, config.context_length)
        valid_split = data.open_split(args.data, "valid", args.data_root, config.context_length)
    if not len(train_split):
        raise data.BadInput(f"{train_split.name}: no caption names a picture, so there are no pairs to train on")
    total = args.max_steps or math.ceil(args.epochs * len(train_split) / args.batch_size)
    every = args.valid_every or max(1, total // 10)
    args.warmup = min(args.warmup, total // 2)

    # model: every process starts from the same weights
    torch.manual_seed(args.seed)
    model = CLIP(config)
    if args.init:
        checkpoint.load_into(model, checkpoint.read(args.init), args.init)
    if args.stage == "1":
        model.freeze_vision()
    model.set_grad_checkpointing(args.grad_checkpointing)
    model.to(device).train()
    autocast, precision = precision_of(args.precision, device)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")     # off: every call passes through
    optimizer = make_optimizer(model, args.weight_decay)

    # the run so far
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    settings = vars(args) | {"precision": precision, "total_steps": total}
    first_step, best = resume(out, settings, model, optimizer, scaler)
    describe(say, args, model, train_split, valid_split, total, precision, device, world, first_step)
    if first_step >= total:
        return say(f"this run is finished: {out / 'best.pt'} has the highest recall on {valid_split.name}, {out / 'last.pt'} the last weights")
    barrier()                                                                   # all have read last.pt before the first process may write it
    if rank == 0:
        write_text(out / "settings.json", json.dumps(settings, ensure_ascii=False, indent=1) + "\n")
        keep_metrics_until(out / "metrics.jsonl", first_step)

    stop = []                                                                   # filled by a signal: finish the step, save, leave
    for s in (signal.SIGTERM, signal.SIGINT):
        signal.signal(s, lambda number, _: stop.append(number))

    def validate(step):
        nonlocal best
        recall = retrieval_recall(*embed_split(model, valid_split, device, autocast, workers=args.workers), valid_split.positives)
        score = sum(recall[way]["MR"] for way in recall) / 2                    # the mean recall over both directions chooses `best`
        t, i = recall["text_to_image"], recall["image_to_text"]
        say(f"step {step:6} valid  text-to-image R@1 {t['R@1']:.1f} R@5 {t['R@5']:.1f} R@10 {t['R@10']:.1f}   image-to-text R@1 {i['R@1']:.1f} R@5 {i['R@5']:.1f} R@10 {i['R@10']:.1f}"
            f"   mean {score:.2f}{'  best so far' if score > best else ''}", flush=True)
        if rank == 0:
            log(out, {"step": step, "valid": recall, "score": score})
            if score > best:
                checkpoint.save(out / "best.pt", model, step=step, recall=recall, settings=settings)
        best = max(best, score)

    def snapshot(step):
        if rank == 0:
            checkpoint.save(out / "last.pt", model, step=step, best=best, settings=settings, optimizer=optimizer.state_dict(), scaler=scaler.state_dict())

    if first_step == 0:
        validate(0)
        snapshot(0)
    batches = data.Batches(len(train_split), args.batch_size, args.seed, first_step, total, rank, world)
    loader = data.training_loader(train_split, config.image_size, batches, args.workers, pin_memory=device.type == "cuda")
    begin, tick, seen, losses = time.time(), time.time(), 0, []
    for step, batch in enumerate(loader, first_step + 1):                       # step = number of optimizer steps when this one is done
        lr = set_lr(optimizer, learning_rate(step - 1, args.lr, args.warmup, total))
        torch.manual_seed(random_seed(args.seed, step, rank))                   # dropout: a function of (seed, step, process), so nothing needs to be stored
        pixels, ids, image_keys, text_keys = (x.to(device, non_blocking=True) for x in batch)
        pixels, ids = prepare(pixels, ids, args, step, rank, world)
        losses.append(train_step(model, pixels, ids, image_keys, text_keys, optimizer, scaler, autocast))
        seen += args.batch_size

        if step % args.log_every == 0 or step == total:
            loss = summed(torch.stack(losses).mean())
            if not math.isfinite(loss):
                raise data.BadInput(f"step {step}: the loss is {loss}; {out / 'last.pt'} holds the run before it. A lower --lr or --precision fp32 may help")
            now = time.time()
            record = {"step": step, "loss": loss, "lr": lr, "temperature": 1 / model.logit_scale.exp().item(), "samples_per_s": seen / (now - tick),
                      "seconds_left": (now - begin) / (step - first_step) * (total - step), "memory_mib": memory_mib(device)}
            say(f"step {step:6}/{total} loss {loss:.4f} lr {lr:.2e} temperature {record['temperature']:.4f} {record['samples_per_s']:.0f} samples/s "
                f"left {clock(record['seconds_left'])} memory {record['memory_mib']:.0f} MiB", flush=True)
            if rank == 0:
                log(out, record)
            tick, seen, losses = now, 0, []
        if step % every == 0 or step == total:
            start = time.time()
            validate(step)
            snapshot(step)
            tick += time.time() - start
        elif args.save_every and step % args.save_every == 0:
            snapshot(step)
        if any_process(stop) if step % args.log_every == 0 or world == 1 else False:
            snapshot(step)
            say(f"stopped by a signal after step {step}; the same command continues from there")
            break
    if dist.is_initialized():
        dist.destroy_process_group()
    if stop:
        sys.exit(128 + stop[0])


def train_step(model, pixels, ids, image_keys, text_keys, optimizer, scaler, autocast):
    """One optimizer step on this process's share of the global batch: forward, loss, backward, step, clamp. Returns this process's share of the loss."""
    with autocast():
        image_embed, text_embed = model.encode_image(pixels), model.encode_text(ids)                # (B, D) each
    loss = contrastive_loss(image_embed, text_embed, model.logit_scale.exp(), image_keys, text_keys)
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


def prepare(pixels, ids, args, step, rank, world):
    """uint8 pictures -> augmented and normalised, some tokens -> [MASK], on the same device.

    The random numbers of a pair depend on (seed, step, its place in the global batch): each process draws those of the whole batch and takes its own.
    """
    generator = torch.Generator().manual_seed(random_seed(args.seed, step, -1))
    pixels = pixels.float() / 255
    if data.AUGMENT[args.augment]:
        draws = 2 * torch.rand(args.batch_size, data.DRAWS, generator=generator) - 1
        pixels = data.augment(pixels, draws.chunk(world)[rank], data.AUGMENT[args.augment])
    if args.mask_tokens:
        draws = torch.rand(args.batch_size, 512, generator=generator).chunk(world)[rank][:, : ids.shape[1]].to(ids.device)
        ids = torch.where((draws < args.mask_tokens) & (ids > SEP), MASK, ids)                      # never [PAD], [CLS], [SEP]
    return data.normalize(pixels), ids


def make_optimizer(model, weight_decay):
    """AdamW over what trains. Matrices and tables decay; gains, biases and the temperature do not. Betas as in CLIP: one pair for ViT, one for ResNet."""
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
    return int(torch.randint(2**62, (), generator=torch.Generator().manual_seed((seed * 1_000_003 + step) * 65_537 + rank + 1)))


# ---------------------------------------------------------------------------------------------------------------- the run's state on disk


def resume(out, settings, model, optimizer, scaler):
    """Continue from out/last.pt if it is there -> (steps done, best score so far). Refuses, with the difference named, when the settings are not the same."""
    path = out / "last.pt"
    if not path.exists():
        return 0, -1.0
    state = checkpoint.read(path)
    before = state["settings"]
    for name in sorted((settings.keys() | before.keys()) - set(FREE)):
        if settings.get(name) != before.get(name):
            raise data.BadInput(f"{out} holds a run with {name} = {before.get(name)}, now it is {settings.get(name)}; use the same settings to continue it, or another --out")
    checkpoint.load_into(model, state, path)
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    return state["step"], state["best"]


def keep_metrics_until(path, step):
    """Drop what a killed run had logged after its last snapshot: those steps come again."""
    if path.exists():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if complete(line) and json.loads(line)["step"] <= step]
        write_text(path, "".join(line + "\n" for line in (lines if step else [])))


def complete(line):
    return line.startswith("{") and line.endswith("}")                          # a kill may cut the last line


def write_text(path, text):
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def log(out, record):
    with open(out / "metrics.jsonl", "a", encoding="utf-8") as f:
        f.write(json.dumps(record) + "\n")


# ---------------------------------------------------------------------------------------------------------------- small things


def summed(value):
    """The sum of a scalar over all processes, as a float."""
    value = value.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(value)
    return value.item()


def any_process(stop):
    return summed(torch.tensor(float(len(stop)))) > 0 if not torch.cuda.is_available() or not dist.is_initialized() else summed(torch.tensor(float(len(stop)), device="cuda")) > 0


def barrier():
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def warnings_of_one(rank):
    """Only the first process warns."""
    import warnings
    with warnings.catch_warnings():
        if rank:
            warnings.simplefilter("ignore")
        yield


def memory_mib(device):
    """Peak memory: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def clock(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


def describe(say, args, model, train_split, valid_split, total, precision, device, world, first_step):
    """The first lines of a run: what it trains, on what, with which settings."""
    if args.data == "demo":
        say("training on the painted demo data set. For the real thing pass --data coco-cn, flickr30k-cn or a folder, and --model vit-b-16 or another size.")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"stage {args.stage}: {checkpoint.name_of(model.cfg)}, {sum(p.numel() for p in model.parameters()):,} parameters, {trained:,} of them train"
        + (f"; starts from {args.init}" if args.init else "; starts from random weights"))
    if args.stage == "1" and not args.init:
        say("the frozen vision tower has random weights: stage 1 is meant to start from a trained one (--init)")
    say(f"{train_split.name}: {len(train_split):,} pairs; {valid_split.name}: {len(valid_split.image_ids):,} pictures, {len(valid_split.texts):,} captions")
    if args.batch_size > len(train_split):
        say(f"warning: the batch of {args.batch_size} is larger than the {len(train_split)} training pairs, so every step repeats pairs; a --batch-size below that is better")
    say(f"{total:,} steps of {args.batch_size:,} pairs on {world} process{'es' if world > 1 else ''}, {device.type}, {precision}"
        + (f"; continues after step {first_step:,}" if first_step else ""))
    say("settings: " + " ".join(f"{k}={v}" for k, v in vars(args).items()), flush=True)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Train CE-CLIP.", epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=list(STAGES), required=True)
    parser.add_argument("--model", help=f"{', '.join(CONFIGS)} (default: that of --init, else tiny)")
    parser.add_argument("--data", default="demo", help=f"{', '.join([*data.NAMES, 'demo'])}, or a folder (default: demo)")
    parser.add_argument("--data-root", default="data", help="where the named data sets lie (default: data)")
    parser.add_argument("--init", help="a checkpoint to start from")
    parser.add_argument("--out", help="folder of the run (default: runs/stage1, runs/stage2 or runs/finetune)")
    parser.add_argument("--batch-size", type=int, help="pairs per optimizer step, over all processes")
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--max-steps", type=int, default=0, help="optimizer steps, instead of --epochs")
    parser.add_argument("--lr", type=float, help="peak learning rate")
    parser.add_argument("--warmup", type=int, help="steps to reach it")
    parser.add_argument("--weight-decay", type=float, default=0.001)
    parser.add_argument("--augment", choices=list(data.AUGMENT), default="none")
    parser.add_argument("--mask-tokens", type=float, default=0.0, help="share of a caption's tokens that become [MASK] in training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="auto: bf16 where the hardware has it, else fp16 on GPUs, else fp32")
    parser.add_argument("--grad-checkpointing", action="store_true", help="less memory, about a third more time")
    parser.add_argument("--workers", type=int, default=1, help="processes that read pictures, for each training process")
    parser.add_argument("--valid-every", type=int, default=0, help="steps between validations (default: a tenth of the run)")
    parser.add_argument("--save-every", type=int, default=0, help="steps between snapshots, beside those at each validation")
    parser.add_argument("--log-every", type=int, default=10, help="steps between lines")
    args = parser.parse_args(argv)
    if args.model is None and not args.init:
        args.model = "tiny"
    if args.model and args.model not in CONFIGS:
        raise data.BadInput(f"--model {args.model}: not a known model ({', '.join(CONFIGS)})")
    model = args.model or checkpoint.name_of(checkpoint.config_of(checkpoint.read(args.init)))
    for name, value in (TINY if model == "tiny" else STAGES)[args.stage].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.out = args.out or f"runs/{'finetune' if args.stage == 'finetune' else 'stage' + args.stage}"
    return args


if __name__ == "__main__":
    data.run(main)
