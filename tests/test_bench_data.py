"""`bench=data`: real loaders on real JPEGs, timm's beside ours; what is printed and kept; the verdict; wrong input."""

import json
import multiprocessing
import time
from itertools import repeat
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import _tree, dytrun, image_files
from timm.data import auto_augment
from torch.utils.data import DataLoader, Dataset

from dytrun import bench_data, bench_stages, compose, jpeg, machine, paired, pixels, timm_loader
from dytrun.augment import seeded, train_transform
from dytrun.bench_data import Fed
from dytrun.data import RankShare, train_batches
from dytrun.errors import UserError
from dytrun.loader_arm import LoaderArm, _cpu_s_of
from dytrun.processes import readable, start_worker
from dytrun.sources import Split, load_data

CPU = torch.device("cpu")
# timm leaves the files open that it reads.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
SMALL = (
    "model=timm", "model.name=vit_tiny_patch16_224",
    "model.kwargs={patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2, global_pool: avg}",
    "data.image_size=32", "bench.batch=4", "bench.rounds=3", "bench.unit_s=0.02",
)  # fmt: skip


def config_of(*words: str):
    return compose.expand(["bench=data", *words], "bench").configs[0]


def said(line: str) -> None:
    """Progress is shown to nobody here."""


def measured(*words: str):
    return bench_data.measure(config_of(*SMALL, *words), CPU, said)


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """Make a training split alone."""
    return _tree(tmp_path_factory.mktemp("images") / "tree", {"train": {"cat": 4, "dog": 3}})


@pytest.fixture(scope="module")
def found(tree):
    """Measure ours and timm's on files, in this process and in one of their own."""
    return measured(f"data.root={tree}", "bench.peer=timm", "bench.workers=[0,1]")


def rows_of(table) -> list[dict[str, str]]:
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def test_the_stages_of_an_image_are_told_apart(found):
    stages = {row["stage"]: row for row in rows_of(found.tables[0])}
    assert tuple(stages) == bench_stages.STAGES
    ms = {name: np.median(values) for name, values in found.values["stages_ms"].items()}
    for name, row in stages.items():
        assert (row["ms"], len(found.values["stages_ms"][name])) == (f"{ms[name]:.3f}", 3)
        # Of images so small the difference that `augment` is may be less than nothing.
        assert row["images/s"] == (f"{1e3 / ms[name]:,.0f}" if ms[name] > 0 else "-")
    assert found.values["stage_images"] == 7
    assert stages["decode"]["by"] == found.values["decoder"] == jpeg.described()
    assert stages["augment"]["by"] == found.values["pixels"]


def test_a_slow_disk_is_seen_where_images_are_read(tree):
    run = config_of(*SMALL, f"data.root={tree}", "data.val_split=train").run
    split = load_data(run.data).train

    def slow(index: int) -> bytes:
        time.sleep(0.05)
        return split.read(index)

    ms = {name: np.median(values) for name, values in
          bench_stages.measure(run, split._replace(read=slow), 3).values["stages_ms"].items()}  # fmt: skip
    assert {name for name, value in ms.items() if value >= 50} == {"read", "all of it"}


def test_ours_stands_beside_timms_with_ratios_that_follow_from_the_rounds(found):
    loaders, rows = found.values["loaders"], rows_of(found.tables[1])
    names = [(one["loader"], one["workers"]) for one in loaders]
    assert names == [(name, workers) for workers in (0, 1) for name in ("timm", "timm", "dytrun")]
    assert [(row["loader"], int(row["processes"])) for row in rows] == names
    for place, (one, row) in enumerate(zip(loaders, rows, strict=True)):
        first = loaders[place - place % 3]
        speed, cpu_s = np.array(one["images_per_s"]), np.array(one["cpu_s_per_image"])
        assert row["images/s"] == f"{np.median(speed):,.1f}"
        assert row["images/s a core"] == f"{1 / np.median(cpu_s):,.1f}"
        assert 0 < np.median(speed) * np.median(cpu_s) < 2.5, "processes cannot use more processors than they are"
        if place % 3:
            ratio = np.median(speed / np.array(first["images_per_s"]))
            assert row["images/s / timm's"] == f"{ratio:.3f}"
            assert row["a core / timm's"] == f"{np.median(np.array(first['cpu_s_per_image']) / cpu_s):.3f}"
        if one["loader"] == "dytrun":
            assert any(note.startswith(f"{one['workers']} process(es): {ratio:.3f} times timm's images a second; too "
                                       "few rounds (3)") for note in found.tables[1].notes)  # fmt: skip
    json.dumps(found.values, allow_nan=False)


