"""hydra/launcher=slurm: a sweep as a SLURM job array through submitit, a job a run, a task a rank.

submitit writes the batch script, and requeues a job that is about to lose its time or its place. What is added here:
every field is checked (`launcher_config`), a job whose rank crashed is started again a bounded number of times, and
one job that ends badly hides no other's result.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import submitit
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher
from submitit.core.utils import FailedJobError

from dytrun import terminal
from dytrun.board import Board, Job, counted
from dytrun.errors import UserError
from dytrun.launcher_config import PLAIN, SlurmConfig, checked
from dytrun.stop import as_interrupt
from dytrun.task import Batch, Outcome, outcomes

_POLL_S = 2.0
_POLLS_TO_ASK, _POLLS_TO_GIVE_UP = 3, 30
# States in which a job stays; unknown: SLURM has forgotten it.
_OVER = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT", "unknown",
}  # fmt: skip
# Parameters that submitit has under these names for every kind of cluster; SLURM's own carry a prefix.
_SHARED = {
    "name", "timeout_min", "nodes", "tasks_per_node", "gpus_per_node", "cpus_per_task", "mem_gb", "stderr_to_stdout",
}  # fmt: skip


class Slurm(SlurmLauncher):
    """Hydra's interface to the cluster; its arguments are those of conf/hydra/launcher/slurm.yaml."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submit all jobs that have something left to do, wait for them, return what each came to, in order."""
        batch = Batch(self, job_overrides)
        folder = Path(batch.task.folder)
        records = folder.parent / "slurm"
        ids = _still_queued(records, batch.pending)
        for name, (job_id, _) in ids.items():
            terminal.line(f"{name}: SLURM has it as job {job_id}, with the settings that it was submitted with; to "
                          f"submit it anew, scancel {job_id} first")  # fmt: skip
        new = [name for name in batch.pending if name not in ids]
        if new:
            submitted = self._submit(folder, [list(batch.overrides[name]) for name in new], initial_job_idx)
            records.mkdir(exist_ok=True)
            for name, job_id in zip(new, submitted, strict=True):
                ids[name] = job_id, folder
                (records / f"{name}.json").write_text(json.dumps([job_id, str(folder)]))
        jobs = {name: Job(name, batch.configs[name].run_dir, batch.configs[name].epochs) for name in batch.pending}
        try:
            with as_interrupt():
                _wait(jobs, ids, folder)
        except KeyboardInterrupt:
            for name in (name for name, job in jobs.items() if job.outcome is None):
                terminal.line(f"{name} goes on as SLURM job {ids[name][0]}; the same command waits for it again, and "
                              f"scancel {ids[name][0]} ends it")  # fmt: skip
            raise
        finally:
            for name in (name for name, job in jobs.items() if job.outcome is not None):
                (records / f"{name}.json").unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # there is none, or another run has a job
                records.rmdir()
        for earlier in {notes for _, notes in ids.values()} - {folder}:
            if all(one.ending in ("finished", "diverged") for one in outcomes(earlier).values()):
                shutil.rmtree(earlier, ignore_errors=True)
        return batch.returns()

    def _submit(self, folder: Path, overrides: Sequence[list[str]], first: int) -> list[str]:
        """Hand the jobs to sbatch as one array; return their numbers.

        Raises:
            UserError: sbatch does not take them.
        """
        if re.search(r"[\x00-\x1f\x7f]", str(folder)):
            raise UserError(f"runs_dir: {str(folder)!r} holds characters that no batch script takes; choose another")
        chosen = SlurmConfig.model_validate(self.params)
        settings = {name: value for name, value in chosen.model_dump(exclude={"max_restarts"}).items() if value}
        settings |= {
            "tasks_per_node": chosen.ranks_per_node,
            "setup": [*chosen.setup, *restart_lines(folder / "crashes", chosen.max_restarts)],
            "additional_parameters": {"requeue": True, **chosen.additional_parameters},
            "srun_args": ["--kill-on-bad-exit=1"],  # a rank that has died takes the others with it
        }
        max_num_timeout = settings.pop("max_num_timeout", 0)
        try:
            with _unheard():
                executor = submitit.AutoExecutor(folder / "jobs" / "%j", cluster="slurm",
                                                 slurm_max_num_timeout=max_num_timeout)  # fmt: skip
                executor.update_parameters(
                    **{name if name in _SHARED else f"slurm_{name}": value for name, value in settings.items()}
                )
                count = len(overrides)
                places = range(first, first + count)
                jobs = executor.map_array(
                    self, overrides, ["hydra.sweep.dir"] * count, places, [f"job-{place}" for place in places],
                    [Singleton.get_state()] * count,
                )  # fmt: skip
        except (FailedJobError, subprocess.CalledProcessError) as error:
            raise UserError(f"hydra.launcher: SLURM did not take the jobs ({_last_line(str(error))})") from None
        terminal.line(f"submitted {', '.join(job.job_id for job in jobs)}; what they print is in {folder}/jobs")
        return [job.job_id for job in jobs]


