"""What W&B costs a step: python wandb_cost.py [ROUNDS]. Prints ratios of step times.

Two measurements, on a small ViT that is trained on digits:

- online against off: two runs at the same time, one with W&B's server and one without W&B, either on a core of its own;
  the cores change every round, so that what else the machine does hits both.
- killed against alive: one run, whose server is killed (SIGKILL) and started again, over and over. A round is a turn
  with it and a turn without, in random order, side by side in time; a turn with it begins when a row has come in.

A turn's step time is the median over its records of their median step. A ratio's interval is Student's, of the rounds'
logarithms.
"""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from conftest import TINY, wandb_server
from scipy import stats
from wandb_runs import KEY

ONLINE_EPOCHS, STEPS_AN_EPOCH = 20, 44
TURN_S, SETTLE_S, REACH_S = 5.0, 1.0, 120.0


def records(directory: Path) -> list[dict]:
    """Return the whole lines with a step time of the one run in a directory."""
    texts = [path.read_text() for path in directory.glob("*/metrics.jsonl")]
    lines = [json.loads(line) for text in texts for line in text.splitlines() if line.endswith("}")]
    return [line for line in lines if "perf/step_ms" in line]


def start(mode: str, directory: Path, epochs: int, env: dict[str, str], prefix: Sequence[str] = ()) -> subprocess.Popen:
    """Start a run, its command behind `prefix`."""
    words = [*TINY, "norm=dyt", f"epochs={epochs}", f"runs_dir={directory}", "machine.devices=1",
             "tracking.log_every_steps=11", f"tracking.mode={mode}"]  # fmt: skip
    command = [*prefix, sys.executable, "-m", "dytrun", "train", *words]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"} | env, stdout=subprocess.DEVNULL)


class Server:
    """A W&B on loopback that can be killed and started again."""

    def __init__(self, folder: Path):
        """Keep what it is sent in `folder`."""
        self._folder, self._port = folder, 0
        self.start()
        self.env = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": f"http://127.0.0.1:{self._port}"}

    def start(self) -> None:
        """Start it, with what it had."""
        self._process, address = wandb_server("well", self._folder, self._port)
        self._port = int(address.rpartition(":")[2])

    def kill(self) -> None:
        """Kill it as a power cut does."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    @property
    def received(self) -> int:
        """Bytes that it was sent."""
        path = self._folder / "sent.jsonl"
        return path.stat().st_size if path.is_file() else 0


def online_against_off(root: Path, number: int) -> float:
    """Train with a server beside a run without W&B; return the ratio of their step times."""
    server = Server(root / "server")
    modes = ("off", "online")
    runs = [start(mode, root / mode, ONLINE_EPOCHS, server.env, ("taskset", "-c", str((number + place) % 2)))
            for place, mode in enumerate(modes)]  # fmt: skip
    assert [run.wait() for run in runs] == [0, 0]
    server.kill()
    late = ONLINE_EPOCHS * STEPS_AN_EPOCH // 3
    off, online = (
        statistics.median(line["perf/step_ms"] for line in records(root / mode) if line["step"] > late)
        for mode in modes
    )
    say(f"round {number + 1}: off {off:.2f} ms, online {online:.2f} ms")
    return online / off


def killed_against_alive(root: Path, rounds: int) -> list[float]:
    """Kill the server of one run and start it again; return a ratio of step times a round."""
    server, ratios = Server(root / "server"), []
    run = start("online", root / "runs", 100_000, server.env)
    wait_for(lambda: bool(records(root / "runs")))
    is_alive = True
    for number in range(rounds):
        found = {}
        for wanted in random.sample([True, False], 2):
            if wanted and not is_alive:
                server.start()
            if is_alive and not wanted:
                server.kill()
            is_alive = wanted
            if wanted:
                before = server.received
                wait_for(lambda before=before: server.received > before)
            time.sleep(SETTLE_S)
            first = len(records(root / "runs")) + 1  # the record that is under way counts to neither
            time.sleep(TURN_S)
            own = records(root / "runs")[first:]
            found[wanted] = statistics.median(line["perf/step_ms"] for line in own)
        ratios.append(found[False] / found[True])
        say(f"round {number + 1}: alive {found[True]:.2f} ms, killed {found[False]:.2f} ms, {len(own)} records a turn")
    run.kill()
    run.wait()
    server.kill()
    return ratios


def wait_for(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + REACH_S
    while not happened():
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.1)


def say(line: str) -> None:
    print(line, flush=True)  # noqa: T201


def summed_up(name: str, ratios: Sequence[float]) -> None:
    logs = np.log(ratios)
    low, high = np.exp(stats.t.interval(0.95, len(logs) - 1, logs.mean(), stats.sem(logs)))
    middle, mean = statistics.median(ratios), np.exp(logs.mean())
    say(f"{name}: median {middle:.3f}, mean {mean:.3f} [{low:.3f}, {high:.3f}], from {min(ratios):.3f} to "
        f"{max(ratios):.3f}, n = {len(ratios)}")  # fmt: skip


def main(rounds: int) -> None:
    against_off = []
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as directory:
            against_off.append(online_against_off(Path(directory), number))
    with tempfile.TemporaryDirectory() as directory:
        killed = killed_against_alive(Path(directory), 4 * rounds)
    summed_up("online / off", against_off)
    summed_up("killed / alive", killed)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
