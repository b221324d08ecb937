"""What DALI does to a batch of JPEGs: decode, crop, resize, flip, RandAugment's operations.

The only file that imports DALI. Each operation is written as Pillow does it, down to what it truncates; where DALI has
one of its own (decoding, resizing, warping, equalizing, filtering), that is used.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, no_type_check

import numpy as np
import torch
from jaxtyping import Float32
from nvidia import dali  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
from torch import Tensor

from dytrun.augment import Deferred
from dytrun.rand_augment import WARPING, Operation, filter_name

# Its annotations say neither which constants there are nor what a node of the graph can do.
fn: Any = dali.fn
math: Any = dali.math
types: Any = dali.types

_FILTERS = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}
_HIGHEST = 255
# The smoothing of Pillow's ImageFilter.SMOOTH, which its sharpness blends with.
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
_ALONE = np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]], np.float32)


class Look(NamedTuple):
    """What images a pipeline makes."""

    size: int
    """Side of the images that come out, in pixels."""
    num_operations: int
    """Of `Drawn.operations` at most."""
    fill: tuple[int, ...]
    """The colour of what is shifted in."""


class Pipeline:
    """DALI's pipeline: batches go in, and their images come out in the same order."""

    def __init__(self, look: Look, batch: int, depth: int, place: tuple[torch.device, int]):
        """Take the most images a batch, the most batches begun and not finished, the device and the threads."""
        device, threads = place
        self._look, self._device = look, device
        number = None if device.type == "cpu" else device.index or 0
        pipeline_def: Any = dali.pipeline_def
        self._pipe = pipeline_def(_graph, enable_conditionals=True)(
            look, number is not None, batch_size=batch, num_threads=max(1, threads), device_id=number,
            exec_pipelined=False, prefetch_queue_depth=depth,  # else the first run starts several
        )  # fmt: skip
        self._pipe.build()
        self._sizes: deque[int] = deque()

    def begin(self, deferred: Sequence[Deferred]) -> None:
        """Begin a batch; it may have none."""
        self._sizes.append(len(deferred))
        if not deferred:
            return
        drawn = [one.drawn for one in deferred]
        numbers = {
            "jpeg": [np.frombuffer(one.jpeg, np.uint8) for one in deferred],
            "box": np.array([one.box for one in drawn], np.int32),
            "size": np.array([one.size for one in drawn], np.float32),
            "filter": np.array([int(_FILTERS[one.interpolation]) for one in drawn], np.int32),
            "window": np.array([one.window for one in drawn], np.int32),
            "flip": np.array([one.is_flipped for one in drawn], np.int32),
        }
        for layer in range(self._look.num_operations):
            chosen = [one.operations[layer] if layer < len(one.operations) else None for one in drawn]
            size = self._look.size
            numbers |= {
                f"number{layer}": np.array([_number(one) for one in chosen], np.int32),
                f"strength{layer}": np.array([_strength(one) for one in chosen], np.float32),
                f"matrix{layer}": np.stack([_matrix(one, size) for one in chosen]),
            }
        for name, values in numbers.items():
            self._pipe.feed_input(name, values)
        self._pipe.schedule_run()

    def finished(self) -> Tensor | None:
        """Return the images (B, H, W, 3) of the batch that was begun first, on the device; None of an empty one.

        Raises:
            RuntimeError: DALI cannot decode one of them; the pipeline is of no more use.
        """
        if self._sizes.popleft() == 0:
            return None
        try:
            (images,) = self._pipe.share_outputs()
        except IndexError as error:  # of a pipeline that failed before
            raise RuntimeError(str(error)) from error
        if self._device.type == "cpu":
            made = torch.from_numpy(np.array(images.as_array()))
        else:
            made = torch.from_dlpack(images.as_tensor()).clone()
            torch.cuda.current_stream(self._device).synchronize()  # before DALI has its memory back
        self._pipe.release_outputs()
        return made


# DALI reads the source of these two: no wrapper may be around them.
@no_type_check
def _graph(look: Look, is_on_gpu: bool) -> Any:
    """Describe the pipeline; DALI turns each `if` on a number that was fed into a choice image by image."""

    def fed(name: str, dtype: Any, ndim: int) -> Any:
        return fn.external_source(name=name, dtype=dtype, ndim=ndim)

    box, window = fed("box", types.INT32, 1), fed("window", types.INT32, 1)
    image = fn.decoders.image_slice(
        fed("jpeg", types.UINT8, 1), device="mixed" if is_on_gpu else "cpu", output_type=types.RGB,
        start=box[0:2], shape=box[2:4], axes=[0, 1], adjust_orientation=False, jpeg_fancy_upsampling=True,
    )  # fmt: skip
    image = fn.resize(
        image,
        size=fed("size", types.FLOAT, 1),
        interp_type=fn.reinterpret(fed("filter", types.INT32, 0), dtype=types.INTERP_TYPE),
    )
    image = fn.slice(image, start=window[0:2], shape=window[2:4], axes=[0, 1])
    image = fn.flip(image, horizontal=fed("flip", types.INT32, 0))
    for layer in range(look.num_operations):
        number = fed(f"number{layer}", types.INT32, 0)
        strength, matrix = fed(f"strength{layer}", types.FLOAT, 0), fed(f"matrix{layer}", types.FLOAT, 2)
        if is_on_gpu:
            strength, matrix = strength.gpu(), matrix.gpu()
        image = _one_of(
            [dali.pipeline.do_not_convert(kind) for kind in _KINDS.values()],
            0,
            number,
            (image, strength, matrix, look.fill),
        )
    return image


