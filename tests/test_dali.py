"""machine.loader=dali: the same images in the same order, with the same numbers drawn; pixels as near as stated.

Where DALI is not installed, only that this is said in one line.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, dytrun, only
from PIL import Image
from test_image_path import BATCH, CPU, STEPS, STEPS_PER_EPOCH, assert_same, batches, photo, recipe, tree_of_photos

from dytrun import resume
from dytrun.augment import Deferred, deferring, seeded, train_drawer, transform
from dytrun.batch import Batch
from dytrun.config import RunConfig
from dytrun.data import RankShare, ValBatches
from dytrun.errors import UserError
from dytrun.images import Picture
from dytrun.rand_augment import WARPING, Operation
from dytrun.sources import load_data

IS_HERE = any((one.name or "").startswith("nvidia-dali-cuda") for one in metadata.distributions())
needs_dali = pytest.mark.skipif(not IS_HERE, reason="DALI is not installed (the extra dali)")
SIZE, FILL = 224, (124, 116, 104)
# The strength of each operation, a usual one of the paper's policy. Then the mean difference of a value from Pillow's
# that is accepted, in levels of 255, and what 99.9 % of the differences stay within.
NEAR = {
    "AutoContrast": ((), 0.1, 1),
    "Equalize": ((), 1.0, 2),
    "Invert": ((), 0.0, 0),
    "Posterize": ((2,), 0.0, 0),
    "Solarize": ((26,), 0.0, 0),
    "SolarizeAdd": ((99,), 0.0, 0),
    "Color": ((1.8,), 0.01, 1),
    "Contrast": ((1.8,), 0.01, 1),
    "Brightness": ((0.2,), 0.01, 1),
    "Sharpness": ((1.8,), 0.5, 5),
    "Rotate": ((27.0,), 1.0, 25),
    "ShearX": ((0.27,), 1.0, 25),
    "ShearY": ((-0.27,), 1.0, 25),
    "TranslateXRel": ((0.405,), 1.0, 25),
    "TranslateYRel": ((-0.2,), 1.0, 25),
}


@pytest.fixture
def tree(tmp_path) -> Path:
    return tree_of_photos(tmp_path / "photos")


def by_dali(root: Path, *overrides: str) -> RunConfig:
    return recipe(root, "machine.loader=dali", *overrides)


def seen(config: RunConfig, batch: int = 4, threads: int = 1) -> list[Batch]:
    """What evaluation sees."""
    data = load_data(config.data)
    return list(ValBatches(config.data, data.val, batch, threads, (0, 1, CPU), config.machine.loader)())


def levels(images: torch.Tensor, config: RunConfig) -> torch.Tensor:
    """Normalised images, as 8-bit levels."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (config.data.mean, config.data.std))
    return (images * std + mean) * 255


def test_where_it_is_not_installed_one_line_says_so(image_tree):
    if IS_HERE:
        pytest.skip("DALI is installed")
    root = image_tree(train={"a": 2, "b": 2}, val={"a": 1, "b": 1})
    run = dytrun("train", "data=folder", f"data.root={root}", "machine.loader=dali", "model=vit_ti", "runs_dir=runs")
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.strip() == (
        "dytrun: machine.loader: dali is not installed here; pip install 'dytrun[dali]', or say machine.loader=torch"
    )
    assert not Path("runs").exists()


@needs_dali
def test_images_in_memory_are_refused():
    run = dytrun("train", *TINY, "machine.loader=dali", "runs_dir=runs")
    assert (run.returncode, run.stdout) == (2, "")
    assert "machine.loader: dali decodes JPEG files, and data=digits is in memory; leave it torch" in run.stderr
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "augmentation",
    [(), ("augment.interpolation=random",), ("augment.rand_augment=null", "augment.color_jitter=0.4"),
     ("augment=none",)],
    ids=["paper", "any filter", "colour jitter", "none"],
)  # fmt: skip
def test_what_is_left_to_somebody_else_is_what_would_have_been_done(tree, augmentation):
    """The numbers that are drawn are those of the default loader: done later, they give its pixels, bit for bit."""
    config = recipe(tree, *augmentation)
    draw = train_drawer(config.augment, config.data)
    makes, defers = transform(draw), deferring(draw)
    for number, path in enumerate(sorted(tree.glob("train/*/*"))):
        picture = Picture(path.read_bytes(), str(path))
        seeded(number)
        expected = makes(picture)
        after = torch.rand(1), np.random.rand()
        seeded(number)
        deferred = defers(Picture(path.read_bytes(), str(path)))
        assert isinstance(deferred, Deferred)
        assert (torch.rand(1), np.random.rand()) == after, "generators stand elsewhere"
        later = transform(lambda height, width, drawn=deferred.drawn: drawn)
        assert np.array_equal(later(Picture(deferred.jpeg, "")), expected)


