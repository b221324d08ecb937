"""Plain JPEGs, by the fastest decoder there is. All of them are libjpeg-turbo, and give the same pixels to the bit.

`jpeg.cpp` has the libjpeg-turbo that Pillow brings decode only the part of an image that a crop keeps. Where that is
not to be had (no C++ compiler, another libjpeg), the whole is decoded: by simplejpeg, by OpenCV where that is missing,
by Pillow where both are.
"""

import contextlib
import ctypes
import functools
import importlib.util
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, _imaging

from dytrun import native
from dytrun.pixels import Pixels

_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = ("-O2", "-std=c++17", "-fPIC", "-shared")
# Pixels that are coded together, (height, width), by the name of the subsampling; of others the whole is decoded.
_UNITS = {"444": (8, 8), "422": (8, 16), "420": (16, 16), "440": (16, 8), "411": (8, 32), "Gray": (8, 8)}
# A JPEG that is whole has its end marker there. Within coded data these two bytes do not occur.
_END, _END_WITHIN = b"\xff\xd9", 1024
# Tests set it to False and have the whole decoded.
_are_parts_wanted = True

Encoded = bytes | memoryview


class Header(NamedTuple):
    """What a JPEG's header tells."""

    height: int
    width: int
    unit: tuple[int, int] | None
    """Pixels that are coded together, (height, width); None where no part can be decoded."""


class _Part(ctypes.Structure):
    """See jpeg.cpp."""

    _fields_ = tuple(
        (name, ctypes.c_int)
        for name in ("top", "left", "height", "width", "image_height", "image_width", "unit_height", "unit_width",
                     "out_left", "out_width")
    )  # fmt: skip


@functools.cache
def decoder() -> str:
    """Name what decodes a whole JPEG here: simplejpeg, opencv or pillow."""
    names = {"simplejpeg": "simplejpeg", "cv2": "opencv"}
    return next((name for module, name in names.items() if importlib.util.find_spec(module)), "pillow")


def described() -> str:
    """Say what decodes what a crop keeps."""
    return "libjpeg-turbo, parts" if decoder() == "simplejpeg" and _library() is not None else decoder()


def header(content: Encoded) -> Header | None:
    """Read the header of a plain JPEG: of one or three channels, and whole; None of anything else."""
    if bytes(content[:3]) != b"\xff\xd8\xff" or _END not in bytes(content[-_END_WITHIN:]):
        return None
    try:
        if decoder() == "simplejpeg":
            import simplejpeg

            height, width, colors, subsampling = simplejpeg.decode_jpeg_header(content)
            plain = Header(int(height), int(width), _UNITS.get(subsampling)) if colors in ("YCbCr", "Gray") else None
        else:
            with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
                is_plain = image.mode in ("RGB", "L") and decoder() == "opencv"
                plain = Header(image.height, image.width, None) if is_plain else None
    except Exception:  # it is not plain then; what it is, is for Pillow to say
        return None
    return plain if plain and plain.height > 0 < plain.width else None


def whole(content: Encoded) -> Pixels | None:
    """Decode a plain JPEG; None where the decoder complains of it."""
    if decoder() == "simplejpeg":
        import simplejpeg

        with contextlib.suppress(ValueError):
            return simplejpeg.decode_jpeg(content, "RGB")
        return None
    import cv2

    cv2.setNumThreads(0)
    return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)


def part(content: Encoded, of: Header, box: tuple[int, int, int, int]) -> Pixels | None:
    """Decode the part (top, left, height, width) of a plain JPEG alone; None where that is not to be had."""
    library = _library()
    if library is None or of.unit is None:
        return None
    _, left, height, width = box
    room = np.empty(height * min(of.width, width + 3 * of.unit[1]) * 3, np.uint8)
    row = np.empty(of.width * 3, np.uint8)
    data, asked = np.frombuffer(content, np.uint8), _Part(*box, of.height, of.width, *of.unit)
    if not library.jpeg_part(
        data.ctypes.data, data.size, ctypes.byref(asked), room.ctypes.data, room.size, row.ctypes.data
    ):
        return None
    found = room[: height * asked.out_width * 3].reshape(height, asked.out_width, 3)
    return found[:, left - asked.out_left : left - asked.out_left + width]


def _library() -> ctypes.CDLL | None:
    return _opened() if _are_parts_wanted else None


@functools.cache
def _opened() -> ctypes.CDLL | None:
    library = native.library(_SOURCE, _FLAGS)
    if library is None or not library.jpeg_open(_imaging.__file__.encode()):
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.jpeg_part.argtypes = (pointer, number, ctypes.POINTER(_Part), pointer, number, pointer)
    return library
