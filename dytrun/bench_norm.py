"""`bench=norm`: one layer alone: LayerNorm, DyT in each implementation, RMSNorm; forward and back, eager and compiled.

Every ratio is to LayerNorm in the same mode, as timm has it: F.layer_norm over the last axis, LayerNorm2d for channels
first. All layers have parameters of the activations' dtype. The least that a layer can do is to read x and write y, and
back to read x and dy and write dx; GB/s are those bytes over the time, beside what this device copies, measured in the
same rounds.
"""

import math
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
import torch._dynamo
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch._inductor import metrics

from dytrun import norm, paired, timing
from dytrun.bench_config import BenchConfig
from dytrun.errors import UserError
from dytrun.model import INDUCTOR
from dytrun.records import Found, Table

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SHAPES = {
    "cpu": ["32x197x192", "32x65x384", "8x197x768", "8x96x56x56:channels_first", "8x96x56x56:channels_last"],
    "cuda": [
        "64x197x768", "256x197x768", "512x197x768", "256x197x1024", "128x128x56x56:channels_last",
        "128x512x14x14:channels_last", "128x128x56x56:channels_first",
    ],
}  # fmt: skip
_ARMS = {
    "cpu": ["ln", "ln", "dyt", "torch", "formula", "plain", "rms", "identity"],
    "cuda": ["ln", "ln", "dyt", "formula", "sigmoid", "plain", "rms", "identity"],
}
# What torch.compile makes of an op, and of no layer at all, tells nothing.
_COMPILED = ("ln", "dyt", "formula", "sigmoid", "plain", "rms")
_COLUMNS = ("layer", "mode", "computed by", "fwd µs", "bwd µs", "both µs", "both / first", "fwd GB/s (of copy)",
            "bwd GB/s (of copy)", "saved / x", "launches", "host µs")  # fmt: skip
_ALPHA = 0.5


