"""Where images come from: the digits, class folders and what is wrong with them, torchvision's formats."""

import gzip
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import config_of
from PIL import Image
from torchvision import datasets

from dytrun.errors import UserError
from dytrun.sources import fingerprint_difference, load_data


def said(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_data(config_of(*overrides).data)
    assert len(caught.value.problems) == 1
    return caught.value.problems[0]


def test_the_digits_are_1797_real_images_split_by_a_fixed_rule():
    data = load_data(config_of("data=digits").data)
    assert (len(data.train.labels), len(data.val.labels), data.num_classes) == (1437, 360, 10)
    assert np.bincount(data.val.labels).tolist() == [42, 28, 26, 48, 38, 39, 30, 26, 36, 47]
    first = data.val.picture(0).pixels()
    assert (first.shape, first.dtype, data.val.labels[0]) == ((8, 8, 3), np.uint8, 0)
    # The first row of the first image of the UCI set: 0 0 5 13 9 1 0 0, of 16.
    assert first[0, :, 0].tolist() == [0, 0, 79, 207, 143, 15, 0, 0]


def test_a_class_folder_tree(image_tree):
    root = image_tree(train={"cat": 3, "dog": 2}, val={"cat": 1, "dog": 2})
    data = load_data(config_of("data=folder", f"data.root={root}").data)
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert data.val.labels.tolist() == [0, 1, 1]
    assert data.train.picture(4).pixels().shape == (40, 48, 3)


def test_classes_that_differ_between_train_and_val_are_listed(image_tree):
    root = image_tree(train={"cat": 1, "dog": 1}, val={"cat": 1, "emu": 1})
    text = said("data=folder", f"data.root={root}")
    assert "only in train: dog" in text
    assert "only in val: emu" in text


def test_an_empty_class_folder_is_named(image_tree):
    root = image_tree(train={"cat": 1, "dog": 1}, val={"cat": 1, "dog": 0})
    text = said("data=folder", f"data.root={root}")
    assert "without an image" in text
    assert text.endswith("dog; fill or remove them")


def test_imagenet_without_a_root_names_key_variable_and_quickstart():
    text = said("data=imagenet")
    assert all(part in text for part in ("data.root", "IMAGENET_DIR", "experiment=quickstart"))


def test_a_root_that_is_not_there(tmp_path):
    assert f"{tmp_path / 'nowhere'} is no folder" in said(f"data.root={tmp_path / 'nowhere'}")
    (tmp_path / "train").mkdir()
    assert f"{tmp_path / 'val'} is no folder" in said(f"data.root={tmp_path}")


def test_imagenet_must_have_its_classes(image_tree):
    root = image_tree(train={"cat": 1, "dog": 1}, val={"cat": 1, "dog": 1})
    assert "1000 is asked for, data=imagenet has 2 in" in said(f"data.root={root}")


def test_a_missing_download_says_what_to_do(tmp_path):
    text = said("data=cifar10", f"data.root={tmp_path}")
    assert "no cifar10 in" in text
    assert "data.download=true" in text


def test_sixteen_bit_grey_is_scaled_and_not_cut_off(image_tree):
    root = image_tree(train={"cat": 1, "dog": 1}, val={"cat": 1, "dog": 1})
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    Image.fromarray(ramp).save(root / "train" / "cat" / "1.png")
    data = load_data(config_of("data=folder", f"data.root={root}").data)
    got = data.train.picture(1).pixels()
    assert got.shape == (16, 16, 3)
    assert np.array_equal(got[..., 0].ravel(), np.arange(256))


def test_fashion_mnist_from_its_idx_files(tmp_path):
    rng = np.random.default_rng(0)
    for prefix, num in (("train", 12), ("t10k", 5)):
        images = rng.integers(0, 256, (num, 28, 28), dtype=np.uint8)
        labels = np.arange(num, dtype=np.uint8) % 10
        header = struct.pack(">IIII", 2051, num, 28, 28)
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
        header = struct.pack(">II", 2049, num)
        (tmp_path / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + labels.tobytes()))
    data = load_data(config_of("data=fashion_mnist", f"data.root={tmp_path}").data)
    assert (len(data.train.labels), data.val.labels.tolist()) == (12, [0, 1, 2, 3, 4])
    assert np.array_equal(data.val.picture(4).pixels()[..., 1], images[4])


