"""timm's RandAugment, drawn by timm and computed here.

timm chooses the operations and their strengths, from Python's and NumPy's global generators, so that the same seed
gives the same augmentation as there; nothing that is drawn depends on the pixels. These are computed on arrays, and
equal Pillow's to the bit. Operations that are tables are not applied one after the other: their tables are composed.
"""

import random
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import timm.data.auto_augment as timm_auto_augment
from jaxtyping import UInt8
from PIL import Image
from timm.data.transforms import str_to_pil_interp

from dytrun import pixels as ops
from dytrun.pixels import Pixels

_LEVELS = np.arange(256)


class Operation(NamedTuple):
    """An operation that was drawn."""

    name: str
    """timm's, without its "Increasing"."""
    strength: tuple[float | int, ...]
    """As timm hands it to the operation: degrees, a share of the side, a factor, bits, a level; nothing for some."""
    options: dict[str, Any]
    """The filter and the filling of one that warps."""


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


def rand_augment(policy: str, size: int, mean: tuple[float, ...], interpolation: str) -> Callable[[], list[Operation]]:
    """Make the function that draws timm's RandAugment of a policy such as "rand-m9-mstd0.5-inc1".

    Args:
        policy: in timm's notation.
        size: side of the image in pixels; the longest shift is 0.45 of it.
        mean: of the data set, the colour of what is shifted in.
        interpolation: "bicubic", "bilinear", or "random": one of the two, drawn for each operation.
    """
    params: dict = {
        "translate_const": int(size * 0.45),
        "img_mean": filling(mean),
    }
    if interpolation != "random":
        params["interpolation"] = str_to_pil_interp(interpolation)
    chosen = timm_auto_augment.rand_augment_transform(policy, params)
    for op in chosen.ops:
        op.aug_fn = partial(_noted, op.name.removesuffix("Increasing"))
    return lambda: chosen([])  # pyright: ignore[reportArgumentType]  it only hands the list on


def filling(mean: tuple[float, ...]) -> tuple[int, ...]:
    """Return the colour of what is shifted in."""
    return tuple(min(255, round(255 * x)) for x in mean)


def most_operations(policy: str) -> int:
    """Return how many operations a policy does to an image at most."""
    return timm_auto_augment.rand_augment_transform(policy, {}).num_layers


# Lists of anything: to look into a list of operations, the check of types in tests would draw from Python's generator.
def done(operations: Iterable, pixels: Pixels) -> Pixels:
    """Do operations to an image, one after the other."""
    canvas = Canvas(pixels)
    for name, strength, options in operations:
        canvas = _OPERATIONS[name](canvas, *strength, **options)
    return canvas.finished()


def _noted(name: str, drawn: list, *strength: float | int, **options: Any) -> list:
    """Stand in for an operation of timm's: note what it would do."""
    if name in WARPING and isinstance(options["resample"], tuple | list):
        options["resample"] = random.choice(options["resample"])
    return [*drawn, Operation(name, strength, options)]


def _brightness(canvas: Canvas, factor: float, **_: object) -> Canvas:
    """Blend with black; a factor of 1 changes nothing, above it exaggerates."""
    return canvas.through(ops.blend_table(0, factor))


def _contrast(canvas: Canvas, factor: float, **_: object) -> Canvas:
    """Blend with the mean grey of the image."""
    return canvas.through(ops.blend_table(ops.gray_mean(canvas.finished()), factor))


def _color(canvas: Canvas, factor: float, **_: object) -> Canvas:
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


def _rotation(shape: tuple[int, int], degrees: float | int) -> ops.Matrix:
    return ops.rotation(shape, degrees)


def _shear_x(_: tuple[int, int], factor: float | int) -> ops.Matrix:
    return 1.0, factor, 0.0, 0.0, 1.0, 0.0


def _shear_y(_: tuple[int, int], factor: float | int) -> ops.Matrix:
    return 1.0, 0.0, 0.0, factor, 1.0, 0.0


def _translation_x(shape: tuple[int, int], share: float | int) -> ops.Matrix:
    return 1.0, 0.0, share * shape[1], 0.0, 1.0, 0.0


def _translation_y(shape: tuple[int, int], share: float | int) -> ops.Matrix:
    return 1.0, 0.0, 0.0, 0.0, 1.0, share * shape[0]


# The matrix for `ops.warped` of each operation that warps an image of (height, width).
WARPING: dict[str, Callable[[tuple[int, int], float | int], ops.Matrix]] = {
    "Rotate": _rotation,
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateXRel": _translation_x,
    "TranslateYRel": _translation_y,
}


def _warped(canvas: Canvas, strength: float | int, *, name: str, resample: Any, fillcolor: Any) -> Canvas:
    pixels = canvas.finished()
    height, width, _ = pixels.shape
    return canvas.put(ops.warped(pixels, WARPING[name]((height, width), strength), fillcolor, filter_name(resample)))


def filter_name(resample: int) -> ops.Interpolation:
    """Name one of Pillow's two filters that timm warps with."""
    return "bicubic" if resample == Image.Resampling.BICUBIC else "bilinear"


# By timm's names; those of operations that grow stronger with the level end in "Increasing" too.
_OPERATIONS: dict[str, Callable[..., Canvas]] = {
    "AutoContrast": _auto_contrast,
    "Equalize": _equalize,
    "Invert": _invert,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "SolarizeAdd": _solarize_add,
    "Color": _color,
    "Contrast": _contrast,
    "Brightness": _brightness,
    "Sharpness": _sharpness,
    **{name: partial(_warped, name=name) for name in WARPING},
}
