"""What a disk can do to checkpoints: bits that flip, kills within a save, no room, no right to write.

The checkpoints are those of a real run; it is copied, harmed, and loaded or taken up again.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import TINY, only
from safetensors.torch import load_file
from warm import Job, Warm, chosen, essence, step_of

from dytrun.checkpoint import NotSaved, Store
from dytrun.errors import UserError
from dytrun.records import RunResult

# Its learning rate soon ruins it: the first epoch is the best by far, whatever a processor's last bits are.
RUN = (*TINY, "norm=dyt", "epochs=4", "ema=on", "optim.lr=0.45", "optim.warmup_epochs=3")
FILES = ("ema.safetensors", "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json")


class Whole(NamedTuple):
    """A run that nothing has disturbed."""

    runs: Path
    essence: dict
    peak: int
    """Most bytes that its checkpoints were seen to take at a time."""

    @property
    def checkpoints(self) -> Path:
        return only(self.runs) / "checkpoints"

    def unfinished(self, runs: Path) -> Path:
        """Copy it as a kill just before its end would have left it; return the checkpoints."""
        shutil.copytree(self.runs, runs)
        for name in ("result.json", "correct.npz"):
            (only(runs) / name).unlink()
        return only(runs) / "checkpoints"


@pytest.fixture(scope="module")
def whole(warm, tmp_path_factory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    sizes, is_over = [0], threading.Event()

    def watch() -> None:
        while not is_over.wait(0.001):
            sizes.append(total(folder))

    watcher = threading.Thread(target=watch)
    watcher.start()
    job = warm.run(folder / "log", "train", *RUN, f"runs_dir={folder / 'runs'}")
    is_over.set()
    watcher.join()
    assert job.code == 0, job.said()
    return Whole(folder / "runs", essence(folder / "runs"), max(sizes))


def total(folder: Path) -> int:
    """Bytes of the checkpoints under a folder, while they come and go."""
    found = 0
    for parent, _, files in os.walk(folder):
        for name in files if "step-" in Path(parent).name else ():
            with contextlib.suppress(FileNotFoundError):
                found += (Path(parent) / name).stat().st_size
    return found


# --- damage


def harms(folder: Path, draw: random.Random) -> Iterator[tuple[str, str, bytes]]:
    """400 damages to a checkpoint: (what, file, its bytes)."""
    raw = {name: (folder / name).read_bytes() for name in FILES}
    for name in FILES * 40:
        bit = draw.randrange(8 * len(raw[name]))
        harmed = bytearray(raw[name])
        harmed[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit}", name, bytes(harmed)
    pages = [(name, start) for name in FILES for start in range(0, len(raw[name]), 4096)
             if any(raw[name][start : start + 4096])]  # fmt: skip
    for name, start in draw.choices(pages, k=100):
        end = min(start + 4096, len(raw[name]))
        yield f"page at {start}", name, raw[name][:start] + bytes(end - start) + raw[name][end:]
    for name in FILES:
        size = len(raw[name])
        for end in [0, 1, size // 2, size - 1, *draw.sample(range(size), 16)]:
            yield f"cut at {end}", name, raw[name][:end]


def test_each_of_400_damages_is_found_and_the_checkpoint_before_it_taken(whole, tmp_path):
    before, newest = sorted(whole.checkpoints.glob("step-*"))[-2:]
    expected = {path.stem: load_file(path) for path in before.glob("*.safetensors")}
    count = 0
    for what, name, harmed in harms(newest, chosen(4)):
        folder = tmp_path / "checkpoints"
        for one in (before, newest):
            shutil.copytree(one, folder / one.name, copy_function=os.link)
        (folder / newest.name / name).unlink()
        (folder / newest.name / name).write_bytes(harmed)
        found, said = Store(folder, keep=2).load()
        assert found is not None and found.step == int(before.name[-8:]), (what, name)
        assert found.tensors.keys() == expected.keys()
        for part, tensors in expected.items():
            assert found.tensors[part].keys() == tensors.keys()
            assert all(torch.equal(found.tensors[part][key], value) for key, value in tensors.items()), (what, name)
        assert said[0].startswith(f"checkpoint of step {int(newest.name[-8:])}: "), (what, name)
        assert said[1:] == [f"going on from step {found.step}, the newest checkpoint that is whole"]
        assert (folder / f"{newest.name}.corrupt" / name).read_bytes() == harmed
        shutil.rmtree(folder)
        count += 1
    assert count == 400


def test_a_run_goes_on_from_before_a_damaged_checkpoint_and_ends_bit_equal(warm, whole, tmp_path):
    folder = whole.unfinished(tmp_path / "runs")
    damage(folder / "step-00000176" / "optimizer.safetensors")
    job = warm.run(tmp_path / "log", "train", *RUN, f"runs_dir={tmp_path / 'runs'}")
    assert job.code == 0, job.said()
    assert "checkpoint of step 176: optimizer.safetensors does not have its SHA-256; it was put aside as" in job.said()
    assert "going on from step 132, the newest checkpoint that is whole" in job.said()
    assert essence(tmp_path / "runs") == whole.essence


def damage(path: Path) -> None:
    """Flip one bit in the middle."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def test_a_run_whose_checkpoints_are_all_damaged_never_starts_anew(warm, whole, tmp_path):
    folder = whole.unfinished(tmp_path / "runs")
    paths = sorted(folder.glob("step-*"), reverse=True)
    for path in paths:
        damage(path / "model.safetensors")
    for faults in (len(paths), 0):
        job = warm.run(tmp_path / f"log{faults}", "train", *RUN, f"runs_dir={tmp_path / 'runs'}")
        assert job.code == 2, job.said()
        said = [line for line in job.said().splitlines() if line.startswith("dytrun: ")]
        assert [": model.safetensors does not have its SHA-256; it was put aside" in line for line in said] == (
            [True] * faults + [False]
        )
        assert said[-1].endswith("no checkpoint there is whole; remove the run's directory to train from the start")
    assert not list(folder.glob("step-*[0-9]"))
    assert len(list(folder.glob("*.corrupt"))) == len(paths)


