"""`bench=model`: what the norms are worth in a whole model: its training step and its inference, arm beside arm.

All arms are in one process and take turns; images are random and on the device already, so that the loader is not
measured. `identity` has no norms at all: no replacement of a norm can be faster than that.
"""

import gc
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
import torch._dynamo
from torch import nn

from dytrun import arm, norm, paired, timing
from dytrun.batch import Batch
from dytrun.bench_config import BenchConfig
from dytrun.compute import autocast, train_loss
from dytrun.config import RunConfig
from dytrun.convert import convert_norms
from dytrun.errors import UserError
from dytrun.model import compile_model, put_on
from dytrun.norm_config import PointWiseConfig
from dytrun.records import Found, Table
from dytrun.sites import norm_sites
from dytrun.state import State, build_state

_COLUMNS = ("arm", "computed by", "img/s", "step ms p50", "p95", "time / first", "saved MiB", "peak GiB")
_WARMUP_STEPS = 3


class _Arm(NamedTuple):
    name: str
    computed_by: str
    state: State
    own_bytes: int
    """Of its weights, gradients and moments; 0 on a CPU, where nobody counts."""


def measure(config: BenchConfig, device: torch.device, say: Callable[[str], None]) -> Found:
    """Measure every mode and pass; a table each.

    Raises:
        UserError: the model has no norms to convert, or cannot be compiled so.
    """
    config = config._replace(run=at_rest(config.run))
    _warm_libraries(device)
    tables, values = [], []
    size = batch_size(config.bench.batch, device)
    batch = random_batch(config.run, size, device)
    for mode in config.bench.modes:
        say(f"{config.run.model.name}, {mode}: building and warming up {len(config.bench.arms)} arms")
        arms = _arms(config, mode, batch, device)
        for what in config.bench.passes:  # the arms of a mode are in memory together, those of two modes are not
            say(f"{mode}, {what}: {config.bench.rounds} rounds")
            calls = [_call(one, what, batch, config.run) for one in arms]
            facts = [_facts(one, call, what, device) for one, call in zip(arms, calls, strict=True)]
            times = _rounds(calls, config, device)
            tables.append(_table(f"{config.run.model.name} {mode} {what}", arms, facts, times, config, size))
            values.append(_values(mode, what, arms, facts, times))
        del arms
        gc.collect()
    return Found(tables, {"batch": size, "image_size": config.run.images.image_size, "measured": values})


def _warm_libraries(device: torch.device) -> None:
    """Let CUDA's libraries take the memory that they keep, which would else count as the first arm's."""
    x = torch.ones(64, 64, device=device, requires_grad=True)
    for dtype in (torch.float32, torch.bfloat16):
        (x.to(dtype) @ x.to(dtype)).sum().backward()


def at_rest(run: RunConfig) -> RunConfig:
    """Let the weights stay where they begin: a training of random images that goes astray has other numbers than one
    that does well, and a processor is ten times as slow on some of them (subnormal ones).
    """
    return run.model_copy(update={"optim": run.optim.model_copy(update={"lr": 1e-12, "min_lr": 0.0})})


def batch_size(setting: int | str, device: torch.device) -> int:
    """Images a step, where nobody has said how many: enough to fill a large GPU, or two cores for a second."""
    return int(setting) if setting != "auto" else 128 if device.type == "cuda" else 4


def random_batch(config: RunConfig, size: int, device: torch.device) -> Batch:
    """Return random images and labels on the device, the same ones for every arm."""
    source = torch.Generator().manual_seed(config.seed)
    side, classes = config.images.image_size, config.images.num_classes or 1000
    images = torch.randn(size, 3, side, side, generator=source)
    targets = torch.randint(classes, (size,), generator=source)
    return Batch(images.to(device), targets.to(device), torch.arange(size))


def bare_step(state: State, batch: Batch, config: RunConfig) -> None:
    """Do one training step and nothing else: no clock, no record, no check."""
    state.optimizer.zero_grad(set_to_none=True)
    state.scaler.scale(train_loss(state.model, batch, config)).backward()
    state.scaler.step(state.optimizer)
    state.scaler.update()


def _arms(config: BenchConfig, mode: str, batch: Batch, device: torch.device) -> list[_Arm]:
    """Build the arms of one mode; the formula is what DyT is under a compiler, so it is no arm of its own there."""
    names = [
        name for name in config.bench.arms if mode == "eager" or name != "formula" or "dyt" not in config.bench.arms
    ]
    how = "off" if mode == "eager" else config.run.machine.compile if config.run.machine.compile != "off" else "model"
    # Arms share the code of their blocks, which is compiled for each of them.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4096)
    arms = []
    for name in names:
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        model, computed_by = _model(name, how, config.run, device)
        state = build_state(model, config.run, device)
        compile_model(model, how)
        model.train()
        for _ in range(_WARMUP_STEPS):
            bare_step(state, batch, config.run)
        after = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        arms.append(_Arm(name, computed_by, state, after - before))
    return arms


