"""Training through its command line: stages, resume, refusals, several processes; and the parts of a step."""
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time

import peers
import pytest
import torch
from conftest import ROOT, refused, script
from test_model import RESNET, VIT, build

import checkpoint
import data
import train

QUICK = ["--batch-size", 6, "--workers", 0, "--precision", "fp32", "--log-every", 1]


def tensors(path):
    return checkpoint.read(path)["model"]


def same(a, b):
    return {k for k in a if torch.equal(a[k], b[k])}


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------------- stages


@pytest.mark.parametrize("cfg", [VIT, RESNET], ids=["vit", "resnet"])
def test_stage_1_leaves_the_vision_tower_alone_and_stage_2_changes_both(cfg, tmp_path, tsv_folder, monkeypatch):
    """Bit-identical, BatchNorm's buffers included; nothing of it in the optimizer."""
    monkeypatch.setitem(train.CONFIGS, "custom", cfg := type(cfg)(**{**vars(cfg), "vocab_size": 21128}))
    checkpoint.save(tmp_path / "start.pt", build(cfg))
    states = [tensors(tmp_path / "start.pt")]
    for stage in ("1", "2"):
        arguments = ["train.py", "--stage", stage, "--data", tsv_folder, "--model", "custom", "--init", tmp_path / "start.pt", "--max-steps", 3, "--lr", 1e-3, *QUICK, "--out", tmp_path / stage]
        monkeypatch.setattr(sys, "argv", [str(a) for a in arguments])
        train.main()
        states.append(tensors(tmp_path / stage / "last.pt"))
    start, one, two = states
    vision = {k for k in start if k.startswith("vision.")}
    assert same(start, one) >= vision
    trained = {k for k in start if k.startswith("text") and "type_embed" not in k} | {"logit_scale"}
    assert not trained & same(start, one) and not (trained | {k for k in vision if "num_batches" not in k}) & same(start, two)
    optimizer = checkpoint.read(tmp_path / "1" / "last.pt")["optimizer"]
    assert len(optimizer["state"]) == sum(k.startswith("text") for k in start) + 1


def test_stage_1_starts_from_a_vision_tower_and_a_fresh_text_tower(tmp_path, tsv_folder):
    script("train.py", "--stage", 2, "--data", tsv_folder, "--max-steps", 2, *QUICK, "--out", tmp_path / "before")
    script("train.py", "--stage", 1, "--data", tsv_folder, "--max-steps", 1, "--seed", 5, "--vision-weights", tmp_path / "before/last.pt", *QUICK, "--out", tmp_path / "one")
    before, one = tensors(tmp_path / "before/last.pt"), tensors(tmp_path / "one/last.pt")
    assert {k for k in one if k.startswith("vision.")} <= same(before, one)
    assert (before["text.word_embed.weight"] != one["text.word_embed.weight"]).float().mean() > 0.99
    assert "brings both towers" in refused("train.py", "--stage", 1, "--vision-weights", tmp_path / "before/last.pt", "--init", tmp_path / "before/last.pt", "--out", tmp_path / "two")


@pytest.mark.parametrize("processes", [1, 2])
def test_stage_1_starts_from_openai_clip_and_bert(processes, tmp_path, tsv_folder):
    """With a learning rate of 0, what is trained stays what it was in the two files; what is left out of them is said."""
    clip, bert, cfg = peers.openai_clip_model(train.CONFIGS["tiny"]), peers.bert_model(train.CONFIGS["tiny"]), train.CONFIGS["tiny"]
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    bert.save_pretrained(tmp_path / "bert")
    output = script("train.py", "--stage", 1, "--data", tsv_folder, "--max-steps", 1, "--lr", 0, "--vision-weights", tmp_path / "clip.pt", "--text-weights", tmp_path / "bert", *QUICK,
                    "--out", tmp_path / "one", processes=processes)
    assert f"starts from {tmp_path / 'clip.pt'} + {tmp_path / 'bert'}" in output
    assert "left out: ln_final.* (2)" in output and f"transformer.* (12) of {tmp_path / 'clip.pt'}; bert.pooler.* (2), cls.* (" in output
    got = checkpoint.load(tmp_path / "one/last.pt")[0]
    assert got.cfg == cfg or got.cfg == dataclasses.replace(cfg, text_dropout=0.1)                 # the dropout that BERT's config.json names
    pixels, ids = peers.batch(cfg)
    with torch.no_grad():
        torch.testing.assert_close(got.vision(pixels), clip.float().encode_image(pixels), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got.text(ids)[:, 0], bert.bert(ids, ids.ne(0)).last_hidden_state[:, 0], rtol=1e-4, atol=1e-5)


