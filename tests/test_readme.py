"""What README.md, and README.zh.md after it, say is true: commands and snippets run, and every name, figure and link is where they say it is.

Commands run in the README's own order, at toy size, in a folder where everything that it speaks of lies: one's output is the next one's input. A command that this file does not know how to run fails.
"""
import argparse
import ast
import functools
import importlib
import importlib.util
import inspect
import io
import json
import math
import os
import re
import runpy
import shlex
import shutil
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace

import peers
import pytest
import torch
from conftest import ROOT, on_processes, png, write_tar, write_tsv_split
from test_loss import IMAGE_KEYS, TEXT_KEYS, TRUTH, embeddings
from test_prepare import COCO, write_files, write_zip
from torch.distributed.run import get_args_parser

import checkpoint
import model
import train
from loss import matches
from support import painter, system
from support.settings import parse_args
from support.tables import PUBLISHED
from tools import bench, landscapes

READMES = {path.name: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("README*.md"))}
each_readme = pytest.mark.parametrize("text", READMES.values(), ids=READMES)
SCRIPTS = sorted([path.stem for path in ROOT.glob("*.py") if "system.run(main)" in path.read_text(encoding="utf-8")]
                 + [f"tools.{path.stem}" for path in ROOT.glob("tools/*.py") if "__main__" in path.read_text(encoding="utf-8")])

# ---------------------------------------------------------------------------------------------------------------- commands

NO_COMMANDS = ("image,caption\n", "vit-b-16, batches of 16, ")                  # how the blocks begin that hold something else: a captions.csv, what bench.py prints
# What is not run here: tests/test_demo.py runs the demo; tests are tests; make and pip would install for minutes. That what they name is there is tested.
ELSEWHERE = ("python -m tools.demo", "python -m pytest ", "make ", "pip ")
# What is appended to a command, so that it takes a moment: the last of two equal flags counts. (A fresh process costs seconds, so images are read without.)
TOY = {
    "train": "--max-steps 1 --batch-size 4 --workers 0 --precision fp32",
    "evaluate": "--workers 0 --precision fp32",
    "tools.classify": "--workers 0 --precision fp32",
    "tools.search": "--workers 0",
    "tools.bench": "--model small-vit --batch-size 8 --rounds 1",
}
TOY_IF_NAMED = {"--processes": "1", "--micro-batches": "4"}
OUTPUTS = ("--out", "--export", "--report", "--json", "--html")


def blocks(text, language):
    """What stands between ``` in this language ("" for none)."""
    return [block for name, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S) if name == language]


def commands(text):
    """Every command of a README, in its order, without comments: the lines of blocks without language, and inline ones."""
    for block, inline in re.findall(r"^```\n(.*?)^```$|`((?:python|torchrun|make|pip) [^`]+)`", re.sub(r"^```\w+\n.*?^```$", "", text, flags=re.M | re.S), re.M | re.S):
        if inline or not block.startswith(NO_COMMANDS):
            yield from filter(None, (shlex.join(shlex.split(line, comments=True)) for line in (inline or block).splitlines()))


