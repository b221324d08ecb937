"""What can happen to a pack, and to whoever makes it or reads it: kills, signals, a full disk, flipped bits, bad input.

`pytest -m kill` kills ten packers; DYTRUN_KILLS=50 kills fifty.
"""

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import packs
import pytest
from conftest import TINY, ancestors, dytrun, is_over, processes
from test_disk import small_disk  # noqa: F401
from test_pack import packed
from warm import chosen

from dytrun import archives, intake, packers
from dytrun.compose import expand
from dytrun.errors import UserError
from dytrun.folders import digest
from dytrun.images import Unreadable
from dytrun.seal import sealed, unsealed
from dytrun.shards import MANIFEST, RECORD, PackedImages, open_pack, verify

KILLS = int(os.environ.get("DYTRUN_KILLS", "10"))
# Permissions bind root too.
AS_ANYBODY = ("setpriv", "--bounding-set=-dac_override,-dac_read_search") if os.geteuid() == 0 else ()
SHRUNK = ("short_side=64", "workers=2", "shard_mib=0.2")


@pytest.fixture(scope="module")
def content() -> dict[str, bytes]:
    return packs.images(train=8, val=4)


@pytest.fixture
def source(tmp_path, content) -> Path:
    return packs.folder(tmp_path / "source", content)


