"""DyT on a CPU, in eager mode: one pass over memory forward and one back, and x alone is kept between them.

`cpu_kernels.cpp` is compiled once a machine, in a second, and kept in the user's cache. Where there is no C++ compiler
with OpenMP, the same is done with torch's own operators, tanh by way of its sigmoid: 2 sigmoid(2 z) - 1.
"""

import ctypes
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor

from dytrun import native

_SOURCE = Path(__file__).with_suffix(".cpp")
# Without -ffast-math: a NaN has to come out as one, or a run would not notice that it has diverged.
_FLAGS = (
    "-O3", *native.PROCESSOR, "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math",
    "-ffp-contract=fast",
)  # fmt: skip
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_Two = tuple[Tensor | None, Tensor | None]
_Inner = tuple[Tensor, Tensor | None]
# Elements that are worth a thread; as many as torch has.
_GRAIN = 32768
_SUMS = 4  # rows of what the backward pass sums up: for alpha, shift, weight, bias


class _Layout(ctypes.Structure):
    """Activations as a dense matrix of rows × cols; see cpu_kernels.cpp."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("in_columns", ctypes.c_int),
    )


class Call(NamedTuple):
    """What the two passes know besides tensors."""

    channel_axis: int
    out_dtype: torch.dtype
    is_native: bool
    """Whether the compiled kernel computes, else torch's operators."""
    formula: Callable[..., Tensor]
    """The same in differentiable operators, for gradients of gradients: (x, (alpha, shift), (weight, bias))."""


def point_wise(
    x: Tensor, inner: tuple[Tensor, Tensor | None], affine: tuple[Tensor | None, Tensor | None], call: Call
) -> Tensor:
    """Compute weight * tanh(alpha * x + shift) + bias in float32 (float64 for float64) as `call.out_dtype`.

    `inner` is (alpha, shift), each of shape (1,) or (C,); `affine` is (weight, bias), each (C,); None leaves one out.

    Raises:
        RuntimeError: a parameter is on another device; the compiled kernel would read an address that is not its own.
    """
    elsewhere = [value.device for value in (*inner, *affine) if value is not None and value.device != x.device]
    if elsewhere:
        raise RuntimeError(f"the activations are on {x.device}, a parameter of the layer on {elsewhere[0]}")
    return _PointWise.apply(call, x, *inner, *affine)


def fits_native(x: Tensor, out_dtype: torch.dtype) -> bool:
    """Whether there is a compiled kernel for these dtypes: float32 and bfloat16 it takes, float16 and float64 not."""
    return x.dtype in _DTYPES and out_dtype in _DTYPES and library() is not None


class _PointWise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, *parameters: Tensor | None) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(x, *parameters)
        alpha, shift, weight, bias = parameters
        assert alpha is not None
        return (_native_forward if call.is_native else _torch_forward)(x, (alpha, shift), (weight, bias), call)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, alpha, shift, weight, bias = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        # Somebody wants the gradient of this gradient, or a batch of gradients, which has no memory of its own.
        if torch.is_grad_enabled() or _is_batched(grads[0]):
            return None, *_by_formula(ctx.saved_tensors, needed, grads[0], ctx.call)
        backward = _native_backward if ctx.call.is_native else _torch_backward
        dx, sums = backward(grads[0], x, (alpha, shift), weight, ctx.call)
        parameters = zip(sums, (alpha, shift, weight, bias), needed[1:], strict=True)
        return None, dx, *(_like(total, value) if is_needed else None for total, value, is_needed in parameters)


