"""Recall: by hand, against a plain loop, ties, several correct items, bounded memory; the paper's tables."""
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import refused, script

import data
import evaluate
from evaluate import best_ranks, retrieval_recall, table


def by_loops(image, text, positives):
    """Recall as its definition says, one query at a time."""
    captions_of = [[t for t, images in enumerate(positives) if i in images] for i in range(len(image))]
    result = {}
    for way, queries, candidates, correct in (("text_to_image", text, image, positives), ("image_to_text", image, text, captions_of)):
        hits = {k: [] for k in (1, 5, 10)}
        for q, right in zip(queries, correct):
            if right:
                scores = [(-float(q @ c), place) for place, c in enumerate(candidates)]
                order = [place for _, place in sorted(scores)]
                for k in hits:
                    hits[k].append(any(place in right for place in order[:k]))
        result[way] = {f"R@{k}": 100 * float(np.mean(h)) for k, h in hits.items()}
    return result


def test_hand_worked_several_captions_per_picture_and_pictures_per_caption():
    image = torch.eye(3)
    text = F.normalize(torch.tensor([[1.0, 0.1, 0], [0, 1, 0.1], [0.1, 0.2, 1], [1, 0.5, 0]]), dim=1)
    positives = [[0], [2], [1, 2], [1]]                                         # caption 2 describes two pictures, pictures 1 and 2 have two captions each
    result = retrieval_recall(image, text, positives)
    assert result["text_to_image"]["R@1"] == 50.0                               # captions 0 and 2 hit, 1 and 3 miss
    assert result["image_to_text"]["R@1"] == pytest.approx(100 * 2 / 3)         # picture 0 -> 0 right; picture 1 -> 1 wrong; picture 2 -> 2 right
    assert result["text_to_image"]["R@5"] == result["image_to_text"]["R@10"] == 100.0
    assert result["text_to_image"]["MR"] == pytest.approx((50 + 100 + 100) / 3)
    assert result["text_to_image"]["chance_R@1"] == pytest.approx(100 * (1 + 1 + 2 + 1) / 3 / 4)


def test_equal_similarities_rank_in_candidate_order():
    queries, candidates = torch.ones(4, 1), torch.ones(3, 1)
    assert best_ranks(queries, candidates, [[0], [1], [2], [2, 1]]).tolist() == [0, 1, 2, 1]


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_equals_a_plain_loop(chunk):
    g = torch.Generator().manual_seed(0)
    image, text = (torch.randint(-1, 2, (n, 4), generator=g).float() for n in (40, 70))             # small integers: many exact ties
    positives = [sorted(set(torch.randint(0, 40, (int(torch.randint(0, 4, (), generator=g)),), generator=g).tolist())) for _ in range(70)]
    result, expected = retrieval_recall(image, text, positives, chunk), by_loops(image, text, positives)
    for way in expected:
        assert {k: result[way][k] for k in expected[way]} == pytest.approx(expected[way])


def test_queries_without_an_answer_are_left_out_and_counted():
    result = retrieval_recall(torch.eye(3), torch.eye(3), [[0], [], [2]])
    assert result["text_to_image"]["queries"] == 2 and result["text_to_image"]["without_answer"] == 1
    assert result["image_to_text"]["queries"] == 2 and result["text_to_image"]["R@1"] == 100.0


def test_never_more_than_a_chunk_of_similarities(monkeypatch):
    largest = []
    real = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: largest.append(len(a)) or real(a, b))
    retrieval_recall(torch.randn(300, 4), torch.randn(900, 4), [[i % 300] for i in range(900)], chunk=64)
    assert max(largest) == 64


def test_embeddings_that_are_not_finite_are_refused():
    with pytest.raises(data.BadInput, match="NaN"):
        retrieval_recall(torch.full((2, 2), math.nan), torch.eye(2), [[0], [1]])


def test_published_rows_are_those_of_the_paper():
    """The mean recalls that the paper prints in table 6 are the means of its R@1, R@5, R@10."""
    before, after = evaluate.PUBLISHED["ap-id"][1]
    means = [round(sum(row[a : a + 3]) / 3, 1) for row in (before, after) for a in (2, 5)]
    assert means == [88.9, 89.7, 92.6, 91.5]
    assert [len(rows) for _, rows in evaluate.PUBLISHED.values()] == [6, 6, 2]


@pytest.mark.parametrize("model, neighbour", [("vit-b-16", "CE-CLIP ViT-B/16"), ("rn50", "CE-CLIP ViT-B/16"), ("vit-l-14", "CE-CLIP ViT-L/14")])
def test_measured_row_ends_its_size_group(model, neighbour):
    lines = table(retrieval_recall(torch.eye(3), torch.eye(3), [[0], [1], [2]]), "coco-cn", "test", model, "some.pt").splitlines()
    at = next(i for i, line in enumerate(lines) if "> " + model in line)
    assert neighbour in lines[at - 1] and "100.0  100.0  100.0  100.0" in lines[at] and len(lines) == 3 + 7 + 1


def test_published_rows_are_for_the_test_split_alone():
    result = retrieval_recall(torch.eye(3), torch.eye(3), [[0], [1], [2]])
    assert "Wukong" in table(result, "flickr30k-cn", "test", "vit-b-16", "x") and "Wukong" not in table(result, "flickr30k-cn", "valid", "vit-b-16", "x")


def test_a_split_without_answers_is_refused():
    with pytest.raises(data.BadInput, match="no caption of the split"):
        retrieval_recall(torch.eye(2), torch.eye(2), [[], []])


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    script("train.py", "--stage", "2", "--max-steps", 1, "--batch-size", 4, "--workers", 0, "--precision", "fp32", "--out", out)
    return out / "last.pt"


def test_command_line_on_one_and_two_processes(tiny_checkpoint, tsv_folder, tmp_path):
    figures = []
    for processes in (1, 2):
        output = script("evaluate.py", "--ckpt", tiny_checkpoint, "--data", tsv_folder, "--json", tmp_path / f"{processes}.json", "--batch-size", 5, processes=processes)
        assert output.count("> tiny") == 1
        figures.append(json.loads((tmp_path / f"{processes}.json").read_text(encoding="utf-8")))
    assert figures[0] == figures[1] and figures[0]["text_to_image"]["queries"] == 12


@pytest.mark.parametrize("arguments, message", [
    (["--ckpt", "nowhere.pt", "--data", "demo"], "nowhere.pt: there is no such checkpoint"),
    (["--ckpt", "CKPT", "--data", "imagenet"], "neither a folder, nor a pattern of tar shards, nor a known data set (coco-cn, flickr30k-cn, muge, ap-id, demo)"),
    (["--ckpt", "CKPT", "--data", "coco-cn", "--data-root", "nowhere"], "there is no folder nowhere/COCO-CN"),
    (["--ckpt", "CKPT", "--data", "demo", "--split", "dev"], "no split 'dev'; it has train, valid, test"),
    (["--ckpt", "CKPT", "--data", "demo", "--split", "train"], "endless"),
    (["--ckpt", "CKPT", "--data", "demo", "--json", "nowhere/a.json"], "name a file in a folder that is there"),
    (["--ckpt", "CKPT", "--data", "demo", "--json", ""], "name a file in a folder that is there"),
    (["--ckpt", "CKPT", "--data", "demo", "--batch-size", "0"], "--batch-size 0"),
])
def test_wrong_arguments_give_one_line(tiny_checkpoint, arguments, message):
    assert message in refused("evaluate.py", *[tiny_checkpoint if a == "CKPT" else a for a in arguments])
