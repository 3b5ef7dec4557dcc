"""Recall: by hand, against a plain loop and cn_clip, ties, several correct items, bounded memory, intervals; the paper's tables; kept features; zero-shot classification."""
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import types

import numpy as np
import peers
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, png, refused, script, write_tsv_split

import checkpoint
import evaluate
from evaluate import Ranking, best_ranks, retrieval_recall
from model import CLIP, CONFIGS
from support import system
from support.images import decoded
from support.processes import precision_of
from support.system import BadInput
from support.tables import PUBLISHED, add_intervals, bootstrap_interval, table
from tools import classify
from tools.classify import class_root, classification_of, open_classes


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


def test_hand_worked_several_captions_per_image_and_images_per_caption():
    image = torch.eye(3)
    text = F.normalize(torch.tensor([[1.0, 0.1, 0], [0, 1, 0.1], [0.1, 0.2, 1], [1, 0.5, 0]]), dim=1)
    positives = [[0], [2], [1, 2], [1]]                                         # caption 2 describes two images, images 1 and 2 have two captions each
    result = retrieval_recall(image, text, positives)
    assert result["text_to_image"]["R@1"] == 50.0                               # captions 0 and 2 hit, 1 and 3 miss
    assert result["image_to_text"]["R@1"] == pytest.approx(100 * 2 / 3)         # image 0 -> 0 right; image 1 -> 1 wrong; image 2 -> 2 right
    assert result["text_to_image"]["R@5"] == result["image_to_text"]["R@10"] == 100.0
    assert result["text_to_image"]["MR"] == pytest.approx((50 + 100 + 100) / 3)
    assert result["text_to_image"]["chance_R@1"] == pytest.approx(100 * (1 + 1 + 2 + 1) / 3 / 4)
    assert {type(x) for x in result["text_to_image"].values()} == {float, int}  # a checkpoint with NumPy's kinds would be refused
    assert result["text_to_image"]["chance_MR"] == pytest.approx((100 * 5 / 12 + 100 + 100) / 3)    # of 3 candidates 5 guesses are all


def test_what_guessing_gives():
    """Against 12,000 random orders of 30 candidates, of which 1, 2 or 5 are right."""
    correct = [[0], [1, 2], [3, 4, 5, 6, 7]] * 4000
    ranks = best_ranks(torch.rand(12_000, 30, generator=torch.Generator().manual_seed(0)), torch.eye(30), correct)
    result = Ranking(ranks, correct, 30).recall()
    assert result["R@1"] == pytest.approx(result["chance_R@1"], abs=1) and result["MR"] == pytest.approx(result["chance_MR"], abs=1) and 35 < result["MR"] < 36


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


@pytest.mark.slow
def test_memory_of_recall_does_not_grow_with_the_queries():
    """CE_CLIP_RECALL=100000 asks for 100,000 x 100,000 at width 512 (minutes on two cores); the matrix alone would take 40 GB."""
    n, width = int(os.environ.get("CE_CLIP_RECALL", 20_000)), 512 if "CE_CLIP_RECALL" in os.environ else 32
    probe = f"""
import resource, torch, evaluate
peak = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 2**20
image, text = torch.randn({n}, {width}), torch.randn({n}, {width})
evaluate.best_ranks(text[:64], image, [[0]] * 64)                               # libraries have what they need
start = peak()
evaluate.retrieval_recall(image, text, [[i] for i in range({n})])
print(peak() - start, peak())
"""
    above, whole = map(float, subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())
    print(f"\nrecall among {n:,} x {n:,} of width {width}: {above:.2f} GiB above the embeddings, the process {whole:.2f} GiB")
    assert above < 0.5 < n * n * 4 / 2**30                                     # the whole matrix would be found out
    assert whole < 2


def many(images=1000, texts=5000, width=512, seed=0):
    """Random features; captions that describe several images, images with several captions. They are whole numbers, and small enough that similarities are exact in any order of
    summation: so equal ones, of which there are a few, are equal for everyone."""
    g = torch.Generator().manual_seed(seed)
    image, text = torch.randint(-60, 61, (images, width), generator=g), torch.randint(-60, 61, (texts, width), generator=g)
    positives = [sorted({t % images, *torch.randint(0, images, (t % 3,), generator=g).tolist()}) for t in range(texts)]
    text += image[[right[-1] for right in positives]] // 6                      # so that something is found
    return image.float(), text.float(), positives