def test_a_model_for_larger_pictures_starts_from_one_for_smaller_ones(tmp_path, tsv_folder, monkeypatch):
    monkeypatch.setitem(train.CONFIGS, "large", dataclasses.replace(train.CONFIGS["tiny"], image_size=96))
    torch.manual_seed(0)
    checkpoint.save(tmp_path / "small.pt", train.CLIP(train.CONFIGS["tiny"]))
    monkeypatch.setattr(sys, "argv", [str(a) for a in ("train.py", "--stage", "finetune", "--model", "large", "--data", tsv_folder, "--init", tmp_path / "small.pt", "--max-steps", 1, "--lr", 0, *QUICK,
                                                       "--out", tmp_path / "run")])
    train.main()
    small, large = checkpoint.load(tmp_path / "small.pt", image_size=96)[0], checkpoint.load(tmp_path / "run/last.pt")[0]
    assert torch.equal(small.vision.attention_pool.position_embed, large.vision.attention_pool.position_embed)


def test_without_data_it_trains_the_demo_and_says_what_to_pass(tmp_path):
    output = script("train.py", "--stage", 1, "--max-steps", 2, *QUICK, "--out", tmp_path)
    assert "--data coco-cn" in output.splitlines()[0] and "step      2/2" in output and "frozen vision tower has random weights" in output
    for word in ("loss", "lr", "temperature", "samples/s", "left", "memory", "settings:", "valid  text-to-image R@1"):
        assert word in output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.pt", "last.pt", "lock", "metrics.jsonl", "settings.json"]
    assert json.loads((tmp_path / "settings.json").read_text())["total_steps"] == 2


def test_recall_is_measured_before_the_first_step_and_as_often_as_asked(tmp_path, tsv_folder):
    script("train.py", "--stage", "finetune", "--data", tsv_folder, "--max-steps", 5, "--valid-every", 2, *QUICK, "--out", tmp_path)
    assert [m["step"] for m in metrics(tmp_path) if "valid" in m] == [0, 2, 4, 5]
    scores = {m["step"]: m["score"] for m in metrics(tmp_path) if "valid" in m}
    assert scores[checkpoint.read(tmp_path / "best.pt")["step"]] == max(scores.values())


@pytest.mark.parametrize("stage", ["1", "2"])
def test_two_processes_take_the_steps_of_one(stage, tmp_path, tsv_folder):
    """The tiny model, augmentation and masked tokens on: the loss of every step to 1e-5 relative."""
    losses = []
    for processes in (1, 2):
        script("train.py", "--stage", stage, "--data", tsv_folder, "--max-steps", 4, "--augment", "drawing", "--mask-tokens", 0.2, *QUICK, "--out", tmp_path / str(processes), processes=processes)
        losses.append([m["loss"] for m in metrics(tmp_path / str(processes)) if "loss" in m])
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_stays_near_fp32(precision, tmp_path, tsv_folder):
    losses = []
    for p in ("fp32", precision):
        script("train.py", "--stage", 2, "--data", tsv_folder, "--max-steps", 3, "--lr", 1e-5, *QUICK, "--precision", p, "--grad-checkpointing", "--out", tmp_path / p)
        losses.append([m["loss"] for m in metrics(tmp_path / p) if "loss" in m])
    assert losses[1] == pytest.approx(losses[0], rel=0.03) and losses[0] != losses[1]
    assert bool(checkpoint.read(tmp_path / precision / "last.pt")["scaler"]) == (precision == "fp16")


