"""The point-wise layers as two Triton kernels, for CUDA outside of torch.compile.

Written out in torch operations, a layer reads and writes its activations once for each of them, forward and backward.
Here each pass reads what it needs once, writes its result once, in the dtype that is asked for, and keeps nothing but
x; maths and sums are float32. Nothing is tuned at run time, and no sum is left to atomics: equal inputs give equal bits
on equal devices.

Activations are seen as a dense matrix (rows, columns) of one of two kinds:
    by column: (tokens, C), the channel is the column; channels last in memory;
    by row: (B * C, pixels), the channel is the row modulo C; channels first in memory.
"""

import functools
from collections.abc import Sequence
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import register_autograd, triton_op, wrap_triton
from triton import knobs

from dytrun.curves import FUSED, How, constexpr, curve, value

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

WIDTHS = (32, 64, 128, 256)
# Bytes of x in a tile. Forward: four loads of 16 bytes for each of 128 threads; backward: one for each of 256, because
# its four sums are as large as a tile and stay in registers.
FORWARD_BYTES, FORWARD_WARPS = 8192, 4
BACKWARD_BYTES, BACKWARD_WARPS = 4096, 8
PROGRAMS_PER_PROCESSOR = 2


@triton.jit
@no_type_check
def _per_channel(parameter, channel, channels, single: constexpr):
    """Load a parameter for some channels, in float32; a missing one stays None."""
    loaded = None
    if parameter is not None:
        if single:
            loaded = tl.load(parameter).to(tl.float32)
        else:
            loaded = tl.load(parameter + channel, channel < channels, 0).to(tl.float32)
    return loaded


@triton.jit
@no_type_check
def _forward(x, y, parameters, size, how: constexpr):
    """Compute a tile of y; tiles of a row follow each other. `size` is (rows, columns, C)."""
    rows, columns, channels = size
    alpha_at, shift_at, weight_at, bias_at = parameters
    across = tl.cdiv(columns, how.tile[1])
    row = tl.program_id(0) // across * how.tile[0] + tl.arange(0, how.tile[0])[:, None]
    column = tl.program_id(0) % across * how.tile[1] + tl.arange(0, how.tile[1])[None, :]
    channel = row % channels if how.by_row else column
    alpha = _per_channel(alpha_at, channel, channels, how.single[0])
    shift = _per_channel(shift_at, channel, channels, how.single[1])
    weight = _per_channel(weight_at, channel, channels, False)
    bias = _per_channel(bias_at, channel, channels, False)

    inside = (row < rows) & (column < columns)
    place = row.to(tl.int64) * columns + column
    z = alpha * tl.load(x + place, inside, 0).to(tl.float32)
    result = value(z if shift is None else z + shift, how)
    if weight is not None:
        result = result * weight
    if bias is not None:
        result = result + bias
    tl.store(y + place, result.to(y.dtype.element_ty), inside)


@triton.jit
@no_type_check
def _place(tile, across, size, how: constexpr):
    """Return for a tile of this program's strip its places in memory, and which of them exist."""
    rows, columns, _ = size
    row, column = _axes(tile, across, how)
    return row.to(tl.int64) * columns + column, (row < rows) & (column < columns)


@triton.jit
@no_type_check
def _axes(tile, across, how: constexpr):
    """Return the rows and the columns of a tile of this program's strip."""
    row, column = tl.arange(0, how.tile[0])[:, None], tl.arange(0, how.tile[1])[None, :]
    if how.by_row:
        row += tl.program_id(0) * how.tile[0]
        column += tile * how.tile[1]
    else:
        row += tile * how.tile[0]
        column += tl.program_id(0) % across * how.tile[1]
    return row, column