def test_timm_has_the_same_recipe_and_says_it(found, tree):
    peer = found.values["peer"]
    assert (peer["reads"], peer["num_train"], peer["differs"]) == (f"files of {tree}/train", 7, False)
    assert "RandomResizedCropAndInterpolation(size=(32, 32), scale=(0.08, 1.0)" in peer["transform"]
    assert "interpolation=bicubic" in peer["transform"] and "RandAugment(n=2" in peer["transform"]
    assert "ColorJitter" not in peer["transform"] and "ToTensor" in peer["transform"]
    assert any("posterize to 0 bits" in note for note in found.tables[1].notes)
    assert found.values["recipe"]["rand_augment"] == "rand-m9-mstd0.5-inc1"
    assert found.values["recipe"]["mixup"] == 0.8


def test_no_process_is_left(found):
    assert found.values["loaders"] and not multiprocessing.active_children()


@pytest.mark.parametrize("how", ["files", "bytes", "pixels"])
def test_timm_makes_the_same_pixels_of_the_same_images(how, tree):
    """With the same seed, to the bit: the recipe, the files and their order of classes are equal."""
    words = ["data=digits"] if how == "pixels" else [f"data.root={tree}", "data.val_split=train"]
    run = config_of(*SMALL, *words).run
    data = load_data(run.data)
    # Read and loaded before any seed is set: the checks of types in these tests draw from Python's generator too.
    contents = [data.train.read(index) for index in range(len(data.train.labels))]
    assert pixels.implementation() in ("native", "pillow")
    split = data.train._replace(read=contents.__getitem__, folder="" if how == "bytes" else data.train.folder)
    files = timm_loader.Files(run, split, data.num_classes, None)
    images, targets = next(files.batches(run, 4, 0, CPU))
    assert images.shape == (4, 3, 32, 32) and targets.shape == (4, data.num_classes)
    assert files.reads.startswith("files of" if how == "files" else "what dytrun reads")
    ours = train_transform(run.augment, run.data)
    for index in range(7):
        seeded(1, index)
        theirs, label = files.dataset[index]
        picture = split.picture(index)
        seeded(1, index)
        assert np.array_equal(ours(picture), np.moveaxis(np.asarray(theirs), 0, -1))
        assert label == split.labels[index]


def test_no_bits_are_black_for_the_policies_that_timm_builds_here_alone():
    from PIL import Image

    gray = Image.new("RGB", (4, 4), (128, 128, 128))
    before = dict(auto_augment.NAME_TO_OP)
    with timm_loader._posterize_of_no_bits():
        black = auto_augment.AugmentOp("PosterizeIncreasing", prob=1.0, magnitude=10)
        halves = auto_augment.AugmentOp("PosterizeIncreasing", prob=1.0, magnitude=9)
    assert before == auto_augment.NAME_TO_OP
    assert np.asarray(black(gray)).max() == 0
    assert np.asarray(halves(gray)).tolist() == np.full((4, 4, 3), 128).tolist()


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_processes_stand_still_between_turns_and_give_nothing_away():
    run = config_of(*SMALL, "data=digits").run
    share = RankShare(0, 1, 4, 1, 10, 0, 10**9)
    arm = LoaderArm(lambda: train_batches(run, load_data(run.data), share, CPU, 2), 4, CPU)
    try:
        assert len(arm._pids) == 2 and arm.batches == 2
        for _ in range(2):
            until = time.monotonic() + 60  # a signal is seen to only when its process is next on a processor
            while {state_of(pid) for pid in arm._pids} != {"T"} and time.monotonic() < until:
                time.sleep(0.01)
            assert {state_of(pid) for pid in arm._pids} == {"T"}
            before = [_cpu_s_of(pid) for pid in arm._pids]
            assert min(before) > 0
            time.sleep(0.2)
            # A process says that it stands some microseconds before the last of its time is counted.
            assert all(0 <= _cpu_s_of(pid) - was < 0.01 for pid, was in zip(arm._pids, before, strict=True))
            assert {state_of(pid) for pid in arm._pids} == {"T"}
            images_per_s, cpu_s = arm.turn()
            assert images_per_s > 0 and cpu_s > 0
        arm.plan(0.5)
        assert arm.batches > 2 and arm.batches % 2 == 0
    finally:
        arm.close()
    assert not multiprocessing.active_children()


class FailsAt(Dataset):
    def __init__(self, place: int):
        self.place = place

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> int:
        if index == self.place:
            raise UserError("one image of a thousand")
        return index


