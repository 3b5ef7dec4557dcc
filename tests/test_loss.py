"""The loss: its value by hand and by loops, several positives, and that processes share it exactly."""
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import on_processes

from loss import contrastive_loss


def embeddings(n=8, d=5, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return tuple(F.normalize(torch.randn(n, d, generator=g, dtype=dtype), dim=1) for _ in range(2))


def by_loops(image, text, scale, truth):
    """The formula of loss.py's docstring, term by term."""
    N, total = len(image), 0.0
    S = [[scale * float(image[i] @ text[j]) for j in range(N)] for i in range(N)]
    for i in range(N):
        row, column = S[i], [S[k][i] for k in range(N)]
        for values, matches in ((row, truth[i]), (column, [truth[k][i] for k in range(N)])):
            log_sum = math.log(sum(math.exp(v) for v in values))
            total -= sum(y * (v - log_sum) for v, y in zip(values, matches)) / sum(matches)
    return total / (2 * N)


def test_hand_worked_pair():
    image = text = torch.eye(2)
    assert contrastive_loss(image, text, torch.tensor(1.0)).item() == pytest.approx(math.log(1 + math.exp(-1)))


def test_equals_the_formula_with_one_match_each():
    image, text = embeddings()
    assert contrastive_loss(image, text, torch.tensor(7.0, dtype=torch.float64)).item() == pytest.approx(by_loops(image, text, 7.0, torch.eye(8).tolist()), rel=1e-12)


def test_pairs_that_share_a_picture_or_a_caption_are_positives():
    image, text = embeddings()
    image_ids, text_ids = torch.tensor([0, 1, 0, 3, 4, 5, 6, 7]), torch.tensor([0, 1, 2, 3, 4, 4, 6, 7])
    truth = torch.eye(8)
    truth[0, 2] = truth[2, 0] = truth[4, 5] = truth[5, 4] = 1
    loss = contrastive_loss(image, text, torch.tensor(7.0, dtype=torch.float64), image_ids, text_ids)
    assert loss.item() == pytest.approx(by_loops(image, text, 7.0, truth.tolist()), rel=1e-12)


def _share(rank, world, ids):
    image, text = (x.chunk(world)[rank].requires_grad_() for x in embeddings(n=12))
    logit_scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    keys = [x.chunk(world)[rank] for x in (torch.arange(12) % 7, torch.arange(12) % 11)] if ids else []
    loss = contrastive_loss(image, text, logit_scale.exp(), *keys)
    loss.backward()
    return loss.detach(), image.grad, text.grad, logit_scale.grad


@pytest.mark.parametrize("ids", [False, True], ids=["one match", "several matches"])
@pytest.mark.parametrize("world", [2, 3])
def test_shares_of_processes_sum_to_the_loss_and_give_its_gradient(world, ids, tmp_path):
    whole = on_processes(_share, 1, tmp_path / "one", ids)[0]
    shares = on_processes(_share, world, tmp_path / "many", ids)
    combine = (sum, torch.cat, torch.cat, sum)
    for expected, function, parts in zip(whole, combine, zip(*shares)):
        torch.testing.assert_close(function(list(parts)), expected, rtol=1e-12, atol=1e-14)