COMMANDS = list(dict.fromkeys(command for text in READMES.values() for command in commands(text)))                                   # what both say is run once
NOT_RUN = [command for command in COMMANDS if command.startswith(ELSEWHERE)]
RUN = [command for command in COMMANDS if command not in NOT_RUN]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Where the reader sits: a folder with what the README's commands name, all of it small -> (folder, the commands that were run there)."""
    folder = tmp_path_factory.mktemp("reader")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        for start, name in enumerate(("COCO-CN", "Flickr30k-CN", "emoji-cn")):
            for split, count, first in (("train", 6, 1), ("valid", 4, 101), ("test", 4, 201)):
                write_tsv_split(folder / name, split, count, start=first + 1000 * start)
        (folder / "data").mkdir()
        write_zip(folder / "data/COCO-CN.zip", {f"COCO-CN/{path.name}": path.read_bytes() for path in (folder / "COCO-CN").iterdir()})              # as "put there by other means"
        (folder / "Flickr30k-CN").rename(folder / "data/Flickr30k-CN")
        rows = "".join(f"{i}.png,第{i}张图片,{split}\n" for i, split in enumerate(["train"] * 6 + ["valid"] * 3 + ["test"] * 3))
        for seed, name in ((10, "path/to/folder"), (50, "data/AP-ID")):
            write_files(folder / name, {"captions.csv": f"image,caption,split\n{rows}", **{f"{i}.png": png(seed=seed + i) for i in range(12)}})
        write_files(folder / "path/to/classes", {f"{name}/{i}.png": png(seed=i) for i, name in enumerate("猫猫狗狗")})
        write_files(folder / "path/to/mscoco", {f"{line}.jpg": png(seed=i) for i, line in enumerate(re.findall(r"COCO_\w+(?=\n)", "".join(COCO.values())))})
        write_zip(folder / "path/to/coco-cn-release.zip", COCO)
        (folder / "emoji-cn").rename(folder / "path/to/emoji-cn")
        write_files(folder, {"Pictures/2026/a.png": png(seed=1), "Pictures/b.png": png(seed=2), "query.jpg": png(seed=3), "cat.jpg": png(seed=4), "prompts.txt": "一张{}的照片\n"})
        pair = lambda i: {f"{i:04}.png": png(seed=i), f"{i:04}.txt": f"第{i}张".encode()}
        for name, numbers in (("shards/000000.tar", (1, 2, 3)), ("shards/000001.tar", (4, 5, 6)), ("held-out/0.tar", (7, 8, 9))):
            write_tar(folder / name, functools.reduce(dict.__or__, map(pair, numbers)))
        small = model.CLIP(peers.VIT)
        (folder / "cache").mkdir()
        for name in ("cache/clip_cn_vit-b-16.pt", "vision.pt"):
            checkpoint.export(small, folder / name)
        torch.save(peers.openai_clip_model(peers.VIT).state_dict(), folder / "ViT-B-16.pt")
        bert = {key: x for key, x in checkpoint.Layout("BERT", text_prefix="").to_theirs(small.state_dict()).items() if key.startswith(("embeddings.", "encoder."))}
        (folder / "chinese-roberta-wwm-ext").mkdir()
        torch.save(bert, folder / "chinese-roberta-wwm-ext/pytorch_model.bin")
        (folder / "chinese-roberta-wwm-ext/config.json").write_text(json.dumps(peers.hub_sizes(64, 2, 1)))
    return SimpleNamespace(folder=folder, done=[])


@pytest.fixture
def there(world, monkeypatch, small_sizes):
    """In that folder; the web is out of reach, released weights are small ones in the cache, the painted data sets are small."""
    monkeypatch.chdir(world.folder)
    for name, value in (("CE_CLIP_CACHE", world.folder / "cache"), ("HOME", world.folder), ("HF_ENDPOINT", "http://127.0.0.1:9")):
        monkeypatch.setenv(name, str(value))
    sizes = {"train": 16, "valid": 8, "test": 8}
    for name, painted in list(landscapes.SETS.items()):
        monkeypatch.setitem(landscapes.SETS, name, painted._replace(sizes=sizes))
    monkeypatch.setattr(painter, "DEMO", painter.DEMO._replace(sizes=sizes))
    monkeypatch.setattr(system, "download", lambda repo, name, *_, **__: world.folder / "cache" / name)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr("support.run.AVERAGES", [0.5])
    return world.folder


