"""What looking at the norms costs training: python tests/probe_cost.py STEPS ROUNDS [OVERRIDE …].

Three loops take turns in one process, in a random order every round: dytrun's own without probes, the same again (how
far it is from itself is the instrument's error), and with a probe every STEPS steps. A round is STEPS steps of
`dytrun train OVERRIDE …` on a batch that is in memory. Besides, the probe alone.
"""

import itertools
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from dytrun import activations, machine, paired, timing
from dytrun.arm import build_arm
from dytrun.bench_model import at_rest, random_batch
from dytrun.bench_trainer import training_state
from dytrun.checkpoint import Store
from dytrun.compose import expand
from dytrun.compute import autocast
from dytrun.config import RunConfig
from dytrun.distributed import Place
from dytrun.engine import fit
from dytrun.optim import Plan
from dytrun.surroundings import Surroundings
from dytrun.throughput import Clock

FOREVER = 10**12
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def loop(run: RunConfig, steps: int, is_probed: bool, folder: Path):
    """Return what does a round of `steps` optimizer steps and gives its milliseconds."""
    tracking = {"log_every_steps": steps, "probe_every_steps": steps if is_probed else None}
    run = run.model_copy(update={"tracking": run.tracking.model_copy(update=tracking)})
    size = run.global_batch
    _, sites = build_arm(run, run.data.num_classes or 1000)
    around = Surroundings(
        Plan(FOREVER, FOREVER, 0, size, 1), Place(0, 1, DEVICE), Clock(DEVICE, size),
        itertools.repeat(random_batch(run, size, DEVICE)), lambda: iter(()), 0, Store(folder, 2),
        [site.name for site in sites],
    )  # fmt: skip
    records = fit(run, training_state(run, DEVICE), around)

    def once() -> None:
        kinds = [type(next(records)).__name__ for _ in range(1 + is_probed)]
        assert kinds == ["TrainRecord", "ProbeRecord"][: len(kinds)]
        timing.settle(DEVICE)

    return lambda: timing.wall_ms(once)


def main(steps: int, rounds: int, overrides: list[str]) -> None:
    run = at_rest(expand(overrides).configs[0])
    run = run.model_copy(update={"checkpoint": run.checkpoint.model_copy(update={"every_minutes": None})})
    machine.prepare_torch(run.machine, DEVICE)
    with tempfile.TemporaryDirectory() as folder:
        loops = [loop(run, steps, is_probed, Path(folder)) for is_probed in (False, False, True)]
        paired.in_turn(loops, 2)
        times = paired.in_turn(loops, rounds)
    state = training_state(run, DEVICE)
    names = [site.name for site in build_arm(run, run.data.num_classes or 1000)[1]]
    images = random_batch(run, activations.GLANCE_IMAGES, DEVICE).images
    alone = [
        timing.wall_ms(lambda: activations.glance(state.model, names, images, autocast(run, DEVICE))) for _ in range(30)
    ]
    step_ms, probe_ms = statistics.median(times[0]) / steps, statistics.median(alone[5:])
    itself, found = (paired.ratio(times[number], times[0], 0.95) for number in (1, 2))
    print(f"{run.model.name} {run.norm.name} compile={run.machine.compile}, {run.global_batch} images a step, "
          f"{machine.device_name(DEVICE)}")  # fmt: skip
    print(f"step {step_ms:.2f} ms, a probe of {len(names)} sites {probe_ms:.2f} ms")
    print(
        f"a probe every {steps} steps, {rounds} rounds: {found} of the time without; without, against itself: {itself}"
    )
    for every in sorted({steps, 44, 500}):
        print(f"by the probe's own time, one every {every} steps: {100 * probe_ms / every / step_ms:.3f} %")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
