"""How fast it is: against the limit that the hardware sets, and against the peer.

    python -m tools.bench                                         # vit-b-16 on this device, fp32 and the default precision
    python -m tools.bench --peer                                  # beside cn_clip, with ratios (pip install --no-deps cn_clip==1.6.0 six)
    python -m tools.bench --model vit-l-14 --batch-size 256 --rows image,stage2 --peer

One table: how many images, captions or pairs a second; what share that is of the fastest large matrix product of this
device in the same run (operations are counted from the sizes: two for each multiplication that the result needs); and with
--peer how many times cn_clip's rate, from the same weights and the same batches in the same process, with what the two
results differ by. Everything is run once to warm up, then in rounds, ours and the peer's in turn. Figures are medians over
the rounds, ratios those of each round. The rows:

    image        images -> image embeddings, as in an evaluation
    text         captions -> text embeddings, 64 at a time, as in an evaluation
    stage1       a training step whose vision tower is frozen
    features     the same from kept features of the images (features.py): the text tower alone
    stage2       a training step of both towers
    cached       the same in several micro-batches: gradient caching, which embeds everything twice
    loss         the loss of a large batch, and its gradient at the embeddings
    tokenizer    captions -> token ids
    loading      JPEG files -> the pixels of a training batch, on one core
    evaluation   recall in both directions, from embeddings
    memory       in processes that do nothing but stage 2 steps, ours and the peer's in turn: peak memory, and their rate

In the row `memory` ours keeps, on a CPU, the memory that it frees (system.keep_freed_memory), as all our scripts do; in the
process that both sides share it does not.
"""
import argparse
import concurrent.futures
import contextlib
import copy
import datetime
import functools
import json
import multiprocessing
import platform
import random
import statistics
import tempfile
import time
import types
from pathlib import Path
from typing import Callable, NamedTuple
from unittest import mock

import numpy as np
import torch
from PIL import Image

import checkpoint
import evaluate
import train
from loss import contrastive_loss, tiled_loss
from model import CLIP, CONFIGS
from support import painter, system
from support.images import normalize, training_pixels
from support.processes import precision_of
from support.meter import memory_mib
from tokenizer import CLS, SEP, Tokenizer
from tools import landscapes

ROWS = ("image", "text", "stage1", "features", "stage2", "cached", "loss", "tokenizer", "loading", "evaluation", "memory")

# Measured in fp32, and in the default precision.
BY_PRECISION = {"image", "text", "stage1", "features", "stage2", "cached", "memory"}
CAPTIONS = 64                                                                   # of the row `text`: the peer's default for extracting


class Row(NamedTuple):
    """What is measured in a row of the table, of both sides."""

    what: str
    precision: str
    count: int                                                                  # images, captions or pairs of one call
    ours: Callable
    theirs: Callable | None = None                                              # the peer's way to the same thing
    operations: float = 0.0                                                     # that one call of ours needs; 0: none are counted
    difference: str = ""                                                        # how far apart the two results are


# ---------------------------------------------------------------------------------------------------------------- operations


