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
import torch
from conftest import TINY, is_gone, only, processes, wait_until
from safetensors.torch import load_file
from warm import essence, step_of

from dytrun.records import RunResult

pytestmark = pytest.mark.slow

RUN = ("train", *TINY, "norm=dyt", "epochs=20", "ema=on", "augment=light", "model.drop_path=0.1", "machine.devices=2",
       "machine.workers=1", "global_batch=64", "tracking.log_every_steps=10")  # fmt: skip


@pytest.fixture(scope="module")
def whole(warm, tmp_path_factory) -> dict:
    """The run that nobody disturbs."""
    directory = tmp_path_factory.mktemp("whole")
    job = warm.run(directory / "log", *RUN, f"runs_dir={directory}")
    assert job.code == 0, job.said()
    return essence(directory)


def start(directory: Path) -> subprocess.Popen[str]:
    """Start the command as a shell does: a process group of its own, with a server that the ranks are forked from."""
    command = [sys.executable, "-m", "dytrun", *RUN, f"runs_dir={directory}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, start_new_session=True, **pipes)


def ended(run: subprocess.Popen[str], within_s: float = 200) -> str:
    """Return what a stopped run says on stderr; nothing of it is left."""
    out, err = run.communicate(timeout=within_s)
    assert run.returncode == 75, out + err
    assert "Traceback" not in err
    assert is_gone(run.pid)
    return err


def stopped_at(said: str, number: signal.Signals) -> int:
    """Return the step after which a run says that it was stopped."""
    assert said.count(f"stopped by {number.name} after step ") == 1, said
    assert "; its checkpoint is written\n" in said
    assert said.endswith("dytrun: type the command again to go on from the last checkpoint\n")
    return int(said.partition(f"by {number.name} after step ")[2].partition(";")[0])


def test_stopped_again_and_again_it_ends_as_if_it_had_not_been(warm, whole, tmp_path):
    runs, stops = tmp_path / "runs", [0]
    ways = [
        (25, "launcher", signal.SIGTERM, 1),
        (70, "group", signal.SIGINT, 0),  # a terminal's Ctrl-C
        (150, "rank 1", signal.SIGUSR1, 2),
        (220, "group", signal.SIGTERM, 3),  # as SLURM does
        (290, "launcher", signal.SIGHUP, 0),
        (330, "rank 0", signal.SIGUSR2, 2),
    ]
    for number, (step, whom, sent, workers) in enumerate(ways):
        run = (*RUN, f"runs_dir={runs}", f"machine.workers={workers}")
        job = warm.start(tmp_path / f"log{number}", *run)
        target = job.pid if not whom.startswith("rank") else job.find(f"{whom} of 2")
        job.until(lambda: step_of(runs) >= step)  # noqa: B023
        os.killpg(target, sent) if whom == "group" else os.kill(target, sent)
        assert job.wait() == 75, job.said()
        assert job.seconds < 30
        assert job.is_gone
        stops.append(stopped_at(job.said(), sent))
        assert stops[-1] >= step
        assert RunResult.load(only(runs) / "result.json").status == "interrupted"
        assert (only(runs) / "checkpoints" / f"step-{stops[-1]:08d}" / "manifest.json").is_file()
    done = warm.run(tmp_path / "log", *RUN, f"runs_dir={runs}")
    assert done.code == 0, done.said()
    assert f"taken up again after step {stops[-1]}: it will end bit-equal" in done.said()
    assert essence(runs) == whole
    starts = RunResult.load(only(runs) / "result.json").starts
    assert [one["step"] for one in starts] == stops
    assert all(one["changed_build"] == {} for one in starts), "loaders do not count"
    assert starts[2]["changed"] == {"machine.workers": [0, 2]}


def test_as_a_shell_starts_it_too(whole, warm, tmp_path):
    """A signal to the group reaches the server of the ranks as well; ranks without one would count as dead."""
    run = start(tmp_path / "runs")
    wait_until(lambda: step_of(tmp_path / "runs") >= 20)
    os.killpg(run.pid, signal.SIGTERM)
    assert stopped_at(ended(run), signal.SIGTERM) >= 20
    done = warm.run(tmp_path / "log", *RUN, f"runs_dir={tmp_path / 'runs'}")
    assert done.code == 0, done.said()
    assert essence(tmp_path / "runs") == whole


def test_a_batch_norm_within_an_epoch_is_each_ranks_own(warm, tmp_path):
    """Its statistics are averaged before an evaluation; until then each rank goes on with those that it had."""
    norms = ("model.name=lcnet_035", "model.kwargs={}", "norm=ln", "data.image_size=32", "epochs=4", "global_batch=64",
             "tracking.log_every_steps=1")  # fmt: skip
    changed = ("model.", "norm=", "epochs=", "global", "tracking.log")
    run = (*(word for word in RUN if not word.startswith(changed)), *norms)
    whole = warm.run(tmp_path / "log", *run, f"runs_dir={tmp_path}/whole")
    assert whole.code == 0, whole.said()
    runs = tmp_path / "parts"
    job = warm.start(tmp_path / "log1", *run, f"runs_dir={runs}")
    job.until(lambda: step_of(runs) >= 3)
    os.kill(job.pid, signal.SIGTERM)
    assert job.wait() == 75, job.said()
    step = stopped_at(job.said(), signal.SIGTERM)
    assert step % 22, "not at the end of an epoch"
    buffers = load_file(only(runs) / "checkpoints" / f"step-{step:08d}" / "rank_buffers.safetensors")
    one, other = (buffers[f"2.{rank}.model.bn1.running_mean"] for rank in (0, 1))
    assert not torch.equal(one, other)
    done = warm.run(tmp_path / "log2", *run, f"runs_dir={runs}")
    assert done.code == 0, done.said()
    found, expected = essence(runs), essence(tmp_path / "whole")
    assert found == expected


def test_three_ranks_sum_up_in_the_same_order_again(warm, tmp_path):
    """More than a bucket of gradients: DDP orders its buckets anew after its first steps, and with them the sums."""
    run = ("train", *TINY, "machine.devices=3", "global_batch=96", "epochs=6", "tracking.log_every_steps=1",
           "model.kwargs={patch_size: 4, embed_dim: 192, depth: 3, num_heads: 3, global_pool: avg}")  # fmt: skip
    whole = warm.run(tmp_path / "log", *run, f"runs_dir={tmp_path}/whole")
    assert whole.code == 0, whole.said()
    runs = tmp_path / "parts"
    job = warm.start(tmp_path / "log1", *run, f"runs_dir={runs}")
    job.until(lambda: step_of(runs) >= 5)
    os.kill(job.pid, signal.SIGTERM)
    assert job.wait() == 75, job.said()
    assert stopped_at(job.said(), signal.SIGTERM) < 84
    done = warm.run(tmp_path / "log2", *run, f"runs_dir={runs}")
    assert done.code == 0, done.said()
    assert essence(runs) == essence(tmp_path / "whole")


def test_a_second_signal_does_not_wait(warm, tmp_path):
    """Its loaders hold, so no step ever ends."""
    runs = tmp_path / "runs"
    job = warm.start(tmp_path / "log", *RUN, f"runs_dir={runs}")
    loaders = [job.find(f"loader of rank {rank} of 2") for rank in (0, 1)]
    job.until(lambda: step_of(runs) >= 10)
    for pid in loaders:
        os.kill(pid, signal.SIGSTOP)
    job.until_it_stands_still(runs)
    before = sorted(path.name for path in only(runs).glob("checkpoints/step-*"))
    os.kill(job.pid, signal.SIGTERM)
    job.until(lambda: "again to leave at once" in job.said())
    time.sleep(1.5)  # a signal that reaches it twice within a second counts once
    assert any(pid == job.pid for pid, _ in processes())
    os.kill(job.pid, signal.SIGTERM)
    assert job.wait() == 75
    assert job.seconds < 30
    assert job.is_gone
    assert "stopped at once; nothing was saved for that" in job.said()
    assert sorted(path.name for path in only(runs).glob("checkpoints/step-*")) == before


INTERRUPTED = """
import sys
from dytrun import cli
def within_exec(args): exec("raise KeyboardInterrupt")
cli._main = within_exec
sys.exit(cli.main())
"""


def test_an_interrupt_within_exec_exits_75_too(tmp_path):
    """Imports run much of their code by exec(); run by -m, CPython notes an interrupt there for its own exit code."""
    (tmp_path / "interrupted.py").write_text(INTERRUPTED)
    path = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-m", "interrupted", "train"], env=path, capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert (done.returncode, done.stderr) == (75, "dytrun: stopped\n")


DEAF = """
import os, signal, sys, time
from dytrun import stop

def profile(frame, event, arg):
    if event == "call" and frame.f_code.co_name == "cb" and "importlib" in frame.f_code.co_filename:
        sys.setprofile(None)
        os.kill(os.getpid(), signal.SIGTERM)

with stop.as_interrupt():
    sys.setprofile(profile)
    try:
        import hydra.core
        time.sleep(100)
    except KeyboardInterrupt:
        sys.exit(75)
"""


def test_a_signal_within_a_callback_of_an_import_is_not_lost():
    """What is raised in a callback Python prints and drops."""
    done = subprocess.run([sys.executable, "-c", DEAF], capture_output=True, text=True, check=False, timeout=90)
    assert (done.returncode, done.stderr) == (75, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_before_anything_has_begun_leaves_nothing(tmp_path, number):
    run = start(tmp_path / "runs")
    wait_until(lambda: "libtorch" in Path(f"/proc/{run.pid}/maps").read_text())  # torch is being imported
    run.send_signal(number)
    assert ended(run) == "dytrun: stopped\n"
    assert not (tmp_path / "runs").exists()
