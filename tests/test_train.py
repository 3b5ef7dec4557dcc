"""Training through its command line: stages, resume, refusals, several processes; and the parts of a step."""
import contextlib
import dataclasses
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import peers
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, bomb, jpeg, on_processes, png, ready, script, write_tar, write_tsv_split
from test_model import RESNET, VIT, batch, build

import checkpoint
import data
import train
from loss import contrastive_loss, matches
from model import Config
from support import painter
from support.images import Transform
from support.meter import Meter
from support.run import Run
from support.settings import RECIPES, fitting_lr, parse_args, remarks, resolve
from support.system import BadInput

QUICK = ["--batch-size", 6, "--workers", 0, "--precision", "fp32", "--log-every", 1]
MINI = Config(embed_dim=16, image_size=32, vision_layers=1, vision_width=32, vision_heads=2, patch_size=16,
              text_layers=1, text_width=32, text_heads=2)


@pytest.fixture(autouse=True)
def mini(monkeypatch):
    """--model mini, for runs in this process whose model does not matter: a tenth of the time of tiny."""
    monkeypatch.setitem(train.CONFIGS, "mini", MINI)


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


def test_stage_1_starts_from_a_vision_tower_and_a_fresh_text_tower(trained, stops, tmp_path, tsv_folder):
    trained("train.py", "--stage", 2, "--data", tsv_folder, "--max-steps", 2, *QUICK, "--out", tmp_path / "before")
    trained("train.py", "--stage", 1, "--data", tsv_folder, "--max-steps", 1, "--seed", 5, "--vision-weights", tmp_path / "before/last.pt", *QUICK, "--out", tmp_path / "one")
    before, one = tensors(tmp_path / "before/last.pt"), tensors(tmp_path / "one/last.pt")
    assert {k for k in one if k.startswith("vision.")} <= same(before, one)
    assert (before["text.word_embed.weight"] != one["text.word_embed.weight"]).float().mean() > 0.99
    assert "brings both towers" in stops("train.py", "--stage", 1, "--vision-weights", tmp_path / "before/last.pt", "--init", tmp_path / "before/last.pt", "--out", tmp_path / "two")


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_stage_1_starts_from_openai_clip_and_bert(processes, tmp_path, tsv_folder, called):
    """With a learning rate of 0, what is trained stays what it was in the two files; what is left out of them is said. The images' features are kept, on one process and on two."""
    clip, bert, cfg = peers.openai_clip_model(train.CONFIGS["tiny"]), peers.bert_model(train.CONFIGS["tiny"]), train.CONFIGS["tiny"]
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    bert.save_pretrained(tmp_path / "bert")
    command = ["--stage", 1, "--data", tsv_folder, "--max-steps", 1, "--lr", 0, "--vision-weights", tmp_path / "clip.pt",
               "--text-weights", tmp_path / "bert", *QUICK, "--out", tmp_path / "one", "--features", tmp_path / "features"]
    output = called(train, *command) if processes == 1 else script("train.py", *command, processes=processes)
    assert f"starts from {tmp_path / 'clip.pt'} + {tmp_path / 'bert'}" in output
    assert "left out: ln_final.* (2)" in output and f"transformer.* (12) of {tmp_path / 'clip.pt'}; bert.pooler.* (2), cls.* (" in output
    got = checkpoint.load(tmp_path / "one/last.pt")[0]
    assert got.cfg == cfg or got.cfg == dataclasses.replace(cfg, text_dropout=0.1)                 # the dropout that BERT's config.json names
    pixels, ids = peers.batch(cfg)
    with torch.no_grad():
        torch.testing.assert_close(got.vision(pixels), clip.float().encode_image(pixels), rtol=1e-4, atol=1e-5)
        split = data.open_split(tsv_folder, "train")
        embeds = got.encode_image(torch.stack([Transform(cfg.image_size)(split.image(i)) for i in range(12)]))
        torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "features/000000.npy")), embeds.half(), rtol=1e-2, atol=1e-4)
        torch.testing.assert_close(got.text(ids), bert.bert(ids, ids.ne(0)).last_hidden_state[:, 0], rtol=1e-4, atol=1e-5)


def test_a_model_for_larger_images_starts_from_one_for_smaller_ones(tmp_path, tsv_folder, monkeypatch):
    small = dataclasses.replace(train.CONFIGS["tiny"], image_size=32)
    monkeypatch.setitem(train.CONFIGS, "large", dataclasses.replace(small, image_size=64))
    torch.manual_seed(0)
    checkpoint.save(tmp_path / "small.pt", train.CLIP(small))
    monkeypatch.setattr(sys, "argv", [str(a) for a in ("train.py", "--stage", "finetune", "--model", "large", "--data", tsv_folder, "--init", tmp_path / "small.pt", "--max-steps", 1, "--lr", 0, *QUICK,
                                                       "--out", tmp_path / "run")])
    train.main()
    small, large = checkpoint.load(tmp_path / "small.pt", image_size=64)[0], checkpoint.load(tmp_path / "run/last.pt")[0]
    assert torch.equal(small.vision.attention_pool.position_embed, large.vision.attention_pool.position_embed)


def test_without_data_it_trains_the_demo_and_says_what_to_pass(tmp_path, called, monkeypatch):
    monkeypatch.setattr(painter, "DEMO", painter.DEMO._replace(sizes=dict.fromkeys(painter.DEMO.sizes, 24)))
    output = called(train, "--stage", 1, "--data-root", tmp_path / "data", "--max-steps", 2, *QUICK, "--out", tmp_path / "run")
    painted, output = output.split("\n", 1)
    tmp_path = tmp_path / "run"
    assert "demo" in painted
    assert "--data coco-cn" in output.splitlines()[0] and "step      2/2" in output and "frozen vision tower has random weights" in output
    for word in ("loss", "lr", "temperature", "samples/s", "left", "memory", "settings:", "valid  text-to-image R@1"):
        assert word in output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.pt", "last.pt", "lock", "metrics.jsonl", "settings.json"]
    assert json.loads((tmp_path / "settings.json").read_text())["total_steps"] == 2
    assert all(0 <= m["waiting"] <= 1 for m in metrics(tmp_path) if "loss" in m)


def test_the_demo_is_painted_once(tmp_path, monkeypatch):
    painted = []
    monkeypatch.setattr(painter, "write_folder", lambda folder, *_: painted.append(folder) or folder.mkdir())
    monkeypatch.setattr(data, "all_names", lambda name, root: ["train"])
    args = SimpleNamespace(data="demo", data_root=tmp_path)
    for _ in range(2):
        train.find_data(args)
    assert painted == [tmp_path / "demo"]


@pytest.mark.parametrize("module", ["train", "evaluate", "checkpoint", "tools.bench"])
def test_waiting_threads_sleep_before_torch_is_imported(module):
    """OpenMP reads OMP_WAIT_POLICY once."""
    probe = f"""
import os, sys

class Finder:
    def find_spec(self, name, path, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"))
            os._exit(0)

sys.meta_path.insert(0, Finder())
import {module}
"""
    for before, after in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | ({"OMP_WAIT_POLICY": before} if before else {})
        done = subprocess.run([sys.executable, "-uc", probe], cwd=ROOT, capture_output=True, text=True, env=environment)
        assert (done.stdout, done.stderr) == (f"{after}\n", "")