@no_type_check
def _one_of(kinds: list, first: int, number: Any, arguments: tuple) -> Any:
    """Do the operation of that number, `first` being that of the first of `kinds`."""
    middle = len(kinds) // 2
    if middle == 0:
        image = kinds[0](*arguments)
    else:
        if number < first + middle:
            image = _one_of(kinds[:middle], first, number, arguments)
        else:
            image = _one_of(kinds[middle:], first + middle, number, arguments)
    return image


def _truncated(values: Any) -> Any:
    return fn.cast(math.floor(math.clamp(values, 0, _HIGHEST)), dtype=types.UINT8)


def _gray(image: Any) -> Any:
    return fn.color_space_conversion(image, image_type=types.RGB, output_type=types.GRAY)


def _same(image: Any, *_: Any) -> Any:
    return image


def _bicubic(image: Any, _: Any, matrix: Any, fill: tuple[int, ...]) -> Any:
    return fn.experimental.warp_perspective(
        image, matrix, interp_type=types.INTERP_CUBIC, fill_value=[float(value) for value in fill]
    )


def _bilinear(image: Any, _: Any, matrix: Any, fill: tuple[int, ...]) -> Any:
    return fn.experimental.warp_perspective(
        image, matrix, interp_type=types.INTERP_LINEAR, fill_value=[float(value) for value in fill]
    )


def _auto_contrast(image: Any, *_: Any) -> Any:
    low, high = (reduce(image, axes=[0, 1], keep_dims=True) for reduce in (fn.reductions.min, fn.reductions.max))
    is_flat = high == low
    scale = 255.0 / math.max(high - low, 1)
    return _truncated((image - low * (is_flat ^ True)) * (is_flat + (is_flat ^ True) * scale))


def _equalize(image: Any, *_: Any) -> Any:
    # DALI counts the values up to a level, Pillow those below it: that of the negative is the same.
    return _invert(fn.equalize(_invert(image)))


def _invert(image: Any, *_: Any) -> Any:
    return types.Constant(_HIGHEST, types.UINT8) - image


def _posterize(image: Any, mask: Any, *_: Any) -> Any:
    return image & fn.cast(mask, dtype=types.UINT8)


def _solarize(image: Any, threshold: Any, *_: Any) -> Any:
    is_below = image < threshold
    return image * is_below + _invert(image) * (is_below ^ True)


def _solarize_add(image: Any, add: Any, *_: Any) -> Any:
    return _truncated(image + (image < 128) * add)


def _color(image: Any, factor: Any, *_: Any) -> Any:
    gray = fn.cast(_gray(image), dtype=types.FLOAT)  # 8-bit differences would wrap around
    return _truncated(gray + factor * (image - gray))


def _contrast(image: Any, factor: Any, *_: Any) -> Any:
    gray = math.floor(fn.reductions.mean(_gray(image)) + 0.5)
    return _truncated(gray + factor * (image - gray))


def _brightness(image: Any, factor: Any, *_: Any) -> Any:
    return _truncated(image * factor)


def _sharpness(image: Any, _: Any, kernel: Any, *__: Any) -> Any:
    return _truncated(fn.filter(image, kernel, dtype=types.FLOAT))


# The operations as DALI does them; the two that warp stand for all of timm's that do.
_KINDS: dict[str, Callable[..., Any]] = {
    "": _same,
    "bicubic": _bicubic,
    "bilinear": _bilinear,
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
}
_NUMBERS = {name: number for number, name in enumerate(_KINDS)}


def _number(operation: Operation | None) -> int:
    if operation is None:
        return 0
    return _NUMBERS[filter_name(operation.options["resample"]) if operation.name in WARPING else operation.name]


def _strength(operation: Operation | None) -> float:
    """Return the one number that DALI's operation takes: of a posterized image the mask of its bits."""
    if operation is None or not operation.strength:
        return 0.0
    (strength,) = operation.strength
    return float(256 - (1 << (8 - min(int(strength), 8))) if operation.name == "Posterize" else strength)


def _matrix(operation: Operation | None, size: int) -> Float32[np.ndarray, "3 3"]:
    """Return the matrix that warps, or the filter that sharpens."""
    if operation is not None and operation.name in WARPING:
        (strength,) = operation.strength
        return np.array([*WARPING[operation.name]((size, size), strength), 0, 0, 1], np.float32).reshape(3, 3)
    factor = operation.strength[0] if operation is not None and operation.name == "Sharpness" else 1.0
    return np.float32(factor) * _ALONE + np.float32(1 - factor) * _SMOOTH
