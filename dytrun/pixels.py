"""Operations on an 8-bit RGB image as an array (H, W, 3): the pixels that Pillow gives, to the bit, and much faster.

`pixels.cpp` is compiled once a machine, in two seconds, and kept in the user's cache; where there is no C++ compiler,
Pillow and NumPy do the same. The formulas and constants are those of Pillow 13 (src/libImaging: Resample.c, Geometry.c,
Blend.c, Filter.c, Convert.c), as its wheels for x86-64 compute them; those for ARM may fuse a multiplication and an
addition, which moves a warped or blended value by one level here and there.
"""

import ctypes
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float32, Int64, UInt8
from PIL import Image, ImageEnhance, ImageStat

from dytrun import native

Pixels = UInt8[np.ndarray, "_ _ 3"]
_Number = float | int
Matrix = tuple[_Number, _Number, _Number, _Number, _Number, _Number]
Interpolation = Literal["bilinear", "bicubic"]

_SOURCE = Path(__file__).with_suffix(".cpp")
# Flags of the compiler. None: Pillow computes. Tests set it, to have either, and what other processors get.
_flags: tuple[str, ...] | None = (
    # Without contraction: Pillow rounds after each multiplication and each addition.
    "-O3", *native.PROCESSOR, "-std=c++17", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math",
    "-ffp-contract=off",
)  # fmt: skip
_P, _INT, _LONG, _FLOAT, _DOUBLE = (
    ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_double,
)  # fmt: skip
# Function of pixels.cpp → what it returns and takes.
_SIGNATURES = {
    "resized": (_INT, (_P, _LONG, _INT, _INT, _P, *(_INT,) * 7)),
    "warped": (_INT, (_P, _INT, _INT, _P, *(_DOUBLE,) * 6, *(_INT,) * 4)),
    "mapped": (None, (_P, _LONG, _P, _P)),
    "histogram": (None, (_P, _LONG, _P)),
    "gray_sum": (_LONG, (_P, _LONG)),
    "color": (None, (_P, _LONG, _P, _FLOAT)),
    "sharpened": (None, (_P, _INT, _INT, _P, _FLOAT)),
    "flipped": (None, (_P, _INT, _INT, _P)),
    "normalised": (None, (_P, _LONG, _LONG, _P, _LONG, _P)),
}
_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_LEVELS = np.arange(256, dtype=np.float32)


def implementation() -> Literal["native", "pillow"]:
    """Say what computes here. The pixels are the same."""
    return "pillow" if _library() is None else "native"


def resized(
    pixels: Pixels,
    size: tuple[int, int],
    window: tuple[int, int, int, int] | None = None,
    interpolation: Interpolation = "bicubic",
) -> UInt8[np.ndarray, "rows columns 3"]:
    """Resize to (height, width), antialiased, as `Image.resize` does.

    `pixels` may be a part of a larger image: rows that do not follow each other in memory. `window` is (top, left,
    height, width) of the resized image: that part alone is computed and returned.

    Raises:
        ValueError: a size of nothing, or a window that is not inside.
    """
    height, width = size
    top, left, rows, columns = window or (0, 0, height, width)
    if min(top, left, rows - 1, columns - 1) < 0 or top + rows > height or left + columns > width:
        raise ValueError(f"an image of {size} has no part {window}")
    _expect(pixels)
    if (library := _library()) is None:
        image = Image.fromarray(pixels).resize((width, height), _RESAMPLING[interpolation])
        return np.array(image.crop((left, top, left + columns, top + rows)))
    if pixels.strides[1:] != (3, 1) or pixels.strides[0] < 0:
        pixels = np.ascontiguousarray(pixels)
    out = np.empty((rows, columns, 3), np.uint8)
    _done(
        library.pixels_resized(
            pixels.ctypes.data, pixels.strides[0], pixels.shape[0], pixels.shape[1], out.ctypes.data, height, width,
            top, left, rows, columns, interpolation == "bicubic",
        )
    )  # fmt: skip
    return out


def warped(
    pixels: Pixels, matrix: Matrix, fill: tuple[int, int, int], interpolation: Interpolation = "bicubic"
) -> Pixels:
    """Take the value at each (x, y) from (a x + b y + c, d x + e y + f) of the image, (a, b, c, d, e, f) = `matrix`.

    As `Image.transform` does with `Image.Transform.AFFINE`: coordinates of centres are half integers, and what comes
    from outside the image gets the colour `fill`.
    """
    red, green, blue = fill
    _expect(pixels)
    if (library := _library()) is None:
        image, how = Image.fromarray(pixels), _RESAMPLING[interpolation]
        return np.array(image.transform(image.size, Image.Transform.AFFINE, matrix, resample=how, fillcolor=fill))
    pixels, out = _in_and_out(pixels)
    _done(
        library.pixels_warped(
            pixels.ctypes.data, *pixels.shape[:2], out.ctypes.data, *matrix, red, green, blue,
            interpolation == "bicubic",
        )
    )  # fmt: skip
    return out


def rotation(size: tuple[int, int], degrees: float) -> Matrix:
    """Return the matrix for `warped` that turns an image of (height, width) counterclockwise about its centre.

    It is that of `Image.rotate`. For a quarter or half turn that function moves pixels instead, which is the same: the
    matrix then has whole numbers in it.
    """
    angle = -math.radians(degrees % 360.0)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    minus_sin = round(-math.sin(angle), 15)
    y, x = size[0] / 2, size[1] / 2
    return cos, sin, (cos * -x + sin * -y + 0.0) + x, minus_sin, cos, (minus_sin * -x + cos * -y + 0.0) + y


