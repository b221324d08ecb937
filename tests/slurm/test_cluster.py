"""What the tests of this directory take for granted of SLURM, seen on the real one.

Times on two cores: up 1.1 s, down 0.1 s; a requeued job starts 6 s later, when its credential has expired; a preempted
job that does not leave by itself runs on for 31 s, though GraceTime is 5.
"""

import os
import sys
import time
from pathlib import Path

import pytest
from conftest import wait_until

from dytrun.slurm import restart_lines
from slurm import cluster as module
from slurm.cluster import Cluster, ClusterError

REMAINS = "while :; do sleep 0.1; done"  # whatever signals the shell traps and sleep dies of


STEP = "srun sh -c 'echo begun; exec sleep 60'"


def retry(most: int) -> str:
    """Return the lines with which dytrun has a batch script run again when it fails."""
    return "\n".join([*restart_lines(Path("crashes").resolve(), most), ""])


def submit(cluster: Cluster, name: str, script: str, *options: str) -> str:
    """Submit a bash script that writes to NAME.out, over all its restarts."""
    path = Path(f"{name}.sh")
    path.write_text(f"#!/bin/bash\n{script}\n")
    return cluster.run(
        "sbatch", "--parsable", "--requeue", f"--output={name}.out", "--open-mode=append", *options, str(path)
    ).strip()


def said(name: str) -> str:
    return Path(f"{name}.out").read_text()


def wait_to_read(name: str, text: str, timeout_s: float = 120) -> None:
    """Wait until a job has written something: it is RUNNING before its first line is."""
    deadline = time.monotonic() + timeout_s
    while not Path(f"{name}.out").exists() or text not in said(name):
        assert time.monotonic() < deadline, f"{name} has not said {text!r}"
        time.sleep(0.05)


def test_four_tasks_run_on_two_nodes(cluster):
    said = cluster.run("srun", "--nodes=2", "--ntasks=4", "sh", "-c", "echo $SLURM_PROCID $SLURMD_NODENAME")
    assert sorted(said.splitlines()) == ["0 n1", "1 n1", "2 n2", "3 n2"]


def test_the_nodes_names_resolve(cluster):
    assert "127.0.0.1" in cluster.run("srun", "--nodes=1", "getent", "hosts", "n2")


@pytest.mark.parametrize(
    ("option", "devices"),
    [("--gpus-per-node=2", ["0,1"] * 4), ("--gpus-per-task=1", ["0", "0", "1", "1"])],
)
def test_tasks_are_given_devices(term_cluster, option, devices):
    told = term_cluster.run("srun", "--nodes=2", "--ntasks=4", option, "sh", "-c", "echo $CUDA_VISIBLE_DEVICES")
    assert sorted(told.split()) == devices


# torch is told of as many GPUs as SLURM shows: there are none here.
PROBE = """
import os, sys
from pathlib import Path
import torch
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: len(os.environ["CUDA_VISIBLE_DEVICES"].split(","))
from dytrun import distributed, launch, machine
launch.join(Path())
devices, world = machine.resolve_devices("auto")
place = [os.environ["RANK"], world, os.environ["LOCAL_RANK"], os.environ["CUDA_VISIBLE_DEVICES"]]
sys.stdout.write(" ".join(map(str, [*place, distributed.own_device(devices)])) + "\\n")
"""


def test_each_rank_has_a_gpu_of_its_own(term_cluster):
    """Where SLURM shows it all of its node, and where it shows it one alone, whatever its local rank."""
    Path("probe.py").write_text(PROBE)
    python = ["env", "SUBMITIT_EXECUTOR=slurm", sys.executable, "probe.py"]
    tasks = ["srun", "--nodes=2", "--ntasks=4"]
    every = term_cluster.run(*tasks, "--ntasks-per-node=2", "--gpus-per-node=2", *python, timeout_s=200)
    assert sorted(every.splitlines()) == [
        "0 4 0 0,1 cuda:0", "1 4 1 0,1 cuda:1", "2 4 0 0,1 cuda:0", "3 4 1 0,1 cuda:1",
    ]  # fmt: skip
    own = term_cluster.run(*tasks, "--ntasks-per-node=2", "--gpus-per-task=1", *python, timeout_s=200)
    assert sorted(own.splitlines()) == ["0 4 0 0 cuda:0", "1 4 1 1 cuda:0", "2 4 0 0 cuda:0", "3 4 1 1 cuda:0"]


@pytest.mark.parametrize("options", [["--gpus-per-node=3"], ["--nodes=1", "--ntasks=1", "--gpus-per-task=3"]])
def test_more_than_there_is_is_refused(term_cluster, options):
    with pytest.raises(ClusterError, match="node configuration is not available"):
        term_cluster.run("srun", "--immediate=2", *options, "true")


