"""fit(): optimizer steps, accumulation, precision, EMA, evaluation, checkpoints. It yields records and never logs.

The host runs ahead of the device: nothing is read from it between two windows of `tracking.log_every_steps`. A loss
or gradient that is not finite still never reaches the weights, because the device itself skips that optimizer step.
"""

import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dytrun import optim
from dytrun.batch import Batch
from dytrun.checkpoint import Checkpoint, Store
from dytrun.config import RunConfig
from dytrun.distributed import Place, all_sum, average_buffers, same_weights
from dytrun.evaluate import evaluate
from dytrun.records import Accuracy, EvalRecord, Record, Speed, TrainRecord
from dytrun.throughput import Clock

# torch 2.14 has renamed DDP's argument, and 2.11 knows only the old name.
_SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)

# Below it fp16 has overflowed a hundred times in a row.
_SMALLEST_LOSS_SCALE = 2.0**-30


class Diverged(Exception):
    """A loss or a gradient was not finite; without fp16's loss scaling the weights are those before that step."""


@dataclass
class Best:
    """The best raw top-1 so far."""

    top1: float = -1.0
    epoch: int = 0


@dataclass
class State:
    """Everything that training changes."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: ModelEmaV3 | None
    scaler: torch.amp.GradScaler
    step: int = 0
    best: Best = field(default_factory=Best)
    train_seconds: float = 0.0
    weights_sha256: dict[str, str] = field(default_factory=dict)
    """Of the raw weights at the start and at the last epoch's end, the same on all ranks."""
    speed: dict[str, float | None] = field(default_factory=dict)
    """Figures up to the last checkpoint, for a run that is taken up with nothing left to train."""


@dataclass(frozen=True)
class Surroundings:
    """What a run is given: its plan, its place, its images, its checkpoints."""

    plan: optim.Plan
    place: Place
    clock: Clock
    train: Iterator[Batch]
    val: Callable[[], Iterator[Batch]]
    num_val: int
    store: Store
    sites: list[str]
    """Names of the point-wise norms, whose alphas are recorded."""


def build_state(model: nn.Module, config: RunConfig, device: torch.device) -> State:
    """Make the optimizer, the EMA copy and the loss scaler of a model that is already on its device."""
    return State(
        model=model,
        optimizer=optim.build_optimizer(model, config.optim),
        ema=ModelEmaV3(model, decay=config.ema.decay) if config.ema.enabled else None,
        scaler=torch.amp.GradScaler(device.type, enabled=config.precision == "fp16"),
    )


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    """Return the context of a run's precision."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def fit(config: RunConfig, state: State, around: Surroundings) -> Iterator[Record]:
    """Train from `state.step` to the end; yield a TrainRecord a window and an EvalRecord an epoch.

    Raises:
        Diverged: on every rank alike.
        RuntimeError: the ranks' weights are not the same, at the start or after an epoch.
    """
    plan, every = around.plan, config.tracking.log_every_steps
    # Before DDP, which would give every rank the first one's, and leave their EMA copies as they are.
    now = same_weights(state.model, f"before step {state.step}")
    state.weights_sha256 = state.weights_sha256 or {"start": now, "end": now}
    net = distribute(state.model, around.place, plan.accumulation)
    window = _Window(around.place.device)
    net.train()
    while state.step < plan.total_steps:
        optim.set_lr(state.optimizer, lr := optim.lr_at(state.step, config.optim, plan))
        train_step(net, state, config, around, window)
        state.step += 1
        around.clock.step_done()
        ends_epoch = state.step % plan.steps_per_epoch == 0
        if state.step % every == 0 or ends_epoch or state.step == plan.total_steps:
            yield _train_record(config, state, around, window, lr)
            window = _Window(around.place.device)
        if ends_epoch:
            with around.clock.pause():
                record = evaluate_state(config, state, around)
                state.weights_sha256["end"] = same_weights(state.model, f"after step {state.step}")
                is_best = record.raw.top1 > state.best.top1
                if is_best:
                    state.best = Best(record.raw.top1, state.step // plan.steps_per_epoch)
                # Written down before the checkpoint: a run that is killed in between does the epoch again.
                yield record
                _save(config, state, around, is_best)


def train_step(net: nn.Module, state: State, config: RunConfig, around: Surroundings, window: "_Window") -> None:
    """Do one optimizer step over the global batch: `plan.accumulation` micro-batches on each rank."""
    accumulation = around.plan.accumulation
    loss_sum = torch.zeros((), device=around.place.device)
    state.optimizer.zero_grad(set_to_none=True)
    for micro in range(accumulation):
        with around.clock.data_wait():
            batch = next(around.train)
        images, targets = batch.images, batch.targets
        if isinstance(net, DistributedDataParallel):
            net.require_backward_grad_sync = micro == accumulation - 1
        with autocast(config, around.place.device):
            logits = net(images)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=_smoothing(config, targets)) / accumulation
        state.scaler.scale(loss).backward()
        loss_sum += loss.detach()
    _optimizer_step(state, config, all_sum(loss_sum) / around.place.world, window)
    if state.ema is not None:
        state.ema.update(state.model)


def distribute(model: nn.Module, place: Place, accumulation: int) -> nn.Module:
    """Wrap a model in DDP where there is more than one rank; the model itself stays usable."""
    if place.world == 1:
        return model
    # A hint about speed for 1×1 convolutions, whose gradients come in another order than their buckets.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    ids = [place.device.index] if place.device.type == "cuda" else None
    # DDP learns a static graph in its first backward pass, which may then not be one that sends no gradients: torch
    # 2.14 fails an assertion there (pytorch issue 143580). To send them in that one alone would be right up to
    # rounding, but a run that was interrupted would no longer end bit-equal to one that was not.
    options: dict[str, Any] = {_SYNC_BUFFERS: False, "static_graph": accumulation == 1}
    return DistributedDataParallel(model, ids, gradient_as_bucket_view=True, **options)


def speed_so_far(state: State, clock: Clock) -> dict[str, float | None]:
    """Return the clock's figures since this start, or those of the start before it if there are none yet."""
    figures: dict[str, float | None] = {
        name: value if math.isfinite(value) else None for name, value in clock.total().items()
    }
    return figures if figures["images_per_s"] is not None else state.speed or figures


