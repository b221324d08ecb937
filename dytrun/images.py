"""The bytes of an image file → an RGB image, or why there is none.

Always three channels of eight bits: alpha and transparency are dropped, and the EXIF orientation is not applied, as in
torchvision and timm. Of an animation it is the first frame. The content tells the format, not the name.

Plain JPEGs are decoded by `jpeg.py`, anything else by Pillow, and so is a JPEG that the fast decoder complains of:
Pillow's verdict counts.
"""

import errno
import functools
import io
import os
import stat
import time
import warnings
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from dytrun import jpeg
from dytrun.errors import first_line
from dytrun.pixels import Pixels

MOST_PIXELS = 89_478_485
"""Larger images are refused unread: Pillow's limit, from which on it warns."""
MOST_BYTES = 8 * MOST_PIXELS
"""No image of so many pixels needs more, at 16 bits a channel and nothing compressed."""
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF")
# Before a file that cannot be got at is tried again: enough for a server that takes its time, not for one that is gone.
_WAITS_S = (0.1, 0.4, 1.6)
# What no waiting mends.
_FINAL = {errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO}
# So many files in a row that stayed away: it is the disk that is gone, and waiting for each of them would take hours.
_PATIENT_WITH = 3

Content = bytes | memoryview | UInt8[np.ndarray, "..."]
"""Of a file; or pixels (H, W) or (H, W, 3) of an image that is in memory."""


class Unreadable(Exception):
    """A file that gives no image."""

    def __init__(self, path: str, why: str, stayed_away: bool = False):
        super().__init__(f"{path}: cannot be read as an image ({why}); mend or remove it")
        self.path, self.why = path, why
        self.stayed_away = stayed_away
        """Whether it is the file that could not be got at, and not its content that is no image."""


class ImageFiles:
    """Index → the bytes of a file; one that cannot be got at is tried again for some seconds."""

    def __init__(self, paths: Sequence[str]):
        self._paths = paths
        self._given_up: set[int] = set()
        self._in_a_row = 0

    def __call__(self, index: int) -> bytes:
        """Read a file.

        Raises:
            Unreadable: it stayed away, is no file, or too large for an image.
        """
        # A file that was waited for in vain is tried once in each later epoch: what is read depends on the file alone.
        is_patient = self._in_a_row < _PATIENT_WITH and index not in self._given_up
        try:
            content = _read(self._paths[index], _WAITS_S if is_patient else ())
        except Unreadable as error:
            if error.stayed_away:
                self._given_up.add(index)
                self._in_a_row += 1
            raise
        self._in_a_row = 0
        return content


class Picture:
    """An image that is open: its size is known, its pixels are decoded when they are asked for."""

    def __init__(self, content: Content, path: str):
        """Open an image; `path` is what an error calls it.

        Raises:
            Unreadable: empty, no image, more than `MOST_PIXELS`, of unknown range, truncated (found here or later).
        """
        self._content, self._path = content, path
        self._pixels: Pixels | None = None
        self._header = None if isinstance(content, np.ndarray) else jpeg.header(content)
        if self._header is not None and self._header.height * self._header.width <= MOST_PIXELS:
            self.height, self.width, _ = self._header
            return
        if not isinstance(content, np.ndarray):
            content = _by_pillow(content, path)
        self._pixels = content if content.ndim == 3 else np.repeat(content[..., None], 3, axis=2)
        self.height, self.width = self._pixels.shape[:2]

    @property
    def jpeg(self) -> bytes | memoryview | None:
        """The file, if it is a plain JPEG; None where the pixels are there already."""
        return None if self._pixels is not None or isinstance(self._content, np.ndarray) else self._content

    def pixels(self) -> Pixels:
        """Return the whole image.

        Raises:
            Unreadable: the content is damaged.
        """
        if self._pixels is None:
            assert not isinstance(self._content, np.ndarray)
            found = jpeg.whole(self._content)
            self._pixels = _by_pillow(self._content, self._path) if found is None else found
        return self._pixels

    def part(self, top: int, left: int, height: int, width: int) -> Pixels:
        """Return a part of the image; of a JPEG no more than that is decoded.

        Raises:
            Unreadable: the content is damaged, there or above; what lies below is not looked at.
        """
        if self._pixels is None and self._header is not None and not isinstance(self._content, np.ndarray):
            found = jpeg.part(self._content, self._header, (top, left, height, width))
            if found is not None:
                return found
        return self.pixels()[top : top + height, left : left + width]


def _read(path: str, waits_s: Sequence[float]) -> bytes:
    """Read a file; wait some seconds before each further try, where it could not be got at."""
    waits = list(waits_s)
    while True:
        try:
            with open(path, "rb", opener=_open_at_once) as file:
                facts = os.fstat(file.fileno())
                if not stat.S_ISREG(facts.st_mode):
                    raise Unreadable(path, "no regular file")
                if facts.st_size > MOST_BYTES:
                    raise Unreadable(path, f"{facts.st_size} bytes are too many for an image")
                return file.read()
        except OSError as error:
            if error.errno in _FINAL or not waits:
                raise Unreadable(path, error.strerror or first_line(error), error.errno not in _FINAL) from None
            time.sleep(waits.pop(0))


def _by_pillow(content: bytes | memoryview, path: str) -> Pixels:
    _heed_warnings()
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            return np.asarray(_rgb(image))
    except MemoryError:
        raise  # a limit on pixels was kept, so it is the machine that is ill
    except Exception as error:  # Pillow's decoders raise nearly anything on hostile bytes
        raise Unreadable(path, _why(error, len(content))) from None


def _why(error: Exception, num_bytes: int) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "the file is empty" if num_bytes == 0 else f"its content is none of {', '.join(_FORMATS)}"
    return first_line(error)


def _rgb(image: Image.Image) -> Image.Image:
    """Return an 8-bit RGB image; Pillow would cut 16-bit grey off at 255 instead of scaling it."""
    if 0 in image.size:
        raise ValueError(f"{image.width}×{image.height} pixels")
    # A PGM of 16 bits comes in 32, its range known all the same.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"{image.mode}: 32 bits a pixel, of unknown range")
    # Dropped either way, but with a warning for some palettes.
    image.info.pop("transparency", None)
    return image.convert("RGB")


def _open_at_once(path: str, flags: int) -> int:
    """A named pipe would be waited for until somebody writes into it."""
    return os.open(path, flags | os.O_NONBLOCK)


@functools.cache
def _heed_warnings() -> None:
    """Make Pillow's warning of a decompression bomb an error, and let it say nothing of broken EXIF, unused here."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
