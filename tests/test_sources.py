"""Where images come from: the digits, class folders and what is wrong with them, torchvision's formats."""

import gzip
import pickle
import struct

import numpy as np
import pytest
from conftest import config_of
from PIL import Image

from dytrun.errors import UserError
from dytrun.sources import load_data


def said(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_data(config_of(*overrides).data)
    assert len(caught.value.problems) == 1
    return caught.value.problems[0]


def test_the_digits_are_1797_real_images_split_by_a_fixed_rule():
    data = load_data(config_of("data=digits").data)
    assert (len(data.train.labels), len(data.val.labels), data.num_classes) == (1437, 360, 10)
    assert np.bincount(data.val.labels).tolist() == [42, 28, 26, 48, 38, 39, 30, 26, 36, 47]
    first = data.val.image(0)
    assert (first.size, first.mode, data.val.labels[0]) == ((8, 8), "RGB", 0)
    # The first row of the first image of the UCI set: 0 0 5 13 9 1 0 0, of 16.
    assert np.asarray(first)[0, :, 0].tolist() == [0, 0, 79, 207, 143, 15, 0, 0]


def test_a_class_folder_tree(image_tree):
    root = image_tree(train={"cat": 3, "dog": 2}, val={"cat": 1, "dog": 2})
    data = load_data(config_of("data=folder", f"data.root={root}").data)
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert data.val.labels.tolist() == [0, 1, 1]
    assert data.train.image(4).size == (48, 40)


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
    got = np.asarray(data.train.image(1))
    assert got.shape == (16, 16, 3)
    assert np.array_equal(got[..., 0].ravel(), np.arange(256))


def test_an_unreadable_image_is_named(image_tree):
    root = image_tree(train={"cat": 1, "dog": 1}, val={"cat": 1, "dog": 1})
    (root / "train" / "cat" / "0.jpg").write_bytes(b"<html>")
    data = load_data(config_of("data=folder", f"data.root={root}").data)
    with pytest.raises(UserError, match=r"cat/0\.jpg: cannot be read as an image"):
        data.train.image(0)


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
    assert np.array_equal(np.asarray(data.val.image(4))[..., 1], images[4])


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
    assert np.array_equal(np.asarray(data.val.image(3))[..., 0].ravel(), rows[3][:1024])


def test_fingerprints_tell_data_apart(image_tree):
    root = image_tree(train={"cat": 2, "dog": 2}, val={"cat": 1, "dog": 1})
    config = config_of("data=folder", f"data.root={root}").data
    before = load_data(config).fingerprint
    assert load_data(config).fingerprint == before
    (root / "train" / "cat" / "1.jpg").rename(root / "train" / "cat" / "9.jpg")
    assert load_data(config).fingerprint != before
