"""metrics.jsonl: every record whole, once and on the disk, whatever the disk does."""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from dytrun.errors import first_line
from dytrun.records import Position


class Journal:
    """A file of lines that never holds part of a line; what a full disk does not take waits in memory."""

    def __init__(self, path: Path, say: Callable[[str], None]):
        """Open the file to go on after what it holds; `say` gets a line whenever the disk does not do its work."""
        self._path, self._say = path, say
        self._waiting: list[str] = []
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._size = os.fstat(self._file).st_size

    def append(self, line: str) -> None:
        """Write a line and whatever waits, to the disk itself; if it does not go, it waits for the next one."""
        self._waiting.append(line)
        error = self._write()
        if error is not None:
            self._say(f"{self._path.name} cannot be written ({error}): {len(self._waiting)} records wait in memory")

    def close(self) -> None:
        """Try a last time to write what waits."""
        error = self._write() if self._waiting else None
        if error is not None:
            self._say(f"{self._path.name} lacks its last {len(self._waiting)} records ({error}); free the disk before "
                      "the next run")  # fmt: skip
        os.close(self._file)

    def _write(self) -> str | None:
        """Write all that waits or nothing; return why not."""
        data = memoryview("".join(f"{line}\n" for line in self._waiting).encode())
        try:
            os.ftruncate(self._file, self._size)  # what the last try may have left
            written = 0
            while written < len(data):
                written += os.write(self._file, data[written:])
            os.fsync(self._file)
        except OSError as error:
            # Nobody may read half a line meanwhile. If this fails too, the next try begins with it.
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)
            return first_line(error)
        self._size += len(data)
        self._waiting.clear()
        return None


def cut_back(path: Path, position: Position, say: Callable[[str], None]) -> list[str]:
    """Cut off a file of records what is after `position` and what a kill has torn; return the lines that stay."""
    if not path.is_file():
        return []
    data = path.read_bytes()
    kept: list[bytes] = []
    unreadable = 0
    for line in data[: data.rfind(b"\n") + 1].splitlines(keepends=True):
        try:
            is_kept = position.is_after(json.loads(line))
        except (ValueError, KeyError, TypeError):  # a crash of the machine can leave a block of zeros
            is_kept, unreadable = False, unreadable + 1
        if is_kept:
            kept.append(line)
    if unreadable:
        say(f"{path.name} has {unreadable} lines that cannot be read; they are left out")
    text = b"".join(kept)
    if data.startswith(text):
        os.truncate(path, len(text))  # which a full disk allows
    else:
        partial = path.with_name(f".{path.name}.partial")
        with partial.open("wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    return text.decode().splitlines()
