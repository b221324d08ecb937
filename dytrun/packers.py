"""The processes that write the shards of a pack, a whole shard each, and how one is written.

A shard is written aside, synced and renamed; then a note of what is in it is written the same way. What is there and as
its note says is not written again: that is how a pack is taken up where it was. What goes into a shard depends on the
source alone, so the number of processes changes nothing.
"""

import ctypes
import errno
import hashlib
import io
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import xxhash
from PIL import Image
from setproctitle import setproctitle

from dytrun import pixels
from dytrun.errors import RunError, UserError, first_line
from dytrun.folders import Listing
from dytrun.images import Picture, Unreadable
from dytrun.records import whole_file
from dytrun.seal import sealed, unsealed
from dytrun.shards import UNFINISHED, shard_path
from dytrun.stop import SIGNALS

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_REPORT_EVERY_S = 0.2
# libjpeg's limit on a side, in pixels.
_MOST_JPEG = 65500
# What a full disk, a quota or a limit on the size of files is called.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Full(Exception):
    """The disk takes no more."""


class Task(NamedTuple):
    """A shard to be written: the images from `first` on, `end` not among them, in the order of the source."""

    split: str
    number: int
    first: int
    end: int


@dataclass
class Note:
    """What is in a shard, a list item an image in the order of the source."""

    plan: str
    """SHA-256 of what the pack is made from, and how."""
    first: int
    end: int
    bytes: int = 0
    sha256: str = ""
    lengths: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    """Bytes in the source."""
    checks: list[int] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    """Images that cannot be decoded: name, and why."""


class Order(NamedTuple):
    """What all shards of a pack have in common."""

    out: Path
    plan: str
    listings: Mapping[str, Listing]
    short_side: int | None
    quality: int | None
    keep_unreadable: bool


Report = Callable[[int, int, bool], None]
"""Is told of images that are done, the bytes that they have now, and whether they have just been written."""


def write_all(order: Order, tasks: Sequence[Task], workers: int, report: Report) -> tuple[list[Note], int]:
    """Write the shards, in that many processes.

    Returns:
        Their notes, in the order of the tasks, and how many images were there already.

    Raises:
        Full: the disk is full; shards that are whole stay.
        UserError: the source cannot be read, or has changed.
        RunError: a process has died.
    """
    if order.short_side is not None:
        pixels.implementation()  # compiled once, not in every process
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pipes, processes = [], []
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # for good in the children: it is this one that stops
    try:
        for _ in range(min(workers, len(tasks))):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, order, os.getpid()), daemon=True)
            process.start()
            theirs.close()
            pipes.append(mine)
            processes.append(process)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        return _hand_out(tasks, pipes, processes, report)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
        for partial in (order.out / UNFINISHED).glob(".*.partial"):
            partial.unlink(missing_ok=True)


def _hand_out(
    tasks: Sequence[Task], pipes: list[Connection], processes: Sequence[Any], report: Report
) -> tuple[list[Note], int]:
    notes: dict[int, Note] = {}
    kept = 0
    waiting = iter(enumerate(tasks))
    for pipe, process in zip(pipes, processes, strict=True):
        _send(pipe, next(waiting), process)
    while len(notes) < len(tasks):
        for pipe in wait(pipes):
            assert isinstance(pipe, Connection)
            try:
                kind, *said = pipe.recv()
            except (EOFError, ConnectionResetError):
                _died(processes[pipes.index(pipe)])
            if kind == "progress":
                report(said[0], said[1], True)
            elif kind == "kept":
                kept += said[0]
                report(said[0], said[1], False)
            elif kind == "done":
                place, note = said
                notes[place] = note
                if (task := next(waiting, None)) is not None:
                    _send(pipe, task, processes[pipes.index(pipe)])
            elif kind == "full":
                raise Full(*said)
            elif kind == "refused":
                raise UserError(*said)
            else:
                raise RunError(*said)
    return [notes[place] for place in range(len(tasks))], kept


def _send(pipe: Connection, task: tuple[int, Task], process: Any) -> None:
    try:
        pipe.send(task)
    except (BrokenPipeError, ConnectionResetError):  # it died after what it said last
        _died(process)


def _died(process: Any) -> NoReturn:
    process.join(5)
    code = process.exitcode or 0
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    raise RunError(f"packing process {process.pid} died ({how}); if memory was short, try fewer workers; type the "
                   "command again, and it goes on where it was")  # fmt: skip


