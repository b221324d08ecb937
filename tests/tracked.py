"""Runs with a Tracker, each in a process of its own: python tracked.py reads lists of requests and forks for each.

A request: {"dir", "env", "overrides", "position", "is_patient", "do"}. What it saw is in DIR.json when it is gone, or
killed. The imports are then paid once for all of them; only wandb is imported in the fork.
"""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from dytrun import tracking, wandb_reach
from dytrun.compose import expand
from dytrun.errors import UserError
from dytrun.records import Accuracy, EvalRecord, Position, ProbeRecord, RunResult, Speed, TrainRecord, np
from dytrun.tracking import Tracker

LOSS = 1.0


def train_record(step: int, loss: float = LOSS) -> TrainRecord:
    speed = Speed(images_per_s=100.0, step_ms_p50=5.0, step_ms_p95=6.0, data_wait_frac=0.1, peak_mem_gib=0.5)
    return TrainRecord(step, step / 10, step * 32, loss, 1e-3, 2.0, speed, world=2)


def eval_record(step: int) -> EvalRecord:
    """An epoch a step; the accuracy, of a thousand images, is best after step 7, at 90 %."""
    count = 900 - 10 * abs(step - 7)
    found = Accuracy(num=1000, top1_count=count, top5_count=990, loss=1.0, correct=np.zeros(1000, bool))
    return EvalRecord(step, float(step), step * 32, raw=found, ema=None)


class Disk:
    """How long the disk has taken to write what a journal wants to be sure of: on a shared machine long at times."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def fsync(self, descriptor: int, sync: Callable[[int], None] = os.fsync) -> None:
        begun = time.perf_counter()
        sync(descriptor)
        self.seconds += time.perf_counter() - begun


def fill(folder: Path) -> None:
    """Leave no byte free on the file system of `folder`."""
    with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def run(request: dict) -> None:
    os.environ.update(request["env"])
    if request["is_patient"]:
        tracking._START_TIMEOUT_S = wandb_reach._PROBE_TIMEOUT_S = wandb_reach._INIT_TIMEOUT_S = 90.0
        tracking._HASTE_TIMEOUT_S = 60.0
    disk = Disk()
    os.fsync = disk.fsync
    seen: dict = {"notes": [], "log_s": [], "pid": os.getpid()}
    out = Path(request["dir"] + ".json")
    config = expand(["data=digits", *request["overrides"]]).configs[0]
    start = time.perf_counter()
    tracker = None
    try:
        directory = Path(request["dir"])
        directory.mkdir(exist_ok=True)
        tracker = Tracker(config, directory, Position(*request["position"]), seen["notes"].append)
    except UserError as error:
        seen["error"] = str(error)
    seen["start_s"] = time.perf_counter() - start
    for name, *values in request["do"] if tracker else []:
        if name == "log":
            for step in range(values[0], values[1] + 1):
                begun, synced = time.perf_counter(), disk.seconds
                tracker.log(train_record(step))
                seen["log_s"].append(time.perf_counter() - begun - (disk.seconds - synced))
        elif name == "epochs":
            for step in range(values[0], values[1] + 1):
                alpha = {f"blocks.{depth}.norm1": 0.5 + depth + step / 100 for depth in range(3)}
                tracker.log(replace(train_record(step), epoch=float(step)))
                tracker.log(ProbeRecord(step, float(step), step * 32, alpha, {}, {}))
                tracker.log(eval_record(step))
        elif name == "wait":
            until, path = time.monotonic() + 60, Path(values[0])
            while not (path.is_file() and values[1] in path.read_text()) and time.monotonic() < until:
                time.sleep(0.05)
        elif name == "signal":
            out.write_text(json.dumps(seen))
            os.kill(values[0] or os.getpid(), getattr(signal, values[1]))
            time.sleep(0.3)
        elif name == "fill":
            fill(Path(values[0]))
        elif name == "finish":
            begun = time.perf_counter()
            tracker.finish(RESULT if values[0] else None, in_haste=values[1])
            seen["finish_s"] = time.perf_counter() - begun
    seen["done"] = time.time()
    out.write_text(json.dumps(seen))


RESULT = RunResult("finished", "s", "p", "vit", "dyt", 0.5, 0, 1, {}, top1=75.0)


def run_all(requests: list[dict]) -> list[dict]:
    """Do every request in a process of its own, at the same time; return how each ended, and when."""
    ends, pids = {}, []
    for request in requests:
        if (pid := os.fork()) == 0:
            run(request)
            sys.exit(0)  # not os._exit: what wandb does at the end of a process belongs to it
        pids.append(pid)
    for _ in pids:
        pid, status = os.wait()
        ends[pid] = {"code": os.waitstatus_to_exitcode(status), "gone": time.time()}
    return [ends[pid] for pid in pids]


if __name__ == "__main__":
    for text in sys.stdin:
        sys.stdout.write(json.dumps(run_all(json.loads(text))) + "\n")
        sys.stdout.flush()
