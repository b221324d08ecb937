"""Where images come from: class folders, torchvision's data sets, the embedded digits, random ones."""

import gzip
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
from jaxtyping import Int
from torchvision import datasets

from dytrun.config import DataConfig
from dytrun.errors import UserError
from dytrun.images import Content, ImageFiles, Picture

_SYNTHETIC_POOL = 16
# Files of a split whose sizes go into the fingerprint: to ask for those of a million takes minutes on some disks.
_SIZES = 2048


class Split(NamedTuple):
    """Images that can be asked for by index, with their labels."""

    labels: Int[np.ndarray, "n"]
    read: Callable[[int], Content]
    """Index → content; raises Unreadable where a file cannot be read."""
    paths: Sequence[str] = ()
    """Of the files, if the images are in files."""
    folder: str = ""
    """The folder of class folders that the files are in."""

    def part(self, chosen: Int[np.ndarray, "k"]) -> "Split":
        """Return some of the images, by their indices, in that order."""
        paths = [self.paths[int(index)] for index in chosen] if self.paths else []
        return Split(self.labels[chosen], lambda index: self.read(int(chosen[index])), paths, self.folder)

    def picture(self, index: int) -> Picture:
        """Open an image.

        Raises:
            Unreadable: a file cannot be read, or its content is no image.
        """
        return Picture(self.read(index), self.paths[index] if self.paths else "")

    def class_folder(self, index: int) -> str:
        """Return the class folder of an image that is in a file."""
        return os.path.join(self.folder, os.path.relpath(self.paths[index], self.folder).split(os.sep)[0])


class Data(NamedTuple):
    """Both splits of a data set."""

    train: Split
    val: Split
    num_classes: int
    fingerprint: str
    """Twelve hex digits of `facts`: data sets that differ there are different."""
    facts: Mapping[str, int | str]
    """Counts and digests, as plain JSON values, by which `fingerprint_difference` says what has changed."""


def load_data(data: DataConfig) -> Data:
    """Find the images that a configuration names; none is decoded yet.

    Raises:
        UserError: a root, a split or a class is missing, or train and val disagree.
    """
    source = _class_folders if data.name in ("imagenet", "folder") else _SOURCES[data.name]
    train, val, classes = source(data)
    if data.num_classes is not None and data.num_classes != classes:
        more = f" in {data.root}; for another class-per-folder tree say data=folder" if data.root else ""
        raise UserError(f"data.num_classes: {data.num_classes} is asked for, data={data.name} has {classes}{more}")
    facts = {
        "num_train": len(train.labels), "num_val": len(val.labels), "num_classes": classes,
        "train_names": _names_digest(train), "val_names": _names_digest(val),
        "train_contents": _contents_digest(train), "val_contents": _contents_digest(val),
    }  # fmt: skip
    return Data(train, val, classes, _digest(data.name.encode(), json.dumps(facts).encode()), facts)


def fingerprint_difference(before: Mapping[str, int | str], now: Mapping[str, int | str]) -> str:
    """Say in a few words how the data of two `Data.facts` differ; an empty text where they do not.

    Names and labels are those of every image. Contents are the pixels of images in memory, and the sizes of files: of
    at most some thousands of each split, spread evenly over it.
    """
    said = []
    for name, key in (("train", "num_train"), ("val", "num_val")):
        if before[key] != now[key]:
            said.append(f"{name} {before[key]} -> {now[key]} images")
        elif before[f"{name}_names"] != now[f"{name}_names"]:
            said.append(f"{name} has images of other names or labels")
        elif before[f"{name}_contents"] != now[f"{name}_contents"]:
            said.append(f"{name} has images of other contents")
    if before["num_classes"] != now["num_classes"]:
        said.append(f"{before['num_classes']} -> {now['num_classes']} classes")
    return ", ".join(said)


def _names_digest(split: Split) -> str:
    start = len(split.folder) + 1
    names = os.fsencode("\n".join(path[start:] for path in split.paths))
    return _digest(np.ascontiguousarray(split.labels, dtype=np.int64).tobytes(), names)


