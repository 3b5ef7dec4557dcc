"""The house rules: how much there is, what imports what, that importing does nothing, no machine's path anywhere."""
import ast
import graphlib
import re
import subprocess
import sys

import pytest
from conftest import ROOT

import data
import support
from support import settings

CARD = ("model.py", "loss.py", "data.py", "train.py", "evaluate.py")                               # the paper
FILES = sorted(path for pattern in ("*.py", "tokenizer/**/*.py", "support/**/*.py", "tools/**/*.py") for path in ROOT.glob(pattern))
TEXT = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in FILES}
TREES = {name: ast.parse(text) for name, text in TEXT.items()}
MODULES = {name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): name for name in TEXT}
STOREYS = [{"model", "loss", "tokenizer"}, {"support"}, {"checkpoint"}, {"data"}, {"evaluate"}, {"train"}, {"tools"}]
PACKAGES = {"torch", "torchvision", "tokenizers", "huggingface_hub", "tqdm", "numpy", "PIL"}       # tokenizers brings huggingface_hub and tqdm
each_file = pytest.mark.parametrize("name", TEXT)


# ---- how much there is


def lines_of(name):
    return TEXT[name].count("\n")


def test_the_paper_is_2000_lines_and_95_kb():
    assert sum(map(lines_of, CARD)) <= 2000
    assert sum(len(TEXT[name].encode()) for name in CARD) <= 95_000


@pytest.mark.parametrize("folder, total, largest", [("tokenizer", 65, 65), ("support", 4000, 450), ("tools", 2000, 600)])
def test_lines_of_a_folder_and_of_each_file(folder, total, largest):
    lines = {name: lines_of(name) for name in TEXT if name.startswith(f"{folder}/")}
    assert max(lines.values()) <= largest and sum(lines.values()) <= total, lines


def test_nothing_else_stands_at_the_top():
    assert {name for name in TEXT if "/" not in name} == {*CARD, "checkpoint.py"} and lines_of("checkpoint.py") <= 30


