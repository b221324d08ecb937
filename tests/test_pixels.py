"""Both implementations against Pillow's own functions, bit for bit, over many sizes, matrices and factors."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from torchvision import transforms

from dytrun import native, pixels

ENGINES = (pytest.param("native", marks=pytest.mark.native), pytest.param("plain", marks=pytest.mark.native), "pillow")
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
FILL = (124, 116, 104)


@pytest.fixture(params=ENGINES)
def engine(request, monkeypatch):
    """Have one compute: what is compiled for this processor; for any of its kind, as elsewhere; or Pillow."""
    plain = tuple(flag for flag in pixels._flags if flag not in native.PROCESSOR)
    monkeypatch.setattr(pixels, "_flags", {"native": pixels._flags, "plain": plain, "pillow": None}[request.param])
    if request.param != "pillow" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler")
    assert pixels.implementation() == ("pillow" if request.param == "pillow" else "native"), "it does not compile"
    return request.param


def noise(source: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return values of all levels, the ends of the scale more often: there results are clipped."""
    values = source.integers(-64, 320, (height, width, 3)).clip(0, 255)
    return values.astype(np.uint8)


def photograph(source: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return slow waves with edges, a flat patch and a little noise: what a picture looks like."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = sum(
        source.normal(0, 60, 3) * np.sin(source.normal(0, 9) * x + source.normal(0, 9) * y + c)[..., None]
        for c in range(4)
    )
    image = 128 + waves + 50 * (x + y > 1)[..., None] + source.normal(0, 3, (height, width, 3))
    image[: height // 3, : width // 4] = 255
    return image.clip(0, 255).astype(np.uint8)


def drawn(source: np.random.Generator, height: int, width: int) -> np.ndarray:
    return (noise if source.random() < 0.5 else photograph)(source, height, width)


def same(found: np.ndarray, expected: Image.Image | np.ndarray) -> None:
    """Compare, and require what callers build on: an array of its own that can be written."""
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous
    assert found.flags.writeable
    np.testing.assert_array_equal(found, np.asarray(expected))


def side(source: np.random.Generator) -> int:
    return int(source.choice((source.integers(1, 13), source.integers(1, 100), 224, 375), p=(0.35, 0.35, 0.2, 0.1)))


@pytest.mark.parametrize("interpolation", RESAMPLING)
def test_resizing_any_part_to_any_size(engine, interpolation):
    """Up and down, by much and by nothing, from 1×1 on; of a part of a larger array; a part of the result."""
    source = np.random.default_rng(0)
    for _ in range(400):
        height, width, *size = (side(source) for _ in range(4))
        whole = drawn(source, height + 5, width + 4)
        top, left = source.integers(0, 6), source.integers(0, 5)
        part = whole[top : top + height, left : left + width]
        if source.random() < 0.2:
            size[source.integers(2)] = part.shape[source.integers(2)]
        expected = np.asarray(Image.fromarray(part).resize(size[::-1], RESAMPLING[interpolation]))
        same(pixels.resized(part, tuple(size), interpolation=interpolation), expected)
        y, x = (int(source.integers(0, n)) for n in size)
        rows, columns = int(source.integers(1, size[0] - y + 1)), int(source.integers(1, size[1] - x + 1))
        window = (y, x, rows, columns)
        same(pixels.resized(part, tuple(size), window, interpolation), expected[y : y + rows, x : x + columns])


def test_resizing_what_a_photograph_and_a_poster_are(engine):
    """Shapes with many taps a pixel, and with few."""
    source = np.random.default_rng(1)
    for height, width, size in ((1, 3000, (7, 5)), (2500, 2, (3, 300)), (900, 1200, (31, 33)), (2, 2, (300, 500))):
        image = drawn(source, height, width)
        for interpolation, how in RESAMPLING.items():
            expected = Image.fromarray(image).resize(size[::-1], how)
            same(pixels.resized(image, size, interpolation=interpolation), expected)


def test_strange_memory(engine):
    """Every second pixel, upside down, rows and columns swapped: what is not in order is copied first."""
    image = noise(np.random.default_rng(2), 40, 60)
    for view in (image[::2], image[:, ::2], image[::-1], image[:, ::-1], image.transpose(1, 0, 2), image[..., ::-1]):
        plain = Image.fromarray(np.ascontiguousarray(view))
        same(pixels.resized(view, (30, 20)), plain.resize((20, 30), Image.Resampling.BICUBIC))
        same(pixels.flipped(view), plain.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
        same(pixels.sharpened(view, 0.3), ImageEnhance.Sharpness(plain).enhance(0.3))
        same(pixels.color(view, 0.3), ImageEnhance.Color(plain).enhance(0.3))
        table = np.arange(768, dtype=np.uint8).reshape(256, 3).T
        same(pixels.mapped(view, table), plain.point(table.ravel().tolist()))
        assert pixels.histogram(view).ravel().tolist() == plain.histogram()
        shear = (1, 0.1, 0, 0, 1, 0)
        expected = plain.transform(plain.size, Image.Transform.AFFINE, shear, Image.Resampling.BICUBIC, fillcolor=FILL)
        same(pixels.warped(view, shear, FILL), expected)


@pytest.mark.parametrize(
    ("size", "window"),
    [((0, 5), None), ((5, 5), (0, 0, 6, 5)), ((5, 5), (1, 0, 5, 5)), ((5, 5), (0, -1, 2, 2)), ((5, 5), (0, 0, 0, 2))],
)
def test_a_part_that_is_not_there(engine, size, window):
    with pytest.raises(ValueError, match="no part"):
        pixels.resized(noise(np.random.default_rng(3), 9, 9), size, window)


@pytest.mark.parametrize("interpolation", RESAMPLING)
def test_warping_by_any_matrix(engine, interpolation):
    """Shears, translations, rotations as RandAugment has them; any others, most of them far outside the image."""
    source = np.random.default_rng(4)
    for step in range(400):
        height, width = side(source), side(source)
        image = drawn(source, height, width)
        matrix = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
        kind = step % 5
        if kind < 2:
            matrix[(1, 3)[kind]] = source.uniform(-0.3, 0.3)
        elif kind == 2:
            matrix[source.choice((2, 5))] = source.choice((-1, 1)) * source.choice((0.5, 1, 100, source.uniform(0, 50)))
        elif kind == 3:
            matrix = list(pixels.rotation((height, width), source.uniform(-30, 30)))
        else:
            matrix = list(source.normal(0, 1, 6) * (1, 1, width, 1, 1, height))
        fill = tuple(int(value) for value in source.integers(0, 256, 3))
        plain = Image.fromarray(image)
        expected = plain.transform(
            plain.size, Image.Transform.AFFINE, matrix, resample=RESAMPLING[interpolation], fillcolor=fill
        )
        same(pixels.warped(image, tuple(map(float, matrix)), fill, interpolation), expected)


def test_turning_by_any_angle(engine):
    """Of a quarter and a half turn Pillow copies pixels; of those between it makes a matrix."""
    source = np.random.default_rng(5)
    for size in ((1, 1), (5, 5), (32, 32), (224, 224), (7, 20), (64, 33)):
        image = drawn(source, *size)
        for degrees in (
            0.0,
            90.0,
            180.0,
            270.0,
            360.0,
            -90.0,
            -180.0,
            450.0,
            30.0,
            -30.0,
            1e-9,
            *source.uniform(-200, 200, 6),
        ):
            for interpolation, how in RESAMPLING.items():
                expected = Image.fromarray(image).rotate(degrees, how, fillcolor=FILL)
                same(pixels.warped(image, pixels.rotation(size, degrees), FILL, interpolation), expected)


FACTORS = (0.0, 1.0, 2.0, 0.1, 0.9, 1.9, 1 / 3, 0.05, 0.9999999, 1.0000001, 1e-9, -0.5, 20.0)


def test_blending_by_any_factor(engine):
    """Colour and sharpness; brightness and contrast as tables. Images that have no inside have nothing to smooth."""
    source = np.random.default_rng(6)
    factors = (*FACTORS, *source.uniform(0, 2, 60))
    for number, factor in enumerate(factors):
        height, width = ((1, 1), (1, 9), (2, 30), (3, 3), (5, 2), (side(source), side(source)))[number % 6]
        image = drawn(source, height, width)
        plain = Image.fromarray(image)
        same(pixels.color(image, factor), ImageEnhance.Color(plain).enhance(factor))
        same(pixels.sharpened(image, factor), ImageEnhance.Sharpness(plain).enhance(factor))
        for other, blender in ((0, ImageEnhance.Brightness), (pixels.gray_mean(image), ImageEnhance.Contrast)):
            table = np.stack([pixels.blend_table(other, factor)] * 3)
            same(pixels.mapped(image, table), blender(plain).enhance(factor))


def test_every_pair_of_levels_blends_as_in_pillow():
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None], (256, 1))
    for factor in (*FACTORS, *np.random.default_rng(7).uniform(-1, 3, 40)):
        for other in range(0, 256, 5):
            expected = Image.blend(Image.new("L", (1, 256), other), Image.fromarray(ramp.copy()), factor)
            same(pixels.blend_table(other, factor), np.asarray(expected).ravel())


