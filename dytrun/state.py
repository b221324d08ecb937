"""Everything that training changes, and its way into a checkpoint and back, bit by bit.

A checkpoint may be made after any step. Order and randomness are functions of the step's number, so what is saved
besides weights, moments and EMA is little: the numbers of the open window, the last losses, and counters.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from dytrun import optim
from dytrun.checkpoint import Checkpoint, Tensors
from dytrun.config import RunConfig
from dytrun.distributed import Place, gather_buffers
from dytrun.errors import UserError
from dytrun.throughput import Clock


@dataclass
class Best:
    """The best raw top-1 so far."""

    top1: float = -1.0
    epoch: int = 0
    step: int = 0


@dataclass
class Window:
    """Sums over the steps since the last TrainRecord."""

    loss_sum: float = 0.0
    grad_norm: float = 0.0
    """Of the last step."""
    steps: int = 0


@dataclass
class State:
    """Everything that training changes."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: ModelEmaV3 | None
    scaler: torch.amp.GradScaler
    step: int = 0
    is_evaluated: bool = True
    """Whether nothing is left to evaluate after the last step: false within an epoch, and at its end until it is."""
    best: Best = field(default_factory=Best)
    window: Window = field(default_factory=Window)
    losses: list[float] = field(default_factory=list)
    """Of the last steps, that a spike is measured against."""
    spikes: list[int] = field(default_factory=list)
    """Steps whose loss was a spike."""
    bad_images: dict[int, dict[str, str]] = field(default_factory=dict)
    """Index of each training image that could not be read → its path, why, and what was used instead."""
    substituted: int = 0
    """How often one of them was to be read."""
    train_seconds: float = 0.0
    weights_sha256: dict[str, str] = field(default_factory=dict)
    """Of the raw weights at the start and at the last epoch's end, the same on all ranks."""
    speed: dict[str, float | None] = field(default_factory=dict)
    """Figures up to the last checkpoint, for a run that is taken up with nothing left to train."""
    saves: int = 0
    """Attempts at a checkpoint, this one included."""
    failed_saves: int = 0
    saved_bytes: int = 0


# What of the state is plain numbers, under the same name in a checkpoint.
_PLAIN = ("is_evaluated", "losses", "spikes", "substituted", "weights_sha256", "saves", "failed_saves", "saved_bytes")


def build_state(model: nn.Module, config: RunConfig, device: torch.device) -> State:
    """Make the optimizer, the EMA copy and the loss scaler of a model that is already on its device."""
    return State(
        model=model,
        optimizer=optim.build_optimizer(model, config.optim),
        ema=ModelEmaV3(model, decay=config.ema.decay) if config.ema.enabled else None,
        scaler=torch.amp.GradScaler(device.type, enabled=config.precision == "fp16"),
    )


def speed_so_far(state: State, clock: Clock) -> dict[str, float | None]:
    """Return the clock's figures since this start, or those of the start before it if there are none yet."""
    figures: dict[str, float | None] = {
        name: value if math.isfinite(value) else None for name, value in clock.total().items()
    }
    return figures if figures["images_per_s"] is not None else state.speed or figures


def snapshot(state: State, more: Mapping[str, Any]) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """Return the tensors and the plain values of a checkpoint; every rank must call it.

    Args:
        state: after whole steps.
        more: further plain values.
    """
    tensors: dict[str, Tensors] = {"model": state.model.state_dict()}
    moments: dict[str, Tensor] = {}
    for index, values in state.optimizer.state_dict()["state"].items():
        moments |= {f"{index}.{name}": value for name, value in values.items()}
    tensors["optimizer"] = moments
    if state.ema is not None:
        tensors["ema"] = state.ema.module.state_dict()
    # Within an epoch the statistics of a BatchNorm that was left are each rank's own.
    if not state.is_evaluated and (buffers := gather_buffers(_parts(state))):
        tensors["rank_buffers"] = buffers
    plain = {name: getattr(state, name) for name in _PLAIN}
    return tensors, plain | {
        "best": asdict(state.best),
        "best_step": state.best.step,
        "window": asdict(state.window),
        "bad_images": {str(index): image for index, image in state.bad_images.items()},
        "scaler": state.scaler.state_dict(),
        **more,
    }


def to_be_saved(state: State) -> Mapping[str, Tensors]:
    """Return as many bytes as a checkpoint will hold, before the optimizer has its moments: two for each weight."""
    weights = state.model.state_dict()
    return {"model": weights, "first": weights, "second": weights} | ({} if state.ema is None else {"ema": weights})


def restore(state: State, checkpoint: Checkpoint, place: Place) -> None:
    """Put a checkpoint's weights, optimizer, EMA, scaler and counters into `state`, strictly.

    Raises:
        UserError: the checkpoint is of another model or optimizer; says what is missing.
    """
    try:
        _restore_tensors(state, checkpoint, place)
    except (RuntimeError, KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"checkpoint of step {checkpoint.step}: it does not fit the model of this run "
            f"({' '.join(str(error).split())[:300]}); use the versions it was made with, or remove the run's directory"
        ) from None
    values = checkpoint.state
    if state.scaler.is_enabled():
        state.scaler.load_state_dict(values["scaler"])
    state.step = checkpoint.step
    state.best = Best(**values["best"])
    state.window = Window(**values["window"])
    state.bad_images = {int(index): image for index, image in values["bad_images"].items()}
    state.train_seconds, state.speed = values["train_seconds"], values["speed"]
    for name in _PLAIN:
        setattr(state, name, values[name])


def _parts(state: State) -> dict[str, nn.Module]:
    return {"model": state.model} | ({} if state.ema is None else {"ema": state.ema.module})


def _restore_tensors(state: State, checkpoint: Checkpoint, place: Place) -> None:
    state.model.load_state_dict(checkpoint.tensors["model"])
    own = f"{place.world}.{place.rank}."
    buffers = {name.removeprefix(own): value for name, value in checkpoint.tensors.get("rank_buffers", {}).items()
               if name.startswith(own)}  # fmt: skip
    if state.ema is not None:
        state.ema.module.load_state_dict(checkpoint.tensors["ema"])
    for name, value in buffers.items():
        part, _, name = name.partition(".")
        _parts(state)[part].get_buffer(name).copy_(value)
    saved = state.optimizer.state_dict()
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in checkpoint.tensors["optimizer"].items():
        index, _, key = name.partition(".")
        moments.setdefault(int(index), {})[key] = value
    state.optimizer.load_state_dict({"state": moments, "param_groups": saved["param_groups"]})
    # They were saved contiguous; the fused kernel pairs elements by memory, so they need the layout of their weights.
    for parameter, values in state.optimizer.state.items():
        for name, value in values.items():
            if name == "step":
                continue
            if value.shape != parameter.shape:
                raise ValueError(f"moments of shape {tuple(value.shape)} for a weight of {tuple(parameter.shape)}")
            values[name] = torch.empty_like(parameter).copy_(value)
