"""timm's RandAugment, drawn by timm and computed here.

timm chooses the operations and their strengths, from Python's and NumPy's global generators, so that the same seed
gives the same augmentation as there. The pixels are computed on arrays, and equal Pillow's to the bit. Operations that
are tables are not applied one after the other: their tables are composed.
"""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import timm.data.auto_augment as timm_auto_augment
from jaxtyping import UInt8
from PIL import Image
from timm.data.transforms import str_to_pil_interp

from dytrun import pixels as ops
from dytrun.pixels import Pixels

_LEVELS = np.arange(256)


class Canvas:
    """An image that operations are done to."""

    def __init__(self, pixels: Pixels):
        self._pixels = pixels
        self._table: UInt8[np.ndarray, "3 256"] | None = None

    def finished(self) -> Pixels:
        """Return the image, every operation done."""
        if self._table is not None:
            self._pixels, self._table = ops.mapped(self._pixels, self._table), None
        return self._pixels

    def put(self, pixels: Pixels) -> "Canvas":
        """Take these pixels instead."""
        self._pixels, self._table = pixels, None
        return self

    def through(self, table: UInt8[np.ndarray, "... 256"]) -> "Canvas":
        """Map each value by a table, (256,) for all channels or (3, 256)."""
        table = np.broadcast_to(table, (3, 256))
        if self._table is not None:
            table = np.take_along_axis(table, self._table.astype(np.intp), axis=1)
        self._table = table
        return self


def rand_augment(policy: str, size: int, mean: tuple[float, ...], interpolation: str) -> Callable[[Pixels], Pixels]:
    """Make timm's RandAugment of a policy such as "rand-m9-mstd0.5-inc1".

    Args:
        policy: in timm's notation.
        size: side of the image in pixels; the longest shift is 0.45 of it.
        mean: of the data set, the colour of what is shifted in.
        interpolation: "bicubic", "bilinear", or "random": one of the two, drawn for each operation.
    """
    params: dict = {
        "translate_const": int(size * 0.45),
        "img_mean": tuple(min(255, round(255 * x)) for x in mean),
    }
    if interpolation != "random":
        params["interpolation"] = str_to_pil_interp(interpolation)
    chosen = timm_auto_augment.rand_augment_transform(policy, params)
    for op in chosen.ops:
        op.aug_fn = _OPERATIONS[op.name.removesuffix("Increasing")]
    return lambda pixels: chosen(Canvas(pixels)).finished()  # pyright: ignore[reportArgumentType]  it only hands it on


def brightness(canvas: Canvas, factor: float, **_: object) -> Canvas:
    """Blend with black; a factor of 1 changes nothing, above it exaggerates."""
    return canvas.through(ops.blend_table(0, factor))


def contrast(canvas: Canvas, factor: float, **_: object) -> Canvas:
    """Blend with the mean grey of the image."""
    return canvas.through(ops.blend_table(ops.gray_mean(canvas.finished()), factor))


def color(canvas: Canvas, factor: float, **_: object) -> Canvas:
    """Blend with the grey image."""
    return canvas.put(ops.color(canvas.finished(), factor))


def _sharpness(canvas: Canvas, factor: float, **_: object) -> Canvas:
    return canvas.put(ops.sharpened(canvas.finished(), factor))


def _invert(canvas: Canvas, **_: object) -> Canvas:
    return canvas.through((255 - _LEVELS).astype(np.uint8))


def _posterize(canvas: Canvas, bits: int, **_: object) -> Canvas:
    """Keep the highest bits; none of them gives black.

    timm asks for 0 bits where the noise on the magnitude reaches its end. Pillow answered with black up to version
    12, and raises from 13 on.
    """
    return canvas.through((_LEVELS & (256 - (1 << (8 - min(bits, 8))))).astype(np.uint8))


def _solarize(canvas: Canvas, threshold: int, **_: object) -> Canvas:
    return canvas.through(np.where(threshold > _LEVELS, _LEVELS, 255 - _LEVELS).astype(np.uint8))


def _solarize_add(canvas: Canvas, add: int, thresh: int = 128, **_: object) -> Canvas:
    return canvas.through(np.where(thresh > _LEVELS, np.minimum(255, _LEVELS + add), _LEVELS).astype(np.uint8))


def _auto_contrast(canvas: Canvas, **_: object) -> Canvas:
    return canvas.through(np.stack([_stretched(counts) for counts in ops.histogram(canvas.finished())]))


def _stretched(counts: np.ndarray) -> np.ndarray:
    """Return the table that spreads a channel over all levels, as Pillow's ImageOps.autocontrast does."""
    found = np.flatnonzero(counts)
    lowest, highest = (int(found[0]), int(found[-1])) if len(found) else (0, 0)
    if highest <= lowest:
        return _LEVELS.astype(np.uint8)
    scale = 255.0 / (highest - lowest)
    return np.clip((_LEVELS * scale + -lowest * scale).astype(np.int64), 0, 255).astype(np.uint8)


def _equalize(canvas: Canvas, **_: object) -> Canvas:
    return canvas.through(np.stack([_flattened(counts) for counts in ops.histogram(canvas.finished())]))


def _flattened(counts: np.ndarray) -> np.ndarray:
    """Return the table that makes a channel's histogram flat, as Pillow's ImageOps.equalize does."""
    found = counts[counts > 0]
    step = (int(counts.sum()) - int(found[-1])) // 255 if len(found) > 1 else 0
    if step == 0:
        return _LEVELS.astype(np.uint8)
    below = np.concatenate([[0], np.cumsum(counts)[:-1]])
    return np.minimum((step // 2 + below) // step, 255).astype(np.uint8)


def _rotate(canvas: Canvas, degrees: float, **kwargs: Any) -> Canvas:
    pixels = canvas.finished()
    return _warped(canvas, ops.rotation(pixels.shape[:2], degrees), kwargs)


def _shear_x(canvas: Canvas, factor: float, **kwargs: Any) -> Canvas:
    return _warped(canvas, (1.0, factor, 0.0, 0.0, 1.0, 0.0), kwargs)


def _shear_y(canvas: Canvas, factor: float, **kwargs: Any) -> Canvas:
    return _warped(canvas, (1.0, 0.0, 0.0, factor, 1.0, 0.0), kwargs)


def _translate_x(canvas: Canvas, share: float, **kwargs: Any) -> Canvas:
    return _warped(canvas, (1.0, 0.0, share * canvas.finished().shape[1], 0.0, 1.0, 0.0), kwargs)


def _translate_y(canvas: Canvas, share: float, **kwargs: Any) -> Canvas:
    return _warped(canvas, (1.0, 0.0, 0.0, 0.0, 1.0, share * canvas.finished().shape[0]), kwargs)


def _warped(canvas: Canvas, matrix: ops.Matrix, kwargs: dict) -> Canvas:
    resample = kwargs["resample"]
    if isinstance(resample, tuple | list):
        resample = random.choice(resample)
    interpolation = "bicubic" if resample == Image.Resampling.BICUBIC else "bilinear"
    return canvas.put(ops.warped(canvas.finished(), matrix, kwargs["fillcolor"], interpolation))


# By timm's names; those of operations that grow stronger with the level end in "Increasing" too.
_OPERATIONS: dict[str, Callable[..., Canvas]] = {
    "AutoContrast": _auto_contrast,
    "Equalize": _equalize,
    "Invert": _invert,
    "Rotate": _rotate,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "SolarizeAdd": _solarize_add,
    "Color": color,
    "Contrast": contrast,
    "Brightness": brightness,
    "Sharpness": _sharpness,
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateXRel": _translate_x,
    "TranslateYRel": _translate_y,
}