def operations(cfg, token_counts):
    """Floating-point operations of encoding one image, and of encoding captions with these numbers of tokens."""
    if isinstance(cfg.vision_layers, int):
        patches = (cfg.image_size // cfg.patch_size) ** 2
        image = 2 * patches * 3 * cfg.patch_size**2 * cfg.vision_width        # the convolution that embeds the patches
        image += transformer([1 + patches], cfg.vision_layers, cfg.vision_width, cfg.embed_dim)
    else:
        image = resnet(cfg)
    return image, transformer(token_counts, cfg.text_layers, cfg.text_width, cfg.embed_dim)


def transformer(lengths, layers, C, D):
    """Sequences of these lengths through transformer layers C wide, and the projection of one token each to D.

    In the last layer that one token alone asks; keys and values are needed of all.
    """
    tokens, firsts = sum(lengths), len(lengths)
    for_each_query = 2 * (C * C + C * C + 8 * C * C)                            # query, output, MLP
    for_each_token = 2 * 2 * C * C                                              # key, value
    # pairs of query and key: 2 x 2 C each, for the score and for the sum of values
    pairs, first_pairs = sum(l * l for l in lengths), tokens
    whole = tokens * (for_each_query + for_each_token) + 4 * C * pairs
    last = firsts * for_each_query + tokens * for_each_token + 4 * C * first_pairs
    return (layers - 1) * whole + last + firsts * 2 * C * D


def resnet(cfg):
    """One image through the ModifiedResNet: a convolution of k x k from c to c' channels takes 2 k² c c' for each place of its output."""
    conv = lambda side, k, c_in, c_out: 2 * k * k * c_in * c_out * side * side
    C, side = cfg.vision_width, cfg.image_size // 2
    total = conv(side, 3, 3, C // 2) + conv(side, 3, C // 2, C // 2) + conv(side, 3, C // 2, C)
    side, c_in = side // 2, C
    for group, depth in enumerate(cfg.vision_layers):
        c = C * 2**group
        for i in range(depth):
            small = side // 2 if group and i == 0 else side                     # the block's average pool comes after its 3 x 3 convolution
            total += conv(side, 1, c_in, c) + conv(side, 3, c, c) + conv(small, 1, c, 4 * c)
            if i == 0:
                total += conv(small, 1, c_in, 4 * c)                            # the shortcut
            side, c_in = small, 4 * c
    # the attention pool: keys and values of all places, the query and the output of one; its attention; the projection
    places = 1 + side * side
    return total + 2 * c_in * c_in * (2 * places + 1) + 4 * places * c_in + 2 * c_in * cfg.embed_dim


def peak(device, dtype, seconds=2.0):
    """Operations a second of the fastest large matrix product in `dtype`, found within `seconds`."""
    best = 0.0
    for n in ((4096, 8192, 16384) if device.type == "cuda" else (1024, 2048, 4096)):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        end = time.perf_counter() + seconds / 3
        while time.perf_counter() < end:
            best = max(best, 2 * n**3 / timed(lambda: a @ b, device))
    return best


# ---------------------------------------------------------------------------------------------------------------- measuring


def timed(call, device):
    """Seconds of one call, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measured(row, device, rounds):
    """Ours and the peer's in turn -> seconds of one call of ours, of each round; the same of the peer's, or nothing.

    What takes less than a tenth of a second is called more often in a round.
    """
    sides = [call for call in (row.ours, row.theirs) if call]
    often = []
    for call in sides:
        call()
        often.append(max(1, round(0.1 / timed(call, device))))
    seconds = [[], []]
    for _ in range(rounds):
        for call, times, side in zip(sides, often, seconds):
            side.append(timed(lambda: [call() for _ in range(times)], device) / times)
    return seconds


# ---------------------------------------------------------------------------------------------------------------- what is measured


class Bench:
    """A model with random weights, the peer's with the same ones, a batch; and the rows."""

    def __init__(self, name, batch_size, device, peer, micro_batches=4, compiled=False):
        self.cfg, self.device, self.micro_batches, self.compiled = CONFIGS[name], device, micro_batches, compiled
        torch.manual_seed(0)
        self.model = CLIP(self.cfg).to(device)
        self.peer = Peer(name, self.model, device) if peer else None
        generator = torch.Generator().manual_seed(0)
        size = (batch_size, 3, self.cfg.image_size, self.cfg.image_size)
        self.pixels = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)           # (B, 3, R, R)
        counts = torch.randint(14, 27, (batch_size,), generator=generator)      # 20 tokens on average, [CLS] and [SEP] among them
        self.ids = captions_of(counts, self.cfg, generator)                     # (B, L)
        self.image_ops, text_ops = operations(self.cfg, token_counts(self.ids))
        self.text_ops = text_ops / batch_size

    def encoding(self, what, encode, theirs, count, ops, precision):
        """A row from two functions that embed the same `count` images or captions, in the precision of an evaluation."""
        autocast, name = precision_of(precision, self.device, evaluating=True)
        peer_autocast = self.peer.autocast(precision) if self.peer else None

        @torch.no_grad()
        def ours():
            self.model.eval()
            with autocast():
                return encode()

        @torch.no_grad()
        def peers():
            self.peer.model.eval()
            with peer_autocast():
                x = theirs()
                return x / x.norm(dim=-1, keepdim=True)

        difference = f"embeddings differ by {(ours() - peers().float()).abs().max().item():.0e}" if self.peer else ""
        return Row(f"{what}, {name}", name, count, ours, peers if self.peer else None, ops, difference)

    def image(self, precision):
        pixels = normalize(self.pixels.to(self.device).float() / 255)
        ours, theirs = lambda: self.model.encode_image(pixels), lambda: self.peer.model.encode_image(pixels)
        return self.encoding("image encoding", ours, theirs, len(pixels), len(pixels) * self.image_ops, precision)

    def text(self, precision):
        ids = repeated(self.ids, CAPTIONS)
        there = ids.to(self.device)
        ours, theirs = lambda: self.model.encode_text(ids), lambda: self.peer.model.encode_text(there)
        _, ops = operations(self.cfg, token_counts(ids))
        return self.encoding("text encoding", ours, theirs, len(ids), ops, precision)

    def step(self, what, precision, frozen=False, features=False, micro_batches=1):
        """A training step, from uint8 images and ids on the CPU to new weights.

        With a learning rate of 0, which costs the same, so that the weights of ours and the peer's stay the same.
        """
        autocast, name = precision_of(precision, self.device)
        model = copy.deepcopy(self.model)                                       # for the gradients' buffers stay with the parameters
        if frozen:
            model.freeze_vision()
        if self.compiled:
            model.compile_vision()
        model.train()
        optimizer = train.make_optimizer(model, 0.001)
        gradients = train.GradientSum([p for p in model.parameters() if p.requires_grad])
        scaler = torch.amp.GradScaler(self.device.type, enabled=name == "fp16")
        pixels = self.pixels
        if features:
            with torch.no_grad():
                pixels = torch.cat([model.encode_image(train.MicroBatch(p, None).images(self.device)) for p in pixels.split(64)]).half().cpu()            # (B, D)
        pixels = pixels.pin_memory() if self.device.type == "cuda" else pixels
        ready = [train.MicroBatch(p, ids) for p, ids in zip(pixels.chunk(micro_batches), self.ids.chunk(micro_batches))]
        ours = lambda: train.train_step(model, ready, None, gradients, optimizer, scaler, autocast)
        theirs, difference = None, ""
        if self.peer and micro_batches == 1:
            theirs = self.peer.step(self.pixels, self.ids, precision, frozen)
            difference = self.peer.difference(self.model, ready[0].images(self.device), ready[0].ids, self.pixels, self.ids)
        # 3: the backward pass takes two products for each one of the forward pass. What `cached` embeds a second time does not count
        of_image = 0 if features else self.image_ops if frozen else 3 * self.image_ops
        needed = 3 * self.text_ops + of_image
        return Row(f"{what}, {name}", name, len(self.ids), ours, theirs, len(self.ids) * needed, difference)

    def stage1(self, precision):
        return self.step("stage 1 step", precision, frozen=True)

    def features(self, precision):
        return self.step("stage 1 step, features kept", precision, frozen=True, features=True)

    def stage2(self, precision):
        return self.step("stage 2 step", precision)

    def cached(self, precision):
        return self.step(f"stage 2 step in {self.micro_batches} micro-batches", precision, micro_batches=self.micro_batches)

    # what does not depend on the towers' precision

    def loss(self, _):
        """The loss of a large batch, and its gradient at the embeddings; the peer's by autograd."""
        N = 32768 if self.device.type == "cuda" else 4096
        D = self.cfg.embed_dim
        image, text = (torch.nn.functional.normalize(torch.randn(N, D, device=self.device), dim=1) for _ in range(2))               # (N, D)
        scale = torch.tensor(100.0, device=self.device)

        def plain():
            """As in cn_clip: two matrices of logits, two cross-entropies."""
            entropy, target = torch.nn.functional.cross_entropy, torch.arange(N, device=self.device)
            a, b = image.clone().requires_grad_(), text.clone().requires_grad_()
            loss = (entropy(scale * a @ b.T, target) + entropy(scale * b @ a.T, target)) / 2        # of (N, N) logits
            loss.backward()
            return loss, a.grad, b.grad

        ours = lambda: tiled_loss(image, text, scale)
        difference = max(((x - y).norm() / y.norm()).item() for x, y in zip(ours(), plain())) if self.peer else 0.0
        # needed are S = I Tᵀ, G T and Gᵀ I, 2 N² D each. tiled_loss makes S four times instead of keeping it, so it cannot pass 50 %
        return Row(f"loss and gradient of {N:,} pairs, fp32", "fp32", N, ours, plain if self.peer else None, 6 * N * N * D,
                   f"relative {difference:.0e}")

    def tokenizer(self, _):
        """1,000 captions of the painted sets, one in five with letters and digits."""
        rng = random.Random(0)
        texts = [painter.describe(painter.random_scene(rng)) for _ in range(500)]
        texts += [landscapes.describe_landscape(landscapes.random_landscape(rng)) for _ in range(500)]
        texts = [f"{text}，共{i}个 No.{i}" if i % 5 == 0 else text for i, text in enumerate(texts)]
        ours, theirs, equal = functools.partial(Tokenizer(), texts), None, False
        if self.peer:
            theirs = lambda: self.peer.tokenize([text.lower().replace("“", '"').replace("”", '"') for text in texts], 52)
            equal = torch.equal(ours(), theirs())
        return Row("tokenizer, 1,000 captions", "", len(texts), ours, theirs, 0, "ids " + ("equal" if equal else "DIFFER"))

    def loading(self, _):
        """JPEG files of 500 x 375 -> tensors for training, on one core; the peer's without --use-augment, as is its default."""
        self.folder = tempfile.TemporaryDirectory(prefix="ce-clip-bench-")      # deleted with this object
        paths = [Path(self.folder.name, f"{i}.jpg") for i in range(50)]
        for i, path in enumerate(paths):
            photo(i).save(path, quality=90)
        R = self.cfg.image_size
        ours = one_core(lambda: [training_pixels(path.read_bytes(), R, path.name) for path in paths])
        theirs, difference = None, 0
        if self.peer:
            theirs = one_core(lambda: [self.peer.transform(Image.open(path)) for path in paths])
            of_255 = 0.27 * 255                                                 # 0.27: CLIP's deviation, about, undone
            difference = statistics.mean((normalize(x / 255) - y).abs().mean().item() * of_255 for x, y in zip(ours(), theirs()))
        return Row(f"images 500 x 375 to {R} on a core", "", len(paths), ours, theirs, 0, f"{difference:.3f} of 255 on average")

    def evaluation(self, _):
        """Recall of 1,000 images and 5,000 captions. (The peer's five scripts are timed in tests/test_evaluate.py.)"""
        image, text = (torch.nn.functional.normalize(torch.randn(n, self.cfg.embed_dim), dim=1) for n in (1000, 5000))
        positives = [[t // 5] for t in range(5000)]
        return Row("recall of 1,000 images, 5,000 captions", "", 5000, lambda: evaluate.retrieval_recall(image, text, positives))


def token_counts(ids):
    """(B, L) -> how many tokens each caption has, a list of B."""
    return (ids != 0).sum(dim=1).tolist()


def repeated(x, n):
    """x again and again, n rows."""
    return x.repeat(-(-n // len(x)), *[1] * (x.ndim - 1))[:n]


def captions_of(counts, cfg, generator):
    """Random words of so many tokens, (B,), [CLS] and [SEP] among them -> (B, L) int64."""
    ids = torch.randint(200, cfg.vocab_size, (len(counts), cfg.context_length), generator=generator)
    places = torch.arange(cfg.context_length)
    ids[:, 0] = CLS
    ids[places == counts[:, None] - 1] = SEP
    return ids.masked_fill(places >= counts[:, None], 0)


def photo(seed):
    """A image with the smooth parts, edges and grain of a photo, 500 x 375."""
    rng = np.random.default_rng(seed)
    image = np.zeros((375, 500, 3))
    for side, weight in ((4, 0.6), (16, 0.3), (60, 0.1)):                       # from coarse to fine
        noise = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        image += weight * np.asarray(noise.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.float32)
    image += rng.normal(0, 4, image.shape)                                  # grain
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def one_core(call):
    """call, with one thread."""
    def on_one():
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return call()
        finally:
            torch.set_num_threads(threads)
    return on_one


# ---------------------------------------------------------------------------------------------------------------- the peer


class Peer:
    """cn_clip 1.6.0: its model with our weights, its loss, its optimizer as its main sets it up."""

    def __init__(self, name, model, device):
        try:
            import cn_clip.clip as package
            from cn_clip.clip.model import CLIP as PeerCLIP
            from cn_clip.training.train import get_loss
        except ImportError as error:
            raise system.BadInput(f"--peer: cn_clip cannot be imported ({error}); pip install --no-deps cn_clip==1.6.0 six") from None
        self.device, self.get_loss = device, get_loss
        self.tokenize, self.transform = package.tokenize, package.utils.image_transform(model.cfg.image_size)
        folder, sizes = Path(package.__file__).parent / "model_configs", {}
        for part in checkpoint.PEER_NAMES[name]:
            sizes |= json.loads((folder / f"{part}.json").read_text())
        if isinstance(sizes["vision_layers"], str):
            sizes["vision_layers"] = json.loads(sizes["vision_layers"])
        self.model = PeerCLIP(**sizes).to(device)
        layout = checkpoint.Layout("Chinese-CLIP", resnet=None if model.cfg.patch_size else model.cfg.vision_layers)
        left = self.model.load_state_dict(layout.to_theirs(model.state_dict()), strict=False)
        assert not left.unexpected_keys and all("pooler" in key for key in left.missing_keys), left

    def autocast(self, precision):
        """Its default, "amp", is fp16 on a GPU; on a CPU it does nothing."""
        on = precision != "fp32" and self.device.type == "cuda"
        return functools.partial(torch.autocast, self.device.type, dtype=torch.float16, enabled=on)

    def loss_of(self, pixels, ids):
        """Its loss of normalised images (B, 3, R, R) and captions (B, L)."""
        args = types.SimpleNamespace(accum_freq=1, mask_ratio=0, distillation=False, aggregate=False,
                                     local_device_rank=self.device.index, report_training_batch_acc=False)
        entropy, context = torch.nn.CrossEntropyLoss(), contextlib.nullcontext()
        if self.device.type == "cpu":                                           # it calls .cuda() on whatever it makes
            context = mock.patch.object(torch.Tensor, "cuda", lambda x, *_, **__: x)
        with context:
            return self.get_loss(self.model, pixels, ids, entropy, entropy, args)[0]

    def step(self, pixels, ids, precision, frozen):
        """Its training step. --freeze-vision keeps the vision tower from getting gradients."""
        self.model.train()
        self.model.visual.requires_grad_(not frozen)
        exempt = lambda name: any(part in name for part in ("bn", "ln", "bias", "logit_scale"))
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        groups = [{"params": [p for name, p in named if exempt(name)], "weight_decay": 0.0},
                  {"params": [p for name, p in named if not exempt(name)], "weight_decay": 0.001}]
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), eps=1e-6)
        autocast = self.autocast(precision)
        scaler = torch.amp.GradScaler(self.device.type, enabled=precision != "fp32" and self.device.type == "cuda")
        pixels, there = normalize(pixels.float() / 255), self.device       # its readers normalise

        def step():
            optimizer.zero_grad()
            with autocast():
                loss = self.loss_of(pixels.to(there), ids.to(there))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            self.model.logit_scale.data = torch.clamp(self.model.logit_scale.data, 0, 4.6052)
            return loss

        return step

    def difference(self, model, pixels, ids, raw, there):
        """How far its loss, and the gradient at its text projection, are from ours, relative; in fp32, without dropout.

        pixels, ids: as our model takes them; raw (B, 3, R, R) uint8, there (B, L): the same for the peer's.
        """
        results = []
        model.eval(), self.model.eval()
        image = pixels.float() if pixels.ndim == 2 else model.encode_image(pixels)                  # (B, D)
        ours = contrastive_loss(image, model.encode_text(ids), model.logit_scale.exp())
        theirs = self.loss_of(normalize(raw.float() / 255).to(self.device), there.to(self.device))
        for loss, projection in ((ours, model.text_projection), (theirs, self.model.text_projection)):
            results.append([loss.detach(), *torch.autograd.grad(loss, [projection])])
        model.train(), self.model.train()
        loss, gradient = (((x - y).norm() / y.norm()).item() for x, y in zip(*results))
        return f"loss {loss:.0e}, gradient {gradient:.0e}"


# ---------------------------------------------------------------------------------------------------------------- memory


def steps_alone(who, name, batch_size, precision):
    """In a process of its own: four stage 2 steps -> MiB that it has needed at most, seconds of a step (median of the last three)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if who == "ours":
        system.keep_freed_memory()
    bench = Bench(name, batch_size, device, False)
    if who == "ours":
        call = bench.stage2(precision).ours
    else:
        call = Peer(name, bench.model, device).step(bench.pixels, bench.ids, precision, False)
    del bench.model                                                             # of ours the step has its copy
    seconds = [timed(call, device) for _ in range(4)]
    return memory_mib(device), statistics.median(seconds[1:])


def in_own_process(function, *arguments):
    """function(*arguments) in a process of its own."""
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


# ---------------------------------------------------------------------------------------------------------------- command line


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit-b-16", help=f"{', '.join(CONFIGS)} (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, help="pairs in a step and images at a time (default: 16, on a GPU 256)")
    parser.add_argument("--rows", default=",".join(ROWS), help=f"which rows, of {', '.join(ROWS)} (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: 5)")
    parser.add_argument("--peer", action="store_true", help="measure cn_clip beside it")
    parser.add_argument("--micro-batches", type=int, default=4, help="of the row `cached`, gradient caching (default: 4)")
    parser.add_argument("--compile", action="store_true", help="torch.compile for the vision tower, as with train.py")
    args = parser.parse_args()
    names = args.rows.split(",")
    system.keep_freed_memory(False)                                             # both sides as the C library does it
    if args.model not in CONFIGS:
        raise system.BadInput(f"--model {args.model}: not a known model ({', '.join(CONFIGS)})")
    if args.peer and args.model not in checkpoint.PEER_NAMES:
        raise system.BadInput(f"--peer: cn_clip has no {args.model}; it has {', '.join(checkpoint.PEER_NAMES)}")
    if unknown := [name for name in names if name not in ROWS]:
        raise system.BadInput(f"--rows {args.rows}: no row {unknown[0]!r}; there are {', '.join(ROWS)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch_size = args.batch_size or (256 if device.type == "cuda" else 16)
    if not (2 <= batch_size <= 10**6 and 1 <= args.rounds <= 1000 and 2 <= args.micro_batches <= batch_size):
        raise system.BadInput(f"--batch-size {batch_size} --rounds {args.rounds} --micro-batches {args.micro_batches}: out of range, "
                              "2 to 1e6, 1 to 1000 and 2 to the batch size")
    if args.compile:
        try:
            checkpoint.empty_model(CONFIGS[args.model]).compile_vision()        # refused before anything is measured
        except ValueError as error:
            raise system.BadInput(f"--compile: {error}") from None

    default, of_evaluation = precision_of("auto", device)[1], precision_of("auto", device, evaluating=True)[1]
    print(f"{args.model}, batches of {batch_size}, captions of 20 tokens on average; {hardware(device)}, torch {torch.__version__}, "
          f"{datetime.date.today()}; default precision {default}")
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    peaks = {name: peak(device, dtype) for name, dtype in dtypes.items() if name in ("fp32", default, of_evaluation)}
    said = ", ".join(f"{name} {rate / 1e9:,.0f} billion operations a second" for name, rate in peaks.items())
    print(f"largest matrix product: {said}")
    bench = Bench(args.model, batch_size, device, args.peer, args.micro_batches, args.compile)
    print(f"\n{'':48}{'/s':>10}  {'of the peak':>11}" + f"  {'cn_clip /s':>10}  {'ratio':>5}  {'lowest-highest':14}  equal?" * args.peer)
    for name in names:
        for precision in ("fp32", "auto") if name in BY_PRECISION and default != "fp32" else ("fp32",):
            if name == "memory":
                print(lines_alone(args.model, batch_size, precision, args.peer), flush=True)
            else:
                row = getattr(bench, name)(precision)
                print(line(row, *measured(row, device, args.rounds), peaks), flush=True)


def line(row, ours, theirs, peaks):
    """A row of the table, from the seconds of each round."""
    rate = row.count / statistics.median(ours)
    share = ""
    if row.operations and row.precision in peaks:
        share = f"{row.operations / statistics.median(ours) / peaks[row.precision]:.0%}"
    text = f"{row.what:48}{rate:10,.1f}  {share:>11}"
    if theirs:
        ratios = [b / a for a, b in zip(ours, theirs)]
        extremes = f"{min(ratios):.2f}-{max(ratios):.2f}"
        text += f"  {row.count / statistics.median(theirs):10,.1f}  {statistics.median(ratios):5.2f}  {extremes:14}  {row.difference}"
    return text


def lines_alone(model, batch_size, precision, peer):
    """Two rows: peak memory and rate of a process of its own; twice for each side, in turn."""
    sides = ("ours", "theirs") if peer else ("ours",)
    memory, seconds = {side: [] for side in sides}, {side: [] for side in sides}
    for side in 2 * sides:
        mib, time_of_step = in_own_process(steps_alone, side, model, batch_size, precision)
        memory[side].append(mib)
        seconds[side].append(time_of_step)
    text = f"{f'  alone: peak memory, MiB, {precision}':48}{max(memory['ours']):10,.0f}  {'':11}"
    if peer:
        text += f"  {max(memory['theirs']):10,.0f}  {max(memory['ours']) / max(memory['theirs']):5.2f}"
    rate = Row(f"  alone: stage 2 step, {precision}", "", batch_size, None)
    return text + "\n" + line(rate, seconds["ours"], seconds.get("theirs", []), {})


def hardware(device):
    """What it runs on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu, name = Path("/proc/cpuinfo"), platform.processor()
    if cpu.exists():                                                            # of Linux
        names = (line.partition(":")[2].strip() for line in cpu.read_text().splitlines() if line.startswith("model name"))
        name = next(names, "")
    return f"{name or 'CPU'}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    system.run(main)
