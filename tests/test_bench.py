"""The benchmark: that it counts what is computed, measures both sides alike, and compares results that are equal. (Its figures are in the README; no test is timed.)"""
import re

import pytest
import torch
from test_model import RESNET, VIT, batch, build
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train
from model import CONFIGS
from tools import bench


@pytest.mark.parametrize("cfg", [VIT, RESNET], ids=["vit", "resnet"])
def test_operations_are_those_that_torch_counts(cfg):
    """In the matrix products, convolutions and attention of a forward pass; and those of a training step are three times as many."""
    model, (pixels, ids) = build(cfg).eval(), batch(cfg)
    image, texts = bench.operations(cfg, bench.token_counts(ids))

    def counted(call):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    with torch.no_grad():
        assert counted(lambda: model.encode_image(pixels)) == len(pixels) * image
        assert counted(lambda: model.encode_text(ids)) == texts
    assert counted(lambda: model.encode_text(ids).sum().backward()) == pytest.approx(3 * texts, rel=0.01)


def test_operations_of_vit_b_16_are_the_published_ones():
    """17.6 billion multiplications and additions for a image (Radford et al. 2021; He et al. count them as one), less what the last layer leaves out: 10 of 12 C² for 196 of its 197 tokens."""
    image, _ = bench.operations(CONFIGS["vit-b-16"], [20])
    assert image / 2 == pytest.approx(17.58e9 - 196 * 10 * 768**2 - 197 * 196 * 2 * 768, rel=0.01)


def test_ours_and_the_peers_run_in_turn(monkeypatch):
    calls = []

    def timed(call, device):
        call()
        return {"ours": 0.05, "theirs": 0.3}[calls[-1]]

    monkeypatch.setattr(bench, "timed", timed)
    row = bench.Row("x", "", 1, lambda: calls.append("ours"), lambda: calls.append("theirs"))
    ours, theirs = bench.measured(row, torch.device("cpu"), 2)
    assert calls[-6:] == ["ours", "ours", "theirs"] * 2                         # what takes less than 0.1 s more often
    assert ours == [0.025] * 2 and theirs == [0.3] * 2
    assert "10.00" in bench.line(row, ours, [0.25, 0.25], {}) and "cn_clip" not in bench.line(row, ours, [], {})


def test_every_row_is_measured_and_equals_the_peer(called, small_bench):
    """A small model, with sizes in files as cn_clip has them; in this process, the row of memory too."""
    pytest.importorskip("cn_clip")
    rows = [row for row in bench.ROWS if row != "loss"]                         # of 4,096 pairs
    output = called(bench, "--model", "small-vit", "--batch-size", 8, "--rows", ",".join(rows), "--rounds", 1, "--peer").splitlines()
    assert "default precision fp32" in output[0] and len(output) == 5 + len(rows)
    for row in output[4:]:
        apart = [float(x) for x in re.findall(r"\d+e-\d+|0e\+00", row)]
        kept = "features kept" in row                                           # in half precision
        assert all(x <= (1e-2 if kept else 1e-5) for x in apart), row
        assert len(apart) == (1 if "encoding" in row else 2 if "step," in row and "alone" not in row or kept else 0), row
    assert "ids equal" in "".join(output)


def test_refusals(stopped):
    assert "not a known model" in stopped(bench, "--model", "vit-x")
    assert "cn_clip has no tiny" in stopped(bench, "--model", "tiny", "--peer")
    assert "no row 'speed'" in stopped(bench, "--rows", "speed")
    assert "out of range" in stopped(bench, "--batch-size", 1)
    for module, *more in ((bench,), (train, "--stage", 1)):
        assert "--compile: it is for ViTs" in stopped(module, "--model", "tiny", "--compile", *more)