def restore(state: State, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's weights, optimizer, EMA, scaler and counters into `state`, strictly."""
    state.model.load_state_dict(checkpoint.tensors["model"])
    if state.ema is not None:
        state.ema.module.load_state_dict(checkpoint.tensors["ema"])
    saved = state.optimizer.state_dict()
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in checkpoint.tensors["optimizer"].items():
        index, _, key = name.partition(".")
        moments.setdefault(int(index), {})[key] = value
    state.optimizer.load_state_dict({"state": moments, "param_groups": saved["param_groups"]})
    # They were saved contiguous; the fused kernel pairs elements by memory, so they need the layout of their weights.
    for parameter, values in state.optimizer.state.items():
        for name, value in values.items():
            if value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter).copy_(value)
    if state.scaler.is_enabled():
        state.scaler.load_state_dict(checkpoint.state["scaler"])
    state.step = checkpoint.step
    state.best = Best(**checkpoint.state["best"])
    state.train_seconds = checkpoint.state["train_seconds"]
    state.speed = checkpoint.state["speed"]
    state.weights_sha256 = checkpoint.state.get("weights_sha256", {})


class _Window:
    """Numbers of the current window, kept on the device until somebody asks."""

    def __init__(self, device: torch.device):
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.grad_norm = torch.zeros((), device=device)
        self.steps = 0
        # 1 from the first step on whose loss or gradient was not finite, and the number of that step.
        self.is_bad = torch.zeros((), device=device)
        self.bad_step = torch.full((), -1, dtype=torch.int64, device=device)

    def add(self, step: int, loss: Tensor, grad_norm: Tensor, is_finite: Tensor) -> None:
        self.loss_sum += loss.double()
        self.grad_norm = grad_norm
        self.steps += 1
        first = (~is_finite) & (self.is_bad == 0)
        self.bad_step = torch.where(first, step, self.bad_step)
        self.is_bad = torch.where(is_finite, self.is_bad, 1.0)


