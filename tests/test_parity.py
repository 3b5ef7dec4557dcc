"""Against the published implementations, from the same weights: embeddings, loss, gradients, optimizer
steps, ids and pixels. Full width; full depth for vit-b-16 and rn50. The large sizes are slow tests."""
import dataclasses
import io
import os
import random
import sys
import types
import warnings

import numpy as np
import peers
import pytest
import torch
from conftest import ready
from PIL import Image

import checkpoint
import train
from loss import contrastive_loss
from model import CONFIGS
from support.formats import layout_of
from support.images import Transform
from tokenizer import CLS, MASK, SEP, UNK, VOCAB, Tokenizer

VITS = {"vit-b-16": CONFIGS["vit-b-16"], **peers.SHALLOW}
ALL = {"rn50": CONFIGS["rn50"], **VITS}
SMALL_RESNET = dataclasses.replace(CONFIGS["rn50"], image_size=64, vision_layers=(1, 1, 1, 1), text_layers=1)


def sizes(configs, *quick):
    """Parameters of a test; those not named in `quick` are slow."""
    return [pytest.param(cfg, id=name, marks=[] if name in quick else pytest.mark.slow) for name, cfg in configs.items()]


def peer_loss(model, pixels, ids, monkeypatch):
    """cn_clip's own loss function, on one process and the CPU."""
    training = pytest.importorskip("cn_clip.training.train")
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, *_, **__: self)
    args = types.SimpleNamespace(accum_freq=1, mask_ratio=0, distillation=False, aggregate=False, local_device_rank=0, report_training_batch_acc=False)
    return training.get_loss(model, pixels, ids, torch.nn.CrossEntropyLoss(), torch.nn.CrossEntropyLoss(), args)[0]


def our_loss(model, pixels, ids):
    keys = torch.arange(len(ids))
    return contrastive_loss(*model(pixels, ids), (keys, keys))


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    return model


def both(cfg, tmp_path):
    """cn_clip's model, and ours from the file that it wrote."""
    peer = peers.cn_clip_model(cfg)
    ours, _ = checkpoint.load(peers.cn_clip_file(peer.state_dict(), tmp_path))
    assert ours.cfg == cfg
    return peer, without_dropout(ours)


def assert_close_tensors(ours, theirs, tolerance):
    """Relative L2 distance of each tensor. (The attention pool's key bias has no gradient but rounding: softmax does not see a constant.)"""
    assert ours.keys() == theirs.keys()
    distance = {k: ((ours[k] - theirs[k]).norm() / theirs[k].norm()).item() for k in theirs if not (k.endswith("key.bias") and theirs[k].norm() < 1e-6)}
    worst = max(distance, key=distance.get)
    print(f"largest relative distance {distance[worst]:.1e} ({worst})")
    assert distance[worst] <= tolerance, (worst, distance[worst])


def in_our_names(keys, tensors):
    """cn_clip's tensors or gradients under our names `keys`."""
    return layout_of(tensors).to_ours(dict(tensors), keys)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {k: p.grad for k, p in model.named_parameters()}


@pytest.mark.parametrize("cfg", sizes(ALL, "vit-b-16", "vit-b-32"))
def test_embeddings_loss_and_gradients_equal_cn_clip(cfg, tmp_path, monkeypatch):
    """Embeddings in evaluation mode; loss and gradients in training mode without dropout (rn50: BatchNorm over the batch).

    A ReLU network's fp32 gradient is itself certain to 1e-2 or 1e-3 only: rounding decides which near-zero activations count. So rn50 is compared in the peer's memory layout, whose
    kernels round alike; in its own, channels last, it is compared in fp64 below.
    """
    peer, ours = both(cfg, tmp_path)
    pixels, ids = peers.batch(cfg)
    with torch.no_grad():
        image, text, scale = peer.eval()(pixels, ids)
        our_image, our_text, our_scale = ours.eval()(pixels, ids)
    print(f"embeddings differ by {max((our_image - image).abs().max(), (our_text - text).abs().max()):.1e}")
    torch.testing.assert_close(our_image, image, rtol=0, atol=1e-5)
    torch.testing.assert_close(our_text, text, rtol=0, atol=1e-5)
    torch.testing.assert_close(our_scale, scale, rtol=1e-6, atol=0)
    monkeypatch.setattr(torch, "channels_last", torch.contiguous_format)
    theirs, mine = peer_loss(peer.train(), pixels, ids, monkeypatch), our_loss(ours.train(), pixels, ids)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=0)
    assert_close_tensors(mine := gradients(ours, mine), in_our_names(mine, gradients(peer, theirs)), 1e-4)
    buffers = dict(ours.named_buffers())                                        # BatchNorm's means and variances
    assert all(torch.allclose(x, buffers[k], rtol=1e-5, atol=1e-6) for k, x in in_our_names(buffers, peer.state_dict()).items())