@pytest.mark.slow
def test_equals_the_published_evaluation(tmp_path):
    """cn_clip's five scripts, and from the same features to the table ours; the times are printed side by side."""
    pytest.importorskip("cn_clip")
    image, text, positives = many()
    expected, theirs = peers.cn_clip_recall(tmp_path, image, text, positives)
    np.save(tmp_path / "image.npy", image), np.save(tmp_path / "text.npy", text)
    start = time.perf_counter()
    image, text = (torch.from_numpy(np.load(tmp_path / f"{name}.npy")) for name in ("image", "text"))
    record = a_record(image, text, positives)
    table([record], "random", "test")
    ours = time.perf_counter() - start
    captions_of = [[t for t, right in enumerate(positives) if i in right] for i in range(len(image))]
    for way, similarity, correct in (("text_to_image", text @ image.T, positives), ("image_to_text", image @ text.T, captions_of)):
        assert {k: record[way][k] for k in expected[way]} == pytest.approx(expected[way])
        order = np.argsort(-similarity.numpy(), axis=1, kind="stable")          # and by a loop over the queries
        for k in (1, 5, 10):
            assert record[way][f"R@{k}"] == pytest.approx(100 * np.mean([bool(set(found[:k]) & set(right)) for found, right in zip(order.tolist(), correct)]))
        assert 5 < record[way]["R@1"] < 95
    print(f"\nfrom features to the table, 1,000 images, 5,000 captions: cn_clip {theirs:.1f} s, ours {ours:.2f} s, ratio {theirs / ours:.0f}")


def a_record(image, text, positives, **more):
    """What evaluate.py knows of a checkpoint, from embeddings."""
    rankings = evaluate.rank_both_ways(image, text, positives)
    record = {"model": "vit-b-16", "ckpt": "some.pt", "setting": "zero-shot", "precision": "fp32", "pairs": sum(map(len, positives))} | more
    record |= {way: ranking.recall() for way, ranking in rankings.items()}
    add_intervals(record, rankings, rankings)
    return record


EYE = torch.eye(3), torch.eye(3), [[0], [1], [2]]


def test_embeddings_that_are_not_finite_are_refused():
    with pytest.raises(system.BadInput, match="NaN"):
        retrieval_recall(torch.full((2, 2), math.nan), torch.eye(2), [[0], [1]])


def test_published_rows_are_those_of_the_paper():
    """The mean recalls that the paper prints in table 6 are the means of its R@1, R@5, R@10."""
    before, after = PUBLISHED["ap-id"][1]
    means = [round(sum(row[a : a + 3]) / 3, 1) for row in (before, after) for a in (3, 6)]
    assert means == [88.9, 89.7, 92.6, 91.5]
    assert [len(rows) for _, rows in PUBLISHED.values()] == [6, 6, 2]


@pytest.mark.parametrize("model, neighbour", [("vit-b-16", "CE-CLIP ViT-B/16"), ("rn50", "CE-CLIP ViT-B/16"), ("vit-l-14", "CE-CLIP ViT-L/14")])
def test_measured_row_ends_its_size_group(model, neighbour):
    lines = table([a_record(*EYE, model=model)], "coco-cn", "test").splitlines()
    at = next(i for i, line in enumerate(lines) if "> " + model in line)
    assert neighbour in lines[at - 1] and "fine-tuned" in lines[at - 1] and lines[at].split()[-10:] == ["100.0", "±0.0", "100.0", "100.0", "100.0"] * 2


def test_published_rows_are_for_the_test_split_alone():
    assert "Wukong" in table([a_record(*EYE)], "flickr30k-cn", "test") and "Wukong" not in table([a_record(*EYE)], "flickr30k-cn", "valid")


def test_pairs_are_compared_with_table_1():
    assert "3 pairs; the paper's table 1 has 1,053, so the published rows are of another set." in table([a_record(*EYE)], "coco-cn", "test")
    assert "3 pairs; the paper's table 1 has 3,185." in table([a_record(*EYE)], "coco-cn", "valid")     # no published row is shown
    assert "1,053 pairs, as in the paper's table 1." in table([a_record(*EYE, pairs=1053)], "coco-cn", "test")
    assert "table 1" not in table([a_record(*EYE)], "own", "test")


# ---------------------------------------------------------------------------------------------------------------- intervals