@triton.jit
@no_type_check
def _backward(arrays, parameters, sums, size, how: constexpr):
    """Compute dx = alpha * h of a strip, h = dy * weight * f'(z), and the strip's sums of x h, h, dy f and dy.

    By column, a program takes every so many-th tile of some columns, and writes a sum a column; sums: (slots, programs
    over the rows, C). By row, it takes all of some rows, and writes a sum a row; sums: (slots, B, C).
    """
    x, dy, dx = arrays
    rows, columns, channels = size
    alpha_at, shift_at, weight_at, _ = parameters
    across = tl.cdiv(columns, how.tile[1])
    if how.by_row:
        first, last, step = 0, across, 1
    else:
        first, last, step = tl.program_id(0) // across, tl.cdiv(rows, how.tile[0]), tl.num_programs(0) // across
    row, column = _axes(first, across, how)
    place, inside = _place(first, across, size, how)
    x_next, dy_next = tl.load(x + place, inside, 0), tl.load(dy + place, inside, 0)
    channel = row % channels if how.by_row else column
    alpha = _per_channel(alpha_at, channel, channels, how.single[0])
    shift = _per_channel(shift_at, channel, channels, how.single[1])
    weight = _per_channel(weight_at, channel, channels, False)
    of_alpha, of_shift = tl.zeros(how.tile, tl.float32), tl.zeros(how.tile, tl.float32)
    of_weight, of_bias = tl.zeros(how.tile, tl.float32), tl.zeros(how.tile, tl.float32)

    for tile in range(first, last, step):
        # The next tile is on its way while this one is computed; after the last one, everything lies outside.
        x_here, dy_here = x_next.to(tl.float32), dy_next.to(tl.float32)
        place, inside = _place(tile + step, across, size, how)
        x_next, dy_next = tl.load(x + place, inside, 0), tl.load(dy + place, inside, 0)
        z = alpha * x_here
        f, slope = curve(z if shift is None else z + shift, how)
        h = dy_here * slope if weight is None else dy_here * weight * slope
        if how.dx:
            place, inside = _place(tile, across, size, how)
            tl.store(dx + place, (alpha * h).to(dx.dtype.element_ty), inside)
        of_alpha += x_here * h
        of_shift += h
        of_weight += dy_here * f
        of_bias += dy_here

    spot, exists, slot_size = row, row < rows, rows
    if not how.by_row:
        spot, exists, slot_size = first * columns + column, column < columns, step * columns
    where = (spot, exists, slot_size)
    _write_sum(sums, of_alpha, how.slots[0], where, how.by_row)
    _write_sum(sums, of_shift, how.slots[1], where, how.by_row)
    _write_sum(sums, of_weight, how.slots[2], where, how.by_row)
    _write_sum(sums, of_bias, how.slots[3], where, how.by_row)


@triton.jit
@no_type_check
def _write_sum(sums, total, slot: constexpr, where, by_row: constexpr):
    """Sum a tile along the strip and write it, if it has a slot; `where`: spots, which of them exist, a slot's size."""
    if slot >= 0:
        spot, exists, size = where
        tl.store(sums + slot * size + spot, tl.sum(total, 1 if by_row else 0, keep_dims=True), exists)


def fits(x: Tensor, function: str) -> bool:
    """Whether the kernels compute `function`, a name of functions.FUNCTIONS, for x: on NVIDIA's GPUs from A100 on."""
    return x.is_cuda and x.dtype in DTYPES and function in FUSED and _is_able(x.device)


