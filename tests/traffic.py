"""What torch.compile makes of the norms on an H200, counted without one: `python tests/traffic.py`, a table.

Dynamo, AOTAutograd, inductor's scheduler and its Triton code generation run for real, on fake tensors, for a GPU that
is only described (132 SMs, sm_90). Then the wrappers that inductor has written are run, on fake tensors as well: what
they launch is written down instead of compiled. Where there is a GPU, it is hidden, and the count is the same.

    full      launches that read or write a tensor of as many elements as x
    small     the other ones: those of Triton and of ATen, which finish sums over partial ones (or cast weights)
    B/elt     bytes per element of x by inductor's own accounting: of every scheduled kernel, each buffer once
    moved     the same from the wrapper: each buffer of each launch once, in the direction that its name says. The
              kernel that sums over rows and columns in one pass keeps partial sums in a workspace, which the
              scheduler does not know of: here it is written by one launch and read by the small ones.

Rows that end in "wide" are compiled as dytrun compiles (model.INDUCTOR), the others with inductor's own options. Bytes
are per norm where there are two, launches are not. Matrix products are left out. What cannot be seen: times, what L2
saves, what a kernel reads twice, what autotuning would choose, the instructions of an element (libdevice.tanh has about
30, which may bind before bytes).
"""

import argparse
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from described_gpu import DEVICE, Graph, described, gradients
from torch import Tensor, nn

from dytrun import norm
from dytrun.model import INDUCTOR

_PRODUCTS = {"mm", "addmm", "bmm"}


class Traffic(NamedTuple):
    """A direction's row of the table; see the head of this file."""

    full: int
    small: int
    counted: float
    moved: float


class Case(NamedTuple):
    """A layer on activations."""

    shape: str
    what: str
    make: Callable[[], nn.Module]
    x: Callable[[], list[Tensor]]
    norms: int = 1
    """How many of them share the count."""
    options: dict[str, Any] = {}  # noqa: RUF012
    """Of torch.compile."""


