"""Every type, bound and unit of the configuration; no value (those live in conf/).

Frozen pydantic models. `RunConfig` also says what a run *is*: its science, and the identity that follows from it.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from dytrun.digest import file_digest, values_digest
from dytrun.norm_config import STRICT, Count, NormConfig, PointWiseConfig, Positive
from dytrun.subject_config import (
    AnyDataConfig,
    AnyModelConfig,
    DataConfig,
    FilePath,
    Fraction,
    Slug,
    TextConfig,
    settled,
    text_problems,
    unbool,
)  # fmt: skip

NonNegative = Annotated[float, Field(ge=0)]
Pair = tuple[Positive, Positive]


class AugmentConfig(BaseModel):
    """What happens to a training image, and to a batch of them."""

    model_config = STRICT
    scale: Pair | None
    ratio: Pair
    interpolation: Literal["bicubic", "bilinear", "random"]
    hflip: Fraction
    rand_augment: Annotated[str, Field(pattern=r"^rand(-(m\d+|n\d+|p[\d.]+|mstd[\d.]+|mmax\d+|inc[01]))+$")] | None
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

    model_config = STRICT
    lr: Positive
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]]
    eps: Positive
    weight_decay: NonNegative
    min_lr: NonNegative
    warmup_epochs: NonNegative
    clip_grad: Positive | None
    layer_decay: Annotated[float, Field(gt=0, le=1)]
    stop_at_spike: bool
    """Whether a loss far above the last ones ends the run; it is counted anyway."""


class EmaConfig(BaseModel):
    """The moving average of the weights."""

    model_config = STRICT
    enabled: bool
    decay: Annotated[float, Field(gt=0, lt=1)]


class MachineConfig(BaseModel):
    """Where a run runs; should not change its result beyond rounding."""

    model_config = STRICT
    devices: Literal["auto"] | Count | list[Annotated[int, Field(ge=0)]]
    workers: Literal["auto"] | Annotated[int, Field(ge=0)]
    loader: Literal["torch", "dali"]
    """Who decodes and augments: processes of torch's DataLoader, or NVIDIA DALI."""
    max_batch_per_rank: Count | None
    eval_batch_per_rank: Count
    compile: Annotated[Literal["off", "blocks", "model"], unbool]
    channels_last: Literal["auto"] | bool
    deterministic: bool
    collective_timeout_s: Count
    hang_timeout_s: Count
    """Seconds without a step, after which a run ends and names the rank that it waits for."""
    max_restarts: Annotated[int, Field(ge=0)]
    """How often in a row, without a new checkpoint, the ranks of this machine are started again after a crash."""


class TrackingConfig(BaseModel):
    """What Weights & Biases gets, and how often numbers are read from the device."""

    model_config = STRICT
    mode: Annotated[Literal["auto", "online", "offline", "off"], unbool]
    project: Slug
    entity: Slug | None
    group: Slug | None
    tags: list[Annotated[Slug, Field(max_length=64)]]
    log_every_steps: Count
    probe_every_steps: Count | None


class CheckpointConfig(BaseModel):
    """How often a run is saved, and how many of the newest are kept."""

    model_config = STRICT
    every_epochs: Count
    every_minutes: Positive | None
    keep: Annotated[int, Field(ge=2)]


class Published(BaseModel):
    """The published result that a page of conf/experiment/ is about."""

    model_config = STRICT
    page: Slug
    """Name of the page: `experiment=PAGE`."""
    source: str
    """Paper and table."""
    top1: Annotated[float, Field(gt=0, le=100)] | None
    """ImageNet-1K, percent; null where the source gives no number."""
    note: str | None
    differs: list[str]
    """What of the science is not as on the page; filled in by the command line."""