@pytest.fixture
def whole(tmp_path, source) -> Path:
    """A pack that is whole, of three and more shards."""
    return packed(source, f"out={tmp_path / 'whole'}", "shard_mib=0.06")


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A source that takes a second or two to be shrunk."""
    few = [packs.jpeg(seed, (640, 480)) for seed in range(12)]
    names = [f"{split}/{name}/{place}.jpg" for split, num in (("train", 90), ("val", 20)) for name in packs.CLASSES
             for place in range(num)]  # fmt: skip
    return packs.folder(tmp_path_factory.mktemp("large"), {name: few[i % 12] for i, name in enumerate(names)})


@pytest.fixture(scope="module")
def undisturbed(large, tmp_path_factory) -> dict[str, bytes]:
    return packs.files(packed(large, f"out={tmp_path_factory.mktemp('undisturbed') / 'out'}", *SHRUNK))


def said(*args: object) -> str:
    with pytest.raises(UserError) as caught:
        packed(*args)
    assert len(caught.value.problems) == 1, caught.value.problems
    assert "\n" not in caught.value.problems[0]
    return caught.value.problems[0]


# --- kills and signals


def packers_of(pid: int) -> list[int]:
    return [one for one, title in processes() if title.startswith("dytrun: packer") and pid in ancestors(one)]


def until_gone(pids: list[int], within_s: float = 30) -> bool:
    end = time.monotonic() + within_s
    while not all(map(is_over, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return all(map(is_over, pids))


def killed_and_taken_up(warm, large: Path, out: Path, draw: random.Random, only_parent: bool, at_least: int = 0) -> int:
    """Kill a packer at a random moment and start it again; return how many shards, of `at_least`, were kept."""
    command = ("data", "pack", str(large), f"out={out}", *SHRUNK)
    job = warm.start(out.with_suffix(".log"), *command)
    job.until(lambda: list(out.glob(".packing/*.json")) if draw.random() < 0.5 else out.exists())
    job.until(lambda: len(list(out.glob(".packing/*-0*.json"))) >= at_least)
    time.sleep(draw.uniform(0, 0.6))
    children = packers_of(job.pid)
    if only_parent:
        with contextlib.suppress(ProcessLookupError):  # it was faster
            os.kill(job.pid, signal.SIGKILL)
    else:
        job.kill()
    job.wait()
    assert until_gone(children)
    notes = list(out.glob(".packing/train-*.json")) + list(out.glob(".packing/val-*.json"))
    kept = {path: path.stat().st_ino for note in notes if (path := out / f"{note.stem}.shard").exists()}
    again = warm.run(out.with_suffix(".log"), *command)
    assert again.code == 0, again.said()
    assert {path: path.stat().st_ino for path in kept} == kept
    return len(kept)


@pytest.mark.parametrize("number", range(3))
def test_a_pack_that_was_killed_ends_byte_for_byte_equal(warm, large, undisturbed, tmp_path, number):
    killed_and_taken_up(warm, large, tmp_path / "out", chosen(number), only_parent=number == 1)
    assert packs.files(tmp_path / "out") == undisturbed


@pytest.mark.kill
def test_packs_that_were_killed_again_and_again_end_byte_for_byte_equal(warm, large, undisturbed, tmp_path):
    kept = []
    for number in range(KILLS):
        draw, at_least = chosen(100 + number), 5 if number % 5 == 4 else 0
        kept.append(killed_and_taken_up(warm, large, tmp_path / "out", draw, number % 2 == 1, at_least))
        assert packs.files(tmp_path / "out") == undisturbed
        shutil.rmtree(tmp_path / "out")
    assert max(kept) > 3, kept


def test_killed_at_every_start_it_is_whole_in_the_end(warm, large, undisturbed, tmp_path):
    out, draw = tmp_path / "out", chosen(7)
    command = ("data", "pack", str(large), f"out={out}", *SHRUNK)
    for _ in range(4):
        job = warm.start(tmp_path / "log", *command)
        job.until(lambda: out.exists())
        time.sleep(draw.uniform(0.1, 0.5))
        job.kill()
        job.wait()
    assert warm.run(tmp_path / "log", *command).code == 0
    assert packs.files(out) == undisturbed


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_stops_it_and_the_same_command_goes_on(warm, large, undisturbed, tmp_path, name):
    out = tmp_path / "out"
    command = ("data", "pack", str(large), f"out={out}", *SHRUNK)
    job = warm.start(tmp_path / "log", *command)
    job.until(lambda: list(out.glob("*.shard")))
    children = packers_of(job.pid)
    os.killpg(job.pid, signal.Signals[name])
    assert job.wait() == 75, job.said()
    assert children and until_gone(children)
    assert job.said().splitlines()[-1] == (
        "dytrun: stopped; type the command again, and it goes on after the files that are whole"
    )
    assert not (out / MANIFEST).exists()
    assert not list(out.glob(".packing/.*"))
    assert warm.run(tmp_path / "log", *command).code == 0
    assert packs.files(out) == undisturbed


def test_a_packing_process_that_dies_is_named(warm, large, undisturbed, tmp_path):
    out = tmp_path / "out"
    command = ("data", "pack", str(large), f"out={out}", *SHRUNK)
    job = warm.start(tmp_path / "log", *command)
    job.until(lambda: list(out.glob("*.shard")) and packers_of(job.pid))
    victim = packers_of(job.pid)[0]
    os.kill(victim, signal.SIGKILL)
    assert job.wait() == 1, job.said()
    assert f"packing process {victim} died (SIGKILL)" in job.said().splitlines()[-1]
    assert job.is_gone
    assert warm.run(tmp_path / "log", *command).code == 0
    assert packs.files(out) == undisturbed


def test_a_packing_process_that_dies_between_two_files_is_named(warm, large, tmp_path):
    out = tmp_path / "out"
    job = warm.start(tmp_path / "log", "data", "pack", str(large), f"out={out}", *SHRUNK)
    job.until(lambda: list(out.glob("*.shard")) and packers_of(job.pid))
    victims = packers_of(job.pid)
    os.kill(job.pid, signal.SIGSTOP)  # it cannot hand out another file
    done = 0
    while done != (done := len(list(out.glob(".packing/*-0*.json")))) or any(map(is_busy, victims)):
        time.sleep(0.2)
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    assert until_gone(victims)
    os.kill(job.pid, signal.SIGCONT)
    assert job.wait() == 1, job.said()
    assert any(f"packing process {victim} died (SIGKILL)" in job.said().splitlines()[-1] for victim in victims)


def is_busy(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "S"


def test_a_lock_that_was_left_behind_a_whole_pack_goes(source, tmp_path):
    out = packed(source, f"out={tmp_path / 'out'}")
    before = packs.files(out)
    (out / ".lock").touch()
    packed(source, f"out={out}")
    assert packs.files(out) == before


def test_two_packers_in_one_directory_are_one_too_many(warm, large, undisturbed, tmp_path):
    out = tmp_path / "out"
    first = warm.start(tmp_path / "log", "data", "pack", str(large), f"out={out}", *SHRUNK)
    first.until(lambda: list(out.glob("*.shard")))
    os.kill(first.pid, signal.SIGSTOP)
    second = dytrun("data", "pack", str(large), f"out={out}", *SHRUNK)
    os.kill(first.pid, signal.SIGCONT)
    assert second.returncode == 2
    assert second.stderr == f"dytrun: out: another process packs into {out}; wait for it, or choose another directory\n"
    assert first.wait() == 0, first.said()
    assert packs.files(out) == undisturbed


def begun(source: Path, out: Path, *more: str) -> Path:
    """Leave a pack as a kill after its shards would."""
    packed(source, f"out={out}", *more)
    shutil.copytree(out, f"{out}-whole")
    manifest = open_pack(out)
    (out / ".packing").mkdir()
    (out / ".packing" / "plan.json").write_bytes(sealed(manifest.made_from.model_dump(mode="json")))
    for name in (MANIFEST, "train.index", "val.index"):
        (out / name).unlink()
    return out


@pytest.mark.parametrize("what", ["image", "option", "name"])
@pytest.mark.parametrize("is_whole", [False, True])
def test_another_source_or_other_options_are_refused_with_the_difference(tmp_path, source, what, is_whole):
    out = tmp_path / "out"
    packed(source, f"out={out}") if is_whole else begun(source, out)
    before, more = packs.files(out), []
    if what == "image":
        (source / "train" / packs.CLASSES[1] / "new.jpg").write_bytes(b"x")
        expected = "train has images of other names, labels or sizes, splits.train.num 24 -> 25"
    elif what == "option":
        more = ["short_side=64"]
        expected = "short_side None -> 64"
    else:
        source = source.rename(tmp_path / "other")
        expected = "name source -> other"
    text = said(source, f"out={out}", *more)
    assert "of another source or with other options (there -> here: " in text
    assert expected in text.replace("quality None -> 95, ", "")
    assert {name: raw for name, raw in packs.files(out).items() if name != ".lock"} == before


def test_a_shard_is_trusted_only_if_it_is_as_its_note_says(warm, large, undisturbed, tmp_path):
    out = tmp_path / "out"
    command = ("data", "pack", str(large), f"out={out}", *SHRUNK)
    job = warm.start(tmp_path / "log", *command)
    job.until(lambda: len(list(out.glob(".packing/*-0*.json"))) >= 4)
    job.kill()
    job.wait()
    first, second, third, fourth = sorted(out.glob(".packing/*-0*.json"))[:4]
    flip(out / f"{first.stem}.shard", 99)
    flip(second, 500)
    (out / f"{third.stem}.shard").unlink()
    shutil.copy(out / f"{first.stem}.shard", out / f"{fourth.stem}.shard")
    assert warm.run(tmp_path / "log", *command).code == 0
    assert packs.files(out) == undisturbed


# --- damage


def flip(path: Path, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[bit // 8 % len(raw)] ^= 1 << bit % 8
    path.write_bytes(raw)


def read_all(pack: Path) -> list[str]:
    """Read every image as training does; return what the reader complained of."""
    problems = []
    try:
        manifest = open_pack(pack)
        splits = [PackedImages(pack, split, manifest) for split in manifest.splits]
    except UserError as error:
        return list(error.problems)
    for images in splits:
        for index in range(len(images.labels)):
            try:
                images(index)
            except UserError as error:
                problems += error.problems
    return problems


def verified(pack: Path) -> list[str]:
    try:
        return verify(pack, open_pack(pack), lambda images, num_bytes, is_work: None)
    except UserError as error:
        return list(error.problems)


def test_a_whole_pack_is_found_whole(whole):
    assert verified(whole) == []
    assert read_all(whole) == []


def test_each_of_300_flipped_bits_is_found_by_verify_and_by_the_reader(whole, content):
    draw, names = chosen(1), sorted(path.name for path in whole.iterdir())
    assert len(names) >= 6
    for number in range(300):
        path = whole / names[number % len(names)]
        raw = path.read_bytes()
        bit = draw.randrange(8 * len(raw))
        flip(path, bit)
        found, read = verified(whole), read_all(whole)
        assert found and read, (path.name, bit)
        if path.suffix == ".shard":
            assert len(read) == 1 and str(path) in read[0] and "dytrun data verify" in read[0]
            assert found == [read[0].partition(";")[0]]
        else:
            assert len(read) == 1 and path.name in read[0]
        path.write_bytes(raw)
    assert packs.read(whole) == content


@pytest.mark.parametrize("name", ["pack.json", "train.index", "val.index", "train-00000.shard", "val-00000.shard"])
@pytest.mark.parametrize("how", ["cut", "empty", "missing", "longer", "zeros"])
def test_files_that_are_cut_off_missing_or_too_long_are_found(whole, name, how):
    path = whole / name
    raw = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes({"cut": raw[:-1], "empty": b"", "longer": raw + b"\0", "zeros": bytes(len(raw))}[how])
    for problems in (verified(whole), read_all(whole)):
        assert problems and all(problem.startswith(str(whole)) for problem in problems)
        assert all("\n" not in problem for problem in problems)


def test_shards_that_have_changed_places_are_found(whole):
    one, other = whole / "train-00000.shard", whole / "train-00001.shard"
    raw = one.read_bytes()
    one.write_bytes(other.read_bytes()[: len(raw)].ljust(len(raw), b"\0"))
    assert verified(whole) and read_all(whole)


def test_an_index_of_another_pack_is_refused(whole, tmp_path, source):
    other = packed(source, f"out={tmp_path / 'other'}", "short_side=64")
    shutil.copy(other / "train.index", whole / "train.index")
    text = f"{whole}/train.index: does not have its SHA-256: it is damaged, or of another pack; pack it again"
    assert read_all(whole) == [text]
    assert text in verified(whole)


def test_an_unfinished_pack_is_refused(tmp_path, source):
    out = begun(source, tmp_path / "out")
    text = (
        f"{out}: is not a whole pack, it has no pack.json; type dytrun data pack … again, and it goes on where it was"
    )
    assert read_all(out) == verified(out) == [text]
    done = dytrun("train", *TINY, "data=folder", f"data.root={out}", "dry_run=true")
    assert (done.returncode, done.stderr) == (2, f"dytrun: {text}\n")
    packed(source, f"out={out}")
    assert packs.files(out) == packs.files(Path(f"{out}-whole"))


@pytest.mark.parametrize("name", ["train-00001.shard", "val.index", "pack.json"])
@pytest.mark.parametrize("is_cut", [False, True])
def test_a_pack_is_complete_only_with_all_its_files(tmp_path, source, whole, name, is_cut):
    raw = (whole / name).read_bytes()
    (whole / name).unlink()
    if is_cut:
        (whole / name).write_bytes(raw[:-1])
    text = said(source, f"out={whole}", "shard_mib=0.06")
    assert str(whole / name) in text or (name, is_cut) == ("pack.json", False)
    assert text.startswith("out: ") and ("remove" in text or "other files" in text)


@pytest.mark.parametrize("name", ["pack.json", "train-00000.shard", "val.index"])
def test_a_named_pipe_in_the_place_of_a_file_is_not_waited_for(whole, name):
    (whole / name).unlink()
    os.mkfifo(whole / name)
    for problems in (verified(whole), read_all(whole)):
        assert problems and "is no" in problems[0]


def test_verify_reads_each_shard_once_and_to_its_end(whole):
    values = unsealed((whole / MANIFEST).read_bytes())
    values["splits"]["train"]["shards"][1]["sha256"] = "0" * 64
    (whole / MANIFEST).write_bytes(sealed(values))
    assert verified(whole) == [f"{whole}/train-00001.shard: does not have its SHA-256"]


def test_only_what_has_just_been_written_counts_as_work(warm, large, tmp_path):
    out = tmp_path / "out"
    command = ("data", "pack", str(large), f"out={out}", *SHRUNK)
    job = warm.start(tmp_path / "log", *command)
    job.until(lambda: len(list(out.glob(".packing/*-0*.json"))) >= 2)
    job.kill()
    job.wait()
    job = warm.run(tmp_path / "log", *command)
    assert job.code == 0, job.said()
    (took,) = [line for line in job.said().splitlines() if "took" in line]
    assert "of the images were there already" in took and "images/s" not in took


def test_a_whole_pack_that_may_not_be_written_is_complete(whole, source):
    whole.chmod(0o555)
    command = [*AS_ANYBODY, sys.executable, "-m", "dytrun", "data", "pack", source, f"out={whole}", "shard_mib=0.06"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    whole.chmod(0o755)
    assert done.returncode == 0 and f"{whole}: complete already" in done.stdout, done.stderr


def test_a_source_that_may_not_be_read_gets_one_line(tmp_path, content):
    root = packs.tars(tmp_path / "tars", content)
    (root / "ILSVRC2012_img_train.tar").chmod(0)
    root.joinpath("train").mkdir()
    for mode, expected in ((0o755, "img_train.tar: Permission denied"), (0, "tars is no directory that can be read (")):
        root.chmod(mode)
        command = [*AS_ANYBODY, sys.executable, "-m", "dytrun", "data", "pack", root, f"out={tmp_path}/out"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert expected in done.stderr
    root.chmod(0o755)


def test_a_file_too_many_is_named(whole):
    (whole / "train-00099.shard").write_bytes(b"x")
    assert verified(whole) == [f"{whole}/train-00099.shard: is no part of the pack"]


def test_a_shard_that_is_cut_off_while_it_is_read_ends_no_process(whole):
    images = PackedImages(whole, "train", open_pack(whole))
    images(0)
    os.truncate(whole / "train-00000.shard", 10)
    with pytest.raises(UserError, match=r"train-00000\.shard: too short; dytrun data verify"):
        images(1)


def forged(pack: Path, change: Callable[[dict, np.ndarray], None]) -> None:
    """Change pack.json and an index, and mend all digests: what somebody would who means harm."""
    values = unsealed((pack / MANIFEST).read_bytes())
    num = values["splits"]["train"]["num"]
    raw = (pack / "train.index").read_bytes()
    records = np.frombuffer(raw[: num * RECORD.itemsize], RECORD).copy()
    values["splits"]["train"]["index"] = {}
    change(values, records)
    raw = records.tobytes() + raw[num * RECORD.itemsize :]
    (pack / "train.index").write_bytes(raw)
    values["splits"]["train"]["index"] |= {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (pack / MANIFEST).write_bytes(sealed(values))


def put(name: str, value: int) -> Callable[[dict, np.ndarray], None]:
    return lambda values, records: records[name].__setitem__(3, value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (put("offset", 2**64 - 1), "names images that no shard has"),
        (put("offset", 10**9), "names images that no shard has"),
        (put("length", 2**32 - 1), "names images that no shard has"),
        (put("shard", 77), "names images that no shard has"),
        (put("label", 3), "names images that no shard has"),
        (lambda values, records: values["splits"]["train"]["shards"][0].update(bytes=2**70), "is not as it should be"),
        (lambda values, records: values["splits"]["train"].update(num=10**12), "too short for 1000000000000 images"),
        (lambda values, records: values["splits"]["train"].update(num=-1), "splits.train.num is not as it should be"),
        (lambda values, records: values["splits"]["train"].update(num=23), "names images that no shard has"),
        (lambda values, records: values["splits"]["train"].update(shards=[]), "names images that no shard has"),
        (
            lambda values, records: values["splits"].update({"../../etc": values["splits"]["val"]}),
            "is not as it should be",
        ),
        (lambda values, records: values.update(format=2), "format 2, and this dytrun reads 1"),
        (lambda values, records: values.update(more=1), "more is not as it should be"),
    ],
)
def test_numbers_that_cannot_be_are_refused_before_they_are_used(whole, change, expected):
    forged(whole, lambda values, records: None)
    assert read_all(whole) == []
    forged(whole, change)
    (problem,) = read_all(whole)
    assert expected in problem


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"7", b"[" * 100_000, b"\xff\xfe", b'{"sealed_by": "0"}'])
def test_a_manifest_that_is_something_else_is_refused(whole, raw):
    (whole / MANIFEST).write_bytes(raw)
    assert read_all(whole) == [f"{whole}/pack.json: it is damaged: it does not have its own digest; pack it again"]


@pytest.mark.slow
def test_training_stops_at_a_flipped_bit_before_the_image_is_used(warm, tmp_path, whole):
    flip(whole / "train-00001.shard", 4001)
    job = warm.run(tmp_path / "log", "train", *TINY, "data=folder", f"data.root={whole}", "data.image_size=32",
                   "global_batch=24", f"runs_dir={tmp_path / 'runs'}", "machine.workers=1")  # fmt: skip
    assert job.code == 2, job.said()
    last = job.said().splitlines()[-1]
    assert f"dytrun: {whole}/train-00001.shard: {whole}/train/n0" in last
    assert f"is not as it was packed; dytrun data verify {whole} says what else is damaged" in last
    assert "Traceback" not in job.said()
    done = dytrun("data", "verify", str(whole))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 2 and "train-00001.shard" in done.stderr


# --- a disk that is full


def test_too_little_room_is_said_before_anything_is_written(tmp_path, large, small_disk):  # noqa: F811
    disk = small_disk(4)
    text = said(large, f"out={disk / 'out'}", "shard_mib=1")
    assert "MiB are free at" in text and "and the pack takes" in text
    assert not list((disk / "out").glob("*.shard"))


def test_a_disk_that_fills_up_costs_nothing_that_was_done(warm, tmp_path, large, undisturbed, small_disk):  # noqa: F811
    size = sum(map(len, undisturbed.values()))
    disk = small_disk(1 + size // 2**21)
    command = ("data", "pack", str(large), f"out={disk / 'out'}", *SHRUNK)
    job = warm.run(tmp_path / "log", *command)
    assert job.code == 2, job.said()
    last = job.said().splitlines()[-1]
    assert last.startswith(f"dytrun: out: {disk / 'out'}")
    assert "No space left on device" in last and "make room, and type the command again: what is whole stays" in last
    assert "Traceback" not in job.said() and job.is_gone
    kept = {path: path.stat().st_ino for path in (disk / "out").glob("*.shard")}
    assert len(kept) >= 2 and not list((disk / "out").glob(".packing/.*.partial"))
    assert read_all(disk / "out")[0].startswith(f"{disk / 'out'}: is not a whole pack")
    subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
    assert warm.run(tmp_path / "log", *command).code == 0
    assert packs.files(disk / "out") == undisturbed
    noted = {path for path in kept if path.stat().st_ino == kept[path]}
    assert len(noted) >= len(kept) - 2  # one a process may have been whole and without its note


# --- bad input


def test_an_unreadable_image_is_listed_where_images_are_shrunk(tmp_path, source, content):
    cat = source / "train" / packs.CLASSES[0]
    good = content[f"train/{packs.CLASSES[0]}/{packs.CLASSES[0]}_0.JPEG"]
    bad = {
        "cut.jpg": good[: len(good) // 2],
        "empty.jpg": b"",
        "page.jpg": b"<html>",
        "short.png": b"\x89PNG\r\n\x1a\n",
    }
    for name, raw in bad.items():
        (cat / name).write_bytes(raw)
    text = said(source, f"out={tmp_path / 'out'}", "short_side=64")
    assert text.startswith(f"source: 4 of 40 images cannot be read as images: {packs.CLASSES[0]}/cut.jpg (")
    assert "and 1 more; mend them" in text and text.endswith("keep_unreadable=true")
    assert not (tmp_path / "out" / MANIFEST).exists()
    out = packed(source, f"out={tmp_path / 'out'}", "short_side=64", "keep_unreadable=true")
    found = packs.read(out)
    assert {name: found[f"train/{packs.CLASSES[0]}/{name}"] for name in bad} == bad
    assert open_pack(out).splits["train"].unreadable == [f"{packs.CLASSES[0]}/{name}" for name in sorted(bad)]
    whole = packed(source, f"out={tmp_path / 'at_once'}", "short_side=64", "keep_unreadable=true")
    assert packs.files(whole) == packs.files(out)
    same = packed(source, f"out={tmp_path / 'same'}")
    assert {name: packs.read(same)[f"train/{packs.CLASSES[0]}/{name}"] for name in bad} == bad


def test_files_that_cannot_be_opened_are_named(tmp_path, source, open_tree, as_nobody):
    root = open_tree(train={"cat": 3}, val={"cat": 1})
    closed = root / "train" / "cat" / "1.jpg"
    closed.chmod(0)
    (root.parent / "out").mkdir()
    (root.parent / "out").chmod(0o777)
    with as_nobody():
        text = said(root, f"out={root.parent / 'out'}")
    assert text == f"{closed}: cannot be read (Permission denied); mend or remove it, and type the command again"
    os.mkfifo(source / "train" / packs.CLASSES[0] / "pipe.jpg")
    assert "pipe.jpg: cannot be read (no regular file)" in said(source, f"out={tmp_path / 'out'}")
    (source / "train" / packs.CLASSES[0] / "pipe.jpg").unlink()
    (source / "train" / packs.CLASSES[0] / "gone.jpg").symlink_to("nowhere")
    assert "gone.jpg cannot be read (No such file or directory)" in said(source, f"out={tmp_path / 'out'}")


def test_other_files_in_the_tree_are_left_out(tmp_path, source, content):
    cat = source / "train" / packs.CLASSES[0]
    for name in ("notes.txt", "labels.csv", "noext", "Thumbs.db"):
        (cat / name).write_bytes(b"no image")
    assert packs.read(packed(source, f"out={tmp_path / 'out'}")) == content


def test_trees_that_do_not_fit_are_refused_as_in_training(tmp_path, source):
    (source / "val" / packs.CLASSES[2]).rename(source / "val" / "other")
    text = said(source, f"out={tmp_path / 'out'}")
    assert text.startswith("source: ") and "only in val: other" in text
    (source / "val" / "other").rename(source / "val" / packs.CLASSES[2])
    (source / "train" / packs.CLASSES[0] / "up").symlink_to(source / "train")
    assert "leads back to a folder above it" in said(source, f"out={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


def test_a_file_that_changes_while_it_is_packed_is_noticed(tmp_path, source):
    config = expand([f"source={source}", f"out={tmp_path / 'out'}"], "data pack").configs[0]
    _, _, listings = intake.found(config, source)
    path = source / "train" / listings["train"].names[2]
    path.write_bytes(path.read_bytes() + b"!")
    (tmp_path / "out" / ".packing").mkdir(parents=True)
    order = packers.Order(tmp_path / "out", "", listings, None, None, False)
    with pytest.raises(UserError, match=f"{path.name} has .* bytes and had .* when it was listed"):
        packers.write_all(order, [packers.Task("train", 0, 0, 24)], 1, lambda images, num_bytes, is_work: None)
    assert not list((tmp_path / "out").glob("*.shard"))


def bad_tar(root: Path, change: Callable[[tarfile.TarFile], None], inner: bool) -> None:
    """Make a training tar with one class, to which something was added: outside, or within the class."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        packs.add(tar, "n01440764_1.JPEG", packs.jpeg(1, (40, 40)))
        if inner:
            change(tar)
    root.mkdir()
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as tar:
        packs.add(tar, "n01440764.tar", file.getvalue())
        if not inner:
            change(tar)