def _optimizer_step(state: State, config: RunConfig, loss: Tensor, window: _Window) -> None:
    """Clip and step, unless the loss or the gradient is not finite now or was before.

    The same everywhere: gradients and `loss` are averages over all ranks. With fp16 a gradient may overflow now and
    then; the scaler skips those steps alone and lowers its scale, and the loss or a vanished scale tells a divergence.
    """
    parameters = [p for group in state.optimizer.param_groups for p in group["params"] if p.grad is not None]
    state.scaler.unscale_(state.optimizer)
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if config.optim.clip_grad is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, config.optim.clip_grad, grad_norm)
    is_finite = torch.isfinite(loss)
    if not state.scaler.is_enabled():
        is_finite = is_finite & torch.isfinite(grad_norm)
    window.add(state.step, loss, grad_norm, is_finite)
    if state.scaler.is_enabled():
        state.scaler.step(state.optimizer)
        state.scaler.update()
    else:
        # Fused AdamW reads this flag on the device and leaves weights and moments alone where it is 1.
        setattr(state.optimizer, "found_inf", window.is_bad)
        state.optimizer.step()


def _smoothing(config: RunConfig, targets: Tensor) -> float:
    """Soft targets were smoothed when they were mixed."""
    return 0.0 if targets.is_floating_point() else config.augment.smoothing


def _train_record(config: RunConfig, state: State, around: Surroundings, window: _Window, lr: float) -> TrainRecord:
    """Read the window from the device, in one go."""
    alphas = [state.model.get_parameter(f"{site}.alpha").detach().mean() for site in around.sites]
    numbers = [window.bad_step, window.loss_sum / window.steps, window.grad_norm]
    values = torch.cat([number.reshape(1).double() for number in numbers + alphas]).tolist()
    bad_step, loss, grad_norm = values[:3]
    if bad_step >= 0:
        raise Diverged(
            f"loss or gradient not finite at step {int(bad_step)} (mean loss of its window {loss:g}, "
            f"gradient norm {grad_norm:g})"
        )
    if state.scaler.is_enabled() and state.scaler.get_scale() < _SMALLEST_LOSS_SCALE:
        raise Diverged(f"every gradient overflows fp16 by step {state.step}, however small the loss is scaled")
    return TrainRecord(
        step=state.step,
        epoch=state.step / around.plan.steps_per_epoch,
        samples_seen=state.step * config.global_batch,
        loss=loss,
        lr=lr,
        grad_norm=grad_norm,
        speed=Speed(**around.clock.window()),
        world=around.place.world,
        alpha=dict(zip(around.sites, values[3:], strict=True)),
    )


def evaluate_state(config: RunConfig, state: State, around: Surroundings) -> EvalRecord:
    """Evaluate the raw and, if there are, the EMA weights over the whole validation split."""

    def accuracy(model: nn.Module) -> Accuracy:
        # The statistics of a BatchNorm that was left are each rank's own; from here on all have the same.
        average_buffers(model)
        return evaluate(model, around.val(), around.num_val, autocast(config, around.place.device))

    return EvalRecord(
        step=state.step,
        epoch=state.step / around.plan.steps_per_epoch,
        samples_seen=state.step * config.global_batch,
        raw=accuracy(state.model),
        ema=accuracy(state.ema.module) if state.ema is not None else None,
    )


def _save(config: RunConfig, state: State, around: Surroundings, is_best: bool) -> None:
    epoch = state.step // around.plan.steps_per_epoch
    is_due = epoch % config.checkpoint.every_epochs == 0 or state.step == around.plan.total_steps
    if not around.place.is_first or not (is_due or is_best):
        return
    tensors: dict[str, dict[str, Tensor]] = {"model": state.model.state_dict(), "optimizer": {}}
    for index, moments in state.optimizer.state_dict()["state"].items():
        tensors["optimizer"] |= {f"{index}.{name}": value for name, value in moments.items()}
    if state.ema is not None:
        tensors["ema"] = state.ema.module.state_dict()
    around.store.save(
        state.step,
        tensors,
        {
            "best": vars(state.best),
            "scaler": state.scaler.state_dict(),
            "train_seconds": state.train_seconds + around.clock.train_seconds,
            "speed": speed_so_far(state, around.clock),
            "weights_sha256": state.weights_sha256,
        },
        is_best,
    )
