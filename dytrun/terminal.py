"""What a person sees: plans, progress, results, tables. Rich on a terminal, plain lines in a log file."""

import contextlib
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from dytrun.records import Accuracy, EvalRecord, Record, RunResult, TrainRecord

# A log file gets at most a line in so many seconds, and the last one.
_LINE_EVERY_S = 5.0
_REDRAWN_EVERY_S = 0.1


@functools.cache
def console() -> Console:
    """Return the console of this process; a log file is wide, and nothing is cut at 80 columns there."""
    return Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 180)


class Display:
    """Shows the records of one run as they come."""

    def __init__(self, title: str, total_steps: int, first_step: int, unit: str = "images"):
        self._total_steps = total_steps
        self._first_step = first_step
        self._unit = {"images": "img"}.get(unit, unit)
        self._started = self._shown = time.monotonic()
        self._train: TrainRecord | None = None
        self._eval: EvalRecord | None = None
        self._progress: Progress | None = None
        if console().is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[now]}"),
            )
            self._progress = Progress(*columns, console=console())
            self._progress.start()
            self._task = self._progress.add_task(title, total=total_steps, completed=first_step, now="")

    def note(self, text: str) -> None:
        """Show a line of its own."""
        console().print(text, markup=False)

    def show(self, record: Record) -> None:
        """Take a record in; a terminal is redrawn, a log gets a line now and then."""
        if isinstance(record, TrainRecord):
            self._train = record
        elif isinstance(record, EvalRecord):
            self._eval = record
        if self._progress is not None:
            self._progress.update(self._task, completed=record.step, now=self._line())
            return
        is_last = record.step == self._total_steps and isinstance(record, EvalRecord)
        if is_last or time.monotonic() - self._shown > _LINE_EVERY_S:
            console().print(f"step {record.step}/{self._total_steps}  {self._line()}  ETA {self._eta(record.step)}")
            self._shown = time.monotonic()

    def close(self) -> None:
        """Give the terminal back."""
        if self._progress is not None:
            self._progress.stop()

    def _line(self) -> str:
        parts = []
        if self._train is not None:
            train = self._train
            speed = train.speed
            parts += [f"epoch {train.epoch:.2f}", f"loss {train.loss:.3f}", f"lr {train.lr:.1e}"]
            if math.isfinite(speed.images_per_s):  # not while the clock warms up
                parts += [f"{speed.images_per_s:,.0f} {self._unit}/s", f"data wait {100 * speed.data_wait_frac:.0f} %"]
        if self._eval is not None:
            ema = f" (EMA {self._eval.ema.top1:.2f})" if self._eval.ema is not None else ""
            parts.append(f"top-1 {self._eval.raw.top1:.2f}{ema}")
        return "  ".join(parts)

    def _eta(self, step: int) -> str:
        done = step - self._first_step
        seconds = (time.monotonic() - self._started) / done * (self._total_steps - step) if done else 0
        return str(timedelta(seconds=round(seconds)))


@contextlib.contextmanager
def moving(title: str, total: int) -> Iterator[Callable[[int, int, bool], None]]:
    """Show how images are gone through: give what is to be told of each few images, their bytes, and if that took work.

    There is no thread behind it, so processes may be forked meanwhile.
    """
    count = TextColumn("{task.completed:.0f}/{task.total:.0f} images")
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), count, TimeRemainingColumn(),
               TextColumn("{task.fields[now]}"))  # fmt: skip
    progress = Progress(*columns, console=console(), auto_refresh=False)
    task = progress.add_task(title, total=total, now="")
    started = shown = time.monotonic()
    images = worked = num_bytes = 0

    def report(more_images: int, more_bytes: int, is_work: bool) -> None:
        nonlocal images, worked, num_bytes, shown
        images += more_images
        if is_work:
            worked, num_bytes = worked + more_images, num_bytes + more_bytes
        now = time.monotonic()
        if now - shown < (_REDRAWN_EVERY_S if console().is_terminal else _LINE_EVERY_S) and images < total:
            return
        shown, seconds = now, max(now - started, 1e-3)
        speed = f"{worked / seconds:,.0f} images/s  {num_bytes / 2**20 / seconds:,.1f} MiB/s"
        if console().is_terminal:
            progress.update(task, completed=images, now=speed, refresh=True)
        else:
            eta = timedelta(seconds=round(seconds / max(worked, 1) * (total - images)))
            console().print(f"{title}: {images:,}/{total:,} images  {speed}  ETA {eta}", markup=False)

    if console().is_terminal:
        progress.start()
    try:
        yield report
    finally:
        if console().is_terminal:
            progress.stop()