def test_interval_holds_what_other_samples_give():
    """Of queries that are hits with chance 0.3, five and five of one image alike: the 95 % interval of one sample against the spread of 300 other samples."""
    rng = np.random.default_rng(0)
    sample = lambda: np.repeat(rng.random(200) < 0.3, 5).astype(float)
    groups = np.repeat(np.arange(200), 5)
    low, high = bootstrap_interval(sample(), groups)
    truth = np.quantile([100 * sample().mean() for _ in range(300)], (0.025, 0.975))
    assert high - low == pytest.approx(truth[1] - truth[0], rel=0.2)
    alone = bootstrap_interval(sample(), np.arange(1000))                        # as if captions were independent: much too narrow
    assert (alone[1] - alone[0]) < 0.6 * (high - low)


def test_resampled_mean_by_hand():
    assert bootstrap_interval(np.ones(4), np.arange(4)) == [100.0, 100.0]
    assert bootstrap_interval(np.array([1.0, 1.0, 0.0]), np.array([7, 7, 9])) == [0.0, 100.0]          # two images: drawn 7 7, 7 9 or 9 9
    low, high = bootstrap_interval(np.array([1.0, 0.0] * 50), np.arange(100) // 2)                      # a hit and a miss of each image
    assert low == high == 50.0


def test_a_split_without_answers_is_refused():
    with pytest.raises(system.BadInput, match="no caption of the split"):
        retrieval_recall(torch.eye(2), torch.eye(2), [[], []])


# ---------------------------------------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "last.pt"
    torch.manual_seed(0)
    checkpoint.save(path, CLIP(CONFIGS["tiny"]))
    return path


@pytest.fixture
def little(tmp_path):
    """A data set of 11 images: with batches of 5 nothing divides. A image has several captions, a caption several images; one caption and one image have no partner."""
    folder = tmp_path / "little"
    write_tsv_split(folder, "test", images=11, captions_per_image=2)
    lines = [json.loads(line) for line in (folder / "test_texts.jsonl").read_text(encoding="utf-8").splitlines()]
    lines[3]["image_ids"] = [2, 3]
    lines[4]["image_ids"] = []
    lines = [line for line in lines if line["image_ids"] != [11]]
    (folder / "test_texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def figures(path):
    return json.loads(path.read_text(encoding="utf-8"))["results"]


def test_two_processes_give_the_figures_of_one(one_thread, called, tiny_checkpoint, little, tmp_path):
    command = lambda n: ["--ckpt", tiny_checkpoint, "--data", little, "--json", tmp_path / f"{n}.json", "--features", tmp_path / str(n), "--batch-size", 5, "--precision", "fp32", "--workers", n - 1]
    assert called(evaluate, *command(1)).count("> tiny") == 1
    assert script("evaluate.py", *command(2), processes=2).count("> tiny") == 1
    one, two = ([*tmp_path.glob(f"{n}/*/*/*.npy")] for n in (1, 2))
    assert len(one) == 2 and all(a.read_bytes() == b.read_bytes() for a, b in zip(sorted(one), sorted(two)))           # bit for bit
    assert figures(tmp_path / "1.json") == figures(tmp_path / "2.json")
    assert figures(tmp_path / "1.json")[0]["text_to_image"]["queries"] == 19


def test_what_the_table_says(called, tiny_checkpoint, little, tmp_path):
    output = called(evaluate, "--ckpt", tiny_checkpoint, "--data", little, "--workers", 0, "--json", tmp_path / "a.json")
    assert "little, test split (%)" in output and f"> tiny ({tiny_checkpoint})  zero-shot" in output
    assert "1 caption without image in the split: no query" in output and "1 image without caption" in output
    record, = figures(tmp_path / "a.json")
    low, high = record["text_to_image"]["R@1_interval"]
    assert low <= record["text_to_image"]["R@1"] <= high and record["pairs"] == 20 and record["setting"] == "zero-shot"


@pytest.mark.parametrize("stage, step, trained_on, evaluated_on, setting", [
    ("finetune", 9, "coco-cn", "coco-cn", "fine-tuned"),
    ("finetune", 9, "/some/COCO-CN", "coco-cn", "fine-tuned"),
    ("2", 9, "demo", "demo", "trained"),
    ("finetune", 0, "coco-cn", "coco-cn", "zero-shot"),
    ("finetune", 9, "coco-cn", "muge", "zero-shot"),
    ("finetune", 9, "a/images", "b/images", "zero-shot"),                   # other folders of the same name
    ("finetune", 9, "a/images", "./a/images/", "fine-tuned"),
    ("finetune", 9, "a/*.tar", "b/*.tar", "zero-shot"),
    (None, 9, "coco-cn", "coco-cn", "zero-shot"),
])
def test_zero_shot_and_fine_tuned_are_told_apart(stage, step, trained_on, evaluated_on, setting):
    state = {"step": step, "settings": {"stage": stage, "data": trained_on}} if stage else {"step": step}
    assert evaluate.setting_of(state, evaluated_on) == setting


def test_what_earlier_runs_have_seen_counts():
    """A fine-tune on muge of weights that were trained on COCO-CN: the start, before its first step, and the end."""
    settings = {"stage": "finetune", "data": "muge", "seen": [["coco-cn", "2"]]}
    assert [evaluate.setting_of({"step": 0, "settings": settings}, name) for name in ("coco-cn", "muge")] == ["trained", "zero-shot"]
    assert [evaluate.setting_of({"step": 9, "settings": settings}, name) for name in ("coco-cn", "muge")] == ["trained", "fine-tuned"]


def test_several_checkpoints_give_one_table_with_their_difference(called, tiny_checkpoint, little, tmp_path):
    other = tmp_path / "other.pt"
    torch.manual_seed(1)
    checkpoint.save(other, CLIP(CONFIGS["tiny"]))
    output = called(evaluate, "--ckpt", tiny_checkpoint, other, "--data", little, "--workers", 0, "--json", tmp_path / "a.json", "--features", tmp_path / "features")
    before, after = figures(tmp_path / "a.json")
    assert output.count("> tiny") == 2 and f"R@1 of {other} less that of {tiny_checkpoint}" in output
    change = after["change_of_R@1"]["image_to_text"]
    assert change["mean"] == pytest.approx(after["image_to_text"]["R@1"] - before["image_to_text"]["R@1"]) and change["interval"][0] <= change["mean"] <= change["interval"][1]
    alone = called(evaluate, "--ckpt", other, "--data", little, "--workers", 0, "--features", tmp_path / "features")
    row = lambda text: next(line.split() for line in text.splitlines() if f"({other})" in line)
    assert row(output) == row(alone)


def test_kept_features_are_used_again_and_stale_ones_refused(called, stopped, tiny_checkpoint, little, tmp_path, monkeypatch):
    command = [evaluate, "--ckpt", tiny_checkpoint, "--data", little, "--workers", 0, "--features", tmp_path / "features", "--precision"]
    first = called(*command, "fp32")
    folder, = (tmp_path / "features").glob("*/*")
    assert folder.name == "little-test"
    about = json.loads((folder / "features.json").read_text(encoding="utf-8"))
    image_embed = np.load(folder / "image_embed.npy")
    assert about["image_ids"] == [str(i) for i in range(1, 12)] and about["texts"][0] == "第1张图片，说法0" and image_embed.dtype == np.float32 and image_embed.shape == (11, 128)
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "embed_split", None)                            # nothing is computed again
        assert called(*command, "fp32") == first.replace("embeddings kept in", "embeddings of").replace("little-test\n", "little-test used again\n")
        assert "precision fp32, now it is bf16" in stopped(*command, "bf16")
        for wrong in (image_embed[:5], image_embed[::-1]):                      # fewer, or other rows of the same shape
            np.save(folder / "image_embed.npy", wrong)
            assert "not those that features.json describes" in stopped(*command, "fp32")
        np.save(folder / "image_embed.npy", image_embed)
        (folder / "features.json").write_text(json.dumps({key: x for key, x in about.items() if key != "image_ids"}))
        assert "not those that features.json describes" in stopped(*command, "fp32")
        (folder / "features.json").write_text("[]")
        assert "features.json cannot be read" in stopped(*command, "fp32")
        (folder / "features.json").write_text(json.dumps(about | {"texts": about["texts"][::-1]}))
        assert "not those that features.json describes" in stopped(*command, "fp32")
        for damage in (b"cut", b""):
            (folder / "image_embed.npy").write_bytes(damage)
            assert "cannot be read" in stopped(*command, "fp32")
        np.save(folder / "image_embed.npy", image_embed)
        (folder / "features.json").write_text(json.dumps(about))
        images, changed = (little / "test_imgs.tsv").read_text(), os.stat(little / "test_imgs.tsv")
        (little / "test_imgs.tsv").write_text(images + "12\t" + images.split("\t")[1].split()[0][:-4] + "\n")          # one more, and with it another file
        assert "files " in stopped(*command, "fp32")
        (little / "test_imgs.tsv").write_text(images)
        os.utime(little / "test_imgs.tsv", ns=(changed.st_atime_ns, changed.st_mtime_ns))
    torch.manual_seed(5)
    checkpoint.save(tiny_checkpoint.with_name("new.pt"), CLIP(CONFIGS["tiny"]))
    original = tiny_checkpoint.read_bytes()
    os.replace(tiny_checkpoint.with_name("new.pt"), tiny_checkpoint)            # other weights under the same name
    assert "weights " in stopped(*command, "fp32")
    tiny_checkpoint.write_bytes(original)
    called(*command, "fp32")                                                    # as they were
    shutil.rmtree(folder)
    called(*command, "bf16")
    assert np.load(folder / "image_embed.npy").dtype == np.float16


@pytest.mark.parametrize("arguments, message", [
    (["--ckpt", "nowhere.pt", "--data", "LITTLE"], "nowhere.pt: there is no such checkpoint"),
    (["--ckpt", "CKPT", "nowhere.pt", "--data", "LITTLE"], "nowhere.pt: there is no such checkpoint"),
    (["--ckpt", "CKPT", "--data", "imagenet"], "neither a folder, nor a pattern of tar shards, nor a known data set (coco-cn, flickr30k-cn, muge, ap-id"),
    (["--ckpt", "CKPT", "--data", "coco-cn", "--data-root", "nowhere"], "there is no folder nowhere/COCO-CN"),
    (["--ckpt", "CKPT", "--data", "LITTLE", "--split", "dev"], "no split 'dev' (dev_imgs.tsv or dev-000000.tar, …); it has test"),
    (["--ckpt", "CKPT", "--data", "LITTLE", "--json", "nowhere/a.json"], "name a file in a folder that"),
    (["--ckpt", "CKPT", "--data", "LITTLE", "--json", ""], "name a file in a folder that"),
    (["--ckpt", "CKPT", "--data", "LITTLE", "--report", "tests"], "--report 'tests': name a file"),
    (["--ckpt", "CKPT", "--data", "LITTLE", "--report", "a", "--json", "./a"], "name two files"),
    (["--ckpt", "CKPT", "--data", "LITTLE", "--batch-size", "0"], "--batch-size 0"),
    (["--ckpt", "CKPT", "--data", "LITTLE", "--features", "CKPT"], "name another folder"),
    (["--ckpt", "CKPT", "CKPT", "--data", "LITTLE", "--features", "a"], "two of the checkpoints would have the same folder"),
    (["--ckpt", "CKPT", "--data", "a*.tar", "--split", "test"], "a pattern of shards has no splits"),
])
def test_wrong_arguments_give_one_line(stopped, tiny_checkpoint, little, arguments, message):
    assert message in stopped(evaluate, *[{"CKPT": tiny_checkpoint, "LITTLE": little}.get(a, a) for a in arguments])


@pytest.mark.parametrize("arguments, message", [
    (["nowhere"], "nowhere: 0 classes and 0 images"),
    (["LITTLE", "--split", "dev"], "no split 'dev'; it has none"),
    (["LITTLE"], "0 classes and 0 images"),
    (["LITTLE", "--workers", "-1"], "--workers -1"),
])
def test_wrong_arguments_of_classify_give_one_line(stopped, tiny_checkpoint, little, arguments, message):
    assert message in stopped(classify, *[{"LITTLE": little}.get(a, a) for a in arguments], "--ckpt", tiny_checkpoint)


def test_a_refusal_is_one_line_and_a_status():
    assert "nowhere.pt: there is no such checkpoint" in refused("evaluate.py", "--ckpt", "nowhere.pt", "--data", "tests")


def test_classify_is_found_by_its_older_name():
    assert "no split 'dev'" in refused("evaluate.py", "--ckpt", "nowhere.pt", "--classify", "tests", "--split", "dev")


# ---------------------------------------------------------------------------------------------------------------- zero-shot classification


def write_classes(root, folders, images=3):
    for n, name in enumerate(folders):
        (root / name).mkdir(parents=True)
        for k in range(images):
            (root / name / f"{k}.png").write_bytes(png(seed=10 * n + k))
    return root


@pytest.fixture
def elevater(tmp_path):
    write_classes(tmp_path / "pets/test", ["000", "001", "002"])
    (tmp_path / "pets/label_cn.txt").write_text("猫\n狗\n“红” 鱼\n", encoding="utf-8")
    return tmp_path / "pets"


def test_class_folders_in_both_layouts(elevater, tmp_path):
    names, images, labels = open_classes(class_root(elevater))
    assert names == ["猫", "狗", "“红” 鱼"] and labels == [0, 0, 0, 1, 1, 1, 2, 2, 2] and images[4] == elevater / "test/001/1.png"
    names, _, labels = open_classes(class_root(write_classes(tmp_path / "own", ["猫", "狗", ".cache"])))
    assert sorted(names) == sorted(["猫", "狗"]) and len(labels) == 6
    assert open_classes(class_root(write_classes(tmp_path / "split/valid", ["a", "b"]).parent, "valid"))[0] == ["a", "b"]
    named = write_classes(tmp_path / "named/test", ["狗", "猫"]).parent         # folders with the classes' names, in another order than the lines
    (named / "label_cn.txt").write_text("猫\n狗\n", encoding="utf-8")
    assert {path.parent.name: names[label] for names, images, labels in [open_classes(class_root(named))] for path, label in zip(images, labels)} == {"狗": "狗", "猫": "猫"}
    imagenet = write_classes(tmp_path / "imagenet/test", ["n02", "n01"]).parent
    (imagenet / "label_cn.txt").write_text("猫\n狗\n", encoding="utf-8")
    assert {path.parent.name: label for _, images, labels in [open_classes(class_root(imagenet, "test"))] for path, label in zip(images, labels)} == {"n01": 0, "n02": 1}


def test_the_name_of_a_class_is_one_line(tmp_path):
    root = write_classes(tmp_path / "k", ["x\nerror: forged", "猫 \u2028\t狗"])
    assert sorted(open_classes(root)[0]) == ["x error: forged", "猫 狗"]


@pytest.mark.parametrize("place", ["猫/s.png", "外", "label_cn.txt"])
def test_links_out_of_a_class_folder_are_refused(tmp_path, place):
    own, theirs = write_classes(tmp_path / "own", ["猫", "狗"], 1), write_classes(tmp_path / "theirs", ["x"], 1)
    (theirs / "label_cn.txt").write_text("狗\n猫\n", encoding="utf-8")
    (own / place).symlink_to({"猫/s.png": next((theirs / "x").iterdir()), "外": theirs / "x", "label_cn.txt": theirs / "label_cn.txt"}[place])
    with pytest.raises(BadInput, match=f"{place}: a link out of .*own; --allow-outside reads it"):
        open_classes(own)
    assert len(open_classes(own, allow_outside=True)[1]) >= 2
    (own / place).unlink()
    (own / "狗/again.png").symlink_to(next((own / "猫").iterdir()))                # inside
    assert len(open_classes(own)[1]) == 3


def test_a_label_file_of_very_many_lines_is_refused(tmp_path):
    own = write_classes(tmp_path / "own", ["0", "1"], 1)
    (own / "label_cn.txt").write_text("猫\n" * 100_001, encoding="utf-8")
    with pytest.raises(BadInput, match="100001 classes and 2 images; expected a folder for each of 2 to 100,000 classes"):
        open_classes(own)


def test_a_class_may_be_called_test(tmp_path):
    assert open_classes(class_root(write_classes(tmp_path / "k", ["test", "狗"])))[0] == ["test", "狗"]


@pytest.mark.filterwarnings("ignore")
def test_odd_class_folders_are_named_in_a_warning(elevater):
    for path in (elevater / "test/000").iterdir():
        path.unlink()
    with pytest.warns(UserWarning, match=re.escape("classes without an image: 1 (猫)")):
        open_classes(elevater / "test")
    (elevater / "label_cn.txt").write_text("002\n001\n000\n")                   # names that are numbers: the folders of these names
    assert open_classes(elevater / "test")[2] == [1, 1, 1, 0, 0, 0]
    (elevater / "label_cn.txt").unlink()
    with pytest.warns(UserWarning, match="the folders' numbers are taken for names"):
        assert open_classes(elevater / "test")[0] == ["000", "001", "002"]


def test_classes_that_look_alike_to_the_model_are_named(tiny_checkpoint):
    model, _ = checkpoint.load(tiny_checkpoint)
    autocast, _ = precision_of("fp32", torch.device("cpu"))
    with pytest.warns(UserWarning, match="the prompts of 龘龘龘 are those of 靐靐靐"):                   # rare characters: the vocabulary has none of them
        evaluate.class_embeddings(model, ["猫", "靐靐靐", "龘龘龘"], ["一张{}的照片"], autocast)


@pytest.mark.filterwarnings("ignore")
def test_a_missing_class_folder_moves_no_label(elevater):
    """torchvision's ImageFolder, which cn_clip uses, would call 002 class 1."""
    shutil.rmtree(elevater / "test/001")
    assert open_classes(class_root(elevater))[2] == [0, 0, 0, 2, 2, 2]


@pytest.mark.parametrize("spoil, message", [
    (lambda root: (root / "test/003").mkdir(), "label_cn.txt: its 3 lines do not fit the folders 000, 001, 002, 003; name them 000, 001, … or as the lines"),
    (lambda root: (root / "test/0").mkdir(), "two folders with one number"),
    (lambda root: (root / "label_cn.txt").write_text("\n\n"), "label_cn.txt: its 0 lines do not fit"),
    (lambda root: [(root / "test" / a).rename(root / "test" / b) for a, b in (("000", "狗"), ("001", "猫"), ("002", "红鱼"))], "its 3 lines do not fit the folders 狗, 猫, 红鱼; name them 000"),
    (lambda root: (root / os.fsdecode(b"test/\xff")).mkdir(), "name them 000, 001, … or as the lines"),
    (lambda root: (root / "label_cn.txt").unlink() or (root / os.fsdecode(b"test/\xff")).mkdir(), "not UTF-8 (000, 001, 002, \\udcff)"),
    (lambda root: (root / "label_cn.txt").write_text("猫\n\n鱼\n", encoding="utf-8"), "a name that is empty or not UTF-8 (猫, , 鱼)"),
    (lambda root: (root / "label_cn.txt").write_text("猫\n狗\n", encoding="utf-8") and (root / "test/000").rename(root / "test/cats"), "name them 000, 001, … or as the lines"),
    (lambda root: (root / "test").rename(root / "val"), "no split 'test'; it has val"),
    (lambda root: [path.unlink() for path in root.rglob("*.png")], "3 classes and 0 images"),
    (lambda root: (root / "label_cn.txt").write_bytes(b"\xff\xfe"), "not UTF-8"),
])
def test_class_folders_that_are_not_clear_are_refused(elevater, spoil, message):
    spoil(elevater)
    with pytest.raises(system.BadInput, match=re.escape(message)):
        open_classes(class_root(elevater))


def test_logits_are_those_of_the_published_pipeline(elevater, monkeypatch):
    """cn_clip's zero_shot_classifier and run, its data set and its templates, with a model of random weights; the temperature is its constant 100."""
    for name, module in (("lmdb", None), ("timm", None), ("timm.data", types.SimpleNamespace(create_transform=None))):     # it imports them, and needs none here
        monkeypatch.setitem(sys.modules, name, module or types.ModuleType(name))
    theirs = pytest.importorskip("cn_clip.eval.zeroshot_evaluation")
    templates = pytest.importorskip("cn_clip.eval.cvinw_zeroshot_templates").openai_templates
    monkeypatch.setattr(theirs, "tqdm", lambda x: x)
    monkeypatch.setattr(theirs, "accuracy", lambda output, target, topk: [float((output.argmax(dim=1) == target).sum())] * 2)         # its own fails under NumPy 2
    cfg = peers.dataclasses.replace(peers.VIT, vocab_size=21128)
    peer = peers.cn_clip_model(cfg).eval()
    args = types.SimpleNamespace(gpu="cpu", context_length=52, datapath=str(elevater / "test"), num_workers=0, img_batch_size=4, index="")
    from cn_clip.clip.utils import image_transform
    with torch.no_grad():
        classifier = theirs.zero_shot_classifier(peer, ["猫", "狗", "“红” 鱼"], templates, args)
        dataset = theirs.get_zeroshot_dataset(args, image_transform(cfg.image_size))
        top1, expected = theirs.run(peer, classifier, dataset.dataloader, args)

    monkeypatch.setitem(CONFIGS, "small-vit", peers.VIT)                        # shapes do not tell the number of heads
    torch.save({"epoch": 1, "step": 1, "name": "peer", "state_dict": {f"module.{key}": x for key, x in peer.state_dict().items()}}, elevater / "peer.pt")
    model, _ = checkpoint.load(elevater / "peer.pt")
    names, images, labels = open_classes(class_root(elevater))
    autocast, _ = precision_of("fp32", torch.device("cpu"))
    classes = evaluate.class_embeddings(model, names, [template("{}") for template in templates], autocast)
    image_embed = evaluate.embed_images(model, lambda i: decoded(images[i].read_bytes, "it"), len(images), torch.device("cpu"), autocast, batch_size=4)
    assert torch.allclose(classes, classifier.T, atol=1e-6)
    assert torch.allclose(evaluate.class_probabilities(image_embed, classes, 100.0), expected, atol=1e-5)
    assert classification_of(image_embed, classes, labels, names)[0]["top-1"] == pytest.approx(100 * top1)


def test_classification_by_hand():
    classes = torch.eye(6)
    images = F.normalize(torch.tensor([[9.0, 8, 0, 0, 0, 0], [8, 9, 0, 0, 0, 0], [7, 6, 5, 4, 3, 9], [0, 0, 9, 0, 0, 0]]), dim=1)
    result, right = classification_of(images, classes, [0, 0, 4, 2], list("甲乙丙丁戊己"))
    assert right.tolist() == [1, 0, 0, 1]
    assert result["top-1"] == 50 and result["top-5"] == 75 and result["mean_per_class"] == pytest.approx((50 + 0 + 100) / 3)
    assert {(c["class"], c["taken_for"], c["times"], c["of"]) for c in result["confused"]} == {("甲", "乙", 1, 2), ("戊", "己", 1, 1)}
    probabilities = evaluate.class_probabilities(images, classes, 10.0)
    assert torch.allclose(probabilities.sum(dim=1), torch.ones(4)) and probabilities[0].argmax() == 0


@pytest.mark.slow
def test_classify_on_two_processes_by_its_older_name(one_thread, called, tiny_checkpoint, elevater, tmp_path):
    command = lambda n: ["--ckpt", tiny_checkpoint, "--workers", 0, "--precision", "fp32", "--batch-size", 4, "--json", tmp_path / f"{n}.json"]
    output = script("evaluate.py", *command(2), "--classify", elevater, processes=2)
    assert output.count("> tiny") == 1
    assert called(classify, elevater, *command(1)).replace("1.json", "2.json") in output
    assert figures(tmp_path / "1.json") == figures(tmp_path / "2.json")


def test_classify_through_the_command_line(called, stopped, tiny_checkpoint, elevater, tmp_path):
    output = called(classify, elevater, "--ckpt", tiny_checkpoint, "--workers", 0, "--json", tmp_path / "a.json", "--report", tmp_path / "a.html")
    record, = figures(tmp_path / "a.json")
    assert "top-1" in output and "9 images, 3 classes, 20 prompts each" in output and record["images"] == 9 and len(record["predictions"]) == 9
    assert sum(p for _, p in record["predictions"][0]["best"]) == pytest.approx(1, abs=1e-3)
    assert "红" in (tmp_path / "a.html").read_text(encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("一只{}\n\n{}的样子\n", encoding="utf-8")
    output = called(classify, elevater / "test", "--ckpt", tiny_checkpoint, tiny_checkpoint, "--workers", 0, "--templates", tmp_path / "prompts.txt")
    assert "2 prompts each" in output and "with 95 % interval: +0.0 (+0.0 to +0.0, which may be chance)" in output
    (tmp_path / "prompts.txt").write_text("一只{}\n一只\n", encoding="utf-8")
    assert "like 一张{}的照片; found 一只" in stopped(classify, elevater, "--ckpt", tiny_checkpoint, "--templates", tmp_path / "prompts.txt")
    (elevater / "test/001/1.png").write_bytes(b"no image")
    assert "001/1.png cannot be read" in stopped(classify, elevater, "--ckpt", tiny_checkpoint, "--workers", 0)
