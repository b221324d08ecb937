"""Augmentation: timm's own transforms are the oracle, the same seed must give the same pixels."""

import random

import numpy as np
import pytest
import torch
from conftest import config_of
from PIL import Image
from timm.data import create_transform

from dytrun.augment import eval_transform, key, mixer, posterize, seeded, train_transform


def photo(width: int = 320, height: int = 240) -> Image.Image:
    """A smooth coloured picture, so that interpolation and colour operations have something to do."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 / width, y * 255 / height, 127 + 100 * np.sin(x / 15) * np.cos(y / 11)], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def test_the_papers_training_transform_is_timms_bit_for_bit(monkeypatch):
    # timm's own policy crashes on Pillow 13 where it asks for 0 bits; there the oracle gets the mended operation.
    monkeypatch.setattr("timm.data.auto_augment.ImageOps.posterize", lambda image, bits: posterize_oracle(image, bits))
    config = config_of()
    ours = train_transform(config.augment, config.data)
    oracle = create_transform(
        224, is_training=True, color_jitter=0.4, auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic",
        re_prob=0.25, re_mode="pixel", re_count=1, mean=config.data.mean, std=config.data.std,
    )  # fmt: skip
    for seed in range(150):
        seeded(seed)
        got = ours(photo())
        seeded(seed)
        assert torch.equal(got, oracle(photo())), f"seed {seed}"


def posterize_oracle(image: Image.Image, bits: int) -> Image.Image:
    mask = 0 if bits == 0 else ~(2 ** (8 - bits) - 1)
    return Image.fromarray(np.asarray(image) & np.uint8(mask & 255))


@pytest.mark.parametrize("bits", range(9))
def test_posterize_keeps_the_highest_bits_and_none_is_black(bits):
    assert np.array_equal(np.asarray(posterize(photo(), bits)), np.asarray(posterize_oracle(photo(), bits)))


def test_the_papers_augmentation_survives_the_strongest_posterize():
    config = config_of()
    transform = train_transform(config.augment, config.data)
    policy = next(step for step in transform.transforms if hasattr(step, "ops"))
    op = next(op for op in policy.ops if op.name == "PosterizeIncreasing")
    op.prob, op.magnitude, op.magnitude_std = 1.0, 10, 0
    assert not np.asarray(op(photo())).any()


def test_light_augmentation_of_small_images_is_timms_too():
    config = config_of("data=cifar10", "augment=light", "augment.color_jitter=0.3")
    ours = train_transform(config.augment, config.data)
    oracle = create_transform(
        32, is_training=True, scale=(0.6, 1.0), ratio=(0.8, 1.25), color_jitter=0.3, interpolation="bicubic",
        mean=config.data.mean, std=config.data.std,
    )  # fmt: skip
    for seed in range(20):
        seeded(seed)
        got = ours(photo(32, 32))
        seeded(seed)
        assert torch.equal(got, oracle(photo(32, 32)))


def test_evaluation_resizes_to_256_and_crops_224():
    config = config_of()
    oracle = create_transform(224, interpolation="bicubic", crop_pct=224 / 256)
    assert torch.equal(eval_transform(config.data)(photo()), oracle(photo()))


def test_large_evaluation_images_are_warped_whole():
    config = config_of("data.image_size=384")
    expected = photo().resize((384, 384), Image.Resampling.BICUBIC)
    got = eval_transform(config.data)(photo())
    red = got[0] * 0.229 + 0.485
    assert torch.allclose(red, torch.from_numpy(np.asarray(expected)[..., 0].copy()) / 255, atol=1e-6)


def test_no_augmentation_is_the_evaluation_transform():
    config = config_of("augment=none")
    assert torch.equal(train_transform(config.augment, config.data)(photo()), eval_transform(config.data)(photo()))


def test_keys_are_unrelated_and_seed_every_global_generator():
    assert len({key(a, b) for a in range(30) for b in range(30)}) == 900
    seeded(1, 2, 3)
    first = random.random(), np.random.rand(), torch.rand(1).item()
    seeded(1, 2, 3)
    assert first == (random.random(), np.random.rand(), torch.rand(1).item())


def test_mixup_by_hand():
    config = config_of("augment.mixup=1.0", "augment.cutmix=0", "augment.smoothing=0.1")
    mix = mixer(config.augment, 4)
    images, labels = torch.rand(2, 3, 8, 8), torch.tensor([0, 3])
    seeded(5)
    lam = None
    np.random.rand()
    lam = np.random.beta(1.0, 1.0)
    seeded(5)
    mixed, targets = mix(images.clone(), labels)
    torch.testing.assert_close(mixed, lam * images + (1 - lam) * images.flip(0))
    # Smoothing 0.1 over 4 classes: 0.925 on the label, 0.025 elsewhere.
    first = torch.tensor([0.925, 0.025, 0.025, 0.025])
    second = torch.tensor([0.025, 0.025, 0.025, 0.925])
    torch.testing.assert_close(
        targets, torch.stack([lam * first + (1 - lam) * second, lam * second + (1 - lam) * first])
    )


def test_cutmix_targets_follow_the_area():
    config = config_of("augment.mixup=0", "augment.cutmix=1.0", "augment.smoothing=0")
    mix = mixer(config.augment, 2)
    for seed in range(10):
        images = torch.stack([torch.zeros(3, 16, 16), torch.ones(3, 16, 16)])
        seeded(seed)
        mixed, targets = mix(images, torch.tensor([0, 1]))
        assert targets[0, 1].item() == pytest.approx(mixed[0].mean().item(), abs=1e-6)


def test_without_mixing_there_is_no_mixer():
    assert mixer(config_of("augment.mixup=0", "augment.cutmix=0").augment, 10) is None
    assert mixer(config_of("augment.mix_prob=0").augment, 10) is None
