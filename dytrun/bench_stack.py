"""`bench=llama`: the paper's table of efficiency, in which what eager mode gains can be seen to go when it is compiled.

Version 1 of DyT's paper (Table 7; 14 in version 2) has LLaMA-7B in eager mode, where RMSNorm is eight operators and DyT
three: DyT takes 7.8 % less time to infer and 8.2 % less to train. Version 2 adds both norms compiled (Table 15): the
same 12.3 s and the same 38.9 s. Here the arms have the same blocks, the same weights and the same hidden states; they
are measured in turn, in each of three modes: eager, each norm compiled by itself, the whole stack compiled.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from dytrun import llama, timing
from dytrun.bench_config import BenchConfig, StackBench
from dytrun.errors import UserError, first_line
from dytrun.model import INDUCTOR
from dytrun.paired import Ratio, in_turn, median_ms, ratio, verdict
from dytrun.records import Found, Table

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# What `auto` stands for: the paper's shapes, or what two cores measure, and compile, in three minutes.
_AUTO = {"cuda": {"size": "7b", "depth": 4, "length": 4096}, "cpu": {"size": "small", "depth": 2, "length": 256}}
_WHAT = ("norms alone", "whole")
_WARM_UP = 3
# One measurement is as many calls as fill so much time, or one: what is over at once is not measured by one call.
_UNIT_MS = 20.0
_MOST_CALLS = 100


@dataclass(frozen=True)
class _Cell:
    """One pass through the stack, or through its norms alone, in one mode, by all arms."""

    mode: str
    which: str
    what: str
    ms: np.ndarray
    """(arms, rounds), each the median of some calls."""
    host_ms: list[float]
    ratios: list[Ratio]
    """To the first arm, of every arm."""


def measure(config: BenchConfig, device: torch.device, say: Callable[[str], None]) -> Found:
    """Measure every arm in every mode and pass that `bench=llama` names; `say` gets a line for each.

    `precision` is the dtype of weights and activations, as the paper's measurement has it, and not autocast's.

    Raises:
        UserError: the memory does not suffice, or something cannot be compiled: nothing is run uncompiled instead.
    """
    options: StackBench = config.bench
    auto = _AUTO[device.type]
    name, depth, tokens = (
        auto[key] if getattr(options, key) == "auto" else getattr(options, key) for key in ("size", "depth", "length")
    )
    size = llama.SIZES[name]
    random = torch.Generator(device).manual_seed(0)
    x = torch.randn(1, tokens, size.width, generator=random, device=device).to(_DTYPES[config.run.precision])
    cells: list[_Cell] = []
    try:
        halves = llama.halves(size, depth, x)
        for mode in options.modes:
            for which in options.passes:
                say(f"{mode}, {which}: {', '.join(options.arms)}")
                cells += _measured(options, (mode, which), halves, x)
    except torch.OutOfMemoryError:
        raise UserError(f"bench: {depth} blocks of {name} do not fit into this device's memory; lower "
                        "bench.depth or bench.length") from None  # fmt: skip
    except TorchDynamoException as error:
        raise UserError(f"bench.modes: torch cannot compile here ({first_line(error)}); say "
                        "bench.modes=[eager]") from error  # fmt: skip
    title = f"{name} (width {size.width}), {depth} blocks, {tokens} tokens, {config.run.precision}"
    tables = [_table(f"{title}; {mode}", options, [c for c in cells if c.mode == mode], x) for mode in options.modes]
    closing = _closing(options, cells)
    last = tables[-1]
    tables[-1] = Table(last.title, last.columns, last.rows, [*last.notes, *closing])
    about = {"size": name, **size._asdict(), "depth": depth, "tokens": tokens}
    values = [value for cell in cells for value in _values(options, cell, x)]
    return Found(tables, {"stack": about, "measured": values, "closing": closing})


def _measured(options: StackBench, where: tuple[str, str], halves: llama.Halves, x: Tensor) -> list[_Cell]:
    """Measure one pass in one mode: the norms alone, and the whole stack."""
    mode, which = where
    # Compiled code is found by what it was compiled from, and all arms share that; past the limit torch would raise.
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 * len(options.arms))
    found = []
    for what in _WHAT:
        stacks = [_stack(arm, mode, what, halves, x) for arm in options.arms]
        calls = _norms_alone(stacks, x, which) if what == "norms alone" else _whole(stacks, x, which)
        ms, host_ms = _timed(calls, x.device, options.rounds)
        found.append(_Cell(mode, which, what, ms, host_ms, [ratio(arm, ms[0], options.confidence) for arm in ms]))
    return found


def _stack(arm: str, mode: str, what: str, halves: llama.Halves, x: Tensor) -> llama.Stack:
    """Build an arm's stack, to be compiled at its first call; with `fullgraph` a part that stays eager is an error."""
    stack = llama.Stack(arm, halves, x)
    if mode == "compiled" and what == "whole":
        stack.compile(dynamic=False, fullgraph=True, options=INDUCTOR)
    elif mode != "eager" and arm != "identity":
        for norm in stack.norms():  # alone, there is nothing around a norm that it could be compiled with
            norm.compile(dynamic=False, fullgraph=True, options=INDUCTOR)
    return stack


