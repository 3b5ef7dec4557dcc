"""The loss: its value by hand and by loops, several matches, its shares of several processes; and the
tiled one equals autograd of the plain one, at little memory."""
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, on_processes

from loss import contrastive_loss, matches, tiled_loss


def embeddings(n=8, d=5, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return tuple(F.normalize(torch.randn(n, d, generator=g, dtype=dtype), dim=1) for _ in range(2))


def by_loops(image, text, scale, truth):
    """The formula of loss.py's docstring, term by term; truth (N, N) as lists."""
    N, total = len(image), 0.0
    S = [[scale * float(image[i] @ text[j]) for j in range(N)] for i in range(N)]
    for i in range(N):
        row, column = S[i], [S[k][i] for k in range(N)]
        for values, ones in ((row, truth[i]), (column, [truth[k][i] for k in range(N)])):
            log_sum = math.log(sum(math.exp(v) for v in values))
            total -= sum(y * (v - log_sum) for v, y in zip(values, ones)) / sum(ones)
    return total / (2 * N)


def test_hand_worked_pair():
    image = text = torch.eye(2)
    assert contrastive_loss(image, text, torch.tensor(1.0)).item() == pytest.approx(math.log(1 + math.exp(-1)))


def test_equals_the_formula_with_one_match_each():
    image, text = embeddings()
    assert contrastive_loss(image, text, torch.tensor(7.0, dtype=torch.float64)).item() == pytest.approx(by_loops(image, text, 7.0, torch.eye(8).tolist()), rel=1e-12)


# Captions 0..5 are the sentences a b c a d e; image 0 has a and c, image 1 b, 2 c and (in another pair) d, 3 a, 4 d, 5 e and one that is not in the batch.
IMAGE_KEYS = torch.tensor([[1, 3], [2, -1], [3, 4], [1, -1], [4, 4], [5, 77]])
TEXT_KEYS = torch.tensor([1, 2, 3, 1, 4, 5])
TRUTH = [[1, 0, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0], [0, 0, 1, 0, 1, 0], [1, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1]]


def test_a_caption_matches_every_image_that_it_describes():
    i, j = matches(IMAGE_KEYS, TEXT_KEYS)
    assert list(zip(i.tolist(), j.tolist())) == [(a, b) for a in range(6) for b in range(6) if TRUTH[a][b]]
    image, text = embeddings(6)
    loss = contrastive_loss(image, text, torch.tensor(7.0, dtype=torch.float64), (i, j))
    assert loss.item() == pytest.approx(by_loops(image, text, 7.0, TRUTH), rel=1e-12)


@pytest.mark.parametrize("N, M", [(150, 4), (40, 1), (1, 3)])
def test_matches_of_any_batch_equal_their_definition(N, M):
    g = torch.Generator().manual_seed(1)
    image_keys, text_keys = torch.randint(-1, 40, (N, M), generator=g), torch.randint(0, 60, (N,), generator=g)
    Y = (image_keys[:, :, None] == text_keys).any(dim=1)
    assert torch.equal(torch.stack(matches(image_keys, text_keys)), Y.nonzero().T)


# ---------------------------------------------------------------------------------------------------------------- processes and tiles


def _case(several):
    """12 pairs and their truth; `several`: pairs 0-7-… share captions, and images have a second caption that stands elsewhere in the batch."""
    sentences = torch.arange(12) % 7
    return embeddings(n=12), (matches(torch.stack([sentences, torch.arange(12) * 5 % 11], dim=1), sentences) if several else None)


def _plain(rank, world, several):
    embeds, truth = _case(several)
    image, text = (x.chunk(world)[rank].requires_grad_() for x in embeds)
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    loss = contrastive_loss(image, text, scale, truth)
    loss.backward()
    return loss.detach(), image.grad, text.grad, scale.grad


def _tiled(rank, world, several):
    embeds, truth = _case(several)
    image, text = (x.chunk(world)[rank] for x in embeds)
    scale = torch.tensor(9.0, dtype=torch.float64)
    return [tiled_loss(image, text, scale, truth, tile) for tile in (1, 12, 29, 60, 10**6)]         # stripes of 1, 1, 2, 5 and all rows: ragged ones among them


def _both(rank, world):
    return [[_plain(rank, world, several), *_tiled(rank, world, several)] for several in (False, True)]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_any_tile_on_any_number_of_processes_equals_autograd_of_the_plain_loss(world, tmp_path):
    """With one match a row and with several: the loss, and the gradients at both embeddings and at the scale, fp64, to 1e-12."""
    combine = sum, torch.cat, torch.cat, sum
    processes = on_processes(_both, world, tmp_path) if world > 1 else [_both(0, 1)]
    largest = 0.0
    for several, shares in enumerate(zip(*processes)):
        whole = _plain(0, 1, bool(several))
        for way in zip(*shares):  # plain, then each tile: what the processes returned
            for function, expected, parts in zip(combine, whole, zip(*way)):
                largest = max(largest, (function(list(parts)) - expected).abs().max().item())
    print(f"\n{world} processes: largest difference {largest:.1e}")
    assert largest < 1e-12


MEMORY = """
import sys, torch, torch.nn.functional as F
from loss import tiled_loss
N, D = int(sys.argv[1]), 512
image, text = (F.normalize(torch.randn(N, D), dim=1) for _ in range(2))
tiled_loss(image[:64], text[:64], torch.tensor(14.0))                           # what the libraries need once
kilobytes = lambda what: [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what)][0]
open("/proc/self/clear_refs", "w").write("5")                                   # the peak begins anew
before = kilobytes("VmRSS")
tiled_loss(image, text, torch.tensor(14.0))
print((kilobytes("VmHWM") - before) * 1024 / 1e9)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_memory_of_the_tiled_loss():
    """Above the embeddings: the two gradients and some stripes. (CE_CLIP_LOSS_PAIRS=32768 asks for the paper's size: one matrix of the plain loss would have 4.3 GB.)"""
    pairs = int(os.environ.get("CE_CLIP_LOSS_PAIRS", 8192))
    more = float(subprocess.run([sys.executable, "-c", MEMORY, str(pairs)], cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    print(f"\ntiled loss, N = {pairs:,}, D = 512: {more:.3f} GB above the embeddings")
    assert more < 0.1 + 2 * pairs * 512 * 4 / 1e9
