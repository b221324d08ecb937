"""A C++ file of the package → a library: compiled once a machine, in a second or two, and kept in the user's cache."""

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

PROCESSOR = (
    ("-march=native", "-mprefer-vector-width=512") if platform.machine() in ("x86_64", "AMD64") else ("-mcpu=native",)
)
"""Flags that let the compiler use all that this processor can do."""


def library(source: Path, flags: Sequence[str]) -> ctypes.CDLL | None:
    """Return what `source` compiles to with these flags, compiling it if nobody has; None where that is not possible.

    The compiler is `$CXX`, else the first of c++, g++ and clang++ on the path.
    """
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        return None
    try:
        # What the compiler is and what this processor can do: a home directory may be that of another machine too.
        macros = subprocess.run(
            [*compiler.split(), *flags, "-dM", "-E", "-x", "c++", os.devnull],
            capture_output=True, check=True, stdin=subprocess.DEVNULL, timeout=60,
        ).stdout  # fmt: skip
        name = hashlib.sha256(b"\0".join([source.read_bytes(), macros, " ".join(flags).encode()])).hexdigest()[:16]
        with tempfile.TemporaryDirectory(prefix="dytrun-") as scratch:
            kept = _cache() or Path(scratch)
            file = kept / f"{source.stem}-{name}.so"
            command = [*compiler.split(), *flags, str(source)]
            if not file.exists():
                _compile(command, file)
            try:
                return ctypes.CDLL(str(file))
            except OSError:  # cut off when the machine went down
                _compile(command, file)
                return ctypes.CDLL(str(file))
    except (OSError, subprocess.SubprocessError):
        return None


def _compile(command: list[str], file: Path) -> None:
    """Compile whole or not at all, whoever else is at it."""
    number, name = tempfile.mkstemp(prefix=f"{file.name}.", dir=file.parent)
    os.close(number)
    part = Path(name)
    try:
        subprocess.run([*command, "-o", name], capture_output=True, check=True, stdin=subprocess.DEVNULL, timeout=300)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def _cache() -> Path | None:
    """Return the folder of what was compiled, if it can be written, and by nobody else: what is there will be run."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    try:
        (folder := Path(home) / "dytrun").mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, RuntimeError):
        return None
    is_ours = found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return folder if is_ours and os.access(folder, os.W_OK) else None
