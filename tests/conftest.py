"""Shared pieces of the tests: configurations composed by the real command line, real processes, real image files."""

import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dytrun.compose import expand
from dytrun.config import RunConfig

# A ViT that trains on digits in seconds; every test that runs one starts from it.
TINY = (
    "model=timm",
    "model.name=vit_tiny_patch16_224",
    "model.kwargs={patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2, global_pool: avg}",
    "data=digits",
    "augment=none",
    "ema=off",
    "epochs=1",
    "global_batch=32",
    "optim.lr=1e-3",
    "optim.warmup_epochs=0",
    "machine.workers=0",
    "tracking.mode=off",
)


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """Each test in a directory of its own, on one thread, without the user's W&B and data.

    W&B's service of another test must not be found either: it would serve the runs that this one starts.
    """
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_SERVICE", "IMAGENET_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def warm():
    """Commands that start in a moment."""
    from warm import Warm

    with Warm() as one:
        yield one


def config_of(*overrides: str) -> RunConfig:
    """Return what the command line makes of `overrides`."""
    return expand(overrides).configs[0]


def tiny(*overrides: str) -> RunConfig:
    """Return the tiny run with some keys changed; a mapping takes the place of the tiny run's own."""
    keys = {override.partition("=")[0] for override in overrides}
    return config_of(*(word for word in TINY if word.partition("=")[0] not in keys), *overrides)


def dytrun(*args: str, env: dict[str, str] | None = None, timeout: float = 500) -> subprocess.CompletedProcess[str]:
    """Run the real command in a real process."""
    return subprocess.run(
        [sys.executable, "-m", "dytrun", *args],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | (env or {}),
        check=False,
    )


@pytest.fixture
def image_tree(tmp_path) -> Callable[..., Path]:
    """Make a class-per-folder tree of small real JPEGs: `image_tree(train={"cat": 3}, val={"cat": 1})`."""

    return lambda **splits: _tree(tmp_path / "tree", splits)


def _tree(root: Path, splits: dict[str, dict[str, int]]) -> Path:
    rng = np.random.default_rng(0)
    for split, classes in splits.items():
        for name, count in classes.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.jpg")
    return root


@pytest.fixture
def open_tree() -> Iterator[Callable[..., Path]]:
    """Make a tree as `image_tree` does, where another user can get at it: pytest's own folders are closed to others."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield lambda **splits: _tree(Path(folder) / "tree", splits)


@pytest.fixture
def as_nobody() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Give up root's rights for a while, for which no permission is denied."""

    @contextlib.contextmanager
    def act() -> Iterator[None]:
        if os.geteuid() != 0:
            yield
            return
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)

    return act


def image_files(folder: Path) -> list[Path]:
    """Return the images of a split, sorted."""
    return sorted(folder.glob("*/*.jpg"))


def lines(run_dir: Path) -> list[dict]:
    """Return the records of a run."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def only(directory: Path, pattern: str = "*") -> Path:
    """Return the one run of a directory."""
    (found,) = (path.parent for path in directory.glob(f"{pattern}/config.json"))
    return found


def processes() -> list[tuple[int, str]]:
    """Return (pid, command line) of every process that can be seen."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append((int(path.parent.name), path.read_bytes().decode(errors="replace")))
    return found


def ancestors(pid: int) -> list[int]:
    """Return a process's parent, its parent, and so on."""
    found = []
    with contextlib.suppress(OSError):
        while pid > 1:
            status = Path(f"/proc/{pid}/status").read_text()
            pid = int(status.partition("PPid:")[2].split()[0])
            found.append(pid)
    return found


def wait_for_title(title: str, ancestor: int, timeout_s: float = 150) -> int:
    """Return the process under `ancestor` whose title begins so, once there is one."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        for pid, command in processes():
            if command.startswith(title) and ancestor in ancestors(pid):
                return pid
        time.sleep(0.05)
    raise TimeoutError(f"no process {title!r} under {ancestor}")


def wait_until(condition: Callable[[], Any], timeout_s: float = 150) -> None:
    """Wait for something that another process does."""
    until = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError(f"it has not come in {timeout_s} s")
        time.sleep(0.02)


def children_cpu_s() -> float:
    """Seconds of processors that all ended child processes have taken: what one waits for others does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def is_over(pid: int) -> bool:
    """Whether a process has ended, all threads of it, though nobody may have asked how."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return True
    return fields[0] == "Z" and int(fields[17]) == 1


def is_gone(group: int, within_s: float = 10) -> bool:
    """Whether nothing of a process group is left, a few seconds later at most."""
    until = time.monotonic() + within_s
    while alive_in_group(group) and time.monotonic() < until:
        time.sleep(0.05)
    return not alive_in_group(group)


def alive_in_group(group: int) -> bool:
    """Whether a process group has a process left that is no zombie, or one whose other threads still hold its files."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            state, its_group, num_threads = fields[0], int(fields[2]), int(fields[17])
            if its_group == group and (state != "Z" or num_threads > 1):
                return True
    return False


@pytest.fixture(scope="session")
def worker(tmp_path_factory) -> Iterator[subprocess.Popen[str]]:
    """One start of Python for all trackers."""
    home = tmp_path_factory.mktemp("home")
    env = os.environ | {"HOME": str(home), "NETRC": str(home / "none"), "OMP_NUM_THREADS": "1"}
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_SERVICE", "WANDB_BASE_URL"):
        env.pop(name, None)
    command = [sys.executable, str(Path(__file__).with_name("tracked.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def track(worker) -> Callable[..., list[dict]]:
    """Run trackers at the same time, each in its process; return what each saw, and how it ended.

    They wait for W&B to start and to be reached however busy this machine is, but for `"is_patient": False`.
    """

    def go(*requests: dict) -> list[dict]:
        usual = {"env": {}, "overrides": [], "position": [0, False], "is_patient": True}
        whole = [usual | request for request in requests]
        whole = [request | {"dir": str(request["dir"])} for request in whole]
        if any(Path(one["dir"], "wandb").is_dir() for one in whole):
            time.sleep(1.1)  # W&B names the parts of a run by the second
        worker.stdin.write(json.dumps(whole) + "\n")
        worker.stdin.flush()
        ends = json.loads(worker.stdout.readline())
        return [end | json.loads(Path(f"{one['dir']}.json").read_text()) for one, end in zip(whole, ends, strict=True)]

    return go


@pytest.fixture
def serve(tmp_path) -> Iterator[Callable[..., tuple[subprocess.Popen[bytes], str]]]:
    """Start servers: `serve(how, folder, port)` returns the process and its address; without a port, a free one."""
    started = []

    def start(how: str, folder: Path, port: int = 0) -> tuple[subprocess.Popen[bytes], str]:
        process, address = wandb_server(how, folder, port)
        started.append(process)
        return process, address

    yield start
    for process in started:
        process.kill()
        process.wait()


def wandb_server(how: str, folder: Path, port: int) -> tuple[subprocess.Popen[bytes], str]:
    """Start a server on a port, or on a free one for 0; return its process and its address once it listens."""
    folder.mkdir(exist_ok=True)
    says = folder / "port"
    says.unlink(missing_ok=True)
    script = str(Path(__file__).with_name("wandb_server.py"))
    process = subprocess.Popen([sys.executable, script, str(port), str(folder), how])
    until = time.monotonic() + 60
    while not (says.is_file() and says.read_text().endswith("\n")):
        assert process.poll() is None and time.monotonic() < until, "the server does not start"
        time.sleep(0.02)
    return process, f"http://127.0.0.1:{int(says.read_text())}"
