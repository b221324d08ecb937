"""One rank, one page: the composition of everything. Read this file first.

    config.json → data, model, conversion → state (optimizer, EMA) → checkpoint → fit ⇒ records ⇒ files → result.json

Ranks read config.json and nothing else; what they do not share is their place (rank, world, device).
"""

import json
import os
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import timm
import torch
import torchvision
from torch import nn

import dytrun
from dytrun import jpeg, machine, norm, optim, owner, replay, resume, terminal, watchdog
from dytrun.agreement import Diverged, Interrupted
from dytrun.arm import build_arm
from dytrun.checkpoint import Store
from dytrun.compute import autocast
from dytrun.config import EvalConfig, ReplayConfig, RunConfig
from dytrun.data import RankShare
from dytrun.distributed import Place, barrier, from_first, gather, session
from dytrun.engine import evaluate_state, fit, interrupted
from dytrun.errors import RunError, UserError
from dytrun.evaluate import Halted, evaluate
from dytrun.feed import AnyData, load, train_feed, val_feed
from dytrun.model import compile_model, put_on, trainable
from dytrun.processes import end_loaders
from dytrun.records import Accuracy, EvalRecord, Position, Record, Remark, RunResult, whole_file, write_json
from dytrun.sources import Data
from dytrun.state import State, build_state, restore, speed_so_far, to_be_saved
from dytrun.stop import Stop
from dytrun.surroundings import Surroundings
from dytrun.throughput import Clock
from dytrun.tracking import Tracker
from dytrun.validation import validate
from dytrun.warmstart import calibrate_start, load_start, wants_calibration


def train_rank(run_dir: str) -> str | None:
    """Train the run of `run_dir` on this rank, which `launch` has started for it; say if it was stopped, and where."""
    note = os.environ.get("DYTRUN_STOP_NOTE")
    with Stop(Path(note) if note else None).listening() as stop:
        config = load_config(Path(run_dir))
        with joined_session(config) as place:
            return train_here(config, Path(run_dir), place, stop)


def joined_session(config: RunConfig) -> AbstractContextManager[Place]:
    """Join the run's other ranks, with the device that is this rank's."""
    devices, _ = machine.resolve_devices(config.machine.devices)
    return session(devices, config.machine.collective_timeout_s)


def train_here(config: RunConfig, directory: Path, place: Place, stop: Stop) -> str | None:
    """Train a run on this rank, from its last checkpoint if it has one; rank 0 writes the files.

    Returns:
        None, on any rank, when result.json is there. If a rank was told to stop: by what, and where the run can be
        taken up again.
    """
    try:
        _train(config, directory, place, stop)
    except Interrupted as error:
        return str(error)
    finally:
        end_loaders()
    return None


def _train(config: RunConfig, directory: Path, place: Place, stop: Stop) -> None:
    machine.prepare_torch(config.machine, place.device)
    data = load(config)
    plan = optim.plan_steps(config, data.train.num, place.world)
    model, sites = build_arm(config, data.num_classes)
    model = put_on(model, config, place.device)
    store = Store(directory / "checkpoints", config.checkpoint.keep)
    saved, said = resume.newest(store, place)
    resume.check_data(saved, data, config.data.root)
    workers = machine.worker_count(config.machine.workers, place.device)
    share = RankShare(place.rank, place.world, plan.batch_per_rank, plan.accumulation, plan.steps_per_epoch,
                      saved.step if saved else 0, plan.total_steps)  # fmt: skip
    here = place.rank, place.world, place.device
    build = resume.build(config, place, plan, versions(config))
    with watchdog.Watchdog(place, directory / ".hang", config.machine.hang_timeout_s) as dog:
        around = Surroundings(
            plan=plan,
            place=place,
            clock=Clock(place.device, config.global_batch),
            train=train_feed(config, data, share, place.device, workers),
            val=val_feed(config, data, config.machine.eval_batch_per_rank, workers, here),
            num_val=data.val.num,
            store=store,
            sites=[site.name for site in sites],
            stopped_by=stop.asked_by,
            beat=dog.beat,
            num_train=data.train.num,
            facts={"build": build, "data": data.facts},
        )
        if saved is None:
            with around.clock.pause():
                _warm_start(config, model, data, around, directory)
        state = build_state(model, config, place.device)
        if saved is not None:
            restore(state, saved, place)
        from_first(lambda: store.check_room(to_be_saved(state)))
        compile_model(model, config.machine.compile)
        result = facts(config, place, data, model) | {
            "num_norm_sites": len(sites),
            "machine": config.machine.model_dump(
                mode="json", include={"compile", "deterministic", "channels_last", "loader"}
            )
            | {"batch_per_rank": plan.batch_per_rank, "accumulation": plan.accumulation, "workers": workers},
        }
        if not place.is_first:
            _follow(fit(config, state, around), config, state, around, directory)
            barrier()
            return
        _lead(config, state, around, directory, (result, resume.begin(directory, saved, build, said)))