@pytest.fixture
def run(there, world, called, small_bench, monkeypatch):
    """Run a command of the README as it stands there -> what it prints."""
    monkeypatch.setattr(bench, "timed", lambda call, device: [call(), 0.2][1])                      # one call instead of as many as fill a tenth of a second

    def run(command):
        world.done.append(command)
        words = [os.path.expanduser(word) for word in shlex.split(command)]             # as a shell does
        if words[0] == "torchrun":
            words = ["python", *launched(words[1:])]
        name, words = (words[2], words[3:]) if words[1] == "-m" else (words[1].removesuffix(".py"), words[2:])
        assert command.startswith(("python ", "torchrun ")) and name in SCRIPTS, f"{command}: this test does not know how to run it"
        arguments = at_toy_size(words)
        arguments += [*shlex.split(TOY.get(name, "")), *(word for flag, value in TOY_IF_NAMED.items() if flag in words for word in (flag, value))]
        arguments = [word.replace("--max-steps", "--epochs") if "--epochs" in words else word for word in arguments]             # one of them; one epoch is a step or two
        arguments += ["--rows", "image"] if name == "tools.bench" and "--rows" not in words else []
        arguments = arguments if "--help" not in words else ["--help"]
        for place in places(name, arguments):                                   # what another command of the README has left there
            shutil.rmtree(place, ignore_errors=True)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("海边的日落\n".encode())))            # tools.search asks
        try:
            said = called(importlib.import_module(name), *arguments)
        except SystemExit as stop:
            assert not stop.code, f"{command}: exit status {stop.code}"
            return ""
        except Exception as error:
            pytest.fail(f"{command}: {type(error).__name__}: {error}")
        for flag, value in zip(arguments, arguments[1:]):
            assert flag not in OUTPUTS or Path(value).exists(), f"{command}: wrote no {value}"
        return said
    return run


def launched(words):
    """What torchrun starts: its own flags are looked at, and in this process there is one."""
    args = get_args_parser().parse_args(words)
    return [args.training_script, *args.training_script_args]


def at_toy_size(words):
    """/path/to/folder lies in the reader's folder; a range of shards has two of them; `--data …` is any data set, and … alone whatever else one likes."""
    words = ["coco-cn" if word == "…" and before == "--data" else word for before, word in zip(["", *words], words)]
    return [re.sub(r"\{000000\.\.0\d+\}", "{000000..000001}", word.replace("/path/to/", "path/to/")) for word in words if word != "…"]


def places(name, arguments):
    """Folders that a command makes, and does not want to find another one's work in."""
    if name == "train" and "--help" not in arguments:
        return [parse_args(arguments).out]
    return arguments[2:3] if arguments[:1] in (["convert"], ["shards"]) else []


@pytest.mark.parametrize("command", RUN, ids=RUN)
def test_every_command_runs(command, run, world):
    for before in RUN[: RUN.index(command)]:                                    # when this one alone is asked for
        if before not in world.done:
            run(before)
    run(command)


@pytest.mark.parametrize("command", NOT_RUN, ids=NOT_RUN)
def test_what_other_commands_name_is_there(command):
    words = command.split()
    if words[0] == "make":
        assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M) for target in words[1:])
    assert all((ROOT / word).is_file() for word in words if word.endswith((".py", ".txt")))
    assert all((ROOT / f"{word.replace('.', '/')}.py").is_file() for word in words if word.startswith("tools."))
    if "pytest" in words:
        assert [word for word in words[3:] if not word.startswith("-")]


@each_readme
def test_every_flag_exists(text, called, monkeypatch):
    """Of all scripts together: a flag of a sentence need not say whose it is."""
    flags, add_argument = {"--no-deps", "--sort", "--draw", "--write-shards", "--classify"}, argparse._ActionsContainer.add_argument             # pip's, tar's, those that have moved
    monkeypatch.setattr(argparse._ActionsContainer, "add_argument", lambda parser, *names, **how: flags.update((action := add_argument(parser, *names, **how)).option_strings) or action)
    for name, *more in [*((name,) for name in SCRIPTS), *(("tools.prepare", command) for command in ("fetch", "convert", "check", "counts", "shards", "sheet", "paint"))]:
        with pytest.raises(SystemExit):
            called(importlib.import_module(name), *more, "--help")
    flags |= {name for action in get_args_parser()._actions for name in action.option_strings}
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) <= flags


