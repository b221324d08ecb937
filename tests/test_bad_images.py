"""Images as they come: every kind of them is three channels, and one that cannot be read is stood in for, or named."""

import gc
import itertools
import json
import os
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, config_of, dytrun, only, tiny
from PIL import Image
from torch.utils.data._utils.pin_memory import pin_memory

from dytrun import images
from dytrun.batch import BadImage, Batch
from dytrun.config import RunConfig
from dytrun.data import RankShare, ValBatches, train_batches
from dytrun.errors import UserError
from dytrun.images import ImageFiles, Picture, Unreadable, _heed_warnings
from dytrun.sources import Data, load_data

CPU = torch.device("cpu")
RAMP = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)


def png(width: int, height: int, rows: bytes = b"", kind: int = 2, depth: int = 8) -> bytes:
    """Write a PNG by hand: any size may stand in its header, whatever follows."""
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def palette(**options: object) -> bytes:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    return encoded(image, "PNG", **options)


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    halves = Image.new("RGB", (16, 8), (200, 0, 0))
    halves.paste((0, 0, 200), (8, 0, 16, 8))
    return encoded(halves, "JPEG", exif=exif)


# What a file holds → its size and its first and last pixel.
KINDS = {
    "rgb": (encoded(Image.new("RGB", (2, 1), (1, 2, 3)), "PNG"), (2, 1), [1, 2, 3], [1, 2, 3]),
    "grey": (png(2, 1, b"\x00\x07\xf0", kind=0), (2, 1), [7, 7, 7], [240, 240, 240]),
    "grey and alpha": (png(2, 1, b"\x00\x07\x00\xf0\x80", kind=4), (2, 1), [7, 7, 7], [240, 240, 240]),
    "rgba": (png(1, 1, b"\x00\x01\x02\x03\x00", kind=6), (1, 1), [1, 2, 3], [1, 2, 3]),
    "one bit": (png(2, 1, b"\x00\x40", kind=0, depth=1), (2, 1), [0, 0, 0], [255, 255, 255]),
    "palette": (palette(), (2, 1), [10, 20, 30], [40, 50, 60]),
    "palette, one colour transparent": (palette(transparency=1), (2, 1), [10, 20, 30], [40, 50, 60]),
    "palette with alpha": (palette(transparency=b"\x00\x80"), (2, 1), [10, 20, 30], [40, 50, 60]),
    "16-bit grey": (encoded(Image.fromarray(RAMP), "PNG"), (16, 16), [0, 0, 0], [255, 255, 255]),
    "16-bit grey TIFF": (encoded(Image.fromarray(RAMP[8:]), "TIFF"), (16, 8), [128, 128, 128], [255, 255, 255]),
    "16-bit PGM": (b"P5 2 1 65535\n" + struct.pack(">HH", 3 * 257, 65535), (2, 1), [3, 3, 3], [255, 255, 255]),
    "16-bit rgb": (png(1, 1, b"\x00\x01\xff\x80\x00\xfe\x01", kind=2, depth=16), (1, 1), [1, 128, 254], [1, 128, 254]),
    "cmyk TIFF": (encoded(Image.new("CMYK", (1, 1), (0, 255, 51, 51)), "TIFF"), (1, 1), [204, 0, 163], [204, 0, 163]),
    "cmyk JPEG": (encoded(Image.new("CMYK", (8, 8), (0, 255, 0, 0)), "JPEG"), (8, 8), [255, 0, 255], [255, 0, 255]),
    "turned by EXIF": (turned(6), (16, 8), [200, 0, 2], [0, 1, 198]),
    "long": (png(60000, 1, b"\x00" + b"\x05" * 180000), (60000, 1), [5, 5, 5], [5, 5, 5]),
}


@pytest.fixture(autouse=True)
def _as_in_a_process_of_its_own():
    """Pytest puts the warning filters back after each test."""
    _heed_warnings.cache_clear()


def pixels_of(path: Path) -> np.ndarray:
    return Picture(ImageFiles([str(path)])(0), str(path)).pixels()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["x.JPEG", "x.png"])
