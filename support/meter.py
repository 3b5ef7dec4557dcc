"""How fast a training run is, and how much memory it takes.

    meter = Meter(first_step, total, batch_size, device)
    for batch in meter.watched(loader): …
    meter.since_last_time(step)                             # {"samples_per_s": 310.2, …}
"""
import contextlib
import resource
import time
from pathlib import Path

import torch


class Meter:
    """Speed, time left, memory, and time spent waiting for images. total: steps of the run."""

    def __init__(self, first_step, total, batch_size, device):
        self.first_step, self.total = first_step, total
        self.batch_size, self.device = batch_size, device
        self.begin = self.tick = time.monotonic()
        self.last, self.waited = first_step, 0.0

    def watched(self, loader):
        """The loader's batches, timed. The first wait does not count: the readers start in it."""
        start, first = time.monotonic(), True
        for batch in loader:
            wait = time.monotonic() - start
            if first:
                self.tick += wait
            else:
                self.waited += wait
            yield batch
            start, first = time.monotonic(), False

    @contextlib.contextmanager
    def paused(self):
        """Time inside does not count as training time."""
        start = time.monotonic()
        yield
        self.tick += time.monotonic() - start

    def since_last_time(self, step):
        """The figures since the last call, as metrics.jsonl has them. waiting: a share of 1."""
        now = time.monotonic()
        figures = {
            "samples_per_s": (step - self.last) * self.batch_size / (now - self.tick),
            "seconds_left": (now - self.begin) / (step - self.first_step) * (self.total - step),
            "memory_mib": memory_mib(self.device),
            "waiting": self.waited / (now - self.tick),
        }
        self.tick, self.last, self.waited = now, step, 0.0
        return figures


def memory_mib(device):
    """Peak memory of this process so far, on the GPU or in RAM, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")                      # on Linux getrusage counts the parent
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20       # macOS: bytes