@pytest.mark.parametrize(("latest", "best"), [(b"\xff\x00 nonsense", None), (None, b"9" * 5000)])
def test_names_of_checkpoints_can_be_lost(warm, whole, tmp_path, latest, best):
    """The best one is that of the first epoch, which only its name and the newest one's state keep from removal."""
    assert (whole.checkpoints / "BEST").read_text() == "44\n"
    folder = whole.unfinished(tmp_path / "runs")
    shutil.rmtree(folder / "step-00000176")
    for name, text in (("LATEST", latest), ("BEST", best)):
        (folder / name).unlink()
        if text is not None:
            (folder / name).write_bytes(text)
    assert Store(folder, keep=2).look_up("LATEST").step == 132
    assert Store(folder, keep=2).look_up("BEST").step == 44
    job = warm.run(tmp_path / "log", "train", *RUN, f"runs_dir={tmp_path / 'runs'}")
    assert job.code == 0, job.said()
    assert essence(tmp_path / "runs") == whole.essence
    assert (folder / "LATEST").read_text() == "176\n"
    (folder / "BEST").unlink()
    seen = warm.run(tmp_path / "eval", "eval", str(folder.parent), "checkpoint=best", "devices=1", "workers=0")
    assert seen.code == 0, seen.said()
    figures = json.loads((folder.parent / "eval.json").read_text())
    assert figures["step"] == 44
    assert figures["raw"]["top1"] == RunResult.load(folder.parent / "result.json").best_top1


