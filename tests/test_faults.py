"""What breaks in the middle of a run: a rank, a loader, a collective, a number. It ends soon, and says who it was."""

import contextlib
import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
from conftest import TINY, alive_in_group, image_files, only, processes
from warm import essence, step_of

from dytrun.records import RunResult

pytestmark = pytest.mark.slow

RUN = ("train", *TINY, "norm=dyt", "epochs=12", "ema=on", "augment=light", "model.drop_path=0.1", "machine.workers=1",
       "machine.devices=2", "global_batch=64", "tracking.log_every_steps=5")  # fmt: skip
HANG_S = 8


@pytest.fixture(scope="module")
def whole(warm, tmp_path_factory) -> dict:
    """What the run comes to that nothing happens to."""
    directory = tmp_path_factory.mktemp("whole")
    job = warm.run(directory / "log", *RUN, f"runs_dir={directory}")
    assert job.code == 0, job.said()
    return essence(directory)


def loader_of(job, rank: int) -> int:
    return job.find(f"loader of rank {rank} of 2")


@pytest.mark.parametrize(
    ("who", "said"),
    [
        ("rank 1 of 2", "rank 1 hangs: no sign of life (stopped, or out of reach); no step for 8 s"),
        ("loader of rank 1 of 2", "rank 1 waits for images, step "),
    ],
)
def test_a_hang_ends_and_names_the_rank(warm, whole, tmp_path, who, said):
    """SIGSTOP: the process is there, and does nothing any more."""
    job = warm.start(tmp_path / "log", *RUN, f"runs_dir={tmp_path}/runs", f"machine.hang_timeout_s={HANG_S}")
    victim = job.find(who)
    job.until(lambda: step_of(tmp_path / "runs") > 30)
    since = time.monotonic()
    os.kill(loader_of(job, 1), signal.SIGSTOP)  # then rank 1 has no more images, and gives no more gradients
    if victim != loader_of(job, 1):
        job.until_it_stands_still(tmp_path / "runs")
        os.kill(victim, signal.SIGSTOP)
    assert job.wait() == 1, job.said()
    assert HANG_S < time.monotonic() - since < HANG_S + 45
    assert f"dytrun: {said}" in job.said(), job.said()
    assert "; no step for 8 s (machine.hang_timeout_s)\n" in job.said()
    assert "--- rank 0 computes, or waits in the exchange of gradients" in job.said()
    assert "in train_step" in job.said(), "where each rank stands"
    assert job.is_gone
    result = RunResult.load(only(tmp_path / "runs") / "result.json")
    assert result.status == "failed"
    assert result.message.startswith("rank 1")
    again = warm.run(tmp_path / "log", *RUN, f"runs_dir={tmp_path}/runs")
    assert again.code == 0, again.said()
    assert essence(tmp_path / "runs") == whole


def test_a_killed_loader_is_an_error_that_names_it(warm, whole, tmp_path):
    job = warm.start(tmp_path / "log", *RUN, f"runs_dir={tmp_path}/runs")
    victim = loader_of(job, 1)
    job.until(lambda: step_of(tmp_path / "runs") > 30)
    os.kill(victim, signal.SIGKILL)
    assert job.wait() == 1
    assert job.seconds < 60, "found by itself; a collective would wait for ten minutes"
    # The first where images are waited for; torch's own words where its signal handler was sooner.
    named = rf"(loader process {victim} \(SIGKILL\) died|DataLoader worker \(pid {victim}\) is killed)"
    assert re.search(f"rank 1: RuntimeError: {named}", job.said()), job.said()
    assert job.is_gone
    again = warm.run(tmp_path / "log", *RUN, f"runs_dir={tmp_path}/runs")
    assert again.code == 0, again.said()
    assert essence(tmp_path / "runs") == whole