@each_readme
def test_the_captions_file_is_read(text, there, called):
    """Its three rows: two images, one of them with two captions."""
    (captions,) = [block for block in blocks(text, "") if block.startswith("image,caption")]
    write_files(there / "photos-of-mine", {"captions.csv": captions, **{name: png(seed=90 + i) for i, name in enumerate(sorted(set(re.findall(r"^photos\S+?(?=,)", captions, re.M))))}})
    rows = [[int(n) for n in re.findall(r"(\d+) (?:images|captions|pairs)", line)] for line in called(importlib.import_module("tools.prepare"), "counts", "photos-of-mine").splitlines()]
    assert [sum(numbers) for numbers in zip(*rows)] == [2, 3, 3]


# ---------------------------------------------------------------------------------------------------------------- snippets


SNIPPETS = ("checkpoint.load(", "def siglip(", "class BagOfWords(")             # by what each has in it


def each_snippet(word):
    """For the ```python blocks with this word in them, without comments: one, if the READMEs differ in their comments only."""
    codes = dict.fromkeys(ast.unparse(ast.parse(block)) for text in READMES.values() for block in blocks(text, "python") if word in block)
    return pytest.mark.parametrize("code", codes, ids=[str(number) for number in range(len(codes))])


def written(code, folder):
    (folder / "snippet.py").write_text(code, encoding="utf-8")
    return folder / "snippet.py"


