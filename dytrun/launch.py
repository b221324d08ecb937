"""One configuration → N ranks → rank 0's result.

On one machine the ranks are started by torchelastic, in processes of their own for every run: no run inherits
another's memory, peaks or compiled code. Under torchrun or another launcher that has set RANK, this process is one.

torch is imported only where it is needed, so that a finished run is recognised without it.
"""

import contextlib
import fcntl
import json
import logging
import multiprocessing
import multiprocessing.forkserver
import os
import select
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dytrun.config import EvalConfig, RunConfig
from dytrun.errors import UserError
from dytrun.records import RunResult, write_json

if TYPE_CHECKING:
    from dytrun.plan import Outline

# What stands in the traceback of a rank that fails because another has.
_LOST_PEER = ("torch/distributed/distributed_c10d.py", "Connection closed by peer", "Connection reset", "NCCL", "gloo")


class Failed(Exception):
    """A rank died or raised. The message names the first one to fail, and holds its traceback."""


class Stopped(Exception):
    """A person or the system asked for an end."""


def previous(config: RunConfig) -> RunResult | None:
    """Return the result of a run that has ended for good (finished or diverged); None if there is work to do."""
    path = config.run_dir / "result.json"
    if not path.is_file():
        return None
    result = RunResult.load(path)
    return result if result.status in ("finished", "diverged") else None


def plan(config: RunConfig) -> "Outline":
    """Say what a run would do.

    Raises:
        UserError: whatever would stop the run before its first step.
    """
    if not config.dry_run:
        warm_up()
    from dytrun.plan import outline

    return outline(config)


def train(config: RunConfig) -> RunResult:
    """Train a run to its end, or on from its last checkpoint.

    Raises:
        UserError: an input turned out wrong, on any rank.
        Failed: a rank died or raised; a result that says so is left in the run's directory.
        Stopped: by a signal.
    """
    from dytrun import distributed, machine, run

    if distributed.joined():
        # Every rank has composed the same configuration from the same command line.
        with _owned(config) if distributed.first_here() else contextlib.nullcontext():
            run.train_here(config, config.run_dir)
        return RunResult.load(config.run_dir / "result.json")
    _, world = machine.resolve_devices(config.machine.devices)
    with _owned(config):
        try:
            _start(run.train_rank, (str(config.run_dir.resolve()),), world)
        except (Failed, Stopped) as error:
            # The rank may have been done, and only the upload to W&B cut short.
            if previous(config) is None:
                status = "failed" if isinstance(error, Failed) else "interrupted"
                result = RunResult(status=status, message=str(error).splitlines()[0], **run.identity(config))
                result.save(config.run_dir / "result.json")
            raise
    return RunResult.load(config.run_dir / "result.json")


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Evaluate a checkpoint; return {step, accuracy: {raw, ema}} and leave the figures in eval.json beside it.

    Raises:
        UserError: there is no such run, checkpoint or data.
        Failed: a rank died or raised.
    """
    warm_up()
    from dytrun import distributed, machine, run

    directory = Path(config.dir)
    run.load_config(directory)
    _, world = machine.resolve_devices(config.devices)
    args = (str(directory.resolve()), config.model_dump_json())
    found = run.evaluate_rank(*args) if distributed.joined() else _start(run.evaluate_rank, args, world)
    if found is not None:
        figures = {
            name: {"top1": one.top1, "top5": one.top5, "loss": one.loss, "num": one.num}
            for name, one in found["accuracy"].items()
        }
        write_json(directory / "eval.json", {"checkpoint": config.checkpoint, "step": found["step"]} | figures)
    return found or {}


def warm_up() -> None:
    """Start the process that ranks are forked from; it imports torch while this one does other things.

    A rank is then a fork of a process that has imported everything and done nothing: it starts in a moment, and
    shares no state with any other.
    """
    if "RANK" in os.environ:
        return
    # One machine: gloo need not ask the name service which of its addresses to use.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    multiprocessing.set_forkserver_preload(["dytrun.run"])
    multiprocessing.forkserver.ensure_running()


def _start(entry: Callable[..., Any], args: tuple[Any, ...], world: int) -> Any:
    """Run `entry(*args)` on `world` ranks of this machine and return what rank 0 returned."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    warm_up()
    # Their warnings repeat at length what the exception says; torchelastic sets a level on each of its loggers.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.multiprocessing")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="dytrun-") as logs, _quiet():
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=world,
            run_id=f"dytrun-{os.getpid()}",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            rdzv_configs={"is_host": True},
            local_addr="localhost",
            start_method="forkserver",
            max_restarts=0,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        try:
            return elastic_launch(config, _rank)(os.getpid(), entry, *args)[0]
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            raise _first_cause(Path(logs)) or Failed(f"rank {rank} died: {failure.message}") from None
        except (SignalException, KeyboardInterrupt) as error:
            raise Stopped(f"stopped by {type(error).__name__} ({error})") from None


def _rank(launcher: int, entry: Callable[..., Any], *args: Any) -> Any:
    """Run `entry` in a process that ends with its launcher, however that ends."""
    threading.Thread(target=_leave_with, args=(launcher,), daemon=True).start()
    # At once and without a traceback. A shell's background job ignores SIGINT, and its children would too.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return entry(*args)


def _leave_with(pid: int) -> None:
    """End this process when process `pid` does."""
    try:
        select.select([os.pidfd_open(pid)], [], [])
    except ProcessLookupError:
        pass
    except (AttributeError, OSError):  # not Linux, or not allowed here
        with contextlib.suppress(ProcessLookupError):
            while True:
                os.kill(pid, 0)
                time.sleep(1)
    os._exit(1)


def _first_cause(logs: Path) -> Exception | None:
    """Turn what failing ranks left behind into our exception; None where none could write anything.

    A rank that fails makes the others fail in their next collective; torchelastic reports whichever it sees first,
    so the one that did not fail for want of another is looked for.
    """
    found: list[tuple[int, str, str, str]] = []
    for path in logs.glob("**/error.json"):
        message = json.loads(path.read_text())["message"]
        first, text = message["message"], message["extraInfo"]["py_callstack"]
        if first.startswith("UserError: "):
            return UserError(*first.removeprefix("UserError: ").splitlines())
        found.append((int(any(sign in text for sign in _LOST_PEER)), path.parent.name, first, text))
    if not found:
        return None
    _, rank, first, text = min(found)
    return Failed(f"rank {rank}: {(first.splitlines() or [''])[0]}\n{text}")


@contextlib.contextmanager
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch.distributed")
        yield


@contextlib.contextmanager
def _owned(config: RunConfig) -> Iterator[None]:
    """Take the run's directory for this process, and write the configuration there.

    The lock goes with the process, however that ends.

    Raises:
        UserError: the directory cannot be written, or another process trains there.
    """
    try:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        lock = (config.run_dir / ".lock").open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UserError(f"{config.run_dir}: {lock.read().strip()} trains there; wait for it, or stop it") from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        write_json(config.run_dir / "config.json", config.model_dump(mode="json"))
    except OSError as error:
        raise UserError(f"runs_dir: {config.run_dir} cannot be written ({error.strerror}); choose another") from None
    with lock:
        yield