def _model(name: str, how: str, config: RunConfig, device: torch.device) -> tuple[nn.Module, str]:
    """Return the model of an arm, and what computes its norms. `dyt` is what norm= says, if that is point-wise."""
    model = arm.build_plain(config, config.images.num_classes or 1000)
    chosen = config.norm if isinstance(config.norm, PointWiseConfig) else None
    function = chosen.name if chosen else "dyt"
    if name == "identity":
        sites = norm_sites(model)
        if not sites:
            raise UserError(f"model: {config.model.name} has no LayerNorm to leave out; choose another model")
        for site in sites:
            model.set_submodule(site.name, nn.Identity())
    elif name in ("dyt", "formula"):
        convert_norms(model, arm.conversion(chosen) if chosen else "dyt")
        for layer in model.modules():
            if isinstance(layer, norm.PointWise) and name == "formula":
                layer.implementation = "formula"
    elif name == "rms":
        convert_norms(model, "rms")
    with autocast(config, device):
        by = {
            "identity": "no norms",
            "formula": f"{norm.IMPLEMENTATIONS['formula']}, {'eager' if how == 'off' else how}",
        }
        computed_by = by.get(name) or norm.described(function if name == "dyt" else name, how, device)
    return put_on(model, config, device), computed_by


def _call(one: _Arm, what: str, batch: Batch, config: RunConfig) -> Callable[[], object]:
    if what == "train":
        return lambda: bare_step(one.state, batch, config)

    def infer() -> None:
        with torch.inference_mode(), autocast(config, batch.images.device):
            one.state.model(batch.images)

    return infer


def _facts(one: _Arm, call: Callable[[], object], what: str, device: torch.device) -> dict[str, Any]:
    """Warm an arm up for a pass; measure its memory."""
    one.state.model.train(what == "train")
    for _ in range(_WARMUP_STEPS):
        call()
    saved = timing.saved_bytes(call, list(one.state.model.parameters())) if what == "train" else 0
    if device.type != "cuda":
        return {"saved_bytes": saved, "peak_bytes": None}
    timing.settle(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    timing.settle(device)
    weights = sum(tensor.nbytes for tensor in one.state.model.state_dict().values())
    own = one.own_bytes if what == "train" else weights  # inference alone would keep neither gradients nor moments
    return {"saved_bytes": saved, "peak_bytes": torch.cuda.max_memory_allocated(device) - before + own}


def _rounds(calls: list[Callable[[], object]], config: BenchConfig, device: torch.device) -> np.ndarray:
    """Measure in turn; return milliseconds, (arms, rounds, steps)."""
    steps = (8 if device.type == "cuda" else 1) if config.bench.steps == "auto" else config.bench.steps

    def unit(call: Callable[[], object]) -> Callable[[], np.ndarray]:
        def once(mark: Callable[[], None]) -> None:
            mark()
            call()
            mark()

        lead = median(timing.host_ms(device, call) for _ in range(3)) if device.type == "cuda" else 0.0
        return lambda: timing.spans_ms(device, once, steps, steps * lead)[:, 0]

    return paired.in_turn([unit(call) for call in calls], config.bench.rounds)


def _table(
    title: str, arms: list[_Arm], facts: list[dict[str, Any]], times: np.ndarray, config: BenchConfig, size: int
) -> Table:
    confidence = config.bench.confidence
    by_round = np.median(times, axis=2)
    first = arms[0].name
    again = next((number for number, one in enumerate(arms) if number and one.name == first), None)
    itself = None if again is None else paired.ratio(by_round[again], by_round[0], confidence)
    rows, notes = [], []
    for number, (one, fact) in enumerate(zip(arms, facts, strict=True)):
        p50, p95 = (float(np.percentile(times[number], share)) for share in (50, 95))
        found = paired.ratio(by_round[number], by_round[0], confidence)
        peak = "-" if fact["peak_bytes"] is None else f"{fact['peak_bytes'] / 2**30:.2f}"
        rows.append([one.name, one.computed_by, f"{1e3 * size / p50:,.1f}", f"{p50:.1f}", f"{p95:.1f}",
                     str(found) if number else "1", f"{fact['saved_bytes'] / 2**20:.1f}", peak])  # fmt: skip
        if number and one.name != first:
            notes.append(paired.verdict(one.name, found, first, itself))
    if itself is not None:
        notes.append(f"{first} against itself: {itself}")
    if config.run.precision != "fp32":
        notes.append("under autocast LayerNorm gives float32, RMSNorm what it is given, the point-wise layers "
                     f"{config.run.precision}, as a linear layer does")  # fmt: skip
    notes.append(f"{size} images a step, {config.run.precision}; medians of {config.bench.rounds} rounds, intervals of "
                 f"{confidence:g}; saved: kept for the backward pass")  # fmt: skip
    return Table(title, _COLUMNS, rows, notes)


def _values(mode: str, what: str, arms: list[_Arm], facts: list[dict[str, Any]], times: np.ndarray) -> dict[str, Any]:
    found = [
        {"arm": one.name, "computed_by": one.computed_by, "step_ms": times[number].tolist(), **fact}
        for number, (one, fact) in enumerate(zip(arms, facts, strict=True))
    ]
    return {"mode": mode, "pass": what, "arms": found}