def test_a_checkpoint_of_another_norm_is_refused_in_one_line(warm, whole, tmp_path):
    folder = whole.unfinished(tmp_path / "runs")
    other = warm.run(tmp_path / "ln.log", "train", *RUN, "norm=ln", "epochs=1", "optim.warmup_epochs=0",
                     f"runs_dir={tmp_path / 'ln'}")  # fmt: skip
    assert other.code == 0, other.said()
    for path in folder.glob("step-*"):
        shutil.rmtree(path)
    shutil.copytree(only(tmp_path / "ln") / "checkpoints" / "step-00000044", folder / "step-00000044")
    job = warm.run(tmp_path / "log", "train", *RUN, f"runs_dir={tmp_path / 'runs'}")
    assert job.code == 2, job.said()
    (said,) = [line for line in job.said().splitlines() if line.startswith("dytrun: ")]
    assert "checkpoint of step 44: it does not fit the model of this run" in said
    assert "Missing key(s) in state_dict" in said and "alpha" in said
    assert said.count("Error(s) in loading") == 1
    assert "Traceback" not in job.said()
    assert (folder / "step-00000044").is_dir()


class Bomb:
    """Leaves a trace when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("opened",)


@pytest.mark.parametrize("name", ["weights.pt", "model.safetensors"])
def test_a_pickle_in_a_checkpoint_is_never_opened(whole, tmp_path, name):
    shutil.copytree(whole.checkpoints, tmp_path / "checkpoints")
    folder = tmp_path / "checkpoints" / "step-00000176"
    text = pickle.dumps(Bomb())
    (folder / name).write_bytes(text)
    if name == "model.safetensors":  # by somebody who has mended the manifest too
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest[name] = {"sha256": hashlib.sha256(text).hexdigest(), "bytes": len(text)}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    found, said = Store(tmp_path / "checkpoints", keep=2).load()
    assert found is not None and found.step == 132
    assert said[0].startswith("checkpoint of step 176: ")
    assert not Path("opened").exists()
    pickle.loads(text)
    assert Path("opened").exists()


# --- kills within a save

_TRACEME, _SYSCALL, _SETOPTIONS, _EXITKILL = 0, 24, 0x4200, 0x100000


def killed(at: int, work: Callable[[], object]) -> bool:
    """Run `work` in a fork that is killed at the entry to its system call number `at`; False if it has fewer."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes, libc.ptrace.restype = [ctypes.c_long] * 4, ctypes.c_long
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            if libc.ptrace(_TRACEME, 0, 0, 0) == 0:
                os.kill(os.getpid(), signal.SIGSTOP)
                work()
                code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status):
        pytest.skip("this system lets no process be traced")
    libc.ptrace(_SETOPTIONS, pid, 0, _EXITKILL)
    for _ in range(2 * at + 1):  # each call stops twice: before it and after
        libc.ptrace(_SYSCALL, pid, 0, 0)
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            return False
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True


def put(store: Store, step: int, value: float, best: int) -> None:
    """Save a checkpoint that holds `value`."""
    tensors = {"model": {"weight": torch.full((3000,), value)}, "ema": {"weight": torch.full((3000,), -value)}}
    store.save(step, tensors, {"value": value, "best_step": best}, is_best=best == step)


linux = pytest.mark.skipif(sys.platform != "linux", reason="ptrace as on Linux")


