"""The demo at toy size: its acts, its commands, its figures, and that it goes on where it stopped."""
import contextlib
import dataclasses
import functools
import importlib
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import BadInput

import data
from model import CONFIGS
from tools import demo


class InThisProcess:
    """In the place of subprocess.Popen: runs one of our scripts here (a tenth of the time), with small batches. What it says, and the status it ends with, as the process would."""

    def __init__(self, args, **_):
        self.args, script = args, Path(args[2]).stem
        out, self.status = io.StringIO(), 0
        toy = {"train": ["--batch-size", "8", "--workers", "0", "--precision", "fp32"], "evaluate": ["--workers", "0", "--precision", "fp32"]}
        with contextlib.redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [*args[2:], *toy.get(script, [])])
            try:
                importlib.import_module(script).main()
            except BadInput as error:
                print(f"error: {error}")
                self.status = 1
        self.stdout = io.StringIO(out.getvalue())

    def wait(self):
        return self.status


@pytest.fixture
def small(tmp_path, monkeypatch):
    """In an empty folder: a tinier model, a few steps of a few painted pairs, a image for each class, our scripts in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(CONFIGS, "tiny", dataclasses.replace(CONFIGS["tiny"], embed_dim=32, image_size=32, vision_layers=(1, 1, 1, 1), vision_width=8, vision_heads=4, text_width=32, text_heads=1))
    monkeypatch.setattr(demo, "STEPS", {"english": 2, "stage1": 2, "stage2": 1, "poems": 2})
    for name, painted in list(data.PAINTED.items()):
        monkeypatch.setitem(data.PAINTED, name, painted._replace(sizes={"train": 24, "valid": 8, "test": 8}))
    monkeypatch.setattr(demo, "paint_classes", functools.partial(demo.paint_classes, each=1))
    monkeypatch.setattr(demo, "subprocess", SimpleNamespace(Popen=InThisProcess, PIPE=None, STDOUT=None))
    monkeypatch.setattr("os.fsync", lambda _: None)


def commands(said):
    return [shlex.split(line)[2:] for line in said.splitlines() if line.startswith("$ python ")]


def table(said):
    """The summary: {row: its cells}."""
    rows = said.partition("test splits, %")[2].partition("\n\n")[0].splitlines()[1:]
    return {row[:52].strip(): row[52:].split() for row in rows}


def recalls(out, name, which):
    way = json.loads((out / name).read_text(encoding="utf-8"))["results"][which]
    t, i = way["text_to_image"], way["image_to_text"]
    return [f"{x:.1f}" for x in (t["R@1"], i["R@1"], sum(side[f"R@{k}"] for side in (t, i) for k in (1, 5, 10)) / 6)]


def test_the_whole_paper_in_miniature(small, called, tmp_path):
    """Acts in order; every command is one that its script took; the summary's figures are those of the JSON files; a second run trains nothing and says the same."""
    first = called(demo)
    acts = re.findall(r"^(\d)\. |^=== (seed 0)$", first, re.M)
    assert [number or seed for number, seed in acts] == ["seed 0", "0", "1", "2", "3", "4", "5"]
    scripts = [command[0] for command in commands(first)]
    assert scripts == ["data.py"] * 3 + ["train.py"] * 4 + ["evaluate.py"] * 3 + ["train.py", "evaluate.py"] and first.count("  finished. ") == 5
    assert first.rstrip().splitlines()[-1].startswith("With images: runs/demo/seed-0/poems.html")

    out = tmp_path / "runs/demo/seed-0"
    rows, (classes,) = table(first), json.loads((out / "classes.json").read_text())["results"]
    difference = rows.pop("the difference")
    assert list(rows.items()) == [
        ("landscapes: stage 1, 2 steps, then stage 2, 1", recalls(out, "landscapes.json", 1)),
        ("landscapes: stage 2 alone, 3 steps", recalls(out, "landscapes.json", 0)),
        ("poems: zero-shot", recalls(out, "poems.json", 0)), ("poems: fine-tuned", recalls(out, "poems.json", 1)),
        (f"{classes['classes']} classes, zero-shot: top-1", [f"{classes['top-1']:.1f}"])]
    staged, alone = list(rows.values())[:2]
    assert [float(x) for x in difference] == pytest.approx([float(a) - float(b) for a, b in zip(staged, alone)], abs=0.11)         # rounded twice
    assert recalls(out, "zero-shot.json", 0) == recalls(out, "poems.json", 0)
    ckpts = lambda name: [Path(r["ckpt"]).relative_to("runs/demo/seed-0") for r in json.loads((out / name).read_text())["results"]]
    assert list(map(str, ckpts("landscapes.json") + ckpts("poems.json"))) == ["alone/last.pt", "stage2/last.pt", "poems/start.pt", "poems/last.pt"]
    log = (tmp_path / "runs/demo/log.txt").read_text(encoding="utf-8")
    assert log.count("\n$ ") == len(scripts) and "settings: " in log and "settings: " not in first
    weights = {path: path.stat().st_mtime_ns for path in out.rglob("last.pt")}

    again = called(demo)
    assert again.count("  nothing to do: finished. ") == 5 == len(weights) and "data.py" not in [command[0] for command in commands(again)]
    assert {path: path.stat().st_mtime_ns for path in weights} == weights
    assert table(again) == rows | {"the difference": difference}