def test_every_kind_of_image_has_three_channels_of_eight_bits(tmp_path, kind, name):
    content, size, first, last = KINDS[kind]
    (tmp_path / name).write_bytes(content)
    pixels = pixels_of(tmp_path / name)
    assert (pixels.shape, pixels.dtype) == ((size[1], size[0], 3), np.uint8)
    assert (pixels[0, 0].tolist(), pixels[-1, -1].tolist()) == (first, last)


def test_an_image_turned_by_exif_is_read_as_it_is_stored(tmp_path):
    for orientation in (1, 6):
        (tmp_path / f"{orientation}.jpg").write_bytes(turned(orientation))
    plain, other = (pixels_of(tmp_path / f"{orientation}.jpg") for orientation in (1, 6))
    assert np.array_equal(plain, other)


class Pauses(list[float]):
    """Seconds that were slept before a file was tried again; after the n-th pause comes `then[n]`."""

    def __init__(self) -> None:
        self.then: dict[int, Callable[[], object]] = {}

    def __call__(self, seconds: float) -> None:
        self.append(seconds)
        self.then.get(len(self), int)()


@pytest.fixture
def pauses(monkeypatch) -> Pauses:
    """Nothing is slept, and how long it would have been is written down."""
    found = Pauses()
    monkeypatch.setattr(images, "time", SimpleNamespace(sleep=found))
    return found


