"""The whole paper in miniature: on painted landscapes, in minutes on a laptop's CPU, with nothing to download.

    python -m tools.demo                   # six acts; run again it continues where it stopped, and when all is done it shows the figures again
    python -m tools.demo --fresh           # starts over
    python -m tools.demo --seeds 0 1 2     # the same from three random starts: mean ± standard deviation of each figure

Every act is one to three commands of train.py and evaluate.py, printed before they run: type them yourself to look closer, or change them.
What they say in full stands in runs/demo/log.txt. The figures are small ones of a small world. What carries over to the real one is the
order of things, and that each step does what the paper says it does.
"""
import argparse
import functools
import json
import os
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from support import system
from support.system import BadInput
from tools import landscapes

OUT = Path("runs/demo")
SETS = ("english-landscapes", "landscapes", "poems")
STEPS = {"english": 110, "stage1": 60, "stage2": 30, "poems": 60}               # of 128 pairs
TEMPLATES = ("{}", "远处有{}", "近处有{}", "地上有{}", "天上有{}")                  # for zero-shot classification: sentences as this world has them

# Of what train.py and evaluate.py print, the lines that tell the story.
SHOWN = re.compile(r"stage |step .* valid |finished|nothing to do|note:|warning:|scale |tiny |model |> |R@1 of|top-1 of|most often|"
                   r" +Text-to-Image|stopped")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true",
                        help="delete the painted sets, the log, and what earlier runs of these seeds have left, and start over")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of random weights and order, one story for each (default: 0)")
    args = parser.parse_args()
    if min(args.seeds) < 0 or max(args.seeds) >= 2**31 - 1 or len(set(args.seeds)) < len(args.seeds):
        raise BadInput(f"--seeds {' '.join(map(str, args.seeds))}: different whole numbers, at least 0 and below {2**31 - 1}")
    begin, lock = time.time(), open_folder(["data", *(f"seed-{seed}" for seed in args.seeds)] if args.fresh else [])
    paint_sets(OUT / "data")
    figures = [story(OUT / f"seed-{seed}", OUT / "data", seed) for seed in args.seeds]
    print("\n" + summary(figures))
    page = OUT / f"seed-{args.seeds[-1]}" / "poems.html"
    print(f"\nWith images: {page} (open it in a browser). All that the commands said: {OUT / 'log.txt'}. "
          f"This took {time.time() - begin:.0f} s.")
    lock.close()


def open_folder(old):
    """Make OUT, keep other demos out of it, delete the folders `old` in it and the log with them -> the lock, held as long as it is open."""
    try:
        OUT.mkdir(parents=True, exist_ok=True)
        if old and any(OUT.iterdir()) and not (OUT / "lock").exists():
            raise BadInput(f"--fresh: {OUT} was not made by demo.py, so nothing is deleted there; move it away")
        lock = system.lock(OUT / "lock")                                        # also what tells that the folder is ours
        if lock is None:
            raise BadInput(f"{OUT}: another demo.py is at work there; wait for it, or end it")
        for name in old:
            if (OUT / name).exists():
                shutil.rmtree(OUT / name)                                       # refuses links
        open(OUT / "log.txt", "w" if old else "a").close()
    except OSError as error:
        where, why = error.filename or OUT, error.strerror or error
        raise BadInput(f"{where}: {why}; make room, or move away what is in its place") from None
    return lock


def paint_sets(folder):
    act("Painting landscapes with English captions, others with Chinese captions, and some whose captions are lines of classical verse.")
    missing = [name for name in SETS if not any((folder / name).glob("*"))]     # each is made whole or not at all
    for process in [start("-m", "tools.prepare", "convert", name, folder / name) for name in missing]:
        finish(process, show=False)
    if not (folder / "classes").exists():
        try:
            paint_classes(folder / "classes")
        except OSError as error:
            raise BadInput(f"{folder / 'classes'}: {error.strerror}; make room and run python -m tools.demo again") from None


def paint_classes(folder, each=8):
    """Images with one thing in each (and the water it needs), in a folder for each thing, as --classify takes them. All, or none."""
    part = folder.with_name("classes.part")
    shutil.rmtree(part, ignore_errors=True)
    for name, element in landscapes.ELEMENTS.items():
        (part / element["names"][0]).mkdir(parents=True)
        for k in range(each):
            image = landscapes.paint_landscape(landscapes.with_water({name}), random.Random(f"classes {name} {k}"))
            image.save(part / element["names"][0] / f"{k}.png")
    system.write_text(part / "templates.txt", "".join(f"{template}\n" for template in TEMPLATES))
    os.replace(part, folder)