def test_an_interrupted_demo_goes_on(small, called, tmp_path, monkeypatch):
    """Stopped in act 2: the next call keeps what acts 0 and 1 have made."""
    story = demo.call
    monkeypatch.setattr(demo, "figures_of", lambda out: pytest.fail("it went on after an error"))

    def call(script, *args):
        if "--init" in args:
            raise BadInput("the power fails")
        story(script, *args)
    monkeypatch.setattr(demo, "call", call)
    with pytest.raises(BadInput, match="the power fails"):
        called(demo)
    made = (tmp_path / "runs/demo/seed-0/stage1/last.pt").stat().st_mtime_ns
    monkeypatch.setattr(demo, "call", lambda script, *args: story(script, *args) if str(args[-1]).endswith(("english", "stage1")) else None)
    monkeypatch.setattr(demo, "figures_of", lambda out: {"row": [1.0]})
    said = called(demo)
    assert said.count("nothing to do: ") == 2 and "  finished. " not in said and (tmp_path / "runs/demo/seed-0/stage1/last.pt").stat().st_mtime_ns == made


def test_figures_are_those_of_the_right_rows(small, tmp_path):
    """Of files in which all differ: before is the first row of poems.json, alone the first of landscapes.json."""
    row = lambda t, i: {"text_to_image": {"R@1": t, "MR": t + 10}, "image_to_text": {"R@1": i, "MR": i + 20}}
    for name, results in (("landscapes", [row(1, 2), row(3, 4)]), ("poems", [row(5, 6), row(7, 8)]), ("classes", [{"classes": 40, "top-1": 9}])):
        (tmp_path / f"{name}.json").write_text(json.dumps({"results": results}))
    assert demo.figures_of(tmp_path) == {
        "landscapes: stage 1, 2 steps, then stage 2, 1": [3, 4, 18.5], "landscapes: stage 2 alone, 3 steps": [1, 2, 16.5], "the difference": [2, 2, 2],
        "poems: zero-shot": [5, 6, 20.5], "poems: fine-tuned": [7, 8, 22.5], "40 classes, zero-shot: top-1": [9]}


def test_each_seed_is_a_story_and_the_summary_their_mean(small, called, monkeypatch, tmp_path):
    asked = []

    def story(out, sets, seed):
        asked.append((str(out), seed))
        return {"a row": [10.0 + 4 * seed, 50.0], "top-1": [7.25]}
    monkeypatch.setattr(demo, "story", story)
    monkeypatch.setattr(demo, "paint_sets", lambda folder: None)
    said = called(demo, "--seeds", 0, 1)
    assert asked == [("runs/demo/seed-0", 0), ("runs/demo/seed-1", 1)]
    assert table(said) == {"a row": "12.0 ± 2.8 50.0 ± 0.0".split(), "top-1": "7.2 ± 0.0".split()}            # sqrt(((10 - 12)² + (14 - 12)²) / 1)
    lines = demo.summary([{"a row": [10.0, 50.0, 30.0], "top-1": [7.25]}]).splitlines()
    ends = [re.search(name, lines[0]).start() for name in ("text-to-image R@1", "image-to-text R@1", "mean recall")]
    assert [lines[1][place : place + 5].strip() for place in ends] == ["10.0", "50.0", "30.0"] and lines[2].split() == ["top-1", "7.2"] and len(lines) == 3


