"""Commands that start in a moment: a process that has imported everything forks for each, as local_pool does.

`python tests/warm.py` reads a list of a command's words a line, with the file for its output in front; it answers
with the process number, and then with the exit code. What is forked is a process group of its own, with real ranks.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import alive_in_group, is_gone, lines, only, processes

from dytrun.records import RunResult


class Warm:
    """The process that forks; a context manager."""

    def __init__(self) -> None:
        self._last: Job | None = None

    def __enter__(self) -> "Warm":
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen([sys.executable, __file__], text=True, env=environment, **pipes)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()

    def start(self, log: Path, *args: str) -> "Job":
        """Start `dytrun ARGS` with its output in `log`."""
        if self._last is not None and self._last.code is None:  # its test has failed
            self._last.kill()
            self._last.wait()
        self._process.stdin.write(json.dumps([str(log), *args]) + "\n")
        self._process.stdin.flush()
        self._last = Job(self._process, int(self._process.stdout.readline()), log)
        return self._last

    def run(self, log: Path, *args: str) -> "Job":
        """Run `dytrun ARGS` to its end."""
        job = self.start(log, *args)
        job.wait()
        return job


class Job:
    """A command under way."""

    def __init__(self, warm: subprocess.Popen[str], pid: int, log: Path):
        self.pid, self._warm, self._log = pid, warm, log
        self.code: int | None = None
        self.seconds = 0.0

    def wait(self) -> int:
        """Return the exit code; negative for a signal. `seconds` is how long that took."""
        since = time.monotonic()
        self.code = int(self._warm.stdout.readline())
        self.seconds = time.monotonic() - since
        return self.code

    def kill(self) -> None:
        """End every process of it, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def find(self, title: str, timeout_s: float = 150) -> int:
        """Return its process of that title, once there is one."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            for pid, command in processes():
                with contextlib.suppress(ProcessLookupError):
                    if command.startswith(f"dytrun: {title}") and os.getpgid(pid) == self.pid:
                        return pid
            time.sleep(0.01)
        raise TimeoutError(f"{title}: {[command for _, command in processes() if 'dytrun' in command]}; {self.said()}")

    def until(self, condition: Callable[[], Any], timeout_s: float = 150) -> None:
        """Wait for something; it must come while the command runs."""
        end = time.monotonic() + timeout_s
        is_alive = True
        while not condition():
            assert time.monotonic() < end, f"{timeout_s} s; {self.said()}"
            assert is_alive, self.said()
            is_alive = bool(alive_in_group(self.pid))  # what it does before its end is still looked at
            time.sleep(0.005)

    def until_it_stands_still(self, runs: Path) -> None:
        """Wait until no step has come for two seconds."""
        seen = [(time.monotonic(), step_of(runs))]

        def is_still() -> bool:
            if (step := step_of(runs)) != seen[-1][1]:
                seen.append((time.monotonic(), step))
            return time.monotonic() - seen[-1][0] > 2

        self.until(is_still)

    def said(self) -> str:
        """What it has printed."""
        return self._log.read_text() if self._log.exists() else "nothing"

    @property
    def is_gone(self) -> bool:
        """Whether nothing of it is left, a few seconds later at most."""
        return is_gone(self.pid)


def step_of(directory: Path) -> int:
    """The last step that the one run under a directory has written down; 0 before."""
    found = [line for path in directory.glob("*/metrics.jsonl") for line in path.read_text().splitlines(True)]
    return max((json.loads(line)["step"] for line in found if line.endswith("\n")), default=0)


def essence(directory: Path) -> dict[str, Any]:
    """Everything of the one run under a directory that must be the same, bit for bit, however often it was stopped."""
    run = only(directory)
    result = RunResult.load(run / "result.json")
    newest = max((run / "checkpoints").glob("step-*[0-9]"))
    state = json.loads((newest / "state.json").read_text())
    best = (run / "checkpoints" / "BEST").read_text()
    return {
        "tensors": {path.name: path.read_bytes() for path in newest.glob("*.safetensors")},
        "best": {path.name: path.read_bytes() for path in
                 (run / "checkpoints" / f"step-{int(best):08d}").glob("*.safetensors")},
        "state": {key: state[key] for key in ("best", "window", "losses", "spikes", "weights_sha256", "scaler",
                                              "is_evaluated", "substituted", "bad_images", "data", "build")},
        "result": (newest.name, result.status, result.steps, result.top1, result.val_loss, result.ema_top1,
                   result.best_top1, result.best_epoch, result.alpha, result.weights_sha256, result.bad_images),
        "metrics": [{key: value for key, value in one.items() if not key.startswith("perf/")} for one in lines(run)],
        "correct": [path.read_bytes() for path in run.glob("correct.npz")],  # a text has none
    }  # fmt: skip


def chosen(seed: int) -> random.Random:
    """A generator for a test; its seed is printed when the test fails."""
    print(f"random seed {seed}")
    return random.Random(seed)


def _serve() -> None:
    import torch.distributed.launcher.api  # noqa: F401

    from dytrun import cli, ranks

    for line in sys.stdin:
        log, *args = json.loads(line)
        pid = os.fork()
        with contextlib.suppress(PermissionError, ProcessLookupError):  # whoever is first
            os.setpgid(pid, pid)
        if pid == 0:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            for stream in (1, 2):
                os.dup2(descriptor, stream)
            ranks.enter_job(os.getppid(), "job")
            sys.argv = ["dytrun", *args]
            code = cli.main()
            sys.stdout and sys.stdout.flush()
            os._exit(code)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve()
