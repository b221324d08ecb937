"""kill -9, again and again: of the whole job, inside a save too, and of single ranks. Nothing is lost.

`pytest -m kill` kills ten runs once each and takes them up again; DYTRUN_KILLS=50 kills fifty. Every one ends
bit-equal to the run that was not killed: weights, moments, EMA, counters, metrics, predictions.
"""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from conftest import TINY
from warm import chosen, essence, step_of

pytestmark = [pytest.mark.kill, pytest.mark.timeout(3600)]

KILLS = int(os.environ.get("DYTRUN_KILLS", "10"))
RUN = (*TINY, "norm=dyt", "epochs=12", "ema=on", "augment=light", "augment.mixup=0.8", "model.drop_path=0.1",
       "machine.workers=1", "machine.max_batch_per_rank=8", "tracking.log_every_steps=7",
       "checkpoint.every_minutes=0.005")  # fmt: skip


@pytest.fixture(scope="module")
def whole(warm, tmp_path_factory) -> dict[int, dict]:
    """What the undisturbed run comes to, of one and of two ranks."""
    found = {}
    for world in (1, 2):
        directory = tmp_path_factory.mktemp(f"whole{world}")
        job = warm.run(directory / "log", "train", *RUN, f"machine.devices={world}", f"runs_dir={directory}")
        assert job.code == 0, job.said()
        found[world] = essence(directory)
    return found


def kill(job, how: str, directory: Path, draw: random.Random) -> None:
    """Wait for a random step, and a random moment longer; kill."""
    victim = job.find(f"rank {how[-1]} of") if how.startswith("rank") else None
    step = draw.randint(1, 300)  # of 528
    job.until(lambda: step_of(directory) >= step)
    time.sleep(draw.uniform(0, 0.1))
    if how == "job inside a save":
        until = time.monotonic() + 150
        while not list(directory.glob("*/checkpoints/.step-*.partial")):  # there for some milliseconds
            assert time.monotonic() < until, job.said()
    if victim is None:
        job.kill()
    else:
        os.kill(victim, signal.SIGKILL)


@pytest.mark.parametrize("number", range(KILLS))
def test_a_killed_run_ends_bit_equal(warm, whole, tmp_path, number):
    draw = chosen(number)
    world = 1 + number % 2
    hows = ["job", "job inside a save", "rank 0"] + (["rank 1"] if world == 2 else [])
    how = hows[(number // 2) % len(hows)]
    runs = tmp_path / "runs"
    command = ("train", *RUN, f"machine.devices={world}", f"runs_dir={runs}")
    job = warm.start(tmp_path / "log", *command)
    kill(job, how, runs, draw)
    code = job.wait()
    if how.startswith("rank"):
        assert code == 1, job.said()
        assert f"{how} died: SIGKILL" in job.said()
        assert job.seconds < 60
    else:
        assert code == -signal.SIGKILL
    assert job.is_gone
    again = warm.run(tmp_path / "log", *command)
    assert again.code == 0, again.said()
    assert essence(runs) == whole[world], how