def test_every_colour_is_as_gray_as_in_pillow(engine):
    """All 16 million colours, 64 steps of red at a time."""
    levels = np.arange(256, dtype=np.uint8)
    for red in range(0, 256, 64):
        image = np.stack(np.meshgrid(levels[red : red + 64], levels, levels, indexing="ij"), -1).reshape(2048, 2048, 3)
        gray = Image.fromarray(image).convert("L")
        same(pixels.color(image, 0.0), np.repeat(np.asarray(gray)[..., None], 3, axis=2))
        assert pixels.gray_mean(image) == int(np.asarray(gray).mean() + 0.5)


def test_tables_and_counts(engine):
    source = np.random.default_rng(8)
    for _ in range(60):
        image = drawn(source, side(source), side(source))
        plain = Image.fromarray(image)
        table = source.integers(0, 256, (3, 256), dtype=np.uint8)
        same(pixels.mapped(image, table), plain.point(table.ravel().tolist()))
        counts = pixels.histogram(image)
        assert counts.dtype == np.int64
        assert counts.ravel().tolist() == plain.histogram()
        same(pixels.flipped(image), plain.transpose(Image.Transpose.FLIP_LEFT_RIGHT))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_normalising_gives_the_floats_of_torchvision(engine, memory_format):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    step = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    for size in ((1, 1), (16, 16), (16, 17), (3, 31)):
        batch = np.stack([noise(np.random.default_rng(seed), *size) for seed in range(5)])
        expected = torch.stack([step(Image.fromarray(image)) for image in batch])
        out = torch.full(expected.shape, torch.nan).to(memory_format=memory_format)
        pixels.normalised(batch, mean, std, out.numpy())
        assert torch.equal(out, expected)
        wide = torch.full((*expected.shape[:3], 40), torch.nan)
        pixels.normalised(batch, mean, std, wide.numpy()[..., : size[1]])
        assert torch.equal(wide[..., : size[1]], expected)
        assert wide[..., size[1] :].isnan().all()