def test_what_is_no_plain_jpeg_is_not_left(tmp_path):
    draw = train_drawer(recipe(tmp_path).augment, recipe(tmp_path).data)
    for name, mode in (("x.png", "RGB"), ("x.jpg", "CMYK")):
        photo(0).convert(mode).save(tmp_path / name)
        picture = Picture((tmp_path / name).read_bytes(), name)
        seeded(3)
        expected = transform(draw)(picture)
        seeded(3)
        assert np.array_equal(deferring(draw)(picture), expected)


@needs_dali
def test_the_same_images_in_the_same_order(tree):
    """And mixed and erased alike. Two epochs, of all kinds of JPEG."""
    config = recipe(tree)
    for one, other in zip(batches(config), batches(by_dali(tree)), strict=True):
        assert torch.equal(one.indices, other.indices)
        assert torch.equal(one.targets, other.targets)
        assert one.images.shape == other.images.shape
        difference = (levels(one.images, config) - levels(other.images, config)).abs()
        assert difference.mean() < 3
        # Images that were swapped, or augmented otherwise, are tens of levels apart.
        assert difference.mean(dim=(1, 2, 3)).max() < 8


@needs_dali
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_pixel(tree, threads):
    config = by_dali(tree)
    assert_same(batches(config, workers=1), batches(config, workers=threads))
    for one, other in zip(seen(config), seen(config, threads=threads), strict=True):
        assert torch.equal(one.images, other.images)


@needs_dali
@pytest.mark.parametrize("step", [1, 3])
def test_taken_up_at_any_step(tree, step):
    config = by_dali(tree)
    rest = batches(config, RankShare(0, 1, BATCH, 1, STEPS_PER_EPOCH, step, STEPS))
    assert_same(batches(config)[step:], rest)


