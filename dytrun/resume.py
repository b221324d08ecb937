"""Taking a run up again: the newest whole checkpoint, and whether what comes is what would have come.

The promise: a run that was interrupted after any step ends bit-equal to one that was not, if the data is the same
(else it is refused) and what the bits depend on is the same (else it is said).
"""

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

from dytrun import machine, norm, optim
from dytrun.checkpoint import Checkpoint, Store
from dytrun.compute import autocast
from dytrun.config import RunConfig
from dytrun.distributed import Place, broadcast_tensors, from_first
from dytrun.errors import UserError
from dytrun.feed import AnyData
from dytrun.owner import amend_start
from dytrun.sources import fingerprint_difference
from dytrun.usage import CONF

# Parts of a configuration that do not change the result.
_NO_SCIENCE = ("machine", "tracking", "checkpoint")


def completed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Give a run's config.json the keys that are newer than it, as conf/train.yaml has them, where they are no science.

    So what an older version of dytrun has trained can still be looked at. A newer key of the science has no value that
    could be right, and is left missing.
    """
    defaults = yaml.safe_load((CONF / "train.yaml").read_text())
    return dict(values) | {part: defaults[part] | values[part] for part in _NO_SCIENCE if part in values}


def newest(store: Store, place: Place) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest whole checkpoint and what is to be said of it.

    The first rank reads it, and every rank gets what was read.

    Raises:
        UserError: there are checkpoints, and none is whole.
    """
    read: list[Checkpoint] = []

    def head() -> tuple[tuple[int, dict[str, Any], list[str]] | None, list[str]]:
        saved, said = store.load()
        if saved is not None:
            read.append(saved)
        return saved and (saved.step, saved.state, list(saved.tensors)), said

    found, said = from_first(head)
    if found is None:
        return None, said
    step, state, parts = found
    tensors = {part: broadcast_tensors(read[0].tensors[part] if read else None, place.device) for part in parts}
    return Checkpoint(step, tensors, state), said


def check_data(saved: Checkpoint | None, data: AnyData, root: str | None) -> None:
    """Refuse to go on with other data than a run began with.

    Raises:
        UserError: says what is different; or another version of dytrun has made the checkpoint.
    """
    if saved is not None and not {"data", "build", "window"} <= saved.state.keys():
        raise UserError(
            f"checkpoint of step {saved.step}: another version of dytrun has made it; go on with that one, or remove "
            "the run's directory to train it from the start"
        )
    if saved is not None and saved.state["data"] != data.facts:
        raise UserError(
            f"data.root: {root or 'the data'} is not what this run was trained on up to step {saved.step} "
            f"({fingerprint_difference(saved.state['data'], data.facts)}); put it back, or remove the run's directory "
            "to train it from the start"
        )


def begin(directory: Path, saved: Checkpoint | None, now: Mapping[str, Any], said: list[str]) -> list[str]:
    """Note in starts.jsonl that a run begins or is taken up again; return what a person is told.

    Args:
        directory: of the run.
        saved: the checkpoint that it is taken up from.
        now: as `build`.
        said: of the checkpoints that were tried.
    """
    changed = {} if saved is None else differences(saved.state["build"], now)
    step = 0 if saved is None else saved.step
    amend_start(directory, step=step, changed_build=changed, remarks=said)
    return said if saved is None else [*said, remark(step, changed)]


def build(config: RunConfig, place: Place, plan: optim.Plan, versions: Mapping[str, str]) -> dict[str, Any]:
    """Return what the bits of a run depend on besides its science and its data."""
    settings = config.machine
    with autocast(config, place.device):
        norms = norm.described(config.norm.name, settings.compile, place.device)
    return {
        "ranks": place.world,
        "batch_per_rank": plan.batch_per_rank,
        "accumulation": plan.accumulation,
        "device": machine.device_name(place.device),
        "instructions": torch.backends.cpu.get_cpu_capability() if place.device.type == "cpu" else None,
        "threads": torch.get_num_threads() if place.device.type == "cpu" else None,
        "cuda": torch.version.cuda if place.device.type == "cuda" else None,
        "cudnn": torch.backends.cudnn.version() if place.device.type == "cuda" else None,
        "loader": machine.loader_name(settings.loader),
        "compile": settings.compile,
        "norms": norms,  # without a compiler, on a CPU, they have another spelling
        "channels_last": settings.channels_last,
        "deterministic": settings.deterministic,
        "code": _code_digest(),
        **versions,
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return {name: [before, now]} wherever two builds differ."""
    return {
        name: [before.get(name), now.get(name)]
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    }


def remark(step: int, changed: Mapping[str, list[Any]]) -> str:
    """Say that a run is taken up again, and what of the promise is left."""
    if not changed:
        return f"taken up again after step {step}: it will end bit-equal to a run that was never interrupted"
    listed = "; ".join(f"{name} {before} before, {now} now" for name, (before, now) in changed.items())
    is_same = not {"ranks", "loader"} & changed.keys()
    order = "images and their order stay the same" if is_same else "the order of the images stays the same"
    return (
        f"taken up again after step {step}, but not bit-equal to a run that was never interrupted: {listed} ({order})"
    )


@cache
def _code_digest() -> str:
    """Twelve hex digits of dytrun's own source."""
    digest = hashlib.sha256()
    for path in sorted([*Path(__file__).parent.glob("*.py"), *Path(__file__).parent.glob("*.cpp")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
