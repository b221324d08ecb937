"""Names and units of everything that a run measures. Whoever asks the engine gets these, and nothing else.

Accuracies are in percent, times in the unit that the name ends with, memory in GiB (2**30 bytes).
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np

# x-axes of every record, first in each line of metrics.jsonl.
AXES = ("step", "epoch", "samples_seen")
METRICS = (
    "train/loss", "train/lr", "train/grad_norm",
    "val/loss", "val/top1", "val/top5",
    "ema/top1", "ema/top5",
    "perf/images_per_s", "perf/images_per_s_per_device", "perf/step_ms", "perf/data_wait_frac",
    "perf/peak_mem_gib",
)  # fmt: skip
# One metric for each norm site; <site> is the module's name in the model.
SITE_METRICS = ("norm/alpha/<site>", "norm/input_std/<site>", "norm/saturation/<site>")


@dataclass(frozen=True)
class Speed:
    """The clock's reading over some steps; pauses (evaluation, checkpoints) and warm-up are not in it."""

    images_per_s: float
    step_ms_p50: float
    step_ms_p95: float
    data_wait_frac: float
    """Share of the time in which the training loop waited for images."""
    peak_mem_gib: float
    """CUDA: most memory allocated on the device. CPU: largest resident set of the process."""


@dataclass(frozen=True)
class TrainRecord:
    """A window of optimizer steps that ended with `step`."""

    step: int
    epoch: float
    samples_seen: int
    loss: float
    """Mean over the window."""
    lr: float
    grad_norm: float
    """Of the window's last step, before clipping."""
    speed: Speed
    world: int

    def metrics(self) -> dict[str, float]:
        """Return {metric name: value}."""
        return {
            "train/loss": self.loss,
            "train/lr": self.lr,
            "train/grad_norm": self.grad_norm,
            "perf/images_per_s": self.speed.images_per_s,
            "perf/images_per_s_per_device": self.speed.images_per_s / self.world,
            "perf/step_ms": self.speed.step_ms_p50,
            "perf/data_wait_frac": self.speed.data_wait_frac,
            "perf/peak_mem_gib": self.speed.peak_mem_gib,
        }


@dataclass(frozen=True)
class ProbeRecord:
    """What the norms do to a few of the images of optimizer step `step`, with the weights after it; by site.

    A number that there is none of is left out: LayerNorm has no alpha, and a function without bounds does not saturate.
    """

    step: int
    epoch: float
    samples_seen: int
    alpha: Mapping[str, float]
    """Its mean where there is one a channel."""
    input_std: Mapping[str, float]
    """Standard deviation over all elements of what goes into the norm, as in figure 8 of DyT's paper."""
    saturation: Mapping[str, float]
    """Share of the inputs for which f(alpha x + shift) is beyond 0.99 of the way from its middle to its bound."""

    def metrics(self) -> dict[str, float]:
        """Return {metric name: value}."""
        parts = (("alpha", self.alpha), ("input_std", self.input_std), ("saturation", self.saturation))
        return {f"norm/{name}/{site}": value for name, found in parts for site, value in found.items()}


@dataclass(frozen=True)
class Accuracy:
    """Integer counts over a split, every image once; of a text, every byte but the first."""

    num: int
    top1_count: int
    top5_count: int
    loss: float
    """Mean cross-entropy with hard labels."""
    correct: np.ndarray | None
    """Top-1 hit or miss of each image, bool, in the order of the split.

    None of a text: bytes that are neighbours are no independent cases, as a comparison case by case would take them.
    """

    @property
    def top1(self) -> float:
        """In percent."""
        return 100 * self.top1_count / self.num

    @property
    def top5(self) -> float:
        """In percent."""
        return 100 * self.top5_count / self.num


@dataclass(frozen=True)
class EvalRecord:
    """An evaluation after `step` optimizer steps."""

    step: int
    epoch: float
    samples_seen: int
    raw: Accuracy
    ema: Accuracy | None

    def metrics(self) -> dict[str, float]:
        """Return {metric name: value}."""
        values = {"val/loss": self.raw.loss, "val/top1": self.raw.top1, "val/top5": self.raw.top5}
        if self.ema is not None:
            values |= {"ema/top1": self.ema.top1, "ema/top5": self.ema.top5}
        return values


@dataclass(frozen=True)
class Remark:
    """What a person should know of a step, in a line: no metric."""

    step: int
    text: str


Record = TrainRecord | ProbeRecord | EvalRecord


class Position(NamedTuple):
    """Where training goes on from: after `step` optimizer steps, with or without the evaluation that belongs there."""

    step: int
    is_evaluated: bool

    def is_after(self, values: Mapping[str, Any]) -> bool:
        """Whether training had got past a record, given as {name: value} of its line in metrics.jsonl."""
        is_there = self.is_evaluated or "val/top1" not in values
        return values["step"] < self.step or (values["step"] == self.step and is_there)


