"""One configuration → N ranks → rank 0's result.

On one machine the ranks are started by torchelastic, in processes of their own for every run: no run inherits
another's memory, peaks or compiled code. Under torchrun or another launcher that has set RANK, this process is one.

torch is imported only where it is needed, so that a finished run is recognised without it.
"""

import contextlib
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dytrun import owner, ranks, terminal
from dytrun.config import EvalConfig, ReplayConfig, RunConfig
from dytrun.errors import UserError, first_line
from dytrun.records import RunResult, write_json
from dytrun.stop import STOPPED, Stop

if TYPE_CHECKING:
    from dytrun.plan import Outline


# Longer than a preempted job is given by most clusters, and than the first rank takes to ask for another start.
_WAIT_S, _WAIT_FOR_FIRST_S = 600.0, 60.0
# How long the other ranks may take from the last collective until they listen for the end of the first one.
_LISTEN_S = 1.0


def is_joined() -> bool:
    """Whether another launcher (torchrun, SLURM) has started this process as one rank of several.

    Raises:
        UserError: the environment says so, and does not say which.
    """
    given = [
        os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE") if name in os.environ
    ]
    if not all(text.isdigit() for text in given):
        raise UserError(f"RANK and WORLD_SIZE: {' '.join(given) or 'empty'} are no numbers; unset them, or leave "
                        "them to torchrun")  # fmt: skip
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_first() -> bool:
    """Whether this process is the one that speaks and writes: the first rank, or no rank at all."""
    return os.environ.get("RANK", "0") == "0"


def join(folder: Path) -> None:
    """Take the place that submitit's job gives this process: a task is a rank. Nothing to do outside such a job.

    Args:
        folder: one that all ranks see; the ranks of a job find each other by a file there.
    """
    if not is_batch_job() or is_joined():
        return
    import submitit

    job = submitit.JobEnvironment()
    start = os.environ.get("SLURM_RESTART_COUNT", "0")
    os.environ |= {
        "RANK": str(job.global_rank),
        "WORLD_SIZE": str(job.num_tasks),
        "LOCAL_RANK": str(job.local_rank),
        "LOCAL_WORLD_SIZE": str(job.num_tasks // job.num_nodes),
        "DYTRUN_RENDEZVOUS": str(folder / f"rendezvous-{job.job_id}-{start}"),
    }
    ranks.show_title(f"rank {job.global_rank} of {job.num_tasks}, job {job.job_id}")


def is_batch_job() -> bool:
    """Whether this process is a task of a job of submitit's."""
    return "SUBMITIT_EXECUTOR" in os.environ


def may_restart() -> bool:
    """Whether whoever started this process may start it again if it fails (hydra/launcher=slurm)."""
    return "DYTRUN_RESTARTS_LEFT" in os.environ


def will_restart() -> bool:
    """Whether it would do so now: as the batch script decides, see `slurm.restart_lines`."""
    if os.path.exists(os.environ.get("DYTRUN_NO_RESTART", "")):
        return False
    if int(os.environ.get("DYTRUN_RESTARTS_LEFT", "0")) > 0:
        return True
    with contextlib.suppress(OSError, KeyError):
        start = Path(os.environ["DYTRUN_START"])
        since = start.stat().st_mtime_ns
        found = Path(start.read_text().rstrip("\n")).glob("step-*")
        return int(os.environ["DYTRUN_RESTARTS"]) > 0 and any(path.stat().st_mtime_ns > since for path in found)
    return False


def wait_to_be_ended() -> None:
    """Give SLURM the time to end this job, which it then starts again by itself."""
    time.sleep(_WAIT_S)


def ask_for_requeue(known: signal.Signals) -> str:
    """Call submitit's handler of a signal, which asks for another start and ends this process; or say why not."""
    from submitit.core.utils import UncompletedJobError

    handler = signal.getsignal(known)
    try:
        if callable(handler):
            handler(known, None)
    except UncompletedJobError as error:
        if may_restart():
            forbid_restart()
        return str(error)
    return ""


def leave_together() -> None:
    """Let the first rank end before the others do, which srun then ends.

    They leave with the same word when told so: were one killed, the job's exit code would be that of a crash.
    """
    if is_first():
        time.sleep(_LISTEN_S)
        return
    signal.signal(signal.SIGTERM, lambda *_: os._exit(STOPPED))
    time.sleep(_WAIT_FOR_FIRST_S)


def forbid_restart() -> None:
    """Say to the batch script that another start would end as this one."""
    Path(os.environ["DYTRUN_NO_RESTART"]).touch()


def previous(config: RunConfig) -> RunResult | None:
    """Return the result of a run that has ended for good (finished or diverged); None if there is work to do."""
    path = config.run_dir / "result.json"
    if not path.is_file():
        return None
    try:
        result = RunResult.load(path)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); remove it, and the run goes on") from None
    return result if result.status in ("finished", "diverged") else None


def plan(config: RunConfig) -> "Outline":
    """Say what a run would do.

    Raises:
        UserError: whatever would stop the run before its first step.
    """
    if not config.dry_run:
        ranks.warm_up()
    from dytrun.plan import outline

    return outline(config)