@linux
@pytest.mark.slow
@pytest.mark.parametrize("is_best", [False, True])
@pytest.mark.parametrize("is_again", [False, True])
def test_a_save_may_be_killed_at_any_system_call(tmp_path, is_best, is_again):
    for step in (1, 2, 3):
        put(Store(tmp_path / "base", 2), step, step, best=1)
    step = 3 if is_again else 4
    outcomes, at, folder, left = [], -1, tmp_path / "now", None
    was_killed = True
    while was_killed:
        at += 1
        shutil.copytree(tmp_path / "base", folder, copy_function=os.link)
        store = Store(folder, 2)
        was_killed = killed(at, lambda: put(store, step, 10, best=step if is_best else 1))  # noqa: B023
        before, left = left, contents(folder)
        if left == before:  # as the kill at the call before has left it
            shutil.rmtree(folder)
            continue
        for name in ("LATEST", "BEST"):  # by another process, before the run is taken up again
            seen = store.look_up(name)
            assert seen.tensors["model"]["weight"].tolist() == [seen.state["value"]] * 3000
        found, said = store.load()
        assert found is not None and said == []
        outcomes.append((found.step, found.state["value"]))
        assert outcomes[-1] in [(3, 3), (step, 10)]
        assert found.tensors["model"]["weight"].tolist() == [found.state["value"]] * 3000
        assert (folder / "LATEST").read_text() == f"{found.step}\n"
        assert (folder / "BEST").read_text() == f"{found.state['best_step']}\n"
        put(store, 5, 5, found.state["best_step"])
        assert names(folder) == {f"step-{one:08d}" for one in (found.step, 5, found.state["best_step"])}
        shutil.rmtree(folder)
    assert at > 100 and len(outcomes) > 15, (at, len(outcomes))
    # The old one up to some call, and the new one from there on; how often memory is asked for varies a little.
    assert outcomes[0] == (3, 3) and outcomes[-1] == (step, 10)


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder; safetensors writes under a name that it draws."""
    found = {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}
    return {re.sub(r"/\.tmp\w+", "/.tmp", name): text for name, text in found.items()}


def names(folder: Path) -> set[str]:
    """What lies in a folder of checkpoints, but LATEST and BEST."""
    return {path.name for path in folder.iterdir()} - {"LATEST", "BEST"}


@linux
@pytest.mark.slow
def test_a_hundred_saves_that_are_killed_leave_no_more_than_one_does(tmp_path):
    draw = chosen(8)
    store = Store(tmp_path, 2)
    put(store, 1, 1, best=1)
    most = 0
    for step in range(2, 102):
        killed(draw.randrange(250), lambda: put(store, step, step, best=1))  # noqa: B023
        most = max(most, len(list(tmp_path.glob("*step-*"))))
        assert most <= 2 + 1 + 1, names(tmp_path)
        found, said = store.load()
        assert found is not None and said == []
        assert found.state["value"] == found.step
        assert store.look_up("BEST").step == 1
    put(store, 102, 102, best=1)
    assert len(names(tmp_path)) <= 2 + 1


def test_what_killed_saves_left_is_removed_at_the_next_start(tmp_path):
    store = Store(tmp_path, keep=2)
    put(store, 1, 1, best=1)
    put(store, 2, 2, best=1)
    (tmp_path / "step-00000002").rename(tmp_path / ".step-00000002.old")
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".step-00000001.old")
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".step-00000002.partial")
    for name in (".LATEST.partial", ".BEST.partial", ".probe.partial"):
        (tmp_path / name).write_text("")
    found, said = store.load()
    assert (found.step, said) == (2, [])
    assert names(tmp_path) == {"step-00000001", "step-00000002"}


# --- room


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[..., Path]]:
    """Make a disk of so many MiB: `small_disk(8)`."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(mib: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", folder]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("a file system of its own cannot be mounted here")
        return folder

    yield mount
    subprocess.run(["umount", "--lazy", folder], capture_output=True, check=False)


class Filling:
    """Somebody who takes what is free on a disk but some bytes, and again whatever gets free."""

    def __init__(self, disk: Path, left: int):
        self._disk, self._left = disk, left
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._fill)

    def __enter__(self) -> "Filling":
        self._thread.start()
        until = time.monotonic() + 60
        while self._room() > 0 and time.monotonic() < until:
            time.sleep(0.001)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        (self._disk / "filling").unlink(missing_ok=True)

    def _room(self) -> int:
        free = os.statvfs(self._disk)
        return free.f_bavail * free.f_frsize - self._left

    def _fill(self) -> None:
        with (self._disk / "filling").open("wb", buffering=0) as file:
            while not self._over.wait(0.001):
                if (count := self._room()) > 0:
                    try:
                        file.write(bytes(count))
                    except OSError:
                        continue


