"""How fast a training run is, and how much memory it takes.

    meter = Meter(first_step, total, settings, pairs, device)
    for batch in meter.watched(loader): …
    run.log(meter.record(step, lr, model, run))
"""
import contextlib
import math
import resource
import sys
import time
from pathlib import Path

import torch


class Meter:
    """Loss, speed, time left, memory and time spent waiting for images, since the last record."""

    def __init__(self, first_step, total, settings, pairs, device):
        """total: steps of the run. pairs: of the data set, which make an epoch."""
        self.first_step, self.total, self.device = first_step, total, device
        self.batch_size, self.pairs = settings.batch_size, pairs
        self.begin = self.tick = time.time()
        self.last, self.waited = first_step, 0.0

    def watched(self, loader):
        """The loader's batches, timed. The first wait does not count: the readers start in it."""
        start, first = time.time(), True
        for batch in loader:
            wait = time.time() - start
            if first:
                self.tick += wait
            else:
                self.waited += wait
            yield batch
            start, first = time.time(), False

    def record(self, step, lr, model, run):
        """The figures since the last record; takes the losses out of `run`."""
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
        """Time inside does not count as training time."""
        start = time.time()
        yield
        self.tick += time.time() - start


def memory_mib(device):
    """Peak memory of this process so far, on the GPU or in RAM, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")                      # on Linux getrusage counts the parent
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
