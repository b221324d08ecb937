"""Short digests, by which two things are known to be the same."""

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dytrun.errors import UserError


def values_digest(values: Mapping[str, Any]) -> str:
    """Return eight hex digits of plain JSON values; the order of keys does not count."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def file_digest(path: str) -> str:
    """Return twelve hex digits of a file's SHA-256.

    Raises:
        UserError: it cannot be read.
    """
    if os.path.isdir(path):
        found = sorted(Path(path).glob("checkpoints/step-*/model.safetensors"))
        hint = f"a file, such as {found[-1]}" if found else "a file of weights"
        raise UserError(f"init_from: {path} is a directory; give {hint}")
    try:
        stat = os.stat(path)
        return _file_digest(path, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise UserError(f"init_from: {path} cannot be read ({error.strerror}); give a file of weights") from None


@functools.lru_cache(maxsize=4)
def _file_digest(path: str, size: int, mtime_ns: int) -> str:
    """Read a file of so many bytes that was changed at that time; both are there to tell it from another one."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]
