"""Augmentation: timm's own transforms are the oracle. The same seed must give the same pixels, to the bit."""

import io
import random

import numpy as np
import pytest
import timm.data.auto_augment as timm_auto_augment
import torch
from conftest import config_of
from PIL import Image
from scipy import stats
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation

from dytrun import pixels as ops
from dytrun.augment import NOWHERE, erased_box, eval_drawer, key, random_box, seeded, train_transform, transform
from dytrun.images import Picture
from dytrun.rand_augment import _OPERATIONS, Canvas

DRAWS = 10_000
# Compiled before anything is drawn: the hook that checks types draws from Python's generator too, where it looks into
# a sequence of any length.
ops.implementation()


def photo(width: int = 320, height: int = 240) -> np.ndarray:
    """A smooth coloured picture, so that interpolation and colour operations have something to do."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 / width, y * 255 / height, 127 + 100 * np.sin(x / 15) * np.cos(y / 11)], axis=-1)
    return pixels.astype(np.uint8)


def jpeg(pixels: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90, **options)
    return file.getvalue()


PHOTOS = [jpeg(photo(*size)) for size in ((320, 240), (500, 375), (375, 500), (224, 224), (90, 300), (100, 60))]


def of_timm(content: bytes, transform: object) -> np.ndarray:
    """What timm makes of a file: opened by Pillow, and as its loader has it, in 8 bits."""
    return np.asarray(transform(Image.open(io.BytesIO(content)).convert("RGB"))).transpose(1, 2, 0)


def posterize_oracle(image: Image.Image, bits: int) -> Image.Image:
    mask = 0 if bits == 0 else ~(2 ** (8 - bits) - 1)
    return Image.fromarray(np.asarray(image) & np.uint8(mask & 255))


@pytest.fixture
def mended_timm(monkeypatch):
    """timm's own policy crashes on Pillow 13 where it asks for 0 bits; there the oracle gets the mended operation."""
    monkeypatch.setattr("timm.data.auto_augment.ImageOps.posterize", posterize_oracle)


