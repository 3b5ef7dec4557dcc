"""How fast it is: against the limit that the hardware sets, and against cn_clip.

    python -m tools.bench           # vit-b-16 on this device, fp32 and --precision auto
    python -m tools.bench --peer    # with cn_clip (pip install --no-deps cn_clip==1.6.0 six)
    python -m tools.bench --model vit-l-14 --batch-size 256 --rows image,stage2 --peer

One table: images, captions or pairs a second; their share of the fastest large matrix product of
this device in the same run; with --peer the ratio to cn_clip's rate, from the same weights and
batches in the same process (tests/test_bench.py compares the results). Each call runs once to warm
up, then in rounds, ours and the peer's in turn; figures are medians over the rounds. The rows:

    image, text         embeddings, as in an evaluation; 64 captions at a time
    stage1, stage2      a training step with a frozen vision tower, and of both towers
    features            a step of stage 1 from kept features of the images
    cached              a step of stage 2 in micro-batches: gradient caching embeds everything twice
    loss                the loss of a large batch, and its gradient at the embeddings
    tokenizer, loading  captions -> token ids; JPEG files -> training pixels, on one core
    evaluation          recall in both directions, from embeddings
    memory              peak memory of processes that only take steps of stage 2, and their rate
"""
import argparse
import concurrent.futures
import copy
import functools
import json
import multiprocessing
import random
import statistics
import tempfile
import time
from collections import namedtuple
from pathlib import Path

from support import system                                  # before torch: see support/__init__.py

import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import checkpoint
import evaluate
import train
from loss import contrastive_loss, tiled_loss
from model import CLIP, CONFIGS
from support.images import normalize, training_pixels
from support.meter import memory_mib
from support.processes import precision_of
from support.system import BadInput
from tokenizer import CLS, PAD, SEP, Tokenizer
from tools import landscapes

STEPS = {                                                   # row -> its name, how the step is made
    "stage1": ("stage 1 step", {"frozen": True}),
    "features": ("stage 1 step, features kept", {"frozen": True, "features": True}),
    "stage2": ("stage 2 step", {}), "cached": ("stage 2 step in micro-batches", {"cached": True}),
}
BY_PRECISION = ("image", "text", *STEPS, "memory")
ROWS = ("image", "text", *STEPS, "loss", "tokenizer", "loading", "evaluation", "memory")

# A row of the table. count: images, captions or pairs of a call; ours, theirs: calls that compute
# it our and the peer's way; flops: operations that a call needs, 0 if they are not counted
Row = namedtuple("Row", "what count ours theirs precision flops", defaults=(None, "", 0.0))


# ---- measuring


def flops(call):
    """Floating-point operations of the matrix products, convolutions and attention of a call.

    FlopCounterMode counts what runs, so attention over captions counts their padding. It sees the
    products of attention in the kernel MATH only.
    """
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def peak(device, dtype, seconds=2.0):
    """Operations a second of the fastest large matrix product in `dtype`, within `seconds`."""
    best = 0.0
    for n in ((4096, 8192, 16384) if device.type == "cuda" else (1024, 2048, 4096)):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        end = time.perf_counter() + seconds / 3
        while time.perf_counter() < end:
            best = max(best, 2 * n**3 / timed(lambda: a @ b, device))
    return best


def timed(call, device):
    """Seconds of one call, the device's work included."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def measured(row, device, rounds):
    """-> seconds of each round for ours, and for the peer's (empty without it)."""
    sides = [call for call in (row.ours, row.theirs) if call]
    for call in sides:
        call()
    seconds = [], []
    for _ in range(rounds):
        for call, side in zip(sides, seconds):
            side.append(timed(call, device))
    return seconds


# ---- the rows


