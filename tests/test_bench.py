"""The benchmark: that it counts what is computed, measures both sides alike, and that their results are equal. (Its figures are in the README; no test is timed.)"""
import dataclasses
import re

import pytest
import torch
from test_model import RESNET, VIT, batch, build

import train
from model import CONFIGS
from tools import bench

CPU = torch.device("cpu")


@pytest.mark.parametrize("cfg", [VIT, RESNET], ids=["vit", "resnet"])
def test_operations_are_those_of_the_products(cfg):
    """Of the text tower, by hand; and a training step has three times as many as a forward pass, but for what it computes twice."""
    model, (pixels, ids) = build(cfg).eval(), batch(cfg)
    (B, L), C = ids.shape, cfg.text_width
    tokens = (ids != 0).sum().item()
    linear = lambda queries: queries * 2 * (C * C + C * C + 8 * C * C) + tokens * 2 * 2 * C * C             # query, output, MLP; key, value
    attention = lambda queries: 2 * 2 * C * L * queries                                                     # padded to L
    whole = linear(tokens) + attention(B * L)
    low = (cfg.text_layers - 1) * whole + linear(B) + attention(B) + B * 2 * C * cfg.embed_dim
    assert low <= bench.flops(lambda: model.encode_text(ids)) <= (cfg.text_layers) * whole + B * 2 * C * cfg.embed_dim
    assert bench.flops(lambda: model.encode_image(pixels)) == len(pixels) * bench.flops(lambda: model.encode_image(pixels[:1])) > 0


@pytest.mark.slow
def test_operations_of_vit_b_16_are_the_published_ones():
    """17.6 billion multiplications and additions for an image (Radford et al. 2021; He et al. count them as one), less what the last layer leaves out: 10 of 12 C² for 196 of its 197 tokens."""
    model = bench.CLIP(CONFIGS["vit-b-16"]).eval()
    image = bench.flops(lambda: model.encode_image(torch.zeros(1, 3, 224, 224)))
    assert image / 2 == pytest.approx(17.58e9 - 196 * 10 * 768**2 - 197 * 196 * 2 * 768, rel=0.01)


def test_ours_and_the_peers_run_in_turn(monkeypatch):
    calls = []

    def timed(call, device):
        call()
        return {"ours": 0.05, "theirs": 0.3}[calls[-1]]

    monkeypatch.setattr(bench, "timed", timed)
    row = bench.Row("x", 1, lambda: calls.append("ours"), lambda: calls.append("theirs"))
    ours, theirs = bench.measured(row, CPU, 2)
    assert calls == ["ours", "theirs"] * 3                                      # once to warm up
    assert ours == [0.05] * 2 and theirs == [0.3] * 2
    assert "6.00" in bench.line(row, ours, theirs, {}) and "-" not in bench.line(row, ours, [], {})


@pytest.fixture
def without_dropout(small_bench, monkeypatch):
    pytest.importorskip("cn_clip")
    monkeypatch.setitem(CONFIGS, "small-vit", dataclasses.replace(CONFIGS["small-vit"], text_dropout=0.0))
    made = bench.Bench("small-vit", 8, CPU, peer=True)
    for module in made.peer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return made


def test_results_equal_the_peers(without_dropout):
    """Of every row with a peer: the same weights and the same data go in, and the same results come out."""
    for name in ("image", "text"):
        row = without_dropout.row(name, "fp32")
        torch.testing.assert_close(row.ours(), torch.nn.functional.normalize(row.theirs(), dim=-1), atol=1e-5, rtol=0)
    for name in ("stage1", "features", "stage2"):
        row = without_dropout.row(name, "fp32")
        torch.testing.assert_close(row.ours()[0], row.theirs().detach(), rtol=1e-2 if name == "features" else 1e-5, atol=0)         # features: in half precision
    row = without_dropout.row("loss", "fp32")
    for x, y in zip(row.ours(), row.theirs()):
        torch.testing.assert_close(x, y.detach(), rtol=1e-4, atol=1e-6)
    row = without_dropout.row("tokenizer", "fp32")
    assert row.count == len(row.ours()) and row.ours().equal(row.theirs())
    row = without_dropout.row("loading", "fp32")
    apart = [(bench.normalize(x / 255) - y).abs().mean() for x, y in zip(row.ours(), row.theirs(), strict=True)]
    assert max(apart) * 0.27 * 255 < 4                                          # of 255: ours shrinks a JPEG while it decodes it


def test_a_step_leaves_the_weights(without_dropout):
    before = {key: x.clone() for key, x in without_dropout.model.state_dict().items()}
    for name in ("stage2", "cached"):
        without_dropout.row(name, "fp32").ours()
    assert all(x.equal(before[key]) for key, x in without_dropout.model.state_dict().items())


def test_every_row_is_measured(called, small_bench):
    """A small model, with sizes in files as cn_clip has them; in this process, the row of memory too."""
    pytest.importorskip("cn_clip")
    rows = [row for row in bench.ROWS if row != "loss"]                         # of 4,096 pairs
    output = called(bench, "--model", "small-vit", "--batch-size", 8, "--rows", ",".join(rows), "--rounds", 1, "--peer").splitlines()
    assert "default precision fp32" in output[0] and len(output) == 5 + len(rows)
    for row in output[4:]:
        assert ("%" in row) == ("encoding" in row or "step" in row and "alone" not in row), row
        ratio = re.search(r"\d  +\d+\.\d\d(  \d+\.\d\d-\d+\.\d\d)?$", row)
        assert bool(ratio) == ("recall" not in row and "micro-batches" not in row), row


def test_refusals(stopped, called):
    with pytest.raises(SystemExit):
        called(bench, "--model", "vit-x")
    assert "cn_clip has no tiny" in stopped(bench, "--model", "tiny", "--peer")
    assert "no row 'speed'" in stopped(bench, "--rows", "speed")
    assert "at least 2" in stopped(bench, "--batch-size", 1)
    for module, *more in ((bench,), (train, "--stage", 1)):
        assert "--compile: it is for ViTs" in stopped(module, "--model", "tiny", "--compile", *more)
