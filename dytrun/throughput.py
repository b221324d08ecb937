"""The clock: training time without pauses, data wait, step times, memory; steps are timed without stopping the device.

Three kinds of time: steps, pauses (evaluation, checkpoints; named where they are spent) and warm-up (the first
steps after a start, which compile and fill caches). Only steps count.
"""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

# Steps after a start that are left out of every figure.
WARMUP_STEPS = 5


class Clock:
    """Times the steps of one process on one device.

    On CUDA a step is measured by events on the stream, which the device fills in when it gets there; they are read
    in `window`, where the host waits once.
    """

    def __init__(self, device: torch.device, images_per_step: int):
        self.device = device
        self.images_per_step = images_per_step
        self.train_seconds = 0.0
        """Time in steps, warm-up included, pauses not."""
        self._steps_ms: list[float] = []
        self._waits_ms: list[float] = []
        self._window_from = 0
        self._warmup_left = WARMUP_STEPS
        self._pending: list[tuple] = []
        self._wait_ms = 0.0
        self._mark = self._now()

    @contextmanager
    def data_wait(self) -> Iterator[None]:
        """Time in which the loop waits for images."""
        start = time.perf_counter()
        yield
        self._wait_ms += 1e3 * (time.perf_counter() - start)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time that belongs to no step."""
        self._read()
        try:
            yield
        finally:
            self._mark = self._now()
            self._wait_ms = 0.0

    def step_done(self) -> None:
        """Say that an optimizer step has been issued."""
        now = self._now()
        self._pending.append((self._mark, now, self._wait_ms))
        self._mark, self._wait_ms = now, 0.0

    def window(self) -> dict[str, float]:
        """Return the figures since the last window (nan while warming up); waits for the device."""
        self._read()
        figures = self._figures(self._window_from)
        self._window_from = len(self._steps_ms)
        return figures

    def total(self) -> dict[str, float]:
        """Return the figures since the start; waits for the device."""
        self._read()
        return self._figures(0)

    def _now(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _read(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        for start, end, wait_ms in self._pending:
            step_ms = 1e3 * (end - start) if isinstance(end, float) else start.elapsed_time(end)
            self.train_seconds += step_ms / 1e3
            if self._warmup_left:
                self._warmup_left -= 1
            else:
                self._steps_ms.append(step_ms)
                self._waits_ms.append(wait_ms)
        self._pending.clear()

    def _figures(self, since: int) -> dict[str, float]:
        steps_ms = np.array(self._steps_ms[since:] or [float("nan")])
        total_ms = steps_ms.sum()
        return {
            "images_per_s": float(1e3 * self.images_per_step * len(steps_ms) / total_ms),
            "step_ms_p50": float(np.percentile(steps_ms, 50)),
            "step_ms_p95": float(np.percentile(steps_ms, 95)),
            "data_wait_frac": float(np.minimum(1.0, sum(self._waits_ms[since:]) / total_ms)),
            "peak_mem_gib": self._peak_mem_gib(),
        }

    def _peak_mem_gib(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