class Bench:
    """A model with random weights, the peer's with the same ones, a batch; makes the rows."""

    def __init__(self, name, batch_size, device, peer, micro_batches=4, compiled=False):
        self.cfg, self.device = CONFIGS[name], device
        self.micro_batches, self.compiled = micro_batches, compiled
        torch.manual_seed(0)
        self.model = CLIP(self.cfg).to(device).eval()
        self.peer = Peer(name, self.model, device) if peer else None
        B, L, R = batch_size, self.cfg.context_length, self.cfg.image_size
        self.pixels = torch.randint(0, 256, (B, 3, R, R), dtype=torch.uint8)
        self.ids = torch.randint(200, self.cfg.vocab_size, (B, L))
        lengths = torch.randint(14, 27, (B, 1))             # 20 on average, with [CLS] and [SEP]
        self.ids[:, 0] = CLS
        self.ids[torch.arange(L) == lengths - 1] = SEP
        self.ids[torch.arange(L) >= lengths] = PAD
        one = self.normalized(self.pixels[:1])
        self.image_flops = flops(lambda: self.model.encode_image(one))
        self.text_flops = flops(lambda: self.model.encode_text(self.ids)) / B

    def normalized(self, pixels):
        return normalize(pixels.to(self.device).float() / 255)

    def row(self, name, precision):
        if name in STEPS:
            what, how = STEPS[name]
            return self.step(what, precision, **how)
        if name in ("image", "text"):
            return self.encoding(name, precision)
        return getattr(self, name)(precision)

    def encoding(self, what, precision):
        inputs, flops = self.normalized(self.pixels), self.image_flops
        if what == "text":                                  # 64 at a time: cn_clip's default
            inputs, flops = self.ids.repeat(64, 1)[:64].to(self.device), self.text_flops

        @torch.no_grad()
        def run(model, autocast):
            model.eval()
            with autocast():
                return getattr(model, f"encode_{what}")(inputs)

        autocast, name = precision_of(precision, self.device, evaluating=True)
        theirs = self.peer and (lambda: run(self.peer.model, self.peer.autocast(precision)))
        return Row(f"{what} encoding, {name}", len(inputs), lambda: run(self.model, autocast),
                   theirs, name, len(inputs) * flops)

    def step(self, what, precision, frozen=False, features=False, cached=False):
        """A training step, from uint8 images and ids on the CPU to new weights.

        The learning rate is 0, so the weights stay those of the peer; a step costs the same.
        """
        autocast, name = precision_of(precision, self.device)
        model = copy.deepcopy(self.model)                   # its gradients stay in GradientSum
        if frozen:
            model.freeze_vision()
        if self.compiled:
            model.compile_vision()
        model.train()
        optimizer = train.make_optimizer(model, 0.001)
        gradients = train.GradientSum([p for p in model.parameters() if p.requires_grad])
        scaler = torch.amp.GradScaler(self.device.type, enabled=name == "fp16")
        pixels, n = self.pixels, self.micro_batches if cached else 1
        if features:
            with torch.no_grad():
                parts = [model.encode_image(self.normalized(part)) for part in pixels.split(64)]
            pixels = torch.cat(parts).half().cpu()          # (B, D)
        pixels = pixels.pin_memory() if self.device.type == "cuda" else pixels
        batch = [train.MicroBatch(*part) for part in zip(pixels.chunk(n), self.ids.chunk(n))]
        theirs = None
        if self.peer and not cached:
            theirs = self.peer.step(self.pixels, self.ids, precision, frozen)
        # The backward pass takes two products for each one of the forward pass. What gradient
        # caching or the MLPs compute a second time is not needed, so it does not count.
        of_image = 0 if features else self.image_flops if frozen else 3 * self.image_flops
        needed = len(self.ids) * (3 * self.text_flops + of_image)
        return Row(f"{what}, {name}", len(self.ids), lambda: train.train_step(
            model, batch, None, gradients, optimizer, scaler, autocast), theirs, name, needed)

    def loss(self, _):
        N, D = 32768 if self.device.type == "cuda" else 4096, self.cfg.embed_dim
        image, text = (F.normalize(torch.randn(N, D, device=self.device)) for _ in range(2))
        scale = torch.tensor(100.0, device=self.device)

        def plain():                                        # as in cn_clip: (N, N) twice, autograd
            a, b = image.clone().requires_grad_(), text.clone().requires_grad_()
            loss = contrastive_loss(a, b, scale)
            return loss, *torch.autograd.grad(loss, (a, b))

        # Needed are S = I Tᵀ, G T and Gᵀ I, 2 N² D each. tiled_loss makes S several times instead
        # of keeping it, so it cannot reach 100 %.
        ours, theirs = functools.partial(tiled_loss, image, text, scale), self.peer and plain
        return Row(f"loss and gradient of {N:,} pairs", N, ours, theirs, "fp32", 6 * N * N * D)

    def tokenizer(self, _):
        """1,000 captions of painted images, one in five with letters and digits."""
        rng, tokenizer, texts = random.Random(0), Tokenizer(), []
        for i in range(1000):
            text = landscapes.describe_landscape(landscapes.random_landscape(rng))
            texts.append(text if i % 5 else f"{text}，共{i}个 no.{i}")
        theirs = self.peer and functools.partial(self.peer.tokenize, texts, 52)
        return Row("tokenizer, 1,000 captions", 1000, lambda: tokenizer(texts), theirs)

    def loading(self, _):
        """JPEG files of 500 x 375 -> tensors for training; the peer's without --use-augment."""
        self.folder = tempfile.TemporaryDirectory()         # deleted with this object
        paths, R = [Path(self.folder.name, f"{i}.jpg") for i in range(50)], self.cfg.image_size
        for path in paths:                                  # smooth parts and grain, as in a photo
            smooth = [Image.effect_noise((32, 24), 150).resize((500, 375)) for _ in range(3)]
            grain = Image.effect_noise((500, 375), 60).convert("RGB")
            Image.blend(Image.merge("RGB", smooth), grain, 0.1).save(path, quality=90)
        ours = lambda: [training_pixels(path.read_bytes(), R, path.name) for path in paths]
        theirs = self.peer and (lambda: [self.peer.transform(Image.open(path)) for path in paths])
        return Row(f"images 500 x 375 to {R} on a core", 50, ours, theirs)

    def evaluation(self, _):
        image, text = (F.normalize(torch.randn(n, self.cfg.embed_dim)) for n in (1000, 5000))
        positives = [[t // 5] for t in range(5000)]
        recall = functools.partial(evaluate.retrieval_recall, image, text, positives)
        return Row("recall of 1,000 images, 5,000 captions", 5000, recall)


class Peer:
    """cn_clip 1.6.0: its model with our weights. On one device its loss is contrastive_loss."""

    def __init__(self, name, model, device):
        try:
            import cn_clip.clip as package
        except ImportError as error:
            raise BadInput(f"--peer: cn_clip cannot be imported ({error}); "
                           "pip install --no-deps cn_clip==1.6.0 six") from None
        self.device, self.tokenize = device, package.tokenize
        self.transform = package.utils.image_transform(model.cfg.image_size)
        folder, sizes = Path(package.__file__).parent / "model_configs", {}
        for part in checkpoint.PEER_NAMES[name]:
            sizes |= json.loads((folder / f"{part}.json").read_text())
        if isinstance(sizes["vision_layers"], str):
            sizes["vision_layers"] = json.loads(sizes["vision_layers"])
        self.model = package.model.CLIP(**sizes).to(device)
        resnet = None if model.cfg.patch_size else model.cfg.vision_layers
        tensors = checkpoint.Layout("Chinese-CLIP", resnet=resnet).to_theirs(model.state_dict())
        left = self.model.load_state_dict(tensors, strict=False)
        assert not left.unexpected_keys and all("pooler" in key for key in left.missing_keys), left

    def autocast(self, precision):
        """Its default, "amp", is fp16 on a GPU; on a CPU it does nothing."""
        on = precision != "fp32" and self.device.type == "cuda"
        return functools.partial(torch.autocast, self.device.type, dtype=torch.float16, enabled=on)

    def step(self, pixels, ids, precision, frozen):
        """Its training step. `frozen`: --freeze-vision."""
        self.model.visual.requires_grad_(not frozen)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, betas=(0.9, 0.98), eps=1e-6)
        autocast, device = self.autocast(precision), self.device
        scaler = torch.amp.GradScaler(device.type, enabled=autocast.keywords["enabled"])
        pixels = normalize(pixels.float() / 255)            # its readers normalise

        def step():
            self.model.train()
            optimizer.zero_grad()
            with autocast():
                loss = contrastive_loss(*self.model(pixels.to(device), ids.to(device)))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            self.model.logit_scale.data.clamp_(0, 4.6052)
            return loss

        return step


def steps_alone(who, name, batch_size, precision):
    """Four steps of stage 2 -> peak memory of this process in MiB, seconds of the last three."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    system.keep_freed_memory(who == "ours")
    bench = Bench(name, batch_size, device, peer=who == "theirs")
    if who == "ours":
        call = bench.step("", precision).ours
    else:
        call = bench.peer.step(bench.pixels, bench.ids, precision, frozen=False)
    del bench.model                                         # our step has a copy
    seconds = [timed(call, device) for _ in range(4)]
    return memory_mib(device), seconds[1:]


def in_own_process(function, *arguments):
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *arguments).result()


def memory_lines(peer, model, batch_size, precision):
    """Two rows of the table, each side measured in a process of its own."""
    how = model, batch_size, precision
    ours, seconds = in_own_process(steps_alone, "ours", *how)
    text, theirs = f"{f'  alone: peak memory, MiB, {precision}':48}{ours:10,.0f}", []
    if peer:
        most, theirs = in_own_process(steps_alone, "theirs", *how)
        text += f"  {'':11}  {most:10,.0f}  {ours / most:5.2f}"
    rate = Row(f"  alone: stage 2 step, {precision}", batch_size, None)
    return text + "\n" + line(rate, seconds, theirs, {})


# ---- the program


def main():
    args = parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch_size = args.batch_size or (256 if device.type == "cuda" else 16)
    if not 2 <= args.micro_batches <= batch_size or args.rounds < 1:
        raise BadInput(f"--batch-size {batch_size} --micro-batches {args.micro_batches} --rounds "
                       f"{args.rounds}: at least 2, 2 to the batch size, and 1")
    system.keep_freed_memory(False)             # only the row `memory` keeps it, as train.py does
    threads, default = torch.get_num_threads(), precision_of("auto", device)[1]
    hardware = f"CPU with {torch.backends.cpu.get_cpu_capability()}, {threads} threads"
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else hardware
    print(f"{args.model}, batches of {batch_size}, captions of 20 tokens on average; {hardware}, "
          f"torch {torch.__version__}, {time.strftime('%Y-%m-%d')}; default precision {default}")
    dtypes, peaks = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}, {}
    for name in ("fp32", default, precision_of("auto", device, evaluating=True)[1]):
        peaks[name] = peaks.get(name) or peak(device, dtypes[name])
    rates = [f"{name} {rate / 1e9:,.0f}" for name, rate in peaks.items()]
    print(f"largest matrix product: {', '.join(rates)} billion operations a second")
    bench = Bench(args.model, batch_size, device, args.peer, args.micro_batches, args.compile)
    heads = f"  {'cn_clip /s':>10}  {'ratio':>5}  lowest-highest" if args.peer else ""
    print(f"\n{'':48}{'/s':>10}  {'of the peak':>11}{heads}")
    for name in args.rows.split(","):
        both = name in BY_PRECISION and default != "fp32"
        for precision in ("fp32", "auto") if both else ("fp32",):
            torch.set_num_threads(1 if name == "loading" else threads)
            if name == "memory":
                text = memory_lines(args.peer, args.model, batch_size, precision)
            else:
                row = bench.row(name, precision)
                text = line(row, *measured(row, device, args.rounds), peaks)
            print(text, flush=True)


def parse_args():
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=CONFIGS, default="vit-b-16", help="(default: %(default)s)")
    add("--batch-size", type=int, help="of steps and images (default: 16, on a GPU 256)")
    add("--rows", default=",".join(ROWS), help="(default: all)")
    add("--rounds", type=int, default=5, help="(default: 5)")
    add("--peer", action="store_true", help="measure cn_clip, too")
    add("--micro-batches", type=int, default=4, help="of the row `cached` (default: 4)")
    add("--compile", action="store_true", help="as with train.py")
    args = parser.parse_args()
    for name in args.rows.split(","):
        if name not in ROWS:
            raise BadInput(f"--rows: no row {name!r}; there are {', '.join(ROWS)}")
    if args.peer and args.model not in checkpoint.PEER_NAMES:
        raise BadInput(f"--peer: cn_clip has no {args.model}")
    if args.compile and CONFIGS[args.model].patch_size is None:
        raise BadInput("--compile: it is for ViTs; the blocks of a ResNet all differ")
    return args


def line(row, ours, theirs, peaks):
    """A row of the table, from the seconds of each round."""
    median, share = statistics.median(ours), ""
    if row.flops:
        share = f"{row.flops / median / peaks[row.precision]:.0%}"
    text = f"{row.what:48}{row.count / median:10,.1f}  {share:>11}"
    if theirs:
        ratios = [b / a for a, b in zip(ours, theirs)]
        text += (f"  {row.count / statistics.median(theirs):10,.1f}  "
                 f"{statistics.median(ratios):5.2f}  {min(ratios):.2f}-{max(ratios):.2f}")
    return text.rstrip()


if __name__ == "__main__":
    system.run(main)