def test_the_log_says_when_a_run_waits_for_its_images(monkeypatch):
    """Steps of one second, before each of them a wait: the share of both since the last line. The first wait, in which the readers start, does not count, nor does a validation."""
    clock, lines = [0.0], []
    passes = lambda seconds: clock.__setitem__(0, clock[0] + seconds)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    meter = Meter(0, 6, 8, torch.device("cpu"))
    run = Run(Path("nowhere"), {"total_steps": 6, "workers": 3, "batch_size": 8}, 0, 48, SimpleNamespace(logit_scale=torch.zeros(())), None, None)
    run.say = run._append = lines.append
    batches = meter.watched(passes(wait) for wait in (60, 0, 0.1, 0.3, 3, 0))
    for step in range(1, 7):
        next(batches)
        passes(1)
        if step % 2 == 0:
            run.log(step, 0.1, meter)
            with meter.paused():
                passes(50)
    assert [line["waiting"] for line in lines[1::2]] == pytest.approx([0, 0.4 / 2.4, 0.6]) and [line["samples_per_s"] for line in lines[1::2]] == pytest.approx([8, 16 / 2.4, 3.2])
    assert [line.partition(" MiB")[2] for line in lines[::2]] == ["", "", " waits for images 60% of the time: --workers 3 read 3/s"]


def test_recall_is_measured_before_the_first_step_and_as_often_as_asked(tmp_path, tsv_folder, trained):
    trained("train.py", "--stage", "finetune", "--model", "mini", "--data", tsv_folder, "--max-steps", 5, "--valid-every", 2, "--no-average", *QUICK, "--out", tmp_path)
    assert [m["step"] for m in metrics(tmp_path) if "valid" in m] == [0, 2, 4, 5]
    scores = {m["step"]: m["score"] for m in metrics(tmp_path) if "valid" in m}
    assert scores[checkpoint.read(tmp_path / "best.pt")["step"]] == max(scores.values())


def losses(out):
    return [m["loss"] for m in metrics(out) if "loss" in m]


def test_two_processes_take_the_steps_of_one(tmp_path, tsv_folder, trained):
    """Stage 1, the tiny model in micro-batches, augmentation and masked tokens on: the loss of every step to 1e-5 relative."""
    command = ["train.py", "--stage", 1, "--data", tsv_folder, "--max-steps", 4, "--augment", "drawing", "--mask-tokens", 0.2, *QUICK]
    trained(*command, "--out", tmp_path / "1")
    script(*command, "--micro-batch", 2, "--out", tmp_path / "2", processes=2)
    assert len(losses(tmp_path / "1")) == 4 and losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=1e-5)


SMALL_VIT = Config(embed_dim=64, image_size=64, vision_layers=2, vision_width=64, vision_heads=4, patch_size=16, text_layers=2, text_width=64, text_heads=4, text_dropout=0.0)


@pytest.mark.slow
def test_processes_and_micro_batches_do_not_change_the_run(tmp_path, tsv_folder):
    """20 steps of 60 pairs, fp32, dropout 0, on real images where they are at hand: the same loss at each step to 1e-5 relative, the same norm of the gradient to 1e-3."""
    torch.manual_seed(0)
    checkpoint.save(tmp_path / "start.pt", train.CLIP(SMALL_VIT))
    folder = os.environ.get("CE_CLIP_REAL_DATA") or tsv_folder
    command = ["train.py", "--stage", 2, "--data", folder, "--init", tmp_path / "start.pt", "--batch-size", 60, "--max-steps", 20, "--lr", 5e-4, "--augment", "drawing", "--mask-tokens", 0.2,
               "--workers", 0, "--precision", "fp32", "--log-every", 1, "--valid-every", 20]
    runs, worst = {}, 0.0
    for processes, micro in ((1, None), (1, 17), (2, 13), (3, 10)):
        out = tmp_path / f"{processes}-{micro}"
        script(*command, *(["--micro-batch", micro] if micro else []), "--out", out, processes=processes)
        runs[out.name] = losses(out), [m["gradient_norm"] for m in metrics(out) if "loss" in m]
    whole = runs["1-None"]
    assert len(whole[0]) == 20 and whole[0][-1] < whole[0][0]
    for name, (loss, norm) in runs.items():
        worst = max(worst, *(abs(a / b - 1) for a, b in zip(loss, whole[0])))
        assert loss == pytest.approx(whole[0], rel=1e-5) and norm == pytest.approx(whole[1], rel=1e-3), name
    print(f"\nlargest relative difference of a loss on {Path(folder).name}: {worst:.1e}")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_stays_near_fp32(precision, tmp_path, tsv_folder, trained):
    for p in ("fp32", precision):
        trained("train.py", "--stage", 2, "--data", tsv_folder, "--max-steps", 3, "--lr", 1e-5, *QUICK, "--precision", p, "--grad-checkpointing", "--out", tmp_path / p)
    assert losses(tmp_path / precision) == pytest.approx(losses(tmp_path / "fp32"), rel=0.03) and losses(tmp_path / precision) != losses(tmp_path / "fp32")
    assert bool(checkpoint.read(tmp_path / precision / "last.pt")["scaler"]) == (precision == "fp16")


# ---------------------------------------------------------------------------------------------------------------- continuing


def arguments(tsv_folder, out, *more):
    return ["train.py", "--stage", "2", "--data", tsv_folder, "--max-steps", 8, "--save-every", 1, "--valid-every", 4, "--augment", "drawing", *QUICK, "--out", out, *more]


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("once")
    for split, first in (("train", 1), ("valid", 101)):
        write_tsv_split(folder / "little", split, start=first)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(a) for a in arguments(folder / "little", folder / "whole")])
        train.main()
    return folder / "whole"


@pytest.fixture
def undisturbed(once, tmp_path):
    return shutil.copytree(once, tmp_path / "whole")


def equal_runs(out, other):
    """The same weights and optimizer state bit for bit, the same best weights, metrics (all that is not time and memory) and bad samples."""
    for name in ("last.pt", "best.pt"):
        a, b = checkpoint.read(out / name), checkpoint.read(other / name)
        assert a["step"] == b["step"] and same(a["model"], b["model"]) == set(b["model"])
        for k, moments in a.get("optimizer", {"state": {}})["state"].items():
            assert all(torch.equal(x, b["optimizer"]["state"][k][n]) for n, x in moments.items())
    timeless = lambda folder: [{k: v for k, v in m.items() if k not in ("samples_per_s", "seconds_left", "memory_mib", "waiting")} for m in metrics(folder)]
    assert timeless(out) == timeless(other)
    assert (out / "bad_samples.jsonl").exists() == (other / "bad_samples.jsonl").exists()
    if (out / "bad_samples.jsonl").exists():
        assert (out / "bad_samples.jsonl").read_bytes() == (other / "bad_samples.jsonl").read_bytes()


