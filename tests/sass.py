"""What the kernels become on an H100 or H200, counted without one: python tests/sass.py [FUNCTION ...].

The launch itself says what to compile: it is caught with tensors that have a shape and no memory. Then Triton compiles
for sm_90, and the machine code is counted. At 4.3 TB/s an H200 has issue slots for 31 instructions an element in the
forward pass (4 bytes in bf16), and for 47 in the backward pass (6 bytes).
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dytrun import kernels
from dytrun.curves import FUSED, How

TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


class Count(NamedTuple):
    """Instructions an element, without what a program does once where it loops; and what else shows in the code."""

    kernel: str
    per_element: float
    registers: int
    spilled: int
    loads: int
    stores: int


def launches(shape: tuple[int, ...], channel_axis: int, function: str, dtype: torch.dtype) -> list[tuple]:
    """Return (kernel, arguments, options) of the forward and the backward pass of a layer without a shift."""
    caught = []

    class Catch:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *args, **options: caught.append((self.kernel, args, options))

    x = torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)
    alpha, weight, bias = (
        torch.empty(size, device="meta", requires_grad=True)
        for size in (1, x.shape[channel_axis], x.shape[channel_axis])
    )
    with mock.patch.object(kernels, "wrap_triton", Catch):
        y = kernels.point_wise(x, (alpha, None), (weight, bias), function, channel_axis, dtype)
        torch.autograd.grad(y, (x, alpha, weight, bias), torch.empty_like(y))
    return caught


def compiled(kernel, args: tuple, options: dict):
    """Compile a launch for sm_90."""
    names = kernel.arg_names
    signature, constants, attributes = {}, {}, {}

    def describe(value, path: tuple[int, ...]):
        if isinstance(value, tuple) and not isinstance(value, How):
            return tuple(describe(item, (*path, k)) for k, item in enumerate(value))
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[path] = [["tt.divisibility", 16]]
        if isinstance(value, Tensor):
            return TYPES[value.dtype]
        if isinstance(value, int) and value != 1:
            return "i32"
        constants[path] = value
        return "constexpr"

    for k, (name, value) in enumerate(zip(names, args, strict=True)):
        signature[name] = describe(value, (k,))
    return triton.compile(ASTSource(kernel, signature, constants, attributes), GPUTarget("cuda", 90, 32), options)


def count(kernel, args: tuple, options: dict) -> Count:
    """Compile a launch and count."""
    made, how = compiled(kernel, args, options), args[-1]
    code = [line.split("\t")[-1] for line in made.asm["sass"].splitlines() if line.strip()]
    labels = {line.strip().rstrip(":"): k for k, line in enumerate(code) if line.strip().endswith(":")}
    jumps = [(labels.get(found[1], k), k) for k, line in enumerate(code) if (found := re.search(r"BRA (\w+)", line))]
    # A kernel ends in a jump to itself.
    start, end = max(
        ((a, b) for a, b in jumps if a < b - 1), key=lambda loop: loop[1] - loop[0], default=(0, len(code))
    )
    vectors = how.tile[0] * how.tile[1] // (32 * options["num_warps"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("STACK", "LOCAL"))
    return Count(
        kernel.__name__.strip("_"), (end - start) / vectors, int(re.search(r"REG:(\d+)", usage)[1]), stack + local,
        *(sum(name in line for line in code[start:end]) for name in ("LDG.E.128", "STG.E.128")),
    )  # fmt: skip


if __name__ == "__main__":
    shapes = ((256 * 197, 768), -1), ((128, 96, 56, 56), 1)
    lines = ["function   shape              pass      SASS/element  registers  spilled  16-byte loads  stores"]
    for function in sys.argv[1:] or sorted(FUSED):
        for shape, axis in shapes:
            for launch in launches(shape, axis, function, torch.bfloat16):
                c = count(*launch)
                lines.append(f"{function:10} {shape!s:18} {c.kernel:8} {c.per_element:13.1f} {c.registers:10}")
                lines[-1] += f" {c.spilled:8} {c.loads:14} {c.stores:7}"
    sys.stdout.write("\n".join([*lines, ""]))
