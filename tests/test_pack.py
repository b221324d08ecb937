"""`dytrun data pack`: from every kind of source the same images, in the same order, as from class folders."""

import io
import json
import os
import pickle
import random
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import packs
import pytest
from conftest import TINY, children_cpu_s, config_of, dytrun, only
from PIL import Image
from torchvision import datasets
from warm import essence, step_of

from dytrun import cli, folders, packers
from dytrun.compose import expand
from dytrun.pack import pack
from dytrun.shards import PackedImages, open_pack
from dytrun.sources import fingerprint_difference, load_data


def packed(*args: object) -> Path:
    """Pack in this process, with few images a shard; return the pack."""
    first, *rest = map(str, args)
    config = expand([f"source='{first}'", *rest, *([] if "shard_mib" in " ".join(rest) else ["shard_mib=0.03"])],
                    "data pack").configs[0]  # fmt: skip
    pack(config)
    return Path(config.out)


def facts(root: Path, *overrides: str):
    return load_data(config_of("data=folder", f"data.root={root}", *overrides).data)


def run(monkeypatch, capsys, *args: object) -> tuple[int, str, list[str]]:
    monkeypatch.setattr(sys, "argv", ["dytrun", *map(str, args)])
    code = cli.main()
    captured = capsys.readouterr()
    return code, captured.out, captured.err.strip().splitlines()


@pytest.fixture(scope="module")
def content() -> dict[str, bytes]:
    return packs.images(train=8, val=4)


@pytest.fixture
def source(tmp_path, content) -> Path:
    return packs.folder(tmp_path / "source", content)


def test_a_pack_is_its_source_image_for_image(tmp_path, source, content):
    out = packed(source, f"out={tmp_path / 'out'}")
    assert packs.read(out) == content
    assert list(packs.read(out)) == sorted(content)
    assert sorted(path.name for path in out.iterdir())[:3] == ["pack.json", "train-00000.shard", "train-00001.shard"]
    there, here = facts(source), facts(out)
    for split in ("train", "val"):
        one, other = getattr(there, split), getattr(here, split)
        assert [one.read(i) for i in range(len(one.labels))] == [other.read(i) for i in range(len(other.labels))]
        assert one.labels.tolist() == other.labels.tolist()
        assert [os.path.relpath(path, source) for path in one.paths] == [os.path.relpath(p, out) for p in other.paths]
        assert np.array_equal(one.picture(3).pixels(), other.picture(3).pixels())
        assert other.class_folder(-1) == str(out / split / packs.CLASSES[-1])
        chosen = np.array([5, 2])
        assert [other.part(chosen).read(i) for i in (0, 1)] == [one.read(5), one.read(2)]


def test_an_untouched_pack_has_the_fingerprint_of_its_folders(tmp_path, source):
    out = packed(source, f"out={tmp_path / 'out'}")
    there, here = facts(source), facts(out)
    assert (there.facts, there.fingerprint, there.num_classes) == (here.facts, here.fingerprint, here.num_classes)
    assert fingerprint_difference(there.facts, here.facts) == ""
    assert (there.pack, here.pack) == ("", "bytes untouched, from the class folders of source")
    (source / "val" / packs.CLASSES[0] / "new.jpg").write_bytes(b"x")
    assert fingerprint_difference(here.facts, facts(source).facts) == "val 12 -> 13 images"


def test_the_same_bytes_whatever_the_workers_the_place_and_the_file_system(tmp_path, source, content):
    elsewhere = tmp_path / "else" / "source"
    packs.folder(elsewhere, dict(random.Random(1).sample(list(content.items()), len(content))))
    for path in elsewhere.rglob("*.JPEG"):
        os.utime(path, (1, 1))
    for more in ((), ("short_side=64",)):
        expected = packs.files(packed(source, f"out={tmp_path / 'one'}", "workers=1", *more))
        assert len(expected) > 8
        for workers, root in ((2, elsewhere), (3, source), (7, elsewhere)):
            found = packed(root, f"out={tmp_path / 'two'}", f"workers={workers}", *more)
            assert packs.files(found) == expected
            shutil.rmtree(found)
        assert not [name for name, text in expected.items() if str(tmp_path).encode() in text]
        shutil.rmtree(tmp_path / "one")


