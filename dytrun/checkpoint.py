"""Checkpoints: written whole or not at all, verified on the way back.

A checkpoint is a directory `step-00001234/` of safetensors files, `state.json` and `manifest.json` (SHA-256 and size
of each file). It is written under a temporary name, synced, renamed. No pickle anywhere: neither torch.load nor
safetensors notices a flipped bit in a tensor, so the manifest is what makes it trustworthy.

`LATEST` and `BEST` name two of them for people and scripts. Nothing here depends on them: what is the best one stands
in the newest one too, and a name that a kill, a full disk or a person has spoilt is written again.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dytrun.errors import UserError, first_line

Tensors = Mapping[str, Tensor]

# The header of a file, its manifest and its blocks on the disk, for all parts of a checkpoint together.
_EXTRA_BYTES = 1 << 20


class NotSaved(Exception):
    """The disk did not take a checkpoint: full, a quota, an error. Those before it are as they were."""


class Checkpoint(NamedTuple):
    """What was saved."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    """Part (model, ema, optimizer) → name → tensor, on the CPU."""
    state: dict[str, Any]
    """Plain JSON values."""


class Store:
    """The checkpoints of one run. Only the process that owns the run's directory may save or load."""

    def __init__(self, directory: Path, keep: int):
        self.directory = directory
        self.keep = keep

    def save(self, step: int, tensors: Mapping[str, Tensors], state: Mapping[str, Any], is_best: bool) -> int:
        """Write a checkpoint, name it, and remove those that are neither among the newest nor the best.

        Args:
            step: its number; one that is there of the same step is replaced.
            tensors: by part.
            state: plain JSON values; `best_step` is that of the best checkpoint.
            is_best: whether it is this one.

        Returns:
            Bytes written.

        Raises:
            NotSaved: the checkpoints are as they were.
        """
        partial = self._partial(step)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._clean()
            partial.mkdir()
            written = _write(partial, tensors, state)
            self._replace(step, partial)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise NotSaved(_reason(error)) from error
        best = step if is_best else self._best(state)
        self._name(step, best)
        self._forget(best)
        return written

    def load(self) -> tuple[Checkpoint | None, list[str]]:
        """Return the newest checkpoint that verifies, None where there is none at all, and what is to be said of it.

        A damaged one is renamed to `*.corrupt` and the one before it taken. What a save that was killed left behind
        is removed.

        Raises:
            UserError: there are checkpoints, and none of them is whole.
        """
        self._clean()
        said = []
        steps = sorted(self._steps(), reverse=True)
        for step in steps:
            found = self._read(step)
            if isinstance(found, Checkpoint):
                if said:
                    said.append(f"going on from step {step}, the newest checkpoint that is whole")
                best = self._best(found.state)
                self._name(step, best)
                self._forget(best)  # a run that is killed after each save would pile them up
                return found, said
            aside = self._path(step).with_suffix(".corrupt")
            shutil.rmtree(aside, ignore_errors=True)
            self._path(step).rename(aside)
            said.append(f"checkpoint of step {step}: {found}; it was put aside as {aside}")
        if steps or list(self.directory.glob("*.corrupt")):
            raise UserError(*said, f"{self.directory}: no checkpoint there is whole; remove the run's directory to "
                            "train from the start")  # fmt: skip
        return None, said

    def look_up(self, name: str | int) -> Checkpoint:
        """Return the newest checkpoint (`LATEST`), the best one (`BEST`) or that of a step, and touch nothing.

        Raises:
            UserError: there is none, or it is damaged.
        """
        step = self.newest_step
        if name == "BEST" and step is not None:
            step = self._best({} if self._fault(step) else self._state(step))
        if step is None:
            raise UserError(f"{self.directory}: no {name} checkpoint there; train the run first")
        if isinstance(name, int) and (step := name) not in self._steps():
            there = ", ".join(map(str, sorted(self._steps())))
            raise UserError(f"{self.directory}: no checkpoint of step {name} there; there are those of {there}")
        found = self._read(step)
        if isinstance(found, str):
            raise UserError(f"{self._path(step)}: damaged ({found}); train the run again")
        return found

    @property
    def newest_step(self) -> int | None:
        """Step of the newest checkpoint, unverified."""
        return max(self._steps(), default=None)

    def check_room(self, tensors: Mapping[str, Tensors]) -> None:
        """Check before the first step that the disk takes the checkpoints of a run, and lets itself be written.

        Args:
            tensors: as they will be saved.

        Raises:
            UserError: says how much is missing.
        """
        size = _EXTRA_BYTES + sum(value.nbytes for part in tensors.values() for value in part.values())
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            probe = self.directory / ".probe.partial"
            try:
                probe.write_text("written to see whether it can be")
                _sync(probe)
            finally:
                probe.unlink(missing_ok=True)
            free = shutil.disk_usage(self.directory).free
        except OSError as error:
            raise UserError(
                f"runs_dir: {self.directory} cannot be written ({_reason(error)}); choose another"
            ) from None
        # What was put aside stays for a while, and makes no room.
        here = sum(file.stat().st_size for file in self.directory.glob("step-*[0-9]/*"))
        # The newest ones, the best, and the one that is being written.
        needed = (self.keep + 2) * size - here
        if free < needed:
            raise UserError(
                f"runs_dir: {free / 2**20:,.0f} MiB are free at {self.directory}, and this run's checkpoints take up "
                f"to {needed / 2**20:,.0f} MiB ({self.keep + 2} of {size / 2**20:,.0f} MiB); make room, or choose "
                "another"
            )

    def _read(self, step: int) -> Checkpoint | str:
        """Read a checkpoint, or say what is wrong with it."""
        if (wrong := self._fault(step)) is not None:
            return wrong
        try:
            tensors = {file.stem: load_file(file) for file in sorted(self._place(step).glob("*.safetensors"))}
            return Checkpoint(step, tensors, self._state(step))
        except (OSError, ValueError, SafetensorError) as error:
            return f"it cannot be read ({first_line(error)})"

    def _fault(self, step: int) -> str | None:
        """Say what is wrong with the files of a checkpoint; None if they are as its manifest says."""
        path = self._place(step)
        try:
            manifest = json.loads((path / "manifest.json").read_text())
            missing = {file.name for file in path.iterdir()} - {"manifest.json"} ^ manifest.keys()
            if missing or not {"state.json", "model.safetensors"} <= manifest.keys():
                return f"its manifest does not fit its files ({', '.join(sorted(missing)) or 'no model'})"
            for name, entry in manifest.items():
                if (path / name).stat().st_size != entry["bytes"]:
                    return f"{name} has {(path / name).stat().st_size} bytes instead of {entry['bytes']}"
                if _sha256(path / name) != entry["sha256"]:
                    return f"{name} does not have its SHA-256"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return f"its manifest cannot be read ({first_line(error)})"
        return None

    def _replace(self, step: int, partial: Path) -> None:
        """Rename a whole checkpoint into place; one of the same step is there until then, and found after a kill."""
        final, aside = self._path(step), self._aside(step)
        if final.exists():
            final.rename(aside)
        try:
            partial.rename(final)
        except OSError:
            if aside.exists():
                aside.rename(final)
            raise
        _sync(self.directory)
        shutil.rmtree(aside, ignore_errors=True)

    def _clean(self) -> None:
        """Remove what a save that was killed or has failed left behind."""
        for aside in self.directory.glob(".step-*.old"):
            final = self.directory / aside.name.removeprefix(".").removesuffix(".old")
            if final.exists():
                shutil.rmtree(aside, ignore_errors=True)
            else:
                aside.rename(final)  # killed between two renames
        for partial in self.directory.glob(".*.partial"):
            if partial.is_dir():
                shutil.rmtree(partial, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    partial.unlink()

    def _forget(self, best: int | None) -> None:
        newest = sorted(self._steps())[-self.keep :]
        for step in self._steps() - {*newest, best, self._named("BEST")}:
            # Renamed first, so that one whose removal is cut short is no checkpoint any more.
            with contextlib.suppress(OSError):
                shutil.rmtree(self._path(step).rename(self._partial(step)), ignore_errors=True)
        for aside in self.directory.glob("*.corrupt"):
            if len(newest) == self.keep and int(aside.stem.removeprefix("step-")) < newest[0]:
                shutil.rmtree(aside, ignore_errors=True)

    def _steps(self) -> set[int]:
        """Steps of all checkpoints, that too which a kill has left half-way to being replaced."""
        names = (re.fullmatch(r"step-(\d+)|\.step-(\d+)\.old", path.name) for path in self.directory.glob("*step-*"))
        return {int(match[1] or match[2]) for match in names if match}

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def _partial(self, step: int) -> Path:
        return self.directory / f".step-{step:08d}.partial"

    def _aside(self, step: int) -> Path:
        return self.directory / f".step-{step:08d}.old"

    def _place(self, step: int) -> Path:
        """Where a checkpoint lies now."""
        return self._path(step) if self._path(step).exists() else self._aside(step)

    def _name(self, newest: int, best: int | None) -> None:
        """Write into LATEST and BEST what they do not say already; what a full disk does not take waits."""
        for name, step in (("LATEST", newest), ("BEST", best)):
            with contextlib.suppress(OSError):
                if step is None:
                    (self.directory / name).unlink(missing_ok=True)
                elif self._named(name) != step:
                    partial = self.directory / f".{name}.partial"
                    partial.write_text(f"{step}\n")
                    _sync(partial)
                    partial.replace(self.directory / name)
                    _sync(self.directory)

    def _named(self, name: str) -> int | None:
        try:
            return int((self.directory / name).read_text())
        except (OSError, ValueError):
            return None

    def _best(self, state: Mapping[str, Any]) -> int | None:
        """Step of the best checkpoint that there is: as the newest one's state has it, else as BEST names it."""
        known = state.get("best_step"), self._named("BEST")
        return next((step for step in known if step in self._steps()), None)

    def _state(self, step: int) -> dict[str, Any]:
        return json.loads((self._place(step) / "state.json").read_text())


def _write(folder: Path, tensors: Mapping[str, Tensors], state: Mapping[str, Any]) -> int:
    """Write the files of a checkpoint and its manifest, synced; return their bytes."""
    for part, values in tensors.items():
        file = folder / f"{part}.safetensors"
        whole = {name: value.detach().contiguous() for name, value in values.items()}
        save_file(whole, file)
        if file.stat().st_size < sum(value.nbytes for value in whole.values()):
            raise OSError(errno.EIO, f"{file.name} came out short")
    (folder / "state.json").write_text(json.dumps(dict(state)))
    files = sorted(folder.iterdir())
    mode = (folder / "state.json").stat().st_mode & 0o777
    for file in files:
        file.chmod(mode)  # safetensors lets nobody else read its files, whatever the umask says
    manifest = {file.name: {"sha256": _sha256(file), "bytes": file.stat().st_size} for file in files}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for file in [*files, folder / "manifest.json", folder]:
        _sync(file)
    return sum(entry["bytes"] for entry in manifest.values())


def _reason(error: Exception) -> str:
    code = error.errno if isinstance(error, OSError) else None
    if said := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors' way of telling it
        code = int(said[1])
    return first_line(error) if code is None else os.strerror(code)


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
