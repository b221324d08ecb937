"""What W&B costs a step: python wandb_cost.py [ROUNDS]. Prints ratios of step times to those of a run without W&B.

In a round the same small ViT is trained on digits online with a server, and online with a server that is killed
(SIGKILL) after a third of the steps; each at the same time as a run without W&B, either on a core of its own, and the
cores change every round: what else the machine does hits both. Of each run the windows of the last two thirds count, so
that a killed server is dead in all of them; a ratio is the median of the rounds' ratios.
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
from pathlib import Path

from conftest import TINY, free_port
from wandb_runs import KEY

EPOCHS, STEPS_AN_EPOCH = 20, 44
STEPS = EPOCHS * STEPS_AN_EPOCH
WAYS = ("online", "killed")


def lines(directory: Path) -> list[dict]:
    """Return the whole lines of the one run in a directory."""
    texts = [path.read_text() for path in directory.glob("*/metrics.jsonl")]
    return [json.loads(line) for text in texts for line in text.splitlines() if line.endswith("}")]


def start(way: str, directory: Path, core: int, env: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a run on a core."""
    mode = "off" if way == "off" else "online"
    words = [*TINY, "norm=dyt", f"epochs={EPOCHS}", f"runs_dir={directory}", "machine.devices=1",
             "tracking.log_every_steps=11", f"tracking.mode={mode}"]  # fmt: skip
    command = ["taskset", "-c", str(core), sys.executable, "-m", "dytrun", "train", *words]
    return subprocess.Popen(command, env=os.environ | env, stdout=subprocess.DEVNULL)


def step_ms(directory: Path) -> float:
    """Return the median of the step times of the last two thirds, in ms."""
    late = [line for line in lines(directory) if 3 * line["step"] > STEPS + 3 * 22]
    return statistics.median(line["perf/step_ms"] for line in late if "perf/step_ms" in line)


def pair(way: str, root: Path, first_core: int) -> dict[str, float]:
    """Train in one way beside a run without W&B; return the step time of each."""
    port, folder = free_port(), root / "server"
    folder.mkdir()
    command = [sys.executable, str(Path(__file__).with_name("wandb_server.py")), str(port), str(folder), "well"]
    server = subprocess.Popen(command)
    time.sleep(1)
    env = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": f"http://127.0.0.1:{port}"}
    runs = {name: start(name, root / name, (first_core + number) % 2, env) for number, name in enumerate(("off", way))}
    while way == "killed" and not any(3 * line["step"] > STEPS for line in lines(root / way)):
        time.sleep(0.1)
    if way == "killed":
        server.send_signal(signal.SIGKILL)
    assert not any(run.wait() for run in runs.values())
    server.kill()
    server.wait()
    return {name: step_ms(root / name) for name in runs}


def say(line: str) -> None:
    print(line, flush=True)  # noqa: T201


def main(rounds: int) -> None:
    ratios: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(rounds):
        for way in random.sample(list(ratios), len(ratios)):
            with tempfile.TemporaryDirectory() as directory:
                found = pair(way, Path(directory), number % 2)
            ratios[way].append(found[way] / found["off"])
            say(f"round {number + 1}: off {found['off']:.2f} ms, {way} {found[way]:.2f} ms")
    for way, of in ratios.items():
        spread = f"from {min(of):.3f} to {max(of):.3f}, n = {len(of)} rounds"
        say(f"{way} / off: median {statistics.median(of):.3f}, {spread}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
