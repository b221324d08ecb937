"""Every type, bound and unit of the configuration; no value (those live in conf/).

Frozen pydantic models. `RunConfig` also says what a run *is*: its science, and the identity that follows from it.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from dytrun.errors import UserError

_STRICT = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Pair = tuple[Positive, Positive]
Rgb = tuple[float, float, float]
# A slug is safe as a part of a path: the identity of a run is a directory name.
Slug = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$")]
# YAML 1.1 reads a bare `off` as false.
_unbool = BeforeValidator(lambda value: {True: "on", False: "off"}[value] if isinstance(value, bool) else value)


class ModelConfig(BaseModel):
    """Which timm model, built how."""

    model_config = _STRICT
    name: Slug
    """timm's name of an architecture, without weights."""
    drop_path: Fraction | None
    """Stochastic depth of the last block; null leaves it to the model."""
    kwargs: dict[str, Any]
    """The model's own construction arguments."""


class LayerNormConfig(BaseModel):
    """The model untouched."""

    model_config = _STRICT
    name: Literal["ln"]


class DyTConfig(BaseModel):
    """Dynamic Tanh (arXiv 2503.10622, section 4)."""

    model_config = _STRICT
    name: Literal["dyt"]
    alpha_init: Positive


NormConfig = Annotated[LayerNormConfig | DyTConfig, Field(discriminator="name")]


class DataConfig(BaseModel):
    """Which images, and how they are brought to the model's size."""

    model_config = _STRICT
    name: Literal["imagenet", "folder", "imagenette", "cifar10", "cifar100", "fashion_mnist", "digits", "synthetic"]
    root: str | None
    download: bool
    train_split: Slug
    val_split: Slug
    image_size: Annotated[int, Field(ge=4, le=4096)]
    """Side of the square image that the model sees, in pixels."""
    mean: Rgb
    std: tuple[Positive, Positive, Positive]
    crop_pct: Annotated[float, Field(gt=0, le=1)] | None
    """Share of the resized short side that the centre crop keeps in evaluation."""
    num_classes: Annotated[int, Field(ge=2)] | None
    num_train: Count | None
    """Training images, for plans made without the data; the data decides."""


class AugmentConfig(BaseModel):
    """What happens to a training image, and to a batch of them."""

    model_config = _STRICT
    scale: Pair | None
    ratio: Pair
    interpolation: Literal["bicubic", "bilinear", "random"]
    hflip: Fraction
    rand_augment: Annotated[str, Field(pattern=r"^rand-[a-z0-9.-]+$")] | None
    color_jitter: NonNegative
    erase_prob: Fraction
    erase_mode: Literal["pixel", "rand", "const"]
    mixup: NonNegative
    cutmix: NonNegative
    mix_prob: Fraction
    mix_switch_prob: Fraction
    smoothing: Annotated[float, Field(ge=0, lt=1)]

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed with one another."""
        return (self.mixup > 0 or self.cutmix > 0) and self.mix_prob > 0


class OptimConfig(BaseModel):
    """AdamW and its schedule."""

    model_config = _STRICT
    lr: Positive
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]]
    eps: Positive
    weight_decay: NonNegative
    min_lr: NonNegative
    warmup_epochs: NonNegative
    clip_grad: Positive | None
    layer_decay: Annotated[float, Field(gt=0, le=1)]


class EmaConfig(BaseModel):
    """The moving average of the weights."""

    model_config = _STRICT
    enabled: bool
    decay: Annotated[float, Field(gt=0, lt=1)]


class MachineConfig(BaseModel):
    """Where a run runs; should not change its result beyond rounding."""

    model_config = _STRICT
    devices: Literal["auto"] | Count | list[Annotated[int, Field(ge=0)]]
    workers: Literal["auto"] | Annotated[int, Field(ge=0)]
    max_batch_per_rank: Count | None
    eval_batch_per_rank: Count
    compile: Annotated[Literal["off", "blocks", "model"], _unbool]
    channels_last: Literal["auto"] | bool
    deterministic: bool
    collective_timeout_s: Count


class TrackingConfig(BaseModel):
    """What Weights & Biases gets, and how often numbers are read from the device."""

    model_config = _STRICT
    mode: Annotated[Literal["auto", "online", "offline", "off"], _unbool]
    project: Slug
    entity: Slug | None
    group: Slug | None
    tags: list[Slug]
    log_every_steps: Count


class CheckpointConfig(BaseModel):
    """How often a run is saved, and how many of the newest are kept."""

    model_config = _STRICT
    every_epochs: Count
    keep: Annotated[int, Field(ge=2)]


class RunConfig(BaseModel):
    """One training run, whole."""

    model_config = _STRICT
    model: ModelConfig
    norm: NormConfig
    data: DataConfig
    augment: AugmentConfig
    optim: OptimConfig
    ema: EmaConfig
    epochs: Count
    global_batch: Count
    precision: Literal["fp32", "bf16", "fp16"]
    seed: Annotated[int, Field(ge=0, lt=2**31)]
    machine: MachineConfig
    tracking: TrackingConfig
    checkpoint: CheckpointConfig
    runs_dir: str
    dry_run: bool

    @model_validator(mode="after")
    def _parts_fit(self) -> "RunConfig":
        problems = []
        if self.optim.warmup_epochs >= self.epochs:
            problems.append(
                f"optim.warmup_epochs: {self.optim.warmup_epochs:g} leaves nothing of epochs={self.epochs}; "
                "shorten the warm-up or train longer"
            )
        if self.optim.min_lr > self.optim.lr:
            problems.append(f"optim.min_lr: {self.optim.min_lr:g} is above optim.lr={self.optim.lr:g}; lower it")
        if self.machine.devices == []:
            problems.append("machine.devices: an empty list; name a device or say auto")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def science(self) -> dict[str, Any]:
        """Everything that changes the result, as plain JSON values.

        Where the data lies is no science, unless the data is known by nothing else (`data=folder`).
        """
        science = self.model_dump(mode="json", include=_SCIENCE)
        del science["data"]["download"]
        if self.data.name == "folder" and self.data.root is not None:
            science["data"]["root"] = str(Path(self.data.root).resolve())
        else:
            del science["data"]["root"]
        return science

    @property
    def science_id(self) -> str:
        """Eight hex digits that two runs share if and only if their science is equal."""
        return _digest(self.science())

    @property
    def pair_id(self) -> str:
        """Eight hex digits that two runs share if their science differs in the norm and the seed alone."""
        return _digest({key: value for key, value in self.science().items() if key not in ("norm", "seed")})

    @property
    def run_name(self) -> str:
        """Name of the run's directory."""
        return f"{self.model.name}-{self.norm.name}-{self.data.name}-s{self.seed}-{self.science_id}"

    @property
    def run_dir(self) -> Path:
        """Where the run leaves its files."""
        return Path(self.runs_dir) / self.run_name