def test_loaders_and_their_rank_outlive_a_signal_to_a_loader(warm, whole, tmp_path):
    job = warm.start(tmp_path / "log", *RUN, f"runs_dir={tmp_path}/runs")
    loaders = [loader_of(job, 0), loader_of(job, 1)]
    job.until(lambda: step_of(tmp_path / "runs") > 30)
    for pid in loaders:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(pid, number)
    assert job.wait() == 0, job.said()
    assert essence(tmp_path / "runs") == whole


def test_ranks_that_die_are_started_again_as_often_as_asked(warm, whole, tmp_path):
    """Each time with a new checkpoint, so that two deaths do not use up one restart."""
    job = warm.start(tmp_path / "log", *RUN, f"runs_dir={tmp_path}/runs", "machine.max_restarts=1")
    dead = 0
    for step in (50, 150):
        job.until(lambda: step_of(tmp_path / "runs") > step and job.find("rank 0 of 2") != dead)  # noqa: B023
        os.kill(dead := job.find("rank 0 of 2"), signal.SIGKILL)
    assert job.wait() == 0, job.said()
    assert job.said().count("rank 0 died: SIGKILL") == 2
    assert essence(tmp_path / "runs") == whole


def test_a_stop_that_a_crash_cuts_short_is_no_reason_to_start_again(warm, tmp_path):
    runs = tmp_path / "runs"
    job = warm.start(tmp_path / "log", *RUN, f"runs_dir={runs}", "machine.max_restarts=1")
    victim = job.find("rank 1 of 2")
    job.until(lambda: step_of(runs) > 30)
    os.kill(victim, signal.SIGSTOP)
    os.kill(job.pid, signal.SIGTERM)
    time.sleep(1)
    os.kill(victim, signal.SIGKILL)
    assert job.wait() == 75, job.said()
    assert "told to stop, but before it had: rank 1 died: SIGKILL" in job.said()
    assert "starting again" not in job.said()


def test_a_crash_without_progress_ends_after_the_bound(warm, tmp_path):
    runs = tmp_path / "runs"
    job = warm.start(tmp_path / "log", *RUN, f"runs_dir={runs}", "machine.max_restarts=2", "checkpoint.every_epochs=12")
    dead: set[int] = set()
    while len(dead) < 3:
        assert alive_in_group(job.pid), job.said()
        for pid, title in processes():
            with contextlib.suppress(ProcessLookupError):  # another test's rank, which has ended since
                if title.startswith("dytrun: rank 1 of 2") and pid not in dead and os.getpgid(pid) == job.pid:
                    os.kill(pid, signal.SIGKILL)
                    dead.add(pid)
        time.sleep(0.02)
    assert job.wait() == 1
    assert job.said().count("starting again") == 2
    assert job.said().count("rank 1 died: SIGKILL") == 3


def test_a_run_that_diverges_can_be_asked_where(warm, tmp_path):
    """float16's range: a learning rate that throws the weights out of it, on two ranks."""
    runs = tmp_path / "runs"
    run = ("train", *TINY, "norm=ln", "machine.devices=2", "global_batch=64", "optim.lr=1e20", f"runs_dir={runs}",
           "machine.max_batch_per_rank=16", "model.drop_path=0.1")  # fmt: skip
    job = warm.run(tmp_path / "log", *run)
    assert job.code == 1, job.said()
    directory = only(runs)
    result = RunResult.load(directory / "result.json")
    assert result.status == "diverged"
    kept = json.loads((directory / "diverged" / "step.json").read_text())
    assert result.message.startswith(f"loss or gradient not finite at step {kept['step']} (loss nan")
    assert result.message.endswith(f"do that step again: dytrun replay {directory}")
    assert [len(one["images"]) for one in kept["ranks"]] == [2, 2], "micro-batches"
    images = [index for one in kept["ranks"] for part in one["images"] for index in part]
    assert len(set(images)) == 64
    again = warm.run(tmp_path / "log2", "replay", str(directory), "devices=2")
    assert again.code == 0, again.said()
    assert f"step {kept['step']} of" in again.said()
    assert "reproduced" in again.said()
    assert "not reproduced" not in again.said()
    wrong = warm.run(tmp_path / "log3", "replay", str(directory), "devices=1")
    assert wrong.code == 2
    assert "devices: the run had 2 rank(s), and here are 1; say devices=2" in wrong.said()