def check(target: str, values: Mapping[str, Any]) -> None:
    """Refuse what could not be submitted, or would reach the batch script as another command.

    Args:
        target: class of Hydra's launcher; other launchers of submitit are checked field by field.
        values: its settings.

    Raises:
        UserError: all that is wrong at once.
    """
    if target.endswith(".dytrun.Slurm"):
        checked(SlurmConfig, values)
        if shutil.which("sbatch") is None:
            raise UserError("hydra/launcher: there is no sbatch on this machine; start from a login node of the "
                            "cluster, or leave hydra/launcher=slurm out")  # fmt: skip
        return
    wrong = [f"hydra.launcher.{key}: {value!r} holds characters that no field of a batch script takes"
             for key, value in _strings(values) if not re.fullmatch(PLAIN, value)]  # fmt: skip
    if wrong:
        raise UserError(*wrong)


def _strings(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return (dotted key, text) of every text that submitit writes into a script, names of flags included."""
    found = []
    for key, value in values.items():
        if prefix:
            found.append((prefix + key, str(key)))
        if isinstance(value, Mapping):
            found += _strings(value, f"{prefix}{key}.")
        elif isinstance(value, str) and key != "setup":
            found.append((prefix + key, value))
    return found


def restart_lines(crashes: Path, most: int) -> list[str]:
    """Return lines of shell that put a job whose rank has crashed back into the queue, `most` times in a row.

    A crash after a new checkpoint is the first of a row. SLURM itself puts a job back after a pre-emption and when a
    node is lost, and not when a task fails.
    """
    count = f"{shlex.quote(str(crashes))}/$SLURM_JOB_ID"
    return [
        # Since SLURM 22.05 srun does not take the batch script's cores for its own.
        "[ -z $SLURM_CPUS_PER_TASK ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK",
        f"mkdir -p {shlex.quote(str(crashes))}; touch {count}; rm -f {count}.start",
        f"export DYTRUN_RESTARTS={most} DYTRUN_RESTARTS_LEFT=$(({most} - $(wc -l < {count})))",
        f"export DYTRUN_NO_RESTART={count}.final DYTRUN_START={count}.start",
        "dytrun_leave() {",
        "  code=$?; job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}; job=${job:-$SLURM_JOB_ID}",
        # The first rank has written there where its checkpoints are.
        '  new=$([ -e "$DYTRUN_START" ] && find "$(cat "$DYTRUN_START")" -name "step-*" -newer "$DYTRUN_START")',
        f'  [ -z "$new" ] || {{ : > {count}; DYTRUN_RESTARTS_LEFT={most}; }}',
        '  [ $code -ne 0 ] && [ ! -e "$DYTRUN_NO_RESTART" ] || return',
        # 75: told to stop, and saved. That is no crash.
        "  [ $code -eq 75 ] || [ $DYTRUN_RESTARTS_LEFT -gt 0 ] || return",
        # scancel ends the script too; the controller calls a job COMPLETING before it tells it, and would requeue it.
        "  state=$(squeue --noheader --jobs=$job --format=%T)",
        '  echo "dytrun: exit code $code of a job that is $state, starts left: $DYTRUN_RESTARTS_LEFT"',
        "  case $state in RUNNING | SIGNALING) ;; *) return ;; esac",
        f"  [ $code -eq 75 ] || echo $code >> {count}",
        "  scontrol requeue $job",
        "}",
        "trap dytrun_leave EXIT",
    ]


def _still_queued(records: Path, names: Sequence[str]) -> dict[str, tuple[str, Path]]:
    """Return (SLURM job, folder of its notes) of the runs that an earlier command has submitted and SLURM still has."""
    known: dict[str, tuple[str, Path]] = {}
    for name in names:
        if (path := records / f"{name}.json").is_file():
            job_id, folder = json.loads(path.read_text())
            known[name] = job_id, Path(folder)
    alive = _states([job_id for job_id, _ in known.values()])
    return {name: entry for name, entry in known.items() if alive is None or entry[0] in alive}


def _wait(jobs: Mapping[str, Job], ids: Mapping[str, tuple[str, Path]], folder: Path) -> None:
    """Follow the jobs until SLURM has none of them any more, and take over their notes on how they ended."""
    if not jobs:
        return
    absent = dict.fromkeys(jobs, 0)
    with Board(list(jobs.values()), f"{counted(jobs)} on SLURM") as board:
        while left := [name for name, job in jobs.items() if job.outcome is None]:
            states = _states([ids[name][0] for name in left])
            for name in left:
                if states is None:  # SLURM does not answer: later
                    break
                job_id, notes = ids[name]
                absent[name] = 0 if job_id in states else absent[name] + 1
                if absent[name] == 0:
                    _show(jobs[name], job_id, states[job_id])
                elif (ended := outcomes(notes).get(name) or _given_up(name, job_id, notes, absent[name])) is not None:
                    ended.save(folder / "outcomes")
                    jobs[name].end(ended)
            board.refresh()
            time.sleep(_POLL_S)


def _given_up(name: str, job_id: str, notes: Path, polls: int) -> Outcome | None:
    """Return what is known of a job that has left the queue without a note, once it is clear that none will come."""
    if polls < _POLLS_TO_ASK:  # a job that is put back into the queue is in no list for a moment
        return None
    done = subprocess.run(
        ["scontrol", "--oneliner", "show", "job", job_id], capture_output=True, text=True, check=False
    )
    known = dict(re.findall(r"(JobState|ExitCode)=(\S+)", done.stdout))
    state = known.get("JobState", "unknown")
    is_late = state in ("COMPLETED", "unknown") and polls < _POLLS_TO_GIVE_UP  # a shared disk shows a new file late
    if is_late or state not in _OVER:
        return None
    logs = notes / "jobs" / job_id
    if state == "CANCELLED":
        return Outcome(name, "failed", (f"SLURM job {job_id} was cancelled; typed again, the run goes on",))
    lines = [line for path in sorted(logs.glob("*.err")) for line in path.read_text(errors="replace").splitlines()]
    named = [line for line in lines if re.match(r"srun: error: .*task", line)]  # srun names the rank that died
    said = f": {[*lines, *named][-1]}" if lines else ""
    ended = f"SLURM job {job_id} ended without a result ({state}, exit code {known.get('ExitCode', 'unknown')}){said}"
    return Outcome(name, "failed", (f"{ended}; see {logs}",))


def _show(job: Job, job_id: str, state: str) -> None:
    name, _, where = state.partition("|")
    if name == "RUNNING" and job.state != "running":
        job.start(f"job {job_id} on {where}")
    elif name != "RUNNING":
        job.state, job.where = name.lower(), f"job {job_id} {where}"


def _states(ids: Sequence[str]) -> dict[str, str] | None:
    """Return {job: "STATE|node or reason"} of the jobs that SLURM still has; None while it does not answer."""
    if not ids:
        return {}
    command = ["squeue", "--all", "--noheader", "--array", "--format=%i|%T|%R", f"--jobs={','.join(ids)}"]
    own = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=own)
    if done.returncode and "Invalid job id" not in done.stderr:
        return None
    rows = (line.partition("|") for line in done.stdout.splitlines())
    return {job_id: state for job_id, _, state in rows}


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """While it lasts what this process and its children say on stderr is dropped: submitit's error holds it too."""
    sys.stderr.flush()
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [*lines, *(line for line in lines if line.startswith("sbatch: "))][-1]