def _whole(stacks: list[llama.Stack], x: Tensor, which: str) -> list[Callable[[], object]]:
    """Return, for each stack, one pass through it."""

    def infer(stack: llama.Stack) -> None:
        with torch.inference_mode():
            stack(x)

    def train(stack: llama.Stack) -> None:
        given = [leaf, *stack.parameters()]
        torch.autograd.grad(llama.loss_of(stack(leaf)), given)

    leaf = x.detach().requires_grad_()
    return [partial(train if which == "train" else infer, stack) for stack in stacks]


def _norms_alone(stacks: list[llama.Stack], x: Tensor, which: str) -> list[Callable[[], object]]:
    """Return, for each stack, one pass through its norms, each with an input of its own: in turn, none is in a cache.

    One after the other on the same values, DyT would shrink them, and a tanh may take less time for small ones.
    """

    def infer(norms: list[torch.nn.Module]) -> None:
        with torch.inference_mode():
            for norm, each in zip(norms, inputs, strict=True):
                norm(each)

    def train(norms: list[torch.nn.Module]) -> None:
        outputs = [norm(each) for norm, each in zip(norms, inputs, strict=True)]
        given = [*inputs, *(value for norm in norms for value in norm.parameters())]
        torch.autograd.grad(outputs, given, [x] * len(outputs))

    inputs = [x.clone().requires_grad_() for _ in stacks[0].norms()]
    return [partial(train if which == "train" else infer, stack.norms()) for stack in stacks]


def _timed(calls: list[Callable[[], object]], device: torch.device, rounds: int) -> tuple[np.ndarray, list[float]]:
    """Return milliseconds of each call in each round, (arms, rounds), and those that the host needs to issue it."""

    def parts(call: Callable[[], object], mark: Callable[[], None]) -> None:
        mark()
        call()
        mark()

    def median(call: Callable[[], object], host_ms: float, often: int) -> float:
        return float(np.median(timing.spans_ms(device, partial(parts, call), often, often * host_ms)))

    for call in calls:
        for _ in range(_WARM_UP):
            call()
    host_ms = [float(np.median([timing.host_ms(device, call) for _ in range(_WARM_UP)])) for call in calls]
    slowest = max(median(call, ms, 2) for call, ms in zip(calls, host_ms, strict=True))
    often = min(_MOST_CALLS, max(1, math.ceil(_UNIT_MS / slowest)))  # the same for all arms
    measures = [partial(median, call, ms, often) for call, ms in zip(calls, host_ms, strict=True)]
    return in_turn(measures, rounds), host_ms


