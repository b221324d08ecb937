"""The pixels of both implementations against Pillow's own functions, bit for bit, over many sizes, matrices, factors."""


import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dytrun import pixels

IMPLEMENTATIONS = (pytest.param("native", marks=pytest.mark.native), "pillow")
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
FILL = (124, 116, 104)


@pytest.fixture(params=IMPLEMENTATIONS)
def engine(request, monkeypatch):
    """Have one of the two compute; the compiled one is left out where no compiler is."""
    monkeypatch.setattr(pixels, "_is_native_wanted", request.param == "native")
    if pixels.implementation() != request.param:
        pytest.skip("no C++ compiler")
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


SIDE = st.one_of(st.integers(1, 12), st.integers(1, 90), st.sampled_from((224, 375)))


@pytest.mark.parametrize("interpolation", RESAMPLING)
@settings(max_examples=150)
@given(size=st.tuples(SIDE, SIDE), new_size=st.tuples(SIDE, SIDE), seed=st.integers(0, 2**32))
def resizes(interpolation, size, new_size, seed):
    source = np.random.default_rng(seed)
    whole = drawn(source, size[0] + 5, size[1] + 4)
    top, left = source.integers(0, 6), source.integers(0, 5)
    part = whole[top : top + size[0], left : left + size[1]]
    if source.random() < 0.2:
        new_size = (size[0], new_size[1])
    if source.random() < 0.2:
        new_size = (new_size[0], size[1])
    expected = np.asarray(Image.fromarray(part).resize(new_size[::-1], RESAMPLING[interpolation]))
    same(pixels.resized(part, new_size, interpolation=interpolation), expected)
    y, x = source.integers(0, new_size[0]), source.integers(0, new_size[1])
    rows, columns = source.integers(1, new_size[0] - y + 1), source.integers(1, new_size[1] - x + 1)
    window = (int(y), int(x), int(rows), int(columns))
    same(
        pixels.resized(part, new_size, window, interpolation),
        np.ascontiguousarray(expected[y : y + rows, x : x + columns]),
    )


@pytest.mark.parametrize("interpolation", RESAMPLING)
def test_resizing_any_part_to_any_size_gives_what_pillow_gives(engine, interpolation):
    resizes(interpolation)
