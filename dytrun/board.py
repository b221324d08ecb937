"""One live table of all jobs of a sweep, read from what the runs leave in their directories.

So it shows the same for a job in another process of this machine and for one on another machine.
"""

import functools
import json
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.live import Live
from rich.table import Table
from rich.text import Text

from dytrun import terminal
from dytrun.task import Outcome

# In a log file, which cannot be redrawn, the whole table is printed this often.
_TABLE_EVERY_S = 600.0
# Enough of the end of metrics.jsonl to hold a training and an evaluation record of a model with many sites.
_TAIL_BYTES = 64 * 1024


@dataclass
class Job:
    """One run of a sweep, as a row."""

    run: str
    run_dir: Path
    epochs: int
    where: str = ""
    """Which cores, GPUs or SLURM job it has."""
    state: str = "waiting"
    began: float | None = None
    seconds: float = 0.0
    outcome: Outcome | None = None

    def start(self, where: str) -> None:
        """Note that the job has begun."""
        self.where, self.state, self.began = where, "running", time.monotonic()

    def end(self, outcome: Outcome) -> None:
        """Note how the job has ended."""
        self.outcome, self.state = outcome, outcome.ending
        self.seconds = time.monotonic() - self.began if self.began is not None else 0.0

    def cells(self) -> list[str]:
        """Return the row of the table."""
        is_there = self.state not in ("waiting", "failed", "refused", "unreadable")
        last = _newest(self.run_dir / "metrics.jsonl") if is_there else {}
        seconds = time.monotonic() - self.began if self.began is not None and self.outcome is None else self.seconds

        def shown(key: str, form: str) -> str:
            return format(last[key], form) if last.get(key) is not None else ""

        return [
            self.run,
            self.state,
            self.where,
            f"{last['epoch']:.1f}/{self.epochs}" if "epoch" in last else "",
            shown("train/loss", ".3f"),
            shown("val/top1", ".2f"),
            shown("perf/images_per_s", ",.0f"),
            str(timedelta(seconds=round(seconds))) if self.began is not None else "",
        ]


class Board:
    """The table: redrawn on a terminal, in a log file a line for each job that begins or ends."""

    def __init__(self, jobs: Sequence[Job], title: str | Callable[[], str]):
        """Show `jobs`, which may change between two looks at them, and so may what the title says."""
        self._jobs = jobs
        self._title = title
        self._shown = time.monotonic()
        self._said: dict[str, str] = {}
        self._live: Live | None = None

    def __enter__(self) -> "Board":
        if terminal.console().is_terminal:
            self._live = Live(self._table(), console=terminal.console(), auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
            self._live.stop()
        else:
            self.refresh()
            terminal.console().print(self._table())

    def refresh(self) -> None:
        """Look at all jobs again."""
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
            return
        for job in self._jobs:
            if job.state not in ("waiting", self._said.get(job.run)):
                self._said[job.run] = job.state
                why = f": {job.outcome.problems[0]}" if job.outcome and job.outcome.problems else ""
                done = sum(one.outcome is not None for one in self._jobs)
                terminal.line(f"[{done}/{len(self._jobs)}] {job.run} {job.state} ({job.where}){why}")
        if time.monotonic() - self._shown > _TABLE_EVERY_S:
            self._shown = time.monotonic()
            terminal.console().print(self._table())

    def _table(self) -> Table:
        names = ("run", "state", "where", "epoch", "loss", "top-1 %", "images/s", "time")
        title = self._title if isinstance(self._title, str) else self._title()
        table = Table(title=Text(title), title_justify="left")
        for name in names:
            table.add_column(name, overflow="fold" if name in ("run", "where") else "ellipsis")
        for job in self._jobs:
            table.add_row(*map(Text, job.cells()))  # a name is no markup
        return table


def counted(runs: Collection[object]) -> str:
    """Say how many runs there are."""
    return f"{len(runs)} run{'' if len(runs) == 1 else 's'}"


def _newest(path: Path) -> Mapping[str, Any]:
    """Return the newest value of each metric at the end of metrics.jsonl."""
    try:
        about = path.stat()
        return _newest_of(path, about.st_size, about.st_mtime_ns)
    except OSError:
        return {}


@functools.lru_cache(maxsize=1024)
def _newest_of(path: Path, size: int, _changed_ns: int) -> Mapping[str, Any]:
    """Read the end of a file of `size` bytes: those of runs that are over do not change, and are read once."""
    with path.open("rb") as file:
        file.seek(max(0, size - _TAIL_BYTES), os.SEEK_SET)
        lines = file.read().split(b"\n")[:-1]
    found: dict[str, Any] = {}
    for line in lines:
        try:
            found |= {key: value for key, value in json.loads(line).items() if value is not None}
        except ValueError:
            continue  # the first line of the tail is cut
    return found
