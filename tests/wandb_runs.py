"""What tests look at of runs in W&B: offline parts, rows that a server has, records as `wandb leet` shows them."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wandb_server import history_of

from dytrun.wandb_log import _entries

KEY = "c4a7" * 10


def wandb_id(run_dir: Path) -> str:
    return json.loads((run_dir / "wandb" / "rows.json").read_text())["id"]


def parts(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "wandb").glob("offline-run-*"))


def rows_of(part: Path) -> list[tuple[int, int]]:
    """Return (W&B's history step, our step) of each row in an offline part, as wandb's own messages tell them."""
    from wandb.proto import wandb_internal_pb2

    (log,) = part.glob("*.wandb")
    rows = []
    for data in _entries(log.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            rows.append((record.history.step.num, values["step"]))
    return rows


def served(folder: Path, run_id: str) -> list[tuple[int, int]]:
    """Return (W&B's history step, our step) of each row as a server has them."""
    return [(row["_step"], row["step"]) for row in history_of(folder, run_id)]


def numbered(count: int) -> list[tuple[int, int]]:
    """What W&B shall have of records for the steps 1 to `count`: each once, in order."""
    return [(number, number + 1) for number in range(count)]


def sync(what: Sequence[str], address: str, tmp_path: Path) -> None:
    """Upload runs as a person would: `wandb sync` and its arguments."""
    subprocess.run(
        [sys.executable, "-m", "wandb", "sync", *what], check=True, capture_output=True,
        env=os.environ | {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": address, "HOME": str(tmp_path)},
    )  # fmt: skip


def leet(part: Path) -> list[dict[str, Any]]:
    """Return the records of an offline part as W&B's own terminal viewer reads them."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(part)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [json.loads(line) for line in done.stdout.splitlines()]
