"""How a run is opened in Weights & Biases, what it is called there, and what W&B has of it already.

Record n of metrics.jsonl is W&B's history step n. Who has which rows:

- a server says how many rows it has whenever a run is resumed there;
- an offline part (a folder offline-run-*) counts on the server only once `wandb sync` has marked it as synced. One
  that is not is superseded by the next part, which has all its records again, and is removed: `wandb sync` numbers
  on from the rows that the server has, so that of two parts with the same records it would make twice as many;
- wandb/rows.json keeps the run's id and how many rows of it were on the server when it was last left. A process that
  was killed while online leaves that open. If the server cannot be asked at the next start either, the offline part
  gets an id of its own and all records, and the first id goes on when the server is back.
"""

import contextlib
import json
import math
import secrets
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dytrun.config import RunConfig, TrackingConfig
from dytrun.errors import UserError, first_line
from dytrun.labels import arm_label, pair_label, run_label
from dytrun.records import AXES, RunResult, Table, write_json
from dytrun.site_chart import PREFIX, SiteChart
from dytrun.wandb_log import log_of, rows_in
from dytrun.wandb_reach import abandon, choose_mode, library, settings

_FLUSH_S = 5.0
_SUMMARY = (
    "status", "top1", "top5", "ema_top1", "ema_top5", "best_top1", "best_epoch", "images_per_s", "step_ms_p50",
    "step_ms_p95", "data_wait_frac", "peak_mem_gib", "num_params", "num_norm_sites", "norm_impl", "device",
)  # fmt: skip
_MOST_TAG_CHARS = 64
_CHART = "sites/over steps"
# Shown above a run's notes.
_PINNED = ("arm", "seed", "comparison", "directory")
_BETTER = {"val/top1": max, "val/top5": max, "ema/top1": max, "ema/top5": max, "val/loss": min}


@dataclass
class Link:
    """An open W&B run."""

    run: Any
    known_rows: int
    """How many records W&B has already; it gets the ones after."""
    note: str
    """What a person should know, in a line."""
    state: Path
    run_id: str
    part: Path | None
    """The transaction log of an offline run."""
    chart: SiteChart
    _last: dict[str, float] | None = None
    """The newest record that W&B got here; its row is still open."""
    _hidden: set[str] = field(default_factory=set)
    _best: dict[str, float] = field(default_factory=dict)
    """Of all records. W&B's own summary="max" knows only those since the last start."""
    _told: dict[str, float] = field(default_factory=dict)

    def log(self, number: int, values: dict[str, float]) -> None:
        """Hand record `number` to W&B, unless W&B has it; every record is to pass here, in order."""
        self.chart.add(values)
        for name in _BETTER.keys() & values.keys():
            if math.isfinite(values[name]):
                best = f"best/{name}"
                self._best[best] = _BETTER[name](values[name], self._best.get(best, values[name]))
        if number < self.known_rows:
            return
        for name in values.keys() - self._hidden:
            if name.startswith(PREFIX):
                # A panel each, of some dozens, hides the others. The chart has them all; whoever wants one adds it.
                self.run.define_metric(name, step_metric="step", hidden=True)
                self._hidden.add(name)
        self.run.log(values, step=number)
        self.known_rows, self._last = number + 1, values
        if self._told != self._best:
            self._told = dict(self._best)
            self.run.summary.update(self._told)
        if self.chart.is_due(values):
            self._draw(values)

    def _draw(self, values: dict[str, float]) -> None:
        """Put the chart of all sites into the last record's row, which stays open until the next one comes."""
        from wandb import Plotly

        # It is a file, and a full disk has no room for it; whether there is any for the records is seen at the end.
        with contextlib.suppress(OSError):
            self.run.log({_CHART: Plotly(self.chart.draw(values))}, step=self.known_rows - 1)

    def close(self, result: RunResult | None, in_haste: bool) -> None:
        """Finish the run; W&B gets the result as its summary.

        Raises:
            TimeoutError: the server did not take all within a minute.
            OSError: the offline part is not whole, as when the disk was full.
        """
        if self._last is not None and self.chart.is_stale and not in_haste:
            self._draw(self._last)
        if result is not None:
            self.run.summary.update({name: getattr(result, name) for name in _SUMMARY})
        if in_haste:
            self.run.mark_preempting()  # a run that leaves with a code other than 0 is then "preempted"
        self.run.finish(exit_code=0 if result is not None and result.status == "finished" else 1)
        if self.part is None:
            write_json(self.state, {"id": self.run_id, "rows": self.known_rows})
        elif not in_haste and not self._is_whole(self.part):
            raise OSError(f"not all records could be written to {self.part}")  # of which W&B says nothing

    def _is_whole(self, part: Path) -> bool:
        """Whether W&B's service has written every record; it does so a moment after it says that it is done."""
        until = time.monotonic() + _FLUSH_S
        while rows_in(part) < self.known_rows:
            if time.monotonic() > until:
                return False
            time.sleep(0.05)
        return True