def test_the_default_makes_few_files(tmp_path, source):
    out = packed(source, f"out={tmp_path / 'out'}", "shard_mib=auto")
    assert len(list(out.iterdir())) == 5


# --- shrunk


def by_pillow(data: bytes, short_side: int, quality: int) -> bytes:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    if min(image.size) > short_side:
        scale = short_side / min(image.size)
        width, height = (short_side if side == min(image.size) else int(short_side * side / min(image.size))
                         for side in image.size)  # fmt: skip
        assert abs(width / image.width - scale) < 0.02 and abs(height / image.height - scale) < 0.02
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return packs.encoded(image, "JPEG", quality=quality, subsampling="4:2:0")


@pytest.mark.parametrize("quality", [95, 60])
def test_larger_images_are_shrunk_as_pillow_would_and_smaller_ones_kept(tmp_path, source, content, quality):
    more = () if quality == 95 else (f"quality={quality}",)
    found = packs.read(packed(source, f"out={tmp_path / 'out'}", "short_side=100", *more))
    kept = shrunk = 0
    assert list(found) == sorted(content)
    for name, data in found.items():
        size = Image.open(io.BytesIO(content[name])).size
        if min(size) <= 100:
            assert data == content[name]
            kept += 1
        else:
            assert data == by_pillow(content[name], 100, quality)
            assert min(Image.open(io.BytesIO(data)).size) == 100
            shrunk += 1
    assert kept > 5 and shrunk > 5


def test_what_is_no_plain_jpeg_becomes_one_only_where_images_are_shrunk(tmp_path, source, content):
    cat = source / "train" / packs.CLASSES[0]
    image = Image.open(io.BytesIO(packs.jpeg(1, (50, 40))))
    more = {
        "a.png": packs.encoded(image, "PNG"),
        "b.jpg": packs.encoded(image.convert("CMYK"), "JPEG"),
        "c.jpg": packs.encoded(image.convert("L"), "JPEG"),
        "d.jpg": packs.encoded(image.convert("P"), "PNG"),
        "e.jpg": packs.encoded(image, "JPEG", progressive=True),
    }
    for name, data in more.items():
        (cat / name).write_bytes(data)
    place = f"train/{packs.CLASSES[0]}/"
    same = packs.read(packed(source, f"out={tmp_path / 'same'}"))
    assert {name: same[place + name] for name in more} == more
    found = packs.read(packed(source, f"out={tmp_path / 'shrunk'}", "short_side=64"))
    changed = {name for name, data in more.items() if found[place + name] != data}
    assert changed == {"a.png", "b.jpg", "d.jpg"}
    for name in changed:
        assert found[place + name] == by_pillow(more[name], 64, 95)


def test_a_shrunk_pack_says_what_it_was_made_from(tmp_path, source, monkeypatch, capsys):
    small, other = (packed(source, f"out={tmp_path / f'out{n}'}", f"short_side={n}") for n in (64, 80))
    there, here = facts(source), facts(small)
    said = "short side at most 64 px, JPEG quality 95"
    assert here.pack == f"{said}, from the class folders of source"
    text = fingerprint_difference(there.facts, json.loads(json.dumps(here.facts)))
    assert text.startswith(f"images as they were -> a pack, {said}, of ")
    assert fingerprint_difference(here.facts, there.facts).endswith("-> images as they were")
    assert " -> a pack, short side at most 80 px" in fingerprint_difference(here.facts, facts(other).facts)
    assert here.fingerprint != there.fingerprint
    code, out, _ = run(monkeypatch, capsys, "train", *TINY, "data=folder", f"data.root={small}", "data.image_size=32",
                       "global_batch=8", "dry_run=true")  # fmt: skip
    assert code == 0
    assert f"24 training and 12 validation images, 3 classes; a pack: {said}, from the class folders of source" in out


# --- other sources


@pytest.mark.parametrize("labels", ["devkit", "kaggle", "csv"])
def test_imagenets_tars_give_the_pack_of_the_class_folders(tmp_path, source, content, labels, capsys):
    root = packs.tars(tmp_path / "tars" / "source", content, labels)
    more = [f"val_labels={root / 'mine.csv'}"] if labels == "csv" else []
    out = packed(root, f"out={tmp_path / 'out'}", *more)
    assert list(packs.read(out).items()) == sorted(content.items())
    assert facts(out).facts == facts(source).facts
    assert facts(out).pack == "bytes untouched, from the tar files of source"
    assert not list(root.glob("n0*"))
    again = packed(root, f"out={tmp_path / 'again'}", "workers=3", *more)
    assert packs.files(again) == packs.files(out)


