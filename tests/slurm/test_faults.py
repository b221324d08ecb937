"""What happens to jobs on a real SLURM: pre-emption, the end of the wall time, lost nodes, crashes, scancel.

Two nodes with a rank each. One rank is stopped in the middle of an epoch, as if its machine were slow, so that the run
is still there when the fault comes; afterwards it must end as a run on this machine that nobody has disturbed.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, dytrun, only, processes
from warm import essence, step_of

from slurm.cluster import Cluster

RUN = (*TINY, "norm=dyt", "epochs=8", "tracking.log_every_steps=1")
EPOCH = 44


@pytest.fixture(scope="session")
def whole(needs_slurm: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What must be the same of the run that nobody disturbs, two ranks on this machine."""
    runs = tmp_path_factory.mktemp("whole")
    done = dytrun("train", *RUN, "machine.devices=2", f"runs_dir={runs}", env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return essence(runs)


class Driver:
    """`dytrun train -m hydra/launcher=slurm` of the run on two nodes, and its job."""

    def __init__(self, cluster: Cluster, *args: str, launcher: str = "slurm", runs: str = "runs"):
        self.cluster, self.runs = cluster, Path(runs)
        settings = [f"hydra/launcher={launcher}", "hydra.launcher.timeout_min=10", "hydra.launcher.nodes=2"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dytrun", "train", "-m", *RUN, *settings, f"runs_dir={runs}", *args],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | cluster.env,
        )  # fmt: skip

    def __enter__(self) -> "Driver":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()
            self.cluster.run("scancel", "--user=root")

    def freeze(self, after: int = 0) -> int:
        """Stop rank 1 in the middle of an epoch; return its process."""
        self.until(lambda: step_of(self.runs) > after, "training goes on")
        while True:
            self.until(lambda: 5 < step_of(self.runs) % EPOCH < EPOCH // 2, "a step in mid-epoch")
            pid = self.rank(1)
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.3)  # what the other rank does until it waits
            if 5 < step_of(self.runs) % EPOCH < EPOCH - 5:
                return pid
            os.kill(pid, signal.SIGCONT)

    def rank(self, number: int) -> int:
        (found,) = (pid for pid, title in self._ranks() if title.startswith(f"dytrun: rank {number} "))
        return found

    def until(self, condition: Callable[[], Any], what: str, timeout_s: float = 120) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, f"not in {timeout_s} s: {what}; {self.logs()}"
            assert self._process.poll() is None, (what, self._process.communicate())
            time.sleep(0.02)

    def record(self) -> dict[str, str]:
        """What SLURM knows of its job."""
        ours = {path.name for path in self.runs.glob(".sweeps/*/jobs/[0-9]*")}
        (found,) = (job for job in self.cluster.jobs().values() if job["JobId"] in ours)
        return found

    def end(self) -> tuple[int, str, str]:
        """Return exit code, stdout and stderr of the driver; nothing of the job must be left."""
        out, err = self._process.communicate(timeout=500)
        end = time.monotonic() + 60
        while ranks := self._ranks():
            assert time.monotonic() < end, f"still there: {ranks}"
            time.sleep(0.1)
        return self._process.returncode, out, err

    def stopped_after(self, by: str) -> int:
        """Return the step after which the job said that it was stopped, and saved."""
        found = re.findall(rf"stopped by {by} after step (\d+); its checkpoint is written", self.logs())
        assert len(set(found)) == 1, (found, self.logs())
        return int(found[0])

    @property
    def newest(self) -> int:
        """Step of the newest checkpoint."""
        return max(int(path.name[5:]) for path in self.runs.glob("*/checkpoints/step-*"))

    def starts(self) -> list[int]:
        """Steps that the run's starts began from."""
        text = (only(self.runs) / "starts.jsonl").read_text()
        return [json.loads(line).get("step") for line in text.splitlines()]

    def logs(self) -> str:
        logs = self.runs.glob(".sweeps/**/*_log.*")
        return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(logs))

    def _has(self, title: str) -> bool:
        """Whether a rank is of this driver's job; a test may have two."""
        here = [path.name for path in self.runs.glob(".sweeps/*/jobs/[0-9]*")]
        return not here or re.search(r"job (\w+)", title)[1] in here

    def _ranks(self) -> list[tuple[int, str]]:
        found = []
        for pid, title in processes():
            if title.startswith("dytrun: rank"):
                with contextlib.suppress(OSError):
                    if Path(f"/proc/{pid}/cwd").resolve() == Path.cwd() and self._has(title):
                        found.append((pid, title))
        return found