def test_threads_do_not_meet(engine):
    source = np.random.default_rng(9)
    images = [drawn(source, int(source.integers(20, 300)), int(source.integers(20, 300))) for _ in range(48)]

    def both(image: np.ndarray) -> np.ndarray:
        return pixels.warped(pixels.resized(image, (96, 96)), pixels.rotation((96, 96), 20.0), FILL)

    with ThreadPoolExecutor(4) as pool:
        for image, found in zip(images, pool.map(both, images), strict=True):
            np.testing.assert_array_equal(found, both(image))


_WRONG = """
import sys
import numpy as np
from dytrun import pixels
print(pixels.implementation())
image, table = np.zeros((4, 4, 3), np.uint8), np.zeros((3, 256), np.uint8)
for call in (
    lambda: pixels.resized(image.astype(np.float32), (2, 2)),
    lambda: pixels.resized(image[..., :1], (2, 2)),
    lambda: pixels.flipped(image[:0]),
    lambda: pixels.warped(image[0], (1, 0, 0, 0, 1, 0), (0, 0, 0)),
    lambda: pixels.mapped(image, table[0]),
    lambda: pixels.mapped(image, table.astype(np.int64)),
    lambda: pixels.normalised(image[None], (0, 0, 0), (1, 1, 1), np.zeros((1, 3, 4, 3), np.float32)),
):
    try:
        call()
    except ValueError as error:
        print("refused:", error)
print("torch" in sys.modules)
"""


@pytest.mark.parametrize("where", [pytest.param("native", marks=pytest.mark.native), "pillow"])
def test_what_is_no_image_is_refused_without_torch(where):
    """A process of its own, because here every argument is checked against its annotation before."""
    env = os.environ | ({"CXX": "/nowhere/c++"} if where == "pillow" else {})
    done = subprocess.run([sys.executable, "-c", _WRONG], env=env, capture_output=True, text=True, check=True)
    who, *refused, has_torch = done.stdout.splitlines()
    assert who == where or not any(map(shutil.which, ("c++", "g++", "clang++")))
    assert len(refused) == 7, refused
    assert all(line.startswith("refused: ") for line in refused)
    assert has_torch == "False", "a loader's process would pay for it"
