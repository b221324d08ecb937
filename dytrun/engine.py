"""fit(): optimizer steps, accumulation, precision, EMA, probes, evaluation, checkpoints. It yields, and never logs.

After every step all ranks know the same of it (`agreement`): whether its loss and gradient may change the weights, and
whether one of them was told to stop, wants to save or has met an image that cannot be read. So they act together.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dytrun import activations, optim, watchdog
from dytrun.agreement import LAG, Agreement, Diverged, Interrupted, Verdict, Wishes
from dytrun.batch import Batch
from dytrun.checkpoint import NotSaved
from dytrun.compute import autocast, distribute, settle, train_loss
from dytrun.config import RunConfig
from dytrun.distributed import average_buffers, from_first, gather, same_weights
from dytrun.errors import UserError, first_line
from dytrun.evaluate import Halted, evaluate
from dytrun.records import Accuracy, EvalRecord, ProbeRecord, Record, Remark, Speed, TrainRecord
from dytrun.state import Best, State, Window, snapshot, speed_so_far
from dytrun.surroundings import Surroundings

# Below it fp16 has overflowed a hundred times in a row.
_SMALLEST_LOSS_SCALE = 2.0**-30


def fit(config: RunConfig, state: State, around: Surroundings) -> Iterator[Record | Remark]:
    """Train from `state.step` to the end; yield a TrainRecord a window, an EvalRecord an epoch, and ProbeRecords.

    Raises:
        Diverged: on every rank alike.
        Interrupted: on every rank alike, when a rank was told to stop; a checkpoint has been made.
        UserError: too many training images cannot be read, or one of the validation images.
        RuntimeError: the ranks' weights are not the same, at the start or after an epoch.
    """
    plan, every = around.plan, config.tracking.log_every_steps
    # Before DDP, which would give every rank the first one's, and leave their EMA copies as they are.
    now = same_weights(state.model, f"before step {state.step}", in_epoch=not state.is_evaluated)
    state.weights_sha256 = state.weights_sha256 or {"start": now, "end": now}
    under = underway(config, state, around)
    if any(gather(around.stopped_by())):
        raise interrupted(state, around, "nothing was done since its checkpoint" if state.step else "it had not begun")
    while True:
        if state.step % plan.steps_per_epoch == 0 and not state.is_evaluated:
            yield from _end_epoch(under)
        if state.step == plan.total_steps:
            return
        optim.set_lr(state.optimizer, lr := optim.lr_at(state.step, config.optim, plan))
        verdicts = train_step(under)
        around.clock.step_done()
        if state.step % every == 0 or state.step % plan.steps_per_epoch == 0:
            verdicts += _judged(under, under.agreement.take(everything=True))
            yield _train_record(under, lr)
        if _is_probed(under, state.step):
            yield from _probe(under)
        yield from _act(under, verdicts)


@dataclass
class Underway:
    """What a start of a run has in its hands."""

    config: RunConfig
    state: State
    around: Surroundings
    net: nn.Module
    """The model, in DDP where there are several ranks."""
    agreement: Agreement
    samples: dict[int, list[list[int]]] = field(default_factory=dict)
    """Of the last steps: the images of each micro-batch on this rank."""
    bad_images: dict[int, dict[str, str]] = field(default_factory=dict)
    """Those that this rank has met."""
    saved_at: float = field(default_factory=time.monotonic)
    images: Tensor | None = None
    """A few of the last micro-batch, where a probe follows."""


def underway(config: RunConfig, state: State, around: Surroundings) -> Underway:
    """Wrap the model, warm its wrapping up, and set up what the ranks agree by."""
    net = distribute(state.model, around.place, around.plan.accumulation)
    net.train()
    with around.clock.pause():
        settle(net, config, around.plan.batch_per_rank, around.place.device)
    # fp16's loss scaling waits for the device in every step anyway.
    is_ahead = around.place.device.type == "cuda" and not state.scaler.is_enabled()
    return Underway(config, state, around, net, Agreement(around.place.device, LAG if is_ahead else 0, state.losses))


def train_step(under: Underway) -> list[Verdict]:
    """Do one optimizer step over the global batch: `plan.accumulation` micro-batches on each rank.

    Returns:
        What all ranks know of it; on CUDA of the step two before.
    """
    state, around = under.state, under.around
    accumulation, beat = around.plan.accumulation, around.beat
    loss_sum = torch.zeros((), device=around.place.device)
    state.optimizer.zero_grad(set_to_none=True)
    under.samples[state.step] = []
    under.samples.pop(state.step - LAG - 1, None)
    substituted = 0
    for micro in range(accumulation):
        beat(state.step, watchdog.IMAGES)
        with around.clock.data_wait():
            batch = next(around.train)
        under.samples[state.step].append(batch.indices.tolist())
        substituted += len(batch.bad)
        under.bad_images.update((index, image._asdict()) for index, image in batch.bad.items())
        if _is_probed(under, state.step + 1):
            under.images = batch.images[: activations.GLANCE_IMAGES].clone()
        beat(state.step, watchdog.COMPUTE)
        if isinstance(under.net, DistributedDataParallel):
            under.net.require_backward_grad_sync = micro == accumulation - 1
        loss = train_loss(under.net, batch, under.config) / accumulation
        state.scaler.scale(loss).backward()
        loss_sum += loss.detach()
    beat(state.step, watchdog.AGREE)
    word = under.agreement.agree(loss_sum, _wishes(under, substituted))
    beat(state.step, watchdog.UPDATE)
    verdicts = _optimizer_step(under, word)
    if state.ema is not None:
        state.ema.update(state.model)
    state.step += 1
    state.is_evaluated = False
    return verdicts


def _wishes(under: Underway, substituted: int) -> Wishes:
    every_s = 60 * (under.config.checkpoint.every_minutes or math.inf)
    is_due = under.around.place.is_first and time.monotonic() - under.saved_at > every_s
    unknown = len(under.bad_images.keys() - under.state.bad_images.keys())
    return Wishes(bool(under.around.stopped_by()), is_due, substituted, unknown)


def _optimizer_step(under: Underway, word: Tensor) -> list[Verdict]:
    """Clip and step, unless the loss or the gradient is not finite now or was before.

    The same everywhere: gradients and loss are averages over all ranks. With fp16 a gradient may overflow now and
    then; the scaler skips those steps alone and lowers its scale, and the loss or a vanished scale tells a divergence.
    """
    config, state, agreement = under.config, under.state, under.agreement
    parameters = [p for group in state.optimizer.param_groups for p in group["params"] if p.grad is not None]
    state.scaler.unscale_(state.optimizer)
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    norms = grad_norm, not state.scaler.is_enabled()
    agreement.put(state.step, word[0] / under.around.place.world, word[1:], norms, config.optim.stop_at_spike)
    verdicts = _judged(under, agreement.take())
    if config.optim.clip_grad is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, config.optim.clip_grad, grad_norm)
    if state.scaler.is_enabled():
        state.scaler.step(state.optimizer)
        state.scaler.update()
    else:
        # Fused AdamW reads this flag on the device and leaves weights and moments alone where it is 1.
        setattr(state.optimizer, "found_inf", agreement.is_bad)
        state.optimizer.step()
    return verdicts


def _judged(under: Underway, verdicts: list[Verdict]) -> list[Verdict]:
    """Take steps into the window and the counters; raise Diverged at the first bad one."""
    state = under.state
    for verdict in verdicts:
        if not verdict.is_good:
            norm_counts = not state.scaler.is_enabled()
            is_finite = math.isfinite(verdict.loss) and not (norm_counts and not math.isfinite(verdict.grad_norm))
            what = "the loss is a spike" if is_finite else "loss or gradient not finite"
            said = f"{what} at step {verdict.step} (loss {verdict.loss:g}, gradient norm {verdict.grad_norm:g})"
            numbers = {"loss": verdict.loss, "grad_norm": verdict.grad_norm}
            raise Diverged(said, verdict.step, under.samples[verdict.step], numbers)
        window = state.window
        state.window = Window(window.loss_sum + verdict.loss, verdict.grad_norm, window.steps + 1)
        state.substituted += verdict.substituted
        if verdict.is_spike:
            state.spikes.append(verdict.step)
    return verdicts


def _act(under: Underway, verdicts: list[Verdict]) -> Iterator[Record | Remark]:
    """Do what a rank has wished for: say which images are bad, save, stop."""
    is_stopped = any(verdict.stop for verdict in verdicts)
    is_saved = is_stopped or any(verdict.save for verdict in verdicts)
    if is_saved:
        verdicts = verdicts + _judged(under, under.agreement.take(everything=True))
    if any(verdict.unknown for verdict in verdicts):
        yield from _share_bad_images(under)
    if is_saved:
        with under.around.clock.pause():
            said = _save(under, is_best=False)
        if is_stopped:
            raise interrupted(under.state, under.around, _outcome(under, said))
        yield from said


def interrupted(state: State, around: Surroundings, saved: str) -> Interrupted:
    """Say by which signal and where a run was stopped; every rank must call it."""
    return Interrupted(f"stopped by {max(gather(around.stopped_by()))} after step {state.step}; {saved}")


def _outcome(under: Underway, said: list[Remark]) -> str:
    if not said:
        return "its checkpoint is written"
    return f"{said[0].text}; the newest is of step {under.around.store.newest_step or 0}"


def _share_bad_images(under: Underway) -> Iterator[Remark]:
    """Give every rank the list of all; stop past `data.max_bad_fraction`."""
    state, known = under.state, len(under.state.bad_images)
    for one in gather({index: image for index, image in under.bad_images.items() if index not in state.bad_images}):
        state.bad_images |= one
    count, num, limit = len(state.bad_images), under.around.num_train, under.config.images.max_bad_fraction
    if count > limit * num:
        first = min(state.bad_images.items())[1]
        said = (
            f"data.max_bad_fraction: {count} of {num} training images cannot be read, more than the share of {limit:g} "
            f"that is allowed; the first is {first['path']} ({first['why']}); mend them, or allow more"
        )
        raise UserError(*[said][: under.around.place.is_first])  # the other ranks leave it to the first one
    if known == 0 or count // 100 > known // 100:
        yield Remark(state.step, f"{count} of {num} training images cannot be read so far; "
                     "others of their class are used instead, see result.json")  # fmt: skip


def _end_epoch(under: Underway) -> Iterator[Record | Remark]:
    """Evaluate and save."""
    config, state, around = under.config, under.state, under.around
    with around.clock.pause():
        try:
            record = evaluate_state(config, state, around)
        except (Halted, UserError) as error:
            said = _save(under, is_best=False)
            raise interrupted(state, around, _outcome(under, said)) if isinstance(error, Halted) else error from None
        state.weights_sha256["end"] = same_weights(state.model, f"after step {state.step}")
        epoch = state.step // around.plan.steps_per_epoch
        is_best = record.raw.top1 > state.best.top1
        if is_best:
            state.best = Best(record.raw.top1, epoch, state.step)
        state.is_evaluated = True
        # Written down before the checkpoint: a run that is killed in between does the epoch again.
        yield record
        is_due = epoch % config.checkpoint.every_epochs == 0 or state.step == around.plan.total_steps
        if is_due or is_best:
            yield from _save(under, is_best)


def _save(under: Underway, is_best: bool) -> list[Remark]:
    """Write a checkpoint on the first rank; say so if the disk does not take it. The others wait."""
    state, around = under.state, under.around
    around.beat(state.step, watchdog.SAVE)
    state.losses = under.agreement.history
    state.saves += 1
    times = {
        "train_seconds": state.train_seconds + around.clock.train_seconds,
        "speed": speed_so_far(state, around.clock),
    }
    tensors, values = snapshot(state, times | around.facts)

    def write() -> str | int:
        try:
            return around.store.save(state.step, tensors, values, is_best)
        except NotSaved as error:
            return str(error)

    found = from_first(write)
    under.saved_at = time.monotonic()
    if isinstance(found, int):
        state.saved_bytes += found
        return []
    state.failed_saves += 1
    return [Remark(state.step, f"the checkpoint of step {state.step} could not be written ({found}), the "
                   f"{state.failed_saves}. such attempt")]  # fmt: skip


def _train_record(under: Underway, lr: float) -> TrainRecord:
    """Close the window."""
    state, around, window = under.state, under.around, under.state.window
    if state.scaler.is_enabled() and (scale := state.scaler.get_scale()) < _SMALLEST_LOSS_SCALE:
        message = f"every gradient overflows fp16 by step {state.step}, however small the loss is scaled"
        raise Diverged(message, state.step - 1, under.samples[state.step - 1], {"scale": scale})
    state.window = Window()
    return TrainRecord(
        step=state.step,
        epoch=state.step / around.plan.steps_per_epoch,
        samples_seen=state.step * under.config.global_batch,
        loss=window.loss_sum / window.steps,
        lr=lr,
        grad_norm=window.grad_norm,
        speed=Speed(**around.clock.window()),
        world=around.place.world,
    )


def _is_probed(under: Underway, step: int) -> bool:
    """Say whether a probe follows a step; the first rank alone makes it, and the others wait in their next exchange."""
    every, around = under.config.tracking.probe_every_steps, under.around
    if every is None or not around.sites or not around.place.is_first:
        return False
    return step % every == 0 or step == around.plan.total_steps


def _probe(under: Underway) -> Iterator[ProbeRecord | Remark]:
    """Look at the norms. It is a pause: LN has less to be asked than DyT, and speeds compare what training takes."""
    state, around, images = under.state, under.around, under.images
    if images is None:
        return
    under.images = None
    around.beat(state.step, watchdog.PROBE)
    try:
        with around.clock.pause():
            found = activations.glance(state.model, around.sites, images, autocast(under.config, around.place.device))
    except RuntimeError as error:  # such as memory that is full; no run ends for a look at it
        yield Remark(state.step, f"the norms after step {state.step} could not be looked at ({first_line(error)})")
        return
    epoch = state.step / around.plan.steps_per_epoch
    yield ProbeRecord(state.step, epoch, state.step * under.config.global_batch, *found)


def evaluate_state(config: RunConfig, state: State, around: Surroundings) -> EvalRecord:
    """Evaluate the raw and, if there are, the EMA weights over the whole validation split."""

    def watched() -> Iterator[Batch]:
        batches = around.val()
        while True:
            around.beat(state.step, watchdog.EVALUATION_IMAGES)
            batch = next(batches, None)
            around.beat(state.step, watchdog.EVALUATE)
            if batch is None:
                return
            yield batch

    def accuracy(model: nn.Module) -> Accuracy:
        # The statistics of a BatchNorm that was left are each rank's own; from here on all have the same.
        average_buffers(model)
        return evaluate(
            model, watched(), around.num_val, autocast(config, around.place.device), lambda: bool(around.stopped_by())
        )

    return EvalRecord(
        step=state.step,
        epoch=state.step / around.plan.steps_per_epoch,
        samples_seen=state.step * config.global_batch,
        raw=accuracy(state.model),
        ema=accuracy(state.ema.module) if state.ema is not None else None,
    )
