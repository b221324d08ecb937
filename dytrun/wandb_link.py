"""How a run is opened in Weights & Biases, and what W&B has of it already; with wandb_log the only file that
imports wandb.

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
import http.client
import json
import netrc
import os
import secrets
import shlex
import shutil
import signal
import ssl
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

from dytrun.config import RunConfig, TrackingConfig
from dytrun.errors import UserError, first_line
from dytrun.records import AXES, RunResult, Table, write_json
from dytrun.wandb_log import log_of, rows_in

_PROBE_TIMEOUT_S = 2.0
_INIT_TIMEOUT_S = 10.0
_FINISH_TIMEOUT_S = 60.0
_FLUSH_S = 5.0
_SUMMARY = (
    "status", "top1", "top5", "ema_top1", "ema_top5", "best_top1", "best_epoch", "images_per_s", "step_ms_p50",
    "step_ms_p95", "data_wait_frac", "peak_mem_gib", "num_params", "num_norm_sites", "norm_impl", "device",
)  # fmt: skip
_BETTER = {"val/top1": "max", "val/top5": "max", "ema/top1": "max", "ema/top5": "max", "val/loss": "min"}


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

    def log(self, number: int, values: dict[str, float]) -> None:
        """Hand record `number` to W&B, unless W&B has it."""
        if number >= self.known_rows:
            self.run.log(values, step=number)
            self.known_rows = number + 1

    def close(self, result: RunResult | None, in_haste: bool) -> None:
        """Finish the run; W&B gets the result as its summary.

        Raises:
            TimeoutError: the server did not take all within a minute.
            OSError: the offline part is not whole, as when the disk was full.
        """
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


def choose_mode(tracking: TrackingConfig) -> tuple[str, str]:
    """Return (online, offline or off; why): online needs a key and a server that answers within two seconds.

    The environment's WANDB_MODE decides where `tracking.mode=auto`.
    """
    if tracking.mode != "auto":
        return tracking.mode, f"tracking.mode={tracking.mode}"
    wanted = os.environ.get("WANDB_MODE")
    if wanted in ("online", "offline", "disabled"):
        return ("off" if wanted == "disabled" else wanted), f"WANDB_MODE={wanted}"
    wandb = _library()
    settings = wandb.setup().settings
    host = urlsplit(settings.base_url).hostname or ""
    if not _has_key(host, settings.api_key):
        return "offline", "no API key (wandb login)"
    silence = _silence(settings.base_url)
    return ("offline", f"{host} is out of reach ({silence})") if silence else ("online", "")


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
    if mode == "online":
        return Link(run, known, f"W&B: {run.url}", state, run_id, None)
    folder = Path(run.dir).parent
    quoted = shlex.quote(str(folder))
    note = f"W&B offline: {why}. See it: wandb leet {quoted}  Upload it: wandb sync {quoted}"
    return Link(run, known, note, state, run_id, log_of(folder, run.id))


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
    wandb = _library()
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
            settings=_settings(wandb),
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


def abandon(at_once: bool) -> None:
    """Give up W&B's service process and everything that it still has to do; `at_once` without asking it."""
    if at_once:
        for pid in _service_processes():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
    import wandb

    # Else wandb's own exit hook waits for a process that may never be done. It exits with the service's code.
    with contextlib.suppress(Exception, SystemExit):
        wandb.teardown()


def _library() -> Any:
    """Import wandb: a second that a run without W&B need not pay."""
    # Its reports of itself go to the same server, and hold up the end of the process if that is dead.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    wandb.setup(wandb.Settings(silent=True))  # or it tells standard error where it has found a key
    return wandb


def _init(config: RunConfig, run_dir: Path, run_id: str, mode: str) -> Any:
    tracking, wandb = config.tracking, _library()
    return wandb.init(
        project=tracking.project,
        entity=tracking.entity,
        group=tracking.group or config.pair_id,
        name=config.run_name,
        id=run_id,
        resume="allow",
        job_type="train",
        tags=[config.model.name, config.norm.name, config.data.name, *tracking.tags],
        dir=str(run_dir),
        mode=mode,
        config=config.science() | {"machine": config.machine.model_dump(mode="json"), "pair_id": config.pair_id},
        settings=_settings(wandb),
    )


def _settings(wandb: Any) -> Any:
    """Nothing of the command line, the environment or the code goes to a server unasked: a key may be in it."""
    return wandb.Settings(
        init_timeout=_INIT_TIMEOUT_S,
        finish_timeout=_FINISH_TIMEOUT_S,
        finish_timeout_raises=True,
        x_disable_meta=True,
        disable_git=True,
        save_code=False,
        console="off",
        silent=True,
    )


def _define_axes(run: Any) -> None:
    for axis in AXES:
        run.define_metric(axis, hidden=True)
    run.define_metric("*", step_metric="step")
    for name, summary in _BETTER.items():
        run.define_metric(name, step_metric="step", summary=f"{summary},last")


def _has_key(host: str, key: str | None) -> bool:
    if key or os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _silence(url: str) -> str:
    """Return why a server does not count as alive, or an empty text; asked by way of the user's proxy, if any.

    A thread asks, because a time-out of urllib is one of each read: a server could send a byte a second.
    """
    found: list[str] = []

    def ask() -> None:
        try:
            urlopen(url, timeout=_PROBE_TIMEOUT_S).close()
            found.append("")
        except HTTPError as error:
            found.append(f"it answers {error.code}" if error.code >= 500 else "")
        except (OSError, ValueError, http.client.HTTPException) as error:
            # Which certificates are good is W&B's business, and it may have been told of others.
            is_tls = isinstance(error, URLError) and isinstance(error.reason, ssl.SSLError)
            found.append("" if is_tls else first_line(error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PROBE_TIMEOUT_S)
    return found[0] if found else f"no answer within {_PROBE_TIMEOUT_S:g} s"


def _read_state(path: Path) -> tuple[str, int | None]:
    """Return the run's W&B id, made at its first start, and how many rows its server has; None is not known."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        values = json.loads(path.read_text())
        return values["id"], values["rows"]
    path.parent.mkdir(parents=True, exist_ok=True)
    run_id = secrets.token_hex(4)
    write_json(path, {"id": run_id, "rows": 0})
    return run_id, 0


def _service_processes() -> Iterator[int]:
    """Return W&B's service among the children of this process."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            head, _, tail = path.read_text().rpartition(")")
            if "(wandb-core" in head and int(tail.split()[1]) == os.getpid():
                yield int(path.parent.name)
