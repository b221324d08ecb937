"""Signals: to the launcher, to one rank, to the whole group, twice, too early; each in a real run of real ranks.

However a run is stopped, it says where, exits with 75, and typed again ends bit-equal to one that was not stopped.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY, alive_in_group, dytrun, lines, only, processes, wait_for_title

from dytrun.records import RunResult

pytestmark = pytest.mark.slow

RUN = (*TINY, "norm=dyt", "epochs=40", "ema=on", "augment=light", "model.drop_path=0.1", "machine.devices=2",
       "machine.workers=1", "global_batch=64", "tracking.log_every_steps=10")  # fmt: skip


def start(*args: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dytrun", "train", *args]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, start_new_session=True, **pipes)


def wait_for_step(directory: Path, step: int, timeout_s: float = 90) -> None:
    """Return when the one run under a directory has written down a step."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        for path in directory.glob("*/metrics.jsonl"):
            if any(record["step"] >= step for record in lines(path.parent)):
                return
        time.sleep(0.05)
    raise TimeoutError(f"no step {step} in {directory}")


def essence(directory: Path) -> tuple:
    """What must be the same of two runs: files of the last checkpoint, result and metrics, without times."""
    run = only(directory)
    result = RunResult.load(run / "result.json")
    newest = max((run / "checkpoints").glob("step-*"))
    files = {path.name: path.read_bytes() for path in newest.glob("*.safetensors")}
    records = [{name: value for name, value in one.items() if not name.startswith("perf/")} for one in lines(run)]
    kept = result.status, result.top1, result.ema_top1, result.best_epoch, result.weights_sha256, result.alpha
    return newest.name, files, kept, records, (run / "correct.npz").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple:
    """The run that nobody disturbs."""
    directory = tmp_path_factory.mktemp("whole")
    done = dytrun("train", *RUN, f"runs_dir={directory}", env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return essence(directory)


def ended(run: subprocess.Popen[str], within_s: float = 15) -> str:
    """Return what a stopped run says on stderr; nothing of it is left."""
    out, err = run.communicate(timeout=within_s)
    assert run.returncode == 75, out + err
    assert "Traceback" not in err
    until = time.monotonic() + 5
    while alive_in_group(run.pid) and time.monotonic() < until:
        time.sleep(0.1)
    assert not alive_in_group(run.pid)
    return err


def rank_of(run: subprocess.Popen[str], rank: int) -> int:
    return wait_for_title(f"dytrun: rank {rank} of 2", run.pid)


def test_stopped_again_and_again_it_ends_as_if_it_had_not_been(tmp_path, whole):
    runs = tmp_path / "runs"
    ways = [
        (25, "launcher", signal.SIGTERM),
        (70, "group", signal.SIGINT),  # a terminal's Ctrl-C
        (150, "rank 1", signal.SIGUSR1),
        (250, "group", signal.SIGTERM),  # as SLURM does
        (350, "launcher", signal.SIGHUP),
    ]
    stopped_at = [0]
    for step, whom, number in ways:
        run = start(*RUN, f"runs_dir={runs}")
        target = rank_of(run, 1) if whom == "rank 1" else run.pid
        wait_for_step(runs, step)
        os.killpg(target, number) if whom == "group" else os.kill(target, number)
        err = ended(run)
        assert f"stopped by {number.name} after step " in err, err
        assert "; its checkpoint is written" in err
        assert err.endswith("dytrun: type the command again to go on from the last checkpoint\n")
        stopped_at.append(int(err.partition("after step ")[2].partition(";")[0]))
        assert stopped_at[-1] >= step
        assert RunResult.load(only(runs) / "result.json").status == "interrupted"
        assert (only(runs) / "checkpoints" / f"step-{stopped_at[-1]:08d}" / "manifest.json").is_file()
    done = dytrun("train", *RUN, f"runs_dir={runs}")
    assert done.returncode == 0, done.stderr
    assert f"taken up again after step {stopped_at[-1]}: it will end bit-equal" in done.stdout
    assert essence(runs) == whole
    starts = RunResult.load(only(runs) / "result.json").starts
    assert [one["step"] for one in starts] == stopped_at
    assert all(one["changed"] == {} and one["changed_build"] == {} for one in starts)


def test_a_second_signal_does_not_wait(tmp_path):
    """Its loaders hold, so no step ever ends."""
    run = start(*RUN, f"runs_dir={tmp_path / 'runs'}")
    wait_for_step(tmp_path / "runs", 10)
    loaders = [pid for pid, title in processes() if title.startswith("dytrun: loader of rank")]
    for pid in loaders:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(1)
    before = sorted(path.name for path in only(tmp_path / "runs").glob("checkpoints/step-*"))
    run.send_signal(signal.SIGTERM)
    time.sleep(2)
    assert run.poll() is None
    run.send_signal(signal.SIGTERM)
    err = ended(run)
    assert "stopped at once; nothing was saved for that" in err
    assert sorted(path.name for path in only(tmp_path / "runs").glob("checkpoints/step-*")) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_before_anything_has_begun_leaves_nothing(tmp_path, number):
    run = start(*RUN, f"runs_dir={tmp_path / 'runs'}")
    time.sleep(1.5)  # torch is being imported
    run.send_signal(number)
    assert ended(run) == "dytrun: stopped\n"
    assert not (tmp_path / "runs").exists()