def member(
    name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, link: str = ""
) -> Callable[[tarfile.TarFile], None]:
    def change(tar: tarfile.TarFile) -> None:
        info = tarfile.TarInfo(name)
        info.type, info.linkname, info.size = kind, link, size
        tar.fileobj.write(info.tobuf(tarfile.GNU_FORMAT))
        tar.offset = tar.fileobj.tell()

    return change


def pax(name: str, headers: dict[str, str]) -> Callable[[tarfile.TarFile], None]:
    def change(tar: tarfile.TarFile) -> None:
        info = tarfile.TarInfo(name)
        info.pax_headers = headers
        tar.fileobj.write(info.tobuf(tarfile.PAX_FORMAT))
        tar.offset = tar.fileobj.tell()

    return change


@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (member("../../evil.jpg"), "leads out of it"),
        (member("a/../../evil.jpg"), "leads out of it"),
        (member("/etc/evil.jpg"), "leads out of it"),
        (member("evil.jpg", tarfile.SYMTYPE, link="/etc/passwd"), "is no file but a link, a device"),
        (member("evil.jpg", tarfile.LNKTYPE, link="n01440764_1.JPEG"), "is no file but a link, a device"),
        (member("evil.jpg", tarfile.CHRTYPE), "is no file but a link, a device"),
        (member("evil.jpg", tarfile.FIFOTYPE), "is no file but a link, a device"),
        (member("evil.jpg", size=10**12), "has 1,000,000,000,000 bytes, and the tar"),
        (member("evil.jpg", size=-512), "has -512 bytes"),
        (member("long", tarfile.GNUTYPE_LONGNAME, size=10**12), "a header of an impossible size"),
        (member("long", tarfile.XHDTYPE, size=-(10**6)), "a header of an impossible size"),
        (pax("evil.jpg", {"size": "-1024"}), "bytes"),
        (pax("evil.jpg", {"path": "../evil.jpg"}), "leads out of it"),
    ],
)
def test_a_tar_that_means_harm_is_refused(tmp_path, change, expected, inner):
    bad_tar(tmp_path / "tars", change, inner)
    text = said(tmp_path / "tars", f"out={tmp_path / 'out'}")
    where = f"{tmp_path}/tars/ILSVRC2012_img_train.tar: " + ("n01440764.tar: " if inner else "")
    assert text.startswith(f"{where}is no tar that can be read (") and expected in text
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("**/evil*"))


