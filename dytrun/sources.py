"""Where images come from: class folders, torchvision's data sets, the embedded digits, random ones."""

import gzip
import json
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from torchvision import datasets

from dytrun import folders
from dytrun.config import DataConfig
from dytrun.errors import UserError
from dytrun.images import Content, ImageFiles, Picture
from dytrun.shards import MadeFrom, PackedImages, is_pack, open_pack

_SYNTHETIC_POOL = 16


class Split(NamedTuple):
    """Images that can be asked for by index, with their labels."""

    labels: Int[np.ndarray, "n"]
    read: Callable[[int], Content]
    """Index → content; raises Unreadable where a file cannot be read."""
    paths: Sequence[str] = ()
    """Of the files, if the images are in files."""
    folder: str = ""
    """The folder of class folders that the files are in."""

    @property
    def num(self) -> int:
        """How many there are."""
        return len(self.labels)

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
    pack: str = ""
    """What was packed and how, in words, where the images are in a pack."""


def load_data(data: DataConfig) -> Data:
    """Find the images that a configuration names; none is decoded yet.

    Raises:
        UserError: a root, a split or a class is missing, or train and val disagree.
    """
    made_from, of_pack = None, {}
    if data.root and data.name in ("imagenet", "folder", "imagenette") and is_pack(Path(data.root)):
        train, val, classes, made_from, source = _packed(data, Path(data.root))
        if made_from.short_side is not None:
            of_pack = {"made_from": f"{made_from.how}, of {source}"}
    else:
        train, val, classes = _SOURCES[data.name](data)
    if data.num_classes is not None and data.num_classes != classes:
        more = f" in {data.root}; for another class-per-folder tree say data=folder" if data.root else ""
        raise UserError(f"data.num_classes: {data.num_classes} is asked for, data={data.name} has {classes}{more}")
    facts = {
        "num_train": len(train.labels), "num_val": len(val.labels), "num_classes": classes,
        "train_names": _names_digest(train), "val_names": _names_digest(val),
        "train_contents": _contents_digest(train), "val_contents": _contents_digest(val),
    } | of_pack  # fmt: skip
    fingerprint = folders.digest(data.name.encode(), json.dumps(facts).encode())
    return Data(train, val, classes, fingerprint, facts, str(made_from or ""))


def fingerprint_difference(before: Mapping[str, int | str], now: Mapping[str, int | str]) -> str:
    """Say in a few words how the data of two `Data.facts` differ; an empty text where they do not.

    Names and labels are those of every image. Contents are the pixels of images in memory, and the sizes of files: of
    at most some thousands of each split, spread evenly over it.
    """
    said = []
    if "num_train_bytes" in now:  # a text
        for name in ("train", "val"):
            one, other = (facts.get(f"num_{name}_bytes") for facts in (before, now))
            if before.get(f"{name}_contents") != now[f"{name}_contents"]:
                said.append(f"{name} {one} -> {other} bytes" if one != other else f"{name} has other bytes")
        return ", ".join(said)
    if before.get("made_from") != now.get("made_from"):
        # Of a pack whose images were shrunk nothing else could be the same.
        one, other = (facts.get("made_from", "images as they were") for facts in (before, now))
        return f"{one} -> a pack, {other}" if "made_from" in now else f"a pack, {one} -> {other}"
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
    if isinstance(split.read, PackedImages):
        return split.read.names_digest()
    start = len(split.folder) + 1
    return folders.names_digest(split.labels, os.fsencode("\n".join(path[start:] for path in split.paths)))


def _contents_digest(split: Split) -> str:
    if isinstance(split.read, _ArrayImages):
        pixels = split.read.pixels
        return folders.digest(repr(pixels.shape).encode(), np.ascontiguousarray(pixels).tobytes())
    size = split.read.size if isinstance(split.read, PackedImages) else lambda index: _size(str(split.paths[index]))
    return folders.sizes_digest(len(split.paths), size)


def _size(path: str) -> int:
    """Return the bytes of a file, or -1 of one that is not there: it is for whoever reads it to complain."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


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
    root, splits = Path(data.root), (data.train_split, data.val_split)
    for folder in [root, *(root / split for split in splits)]:
        if not os.path.isdir(folder):
            raise UserError(f"data.root: {folder} is no folder; give one that holds {data.train_split}/ and "
                            f"{data.val_split}/ with a folder for each class, or a pack")  # fmt: skip
    classes, (train, val) = folders.listed(root, splits)
    splits = [_file_split(one.paths, one.labels, one.folder) for one in (train, val)]
    return splits[0], splits[1], len(classes)


def _file_split(paths: list[str], labels: np.ndarray, folder: str) -> Split:
    return Split(labels, ImageFiles(paths), paths, folder)


def _packed(data: DataConfig, pack: Path) -> tuple[Split, Split, int, MadeFrom, str]:
    """Return the splits of a pack, what it was made from, and what tells that source from another."""
    manifest = open_pack(pack)
    found = [PackedImages(pack, split, manifest) for split in (data.train_split, data.val_split)]
    train, val = (Split(images.labels, images, images.paths, images.folder) for images in found)
    return train, val, len(manifest.classes), manifest.made_from, manifest.source_id


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
    "imagenet": _class_folders,
    "folder": _class_folders,
    "digits": _digits,
    "fashion_mnist": _fashion_mnist,
    "cifar10": _torchvision,
    "cifar100": _torchvision,
    "imagenette": _torchvision,
    "synthetic": _synthetic,
}