def _lead(
    config: RunConfig, state: State, around: Surroundings, directory: Path, known: tuple[dict[str, Any], list[str]]
) -> None:
    """Train as the first rank: the one that shows, logs and writes. `known` of the result, and what is to be said."""
    result, said = known
    display, ended = terminal.Display(config.run_name, around.plan.total_steps, state.step, config.unit), None
    for line in said:
        display.note(line)
    tracker = Tracker(config, directory, Position(state.step, state.is_evaluated), display.note)
    try:
        last, message = _follow(fit(config, state, around), config, state, around, directory, (tracker, display))
        init = _init_facts(directory)
        if init.get("alpha_from") is not None:
            result["alpha_init"] = None
        ended = RunResult(**result, **outcome(state, around, last, message), init=init, starts=owner.starts(directory))
        try:
            if last is not None and last.raw.correct is not None:
                _save_correct(directory / "correct.npz", last.raw.correct, last.ema and last.ema.correct)
            ended.save(directory / "result.json")
        except OSError as error:
            ended = None
            raise RunError(f"{directory}: the result cannot be written ({error.strerror or error}); make room, and "
                           "type the command again to go on from the last checkpoint") from None  # fmt: skip
        barrier()
    finally:
        around.beat(state.step, watchdog.DONE)  # W&B may take its time
        display.close()
        tracker.finish(ended, in_haste=ended is None)  # told to stop, or the other ranks wait to end


def evaluate_rank(run_dir: str, options: str) -> dict[str, Any] | None:
    """Evaluate a checkpoint of the run of `run_dir` on this rank's share; rank 0 returns the counts."""
    directory, chosen = Path(run_dir), EvalConfig.model_validate_json(options)
    config = load_config(directory, chosen.data_root)
    devices, _ = machine.resolve_devices(chosen.devices)
    with session(devices, config.machine.collective_timeout_s) as place:
        machine.prepare_torch(config.machine, place.device)
        data = load(config)
        store = Store(directory / "checkpoints", config.checkpoint.keep)
        saved = store.look_up("BEST" if chosen.checkpoint == "best" else "LATEST")
        if len(set(gather(saved.step))) > 1:
            raise UserError(f"{directory}: a checkpoint was written meanwhile; say it again")
        workers = machine.worker_count(chosen.workers, place.device)
        here = place.rank, place.world, place.device
        val = val_feed(config, data, chosen.batch_per_rank, workers, here)
        model, _ = build_arm(config, data.num_classes)
        model = put_on(model, config, place.device)
        found: dict[str, Accuracy] = {}
        for part, label in (("model", "raw"), ("ema", "ema")):
            if part in saved.tensors:
                model.load_state_dict(saved.tensors[part])
                found[label] = evaluate(model, val(), data.val.num, autocast(config, place.device))
        end_loaders()
    return {"step": saved.step, "accuracy": found, "unit": config.unit} if place.is_first else None


def replay_rank(run_dir: str, options: str) -> dict[str, Any] | None:
    """Do the step again at which the run of `run_dir` diverged; rank 0 returns what was seen."""
    directory, chosen = Path(run_dir), ReplayConfig.model_validate_json(options)
    config = load_config(directory, chosen.data_root)
    devices, _ = machine.resolve_devices(chosen.devices)
    with session(devices, config.machine.collective_timeout_s) as place:
        machine.prepare_torch(config.machine, place.device)
        data = load(config)
        model, _ = build_arm(config, data.num_classes)
        plan = optim.plan_steps(config, data.train.num, place.world)
        found = replay.again(config, directory, data, (put_on(model, config, place.device), plan), place) | {
            "unit": config.unit
        }
    return found if place.is_first else None


def load_config(run_dir: Path, data_root: str | None = None) -> RunConfig:
    """Read a run's configuration back; `data_root` is where its data lies now, if not where it did.

    Raises:
        UserError: the directory holds no run, or its data lies nowhere.
    """
    try:
        values = resume.completed(json.loads((run_dir / "config.json").read_text()))
        if data_root is not None:
            values["data"] = values["data"] | {"root": data_root}
        return validate(RunConfig, values)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{run_dir}: no run there (config.json: {error}); give the directory of a run") from None


