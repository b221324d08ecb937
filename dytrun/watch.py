"""The table of all runs of a directory, as they go: read from their files, so neither W&B nor the runs are asked."""

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from dytrun import owner
from dytrun.board import Board, Job, counted
from dytrun.errors import UserError
from dytrun.records import RunResult
from dytrun.task import Outcome

_EVERY_S = 1.0
_PLACES = ("running", "stopped", "finished", "diverged", "failed", "unreadable")


def watch(directory: Path) -> None:
    """Show the runs of a directory, those under way first, until an interrupt; runs that begin later appear.

    Raises:
        UserError: there is no such directory, or it is a run itself.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no directory; give the one that holds the runs: dytrun report DIR watch=true")
    if (directory / "config.json").is_file():
        raise UserError(f"{directory}: a run, not a directory of runs; say dytrun report {directory.parent} watch=true")
    jobs: list[Job] = []
    with suppress(KeyboardInterrupt), Board(jobs, lambda: _title(directory, jobs)) as board:
        while True:
            jobs[:] = look(directory)
            board.refresh()
            time.sleep(_EVERY_S)


def look(directory: Path) -> list[Job]:
    """Return the runs of a directory as they are now, those under way first, then the newest."""
    found = [(path.stat().st_mtime, _job(path.parent)) for path in directory.glob("*/config.json") if path.is_file()]
    return [job for _, job in sorted(found, key=lambda one: (_PLACES.index(one[1].state), -one[0], one[1].run))]


def _job(run_dir: Path) -> Job:
    """Return a run as a row of the table."""
    job = Job(run_dir.name, run_dir, 0)
    try:
        job.epochs = int(json.loads((run_dir / "config.json").read_text())["epochs"])
        at_work, starts = owner.at_work(run_dir), owner.starts(run_dir)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        job.outcome, job.state = Outcome(job.run, "failed", ["its files cannot be read"]), "unreadable"
        return job
    last = starts[-1] if starts else {}
    if at_work is not None:
        job.start(str(at_work))
        job.began = time.monotonic() - _seconds_since(at_work.started)
        return job
    job.where, job.state, job.outcome = str(last.get("host") or ""), "stopped", Outcome(job.run, "stopped")
    with suppress(OSError, ValueError, TypeError):
        result = RunResult.load(run_dir / "result.json")
        job.state = result.status if result.status in _PLACES else "stopped"
        if result.train_seconds is not None:
            job.began, job.seconds = 0.0, result.train_seconds
    return job


def _seconds_since(moment: str) -> float:
    with suppress(ValueError):
        return max((datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds(), 0.0)
    return 0.0


def _title(directory: Path, jobs: Sequence[Job]) -> str:
    counts = [f"{number} {state}" for state in _PLACES if (number := sum(job.state == state for job in jobs))]
    said = f"{counted(jobs)} in {directory}" + (f": {', '.join(counts)}" if counts else "")
    return f"{said} (Ctrl-C ends the view, not the runs)"
