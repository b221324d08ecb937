"""Records → metrics.jsonl and Weights & Biases; the only file that imports wandb.

metrics.jsonl is the truth and W&B a view of it: no key, no network or a slow server never stops a run.
"""

import json
import netrc
import os
import secrets
import shlex
import socket
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from dytrun.config import RunConfig, TrackingConfig
from dytrun.errors import UserError, first_line
from dytrun.records import AXES, Record, RunResult, to_json_line, whole_lines

# Seconds that a run may wait for W&B before it goes on without.
_PROBE_TIMEOUT_S = 2.0
_INIT_TIMEOUT_S = 15.0
_FINISH_TIMEOUT_S = 60.0
_SUMMARY = (
    "status", "top1", "top5", "ema_top1", "ema_top5", "best_top1", "best_epoch", "images_per_s", "step_ms_p50",
    "step_ms_p95", "data_wait_frac", "peak_mem_gib", "num_params", "num_norm_sites", "norm_impl", "device",
)  # fmt: skip
_BETTER = {"val/top1": "max", "val/top5": "max", "ema/top1": "max", "ema/top5": "max", "val/loss": "min"}


class Tracker:
    """Writes the records of one run; used on one rank only.

    W&B may fail at any call (its service process dies, its server does): it is then left, with one line, and the
    run goes on.
    """

    def __init__(self, config: RunConfig, run_dir: Path, first_step: int, say: Callable[[str], None]):
        """Open the run's files for records after `first_step`; later ones of an interrupted try are dropped.

        `say` gets what a person should know, a line each.

        Raises:
            UserError: `tracking.mode=online` and W&B cannot be reached.
        """
        self._say = say
        self._path = run_dir / "metrics.jsonl"
        kept = [line for line in whole_lines(self._path) if json.loads(line)["step"] <= first_step]
        partial = self._path.with_name(".metrics.jsonl.partial")
        partial.write_text("".join(f"{line}\n" for line in kept))
        partial.replace(self._path)
        self._file = self._path.open("a")
        self._run: Any = None
        self._attempt(lambda: self._start_wandb(config, run_dir))

    def log(self, record: Record) -> None:
        """Append a record to metrics.jsonl, flushed, and hand it to W&B, which queues it."""
        self._file.write(to_json_line(record) + "\n")
        self._file.flush()
        if self._run is not None:
            values = {axis: getattr(record, axis) for axis in AXES} | record.metrics()
            self._attempt(lambda: self._run.log(values))

    def finish(self, result: RunResult | None) -> None:
        """Close the files; W&B gets the result as its summary, and a minute to upload what is left."""
        self._file.close()
        if self._run is None:
            return
        if result is not None:
            values = {name: getattr(result, name) for name in _SUMMARY}
            self._attempt(lambda: self._run.summary.update(values))
        code = 0 if result is not None and result.status == "finished" else 1
        self._attempt(lambda: self._run.finish(exit_code=code))

    def _attempt(self, call: Callable[[], None]) -> None:
        try:
            if self._run is not None or not self._file.closed:
                call()
        except UserError:
            raise
        except Exception as error:
            self._run = None
            self._say(f"W&B is left out from here ({first_line(error)}); metrics.jsonl has everything")

    def _start_wandb(self, config: RunConfig, run_dir: Path) -> None:
        mode, why = choose_mode(config.tracking)
        if mode == "off":
            return
        import wandb  # a second of imports that a run without W&B need not pay

        try:
            run = _init(wandb, config, run_dir, _run_id(run_dir), mode)
        except Exception as error:  # wandb raises CommError, UsageError, and what its service process died of
            if config.tracking.mode == "online":
                raise UserError(
                    f"tracking.mode: W&B cannot be reached ({first_line(error)}); say tracking.mode=auto"
                ) from error
            mode, why = "offline", f"W&B did not answer ({first_line(error)})"
            # W&B's service still holds the id of the try that failed, and gives it to nobody else.
            run = _init(wandb, config, run_dir, secrets.token_hex(4), mode)
        for axis in AXES:
            run.define_metric(axis, hidden=True)
        run.define_metric("*", step_metric="step")
        for name, summary in _BETTER.items():
            run.define_metric(name, step_metric="step", summary=f"{summary},last")
        self._run = run
        if mode == "offline":
            folder = shlex.quote(str(Path(run.dir).parent))
            self._say(f"W&B offline: {why}. See it: wandb leet {folder}  Upload it: wandb sync {folder}")
        else:
            self._say(f"W&B: {run.url}")


def choose_mode(tracking: TrackingConfig) -> tuple[str, str]:
    """Return (online, offline or off; why): online needs a key and a server that answers within two seconds.

    The environment's WANDB_MODE decides where `tracking.mode=auto`.
    """
    if tracking.mode != "auto":
        return tracking.mode, f"tracking.mode={tracking.mode}"
    wanted = os.environ.get("WANDB_MODE")
    if wanted in ("online", "offline", "disabled"):
        return ("off" if wanted == "disabled" else wanted), f"WANDB_MODE={wanted}"
    import wandb

    url = urlsplit(wandb.setup().settings.base_url)
    host, port = url.hostname or "", url.port or (443 if url.scheme == "https" else 80)
    if not _has_key(host, wandb.setup().settings.api_key):
        return "offline", "no API key (wandb login)"
    if url.scheme in getproxies():
        return "online", ""  # the proxy knows the way; if it does not, init gives up soon enough
    try:
        socket.create_connection((host, port), timeout=_PROBE_TIMEOUT_S).close()
    except OSError as error:
        return "offline", f"{host} is out of reach ({error})"
    return "online", ""


def _has_key(host: str, key: str | None) -> bool:
    if key or os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _init(wandb: ModuleType, config: RunConfig, run_dir: Path, run_id: str, mode: str) -> Any:
    tracking = config.tracking
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
        # Nothing of the command line, the environment or the code goes to a server unasked: a key may be in it.
        settings=wandb.Settings(
            init_timeout=_INIT_TIMEOUT_S,
            finish_timeout=_FINISH_TIMEOUT_S,
            x_disable_meta=True,
            disable_git=True,
            save_code=False,
            console="off",
            silent=True,
        ),
    )


def _run_id(run_dir: Path) -> str:
    """Return the run's W&B id, made at its first start, so that a resumed run goes on in the same W&B run."""
    path = run_dir / "wandb" / "run_id"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(4))
    return path.read_text().strip()