@pytest.mark.parametrize("cfg", sizes({"rn50": CONFIGS["rn50"], "small": SMALL_RESNET}, "small"))
def test_resnet_gradients_equal_cn_clip_in_fp64(cfg, tmp_path, monkeypatch):
    """In its own memory layout. 1e-6 is far above what ReLUs leave uncertain in fp64 (about 1e-8)."""
    peer, ours = (model.double().train() for model in both(cfg, tmp_path))
    pixels, ids = peers.batch(cfg)
    theirs, mine = peer_loss(peer, pixels.double(), ids, monkeypatch), our_loss(ours, pixels.double(), ids)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0)
    mine = {k: g.float() for k, g in gradients(ours, mine).items()}
    assert_close_tensors(mine, in_our_names(mine, gradients(peer, theirs)), 1e-6)


@pytest.mark.parametrize("cfg", sizes(VITS, "vit-b-32"))
def test_embeddings_equal_transformers_both_ways(cfg, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = peers.hub_model(cfg)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, _ = checkpoint.load(tmp_path / "theirs")
    checkpoint.export(ours, tmp_path / "ours", "huggingface")
    back = transformers.ChineseCLIPModel.from_pretrained(tmp_path / "ours").eval()
    pixels, ids = peers.batch(cfg)
    with torch.no_grad():
        image, text, _ = ours(pixels, ids)
        for hub in (theirs, back):
            out = hub(input_ids=ids, attention_mask=ids.ne(0), pixel_values=pixels)
            torch.testing.assert_close(image, out.image_embeds, rtol=0, atol=1e-5)
            torch.testing.assert_close(text, out.text_embeds, rtol=0, atol=1e-5)
    assert all(torch.equal(x, back.state_dict()[k]) for k, x in theirs.state_dict().items())


def peer_optimizer(model, lr):
    """AdamW as cn_clip's main sets it up: its rule of names, its betas."""
    exempt = lambda name: any(part in name for part in ("bn", "ln", "bias", "logit_scale"))
    groups = [{"params": [p for n, p in model.named_parameters() if exempt(n)], "weight_decay": 0.0}, {"params": [p for n, p in model.named_parameters() if not exempt(n)], "weight_decay": 0.001}]
    resnet = hasattr(model.visual, "attnpool")
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999 if resnet else 0.98), eps=1e-8 if resnet else 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("cfg, dtype", [(peers.SHALLOW["vit-b-32"], torch.float32), (SMALL_RESNET, torch.float64)], ids=["vit-b-32", "rn-fp64"])
def test_ten_steps_equal_cn_clip(cfg, dtype, tmp_path, monkeypatch):
    """The same weights on the same batches: one process, no dropout, the warmup and cosine of each project. The peer decays some LayerNorm gains by accident: within the tolerance.
    (A ResNet in fp64, for the reason above: Adam makes whole steps of gradients that are rounding.)
    """
    steps, warmup, lr = 10, 3, 5e-5
    peer, ours = (model.to(dtype).train() for model in both(cfg, tmp_path))
    optimizers = peer_optimizer(peer, lr), train.make_optimizer(ours, 0.001)
    gradients = train.GradientSum(list(ours.parameters()))
    schedule = pytest.importorskip("cn_clip.training.scheduler").cosine_lr(optimizers[0], lr, warmup, steps)
    scaler, autocast = torch.amp.GradScaler("cpu", enabled=False), lambda: torch.autocast("cpu", enabled=False)
    for step in range(steps):
        pixels, ids = peers.batch(cfg, n=8, seed=step)
        pixels = pixels.to(dtype)
        schedule(step)
        optimizers[0].zero_grad()
        theirs = peer_loss(peer, pixels, ids, monkeypatch)
        theirs.backward()
        optimizers[0].step()
        peer.logit_scale.data.clamp_(0, 4.6052)
        for group in optimizers[1].param_groups:
            group["lr"] = train.learning_rate(step, lr, warmup, steps)
        assert optimizers[0].param_groups[0]["lr"] == pytest.approx(optimizers[1].param_groups[0]["lr"])
        mine, _ = train.train_step(ours, [ready(pixels, ids, step)], None, gradients, optimizers[1], scaler, autocast)
        assert mine == pytest.approx(theirs.item(), rel=1e-5)
    mine = {k: p.detach().float() for k, p in ours.named_parameters()}
    assert_close_tensors(mine, in_our_names(mine, dict(peer.named_parameters())), 1e-5)