@needs_dali
def test_ranks_share_out_the_same_images(tree):
    config = by_dali(tree, "augment.mix_prob=0")
    ranks = [batches(config, RankShare(rank, 2, BATCH // 2, 1, STEPS_PER_EPOCH, 0, STEPS)) for rank in (0, 1)]
    for whole, *parts in zip(batches(config), *ranks, strict=True):
        assert torch.equal(whole.images, torch.cat([part.images for part in parts]))


@needs_dali
@pytest.mark.parametrize("size", [64, 384], ids=["resized and cropped", "warped whole"])
def test_evaluation_sees_every_image_once(tree, size):
    overrides = (f"data.image_size={size}",)
    theirs, ours = seen(recipe(tree, *overrides)), seen(by_dali(tree, *overrides))
    assert [len(batch.indices) for batch in ours] == [4, 2]
    data = load_data(recipe(tree).data)
    assert torch.cat([batch.indices for batch in ours]).tolist() == list(range(len(data.val.labels)))
    assert torch.cat([batch.targets for batch in ours]).tolist() == data.val.labels.tolist()
    for one, other in zip(theirs, ours, strict=True):
        difference = (levels(one.images, recipe(tree)) - levels(other.images, recipe(tree))).abs()
        assert difference.mean() < 0.5
        assert difference.max() < 12


@needs_dali
def test_evaluation_can_be_left_in_the_middle(tree):
    config = by_dali(tree)
    data = load_data(config.data)
    val = ValBatches(config.data, data.val, 2, 1, (0, 1, CPU), "dali")
    whole = [batch.indices.tolist() for batch in val()]
    next(iter(val()))
    assert [batch.indices.tolist() for batch in val()] == whole


@needs_dali
@pytest.mark.parametrize("name", NEAR)
def test_each_operation_is_near_pillows(name, capsys):
    from dytrun.dali_graph import Look, Pipeline

    strength, mean, most = NEAR[name]
    options = {"fillcolor": FILL, "resample": Image.Resampling.BICUBIC} if name in WARPING else {}
    found = []
    for number in range(4):
        picture = Image.new("RGB", (SIZE, SIZE))
        picture.paste(photo(number).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        content = jpeg_of(picture)
        draw = train_drawer(plain().augment, plain().data)
        plain_one = draw(SIZE, SIZE)._replace(is_flipped=False)
        done = plain_one._replace(operations=(Operation(name, strength, options),))
        pipeline = Pipeline(Look(SIZE, 2, FILL), 2, 1, (CPU, 1))
        pipeline.begin([Deferred(content, plain_one), Deferred(content, done)])
        untouched, got = pipeline.finished().numpy()
        expected = transform(lambda height, width, done=done: done)(Picture(content, ""))
        assert np.array_equal(untouched, Picture(content, "").pixels()), "decoding differs"
        found.append(np.abs(got.astype(int) - expected))
    difference = np.stack(found)
    with capsys.disabled():
        sys.stdout.write(f"{name}: mean {difference.mean():.3f}, 99.9 % below {np.quantile(difference, 0.999):.0f}\n")
    assert difference.mean() <= mean
    assert np.quantile(difference, 0.999) <= most


def plain() -> RunConfig:
    return recipe(Path("/"), "augment=none", f"data.image_size={SIZE}", "data.crop_pct=1")


def jpeg_of(image: Image.Image) -> bytes:
    from io import BytesIO

    file = BytesIO()
    image.save(file, "JPEG", quality=95)
    return file.getvalue()


def spoil(path: Path) -> None:
    """Leave a header, and data that no decoder can make anything of: the quantization tables are gone."""
    path.write_bytes(path.read_bytes().replace(b"\xff\xdb", b"\xff\xfe"))


@needs_dali
def test_bad_images_are_replaced_by_the_same_others_as_in_the_default_loader(tree):
    paths = sorted(tree.glob("train/*/*"))
    spoil(paths[1])
    paths[9].write_bytes(b"no image")
    photo(4).save(paths[4].with_suffix(".png"))
    paths[4].unlink()
    for one, other in zip(batches(recipe(tree)), batches(by_dali(tree)), strict=True):
        assert dict(one.bad) == dict(other.bad)
        assert torch.equal(one.indices, other.indices)
        difference = (levels(one.images, recipe(tree)) - levels(other.images, recipe(tree))).abs()
        assert difference.mean(dim=(1, 2, 3)).max() < 8
    found = {path for batch in batches(by_dali(tree)) for path in [bad.path for bad in batch.bad.values()]}
    assert found == {str(paths[1]), str(paths[9])}


@needs_dali
def test_an_image_that_cannot_be_evaluated_is_named(tree):
    path = sorted(tree.glob("val/*/*"))[2]
    spoil(path)
    with pytest.raises(UserError, match=f"{path}: cannot be read as an image"):
        seen(by_dali(tree))


def test_another_loader_is_said():
    said = resume.remark(7, resume.differences({"loader": "torch"}, {"loader": "dali 2.4.0"}))
    assert "loader torch before, dali 2.4.0 now (the order of the images stays the same)" in said


def train_arguments(root: Path, *more: str) -> list[str]:
    arguments = [one for one in TINY if not one.startswith(("data=", "augment="))]
    return [
        *arguments, "data=folder", f"data.root={root}", "data.image_size=32", "augment=light", "epochs=4",
        "global_batch=16", "machine.workers=1", "checkpoint.every_epochs=1", *more,
    ]  # fmt: skip


@needs_dali
def test_a_run_ends_and_is_evaluated_as_with_the_default_loader(tmp_path):
    """Two classes that a colour tells apart are learned with either."""
    root, top1 = tree_of_photos(tmp_path / "photos", 96, 48), {}
    for loader in ("torch", "dali"):
        run = dytrun("train", *train_arguments(root, f"machine.loader={loader}", f"runs_dir={loader}", "epochs=12"))
        assert run.returncode == 0, run.stderr
        result = json.loads((only(tmp_path / loader) / "result.json").read_text())
        assert (result["num_val"], result["machine"]["loader"]) == (48, loader)
        top1[loader] = result["top1"]
    assert min(top1.values()) > 80
    assert abs(top1["torch"] - top1["dali"]) < 15
    evaluated = dytrun("eval", str(only(tmp_path / "dali")), "workers=2")
    assert evaluated.returncode == 0, evaluated.stderr
    assert f"{top1['dali']:.3f}" in evaluated.stdout


@needs_dali
def test_a_run_that_is_stopped_goes_on_bit_equal(tmp_path):
    root = tree_of_photos(tmp_path / "photos", 96, 16)
    whole = dytrun("train", *train_arguments(root, "machine.loader=dali", "runs_dir=whole", "epochs=40"))
    assert whole.returncode == 0, whole.stderr
    arguments = train_arguments(root, "machine.loader=dali", "runs_dir=parts", "epochs=40")
    started = subprocess.Popen(
        [sys.executable, "-m", "dytrun", "train", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True, env=os.environ,
    )  # fmt: skip
    until = time.monotonic() + 120
    while not list(Path("parts").glob("*/checkpoints/step-*")) and time.monotonic() < until:
        time.sleep(0.02)
    started.send_signal(signal.SIGTERM)
    _, said = started.communicate(timeout=200)
    assert started.returncode == 75, said
    shutil.copytree("parts", "other")
    again = dytrun("train", *arguments, "machine.workers=2")
    assert again.returncode == 0, again.stderr
    digests = [json.loads((only(tmp_path / name) / "result.json").read_text())["weights_sha256"]
               for name in ("whole", "parts")]  # fmt: skip
    assert digests[0] == digests[1]
    assert json.loads((only(tmp_path / "parts") / "result.json").read_text())["starts"][-1]["changed_build"] == {}
    # By the other loader it goes on too, and that is said.
    other = dytrun("train", *arguments, "machine.loader=torch", "runs_dir=other")
    assert other.returncode == 0, other.stderr
    changed = json.loads((only(tmp_path / "other") / "result.json").read_text())["starts"][-1]["changed_build"]
    assert list(changed) == ["loader"]
    assert changed["loader"][0].startswith("dali ")
    assert f"not bit-equal to a run that was never interrupted: loader {changed['loader'][0]} before, torch now" in (
        " ".join((other.stdout + other.stderr).split())
    )
