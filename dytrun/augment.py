"""What happens to an image before it is a part of a batch: crop, flip, colours; and where it will be erased.

The paper's augmentation in timm's order (timm/data/transforms_factory.py): with the same seed the numbers drawn are
those of timm's `create_transform`, and so are the pixels, to the bit. What is drawn depends on the size of an image and
not on its pixels. What needs a whole batch, or is cheap on the device, is in `finish.py`.

Randomness is a function, not a state: `seeded` sets every global generator that timm and torchvision draw from, keyed
by what the numbers are for.
"""

import math
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torchvision import transforms

from dytrun import pixels as ops
from dytrun.config import AugmentConfig, DataConfig
from dytrun.images import Picture
from dytrun.pixels import Pixels
from dytrun.rand_augment import Operation, done, most_operations, rand_augment

# Centre crop over resized short side in the reference's evaluation, and the size from which it warps instead
# (jiachenzhu/DyT, datasets.py).
_CROP_PCT = 224 / 256
_WARP_FROM = 384
# Share of the image that is erased, smallest ratio of its sides, and tries to fit it in (timm's RandomErasing).
_ERASED_AREA, _ERASED_RATIO, _TRIES = (0.02, 1 / 3), 0.3, 10
_JITTERED = ("Brightness", "Contrast", "Color")


class Box(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


NOWHERE = Box(0, 0, 0, 0)


class Drawn(NamedTuple):
    """What is to be done to an image of known size, in this order."""

    box: Box
    """The part of it that is kept."""
    size: tuple[int, int]
    """(height, width) that this is resized to."""
    interpolation: ops.Interpolation
    window: Box
    """The part that is kept of that."""
    is_flipped: bool = False
    operations: Sequence[Operation] = ()


class Deferred(NamedTuple):
    """A JPEG, and what somebody else is to do to it."""

    jpeg: bytes | memoryview
    drawn: Drawn


Transform = Callable[[Picture], Pixels]
Drawer = Callable[[int, int], Drawn]
"""Height and width of an image → what is to be done to it."""


def key(*parts: int) -> int:
    """Mix integers into one 63-bit seed; different parts give unrelated seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seeded(*parts: int) -> None:
    """Set Python's, NumPy's and torch's global generators from `key(*parts)`, the current CUDA device's too."""
    seed = key(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # torch.manual_seed would format a stack trace for every device that is not in use: slower than an augmentation.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


def train_drawer(augment: AugmentConfig, data: DataConfig) -> Drawer:
    """Make the function that draws, from the global generators, what becomes of a training image."""
    place = eval_drawer(data) if augment.scale is None else _random_crop(augment, data.image_size)
    drawn = list
    if augment.rand_augment is not None:
        drawn = rand_augment(augment.rand_augment, data.image_size, data.mean, augment.interpolation)
    elif augment.color_jitter > 0:
        drawn = _color_jitter(augment.color_jitter)

    def draw(height: int, width: int) -> Drawn:
        placed = place(height, width)
        is_flipped = augment.hflip > 0 and bool(torch.rand(1) < augment.hflip)
        return placed._replace(is_flipped=is_flipped, operations=drawn())

    return draw


def num_operations(augment: AugmentConfig) -> int:
    """Return how many operations there are in what is drawn, at most."""
    if augment.rand_augment is not None:
        return most_operations(augment.rand_augment)
    return len(_JITTERED) if augment.color_jitter > 0 else 0


def eval_drawer(data: DataConfig) -> Drawer:
    """Make the function that says what becomes of an image in the reference's evaluation; nothing is drawn."""
    size, short = data.image_size, eval_resize(data)

    def place(height: int, width: int) -> Drawn:
        if short is None:
            return Drawn(Box(0, 0, height, width), (size, size), "bicubic", Box(0, 0, size, size))
        longer = int(short * max(height, width) / min(height, width))
        full = (longer, short) if height > width else (short, longer)
        top, left = (round((side - size) / 2.0) for side in full)
        return Drawn(Box(0, 0, height, width), full, "bicubic", Box(top, left, size, size))

    return place


def transform(draw: Drawer) -> Transform:
    """Make picture → square, as `draw` says.

    The function raises Unreadable where the picture is damaged.
    """

    def transformed(picture: Picture) -> Pixels:
        drawn = draw(picture.height, picture.width)
        is_whole = drawn.box == (0, 0, picture.height, picture.width)
        kept = picture.pixels() if is_whole else picture.part(*drawn.box)
        pixels = ops.resized(kept, drawn.size, drawn.window, drawn.interpolation)
        return done(drawn.operations, ops.flipped(pixels) if drawn.is_flipped else pixels)

    return transformed


def deferring(draw: Drawer) -> Callable[[Picture], Pixels | Deferred]:
    """Make the function that does to a picture what `transform` does, but leaves a plain JPEG to somebody else."""
    transformed = transform(draw)

    def deferred(picture: Picture) -> Pixels | Deferred:
        if picture.jpeg is None:
            return transformed(picture)
        return Deferred(picture.jpeg, draw(picture.height, picture.width))

    return deferred


def train_transform(augment: AugmentConfig, data: DataConfig) -> Transform:
    """Make picture → square of `data.image_size`; draws from the global generators."""
    return transform(train_drawer(augment, data))


def eval_resize(data: DataConfig) -> int | None:
    """Return the short side, in pixels, of which evaluation keeps the centre; None where it warps the whole image."""
    if data.crop_pct is None and data.image_size >= _WARP_FROM:
        return None
    return int(data.image_size / (data.crop_pct or _CROP_PCT))


def random_box(height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]) -> Box:
    """Draw the part of an image that a random crop keeps, as timm's RandomResizedCropAndInterpolation."""
    for _ in range(_TRIES):
        area = random.uniform(*scale) * (height * width)
        aspect = math.exp(random.uniform(math.log(ratio[0]), math.log(ratio[1])))
        # At least a pixel: timm's rounds to none in the smallest images, and fails on them.
        box_width, box_height = max(1, round(math.sqrt(area * aspect))), max(1, round(math.sqrt(area / aspect)))
        if box_width <= width and box_height <= height:
            top = random.randint(0, height - box_height)
            return Box(top, random.randint(0, width - box_width), box_height, box_width)
    box_height, box_width = height, width
    if width / height < min(ratio):
        box_height = round(width / min(ratio))
    elif width / height > max(ratio):
        box_width = round(height * max(ratio))
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


