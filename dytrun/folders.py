"""Class folders: which image files there are, in which order; and the digests by which data sets are told apart."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

from dytrun.errors import UserError
from dytrun.images import Unreadable

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""torchvision's IMG_EXTENSIONS: its data sets are listed with the same files."""
# Files of a split whose sizes go into the fingerprint: to ask for those of a million takes minutes on some disks.
_SIZES = 2048


class Listed(NamedTuple):
    """The images of a split's folder, class after class."""

    folder: str
    paths: list[str]
    labels: np.ndarray
    """Place of an image's class among the class names, int64 (N,)."""


class Listing(NamedTuple):
    """The images of a split as they lie in a source, in the order in which they are best read there."""

    names: list[str]
    """Class, slash, the rest: as in a class folder."""
    labels: np.ndarray
    """int64 (N,)."""
    sizes: np.ndarray
    """Bytes, int64 (N,)."""
    is_exact: bool
    """Whether the sizes are those of the images, and not an estimate."""
    cuts: np.ndarray
    """Places between images, ascending, from which reading can begin without effort; the last one is N."""
    read: Callable[[int, int], Iterator[bytes | Unreadable]]
    """(first, end) → the bytes of these images, or why one has none."""

    def order(self) -> list[int]:
        """Return the order of the images in a class-per-folder tree: by class, folder within it, name."""
        keys = [(int(label), *os.path.split(name)) for label, name in zip(self.labels, self.names, strict=True)]
        return sorted(range(len(keys)), key=keys.__getitem__)


def listed(root: Path, splits: Sequence[str], where: str = "data.root") -> tuple[list[str], list[Listed]]:
    """List the class names and the images of some splits of a class-per-folder tree.

    Args:
        root: holds a folder of that name for each split, and that one a folder for each class.
        splits: names; the first one says which classes there are.
        where: key of the configuration, for messages.

    Raises:
        UserError: no classes, other ones in another split, one without an image, a folder that cannot be read.
    """
    found = [_class_names(root / split, where) for split in splits]
    classes = found[0]
    if not classes:
        raise UserError(f"{where}: {root / splits[0]} holds no class folders; give a class-per-folder tree")
    for others in found[1:]:
        if others != classes:
            _refuse_classes(root, splits, (classes, others), where)
    return classes, [_listed(root / split, classes, where) for split in splits]


def shortened(names: Sequence[str], most: int = 10) -> str:
    """Return some of the names and how many more there are."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def digest(*parts: bytes) -> str:
    """Return twelve hex digits of a SHA-256."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part)
    return whole.hexdigest()[:12]


def names_digest(labels: np.ndarray, names: bytes) -> str:
    """Return the digest of all labels and names, the names relative to the split's folder, with line breaks between."""
    return digest(np.ascontiguousarray(labels, dtype=np.int64).tobytes(), names)


def sizes_digest(num: int, size: Callable[[int], int]) -> str:
    """Return the digest of the sizes in bytes: of at most some thousands of images, spread evenly over a split."""
    asked = min(num, _SIZES)
    return digest(repr([size(i * num // asked) for i in range(asked)]).encode())


def _class_names(folder: Path, where: str) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    except OSError as error:
        _refuse(error, where)


def _refuse_classes(root: Path, splits: Sequence[str], classes: tuple[list[str], list[str]], where: str) -> NoReturn:
    one, other = map(set, classes)
    lists = [f"only in {split}: {shortened(sorted(names))}"
             for split, names in ((splits[0], one - other), (splits[1], other - one)) if names]  # fmt: skip
    raise UserError(f"{where}: {root} has different classes in train and val ({'; '.join(lists)}); mend it")


def _listed(folder: Path, classes: Sequence[str], where: str) -> Listed:
    paths = [_image_paths(folder, name, where) for name in classes]
    empty = [name for name, of_class in zip(classes, paths, strict=True) if not of_class]
    if empty:
        raise UserError(f"{where}: class folders without an image in {folder}: {shortened(empty)}; fill or remove them")
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(of_class) for of_class in paths])
    return Listed(str(folder), [path for of_class in paths for path in of_class], labels)


def _image_paths(folder: Path, name: str, where: str) -> list[str]:
    """List the image files of a class at any depth, in the order of torchvision's `make_dataset`.

    It would list a loop of links some forty times over, and skip a folder that it may not read without a word.
    """
    # Of each folder the device and inode, its own and those of all above it.
    chains: dict[str, tuple[tuple[int, int], ...]] = {str(folder): (_identity(str(folder), where),)}
    found: list[tuple[str, list[str]]] = []
    for directory, _, names in os.walk(
        os.path.join(folder, name), onerror=lambda error: _refuse(error, where), followlinks=True
    ):
        above, own = chains[os.path.dirname(directory)], _identity(directory, where)
        if own in above:
            raise UserError(f"{where}: {directory} leads back to a folder above it; remove that link")
        chains[directory] = (*above, own)
        found.append((directory, names))
    return [
        os.path.join(directory, name)
        for directory, names in sorted(found)
        for name in sorted(names)
        if name.lower().endswith(SUFFIXES)
    ]


def _identity(directory: str, where: str) -> tuple[int, int]:
    try:
        facts = os.stat(directory)
    except OSError as error:
        _refuse(error, where)
    return facts.st_dev, facts.st_ino


def _refuse(error: OSError, where: str) -> NoReturn:
    raise UserError(
        f"{where}: {error.filename} cannot be listed ({error.strerror}); mend its permissions, or remove it"
    ) from None