def test_tars_that_are_damaged_are_refused(tmp_path, content):
    root = packs.tars(tmp_path / "tars", content)
    for name in ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"):
        raw = (root / name).read_bytes()
        draw = chosen(3)
        for end in [0, 1, 511, 600, len(raw) // 2, *draw.sample(range(len(raw) - 30_000), 20)]:
            (root / name).write_bytes(raw[:end])
            assert f"{root / name}" in said(root, f"out={tmp_path / 'out'}")
        for harmed in (b"\x1f\x8b" + raw, b"no tar" * 1000, b"x" * 512 + raw[512:]):
            (root / name).write_bytes(harmed)
            assert f"{root / name}" in said(root, f"out={tmp_path / 'out'}")
        (root / name).write_bytes(raw)
    assert packs.read(packed(root, f"out={tmp_path / 'out'}")) == content


def test_an_image_too_large_for_memory_is_not_read(tmp_path):
    path = tmp_path / "huge.tar"
    with path.open("wb") as file:
        info = tarfile.TarInfo("n01440764_9.JPEG")
        info.size = 10**10
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(10**10 + 2048)
    with path.open("rb") as file:
        (member,) = archives._members(path, file)
    (found,) = archives._Slices(path, [member])(0, 1)
    assert isinstance(found, Unreadable) and found.why == "10,000,000,000 bytes are too many for an image"


def test_an_image_twice_in_a_tar_is_refused(tmp_path):
    bad_tar(tmp_path / "tars", lambda tar: packs.add(tar, "./n01440764_1.JPEG", b"other"), inner=True)
    assert "holds n01440764/n01440764_1.JPEG twice" in said(tmp_path / "tars", f"out={tmp_path / 'out'}")


def test_labels_that_do_not_fit_the_flat_validation_set_are_refused(tmp_path, content):
    root = packs.tars(tmp_path / "tars", content, labels="none")
    out = f"out={tmp_path / 'out'}"
    assert said(root, out).startswith("val_labels: the images of ILSVRC2012_img_val.tar have no labels in it; put")
    assert "cannot be read" in said(root, out, "val_labels=/nowhere.csv")
    rows = [f"ILSVRC2012_val_{number:08d}.JPEG,{packs.CLASSES[(number - 1) % 3]}" for number in range(1, 13)]
    mine = root / "mine.csv"
    for text, expected in (
        ("\n".join(rows[:-1]), "no class for ILSVRC2012_val_00000012"),
        (
            "\n".join([*rows, "ILSVRC2012_val_00000013.JPEG,n01440764"]),
            "ILSVRC2012_val_00000013 have a label and are not",
        ),
        ("\n".join([*rows[:-1], rows[-1].replace("n02", "n99")]), "classes that ILSVRC2012_img_train.tar has not: n99"),
        (
            "\n".join(row.replace("n02086240", "n01440764") for row in rows),
            "classes without a validation image: n02086240",
        ),
        ("0\n1\n", "cannot be read"),
        ("", "no class for"),
        ("\0\0", "val_labels"),
    ):
        mine.write_text(text)
        assert expected in said(root, out, f"val_labels={mine}"), text
    mine.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in said(root, out, f"val_labels={mine}")
    packs.devkit(root / "kit.tar.gz", [packs.CLASSES[number % 3] for number in range(11)])
    assert "no class for ILSVRC2012_val_00000012" in said(root, out, f"val_labels={root / 'kit.tar.gz'}")
    (root / "kit.tar.gz").write_bytes((root / "kit.tar.gz").read_bytes()[:300])
    assert "cannot be read" in said(root, out, f"val_labels={root / 'kit.tar.gz'}")
    packs.devkit(root / "kit.tar.gz", [packs.CLASSES[number % 3] for number in range(12)])
    assert packs.read(packed(root, out, f"val_labels={root / 'kit.tar.gz'}")) == content


def test_parquet_that_does_not_fit_is_refused(tmp_path, content):
    import pyarrow as pa
    from pyarrow import parquet as pq

    root = packs.parquet(tmp_path / "hf", content, names=["a", "b", "c"])
    path, out = root / "data" / "train-00001-of-00002.parquet", f"out={tmp_path / 'out'}"
    raw = path.read_bytes()
    for harmed in (b"", raw[: len(raw) // 2], b"no parquet" * 99, raw[:-8] + b"\xff\xff\xff\x7fPAR1"):
        path.write_bytes(harmed)
        assert said(root, out).startswith(f"{path}: cannot be read as parquet (")
    table = pq.read_table(io.BytesIO(raw))
    pq.write_table(table.drop_columns(["label"]), path)
    assert f"{path}: has no column label" in said(root, out)
    for label, expected in (
        (7, "train has a label that is no class"),
        (-1, "no class"),
        (None, "missing or no number"),
        (2**62, "train has a label that is no class"),
    ):
        labels = pa.array([label, *table.column("label").to_pylist()[1:]], pa.int64())
        pq.write_table(table.set_column(1, "label", labels), path)
        assert expected in said(root, out)
    assert not (tmp_path / "out").exists()
    for label, expected in ((2**62, "a label of 4,611,686,018,427,387,904, and no names"), (2**63, "no number")):
        labels = pa.array([label, *table.column("label").to_pylist()[1:]], pa.uint64())
        pq.write_table(table.set_column(1, "label", labels).replace_schema_metadata(None), path)
        (root / "data" / "train-00000-of-00002.parquet").unlink(missing_ok=True)
        (root / "data" / "validation-00000-of-00001.parquet").unlink(missing_ok=True)
        assert expected in said(root, out)
    rows = table.to_pylist()
    rows[3]["image"]["bytes"] = None
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    assert f"{path}: row 3 of row group 0: cannot be read (it has no bytes)" in said(root, out)


def test_without_pyarrow_parquet_is_refused_with_what_to_install(tmp_path, content):
    root = packs.parquet(tmp_path / "hf", content)
    text = (
        "import sys; sys.modules['pyarrow'] = None; sys.argv = ['dytrun', 'data', 'pack', *sys.argv[1:]]; "
        "from dytrun import cli; sys.exit(cli.main())"
    )
    done = subprocess.run([sys.executable, "-c", text, str(root), f"out={tmp_path / 'out'}"], capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "dytrun: source: parquet files want pyarrow; it is missing; pip install 'dytrun[parquet]'\n"


def test_a_pack_says_nothing_of_this_machine(whole, tmp_path):
    values = json.loads((whole / MANIFEST).read_text())
    assert values["made_from"]["name"] == "source" and str(tmp_path) not in json.dumps(values)
    assert len(values["source_id"]) == len(digest(b""))