def train(config: RunConfig, begin: Callable[[RunConfig], RunResult | None]) -> RunResult:
    """Train a run to its end, or on from its last checkpoint.

    Args:
        config: the run.
        begin: called once, before anything is written; what it returns other than None is the result.

    Raises:
        UserError: an input turned out wrong, on any rank.
        ranks.Failed: a rank died or raised; a result that says so is left in the run's directory.
        ranks.Stopped: by a signal.
    """
    if is_joined():
        return _train_joined(config, begin)
    done = begin(config)
    if done is not None:
        return done
    from dytrun import machine, run

    _, world = machine.resolve_devices(config.machine.devices)
    with owner.owned(config), _failure_noted(config):
        said = _start(config, run.train_rank, world)
        if said is not None:
            raise ranks.Stopped(said)
    return RunResult.load(config.run_dir / "result.json")


def _start(config: RunConfig, entry: Callable[[str], str | None], world: int) -> str | None:
    """Start the ranks, and again after a crash as often as `machine.max_restarts` allows without a new checkpoint."""
    from dytrun.checkpoint import Store

    store = Store(config.run_dir / "checkpoints", config.checkpoint.keep)
    left = most = config.machine.max_restarts
    while True:
        step = store.newest_step
        try:
            return ranks.start_ranks(entry, (str(config.run_dir.resolve()),), world, is_stoppable=True)
        except ranks.Failed as error:
            left = most if store.newest_step != step else left
            if left == 0:
                raise
            left -= 1
            terminal.line(f"{first_line(error)}; starting again, {left} more time(s) without a new checkpoint")


def _train_joined(config: RunConfig, begin: Callable[[RunConfig], RunResult | None]) -> RunResult:
    """Train as one rank of a group that another launcher has started.

    Every rank has composed a configuration from the same command line, perhaps in another directory or on another
    machine: what counts is the first one's, and where that one writes.
    """
    from dytrun import distributed, run

    with contextlib.ExitStack() as held, Stop().listening() as stop, run.joined_session(config) as place:

        def decided() -> tuple[RunResult | None, str, str]:
            done = begin(config)
            if done is None:
                held.enter_context(owner.owned(config))
                held.enter_context(_failure_noted(config))
                _note_start(config)
            return done, config.model_dump_json(), str(config.run_dir.resolve())

        done, text, directory = distributed.from_first(decided)
        if done is None:
            said = run.train_here(RunConfig.model_validate_json(text), Path(directory), place, stop)
            if said is not None:
                raise ranks.Stopped(said)
        return distributed.from_first(lambda: done or RunResult.load(Path(directory) / "result.json"))


def _note_start(config: RunConfig) -> None:
    """Tell the batch script where new checkpoints are seen: a crash after one does not count with those before."""
    if "DYTRUN_START" in os.environ:
        Path(os.environ["DYTRUN_START"]).write_text(f"{(config.run_dir / 'checkpoints').resolve()}\n")


@contextlib.contextmanager
def _failure_noted(config: RunConfig) -> Iterator[None]:
    """Leave a result that says why, if what is done here does not come to an end."""
    from dytrun import run

    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # The rank may have been done, and only the upload to W&B cut short.
        if previous(config) is None:
            status = "interrupted" if isinstance(error, ranks.Stopped) else "failed"
            said = "lost another rank: " if ranks.lost_peer(traceback.format_exc()) else ""
            result = RunResult(status=status, message=said + first_line(error), **run.identity(config))
            with contextlib.suppress(OSError):  # a full disk is what it may have failed for
                result.save(config.run_dir / "result.json")
        raise


def replay(config: ReplayConfig) -> dict[str, Any] | None:
    """Do the step again at which a run diverged; return what was seen, on the first rank.

    Raises:
        UserError: there is no such run, it has not diverged, or the ranks are not as many.
        ranks.Failed: a rank died or raised.
    """
    return _on_ranks("replay_rank", config)


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Evaluate a checkpoint; return {step, accuracy: {raw, ema}} and leave the figures in eval.json beside it.

    Raises:
        UserError: there is no such run, checkpoint or data.
        ranks.Failed: a rank died or raised.
    """
    found = _on_ranks("evaluate_rank", config)
    if found is not None:
        figures = {
            name: {"top1": one.top1, "top5": one.top5, "loss": one.loss, "num": one.num}
            for name, one in found["accuracy"].items()
        }
        write_json(Path(config.dir) / "eval.json", {"checkpoint": config.checkpoint, "step": found["step"]} | figures)
    return found or {}


def _on_ranks(entry: str, config: EvalConfig | ReplayConfig) -> dict[str, Any] | None:
    """Do something with a finished run on as many ranks as are asked for, or as one of a group that another started.

    `entry` is a function's name in `run`, which is imported when the server of the ranks is on its way.
    """
    ranks.warm_up()
    from dytrun import machine, run

    directory = Path(config.dir)
    run.load_config(directory)
    _, world = machine.resolve_devices(config.devices)
    function, args = getattr(run, entry), (str(directory.resolve()), config.model_dump_json())
    return function(*args) if is_joined() else ranks.start_ranks(function, args, world)