class _Plain(nn.Module):
    """weight * tanh(alpha * x) + bias as it is read in the paper (algorithm 1): the formula as written."""

    def __init__(self, num_channels: int, channel_axis: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), _ALPHA))
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))
        self.shape = (-1,) if channel_axis == -1 else (-1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.view(self.shape) * torch.tanh(self.alpha * x) + self.bias.view(self.shape)


class _Case(NamedTuple):
    """Activations that layers are given."""

    text: str
    size: tuple[int, ...]
    channel_axis: int
    memory: torch.memory_format

    def tensor(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.randn(self.size, device=device).to(dtype=dtype, memory_format=self.memory)


class _Arm(NamedTuple):
    name: str
    mode: str
    computed_by: str
    layer: nn.Module
    call: Callable[[Tensor], Tensor]


def measure(config: BenchConfig, device: torch.device, say: Callable[[str], None]) -> Found:
    """Measure every shape; a table each.

    Raises:
        UserError: an arm cannot run on this device, or not with these activations.
    """
    bench, dtype = config.bench, _DTYPES[config.run.precision]
    shapes = _SHAPES[device.type] if bench.shapes is None else bench.shapes
    names = [*_ARMS[device.type], *["liger"] * (_has_liger() and device.type == "cuda")]
    if bench.arms is not None:
        names = bench.arms
        if bench.modes == ["compiled"] and not {*names} & {*_COMPILED}:
            raise UserError(f"bench.arms: nothing of {names} is compiled; add eager to bench.modes, or other arms")
        _check(names, [_case(shape) for shape in shapes], device, dtype)
    tables, values = [], []
    for shape in shapes:
        case = _case(shape)
        arms = [arm for mode in bench.modes for arm in _arms(names, mode, case, device, dtype)]
        say(f"{shape}: {len(arms)} layers, {bench.rounds} rounds")
        facts, times = _rounds(arms, case, config, device, dtype)
        tables.append(_table(case, arms, facts, times, config))
        values.append(_values(case, arms, facts, times))
    return Found(tables, {"shapes": values, "dtype": config.run.precision})


def _case(text: str) -> _Case:
    size, _, layout = text.partition(":")
    memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    return _Case(text, tuple(map(int, size.split("x"))), 1 if layout else -1, memory)


def _has_liger() -> bool:
    try:
        import liger_kernel.transformers.dyt  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        return False
    return True


def _check(names: list[str], cases: list[_Case], device: torch.device, dtype: torch.dtype) -> None:
    """Refuse what cannot be measured before anything is."""
    problems = []
    for name, here in (("triton", "cuda"), ("liger", "cuda"), ("native", "cpu"), ("torch", "cpu")):
        if name in names and device.type != here:
            problems.append(f"bench.arms: {name} runs on {here} alone, and this is {device.type}; leave it out")
    if "liger" in names and not _has_liger():
        problems.append("bench.arms: liger is not installed; pip install liger-kernel, or leave it out")
    if "liger" in names and any(case.channel_axis == 1 for case in cases):
        problems.append("bench.arms: liger's DyT has its channels on the last axis; leave it or the shapes out")
    x = torch.empty(0, device=device, dtype=dtype)
    if "triton" in names and device.type == "cuda" and norm.implementation(x, "dyt") != "triton":
        problems.append("bench.arms: there is no Triton op for this dtype or device, or no Triton; leave it out")
    if "native" in names and norm.implementation(x, "dyt") != "native":
        problems.append("bench.arms: there is no C++ op for this dtype, or no compiler here to build it; leave it out")
    if problems:
        raise UserError(*problems)


def _arms(names: list[str], mode: str, case: _Case, device: torch.device, dtype: torch.dtype) -> list[_Arm]:
    """Build the layers of one mode; what no compiler changes is measured eager alone."""
    arms = []
    for name in names:
        if mode == "compiled" and name not in _COMPILED:
            continue
        if name == "liger" and case.channel_axis == 1:
            continue  # it has its channels on the last axis
        if mode == "compiled" and name == norm.compiled_implementation(device, "dyt") and "dyt" in names:
            continue  # the same
        layer = _layer(name, case).to(device, dtype)
        x = torch.empty(0, case.size[case.channel_axis], device=device, dtype=dtype)
        by = _computed_by(name, mode, x)
        call: Any = layer
        if mode == "compiled":
            # All layers of a class share their code, of which each shape is compiled apart.
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
            call = torch.compile(layer, dynamic=False, fullgraph=True, options=INDUCTOR)
        arms.append(_Arm(name, mode, by, layer, call))
    return arms


def _layer(name: str, case: _Case) -> nn.Module:
    num_channels, axis = case.size[case.channel_axis], case.channel_axis
    if name == "ln":
        return nn.LayerNorm(num_channels) if axis == -1 else LayerNorm2d(num_channels)
    if name == "rms":
        return norm.RmsNorm(num_channels, axis, 1e-6)
    if name == "identity":
        return nn.Identity()
    if name == "plain":
        return _Plain(num_channels, axis)
    if name == "liger":
        from liger_kernel.transformers.dyt import LigerDyT  # pyright: ignore[reportMissingImports]

        return LigerDyT(num_channels, init_alpha=_ALPHA)
    layer = norm.PointWise(num_channels, "dyt", _ALPHA, channel_axis=axis)
    layer.implementation = None if name == "dyt" else name
    return layer


def _computed_by(name: str, mode: str, x: Tensor) -> str:
    others = {"ln": "F.layer_norm", "rms": "F.rms_norm", "plain": "as in the paper", "identity": "nothing",
              "liger": "liger-kernel"}  # fmt: skip
    if name == "dyt":
        name = norm.compiled_implementation(x.device, "dyt") if mode == "compiled" else norm.implementation(x, "dyt")
    return others.get(name) or norm.IMPLEMENTATIONS[name]


def _rounds(
    arms: list[_Arm], case: _Case, config: BenchConfig, device: torch.device, dtype: torch.dtype
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Warm every layer up, then measure in turn; return facts of each and milliseconds, (arms + copy, rounds, 2)."""
    bench = config.bench
    copies = timing.cold_copies(2 * math.prod(case.size) * dtype.itemsize, device)
    xs = [case.tensor(device, dtype).requires_grad_() for _ in range(copies)]
    dys = [case.tensor(device, dtype) for _ in range(copies)]
    facts = [_facts(arm, xs[0], dys[0], device) for arm in arms]

    def unit(parts: Callable[[int, Callable[[], None]], None]) -> Callable[[], np.ndarray]:
        turn = iter(range(10**9))

        def once(mark: Callable[[], None]) -> None:
            parts(next(turn) % copies, mark)

        host = median(timing.host_ms(device, lambda: once(lambda: None)) for _ in range(5))
        whole = median(float(timing.spans_ms(device, once, 1, host)[0].sum()) for _ in range(5))
        calls = min(200, max(1, round(bench.unit_ms / max(whole, 1e-3))))
        return lambda: np.median(timing.spans_ms(device, once, calls, 1.2 * calls * host), axis=0)

    def of(arm: _Arm) -> Callable[[int, Callable[[], None]], None]:
        def parts(i: int, mark: Callable[[], None]) -> None:
            mark()
            y = arm.call(xs[i])
            mark()
            torch.autograd.grad(y, [xs[i], *arm.layer.parameters()], dys[i])
            mark()

        return parts

    def copy(i: int, mark: Callable[[], None]) -> None:
        mark()
        dys[i].detach().copy_(xs[i].detach())
        mark()
        mark()

    return facts, paired.in_turn([*(unit(of(arm)) for arm in arms), unit(copy)], bench.rounds)


def _facts(arm: _Arm, x: Tensor, dy: Tensor, device: torch.device) -> dict[str, Any]:
    """Compile and warm a layer up; say what it keeps for the backward pass, and how much it launches."""
    parameters = list(arm.layer.parameters())
    metrics.reset()

    def both() -> None:
        torch.autograd.grad(arm.call(x), [x, *parameters], dy)

    both()
    generated = metrics.generated_kernel_count
    both()
    is_seen = arm.mode == "eager" or device.type == "cuda"
    return {
        "saved": timing.saved_bytes(lambda: arm.call(x), parameters) / x.nbytes,
        "launches": timing.launches(device, both) if is_seen else generated,
        # What Python and the launches take where the device computes meanwhile; on a CPU it is in the times.
        "host_us": 1e3 * median(timing.host_ms(device, both) for _ in range(9)) if device.type == "cuda" else None,
    }


def _table(case: _Case, arms: list[_Arm], facts: list[dict[str, Any]], times: np.ndarray, config: BenchConfig) -> Table:
    nbytes = math.prod(case.size) * _DTYPES[config.run.precision].itemsize
    copy_ms = paired.median_ms(times[-1, :, 0])
    rows, notes, whole = [], [], times.sum(axis=2)
    for number, (arm, fact) in enumerate(zip(arms, facts, strict=True)):
        forward_ms, backward_ms = (paired.median_ms(times[number, :, part]) for part in (0, 1))
        first = next(index for index, other in enumerate(arms) if other.mode == arm.mode)
        found = paired.ratio(whole[number], whole[first], config.bench.confidence)
        rates = [_rate(moved * nbytes, ms, 2 * nbytes / copy_ms) if arm.name != "identity" else "-"
                 for moved, ms in ((2, forward_ms), (3, backward_ms))]  # fmt: skip
        rows.append([arm.name, arm.mode, arm.computed_by, f"{1e3 * forward_ms:.0f}", f"{1e3 * backward_ms:.0f}",
                     f"{1e3 * paired.median_ms(whole[number]):.0f}", "1" if number == first else str(found), *rates,
                     f"{fact['saved']:.2f}", str(fact["launches"]),
                     "-" if fact["host_us"] is None else f"{fact['host_us']:.0f}"])  # fmt: skip
        if number != first and arm.name == "dyt":
            itself = _itself(arms, whole, first, config.bench.confidence)
            notes.append(f"{arm.mode} {paired.verdict('dyt', found, arms[first].name, itself)}")
            plain = next((i for i, one in enumerate(arms) if one.name == "plain" and one.mode == arm.mode), None)
            if plain is not None:
                against = paired.ratio(whole[number], whole[plain], config.bench.confidence)
                notes.append(f"{arm.mode} dyt: {against} of plain's time")
    notes.append(f"copy: {1e3 * copy_ms:.0f} µs, {2 * nbytes / copy_ms / 1e6:.1f} GB/s; medians of "
                 f"{config.bench.rounds} rounds, intervals of {config.bench.confidence:g}")  # fmt: skip
    return Table(f"{case.text} {config.run.precision}", _COLUMNS, rows, notes)


def _itself(arms: list[_Arm], whole: np.ndarray, first: int, confidence: float) -> paired.Ratio | None:
    """Return the baseline over itself, if it stands in its mode's list twice."""
    again = [index for index, arm in enumerate(arms) if arm[:2] == arms[first][:2] and index != first]
    return paired.ratio(whole[again[0]], whole[first], confidence) if again else None


def _rate(nbytes: int, ms: float, copy_per_ms: float) -> str:
    return f"{nbytes / ms / 1e6:.1f} ({100 * nbytes / ms / copy_per_ms:.0f} %)"


def _values(case: _Case, arms: list[_Arm], facts: list[dict[str, Any]], times: np.ndarray) -> dict[str, Any]:
    layers = [
        {"arm": arm.name, "mode": arm.mode, "computed_by": arm.computed_by, "forward_ms": times[number, :, 0].tolist(),
         "backward_ms": times[number, :, 1].tolist(), "saved_per_x": fact["saved"], "launches": fact["launches"],
         "host_us": fact["host_us"]}
        for number, (arm, fact) in enumerate(zip(arms, facts, strict=True))
    ]  # fmt: skip
    return {"shape": case.text, "layers": layers, "copy_ms": times[-1, :, 0].tolist()}