def story(out, sets, seed):
    """The acts, from one seed -> their figures: name -> percent, from the test splits."""
    english, chinese, poems = (sets / name for name in SETS)
    common = ["--batch-size", 128, "--log-every", 10, "--seed", seed]
    steps = lambda n, warmup: ["--max-steps", n, "--warmup", min(warmup, n // 2), "--valid-every", n]
    both = STEPS["stage1"] + STEPS["stage2"]
    out.mkdir(parents=True, exist_ok=True)
    print(f"\n=== seed {seed}")

    act("0. A tiny CLIP learns from English captions. It plays the part of OpenAI's weights: it sees well, and knows no Chinese. Only its "
        "vision tower will be used.")
    call("train.py", "--stage", 2, "--data", english, "--lr", 2e-3, *steps(STEPS["english"], 30), *common, "--out", out / "english")
    towers = ["--vision-weights", out / "english/last.pt", "--data", chinese]

    act("1. Stage 1 (section 3.2): a fresh Chinese text tower learns to say what the frozen vision tower sees. Images are embedded once, "
        "so steps are cheap.")
    call("train.py", "--stage", 1, *towers, "--lr", 4e-3, *steps(STEPS["stage1"], 10), *common, "--out", out / "stage1")

    act("2. Stage 2: both towers learn, in small steps, for the vision tower has something to lose.")
    call("train.py", "--stage", 2, "--init", out / "stage1/last.pt", "--data", chinese, "--lr", 5e-4, *steps(STEPS["stage2"], 10), *common,
         "--out", out / "stage2")

    act(f"2b. Does stage 1 pay? The same vision tower and a fresh text tower in stage 2 alone, for as many steps ({both}).")
    call("train.py", "--stage", 2, *towers, "--lr", 2e-3, *steps(both, 10), *common, "--out", out / "alone")
    # last.pt, not best.pt: these runs are validated at their two ends only, and the story is of where they end.
    call("evaluate.py", "--ckpt", out / "alone/last.pt", out / "stage2/last.pt", "--data", chinese, "--json", out / "landscapes.json")

    act("3. Zero-shot (figure 2, steps 2 and 3): what is in images of one thing each, by names in Chinese; and which image a poem "
        "speaks of, though nobody told the model what poems are.")
    call("evaluate.py", "--ckpt", out / "stage2/last.pt", "--classify", sets / "classes", "--templates", sets / "classes/templates.txt",
         "--json", out / "classes.json")
    call("evaluate.py", "--ckpt", out / "stage2/last.pt", "--data", poems, "--json", out / "zero-shot.json")

    act("4. Fine-tuning on 2,000 poems and their images (sections 3.2 and 4.1: AP-ID).")
    call("train.py", "--stage", "finetune", "--init", out / "stage2/last.pt", "--data", poems, "--no-average", *steps(STEPS["poems"], 20),
         *common, "--out", out / "poems")

    act("5. Table 6: before and after, on poems that were never trained on.")
    call("evaluate.py", "--ckpt", out / "poems/start.pt", out / "poems/last.pt", "--data", poems, "--json", out / "poems.json",
         "--report", out / "poems.html")
    return figures_of(out)


def figures_of(out):
    """What evaluate.py has written -> {row of the summary: its figures in percent}."""
    results = lambda name: json.loads((out / name).read_text(encoding="utf-8"))["results"]
    ways = lambda r: [r["text_to_image"]["R@1"], r["image_to_text"]["R@1"], (r["text_to_image"]["MR"] + r["image_to_text"]["MR"]) / 2]
    (alone, staged), (before, after), (classes,) = results("landscapes.json"), results("poems.json"), results("classes.json")
    return {f"landscapes: stage 1, {STEPS['stage1']} steps, then stage 2, {STEPS['stage2']}": ways(staged),
            f"landscapes: stage 2 alone, {STEPS['stage1'] + STEPS['stage2']} steps": ways(alone),
            "the difference": [a - b for a, b in zip(ways(staged), ways(alone))],
            "poems: zero-shot": ways(before),
            "poems: fine-tuned": ways(after),
            f"{classes['classes']} classes, zero-shot: top-1": [classes["top-1"]]}


def summary(figures):
    """Figures of some seeds -> a table: the one, or mean ± standard deviation."""
    lines = [f"{'test splits, %':52}  text-to-image R@1  image-to-text R@1  mean recall"]
    for row in figures[0]:
        cells = ""
        for some in zip(*(of_seed[row] for of_seed in figures)):
            cell = f"{statistics.mean(some):5.1f}" + (f" ± {statistics.stdev(some):4.1f}" if len(some) > 1 else "")
            cells += f"{cell:19}"
        lines.append(f"{row:52}  {cells.rstrip()}")
    return "\n".join(lines)


def act(text):
    print(f"\n{text}", flush=True)


def start(script, *args):
    """Start one of our scripts as a person would, its command printed."""
    print("$ python " + shlex.join([script, *map(str, args)]), flush=True)
    command = [sys.executable, "-u", script, *map(str, args)]
    # Threads that wait should sleep, not spin: where other programs share the cores, that is three times as fast.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONIOENCODING": "utf-8"}
    ends_with_us = functools.partial(system.end_with, os.getpid(), signal.SIGTERM)                  # should we be killed, it saves and ends
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace",
                            env=environment, preexec_fn=ends_with_us)


def finish(process, show=True):
    """Print the lines that tell the story as they come, keep all in log.txt. Raises BadInput when the script fails."""
    last = ""
    with open(OUT / "log.txt", "a", encoding="utf-8") as log:
        log.write(f"\n$ {shlex.join(process.args)}\n")
        try:
            for line in process.stdout:
                log.write(line)
                last = line.strip() or last
                if show and SHOWN.match(line):
                    print("  " + line.rstrip(), flush=True)
        except KeyboardInterrupt:
            print("  stopping; python -m tools.demo goes on from there", flush=True)
            raise
        finally:                                                                # after Ctrl-C it finishes its step and saves
            log.write(process.stdout.read())
            status = process.wait()
    if status:
        what, then = last.removeprefix("error: "), "when that is mended, python -m tools.demo goes on; --fresh starts over"
        if status < 0:
            what = f"{Path(process.args[2]).name} was ended by signal {-status}"                    # 9: perhaps for want of memory
        if status < 0 or status > 128:
            then = "python -m tools.demo goes on from there"
        raise BadInput(f"{what} ({then}; {OUT / 'log.txt'} says more)")


def call(script, *args):
    finish(start(script, *args))


if __name__ == "__main__":
    system.run(main)