def imported(path):
    spec = importlib.util.spec_from_file_location("snippet", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_snippet_is_tested():
    """All are in README.md, and each is one of those below."""
    found = {name: [[word for word in SNIPPETS if word in block] for block in blocks(text, "python")] for name, text in READMES.items()}
    assert found["README.md"] == [[word] for word in SNIPPETS] and all(len(words) == 1 for some in found.values() for words in some)


@each_snippet("checkpoint.load(")
def test_released_weights_say_which_caption_fits(code, there, tmp_path, capsys):
    found = runpy.run_path(str(written(code, tmp_path)))
    (shares,) = json.loads(capsys.readouterr().out)
    assert len(shares) == 2 and sum(shares) == pytest.approx(1, abs=1e-6)
    expected = torch.tensor([(found["scale"] * (found["image_embed"][0] * text_embed).sum()).item() for text_embed in found["text_embed"]]).exp()
    assert shares == pytest.approx((expected / expected.sum()).tolist(), abs=1e-5)
    for embed in (found["image_embed"], found["text_embed"]):
        torch.testing.assert_close(embed.norm(dim=1), torch.ones(len(embed)))
    assert not found["model"].training and all(p.dtype == torch.float32 for p in found["model"].parameters())


def siglip_by_loops(image, text, scale, truth):
    """-1/N Σ_i Σ_j log 1 / (1 + exp(-y_ij (s I_i·T_j - 10))), y 1 where caption j describes image i and else -1, and its gradients; truth (N, N) as lists."""
    N, loss, d_image, d_text, d_scale = len(image), 0.0, torch.zeros_like(image), torch.zeros_like(text), 0.0
    for i in range(N):
        for j in range(N):
            y, cosine = 2 * truth[i][j] - 1, sum(float(a) * float(b) for a, b in zip(image[i], text[j]))
            z = scale * cosine - 10
            loss += math.log(1 + math.exp(-y * z)) / N
            slope = -y / (1 + math.exp(y * z)) / N
            d_image[i] += slope * scale * text[j]
            d_text[j] += slope * scale * image[i]
            d_scale += slope * cosine
    return [torch.tensor(loss, dtype=torch.float64), d_image, d_text, torch.tensor(d_scale, dtype=torch.float64)]


def siglip_shares(rank, world, path):
    """This process's part of six pairs, without and with several matches."""
    siglip, own = imported(path).siglip, slice(6 // world * rank, 6 // world * (rank + 1))
    image, text = embeddings(6)
    return [siglip(image[own], text[own], torch.tensor(12.0, dtype=torch.float64), truth) for truth in (None, matches(IMAGE_KEYS, TEXT_KEYS))]


@each_snippet("def siglip(")
def test_siglip_is_its_formula_and_the_same_on_two_processes(code, tmp_path):
    path = written(code, tmp_path)
    one = siglip_shares(0, 1, path)
    both = [[(a[0] + b[0], torch.cat([a[1], b[1]]), torch.cat([a[2], b[2]]), a[3] + b[3]) for a, b in zip(*on_processes(siglip_shares, 2, tmp_path / "two", path))]]
    for case, truth in enumerate((torch.eye(6, dtype=torch.int64).tolist(), TRUTH)):
        expected = siglip_by_loops(*embeddings(6), 12.0, truth)
        for got in (one[case], *(some[case] for some in both)):
            for x, y in zip(got, expected, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)


@each_snippet("def siglip(")
def test_siglip_trains_in_the_place_of_our_loss(code, trained, tsv_folder, tmp_path, monkeypatch):
    """Micro-batches stay as they are, and so does the frozen tower: the same step."""
    monkeypatch.setattr(train, "tiled_loss", imported(written(code, tmp_path)).siglip)
    common = ["train.py", "--stage", 1, "--data", tsv_folder, "--max-steps", 3, "--batch-size", 6, "--workers", 0, "--precision", "fp32", "--log-every", 1, "--features", "none"]
    curves = []
    for name, more in (("whole", []), ("parts", ["--micro-batch", 4])):
        trained(*common, *more, "--out", tmp_path / name)
        curves.append([(step["loss"], step["gradient_norm"]) for step in map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines()) if "loss" in step])
    assert len(curves[0]) == 3 and curves[0][2][0] < curves[0][0][0]
    assert [x for step in curves[1] for x in step] == pytest.approx([x for step in curves[0] for x in step], rel=1e-4)


@each_snippet("class BagOfWords(")
def test_a_bag_of_words_trains_in_the_place_of_bert(code, trained, tsv_folder, tmp_path, monkeypatch):
    """And our own checkpoints of it work at once."""
    BagOfWords = imported(written(code, tmp_path)).BagOfWords
    monkeypatch.setattr(model, "BertEncoder", BagOfWords)
    trained("train.py", "--stage", 2, "--data", tsv_folder, "--max-steps", 1, "--batch-size", 6, "--workers", 0, "--precision", "fp32", "--out", tmp_path / "run")
    start = checkpoint.read(tmp_path / "run/best.pt")["model"]
    loaded = checkpoint.load(tmp_path / "run/last.pt")[0]
    assert isinstance(loaded.text, BagOfWords) and not torch.equal(loaded.text.words.weight, start["text.words.weight"])
    ids = torch.tensor([[101, 7, 9, 9, 102, 0, 0], [101, 5, 102, 0, 0, 0, 0]])
    means = [torch.stack([loaded.text.words.weight[i] for i in row if i]).mean(0) for row in ids]
    torch.testing.assert_close(loaded.text(ids), torch.stack(means))


# ---------------------------------------------------------------------------------------------------------------- names, figures, links


def names_of(line):
    """`a.py`: `name`, … `name.attr` → (a, name), … ; what is in backticks and no name is left out."""
    file = None
    for token in re.findall(r"`([^`]+)`", line):
        if re.fullmatch(r"[\w/]+\.py", token):
            file = token.removesuffix(".py").replace("/", ".")
        elif file and re.fullmatch(r"[A-Za-z_][\w.]*", token):
            yield file, token


@each_readme
def test_the_paper_is_where_the_table_says(text):
    """Each name of the code column, and of the steps joined by arrows."""
    rows = [line.rstrip("| ").rpartition("|")[2] for line in text.splitlines() if re.match(r"\|.*\| `[\w/]+\.py`[^|]*\|$", line)]
    names = [pair for line in rows for pair in names_of(line)]
    path = [pair for line in text.splitlines() if "→" in line and ".py`" in line for pair in names_of(line)]
    extending = [pair for line in text.partition("siglip" if "README.md" not in text else "SigLIP")[2].splitlines() for pair in re.findall(r"`(\w+)\.py`: `([A-Za-z_][\w.]*)`", line)]
    assert len(rows) >= 15 and len(names) >= 15 and len(path) >= 5 and len(extending) >= 4
    for file, name in names + path + extending:
        assert has(importlib.import_module(file), name), f"`{file}.py` has no `{name}`"


def has(thing, name):
    for part in name.split("."):
        if not hasattr(thing, part):
            return False
        thing = getattr(thing, part)
    return True


def test_what_is_to_be_read_has_about_800_lines():
    """As the READMEs say of model.py, loss.py and four definitions of train.py."""
    whole = sum(len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in ("model.py", "loss.py"))
    parts = [inspect.getsource(part) for part in (train.main, train.train, train.train_step, train.GradientSum)]
    assert "about 800 lines" in READMES["README.md"] and "约八百行" in READMES["README.zh.md"] and 750 < whole + sum(part.count("\n") for part in parts) < 850


@each_readme
def test_every_file_that_is_named_is_there(text):
    own = {"siglip.py"}                                                         # the reader's
    named = set(re.findall(r"`((?:\w+/)*\w+\.(?:py|NOTICE))`", text)) | set(re.findall(r"`((?:tests|tokenizer)/[\w./]+)`", text))
    assert len(named) >= 10 and [name for name in sorted(named - own) if not (ROOT / name).is_file()] == []


@each_readme
def test_no_line_numbers(text):
    """They would be wrong after the next change: names stay."""
    assert not re.search(r"\.py`(?:, line |[，, ]*第 ?)\d", text)
    for word in ("BertEncoder(cfg)", "VisionTransformer(cfg)", "tiled_loss(", "d_scale"):
        assert word in "".join((ROOT / name).read_text(encoding="utf-8") for name in ("model.py", "train.py"))


@each_readme
def test_published_rows_are_those_that_evaluate_prints(text):
    rows = re.findall(r"^\| (\S.*?) \| (\S.*?) \| ([\d., ]+) \| ([\d., ]+) \| [^|]*\|$", text, re.M)
    rows = [(title, who, [float(x) for x in f"{there}, {back}".split(", ")]) for title, who, there, back in rows if there.count(".") == 3]
    published = [(title, f"{name}, {setting}", figures) for title, table in PUBLISHED.values() for _, name, setting, *figures in table]
    if "Table 4" in text:
        assert rows == published
    assert [figures for *_, figures in rows] == [figures for *_, figures in published]
    for (title, who, _), (known, name, _) in zip(rows, published):
        assert who.startswith(name.rpartition(",")[0]) and re.search(r"\d", title)[0] == re.search(r"\d", known)[0] and title.split()[-1] == known.split()[-1]


def slugs(text):
    """Names of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


LINKS = [(name, link) for name, text in READMES.items() for link in sorted(set(re.findall(r"(?:\]\(|src=\"|srcset=\")([^)\s\"]+)", text))) if not link.startswith("http")]


@pytest.mark.parametrize("name, link", LINKS, ids=[" ".join(pair) for pair in LINKS])
def test_links_lead_somewhere(name, link):
    file, _, anchor = link.partition("#")
    assert (ROOT / (file or name)).is_file(), f"{name}: there is no {file}"
    assert not anchor or anchor in slugs((ROOT / (file or name)).read_text(encoding="utf-8")), f"{name}: there is no heading #{anchor}"


def test_sections_that_are_spoken_of_are_there():
    text = READMES["README.md"]
    assert {name.lower() for name in re.findall(r"(?:see|as for|See) \*([^*]+)\*", text)} <= set(re.findall(r"^## (.*)$", text.lower(), re.M))


def test_the_image_of_the_model_is_drawn_for_light_and_dark():
    svg = "{http://www.w3.org/2000/svg}"
    root = ET.parse(ROOT / "model.svg").getroot()
    assert root.tag == f"{svg}svg" and root.find(f"{svg}title").text.strip()
    assert re.search(r"@media\s*\(prefers-color-scheme:\s*dark\)", "".join(style.text for style in root.iter(f"{svg}style")))