def test_crashed_job_is_run_again(cluster):
    """Once, twice, never and in an array, at the same time."""
    trap = retry(1)
    once = submit(cluster, "once", f"{trap} [ $SLURM_RESTART_COUNT ] || srun sh -c 'kill -9 $$'")
    always = submit(cluster, "always", f"{trap} srun sh -c 'exit 7'")
    never = submit(cluster, "never", f"{trap} srun true")
    array = submit(cluster, "array", f"{trap} [ $SLURM_ARRAY_TASK_ID = 0 ] || [ $SLURM_RESTART_COUNT ]", "--array=0-1")
    assert cluster.wait_for(once, "COMPLETED")["Restarts"] == "1"
    assert cluster.wait_for(always, "FAILED")["Restarts"] == "1"
    assert cluster.wait_for(never, "COMPLETED")["Restarts"] == "0"
    assert cluster.wait_for(array, "COMPLETED")["Restarts"] == "1"
    elements = [job for job in cluster.jobs().values() if job.get("ArrayJobId") == array]
    assert {job["ArrayTaskId"]: job["Restarts"] for job in elements} == {"0": "0", "1": "1"}


def test_crashes_count_in_a_row(cluster):
    """A job that crashes after each of three new checkpoints is run again each time, and then no more."""
    Path("check points").mkdir()
    note = 'readlink -f "check points" > $DYTRUN_START; sleep 0.1'
    script = f"{note}; n=${{SLURM_RESTART_COUNT:-0}}; [ $n -ge 3 ] || mkdir 'check points/step-'$n; exit 7"
    job = submit(cluster, "job", f"{retry(1)} {script}")
    assert cluster.wait_for(job, "FAILED", 60)["Restarts"] == "3"


@pytest.mark.parametrize("script", ["false; STEP", "trap 'echo TERM' TERM; STEP", "trap '' TERM; STEP"])
def test_cancelled_job_stays_cancelled(cluster, script):
    """Whatever the script does about SIGTERM, and whatever code it ends with."""
    for number in range(5):
        name = f"cancelled{number}"
        job = submit(cluster, name, retry(3) + script.replace("STEP", STEP))
        wait_to_read(name, "begun")
        cluster.run("scancel", job)
        assert cluster.wait_for(job, "CANCELLED")["Restarts"] == "0"
        if "of a job that is COMPLETING" in said(name):
            return  # else it was killed (KillWait) before it could ask
    pytest.fail(said(name))


def test_without_the_question_a_cancelled_job_would_return(cluster):
    for number in range(5):
        job = submit(cluster, f"unasked{number}", f"{retry(3)} squeue() {{ echo RUNNING; }}; trap '' TERM; {STEP}")
        wait_to_read(f"unasked{number}", "begun")
        cluster.run("scancel", job)
        record = cluster.wait_for(job, {"PENDING", "CANCELLED"})
        cluster.run("scancel", job)
        if record["JobState"] == "PENDING":
            assert record["Restarts"] == "1"
            return  # else it was killed (KillWait) before it could
    pytest.fail(str(record))


def test_failed_start_leaves_nothing(needs_slurm, tmp_path, monkeypatch):
    hosts = module.HOSTS.read_bytes()
    monkeypatch.setattr(module, "IDLE_WITHIN_S", 1)

    def never(self) -> bool:
        log = self.directory / "log" / "slurmctld.log"
        wait_until(lambda: log.is_file() and log.stat().st_size)
        return False

    monkeypatch.setattr(Cluster, "_idle", never)
    cluster = Cluster(tmp_path)
    with pytest.raises(ClusterError, match=r"nodes are not idle, after 1 s\n(?s:.*)--- slurmctld.log"), cluster:
        pass
    assert module.HOSTS.read_bytes() == hosts
    assert list(cluster._processes()) == []


def test_nothing_is_left_of_a_cluster_that_is_busy(needs_slurm, tmp_path):
    hosts = module.HOSTS.read_bytes()
    with Cluster(tmp_path, nodes=1) as cluster:
        submit(cluster, "job", f"trap '' TERM; echo started; srun bash -c '{REMAINS}'")
        wait_to_read("job", "started")
        assert module.HOSTS.read_bytes() != hosts
    assert module.HOSTS.read_bytes() == hosts
    assert list(cluster._processes()) == []
    assert "SLURM_CONF" not in os.environ or os.environ["SLURM_CONF"] != cluster.env["SLURM_CONF"]