def _serve(pipe: Connection, order: Order, parent: int) -> None:
    """Write shard after shard, until the process that has started this one ends, however it does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
    setproctitle("dytrun: packer")
    while True:
        place, task = pipe.recv()
        try:
            note = finished(order, task)
            if note is not None and (order.keep_unreadable or not note.unreadable):
                pipe.send(("kept", len(note.lengths), note.bytes))
            else:
                note = _written(order, task, _Progress(pipe))
            answer = ("done", place, note)
        except UserError as error:
            answer = ("refused", *error.problems)
        except OSError as error:
            answer = ("full" if error.errno in FULL else "refused", f"{error.filename or order.out}: {reason(error)}")
        except Exception:
            answer = ("bug", traceback.format_exc())
        pipe.send(answer)


class _Progress:
    """Sends what was done now and then, and not for every image."""

    def __init__(self, pipe: Connection):
        self._pipe, self._images, self._bytes, self._sent = pipe, 0, 0, time.monotonic()

    def __call__(self, images: int, num_bytes: int) -> None:
        self._images += images
        self._bytes += num_bytes
        if time.monotonic() - self._sent > _REPORT_EVERY_S:
            self.send()

    def send(self) -> None:
        """Send what was not sent yet."""
        self._pipe.send(("progress", self._images, self._bytes))
        self._images, self._bytes, self._sent = 0, 0, time.monotonic()


def note_path(out: Path, task: Task) -> Path:
    """Return where the note on a shard lies, as long as the pack is unfinished."""
    return out / UNFINISHED / f"{task.split}-{task.number:05d}.json"


def finished(order: Order, task: Task) -> Note | None:
    """Return the note on a shard that is there and whole."""
    shard = shard_path(order.out, task.split, task.number)
    try:
        note = Note(**unsealed(note_path(order.out, task).read_bytes()))
        if (note.plan, note.first, note.end) != (order.plan, task.first, task.end):
            return None
        if shard.stat().st_size != note.bytes:
            return None
        with shard.open("rb") as file:
            return note if hashlib.file_digest(file, "sha256").hexdigest() == note.sha256 else None
    except (OSError, ValueError, TypeError):
        return None


def _written(order: Order, task: Task, progress: _Progress) -> Note:
    """Write a shard."""
    note = Note(order.plan, task.first, task.end)
    shard = shard_path(order.out, task.split, task.number)
    with whole_file(order.out / UNFINISHED / shard.name) as file:
        digest = hashlib.sha256()
        for name, raw, data in _packed(order, task, note):
            if len(data) >= 1 << 32:
                raise UserError(f"{name}: {len(data):,} bytes are too many for an image")
            file.write(data)
            digest.update(data)
            note.lengths.append(len(data))
            note.sizes.append(len(raw))
            note.checks.append(xxhash.xxh3_64_intdigest(data))
            progress(1, len(data))
    note.bytes, note.sha256 = sum(note.lengths), digest.hexdigest()
    (order.out / UNFINISHED / shard.name).replace(shard)
    sync_names(order.out)
    with whole_file(note_path(order.out, task)) as file:
        file.write(sealed(asdict(note)))
    progress.send()
    return note


def _packed(order: Order, task: Task, note: Note) -> Iterator[tuple[str, bytes, bytes]]:
    """Yield name, bytes in the source and bytes to be packed; what cannot be decoded is noted, and stays as it is."""
    listing = order.listings[task.split]
    names, sizes = listing.names[task.first : task.end], listing.sizes[task.first : task.end].tolist()
    for name, size, raw in zip(names, sizes, listing.read(task.first, task.end), strict=True):
        if isinstance(raw, Unreadable):
            raise UserError(f"{raw.path}: cannot be read ({raw.why}); mend or remove it, and type the command again")
        if listing.is_exact and len(raw) != size:
            raise UserError(f"source: {name} has {len(raw):,} bytes and had {size:,} when it was listed; begin again "
                            "when nobody writes there")  # fmt: skip
        data = raw
        if order.short_side is not None:
            try:
                data = shrunk(raw, name, order.short_side, order.quality or 0)
            except Unreadable as error:
                note.unreadable.append((name, error.why))
        yield name, raw, data


def shrunk(raw: bytes, name: str, short_side: int, quality: int) -> bytes:
    """Bring the short side of an image to that many pixels, antialiased bicubic, and encode it as JPEG (4:2:0).

    Bicubic as in evaluation, whose resizing to the same size then has nothing left to do. A smaller image keeps its
    bytes if it is a plain JPEG, and its size in any case.

    Raises:
        Unreadable: it is no image.
    """
    picture = Picture(raw, name)
    image = picture.pixels()
    height, width = image.shape[:2]
    if min(height, width) > short_side:
        # As torchvision's Resize: the long side is cut off to whole pixels.
        long_side = int(short_side * max(height, width) / min(height, width))
        image = pixels.resized(image, (short_side, long_side) if height <= width else (long_side, short_side))
    elif _is_plain_jpeg(raw):
        return raw
    if max(image.shape) > _MOST_JPEG:
        raise Unreadable(name, f"{width}×{height} pixels are too long for a JPEG")
    encoded = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(encoded, "JPEG", quality=quality, subsampling="4:2:0")
    return encoded.getvalue()


def _is_plain_jpeg(raw: bytes) -> bool:
    if raw[:3] != b"\xff\xd8\xff":
        return False
    with Image.open(io.BytesIO(raw), formats=("JPEG",)) as image:
        return image.mode in ("RGB", "L")


def sync_names(directory: Path) -> None:
    """Make sure that the names in a directory are on the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reason(error: Exception) -> str:
    """Return why a file operation failed."""
    return (error.strerror if isinstance(error, OSError) else None) or first_line(error)
