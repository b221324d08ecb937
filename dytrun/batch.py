"""What the loaders hand to the loop. Axes: B batch, C channel, H height, W width, T token, K class."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from jaxtyping import Int
from torch import Tensor

# A target that is none: behind the end of a text. The one that torch's cross_entropy leaves out.
NO_TARGET = -100


class BadImage(NamedTuple):
    """A training image that could not be read."""

    path: str
    why: str
    used_instead: str
    """Path of the image of the same class that stood in for it."""


class Batch(NamedTuple):
    """A micro-batch on the device."""

    images: Tensor
    """Floats (B, C, H, W), or of a text the bytes of its windows (B, T)."""
    targets: Tensor
    """Labels (B,), soft targets (B, K) where images are mixed, or the byte that follows each byte (B, T)."""
    indices: Int[Tensor, "b"]
    """Which images, or windows, of the split."""
    bad: Mapping[int, BadImage] = MappingProxyType({})
    """Those of `indices` for which another image stood in; never any in evaluation."""


def aligned(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return float32 logits (N, K) and targets (N,) or (N, K), a row for each prediction: N is B, or B times T."""
    return logits.float().flatten(0, -2), targets if targets.is_floating_point() else targets.flatten()
