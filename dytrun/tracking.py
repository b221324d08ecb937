"""Records → metrics.jsonl and Weights & Biases.

metrics.jsonl is the truth and W&B a view of it: no key, no network, a slow or dead server and a full disk never stop
a run. A thread brings W&B every record once, from the file what W&B lacks of an interrupted try, then the new ones.
Nothing that W&B does or does not do can hold up a step.
"""

import json
import math
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dytrun.config import RunConfig
from dytrun.errors import UserError, first_line
from dytrun.journal import Journal, cut_back
from dytrun.records import Position, Record, RunResult, to_json_line, whole_lines
from dytrun.wandb_link import Link, open_link
from dytrun.wandb_reach import abandon

# Seconds that a run may wait for W&B: at its start, at its end, and at its end when it was told to stop.
_START_TIMEOUT_S = 5.0
_END_TIMEOUT_S = 90.0
_HASTE_TIMEOUT_S = 3.0


class _End(NamedTuple):
    result: RunResult | None
    in_haste: bool


class Tracker:
    """Writes the records of one run; used on one rank and by one thread only."""

    def __init__(self, config: RunConfig, run_dir: Path, position: Position, say: Callable[[str], None]):
        """Open the run's files for records after `position`; later ones of an interrupted try are dropped.

        `say` gets what a person should know, a line each, always in the caller's thread. W&B gets five seconds; a
        slower one joins when it is ready.

        Raises:
            UserError: `tracking.mode=online` and W&B cannot be reached.
        """
        self._say = say
        path = run_dir / "metrics.jsonl"
        old_lines = cut_back(path, position, say)
        self._journal = Journal(path, say)
        self._queue: queue.SimpleQueue[str | _End] = queue.SimpleQueue()
        self._notes: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._is_open = threading.Event()
        self._refusal: UserError | None = None
        arguments = config, run_dir, old_lines
        self._thread = threading.Thread(target=self._follow, args=arguments, daemon=True, name="W&B")
        if config.tracking.mode == "off":
            return
        self._thread.start()
        is_asked_for = config.tracking.mode == "online"
        if not self._is_open.wait(None if is_asked_for else _START_TIMEOUT_S):
            say("W&B has not answered yet; training does not wait for it")
        self._pass_on_notes()
        if self._refusal is not None:
            self._journal.close()
            raise self._refusal

    def log(self, record: Record) -> None:
        """Append a record to metrics.jsonl, on the disk, and leave it to W&B's thread."""
        line = to_json_line(record)
        self._journal.append(line)
        if self._thread.is_alive():
            self._queue.put(line)
        self._pass_on_notes()

    def finish(self, result: RunResult | None, in_haste: bool = False) -> None:
        """Close the files; W&B gets the result as its summary, and a minute to upload what is left.

        `in_haste`, where the run was told to stop and seconds count, it gets three; the next start uploads the rest.
        """
        self._journal.close()
        if self._thread.is_alive():
            self._queue.put(_End(result, in_haste))
            self._thread.join(_HASTE_TIMEOUT_S if in_haste else _END_TIMEOUT_S)
        self._pass_on_notes()
        if self._thread.is_alive():
            abandon(at_once=True)
            self._say("W&B was not done in time and is left behind; metrics.jsonl has everything")

    def _pass_on_notes(self) -> None:
        while not self._notes.empty():
            self._say(self._notes.get())

    def _follow(self, config: RunConfig, run_dir: Path, old_lines: list[str]) -> None:
        """Bring W&B every record that it lacks, until the end; if W&B fails at anything, go without it."""
        try:
            link = open_link(config, run_dir)
            if link is not None:
                self._notes.put(link.note)
                self._is_open.set()
                end = self._feed(link, old_lines)
                try:
                    link.close(end.result, end.in_haste)
                except TimeoutError:
                    self._start_over(config, run_dir, end)
        except UserError as error:
            self._refusal = error
        except Exception as error:
            self._notes.put(f"W&B is left out from here ({first_line(error)}); metrics.jsonl has everything")
        finally:
            self._is_open.set()

    def _feed(self, link: Link, old_lines: list[str]) -> _End:
        for number, line in enumerate(old_lines):
            link.log(number, _values(line))
        number = len(old_lines)
        while not isinstance(item := self._queue.get(), _End):
            link.log(number, _values(item))
            number += 1
        return item

    def _start_over(self, config: RunConfig, run_dir: Path, end: _End) -> None:
        """Bring W&B what its server did not take in time: the rest if it is back, else all of it as an offline run."""
        abandon(at_once=True)
        said = "W&B's server did not take all of the run"
        # Where W&B was asked for it was there at the start; offline is better than nothing now.
        tracking = config.tracking.model_copy(update={"mode": "auto"})
        link = open_link(config.model_copy(update={"tracking": tracking}), run_dir)
        if link is None:
            self._notes.put(f"{said}; metrics.jsonl has everything")
        else:
            self._notes.put(f"{said}. {link.note}")
            for number, line in enumerate(whole_lines(run_dir / "metrics.jsonl")):
                link.log(number, _values(line))
            link.close(end.result, end.in_haste)


def _values(line: str) -> dict[str, float]:
    """Read a line of metrics.jsonl; what was not finite is null there and not a number here."""
    return {name: math.nan if value is None else value for name, value in json.loads(line).items()}