_SCIENCE = {
    "model", "norm", "data", "augment", "optim", "ema", "epochs", "global_batch", "precision", "seed",
}  # fmt: skip


class EvalConfig(BaseModel):
    """`dytrun eval DIR`."""

    model_config = _STRICT
    dir: str
    checkpoint: Literal["last", "best"]
    data_root: str | None
    devices: Literal["auto"] | Count | list[Annotated[int, Field(ge=0)]]
    workers: Literal["auto"] | Annotated[int, Field(ge=0)]
    batch_per_rank: Count


class ReportConfig(BaseModel):
    """`dytrun report [DIR]`."""

    model_config = _STRICT
    dir: str
    baseline: Slug
    confidence: Annotated[float, Field(gt=0.5, lt=1)]


Config = TypeVar("Config", RunConfig, EvalConfig, ReportConfig)


def validate(schema: type[Config], values: Mapping[str, Any]) -> Config:
    """Turn plain values into a typed configuration.

    Raises:
        UserError: all that is wrong at once, each problem with its dotted path.
    """
    targets = [f"{path}: {key} is refused; nothing is built from a name in a configuration" for path, key in
               _instantiation_keys(values)]  # fmt: skip
    try:
        config = schema.model_validate(values)
    except ValidationError as error:
        known = list(_leaves(schema))
        problems = [line for item in _by_path(error) for line in _problem(item, known)]
        raise UserError(*targets, *problems) from None
    if targets:
        raise UserError(*targets)
    return config


def near(name: str, known: list[str]) -> str:
    """Return `; did you mean 'x'?` for a name that is nearly one of `known`, else nothing."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean '{match[0]}'?" if match else ""


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def _instantiation_keys(values: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the keys by which Hydra would be told to call something: `_target_` and its kin."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            here = f"{path}.{key}" if path else str(key)
            if re.fullmatch(r"_\w+_", str(key)):
                yield here, str(key)
            yield from _instantiation_keys(value, here)
    elif isinstance(values, list | tuple):
        for index, value in enumerate(values):
            yield from _instantiation_keys(value, f"{path}[{index}]")


def _leaves(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in schema.model_fields.items():
        options = getattr(field.annotation, "__args__", (field.annotation,))
        nested = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
        if not nested:
            yield f"{prefix}{name}"
        for option in nested:
            yield from _leaves(option, f"{prefix}{name}.")


def _by_path(error: ValidationError) -> list[dict[str, Any]]:
    """Return pydantic's findings with dotted paths; those on the members of one union are one finding."""
    found: dict[str, dict[str, Any]] = {}
    for item in error.errors():
        # pydantic puts the chosen member of a union into the path; a user never typed it.
        loc = [str(part) for part in item["loc"]]
        if loc[:1] == ["norm"] and len(loc) > 2:
            del loc[1]
        path = ".".join(
            part for part in loc if not re.match(r"(literal|constrained|list|int|bool|float|tuple)\b", part)
        )
        if path in found and item["type"] != "value_error":
            found[path]["msg"] += f", or {item['msg'][0].lower()}{item['msg'][1:]}"
        else:
            found[path or str(len(found))] = {**item, "path": path}
    return list(found.values())


def _problem(error: dict[str, Any], known: list[str]) -> Iterator[str]:
    """One line for one finding: path, value, what is allowed or nearly meant."""
    path = error["path"]
    if re.fullmatch(r".*\b_\w+_", path):
        return  # named already, as an instantiation key
    if error["type"] == "extra_forbidden":
        section = [name for name in known if name.startswith(path.rpartition(".")[0])]
        yield f"{path}: no such key{near(path, section) or near(path, known)}"
    elif error["type"] == "missing":
        yield f"{path}: a value is needed; say {path}=…"
    elif error["type"] == "value_error":
        yield from str(error["ctx"]["error"]).splitlines()
    elif error["type"] == "union_tag_invalid":
        yield f"{path}.name: {error['ctx']['tag']!r} is none of {error['ctx']['expected_tags']}"
    else:
        yield f"{path}: {error['input']!r} is not allowed ({error['msg'][0].lower()}{error['msg'][1:]})"