def test_bad_images_are_counted_once_over_ranks_and_epochs(warm, image_tree, tmp_path):
    """1 % of the JPEGs are cut short: the run finishes, lists them, and does the same when it is taken up again."""
    root = image_tree(train={"a": 150, "b": 150}, val={"a": 8, "b": 8})
    bad = image_files(root / "train")[7:300:100]
    for path in bad:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    data = ("data=folder", f"data.root={root}", "data.image_size=16", "epochs=16", "data.max_bad_fraction=0.01")
    run = (*(word for word in RUN if not word.startswith(("data=", "epochs="))), *data)
    whole = warm.run(tmp_path / "log", *run, f"runs_dir={tmp_path}/whole")
    assert whole.code == 0, whole.said()
    result = RunResult.load(only(tmp_path / "whole") / "result.json")
    assert sorted(one["path"] for one in result.bad_images) == sorted(map(str, bad))
    assert all(Path(one["used_instead"]).parent == Path(one["path"]).parent for one in result.bad_images)
    assert 32 <= result.substituted <= 48, "each of three in at most sixteen epochs"
    job = warm.start(tmp_path / "log", *run, f"runs_dir={tmp_path}/parts")
    job.until(lambda: step_of(tmp_path / "parts") >= 5)
    os.kill(job.pid, signal.SIGTERM)
    assert job.wait() == 75, job.said()
    more_loaders = ("machine.workers=2",)
    again = warm.run(tmp_path / "log", *run, f"runs_dir={tmp_path}/parts", *more_loaders)
    assert again.code == 0, again.said()
    assert essence(tmp_path / "parts") == essence(tmp_path / "whole")
    too_many = warm.run(tmp_path / "log4", *run, f"runs_dir={tmp_path}/few", "data.max_bad_fraction=0.005")
    assert too_many.code == 2, too_many.said()
    assert "data.max_bad_fraction: 2 of 300 training images cannot be read, more than the share of 0.005" in (
        too_many.said()
    )


def test_other_data_is_refused_and_other_threads_are_said(warm, image_tree, tmp_path):
    root = image_tree(train={"a": 64, "b": 64}, val={"a": 8, "b": 8})
    data = ("data=folder", f"data.root={root}", "data.image_size=16", "epochs=40")
    run = (*(word for word in RUN if not word.startswith(("data=", "epochs="))), *data, f"runs_dir={tmp_path}/runs")
    job = warm.start(tmp_path / "log", *run)
    job.until(lambda: step_of(tmp_path / "runs") >= 4)
    os.kill(job.pid, signal.SIGTERM)
    assert job.wait() == 75, job.said()
    extra = root / "train" / "a" / "new.jpg"
    extra.write_bytes((root / "train" / "a" / "0.jpg").read_bytes())
    refused = warm.run(tmp_path / "log2", *run)
    assert refused.code == 2
    assert f"data.root: {root} is not what this run was trained on up to step " in refused.said()
    assert "train 128 -> 129 images" in refused.said()
    extra.unlink()
    other = warm.run(tmp_path / "log3", *run, "machine.devices=1", "machine.max_batch_per_rank=32")
    assert other.code == 0, other.said()
    assert "not bit-equal to a run that was never interrupted: accumulation 1 before, 2 now; ranks 2 before, 1 now" in (
        " ".join(other.said().split())
    )
    starts = RunResult.load(only(tmp_path / "runs") / "result.json").starts
    assert starts[-1]["changed_build"] == {"accumulation": [1, 2], "ranks": [2, 1]}
    assert starts[-1]["changed"]["machine.devices"] == [2, 1]
