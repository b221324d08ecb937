"""What checkpoints cost here: `python tests/checkpoint_cost.py`, a table of real trainings and no test.

    python tests/checkpoint_cost.py --every 2 model=vit_ti data.image_size=64 global_batch=16
    python tests/checkpoint_cost.py --every 20 --steps 200 model=vit_b precision=bf16 global_batch=128

The words are keys of dytrun train. Two runs of the same steps, one that is saved every so many seconds and one that is
never saved, take turns in this process; the engine is the real one, the images are synthetic. A round is the seconds
of its steps, pauses for saving included, so that what a save slows down elsewhere counts too.

    step        milliseconds of a step, median over rounds
    ratio       with over without, median over the pairs of rounds
    save        milliseconds of a whole save, from the ready tensors to the next step, and its bytes
    parts       what it is made of, done apart on the same tensors: copy from the device, write, sha256, fsync, load
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from conftest import config_of
from safetensors.torch import load_file, save_file

from dytrun import checkpoint, machine, optim
from dytrun.arm import build_arm
from dytrun.checkpoint import Store
from dytrun.config import RunConfig
from dytrun.data import RankShare, train_batches
from dytrun.distributed import Place
from dytrun.engine import Surroundings, Underway, _act, train_step, underway
from dytrun.sources import load_data
from dytrun.state import State, build_state, snapshot
from dytrun.throughput import Clock

_ALWAYS = ("data=synthetic", "augment=none", "epochs=1", "optim.warmup_epochs=0", "tracking.mode=off",
           "machine.workers=0", "optim.lr=1e-4")  # fmt: skip
_CPU = ("model=vit_ti", "data.image_size=64", "global_batch=16", "machine.max_batch_per_rank=16", "ema=on")


class Saves(Store):
    """A store that notes how long each save took, and its bytes."""

    taken: list[tuple[float, int]]

    def save(self, *args, **kwargs) -> int:
        """Save, and note."""
        since = time.perf_counter()
        written = super().save(*args, **kwargs)
        self.taken.append((time.perf_counter() - since, written))
        return written


def main() -> None:
    """Train both runs in turns and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=float, default=2.0, help="seconds between saves")
    parser.add_argument("--rounds", type=int, default=6, help="pairs of rounds")
    parser.add_argument("--steps", type=int, default=40, help="steps a round")
    parser.add_argument("--dir", help="on the disk that is to be measured; default: a temporary one")
    parser.add_argument("keys", nargs="*", help=f"keys of dytrun train; default: {' '.join(_CPU)}")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        _measure(options, Path(folder))


def _measure(options: argparse.Namespace, folder: Path) -> None:
    steps = options.steps * (options.rounds + 1) + 8
    keys = [*_ALWAYS, *(options.keys or _CPU), f"runs_dir={folder}"]
    batch = config_of(*keys).global_batch
    keys += [f"data.num_train={steps * batch}"]
    arms = {name: _arm(config_of(*keys, f"checkpoint.every_minutes={minutes}"), folder / name)
            for name, minutes in (("with", options.every / 60), ("without", "null"))}  # fmt: skip
    for arm in arms.values():
        _steps(arm, options.steps)  # warm
    store = arms["with"].around.store
    assert isinstance(store, Saves)
    store.taken.clear()
    times: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(options.rounds):
        for name in sorted(arms, reverse=bool(number % 2)):
            times[name].append(_steps(arms[name], options.steps) / options.steps)
    state, place = arms["with"].state, arms["with"].around.place
    _print(f"{machine.device_name(place.device)}; {options.keys or list(_CPU)}; {sum(p.numel() for p in state.model.parameters()):,} weights; disk {folder}")  # fmt: skip  # noqa: E501
    ratios = [one / other for one, other in zip(times["with"], times["without"], strict=True)]
    _print(f"step   {1e3 * statistics.median(times['without']):.1f} ms without, {1e3 * statistics.median(times['with']):.1f} ms saved every {options.every:g} s ({len(store.taken)} saves in {options.rounds} x {options.steps} steps)")  # fmt: skip  # noqa: E501
    _print(f"ratio  {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    seconds, size = statistics.median(one for one, _ in store.taken), store.taken[-1][1]
    _print(f"save   {1e3 * seconds:.1f} ms, {size:,} bytes, {size / seconds / 1e6:,.0f} MB/s; "
           f"at every 15 minutes {100 * seconds / 900:.3f} % of the time")  # fmt: skip
    for name, part in _parts(state, folder / "parts"):
        _print(f"  {name:<8} {1e3 * part:7.1f} ms  {size / part / 1e6:8,.0f} MB/s")


def _print(line: str) -> None:
    print(line, flush=True)  # noqa: T201


def _arm(config: RunConfig, folder: Path) -> Underway:
    """Set a run up as run.py does, on one rank."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    machine.prepare_torch(config.machine, device)
    place, data = Place(0, 1, device), load_data(config.data)
    plan = optim.plan_steps(config, len(data.train.labels), 1)
    share = RankShare(0, 1, plan.batch_per_rank, plan.accumulation, plan.steps_per_epoch, 0, plan.total_steps)
    model, _ = build_arm(config, data.num_classes)
    store = Saves(folder, config.checkpoint.keep)
    store.taken = []
    around = Surroundings(plan, place, Clock(device, config.global_batch),
                          train_batches(config, data, share, device, 0), lambda: iter(()), 0, store, [])  # fmt: skip
    under = underway(config, build_state(model.to(device), config, device), around)
    under.saved_at = 0.0  # between its turns, seconds before now
    return under


def _steps(arm: Underway, count: int) -> float:
    """Seconds of that many steps and of the saves that fall due, the device's work included."""
    arm.saved_at += time.monotonic()  # the other arm's turn does not count
    _wait(arm)
    since = time.perf_counter()
    for _ in range(count):
        verdicts = train_step(arm)
        arm.around.clock.step_done()
        list(_act(arm, verdicts))
    _wait(arm)
    seconds = time.perf_counter() - since
    arm.saved_at -= time.monotonic()
    return seconds


def _wait(arm: Underway) -> None:
    if arm.around.place.device.type == "cuda":
        torch.cuda.synchronize()


def _parts(state: State, folder: Path) -> Iterator[tuple[str, float]]:
    """Name and seconds of each part of a save, the median of five."""
    folder.mkdir()
    tensors, _ = snapshot(state, {})
    here: dict[str, dict[str, torch.Tensor]] = {}
    files = [folder / f"{part}.safetensors" for part in tensors]

    def copy() -> None:
        for part, values in tensors.items():
            here[part] = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in values.items()}

    def each(do: Callable[[Path], object]) -> Callable[[], None]:
        return lambda: [do(file) for file in files] and None

    todo: list[tuple[str, Callable[[], None]]] = [
        ("copy", copy),
        ("write", each(lambda file: save_file(here[file.stem], file))),
        ("sha256", each(checkpoint._sha256)),
        ("fsync", each(checkpoint._sync)),
        ("load", each(load_file)),
    ]
    seconds: dict[str, list[float]] = {name: [] for name, _ in todo}
    for _ in range(5):
        for name, do in todo:
            since = time.perf_counter()
            do()
            seconds[name].append(time.perf_counter() - since)
    for name, found in seconds.items():
        yield name, statistics.median(found)


if __name__ == "__main__":
    main()