def test_tars_are_shrunk_too(tmp_path, source, content):
    root = packs.tars(tmp_path / "tars", content)
    one = packed(root, f"out={tmp_path / 'one'}", "short_side=64")
    other = packed(source, f"out={tmp_path / 'other'}", "short_side=64")
    assert packs.read(one) == packs.read(other)
    assert facts(one).facts == facts(other).facts


def test_hugging_faces_parquet_gives_the_pack_of_the_class_folders(tmp_path, source, content):
    root = packs.parquet(tmp_path / "hf", content, names=["tench, Tinca tinca", "goldfish", "Shih-Tzu"])
    out = packed(root, f"out={tmp_path / 'out'}")
    assert list(packs.read(out).items()) == sorted(content.items())
    assert facts(out).facts == facts(source).facts
    assert len(list(out.glob("train-*.shard"))) > 2
    assert packs.files(packed(root, f"out={tmp_path / 'again'}", "workers=3")) == packs.files(out)
    small = packed(root, f"out={tmp_path / 'small'}", "short_side=64")
    assert packs.read(small) == packs.read(packed(source, f"out={tmp_path / 'other'}", "short_side=64"))


@pytest.mark.parametrize("names", [["tench, Tinca tinca", "goldfish", "AC/DC"], None])
def test_parquet_of_other_data_keeps_its_numbers_and_names(tmp_path, content, names):
    root = packs.parquet(tmp_path / "hf", content, names=names, suffix=False)
    out = packed(root, f"out={tmp_path / 'out'}")
    classes = ["tench, Tinca tinca", "goldfish", "AC_DC"] if names else ["0", "1", "2"]
    assert open_pack(out).classes == classes
    place = dict(zip(packs.CLASSES, classes, strict=True))
    expected = {path.replace(path.split("/")[1], place[path.split("/")[1]], 1): data for path, data in content.items()}
    found = packs.read(out)
    assert found == expected
    images = PackedImages(out, "train", open_pack(out))
    assert images.labels.tolist() == sorted(images.labels.tolist())


# --- what there is


def test_a_tree_with_one_split_is_packed_with_a_word(tmp_path, source, capsys):
    shutil.rmtree(source / "val")
    out = packed(source, f"out={tmp_path / 'out'}")
    assert f"{source} has no val: the pack will do for what needs train alone" in capsys.readouterr().out
    assert list(open_pack(out).splits) == ["train"]
    with pytest.raises(Exception, match=r"a pack of train alone, without val; pack a source that has it"):
        facts(out)
    assert len(facts(out, "data.val_split=train").val.labels) == 24


def test_splits_may_be_called_otherwise(tmp_path, source):
    (source / "val").rename(source / "test")
    out = packed(source, f"out={tmp_path / 'out'}", "val_split=test")
    assert facts(out, "data.val_split=test").facts == facts(source, "data.val_split=test").facts


def test_imagenet_and_imagenette_take_packs(tmp_path, source):
    out = packed(source, f"out={tmp_path / 'out'}")
    for name in ("imagenet", "imagenette"):
        found = load_data(config_of(f"data={name}", f"data.root={out}", "data.num_classes=3").data)
        assert (len(found.train.labels), len(found.val.labels)) == (24, 12)
    with pytest.raises(Exception, match="1000 is asked for, data=imagenet has 3 in"):
        load_data(config_of(f"data.root={out}").data)


def test_image_files_are_known_by_torchvisions_endings():
    assert set(folders.SUFFIXES) == set(datasets.folder.IMG_EXTENSIONS)


def test_images_may_be_read_in_other_processes(tmp_path, source):
    out = packed(source, f"out={tmp_path / 'out'}")
    images = PackedImages(out, "train", open_pack(out))
    expected = images(5)
    copy = pickle.loads(pickle.dumps(images))
    assert (copy(5), copy.paths[5]) == (expected, images.paths[5])
    reader, writer = os.pipe()
    if os.fork() == 0:
        os._exit(0 if os.write(writer, images(5)) else 1)
    os.wait()
    assert os.read(reader, 1 << 20) == expected