def main() -> int:
    """Count all cases, or those that `--only` matches, and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression on 'shape what'")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each case instead of the table")
    parser.add_argument("--code", action="store_true", help="print the wrappers too, with the kernels in them")
    options = parser.parse_args()
    columns = ("full", "small", "B/elt", "moved")
    head = ["shape", "what", *(f"{way} {name}" for way in ("fwd", "bwd") for name in columns)]
    rows = [head]
    for case in cases():
        if not re.search(options.only, f"{case.shape} {case.what}"):
            continue
        graphs = compiled(case)
        ways = [traffic(graph, case) for graph in graphs]
        if options.json:
            forward, backward = (way._asdict() for way in ways)
            _say(json.dumps({"shape": case.shape, "what": case.what, "forward": forward, "backward": backward}))
        if options.code:
            _say("\n".join(graph.wrapper for graph in graphs))
        cells = [[str(way.full), str(way.small), f"{way.counted:.2f}", f"{way.moved:.2f}"] for way in ways]
        rows.append([case.shape, case.what, *itertools.chain.from_iterable(cells)])
        sys.stderr.write(f"{case.shape} {case.what}\n")
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    for row in [] if options.json else rows:
        _say("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    return 0


class LayerNorm(nn.Module):
    """LayerNorm over channels: maths in float32, result in the dtype of x, as `PointWise` has it."""

    def __init__(self, channels: int, axis: int = -1):
        super().__init__()
        self.axis = axis
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x.movedim(self.axis, -1).float(), self.weight.shape, self.weight, self.bias)
        return y.to(x.dtype).movedim(-1, self.axis)


class Naive(nn.Module):
    """DyT as it is usually written, alpha a scalar."""

    def __init__(self, channels: int, axis: int = -1):
        super().__init__()
        self.view = (-1,) if axis == -1 else (-1, 1, 1)
        self.alpha = nn.Parameter(torch.ones(1))
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.weight.view(self.view) * torch.tanh(self.alpha * x.float()) + self.bias.view(self.view)
        return y.to(x.dtype)


def _by_sigmoid(z: Tensor) -> Tensor:
    return 2 * torch.sigmoid(2 * z) - 1


class Block(nn.Module):
    """Two norms, each in front of a product whose result is added to the residual: a transformer's block, as compiled.

    Activations have the dtype of x, which is that of the residual; products are in bf16.
    """

    def __init__(self, channels: int, make: Callable[[int], nn.Module]):
        super().__init__()
        self.norm1, self.norm2 = make(channels), make(channels)
        self.one, self.two = (nn.Linear(channels, channels) for _ in range(2))
        # Without a bias the residual add would become part of the product, and a bias's gradient is no norm's.
        for product in (self.one, self.two):
            product.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + _product(self.one, self.norm1(x))
        return x + _product(self.two, self.norm2(x))


def _product(layer: nn.Linear, x: Tensor) -> Tensor:
    """Do what autocast does, which refuses where no GPU is seen."""
    return F.linear(*(tensor.to(torch.bfloat16) for tensor in (x, layer.weight, layer.bias)))


def _family(channels: int, axis: int = -1) -> dict[str, Callable[[], nn.Module]]:
    return {
        "LayerNorm": lambda: LayerNorm(channels, axis),
        "naive DyT": lambda: Naive(channels, axis),
        "DyT": lambda: norm.PointWise(channels, channel_axis=axis),
    }


def _variants(channels: int) -> dict[str, Callable[[], nn.Module]]:
    return {
        "DyT by sigmoid": lambda: norm.PointWise(channels, "by_sigmoid"),
        "DyT, alpha a channel": lambda: norm.PointWise(channels, per_channel_alpha=True),
        "Derf": lambda: norm.PointWise(channels, "derf", shift_init=0.0),
        "Derf, alpha a channel": lambda: norm.PointWise(channels, "derf", shift_init=0.0, per_channel_alpha=True),
        "isru": lambda: norm.PointWise(channels, "isru"),
    }


def cases() -> Iterator[Case]:
    """Yield every row of the table: bf16 activations, float32 parameters."""
    for channels in (192, 384, 768, 1024):
        layers = _family(channels) | (_variants(channels) if channels == 768 else {})
        for what, make in layers.items():
            yield Case(f"50432x{channels}", what, make, lambda channels=channels: [_x(50432, channels)])
    for what, make in (_family(768) | _variants(768)).items():
        yield Case("50432x768", f"{what}, wide", make, lambda: [_x(50432, 768)], options=INDUCTOR)
    for what, make in _family(192).items():
        yield Case("6304x192", what, make, lambda: [_x(6304, 192)])
    for shape in ((128, 56, 56, 128), (128, 14, 14, 512)):
        for what, make in _family(shape[-1]).items():
            yield Case("NHWC " + "x".join(map(str, shape)), what, make, lambda shape=shape: [_x(*shape)])
    for name, layout in (("channels_last", torch.channels_last), ("NCHW", torch.contiguous_format)):
        for what, make in _family(128, axis=1).items():
            yield Case(f"{name} 128x128x56x56", what, make,
                       lambda layout=layout: [_x(128, 128, 56, 56, layout=layout)])  # fmt: skip
    makes = {"LayerNorm": LayerNorm, "naive DyT": Naive, "DyT": norm.PointWise,
             "Derf": lambda channels: norm.PointWise(channels, "derf", shift_init=0.0)}  # fmt: skip
    for dtype, (what, make) in itertools.product((torch.bfloat16, torch.float32), makes.items()):
        for options in ({}, INDUCTOR):
            yield Case(f"block {str(dtype)[6:]} 50432x768", what + (", wide" if options else ""),
                       lambda make=make: Block(768, make), lambda dtype=dtype: [_x(50432, 768, dtype=dtype)],
                       norms=2, options=options)  # fmt: skip


def _x(
    *shape: int, layout: torch.memory_format = torch.contiguous_format, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=DEVICE, memory_format=layout).requires_grad_()


def compiled(case: Case) -> tuple[Graph, Graph]:
    """Compile a case for the H200 described above and run its wrappers; return the forward and the backward graph."""
    torch._dynamo.reset()
    graphs: list[Graph] = []
    with described(graphs), mock.patch.dict(norm.FUNCTIONS, by_sigmoid=_by_sigmoid):
        inputs = case.x()
        with torch.device(DEVICE):
            layer = case.make()
        outputs = torch.compile(layer, fullgraph=True, dynamic=False, options=case.options)(*inputs)
        outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
        gradients(outputs, inputs, [torch.empty_like(output) for output in outputs])
    forward, backward = graphs
    return forward, backward


def traffic(graph: Graph, case: Case) -> Traffic:
    """Count what a graph's wrapper has launched, per element of the activations and norm."""
    elements = math.prod(int(size) for size in re.findall(r"\d+", case.shape.split()[-1]))
    launches = [launch for launch in graph.launches if launch.name not in _PRODUCTS]
    full = [any(t.numel() >= elements for t in (*launch.reads, *launch.writes)) for launch in launches]
    moved = sum(t.numel() * t.element_size() for launch in launches for t in (*launch.reads, *launch.writes))
    each = elements * case.norms
    return Traffic(sum(full), len(full) - sum(full), graph.counted / each, moved / each)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


if __name__ == "__main__":
    sys.exit(main())
