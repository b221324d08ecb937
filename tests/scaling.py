"""What compiling and more ranks bring here: `python tests/scaling.py`, a table of real runs, and no test.

Every figure is from a `dytrun train` of its own, in a process of its own, on synthetic images, without W&B, in a
directory that is thrown away. Compiled code is kept by none, so that each run pays for its own. Rounds are
interleaved, a cell is the median over rounds, and ratios are taken within a round, so that a machine that slows down
slows down both sides.

    first step   seconds from the ready model to the end of step 1, warm-up of the next ones included: train_seconds
                 less what the other steps take at the pace of those that the clock counts
    compile      first step less that of `off`; what evaluation compiles is not in it, but in `wall`
    wall         the whole command
    scaling      images/s over ranks x images/s of one rank; each rank has the same batch, and on a CPU as many threads
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from dytrun.throughput import WARMUP_STEPS

MODES = ("off", "blocks", "model")
_COMPILE_HEAD = ["model", "compile", "first-step-s", "compile-s", "step-ms", "images/s", "peak-GiB", "data-wait",
                 "step-vs-off", "wall-s"]  # fmt: skip
_RANK_HEAD = ["model", "ranks", "threads", "step-ms", "images/s", "peak-GiB", "data-wait", "scaling"]
# `--model tiny`: compiles and trains on two cores in seconds.
_TINY = (
    "model=timm",
    "model.name=vit_tiny_patch16_224",
    "model.kwargs={patch_size: 4, embed_dim: 128, depth: 3, num_heads: 4, global_pool: avg}",
    "data.image_size=32",
    "data.num_classes=10",
)
_PLAIN = (
    "data=synthetic",
    "augment=none",
    "ema=off",
    "epochs=1",
    "optim.lr=1e-4",
    "optim.warmup_epochs=0",
    "tracking.mode=off",
)


class Case(NamedTuple):
    """A row of a table: what one run differs in."""

    model: str
    mode: str
    ranks: int
    threads: int | None
    """Of each rank; None leaves it to dytrun."""


class Figures(NamedTuple):
    """What one run measured; from its result.json and from the clock on the wall."""

    device: str
    images_per_s: float
    step_ms: float
    peak_gib: float
    wait_frac: float
    first_s: float
    wall_s: float


Rounds = list[Figures | None]


def main() -> int:
    """Run all cases, round by round, and print the tables."""
    options = _options()
    compiled = [Case(model, mode, 1, None) for model in options.model for mode in MODES]
    ranked = [Case(model, "off", ranks, _threads(options.ranks)) for model in options.model for ranks in options.ranks]
    cases = list(dict.fromkeys(compiled + ranked))
    found: dict[Case, Rounds] = {case: [] for case in cases}
    for number in range(options.rounds):
        for case in cases:
            _note(f"round {number + 1}/{options.rounds}: {case.model} compile={case.mode} ranks={case.ranks}")
            found[case].append(_measure(case, options))
    runs = [figures for rounds in found.values() for figures in rounds]
    good = [figures for figures in runs if figures is not None]
    if not good:
        return 1
    _say(f"{good[0].device}; torch {torch.__version__}; {options.precision}, {options.batch} images a rank and step, "
         f"{options.steps} steps, median of {options.rounds} round(s)")  # fmt: skip
    _say("")
    _table(_COMPILE_HEAD, [_compile_row(case, found) for case in compiled])
    _say("")
    _table(_RANK_HEAD, [_rank_row(case, found, options.ranks[0]) for case in ranked])
    return 0 if len(good) == len(runs) else 1


def _options() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    here = torch.cuda.device_count() if cuda else 2
    ranks = [count for count in (1, 2, 4, 8) if count <= max(1, here)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=lambda text: text.split(","), default=["vit_b", "convnext_b"] if cuda else ["tiny"]
    )
    parser.add_argument("--steps", type=int, default=60 if cuda else 40)
    parser.add_argument("--batch", type=int, default=128 if cuda else 32, help="images a rank and step")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="bf16" if cuda else "fp32")
    parser.add_argument("--ranks", type=lambda text: [int(part) for part in text.split(",")], default=ranks)
    parser.add_argument("--rounds", type=int, default=3 if cuda else 2)
    parser.add_argument("overrides", nargs="*", help="more keys of dytrun train, for every run: norm=dyt ema=on")
    options = parser.parse_args()
    if options.steps <= WARMUP_STEPS:
        parser.error(f"--steps: the clock leaves out the first {WARMUP_STEPS}; give more")
    if cuda and max(options.ranks) > here:
        parser.error(f"--ranks: {max(options.ranks)} is more than the {here} GPU(s) here")
    options.ranks.sort()
    return options


def _threads(ranks: list[int]) -> int | None:
    """Give a rank the same share of the cores whatever the count, else one rank alone would have them all."""
    if torch.cuda.is_available():
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // max(ranks))


def _measure(case: Case, options: argparse.Namespace) -> Figures | None:
    """Train once; None, and a line that says why, where that fails."""
    with tempfile.TemporaryDirectory(prefix="dytrun-scaling-") as home:
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{home}/code", "TRITON_CACHE_DIR": f"{home}/triton"}
        if case.threads is not None:
            env["OMP_NUM_THREADS"] = str(case.threads)
        command = [sys.executable, "-m", "dytrun", "train", *_overrides(case, options), f"runs_dir={home}/runs"]
        begun = time.perf_counter()
        done = subprocess.run(command, env=env, cwd=home, capture_output=True, text=True, check=False)
        wall = time.perf_counter() - begun
        results = list(Path(home).glob("runs/*/result.json"))
        values = json.loads(results[0].read_text()) if results else {}
    if done.returncode or values.get("status") != "finished":
        why = (values.get("message") or (done.stderr or done.stdout).strip() or "no result").replace(home, "…")
        _note(f"failed ({done.returncode}): {why.splitlines()[-1]}")
        return None
    pace = options.batch * case.ranks / values["images_per_s"]
    first = values["train_seconds"] - (values["steps"] - 1) * pace
    return Figures(values["device"], values["images_per_s"], values["step_ms_p50"], values["peak_mem_gib"],
                   values["data_wait_frac"], first, wall)  # fmt: skip


def _overrides(case: Case, options: argparse.Namespace) -> list[str]:
    batch = options.batch * case.ranks
    return [
        *_PLAIN,
        *(_TINY if case.model == "tiny" else (f"model={case.model}",)),
        f"precision={options.precision}",
        f"global_batch={batch}",
        f"data.num_train={batch * options.steps}",
        f"machine.max_batch_per_rank={options.batch}",
        f"machine.devices={case.ranks}",
        f"machine.compile={case.mode}",
        f"tracking.log_every_steps={options.steps}",
        *options.overrides,
    ]


def _compile_row(case: Case, found: dict[Case, Rounds]) -> list[str]:
    mine, off = found[case], found[case._replace(mode="off")]
    pairs = [(one, other) for one, other in zip(mine, off, strict=True) if one and other]
    cost = _median(one.first_s - other.first_s for one, other in pairs)
    ratio = _median(one.step_ms / other.step_ms for one, other in pairs)
    return [
        case.model,
        case.mode,
        f"{_of(mine, 'first_s'):.1f}",
        "-" if case.mode == "off" else f"{cost:.1f}",
        *_common(mine),
        f"{ratio:.3f}",
        f"{_of(mine, 'wall_s'):.1f}",
    ]


def _rank_row(case: Case, found: dict[Case, Rounds], fewest: int) -> list[str]:
    mine, base = found[case], found[case._replace(ranks=fewest)]
    pairs = [(one, other) for one, other in zip(mine, base, strict=True) if one and other]
    share = _median(one.images_per_s / other.images_per_s * fewest / case.ranks for one, other in pairs)
    threads = "auto" if case.threads is None else str(case.threads)
    return [case.model, str(case.ranks), threads, *_common(mine), f"{100 * share:.1f} %"]


def _common(rounds: Rounds) -> list[str]:
    return [
        f"{_of(rounds, 'step_ms'):.2f}",
        f"{_of(rounds, 'images_per_s'):.1f}",
        f"{_of(rounds, 'peak_gib'):.2f}",
        f"{100 * _of(rounds, 'wait_frac'):.1f} %",
    ]


def _of(rounds: Rounds, name: str) -> float:
    return _median(getattr(figures, name) for figures in rounds if figures)


def _median(values) -> float:
    return statistics.median(found) if (found := list(values)) else math.nan


def _table(head: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    for row in [head, *rows]:
        _say("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


def _note(line: str) -> None:
    """Progress goes beside the tables, not into them."""
    sys.stderr.write(f"{line}\n")


if __name__ == "__main__":
    sys.exit(main())