def _contents_digest(split: Split) -> str:
    if isinstance(split.read, _ArrayImages):
        return _digest(repr(split.read.pixels.shape).encode(), np.ascontiguousarray(split.read.pixels).tobytes())
    num = min(len(split.paths), _SIZES)
    return _digest(repr([_size(split.paths[i * len(split.paths) // num]) for i in range(num)]).encode())


def _size(path: str) -> int:
    """Return the bytes of a file, or -1 of one that is not there: it is for whoever reads it to complain."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:12]


class _ArrayImages(NamedTuple):
    """Images in memory: uint8 pixels (N, H, W) or (N, H, W, 3); an index past the end starts again."""

    pixels: np.ndarray

    def __call__(self, index: int) -> Content:
        return self.pixels[index % len(self.pixels)]


def _class_folders(data: DataConfig) -> tuple[Split, Split, int]:
    if not data.root:
        env = ", or set IMAGENET_DIR once and for all" if data.name == "imagenet" else ""
        raise UserError(
            f"data.root: data={data.name} needs the folder of its images; say data.root=DIR{env}; "
            "to try dytrun without any data: dytrun train experiment=quickstart"
        )
    root = Path(data.root)
    folders = [root / data.train_split, root / data.val_split]
    for folder in [root, *folders]:
        if not folder.is_dir():
            raise UserError(f"data.root: {folder} is no folder; give one that holds {data.train_split}/ and "
                            f"{data.val_split}/ with a folder for each class")  # fmt: skip
    classes, val_classes = (_class_names(folder) for folder in folders)
    if not classes:
        raise UserError(f"data.root: {folders[0]} holds no class folders; give a class-per-folder tree")
    if classes != val_classes:
        only_train, only_val = sorted(set(classes) - set(val_classes)), sorted(set(val_classes) - set(classes))
        lists = [f"only in {split}: {_shortened(names)}" for split, names in
                 ((data.train_split, only_train), (data.val_split, only_val)) if names]  # fmt: skip
        raise UserError(f"data.root: {root} has different classes in train and val ({'; '.join(lists)}); mend it")
    number = {name: index for index, name in enumerate(classes)}
    train, val = (_folder_split(folder, number) for folder in folders)
    return train, val, len(classes)


def _class_names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    except OSError as error:
        _refuse(error)


def _folder_split(folder: Path, number: dict[str, int]) -> Split:
    listed = {name: _image_paths(folder, name) for name in number}
    empty = [name for name, paths in listed.items() if not paths]
    if empty:
        raise UserError(
            f"data.root: class folders without an image in {folder}: {_shortened(empty)}; fill or remove them"
        )
    labels = np.repeat(np.array(list(number.values()), dtype=np.int64), [len(paths) for paths in listed.values()])
    return _file_split([path for paths in listed.values() for path in paths], labels, str(folder))


def _file_split(paths: list[str], labels: np.ndarray, folder: str) -> Split:
    return Split(labels, ImageFiles(paths), paths, folder)


def _image_paths(folder: Path, name: str) -> list[str]:
    """List the image files of a class at any depth, in the order of torchvision's `make_dataset`.

    It would list a loop of links some forty times over, and skip a folder that it may not read without a word.
    """
    # Of each folder the device and inode, its own and those of all above it.
    chains: dict[str, tuple[tuple[int, int], ...]] = {str(folder): (_identity(str(folder)),)}
    found: list[tuple[str, list[str]]] = []
    for directory, _, names in os.walk(os.path.join(folder, name), onerror=_refuse, followlinks=True):
        above, own = chains[os.path.dirname(directory)], _identity(directory)
        if own in above:
            raise UserError(f"data.root: {directory} leads back to a folder above it; remove that link")
        chains[directory] = (*above, own)
        found.append((directory, names))
    return [
        os.path.join(directory, name)
        for directory, names in sorted(found)
        for name in sorted(names)
        if name.lower().endswith(datasets.folder.IMG_EXTENSIONS)
    ]


def _identity(directory: str) -> tuple[int, int]:
    try:
        facts = os.stat(directory)
    except OSError as error:
        _refuse(error)
    return facts.st_dev, facts.st_ino


def _refuse(error: OSError) -> NoReturn:
    raise UserError(
        f"data.root: {error.filename} cannot be listed ({error.strerror}); mend its permissions, or remove it"
    ) from None


def _shortened(names: Sequence[str], most: int = 10) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _digits(_: DataConfig) -> tuple[Split, Split, int]:
    with files("dytrun").joinpath("assets/digits.npz").open("rb") as file:
        arrays = np.load(file)
        # 17 grey levels, 0 to 16, spread over a byte.
        pixels, labels = arrays["images"].astype(np.uint16) * 255 // 16, arrays["labels"]
    is_val = np.arange(len(labels)) % 5 == 0
    train, val = (_array_split(pixels[part].astype(np.uint8), labels[part]) for part in (~is_val, is_val))
    return train, val, 10


def _fashion_mnist(data: DataConfig) -> tuple[Split, Split, int]:
    if not data.root or not (Path(data.root) / "train-images-idx3-ubyte.gz").is_file():
        return _torchvision(data)
    splits = []
    for prefix in ("train", "t10k"):
        pixels = _idx(Path(data.root) / f"{prefix}-images-idx3-ubyte.gz", header=16).reshape(-1, 28, 28)
        splits.append(_array_split(pixels, _idx(Path(data.root) / f"{prefix}-labels-idx1-ubyte.gz", header=8)))
    return splits[0], splits[1], 10


def _idx(path: Path, header: int) -> np.ndarray:
    try:
        return np.frombuffer(gzip.decompress(path.read_bytes()), dtype=np.uint8, offset=header)
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"data.root: {path} cannot be read ({error}); fetch it again") from None


def _torchvision(data: DataConfig) -> tuple[Split, Split, int]:
    """CIFAR, Fashion-MNIST and Imagenette as torchvision keeps them."""
    root, download = data.root or "data", data.download
    try:
        if data.name == "imagenette":
            parts = [datasets.Imagenette(root, split=split, download=download and split == "train")
                     for split in ("train", "val")]  # fmt: skip
            splits = []
            for part in parts:
                # torchvision leaves them in the order in which the file system names them.
                samples = sorted((label, str(path)) for path, label in part._samples)
                labels = np.array([label for label, _ in samples], dtype=np.int64)
                splits.append(_file_split([path for _, path in samples], labels, str(part._image_root)))
            return splits[0], splits[1], len(parts[0].classes)
        kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "fashion_mnist": datasets.FashionMNIST}
        train, val = (kind[data.name](root, train=train, download=download) for train in (True, False))
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"data.root: no {data.name} in {Path(root).resolve()} ({str(error).splitlines()[0].rstrip('.')}); "
            "say where it lies, or data.download=true"
        ) from error
    splits = [_array_split(np.asarray(part.data), np.asarray(part.targets)) for part in (train, val)]
    return splits[0], splits[1], len(train.classes)


def _synthetic(data: DataConfig) -> tuple[Split, Split, int]:
    num_train, classes = data.num_train or 1, data.num_classes or 2
    pool = np.random.Generator(np.random.Philox(0)).integers(
        0, 256, (_SYNTHETIC_POOL, data.image_size, data.image_size, 3), dtype=np.uint8
    )
    splits = [Split(np.arange(num) % classes, _ArrayImages(pool)) for num in (num_train, max(1, num_train // 25))]
    return splits[0], splits[1], classes


def _array_split(pixels: np.ndarray, labels: np.ndarray) -> Split:
    return Split(labels.astype(np.int64), _ArrayImages(pixels))


_SOURCES: dict[str, Callable[[DataConfig], tuple[Split, Split, int]]] = {
    "digits": _digits,
    "fashion_mnist": _fashion_mnist,
    "cifar10": _torchvision,
    "cifar100": _torchvision,
    "imagenette": _torchvision,
    "synthetic": _synthetic,
}
