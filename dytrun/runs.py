"""A directory of runs → what each of them left: result, records, configuration, command, hits image by image."""

import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool
from pydantic import TypeAdapter, ValidationError

from dytrun.errors import UserError, first_line
from dytrun.records import RunResult, whole_lines

_RESULT = TypeAdapter(RunResult)
# Any of these in a directory without config.json says that a run was there.
_TRACES = ("result.json", "metrics.jsonl", "starts.jsonl", "correct.npz")
# More than NumPy writes before an array's own bytes.
_HEADER_BYTES = 4096
# What NumPy and zipfile raise for damaged files; a flipped bit can make one look encrypted (RuntimeError), or
# compressed in a way that nobody knows (NotImplementedError, which is one).
_UNREADABLE = (
    OSError, ValueError, TypeError, KeyError, EOFError, MemoryError, OverflowError, RuntimeError, zipfile.BadZipFile,
    zlib.error,
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One directory of runs/."""

    name: str
    result: RunResult
    records: list[dict[str, Any]]
    """Lines of metrics.jsonl."""
    config: Mapping[str, Any]
    """config.json: the whole configuration."""
    command: str | None
    """The last one typed for this run, where it is known."""
    started: str | None
    """When that was, ISO 8601."""
    hits: Bool[np.ndarray, " images"] | None
    """Top-1 hit or miss of each validation image, in the order of the split; None without a correct.npz that fits."""


def load_runs(directory: Path) -> tuple[list[Run], list[str]]:
    """Read every run that has a result; say what was left out, or of what a part is missing, and why.

    Raises:
        UserError: the directory is missing, or none of its runs has a result.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no directory; give the one that holds the runs: dytrun report [DIR]")
    if (directory / "config.json").is_file():
        raise UserError(f"{directory}: a run, not a directory of runs; say dytrun report {directory.parent}")
    runs: list[Run] = []
    problems: list[str] = []
    unkept: list[str] = []
    for path in sorted(path for path in directory.iterdir() if path.is_dir() and not path.name.startswith(".")):
        if not (path / "config.json").is_file():
            if any((path / name).exists() for name in _TRACES):
                problems.append(f"{path.name}: a run without its config.json; train it again")
            continue
        run = _load(path, problems, unkept)
        twin = next((other.name for other in runs if run and other.result.science_id == run.result.science_id), None)
        if twin:
            problems.append(f"{path.name}: the same run as {twin}, and counted once; remove one of them")
        elif run:
            runs.append(run)
    if unkept:
        problems.append(f"image by image, for want of a correct.npz: {', '.join(unkept)}")
    if not runs:
        more = f"; {problems[0]}" if problems else ""
        raise UserError(f"{directory}: no finished run there{more}; give a directory of runs, or train one: "
                        "dytrun train experiment=quickstart")  # fmt: skip
    return runs, problems


def _load(path: Path, problems: list[str], unkept: list[str]) -> Run | None:
    """Read one run; add to `problems` what is wrong with it, and to `unkept` its name if it has no correct.npz."""
    name = path.name
    try:
        config = json.loads((path / "config.json").read_text())
        if not isinstance(config, dict) or not {"model", "norm", "data"} <= config.keys():
            raise ValueError("config.json is no configuration")
        result = _RESULT.validate_python(json.loads((path / "result.json").read_text()))
        parts = [result.science.get(key) for key in ("norm", "data")]
        if not all(isinstance(part, dict) for part in parts) or "name" not in result.science["norm"]:
            raise ValueError("result.json lacks the run's science")
        if unfit := [key for key, value in vars(result).items() if isinstance(value, float) and not isfinite(value)]:
            raise ValueError(f"result.json, {unfit[0]}: no finite number")
        records = [json.loads(line) for line in whole_lines(path / "metrics.jsonl")]
        if not all(isinstance(line, dict) for line in records):
            raise ValueError("metrics.jsonl has lines that are no records")
    except FileNotFoundError:
        problems.append(f"{name}: no result yet (running, or stopped: type its command again)")
        return None
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{name}: its files cannot be read ({_why(error)}); train it again")
        return None
    hits = None
    if result.status == "finished":
        if not records:
            problems.append(f"{name}: its curves, for want of a metrics.jsonl")
        if not (path / "correct.npz").is_file():
            unkept += [name] * (result.science["data"].get("name") != "text")  # which has none
        else:
            try:
                hits = _hits(path / "correct.npz", result)
            except ValueError as error:
                problems.append(f"{name}: correct.npz {error}; so not image by image; train it again")
    return Run(name, result, records, config, _of_last_start(path, "command"), _of_last_start(path, "started"), hits)


def _hits(path: Path, result: RunResult) -> Bool[np.ndarray, " images"]:
    """Read correct.npz and hold it against result.json.

    Raises:
        ValueError: it cannot be read, or says something else.
    """
    try:
        with zipfile.ZipFile(path) as parts:
            largest = max((part.file_size for part in parts.infolist()), default=0)
        if largest > _HEADER_BYTES + -(-(result.num_val or 0) // 8):
            raise ValueError(f"{largest:,} bytes are too many for {result.num_val} images")
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            num, packed = int(arrays["num"]), arrays["correct"]
            ema = arrays.get("ema_correct")
    except _UNREADABLE as error:
        raise ValueError(f"cannot be read ({first_line(error)})") from None
    if num != result.num_val or num < 1:
        raise ValueError(f"is of {num:,} images, result.json of {result.num_val}")
    for bits, top1, what in ((packed, result.top1, "top-1"), (ema, result.ema_top1, "the EMA weights' top-1")):
        if bits is None:
            continue
        if bits.dtype != np.uint8 or bits.shape != (-(-num // 8),):
            raise ValueError(f"has not one bit for each of {num:,} images")
        count = int(np.unpackbits(bits, count=num).sum())
        if top1 != 100 * count / num:
            raise ValueError(f"counts {count:,} hits, {100 * count / num:g} %, where result.json says {what} {top1} %")
    return np.unpackbits(packed, count=num).astype(bool)


def _of_last_start(path: Path, key: str) -> str | None:
    """Return what the last line of starts.jsonl that has a key says; None where it is not known."""
    try:
        starts = [json.loads(line) for line in whole_lines(path / "starts.jsonl")]
    except (OSError, ValueError):
        return None
    known = [start[key] for start in starts if isinstance(start, dict) and start.get(key)]
    return str(known[-1]) if known else None


def _why(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"result.json, {'.'.join(map(str, first['loc']))}: {first['msg']}"
    return first_line(error)
