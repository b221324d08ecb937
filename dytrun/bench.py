"""`dytrun bench`: which instrument, on which device; the file and the W&B run that keep what it found."""

import errno
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch._inductor.config
from torch._dynamo.exc import TorchDynamoException

from dytrun import machine
from dytrun.bench_config import BenchConfig
from dytrun.errors import UserError, first_line
from dytrun.records import Found, write_json


def run(config: BenchConfig, say: Callable[[str], None]) -> Found:
    """Measure what `bench=` names on the first device of the machine; `say` gets a line of progress now and then.

    Raises:
        UserError: an arm is not to be had here, or a shape does not fit it.
    """
    # Each takes its own libraries along.
    from dytrun import bench_data, bench_model, bench_norm, bench_stack, bench_trainer

    devices, _ = machine.resolve_devices(config.run.machine.devices)
    device = torch.device("cpu") if devices is None else torch.device("cuda", devices[0])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    machine.prepare_torch(config.run.machine, device)
    is_alone = config.bench.name != "data"  # no loader works beside it
    if device.type == "cpu" and is_alone and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(machine.cores())
    if device.type == "cpu":
        torch._inductor.config.compile_threads = 1  # its helpers would still be starting up while others are measured
    instruments = {
        "norm": bench_norm.measure, "model": bench_model.measure, "trainer": bench_trainer.measure,
        "llama": bench_stack.measure, "data": bench_data.measure,
    }  # fmt: skip
    say(f"bench={config.bench.name} on {machine.device_name(device)}, torch {torch.__version__}")
    try:
        found = instruments[config.bench.name](config, device, say)
    except TorchDynamoException as error:
        key, eager = ("bench.modes", "[eager]") if hasattr(config.bench, "modes") else ("machine.compile", "off")
        raise UserError(f"{key}: torch cannot compile here ({first_line(error)}); say {key}={eager}") from error
    except torch.OutOfMemoryError:
        raise UserError("bench: the device's memory does not suffice; lower bench.batch, or name fewer arms") from None
    commit, dirty = machine.commit()
    about = {
        "bench": config.bench.model_dump(mode="json"),
        "device": machine.device_name(device),
        "precision": config.run.precision,
        "model": config.run.model.name,
        "norm": config.run.norm.name,
        "compile": config.run.machine.compile,
        "commit": commit,
        "dirty": dirty,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
    }
    return Found(found.tables, about | found.values)


def target(config: BenchConfig) -> Path:
    """Return the file that what is found goes to; its folder is made now, so that nothing is measured in vain.

    Raises:
        UserError: it cannot be written.
    """
    clock = time.strftime("%Y%m%d-%H%M%S")
    default = Path(config.run.runs_dir) / "bench" / f"{config.bench.name}-{clock}.json"
    path = Path(config.bench.out or default)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"bench.out: {path} cannot be written ({error.strerror}); choose another") from None
    return path


def keep(path: Path, config: BenchConfig, found: Found) -> None:
    """Write what was found as JSON, and give it to W&B if that was asked for."""
    write_json(path, found.values)
    if config.run.tracking.mode != "off":
        from dytrun import wandb_link

        wandb_link.log_once(config.run.tracking, path, "bench", found.values, found.tables)
