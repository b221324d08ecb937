"""The processes of one machine: the ranks of a run, each in a process of its own, that end together.

torchelastic starts and watches them. No run inherits another's memory, peaks or compiled code.

torch is imported only where it is needed, so that a finished run is recognised without it.
"""

import contextlib
import json
import logging
import multiprocessing
import multiprocessing.forkserver
import os
import select
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from setproctitle import getproctitle, setproctitle, setthreadtitle

from dytrun.errors import UserError, first_line
from dytrun.stop import SIGNALS, STOPPED, ignored, passed_on

# It looks for a process's arguments beside its environment, and must do so before that is changed and moves away.
getproctitle()

# What stands in the traceback of a rank that fails because another has.
_LOST_PEER = ("torch/distributed/distributed_c10d.py", "Connection closed by peer", "Connection reset", "NCCL", "gloo")
# How often it is looked after the ranks, and how long the others may still speak when one has gone.
_LOOK_S, _LAST_WORDS_S = 0.2, 1.0
# Long enough for ranks to be forked, which a thread at work could spoil.
_FORK_S = 2.0
# Longer than the launcher takes to see that a rank has died, and to end the others.
GRIEF_S = 8.0

# Whether this process is a job that a pool has forked (enter_job), and has started no ranks yet.
_is_forked_job = False


class Failed(Exception):
    """A rank died or raised. The message names the first one to fail, and holds its traceback."""


class Stopped(Exception):
    """A person or the system asked for an end."""


def warm_up(*modules: str) -> None:
    """Start the process that ranks are forked from; it imports torch while this one does other things.

    A rank is then a fork of a process that has imported everything and done nothing: it starts in a moment, and
    shares no state with any other.
    """
    if "RANK" in os.environ:
        return
    # One machine: gloo need not ask the name service which of its addresses to use.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    if _start_method() == "fork":
        return
    # In a process of joblib's a way of starting processes is set that those which it starts do not know.
    if multiprocessing.get_start_method() not in multiprocessing.get_all_start_methods():
        multiprocessing.set_start_method("forkserver", force=True)
    multiprocessing.set_forkserver_preload(["dytrun.ranks", "dytrun.run", *modules])
    # A signal to the whole group is not for that process: ranks whose server has gone would count as dead.
    with ignored():
        multiprocessing.forkserver.ensure_running()


def enter_job(launcher: int, title: str) -> None:
    """Make this process, a fork of one that has imported everything and done nothing, a job: see `warm_up`.

    It ends with process `launcher`, and its ranks, if they are to compute on the CPU, are forked from itself: a
    server of its own would import everything once more.
    """
    global _is_forked_job
    _is_forked_job = True
    _bind_to(launcher, title)


