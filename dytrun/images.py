"""One image file → an RGB image, or why there is none.

Always three channels of eight bits: alpha and transparency are dropped, and the EXIF orientation is not applied, as in
torchvision and timm. Of an animation it is the first frame. The content tells the format, not the name.
"""

import errno
import functools
import os
import stat
import time
import warnings
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from dytrun.errors import first_line

MOST_PIXELS = 89_478_485
"""Larger images are refused unread: Pillow's limit, from which on it warns."""
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF")
# Before a file that cannot be got at is tried again: enough for a server that takes its time, not for one that is gone.
_WAITS_S = (0.1, 0.4, 1.6)
# What no waiting mends.
_FINAL = {errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO}
# So many files in a row that stayed away: it is the disk that is gone, and waiting for each of them would take hours.
_PATIENT_WITH = 3


class Unreadable(Exception):
    """A file that gives no image."""

    def __init__(self, path: str, why: str, stayed_away: bool = False):
        super().__init__(f"{path}: cannot be read as an image ({why}); mend or remove it")
        self.path, self.why = path, why
        self.stayed_away = stayed_away
        """Whether it is the file that could not be got at, and not its content that is no image."""


class ImageFiles:
    """Index → image, from a list of files; a file that cannot be got at is tried again for some seconds."""

    def __init__(self, paths: Sequence[str]):
        self._paths = paths
        self._given_up: set[int] = set()
        self._in_a_row = 0

    def __call__(self, index: int) -> Image.Image:
        """Read an image.

        Raises:
            Unreadable: it is none, or stayed away.
        """
        # A file that was waited for in vain is tried once in each later epoch: what is read depends on the file alone.
        is_patient = self._in_a_row < _PATIENT_WITH and index not in self._given_up
        try:
            image = read_image(self._paths[index], _WAITS_S if is_patient else ())
        except Unreadable as error:
            if error.stayed_away:
                self._given_up.add(index)
                self._in_a_row += 1
            raise
        self._in_a_row = 0
        return image


def read_image(path: str, waits_s: Sequence[float] = _WAITS_S) -> Image.Image:
    """Read a file as an RGB image.

    Args:
        path: of a regular file.
        waits_s: seconds before each further try, where the file could not be got at (no such file, input or output
            error, too many open files, …). A content that is no image is not tried again.

    Raises:
        Unreadable: truncated, empty, no image, more than `MOST_PIXELS`, of unknown range, not there, not permitted, …
    """
    _heed_warnings()
    waits = list(waits_s)
    while True:
        try:
            return _decoded(path)
        except OSError as error:
            if error.errno in _FINAL or not waits:
                raise Unreadable(path, error.strerror or first_line(error), error.errno not in _FINAL) from None
            time.sleep(waits.pop(0))


def _decoded(path: str) -> Image.Image:
    """Decode a file; an OSError is one of the file system, never of the content."""
    with open(path, "rb", opener=_open_at_once) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise Unreadable(path, "no regular file")
        try:
            with Image.open(file, formats=_FORMATS) as image:
                return _rgb(image)
        except MemoryError:
            raise  # a limit on pixels was kept, so it is the machine that is ill
        except Exception as error:  # Pillow's decoders raise nearly anything on hostile bytes
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise Unreadable(path, _why(error, file)) from None


def _why(error: Exception, file: BinaryIO) -> str:
    if isinstance(error, UnidentifiedImageError):
        is_empty = os.fstat(file.fileno()).st_size == 0
        return "the file is empty" if is_empty else f"its content is none of {', '.join(_FORMATS)}"
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