@pytest.mark.parametrize("place", [0, 4, 9])
def test_processes_end_at_once_where_a_batch_fails(place, monkeypatch):
    """In the first one, while warming up, in a turn: one that stood still would be waited for."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 100.0)  # so long each is waited for
    loader = DataLoader(FailsAt(place), 1, num_workers=2, worker_init_fn=start_worker)

    def measure() -> None:
        arm = LoaderArm(lambda: readable(iter(loader)), 1, CPU)
        try:
            arm.plan(0.1)
        finally:
            arm.close()

    begin = time.monotonic()
    with pytest.raises(UserError, match="one image of a thousand"):
        measure()
    assert not multiprocessing.active_children()
    assert time.monotonic() - begin < 60


def test_a_turn_counts_the_seconds_of_its_processes():
    """A loader in this process that burns a known time for each batch."""

    def burnt():
        for _ in repeat(None):
            until = time.process_time() + 0.01
            while time.process_time() < until:
                pass
            yield None

    arm = LoaderArm(burnt, 5, CPU)
    arm.plan(0.1)
    assert 1 <= arm.batches <= 11
    images_per_s, cpu_s = arm.turn()
    assert cpu_s == pytest.approx(0.01 / 5, rel=0.2)
    assert images_per_s <= 5 / 0.01 * 1.01  # two clocks, of the process and of the wall


@pytest.mark.parametrize("data", ["digits", "synthetic"])
def test_images_in_memory_are_not_decoded(data):
    found = measured(f"data={data}", "bench.peer=timm", "bench.workers=[0]", "bench.device=false")
    stages = {row["stage"]: row for row in rows_of(found.tables[0])}
    assert (stages["decode"]["by"], stages["decode"]["images/s"]) == ("in memory", "-")
    assert (found.values["decoder"], len(found.tables)) == (None, 2)
    assert found.values["peer"]["reads"].startswith("what dytrun reads, bytes or pixels")


def test_the_folder_of_a_pack_can_be_given_to_timm(tree, tmp_path):
    other = _tree(tmp_path / "other", {"train": {"cat": 1, "dog": 1}})
    words = (f"data.root={tree}", "bench.peer=timm", f"bench.peer_root={other}", "bench.workers=[0]")
    found = measured(*words, "bench.device=false")
    assert found.values["peer"]["reads"] == f"files of {other}/train" and found.values["peer"]["differs"]
    assert "timm finds 2 images there, another number than dytrun" in found.tables[1].notes


def test_timm_takes_the_next_image_of_a_pack_where_one_is_damaged(tree):
    split = load_data(config_of(f"data.root={tree}", "data.val_split=train").run.data).train
    contents = [bytes(split.read(index)) for index in range(3)]
    contents[1] = contents[1][: len(contents[1]) // 2]
    images = timm_loader._SameBytes(Split(np.array([4, 5, 6]), contents.__getitem__))
    images.transform = lambda image: image
    assert [images[place][1] for place in range(4)] == [4, 6, 6, 4]


def test_more_processes_than_cores_are_what_was_asked_for(tree):
    most = str(machine.cores() + 1)
    found = measured(f"data.root={tree}", "bench.peer=timm", f"bench.workers=[{most}]", "bench.device=false")
    assert {row["processes"] for row in rows_of(found.tables[1])} == {most}


def test_a_batch_larger_than_the_data_goes_on_with_the_next_epoch(tree):
    found = measured(f"data.root={tree}", "bench.batch=16", "bench.workers=[0]", "bench.device=false")
    assert found.values["batch"] == 16
    assert [row["loader"] for row in rows_of(found.tables[1])] == ["dytrun"]
    config = config_of(*SMALL, f"data.root={tree}", "data.val_split=train")
    batch = next(bench_data._our_batches(config.run, load_data(config.run.data), (16, 0), CPU))
    assert batch.images.shape == (16, 3, 32, 32)


def test_who_waits_for_whom():
    starved = Fed(per_core=420.0, cores=16, per_device=2105.0, devices=8)
    assert bench_data.verdict(starved) == (
        "data-bound: the cores load 0.40 of the images that the model could take; 40.1 cores are needed, 16 are here"
    )
    fed = Fed(per_core=420.0, cores=16, per_device=210.0, devices=8)
    assert bench_data.verdict(fed) == (
        "compute-bound: the cores could load 4.0 times the images that the model takes; 4.0 cores are needed, 16 are "
        "here"
    )
    assert "0.02 cores are needed" in bench_data.verdict(Fed(420.0, 2, 8.9, 1))


def test_the_verdict_follows_from_what_was_measured(found):
    fed = found.values["fed"]
    core = 1 / np.median(found.values["loaders"][-1]["cpu_s_per_image"])
    device = np.median(found.values["step_images_per_s"])
    assert (fed["per_core"], fed["per_device"]) == (pytest.approx(core), pytest.approx(device))
    assert fed["share"] == pytest.approx(core * fed["cores"] / (device * fed["devices"]))
    assert fed["verdict"] == found.tables[2].notes[0]
    assert fed["verdict"].startswith("data-bound" if fed["share"] < 1 else "compute-bound")
    assert found.tables[2].notes[-1].startswith("a CPU figure")


def test_what_may_be_said_of_a_ratio():
    itself = paired.Ratio(1.0, 0.97, 1.02, 9)
    assert bench_data.compared("2 process(es)", paired.Ratio(1.9, 1.8, 2.0, 9), itself) == (
        "2 process(es): 1.900 [1.800, 2.000] times timm's images a second, more (timm against itself 1.000 "
        "[0.970, 1.020])"
    )
    assert ", fewer (" in bench_data.compared("2 process(es)", paired.Ratio(0.8, 0.7, 0.9, 9), itself)
    assert "no further from 1 than the error" in bench_data.compared(
        "2 process(es)", paired.Ratio(1.05, 1.01, 1.1, 9), itself
    )


WRONG = [
    ([], "data.root: data=folder needs the folder of its images"),
    (["bench.peer=tim"], "bench.peer: 'tim' is not allowed (input should be 'timm')"),
    (["bench.worker=2"], "did you mean 'bench.workers'?"),
    (["bench.workers=[-1]"], "bench.workers: -1 does not fit in place 0"),
    (["bench.workers=[1,1]"], "bench.workers: [1, 1] is not allowed (each should be named once)"),
    (["data=digits", "bench.peer=timm", "augment=none"], "bench.peer: timm's loader trains on random crops alone"),
    (["data=digits", "bench.peer=timm", "bench.batch=3"], "bench.batch: timm mixes the images of an even batch alone"),
    (["data=digits", "bench.peer_root=."], "bench.peer_root: nobody reads it; say bench.peer=timm too"),
    (["data=digits", "bench.peer=timm", "bench.peer_root=gone"], "bench.peer_root: gone is no folder"),
    (["data.root=empty"], "data.root: empty/train is no folder"),
    (["data.root=broken"], "broken/train/dog/0.jpg: cannot be read as an image"),
]


@pytest.mark.parametrize(("words", "line"), WRONG, ids=[" ".join(words) for words, _ in WRONG])
def test_wrong_input_is_one_line_and_leaves_nothing(words, line, tmp_path, monkeypatch, capsys):
    from dytrun import cli

    (tmp_path / "empty").mkdir()
    for path in image_files(_tree(tmp_path / "broken", {"train": {"cat": 1, "dog": 1}}) / "train"):
        path.write_bytes(path.read_bytes()[:100])
    monkeypatch.setattr("sys.argv", ["dytrun", "bench=data", *words])
    assert cli.main() == 2
    err = capsys.readouterr().err
    assert line in err and len(err.splitlines()) == 1
    assert not list(tmp_path.rglob("*.json"))
    assert not multiprocessing.active_children()


def test_the_paper_s_recipe_on_class_folders_unless_something_else_is_said():
    run = config_of().run
    assert (run.data.name, run.augment.rand_augment, run.augment.cutmix) == ("folder", "rand-m9-mstd0.5-inc1", 1.0)
    run = config_of("data=digits", "augment=light").run
    assert (run.data.name, run.augment.rand_augment) == ("digits", None)
    others = [
        compose.expand([f"bench={name}"], "bench").configs[0].run for name in ("norm", "model", "trainer", "llama")
    ]
    assert {(run.data.name, run.augment.scale, run.augment.mixup) for run in others} == {("synthetic", None, 0.0)}


@pytest.mark.slow
def test_the_command_prints_three_tables_and_leaves_a_file(tree, tmp_path):
    done = dytrun("bench=data", "bench.peer=timm", f"data.root={tree}", "bench.workers=[2]", *SMALL,
                  f"runs_dir={tmp_path}")  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    for text in ("one image on one core", "the loader, 32 pixels", "does the loader feed the model?"):
        assert text in done.stdout
    (file,) = (tmp_path / "bench").glob("data-*.json")
    assert done.stdout.splitlines()[-1] == f"{file} written"
    values = json.loads(file.read_text())
    assert values["device"].startswith("CPU") and values["data"]["num_train"] == 7
    assert [len(one["images_per_s"]) for one in values["loaders"]] == [3, 3, 3]
