"""`bench=data`: what each stage of a training image takes, what the loader gives, and whether that feeds the model.

The loader is the one of `dytrun train`: finished
batches on the device. Beside it stands timm's, if that is asked for, in turn; and the model's training step on images
that are on the device already, which says how many of them a device could take.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from dytrun import bench_model, bench_stages, bench_trainer, machine, paired, timing, timm_loader
from dytrun.batch import Batch
from dytrun.bench_config import BenchConfig
from dytrun.config import RunConfig
from dytrun.data import RankShare, train_batches
from dytrun.errors import UserError
from dytrun.loader_arm import LoaderArm
from dytrun.records import Found, Table
from dytrun.sources import Data, load_data

_OURS, _TIMM = "dytrun", "timm"
_FOREVER = 10**9  # steps; the loader does not end while it is measured
_STEP_ROUNDS, _STEP_MS = 5, 500.0


class Fed(NamedTuple):
    """What the loader gives and the model takes, in images a second."""

    per_core: float
    cores: int
    per_device: float
    devices: int

    @property
    def share(self) -> float:
        """What all cores load over what all devices take."""
        return self.per_core * self.cores / (self.per_device * self.devices)

    @property
    def cores_needed(self) -> float:
        """Cores like these that would feed the devices."""
        return self.per_device * self.devices / self.per_core


class _Rates(NamedTuple):
    """Of one loader with one number of processes, a value a round."""

    loader: str
    workers: int
    images_per_s: np.ndarray
    cpu_s: np.ndarray
    """Seconds of processors an image."""

    @property
    def per_core(self) -> float:
        """Images that a second of one processor loads; where nobody counts those, the share of each process."""
        found = 1 / float(np.median(self.cpu_s))
        return found if np.isfinite(found) else float(np.median(self.images_per_s)) / max(1, self.workers)


def measure(config: BenchConfig, device: torch.device, say: Callable[[str], None]) -> Found:
    """Measure the stages, the loaders in turn, and the step.

    Raises:
        UserError: there is no data, none of it can be read, or timm's loader does not have this recipe.
    """
    run, bench = config.run, config.bench
    batch = _batch(config)
    if bench.peer is None and bench.peer_root is not None:
        raise UserError("bench.peer_root: nobody reads it; say bench.peer=timm too")
    if bench.peer is not None:
        timm_loader.check(run, batch)
    data, files = _loaded(run), None
    if bench.peer is not None:
        files = timm_loader.Files(run, data.train, data.num_classes, bench.peer_root)
    say(f"{data.num_classes:,} classes, {len(data.train.labels):,} training images")
    stages = bench_stages.measure(run, data.train, bench.rounds)
    rates, peer = _loaders(config, (data, files), device, say)
    tables = [*stages.tables, _loader_table(rates, config, device, peer)]
    values: dict[str, Any] = {
        "data": {"name": run.images.name, "root": run.images.root, "num_train": len(data.train.labels)},
        "recipe": run.augment.model_dump(mode="json"), "image_size": run.images.image_size, "batch": batch,
        "peer": peer, **stages.values,
        "loaders": [{"loader": one.loader, "workers": one.workers, "images_per_s": one.images_per_s.tolist(),
                     "cpu_s_per_image": one.cpu_s.tolist()} for one in rates],
    }  # fmt: skip
    if bench.device:
        say(f"{run.model.name}: its training step, without a loader")
        step_batch, per_s = _step(config, data.num_classes, device)
        _, devices = machine.resolve_devices(run.machine.devices)
        best = max((one for one in rates if one.loader == _OURS), key=lambda one: one.workers)
        fed = Fed(best.per_core, machine.cores(), float(np.median(per_s)), devices)
        tables.append(_fed_table(fed, run, device, (step_batch, best.workers)))
        said = {"share": fed.share, "cores_needed": fed.cores_needed, "verdict": verdict(fed)}
        values |= {"step_batch": step_batch, "step_images_per_s": per_s.tolist(), "fed": fed._asdict() | said}
    return Found(tables, values)


def verdict(fed: Fed) -> str:
    """Say in a sentence which of the two waits for the other."""
    cores = f"{fed.cores_needed:,.1f}" if fed.cores_needed >= 0.1 else f"{fed.cores_needed:.1g}"
    needed = f"{cores} cores are needed, {fed.cores} are here"
    if fed.share < 1:
        return f"data-bound: the cores load {fed.share:.2f} of the images that the model could take; {needed}"
    return f"compute-bound: the cores could load {fed.share:.1f} times the images that the model takes; {needed}"


def compared(what: str, found: paired.Ratio, itself: paired.Ratio) -> str:
    """Say in a sentence what a ratio to timm's images a second allows to be said."""
    said = f"{what}: {found} times timm's images a second"
    is_beyond = found.is_beyond(itself)
    if is_beyond is None:
        return f"{said}; too few rounds ({found.n}) for an interval, nothing may be concluded"
    if not is_beyond:
        return f"{said}; no further from 1 than the error of the measurement (timm against itself {itself})"
    return f"{said}, {'more' if found.median > 1 else 'fewer'} (timm against itself {itself})"


