"""`dytrun data pack`: a source of images → a pack, whole or not at all, and taken up where it was.

While it is made, `.packing/` in it holds what it is made from and a note on each shard that is whole; the last thing
that is written is pack.json. Nothing in a pack depends on a clock, a path of the machine, the order of a file system
or the number of processes: the same source and options give the same bytes.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
from PIL import features

from dytrun import folders, packers, terminal
from dytrun.errors import UserError
from dytrun.folders import Listing
from dytrun.intake import found
from dytrun.pack_config import PackConfig
from dytrun.packers import Full, Note, Order, Task, reason
from dytrun.records import difference, whole_file
from dytrun.seal import sealed, unsealed
from dytrun.shards import (
    FORMAT,
    MANIFEST,
    RECORD,
    SHARD,
    UNFINISHED,
    MadeFrom,
    Manifest,
    PackedImages,
    PackedSplit,
    PackFile,
    SplitSource,
    is_pack,
    open_pack,
)

_LOCK, _PLAN = ".lock", "plan.json"
_QUALITY = 95
# Shards of a pack are open files of every process that reads it, and a process may have 1,024 of those by default.
_USUAL_SHARDS, _MOST_SHARDS = 256, 512
# A process writes a whole one: there are enough for all cores, and one that was interrupted is soon written again.
_SMALL_SHARD, _USUAL_SHARD, _SHARDS_OF_SMALL = 16 << 20, 256 << 20, 32
# A packer that was killed holds its lock until its processes have noticed.
_TRIES, _TRY_S = 30, 0.1


class Packed(NamedTuple):
    """What became of a command."""

    manifest: Manifest
    was_there: bool
    num_kept: int
    """Images that were there already, of a pack that was begun."""
    seconds: float


def pack(config: PackConfig) -> Packed:
    """Make a pack, or finish one.

    Raises:
        UserError: the source or the directory will not do; the disk is full; images cannot be read.
        RunError: a packing process has died.
    """
    since = time.monotonic()
    source, out = Path(config.source), Path(config.out)
    try:
        _check_places(source, out)
        kind, classes, listings = found(config, source)
    except OSError as error:
        raise UserError(f"{error.filename or source}: {reason(error)}; mend that, or choose another") from None
    made_from = _made_from(config, kind, source, classes, listings)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with contextlib.nullcontext() if (out / MANIFEST).exists() else _alone(out):  # what is whole may be read-only
            was_there = (manifest := _begun(out, made_from)) is not None
            manifest, num_kept = (manifest, 0) if manifest else _make(config, made_from, classes, listings)
            shutil.rmtree(out / UNFINISHED, ignore_errors=True)
        with contextlib.suppress(OSError):
            (out / _LOCK).unlink()  # of one that was killed after its last file
    except Full as error:
        raise UserError(_full(out, str(error))) from None
    except OSError as error:
        if error.errno in packers.FULL:
            raise UserError(_full(out, f"{out}: {reason(error)}")) from None
        raise UserError(f"out: {error.filename or out}: {reason(error)}; mend that, or choose another") from None
    return Packed(manifest, was_there, num_kept, time.monotonic() - since)


def _check_places(source: Path, out: Path) -> None:
    try:
        os.scandir(source).close()
    except OSError as error:
        raise UserError(f"source: {source} is no directory that can be read ({reason(error)}); give class folders, "
                        "ImageNet's tars or parquet files") from None  # fmt: skip
    if is_pack(source):
        raise UserError(f"source: {source} is a pack already; give what it was made from")
    if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(source)):
        raise UserError(f"out: {out} lies in the source; choose a directory outside of {source}")
    if os.path.lexists(out) and not os.path.isdir(out):
        raise UserError(f"out: {out} is no directory; choose another")
    if os.path.isdir(out) and not any(os.path.exists(out / name) for name in (MANIFEST, f"{UNFINISHED}/{_PLAN}")):
        strange = sorted(name for name in os.listdir(out) if name not in (_LOCK, UNFINISHED))
        if strange:
            raise UserError(f"out: {out} holds other files ({folders.shortened(strange, 3)}); choose an empty one")


def _made_from(
    config: PackConfig, kind: str, source: Path, classes: Sequence[str], listings: Mapping[str, Listing]
) -> MadeFrom:
    is_shrunk = config.short_side is not None
    encoder = f"Pillow {PIL.__version__}, libjpeg-turbo {features.version_feature('libjpeg_turbo')}"
    values = {
        "kind": kind,
        "name": source.resolve().name,
        "splits": {split: SplitSource(num=len(one.names), listing=_listing_digest(one, classes))
                   for split, one in listings.items()},
        "short_side": config.short_side,
        "quality": (_QUALITY if config.quality == "auto" else config.quality) if is_shrunk else None,
        "encoder": encoder if is_shrunk else None,
        "shard_bytes": _shard_bytes(config, listings),
    }  # fmt: skip
    return MadeFrom.model_validate(values)


def _listing_digest(one: Listing, classes: Sequence[str]) -> str:
    names = b"\0".join(map(os.fsencode, [*classes, *one.names]))
    return hashlib.sha256(one.labels.tobytes() + one.sizes.tobytes() + names).hexdigest()


def _shard_bytes(config: PackConfig, listings: Mapping[str, Listing]) -> int:
    total = sum(int(one.sizes.sum()) for one in listings.values())
    if config.shard_mib == "auto":
        return max(_SMALL_SHARD, min(_USUAL_SHARD, total // _SHARDS_OF_SMALL), total // _USUAL_SHARDS)
    found = max(1, int(config.shard_mib * 2**20))
    if total // found > _MOST_SHARDS:
        raise UserError(f"shard_mib: {config.shard_mib:g} would make {total // found:,} files, and {_MOST_SHARDS} are "
                        f"the most; say {1.01 * total / _MOST_SHARDS / 2**20:.3g} or more")  # fmt: skip
    return found


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keep every other packer out of a directory."""
    lock = out / _LOCK
    for _ in range(_TRIES):
        file = lock.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_ino == lock.stat().st_ino:
                break
        except FileNotFoundError:
            pass  # its owner has just ended
        except BlockingIOError:
            time.sleep(_TRY_S)
        except OSError:
            terminal.line(f"{out}: its file system has no locks; let no other process pack there at the same time")
            break
        file.close()
    else:
        raise UserError(f"out: another process packs into {out}; wait for it, or choose another directory")
    with file:
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _begun(out: Path, made_from: MadeFrom) -> Manifest | None:
    """Return what is in a pack that is done; of one that was begun, check that it is the same one.

    Raises:
        UserError: it is another one.
    """
    plan = out / UNFINISHED / _PLAN
    now = made_from.model_dump(mode="json")
    manifest = _opened(out) if (out / MANIFEST).exists() else None
    if manifest is not None:
        before = manifest.made_from.model_dump(mode="json")
    elif plan.exists():
        try:
            before = unsealed(plan.read_bytes())
        except ValueError as error:
            raise UserError(f"{plan}: {error}; remove {out}, and begin again") from None
    else:
        plan.parent.mkdir(exist_ok=True)
        with whole_file(plan) as file:
            file.write(sealed(now))
        packers.sync_names(plan.parent)
        return None
    if before != now:
        said = ", ".join(_in_words(key, there, here) for key, there, here in difference(before, now))
        what = "is the pack" if manifest is not None else "is to become the pack"
        raise UserError(f"out: {out} {what} of another source or with other options (there -> here: {said}); choose "
                        "another directory, or remove that one")  # fmt: skip
    return manifest