def facts(config: RunConfig, place: Place, data: AnyData, model: nn.Module) -> dict[str, Any]:
    """Return the fields of a result that are known before the first step."""
    with autocast(config, place.device):
        computed = norm.described(config.norm.name, config.machine.compile, place.device)
    commit, dirty = machine.commit()
    return identity(config) | {
        "num_params": trainable(model),
        "norm_impl": computed,
        "device": machine.device_name(place.device),
        "ranks": place.world,
        "data_fingerprint": data.fingerprint,
        "data_pack": data.pack or None,
        "versions": versions(config),
        "commit": commit,
        "dirty": dirty,
    }  # fmt: skip


def versions(config: RunConfig) -> dict[str, str]:
    """Return the versions of everything that computes."""
    of_model = {"transformers": metadata.version("transformers")} if config.model.name == "llama" else {}
    return of_model | {
        "dytrun": dytrun.__version__, "python": platform.python_version(), "torch": torch.__version__,
        "torchvision": torchvision.__version__, "timm": timm.__version__, "numpy": np.__version__,
        "pillow": PIL.__version__, "jpeg_decoder": jpeg.decoder(),
    }  # fmt: skip


def identity(config: RunConfig) -> dict[str, Any]:
    """Return the fields of a result that the configuration alone tells."""
    return {
        "science_id": config.science_id,
        "pair_id": config.pair_id,
        "model": config.model.name,
        "norm": config.norm.name,
        "alpha_init": getattr(config.norm, "alpha_init", None),
        "published": config.published.model_dump() if config.published else None,
        "seed": config.seed,
        "epochs": config.epochs,
        "science": config.science(),
    }


def outcome(state: State, around: Surroundings, last: EvalRecord | None, message: str | None) -> dict[str, Any]:
    """Return the fields of a result that training gave."""
    values: dict[str, Any] = {
        "status": "finished" if message is None else "diverged",
        "message": message,
        "steps": state.step,
        "weights_sha256": state.weights_sha256,
        "bad_images": [{"index": index} | image for index, image in sorted(state.bad_images.items())],
        "substituted": state.substituted,
        "loss_spikes": state.spikes,
        "checkpoints": {"tried": state.saves, "failed": state.failed_saves, "bytes": state.saved_bytes},
        "train_seconds": state.train_seconds + around.clock.train_seconds,
        "alpha": norm.alphas(state.model),
    }
    if last is not None:
        values |= {"top1": last.raw.top1, "top5": last.raw.top5, "val_loss": last.raw.loss, "num_val": last.raw.num}
        values |= {"best_top1": state.best.top1, "best_epoch": state.best.epoch}
        if last.ema is not None:
            values |= {"ema_top1": last.ema.top1, "ema_top5": last.ema.top5}
    return values | speed_so_far(state, around.clock)


def _follow(
    records: Iterator[Record | Remark],
    config: RunConfig,
    state: State,
    around: Surroundings,
    directory: Path,
    sinks: tuple[Tracker, terminal.Display] | None = None,
) -> tuple[EvalRecord | None, str | None]:
    """Hand every record to the sinks; return the last evaluation and, if training diverged, why."""
    last = None
    try:
        for record in records:
            last = record if isinstance(record, EvalRecord) else last
            if sinks is None:
                continue
            tracker, display = sinks
            if isinstance(record, Remark):
                display.note(record.text)
            else:
                tracker.log(record)
                display.show(record)
    except Diverged as error:
        state.step = error.step  # on CUDA more steps were begun, and refused by the device
        return last, f"{error}; {replay.keep(directory, state.model, around, error)}"
    # A run that was stopped between its last checkpoint and its result has nothing left to train.
    try:
        return last or evaluate_state(config, state, around), None
    except Halted:
        raise interrupted(state, around, "its checkpoint is written") from None


def _warm_start(config: RunConfig, model: nn.Module, data: AnyData, around: Surroundings, directory: Path) -> None:
    """Start from a file of weights, if the run has one, and write down in init.json what came out of it."""
    start = load_start(config, model)
    if start is None:
        return
    found = start.facts()
    if wants_calibration(config) and isinstance(data, Data):

        def accuracy(module: nn.Module) -> Accuracy:
            return evaluate(module, around.val(), around.num_val, autocast(config, around.place.device))

        found["calibration"] = calibrate_start(config, start, model, data, around.place, accuracy)
        if around.place.is_first:
            terminal.calibration(found["calibration"])
    if around.place.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(around.place.device)  # the peak of a run is that of its training
    if around.place.is_first:
        write_json(directory / "init.json", found)


def _init_facts(directory: Path) -> dict[str, Any]:
    path = directory / "init.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _save_correct(path: Path, raw: np.ndarray, ema: np.ndarray | None) -> None:
    """One bit an image, in the order of the split: numpy.unpackbits(correct, count=num)."""
    arrays = {"correct": np.packbits(raw), "num": np.array(len(raw))}
    if ema is not None:
        arrays["ema_correct"] = np.packbits(ema)
    with whole_file(path) as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