RECIPES = {
    "paper": ((), {"color_jitter": 0.4, "auto_augment": "rand-m9-mstd0.5-inc1", "interpolation": "bicubic"}),
    "any filter": (
        ("augment.rand_augment=rand-m7-n3-mstd1-inc0", "augment.interpolation=random"),
        {"auto_augment": "rand-m7-n3-mstd1-inc0", "interpolation": "random"},
    ),
    "bilinear": (
        ("augment.rand_augment=rand-m9-p1.0-inc1", "augment.interpolation=bilinear"),
        {"auto_augment": "rand-m9-p1.0-inc1", "interpolation": "bilinear"},
    ),
    "colour jitter": (
        ("augment.rand_augment=null", "augment.color_jitter=0.4"),
        {"color_jitter": 0.4, "interpolation": "bicubic"},
    ),
    "crop and flip": (
        ("augment.rand_augment=null", "augment.color_jitter=0", "augment.scale=[0.6,1]", "augment.ratio=[0.8,1.25]"),
        {"color_jitter": 0, "scale": (0.6, 1.0), "ratio": (0.8, 1.25), "interpolation": "bicubic"},
    ),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_training_image_is_timms_bit_for_bit(mended_timm, recipe):
    overrides, arguments = RECIPES[recipe]
    config = config_of(*overrides)
    ours = train_transform(config.augment, config.data)
    oracle = create_transform(224, is_training=True, use_prefetcher=True, mean=config.data.mean, **arguments)
    for seed in range(200):
        content = PHOTOS[seed % len(PHOTOS)]
        seeded(seed)
        got = ours(Picture(content, ""))
        seeded(seed)
        assert np.array_equal(got, of_timm(content, oracle)), f"seed {seed}"


def test_small_images_too(mended_timm):
    config = config_of("data=cifar10", "augment=light", "augment.color_jitter=0.3")
    ours = train_transform(config.augment, config.data)
    oracle = create_transform(
        32, is_training=True, scale=(0.6, 1.0), ratio=(0.8, 1.25), color_jitter=0.3, interpolation="bicubic",
        use_prefetcher=True,
    )  # fmt: skip
    small = photo(32, 32)
    for seed in range(50):
        seeded(seed)
        got = ours(Picture(small, ""))
        seeded(seed)
        assert np.array_equal(got, np.asarray(oracle(Image.fromarray(small))).transpose(1, 2, 0))


@pytest.mark.parametrize("name", sorted(_OPERATIONS))
@pytest.mark.parametrize("level", [0, 0.1, 3.3, 9, 10])
def test_each_operation_of_rand_augment_is_timms_bit_for_bit(mended_timm, name, level):
    hparams = {"translate_const": 100, "img_mean": (124, 116, 104), "interpolation": Image.Resampling.BICUBIC}
    names = [name, f"{name}Increasing"] if f"{name}Increasing" in timm_auto_augment.NAME_TO_OP else [name]
    noise = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    flat, narrow = np.full((16, 16, 3), 7, np.uint8), (photo(120, 90) // 4 + 60).astype(np.uint8)
    for operation in names:
        op = timm_auto_augment.AugmentOp(operation, prob=1.0, magnitude=level, hparams=hparams)
        for seed, pixels in enumerate((photo(), noise, flat, narrow)):
            random.seed(seed)
            expected = np.asarray(op(Image.fromarray(pixels)))
            random.seed(seed)
            mine = timm_auto_augment.AugmentOp(operation, prob=1.0, magnitude=level, hparams=hparams)
            mine.aug_fn = _OPERATIONS[name]
            assert np.array_equal(mine(Canvas(pixels)).finished(), expected), (operation, seed)


def test_tables_are_composed_and_give_what_one_after_the_other_gives():
    pixels = photo()
    composed, stepwise = Canvas(pixels), Canvas(pixels)
    for name, arguments in (("Posterize", (3,)), ("Invert", ()), ("SolarizeAdd", (40,)), ("Brightness", (1.7,))):
        composed = _OPERATIONS[name](composed, *arguments)
        stepwise = Canvas(_OPERATIONS[name](stepwise, *arguments).finished())
    assert np.array_equal(composed.finished(), stepwise.finished())


def test_the_strongest_posterize_gives_black():
    assert not _OPERATIONS["Posterize"](Canvas(photo()), 0).finished().any()


def of_operations(draw) -> tuple[list[str], list[float]]:
    """The operations that `draw` applies in many images, and the strengths at which it does."""
    names, levels = [], []
    for seed in range(DRAWS):
        seeded(seed)
        for name, arguments in draw():
            names.append(name)
            levels += [arguments[0]] if name == "Rotate" else []
    return names, levels


def test_operations_and_strengths_are_distributed_as_timms(monkeypatch):
    """Over other seeds than timm's, so that it is the distribution that is compared, not the same numbers again."""
    config = config_of()
    seen: list = []
    for name in _OPERATIONS:
        monkeypatch.setitem(
            _OPERATIONS, name, lambda canvas, *arguments, name=name, **_: seen.append((name, arguments)) or canvas
        )
    ours = train_transform(config.augment, config.data)
    picture = Picture(photo(32, 32), "")

    def mine() -> list:
        seen.clear()
        ours(picture)
        return list(seen)

    def timms() -> list:
        seen.clear()
        oracle(object())
        return list(seen)

    oracle = timm_auto_augment.rand_augment_transform("rand-m9-mstd0.5-inc1", {"translate_const": 100})
    for op in oracle.ops:
        plain = op.name.removesuffix("Increasing")
        op.aug_fn = lambda image, *arguments, plain=plain, **_: seen.append((plain, arguments)) or image
    (names, levels), (other_names, other_levels) = of_operations(mine), of_operations(lambda: shifted(timms))
    table = [[found.count(name) for name in sorted(_OPERATIONS)] for found in (names, other_names)]
    assert stats.chi2_contingency(table).pvalue > 1e-3
    assert stats.ks_2samp(levels, other_levels).pvalue > 1e-3
    # Two operations an image, each with probability one half.
    assert stats.binomtest(len(names), 2 * DRAWS, 0.5).pvalue > 1e-3


def shifted(draw):
    """Draw from generators that stand elsewhere than ours do at the same seed."""
    seeded(random.getrandbits(30), 1)
    return draw()


def test_crops_are_distributed_as_timms():
    image, scale, ratio = Image.new("RGB", (500, 375)), (0.08, 1.0), (3 / 4, 4 / 3)
    seeded(1)
    ours = np.array([random_box(375, 500, scale, ratio) for _ in range(DRAWS)])
    seeded(2)
    timms = np.array([RandomResizedCropAndInterpolation.get_params(image, scale, ratio) for _ in range(DRAWS)])
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], timms[:, column]).pvalue > 1e-3