def _batch(config: BenchConfig) -> int:
    if config.bench.batch != "auto":
        return int(config.bench.batch)
    return min(config.run.machine.max_batch_per_rank or config.run.global_batch, config.run.global_batch)


def _loaded(run: RunConfig) -> Data:
    """Find the data; a training split alone will do."""
    try:
        return load_data(run.images)
    except UserError:
        if run.images.val_split != run.images.train_split:
            try:
                return load_data(run.images.model_copy(update={"val_split": run.images.train_split}))
            except UserError:
                pass  # the first complaint is the one to hear
        raise


def _loaders(
    config: BenchConfig,
    images: tuple[Data, timm_loader.Files | None],
    device: torch.device,
    say: Callable[[str], None],
) -> tuple[list[_Rates], dict[str, Any] | None]:
    """Measure the loaders in turn, timm's twice where it has files; return their rates, and what timm's is."""
    run, bench, batch = config.run, config.bench, _batch(config)
    data, files = images
    counts = [machine.worker_count(run.machine.workers, device)] if bench.workers is None else bench.workers
    names, arms = [], []
    try:
        for workers in counts:
            ours = (_OURS, partial(_our_batches, run, data, (batch, workers), device))
            peers = [] if files is None else [(_TIMM, partial(files.batches, run, batch, workers, device))] * 2
            for name, start in (*peers, ours):
                say(f"{name} with {workers} process(es): starting and warming up")
                arms.append(LoaderArm(start, batch, device))
                arms[-1].plan(bench.unit_s)
                names.append((name, workers))
        say(f"{len(arms)} loader(s) in turn, {bench.rounds} rounds of {bench.unit_s:g} s")
        found = paired.in_turn([arm.turn for arm in arms], bench.rounds)
    finally:
        for arm in arms:
            arm.close()
    rates = [_Rates(*name, *values.T) for name, values in zip(names, found, strict=True)]
    if files is None:
        return rates, None
    about = {"name": _TIMM, "reads": files.reads, "num_train": files.num, "transform": files.transform}
    return rates, about | {"differs": files.num != len(data.train.labels)}


