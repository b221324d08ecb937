"""Where images come from: class folders, torchvision's data sets, the embedded digits, random ones."""

import gzip
import hashlib
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from PIL import Image
from torchvision import datasets

from dytrun.config import DataConfig
from dytrun.errors import UserError

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF")
_SYNTHETIC_POOL = 16


class Split(NamedTuple):
    """Images that can be asked for by index, with their labels."""

    labels: Int[np.ndarray, "n"]
    image: Callable[[int], Image.Image]
    """Index → RGB image."""


class Data(NamedTuple):
    """Both splits of a data set."""

    train: Split
    val: Split
    num_classes: int
    fingerprint: str
    """Twelve hex digits of the names and labels of all images: data sets that differ there are different."""


def load_data(data: DataConfig) -> Data:
    """Find the images that a configuration names; none is decoded yet.

    Raises:
        UserError: a root, a split or a class is missing, or train and val disagree.
    """
    if data.name in ("imagenet", "folder"):
        train, val, classes, names = _class_folders(data)
    else:
        train, val, classes = _SOURCES[data.name](data)
        names = []
    if data.num_classes is not None and data.num_classes != classes:
        more = f" in {data.root}; for another class-per-folder tree say data=folder" if data.root else ""
        raise UserError(f"data.num_classes: {data.num_classes} is asked for, data={data.name} has {classes}{more}")
    digest = hashlib.sha256(f"{data.name} {data.image_size if data.name == 'synthetic' else ''}".encode())
    for part in (train.labels, val.labels):
        digest.update(np.ascontiguousarray(part, dtype=np.int64).tobytes())
    digest.update("\n".join(names).encode())
    return Data(train, val, classes, digest.hexdigest()[:12])


class _ArrayImages(NamedTuple):
    """Images in memory: uint8 pixels (N, H, W) or (N, H, W, 3); an index past the end starts again."""

    pixels: np.ndarray

    def __call__(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index % len(self.pixels)]).convert("RGB")


def _rgb(image: Image.Image) -> Image.Image:
    """Return an 8-bit RGB image; Pillow would cut 16-bit grey off at 255 instead of scaling it."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"{image.mode}: 32 bits a pixel, of unknown range")
    return image.convert("RGB")


class _FileImages(NamedTuple):
    paths: list[str]

    def __call__(self, index: int) -> Image.Image:
        path = self.paths[index]
        try:
            with Image.open(path, formats=_FORMATS) as file:
                return _rgb(file)
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"{path}: cannot be read as an image ({error}); mend or remove it") from None


def _class_folders(data: DataConfig) -> tuple[Split, Split, int, list[str]]:
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
    classes, val_classes = (sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) for folder in folders)
    if not classes:
        raise UserError(f"data.root: {folders[0]} holds no class folders; give a class-per-folder tree")
    if classes != val_classes:
        only_train, only_val = sorted(set(classes) - set(val_classes)), sorted(set(val_classes) - set(classes))
        lists = [f"only in {split}: {_shortened(names)}" for split, names in
                 ((data.train_split, only_train), (data.val_split, only_val)) if names]  # fmt: skip
        raise UserError(f"data.root: {root} has different classes in train and val ({'; '.join(lists)}); mend it")
    number = {name: index for index, name in enumerate(classes)}
    train, val = (_folder_split(folder, number) for folder in folders)
    names = [path for split in (train, val) for path in split.paths]
    return train.split, val.split, len(classes), names


class _FolderSplit(NamedTuple):
    split: Split
    paths: list[str]


def _folder_split(folder: Path, number: dict[str, int]) -> _FolderSplit:
    samples = datasets.folder.make_dataset(
        str(folder), number, extensions=datasets.folder.IMG_EXTENSIONS, allow_empty=True
    )
    paths, labels = [path for path, _ in samples], np.array([label for _, label in samples], dtype=np.int64)
    empty = sorted(set(number.values()) - set(labels.tolist()))
    if empty:
        names = [name for name, index in number.items() if index in empty]
        raise UserError(
            f"data.root: class folders without an image in {folder}: {_shortened(names)}; fill or remove them"
        )

    return _FolderSplit(Split(labels, _FileImages(paths)), [str(Path(path).relative_to(folder)) for path in paths])


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
            splits = [
                Split(np.array([label for _, label in part._samples]), _FileImages([path for path, _ in part._samples]))
                for part in parts
            ]
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
