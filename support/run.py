"""What a training run leaves on disk and says: the files of --out, the lines of its log; and how it is stopped.

    run = Run(out, settings, rank, model, optimizer, scaler)
    first_step = run.resume(checkpoint.read(out / "last.pt"))               # the same settings, or BadInput names those that differ
    run.took(step, loss, norm, …), run.validated(step, recall), run.snapshot(step)

The loop in train.py calls all this; how to continue, and which settings may change then, stands here.
"""
import contextlib
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch

from support import system, weights
from support.formats import compare
from support.processes import all_reduce_max, barrier
from support.system import BadInput

# May differ when a run continues, for they do not change the result. (The data may have moved: it has a fingerprint, of captions and
# image names, or of the shards' names and sizes.)
FREE = {
    "recipe", "out", "data", "data_root", "valid_data", "features", "workers", "processes", "max_bad", "grad_checkpointing", "compile",
    "log_every", "save_every", "save_minutes", "keep", "patience", "average", "seen",
}


# ---------------------------------------------------------------------------------------------------------------- the run's folder


class Run:
    """What a run leaves on disk, in its folder --out. Only the first process writes; every process reads last.pt to continue.

        last.pt             the newest weights, and all that is needed to continue
        best.pt             those with the highest recall on the valid split
        start.pt            those before the first step: of a fine-tune, or for --average
        step-*.pt           the newest snapshots, with --keep
        settings.json       every setting, those that follow from others, too
        metrics.jsonl       a line for each line that is printed
        bad_samples.jsonl   the pairs that could not be read
        nonfinite.json      the pairs of the batch whose loss or gradient stopped the run
        lock                held while the run goes on, so that no other one writes there
        features/           of stage 1 without augmentation, if --features says no other place (features.py)
    """

    def __init__(self, out, settings, rank, model, optimizer, scaler):
        """`settings`: all of them as a dictionary; what they are called is what the flags of train.py are called."""
        self.out, self.settings, self.first = out, settings, rank == 0
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.best, self.best_step = -1.0, 0                                     # highest score on the valid split so far, and when
        self.averaged = False                                                   # whether the averages of start and end have been tried
        self.losses = []                                                        # of the steps since the last line of the log
        self.skipped = 0                                                        # how many steps were not finite, and so not taken
        self.norm = math.nan                                                    # of the last gradient that was looked at
        self.unseen = None                                                      # what `took` has not looked at yet
        self.bad = set()                                                        # numbers of the pairs that could not be read
        self.saved = time.time()

    def say(self, line):
        """Print a line, once for all processes."""
        if self.first:
            print(line, flush=True)

    def resume(self, state):
        """Continue from a snapshot (all but the model's weights) -> optimizer steps done.

        Raises BadInput, with the difference named, when the settings are not the same; or when it is no snapshot, or damaged.
        """
        try:
            return self._resume(state)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:    # entries of the wrong kind
            raise BadInput(f"{self.out / 'last.pt'} is damaged: its entries are not those of a training snapshot "
                           f"({type(error).__name__}: {error}); choose another --out") from None

    def _resume(self, state):
        last = self.out / "last.pt"
        missing = {"settings", "optimizer", "scaler", "best", "best_step", "averaged", "losses", "skipped_steps", "step"} - state.keys()
        if missing:
            raise BadInput(f"{last} is no training snapshot (it lacks {', '.join(sorted(missing))}), so nothing can continue from it; "
                           "choose another --out")

        # the same settings. Masks are drawn for each micro-batch of a process: with another size or number of processes, others
        before, now = state["settings"], self.settings
        masks = self.model.cfg.text_dropout > 0 or now["patch_dropout"] > 0
        free = FREE if masks else FREE | {"micro_batch"}
        names = {"norm_batch": "BatchNorm over --micro-batch x processes =", "features_kept": "features kept (--features):"}
        changed = [f"{names.get(name, name)} {before.get(name)}, now it is {now.get(name)}" for name in differing(before, now, free)]
        if changed:
            raise BadInput(f"{self.out} holds a run with {'; '.join(changed)}. Continue it with the same settings, choose another --out, "
                           f"or start a new run from it: --init {last} --out {self.out}-2")
        if masks and before["processes"] != now["processes"]:
            self.say(f"note: {now['processes']} processes instead of {before['processes']} draw other dropout masks from here on; "
                     "all else stays the same")

        # where it stood
        self.optimizer.load_state_dict(state["optimizer"])
        for p, moments in self.optimizer.state.items():                         # too short a moment: AdamW would write past its end
            if not all(moments[name].shape == p.shape and moments[name].isfinite().all() for name in ("exp_avg", "exp_avg_sq")):
                raise ValueError("the optimizer's moments do not fit the parameters")
        self.scaler.load_state_dict(state["scaler"])
        self.best, self.best_step, self.averaged = float(state["best"]), int(state["best_step"]), bool(state["averaged"])
        self.losses, self.skipped = [float(x) for x in state["losses"]], int(state["skipped_steps"])

        # the files that it needs later: should one be gone, that comes to light now and not at the end
        if self.best >= 0 and not (self.out / "best.pt").exists():
            raise BadInput(f"{self.out / 'best.pt'}, the best weights of this run so far, is gone; put it back, "
                           f"or begin a new run from the last ones: --init {last} --out {self.out}-2")
        if self.settings["average"] and not self.averaged:
            self.start_weights()
        if type(state["step"]) is not int or not 0 <= state["step"] <= self.settings["total_steps"]:
            raise ValueError(f"step {state['step']!r}")
        return state["step"]

    def open_folder(self, step):
        """Prepare the folder, `step` steps done. What a killed run had logged after its last snapshot goes: those steps come again.

        Raises BadInput when another run is writing there, or has left its best.pt.
        """
        barrier()                                                          # everyone has read last.pt before it is written again
        if not self.first:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.out / "lock", "w")                                # held until this process ends, however it ends
        if not system.is_locked(self.lock):
            raise BadInput(f"{self.out}: another run is writing there; choose another --out")
        with contextlib.suppress(OSError, ValueError, AttributeError):         # not there, or none of ours
            before = json.loads((self.out / "settings.json").read_bytes())
            if step == 0 and (self.out / "best.pt").exists() and differing(before, self.settings, FREE):
                raise BadInput(f"{self.out} holds the best.pt of another run, without its last.pt; choose another --out")
        system.write_text(self.out / "settings.json", json.dumps(self.settings, ensure_ascii=False, indent=1) + "\n")
        kept = {"metrics.jsonl": [], "bad_samples.jsonl": []}                   # their lines up to `step`
        for name in kept:
            path = self.out / name
            if path.exists() and step:
                lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
                kept[name] = [line for line in lines if logged_step(line) <= step]
            if path.exists() or name == "metrics.jsonl":
                system.write_text(path, "".join(line + "\n" for line in kept[name]))
        self.bad = {json.loads(line).get("pair") for line in kept["bad_samples.jsonl"]}

    def report(self, step, reports, seen, total):
        """List the pairs that could not be read, each once; BadInput when they are more than the share `max_bad` of all that were seen.

        reports: {"pair", "reason", …} of each; seen: pairs so far, counted as 1,000 at least, if there are as many in `total`.
        """
        fresh = [r for r in {r["pair"]: r for r in reports}.values() if r["pair"] not in self.bad]
        if not fresh or not self.first:
            return
        self.bad |= {r["pair"] for r in fresh}
        for r in fresh:
            self._append({"step": step, **r}, "bad_samples.jsonl")
        seen = max(seen, min(total, 1000))
        most, listed = int(self.settings["max_bad"] * seen), self.out / "bad_samples.jsonl"
        pairs, were = ("pairs", "were") if len(fresh) > 1 else ("pair", "was")
        self.say(f"step {step:6} {len(fresh)} {pairs} could not be read and {were} replaced; {len(self.bad):,} so far, {most:,} may be "
                 f"({listed}); the first: {fresh[0]['reason']}")
        if len(self.bad) > most:
            raise BadInput(f"step {step}: {len(self.bad):,} pairs cannot be read, and of {seen:,} only {most:,} may be "
                           f"(--max-bad {self.settings['max_bad']:g}); {listed} lists them. The first: {fresh[0]['reason']}")

    def took(self, step, loss, norm, pairs):
        """After a step: look at the loss and the gradient of the step before it.

        Those of this one, scalars of a device that may still be computing them, are looked at after the next step, or before
        anything is logged or saved: so the device never waits for Python. pairs(): where the batch's pairs came from.
        """
        self.look()
        figures = torch.stack([loss, norm]).to("cpu", non_blocking=True)
        arrived = torch.cuda.Event() if loss.is_cuda else None
        if arrived:
            arrived.record()
        self.unseen = step, figures, arrived, pairs

    def look(self):
        """Keep the loss of the last step; or raise BadInput, when loss or gradient were not finite.

        Under fp16 scaling such steps are counted: they are how the scale is found.
        """
        if self.unseen is None:
            return
        (step, figures, arrived, pairs), self.unseen = self.unseen, None
        if arrived:
            arrived.synchronize()
        loss, self.norm = figures.tolist()
        if math.isfinite(loss):
            self.losses.append(loss)
        if math.isfinite(loss) and math.isfinite(self.norm):
            return
        self.skipped += 1
        if self.scaler.is_enabled() and self.scaler.get_scale() > 2**-10:
            return                                                              # it has halved its scale
        where = self.out / "nonfinite.json"
        if self.first:
            about = {"step": step, "loss": str(loss), "gradient_norm": str(self.norm), "pairs": pairs()}
            system.write_text(where, json.dumps(about, ensure_ascii=False))
        raise BadInput(f"step {step}: the loss is {loss} and the norm of its gradient {self.norm}; the step was not taken. "
                       f"{where} lists the pairs of the batch (before any replacement); {self.out / 'last.pt'} holds the run before. "
                       "A lower --lr or --precision fp32 may help")

    def log(self, record):
        """What Meter.record gives: one line for the reader, the same figures in metrics.jsonl."""
        loss = "-" if record["loss"] is None else f"{record['loss']:.4f}"
        left = timedelta(seconds=int(record["seconds_left"]))
        line = (f"step {record['step']:6}/{self.settings['total_steps']} loss {loss} lr {record['lr']:.2e} "
                f"temperature {record['temperature']:.4f} {record['samples_per_s']:.0f} samples/s left {left} "
                f"memory {record['memory_mib']:.0f} MiB")
        if record["skipped"]:
            line += f" skipped {record['skipped']}"
        if record["waiting"] > 0.2:
            line += (f" waits for images {record['waiting']:.0%} of the time: "
                     f"--workers {self.settings['workers']} read {record['samples_per_s']:.0f}/s")
        self.say(line)
        self._append(record)

    def validated(self, step, recall, share=None):
        """Report recall on the valid split, {way: {"R@1", …, "MR"}} in percent; the highest mean over both ways so far becomes best.pt.

        `share`: of an average, how far from the start it is.
        """
        score = sum(recall[way]["MR"] for way in recall) / 2
        figures = {way: " ".join(f"{k} {recall[way][k]:.1f}" for k in ("R@1", "R@5", "R@10")) for way in recall}
        what = f"step {step:6}" if share is None else f"average {1 - share:.1f} start + {share:.1f} end, step {step:6}"
        self.say(f"{what} valid  text-to-image {figures['text_to_image']}   image-to-text {figures['image_to_text']}   "
                 f"mean {score:.2f}" + ("  best so far" if score > self.best else ""))
        self._append({"step": step, "valid": recall, "score": score} | ({} if share is None else {"average": share}))
        if score > self.best:
            if self.first:
                weights.save(self.out / "best.pt", self.model, step=step, average=share, recall=recall, settings=self.settings)
            self.best = score
            self.best_step = step if share is None else self.best_step          # --patience counts from here

    def keep_start(self):
        """start.pt: the weights before the first step, for --average and to compare with."""
        if self.first and (self.settings["average"] or self.settings["stage"] == "finetune"):
            weights.save(self.out / "start.pt", self.model, step=0, settings=self.settings)

    def start_weights(self):
        """-> the tensors of start.pt, left on the disk and read as they are used. BadInput when it is not the start of this run."""
        path = self.out / "start.pt"
        try:
            state = weights.read(path)
            compare(state["model"], self.model.state_dict(), "its tensors do not fit")
            if state.get("step") != 0:
                raise BadInput(f"it holds the weights after step {state.get('step')}")
        except BadInput as error:
            raise BadInput(f"{path} is not the start of this run, from which the averages at the end begin; put it back, "
                           f"or go on with --no-average. ({error})") from None
        return state["model"]

    def stop(self, step, signals):
        """End the process, with the status of a signal (SystemExit)."""
        self.say(f"stopped by a signal after step {step}; the same command continues from there")
        sys.exit(128 + (signals or [signal.SIGTERM])[0])

    def load_average(self, share):
        """WiSE-FT (arXiv 2109.01903): between the start and the end of a fine-tune there are often weights that are better than both.

        The model gets (1 - share) start.pt + share last.pt.
        """
        barrier()                                                          # both have been written
        start, end = self.start_weights(), weights.read(self.out / "last.pt")["model"]
        average = {key: x.lerp(end[key], share) if x.is_floating_point() else end[key] for key, x in start.items()}
        self.model.load_state_dict(average)

    def ended(self, step):
        """Whether no step comes after `step`: it is the run's last, or validation after validation brought no higher recall (--patience).

        Those during the warmup do not count.
        """
        number = lambda step: step // self.settings["valid_every"]              # of validations up to this step
        waited = number(step) - number(max(self.best_step, self.settings["warmup"]))
        return self.averaged or step == self.settings["total_steps"] or 0 < self.settings["patience"] <= waited

    def summary(self, step):
        """What the finished run leaves, and whether it learned anything: a line.

        best.pt is asked itself what it is. A run that was killed while it tried averages may have left one there, of which its
        last.pt does not know. (For the first process, which says it; the others get "".)
        """
        if not self.first:
            return ""
        last, early = f"{self.out / 'last.pt'}: the last weights", ""
        if step < self.settings["total_steps"]:
            early = f" (early: no higher recall in {self.settings['patience']} validations)"
        if self.best < 0:
            return f"finished{early}. {last} (nothing was validated)"
        best = weights.read(self.out / "best.pt")
        share = best.get("average")
        which = f"after step {best.get('step')} of {step}" if share is None else f"{1 - share:.1f} x the start + {share:.1f} x the end"
        if share is None and not best.get("step"):
            which += " (that is the START: training did not raise the recall)"
        return f"finished{early}. {self.out / 'best.pt'}: highest recall on the valid split, {which}; {last}"

    def snapshot(self, step):
        """Write last.pt; never with weights that are not numbers, so what is there can always be continued."""
        self.look()
        if self.first:
            if not all(x.isfinite().all() for x in self.model.state_dict().values()):
                raise BadInput(f"step {step}: the weights are no longer finite; {self.out / 'last.pt'} holds the run before it. "
                               "A lower --lr or --precision fp32 may help")
            last = self.out / "last.pt"
            weights.save(last, self.model, step=step, settings=self.settings,
                            optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict(),
                            best=self.best, best_step=self.best_step, averaged=self.averaged,
                            losses=self.losses, skipped_steps=self.skipped)
            if self.settings["keep"] > 1:
                name = self.out / f"step-{step:08}.pt"
                part = self.out / (name.name + ".part")
                part.unlink(missing_ok=True)                                    # of a killed run
                try:
                    os.link(last, part)                                         # a second name for the same file, until last.pt is replaced
                except OSError:                                                 # on disks without such links
                    shutil.copyfile(last, part)
                os.replace(part, name)
                kept = sorted(path for path in self.out.glob("step-*.pt") if path.name <= name.name)
                for path in kept[: -self.settings["keep"]]:
                    path.unlink()
        self.saved = time.time()

    def minutes_since_snapshot(self):
        return (time.time() - self.saved) / 60

    def _append(self, record, name="metrics.jsonl"):
        if self.first:
            with open(self.out / name, "a", encoding="utf-8") as f:
                f.write(json.dumps(record, ensure_ascii=False) + "\n")


