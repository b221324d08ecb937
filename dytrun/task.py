"""One run of a command line, wherever Hydra's launcher runs it, and the note on how it ended.

A launcher may run a job in this process, in another one or on another machine. What they share is a folder: the job
notes there how it ended, and whoever started the jobs reads it.
"""

import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from dytrun import compose
from dytrun.errors import RunError, UserError, first_line
from dytrun.stop import STOPPED

DONE, FAILED, WRONG_INPUT = 0, 1, 2

Ending = Literal["finished", "planned", "diverged", "failed", "refused", "stopped"]


@dataclass(frozen=True)
class Outcome:
    """How one run ended."""

    run: str
    ending: Ending
    problems: Sequence[str] = ()
    """Lines for a person; those of a run that was `refused` can be mended by the user."""
    trace: str = ""
    """Traceback of an error that nobody foresaw."""
    top1: float | None = None
    """Percent."""

    @property
    def value(self) -> float:
        """What a sweeper that searches is told: top-1; 0 where training diverged, NaN where there is no value."""
        return 0.0 if self.ending == "diverged" else math.nan if self.top1 is None else self.top1

    def save(self, folder: Path) -> None:
        """Note how the run ended; of several notes on one run the last one counts."""
        from dytrun.records import write_json

        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{self.run}.json", asdict(self))