# ---------------------------------------------------------------------------------------------------------------- continuing


def arguments(tsv_folder, out, *more):
    return ["train.py", "--stage", "2", "--data", tsv_folder, "--max-steps", 8, "--save-every", 1, "--valid-every", 4, "--augment", "drawing", *QUICK, "--out", out, *more]


@pytest.fixture
def undisturbed(tsv_folder, tmp_path):
    script(*arguments(tsv_folder, tmp_path / "whole"))
    return tmp_path / "whole"


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=["SIGKILL", "SIGTERM", "SIGINT"])
def test_a_killed_run_continues_to_the_same_weights(kill, tsv_folder, tmp_path, undisturbed):
    out = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, *map(str, arguments(tsv_folder, out))], cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for line in process.stdout:
        if line.startswith("step      3/8"):
            process.send_signal(kill)
            break
    process.stdout.read()
    assert process.wait() != 0
    reached = checkpoint.read(out / "last.pt")["step"]
    assert 2 <= reached < 8
    output = script(*arguments(tsv_folder, out))
    assert f"continues after step {reached}" in output
    assert same(tensors(out / "last.pt"), tensors(undisturbed / "last.pt")) == set(tensors(out / "last.pt"))
    assert [(m["step"], m.get("loss"), m.get("score")) for m in metrics(out)] == [(m["step"], m.get("loss"), m.get("score")) for m in metrics(undisturbed)]


def test_a_finished_run_says_so_and_changes_nothing(tsv_folder, undisturbed):
    before = {p.name: p.read_bytes() for p in undisturbed.iterdir()}
    assert "nothing to do: finished." in script(*arguments(tsv_folder, undisturbed))
    assert {p.name: p.read_bytes() for p in undisturbed.iterdir()} == before


def test_other_settings_are_refused_by_name(tsv_folder, undisturbed):
    for more, message in ((["--lr", "0.5"], "lr 0.002, now it is 0.5"), (["--seed", "7"], "seed 0, now it is 7"), (["--stage", "1"], "lr 0.002, now it is 0.001"), (["--model", "vit-b-32"], "model tiny, now it is vit-b-32")):
        assert message in refused(*arguments(tsv_folder, undisturbed, *more))
    assert "nothing to do: finished." in script(*arguments(tsv_folder, undisturbed, "--workers", 1, "--log-every", 3))


def test_a_damaged_snapshot_is_refused(tsv_folder, undisturbed):
    whole = (undisturbed / "last.pt").read_bytes()
    (undisturbed / "last.pt").write_bytes(whole[:1000])
    assert "last.pt: not a readable checkpoint" in refused(*arguments(tsv_folder, undisturbed))
    (undisturbed / "last.pt").write_bytes(whole)
    state = torch.load(undisturbed / "last.pt")
    short = {"state": {k: v | {"exp_avg": torch.ones(3)} for k, v in state["optimizer"]["state"].items()}, "param_groups": state["optimizer"]["param_groups"]}
    for change in ({"settings": None}, {"optimizer": {}}, {"optimizer": short}, {"step": "1"}, {"step": 99}, {"best": None}):
        torch.save(state | change, undisturbed / "last.pt")
        assert "last.pt is damaged: its entries are not those of a training snapshot" in refused(*arguments(tsv_folder, undisturbed))


# ---------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("more, message", [
    (["--model", "vit-b-17"], "not a known model (rn50, vit-b-32, vit-b-16, vit-l-14, vit-l-14-336, vit-h-14, tiny)"),
    (["--data", "nowhere"], "neither a folder nor a known data set"),
    (["--init", "nowhere.pt"], "nowhere.pt: there is no such checkpoint"),
    (["--init", ""], ": there is no such checkpoint"),
    (["--batch-size", "0"], "--batch-size 0: out of range"),
    (["--mask-tokens", "1.5"], "--mask-tokens 1.5: out of range"),
])
def test_wrong_arguments_give_one_line(more, message, tmp_path):
    assert message in refused("train.py", "--stage", 2, "--out", tmp_path / "run", *more)
    assert not (tmp_path / "run").exists()