def thaw(pid: int) -> None:
    """Let a process go on that SIGUSR2 waits for; SLURM may have let it already."""
    end = time.monotonic() + 90
    while time.monotonic() < end:
        try:
            known = dict(re.findall(r"(State|ShdPnd):\s+(\w+)", Path(f"/proc/{pid}/status").read_text()))
            if known["State"] != "T" or int(known["ShdPnd"], 16) & 1 << (signal.SIGUSR2 - 1):
                os.kill(pid, signal.SIGCONT)
                return
        except OSError:
            return
        time.sleep(0.05)
    raise TimeoutError("no SIGUSR2")


@pytest.mark.parametrize(
    ("site", "launcher", "by"),
    [("cluster", "slurm", "SIGUSR2"), ("term_cluster", "slurm", "SIGTERM"),
     ("term_cluster", "submitit_slurm", "SIGTERM")],
)  # fmt: skip
def test_a_preempted_job_saves_at_once_and_goes_on(request, whole, site, launcher, by):
    with Driver(request.getfixturevalue(site), launcher=launcher) as driver:
        driver.freeze()
        high = driver.cluster.run("sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive",
                                  "--output=/dev/null", "--wrap=true").strip()  # fmt: skip
        driver.cluster.wait_for(high, "COMPLETED", 60)  # SLURM's SIGCONT has woken the rank
        step = driver.stopped_after(by)
        code, _, err = driver.end()
        assert code == 0, (err, driver.logs())
        assert step % EPOCH != 0
        assert driver.starts() == [0, step]
        assert essence(driver.runs) == whole


def test_a_job_at_the_end_of_its_time_goes_on_in_the_next_as_often_as_allowed(cluster, whole):
    """Two jobs with one minute: one may come back, and one may not."""
    late = ("hydra.launcher.timeout_min=1", "hydra.launcher.signal_delay_s=15")
    final = (*late, "hydra.launcher.max_num_timeout=0", "norm.alpha_init=0.3")
    with Driver(cluster, *late) as driver, Driver(cluster, *final, runs="final") as last:
        for one in [driver.freeze(), last.freeze()]:
            thaw(one)
        code, _, err = last.end()
        assert code == 1, last.logs()
        step = last.stopped_after("SIGUSR2")
        assert last.newest == step
        assert f"stopped by SIGUSR2 after step {step}; its checkpoint is written" in err
        assert "timed-out too many times" in err
        assert last.record()["Restarts"] == "0"
        code, _, err = driver.end()
        assert code == 0, (err, driver.logs())
        first, *later = driver.starts()
        assert first == 0
        assert len(later) in (1, 2)
        assert later[0] % EPOCH != 0
        assert essence(driver.runs) == whole


def test_a_cancelled_job_saves_and_does_not_come_back(cluster):
    with Driver(cluster) as driver:
        driver.freeze()
        job = driver.record()["JobId"]
        cluster.run("scancel", job)
        code, _, err = driver.end()
        assert code == 1, driver.logs()
        assert re.search(r"SLURM job \w+ was cancelled; typed again, the run goes on", err), err
        assert driver.newest == driver.stopped_after("SIGTERM")
        record = cluster.jobs()[job]
        assert (record["JobState"], record["Restarts"]) == ("CANCELLED", "0")


def test_a_job_of_a_lost_node_goes_on_when_that_is_back(cluster, whole):
    """As when the power of one fails; SLURM finds out by itself."""
    with Driver(cluster) as driver:
        driver.freeze(after=EPOCH)
        saved = driver.newest
        cluster.kill_node("n2")
        driver.until(lambda: "DOWN" in cluster.run("scontrol", "show", "node", "n2"), "the node is down")
        cluster.start_node("n2")
        code, _, err = driver.end()
        assert code == 0, (err, driver.logs())
        assert driver.starts() == [0, saved]
        assert essence(driver.runs) == whole


def test_crashes_with_progress_between_them_are_no_loop(cluster, whole):
    """Two, where one in a row is allowed."""
    with Driver(cluster, "hydra.launcher.max_restarts=1") as driver:
        os.kill(driver.freeze(), signal.SIGKILL)
        driver.until(lambda: not driver._ranks(), "the job ends")
        os.kill(driver.freeze(after=2 * EPOCH), signal.SIGKILL)
        code, _, err = driver.end()
        assert code == 0, (err, driver.logs())
        assert len(driver.starts()) == 3
        assert essence(driver.runs) == whole


def test_a_job_ends_without_slurms_controller(cluster, whole):
    with Driver(cluster) as driver:
        slow = driver.freeze()
        job = driver.record()["JobId"]
        # A controller that is killed knows what it has written: five seconds after a change at the latest.
        time.sleep(6)
        cluster.kill_controller()
        os.kill(slow, signal.SIGCONT)
        driver.until(lambda: list(driver.runs.glob("*/result.json")), "the run ends")
        cluster.start_controller()
        code, _, err = driver.end()
        assert code == 0, (err, driver.logs())
        assert driver.starts() == [0]
        assert essence(driver.runs) == whole
        assert cluster.wait_for(job, "COMPLETED", 60)["Restarts"] == "0"