@dataclass(frozen=True)
class Task:
    """What Hydra calls for each run of a command line.

    It never raises, so that the runs after a failed one go on and Hydra prints nothing of its own; under
    hydra/launcher=slurm a task whose run fails leaves by SystemExit.
    """

    folder: str
    """Where the jobs of this command line note how they ended."""
    config_dir: str | None
    """What --config-dir gave."""
    in_turn: bool
    """Whether the runs follow one another in this process, so that one that is stopped stops those after it."""

    def __call__(self, cfg: Any) -> float:
        """Train the run that Hydra has composed; return its value for sweepers that search."""
        from dytrun import commands, launch, ranks

        name = "job"
        launch.join(Path(self.folder))
        try:
            if self.in_turn and any(outcome.ending == "stopped" for outcome in outcomes(self.folder).values()):
                return math.nan
            config = compose.validated("train", cfg)
            name = config.run_name
            page = config.published and compose.page_of(cfg, config.published.page, self.config_dir)
            ending, top1 = commands.train(config, page)
            found = Outcome(name, ending, top1=top1)
        except UserError as error:
            found = Outcome(name, "refused", error.problems)
        except ranks.Stopped as error:
            found = Outcome(name, "stopped", (str(error),))
            if launch.is_batch_job():
                found = self._leave_batch_job(found)
        except Exception as error:
            first, _, trace = str(error).partition("\n") if isinstance(error, ranks.Failed | RunError) else (
                first_line(error), "", traceback.format_exc())  # fmt: skip
            found = Outcome(name, "failed", (first,), trace)
        if launch.may_restart() and (found.ending == "failed" or found.problems):
            self._fail_batch_job(found)
        self._note(found)
        return found.value

    def _fail_batch_job(self, found: Outcome) -> NoReturn:
        """End a task of hydra/launcher=slurm so that the other ranks end too, and the job is started again or not.

        Hydra would keep an exception to itself.
        """
        from dytrun import launch, ranks

        sys.stderr.write("\n".join([found.trace, *found.problems, ""]))
        is_final = found.ending == "refused" or "UncompletedJobError" in found.trace  # submitit: out of time too often
        if is_final:
            launch.forbid_restart()
        if ranks.lost_peer(found.trace):
            time.sleep(ranks.GRIEF_S)  # srun says which rank was lost, and ends this one
        elif is_final or not launch.will_restart():
            self._note(found)
        raise SystemExit(FAILED)

    def _leave_batch_job(self, found: Outcome) -> Outcome:
        """End a task of SLURM's that was told to stop and has saved, so that the job comes back.

        The signal that submitit knows goes to its own handler: it asks for another start, and counts those after a
        job has run out of time. After another one our batch script does; where the script is not ours SLURM does
        itself, if it ends the job, and not if the job ends before.

        Returns:
            How the run ended, where the job does not come back: it has run out of time too often, or is none of SLURM.
        """
        from dytrun import launch

        sys.stderr.write(f"dytrun: {found.problems[0]}\n")
        sys.stderr.flush()
        known = signal.Signals[f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"]
        if known.name in found.problems[0]:
            if launch.is_first() and (refused := launch.ask_for_requeue(known)):
                return Outcome(found.run, "failed", (f"{found.problems[0]}; {refused}",))
        elif "SLURM_JOB_ID" not in os.environ:
            return found
        elif not launch.may_restart():
            launch.wait_to_be_ended()
        launch.leave_together()
        raise SystemExit(STOPPED)

    def _note(self, found: Outcome) -> None:
        # Ranks of one job share a folder: the first one notes how the run ended, another what went wrong with it.
        is_first = self.in_turn or os.environ.get("RANK", "0") == "0"
        if is_first or (found.problems and found.run not in outcomes(self.folder)):
            found.save(Path(self.folder) / "outcomes")


class Batch:
    """The jobs that a launcher of ours is given at once, composed; those with nothing left to do are done with."""

    def __init__(self, launcher: Any, job_overrides: Sequence[Sequence[str]]):
        """Take the jobs from a launcher that Hydra has set up.

        Args:
            launcher: holds `hydra_context`, `config` and `task_function`.
            job_overrides: of each job, in order.
        """
        from dytrun import terminal

        load = launcher.hydra_context.config_loader.load_sweep_config
        self.task: Task = launcher.task_function
        self._all = [(list(one), load(launcher.config, list(one))) for one in job_overrides]
        self._names: list[str] = []
        self.configs: dict[str, Any] = {}
        self.overrides: dict[str, list[str]] = {}
        self.cfgs: dict[str, Any] = {}
        self.pending: list[str] = []
        for overrides, cfg in self._all:
            config = compose.validated("train", cfg)
            name = config.run_name
            self._names.append(name)
            if name in self.configs:
                terminal.line(f"{name}: asked for twice, and run once; a run is its science, and that is the same")
                continue
            self.configs[name], self.overrides[name], self.cfgs[name] = config, overrides, cfg
            if config.dry_run or _is_done(config):
                self.task(cfg)
            else:
                self.pending.append(name)

    def returns(self) -> list[Any]:
        """Return to Hydra what each job came to, in order. A job that failed is no exception."""
        from hydra.core.utils import JobReturn, JobStatus

        ended = outcomes(self.task.folder)
        values = [ended[name].value if name in ended else math.nan for name in self._names]
        return [
            JobReturn(overrides, cfg, status=JobStatus.COMPLETED, _return_value=value)
            for (overrides, cfg), value in zip(self._all, values, strict=True)
        ]


def _is_done(config: Any) -> bool:
    """Say whether a run has nothing left to do; one whose result cannot be read has something to say."""
    from dytrun import launch

    try:
        return launch.previous(config) is not None
    except UserError:
        return True


def outcomes(folder: str | Path) -> dict[str, Outcome]:
    """Return {run: outcome} of all jobs that have ended so far, in the order in which they did."""
    notes = sorted((Path(folder) / "outcomes").glob("[!.]*.json"), key=lambda path: path.stat().st_mtime_ns)
    found = (Outcome(**json.loads(path.read_text())) for path in notes)
    return {outcome.run: outcome for outcome in found}


def exit_code(found: Sequence[Outcome], is_sweep: bool) -> int:
    """Return what the command line says to the shell; in a sweep a divergence is a result."""
    endings = {outcome.ending for outcome in found}
    if "stopped" in endings:
        return STOPPED
    if "failed" in endings:
        return FAILED
    if "refused" in endings:
        return WRONG_INPUT
    return FAILED if endings == {"diverged"} and not is_sweep else DONE