@functools.cache
def _is_able(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def point_wise(
    x: Tensor,
    inner: tuple[Tensor, Tensor | None],
    affine: tuple[Tensor | None, Tensor | None],
    function: str,
    channel_axis: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """Compute weight * f(alpha * x + shift) + bias in float32, and return it in `out_dtype` and in x's memory format.

    Arguments are norm.formula's; `channel_axis` is -1 or 1. Gradients of x and of the parameters come in their
    dtypes; they cannot be differentiated again.

    Raises:
        ValueError: for a parameter that fits no channels, or more rows than the kernels count.
    """
    return _point_wise(x, *inner, *affine, f"{function} {channel_axis} {str(out_dtype).removeprefix('torch.')}")


# An op takes what dispatcher and autograd know: in torch 2.14, a list of tensors has no gradients if one is missing.
@triton_op("dytrun::point_wise", mutates_args={})
def _point_wise(
    x: Tensor, alpha: Tensor, shift: Tensor | None, weight: Tensor | None, bias: Tensor | None, request: str
) -> Tensor:
    """Compute `point_wise`; `request` is "function channel_axis out_dtype"."""
    function, channel_axis, out_dtype = _parsed(request)
    parameters = (alpha, shift, weight, bias)
    x, by_row, size = _matrix(x, channel_axis)
    y = torch.empty_like(x, dtype=out_dtype)
    if y.numel():
        tile = _tile(size[1], FORWARD_BYTES // x.element_size())
        how = _how(function, by_row, parameters, out_dtype, size[2])._replace(tile=tile)
        grid = (triton.cdiv(size[0], tile[0]) * triton.cdiv(size[1], tile[1]),)
        with torch.cuda.device_of(x):
            wrap_triton(_forward)[grid](x, y, _dense(parameters), size, how, num_warps=FORWARD_WARPS)
    return y


@triton_op("dytrun::point_wise_backward", mutates_args={})
def _point_wise_backward(
    dy: Tensor,
    x: Tensor,
    parameters: Sequence[Tensor | None],
    needed: Sequence[bool],
    function: str,
    channel_axis: int,
) -> tuple[Tensor, Tensor]:
    """Return dx, empty where it is not needed, and the needed sums over all but the channels: float32, (sums, C)."""
    x, by_row, size = _matrix(x, channel_axis)
    rows, columns, channels = size
    dy = dy.movedim(channel_axis, 1 if by_row else -1).contiguous()
    dx = torch.empty_like(x) if needed[0] else x.new_empty(0)
    count = sum(needed[1:])
    if not x.numel():
        return dx, x.new_zeros((count, channels), dtype=torch.float32)
    tile = _tile(columns, BACKWARD_BYTES // x.element_size())
    slots = [sum(needed[1:k]) if needed[k] else -1 for k in range(1, 5)]
    how = _how(function, by_row, parameters, dy.dtype, channels)._replace(tile=tile, slots=tuple(slots), dx=needed[0])
    if by_row:
        programs, parts = triton.cdiv(rows, tile[0]), rows // channels
    else:
        across = triton.cdiv(columns, tile[1])
        parts = min(triton.cdiv(rows, tile[0]), max(1, PROGRAMS_PER_PROCESSOR * _processors(x.device) // across))
        programs = across * parts
    sums = x.new_empty((count, parts, channels), dtype=torch.float32)
    with torch.cuda.device_of(x):
        wrap_triton(_backward)[(programs,)](
            (x, dy, dx), _dense(parameters), sums, size, how, num_warps=BACKWARD_WARPS, maxnreg=128
        )
    return dx, sums.sum(1)


def _parsed(request: str) -> tuple[str, int, torch.dtype]:
    function, channel_axis, dtype = request.split()
    return function, int(channel_axis), getattr(torch, dtype)


def _matrix(x: Tensor, channel_axis: int) -> tuple[Tensor, bool, tuple[int, int, int]]:
    """Return x, or a copy if it is not dense; whether it is a matrix by row; and that matrix's (rows, columns, C)."""
    by_row = False
    if not x.movedim(channel_axis, -1).is_contiguous():
        by_row = x.ndim > 1 and x.movedim(channel_axis, 1).is_contiguous()
        if not by_row:
            x = x.contiguous()
            by_row = channel_axis % x.ndim != x.ndim - 1
    channels = x.shape[channel_axis]
    rows = x.shape[0] * channels if by_row else x.numel() // max(channels, 1)
    if rows >= 2**31 - max(WIDTHS) * FORWARD_BYTES:
        raise ValueError(f"{rows} rows are more than the kernels count: x has shape {tuple(x.shape)}")
    return x, by_row, (rows, x.numel() // max(rows, 1), channels)


def _how(function: str, by_row: bool, parameters: Sequence[Tensor | None], dtype: torch.dtype, channels: int) -> How:
    """Return what does not depend on the pass; `dtype` is that of y, and so of its gradient."""
    sizes = [channels if p is None else p.numel() for p in parameters]
    if not {*sizes[:2]} <= {1, channels} or {*sizes[2:]} != {channels}:
        raise ValueError(f"parameters of sizes {sizes} do not fit {channels} channels")
    asm = not knobs.runtime.interpret and torch.version.hip is None
    return How(function, by_row, (sizes[0] == 1, sizes[1] == 1), dtype != torch.bfloat16, asm, (0, 0))


def _tile(columns: int, elements: int) -> tuple[int, int]:
    """Return height and width of tiles of so many elements: the widest of those that pad the columns least."""
    width = min(WIDTHS, key=lambda width: (triton.cdiv(columns, width) * width, -width))
    return elements // width, width


def _dense(parameters: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    return tuple(None if parameter is None else parameter.contiguous() for parameter in parameters)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.request = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, *parameters = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:5])
    function, channel_axis, _ = _parsed(ctx.request)
    dx, sums = _point_wise_backward(dy, x, parameters, needed, function, channel_axis)
    left = list(sums.unbind())
    gradients = [_fitting(left.pop(0), p) if need else None for p, need in zip(parameters, needed[1:], strict=True)]
    return dx if needed[0] else None, *gradients, None


def _fitting(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Bring a sum a channel into a parameter's shape and dtype."""
    total = gradient if parameter.numel() == gradient.numel() else gradient.sum()
    return total.to(parameter.dtype).view(parameter.shape)


def _refuse(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
    raise RuntimeError("dytrun::point_wise cannot be differentiated twice; norm.formula can")


register_autograd("dytrun::point_wise", _differentiate, setup_context=_save)
register_autograd("dytrun::point_wise_backward", _refuse)
