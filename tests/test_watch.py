"""`dytrun report watch=true`: real runs in every state, a real terminal."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from conftest import TINY, only
from warm import Warm, step_of

from dytrun import owner, watch
from dytrun.cli import main
from dytrun.errors import UserError


@pytest.fixture(scope="module")
def warm():
    with Warm() as process:
        yield process


def states(directory) -> dict[str, str]:
    return {job.run: job.state for job in watch.look(directory)}


class Screen:
    """What a process draws into its terminal. A read may end anywhere, also in the middle of a row or of a letter."""

    def __init__(self, terminal: int) -> None:
        self._drawn, self._terminal = b"", terminal

    @property
    def said(self) -> str:
        return self._drawn.decode(errors="replace")

    def goes_on(self) -> bool:
        """Take what has come, or wait a moment for it; False once nobody is there to draw any more."""
        if not select.select([self._terminal], [], [], 0.2)[0]:
            return True
        try:
            drawn = os.read(self._terminal, 65536)
        except OSError:  # Linux: EIO once the other end is closed
            return False
        self._drawn += drawn
        return bool(drawn)


def screen(directory, is_enough: Callable[[str], object], timeout_s: float = 120) -> tuple[int, str]:
    """Watch a directory in a terminal of its own until it has shown enough, then press Ctrl-C."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "dytrun", "report", str(directory), "watch=true"]
    environment = os.environ | {"COLUMNS": "200", "LINES": "50", "TERM": "xterm"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    terminal, end = Screen(ours), time.monotonic() + timeout_s
    try:
        while terminal.goes_on() and not is_enough(terminal.said) and time.monotonic() < end:
            pass
        process.send_signal(signal.SIGINT)
        while terminal.goes_on() and time.monotonic() < end + 30:  # what was cut off at the match, and the last picture
            pass
        return process.wait(30), terminal.said
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def epochs_in(said: str) -> set[str]:
    """How far the run of 400 epochs has been in each picture."""
    return set(re.findall(r"│ running +│[^│]*│ ([\d.]+)/400", said))


@pytest.mark.slow
def test_runs_are_seen_to_begin_to_go_on_to_be_killed_and_to_end(warm, tmp_path):
    runs = tmp_path / "runs"
    done = warm.run(tmp_path / "log1", "train", *TINY, f"runs_dir={runs}")
    assert done.code == 0, done.said()
    finished = only(runs).name
    assert states(runs) == {finished: "finished"}
    job = warm.start(tmp_path / "log2", "train", *TINY, "norm=dyt", "epochs=400", f"runs_dir={runs}")
    job.until(lambda: step_of(runs) > 44)
    names = list(states(runs))
    assert states(runs) == {names[0]: "running", finished: "finished"}  # those under way come first
    assert f"process {job.pid} on " in watch.look(runs)[0].where
    code, said = screen(runs, lambda said: len(epochs_in(said)) > 1)
    assert code == 0
    assert len(epochs_in(said)) > 1, said  # it was drawn anew
    assert "2 runs in " in said and "1 running, 1 finished" in said
    assert re.search(r"finished +│[^│]*│ 1\.0/1 +│ \d\.\d+ +│ \d+\.\d\d", said), said
    job.kill()
    job.wait()
    assert job.is_gone
    assert states(runs) == {names[0]: "stopped", finished: "finished"}
    assert owner.at_work(runs / names[0]) is None


def test_what_cannot_be_read_is_a_row_and_a_name_is_no_markup(tmp_path):
    odd = tmp_path / "[red]run"
    odd.mkdir()
    (odd / "config.json").write_text('{"epochs"')
    (tmp_path / "README.md").write_text("no run")
    (tmp_path / "begun").mkdir()  # a run that has not written its configuration yet
    assert states(tmp_path) == {"[red]run": "unreadable"}
    code, said = screen(tmp_path, lambda said: "unreadable" in said)
    assert code == 0
    assert "[red]run" in said


def test_no_directory_and_a_run_are_refused(tmp_path, capsys, monkeypatch):
    with pytest.raises(UserError, match="no directory; give the one that holds the runs"):
        watch.watch(tmp_path / "none")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="a run, not a directory of runs"):
        watch.watch(tmp_path)
    monkeypatch.setattr("sys.argv", ["dytrun", "report", str(tmp_path), "watch=true", "wandb=true"])
    assert main() == 2
    assert "say one of them" in capsys.readouterr().err