class RunConfig(BaseModel):
    """One training run, whole."""

    model_config = STRICT
    model: AnyModelConfig
    norm: NormConfig
    data: AnyDataConfig
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
    init_from: Annotated[str, Field(min_length=1)] | None
    """A file of weights to start from; null draws them."""
    init_part: str | None
    """Name of the state dict within the file, where it holds several."""
    published: Published | None
    runs_dir: FilePath
    dry_run: bool

    @model_validator(mode="before")
    @classmethod
    def _settled(cls, values: Any) -> Any:
        return settled(values)

    @model_validator(mode="after")
    def _parts_fit(self) -> "RunConfig":
        problems = text_problems(self)
        if self.optim.warmup_epochs >= self.epochs:
            problems.append(
                f"optim.warmup_epochs: {self.optim.warmup_epochs:g} leaves nothing of epochs={self.epochs}; "
                "shorten the warm-up or train longer"
            )
        if self.optim.min_lr > self.optim.lr:
            problems.append(f"optim.min_lr: {self.optim.min_lr:g} is above optim.lr={self.optim.lr:g}; lower it")
        for name, (low, high) in (("scale", self.augment.scale or (1, 1)), ("ratio", self.augment.ratio)):
            if low > high or (name == "scale" and high > 1):
                problems.append(f"augment.{name}: [{low:g}, {high:g}] is no range; give [smaller, larger]")
        if self.machine.hang_timeout_s >= self.machine.collective_timeout_s:
            problems.append(
                f"machine.hang_timeout_s: {self.machine.hang_timeout_s} is not below machine.collective_timeout_s="
                f"{self.machine.collective_timeout_s}: a hang would end the run before it is said whose; change one"
            )
        if self.machine.devices == []:
            problems.append("machine.devices: an empty list; name a device or say auto")
        if isinstance(self.machine.devices, list) and len({*self.machine.devices}) < len(self.machine.devices):
            problems.append(f"machine.devices: {self.machine.devices} names a device twice; a rank needs its own")
        is_image = not isinstance(self.data, TextConfig)  # what is calibrated on text is said already
        if is_image and isinstance(self.norm, PointWiseConfig) and self.norm.calibrate and self.init_from is None:
            problems.append(
                "norm.calibrate: there is no trained norm to fit, because the weights are drawn anew; give a trained "
                "LayerNorm model with init_from=FILE"
            )
        if isinstance(self.norm, PointWiseConfig) and self.norm.calibrate and not self.norm.fitted_parts:
            problems.append("norm.calibrate: with alpha held and no weight and bias there is nothing to fit")
        if self.init_part is not None and self.init_from is None:
            problems.append("init_part: a part of which file? say init_from=FILE")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def science(self) -> dict[str, Any]:
        """Everything that changes the result, as plain JSON values.

        Where the data lies is no science, unless the data is known by nothing else (`data=folder`, a text). Of
        `init_from` it is the content that counts.

        Raises:
            UserError: `init_from` cannot be read.
        """
        science = self.model_dump(mode="json", include=SCIENCE)
        if isinstance(self.data, TextConfig):
            del science["augment"]
        else:
            del science["data"]["download"], science["data"]["max_bad_fraction"]
        if self.data.name in ("folder", "text") and self.data.root is not None:
            science["data"]["root"] = str(Path(self.data.root).resolve())
        else:
            del science["data"]["root"]
        if isinstance(self.data, DataConfig) and self.data.name != "synthetic":
            del science["data"]["num_train"]  # a plan's number; the data decides
        if not self.ema.enabled:
            del science["ema"]["decay"]
        if not self.optim.stop_at_spike:
            del science["optim"]["stop_at_spike"]
        if "augment" in science and not self.augment.mixes:
            for key in ("mixup", "cutmix", "mix_prob", "mix_switch_prob"):
                del science["augment"][key]
        science["model"].get("kwargs", {}).pop("img_size", None)  # it can only be data.image_size
        for key in ("include", "exclude"):
            if science["norm"].get(key):
                science["norm"][key].sort()
        if "rules" in science["norm"]:
            science["norm"]["rules"] = [list(rule) for rule in science["norm"]["rules"].items()]  # their order counts
            if not science["norm"]["calibrate"]:
                del science["norm"]["calibrate"], science["norm"]["calibrate_images"]
            elif isinstance(self.norm, PointWiseConfig) and "alpha" in self.norm.fitted_parts:
                del science["norm"]["alpha_init"], science["norm"]["rules"]  # the fit decides
        if self.init_from is not None:
            science["init_from"] = file_digest(self.init_from)
            if self.init_part is not None:
                science["init_part"] = self.init_part
        return science

    @property
    def images(self) -> DataConfig:
        """The data of a run on images; asked by what no run on text comes to."""
        assert isinstance(self.data, DataConfig)
        return self.data

    @property
    def unit(self) -> str:
        """What a batch is counted in."""
        return "windows" if self.data.name == "text" else "images"

    @property
    def science_id(self) -> str:
        """Eight hex digits that two runs share if and only if their science is equal."""
        return values_digest(self.science())

    @property
    def pair_id(self) -> str:
        """Eight hex digits that two runs share if their science differs in the norm and the seed alone."""
        return values_digest({key: value for key, value in self.science().items() if key not in ("norm", "seed")})

    @property
    def run_name(self) -> str:
        """Name of the run's directory."""
        return f"{self.model.name}-{self.norm.name}-{self.data.name}-s{self.seed}-{self.science_id}"

    @property
    def run_dir(self) -> Path:
        """Where the run leaves its files."""
        return Path(self.runs_dir) / self.run_name


# The parts of a configuration that change the result, besides the weights that it starts from.
SCIENCE = {
    "model", "norm", "data", "augment", "optim", "ema", "epochs", "global_batch", "precision", "seed",
}  # fmt: skip


class EvalConfig(BaseModel):
    """`dytrun eval DIR`."""

    model_config = STRICT
    dir: FilePath
    checkpoint: Literal["last", "best"]
    data_root: FilePath | None
    devices: Literal["auto"] | Count | list[Annotated[int, Field(ge=0)]]
    workers: Literal["auto"] | Annotated[int, Field(ge=0)]
    batch_per_rank: Count


class ReplayConfig(BaseModel):
    """`dytrun replay DIR`."""

    model_config = STRICT
    dir: FilePath
    data_root: FilePath | None
    devices: Literal["auto"] | Count | list[Annotated[int, Field(ge=0)]]


class ProbeConfig(BaseModel):
    """`dytrun probe DIR`."""

    model_config = STRICT
    dir: FilePath
    checkpoint: Literal["last", "best"] | Count
    """Which one; a number is the step after which it was made."""
    weights: Literal["raw", "ema"]
    batches: Count
    batch: Count
    data_root: FilePath | None
    workers: Literal["auto"] | Annotated[int, Field(ge=0)]
    out: FilePath | None
    wandb: bool


class ReportConfig(BaseModel):
    """`dytrun report [DIR]`."""

    model_config = STRICT
    dir: FilePath
    baseline: Slug | None
    confidence: Annotated[float, Field(gt=0.5, lt=1)]
    margin: Annotated[float, Field(gt=0, lt=100)]
    wandb: bool
    project: Slug | None
    entity: Slug | None
    watch: bool
