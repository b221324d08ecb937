"""The processes that load images: how they start, what is said when one dies, and how they end."""

import ctypes
import multiprocessing
import signal
import sys
import threading
from collections.abc import Iterator
from typing import TypeVar

import torch
from setproctitle import getproctitle, setproctitle, setthreadtitle

from dytrun.errors import UserError
from dytrun.stop import SIGNALS

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
Batch = TypeVar("Batch")


def start_worker(_: int) -> None:
    """Compute on one thread, leave signals to the rank, and end at once when that does, however it ends."""
    torch.set_num_threads(1)
    signal.set_wakeup_fd(-1)  # the rank's own pipe, which a fork has inherited
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    setproctitle(getproctitle().replace("dytrun: ", "dytrun: loader of ", 1))
    setthreadtitle("dytrun-loader")
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def readable(loaded: Iterator[Batch]) -> Iterator[Batch]:
    """Go through what is loaded; a worker's UserError arrives wrapped in its traceback, so cut it out again."""
    try:
        yield from loaded
        return
    except UserError as error:
        problem = str(error).strip().rpartition("UserError: ")[2]
        # Its frames hold the loader in a circle. Collected as one, the loader would not reach its processes any more,
        # and wait five seconds for each.
        error.__traceback__ = None
    except (RuntimeError, OSError, EOFError):
        # What is raised when a loader process has gone depends on where that was; the others' log would mislead.
        gone = [process for process in getattr(loaded, "_workers", []) if process.exitcode]
        if not gone:
            raise
        how = [signal.Signals(-one.exitcode).name if one.exitcode < 0 else f"exit code {one.exitcode}" for one in gone]
        named = ", ".join(f"{one.pid} ({why})" for one, why in zip(gone, how, strict=True))
        raise RuntimeError(f"loader process {named} died; if memory was short, try fewer machine.workers") from None
    raise UserError(problem)


def end_loaders() -> None:
    """End the loader processes of this one, which heed no signal but this."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes it for an accident
    for process in multiprocessing.active_children():
        process.kill()