def start_ranks(entry: Callable[..., Any], args: tuple[Any, ...], world: int, is_stoppable: bool = False) -> Any:
    """Run `entry(*args)` on `world` ranks of this machine and return what rank 0 returned.

    Where the entry `is_stoppable` a first signal only asks it to stop (`stop.Stop`, DYTRUN_STOP_NOTE), and it returns
    when it has; a second one ends the ranks at once. Else the first one does.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    method = _start_method()
    warm_up()
    # A process that has started ranks has threads of torchelastic's, which a second fork would tear.
    global _is_forked_job
    _is_forked_job = False
    # Their warnings repeat at length what the exception says; torchelastic sets a level on each of its loggers.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.multiprocessing")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="dytrun-") as logs, _quiet(), _gateway(Path(logs), is_stoppable) as note:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=world,
            run_id=f"dytrun-{os.getpid()}",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            rdzv_configs={"is_host": True},
            local_addr="localhost",
            start_method=method,
            max_restarts=0,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
            signals_to_handle="SIGQUIT" if is_stoppable else "SIGTERM,SIGINT,SIGHUP,SIGQUIT",
        )
        try:
            return elastic_launch(config, _rank)(os.getpid(), note, entry, *args)[0]
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode == STOPPED:
                raise Stopped("stopped at once by a second signal; nothing was saved for that") from None
            how = signal.Signals(-failure.exitcode).name if failure.exitcode < 0 else f"exit code {failure.exitcode}"
            died = f"rank {rank} died: {how}, process {failure.pid}; the other ranks were ended"
            cause = _first_cause(Path(logs)) or Failed(died)
            if is_stoppable and Path(note).exists() and not isinstance(cause, UserError):
                raise Stopped(f"told to stop, but before it had: {first_line(cause)}") from None
            raise cause from None
        except SignalException as error:
            raise Stopped(f"stopped by {signal.Signals(error.sigval).name}") from None
        except KeyboardInterrupt:
            raise Stopped("stopped at once; nothing was saved for that") from None


def _start_method() -> str:
    # Whether there are GPUs must be found out without CUDA, which does not survive a fork.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    if not _is_forked_job:
        return "forkserver"
    from dytrun import machine

    return "forkserver" if machine.num_gpus() else "fork"


@contextlib.contextmanager
def _gateway(folder: Path, is_stoppable: bool) -> Iterator[str]:
    """Stand between signals and the ranks; give the file in which the ranks look whether they are to stop."""
    is_over = threading.Event()
    undertaker = threading.Thread(target=_end_with_the_first, args=(folder, is_over), daemon=True)
    undertaker.start()
    note = folder / "stop"
    say = "the step under way is finished and saved; again to leave at once"
    try:
        with passed_on(note, say) if is_stoppable else contextlib.nullcontext():
            yield str(note)
    finally:
        is_over.set()
        undertaker.join()


def _end_with_the_first(folder: Path, is_over: threading.Event) -> None:
    """End the other ranks when one has gone without being done.

    torchelastic asks them to leave, which one that trains takes for a wish to stop, and waits half a minute for it.
    """
    is_over.wait(_FORK_S)
    while not is_over.wait(_LOOK_S):
        ranks = {path.stem: int(path.read_text() or 0) for path in folder.glob("*.pid")}
        left = {name: pid for name, pid in ranks.items() if not (folder / f"{name}.done").exists()}
        if any(pid and not _is_alive(pid) for pid in left.values()):
            time.sleep(_LAST_WORDS_S)
            for pid in left.values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _rank(launcher: int, note: str, entry: Callable[..., Any], *args: Any) -> Any:
    """Run `entry` in a process that ends with its launcher, however that ends."""
    os.environ["DYTRUN_STOP_NOTE"] = note
    place = Path(note).with_name(os.environ["RANK"])
    place.with_suffix(".pid").write_text(str(os.getpid()))
    _bind_to(launcher, f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}, {Path(args[0]).name}")
    try:
        found = entry(*args)
        place.with_suffix(".done").touch()
        return found
    except Exception as error:
        # A rank that another has left is told so at once, and would be first to say it. It waits to be ended.
        # One that leaves it to the first rank to speak waits for that, too.
        if lost_peer(traceback.format_exc()) or (isinstance(error, UserError) and not error.problems):
            time.sleep(GRIEF_S)
        raise


def lost_peer(trace: str) -> bool:
    """Say whether a traceback is that of a rank that fails because another has."""
    return any(sign in trace for sign in _LOST_PEER)


def _bind_to(launcher: int, title: str) -> None:
    """Let this process end with another one, by signals at once and without a traceback, and show what it is."""
    threading.Thread(target=_leave_with, args=(launcher,), daemon=True).start()
    # A shell's background job ignores SIGINT, and its children would too; a forked one has its parent's handlers.
    for number in (*SIGNALS, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    show_title(title)


def show_title(title: str) -> None:
    """Show in ps and top what this process is."""
    setproctitle(f"dytrun: {title}")
    # The short name, which setproctitle sets too, may hold no blanks: SLURM's proctrack/linuxproc, which finds a
    # job's processes in /proc/*/stat, would not see this one, and not end it.
    setthreadtitle("dytrun")


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
    if (logs / "hang").is_file():  # as the ranks' watchdogs left it
        return Failed((logs / "hang").read_text())
    found: list[tuple[int, int, str, str, str]] = []
    for path in logs.glob("**/error.json"):
        message = json.loads(path.read_text())["message"]
        first, text = message["message"], message["extraInfo"]["py_callstack"]
        if lines := first.removeprefix("UserError: ").splitlines() if first.startswith("UserError: ") else []:
            return UserError(*lines)  # one without lines is of a rank that has left it to the first one to speak
        if first.startswith("RunError: "):
            return Failed(first.removeprefix("RunError: "))
        found.append((lost_peer(text), int(message["extraInfo"]["timestamp"]), path.parent.name, first, text))
    if not found:
        return None
    _, _, rank, first, text = min(found)
    return Failed(f"rank {rank}: {(first.splitlines() or [''])[0]}\n{text}")


@contextlib.contextmanager
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch.distributed")
        yield
