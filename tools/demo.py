"""The whole paper in miniature: on painted landscapes, in minutes on a CPU, without a download.

    python -m tools.demo                   # six acts; run again it continues where it stopped
    python -m tools.demo --fresh           # starts over
    python -m tools.demo --seeds 0 1 2     # three random starts: mean ± standard deviation

Every act is one to three commands (tools/acts.txt): type them yourself to look closer, or change
them. All that they print stands in runs/demo/log.txt. The steps are those of the paper.
"""
import argparse
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
from support.system import BadInput, filled_beside
from tools import landscapes

OUT = Path("runs/demo")

# The script: what is printed, and behind "$ " the commands that run.
ACTS = Path(__file__).with_name("acts.txt").read_text(encoding="utf-8").replace("\\\n", "")

# The lines of the commands' output that tell the story.
SHOWN = re.compile(r"stage |step .* valid |finished|nothing to do|note:|warning:|scale |tiny |"
                   r"model |> |R@1 of|top-1 of|most often| +Text-to-Image|stopped")


def main():
    parser = argparse.ArgumentParser(prog="python -m tools.demo", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="start over: delete the painted sets, "
                        "the log and what these seeds left")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="(default: 0)")
    args = parser.parse_args()
    seeds = args.seeds
    if min(seeds) < 0 or max(seeds) >= 2**31 - 1 or len(set(seeds)) < len(seeds):
        raise BadInput(f"--seeds {seeds}: different whole numbers from 0 to {2**31 - 2}")
    if not Path("train.py").is_file():
        raise BadInput(f"{Path.cwd()} has no train.py: run this in the folder of train.py")
    begin, lock = time.monotonic(), open_folder(seeds, args.fresh)
    paint_classes(OUT / "data/classes")
    figures = [story(seed) for seed in seeds]
    print("\n" + summary(figures))
    print(f"\nWith images: {OUT}/seed-{seeds[-1]}/poems.html (open it in a browser). All output: "
          f"{OUT}/log.txt. This took {time.monotonic() - begin:.0f} s.")
    lock.close()


def open_folder(seeds, fresh):
    """Make OUT; with `fresh` empty it, see --fresh -> the lock that keeps other demos out."""
    OUT.mkdir(parents=True, exist_ok=True)
    if fresh and any(OUT.iterdir()) and not (OUT / "lock").exists():
        raise BadInput(f"--fresh: {OUT} was not made by tools/demo.py, so it stays; move it away")
    lock = system.lock(OUT / "lock")                        # it also shows that the folder is ours
    if lock is None:
        raise BadInput(f"{OUT}: another demo is at work there; wait for it, or end it")
    for name in ["data", *(f"seed-{seed}" for seed in seeds)]:
        if fresh and (OUT / name).exists():
            shutil.rmtree(OUT / name)                       # refuses links
    open(OUT / "log.txt", "w" if fresh else "a").close()
    return lock


def paint_classes(folder, each=8):
    """Images of one element each (and the water it needs), in a folder for each element."""
    if folder.exists():
        return
    with filled_beside(folder) as part:
        for element, facts in landscapes.ELEMENTS.items():
            scene, inside = landscapes.with_water({element}), part / "new" / facts["names"][0]
            inside.mkdir(parents=True)
            for k in range(each):
                rng = random.Random(f"classes {element} {k}")
                landscapes.paint_landscape(scene, rng).save(inside / f"{k}.png")
        system.write_text(part / "new/templates.txt", "{}\n远处有{}\n近处有{}\n地上有{}\n天上有{}\n")
        os.replace(part / "new", folder)


def story(seed):
    """The acts, from one seed -> their figures: name -> percent, on the test splits."""
    out, common = OUT / f"seed-{seed}", f"--batch-size 128 --log-every 10 --seed {seed}"
    out.mkdir(exist_ok=True)
    acts = ACTS.format(seed=seed, sets=OUT / "data", out=out, common=common)
    for line in acts.splitlines():
        print(line, flush=True)
        if line.startswith("$ "):
            run(line)
    results = []
    for name in ("landscapes", "poems", "classes"):
        results += json.loads((out / f"{name}.json").read_text(encoding="utf-8"))["results"]
    rows = []                                               # R@1 of images, of texts, mean recall
    for result in results[:4]:
        to_image, to_text = result["text_to_image"], result["image_to_text"]
        rows.append([to_image["R@1"], to_text["R@1"], (to_image["MR"] + to_text["MR"]) / 2])
    alone, staged, before, after = rows
    return {"landscapes: stage 1, then stage 2": staged,
            "landscapes: stage 2 alone, as many steps": alone,
            "the difference": [a - b for a, b in zip(staged, alone)],
            "poems: zero-shot": before, "poems: fine-tuned": after,
            f"{results[4]['classes']} classes, zero-shot: top-1": [results[4]["top-1"]]}


def summary(figures):
    """The figures of some seeds -> a table of means, ± their standard deviation."""
    lines = [f"{'test splits, %':52}  text-to-image R@1  image-to-text R@1  mean recall"]
    for row in figures[0]:
        cells = ""
        for values in zip(*(of_seed[row] for of_seed in figures)):
            spread = f" ± {statistics.stdev(values):4.1f}" if len(values) > 1 else ""
            cells += f"{statistics.mean(values):5.1f}{spread}".ljust(19)
        lines.append(f"{row:52}  {cells.rstrip()}")
    return "\n".join(lines)


def run(line):
    """Run "$ python …": print what tells the story as it comes, log all. BadInput: it failed."""
    last, pid = "", os.getpid()
    process = subprocess.Popen([sys.executable, "-u", *shlex.split(line)[2:]], encoding="utf-8",
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace",
                               env=os.environ | {"PYTHONIOENCODING": "utf-8"},
                               preexec_fn=lambda: system.end_with(pid, signal.SIGTERM))
    with open(OUT / "log.txt", "a", encoding="utf-8") as log:
        log.write(f"\n{line}\n")
        try:
            for said in process.stdout:
                log.write(said)
                last = said.strip() or last
                if SHOWN.match(said):
                    print("  " + said.rstrip(), flush=True)
        finally:                                            # after Ctrl-C it saves and ends
            log.write(process.stdout.read())
            status = process.wait()
    if status:
        what = last.removeprefix("error: ") if status > 0 else f"signal {-status} ended {line[2:]}"
        raise BadInput(f"{what} ({OUT}/log.txt has more; python -m tools.demo continues there)")


if __name__ == "__main__":
    system.run(main)