# ---------------------------------------------------------------------------------------------------------------- ids and pixels


# What captions may hold, and more: (first, last code point), how often
RANGES = [((0x4E00, 0x9FFF), 12), ((0x20, 0x7E), 6), ((0x30, 0x39), 2), ((0x3400, 0x4DBF), 1), ((0x20000, 0x2A6DF), 1), ((0x2A700, 0x2EBEF), 2), ((0x30000, 0x323AF), 1), ((0xF900, 0xFAFF), 1),
          ((0x2F800, 0x2FA1F), 1), ((0x2E80, 0x2FDF), 1), ((0x3000, 0x30FF), 2), ((0xFF00, 0xFFEF), 2), ((0xA0, 0x24F), 3), ((0x1E00, 0x1EFF), 2), ((0x300, 0x36F), 1), ((0x370, 0x4FF), 1),
          ((0xE00, 0xE7F), 1), ((0xAC00, 0xD7A3), 1), ((0x2000, 0x206F), 2), ((0x2100, 0x2BFF), 2), ((0x1F1E6, 0x1FAFF), 3), ((0xFE00, 0xFE0F), 1), ((0, 0x1F), 1), ((0x7F, 0x9F), 1), ((0xE000, 0xF8FF), 1),
          ((0xE0000, 0xE007F), 1)]


def random_captions(n):
    rng = random.Random(0)
    ranges, weights = zip(*RANGES)
    characters = lambda k: "".join(chr(rng.randint(*span)) for span in rng.choices(ranges, weights, k=k))
    for _ in range(n):
        kind = rng.random()
        if kind < 0.9:
            yield characters(rng.randint(0, 30))
        elif kind < 0.95:                                                       # one word, up to far over the limit of 200
            yield "".join(rng.choices("abcdefghijklmnopqrstuvwxyzéàñßçø0123456789", k=rng.randint(1, 300)))
        elif kind < 0.999:
            yield " ".join(characters(rng.randint(1, 12)) for _ in range(rng.randint(0, 25)))
        else:                                                                   # a whole page
            yield characters(5000)


@pytest.fixture
def peer_pipeline(monkeypatch):
    """A caption's way to ids in cn_clip's training. (Its module asks for packages that this does not use.)"""
    peer = pytest.importorskip("cn_clip.clip")
    monkeypatch.setitem(sys.modules, "lmdb", types.ModuleType("lmdb"))
    monkeypatch.setitem(sys.modules, "timm", types.ModuleType("timm"))
    monkeypatch.setitem(sys.modules, "timm.data", types.SimpleNamespace(create_transform=None))
    from cn_clip.training.data import _preprocess_text

    return lambda texts: peer.tokenize([_preprocess_text(text) for text in texts], 52)


def test_ids_equal_cn_clip(peer_pipeline):
    """CE_CLIP_CAPTIONS=100000: so many random captions."""
    texts = list(random_captions(int(os.environ.get("CE_CLIP_CAPTIONS", 5_000)))) + ["", " ", "[MASK]猫[SEP]", "[CLS]", "“引号”", "İstanbul", "ﬁ", "A" * 201, "。" * 60]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                         # long ones are cut
        ours = Tokenizer()(texts)
    assert [texts[i] for i in (ours != peer_pipeline(texts)).any(1).nonzero().flatten()] == []