def _opened(out: Path) -> Manifest:
    """Open a pack whose files are all there, each of its size."""
    try:
        manifest = open_pack(out)
        for split in manifest.splits:
            PackedImages(out, split, manifest)
    except UserError as error:
        raise UserError(f"out: {str(error).rpartition(';')[0]}; remove {out}, and begin again") from None
    return manifest


def _in_words(key: str, there: Any, here: Any) -> str:
    if key.endswith(".listing"):
        return f"{key.split('.')[1]} has images of other names, labels or sizes"
    return f"{key} {there} -> {here}"


def _make(
    config: PackConfig, made_from: MadeFrom, classes: Sequence[str], listings: Mapping[str, Listing]
) -> tuple[Manifest, int]:
    """Write what is missing: shards, then the indices, then pack.json; say how many images were there already."""
    out = Path(config.out)
    plan = hashlib.sha256(sealed(made_from.model_dump(mode="json"))).hexdigest()
    order = Order(out, plan, listings, made_from.short_side, made_from.quality, config.keep_unreadable)
    tasks = [task for split, one in listings.items() for task in _tasks(split, one, made_from.shard_bytes)]
    _check_room(out, made_from, listings)
    total = sum(len(one.names) for one in listings.values())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = cores if config.workers == "auto" else config.workers
    with terminal.moving(f"packing {config.source}", total) as report:
        notes, num_kept = packers.write_all(order, tasks, workers, report)
    unreadable = [one for note in notes for one in note.unreadable]
    if unreadable and not config.keep_unreadable:
        said = folders.shortened([f"{name} ({why})" for name, why in unreadable], 3)
        raise UserError(f"source: {len(unreadable)} of {total:,} images cannot be read as images: {said}; mend them "
                        "and pack into a new directory, or keep them as they are: keep_unreadable=true")  # fmt: skip
    packed, sources = {}, {}
    for split, one in listings.items():
        mine = [(task, note) for task, note in zip(tasks, notes, strict=True) if task.split == split]
        packed[split], sources[split] = _finish_split(out, split, one, mine)
    values = {
        "format": FORMAT,
        "made_from": made_from.model_dump(mode="json"),
        "source_id": folders.digest(json.dumps(sources).encode()),
        "classes": list(classes),
        "splits": {split: one.model_dump(mode="json") for split, one in packed.items()},
    }
    manifest = Manifest.model_validate(values)
    _place(out, MANIFEST, sealed(values))
    return manifest, num_kept