def differing(before, now, free):
    """Names of the settings, but for those in `free`, that are not the same in two runs."""
    return [name for name in sorted((before.keys() | now.keys()) - free) if before.get(name) != now.get(name)]


def logged_step(line):
    """The step of a line of metrics.jsonl or bad_samples.jsonl.

    Infinity for an average, which is tried once more when a run continues, and for a line that a crash has cut, or that is none
    of ours.
    """
    try:
        record = json.loads(line)
        ours = "average" not in record and type(record["step"]) is int and type(record.get("pair", 0)) is int
        return record["step"] if ours else math.inf
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return math.inf


# ---------------------------------------------------------------------------------------------------------------- speed and memory


class Meter:
    """Loss, speed, time left, memory, and the share of the time that this process waited for images, since the last line.

    `pairs`: of the data set, what an epoch is.
    """

    def __init__(self, first_step, total, settings, pairs, device):
        self.first_step, self.total, self.batch_size, self.pairs, self.device = first_step, total, settings.batch_size, pairs, device
        self.begin, self.tick, self.last, self.waited = time.time(), time.time(), first_step, 0.0

    def watched(self, loader):
        """The loader's batches. What the run waits for them counts, but for the first: until it comes the readers start."""
        start, first = time.time(), True
        for batch in loader:
            wait = time.time() - start
            self.tick, self.waited = self.tick + wait * first, self.waited + wait * (not first)
            yield batch
            start, first = time.time(), False

    def record(self, step, lr, model, run):
        """The figures since the last record, a dictionary, whose losses are taken from `run`."""
        now, losses = time.time(), run.losses
        run.losses = []
        record = {
            "step": step,
            "epoch": step * self.batch_size / self.pairs,
            "loss": sum(losses) / len(losses) if losses else None,
            "gradient_norm": run.norm if math.isfinite(run.norm) else None,
            "lr": lr,
            "temperature": 1 / model.logit_scale.exp().item(),
            "skipped": run.skipped,
            "samples_per_s": (step - self.last) * self.batch_size / (now - self.tick),
            "seconds_left": (now - self.begin) / (step - self.first_step) * (self.total - step),
            "memory_mib": memory_mib(self.device),
            "waiting": self.waited / (now - self.tick),
        }
        self.tick, self.last, self.waited = now, step, 0.0
        return record

    @contextlib.contextmanager
    def paused(self):
        """Time that does not count as training speed."""
        start = time.time()
        yield
        self.tick += time.time() - start


def memory_mib(device):
    """Peak memory so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # of Linux: getrusage would begin with the peak of the process that has started this one
    if (status := Path("/proc/self/status")).exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# ---------------------------------------------------------------------------------------------------------------- stopping


def catch_signals(first):
    """SIGTERM and SIGINT (Ctrl-C) no longer end the process: they fill the list that is returned, and the loop stops after its step.

    A second one of the same kind ends it at once (of the same kind, since Ctrl-C under torchrun brings one of each).
    """
    caught = []

    def catch(number, _):
        caught.append(number)
        if first:
            os.write(2, b"stopping after this step; press again to stop at once, without saving\n")
        signal.signal(number, signal.SIG_DFL)

    for s in (signal.SIGTERM, signal.SIGINT):
        signal.signal(s, catch)
    return caught


def asked_to_stop(signals):
    """Whether a signal came to any process: then all of them stop after the same step."""
    return all_reduce_max(len(signals)) > 0