def open_link(config: RunConfig, run_dir: Path) -> Link | None:
    """Open the run in W&B, online or offline; None where W&B is not wanted.

    Raises:
        UserError: `tracking.mode=online` and W&B cannot be reached.
    """
    mode, why = choose_mode(config.tracking)
    if mode == "off":
        return None
    state = run_dir / "wandb" / "rows.json"
    run_id, rows = _read_state(state)
    old_parts = set((run_dir / "wandb").glob("offline-run-*"))
    run, known = None, 0
    if mode == "online":
        try:
            run = _init(config, run_dir, run_id, mode)
            known = run.starting_step
            write_json(state, {"id": run_id, "rows": None})
        except Exception as error:  # wandb raises CommError, UsageError, and what its service process died of
            if config.tracking.mode == "online":
                raise UserError(
                    f"tracking.mode: W&B cannot be reached ({first_line(error)}); say tracking.mode=auto"
                ) from error
            run, mode, why = None, "offline", f"W&B did not answer ({first_line(error)})"
            abandon(at_once=False)  # its service still holds the id of the try that failed
    if run is None:
        offline_id = run_id if rows is not None else f"{run_id}-offline"
        synced = [part for part in old_parts if log_of(part, offline_id, ".synced").is_file()]
        known = max([rows or 0, *(rows_in(log_of(part, offline_id)) for part in synced)])
        run = _init(config, run_dir, offline_id, mode)
    for part in old_parts:
        if not list(part.glob("*.wandb.synced")):
            shutil.rmtree(part, ignore_errors=True)
    _define_axes(run)
    run.pin_config_keys(_PINNED)
    chart = SiteChart(config.epochs)
    if mode == "online":
        return Link(run, known, f"W&B: {run.url}", state, run_id, None, chart)
    folder = Path(run.dir).parent
    quoted = shlex.quote(str(folder))
    note = f"W&B offline: {why}. See it: wandb leet {quoted}  Upload it: wandb sync {quoted}"
    return Link(run, known, note, state, run_id, log_of(folder, run.id), chart)


def log_once(
    tracking: TrackingConfig,
    file: Path,
    job_type: str,
    values: Mapping[str, Any],
    tables: Sequence[Table],
    figures: Mapping[str, Path] | None = None,
) -> None:
    """Give W&B what one command has found as a run of its own, named after the file that it is in.

    Args:
        tracking: mode, project and the like.
        file: where all of it is; W&B's own files go beside it.
        job_type: what W&B calls the kind of run, and its group where the user has named none.
        values: numbers and texts, for W&B's config; lists are left out.
        tables: each a table of W&B's.
        figures: title → PNG file.

    Raises:
        UserError: W&B did not take it; the file is written.
    """
    mode, _ = choose_mode(tracking)
    if mode == "off":
        return
    wandb = library()
    try:
        run = wandb.init(
            project=tracking.project,
            entity=tracking.entity,
            group=tracking.group or job_type,
            name=f"{job_type}-{file.stem}",
            job_type=job_type,
            tags=tracking.tags,
            dir=str(file.parent),
            mode=mode,
            config={name: value for name, value in values.items() if not isinstance(value, list)},
            settings=settings(wandb),
        )
        try:
            for table in tables:
                rows = [list(row) for row in table.rows]
                run.log({table.title: wandb.Table(columns=list(table.columns), data=rows)})
            for title, path in (figures or {}).items():
                run.log({title: wandb.Image(str(path))})
            run.summary["notes"] = [note for table in tables for note in table.notes]
        finally:
            run.finish()
    except Exception as error:  # wandb raises CommError, UsageError, and what its service process died of
        raise UserError(f"tracking.mode: W&B did not take it ({first_line(error)}); it is in {file}") from error


def _init(config: RunConfig, run_dir: Path, run_id: str, mode: str) -> Any:
    tracking, wandb, science, pair_id = config.tracking, library(), config.science(), config.pair_id
    comparison = pair_label(science, pair_id)
    return wandb.init(
        project=tracking.project,
        entity=tracking.entity,
        group=tracking.group or comparison,
        name=run_label(science),
        id=run_id,
        resume="allow",
        job_type="train",
        tags=[config.model.name[:_MOST_TAG_CHARS], config.norm.name, config.data.name, *tracking.tags],
        dir=str(run_dir),
        mode=mode,
        # Nested, so that a column is called as the key is typed: norm.name, norm.alpha_init, model.name, seed.
        config=science
        | {"machine": config.machine.model_dump(mode="json"), "pair_id": pair_id, "comparison": comparison}
        | {"arm": arm_label(science), "directory": config.run_name},
        settings=settings(wandb),
    )


def _define_axes(run: Any) -> None:
    for axis in AXES:
        run.define_metric(axis, hidden=True)
    run.define_metric("*", step_metric="step")


def _read_state(path: Path) -> tuple[str, int | None]:
    """Return the run's W&B id, made at its first start, and how many rows its server has; None is not known."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        values = json.loads(path.read_text())
        return values["id"], values["rows"]
    path.parent.mkdir(parents=True, exist_ok=True)
    run_id = secrets.token_hex(4)
    write_json(path, {"id": run_id, "rows": 0})
    return run_id, 0