@each_file
def test_lines_have_100_columns_and_functions_60_lines(name):
    assert [n for n, line in enumerate(TEXT[name].split("\n"), 1) if len(line) > 100] == []
    functions = [node for node in ast.walk(TREES[name]) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert [node.name for node in functions if node.end_lineno - node.lineno + 1 > 60] == []


# ---- what imports what


def imported(name):
    """Every name that a file imports, anywhere in it: `from a.b import c` gives a.b and a.b.c."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def storey(module):
    return next(number for number, storey in enumerate(STOREYS) if module.split(".")[0] in storey)


OWN = {module: {other for other in imported(name) if other in MODULES and other != module} for module, name in MODULES.items()}


def test_imports_go_down_and_in_no_circle():
    up = [(module, other) for module, others in OWN.items() for other in others if storey(other) > storey(module)]
    beside = [(module, other) for module in ("model", "loss", "tokenizer") for other in OWN[module]]
    assert up == [] and beside == []
    tuple(graphlib.TopologicalSorter(OWN).static_order())                       # raises CycleError


def test_modules_of_support_import_those_that_stand_above_them():
    """In the list of its docstring, which names each of them."""
    order = [f"support.{name}" for name in re.findall(r"^(\w+)  +\S", support.__doc__, re.M)]
    assert sorted(order) == sorted(module for module in MODULES if module.startswith("support."))
    place = {module: number for number, module in enumerate(order)}
    assert [(module, other) for module in order for other in OWN[module] if other in place and place[other] > place[module]] == []


@each_file
def test_imports_are_few_packages_and_the_standard_library(name):
    first = {module.split(".")[0] for module in imported(name)}
    own = {module.split(".")[0] for module in MODULES}
    assert first <= PACKAGES | own | set(sys.stdlib_module_names) | ({"cn_clip"} if name == "tools/bench.py" else set())              # with --peer it measures that one, too
    if name in ("model.py", "loss.py"):
        assert first <= {"torch"} | set(sys.stdlib_module_names)


# ---- importing


@each_file
def test_a_module_only_defines(name):
    """But for a table that it reads from a file beside it, in a `with`."""
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.Expr, ast.If, ast.With)
    for node in TREES[name].body:
        assert isinstance(node, allowed), ast.unparse(node)
        assert not isinstance(node, ast.Expr) or isinstance(node.value, ast.Constant), ast.unparse(node)
        assert not isinstance(node, ast.If) or "__name__" in ast.unparse(node.test)


def test_importing_does_nothing(tmp_path):
    """All modules, in one process: no thread, no file, no word, no GPU."""
    probe = (f"import os, sys, threading; sys.path.insert(0, {str(ROOT)!r}); import {', '.join(sorted(MODULES))}; import torch; "
             "print(torch.cuda.is_initialized(), threading.active_count(), os.listdir('.'))")
    done = subprocess.run([sys.executable, "-c", probe], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("False 1 []\n", "")


def test_encoders_are_written_from_primitives():
    forbidden = r"torchvision\.models|nn\.Transformer|nn\.MultiheadAttention|\btimm\b|\btransformers\b"
    assert not re.search(forbidden, TEXT["model.py"])


def test_no_eval_exec_global_or_bare_except_and_no_path_of_a_machine():
    for name, text in TEXT.items():
        assert not re.search(r"(?<![.\w])(eval|exec)\(|^\s*global |except:", text, re.M), name
        assert not re.search(r"/(home|work|root|Users)/", text), name


@each_file
def test_every_flag_is_read(name):
    """A flag that nobody reads is a lie."""
    family = "".join(TEXT[other] for other in TEXT if other in (name, "train.py", "evaluate.py") or other.startswith("support/"))
    of_train = [flag[2:] for group in settings.FLAGS.values() for flag in group] if name == "train.py" else []
    for flag in re.findall(r'add(?:_argument)?\(\s*"--([a-z-]+)"', TEXT[name]) + of_train:
        attribute = flag.replace("-", "_")
        assert re.search(rf'\b(args|settings|folder)\.{attribute}\b|"{attribute}"', family), f"{name} --{flag}"


def test_every_number_has_a_range():
    numbers = [flag for group in settings.FLAGS.values() for flag, options in group.items() if "type" in options]
    assert sorted(settings.RANGES) == sorted(flag[2:].replace("-", "_") for flag in numbers)


# ---- one optimizer step


def test_a_step_passes_900_lines(trained, tsv_folder, tmp_path, monkeypatch):
    """The lines of our functions that run in one step of stage 2 with two micro-batches, from fetching its data to fetching that of the next one."""
    code, training_loader = set(), data.training_loader

    def loader(*args, **how):
        for fetched, batch in enumerate(training_loader(*args, **how), 1):
            yield batch
            if fetched == 2:                                                    # the second step begins
                frame = sys._getframe(1)
                while frame:                                                    # its loop, and what called that
                    code.add(frame.f_code)
                    frame = frame.f_back
                sys.setprofile(lambda frame, event, arg: code.add(frame.f_code) if event == "call" else None)
            if fetched == 4:
                sys.setprofile(None)

    monkeypatch.setattr(data, "training_loader", loader)
    try:
        trained("train.py", "--stage", 2, "--data", tsv_folder, "--max-steps", 3, "--batch-size", 4, "--micro-batch", 2, "--workers", 0,
                "--precision", "fp32", "--log-every", 100, "--valid-every", 100, "--out", tmp_path / "run")
    finally:
        sys.setprofile(None)
    lines = {}
    for function in code:
        name = function.co_filename.removeprefix(f"{ROOT}/")
        if name in TREES:
            lines.setdefault(name, set()).update(definition(name, function.co_firstlineno))
    count = {name: len(numbers) for name, numbers in lines.items()}
    print(f"a step passes {sum(count.values())} lines: {count}")
    assert {"train.py", "data.py", "model.py", "loss.py"} <= count.keys() and sum(count.values()) <= 900, count


def definition(name, first):
    """Lines of the function, lambda or comprehension whose code begins there, its decorators too."""
    ends = [node.end_lineno for node in ast.walk(TREES[name])
            if first == min([getattr(node, "lineno", 0), *(d.lineno for d in getattr(node, "decorator_list", []))])]
    return range(first, max(ends, default=first) + 1)
