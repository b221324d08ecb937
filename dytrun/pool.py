"""hydra/launcher=local_pool: a sweep's runs, several at a time, over the GPUs or cores of this machine.

Each job is a process of its own, with the GPUs and cores that it has for itself, and its ranks are processes of
theirs: a job that is killed, that fails or diverges leaves the others alone.
"""

import collections
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher

from dytrun import machine, ranks
from dytrun.board import Board, Job, counted
from dytrun.launcher_config import PoolConfig, checked
from dytrun.machine import Slot
from dytrun.stop import as_interrupt
from dytrun.task import Batch, Outcome, Task, outcomes

# How often the table is looked at again, and how long a job may take to leave when it is told to.
_REFRESH_S, _LEAVE_S = 1.0, 60.0
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class LocalPool(Launcher):
    """Hydra's interface to the pool; its arguments are those of conf/hydra/launcher/local_pool.yaml."""

    def __init__(self, **settings: Any):
        self._pool = PoolConfig.model_validate(settings)

    def setup(self, *, hydra_context: Any, task_function: Callable[[Any], Any], config: Any) -> None:
        """Take what Hydra knows."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run all jobs that have something left to do; return what each came to, in order."""
        batch = Batch(self, job_overrides)
        if batch.pending:
            _Pool(batch, machine.slots(self._pool)).work()
        return batch.returns()


class _Pool:
    """The jobs that run now, each in its slot."""

    def __init__(self, batch: Batch, slots: Sequence[Slot]):
        self._batch = batch
        self._folder = Path(batch.task.folder)
        self._jobs = {
            name: Job(name, batch.configs[name].run_dir, batch.configs[name].epochs) for name in batch.pending
        }
        self._waiting = collections.deque(batch.pending)
        self._free = list(slots)
        self._running: dict[str, tuple[BaseProcess, Slot]] = {}
        self._is_stopped = False
        self._processes = multiprocessing.get_context("forkserver")

    def work(self) -> None:
        """Run what waits; on SIGTERM or Ctrl-C end what runs and start no more."""
        title = f"{counted(self._jobs)}, {len(self._free)} at a time; what they print is in {self._folder}/logs"
        with as_interrupt(), Board(list(self._jobs.values()), title) as board:
            try:
                while self._waiting or self._running:
                    while self._waiting and self._free:
                        self._start(self._waiting[0])
                    board.refresh()
                    sentinels = [process.sentinel for process, _ in self._running.values()]
                    multiprocessing.connection.wait(sentinels, _REFRESH_S)
                    self._reap()
            except KeyboardInterrupt:
                self._stop()
                for name in self._waiting:
                    self._jobs[name].end(self._note(Outcome(name, "stopped", ("was not started",))))

    def _start(self, name: str) -> None:
        args = os.getpid(), self._batch.task, self._batch.cfgs[name], self._free[0], name
        process = self._processes.Process(target=_work, args=args)
        # A job that has begun is known to have, whenever the signal to stop comes.
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        process.start()
        slot = self._free.pop(0)
        self._running[name] = process, slot
        self._waiting.remove(name)
        self._jobs[name].start(f"{slot}, pid {process.pid}")
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)

    def _reap(self) -> None:
        """Note how the jobs whose process has ended came out, and free their slots."""
        for name, (process, slot) in list(self._running.items()):
            if process.is_alive():
                continue
            process.join()
            outcome = outcomes(self._folder).get(name)
            if outcome is None:
                code = process.exitcode or 0
                how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
                ending = "stopped" if self._is_stopped else "failed"
                outcome = self._note(Outcome(name, ending, (f"its process ended without a word ({how})",)))
            self._jobs[name].end(outcome)
            del self._running[name]
            self._free.append(slot)

    def _note(self, outcome: Outcome) -> Outcome:
        outcome.save(self._folder / "outcomes")
        return outcome

    def _stop(self) -> None:
        self._is_stopped = True
        for process, _ in self._running.values():
            process.terminate()
        for process, _ in self._running.values():
            process.join(_LEAVE_S)
            process.kill()
            process.join()
        self._reap()


def check(settings: Mapping[str, Any]) -> None:
    """Refuse what this machine has no room for, before anything starts.

    Raises:
        UserError: a setting is wrong; more jobs at a time, or more for each, than there are GPUs and cores.
    """
    pool = checked(PoolConfig, settings)
    # Jobs are forked from a process that has imported everything, and begin to train in a moment; it begins now.
    ranks.warm_up("dytrun.commands", "dytrun.pool", "torch.distributed.launcher.api")
    machine.slots(pool)


def _work(launcher: int, task: Task, cfg: Any, slot: Slot, name: str) -> None:
    """Be a job: alone on the slot's cores and GPUs, and silent but for its log."""
    logs = Path(task.folder) / "logs"
    logs.mkdir(exist_ok=True)
    log = os.open(logs / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log, stream.fileno())
    ranks.enter_job(launcher, f"job {name}")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, slot.cores)
    if slot.gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(slot.gpus)
    task(cfg)