def line(text: str) -> None:
    """Print a line."""
    console().print(text, markup=False)


def pairs(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Print a plan: a name and what it is, a row each."""
    console().print(title, markup=False)
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        console().print(f"  {name:<{width}}  {text}", markup=False)


def result(run: RunResult) -> None:
    """Print the closing table of a run."""
    is_text = run.science["data"]["name"] == "text"
    counted, unit = ("bytes", "windows") if is_text else ("images", "images")
    rows = [("status", run.status + (f": {run.message}" if run.message else ""))]
    if run.top1 is not None:
        if is_text:
            rows.append(("loss", f"{run.val_loss:.4f} nats a byte"))
        rows.append(("top-1 / top-5", f"{run.top1:.2f} / {run.top5:.2f} % of {run.num_val:,} {counted}"))
        rows.append(("best top-1", f"{run.best_top1:.2f} % in epoch {run.best_epoch}"))
    if run.ema_top1 is not None:
        rows.append(("EMA top-1 / top-5", f"{run.ema_top1:.2f} / {run.ema_top5:.2f} %"))
    if run.images_per_s is not None:
        rows.append(("speed", f"{run.images_per_s:,.0f} {unit}/s, step {run.step_ms_p50:.1f} ms (p95 "
                     f"{run.step_ms_p95:.1f}), data wait {100 * (run.data_wait_frac or 0):.0f} %"))  # fmt: skip
        rows.append(("measured on", f"{run.device}, {run.ranks} rank(s); norm: {run.norm_impl}"))
        rows.append(("peak memory", f"{run.peak_mem_gib:.2f} GiB"))
    if run.train_seconds:
        rows.append(("training time", str(timedelta(seconds=round(run.train_seconds)))))
    pairs(f"{run.model} {run.norm} seed {run.seed}", rows)


def calibration(found: Mapping[str, Any]) -> None:
    """Print how near each point-wise layer comes to the norm that it replaces, and what that does to the accuracy."""
    sites = found["sites"].items()
    rows = [(name, *(f"{site[key]:.3f}" for key in ("alpha", "error_before", "error"))) for name, site in sites]
    top1 = "not measured, because the classifier is new"
    if found["top1_trained"] is not None:
        top1 = ", ".join(f"{found[f'top1_{state}']:.2f} % {state}" for state in ("trained", "converted", "calibrated"))
    columns = ("site", "alpha", "converted", "calibrated")
    title = "calibration: relative RMS error at each site"
    table(title, columns, rows, [f"top-1 before training: {top1}"])


def accuracies(title: str, rows: Mapping[str, Accuracy], counted: str = "images") -> None:
    """Print exact accuracies, a row for each set of weights."""
    table = Table("weights", "top-1 %", "top-5 %", "loss", f"correct / {counted}", title=title, title_justify="left")
    for name, found in rows.items():
        count = f"{found.top1_count:,} / {found.num:,}"
        table.add_row(name, f"{found.top1:.3f}", f"{found.top5:.3f}", f"{found.loss:.4f}", count)
    console().print(table)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], notes: Sequence[str]) -> None:
    """Print a table and the notes below it."""
    drawn = Table(title=Text(title), title_justify="left")
    for name in columns:
        drawn.add_column(Text(name), overflow="fold")  # what is cut off may be what two rows differ in
    for row in rows:
        drawn.add_row(*(Text(str(cell)) for cell in row))  # norm.exclude=[a] is no markup
    console().print(drawn)
    for note in notes:
        console().print(note, markup=False)