def _tasks(split: str, one: Listing, shard_bytes: int) -> Iterator[Task]:
    """Cut a split into shards, where so many bytes of the source are full."""
    ends = np.cumsum(one.sizes)[one.cuts - 1]
    number = first = place = 0
    while place < len(one.cuts):
        done = int(ends[place - 1]) if place else 0
        last = min(int(np.searchsorted(ends, done + shard_bytes)), len(one.cuts) - 1)
        last = max(last, place)
        yield Task(split, number, first, int(one.cuts[last]))
        number, first, place = number + 1, int(one.cuts[last]), last + 1


def _check_room(out: Path, made_from: MadeFrom, listings: Mapping[str, Listing]) -> None:
    """Refuse what cannot fit; how large shrunk images will be is not known before."""
    if made_from.short_side is not None:
        return
    needed = sum(int(one.sizes.sum()) + len(one.names) * RECORD.itemsize for one in listings.values())
    needed -= sum(path.stat().st_size for path in out.glob(f"*{SHARD}"))
    free = shutil.disk_usage(out).free
    if free < needed:
        raise UserError(f"out: {free / 2**20:,.0f} MiB are free at {out}, and the pack takes {needed / 2**20:,.0f} MiB "
                        "more; make room, or choose another directory")  # fmt: skip


def _finish_split(
    out: Path, split: str, one: Listing, written: Sequence[tuple[Task, Note]]
) -> tuple[PackedSplit, list[Any]]:
    """Write the index of a split; return its part of pack.json, and what tells its source from another."""
    num = len(one.names)
    records, sizes = np.zeros(num, RECORD), np.zeros(num, np.int64)
    for task, note in written:
        here = records[task.first : task.end]
        here["length"], here["check"], here["shard"] = note.lengths, note.checks, task.number
        here["offset"][1:] = np.cumsum(note.lengths[:-1], dtype=np.uint64)
        sizes[task.first : task.end] = note.sizes
    records["label"] = one.labels
    order = one.order()
    records, sizes = records[order], sizes[order]
    names = [os.fsencode(one.names[place]) for place in order]
    raw = records.tobytes() + b"".join(name + b"\0" for name in names)
    _place(out, f"{split}.index", raw)
    index = PackFile(bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest())
    shards = [PackFile(bytes=note.bytes, sha256=note.sha256) for _, note in written]
    unreadable = sorted(name for _, note in written for name, _ in note.unreadable)
    packed = PackedSplit(num=num, index=index, shards=shards, unreadable=unreadable)
    labels = folders.names_digest(records["label"], b"\n".join(names))
    return packed, [split, num, labels, folders.sizes_digest(num, lambda place: int(sizes[place]))]


def _place(out: Path, name: str, raw: bytes) -> None:
    """Write a file of the pack whole or not at all."""
    with whole_file(out / UNFINISHED / name) as file:
        file.write(raw)
    (out / UNFINISHED / name).replace(out / name)
    packers.sync_names(out)


def _full(out: Path, said: str) -> str:
    free = shutil.disk_usage(out).free
    return (f"out: {said} ({free / 2**20:,.1f} MiB are free there now); make room, and type the command again: what is "
            "whole stays")  # fmt: skip
