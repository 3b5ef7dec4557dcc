"""A training run: the files in --out, the lines of the log, resuming and stopping.

    run = Run(out, settings, rank, model, optimizer, scaler)
    first_step = run.resume(checkpoint.read(out / "last.pt"))   # BadInput when settings differ
    run.open_folder(first_step)
    run.after_step(step, loss, norm, …), run.validated(step, recall), run.snapshot(step)

The loop in train.py calls all this.
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
from support.checks import check_names_and_shapes
from support.processes import all_gather_objects, all_reduce_max, barrier
from support.resume import check_settings, differing, keep_lines
from support.system import BadInput

AVERAGES = [tenths / 10 for tenths in range(1, 10)]         # how far from the start to the end


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

    def __init__(self, out, settings, rank, model, optimizer, scaler):
        """settings: all of them, {name of train.py's flag: value}."""
        self.out, self.settings, self.first = out, settings, rank == 0
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.best, self.best_step = -1.0, 0                 # the highest score so far, and its step
        self.averaged = False                               # whether the averages have been tried
        self.losses = []                                    # since the last record of the log
        self.norm = math.nan                                # of the last gradient
        self.skipped = 0                                    # steps that were not finite, not taken
        self.pending = None                                 # the step that is still to be checked
        self.bad = set()                                    # numbers of the unreadable pairs
        self.saved = time.time()
        self.signals = []

    def say(self, line):
        """Print a line, once for all processes."""
        if self.first:
            print(line, flush=True)

    def _append(self, record, name="metrics.jsonl"):
        if self.first:
            with open(self.out / name, "a", encoding="utf-8") as f:
                f.write(json.dumps(record, ensure_ascii=False) + "\n")

    # ---- start and resume

    def agree(self, **facts):
        """Raise BadInput when processes differ in their settings or in `facts`.

        On several nodes each must see the same files.
        """
        first, *others = all_gather_objects(self.settings | facts)
        for rank, other in enumerate(others, 1):
            differ = [f"{name} {other[name]} where process 0 has {first[name]}"
                      for name in first if other[name] != first[name]]
            if differ:
                raise BadInput(f"process {rank} has {'; '.join(differ)}: every node must see the "
                               "same data, weights and --out (a shared file system)")

    def resume(self, state):
        """Continue from a snapshot, all but the model's weights -> the number of its last step.

        BadInput names the settings that differ, or says that it is no snapshot, or damaged.
        """
        last = self.out / "last.pt"
        needed = {"settings", "optimizer", "scaler", "best", "best_step", "averaged", "losses",
                  "skipped_steps", "step"}
        if missing := ", ".join(sorted(needed - state.keys())):
            raise BadInput(f"{last} is no training snapshot (it lacks {missing}), so nothing can "
                           "continue from it; choose another --out")
        try:
            check_settings(state["settings"], self.settings, self.model.cfg, self.out, self.say)
            self._restore(state)
            self._check_files()
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise BadInput(f"{last} is damaged: its entries are not those of a training snapshot "
                           f"({type(error).__name__}: {error}); choose another --out") from None
        return state["step"]

    def _restore(self, state):
        self.optimizer.load_state_dict(state["optimizer"])
        for p, moments in self.optimizer.state.items():     # AdamW writes past a moment's end
            for x in (moments["exp_avg"], moments["exp_avg_sq"]):
                if x.shape != p.shape or not x.isfinite().all():
                    raise ValueError("the optimizer's moments do not fit the parameters")
        self.scaler.load_state_dict(state["scaler"])
        self.best, self.best_step = float(state["best"]), int(state["best_step"])
        self.averaged, self.skipped = bool(state["averaged"]), int(state["skipped_steps"])
        self.losses = [float(x) for x in state["losses"]]
        if type(state["step"]) is not int or not 0 <= state["step"] <= self.settings["total_steps"]:
            raise ValueError(f"step {state['step']!r}")

    def _check_files(self):
        """Raise BadInput now, not at the end, when a file that the run needs later is gone."""
        if self.best >= 0 and not (self.out / "best.pt").exists():
            raise BadInput(f"{self.out / 'best.pt'}, the best weights of this run so far, is gone; "
                           "put it back, or begin a new run from the last ones: "
                           f"--init {self.out / 'last.pt'} --out {self.out}-2")
        if self.settings["average"] and not self.averaged:
            self.start_weights()

    def open_folder(self, step):
        """Lock the folder, catch signals, and drop what a killed run logged after `step`.

        BadInput when another run is writing there, or has left its best.pt.
        """
        self.catch_signals()
        barrier()                                           # every process has read last.pt
        if not self.first:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        self.lock = system.lock(self.out / "lock")          # held until this process ends
        if self.lock is None:
            raise BadInput(f"{self.out}: another run is writing there; choose another --out")
        with contextlib.suppress(OSError, ValueError, AttributeError):      # not there, not ours
            before = json.loads((self.out / "settings.json").read_bytes())
            other = step == 0 and differing(before, self.settings)
            if other and (self.out / "best.pt").exists():
                raise BadInput(f"{self.out} holds the best.pt of another run, without its last.pt; "
                               "choose another --out")
        system.write_json(self.out / "settings.json", self.settings)
        keep_lines(self.out / "metrics.jsonl", step)
        if (self.out / "bad_samples.jsonl").exists():
            lines = keep_lines(self.out / "bad_samples.jsonl", step)
            self.bad = {json.loads(line).get("pair") for line in lines}

    # ---- after a step

    def report(self, step, reports, seen, total):
        """List unreadable pairs, each once; BadInput when more than the share `max_bad` are.

        reports: {"pair", "reason", …} of each. seen: pairs so far; they count as 1,000 at least, if
        `total` are as many.
        """
        fresh = {r["pair"]: r for r in reports if r["pair"] not in self.bad}
        if not fresh or not self.first:
            return
        self.bad |= fresh.keys()
        for r in fresh.values():
            self._append({"step": step, **r}, "bad_samples.jsonl")
        listed, reason = self.out / "bad_samples.jsonl", next(iter(fresh.values()))["reason"]
        seen = max(seen, min(total, 1000))
        most = int(self.settings["max_bad"] * seen)
        pairs, were = ("pairs", "were") if len(fresh) > 1 else ("pair", "was")
        self.say(f"step {step:6} {len(fresh)} {pairs} could not be read and {were} replaced; "
                 f"{len(self.bad):,} so far, {most:,} may be ({listed}); the first: {reason}")
        if len(self.bad) > most:
            raise BadInput(f"step {step}: {len(self.bad):,} pairs cannot be read, and of {seen:,} "
                           f"only {most:,} may be (--max-bad {self.settings['max_bad']:g}); "
                           f"{listed} lists them. The first: {reason}")

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
            record = {"step": step, "loss": str(loss), "gradient_norm": str(self.norm),
                      "pairs": pairs_of(step)}
            system.write_json(where, record)
        raise BadInput(f"step {step}: the loss is {loss} and the norm of its gradient {self.norm}; "
                       f"the step was not taken. {where} lists the pairs of the batch (before any "
                       f"replacement); {self.out / 'last.pt'} holds the run before. A lower --lr "
                       "or --precision fp32 may help")

    def log(self, record):
        """Print a record of Meter.record, and append it to metrics.jsonl."""
        loss = "-" if record["loss"] is None else f"{record['loss']:.4f}"
        left = timedelta(seconds=int(record["seconds_left"]))
        line = (f"step {record['step']:6}/{self.settings['total_steps']} loss {loss} "
                f"lr {record['lr']:.2e} temperature {record['temperature']:.4f} "
                f"{record['samples_per_s']:.0f} samples/s left {left} "
                f"memory {record['memory_mib']:.0f} MiB")
        if record["skipped"]:
            line += f" skipped {record['skipped']}"
        if record["waiting"] > 0.2:
            line += (f" waits for images {record['waiting']:.0%} of the time: "
                     f"--workers {self.settings['workers']} read {record['samples_per_s']:.0f}/s")
        self.say(line)
        self._append(record)

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
        late = minutes and time.time() - self.saved >= 60 * minutes
        return bool(late or every and step % every == 0)

    def snapshot(self, step):
        """Write last.pt; BadInput when weights are not finite, so that it can always be resumed."""
        self.check_last_step()
        self.saved = time.time()
        if not self.first:
            return
        last = self.out / "last.pt"
        if not all(x.isfinite().all() for x in self.model.state_dict().values()):
            raise BadInput(f"step {step}: the weights are no longer finite; {last} holds the run "
                           "before it. A lower --lr or --precision fp32 may help")
        weights.save(last, self.model, step=step, settings=self.settings,
                     optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict(),
                     best=self.best, best_step=self.best_step, averaged=self.averaged,
                     losses=self.losses, skipped_steps=self.skipped)
        if self.settings["keep"] > 1:
            self._keep_snapshot(last, self.out / f"step-{step:08}.pt")

    def _keep_snapshot(self, last, name):
        """Give last.pt a second name, and delete all but the newest --keep such files."""
        part = self.out / (name.name + ".part")
        part.unlink(missing_ok=True)                        # of a killed run
        try:
            os.link(last, part)
        except OSError:                                     # the disk has no hard links
            shutil.copyfile(last, part)
        os.replace(part, name)
        kept = sorted(path for path in self.out.glob("step-*.pt") if path.name <= name.name)
        for path in kept[: -self.settings["keep"]]:
            path.unlink()

    def keep_start(self):
        """Write start.pt, the weights before the first step, for averages and comparisons."""
        if self.first and (self.settings["average"] or self.settings["stage"] == "finetune"):
            weights.save(self.out / "start.pt", self.model, step=0, settings=self.settings)

    # ---- averages of the start and the end

    def try_averages(self, step, validate):
        """Validate averages of start.pt and last.pt, too; the best one becomes best.pt.

        Between the start and the end of a fine-tune there are often better weights than both
        (WiSE-FT, arXiv 2109.01903).
        """
        for share in AVERAGES:
            self.load_average(share)
            validate(step, share)
            self.stop_if_asked(step)
        self.load_average(1.0)                              # the end
        self.averaged = True
        self.snapshot(step)

    def load_average(self, share):
        """Load (1 - share) start.pt + share last.pt into the model."""
        barrier()                                           # both have been written
        start, end = self.start_weights(), weights.read(self.out / "last.pt")["model"]
        average = {key: x.lerp(end[key], share) if x.is_floating_point() else end[key]
                   for key, x in start.items()}
        self.model.load_state_dict(average)

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
            raise BadInput(f"{path} is not the start of this run, from which the averages at the "
                           "end begin; put it back, or go on with --no-average. "
                           f"({error})") from None
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

    def nothing_to_do(self, step):
        return (f"nothing to do: {self.summary(step)}. To train on from there: "
                f"--init {self.out / 'best.pt'} with another --out")

    def summary(self, step):
        """One line: the weights that the finished run leaves. "" in all processes but the first.

        best.pt itself tells what it holds: last.pt does not know of the best average when the run
        was killed between averages.
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
        which = f"after step {best.get('step')} of {step}"
        if share is not None:
            which = f"{1 - share:.1f} x the start + {share:.1f} x the end"
        elif not best.get("step"):
            which += " (that is the START: training did not raise the recall)"
        return (f"finished{early}. {self.out / 'best.pt'}: highest recall on the valid split, "
                f"{which}; {last}")

    # ---- stopping

    def catch_signals(self):
        """From now on SIGTERM and SIGINT (Ctrl-C) stop the run after its step.

        A second one of the same kind ends the process at once. (Of the same kind: Ctrl-C under
        torchrun brings one of each.)
        """
        signals, first = self.signals, self.first           # not self: the handlers stay for ever

        def catch(number, _):
            signals.append(number)
            if first:
                os.write(2, b"stopping after this step; press again to stop at once, "
                            b"without saving\n")
            signal.signal(number, signal.SIG_DFL)

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, catch)

    def asked_to_stop(self):
        """Whether a signal came to any process: then all of them stop after the same step."""
        return all_reduce_max(len(self.signals)) > 0

    def stop_if_asked(self, step):
        if self.asked_to_stop():
            self.stop(step)

    def stop(self, step):
        """End the process with the status of a signal (SystemExit)."""
        self.say(f"stopped by a signal after step {step}; the same command continues from there")
        sys.exit(128 + (self.signals or [signal.SIGTERM])[0])