def start(command, processes=1, **more):
    command = [sys.executable, *map(str, command)] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *map(str, command)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, **more)


@pytest.mark.parametrize("kill", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)], ids=["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_the_run_continues_to_the_same_weights(kill, tsv_folder, tmp_path, trained):
    out = tmp_path / "run"
    torch.set_num_threads(1)
    process = start([*arguments(tsv_folder, out), "--save-every", 0])
    for line in process.stdout:
        if line.startswith("step      2/8"):
            process.send_signal(kill)
            break
    assert "stopped by a signal after step" in process.stdout.read() and process.wait() == 128 + kill
    with open(out / "metrics.jsonl", "a") as f:                                 # as a crash leaves it
        f.write('{"step": 9, "loss": 1.0}\n5\n{}\n{"step": null}\n{"step": 1, "lo')
    assert 2 <= checkpoint.read(out / "last.pt")["step"] < 8
    trained(*arguments(tsv_folder, out))
    trained(*arguments(tsv_folder, tmp_path / "whole1"))
    equal_runs(out, tmp_path / "whole1")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_random_moments_a_run_ends_as_if_undisturbed(processes, tsv_folder, tmp_path):
    """SIGKILL in training, in validation, while a snapshot is written (one is, most of the time); the whole run or, of two processes, one. On tar shards with a bad sample, readers on.

    CE_CLIP_KILLS=20: so many moments (else one)."""
    files = {f"{i:02}.{extension}": content for i in range(40) for extension, content in (("png", png(seed=i)), ("txt", f"第{i}张".encode()))}
    files["07.png"] = b"damaged"
    write_tar(tmp_path / "a.tar", files)
    command = lambda out: ["train.py", "--stage", "finetune", "--data", tmp_path / "a.tar", "--valid-data", tsv_folder, "--batch-size", 8, "--max-steps", 24, "--save-every", 1, "--valid-every", 3, "--max-bad", 0.5,
                           "--log-every", 2, "--precision", "fp32", "--workers", 1, "--out", out]
    script(*command(tmp_path / "whole"), processes=processes)
    rng, kills, out = random.Random(processes), Counter(), tmp_path / "killed"
    while kills.total() < int(os.environ.get("CE_CLIP_KILLS", 1)):
        process = start(command(out), processes, stderr=subprocess.DEVNULL)
        moment = rng.choice(["any time", "validation", "snapshot"])
        for line in process.stdout:
            words = line.split()
            if words[0] == "step" and (moment != "validation" or int(words[1].split("/")[0]) % 6 == 0 and "valid" not in words):     # that line comes just before validation
                break
        if moment == "any time":
            time.sleep(rng.uniform(0, 1.0))
        while moment == "snapshot" and not list(out.glob("last.pt.part")) and process.poll() is None:
            pass
        workers = [int(pid) for pid in subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()]
        if process.poll() is None:
            kills[moment] += 1
            if processes == 2 and rng.random() < 0.5:
                os.kill(rng.choice(workers), signal.SIGKILL)                    # torchrun then ends the other one
                process.stdout.read()
        for pid in [process.pid] + workers * (processes == 2):                  # workers of torchrun; of a single process they are its readers, and must find out for themselves
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if process.wait() == 0:                                                 # it was quicker: once more from the start
            equal_runs(out, tmp_path / "whole")
            shutil.rmtree(out)
    print(f"\n{processes} processes, killed {kills.total()} times: {dict(kills)}")
    script(*command(out), processes=processes)
    equal_runs(out, tmp_path / "whole")


@pytest.mark.slow
def test_torchrun_restarts_a_run_whose_worker_died(tsv_folder, tmp_path):
    command = lambda out: [*arguments(tsv_folder, out), "--stage", "finetune", "--max-steps", 12]
    script(*command(tmp_path / "whole"), processes=2)
    process = start(["--max-restarts", 1, *command(tmp_path / "run")], 2, stderr=subprocess.DEVNULL)
    for line in process.stdout:
        if line.startswith("step      3/12"):
            workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
            os.kill(int(workers[1]), signal.SIGKILL)
            break
    output = process.stdout.read()
    assert process.wait() == 0 and "continues after step" in output and "finished" in output
    equal_runs(tmp_path / "run", tmp_path / "whole")


def test_a_finished_run_says_so_and_changes_nothing(tsv_folder, undisturbed, called):
    before = {p.name: p.read_bytes() for p in undisturbed.iterdir()}
    assert "nothing to do: finished." in called(train, *arguments(tsv_folder, undisturbed)[1:])
    assert {p.name: p.read_bytes() for p in undisturbed.iterdir()} == before


def test_other_settings_are_refused_by_name(tsv_folder, undisturbed, trained, stops, capsys):
    for more, message in ((["--lr", "0.5"], "lr 0.002, now it is 0.5"), (["--seed", "7"], "seed 0, now it is 7"), (["--stage", "1"], "lr 0.002, now it is 0.001"), (["--model", "vit-b-32"], "model tiny, now it is vit-b-32"),
                          (["--micro-batch", 3], "norm_batch 6, now it is 3")):
        assert message in stops(*arguments(tsv_folder, undisturbed, *more))
    trained(*arguments(tsv_folder, undisturbed, "--workers", 1, "--log-every", 3, "--micro-batch", 6, "--keep", 3, "--max-bad", 0.5))
    assert "nothing to do: finished." in capsys.readouterr().out


def test_a_snapshot_of_another_version_continues(tsv_folder, undisturbed, stops, called):
    """It knows a setting that is gone, and lacks one that is new: neither was turned on."""
    state = torch.load(undisturbed / "last.pt")

    def write(**gone):
        settings = {name: value for name, value in state["settings"].items() if name != "patch_dropout"} | gone
        torch.save(state | {"settings": settings}, undisturbed / "last.pt")

    write(sparkle=0.0, glow=None, shine="none")
    assert "nothing to do: finished." in called(train, *arguments(tsv_folder, undisturbed)[1:])
    write(sparkle=0.5)
    assert "holds a run with sparkle 0.5, now it is None" in stops(*arguments(tsv_folder, undisturbed))


def test_a_micro_batch_may_change_where_it_changes_nothing(tsv_folder, tmp_path, trained, stops):
    """A ViT without dropout continues with another one; with dropout the masks would be others."""
    for dropout in (0.0, 0.1):
        out = tmp_path / str(dropout)
        checkpoint.save(tmp_path / "start.pt", train.CLIP(dataclasses.replace(SMALL_VIT, text_dropout=dropout)))
        command = ["train.py", "--stage", 2, "--data", tsv_folder, "--init", tmp_path / "start.pt", "--max-steps", 2, *QUICK, "--out", out]
        trained(*command)
        if dropout:
            assert "micro_batch None, now it is 3" in stops(*command, "--micro-batch", 3)
        else:
            trained(*command, "--micro-batch", 3)


def test_a_damaged_snapshot_is_refused(tsv_folder, undisturbed, stops):
    whole = (undisturbed / "last.pt").read_bytes()
    (undisturbed / "last.pt").write_bytes(whole[:1000])
    assert "last.pt: not a readable checkpoint" in stops(*arguments(tsv_folder, undisturbed))
    (undisturbed / "last.pt").write_bytes(whole)
    state = torch.load(undisturbed / "last.pt")
    short = {"state": {k: v | {"exp_avg": torch.ones(3)} for k, v in state["optimizer"]["state"].items()}, "param_groups": state["optimizer"]["param_groups"]}
    for change in ({"settings": None}, {"optimizer": {}}, {"optimizer": short}, {"step": "1"}, {"step": 99}, {"best": None}, {"losses": "x"}):
        torch.save(state | change, undisturbed / "last.pt")
        assert "last.pt is damaged or no training snapshot" in stops(*arguments(tsv_folder, undisturbed))


def test_the_latest_snapshots_are_kept_and_the_run_goes_on_from_any(tsv_folder, tmp_path, undisturbed, trained):
    trained(*arguments(tsv_folder, tmp_path / "run", "--keep", 3))
    assert sorted(p.name for p in (tmp_path / "run").glob("step-*.pt")) == [f"step-{n:08}.pt" for n in (6, 7, 8)]
    shutil.copy(tmp_path / "run/step-00000006.pt", tmp_path / "run/last.pt")
    trained(*arguments(tsv_folder, tmp_path / "run", "--keep", 3))
    assert same(tensors(tmp_path / "run/last.pt"), tensors(undisturbed / "last.pt")) == set(tensors(undisturbed / "last.pt"))


def test_a_second_run_keeps_out_of_a_folder(tsv_folder, tmp_path, stops):
    """Another process holds the lock."""
    (tmp_path / "out").mkdir()
    hold = "import fcntl, sys; f = open('out/lock', 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", hold], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        assert "another run is writing there" in stops("train.py", "--stage", 2, "--data", tsv_folder, "--batch-size", 4, "--max-steps", 1, "--workers", 0, "--out", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["lock"]


def test_a_run_that_another_one_continued_while_this_one_started_is_left_alone(tsv_folder, tmp_path, trained, stops, monkeypatch):
    """Between reading last.pt and the lock lies the loading of a model: long enough for the other run to write and end."""
    trained(*arguments(tsv_folder, tmp_path / "out", "--keep", 9))
    build, last, third = train.build_model, tmp_path / "out/last.pt", tmp_path / "out/step-00000003.pt"
    shutil.copy(tmp_path / "out/step-00000002.pt", last)

    def slowly(*given):
        shutil.copy(third, tmp_path / "other")
        os.replace(tmp_path / "other", last)
        return build(*given)
    monkeypatch.setattr(train, "build_model", slowly)
    assert "another run has just written there; run this again" in stops(*arguments(tsv_folder, tmp_path / "out", "--keep", 9))
    assert last.read_bytes() == third.read_bytes()


@pytest.mark.parametrize("anew", [True, False], ids=["made anew", "gone"])
def test_a_folder_that_is_deleted_under_a_run_ends_it(tsv_folder, tmp_path, stops, monkeypatch, anew):
    out, step = tmp_path / "out", train.train_step

    def deletes(*given):
        shutil.rmtree(out)
        if anew:
            out.mkdir()
            (out / "lock").touch()                                              # of the next run there
        return step(*given)
    monkeypatch.setattr(train, "train_step", deletes)
    assert "was deleted or replaced while the run was writing there; start it anew with another --out" in stops(*arguments(tsv_folder, out))
    assert sorted(path.name for path in out.glob("*")) == (["lock"] if anew else [])


def test_out_is_a_link_to_nothing(tsv_folder, tmp_path, stops):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere/deep")
    assert "link: a link to nothing; name a folder" in stops(*arguments(tsv_folder, tmp_path / "link"))


def test_a_batch_of_thousands_of_epochs_is_refused(tsv_folder, tmp_path, stops):
    assert stops(*arguments(tsv_folder, tmp_path / "out"), "--batch-size", 10**7) == (
        "--batch-size 10000000: more than 1,000 times the 12 pairs of little/train")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_signal_ends_the_wait_for_a_batch(tsv_folder, tmp_path, workers):
    """The image of one pair comes from a disk that hangs; the run saves and ends all the same."""
    code = """if True:
        import os, sys, time
        from support import system
        import data, train
        read = data.TsvSplit.image_bytes

        def hangs(split, i):
            if split.name.endswith("train") and os.path.exists(sys.argv[-1] + "/last.pt"):
                os.write(1, b"it hangs\\n")
                time.sleep(600)
            return read(split, i)
        data.TsvSplit.image_bytes = hangs
        system.run(train.main)"""
    process = start(["-c", code, *arguments(tsv_folder, tmp_path / "out")[1:-2], "--workers", workers, "--out", tmp_path / "out"])
    while "it hangs" not in (line := process.stdout.readline()):
        assert line
    begin = time.time()
    process.send_signal(signal.SIGTERM)
    assert "stopped by a signal after step 0" in process.stdout.read() and process.wait() == 143 and time.time() - begin < 60


def test_snapshots_by_the_clock(tsv_folder, tmp_path, trained, monkeypatch):
    steps = []
    monkeypatch.setattr(Run, "snapshot", lambda self, step, snapshot=Run.snapshot: steps.append(step) or snapshot(self, step))
    day = itertools.count(10**9, -86400)
    monkeypatch.setattr(time, "time", lambda: float(next(day)))                 # a clock that is set back does not stop the snapshots
    for minutes, expected in ((1e-6, [0, 1, 2, 3, 4]), (0, [0, 4]), (60, [0, 4])):
        steps.clear()
        trained("train.py", "--stage", 2, "--model", "mini", "--data", tsv_folder, "--max-steps", 4, "--valid-every", 4, "--save-minutes", minutes, *QUICK, "--out", tmp_path / str(minutes))
        assert steps == expected


def test_a_full_disk_leaves_the_snapshot_before_and_says_so(tsv_folder, undisturbed, stops):
    """Stands for it: files may not grow over 1 MiB, as the system then says "File too large"."""
    torch.save(torch.load(undisturbed / "last.pt") | {"step": 5}, undisturbed / "last.pt")          # as if killed after step 5
    before = (undisturbed / "last.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        line = stops(*arguments(tsv_folder, undisturbed))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "last.pt: cannot be written (" in line and "nothing there was changed" in line
    assert (undisturbed / "last.pt").read_bytes() == before and not list(undisturbed.glob("*.part"))


# ---------------------------------------------------------------------------------------------------------------- recipes


PAPER = """
Table 2: context_length 52, warmup 100, batch_size 128, lr 5e-5, wd 0.001, max_epochs 200, valid-step-interval 150

Table 3         Batch size   Peak Learning rate   Maximum epochs   Warmup iterations
COCO-CN      Base-size   12800   5e-5   13   6
COCO-CN      Large-size   4096   6e-5   7   5
Flickr30K-CN Base-size   7680   5e-5   5   20
Flickr30K-CN Large-size   4096   2e-5   6   20
"""
MODELS = {"base": "vit-b-16", "large": "vit-l-14"}


@pytest.mark.parametrize("row", [line.split() for line in PAPER.splitlines() if "-size " in line], ids=lambda row: "-".join(row[:2]))
def test_recipes_of_table_3_are_its_numbers(row):
    dataset, size, *numbers = row
    name = f"{dataset}-{size.split('-')[0]}".lower()
    args, model = parse_args(["--recipe", name]), MODELS[name.split("-")[-1]]
    assert [args.batch_size, args.lr, args.epochs, args.warmup] == [float(x) for x in numbers]
    assert (args.stage, args.data, args.init, args.weight_decay, args.positives, args.average) == ("finetune", dataset.lower(), f"cn-clip-{model}", 0.001, "pair", False)
    assert train.CONFIGS[model].context_length == 52


def test_the_recipe_of_ap_id_is_table_2():
    args, table = parse_args(["--recipe", "ap-id"]), dict(re.findall(r"([\w-]+) ([\de.-]+)(?:,|$)", PAPER.splitlines()[1].split(": ")[1]))
    assert (args.warmup, args.batch_size, args.lr, args.weight_decay, args.epochs, args.valid_every) == tuple(
        float(table[name]) for name in ("warmup", "batch_size", "lr", "wd", "max_epochs", "valid-step-interval"))
    assert (args.stage, args.data, args.init) == ("finetune", "ap-id", "cn-clip-vit-b-16") and float(table["context_length"]) == train.CONFIGS["vit-b-16"].context_length


def test_recipes_of_pretraining():
    for stage, lr in (("1", 1e-4), ("2", 2e-5)):
        args = parse_args(["--recipe", f"stage{stage}", "--data", "coco-cn"])
        assert (args.stage, args.batch_size, args.lr, args.warmup, args.weight_decay) == (stage, 32768, lr, 5000, 0.001)
        with pytest.raises(BadInput, match="name the data"):
            parse_args(["--recipe", f"stage{stage}"])


def test_flags_override_a_recipe_and_the_run_says_what_came_from_where(tmp_path, tsv_folder, called):
    checkpoint.save(tmp_path / "start.pt", train.CLIP(train.CONFIGS["tiny"]))
    output = called(train, "--recipe", "coco-cn-base", "--data", tsv_folder, "--init", tmp_path / "start.pt", *QUICK, "--max-steps", 1, "--out", tmp_path / "run")
    line = next(line for line in output.splitlines() if line.startswith("recipe"))
    recipe, otherwise = line.split("; otherwise than there: ")
    assert recipe == "recipe coco-cn-base (the paper's tables 2 and 3)"
    assert otherwise == f"init={tmp_path / 'start.pt'} data={tsv_folder} batch_size=6 epochs=None warmup=0"                    # a run of one step has no warmup
    settings = json.loads((tmp_path / "run/settings.json").read_text())
    assert (settings["recipe"], settings["lr"], settings["batch_size"]) == ("coco-cn-base", 5e-5, 6)
    towers = parse_args(["--recipe", "ap-id", "--vision-weights", "ViT-B-16.pt"])
    assert towers.init is None and towers.vision_weights == "ViT-B-16.pt"


@pytest.mark.parametrize("flags, message", [([], "--stage or --recipe is required"), (["--stage", "2", "--model", "vit-b-17"], "invalid choice: 'vit-b-17' (choose from ")])
def test_without_stage_or_recipe_it_asks_for_one_and_models_are_known(flags, message, capsys):
    with pytest.raises(SystemExit):
        parse_args(flags)
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------- fine-tuning ends no lower than it began


def finetune(tsv_folder, out, *more):
    return ["train.py", "--stage", "finetune", "--model", "mini", "--data", tsv_folder, "--max-steps", 4,
            "--valid-every", 1, *QUICK, "--out", out, *more]


@pytest.fixture
def scores(monkeypatch):
    """Recall as told: this list's numbers, one after the other, then 0."""
    told = []
    recall = lambda *_: {way: dict.fromkeys(("R@1", "R@5", "R@10", "MR"), score) for score in [told.pop(0) if told else 0.0] for way in ("text_to_image", "image_to_text")}
    monkeypatch.setattr(train, "retrieval_recall", recall)
    return told


def test_the_best_of_start_end_and_their_averages_is_kept(tsv_folder, tmp_path, trained, scores):
    scores += [50, 40, 30, 20, 10, 1, 2, 60, 3, 55]                             # the start, four steps, averages 0.1 to 0.5
    trained(*finetune(tsv_folder, tmp_path / "run", "--lr", 0.01))
    start, last, best = (tensors(tmp_path / "run" / name) for name in ("start.pt", "last.pt", "best.pt"))
    assert checkpoint.read(tmp_path / "run/best.pt")["average"] == 0.3 and checkpoint.read(tmp_path / "run/start.pt")["step"] == 0
    for key, x in best.items():
        torch.testing.assert_close(x, start[key] + 0.3 * (last[key] - start[key]) if x.is_floating_point() else last[key])
    assert [(m["step"], m["average"]) for m in metrics(tmp_path / "run") if "average" in m] == [(4, share / 10) for share in range(1, 10)]
    trained(*finetune(tsv_folder, tmp_path / "plain", "--lr", 0.01, "--no-average"))
    assert same(last, plain := tensors(tmp_path / "plain/last.pt")) == set(plain)


def test_a_run_killed_among_its_averages_says_what_its_best_weights_are(tsv_folder, tmp_path, trained, called, scores, monkeypatch):
    """last.pt does not know yet of an average that became best.pt; without --average nothing more is to do."""
    scores += [50, 40, 30, 20, 10, 1, 2, 60]
    validated = Run.validated
    monkeypatch.setattr(Run, "validated", lambda run, step, recall, share=None: sys.exit("killed") if share == 0.4 else validated(run, step, recall, share))
    with pytest.raises(SystemExit, match="killed"):
        trained(*finetune(tsv_folder, tmp_path / "run", "--lr", 0.01))
    output = called(train, *finetune(tsv_folder, tmp_path / "run", "--lr", 0.01, "--no-average")[1:])
    assert "nothing to do: finished. " in output and "0.7 x the start + 0.3 x the end" in output


def test_lost_or_foreign_weights_in_the_folder_are_told(tsv_folder, tmp_path, trained, stops):
    out = tmp_path / "run"
    trained(*finetune(tsv_folder, out, "--keep", 9))
    shutil.copy(out / "step-00000002.pt", out / "last.pt")
    for name, message in (("best.pt", "best.pt, the best weights so far, is gone"), ("start.pt", "start.pt is not the start of this run")):
        (out / name).rename(tmp_path / "away.pt")
        assert message in stops(*finetune(tsv_folder, out, "--keep", 9))
        (tmp_path / "away.pt").rename(out / name)
    shutil.copy(out / "start.pt", tmp_path / "away.pt")
    shutil.copy(out / "last.pt", out / "start.pt")
    assert "it holds the weights after step 2" in stops(*finetune(tsv_folder, out, "--keep", 9))
    shutil.copy(tmp_path / "away.pt", out / "start.pt")
    trained(*finetune(tsv_folder, out, "--keep", 9))
    (out / "last.pt").unlink()
    assert "holds the best.pt of another run" in stops(*finetune(tsv_folder, out, "--seed", 1))
    (out / "settings.json").write_text("damaged")       # no reason to refuse the folder
    trained(*finetune(tsv_folder, out))
    assert "name a folder" in stops(*finetune(tsv_folder, out / "settings.json"))


def test_a_rate_that_destroys_the_model_leaves_the_start_as_the_best(tsv_folder, tmp_path, called, scores):
    scores += [50, 40, 30, 20, 10] + [0] * 9
    output = called(train, *finetune(tsv_folder, tmp_path / "run", "--lr", 1.0)[1:])
    assert "the START: training did not raise the recall" in output and same(tensors(tmp_path / "run/best.pt"), start := tensors(tmp_path / "run/start.pt")) == set(start)


def test_patience_ends_a_run_and_the_same_command_knows_it(tsv_folder, tmp_path, called, scores):
    scores += [10, 20, 20, 15, 30]                                              # the last one: of an average
    output = called(train, *finetune(tsv_folder, tmp_path / "run", "--max-steps", 9, "--warmup", 0, "--patience", 2)[1:])
    assert [m["step"] for m in metrics(tmp_path / "run") if "valid" in m and "average" not in m] == [0, 1, 2, 3] and checkpoint.read(tmp_path / "run/last.pt")["step"] == 3
    assert "last.pt: the weights after step 3 of 9" in output
    assert "nothing to do: finished. " in called(train, *finetune(tsv_folder, tmp_path / "run", "--max-steps", 9, "--warmup", 0, "--patience", 2)[1:])


def test_patience_is_over_at_a_validation_never_between_two():
    run = Run(Path("nowhere"), {"total_steps": 1000, "valid_every": 100, "warmup": 50, "patience": 2}, 0, 0, None, None, None)
    for best, last in ((0, 200), (100, 300), (400, 600)):
        run.best_step = best
        assert [run.ended(step) for step in range(best + 1, last + 1)] == [False] * (last - best - 1) + [True]


def test_killed_among_the_averages_a_run_ends_as_if_undisturbed(tsv_folder, tmp_path, trained, stops, monkeypatch):
    trained(*finetune(tsv_folder, tmp_path / "whole"))
    recall, calls = train.retrieval_recall, []

    def killed(*arguments):
        calls.append(0)
        if len(calls) == 9:                                                     # start, four steps, four averages
            raise InterruptedError
        return recall(*arguments)

    monkeypatch.setattr(train, "retrieval_recall", killed)
    with pytest.raises(InterruptedError):
        trained(*finetune(tsv_folder, tmp_path / "run"))
    assert checkpoint.read(tmp_path / "run/last.pt")["step"] == 4 and not checkpoint.read(tmp_path / "run/last.pt")["averaged"]
    (tmp_path / "run/start.pt").rename(tmp_path / "elsewhere.pt")
    assert "run/start.pt is not the start of this run" in stops(*finetune(tsv_folder, tmp_path / "run"))
    (tmp_path / "elsewhere.pt").rename(tmp_path / "run/start.pt")
    trained(*finetune(tsv_folder, tmp_path / "run"))
    equal_runs(tmp_path / "run", tmp_path / "whole")
    assert checkpoint.read(tmp_path / "run/last.pt")["averaged"]


@pytest.mark.parametrize("lr, words", [
    (0.02, "a learning rate of 0.02 is large: it may destroy what the start knows; --lr 4.3e-04 fits"),
    (1e-6, "is small: little will be learned"), (1e-4, None)])
def test_a_rate_that_does_not_fit_the_batch_is_warned_of(lr, words, tsv_folder):
    tiny, split = train.CONFIGS["tiny"], data.open_split(tsv_folder, "train")
    args = parse_args(["--stage", "finetune", "--lr", str(lr), "--batch-size", "6"])
    lines = "".join(remarks(resolve(args, tiny, split, split, "fp32", 1), tiny, split, split, "start.pt"))
    assert words in lines if words else "a learning rate of" not in lines


def test_the_rate_that_fits_grows_with_the_root_of_the_batch():
    vit = train.CONFIGS["vit-b-16"]
    assert fitting_lr(7680, vit) == 5e-5 and fitting_lr(7680 // 4, vit) == 2.5e-5
    for name, (_, recipe) in RECIPES.items():                             # what the paper took for its large batches fits
        if "lr" in recipe and recipe["stage"] == "finetune" and name != "ap-id":
            assert 0.5 < recipe["lr"] / fitting_lr(recipe["batch_size"], vit) < 2


def test_what_chooses_by_recall_needs_a_valid_split(tsv_folder, tmp_path, stops):
    write_tar(tmp_path / "a.tar", {"1.png": png(), "1.txt": b"x"})
    for flag in (["--average"], ["--patience", 3]):
        assert f"{flag[0]}: there is no valid split" in stops("train.py", "--stage", 2, "--data", tmp_path / "a.tar", *flag, "--out", tmp_path / "run")


# ---------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("more, message", [
    (["--data", "nowhere"], "neither a folder, nor a pattern of tar shards, nor a known data set"),
    (["--init", "nowhere.pt"], "nowhere.pt: there is no such checkpoint"),
    (["--init", ""], ": there is no such checkpoint"),
    (["--batch-size", "0"], "--batch-size 0: out of range"),
    (["--mask-tokens", "1.5"], "--mask-tokens 1.5: out of range"),
    (["--micro-batch", "0"], "--micro-batch 0: out of range"),
    (["--max-bad", "nan"], "--max-bad nan: out of range"),
    (["--patch-dropout", "0.5"], "--patch-dropout 0.5: it is for a ViT that trains"),
    (["--data", "shards/{000..002}.tar"], "3 of 3 shards are missing, the first shards/000.tar"),
])
def test_wrong_arguments_give_one_line(more, message, tmp_path, tsv_folder, stops):
    assert message in stops("train.py", "--stage", 2, "--data", tsv_folder, "--out", tmp_path / "run", *more)
    assert not (tmp_path / "run").exists()


def test_weights_of_another_architecture_are_refused(tmp_path, tsv_folder, stops):
    checkpoint.save(tmp_path / "vit.pt", build(VIT))
    assert "do not fit the architecture tiny" in stops("train.py", "--stage", 2, "--model", "tiny", "--data", tsv_folder, "--init", tmp_path / "vit.pt", "--out", tmp_path / "run")


def test_a_batch_that_does_not_divide_is_refused(tsv_folder):
    args, split = parse_args(["--stage", "2", "--batch-size", "7"]), data.open_split(tsv_folder, "train")
    with pytest.raises(BadInput, match="--batch-size 7: no multiple of 2 processes"):
        resolve(args, train.CONFIGS["tiny"], split, split, "fp32", 2)


@pytest.mark.slow
def test_a_mistake_of_all_processes_is_told_once(tmp_path, tsv_folder):
    output = script("train.py", "--stage", 1, "--data", tsv_folder, "--batch-size", 7, "--out", tmp_path / "run", processes=2, ok=False)
    assert output.count("error: --batch-size 7: no multiple of 2 processes") == 1


@pytest.mark.slow
def test_a_mistake_that_one_process_meets_is_told_by_it(tsv_folder, tmp_path):
    path = tsv_folder / "valid_imgs.tsv"
    lines = path.read_text().splitlines(keepends=True)
    lines[1] = lines[1].replace("\tiVBOR", "\tiVBOX")                           # the second image: read by the second process
    path.write_text("".join(lines))
    output = script("train.py", "--stage", 2, "--data", tsv_folder, "--max-steps", 3, *QUICK, "--out", tmp_path / "run", processes=2, ok=False)
    assert output.count("error: little/valid: image 102 cannot be read") == 1 and "in embed_split" not in output


# ---------------------------------------------------------------------------------------------------------------- bad samples, bad numbers


@pytest.fixture(scope="module")
def damaged_shards(tmp_path_factory):
    """1,000 pairs on shards, 2 % damaged: five of each kind."""
    folder = tmp_path_factory.mktemp("damaged")
    kinds = [{"jpg": jpeg()[:-400], "txt": b"x"}, {"jpg": b"no image at all", "txt": b"x"}, {"jpg": jpeg()}, {"png": bomb(), "txt": b"x"}]
    for s in range(4):
        files = {}
        for i in range(s * 250, (s + 1) * 250):
            sample = kinds[i // 50 % 4] if i % 50 == 7 else {"png": png(seed=i), "txt": f"第{i}张".encode()}
            files |= {f"{i:04}.{extension}": content for extension, content in sample.items()}
        write_tar(folder / f"{s}.tar", files)
    return f"{folder}/{{0..3}}.tar"


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_damaged_samples_are_replaced_named_and_counted_and_the_run_ends(processes, damaged_shards, tmp_path, called):
    """An epoch and a half."""
    checkpoint.save(tmp_path / "mini.pt", train.CLIP(MINI))
    command = ["--stage", 2, "--data", damaged_shards, "--init", tmp_path / "mini.pt", "--epochs", 1.5, "--batch-size", 100, "--max-bad", 0.05, "--precision", "fp32", "--log-every", 15,
               "--out", tmp_path / "run"]
    output = called(train, *command) if processes == 1 else script("train.py", *command, processes=2)
    assert "no validation, so no best.pt" in output and "20 pairs cannot be read, and of 1,000 only 50 may be" in output and "finished" in output
    bad = [json.loads(line) for line in (tmp_path / "run/bad_samples.jsonl").read_text().splitlines()]
    assert len(bad) == 20 and {b["pair"] for b in bad} == {i for i in range(1000) if i % 50 == 7} and all(1 <= b["step"] <= 10 for b in bad)              # each once, all in the first epoch
    for reason in ("image file is truncated", "not an image in a format", "it is missing", "exceeds limit"):
        assert sum(reason in b["reason"] for b in bad) == 5
    assert all(Path(b["file"]).is_file() and b["offset"] > 0 for b in bad)


def test_too_many_damaged_samples_stop_the_run(damaged_shards, tmp_path, stops):
    line = stops("train.py", "--stage", 2, "--model", "mini", "--data", damaged_shards, "--epochs", 2, "--batch-size", 50, "--precision", "fp32", "--out", tmp_path / "run")
    assert "11 pairs cannot be read, and of 1,000 only 10 may be (--max-bad 0.01)" in line and ", for example: " in line
    assert len((tmp_path / "run/bad_samples.jsonl").read_text().splitlines()) == 11 and checkpoint.read(tmp_path / "run/last.pt")["step"] < 20


def test_in_a_small_data_set_one_bad_image_stops_the_run_with_its_id(tsv_folder, tmp_path, stops):
    path = tsv_folder / "train_imgs.tsv"
    lines = path.read_text().splitlines(keepends=True)
    lines[4] = lines[4].replace("\tiVBOR", "\tiVBOX")
    path.write_text("".join(lines))
    assert "little/train: image 5 cannot be read" in stops("train.py", "--stage", 2, "--model", "mini", "--data", tsv_folder, "--max-steps", 3, "--batch-size", 6, "--workers", 1, "--out", tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_the_run_before_the_step(tsv_folder, tmp_path, stops):
    line = stops("train.py", "--stage", 2, "--data", tsv_folder, "--max-steps", 30, *QUICK, "--valid-every", 30, "--lr", 1e30, "--warmup", 0, "--out", tmp_path / "run")
    assert "step 2: the loss is nan and the norm of its gradient nan; the step was not taken" in line
    record = json.loads((tmp_path / "run/nonfinite.json").read_text())
    assert record["step"] == 2 and len(record["pairs"]) == 6 and all(pair["file"].endswith("train_imgs.tsv") and pair["image"] in range(1, 13) for pair in record["pairs"])
    assert checkpoint.read(tmp_path / "run/last.pt")["step"] == 0


def test_fp16_scaling_skips_steps_that_overflow_and_counts_them():
    model, (pixels, ids) = build(VIT).train(), batch(VIT)
    optimizer, gradients = train.make_optimizer(model, 0.1), train.GradientSum(list(model.parameters()))
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    run = Run(Path("nowhere"), {}, 0, 0, model, optimizer, scaler)
    taken = []
    for step in range(1, 41):
        before = model.text_projection.detach().clone()
        loss, norm = train.train_step(model, [ready(pixels, ids, step)], None, gradients, optimizer, scaler, contextlib.nullcontext)
        run.after_step(step, loss, norm, None)
        taken.append(not torch.equal(before, model.text_projection))
        assert taken[-1] == math.isfinite(norm)
    run.check_last_step()
    assert 0 < run.skipped == taken.count(False) < 20 and not taken[0] and len(run.losses) == 40


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
    args = parse_args(["--stage", "2", "--mask-tokens", "0.9", "--batch-size", "4"])
    keys, pixels = torch.arange(4), torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    (micro,), *_ = train.read_batch(iter([(pixels, ids, keys[:, None], keys, [])]), [range(4)], 1, args, 6)
    masked = micro.ids
    assert (masked[:, [0, 3, 4, 5]] == ids[:, [0, 3, 4, 5]]).all() and (masked == 103).sum() >= 4


def test_random_seeds_differ():
    seeds = {train.random_seed(s, step, rank, micro) for s in range(3) for step in range(50) for rank in range(-1, 8) for micro in range(5)}
    assert len(seeds) == 3 * 50 * 9 * 5


@pytest.mark.parametrize("stage", ["1", "2"])
@pytest.mark.parametrize("cfg", [dataclasses.replace(VIT, text_dropout=0.3), dataclasses.replace(RESNET, text_dropout=0.3)], ids=["vit", "resnet"])
def test_the_cached_step_equals_autograd_through_the_same_chunks_kept_in_memory(cfg, stage):
    """Dropout and patch dropout on, ragged micro-batches, several matches: gradients, loss and BatchNorm's statistics, relative 1e-6 in fp64; no second pass through a frozen tower."""
    pixels, ids = batch(cfg, n=11)
    chunks = list(zip(pixels.double().split(4), ids.split(4)))
    truth = matches(torch.arange(11)[:, None] % 9, torch.arange(11) % 9)
    results, passes = [], []
    for cached in (False, True):
        model = build(cfg).double().train()
        if stage == "1":
            model.freeze_vision()
        model.vision.patch_dropout = 0.5
        model.vision.register_forward_pre_hook(lambda *_: passes.append(cached))
        gradients = train.GradientSum([p for p in model.parameters() if p.requires_grad])
        optimizer = train.make_optimizer(model, 0.1)                            # its learning rate is 0
        if cached:
            loss, norm = train.train_step(model, [ready(*chunk, seed) for seed, chunk in zip((5, 6, 7), chunks)], truth, gradients, optimizer, torch.amp.GradScaler("cpu", enabled=False), contextlib.nullcontext)
        else:
            embeds = []
            for seed, chunk in zip((5, 6, 7), chunks):
                torch.manual_seed(seed)
                embeds.append(model(*chunk)[:2])
            loss = contrastive_loss(*map(torch.cat, zip(*embeds)), model.logit_scale.exp(), truth)
            loss.backward()
            loss, norm = loss.item(), gradients.norm()
        results.append({"loss": torch.as_tensor(loss), "norm": torch.as_tensor(norm)} | {n: p.grad for n, p in model.named_parameters() if p.requires_grad} | dict(model.named_buffers()))
        results[-1].pop("vision.attention_pool.key.bias", None)                 # softmax cancels it: its gradient is rounding alone
    assert passes.count(False) == 3 and passes.count(True) == (3 if stage == "1" else 6)
    worst = max(((a - b).norm() / (a.norm() + 1e-12)).item() for a, b in ((results[0][k].double(), results[1][k].double()) for k in results[0]))
    print(f"\nlargest relative difference of a gradient: {worst:.1e}")
    assert len(results[0]) > 20 and worst < 1e-6


def test_with_positives_pair_only_its_own_caption_is_right(tsv_folder, tmp_path, trained, monkeypatch):
    write_tsv_split(tsv_folder, "train", captions_per_image=3)
    given, loss = {}, train.tiled_loss
    for positives in ("all", "pair"):
        monkeypatch.setattr(train, "tiled_loss", lambda *arguments: given.update({positives: arguments[3]}) or loss(*arguments))
        trained("train.py", "--stage", 2, "--model", "mini", "--data", tsv_folder, "--max-steps", 1, *QUICK, "--batch-size", 36, "--positives", positives, "--out", tmp_path / positives)
    assert len(given["all"][0]) == 36 * 3 and given["pair"] is None


def test_one_micro_batch_is_embedded_once():
    model, (pixels, ids) = build(VIT).train(), batch(VIT)
    passes = []
    for tower in (model.vision, model.text):
        tower.register_forward_pre_hook(lambda module, _: passes.append(type(module).__name__))
    optimizer, gradients = train.make_optimizer(model, 0.1), train.GradientSum(list(model.parameters()))
    train.train_step(model, [ready(pixels, ids)], None, gradients, optimizer, torch.amp.GradScaler("cpu", enabled=False), contextlib.nullcontext)
    assert passes.count("VisionTransformer") == 1 and passes.count("BertEncoder") <= 4              # groups of captions of like length


def _sent_of_both_stages(rank, world):
    return {stage: _sent(rank, stage) for stage in ("1", "2")}


def _sent(rank, stage):
    """One step on two processes -> how many numbers all-reduces sent, how many buckets were on their way before the backward pass was over, the gradients."""
    model, (pixels, ids) = build(VIT).train(), batch(VIT, n=8)
    if stage == "1":
        model.freeze_vision()
    gradients = train.GradientSum([p for p in model.parameters() if p.requires_grad], most=5000)
    sent, early, wait, reduce = [], [], gradients.wait, dist.all_reduce
    gradients.wait = lambda: early.append(len(gradients.handles)) or wait()
    dist.all_reduce = lambda x, **more: sent.append(x.numel()) or reduce(x, **more)
    torch.manual_seed(0)
    share = slice(4 * rank, 4 * rank + 4)
    loss, norm = train.train_step(model.eval(), [ready(pixels[share], ids[share])], None, gradients, train.make_optimizer(model, 0.1), torch.amp.GradScaler("cpu", enabled=False), contextlib.nullcontext)
    dist.all_reduce = reduce
    return torch.tensor(sent), early[0], len(gradients.buckets), loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def test_gradients_are_summed_while_the_backward_pass_runs_and_only_what_trains_is_sent(tmp_path):
    results = on_processes(_sent_of_both_stages, 2, tmp_path)
    for stage in ("1", "2"):
        model, (pixels, ids) = build(VIT).eval(), batch(VIT, n=8)
        if stage == "1":
            model.freeze_vision()
        contrastive_loss(*model(pixels, ids)).backward()
        expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        for sent, early, buckets, loss, got in (result[stage] for result in results):
            assert sent.sum() == sum(p.numel() for p in model.parameters() if p.requires_grad) + buckets and early == buckets > 5
            assert loss == pytest.approx(contrastive_loss(*model(pixels, ids)).item(), rel=1e-5) and got.keys() == expected.keys()
            for name, gradient in expected.items():
                torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_a_frozen_tower_prepares_each_image_once():
    """The second pass of gradient caching needs no images then."""
    for frozen, times in ((True, 1), (False, 2)):
        model, (pixels, ids) = build(VIT).train(), batch(VIT)
        if frozen:
            model.freeze_vision()
        prepared = []
        micro = SimpleNamespace(images=lambda device: prepared.append(0) or pixels, ids=ids, seed=0)
        gradients = train.GradientSum([p for p in model.parameters() if p.requires_grad])
        train.train_step(model, [micro, micro, micro], None, gradients, train.make_optimizer(model, 0.1),
                         torch.amp.GradScaler("cpu", enabled=False), contextlib.nullcontext)
        assert len(prepared) == 3 * times


def test_patch_dropout_leaves_out_patches_in_training_alone():
    model, (pixels, _) = build(VIT), batch(VIT)
    seen = []
    model.vision.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0]) // len(pixels)))            # tokens of a image
    model.vision.patch_dropout = 0.75
    for mode in (True, False):
        model.train(mode).encode_image(pixels)
    assert seen == [1 + 4, 1 + 16]
