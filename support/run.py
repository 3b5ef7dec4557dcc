"""A training run: the files in --out, the lines of the log, resuming and stopping.

    run = Run(out, settings, rank, pairs, model, optimizer, scaler)
    first_step = run.resume(checkpoint.read(out / "last.pt"))   # BadInput when settings differ
    run.open_folder(first_step, stamp)
    run.after_step(step, loss, norm, …), run.log(…), run.validated(step, recall), run.snapshot(step)
"""
import contextlib
import json
import math
import os
import shutil
import signal
import sys
import time
from datetime import timedelta

import torch

from support import system, weights
from support.formats import check_names_and_shapes
from support.processes import all_gather_objects, all_reduce_max, barrier
from support.settings import MAY_CHANGE_ON_RESUME
from support.system import BadInput

AVERAGES = [tenths / 10 for tenths in range(1, 10)]         # how far from the start to the end
OFF = (None, False, 0, "", "none", "auto")                  # of a setting that no flag turns on


class Run:
    """The folder --out of a run. The first process writes; every process reads last.pt to resume.

        last.pt             the newest weights, and the state to resume from
        best.pt             the weights with the highest recall on the valid split
        start.pt            those before the first step: of a fine-tune, or for --average
        step-*.pt           the newest snapshots, with --keep
        settings.json       every setting
        metrics.jsonl       a record for each line that is printed
        bad_samples.jsonl   the pairs that could not be read
        nonfinite.json      the pairs of the batch whose loss or gradient stopped the run
        lock                held while the run lasts, to keep a second run out
        features/           of stage 1: see support/features.py
    """

    def __init__(self, out, settings, rank, pairs, model, optimizer, scaler):
        """settings: all of them, {name of train.py's flag: value}. pairs: in an epoch."""
        self.out, self.settings, self.first, self.pairs = out, settings, rank == 0, pairs
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.best, self.best_step = -1.0, 0                 # the highest score so far, and its step
        self.averaged = False                               # whether the averages have been tried
        self.losses = []                                    # since the last record of the log
        self.norm = math.nan                                # of the last gradient
        self.skipped = 0                                    # steps that were not finite, not taken
        self.pending = None                                 # the step that is still to be checked
        self.bad = set()                                    # numbers of the unreadable pairs
        self.saved = time.monotonic()
        self.signals = system.StopSignals()

    def say(self, line):
        """Print a line, once for all processes."""
        if self.first:
            print(line, flush=True)

    def _append(self, record, name="metrics.jsonl"):
        if self.first:
            self._check_lock()
            with open(self.out / name, "a", encoding="utf-8") as f:
                f.write(system.as_json(record) + "\n")

    def _check_lock(self):
        """BadInput when the folder was deleted or replaced: a second run may be writing there."""
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self.lock.fileno()), os.stat(self.out / "lock")):
                return
        raise BadInput(f"{self.out}: the folder was deleted or replaced while the run was writing "
                       "there; start it anew with another --out")

    # ---- start and resume

    def agree(self, **facts):
        """Raise BadInput when processes differ in their settings or in `facts`."""
        first, *others = all_gather_objects(self.settings | facts)
        for rank, other in enumerate(others, 1):
            differ = [f"{name} {other[name]} where process 0 has {first[name]}"
                      for name in first if other[name] != first[name]]
            if differ:
                raise BadInput(f"process {rank} has {'; '.join(differ)}: every node must see the "
                               "same data, weights and --out (a shared file system)")

    def resume(self, state):
        """Continue from a snapshot, all but the model's weights -> the number of its last step.

        BadInput names settings that differ or a file that is gone, or says that it is damaged.
        """
        try:
            self._check_settings(state["settings"])
            groups = self.optimizer.state_dict()["param_groups"]        # not those of the file
            self.optimizer.load_state_dict(state["optimizer"] | {"param_groups": groups})
            state["optimizer"]["state"].clear()             # a moment is freed when it is copied
            for p, moments in self.optimizer.state.items():
                taken = float(moments["step"])
                for name, least in (("exp_avg", -math.inf), ("exp_avg_sq", 0)):
                    x = moments[name]                           # AdamW would write past a short one
                    fits = x.shape == p.shape and x.isfinite().all() and x.min() >= least
                    if not fits or not 0 <= taken <= self.settings["total_steps"]:
                        raise ValueError("the optimizer's state does not fit the parameters")
                    moments[name] = torch.empty_like(p).copy_(x)        # in memory of its own
                moments["step"] = torch.tensor(taken, device=p.device)
            self.scaler.load_state_dict(state["scaler"])
            self.best, self.best_step = float(state["best"]), int(state["best_step"])
            self.averaged, self.skipped = bool(state["averaged"]), int(state["skipped_steps"])
            self.losses = [float(x) for x in state["losses"]]
            if state["step"] not in range(self.settings["total_steps"] + 1):
                raise ValueError(f"step {state['step']!r}")
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise BadInput(f"{self.out / 'last.pt'} is damaged or no training snapshot "
                           f"({type(error).__name__}: {error}); choose another --out") from None
        if self.best >= 0 and not (self.out / "best.pt").exists():
            raise BadInput(f"{self.out / 'best.pt'}, the best weights so far, is gone; put it back "
                           f"or start anew: --init {self.out / 'last.pt'} --out {self.out}-2")
        if self.settings["average"] and not self.averaged:
            self.start_weights()                            # BadInput now instead of at the end
        return state["step"]

    def _check_settings(self, before):
        # A process draws masks for each micro-batch, so another size or number draws other masks.
        masks = self.model.cfg.text_dropout > 0 or self.settings["patch_dropout"] > 0
        changed = differences(before, self.settings, set() if masks else {"micro_batch"})
        if changed:
            raise BadInput(f"{self.out} holds a run with {'; '.join(changed)}. Pass its settings "
                           "to continue it, or start a new run from it: "
                           f"--init {self.out / 'last.pt'} --out {self.out}-2")
        if masks and before["processes"] != self.settings["processes"]:
            self.say("note: another number of processes draws other dropout masks from here on")

    def open_folder(self, step, stamp):
        """Lock the folder, catch signals, and drop what a killed run logged after `step`.

        stamp: system.stamp of last.pt before it was read. BadInput when another run is writing
        there, has done so since, or has left its best.pt.
        """
        self.signals.catch(self.first)
        barrier()                                           # every process has read last.pt
        if not self.first:
            return
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            why = "a link to nothing" if self.out.is_symlink() else error.strerror
            raise BadInput(f"--out {self.out}: {why}; name a folder") from None
        self.lock = system.lock(self.out / "lock")          # held until this process ends
        if self.lock is None:
            raise BadInput(f"{self.out}: another run is writing there; choose another --out")
        if system.stamp(self.out / "last.pt") != stamp:
            raise BadInput(f"{self.out}: another run has just written there; run this again")
        known = self.out / "settings.json"
        if step == 0 and (self.out / "best.pt").exists():
            with contextlib.suppress(OSError, ValueError, AttributeError):  # missing, or damaged
                if differences(json.loads(known.read_bytes()), self.settings):
                    raise BadInput(f"{self.out} holds the best.pt of another run, without its "
                                   "last.pt; choose another --out")
        system.write_json(known, self.settings)
        keep_records(self.out / "metrics.jsonl", step)
        if (self.out / "bad_samples.jsonl").exists():
            self.bad = {r.get("pair") for r in keep_records(self.out / "bad_samples.jsonl", step)}

    # ---- after a step

    def report(self, step, reports):
        """List unreadable pairs, each once; BadInput when more than --max-bad of the pairs so far
        are, or of the first 1,000. reports: {"pair", "reason", …} of each.
        """
        fresh = {r["pair"]: r for r in reports if r["pair"] not in self.bad}
        if not fresh or not self.first:
            return
        self.bad |= fresh.keys()
        for r in fresh.values():
            self._append({"step": step, **r}, "bad_samples.jsonl")
        seen = min(self.pairs, max(1000, step * self.settings["batch_size"]))
        example = next(iter(fresh.values()))["reason"]
        most = int(self.settings["max_bad"] * seen)
        line = (f"step {step:6} {len(self.bad):,} pairs cannot be read, and of {seen:,} only "
                f"{most:,} may be (--max-bad {self.settings['max_bad']:g}); "
                f"{self.out / 'bad_samples.jsonl'} lists them, for example: {example}")
        if len(self.bad) > most:
            raise BadInput(line)
        self.say(line)

    def after_step(self, step, loss, norm, pairs_of):
        """Check the step before this one; this one is checked after the next step.

        loss, norm: scalars that the device may still be computing. It never waits for Python, since
        they are read that late, or before anything is logged or saved. pairs_of(step): where the
        pairs of its batch come from.
        """
        self.check_last_step()
        figures = torch.stack([loss, norm]).to("cpu", non_blocking=True)
        arrived = torch.cuda.Event() if loss.is_cuda else None
        if arrived:
            arrived.record()
        self.pending = step, figures, arrived, pairs_of

    def check_last_step(self):
        """Keep the loss of the last step. BadInput when loss or gradient were not finite.

        fp16 scaling finds its scale by such steps, so they are counted and may happen.
        """
        if self.pending is None:
            return
        step, figures, arrived, pairs_of = self.pending
        self.pending = None
        if arrived:
            arrived.synchronize()
        loss, self.norm = figures.tolist()
        if math.isfinite(loss):
            self.losses.append(loss)
        if math.isfinite(loss) and math.isfinite(self.norm):
            return
        self.skipped += 1
        if self.scaler.is_enabled() and self.scaler.get_scale() > 2**-10:
            return                                          # the scale has been halved
        where = self.out / "nonfinite.json"
        if self.first:
            self._check_lock()
            record = {"step": step, "loss": str(loss), "gradient_norm": str(self.norm),
                      "pairs": pairs_of(step)}
            system.write_json(where, record)
        raise BadInput(f"step {step}: the loss is {loss} and the norm of its gradient {self.norm}; "
                       f"the step was not taken. {where} lists the pairs of the batch. A lower "
                       "--lr or --precision fp32 may help")

    def log(self, step, lr, meter):
        """Print a line about the steps since the last one, and append it to metrics.jsonl."""
        self.check_last_step()
        speed = meter.since_last_time(step)
        record = {
            "step": step,
            "epoch": step * self.settings["batch_size"] / self.pairs,
            "loss": sum(self.losses) / len(self.losses) if self.losses else None,
            "gradient_norm": self.norm if math.isfinite(self.norm) else None,
            "lr": lr,
            "temperature": 1 / self.model.logit_scale.exp().item(),
            "skipped": self.skipped,
        }
        self.losses = []
        loss = "-" if record["loss"] is None else f"{record['loss']:.4f}"
        line = (f"step {step:6}/{self.settings['total_steps']} loss {loss} lr {lr:.2e} "
                f"temperature {record['temperature']:.4f} {speed['samples_per_s']:.0f} samples/s "
                f"left {timedelta(seconds=int(speed['seconds_left']))} "
                f"memory {speed['memory_mib']:.0f} MiB")
        if self.skipped:
            line += f" skipped {self.skipped}"
        if speed["waiting"] > 0.2:
            line += (f" waits for images {speed['waiting']:.0%} of the time: "
                     f"--workers {self.settings['workers']} read {speed['samples_per_s']:.0f}/s")
        self.say(line)
        self._append(record | speed)

    def validated(self, step, recall, share=None):
        """Report recall on the valid split; the highest mean over both ways so far becomes best.pt.

        recall: {way: {"R@1", …, "MR"}} in percent. share: of an average, how far from the start.
        """
        score = sum(figures["MR"] for figures in recall.values()) / 2
        shown = {way: " ".join(f"{k} {figures[k]:.1f}" for k in ("R@1", "R@5", "R@10"))
                 for way, figures in recall.items()}
        title, record = f"step {step:6}", {"step": step, "valid": recall, "score": score}
        if share is not None:
            title = f"average {1 - share:.1f} start + {share:.1f} end, step {step:6}"
            record["average"] = share
        best = "  best so far" if score > self.best else ""
        self.say(f"{title} valid  text-to-image {shown['text_to_image']}   "
                 f"image-to-text {shown['image_to_text']}   mean {score:.2f}{best}")
        self._append(record)
        if score > self.best:
            if self.first:
                weights.save(self.out / "best.pt", self.model, step=step, average=share,
                             recall=recall, settings=self.settings)
            self.best = score
            self.best_step = step if share is None else self.best_step          # for --patience

    # ---- snapshots

    def snapshot_due(self, step):
        """Whether --save-every or --save-minutes asks for a snapshot after this step."""
        every, minutes = self.settings["save_every"], self.settings["save_minutes"]
        late = minutes and time.monotonic() - self.saved >= 60 * minutes
        return bool(late or every and step % every == 0)

    def snapshot(self, step):
        """Write last.pt; BadInput when weights are not finite, so that it can always be resumed."""
        self.check_last_step()
        self.saved = time.monotonic()
        if not self.first:
            return
        self._check_lock()
        if not all(x.isfinite().all() for x in self.model.state_dict().values()):
            raise BadInput(f"step {step}: the weights are no longer finite; last.pt holds the run "
                           "before. A lower --lr or --precision fp32 may help")
        weights.save(self.out / "last.pt", self.model, step=step, settings=self.settings,
                     optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict(),
                     best=self.best, best_step=self.best_step, averaged=self.averaged,
                     losses=self.losses, skipped_steps=self.skipped)
        if self.settings["keep"] > 1:
            self._keep_snapshot(self.out / f"step-{step:08}.pt")

    def _keep_snapshot(self, name):
        """Give last.pt a second name, and delete all but the newest --keep such files."""
        part = self.out / (name.name + ".part")
        part.unlink(missing_ok=True)                        # of a killed run
        try:
            os.link(self.out / "last.pt", part)
        except OSError:                                     # the disk has no hard links
            shutil.copyfile(self.out / "last.pt", part)
        os.replace(part, name)
        kept = sorted(path for path in self.out.glob("step-*.pt") if path.name <= name.name)
        for path in kept[: -self.settings["keep"]]:
            path.unlink()

    def keep_start(self):
        """Write start.pt, the weights before the first step, for averages and comparisons."""
        if self.first and (self.settings["average"] or self.settings["stage"] == "finetune"):
            self._check_lock()
            weights.save(self.out / "start.pt", self.model, step=0, settings=self.settings)

    # ---- averages of the start and the end

    def try_averages(self, step, validate):
        """Validate (1 - share) start.pt + share last.pt, too; the best average becomes best.pt.

        Between the start and the end of a fine-tune there are often better weights than both
        (WiSE-FT, arXiv 2109.01903). The model ends with those of last.pt.
        """
        barrier()                                           # both have been written
        start, end = self.start_weights(), weights.read(self.out / "last.pt")["model"]
        for share in AVERAGES:
            average = {key: x.lerp(end[key], share) if x.is_floating_point() else end[key]
                       for key, x in start.items()}
            self.model.load_state_dict(average)
            validate(step, share)
            self.stop_if_asked(step)
        self.model.load_state_dict(end)
        self.averaged = True
        self.snapshot(step)

    def start_weights(self):
        """The tensors of start.pt, mapped from the disk. BadInput when it is another run's."""
        path = self.out / "start.pt"
        try:
            state = weights.read(path)
            expected = self.model.state_dict()
            check_names_and_shapes(state["model"], expected, "its tensors do not fit")
            if state.get("step") != 0:
                raise BadInput(f"it holds the weights after step {state.get('step')}")
        except BadInput as error:
            raise BadInput(f"{path} is not the start of this run, which its averages need; put it "
                           f"back, or continue with --no-average ({error})") from None
        return state["model"]

    # ---- the end

    def ended(self, step):
        """Whether `step` is the last step: of all, or by --patience.

        Patience counts the validations since the best one, or since the warmup.
        """
        if self.averaged or step == self.settings["total_steps"]:
            return True
        every, since = self.settings["valid_every"], max(self.best_step, self.settings["warmup"])
        waited = step // every - since // every
        return 0 < self.settings["patience"] <= waited

    def finished(self, step):
        """Whether after `step` nothing is left to do."""
        return self.ended(step) and (self.averaged or not self.settings["average"])

    def summary(self, step):
        """One line: the weights that the finished run leaves. "" in all processes but the first."""
        if not self.first:
            return ""
        line = (f"finished. {self.out / 'last.pt'}: the weights after step {step} of "
                f"{self.settings['total_steps']}")
        if self.best < 0:
            return line + " (nothing was validated)"
        best = weights.read(self.out / "best.pt")           # last.pt may not know of an average
        share, which = best.get("average"), f"after step {best.get('step')}"
        if share is not None:
            which = f"{1 - share:.1f} x the start + {share:.1f} x the end"
        elif not best.get("step"):
            which = "the START: training did not raise the recall"
        return f"{line}; {self.out / 'best.pt'}: the highest recall on the valid split, {which}"

    # ---- stopping

    def asked_to_stop(self):
        """Whether a signal came to any process: then all of them stop after the same step."""
        return all_reduce_max(len(self.signals.caught)) > 0

    def stop_if_asked(self, step):
        """End the process with the status of a signal (SystemExit) when one came."""
        if self.asked_to_stop():
            self.say(f"stopped by a signal after step {step}; the same command continues there")
            sys.exit(128 + (self.signals.caught or [signal.SIGTERM])[0])


def differences(before, now, also_free=()):
    """"NAME VALUE, now it is VALUE" of each setting that differs and may not: a list.

    Another version may know more settings or fewer. One that is in `before` or `now` alone differs
    when it is on.
    """
    changed = []
    for name in sorted((before.keys() | now.keys()) - MAY_CHANGE_ON_RESUME - set(also_free)):
        differs = before.get(name) != now.get(name)
        if name not in before or name not in now:
            differs = (before | now)[name] not in OFF
        if differs:
            changed.append(f"{name} {before.get(name)}, now it is {now.get(name)}")
    return changed


def read_log(path):
    """The records of a .jsonl log; none without the file. A crash may have left other lines."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            with contextlib.suppress(ValueError, RecursionError):
                record = json.loads(line)
                if isinstance(record, dict) and isinstance(record.get("step"), int):
                    records.append(record)
    return records


def keep_records(path, step):
    """Cut a .jsonl log to its records up to `step` -> those. Averages go: they are tried again."""
    logged = read_log(path) if step else []
    records = [r for r in logged if r["step"] <= step and "average" not in r]
    lines = [system.as_json(record) + "\n" for record in records]
    system.write_text(path, "".join(lines))
    return records
