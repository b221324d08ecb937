"""What happens to a batch on its device: 8 bits become normalised floats, boxes are erased, images are mixed.

On a GPU it is one compiled function, which reads the 8-bit images once. On a CPU it is done in place, and only where
a box is. Both draw the same noise: a function of an image's key and of the place in the image, so that neither the
device nor the split into batches changes it.

Axes: B batch, C channel, H height, W width, K class.
"""

import math
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from timm.data import Mixup
from timm.data.mixup import cutmix_bbox_and_lam, mixup_target
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from dytrun import pixels as ops
from dytrun.augment import NOWHERE, Box
from dytrun.config import AugmentConfig, DataConfig
from dytrun.errors import first_line

# SplitMix64 (Steele, Lea and Flood, 2014): its increment and its two multipliers, as signed numbers.
_STEP, _FIRST, _SECOND = (number - 2**64 for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
# A batch of so many bytes, as floats, stays in a core's cache.
_CACHED_BYTES = 2**20


class Erased(NamedTuple):
    """Which part of an image is erased, and the key of what stands there instead."""

    box: Box = NOWHERE
    key: int = 0


class Mixing(NamedTuple):
    """How the images of a micro-batch are mixed with those of the batch in reverse."""

    lam: float = 1.0
    """Share of the image itself in its target, and in each pixel where none is cut out."""
    cut: Box | None = None
    """The part that comes from the other image whole; None blends both everywhere."""


class Constants(NamedTuple):
    """What the device keeps for every batch."""

    mean: Float[Tensor, "c 1 1"]
    std: Float[Tensor, "c 1 1"]
    places: Int[Tensor, "c h w"]
    """The number of each place in an image that gets noise of its own: of a pixel and channel, or of a channel."""


class Finish:
    """8-bit images (B, H, W, C) of a micro-batch → normalised and mixed images (B, C, H, W), on the device."""

    def __init__(self, data: DataConfig, erase_mode: str, device: torch.device):
        """Take the mean and standard deviation of `data`; `erase_mode` is "pixel", "rand" or "const"."""
        self._data, self._mode = data, erase_mode
        self._constants = constants(data, erase_mode, device)
        # Memory of the last batches, and what tells whether somebody still uses it.
        self._buffers: list[tuple[np.ndarray, weakref.ref]] = []
        self._scratch = torch.empty(len(data.mean), data.image_size, data.image_size)
        # A batch of another size is compiled anew.
        self._fused = torch.compile(fused, dynamic=False) if device.type == "cuda" else None

    def __call__(
        self, images: UInt8[Tensor, "b h w c"], erased: Int[Tensor, "b 5"] | None = None, mixing: Mixing | None = None
    ) -> Float[Tensor, "b c h w"]:
        """Finish a batch; `erased` has a row of box and key for each image."""
        mixing = mixing or Mixing()
        return self._in_place(images, erased, mixing) if self._fused is None else self._at_once(images, erased, mixing)

    def _at_once(self, images: Tensor, erased: Tensor | None, mixing: Mixing) -> Tensor:
        assert self._fused is not None
        numbers = numbers_of(mixing).pin_memory().to(images.device, non_blocking=True)
        arguments = images, self._constants, erased, numbers, self._mode
        try:
            return self._fused(*arguments)
        except TorchDynamoException as error:
            warnings.warn(f"batches are finished by single operators: {first_line(error)}", stacklevel=1)
            self._fused = fused
            return fused(*arguments)

    def _in_place(self, images: Tensor, erased: Tensor | None, mixing: Mixing) -> Tensor:
        number, height, width, channels = images.shape
        memory = self._lent((number, channels, height, width))
        out = torch.from_numpy(memory)
        rows = [None] * number if erased is None else erased.tolist()
        is_small = memory.nbytes <= _CACHED_BYTES
        if is_small:
            ops.normalised(images.numpy(), self._data.mean, self._data.std, memory)
            if mixing.lam == 1 and not any(row and row[2] for row in rows):
                return out
        # Pair by pair, while both are in the cache; in the middle there may be one alone.
        for index in range((number + 1) // 2):
            other = number - 1 - index
            for one in {index, other}:
                if not is_small:
                    pixels, to = images[one : one + 1].numpy(), memory[one : one + 1]
                    ops.normalised(pixels, self._data.mean, self._data.std, to)
                self._erase(out[one], rows[one])
            if mixing.lam != 1 and index != other:
                self._mix_pair(out[index], out[other], mixing)
        return out

    def _lent(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return memory that no tensor uses any more: to touch new memory takes longer than to fill it."""
        memory = next((memory for memory, user in self._buffers if memory.shape == shape and user() is None), None)
        if memory is None:
            memory = np.empty(shape, np.float32)
        # A tensor that is made of the view, and whatever is a view of that, keeps the view alive.
        view = memory[:]
        kept = [one for one in self._buffers if one[0] is not memory]
        self._buffers = [*kept[-1:], (memory, weakref.ref(view))]
        return view

    def _mix_pair(self, one: Tensor, other: Tensor, mixing: Mixing) -> None:
        if mixing.cut is None:
            before = self._scratch.copy_(one)
            one.lerp_(other, 1 - mixing.lam)
            other.lerp_(before, 1 - mixing.lam)
            return
        top, left, height, width = mixing.cut
        box = (..., slice(top, top + height), slice(left, left + width))
        before = one[box].clone()
        one[box] = other[box]
        other[box] = before

    def _erase(self, image: Tensor, erased: list[int] | None) -> None:
        if erased is None or erased[2] == 0:
            return
        top, left, height, width, key = erased
        box = (slice(None), slice(top, top + height), slice(left, left + width))
        image[box] = _filling(torch.tensor(key), self._constants.places[box], self._mode)


def constants(data: DataConfig, erase_mode: str, device: torch.device) -> Constants:
    """Put on the device what does not change."""
    mean, std = (torch.tensor(value, device=device).view(-1, 1, 1) for value in (data.mean, data.std))
    shape = (len(data.mean), data.image_size, data.image_size)
    if erase_mode == "pixel":
        return Constants(mean, std, torch.arange(math.prod(shape), device=device).view(shape))
    return Constants(mean, std, torch.arange(shape[0], device=device).view(-1, 1, 1).expand(shape))


def numbers_of(mixing: Mixing) -> Float[Tensor, "5"]:
    """Return the share of the image itself, and the box that comes from the other one whole.

    As a tensor: a number would be compiled in, anew for each batch.
    """
    return torch.tensor([mixing.lam, *NOWHERE] if mixing.cut is None else [1.0, *mixing.cut])


def mixing_drawer(augment: AugmentConfig, num_classes: int, size: int) -> Callable[[], Mixing] | None:
    """Make the function that draws how a micro-batch is mixed, or None where nothing mixes.

    timm's Mixup in its batch mode, as the reference uses it: one lambda a micro-batch, partner = the batch reversed.
    It draws from NumPy's global generator.
    """
    if not augment.mixes:
        return None
    timm_mix = Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        prob=augment.mix_prob,
        switch_prob=augment.mix_switch_prob,
        label_smoothing=augment.smoothing,
        num_classes=num_classes,
    )

    def draw() -> Mixing:
        lam, is_cut = timm_mix._params_per_batch()
        if not is_cut or lam == 1:
            return Mixing(lam)
        (top, bottom, left, right), lam = cutmix_bbox_and_lam((size, size), lam)
        return Mixing(float(lam), Box(int(top), int(left), int(bottom - top), int(right - left)))

    return draw


def mixed_targets(labels: Int[Tensor, "b"], mixing: Mixing, num_classes: int, smoothing: float) -> Float[Tensor, "b k"]:
    """Return the soft targets of a mixed micro-batch."""
    return mixup_target(labels, num_classes, mixing.lam, smoothing)


def fused(
    images: UInt8[Tensor, "b h w c"],
    constants: Constants,
    erased: Int[Tensor, "b 5"] | None,
    mixing: Float[Tensor, "5"],
    erase_mode: str,
) -> Float[Tensor, "b c h w"]:
    """Normalise, erase and mix in whole tensors, as one kernel when it is compiled; `mixing` is of `numbers_of`."""
    out = (images.permute(0, 3, 1, 2).float() / 255 - constants.mean) / constants.std
    if erased is not None:
        filling = _filling(erased[:, 4].view(-1, 1, 1, 1), constants.places, erase_mode)
        out = torch.where(_inside(erased[:, :4].unbind(1), out), filling, out)
    other, share = out.flip(0), mixing[0]
    # As images lie elsewhere too: those that come in have their channels last, and a model would go on with that.
    return torch.where(_inside(mixing[1:].unbind(), out), other, out * share + other * (1 - share)).contiguous()


def _inside(box: Sequence[Tensor], images: Tensor) -> Tensor:
    """Return where (B or 1, 1, H, W) a pixel is in a box, given as tensors (B,) or of no dimension."""
    top, left, height, width = (side.reshape(-1, 1, 1, 1) for side in box)
    rows = torch.arange(images.shape[2], device=images.device).view(-1, 1)
    columns = torch.arange(images.shape[3], device=images.device)
    return (rows >= top) & (rows < top + height) & (columns >= left) & (columns < left + width)


def _filling(key: Tensor, places: Tensor, mode: str) -> Tensor:
    return torch.zeros((), device=places.device) if mode == "const" else noise(key, places)


def noise(key: Int[Tensor, "..."], places: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return standard normal numbers, each a function of a key and a place: SplitMix64, then Box and Muller."""
    bits = (places + 1) * _STEP + key
    for shift, factor in ((30, _FIRST), (27, _SECOND), (31, 1)):
        # To the right, zeros coming in.
        bits ^= (bits >> shift).bitwise_and_((1 << (64 - shift)) - 1)
        if factor != 1:
            bits *= factor
    radius, angle = ((bits >> 40) & 0xFFFFFF).float(), (bits & 0xFFFFFF).float()
    radius = radius.add_(1).mul_(2.0**-24).log_().mul_(-2).sqrt_()
    return radius.mul_(angle.mul_(2 * math.pi * 2.0**-24).cos_())
