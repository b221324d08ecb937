"""`bench=trainer`: what dytrun's own loop costs, beside a bare loop over the same model, batch and optimizer.

The loop is the one of `dytrun train`: gradient norm, divergence check, clock, learning rate, a record a window that
goes to metrics.jsonl. The images are on the device already; the loader is another question.
"""

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from dytrun import arm, norm, paired, timing
from dytrun.bench_config import BenchConfig
from dytrun.bench_model import at_rest, bare_step, batch_size, random_batch
from dytrun.checkpoint import Store
from dytrun.compute import autocast
from dytrun.config import RunConfig
from dytrun.distributed import Place
from dytrun.engine import fit
from dytrun.model import compile_model, put_on
from dytrun.optim import Plan
from dytrun.records import Found, Position, Table, TrainRecord
from dytrun.state import State, build_state
from dytrun.surroundings import Surroundings
from dytrun.throughput import Clock
from dytrun.tracking import Tracker

_WARMUP_ROUNDS = 2
_FOREVER = 10**9  # steps; no epoch ends while it is measured
_BARE, _OURS = "bare loop", "dytrun"


def measure(config: BenchConfig, device: torch.device, say: Callable[[str], None]) -> Found:
    """Measure both loops in turn, the bare one twice."""
    run, steps = _as_measured(config.run, config.bench.steps), config.bench.steps
    size = batch_size(config.bench.batch, device)
    batch = random_batch(run, size, device)
    say(f"{run.model.name}, {run.norm.name}: {size} images a step, {steps} steps a round, {config.bench.rounds} rounds")

    def bare() -> Callable[[], float]:
        state = training_state(run, device)

        def once() -> None:
            for _ in range(steps):
                bare_step(state, batch, run)
            timing.settle(device)

        return lambda: timing.wall_ms(once) / steps

    with tempfile.TemporaryDirectory(prefix="dytrun-bench-") as scratch:
        state, plan = training_state(run, device), Plan(_FOREVER, _FOREVER, 0, size, 1)
        around = Surroundings(
            plan, Place(0, 1, device), Clock(device, size), itertools.repeat(batch), lambda: iter(()), 0,
            Store(Path(scratch) / "checkpoints", run.checkpoint.keep), [],
        )  # fmt: skip
        tracker = Tracker(run, Path(scratch), Position(0, True), say)
        records = fit(run, state, around)

        def ours() -> None:
            record = next(records)
            assert isinstance(record, TrainRecord)
            tracker.log(record)
            timing.settle(device)

        loops = [bare(), bare(), lambda: timing.wall_ms(ours) / steps]
        try:
            paired.in_turn(loops, _WARMUP_ROUNDS)
            times = paired.in_turn(loops, config.bench.rounds)
        finally:
            tracker.finish(None, in_haste=True)
    itself, found = (paired.ratio(times[number], times[0], config.bench.confidence) for number in (1, 2))
    rows = [[name, f"{paired.median_ms(row):.2f}", str(ratio)] for name, row, ratio in
            zip((_BARE, _BARE, _OURS), times, ("1", itself, found), strict=True)]  # fmt: skip
    notes = [
        paired.verdict(_OURS, found, f"the {_BARE}", itself),
        f"overhead: {100 * (found.median - 1):+.2f} % (median of {config.bench.rounds} rounds of {steps} steps)",
    ]
    with autocast(run, device):
        computed_by = norm.described(run.norm.name, run.machine.compile, device)
    title = f"{run.model.name} {run.norm.name} ({computed_by}) {run.precision}, {size} images a step"
    values = {
        "computed_by": computed_by,
        "batch": size,
        "steps": steps,
        "bare_ms": times[:2].tolist(),
        "dytrun_ms": times[2].tolist(),
    }
    return Found([Table(title, ("loop", "step ms", "time / first"), rows, notes)], values)


def _as_measured(run: RunConfig, steps: int) -> RunConfig:
    """Let a record be due after each round, a probe and a checkpoint never; the weights stay as they are."""
    tracking = run.tracking.model_copy(update={"log_every_steps": steps, "probe_every_steps": None, "mode": "off"})
    checkpoint = run.checkpoint.model_copy(update={"every_minutes": None})
    return at_rest(run).model_copy(update={"tracking": tracking, "checkpoint": checkpoint})


def training_state(run: RunConfig, device: torch.device) -> State:
    """Build the model that `norm=` says, compiled if that is asked for, and its optimizer."""
    model, _ = arm.build_arm(run, run.images.num_classes or 1000)
    model = put_on(model, run, device)
    compile_model(model, run.machine.compile)
    model.train()
    return build_state(model, run, device)
