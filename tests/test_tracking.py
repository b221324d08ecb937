"""metrics.jsonl, the choice of W&B's mode, and W&B servers that refuse or never answer."""

import json
import socket
import subprocess
import sys
import time

import pytest
from conftest import tiny

from dytrun import records
from dytrun.records import Accuracy, EvalRecord, Speed, TrainRecord, to_json_line
from dytrun.tracking import Tracker, choose_mode

KEY = "0123456789" * 4


def train_record(step: int, loss: float = 1.0) -> TrainRecord:
    speed = Speed(images_per_s=100.0, step_ms_p50=5.0, step_ms_p95=6.0, data_wait_frac=0.1, peak_mem_gib=0.5)
    return TrainRecord(step, step / 10, step * 32, loss, 1e-3, 2.0, speed, world=2, alpha={"blocks.0.norm1": 0.5})


def eval_record(step: int) -> EvalRecord:
    found = Accuracy(num=4, top1_count=3, top5_count=4, loss=0.5, correct=records.np.array([True] * 3 + [False]))
    return EvalRecord(step, step / 10, step * 32, raw=found, ema=found)


def test_the_names_of_metrics_are_frozen():
    """Dashboards and reports outside this repository read these names: a change here breaks them."""
    names = train_record(1).metrics().keys() | eval_record(1).metrics().keys()
    assert names - {"norm/alpha/blocks.0.norm1"} == set(records.METRICS)
    assert records.METRICS == (
        "train/loss", "train/lr", "train/grad_norm", "val/loss", "val/top1", "val/top5", "ema/top1", "ema/top5",
        "perf/images_per_s", "perf/images_per_s_per_device", "perf/step_ms", "perf/data_wait_frac",
        "perf/peak_mem_gib",
    )  # fmt: skip
    assert records.SITE_METRICS == ("norm/alpha/<site>", "norm/input_std/<site>", "norm/saturation/<site>")
    assert records.AXES == ("step", "epoch", "samples_seen")


def test_a_line_is_a_record_and_what_is_not_finite_becomes_null():
    line = json.loads(to_json_line(train_record(10, loss=float("nan"))))
    assert line["train/loss"] is None
    assert (line["step"], line["epoch"], line["samples_seen"]) == (10, 1.0, 320)
    assert line["perf/images_per_s_per_device"] == 50.0
    assert line["norm/alpha/blocks.0.norm1"] == 0.5
    assert json.loads(to_json_line(eval_record(10)))["val/top1"] == 75.0


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path):
    config = tiny()
    tracker = Tracker(config, tmp_path, 0, print)
    for step in (10, 20, 30):
        tracker.log(train_record(step))
    tracker.finish(None)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "tra')  # what a killed process left
    tracker = Tracker(config, tmp_path, 20, print)
    tracker.log(train_record(30, loss=9.0))
    tracker.finish(None)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["train/loss"]) for line in lines] == [(10, 1.0), (20, 1.0), (30, 9.0)]


def test_without_a_key_auto_is_offline(monkeypatch, tmp_path):
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert choose_mode(tiny("tracking.mode=auto").tracking)[0] == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert choose_mode(tiny("tracking.mode=auto").tracking)[0] == "off"
    assert choose_mode(tiny("tracking.mode=offline").tracking)[0] == "offline"


START = """
import sys, time
from dytrun.compose import expand
from dytrun.tracking import Tracker
from pathlib import Path
config = expand(sys.argv[2:]).configs[0]
start = time.time()
notes = []
tracker = Tracker(config, Path(sys.argv[1]), 0, notes.append)
print(time.time() - start)
print(notes[0])
tracker.finish(None)
"""


def start_tracker(directory, server: str, monkeypatch, *overrides: str) -> subprocess.CompletedProcess[str]:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", server)
    directory.mkdir()
    return subprocess.run(
        [sys.executable, "-c", START, str(directory), "data=digits", *overrides],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_a_server_that_refuses_costs_seconds_and_no_run(tmp_path, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = start_tracker(tmp_path / "run", f"http://127.0.0.1:{port}", monkeypatch)
    assert done.returncode == 0, done.stderr
    seconds, note = done.stdout.splitlines()[:2]
    assert float(seconds) < 10
    assert "out of reach" in note
    assert "wandb leet" in note
    assert "wandb sync" in note
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))


@pytest.mark.slow
def test_a_server_that_never_answers_costs_half_a_minute_and_no_run(tmp_path, monkeypatch):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(50)
        begun = time.time()
        done = start_tracker(tmp_path / "run", f"http://127.0.0.1:{server.getsockname()[1]}", monkeypatch)
        assert done.returncode == 0, done.stderr
        assert float(done.stdout.splitlines()[0]) < 30, time.time() - begun
        assert "did not answer" in done.stdout
        assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))


@pytest.mark.slow
def test_online_asked_for_and_not_had_is_an_error(tmp_path, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = start_tracker(tmp_path / "run", f"http://127.0.0.1:{port}", monkeypatch, "tracking.mode=online")
    assert "UserError: tracking.mode: W&B cannot be reached" in done.stderr


def test_no_key_is_written_anywhere(tmp_path, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start_tracker(tmp_path / "run", f"http://127.0.0.1:{port}", monkeypatch)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
