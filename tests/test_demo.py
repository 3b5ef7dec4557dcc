"""The demo at toy size: its acts, its commands, its figures, and that it continues where it stopped."""
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

from model import CONFIGS
from support.tables import TABLE_1
from tools import demo, landscapes

ROWS = ["landscapes: stage 1, then stage 2", "landscapes: stage 2 alone, as many steps", "the difference", "poems: zero-shot", "poems: fine-tuned"]


class InThisProcess:
    """In the place of subprocess.Popen: runs one of our programs here (a tenth of the time), with small batches. What it says, and the status it ends with, as the process would."""

    def __init__(self, command, **_):
        self.args, module, words = command, command[2].removesuffix(".py"), command[3:]
        if module == "-m":
            module, *words = words
        out, self.status = io.StringIO(), 0
        toy = {"train": ["--batch-size", "8", "--workers", "0", "--precision", "fp32", "--warmup", "1"], "evaluate": ["--workers", "0", "--precision", "fp32"]}
        toy["tools.classify"] = toy["evaluate"]
        words = [*words, *toy.get(module, [])]
        if module == "train":
            words += ["--max-steps", "2"]
        with contextlib.redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [module, *words])
            try:
                importlib.import_module(module).main()
            except BadInput as error:
                print(f"error: {error}")
                self.status = 1
        self.stdout = io.StringIO(out.getvalue())

    def wait(self):
        return self.status


@pytest.fixture
def small(tmp_path, monkeypatch):
    """In an empty folder: a tinier model, a few steps of a few painted pairs, an image for each class, our programs in this process."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").touch()
    monkeypatch.setitem(CONFIGS, "tiny", dataclasses.replace(CONFIGS["tiny"], embed_dim=32, image_size=32, vision_layers=(1, 1, 1, 1), vision_width=8, vision_heads=4, text_width=32, text_heads=1))
    for name, painted in list(landscapes.SETS.items()):
        monkeypatch.setitem(landscapes.SETS, name, painted._replace(sizes={"train": 24, "valid": 8, "test": 8}))
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
    """Acts in order; every command is one that its program took; the summary's figures are those of the JSON files; a second run trains nothing and says the same."""
    first = called(demo)
    assert re.findall(r"^(\w+)\. ", first, re.M) == ["0", "1", "2", "2b", "3", "4", "5"] and first.count("\n=== seed 0") == 1
    programs = [command[0] if command[0] != "-m" else command[1] for command in commands(first)]
    assert programs == ["tools.prepare"] * 3 + ["train.py"] * 4 + ["evaluate.py", "tools.classify", "evaluate.py", "train.py", "evaluate.py"]
    assert first.count("  finished. ") == 5 and first.rstrip().splitlines()[-1].startswith("With images: runs/demo/seed-0/poems.html")

    out = tmp_path / "runs/demo/seed-0"
    rows, (classes,) = table(first), json.loads((out / "classes.json").read_text())["results"]
    difference = rows.pop("the difference")
    assert list(rows.items()) == [
        (ROWS[0], recalls(out, "landscapes.json", 1)), (ROWS[1], recalls(out, "landscapes.json", 0)),
        (ROWS[3], recalls(out, "poems.json", 0)), (ROWS[4], recalls(out, "poems.json", 1)),
        (f"{classes['classes']} classes, zero-shot: top-1", [f"{classes['top-1']:.1f}"])]
    staged, alone = list(rows.values())[:2]
    assert [float(x) for x in difference] == pytest.approx([float(a) - float(b) for a, b in zip(staged, alone)], abs=0.11)         # rounded twice
    assert recalls(out, "zero-shot.json", 0) == recalls(out, "poems.json", 0)
    ckpts = lambda name: [Path(r["ckpt"]).relative_to("runs/demo/seed-0") for r in json.loads((out / name).read_text())["results"]]
    assert list(map(str, ckpts("landscapes.json") + ckpts("poems.json"))) == ["alone/last.pt", "stage2/last.pt", "poems/start.pt", "poems/last.pt"]
    log = (tmp_path / "runs/demo/log.txt").read_text(encoding="utf-8")
    assert log.count("\n$ ") == len(programs) and "settings: " in log and "settings: " not in first
    made = [*out.rglob("last.pt"), *(tmp_path / "runs/demo/data").rglob("0.png"), *(tmp_path / "runs/demo/data").rglob("0000.png")]
    weights = {path: path.stat().st_mtime_ns for path in made}

    again = called(demo)
    assert again.count("  nothing to do: finished. ") == 5 == len(list(out.rglob("last.pt"))) and commands(again) == commands(first)
    assert {path: path.stat().st_mtime_ns for path in weights} == weights and len(weights) > 40
    assert table(again) == rows | {"the difference": difference}


