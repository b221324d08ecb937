"""Sources of packs for the tests, of every kind, made of the same real images; and what a pack comes to."""

import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from dytrun.shards import PackedImages, open_pack

CLASSES = ("n01440764", "n01443537", "n02086240")


def jpeg(seed: int, size: tuple[int, int], quality: int = 90, mode: str = "RGB") -> bytes:
    """A picture of some waves and some noise."""
    rng = np.random.default_rng(seed)
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(x * a + y * b) for a, b in rng.uniform(0.01, 0.2, (3, 2))], axis=-1)
    pixels = (127 + 90 * waves + rng.normal(0, 12, (height, width, 3))).clip(0, 255).astype(np.uint8)
    return encoded(Image.fromarray(pixels).convert(mode), "JPEG", quality=quality)


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def images(train: int, val: int) -> dict[str, bytes]:
    """`split/class/name` → content, of so many images a class, named as ImageNet's are."""
    found, number = {}, 0
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(CLASSES):
            for place in range(count):
                number += 1
                file = (
                    f"{name}_{place * 7}.JPEG"
                    if split == "train"
                    else f"ILSVRC2012_val_{3 * place + label + 1:08d}.JPEG"
                )
                size = (90 + 37 * (number % 5), 60 + 23 * (number % 7))
                found[f"{split}/{name}/{file}"] = jpeg(number, size)
    return found


def folder(root: Path, content: dict[str, bytes]) -> Path:
    """Class folders."""
    for name, data in content.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def tars(root: Path, content: dict[str, bytes], labels: str = "devkit") -> Path:
    """ImageNet's tars, the classes in an order of their own; labels: devkit, kaggle, csv or none."""
    root.mkdir(parents=True, exist_ok=True)
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as outer:
        for name in reversed(CLASSES):
            file = io.BytesIO()
            with tarfile.open(fileobj=file, mode="w") as inner:
                for path, data in reversed(content.items()):
                    if path.startswith(f"train/{name}/"):
                        add(inner, path.rpartition("/")[2], data)
            add(outer, f"{name}.tar", file.getvalue())
    val = {path.rpartition("/")[2]: (path.split("/")[1], data) for path, data in content.items() if path[:3] == "val"}
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as tar:
        for name, (_, data) in sorted(val.items(), reverse=True):
            add(tar, name, data)
    order = sorted(val)
    if labels == "devkit":
        devkit(root / "ILSVRC2012_devkit_t12.tar.gz", [val[name][0] for name in order])
    elif labels == "kaggle":
        rows = [f"{name.removesuffix('.JPEG')},{val[name][0]} 1 2 3 4 {val[name][0]} 5 6 7 8 " for name in order]
        (root / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows]) + "\n")
    elif labels == "csv":
        (root / "mine.csv").write_text("".join(f"{name},{val[name][0]}\n" for name in order))
    return root


def devkit(path: Path, truth: list[str]) -> None:
    """The devkit's two files that matter; its numbers are not in the order of the names, and there are inner nodes."""
    numbers = {name: 3 - place for place, name in enumerate(CLASSES)}
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    rows = [(numbers[name], name, "a fish", "a gloss", 0) for name in CLASSES]
    rows.append((1001, "n00001740", "an entity", "all", 5))
    file = io.BytesIO()
    savemat(file, {"synsets": np.array(rows, dtype=kinds)})
    with gzip.open(path, "wb") as raw, tarfile.open(fileobj=raw, mode="w") as tar:
        lines = "".join(f"{numbers[name]}\n" for name in truth)
        add(tar, "ILSVRC2012_devkit_t12/readme.txt", b"hello")
        add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", lines.encode())
        add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", file.getvalue())


def parquet(root: Path, content: dict[str, bytes], names: list[str] | None = None, suffix: bool = True) -> Path:
    """Hugging Face's layout, rows in no order of classes, row groups of four."""
    import pyarrow as pa
    from pyarrow import parquet as pq

    (root / "data").mkdir(parents=True)
    kind = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())])
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        kind = kind.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    for split, called, num_files in (("train", "train", 2), ("val", "validation", 1)):
        paths = [path for path in content if path.startswith(f"{split}/")]
        np.random.default_rng(0).shuffle(paths)
        for number in range(num_files):
            rows = []
            for path in paths[number::num_files]:
                _, name, file = path.split("/")
                stem, extension = os.path.splitext(file)
                told = f"{stem}_{name}{extension}" if suffix else file
                rows.append({"image": {"bytes": content[path], "path": told}, "label": CLASSES.index(name)})
            file = root / "data" / f"{called}-{number:05d}-of-{num_files:05d}.parquet"
            pq.write_table(pa.Table.from_pylist(rows, schema=kind), file, row_group_size=4)
    return root


def read(pack: Path) -> dict[str, bytes]:
    """`split/class/name` → content of every image, in the pack's order."""
    manifest, found = open_pack(pack), {}
    for split in manifest.splits:
        one = PackedImages(pack, split, manifest)
        assert [manifest.classes[label] for label in one.labels] == [os.path.relpath(path, one.folder).split("/")[0]
                                                                     for path in one.paths]  # fmt: skip
        found |= {os.path.relpath(path, pack): one(index) for index, path in enumerate(one.paths)}
    return found


def files(pack: Path) -> dict[str, bytes]:
    """Everything in a directory."""
    return {str(path.relative_to(pack)): path.read_bytes() for path in sorted(pack.rglob("*")) if path.is_file()}