def _by_formula(
    inputs: Sequence[Tensor | None], needed: Sequence[bool], dy: Tensor, call: Call
) -> Iterator[Tensor | None]:
    """Differentiate the formula instead, by its inputs alone: one of them may have been made of another, or be it."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        x, alpha, shift, weight, bias = aliases = [None if value is None else value.view_as(value) for value in inputs]
        y = call.formula(x, (alpha, shift), (weight, bias))
    given = [value for value, is_needed in zip(aliases, needed, strict=True) if is_needed and value is not None]
    found = iter(torch.autograd.grad(y, given, dy, create_graph=create_graph))
    return (next(found) if is_needed else None for is_needed in needed)


def _is_batched(tensor: Tensor) -> bool:
    return is_functorch_wrapped_tensor(tensor) or is_legacy_batchedtensor(tensor)


def _like(total: Tensor, value: Tensor) -> Tensor:
    """Bring a sum a channel to the shape and dtype of the parameter it is the gradient of."""
    return (total.sum() if value.numel() == 1 else total).view(value.shape).to(value.dtype)


def _native_forward(x: Tensor, inner: _Inner, affine: _Two, call: Call) -> Tensor:
    x, layout = _dense(x, call.channel_axis)
    y = torch.empty_like(x, dtype=call.out_dtype)
    _run("forward", (x, y), (x, y), _rows(layout.channels, (*inner, *affine)), layout)
    return y


def _native_backward(dy: Tensor, x: Tensor, inner: _Inner, weight: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
    x, layout = _dense(x, call.channel_axis)
    if dy.stride() != x.stride():  # also what was expanded
        dy = torch.empty_like(x, dtype=dy.dtype).copy_(dy)
    dx = torch.empty_like(x)
    sums = torch.empty(_SUMS, layout.channels, dtype=torch.float64, device="cpu")
    _run("backward", (x, dy), (x, dy, dx), _rows(layout.channels, (*inner, weight)), layout, sums)
    return dx, sums


def _run(
    name: str,
    typed: tuple[Tensor, Tensor],
    tensors: tuple[Tensor, ...],
    rows: list[Tensor],
    layout: _Layout,
    *sums: Tensor,
) -> None:
    """Call the kernel of these two dtypes."""
    kernels = library()
    assert kernels is not None
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (*tensors, *rows, *sums)]
    kernel = getattr(kernels, "_".join((name, *(_DTYPES[tensor.dtype] for tensor in typed))))
    threads = min(torch.get_num_threads(), max(1, layout.rows * layout.cols // _GRAIN))
    kernel(*pointers, layout, ctypes.c_int(threads))


def _rows(channels: int, values: tuple[Tensor | None, ...]) -> list[Tensor]:
    """Bring alpha, shift, weight (and bias) to one float32 value a channel; an absent one changes nothing."""
    rows = []
    for value, absent in zip(values, (1.0, 0.0, 1.0, 0.0), strict=False):
        if value is None:
            rows.append(torch.full((channels,), absent, dtype=torch.float32, device="cpu"))
        else:
            rows.append(value.detach().to(torch.float32).expand(channels).contiguous())
    return rows


def _dense(x: Tensor, channel_axis: int) -> tuple[Tensor, _Layout]:
    """Return x, or a copy of it, without gaps in memory, and how its channels lie there."""
    channels = x.shape[channel_axis]
    is_last = channel_axis == -1 or channel_axis == x.ndim - 1
    if not is_last and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        is_last = True
    else:
        x = x.contiguous()
    rows = x.numel() // max(1, channels) if is_last else x.shape[0] * channels
    return x, _Layout(rows, x.numel() // max(1, rows), channels, is_last)


def _torch_forward(x: Tensor, inner: _Inner, affine: _Two, call: Call) -> Tensor:
    weight, bias = (None if value is None else _along(value, x, call) for value in affine)
    s = _sigmoid(x, inner, call)
    weight = s.new_ones(1) if weight is None else weight.to(s.dtype)
    bias = -weight if bias is None else bias.to(s.dtype) - weight
    return torch.addcmul(bias, s, 2 * weight, out=s).to(call.out_dtype)


def _torch_backward(dy: Tensor, x: Tensor, inner: _Inner, weight: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
    axis = call.channel_axis % x.ndim

    def total(values: Tensor) -> Tensor:
        return values.movedim(axis, -1).flatten(0, -2).sum(0) if x.ndim > 1 else values.clone()

    s = _sigmoid(x, inner, call)
    dy = dy.to(s.dtype)
    by_bias, product = total(dy), dy * s
    by_weight = 2 * total(product) - by_bias
    h = dy.mul(4.0) if weight is None else torch.mul(dy, 4 * _along(weight, x, call).to(s.dtype), out=product)
    h = torch.ops.aten.sigmoid_backward(h, s)
    sums = torch.stack([total(torch.mul(h, x, out=s)), total(h), by_weight, by_bias])
    return h.mul_(_along(inner[0], x, call)).to(x.dtype), sums


def _sigmoid(x: Tensor, inner: _Inner, call: Call) -> Tensor:
    """Compute (1 + tanh(z)) / 2, for z up to 20: beyond, its slope would be a subnormal number, and those are slow."""
    alpha, shift = inner
    z = x.to(torch.promote_types(x.dtype, torch.float32)) * (2 * _along(alpha, x, call))
    return (z if shift is None else z.add_(2 * _along(shift, x, call))).clamp_(-40, 40).sigmoid_()


def _along(value: Tensor, x: Tensor, call: Call) -> Tensor:
    """Give a value a channel, or one for all, the channel axis of x."""
    shape = [1] * x.ndim
    shape[call.channel_axis] = -1
    return value.view(shape)


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels, compiling them if nobody has; None where that is not possible."""
    return native.library(_SOURCE, _FLAGS)
