"""Records → metrics.jsonl and Weights & Biases; the only file that imports wandb.

metrics.jsonl is the truth and W&B a view of it: no key, no network or a slow server never stops a run.
"""

import json
import netrc
import os
import secrets
import socket
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from dytrun.config import RunConfig, TrackingConfig
from dytrun.errors import UserError
from dytrun.records import AXES, Record, RunResult, to_json_line, whole_lines

# Seconds that a run may wait for W&B before it goes on without.
_PROBE_TIMEOUT_S = 2.0
_INIT_TIMEOUT_S = 15.0
_FINISH_TIMEOUT_S = 60.0
_BETTER = {"val/top1": "max", "val/top5": "max", "ema/top1": "max", "ema/top5": "max", "val/loss": "min"}


class Tracker:
    """Writes the records of one run; used on one rank only."""

    def __init__(self, config: RunConfig, run_dir: Path, first_step: int):
        """Open the run's files for records after `first_step`; later ones of an interrupted try are dropped.

        Raises:
            UserError: `tracking.mode=online` and W&B cannot be reached.
        """
        self.notes: list[str] = []
        """What a person should know, a line each."""
        self._path = run_dir / "metrics.jsonl"
        kept = [line for line in whole_lines(self._path) if json.loads(line)["step"] <= first_step]
        partial = self._path.with_name(".metrics.jsonl.partial")
        partial.write_text("".join(f"{line}\n" for line in kept))
        partial.replace(self._path)
        self._file = self._path.open("a")
        self._run = self._start_wandb(config, run_dir)

    def log(self, record: Record) -> None:
        """Append a record to metrics.jsonl, flushed, and hand it to W&B, which queues it."""
        self._file.write(to_json_line(record) + "\n")
        self._file.flush()
        if self._run is not None:
            self._run.log({axis: getattr(record, axis) for axis in AXES} | record.metrics())

    def finish(self, result: RunResult | None) -> None:
        """Close the files; W&B gets the result as its summary, and a minute to upload what is left."""
        self._file.close()
        if self._run is None:
            return
        if result is not None:
            names = ("status", "top1", "top5", "ema_top1", "ema_top5", "best_top1", "best_epoch", "images_per_s",
                     "step_ms_p50", "step_ms_p95", "data_wait_frac", "peak_mem_gib", "num_params",
                     "num_norm_sites", "norm_impl", "device")  # fmt: skip
            self._run.summary.update({name: getattr(result, name) for name in names})
        self._run.finish(exit_code=0 if result is not None and result.status == "finished" else 1)

    def _start_wandb(self, config: RunConfig, run_dir: Path) -> Any:
        mode, why = choose_mode(config.tracking)
        if mode == "off":
            return None
        import wandb  # a second of imports that a run without W&B need not pay

        run_id = _run_id(run_dir)
        try:
            run = _init(wandb, config, run_dir, run_id, mode)
        except Exception as error:  # wandb raises CommError, UsageError, and what its service process died of
            if config.tracking.mode == "online":
                raise UserError(f"tracking.mode: W&B cannot be reached ({error}); say tracking.mode=auto") from error
            # W&B's service still holds the id of the try that failed, and gives it to nobody else.
            run_id = _run_id(run_dir, is_new=True)
            mode, why = "offline", f"W&B did not answer ({str(error).splitlines()[0]})"
            run = _init(wandb, config, run_dir, run_id, mode)
        if mode == "offline":
            folder = Path(run.dir).parent
            self.notes.append(f"W&B offline: {why}. See it: wandb leet {folder}  Upload it: wandb sync {folder}")
        else:
            self.notes.append(f"W&B: {run.url}")
        for axis in AXES:
            run.define_metric(axis, hidden=True)
        run.define_metric("*", step_metric="step")
        for name, summary in _BETTER.items():
            run.define_metric(name, step_metric="step", summary=f"{summary},last")
        return run


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


def _run_id(run_dir: Path, is_new: bool = False) -> str:
    """Return the run's W&B id, made at its first start, so that a resumed run goes on in the same W&B run."""
    path = run_dir / "wandb" / "run_id"
    if is_new or not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(4))
    return path.read_text().strip()