def test_the_demos_steps_are_those_of_the_poems_and_of_equal_length():
    """Stage 2 alone takes as many steps as stages 1 and 2, from the same weights and data; the sets are as large as act 4 says."""
    commands = {words[-1].rpartition("/")[2]: words for words in map(shlex.split, re.findall(r"^\$ (python train.py .*)$", demo.ACTS, re.M))}
    value = lambda run, flag: commands[run][commands[run].index(flag) + 1]
    assert list(commands) == ["english", "stage1", "stage2", "alone", "poems"]
    assert int(value("alone", "--max-steps")) == int(value("stage1", "--max-steps")) + int(value("stage2", "--max-steps")) == 90 and "as many steps (90)" in demo.ACTS
    assert value("alone", "--vision-weights") == value("stage1", "--vision-weights") and value("alone", "--data") == value("stage1", "--data") == value("stage2", "--data")
    assert all(value(run, "--valid-every") == value(run, "--max-steps") for run in commands)
    assert landscapes.SETS["poems"].sizes == TABLE_1["ap-id"] and landscapes.SETS["poems"].sizes["train"] == 2000


def test_an_interrupted_demo_continues(small, called, tmp_path, monkeypatch):
    """Stopped in act 2: the next call keeps what acts 0 and 1 have made."""
    run = demo.run

    def fails_in_act_2(line):
        if "--init" in line:
            raise BadInput("the power fails")
        run(line)
    monkeypatch.setattr(demo, "run", fails_in_act_2)
    with pytest.raises(BadInput, match="the power fails"):
        called(demo)
    made = (tmp_path / "runs/demo/seed-0/stage1/last.pt").stat().st_mtime_ns
    said = []
    monkeypatch.setattr(demo, "print", lambda *words, **_: said.append(" ".join(words)), raising=False)
    with pytest.raises(BadInput, match="the power fails"):
        called(demo)
    assert sum("nothing to do: " in line for line in said) == 2 and not any("  finished. " in line for line in said)
    assert (tmp_path / "runs/demo/seed-0/stage1/last.pt").stat().st_mtime_ns == made


def test_figures_are_those_of_the_right_rows(tmp_path, monkeypatch):
    """Of files in which all differ: before is the first row of poems.json, alone the first of landscapes.json."""
    row = lambda t, i: {"text_to_image": {"R@1": t, "MR": t + 10}, "image_to_text": {"R@1": i, "MR": i + 20}}
    monkeypatch.setattr(demo, "OUT", tmp_path)
    monkeypatch.setattr(demo, "run", lambda line: None)
    (tmp_path / "seed-7").mkdir()
    for name, results in (("landscapes", [row(1, 2), row(3, 4)]), ("poems", [row(5, 6), row(7, 8)]), ("classes", [{"classes": 40, "top-1": 9}])):
        (tmp_path / f"seed-7/{name}.json").write_text(json.dumps({"results": results}))
    figures = [[3, 4, 18.5], [1, 2, 16.5], [2, 2, 2], [5, 6, 20.5], [7, 8, 22.5]]
    assert demo.story(7) == dict(zip(ROWS, figures)) | {"40 classes, zero-shot: top-1": [9]}


