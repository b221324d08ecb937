"""A loader that is measured in turn with others: its processes stand still while it is not its turn.

Loader processes work ahead. One that went on beside another arm would take its cores, and begin its next turn with
batches that nobody waited for. So they are stopped (SIGSTOP) at the end of a turn, and go on at the next from where
they were: with as much ready, and as far in the next batch, as when the clock stopped.
"""

import contextlib
import ctypes
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator

import torch

from dytrun import timing

# Batches of each process before anything is timed: kernels are compiled, and what is ready reaches its usual depth.
_WARMUP_BATCHES = 3


class LoaderArm:
    """Batches of one size from some loader processes, and what they take."""

    def __init__(self, start: Callable[[], Iterator[object]], batch: int, device: torch.device):
        """Start the processes, which `start()` or its first batch does, and warm them up; then they stand still."""
        others = {child.pid for child in multiprocessing.active_children()}
        self._batch, self._device = batch, device
        self._batches = start()
        self._pids: list[int] = []
        next(self._batches)
        self._pids = [child.pid for child in multiprocessing.active_children() if child.pid and child.pid not in others]
        self.batches = max(1, len(self._pids))
        """A turn's. Processes finish theirs together, so it is as many of each."""
        self.turn(_WARMUP_BATCHES)

    def plan(self, seconds: float) -> None:
        """Let a turn take about so long."""
        images_per_s, _ = self.turn(2)
        each = max(1, len(self._pids))
        self.batches = each * max(1, math.ceil(seconds * images_per_s / self._batch / each))

    def turn(self, times: int = 1) -> tuple[float, float]:
        """Load a turn's batches; return images a second, and seconds of processors, the rank's too, that an image took.

        The latter are NaN where the system does not say.
        """
        self._signal(signal.SIGCONT)
        timing.settle(self._device)
        begin, used = time.perf_counter(), self._cpu_s()
        for _ in range(times * self.batches):
            next(self._batches)
        timing.settle(self._device)
        passed, used = time.perf_counter() - begin, self._cpu_s() - used
        # Not where a batch has failed: a process that stands still cannot be ended, and would be waited for.
        self._signal(signal.SIGSTOP)
        images = times * self.batches * self._batch
        return images / passed, used / images

    def close(self) -> None:
        """End the processes, once nothing else refers to their batches."""
        self._signal(signal.SIGCONT)
        self._batches = iter(())

    def _signal(self, number: int) -> None:
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):  # it died; that is for the loader to say
                os.kill(pid, number)

    def _cpu_s(self) -> float:
        return time.process_time() + sum(map(_cpu_s_of, self._pids))


def _cpu_s_of(pid: int) -> float:
    """Seconds of processors that another process and its threads have taken, user's and system's."""
    clock = ctypes.c_int()
    try:
        problem = ctypes.CDLL(None).clock_getcpuclockid(pid, ctypes.byref(clock))  # POSIX; not everywhere
    except AttributeError:
        return math.nan
    return math.nan if problem else time.clock_gettime(clock.value)