def test_cifar10_from_torchvisions_files(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        rows = rng.integers(0, 256, (4, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": rows, "labels": [0, 1, 2, 9]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))
    # The files are ours, so their checksums are not those of the real ones.
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    data = load_data(config_of("data=cifar10", f"data.root={tmp_path}").data)
    assert (len(data.train.labels), len(data.val.labels), data.num_classes) == (20, 4, 10)
    assert data.val.labels.tolist() == [0, 1, 2, 9]
    assert np.array_equal(data.val.picture(3).pixels()[..., 0].ravel(), rows[3][:1024])


def test_images_are_listed_as_torchvision_lists_them(image_tree):
    """Any depth, hidden files, links, no other extension, in the byte order of whole folder names."""
    root = image_tree(train={"cat": 12, "dog": 2, ".hidden": 1}, val={"cat": 1, "dog": 1, ".hidden": 1})
    cat = root / "train" / "cat"
    for name in ("b", "b-c", "b/d", "B", "x.jpg"):
        (cat / name).mkdir(exist_ok=True)
        (cat / name / "Z.JPEG").touch()
    for name in ("notes.txt", ".hidden.png", "noext", "é.PnG"):
        (cat / name).touch()
    (cat / "linked").symlink_to(root / "train" / "dog")
    (cat / "dangling.webp").symlink_to("nowhere")
    (root / "train" / "dog" / "file.bmp").symlink_to(cat / "0.jpg")
    data = load_data(config_of("data=folder", f"data.root={root}").data)
    number = {".hidden": 0, "cat": 1, "dog": 2}
    expected = datasets.folder.make_dataset(str(root / "train"), number, datasets.folder.IMG_EXTENSIONS)
    assert len(expected) == 1 + (12 + 5 + 2 + 3 + 1) + 3
    assert list(zip(data.train.paths, data.train.labels.tolist(), strict=True)) == expected


def test_links_that_lead_in_a_circle_are_named(image_tree):
    root = image_tree(train={"cat": 1, "dog": 1}, val={"cat": 1, "dog": 1})
    cat, dog = root / "train" / "cat", root / "train" / "dog"
    (cat / "up").symlink_to(cat)
    assert said("data=folder", f"data.root={root}") == (
        f"data.root: {cat}/up leads back to a folder above it; remove that link"
    )
    (cat / "up").unlink()
    (cat / "x").symlink_to(dog)
    (dog / "y").symlink_to(cat)
    assert f"{cat}/x/y leads back" in said("data=folder", f"data.root={root}")
    (dog / "y").unlink()
    assert len(load_data(config_of("data=folder", f"data.root={root}").data).train.labels) == 3


def test_a_folder_that_may_not_be_listed_is_named(open_tree, as_nobody):
    root = open_tree(train={"cat": 2, "dog": 1}, val={"cat": 1, "dog": 1})
    closed = root / "train" / "cat" / "more"
    closed.mkdir(mode=0)
    config = config_of("data=folder", f"data.root={root}").data
    with as_nobody(), pytest.raises(UserError) as caught:
        load_data(config)
    expected = f"data.root: {closed} cannot be listed (Permission denied); mend its permissions, or remove it"
    assert str(caught.value) == expected
    (root / "val").chmod(0o111)
    with as_nobody(), pytest.raises(UserError, match=f"{root / 'val'} cannot be listed"):
        load_data(config)


def _difference(root: Path, change: Callable[[], object]) -> str:
    config = config_of("data=folder", f"data.root={root}").data
    before = load_data(config)
    assert load_data(config)[2:] == before[2:]
    change()
    now = load_data(config)
    assert now.fingerprint != before.fingerprint
    return fingerprint_difference(json.loads(json.dumps(before.facts)), now.facts)


def test_whatever_changes_in_a_folder_tree_is_noticed_and_said(image_tree):
    root = image_tree(train={"cat": 3, "dog": 2}, val={"cat": 1, "dog": 1})
    train, val = root / "train", root / "val"
    one = (train / "cat" / "0.jpg").read_bytes()
    assert _difference(root, lambda: (train / "cat" / "7.jpg").write_bytes(one)) == "train 5 -> 6 images"
    (val / "cat" / "1.jpg").write_bytes(one)
    assert _difference(root, (val / "cat" / "1.jpg").unlink) == "val 3 -> 2 images"
    other = "train has images of other names or labels"
    assert _difference(root, lambda: (train / "cat" / "7.jpg").rename(train / "cat" / "8.jpg")) == other
    assert _difference(root, lambda: (train / "cat" / "8.jpg").rename(train / "dog" / "8.jpg")) == other
    assert _difference(root, lambda: (train / "cat" / "0.jpg").write_bytes(one + b"!")) == (
        "train has images of other contents"
    )
    for split in ("train", "val"):
        (root / split / "emu").mkdir()
        (root / split / "emu" / "e.jpg").write_bytes(one)
    assert fingerprint_difference({"num_train": 6, "num_val": 2, "num_classes": 2},
                                  load_data(config_of("data=folder", f"data.root={root}").data).facts) == (
        "train 6 -> 7 images, val 2 -> 3 images, 2 -> 3 classes"
    )  # fmt: skip


def test_names_that_are_no_utf8_have_a_fingerprint_too(image_tree):
    root = image_tree(train={"cat": 1, "dog": 1}, val={"cat": 1, "dog": 1})
    name = os.fsdecode(b"caf\xe9.jpg")
    assert _difference(root, lambda: (root / "train" / "cat" / "0.jpg").rename(root / "train" / "cat" / name)) == (
        "train has images of other names or labels"
    )


def test_sizes_are_asked_of_2048_images_spread_over_a_large_split(tmp_path):
    for split, count in (("train", 3000), ("val", 1)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                (tmp_path / split / name / f"{number:04}.jpg").touch()
    config = config_of("data=folder", f"data.root={tmp_path}").data
    before = load_data(config).facts
    noticed = []
    for number in range(3):
        path = tmp_path / "train" / "dog" / f"{2996 + number}.jpg"
        path.write_bytes(b"x")
        noticed.append(load_data(config).facts != before)
        path.write_bytes(b"")
    assert sum(noticed) == 1  # 2048 of 6000: one in three


def test_pixels_are_in_the_fingerprint_of_images_in_memory(tmp_path):
    def write(pixel: int) -> None:
        for prefix, num in (("train", 12), ("t10k", 5)):
            images = np.full((num, 28, 28), pixel if prefix == "t10k" else 0, dtype=np.uint8)
            header = struct.pack(">IIII", 2051, num, 28, 28)
            (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
            labels = struct.pack(">II", 2049, num) + bytes(num)
            (tmp_path / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))

    config = config_of("data=fashion_mnist", f"data.root={tmp_path}").data
    write(1)
    before = load_data(config)
    write(2)
    now = load_data(config)
    assert before.fingerprint != now.fingerprint
    assert fingerprint_difference(before.facts, now.facts) == "val has images of other contents"
