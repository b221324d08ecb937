"""Operations on an 8-bit RGB image as an array (H, W, 3): bit for bit the pixels that Pillow gives.

Formulas and constants are those of Pillow 13 (src/libImaging: Resample.c, Geometry.c, Blend.c, Filter.c, Convert.c).
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float32, Int64, UInt8
from PIL import Image, ImageEnhance, ImageStat

Pixels = UInt8[np.ndarray, "_ _ 3"]
Interpolation = Literal["bilinear", "bicubic"]

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_LEVELS = np.arange(256, dtype=np.float32)


def implementation() -> Literal["native", "pillow"]:
    """Say what computes here. The pixels are the same."""
    return "pillow"


def resized(
    pixels: Pixels,
    size: tuple[int, int],
    window: tuple[int, int, int, int] | None = None,
    interpolation: Interpolation = "bicubic",
) -> Pixels:
    """Resize to (height, width), antialiased, as `Image.resize` does.

    `pixels` may be a part of a larger image: rows that do not follow each other in memory. `window` is (top, left,
    height, width) of the resized image: that part alone is computed and returned.
    """
    height, width = size
    image = _image(pixels).resize((width, height), _RESAMPLING[interpolation])
    if window is not None:
        top, left, rows, columns = window
        image = image.crop((left, top, left + columns, top + rows))
    return np.array(image)


def warped(
    pixels: Pixels, matrix: Sequence[float], fill: Sequence[int], interpolation: Interpolation = "bicubic"
) -> Pixels:
    """Take the value at each (x, y) from (a x + b y + c, d x + e y + f) of the image, (a, b, c, d, e, f) = `matrix`.

    As `Image.transform` does with `Image.Transform.AFFINE`: coordinates of centres are half integers, and what comes
    from outside the image gets the colour `fill`.
    """
    image = _image(pixels)
    how = _RESAMPLING[interpolation]
    return np.array(
        image.transform(image.size, Image.Transform.AFFINE, tuple(matrix), resample=how, fillcolor=tuple(fill))
    )


def rotation(size: tuple[int, int], degrees: float) -> tuple[float, float, float, float, float, float]:
    """Return the matrix for `warped` that turns an image of (height, width) counterclockwise about its centre.

    It is that of `Image.rotate`. A quarter or half turn, for which that function moves pixels instead, has whole numbers
    in its matrix and gives the same.
    """
    angle = -math.radians(degrees % 360.0)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    minus_sin = round(-math.sin(angle), 15)
    y, x = size[0] / 2, size[1] / 2
    return cos, sin, (cos * -x + sin * -y + 0.0) + x, minus_sin, cos, (minus_sin * -x + cos * -y + 0.0) + y


def mapped(pixels: Pixels, table: UInt8[np.ndarray, "3 256"]) -> Pixels:
    """Replace each value by `table[channel, value]`."""
    return table[np.arange(3), pixels]


def histogram(pixels: Pixels) -> Int64[np.ndarray, "3 256"]:
    """Count each value in each channel."""
    return np.array(_image(pixels).histogram(), dtype=np.int64).reshape(3, 256)


def gray_mean(pixels: Pixels) -> int:
    """Return the mean of the gray image, rounded, to which `ImageEnhance.Contrast` blends."""
    return int(ImageStat.Stat(_image(pixels).convert("L")).mean[0] + 0.5)


def color(pixels: Pixels, factor: float) -> Pixels:
    """Blend the gray image (factor 0) with the image (1), or go beyond, as `ImageEnhance.Color` does."""
    return np.array(ImageEnhance.Color(_image(pixels)).enhance(factor))


def sharpened(pixels: Pixels, factor: float) -> Pixels:
    """Blend the smoothed image (factor 0) with the image (1), or go beyond, as `ImageEnhance.Sharpness` does."""
    return np.array(ImageEnhance.Sharpness(_image(pixels)).enhance(factor))


def flipped(pixels: Pixels) -> Pixels:
    """Swap left and right."""
    return np.array(_image(pixels).transpose(Image.Transpose.FLIP_LEFT_RIGHT))


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
    table = (_LEVELS / np.float32(255) - np.float32(mean)[:, None]) / np.float32(std)[:, None]
    for channel in range(3):
        np.take(table[channel], pixels[..., channel], out=out[:, channel])


def _image(pixels: Pixels) -> Image.Image:
    return Image.fromarray(pixels)