def test_fresh_starts_over_and_leaves_other_seeds(small, called, monkeypatch, tmp_path):
    """What its own seeds have made, and the images, are made anew."""
    out, begun = tmp_path / "runs/demo", []
    monkeypatch.setattr(demo, "story", lambda out, sets, seed: begun.append(seed) or {"row": [1.0]})
    monkeypatch.setattr(demo, "paint_sets", lambda folder: begun.append(folder.exists()))
    for name in ("data", "seed-0", "seed-1", "seed-2"):
        (out / name).mkdir(parents=True)
    with pytest.raises(BadInput, match="was not made by demo.py, so nothing is deleted"):           # no lock of ours lies there
        called(demo, "--fresh")
    called(demo, "--seeds", 1, 2)
    assert begun == [True, 1, 2] and len(list(out.glob("[ds]*"))) == 4
    called(demo, "--fresh", "--seeds", 1, 2)
    assert begun[3:] == [False, 1, 2] and sorted(path.name for path in out.iterdir()) == ["lock", "log.txt", "seed-0"]
    (out / "data").symlink_to(tmp_path)
    with pytest.raises(BadInput, match="symbolic link"):
        called(demo, "--fresh")
    assert out.exists() and (out / "data").exists()


def test_two_demos_keep_out_of_each_others_way(small, stopped, tmp_path):
    """A process holds the lock; nothing of it is deleted."""
    (tmp_path / "runs/demo/data").mkdir(parents=True)
    hold = "import fcntl, sys; f = open('runs/demo/lock', 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", hold], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        assert "another demo.py is at work there" in stopped(demo, "--fresh")
    assert (tmp_path / "runs/demo/data").exists()


@pytest.mark.parametrize("seeds", [[-1], [0, 0], [2**31 - 1], [0, 2**40]])
def test_refused_seeds(seeds, small, stopped, tmp_path):
    assert "different whole numbers" in stopped(demo, "--seeds", *seeds) and not (tmp_path / "runs").exists()


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """Write a script where demo.py looks for ours, start it as a process, wait for it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "HERE", tmp_path)
    monkeypatch.setattr(demo, "OUT", tmp_path)

    def play(source, *args, show=True):
        (tmp_path / "a.py").write_text(source, encoding="utf-8")
        demo.finish(demo.start("a.py", *args), show)
    return play


def test_a_process_is_heard_and_its_log_kept(scripts, capsys, tmp_path):
    scripts("import sys; print('stage 1: 海边\\nsettings: a=1\\nfinished', sys.argv[1:]); print('error: on stderr', file=sys.stderr)", "a b", tmp_path / "x")
    said = capsys.readouterr().out
    assert said == f"$ python a.py 'a b' {tmp_path}/x\n  stage 1: 海边\n  finished ['a b', '{tmp_path}/x']\n"
    assert (tmp_path / "log.txt").read_text(encoding="utf-8").partition("\n")[2].split("\n", 1)[1] == f"stage 1: 海边\nsettings: a=1\nfinished ['a b', '{tmp_path}/x']\nerror: on stderr\n"
    scripts("print('stage 2')", show=False)
    assert capsys.readouterr().out == "$ python a.py\n" and (tmp_path / "log.txt").read_text(encoding="utf-8").endswith("a.py\nstage 2\n")


def test_a_script_that_fails_stops_the_demo_with_its_error(scripts, tmp_path, capsys):
    with pytest.raises(BadInput) as caught:
        scripts("import sys; print('step 1'); sys.exit('error: --lr 7: too large')")
    assert str(caught.value) == f"--lr 7: too large (when that is mended, python demo.py goes on; --fresh starts over; {tmp_path}/log.txt says more)"
    assert (tmp_path / "log.txt").read_text().endswith("step 1\nerror: --lr 7: too large\n")


def test_a_script_that_is_killed_stops_the_demo_and_is_named(scripts):
    with pytest.raises(BadInput, match=r"a\.py .*signal 9"):
        scripts("import os; print('step 30/60 loss 1.0', flush=True); os.kill(os.getpid(), 9)")


def test_a_terminal_of_another_encoding_is_no_matter(scripts, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONIOENCODING", "gbk")
    scripts("print('stage 1: 海边')")
    assert "stage 1: 海边" in capsys.readouterr().out
