"""metrics.jsonl, on a good and on a full disk, and the choice of W&B's mode."""

import json
import math
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import tiny
from tracked import fill, train_record

from dytrun import records
from dytrun.records import Accuracy, EvalRecord, Position, ProbeRecord, Record, to_json_line
from dytrun.site_chart import SiteChart
from dytrun.tracking import Tracker
from dytrun.wandb_reach import choose_mode


def eval_record(step: int) -> EvalRecord:
    found = Accuracy(num=4, top1_count=3, top5_count=4, loss=0.5, correct=records.np.array([True] * 3 + [False]))
    return EvalRecord(step, step / 10, step * 32, raw=found, ema=found)


def test_the_names_of_metrics_are_frozen():
    """Dashboards and reports outside this repository read these names: a change here breaks them."""
    names = train_record(1).metrics().keys() | eval_record(1).metrics().keys()
    assert names == set(records.METRICS)
    site = {"blocks.0.norm1": 0.5}
    assert tuple(ProbeRecord(1, 0.1, 32, site, site, site).metrics()) == tuple(
        name.replace("<site>", "blocks.0.norm1") for name in records.SITE_METRICS
    )
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
    assert json.loads(to_json_line(eval_record(10)))["val/top1"] == 75.0


def track(run_dir: Path, position: Position, new: list[Record]) -> list[str]:
    """Log some records without W&B and return what was said."""
    said: list[str] = []
    tracker = Tracker(tiny(), run_dir, position, said.append)
    for record in new:
        tracker.log(record)
    tracker.finish(None)
    return said


def steps(run_dir: Path) -> list[tuple[int, float | None]]:
    """Return (step, loss) of each line; an evaluation has None."""
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line.get("train/loss")) for line in found]


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path):
    track(tmp_path, Position(0, False), [train_record(step) for step in (10, 20, 30)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "tra')  # what a killed process left
    track(tmp_path, Position(20, True), [train_record(30, loss=9.0)])
    assert steps(tmp_path) == [(10, 1.0), (20, 1.0), (30, 9.0)]


@pytest.mark.parametrize(
    ("position", "kept"),
    [
        (Position(20, True), [(10, 1.0), (10, None), (20, 1.0), (20, None)]),
        (Position(20, False), [(10, 1.0), (10, None), (20, 1.0)]),
        (Position(15, False), [(10, 1.0), (10, None)]),
        (Position(0, False), []),
    ],
)
def test_an_evaluation_is_kept_only_if_training_got_past_it(tmp_path, position, kept):
    track(tmp_path, Position(0, False), [train_record(10), eval_record(10), train_record(20), eval_record(20)])
    assert track(tmp_path, position, []) == []
    assert steps(tmp_path) == kept


def test_a_line_that_cannot_be_read_costs_no_other(tmp_path):
    track(tmp_path, Position(0, False), [train_record(10)])
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(bytes(100) + b"\n" + (to_json_line(train_record(20)) + "\n").encode())
    said = track(tmp_path, Position(20, True), [])
    assert said == ["metrics.jsonl has 1 lines that cannot be read; they are left out"]
    assert steps(tmp_path) == [(10, 1.0), (20, 1.0)]


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_what_a_full_disk_does_not_take_waits_in_memory_whole(small_disk):
    said: list[str] = []
    tracker = Tracker(tiny(), small_disk, Position(0, False), said.append)
    # Less than a record is left of the page that the file ends in: the next one begins and does not fit.
    size = len(to_json_line(train_record(11))) + 1
    assert 4096 % size
    for step in range(10, 10 + 4096 // size):
        tracker.log(train_record(step))
    last = step
    fill(small_disk)
    before = (small_disk / "metrics.jsonl").read_bytes()
    for step in (last + 1, last + 2):
        tracker.log(train_record(step))
        assert (small_disk / "metrics.jsonl").read_bytes() == before  # not a byte of half a record
    reason = "metrics.jsonl cannot be written ([Errno 28] No space left on device)"
    assert said == [f"{reason}: 1 records wait in memory", f"{reason}: 2 records wait in memory"]
    (small_disk / "filler").unlink()
    tracker.log(train_record(last + 3))
    assert steps(small_disk) == [(step, 1.0) for step in range(10, last + 4)]
    fill(small_disk)
    for step in range(last + 4, last + 24):
        tracker.log(train_record(step))
    tracker.finish(None)
    assert "lacks its last" in said[-1]
    assert "free the disk" in said[-1]
    held = (small_disk / "metrics.jsonl").read_text()
    assert held.endswith("}\n")
    waiting = int(said[-1].partition("lacks its last ")[2].split()[0])
    assert held.count("\n") + waiting == last + 24 - 10
    # The next start needs no room to drop what came after its checkpoint, and goes on where the file ends.
    said.clear()
    tracker = Tracker(tiny(), small_disk, Position(last, True), said.append)
    (small_disk / "filler").unlink()
    tracker.log(train_record(last + 1, loss=2.0))
    tracker.finish(None)
    assert steps(small_disk) == [*((step, 1.0) for step in range(10, last + 1)), (last + 1, 2.0)]
    assert said == []


def test_without_a_key_auto_is_offline(monkeypatch, tmp_path):
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert choose_mode(tiny("tracking.mode=auto").tracking)[0] == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert choose_mode(tiny("tracking.mode=auto").tracking)[0] == "off"
    assert choose_mode(tiny("tracking.mode=offline").tracking)[0] == "offline"


def test_the_chart_of_the_sites_is_thinned_and_drawn_ten_times_at_most():
    chart, drawings = SiteChart(epochs=40), []
    for step in range(1, 401):
        # Alphas in lines of their own or in those of training, what else is measured of a site seldom.
        chart.add({"step": float(step), "epoch": step / 10, "train/loss": math.nan, "norm/alpha/b.1": step / 400})
        if step % 10 == 0:
            chart.add(
                {"step": float(step), "epoch": step / 10, "norm/input_std/a": 1.0, "norm/input_std/b.1": math.nan}
            )
            values = {"step": float(step), "epoch": step / 10, "val/top1": 1.0}
            chart.add(values)
            if chart.is_due(values):
                drawings.append(chart.draw(values))
    assert len(drawings) == 10
    assert not chart.is_stale
    alpha, std = drawings[-1].data
    assert (alpha.name, std.name) == ("b.1", "a")  # a number that is not one is left out
    assert len(alpha.x) <= 129
    assert (alpha.x[0], alpha.x[-1], alpha.y[-1]) == (1, 400, 1.0)
    assert list(std.x) == list(range(10, 401, 10))
    assert alpha.yaxis != std.yaxis
