"""The part of a JPEG that a crop keeps is that part of the whole, to the bit; what is damaged is never guessed."""

import io
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, _imaging

from dytrun import jpeg, native
from dytrun.images import Picture, Unreadable

NATIVE = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")


def encoded(pixels: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **options)
    return file.getvalue()


def by_pillow(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


@st.composite
def jpegs(draw) -> bytes:
    """Noise and smooth pictures, in all the ways that Pillow writes, of sizes that are no multiples of anything."""
    height, width = draw(st.integers(1, 130)), draw(st.integers(1, 130))
    source = np.random.default_rng(draw(st.integers(0, 2**32)))
    pixels = source.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if draw(st.booleans()):
        small = Image.fromarray(pixels[: max(1, height // 8), : max(1, width // 8)])
        pixels = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))
    if draw(st.integers(0, 5)) == 0:
        return encoded(pixels[..., 0], quality=draw(st.integers(5, 100)))
    options = {"progressive": True} if draw(st.booleans()) else {}
    if draw(st.booleans()):
        options["restart_marker_rows"] = 1
    subsampling = draw(st.sampled_from(["4:4:4", "4:2:2", "4:2:0"]))
    return encoded(pixels, quality=draw(st.integers(5, 100)), subsampling=subsampling, **options)


@NATIVE
@pytest.mark.native
@settings(max_examples=300, deadline=None)
@given(content=jpegs(), data=st.data())
def test_a_part_is_that_part_of_what_pillow_decodes(content, data):
    whole, header = by_pillow(content), jpeg.header(content)
    assert (header.height, header.width) == whole.shape[:2]
    for _ in range(4):
        height, width = data.draw(st.integers(1, header.height)), data.draw(st.integers(1, header.width))
        top, left = data.draw(st.integers(0, header.height - height)), data.draw(st.integers(0, header.width - width))
        found = jpeg.part(memoryview(content), header, (top, left, height, width))
        assert np.array_equal(found, whole[top : top + height, left : left + width])
    assert np.array_equal(jpeg.whole(content), whole)


# 4:4:0 and 4:1:1, which Pillow reads and does not write: the subsampling stands in the header alone, and the same coded
# data fills another number of blocks. Only sizes are compared here, so damage does not matter.
@pytest.mark.parametrize(("factors", "unit"), [(0x12, (16, 8)), (0x41, (8, 32))])
def test_rare_subsamplings_are_known(factors, unit):
    content = bytearray(encoded(np.zeros((64, 64, 3), np.uint8), subsampling="4:2:0"))
    start = content.index(b"\xff\xc0")
    content[start + 11] = factors
    assert jpeg.header(bytes(content)) == (64, 64, unit)


def test_what_is_no_plain_jpeg_is_left_to_pillow():
    pixels = np.zeros((20, 30, 3), np.uint8)
    content = encoded(pixels)
    assert jpeg.header(content) == (20, 30, (16, 16))
    for other in (b"", content[:-2], content[:-300], b"\x89PNG" + content, content[:2], bytes(40)):
        assert jpeg.header(other) is None
    cmyk = io.BytesIO()
    Image.new("CMYK", (8, 8)).save(cmyk, "JPEG")
    assert jpeg.header(cmyk.getvalue()) is None
    assert np.array_equal(Picture(cmyk.getvalue(), "x").part(1, 2, 3, 4), by_pillow(cmyk.getvalue())[1:4, 2:6])


@NATIVE
@pytest.mark.native
def test_damage_gives_pillows_pixels_or_its_refusal():
    """Wherever the damage is; the fast decoders complain of it, and Pillow says what there is."""
    rng = np.random.default_rng(0)
    whole = encoded(rng.integers(0, 256, (96, 96, 3), dtype=np.uint8), quality=90)
    refused = complained = 0
    for _ in range(300):
        content = bytearray(whole)
        start = int(rng.integers(2, len(content) - 40))
        content[start : start + int(rng.integers(1, 30))] = rng.integers(0, 256, 20, dtype=np.uint8).tobytes()
        content = bytes(content) + b"\xff\xd9"
        try:
            expected = by_pillow(content)
        except Exception:
            refused += 1
            expected = None
        for box in ((0, 0, 96, 96), (40, 0, 56, 30)):
            top, left, height, width = box
            try:
                found = Picture(content, "x").part(*box)
            except Unreadable:
                assert expected is None
                continue
            complained += jpeg.whole(content) is None
            if expected is not None and expected.shape[:2] == (96, 96):
                assert np.array_equal(found, expected[top : top + height, left : left + width])
    assert refused > 5 < complained


@NATIVE
@pytest.mark.native
def test_a_header_that_does_not_fit_is_refused():
    content = encoded(np.zeros((40, 40, 3), np.uint8))
    header = jpeg.header(content)
    assert jpeg.part(content, header._replace(width=800), (0, 0, 10, 700)) is None
    assert jpeg.part(content, header._replace(height=30), (0, 0, 30, 40)) is None
    assert jpeg.part(content[:200], header, (0, 0, 40, 40)) is None
    assert jpeg.part(b"nothing of the kind", header, (0, 0, 40, 40)) is None


@NATIVE
@pytest.mark.native
def test_a_library_with_another_interface_is_not_used(tmp_path):
    other = tmp_path / "jpeg.cpp"
    other.write_text(jpeg._SOURCE.read_text().replace("VERSION = 62", "VERSION = 80"))
    for source, is_used in ((jpeg._SOURCE, True), (other, False)):
        library = native.library(source, jpeg._FLAGS)
        assert library is not None
        assert bool(library.jpeg_open(_imaging.__file__.encode())) is is_used


def test_without_parts_the_whole_is_decoded(monkeypatch):
    content = encoded(np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8))
    monkeypatch.setattr(jpeg, "_are_parts_wanted", False)
    assert jpeg.described() == "simplejpeg"
    assert np.array_equal(Picture(content, "x").part(10, 20, 30, 40), by_pillow(content)[10:40, 20:60])