def test_empty_files_and_odd_names_are_packed_as_they_are(tmp_path, source):
    cat = source / "train" / packs.CLASSES[0]
    more = {os.fsdecode(b"caf\xe9.jpg"): b"", "two\nlines.jpg": b"no image", " .png": b"\0" * 10}
    for name, data in more.items():
        (cat / name).write_bytes(data)
    for path in (source / "val").rglob("*.JPEG"):
        path.write_bytes(b"")
    out = packed(source, f"out={tmp_path / 'out'}")
    assert (out / "val-00000.shard").stat().st_size == 0
    found = packs.read(out)
    assert {name: found[f"train/{packs.CLASSES[0]}/{name}"] for name in more} == more
    assert facts(out).facts == facts(source).facts


# --- the command line


def test_the_command_says_what_it_made_and_what_to_type_next(tmp_path, source, monkeypatch, capsys):
    args = ("data", "pack", source, f"out={tmp_path / 'out'}", "workers=2", "short_side=64")
    code, out, err = run(monkeypatch, capsys, *args)
    assert (code, err) == (0, [])
    for text in ("36/36 images", "images/s", "MiB/s", "ETA", "train 24, val 12 images in 3 classes",
                 f"dytrun train data=folder data.root={tmp_path / 'out'}"):  # fmt: skip
        assert text in out
    before = packs.files(tmp_path / "out")
    code, out, _ = run(monkeypatch, capsys, *args)
    assert code == 0 and "complete already" in out and "images/s" not in out
    assert packs.files(tmp_path / "out") == before
    code, out, _ = run(monkeypatch, capsys, "data", "verify", tmp_path / "out")
    assert code == 0
    assert "36 images" in out and "all as they were packed (short side at most 64 px, JPEG quality 95" in out


def test_the_whole_configuration_is_shown_beside_a_directory(tmp_path, source, monkeypatch, capsys):
    for args in (("data", "pack", source, "--cfg", "job"), ("data", "pack", "--cfg", "job", f"source={source}")):
        code, out, err = run(monkeypatch, capsys, *args)
        assert (code, err) == (0, []) and f"source: {source}" in out and "short_side: null" in out


def test_a_terminal_shows_paths_that_look_like_markup(tmp_path, source):
    (tmp_path / "a[").mkdir()
    source = source.rename(tmp_path / "a[" / "b]")
    done = dytrun("data", "pack", str(source), f"out={tmp_path / 'out'}", env={"FORCE_COLOR": "1"})
    assert done.returncode == 0, done.stderr
    assert "━" in done.stdout and "36/36 images" in done.stdout


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("data", "do what? say dytrun data pack or dytrun data verify"),
        ("data pakc SRC", "'pakc' is no command; did you mean 'pack'?"),
        ("pack SRC", "'pack' is no command; did you mean 'data pack'?"),
        ("data pack", "source: pack what?"),
        ("data pack SRC", "out: where to?"),
        ("data pack SRC out=o shortside=256", "shortside: no such key; did you mean 'short_side'?"),
        ("data pack SRC out=o short_side=0", "short_side: 0"),
        ("data pack SRC out=o quality=90", "quality: 90, but without short_side=N nothing is encoded"),
        ("data pack SRC out=o keep_unreadable=true", "keep_unreadable: without short_side=N"),
        ("data pack SRC out=o workers=0", "workers: 0"),
        ("data pack SRC out=o val_labels=x.csv", "val_labels: SRC is packed from its folder, which has labels"),
        ("data pack SRC out=SRC/train/o", "out: SRC/train/o lies in the source"),
        ("data pack SRC out=SRC", "out: SRC lies in the source"),
        ("data pack SRC out=full", "out: full holds other files (notes.txt)"),
        ("data pack SRC out=full/notes.txt", "out: full/notes.txt is no directory"),
        (f"data pack SRC out={'x' * 300}", f"out: {'x' * 40}… is longer than a path can be; give another"),
        (f"data pack {'x' * 300} out=o", f"source: {'x' * 40}… is longer than a path can be; give another"),
        ("data pack SRC out=o shard_mib=0.0000001", "would make"),
        ("data pack nowhere out=o", "source: nowhere is no directory"),
        ("data pack full out=o", "source: full holds neither train/ nor val/"),
        ("data verify full", "full: is no pack"),
        ("data verify SRC more", "takes one directory"),
        ("train data=folder data.root=full", "is no folder"),
    ],
)
def test_what_is_typed_wrongly_gets_one_line(tmp_path, source, monkeypatch, capsys, args, said):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    source.rename(tmp_path / "SRC")
    code, _, err = run(monkeypatch, capsys, *args.split())
    assert code == 2
    assert any(said in line for line in err), err
    assert len(err) <= 2
    assert not (tmp_path / "o").exists()
    assert os.listdir(tmp_path / "full") == ["notes.txt"]


