"""ImageNet's tar files, read where they lie and never unpacked.

ILSVRC2012_img_train.tar is a tar of one tar a class; ILSVRC2012_img_val.tar is flat, and the classes of its images are
in the devkit (ILSVRC2012_devkit_t12.tar.gz, as torchvision's `ImageNet` reads it) or in a CSV, such as Kaggle's
LOC_val_solution.csv. Nothing in an archive is trusted: names that lead out of it, links, devices and sizes that cannot
be are refused.
"""

import csv
import gzip
import io
import os
import posixpath
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from dytrun.errors import UserError, first_line
from dytrun.folders import SUFFIXES, Listing, shortened
from dytrun.images import MOST_BYTES, Unreadable

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
_DEVKIT, _SOLUTION = "ILSVRC2012_devkit_t12.tar.gz", "LOC_val_solution.csv"
# What tarfile may read in one piece: a header, or the long name or pax record before one.
_MOST_HEADER = 1 << 20
# The devkit's files have less than a tenth of this.
_MOST_TEXT = 1 << 25
_BLOCK = 512


class _Broken(Exception):
    """What is wrong with an archive."""


class _Window:
    """A part of a file, as the file that tarfile reads headers from; what would take memory or lead out is refused."""

    def __init__(self, file: IO[bytes], start: int, size: int):
        self._file, self._start, self._size, self._at = file, start, size, 0

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        if whence != os.SEEK_SET or place < 0:
            raise _Broken("an impossible size")
        self._at = place
        return place

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MOST_HEADER:
            raise _Broken("a header of an impossible size")
        self._file.seek(self._start + self._at)
        data = self._file.read(max(0, min(size, self._size - self._at)))
        self._at += len(data)
        return data


class _Member(NamedTuple):
    name: str
    start: int
    """Place of its bytes in the file."""
    size: int


class _Slices:
    """(first, end) → the bytes of some parts of a file, which every process opens for itself."""

    def __init__(self, path: Path, members: Sequence[_Member]):
        self._path, self._members = path, members

    def __call__(self, first: int, end: int) -> Iterator[bytes | Unreadable]:
        with self._path.open("rb", buffering=0) as file:
            for member in self._members[first:end]:
                if member.size > MOST_BYTES:
                    yield Unreadable(f"{self._path}: {member.name}", f"{member.size:,} bytes are too many for an image")
                    continue
                try:
                    file.seek(member.start)
                    yield file.read(member.size)
                except OSError as error:
                    yield Unreadable(f"{self._path}: {member.name}", error.strerror or first_line(error))


def find_tars(root: Path, splits: Sequence[str]) -> list[str]:
    """Return those of the splits (train, val) for which there is one of ImageNet's tars."""
    return [split for split, name in zip(splits, (TRAIN_TAR, VAL_TAR), strict=True) if (root / name).is_file()]


def list_tars(root: Path, splits: Sequence[str], val_labels: str | None) -> tuple[list[str], dict[str, Listing]]:
    """List the classes, and the images of the splits (train, val) for which there is a tar.

    Raises:
        UserError: a tar that cannot be read or trusted; labels that are missing, or do not fit the images.
    """
    train, val = splits
    classes, found = [], {}
    if (root / TRAIN_TAR).is_file():
        members = _of_classes(root / TRAIN_TAR)
        classes = sorted({member.name.partition("/")[0] for member in members})
        found[train] = _listing(root / TRAIN_TAR, members, classes)
    if (root / VAL_TAR).is_file():
        with (root / VAL_TAR).open("rb") as file:
            images = [one for one in _members(root / VAL_TAR, file) if one.name.lower().endswith(SUFFIXES)]
        labels = _val_labels(root, val_labels)
        _check_labels(root / VAL_TAR, images, labels, classes)
        classes = classes or sorted(set(labels.values()))
        members = [one._replace(name=f"{labels[_stem(one.name)]}/{posixpath.basename(one.name)}") for one in images]
        found[val] = _listing(root / VAL_TAR, members, classes)
    return classes, found


def _listing(path: Path, members: Sequence[_Member], classes: Sequence[str]) -> Listing:
    names = [member.name for member in members]
    if len(set(names)) < len(names):
        seen: set[str] = set()
        twice = next(name for name in names if name in seen or seen.add(name))
        raise UserError(f"{path}: holds {twice} twice; fetch it again")
    number = {name: place for place, name in enumerate(classes)}
    labels = np.array([number[name.partition("/")[0]] for name in names], dtype=np.int64)
    sizes = np.array([member.size for member in members], dtype=np.int64)
    return Listing(names, labels, sizes, True, np.arange(1, len(names) + 1), _Slices(path, members))


def _of_classes(path: Path) -> list[_Member]:
    """List the images of a tar of one tar a class."""
    found = []
    with path.open("rb") as file:
        for outer in _members(path, file):
            name = posixpath.basename(outer.name)
            if not name.endswith(".tar"):
                raise UserError(f"{path}: {outer.name} is no tar of a class; give ImageNet's own file")
            inner = [one for one in _members(path, file, outer) if one.name.lower().endswith(SUFFIXES)]
            if not inner:
                raise UserError(f"{path}: {outer.name} holds no image; fetch it again")
            found += [one._replace(name=f"{name.removesuffix('.tar')}/{one.name}") for one in inner]
    if not found:
        raise UserError(f"{path}: holds no tar of a class; fetch it again")
    return found