JPEG = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)), "JPEG")
NO_IMAGE = "its content is none of JPEG, PNG, WEBP, BMP, PPM, TIFF"
BAD = {
    "truncated": (JPEG[: len(JPEG) // 2], "image file is truncated"),
    "header alone": (JPEG[:200], "Truncated File Read"),
    "empty": (b"", "the file is empty"),
    "html": (b"<!DOCTYPE html><html><body>404</body></html>", NO_IMAGE),
    "random": (bytes(np.random.default_rng(1).integers(0, 256, 10, dtype=np.uint8)), NO_IMAGE),
    "another format": (encoded(Image.new("RGB", (4, 4)), "GIF"), NO_IMAGE),
    "no width": (png(0, 5), NO_IMAGE),
    "bomb": (png(9460, 9460), "exceeds limit of 89478485 pixels"),
    "large bomb": (png(2**31 - 1, 2**31 - 1), "exceeds limit of"),
    "32 bits": (encoded(Image.new("F", (2, 2)), "TIFF"), "F: 32 bits a pixel, of unknown range"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_image_is_refused_at_once(tmp_path, pauses, kind):
    content, why = BAD[kind]
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(Unreadable) as caught:
        pixels_of(tmp_path / "x.jpg")
    assert not pauses
    assert why in caught.value.why
    assert not caught.value.stayed_away
    assert str(caught.value) == (
        f"{tmp_path}/x.jpg: cannot be read as an image ({caught.value.why}); mend or remove it"
    )


def test_what_is_no_file_is_refused_at_once(tmp_path, pauses, open_tree, as_nobody):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "itself.jpg").symlink_to("itself.jpg")
    closed = open_tree(train={"cat": 1}) / "train" / "cat" / "0.jpg"
    closed.chmod(0)
    reasons = {
        tmp_path / "pipe.jpg": "no regular file",
        tmp_path / "folder.jpg": "Is a directory",
        tmp_path / "itself.jpg": "Too many levels of symbolic links",
        closed: "Permission denied",
    }
    for path, why in reasons.items():
        with as_nobody() if path == closed else open(os.devnull), pytest.raises(Unreadable) as caught:
            pixels_of(path)
        assert caught.value.why == why
    assert not pauses


def test_a_bomb_takes_no_memory_and_nothing_is_printed(tmp_path):
    """In a process of its own, with Python's usual warnings."""
    (tmp_path / "bomb.png").write_bytes(png(9460, 9460))
    exif = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x09\x00\x12\x01"  # its directory says nine entries, and ends
    broken = JPEG[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + JPEG[2:]
    (tmp_path / "exif.jpg").write_bytes(broken)
    (tmp_path / "header.jpg").write_bytes(JPEG[:200])
    code = (
        "import resource\n"
        "from PIL import Image\n"
        "from dytrun.images import ImageFiles, Picture, Unreadable\n"
        "def shape(path): return Picture(ImageFiles([path])(0), path).pixels().shape\n"
        "print(shape('exif.jpg'))\n"
        "Image.preinit()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for name in ('bomb.png', 'header.jpg'):\n"
        "    try: shape(name)\n"
        "    except Unreadable as error: print(error.why)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    said = done.stdout.splitlines()
    assert (said[0], said[2:], done.stderr) == ("(40, 48, 3)", ["Truncated File Read", "True"], "")
    assert said[1].startswith("Image size (89491600 pixels) exceeds limit of 89478485 pixels")


def test_a_file_that_comes_back_is_waited_for(tmp_path, pauses):
    path = tmp_path / "late.jpg"
    pauses.then[2] = lambda: path.write_bytes(JPEG)
    assert pixels_of(path).shape == (40, 48, 3)
    assert pauses == [0.1, 0.4]


def test_a_file_that_stays_away_is_waited_for_once(tmp_path, pauses):
    """/proc/self/mem answers with a real input/output error where nothing is mapped."""
    for number in range(8):
        (tmp_path / f"{number}.jpg").symlink_to("/proc/self/mem")
    (tmp_path / "8.jpg").write_bytes(JPEG)
    for split, classes in (("train", 9), ("val", 1)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(classes):
                (tmp_path / split / name / f"{number}.jpg").symlink_to(tmp_path / f"{8 - number}.jpg")
    data = load_data(config_of("data=folder", f"data.root={tmp_path}").data)

    def waited(index: int) -> list[float]:
        pauses.clear()
        with pytest.raises(Unreadable, match=r"\(Input/output error\)"):
            data.train.picture(index)
        return list(pauses)

    assert waited(1) == [0.1, 0.4, 1.6]
    assert waited(1) == []
    assert waited(2) == [0.1, 0.4, 1.6]
    assert waited(3) == []  # three times in a row: it is the disk
    assert data.train.picture(0).pixels().shape == (40, 48, 3)
    assert waited(4) == [0.1, 0.4, 1.6]  # it is there again


def refusal(act: Callable[[], object]) -> str:
    """Return the problem that something ends with. It keeps no traceback, which would hold the loader's processes."""
    try:
        act()
    except UserError as error:
        (problem,) = error.problems
        return problem
    return "none"


def share(first_step: int = 0, total_steps: int = 8, batch: int = 8) -> RankShare:
    return RankShare(0, 1, batch, 1, 4, first_step, total_steps)


def batches(config: RunConfig, data: Data, workers: int = 0, first_step: int = 0) -> list[Batch]:
    return list(train_batches(config, data, share(first_step), CPU, workers))


@pytest.fixture
def spoilt(image_tree) -> tuple[RunConfig, set[Path]]:
    """A tree with four unreadable images of 32, and its run: two epochs of four steps."""
    root = image_tree(train={"cat": 16, "dog": 16}, val={"cat": 2, "dog": 2})
    bad = {"cat/3.jpg": "truncated", "cat/7.jpg": "html", "dog/0.jpg": "empty", "dog/5.jpg": "bomb"}
    for name, kind in bad.items():
        (root / "train" / name).write_bytes(BAD[kind][0])
    config = tiny("data=folder", f"data.root={root}", "data.image_size=16", "augment=light", "augment.erase_prob=0.5",
                  "augment.mixup=0.8", "global_batch=8", "epochs=2")  # fmt: skip
    return config, {root / "train" / name for name in bad}


def same(ones: list[Batch], others: list[Batch]) -> bool:
    return all(
        torch.equal(one.images, other.images)
        and torch.equal(one.targets, other.targets)
        and torch.equal(one.indices, other.indices)
        and one.bad == other.bad
        for one, other in zip(ones, others, strict=True)
    )


def test_another_image_of_the_class_stands_in_and_the_batch_says_so(spoilt):
    config, bad = spoilt
    config = config.model_copy(update={"augment": config.augment.model_copy(update={"mixup": 0.0})})
    data = load_data(config.data)
    found: dict[int, BadImage] = {}
    for epoch in (0, 1):
        of_epoch: dict[int, BadImage] = {}
        for batch in batches(config, data)[4 * epoch : 4 * epoch + 4]:
            assert set(batch.bad) <= set(batch.indices.tolist())
            assert batch.targets.tolist() == [int(index >= 16) for index in batch.indices]
            of_epoch |= batch.bad
        assert {Path(image.path) for image in of_epoch.values()} == bad
        assert all(data.train.paths[index] == image.path for index, image in of_epoch.items())
        found = found or of_epoch
        assert of_epoch == found
    for image in found.values():
        assert Path(image.used_instead).parent == Path(image.path).parent
        assert Path(image.used_instead) not in bad
    whys = {Path(image.path).name: image.why for image in found.values()}
    assert whys["7.jpg"] == NO_IMAGE and whys["0.jpg"] == "the file is empty"


def test_what_stands_in_is_augmented_as_the_image_that_was_asked_for(spoilt):
    """Put in the place of the bad file, it gives the very same batch."""
    config, _ = spoilt
    data = load_data(config.data)
    before = batches(config, data)
    used = {image.path: image.used_instead for batch in before for image in batch.bad.values()}
    assert len(used) == 4
    for path, instead in used.items():
        Path(path).write_bytes(Path(instead).read_bytes())
    after = batches(config, load_data(config.data))
    assert not any(batch.bad for batch in after)
    assert same([batch._replace(bad={}) for batch in before], after)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")
def test_workers_and_taking_up_change_nothing_of_what_stands_in(spoilt):
    config, _ = spoilt
    data = load_data(config.data)
    whole = batches(config, data)
    assert sum(len(batch.bad) for batch in whole) == 8
    for workers, first_step in ((0, 3), (1, 0), (2, 3), (2, 5), (3, 0)):
        assert same(whole[first_step:], batches(config, data, workers, first_step)), (workers, first_step)


def test_another_seed_lets_others_stand_in(spoilt):
    config, _ = spoilt
    used = []
    for seed in (0, 1, 2):
        config = config.model_copy(update={"seed": seed})
        found = [batch.bad for batch in batches(config, load_data(config.data))]
        used.append({image.path: image.used_instead for part in found for image in part.values()})
    assert used[0].keys() == used[1].keys() == used[2].keys()
    assert used[0] != used[1] != used[2] != used[0]


def test_a_file_that_goes_while_running_is_stood_in_for(spoilt):
    config, bad = spoilt
    data = load_data(config.data)
    stream = train_batches(config, data, share(), CPU, 0)
    list(itertools.islice(stream, 4))
    gone = Path(data.train.paths[1])
    gone.unlink()
    found = {Path(image.path): image.why for batch in stream for image in batch.bad.values()}
    assert found.keys() == bad | {gone}
    assert found[gone] == "No such file or directory"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_class_without_any_readable_image_is_named(spoilt, workers):
    config, _ = spoilt
    folder = Path(config.data.root or "") / "train" / "dog"
    for path in folder.iterdir():
        path.write_bytes(b"")
    problem = refusal(lambda: batches(config, load_data(config.data), workers))
    assert problem.startswith(f"{folder}: no image of this class can be read, {folder}/")
    assert problem.endswith(".jpg for one (the file is empty); mend them")


@pytest.mark.parametrize("workers", [0, 2])
def test_in_evaluation_nothing_stands_in(image_tree, workers):
    root = image_tree(train={"cat": 1, "dog": 1}, val={"cat": 20, "dog": 20})
    path = root / "val" / "dog" / "3.jpg"
    path.write_bytes(JPEG[:900])
    config = tiny("data=folder", f"data.root={root}", "data.image_size=16")
    data = load_data(config.data)
    problem = refusal(lambda: list(ValBatches(config.data, data.val, 2, workers, (0, 1, CPU))()))
    assert problem.startswith(f"{path}: cannot be read as an image (image file is truncated")
    assert problem.endswith("mend or remove it")


def test_in_calibration_nothing_stands_in(spoilt):
    config, _ = spoilt
    images = load_data(config.data).train.part(np.array([5, 3, 1]))
    seen = ValBatches(config.data, images, 2, 0, (0, 1, CPU))
    with pytest.raises(UserError, match=r"cat/3\.jpg: cannot be read as an image"):  # files 0, 1, 10 to 15, 2, 3, …
        list(ValBatches(config.data, load_data(config.data).train, 64, 0, (0, 1, CPU))())
    assert [Path(path).name for path in images.paths] == ["13.jpg", "11.jpg", "1.jpg"]
    assert [batch.indices.tolist() for batch in seen()] == [[0, 1], [2]]


def test_a_long_image_that_resizing_would_blow_up_is_refused(image_tree):
    """A short side of one pixel, brought to 18, would make 3.9 million pixels of 12 thousand; and of 60000 19.4."""
    root = image_tree(train={"cat": 2, "dog": 1}, val={"cat": 1, "dog": 1})
    (root / "val" / "cat" / "0.jpg").write_bytes(KINDS["long"][0])
    (root / "train" / "cat" / "0.jpg").write_bytes(KINDS["long"][0])
    config = tiny("data=folder", f"data.root={root}", "data.image_size=64")
    data = load_data(config.data)
    with pytest.raises(UserError, match=r"val/cat/0\.jpg.*60000×1 pixels are too long to be resized"):
        list(ValBatches(config.data, data.val, 2, 0, (0, 1, CPU))())
    for augment, num_bad in (("none", 1), ("light", 0)):  # a random crop is taken before it is resized
        config = tiny("data=folder", f"data.root={root}", "data.image_size=64", f"augment={augment}")
        (batch,) = train_batches(config, data, RankShare(0, 1, 3, 1, 1, 0, 1), CPU, 0)
        assert len(batch.bad) == num_bad


def test_what_was_bad_goes_through_pinned_memory():
    bad = {3: BadImage("a.jpg", "the file is empty", "b.jpg")}
    assert pin_memory((bad, {})) == (bad, {})


def test_the_share_of_bad_images_is_no_science():
    config = config_of("data=folder", "data.root=/images")
    assert config.data.max_bad_fraction == 0.02
    assert config_of("data=folder", "data.root=/images", "data.max_bad_fraction=0.5").science() == config.science()
    with pytest.raises(UserError, match=r"data\.max_bad_fraction: .*less than or equal to 1"):
        config_of("data=digits", "data.max_bad_fraction=1.1")


@pytest.mark.parametrize(
    ("overrides", "science_id", "pair_id"),
    [
        (("experiment=quickstart",), "f8f361a5", "edd50442"),
        (("experiment=vit_b_dyt", "data.root=/x"), "f64a5a0e", "09f4d934"),
        (("data=folder", "data.root=/x"), "85edaebd", "b2bd5378"),
    ],
)
def test_runs_keep_their_identity(overrides, science_id, pair_id):
    """Changed, every finished run would be trained once more; on purpose only, and then said in the log of runs."""
    config = config_of(*overrides)
    assert (config.science_id, config.pair_id) == (science_id, pair_id)


@pytest.mark.slow
def test_a_run_trains_to_its_end_with_a_hundredth_of_its_images_truncated(image_tree, tmp_path):
    root = image_tree(train={"cat": 150, "dog": 150}, val={"cat": 8, "dog": 8})
    for name in ("cat/4", "cat/140", "dog/77"):
        path = root / "train" / f"{name}.jpg"
        path.write_bytes(path.read_bytes()[:900])
    done = dytrun("train", *TINY, "data=folder", f"data.root={root}", "data.image_size=16", "norm=dyt",
                  "machine.workers=2", "epochs=2")  # fmt: skip
    assert (done.returncode, done.stderr.count("Traceback")) == (0, 0), done.stderr
    result = json.loads((only(tmp_path / "runs") / "result.json").read_text())
    assert (result["status"], result["steps"], result["num_val"]) == ("finished", 18, 16)


def test_after_a_bad_image_the_loader_processes_end_at_once(image_tree, monkeypatch):
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 100.0)  # so long each may be waited for
    root = image_tree(train={"cat": 1, "dog": 1}, val={"cat": 20, "dog": 20})
    (root / "val" / "dog" / "3.jpg").write_bytes(b"")
    config = tiny("data=folder", f"data.root={root}", "data.image_size=16")

    def fail() -> None:
        val = ValBatches(config.data, load_data(config.data).val, batch=2, workers=2, place=(0, 1, CPU))
        with pytest.raises(UserError, match="the file is empty"):
            list(val())

    begun = time.monotonic()
    fail()
    gc.collect()
    assert time.monotonic() - begun < 60