def test_ids_that_differ_on_purpose():
    """From cn_clip's bare tokenize(), which leaves out the step before it: quotes are not unified there. From transformers' tokenizer: it lets a caption inject special tokens.

    Not on purpose: some 500 code points of rare scripts (Sogdian punctuation, Glagolitic combining letters, …), where Python's Unicode tables, which cn_clip asks, are older or newer
    than those of the tokenizers library. They become [UNK] or nothing either way.
    """
    peer, ours, transformers = pytest.importorskip("cn_clip.clip"), Tokenizer(), pytest.importorskip("transformers")
    assert peer.tokenize("“猫”")[0, :4].tolist() == [CLS, UNK, 4344, UNK] and ours("“猫”").equal(peer.tokenize('"猫"'))
    hub = transformers.BertTokenizerFast(vocab=str(VOCAB), do_lower_case=True)
    for text, token in (("猫[MASK]狗", MASK), ("猫[SEP]狗", SEP), ("[CLS]猫", CLS), ("[UNK]猫", UNK)):
        assert hub(text)["input_ids"].count(token) == 1 + (token in (CLS, SEP))
        assert ours(text)[0].tolist().count(token) == (token in (CLS, SEP))


def noise(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def stored(image, format, **options):
    """Through a file, as images come."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return Image.open(io.BytesIO(file.getvalue()))


@pytest.fixture
def peer_transform():
    return pytest.importorskip("cn_clip.clip.utils").image_transform(224)


@pytest.mark.parametrize("shape", [(1, 1), (1, 900), (900, 1), (2, 3), (224, 224), (223, 225), (64, 64), (375, 500), (500, 375), (40, 3000), (1200, 1600)])
def test_pixels_equal_cn_clip_on_jpeg_and_png(shape, peer_transform):
    smooth = Image.effect_mandelbrot(shape[::-1], (-2, -1.2, 1, 1.2), 90)
    images = [stored(noise(*shape), "JPEG", quality=90), stored(noise(*shape), "PNG"), stored(smooth.convert("RGB"), "JPEG", progressive=True), stored(smooth, "JPEG"), stored(smooth, "PNG")]
    for image in images:                                                    # the last two are grey
        assert torch.equal(Transform(224)(image), peer_transform(image)), (image.mode, image.format)


def test_pixels_of_other_kinds_of_images(peer_transform):
    """What is done, why, and that the rest is as in cn_clip: ours equals the peer's on the RGB image that is named here; on the file itself the peer's differs."""
    rgb = noise(60, 80)
    exif = rgb.getexif()
    exif[0x0112] = 6
    palette = rgb.quantize(17)
    clear = rgb.copy()
    clear.putalpha(Image.linear_gradient("L").resize(rgb.size))
    grey16 = np.random.default_rng(1).integers(0, 65536, (60, 80), dtype=np.uint16)
    gif = rgb.quantize(16)
    gif.paste(3, (0, 0, 40, 60))
    on_white = lambda image: Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")
    cases = {
        "palette: colours are mixed by resizing, not numbers of a table": (p := stored(palette, "PNG"), p.convert("RGB")),
        "CMYK: converted before resizing like all others": (c := stored(rgb.convert("CMYK"), "JPEG"), c.convert("RGB")),
        "transparency: on white, as a browser shows it; the peer keeps the colours that nobody sees": (stored(clear, "PNG"), on_white(clear)),
        "palette with a transparent entry: the same": (g := stored(gif, "PNG", transparency=3), on_white(g)),
        "16-bit grey: scaled to 8 bits; the peer cuts off all above 255": (stored(Image.fromarray(grey16), "PNG"), Image.fromarray((grey16 // 257).astype(np.uint8)).convert("RGB")),
        "EXIF orientation: turned upright": (stored(rgb, "PNG", exif=exif), rgb.rotate(270, expand=True)),
        "bilevel: the shades between black and white that resizing makes are kept": (b := stored(rgb.convert("1"), "PNG"), b.convert("RGB")),
    }
    for what, (image, seen) in cases.items():
        assert torch.equal(Transform(224)(image), peer_transform(seen)), what
        assert not torch.equal(peer_transform(image), peer_transform(seen)), what