@pytest.mark.parametrize(
    ("line", "offered"),
    [("dytrun data ", "pack verify"), ("dytrun data pack sho", "short_side="),
     ("dytrun data pack /data/imagenet out=x keep", "keep_unreadable="), ("dytrun eval runs/x check", "checkpoint=")],
)  # fmt: skip
def test_shells_complete_it(monkeypatch, capsys, line, offered):
    monkeypatch.setenv("COMP_LINE", line)
    monkeypatch.setenv("COMP_POINT", str(len(line)))
    _, out, _ = run(monkeypatch, capsys, "-sc", "query=bash")
    assert offered in out


def test_help_and_packing_import_no_torch(tmp_path, source):
    took = []
    for _ in range(3):
        begun = children_cpu_s()
        done = dytrun("data", "pack", "--help")
        took.append(children_cpu_s() - begun)
    assert min(took) < 1
    assert "short_side: null" in done.stdout and "dytrun data verify" in done.stdout
    text = (
        "import sys; from dytrun import cli; code = cli.main(); assert code == 0, code; "
        "assert not {'torch', 'torchvision', 'timm', 'pyarrow'} & set(sys.modules)"
    )
    import subprocess

    args = ["data", "pack", str(source), f"out={tmp_path / 'out'}", "short_side=64"]
    done = subprocess.run([sys.executable, "-c", text, *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- training


TRAIN = (*TINY, "data=imagenet", "data.num_classes=3", "data.image_size=32", "global_batch=8", "augment=light",
         "epochs=12", "norm=dyt")  # fmt: skip


@pytest.mark.slow
def test_training_from_a_pack_is_bit_equal_and_may_take_over_from_the_folders(warm, tmp_path, source):
    out = packed(source, f"out={tmp_path / 'out'}")
    found = []
    for name, root, workers in (("a", source, 0), ("b", out, 1)):
        job = warm.run(tmp_path / f"log{name}", "train", *TRAIN, f"data.root={root}", f"runs_dir={tmp_path / name}",
                       f"machine.workers={workers}")  # fmt: skip
        assert job.code == 0, job.said()
        found.append(essence(tmp_path / name))
    assert found[0] == found[1]
    result = json.loads((only(tmp_path / "b") / "result.json").read_text())
    assert result["data_pack"] == "bytes untouched, from the class folders of source"
    command = ("train", *TRAIN, "checkpoint.every_minutes=0.0001", f"runs_dir={tmp_path / 'd'}")
    job = warm.start(tmp_path / "logd", *command, f"data.root={source}")
    job.until(lambda: step_of(tmp_path / "d") >= 4)
    job.kill()
    assert job.wait() == -signal.SIGKILL, "it was over too soon"
    assert job.is_gone
    job = warm.run(tmp_path / "logd", *command, f"data.root={out}")
    assert job.code == 0, job.said()
    assert essence(tmp_path / "d") == found[0]


def test_a_shrunk_image_is_what_evaluation_would_make_of_it():
    """Of 256 px, which is what evaluation resizes to at 224 px: its resizing then changes nothing."""
    data = packers.shrunk(packs.jpeg(3, (500, 375)), "x", 256, 100)
    assert Image.open(io.BytesIO(data)).size == (341, 256)
    shrunk = np.asarray(Image.open(io.BytesIO(data)), dtype=float)
    by_eval = Image.open(io.BytesIO(packs.jpeg(3, (500, 375)))).resize((341, 256), Image.Resampling.BICUBIC)
    assert np.abs(shrunk - np.asarray(by_eval, dtype=float)).mean() < 4