def _our_batches(run: RunConfig, data: Data, sizes: tuple[int, int], device: torch.device) -> Iterator[Batch]:
    """Return what one rank trains on, of (batch, workers) = `sizes`; no last, smaller batch, and no end."""
    batch, workers = sizes
    num = len(data.train.labels)
    if num < batch:
        data = data._replace(train=data.train.part(np.arange(batch) % num))
    share = RankShare(0, 1, batch, 1, max(1, num // batch), 0, _FOREVER)
    return train_batches(run, data, share, device, workers)


def _step(config: BenchConfig, num_classes: int, device: torch.device) -> tuple[int, np.ndarray]:
    """Train on one batch that is on the device; return its images, and images a second of each round."""
    size = bench_model.batch_size(config.bench.batch, device)
    if config.bench.batch == "auto" and device.type == "cuda":
        size = _batch(config)
    data = config.run.images.model_copy(update={"num_classes": num_classes})
    run = bench_model.at_rest(config.run.model_copy(update={"data": data}))
    state = bench_trainer.training_state(run, device)
    batch = bench_model.random_batch(run, size, device)

    def steps(count: int) -> float:
        def do() -> None:
            for _ in range(count):
                bench_model.bare_step(state, batch, run)
            timing.settle(device)

        return timing.wall_ms(do) / count

    steps(2)  # the first is slow, and one that is compiled very slow
    count = max(1, round(_STEP_MS / steps(1)))
    return size, 1e3 * size / np.array([steps(count) for _ in range(_STEP_ROUNDS)])


def _loader_table(rates: list[_Rates], config: BenchConfig, device: torch.device, peer: dict[str, Any] | None) -> Table:
    cores, rows, notes = machine.cores(), [], []
    columns = ["loader", "processes", "images/s", "cores busy", "images/s a core", f"on {cores} core(s)"]
    columns += [] if peer is None else ["images/s / timm's", "a core / timm's"]
    for place, one in enumerate(rates):
        speed, cpu_s = float(np.median(one.images_per_s)), float(np.median(one.cpu_s))
        row = [one.loader, str(one.workers), f"{speed:,.1f}", f"{speed * cpu_s:.2f}", f"{one.per_core:,.1f}",
               f"{one.per_core * cores:,.0f}"]  # fmt: skip
        if peer is not None:
            first = rates[place - place % 3]
            found, by_core = _ratios(one, first, config.bench.confidence)
            row += ["1", "1"] if one is first else [str(found), str(by_core)]
            if one.loader == _OURS:
                itself, itself_by_core = _ratios(rates[place - 1], first, config.bench.confidence)
                notes.append(compared(f"{one.workers} process(es)", found, itself))
                notes.append(compared(f"{one.workers} process(es), by processor time", by_core, itself_by_core))
        rows.append(row)
    if peer is not None:
        notes.append(f"timm's create_loader reads {peer['reads']}; its default: 8 bits from the processes, normalised "
                     "and erased on the device; mixup there too, in the rank")  # fmt: skip
        if peer["differs"]:
            notes.append(f"timm finds {peer['num_train']:,} images there, another number than dytrun")
        if config.run.augment.rand_augment is not None:
            notes.append("timm: posterize to 0 bits mended (black), which Pillow 13 refuses")
        notes.append("timm: the list of images repeated, so that no epoch ends, which its processes run empty for")
    notes.append(
        f"finished batches of {_batch(config)} on {machine.device_name(device)}; medians of {config.bench.rounds} "
        f"rounds, intervals of {config.bench.confidence:g}; starts and first batches not counted, processes stopped "
        "while it is not their turn"
    )
    notes.append("a core: images a second of processor time, of the processes and the rank together; on all cores: "
                 "that times their number")  # fmt: skip
    return Table(f"the loader, {config.run.images.image_size} pixels", columns, rows, notes)


def _ratios(one: _Rates, first: _Rates, confidence: float) -> tuple[paired.Ratio, paired.Ratio]:
    """Return the ratios of images a second, and of images a second of processor time."""
    return (
        paired.ratio(one.images_per_s, first.images_per_s, confidence),
        paired.ratio(1 / one.cpu_s, 1 / first.cpu_s, confidence),
    )


def _fed_table(fed: Fed, run: RunConfig, device: torch.device, sizes: tuple[int, int]) -> Table:
    """Say what of (images a step, loader processes measured) = `sizes` is fed."""
    step_batch, workers = sizes
    rows = [
        [f"the model takes, {fed.devices} device(s)", f"{fed.per_device:,.1f}", f"{fed.per_device * fed.devices:,.1f}"],
        [f"the loader gives, {fed.cores} core(s)", f"{fed.per_core:,.1f}", f"{fed.per_core * fed.cores:,.1f}"],
    ]
    notes = [
        verdict(fed),
        f"{run.model.name} {run.norm.name} {run.precision}, compile {run.machine.compile}: its training step, "
        f"{step_batch} images that are there already, on {machine.device_name(device)}; the loader's core as measured "
        f"with {workers} process(es)",
    ]
    if device.type == "cpu":
        notes.append("a CPU figure: the model computes on the cores that the loader needs, so they share them")
    return Table("does the loader feed the model?", ("images/s", "of one", "of all"), rows, notes)