Status = Literal["finished", "diverged", "interrupted", "failed"]


@dataclass(frozen=True)
class RunResult:
    """What result.json holds. A field is null where a run did not get so far."""

    status: Status
    science_id: str
    pair_id: str
    model: str
    norm: str
    alpha_init: float | None
    seed: int
    epochs: int
    science: Mapping[str, Any]
    """Everything of the configuration that changes the result; what a comparison is checked against."""
    message: str | None = None
    """Why a run diverged, failed or stopped."""
    num_params: int | None = None
    num_norm_sites: int | None = None
    norm_impl: str | None = None
    """Which implementation computed the norms, eager or compiled."""
    device: str | None = None
    ranks: int | None = None
    machine: Mapping[str, Any] = field(default_factory=dict)
    """What a speed depends on besides the device: micro-batch, loader processes, compilation, memory format."""
    data_fingerprint: str | None = None
    data_pack: str | None = None
    """What was packed and how, if the images were in a pack."""
    versions: Mapping[str, str] = field(default_factory=dict)
    commit: str | None = None
    dirty: bool | None = None
    steps: int = 0
    top1: float | None = None
    top5: float | None = None
    val_loss: float | None = None
    num_val: int | None = None
    ema_top1: float | None = None
    ema_top5: float | None = None
    best_top1: float | None = None
    best_epoch: int | None = None
    images_per_s: float | None = None
    step_ms_p50: float | None = None
    step_ms_p95: float | None = None
    data_wait_frac: float | None = None
    peak_mem_gib: float | None = None
    train_seconds: float | None = None
    weights_sha256: Mapping[str, str] = field(default_factory=dict)
    """Of the raw weights at the `start` and at the `end` of training; checked to be the same on all ranks."""
    bad_images: Sequence[Mapping[str, Any]] = ()
    """Training images that could not be read: index, path, why, and the one that was used instead."""
    substituted: int = 0
    """How often one of them was to be read."""
    loss_spikes: Sequence[int] = ()
    """Steps whose loss lay ten robust standard deviations above the median of the 128 before."""
    checkpoints: Mapping[str, int] = field(default_factory=dict)
    """How many were to be written, how many could not be, and the bytes of the others."""
    starts: Sequence[Mapping[str, Any]] = ()
    """Each start of the run: from which step, and what was different from the one before."""
    alpha: Mapping[str, float] = field(default_factory=dict)
    """Final alpha of each site; its mean where there is one a channel."""
    init: Mapping[str, Any] = field(default_factory=dict)
    """What the run started from, where that is a file: what was copied, what was new, how calibration went."""
    published: Mapping[str, Any] | None = None
    """The published result that the run's experiment page is about, and what the run has changed of it."""

    def save(self, path: Path) -> None:
        """Write the result whole or not at all."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> "RunResult":
        """Read a result back; keys of other versions of dytrun are left out."""
        values = json.loads(path.read_text())
        names = {item.name for item in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in names})


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (dotted key, value in one, value in the other) wherever two sciences differ, seeds apart."""
    left, right = _flat(one), _flat(other)
    keys = [key for key in sorted(left.keys() | right.keys()) if key != "seed" and left.get(key) != right.get(key)]
    return [(key, left.get(key), right.get(key)) for key in keys]


def to_json_line(record: Record) -> str:
    """Write a record as a line of metrics.jsonl; a value that is not finite becomes null, as JSON has no other."""
    axes = {axis: getattr(record, axis) for axis in AXES}
    return json.dumps(_finite(axes | record.metrics()))


@dataclass(frozen=True)
class Table:
    """What a person is shown of a benchmark."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]


@dataclass(frozen=True)
class Found:
    """What a benchmark found: tables, and the same as plain values for a JSON file, every single measurement in it."""

    tables: Sequence[Table]
    values: dict[str, Any]


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file whole or not at all: a reader sees the old one or the new one."""
    with whole_file(path) as file:
        file.write(f"{json.dumps(_finite(values), indent=1, allow_nan=False)}\n".encode())


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Give a file that takes the place of the one at `path` once it is whole and on the disk, or leaves nothing."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def whole_lines(path: Path) -> list[str]:
    """Return the lines of a file, or none without it; a last line without its end is one that a kill cut short."""
    if not path.is_file():
        return []
    text = path.read_text()
    return [line for line in text[: text.rfind("\n") + 1].splitlines() if line]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _finite(value: Any) -> Any:
    """Replace what JSON cannot hold, numbers that are not finite, by null."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