def mapped(pixels: Pixels, table: UInt8[np.ndarray, "3 256"]) -> Pixels:
    """Replace each value by `table[channel, value]`."""
    _expect(pixels)
    if table.dtype != np.uint8 or table.shape != (3, 256):
        raise ValueError(f"a table of (3, 256) bytes is needed, not {table.shape} of {table.dtype}")
    if (library := _library()) is None:
        return np.ascontiguousarray(table[np.arange(3), pixels])
    pixels, out = _in_and_out(pixels)
    table = np.ascontiguousarray(table)
    library.pixels_mapped(pixels.ctypes.data, pixels.size // 3, out.ctypes.data, table.ctypes.data)
    return out


def histogram(pixels: Pixels) -> Int64[np.ndarray, "3 256"]:
    """Count each value in each channel."""
    _expect(pixels)
    if (library := _library()) is None:
        return np.array(Image.fromarray(pixels).histogram(), dtype=np.int64).reshape(3, 256)
    pixels = np.ascontiguousarray(pixels)
    counts = np.empty((3, 256), np.int64)
    library.pixels_histogram(pixels.ctypes.data, pixels.size // 3, counts.ctypes.data)
    return counts


def gray_mean(pixels: Pixels) -> int:
    """Return the mean of the gray image, rounded, to which `ImageEnhance.Contrast` blends."""
    _expect(pixels)
    if (library := _library()) is None:
        return int(ImageStat.Stat(Image.fromarray(pixels).convert("L")).mean[0] + 0.5)
    pixels = np.ascontiguousarray(pixels)
    number = pixels.size // 3
    return int(library.pixels_gray_sum(pixels.ctypes.data, number) / number + 0.5)


def color(pixels: Pixels, factor: float) -> Pixels:
    """Blend the gray image (factor 0) with the image (1), or go beyond, as `ImageEnhance.Color` does."""
    _expect(pixels)
    if (library := _library()) is None:
        return np.array(ImageEnhance.Color(Image.fromarray(pixels)).enhance(factor))
    pixels, out = _in_and_out(pixels)
    library.pixels_color(pixels.ctypes.data, pixels.size // 3, out.ctypes.data, factor)
    return out


def sharpened(pixels: Pixels, factor: float) -> Pixels:
    """Blend the smoothed image (factor 0) with the image (1), or go beyond, as `ImageEnhance.Sharpness` does."""
    _expect(pixels)
    if (library := _library()) is None:
        return np.array(ImageEnhance.Sharpness(Image.fromarray(pixels)).enhance(factor))
    pixels, out = _in_and_out(pixels)
    library.pixels_sharpened(pixels.ctypes.data, *pixels.shape[:2], out.ctypes.data, factor)
    return out


def flipped(pixels: Pixels) -> Pixels:
    """Swap left and right."""
    _expect(pixels)
    if (library := _library()) is None:
        return np.array(Image.fromarray(pixels).transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    pixels, out = _in_and_out(pixels)
    library.pixels_flipped(pixels.ctypes.data, *pixels.shape[:2], out.ctypes.data)
    return out


def blend_table(other: int, factor: float) -> UInt8[np.ndarray, "256"]:
    """Return what `Image.blend` of the constant `other` (factor 0) with an image (1) makes of each value.

    Brightness blends with 0, contrast with `gray_mean`.
    """
    blended = np.float32(other) + np.float32(factor) * (_LEVELS - np.float32(other))
    return blended.clip(0, 255).astype(np.uint8)


def normalised(
    pixels: UInt8[np.ndarray, "batch height width 3"],
    mean: Sequence[float],
    std: Sequence[float],
    out: Float32[np.ndarray, "batch 3 height width"],
) -> None:
    """Write (value / 255 - mean) / std of each channel into `out`: torchvision's ToTensor and Normalize, to the bit.

    `out` may lie in memory as it is named, or with its channels last.
    """
    for image in pixels[:1]:
        _expect(image)
    batch, height, width, _ = pixels.shape
    if out.dtype != np.float32 or out.shape != (batch, 3, height, width):
        raise ValueError(f"{pixels.shape} normalised does not fit {out.shape} of {out.dtype}")
    table = (_LEVELS / np.float32(255) - _column(mean)) / _column(std)
    is_planar, is_packed = out.flags.c_contiguous, out.transpose(0, 2, 3, 1).flags.c_contiguous
    if (library := _library()) is None or not (is_planar or is_packed):
        for channel in range(3):
            np.take(table[channel], pixels[..., channel], out=out[:, channel])
        return
    pixels = np.ascontiguousarray(pixels)
    number = height * width
    channel_stride = number if is_planar else 1
    library.pixels_normalised(pixels.ctypes.data, batch, number, out.ctypes.data, channel_stride, table.ctypes.data)


def _expect(pixels: np.ndarray) -> None:
    """Refuse what is no image: the compiled functions would read memory that is not theirs."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0:
        raise ValueError(f"an image of (height, width, 3) bytes is needed, not {pixels.shape} of {pixels.dtype}")


def _in_and_out(pixels: Pixels) -> tuple[Pixels, Pixels]:
    """Return the pixels without gaps in memory, and memory for as many."""
    return np.ascontiguousarray(pixels), np.empty(pixels.shape, np.uint8)


def _column(values: Sequence[float]) -> np.ndarray:
    return np.array(values, dtype=np.float32)[:, None]


def _done(status: int) -> None:
    if status != 0:
        raise MemoryError("no memory for an image")


def _library() -> ctypes.CDLL | None:
    return None if _flags is None else _compiled(_flags)


@functools.cache
def _compiled(flags: tuple[str, ...]) -> ctypes.CDLL | None:
    library = native.library(_SOURCE, flags)
    if library is not None:
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, f"pixels_{name}")
            function.restype, function.argtypes = result, arguments
    return library