def erased_box(size: int, probability: float) -> Box:
    """Draw the part of a square image that is erased, as timm's RandomErasing; `NOWHERE` if none is."""
    if probability == 0 or random.random() > probability:
        return NOWHERE
    for _ in range(_TRIES):
        area = random.uniform(*_ERASED_AREA) * (size * size)
        aspect = math.exp(random.uniform(math.log(_ERASED_RATIO), math.log(1 / _ERASED_RATIO)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if width < size and height < size:
            top = random.randint(0, size - height)
            return Box(top, random.randint(0, size - width), height, width)
    return NOWHERE


def _random_crop(augment: AugmentConfig, size: int) -> Drawer:
    scale, ratio = augment.scale, augment.ratio
    assert scale is not None

    def place(height: int, width: int) -> Drawn:
        box, interpolation = random_box(height, width, scale, ratio), augment.interpolation
        if interpolation == "random":
            interpolation = random.choice(("bilinear", "bicubic"))
        return Drawn(box, (size, size), interpolation, Box(0, 0, size, size))

    return place


def _color_jitter(strength: float) -> Callable[[], list[Operation]]:
    """Brightness, contrast and saturation, each by a random factor, in random order; drawn by torchvision."""
    jitter = transforms.ColorJitter(*(strength,) * 3)
    ranges = [None if one is None else list(one) for one in (jitter.brightness, jitter.contrast, jitter.saturation)]

    def draw() -> list:  # of Operation
        order, *factors = transforms.ColorJitter.get_params(ranges[0], ranges[1], ranges[2], None)
        chosen = [(_JITTERED[number], factors[number]) for number in order.tolist() if number < len(_JITTERED)]
        return [Operation(name, (factor,), {}) for name, factor in chosen if factor is not None]

    return draw
