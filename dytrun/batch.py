"""What the loaders hand to the loop. Axes: B batch, C channel, H height, W width, K class."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor


class BadImage(NamedTuple):
    """A training image that could not be read."""

    path: str
    why: str
    used_instead: str
    """Path of the image of the same class that stood in for it."""


class Batch(NamedTuple):
    """A micro-batch on the device."""

    images: Float[Tensor, "b c h w"]
    targets: Tensor
    """Labels (B,), or soft targets (B, K) where images are mixed."""
    indices: Int[Tensor, "b"]
    """Which images of the split."""
    bad: Mapping[int, BadImage] = MappingProxyType({})
    """Those of `indices` for which another image stood in; never any in evaluation."""
