"""Checkpoints: written whole or not at all, verified on the way back.

A checkpoint is a directory `step-00001234/` of safetensors files, `state.json` and `manifest.json` (SHA-256 and size
of each file). It is written under a temporary name, synced, renamed; `LATEST` then names it. No pickle anywhere:
neither torch.load nor safetensors notices a flipped bit in a tensor, so the manifest is what makes it trustworthy.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save_file
from torch import Tensor

from dytrun.errors import UserError

Tensors = Mapping[str, Tensor]


class Checkpoint(NamedTuple):
    """What was saved."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    """Part (model, ema, optimizer) → name → tensor, on the CPU."""
    state: dict[str, Any]
    """Plain JSON values."""


class Store:
    """The checkpoints of one run."""

    def __init__(self, directory: Path, keep: int):
        self.directory = directory
        self.keep = keep

    def save(self, step: int, tensors: Mapping[str, Tensors], state: Mapping[str, Any], is_best: bool) -> None:
        """Write a checkpoint, point to it, and remove those that are neither among the newest nor the best."""
        self.directory.mkdir(parents=True, exist_ok=True)
        final, partial = self._path(step), self.directory / f".step-{step:08d}.partial"
        for old in (partial, final):
            shutil.rmtree(old, ignore_errors=True)
        partial.mkdir()
        for part, values in tensors.items():
            save_file(
                {name: value.detach().contiguous() for name, value in values.items()}, partial / f"{part}.safetensors"
            )
        (partial / "state.json").write_text(json.dumps(dict(state)))
        files = sorted(partial.iterdir())
        manifest = {file.name: {"sha256": _sha256(file), "bytes": file.stat().st_size} for file in files}
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for file in [*files, partial / "manifest.json", partial]:
            _sync(file)
        partial.rename(final)
        self._point("LATEST", step)
        if is_best:
            self._point("BEST", step)
        self._forget()

    def load(self) -> Checkpoint | None:
        """Return the newest checkpoint that verifies; None where there is none at all.

        A damaged one is renamed to `*.corrupt` and the one before it taken.

        Raises:
            UserError: there are checkpoints, and none of them is whole.
        """
        steps = sorted(self._steps(), reverse=True)
        for step in steps:
            if self._verifies(step):
                return self._read(step)
            aside = self._path(step).with_suffix(".corrupt")
            shutil.rmtree(aside, ignore_errors=True)
            self._path(step).rename(aside)
        if steps or list(self.directory.glob("*.corrupt")):
            raise UserError(
                f"{self.directory}: no checkpoint there is whole; remove the run's directory to train from the start"
            )
        return None

    def look_up(self, name: str) -> Checkpoint:
        """Return the checkpoint that `LATEST` or `BEST` points to, and touch nothing.

        Raises:
            UserError: there is none, or it is damaged.
        """
        step = self._pointed(name)
        if step is None or not self._path(step).is_dir():
            raise UserError(f"{self.directory}: no {name} checkpoint there; train the run first")
        if not self._verifies(step):
            raise UserError(f"{self._path(step)}: damaged (its files do not match its manifest); train the run again")
        return self._read(step)

    def _read(self, step: int) -> Checkpoint:
        path = self._path(step)
        tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
        return Checkpoint(step, tensors, json.loads((path / "state.json").read_text()))

    def _verifies(self, step: int) -> bool:
        path = self._path(step)
        try:
            manifest = json.loads((path / "manifest.json").read_text())
            return all(
                (path / name).stat().st_size == entry["bytes"] and _sha256(path / name) == entry["sha256"]
                for name, entry in manifest.items()
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False

    def _forget(self) -> None:
        newest = sorted(self._steps())[-self.keep :]
        for step in self._steps():
            if step not in newest and step != self._pointed("BEST"):
                shutil.rmtree(self._path(step))

    def _steps(self) -> list[int]:
        found = (re.fullmatch(r"step-(\d+)", path.name) for path in self.directory.glob("step-*"))
        return [int(match[1]) for match in found if match]

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def _point(self, name: str, step: int) -> None:
        partial = self.directory / f".{name}.partial"
        partial.write_text(f"{step}\n")
        _sync(partial)
        partial.replace(self.directory / name)
        _sync(self.directory)

    def _pointed(self, name: str) -> int | None:
        try:
            return int((self.directory / name).read_text())
        except (OSError, ValueError):
            return None


def matches_manifest(path: Path) -> bool:
    """Say whether a file is as the manifest beside it says; a file that stands in none is taken as it is."""
    try:
        entry = json.loads((path.parent / "manifest.json").read_text()).get(path.name)
    except (OSError, ValueError, AttributeError):
        return True
    if not isinstance(entry, Mapping) or "sha256" not in entry or not path.is_file():
        return True
    return _sha256(path) == entry["sha256"]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Make sure that a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