def test_weights_of_another_architecture_are_refused(tmp_path):
    checkpoint.save(tmp_path / "vit.pt", build(VIT))
    assert "do not fit the architecture tiny" in refused("train.py", "--stage", 2, "--model", "tiny", "--init", tmp_path / "vit.pt", "--out", tmp_path / "run")


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    output = script("train.py", "--stage", 1, "--batch-size", 7, "--out", tmp_path / "run", processes=2, ok=False)
    assert output.count("error: --batch-size 7 does not divide by 2 processes; 6 does") == 1        # not once per process
    assert "--batch-size 256 does not divide by 3 processes; 255 does" in script("train.py", "--stage", 1, "--out", tmp_path / "run", processes=3, ok=False)


def test_a_picture_that_does_not_decode_stops_the_run_with_its_id(tsv_folder, tmp_path):
    path = tsv_folder / "train_imgs.tsv"
    path.write_text(path.read_text().replace("\tiVBOR", "\tiVBOX"))
    assert "cannot be read" in refused("train.py", "--stage", 2, "--data", tsv_folder, "--max-steps", 3, "--batch-size", 6, "--workers", 1, "--out", tmp_path / "run")


def test_a_mistake_that_one_process_meets_is_told_by_it(tsv_folder, tmp_path):
    path = tsv_folder / "valid_imgs.tsv"
    lines = path.read_text().splitlines(keepends=True)
    lines[1] = lines[1].replace("\tiVBOR", "\tiVBOX")                           # the second picture: read by the second process
    path.write_text("".join(lines))
    output = script("train.py", "--stage", 2, "--data", tsv_folder, "--max-steps", 3, *QUICK, "--out", tmp_path / "run", processes=2, ok=False)
    assert output.count("error: little/valid: picture 102 cannot be read") == 1 and "in embed_split" not in output


def test_a_loss_that_is_not_finite_stops_the_run(tsv_folder, tmp_path):
    line = refused("train.py", "--stage", 2, "--data", tsv_folder, "--max-steps", 30, *QUICK, "--lr", 1e30, "--warmup", 0, "--out", tmp_path / "run")
    assert "the loss is nan" in line or "NaN" in line


# ---------------------------------------------------------------------------------------------------------------- parts of a step


def test_learning_rate_warms_up_and_falls_to_zero():
    rates = [train.learning_rate(step, 1.0, 4, 20) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4] == 1.0
    assert rates[12] == pytest.approx(0.5) and 0 < rates[19] < 0.02 and train.learning_rate(20, 1.0, 4, 20) == pytest.approx(0)


def test_matrices_decay_and_gains_do_not():
    decayed, plain = train.make_optimizer(build(VIT), 0.1).param_groups
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0.0
    assert all(p.ndim >= 2 for p in decayed["params"]) and all(p.ndim < 2 for p in plain["params"])
    assert (decayed["betas"], decayed["eps"]) == ((0.9, 0.98), 1e-6)
    other = train.make_optimizer(build(RESNET), 0.1).param_groups[0]
    assert (other["betas"], other["eps"]) == ((0.9, 0.999), 1e-8)


def test_masked_tokens_are_never_padding_or_ends():
    ids = torch.tensor([[101, 500, 600, 102, 0, 0]] * 4)
    args = train.parse_args(["--stage", "2", "--mask-tokens", "0.9", "--batch-size", "4"])
    _, masked = train.prepare(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), ids, args, 1, 0, 1)
    assert (masked[:, [0, 3, 4, 5]] == ids[:, [0, 3, 4, 5]]).all() and (masked == 103).sum() >= 4


def test_random_seeds_differ():
    assert len({train.random_seed(s, step, rank) for s in range(4) for step in range(50) for rank in range(-1, 8)}) == 4 * 50 * 9
