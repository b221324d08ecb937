"""hydra/launcher=local_pool in real processes: several runs at once, one killed, one diverging, all typed again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY, dytrun, is_gone, only, tiny, wait_for_title, wait_until

from dytrun import machine
from dytrun.errors import UserError
from dytrun.launcher_config import PoolConfig
from dytrun.records import RunResult
from dytrun.task import Outcome, exit_code

POOL = ("hydra/launcher=local_pool", "hydra.launcher.jobs=2", "runs_dir=runs")


def statuses(runs: Path) -> list[str]:
    return sorted(RunResult.load(path).status for path in runs.glob("*/result.json"))


@pytest.mark.slow
def test_a_killed_and_a_diverging_job_leave_the_others_alone(tmp_path):
    args = ["train", "-m", *TINY, *POOL, "norm=ln,dyt", "optim.lr=1e-3,1e30", "optim.min_lr=0", "epochs=20"]
    first = tiny("norm=ln", "optim.lr=1e-3", "optim.min_lr=0", "epochs=20").run_dir.name
    process = subprocess.Popen(
        [sys.executable, "-m", "dytrun", *args],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        os.kill(wait_for_title(f"dytrun: job {first}", process.pid), signal.SIGKILL)
        out, err = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 1, err
    assert statuses(tmp_path / "runs") == ["diverged", "diverged", "finished"]
    (said,) = [line for line in err.splitlines() if "SIGKILL" in line]
    killed = said.split(": ")[1]
    assert killed.startswith("vit_tiny_patch16_224-ln-digits-s0-")
    assert "1 of 4 runs failed" in err
    table = out[out.rindex("4 runs, 2 at a time") :]
    assert [word for word in ("failed", "finished", "diverged") if word in table] == ["failed", "finished", "diverged"]
    assert is_gone(process.pid)
    assert list((tmp_path / "runs").glob(f".sweeps/*/logs/{killed}.log")), "the log of what failed is kept"

    again = dytrun(*args)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count(" running (core") == 1
    assert again.stdout.count("already; remove") == 3
    assert statuses(tmp_path / "runs") == ["diverged", "diverged", "finished", "finished"]

    alone = dytrun("train", *TINY, "norm=ln", "epochs=20", "optim.min_lr=0", "runs_dir=alone")
    assert alone.returncode == 0
    one = RunResult.load(only(tmp_path / "alone") / "result.json")
    other = RunResult.load(tmp_path / "runs" / only(tmp_path / "alone").name / "result.json")
    assert (one.weights_sha256, one.top1) == (other.weights_sha256, other.top1)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_stopping_the_pool_ends_every_job(tmp_path, how):
    args = ["train", "-m", *TINY, *POOL, "norm=ln", "seed=0,1,2", "epochs=400", "machine.devices=2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dytrun", *args], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_until(lambda: len({path.parents[1] for path in tmp_path.glob("runs/*/checkpoints/step-*")}) == 2)
    process.send_signal(how)
    _, err = process.communicate(timeout=200)
    assert is_gone(process.pid)
    if how == signal.SIGTERM:
        assert process.returncode == 75, err
        assert "was not started" in err
        assert "type the command again" in err
        assert "Traceback" not in err
        assert statuses(tmp_path / "runs") == ["interrupted", "interrupted"]


@pytest.mark.slow
def test_a_killed_rank_of_a_job_is_named(tmp_path):
    args = ["train", "-m", *TINY, *POOL, "norm=ln,dyt", "epochs=40", "machine.devices=2"]
    process = subprocess.Popen([sys.executable, "-m", "dytrun", *args], stderr=subprocess.PIPE, text=True)
    victim = wait_for_title("dytrun: rank 1 of 2, vit_tiny_patch16_224-ln", process.pid)
    while not list(tmp_path.glob("runs/*-ln-*/checkpoints/step-*")):
        time.sleep(0.1)
    assert len(os.sched_getaffinity(victim)) == len(os.sched_getaffinity(0)) // 2
    os.kill(victim, signal.SIGKILL)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 1
    assert f"rank 1 died: SIGKILL, process {victim}" in err
    assert "Traceback" not in err
    assert statuses(tmp_path / "runs") == ["failed", "finished"]


@pytest.mark.slow
def test_a_job_with_wrong_input_says_so_and_the_others_finish(tmp_path):
    done = dytrun("train", "-m", *TINY, *POOL, "norm=ln", "global_batch=32,2000")
    assert done.returncode == 2, done.stderr
    assert "global_batch: 2000 is more than the 1437 training images" in done.stderr
    assert statuses(tmp_path / "runs") == ["finished"]


@pytest.mark.slow
def test_a_directory_with_marks_of_hydras_grammar_and_a_result_that_cannot_be_read(tmp_path, monkeypatch):
    home = tmp_path / "jörg, (a=b) {c} 'd' #$"
    home.mkdir()
    monkeypatch.chdir(home)
    name = dytrun("train", *TINY, "norm=ln", "dry_run=true").stdout.split("runs/")[1].split()[0]
    (home / "runs" / name).mkdir(parents=True)
    (home / "runs" / name / "result.json").write_text("")
    done = dytrun("train", "-m", *TINY, *POOL, "norm=ln,dyt")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert f"{name}/result.json: cannot be read" in done.stderr
    (home / "runs" / name / "result.json").unlink()
    assert statuses(home / "runs") == ["finished"]


def test_what_the_shell_is_told():
    def code(*endings, is_sweep=True):
        return exit_code([Outcome("x", ending) for ending in endings], is_sweep)

    assert code("finished", "failed", "stopped") == 75
    assert code("finished", "refused", "failed") == 1
    assert code("finished", "refused") == 2
    assert code("finished", "diverged") == code("diverged") == code("planned") == 0
    assert code("diverged", is_sweep=False) == 1


def slots_of(monkeypatch, cores: int, gpus: int, **settings) -> list[str]:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    values = {"jobs": "auto", "gpus_per_job": 1, "cores_per_job": "auto"} | settings
    return [str(slot) for slot in machine.slots(PoolConfig.model_validate(values))]


def test_the_machine_is_shared_out(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert slots_of(monkeypatch, 2, 0) == ["core 0", "core 1"]
    assert slots_of(monkeypatch, 5, 0, jobs=2) == ["core 0,1", "core 2,3"]
    assert slots_of(monkeypatch, 16, 8, gpus_per_job=4) == ["GPU 0,1,2,3", "GPU 4,5,6,7"]
    assert slots_of(monkeypatch, 6, 8, cores_per_job=3) == ["GPU 0", "GPU 1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-ab, 3")
    assert slots_of(monkeypatch, 4, 2) == ["GPU GPU-ab", "GPU 3"]


@pytest.mark.parametrize(
    ("cores", "gpus", "settings"),
    [(2, 0, {"jobs": 3}), (2, 0, {"cores_per_job": 3}), (64, 2, {"jobs": 3}), (64, 2, {"gpus_per_job": 3})],
)
def test_more_jobs_than_fit_are_refused(monkeypatch, cores, gpus, settings):
    with pytest.raises(
        UserError,
        match=r"hydra\.launcher\.(jobs|cores_per_job|gpus_per_job): \d job\(s\) at a time do not fit; here are",
    ):
        slots_of(monkeypatch, cores, gpus, **settings)
