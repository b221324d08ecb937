"""The same (seed, epoch, index) gives the same pixels: whatever loads, decodes and computes them, and from where."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import config_of, dytrun
from PIL import Image
from timm.data import create_transform

from dytrun import jpeg, pixels
from dytrun.batch import Batch
from dytrun.config import RunConfig
from dytrun.data import RankShare, ValBatches, train_batches
from dytrun.images import Picture
from dytrun.sources import load_data

CPU = torch.device("cpu")
STEPS, STEPS_PER_EPOCH, BATCH = 4, 2, 8
SIZES = ((150, 110), (110, 150), (90, 90), (64, 200))


def photo(number: int, classes: int = 2) -> Image.Image:
    """A picture that differs from number to number, and tells its class by its colour."""
    width, height = SIZES[number % len(SIZES)]
    rng = np.random.default_rng(number)
    y, x = np.mgrid[0:height, 0:width] / 40
    waves = [np.sin(rng.uniform(0.5, 3) * x + rng.uniform(0, 6)) * np.cos(rng.uniform(0.5, 3) * y) for _ in range(3)]
    planes = np.stack(waves, axis=-1) * 60 + 110
    planes[..., number % classes] += 60
    return Image.fromarray((planes + rng.normal(0, 6, planes.shape)).clip(0, 255).astype(np.uint8))


def tree_of_photos(root: Path, num_train: int = 16, num_val: int = 6) -> Path:
    """JPEGs of all the kinds that data sets hold, in two classes."""
    options = ({"subsampling": 2}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"gray": True})
    for split, count in (("train", num_train), ("val", num_val)):
        for number in range(count):
            folder = root / split / f"class{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            how = dict(options[number // 2 % len(options)])
            image = photo(number).convert("L") if how.pop("gray", False) else photo(number)
            image.save(folder / f"{number:03}.JPEG", quality=90, **how)
    return root


@pytest.fixture
def tree(tmp_path) -> Path:
    return tree_of_photos(tmp_path / "photos")


def recipe(root: Path, *overrides: str) -> RunConfig:
    """The paper's augmentation, every image erased in half the cases."""
    return config_of("data=folder", f"data.root={root}", "data.image_size=64", "augment.erase_prob=0.5", *overrides)


def batches(config: RunConfig, share: RankShare | None = None, workers: int = 0) -> list[Batch]:
    share = share or RankShare(0, 1, BATCH, 1, STEPS_PER_EPOCH, 0, STEPS)
    return list(train_batches(config, load_data(config.data), share, CPU, workers))


def assert_same(some: list[Batch], others: list[Batch]) -> None:
    assert len(some) == len(others) > 0
    for one, other in zip(some, others, strict=True):
        assert torch.equal(one.indices, other.indices)
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.targets, other.targets)


@pytest.mark.parametrize("workers", [1, 3])
def test_whatever_the_number_of_loader_processes(tree, workers):
    config = recipe(tree)
    assert_same(batches(config), batches(config, workers=workers))


def test_whatever_the_number_of_ranks(tree):
    """Without mixing: which images are mixed depends on how a batch is split, as in the reference."""
    config = recipe(tree, "augment.mix_prob=0")
    ranks = [batches(config, RankShare(rank, 2, BATCH // 2, 1, STEPS_PER_EPOCH, 0, STEPS)) for rank in (0, 1)]
    for whole, *parts in zip(batches(config), *ranks, strict=True):
        assert torch.equal(whole.images, torch.cat([part.images for part in parts]))


@pytest.mark.parametrize("step", [1, 2, 3])
def test_taken_up_at_any_step_by_other_loaders(tree, step):
    config = recipe(tree)
    rest = batches(config, RankShare(0, 1, BATCH, 1, STEPS_PER_EPOCH, step, STEPS), workers=3)
    assert_same(batches(config)[step:], rest)


@pytest.fixture(scope="module")
def folder_and_pack(tmp_path_factory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("packed")
    done = dytrun("data", "pack", str(tree_of_photos(place / "photos")), f"out={place / 'pack'}")
    assert done.returncode == 0, done.stderr
    return place / "photos", place / "pack"


@pytest.mark.parametrize(
    ("rank", "world", "workers", "step"), [(0, 1, 0, 0), (0, 1, 1, 0), (0, 1, 3, 1), (1, 2, 0, 3), (0, 2, 3, 0)]
)
def test_from_a_pack_as_from_the_folder(folder_and_pack, rank, world, workers, step):
    """Of the bytes untouched: by any loaders, on either rank, taken up at any step."""
    folder, pack = (recipe(root) for root in folder_and_pack)
    share = RankShare(rank, world, BATCH // world, 1, STEPS_PER_EPOCH, step, STEPS)
    assert_same(batches(folder, share), batches(pack, share, workers))


def test_validation_from_a_pack_too(folder_and_pack):
    seen = []
    for config in map(recipe, folder_and_pack):
        seen.append(list(ValBatches(config.data, load_data(config.data).val, 4, 1, (0, 1, CPU))()))
    assert_same(*seen)


def test_whatever_computes_them(tree, monkeypatch):
    """Without a compiler Pillow computes; the result of a run does not depend on it."""
    config = recipe(tree)
    expected, data = batches(config), load_data(config.data)
    seen = [batch.images for batch in ValBatches(config.data, data.val, 4, 0, (0, 1, CPU))()]
    monkeypatch.setattr(pixels, "_flags", None)
    monkeypatch.setattr(jpeg, "_are_parts_wanted", False)
    assert pixels.implementation() == "pillow"
    assert_same(expected, batches(config))
    again = [batch.images for batch in ValBatches(config.data, data.val, 4, 0, (0, 1, CPU))()]
    assert all(torch.equal(*pair) for pair in zip(seen, again, strict=True))


@pytest.mark.parametrize("name", ["simplejpeg", "opencv", "pillow"])
def test_whatever_decodes_them(tree, monkeypatch, name):
    monkeypatch.setattr(jpeg, "decoder", lambda: name)
    for path in sorted(tree.glob("*/*/*")):
        expected = np.asarray(Image.open(path).convert("RGB"))
        picture = Picture(path.read_bytes(), str(path))
        assert (picture.height, picture.width) == expected.shape[:2]
        assert np.array_equal(picture.pixels(), expected), path.name


def test_simplejpeg_is_used_where_it_is_installed():
    assert jpeg.decoder() == "simplejpeg"


def test_a_jpeg_is_decoded_when_its_pixels_are_asked_for(tree):
    (path, *_) = sorted(tree.glob("train/class0/*"))
    content = path.read_bytes()
    damaged = content[: len(content) // 2] + bytes(20) + content[len(content) // 2 + 20 :]
    assert (Picture(damaged, "x").height, Picture(damaged, "x").width) == photo(0).size[::-1]
    # Pillow's verdict on it counts: it has pixels, as timm would see them.
    assert np.array_equal(Picture(damaged, "x").pixels(), np.asarray(opened_by_pillow(damaged)))


def opened_by_pillow(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


def test_evaluation_sees_every_image_as_timm_would(tree):
    config, data = recipe(tree), load_data(recipe(tree).data)
    oracle = create_transform(64, interpolation="bicubic", crop_pct=224 / 256)
    found = list(ValBatches(config.data, data.val, 4, 2, (0, 1, CPU))())
    expected = torch.stack([oracle(Image.open(path).convert("RGB")) for path in data.val.paths])
    assert torch.equal(torch.cat([batch.images for batch in found]), expected)
    assert torch.cat([batch.targets for batch in found]).tolist() == data.val.labels.tolist()