@pytest.mark.parametrize("size", [(375, 500), (500, 90), (30, 2000), (9, 7)])
def test_a_crop_is_timms_for_every_seed(size):
    image = Image.new("RGB", size[::-1])
    for seed in range(300):
        seeded(seed)
        got = random_box(*size, (0.3, 1.0), (0.75, 1.3333))
        seeded(seed)
        assert got == RandomResizedCropAndInterpolation.get_params(image, (0.3, 1.0), (0.75, 1.3333))


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (2, 2)])
def test_a_crop_of_the_smallest_images_keeps_a_pixel(size):
    """timm rounds some of them to nothing, which no one can resize."""
    timms = []
    for seed in range(300):
        seeded(seed)
        top, left, height, width = random_box(*size, (0.01, 1.0), (0.75, 1.3333))
        assert top >= 0 < height <= size[0] - top
        assert left >= 0 < width <= size[1] - left
        seeded(seed)
        timms.append(
            RandomResizedCropAndInterpolation.get_params(Image.new("RGB", size[::-1]), (0.01, 1.0), (0.75, 1.3333))
        )
    assert any(0 in box[2:] for box in timms)


def timms_erasure(size: int, probability: float) -> tuple[int, int, int, int]:
    image = torch.zeros(1, size, size)
    RandomErasing(probability, mode="pixel", max_count=1, device="cpu")(image)
    where = np.argwhere(image[0].numpy() != 0)
    if not len(where):
        return NOWHERE
    (top, left), (bottom, right) = where.min(0), where.max(0)
    return int(top), int(left), int(bottom - top + 1), int(right - left + 1)


def test_erased_boxes_are_timms_for_every_seed_and_in_distribution():
    for seed in range(400):
        seeded(seed)
        got = erased_box(64, 0.5)
        seeded(seed)
        assert got == timms_erasure(64, 0.5)
    seeded(1)
    ours = np.array([erased_box(224, 0.25) for _ in range(DRAWS)])
    seeded(2)
    timms = np.array([timms_erasure(224, 0.25) for _ in range(DRAWS)])
    counts = [(found[:, 2] > 0).sum() for found in (ours, timms)]
    assert stats.chi2_contingency([counts, [DRAWS - count for count in counts]]).pvalue > 1e-3
    assert stats.binomtest(int(counts[0]), DRAWS, 0.25).pvalue > 1e-3
    for column in range(4):
        assert stats.ks_2samp(*(found[found[:, 2] > 0][:, column] for found in (ours, timms))).pvalue > 1e-3


@pytest.mark.parametrize("content", PHOTOS, ids=range(len(PHOTOS)))
def test_evaluation_resizes_to_256_and_crops_224(content):
    oracle = create_transform(224, interpolation="bicubic", crop_pct=224 / 256, use_prefetcher=True)
    assert np.array_equal(transform(eval_drawer(config_of().data))(Picture(content, "")), of_timm(content, oracle))


def test_large_evaluation_images_are_warped_whole():
    expected = Image.fromarray(photo()).resize((384, 384), Image.Resampling.BICUBIC)
    got = transform(eval_drawer(config_of("data.image_size=384").data))(Picture(photo(), ""))
    assert np.array_equal(got, np.asarray(expected))


def test_no_augmentation_is_the_evaluation_transform():
    config = config_of("augment=none")
    picture = Picture(photo(), "")
    assert np.array_equal(
        train_transform(config.augment, config.data)(picture), transform(eval_drawer(config.data))(picture)
    )  # fmt: skip


def test_keys_are_unrelated_and_seed_every_global_generator():
    assert len({key(a, b) for a in range(30) for b in range(30)}) == 900
    seeded(1, 2, 3)
    first = random.random(), np.random.rand(), torch.rand(1).item()
    seeded(1, 2, 3)
    assert first == (random.random(), np.random.rand(), torch.rand(1).item())