def _members(path: Path, file: IO[bytes], within: _Member | None = None) -> Iterator[_Member]:
    """Yield the files of a tar, or of one within it, with their places in the file.

    Raises:
        UserError: names the tar and the member.
    """
    start, size = (within.start, within.size) if within else (0, os.fstat(file.fileno()).st_size)
    where = f"{path}: {within.name}" if within else f"{path}"
    window = _Window(file, start, size)
    try:
        with tarfile.open(fileobj=window, mode="r:") as tar:  # pyright: ignore[reportArgumentType, reportCallIssue]
            while (info := tar.next()) is not None:
                tar.members = []  # a million would be kept
                if not info.isdir():
                    yield _Member(_safe_name(info), start + info.offset_data, _safe_size(info, size))
            # tarfile takes any damage for the end.
            window.seek(tar.offset)
            if window.read(_BLOCK) != bytes(_BLOCK):
                raise _Broken("it ends in the middle: it was cut off, or is damaged")
    except (_Broken, tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError) as error:
        raise UserError(f"{where}: is no tar that can be read ({first_line(error)}); fetch it again") from None
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror or first_line(error)})") from None


def _safe_name(info: tarfile.TarInfo) -> str:
    name = posixpath.normpath(info.name)
    if info.name.startswith("/") or name.split("/")[0] == ".." or "\0" in name or name == ".":
        raise _Broken(f"the name {info.name!r} leads out of it")
    if not info.isreg() or info.issparse():
        raise _Broken(f"{info.name!r} is no file but a link, a device or the like")
    return name


def _safe_size(info: tarfile.TarInfo, most: int) -> int:
    if info.size < 0 or info.offset_data + info.size > most:
        raise _Broken(f"{info.name!r} has {info.size:,} bytes, and the tar {most:,}")
    return info.size


def _stem(name: str) -> str:
    return posixpath.splitext(posixpath.basename(name))[0]


# --- the labels of the flat validation set


def _val_labels(root: Path, given: str | None) -> dict[str, str]:
    """Return the class of every validation image, by its name without extension."""
    paths = [Path(given)] if given else [root / name for name in (_DEVKIT, _SOLUTION) if (root / name).is_file()]
    if not paths:
        raise UserError(f"val_labels: the images of {VAL_TAR} have no labels in it; put {_DEVKIT} or {_SOLUTION} "
                        "beside it, or say val_labels=FILE")  # fmt: skip
    path = paths[0]
    try:
        return _of_devkit(path) if path.name.endswith((".tar.gz", ".tgz")) else _of_csv(path)
    except (OSError, EOFError, ValueError, LookupError, TypeError, tarfile.TarError, csv.Error) as error:
        raise UserError(f"val_labels: {path} cannot be read ({first_line(error)}); give the devkit's tar, or a CSV of "
                        "file and class") from None  # fmt: skip


def _of_csv(path: Path) -> dict[str, str]:
    """Read file,class: the class is the first word of its column, so that Kaggle's boxes may follow it."""
    if path.stat().st_size > _MOST_TEXT:
        raise ValueError("too large")
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if row]
    if rows and not _stem(rows[0][0].strip())[-1:].isdigit():  # the columns' names
        rows = rows[1:]
    return {_stem(row[0].strip()): row[1].split()[0] for row in rows}


def _of_devkit(path: Path) -> dict[str, str]:
    """Read the devkit: a line a validation image with the number of its class, and the names of the numbers."""
    from scipy.io import loadmat

    wanted = {"data/ILSVRC2012_validation_ground_truth.txt": b"", "data/meta.mat": b""}
    with gzip.open(path) as packed:
        raw = packed.read(4 * _MOST_TEXT + 1)
    if len(raw) > 4 * _MOST_TEXT:
        raise ValueError("too large")
    with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as tar:
        for info in tar:
            for name in wanted:
                if f"/{info.name}".endswith(f"/{name}") and info.isreg():
                    if info.size > _MOST_TEXT:
                        raise ValueError(f"{info.name} has {info.size:,} bytes")
                    file = tar.extractfile(info)
                    wanted[name] = file.read() if file else b""
    truth, meta = wanted.values()
    if not truth or not meta:
        raise ValueError(f"it has not both of {' and '.join(wanted)}")
    synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
    wnids = {int(one["ILSVRC2012_ID"]): str(one["WNID"]) for one in np.atleast_1d(synsets) if one["num_children"] == 0}
    numbers = [int(line) for line in truth.split()]
    return {f"ILSVRC2012_val_{place:08d}": wnids[number] for place, number in enumerate(numbers, start=1)}


def _check_labels(path: Path, images: Sequence[_Member], labels: Mapping[str, str], classes: Sequence[str]) -> None:
    stems = [_stem(image.name) for image in images]
    if missing := [stem for stem in stems if stem not in labels]:
        raise UserError(f"val_labels: no class for {shortened(missing, 3)} of {path.name}; give the labels of these")
    if left := sorted(set(labels) - set(stems)):
        raise UserError(f"{path}: {shortened(left, 3)} have a label and are not in it; fetch it again")
    if unknown := sorted(set(labels.values()) - set(classes)) if classes else []:
        raise UserError(f"val_labels: classes that {TRAIN_TAR} has not: {shortened(unknown)}; give the labels of these")
    if classes and (without := sorted(set(classes) - set(labels.values()))):
        raise UserError(f"val_labels: classes without a validation image: {shortened(without)}; give all labels")