def test_each_seed_is_a_story_and_the_summary_their_mean(small, called, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(demo, "story", lambda seed: asked.append(seed) or {"a row": [10.0 + 4 * seed, 50.0], "top-1": [7.25]})
    monkeypatch.setattr(demo, "paint_classes", lambda folder: None)
    said = called(demo, "--seeds", 0, 1)
    assert asked == [0, 1]
    assert table(said) == {"a row": "12.0 ± 2.8 50.0 ± 0.0".split(), "top-1": "7.2 ± 0.0".split()}            # sqrt(((10 - 12)² + (14 - 12)²) / 1)
    lines = demo.summary([{"a row": [10.0, 50.0, 30.0], "top-1": [7.25]}]).splitlines()
    ends = [re.search(name, lines[0]).start() for name in ("text-to-image R@1", "image-to-text R@1", "mean recall")]
    assert [lines[1][place : place + 5].strip() for place in ends] == ["10.0", "50.0", "30.0"] and lines[2].split() == ["top-1", "7.2"] and len(lines) == 3


def test_fresh_starts_over_and_leaves_other_seeds(small, called, monkeypatch, tmp_path):
    """What its own seeds have made, and the images, are made anew."""
    out, begun = tmp_path / "runs/demo", []
    monkeypatch.setattr(demo, "story", lambda seed: begun.append(seed) or {"row": [1.0]})
    monkeypatch.setattr(demo, "paint_classes", lambda folder: begun.append(folder.parent.exists()))
    for name in ("data", "seed-0", "seed-1", "seed-2"):
        (out / name).mkdir(parents=True)
    with pytest.raises(BadInput, match="was not made by tools/demo.py, so it stays"):               # no lock of ours lies there
        called(demo, "--fresh")
    called(demo, "--seeds", 1, 2)
    assert begun == [True, 1, 2] and len(list(out.glob("[ds]*"))) == 4
    called(demo, "--fresh", "--seeds", 1, 2)
    assert begun[3:] == [False, 1, 2] and sorted(path.name for path in out.iterdir()) == ["lock", "log.txt", "seed-0"]
    (out / "data").symlink_to(tmp_path)
    with pytest.raises(OSError, match="symbolic link"):
        called(demo, "--fresh")
    assert out.exists() and (out / "data").exists()


def test_two_demos_keep_out_of_each_others_way(small, stopped, tmp_path):
    """A process holds the lock; nothing of it is deleted."""
    (tmp_path / "runs/demo/data").mkdir(parents=True)
    hold = "import fcntl, sys; f = open('runs/demo/lock', 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", hold], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        assert "another demo is at work there" in stopped(demo, "--fresh")
    assert (tmp_path / "runs/demo/data").exists()


@pytest.mark.parametrize("seeds", [[-1], [0, 0], [2**31 - 1], [0, 2**40]])
def test_refused_seeds(seeds, small, stopped, tmp_path):
    assert "different whole numbers" in stopped(demo, "--seeds", *seeds) and not (tmp_path / "runs").exists()


def test_another_folder_is_refused(stopped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert stopped(demo).endswith("has no train.py: run this in the folder of train.py") and list(tmp_path.iterdir()) == []


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """Write a.py, run `$ python a.py …` as the demo does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "OUT", tmp_path)

    def play(source, *args):
        (tmp_path / "a.py").write_text(source, encoding="utf-8")
        demo.run("$ python " + shlex.join(["a.py", *args]))
    return play


def test_a_process_is_heard_and_its_log_kept(scripts, capsys, tmp_path):
    scripts("import sys; print('stage 1: 海边\\nsettings: a=1\\nfinished', sys.argv[1:]); print('error: on stderr', file=sys.stderr)", "a b", "x")
    assert capsys.readouterr().out == "  stage 1: 海边\n  finished ['a b', 'x']\n"
    assert (tmp_path / "log.txt").read_text(encoding="utf-8") == "\n$ python a.py 'a b' x\nstage 1: 海边\nsettings: a=1\nfinished ['a b', 'x']\nerror: on stderr\n"


def test_a_script_that_fails_stops_the_demo_with_its_error(scripts, tmp_path, capsys):
    with pytest.raises(BadInput) as caught:
        scripts("import sys; print('step 1'); sys.exit('error: --lr 7: too large')")
    assert str(caught.value) == f"--lr 7: too large ({tmp_path}/log.txt has more; python -m tools.demo continues there)"
    assert (tmp_path / "log.txt").read_text().endswith("step 1\nerror: --lr 7: too large\n")


def test_a_script_that_is_killed_stops_the_demo_and_is_named(scripts):
    with pytest.raises(BadInput, match=r"signal 9 ended python a\.py"):
        scripts("import os; print('step 30/60 loss 1.0', flush=True); os.kill(os.getpid(), 9)")


def test_a_terminal_of_another_encoding_is_no_matter(scripts, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONIOENCODING", "gbk")
    scripts("print('stage 1: 海边')")
    assert "stage 1: 海边" in capsys.readouterr().out