def after_its_first_checkpoint(warm: Warm, disk: Path, log: Path, *more: str) -> Job:
    """Start the run on a disk and halt it (SIGSTOP) between its first checkpoint and its second, of step 88."""
    for _ in range(5):
        job = warm.start(log, "train", *RUN, f"runs_dir={disk}", *more)
        job.until(lambda: list(disk.glob("*/checkpoints/step-*")))
        os.killpg(job.pid, signal.SIGSTOP)
        if step_of(disk) < 88:
            return job
        job.kill()  # this process was held up, and the run has come too far
        job.wait()
        log.unlink()
        shutil.rmtree(only(disk))
    raise TimeoutError("the run is always past its second checkpoint")


@pytest.mark.slow
def test_a_run_goes_on_to_its_end_on_a_disk_that_is_full(warm, whole, tmp_path, small_disk):
    disk = small_disk(8)
    job = after_its_first_checkpoint(warm, disk, tmp_path / "log")
    with Filling(disk, 48 << 10):
        os.killpg(job.pid, signal.SIGCONT)
        assert job.wait() == 0, job.said()
    result = RunResult.load(only(disk) / "result.json")
    failed = result.checkpoints["failed"]
    assert failed >= 2
    assert result.checkpoints["tried"] == 4
    for number in range(1, failed + 1):
        assert f"could not be written (No space left on device), the {number}. such attempt" in job.said()
    assert result.checkpoints["bytes"] == pytest.approx((4 - failed) * 140_000, rel=0.1)
    assert Store(only(disk) / "checkpoints", 2).look_up("LATEST").step == 44 * (4 - failed)
    assert not list(only(disk).rglob("*.partial*"))
    assert (result.top1, result.weights_sha256) == (whole.essence["result"][3], whole.essence["result"][9])
    assert lines_of(disk) == whole.essence["metrics"]


def lines_of(runs: Path) -> list[dict]:
    text = (only(runs) / "metrics.jsonl").read_text()
    found = [json.loads(line) for line in text.splitlines()]
    return [{key: value for key, value in one.items() if not key.startswith("perf/")} for one in found]


@pytest.mark.slow
def test_a_disk_that_gets_room_again_is_written_again(warm, whole, tmp_path, small_disk):
    disk = small_disk(8)
    job = after_its_first_checkpoint(warm, disk, tmp_path / "log", "checkpoint.every_minutes=0.0005")
    with Filling(disk, 48 << 10):
        os.killpg(job.pid, signal.SIGCONT)
        job.until(lambda: ", the 1. such attempt" in job.said())
    assert job.wait() == 0, job.said()
    result = RunResult.load(only(disk) / "result.json")
    assert 1 <= result.checkpoints["failed"] < result.checkpoints["tried"]
    assert Store(only(disk) / "checkpoints", 2).look_up("LATEST").step == 176
    assert essence(disk)["tensors"] == whole.essence["tensors"]


@pytest.mark.slow
def test_a_run_whose_result_finds_no_room_fails_in_one_line_and_can_be_taken_up(warm, whole, tmp_path, small_disk):
    disk = small_disk(8)
    job = after_its_first_checkpoint(warm, disk, tmp_path / "log")
    with Filling(disk, 0):
        os.killpg(job.pid, signal.SIGCONT)
        assert job.wait() == 1, job.said()
        said = [line for line in job.said().splitlines() if line.startswith("dytrun: ")]
        assert len(said) == 1
        assert "the result cannot be written (No space left on device); make room" in said[0]
        assert "Traceback" not in job.said()
        assert not (only(disk) / "result.json").exists()
        assert not list(only(disk).rglob("*.partial*"))
    again = warm.run(tmp_path / "again", "train", *RUN, f"runs_dir={disk}")
    assert again.code == 0, again.said()
    assert "taken up again after step" in again.said()
    assert "bit-equal" in again.said()
    assert essence(disk) == whole.essence


