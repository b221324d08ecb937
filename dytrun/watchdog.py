"""A run that hangs ends, and says which rank it waits for.

Each rank watches itself from a thread. One that has not moved for too long writes down where it stands, with the
stacks of its threads, and so do the others once they see that; a rank that writes nothing is the one that hangs,
else the one that is furthest behind. Files, because a collective or a store may be what hangs.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from dytrun.distributed import Place

# What a rank does before a step and in it, in order: of two ranks at the same number of steps the one that is at an
# earlier part is waited for.
PROBE, EVALUATION_IMAGES, EVALUATE, SAVE, IMAGES, COMPUTE, AGREE, UPDATE = (
    "looks at the norms",
    "waits for images of the evaluation",
    "evaluates",
    "saves",
    "waits for images",
    "computes, or waits in the exchange of gradients",
    "waits for the other ranks' losses",
    "updates the weights",
)
_ORDER = (PROBE, EVALUATION_IMAGES, EVALUATE, SAVE, IMAGES, COMPUTE, AGREE, UPDATE)
# After which a rank is not watched any more.
DONE = "is done"
# Seconds that a rank which can still speak has for it.
_ANSWER_S = 4.0


class Watchdog:
    """Watches this rank from the first `beat` on; used as a context manager."""

    def __init__(self, place: Place, folder: Path, timeout_s: float, end: Callable[[str], None] | None = None):
        """Take a place, a folder that all ranks see, and the seconds without a beat after which the run ends.

        `end` is called with what is to be said; None: it is left to this machine's launcher to say, or printed where
        that is another's, and the process ends with exit code 1.
        """
        self._place, self._folder, self._timeout_s = place, folder, timeout_s
        self._end = end or _end
        self._at = 0.0
        self._step, self._what = 0, COMPUTE
        self._closed, self._is_watched = threading.Event(), False
        self._thread = threading.Thread(target=self._watch, daemon=True, name="dytrun-watchdog")
        if place.is_first and folder.is_dir():
            for path in folder.iterdir():
                path.unlink()

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def beat(self, step: int, what: str) -> None:
        """Say that this rank has come to a part of a step, or is DONE."""
        if what == DONE:
            self._closed.set()
            return
        self._step, self._what, self._at = step, what, time.monotonic()
        if not self._is_watched:  # not before: loader processes are forked, and a fork would tear a thread
            self._is_watched = True
            self._thread.start()

    def _watch(self) -> None:
        every_s = min(1.0, self._timeout_s / 4)
        # If even this thread is held up, by code that holds the interpreter's lock, a thread in C speaks for it.
        last_resort = self._timeout_s + 2 * _ANSWER_S
        while not self._closed.wait(every_s):
            faulthandler.dump_traceback_later(last_resort, exit=True)
            if time.monotonic() - self._at > self._timeout_s or any(self._folder.glob("rank-*.json")):
                break
        if self._closed.is_set():
            faulthandler.cancel_dump_traceback_later()
            return
        said = "a rank hangs, and there is no room to say which"
        try:
            said = self._report(time.monotonic() - self._at)
        finally:
            self._end(said)

    def _report(self, still_s: float) -> str:
        self._folder.mkdir(exist_ok=True)
        rank = self._place.rank
        with (self._folder / f"rank-{rank}.txt").open("w") as file:
            faulthandler.dump_traceback(file)
        stack = (self._folder / f"rank-{rank}.txt").read_text()
        found = {"rank": rank, "step": self._step, "what": self._what, "still_s": round(still_s, 1),
                 "process": os.getpid(), "host": socket.gethostname()}  # fmt: skip
        partial = self._folder / f".rank-{rank}.partial"
        partial.write_text(json.dumps(found | {"stack": stack}))
        partial.replace(self._folder / f"rank-{rank}.json")
        until = time.monotonic() + _ANSWER_S
        while time.monotonic() < until and len(_reports(self._folder)) < self._place.world:
            time.sleep(0.1)
        return verdict(_reports(self._folder), self._place.world, self._timeout_s)


def verdict(reports: dict[int, dict], world: int, timeout_s: float) -> str:
    """Say in a first line which rank hangs, and in the lines below where each of them stands."""
    silent = [rank for rank in range(world) if rank not in reports]
    behind = min((one["step"], _ORDER.index(one["what"])) for one in reports.values()) if reports else (0, 0)
    last = [rank for rank, one in reports.items() if (one["step"], _ORDER.index(one["what"])) == behind]
    where = {rank: f"rank {rank} {one['what']}, step {one['step'] + 1}, process {one['process']} on {one['host']}"
             for rank, one in sorted(reports.items())}  # fmt: skip
    if silent:
        named = " and ".join(f"rank {rank}" for rank in silent)
        first = f"{named} hang{'s' if len(silent) == 1 else ''}: no sign of life (stopped, or out of reach)"
    elif len(last) < world or world == 1:
        first = " and ".join(where[rank] for rank in last) + f": hang{'s' if len(last) == 1 else ''}"
    else:
        first = "all ranks hang at the same place"
    lines = [f"{first}; no step for {timeout_s:g} s (machine.hang_timeout_s)"]
    for rank, one in sorted(reports.items()):
        lines += [f"--- {where[rank]}, for {one['still_s']:g} s", one["stack"].rstrip()]
    return "\n".join(lines)


def _reports(folder: Path) -> dict[int, dict]:
    found = (json.loads(path.read_text()) for path in folder.glob("rank-*.json"))
    return {one["rank"]: one for one in found}


def _end(said: str) -> None:
    try:
        if note := os.environ.get("DYTRUN_STOP_NOTE"):  # the launcher is here, and says it
            partial = Path(note).with_name(f"hang.{os.getpid()}")
            partial.write_text(said)
            partial.replace(Path(note).with_name("hang"))
        else:
            sys.stderr.write(f"dytrun: {said}\n")
            sys.stderr.flush()
    finally:
        os._exit(1)