def _again(options: StackBench) -> int | None:
    """Return where the baseline stands for the second time."""
    first, *others = options.arms
    return others.index(first) + 1 if first in others else None


def _itself(options: StackBench, cell: _Cell) -> Ratio | None:
    again = _again(options)
    return None if again is None else cell.ratios[again]


def _verdicts(options: StackBench, cell: _Cell) -> list[str | None]:
    """Return, for each arm that is not the baseline, what its ratio allows to be said."""
    baseline = options.arms[0]
    return [
        None if arm == baseline
        else verdict(f"{cell.which}, {cell.what}, {arm}", found, baseline, _itself(options, cell))
        for arm, found in zip(options.arms, cell.ratios, strict=True)
    ]  # fmt: skip


def _table(title: str, options: StackBench, cells: list[_Cell], x: Tensor) -> Table:
    rows, notes = [], []
    for cell in cells:
        for number, arm in enumerate(options.arms):
            against = str(cell.ratios[number]) if number else "1"
            said = llama.described(arm, cell.mode != "eager", x)
            name = f"{arm} (again)" if number == _again(options) else arm
            rows.append([name, cell.which, cell.what, f"{median_ms(cell.ms[number]):.3f}", against, said])
        notes += filter(None, _verdicts(options, cell))
    return Table(title, ["arm", "pass", "what", "ms p50", f"of {options.arms[0]}'s", "norms computed by"], rows, notes)


def _values(options: StackBench, cell: _Cell, x: Tensor) -> list[dict[str, Any]]:
    said = _verdicts(options, cell)
    return [
        {
            "mode": cell.mode,
            "pass": cell.which,
            "what": cell.what,
            "arm": arm,
            "implementation": llama.described(arm, cell.mode != "eager", x),
            "ms": cell.ms[number].tolist(),
            "ms_p50": median_ms(cell.ms[number]),
            "host_ms": cell.host_ms[number],
            "ratio": vars(cell.ratios[number]),
            "verdict": said[number],
        }
        for number, arm in enumerate(options.arms)
    ]


def _closing(options: StackBench, cells: list[_Cell]) -> list[str]:
    """Say for each pass what becomes of DyT's ratio from mode to mode; nothing where there is one mode, or no DyT."""
    first, *others = options.arms
    arms = [(number, arm) for number, arm in enumerate(others, 1) if arm in ("plain", "dyt") and arm != first]
    if len(options.modes) == 1:
        return []
    said = []
    for which, (number, arm) in itertools.product(options.passes, arms):
        of_pass = [cell for cell in cells if cell.which == which and cell.what == "whole"]
        ratios = {cell.mode: cell.ratios[number] for cell in of_pass}
        words = {cell.mode: _word(cell.ratios[number], _itself(options, cell)) for cell in of_pass}
        each = ", ".join(f"{mode} {found} ({words[mode]})" for mode, found in ratios.items())
        tail = "; compiled, the gain is gone" if _is_gone(ratios, words) else ""
        said.append(f"{which}, whole, {arm} of {first}'s time: {each}{tail}")
    return said


def _is_gone(ratios: dict[str, Ratio], words: dict[str, str]) -> bool:
    """Whether eager mode is faster and no compiled one is; one whose interval meets eager mode's shows nothing."""
    eager = ratios.get("eager")
    if eager is None or eager.high is None or words["eager"] != "faster":
        return False
    compiled = {mode: found.low for mode, found in ratios.items() if mode != "eager"}
    return all(words[mode] != "faster" and low is not None and low > eager.high for mode, low in compiled.items())


def _word(found: Ratio, itself: Ratio | None) -> str:
    """Return in a word what `verdict` says in a sentence."""
    is_beyond = found.is_beyond(itself)
    if is_beyond is None:
        return "not known"
    if not is_beyond:
        return "within the error"
    return "faster" if found.median < 1 else "slower"