def test_a_file_that_may_not_grow_is_no_checkpoint(tmp_path):
    store = Store(tmp_path, 2)
    put(store, 1, 1, best=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(NotSaved, match="File too large"):
            put(store, 2, 2, best=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == {"step-00000001"}
    assert store.load()[0].state["value"] == 1
    put(store, 2, 2, best=2)
    assert store.load()[0].state["value"] == 2
    assert store.look_up("BEST").step == 2


def test_a_disk_that_fails_loses_no_checkpoint(tmp_path, small_disk):
    """A file system in a file whose own disk is full: it takes what is written, and says EIO when that is synced."""
    image, folder = small_disk(12) / "image", tmp_path / "failing"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    folder.mkdir()
    try:
        subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
        subprocess.run(["mount", "-o", "loop", image, folder], check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a file system in a file cannot be mounted here")
    store, refusals, last = Store(folder / "checkpoints", 2), [], 0
    try:
        for step in range(1, 12):
            tensors = {"model": {"weight": torch.full((500_000,), step / 3)}}
            try:
                store.save(step, tensors, {"best_step": 1}, is_best=step == 1)
                last = step
            except NotSaved as error:
                refusals.append(str(error))
        assert refusals[0] == "Input/output error"
        found, said = store.load()
        assert (found.step, said) == (last, [])
        assert torch.equal(found.tensors["model"]["weight"], torch.full((500_000,), last / 3))
        assert store.look_up("BEST").step == 1
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_too_little_room_is_said_before_the_first_step(warm, tmp_path, small_disk):
    disk = small_disk(3)
    job = warm.run(tmp_path / "log", "train", *RUN, f"runs_dir={disk}")
    assert job.code == 2, job.said()
    (said,) = [line for line in job.said().splitlines() if line.startswith("dytrun: ")]
    assert "runs_dir: 3 MiB are free at " in said
    assert "this run's checkpoints take up to 4 MiB (4 of 1 MiB); make room, or choose another" in said
    assert not list(disk.glob("*/checkpoints/*")) + list(disk.glob("*/checkpoints/.*"))
    assert not list(disk.glob("*/metrics.jsonl"))


def test_a_disk_that_cannot_be_written_is_said_before_the_first_step(warm, tmp_path, small_disk):
    disk = small_disk(3)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    job = warm.run(tmp_path / "log", "train", *RUN, f"runs_dir={disk}")
    assert job.code == 2, job.said()
    (said,) = [line for line in job.said().splitlines() if line.startswith("dytrun: ")]
    assert "cannot be written (Read-only file system); choose another" in said
    assert not list(disk.iterdir())


def test_a_directory_of_somebody_else_is_said_before_the_first_step(open_tree, as_nobody):
    folder = open_tree(train={"cat": 1}).parent / "checkpoints"
    folder.mkdir()
    with as_nobody(), pytest.raises(UserError, match=r"cannot be written \(Permission denied\); choose another"):
        Store(folder, 2).check_room({"model": {"weight": torch.zeros(3)}})
    assert not list(folder.iterdir())


def test_the_room_that_is_asked_for_is_what_a_run_takes(whole, tmp_path, monkeypatch):
    """Weights, two moments and EMA, of the newest two, the best one and the one that is being written."""
    sizes, remove = [], shutil.rmtree

    def removing(path: Path, **how: bool) -> None:
        sizes.append(total(tmp_path))
        remove(path, **how)

    monkeypatch.setattr(shutil, "rmtree", removing)
    store, (_, tensors, state) = Store(tmp_path, 2), Store(whole.checkpoints, 2).look_up("LATEST")
    for step in (44, 88, 132, 176):
        store.save(step, tensors, state | {"best_step": 44}, is_best=step == 44)
    newest = max(whole.checkpoints.glob("step-*"))
    weights = sum(value.nbytes for value in load_file(newest / "model.safetensors").values())
    size = sum(path.stat().st_size for path in newest.iterdir())
    assert 4 * weights < size < 4 * weights + (1 << 20)
    assert 3.9 * size < max(sizes) < 4 * size + (1 << 20)
    assert whole.peak < 4 * size + (1 << 20)
