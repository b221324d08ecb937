"""What W&B costs a step: python wandb_cost.py [ROUNDS]. Prints ratios of step times to those of a run without W&B.

A round trains the same small ViT on digits in each way, in a random order: without W&B, online with a server, and
online with a server that is killed (SIGKILL) after a third of the steps. Of each run the windows of the last two
thirds count, so that a killed server is dead in all of them; a ratio is the median of the rounds' ratios.
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

EPOCHS, STEPS_AN_EPOCH = 30, 44
STEPS = EPOCHS * STEPS_AN_EPOCH
WAYS = ("off", "online", "killed")


def lines(directory: Path) -> list[dict]:
    """Return the whole lines of the one run in a directory."""
    texts = [path.read_text() for path in directory.glob("*/metrics.jsonl")]
    return [json.loads(line) for text in texts for line in text.splitlines() if line.endswith("}")]


def step_ms(way: str, directory: Path) -> float:
    """Train in one way; return the median of the step times of the last two thirds, in ms."""
    port, folder = free_port(), directory / "server"
    folder.mkdir(parents=True)
    command = [sys.executable, str(Path(__file__).with_name("wandb_server.py")), str(port), str(folder), "well"]
    server = subprocess.Popen(command)
    env = os.environ | {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": f"http://127.0.0.1:{port}"}
    time.sleep(1)
    words = [*TINY, "norm=dyt", f"epochs={EPOCHS}", f"runs_dir={directory}", "machine.devices=1",
             "tracking.log_every_steps=11", f"tracking.mode={'off' if way == 'off' else 'online'}"]  # fmt: skip
    run = subprocess.Popen([sys.executable, "-m", "dytrun", "train", *words], env=env, stdout=subprocess.DEVNULL)
    while way == "killed" and run.poll() is None and not any(3 * line["step"] > STEPS for line in lines(directory)):
        time.sleep(0.1)
    if way == "killed":
        server.send_signal(signal.SIGKILL)
    assert run.wait() == 0
    server.kill()
    server.wait()
    late = [line for line in lines(directory) if 3 * line["step"] > STEPS + 3 * 22]
    return statistics.median(line["perf/step_ms"] for line in late if "perf/step_ms" in line)


def say(line: str) -> None:
    print(line, flush=True)  # noqa: T201


def main(rounds: int) -> None:
    ratios: dict[str, list[float]] = {way: [] for way in WAYS[1:]}
    for number in range(rounds):
        found = {}
        for way in random.sample(WAYS, len(WAYS)):
            with tempfile.TemporaryDirectory() as directory:
                found[way] = step_ms(way, Path(directory))
        for way, of in ratios.items():
            of.append(found[way] / found["off"])
        say(f"round {number + 1}: " + ", ".join(f"{way} {found[way]:.2f} ms" for way in WAYS))
    for way, of in ratios.items():
        spread = f"from {min(of):.3f} to {max(of):.3f}, n = {len(of)} rounds"
        say(f"{way} / off: median {statistics.median(of):.3f}, {spread}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
