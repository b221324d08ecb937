"""What happens to an image, and to a batch of images.

The paper's augmentation with timm's own parts in timm's order (timm/data/transforms_factory.py), so that the same
seed gives the same pixels as timm's `create_transform`. Randomness is a function, not a state: `seeded` sets every
global generator that these libraries draw from, keyed by what the numbers are for.

Axes: B batch, C channel, H height, W width, K class.
"""

import random
from collections.abc import Callable

import numpy as np
import timm.data.auto_augment as timm_auto_augment
import torch
from jaxtyping import Float, Int
from PIL import Image
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_pil_interp
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from dytrun.config import AugmentConfig, DataConfig

Transform = Callable[[Image.Image], Tensor]
Mixer = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

# Centre crop over resized short side in the reference's evaluation, and the size from which it warps instead
# (jiachenzhu/DyT, datasets.py).
_CROP_PCT = 224 / 256
_WARP_FROM = 384


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


def train_transform(augment: AugmentConfig, data: DataConfig) -> Transform:
    """Make PIL image → normalised float tensor (C, H, W); draws from the global generators."""
    size = data.image_size
    steps: list = _crop(augment, data)
    if augment.hflip > 0:
        steps.append(transforms.RandomHorizontalFlip(p=augment.hflip))
    if augment.rand_augment is not None:
        params: dict = {
            "translate_const": int(size * 0.45),
            "img_mean": tuple(min(255, round(255 * x)) for x in data.mean),
        }
        if augment.interpolation != "random":
            params["interpolation"] = str_to_pil_interp(augment.interpolation)
        policy = timm_auto_augment.rand_augment_transform(augment.rand_augment, params)
        for op in policy.ops:
            if op.aug_fn is timm_auto_augment.posterize:
                op.aug_fn = posterize
        steps.append(policy)
    elif augment.color_jitter > 0:
        steps.append(transforms.ColorJitter(*(augment.color_jitter,) * 3))
    steps += _to_tensor(data)
    if augment.erase_prob > 0:
        steps.append(RandomErasing(augment.erase_prob, mode=augment.erase_mode, max_count=1, device="cpu"))
    return transforms.Compose(steps)


def eval_transform(data: DataConfig) -> Transform:
    """Make the deterministic PIL image → normalised float tensor (C, H, W) of the reference's evaluation."""
    return transforms.Compose([*_resize_and_crop(data), *_to_tensor(data)])


def eval_resize(data: DataConfig) -> int | None:
    """Return the short side, in pixels, of which evaluation keeps the centre; None where it warps the whole image."""
    if data.crop_pct is None and data.image_size >= _WARP_FROM:
        return None
    return int(data.image_size / (data.crop_pct or _CROP_PCT))


def mixer(augment: AugmentConfig, num_classes: int) -> Mixer | None:
    """Make (images (B, C, H, W), labels (B,)) → (mixed images, soft targets (B, K)), or None where nothing mixes.

    timm's Mixup in its batch mode, as the reference uses it: one lambda a micro-batch, partner = the batch reversed.
    It works in place on the device of the images and draws from NumPy's global generator.
    """
    if not augment.mixes:
        return None
    mix = Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        prob=augment.mix_prob,
        switch_prob=augment.mix_switch_prob,
        mode="batch",
        label_smoothing=augment.smoothing,
        num_classes=num_classes,
    )

    def apply(
        images: Float[Tensor, "b c h w"], labels: Int[Tensor, "b"]
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b k"]]:
        return mix(images, labels)

    return apply


def posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """Keep the `bits` highest bits of each channel; none of them gives black.

    timm's `PosterizeIncreasing` asks for 0 bits when the noise on its magnitude reaches the end. Pillow answered
    with black up to version 12 and raises from 13 on.
    """
    if bits <= 0:
        return image.point(lambda _: 0)
    return timm_auto_augment.posterize(image, bits)


def _crop(augment: AugmentConfig, data: DataConfig) -> list:
    if augment.scale is None:
        return _resize_and_crop(data)
    return [
        RandomResizedCropAndInterpolation(
            data.image_size, scale=augment.scale, ratio=augment.ratio, interpolation=augment.interpolation
        )
    ]


def _resize_and_crop(data: DataConfig) -> list:
    size, bicubic = data.image_size, InterpolationMode.BICUBIC
    resized = eval_resize(data)
    if resized is None:
        return [transforms.Resize((size, size), interpolation=bicubic)]
    return [transforms.Resize(resized, interpolation=bicubic), transforms.CenterCrop(size)]


def _to_tensor(data: DataConfig) -> list:
    return [transforms.ToTensor(), transforms.Normalize(torch.tensor(data.mean), torch.tensor(data.std))]
