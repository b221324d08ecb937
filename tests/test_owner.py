"""Who owns a run's directory: the second of two is refused, the dead are succeeded, another science is kept out."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import TINY, children_cpu_s, dytrun, tiny, wait_until

from dytrun import owner
from dytrun.config import RunConfig
from dytrun.errors import UserError
from dytrun.records import RunResult

HERE = os.uname().nodename


def left(config: RunConfig, **changed) -> Path:
    """Leave the lock file of a process that has not signed off."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    lock = config.run_dir / ".lock"
    lock.write_text(json.dumps(asdict(owner._me()) | changed))
    return lock


def aged(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def problem(config: RunConfig) -> str:
    """Return why a run is refused; early and when it is taken it is the same."""
    said = []
    for take in (lambda: owner.check(config), lambda: owner.owned(config).__enter__()):
        with pytest.raises(UserError) as refused:
            take()
        assert len(refused.value.problems) == 1
        said.append(refused.value.problems[0])
    assert said[0].partition("sign of life")[0] == said[1].partition("sign of life")[0]
    return said[0]


@pytest.mark.slow
def test_of_two_in_one_directory_the_second_is_refused_within_two_seconds(tmp_path):
    args = [sys.executable, "-m", "dytrun", "train", *TINY, "epochs=60"]
    first = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: list(tmp_path.glob("runs/*/metrics.jsonl")))
    took = []
    for _ in range(3):
        begun = children_cpu_s()
        second = dytrun(*args[3:])
        took.append(children_cpu_s() - begun)
        assert (second.returncode, second.stdout) == (2, "")
        assert f"process {first.pid} on {HERE} trains there, since 20" in second.stderr
        assert len(second.stderr.splitlines()) == 1
    assert first.poll() is None, "it was over too soon to say anything"
    assert min(took) < 2
    _, err = first.communicate(timeout=200)
    assert first.returncode == 0, err
    (run,) = (tmp_path / "runs").iterdir()
    assert RunResult.load(run / "result.json").status == "finished"
    assert (run / ".lock").read_text() == ""
    (start,) = owner.starts(run)
    assert (start["host"], start["pid"], start["slurm_job"], start["changed"]) == (HERE, first.pid, None, {})
    assert start["command"].startswith("dytrun train model=timm ")
    assert start["command"].endswith(" epochs=60")


def test_a_process_that_has_the_lock_is_named(tmp_path):
    config = tiny()
    with owner.owned(config):
        assert f"process {os.getpid()} on {HERE} trains there, since 20" in problem(config)
    with owner.owned(config):  # it has signed off, and another one may
        pass
    assert [start["changed"] for start in owner.starts(config.run_dir)] == [{}, {}]


def test_one_who_looks_does_not_keep_the_owner_out():
    config = tiny()
    lock = left(config, host="elsewhere")
    aged(lock, 60)
    with lock.open() as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        owner.check(config)  # two may look at once
    with owner.owned(config):
        pass


def test_a_dead_process_of_this_machine_is_succeeded_at_once(capsys):
    left(config := tiny(), pid=4_000_000)
    with owner.owned(config):
        assert json.loads((config.run_dir / ".lock").read_text())["pid"] == os.getpid()
    assert capsys.readouterr().out == f"{config.run_name}: took over from process 4000000 on {HERE}, which is gone\n"
    assert (config.run_dir / ".lock").read_text() == ""


def test_another_machine_is_believed_to_be_alive_for_half_a_minute(capsys):
    lock = left(config := tiny(), host="n7", pid=12, started="2026-11-22T10:00:00+00:00")
    aged(lock, 20)
    said = problem(config)
    assert "process 12 on n7 trains there, since 2026-11-22T10:00:00+00:00; its last sign of life is 2" in said
    assert json.loads(lock.read_text())["host"] == "n7"
    assert sorted(path.name for path in config.run_dir.iterdir()) == [".lock"], "nothing was written"
    aged(lock, 31)
    with owner.owned(config):
        pass
    assert "took over from process 12 on n7, which is gone" in capsys.readouterr().out


def test_a_sign_of_life_is_given(monkeypatch):
    monkeypatch.setattr(owner, "_SIGN_S", 0.1)
    with owner.owned(config := tiny()):
        aged(config.run_dir / ".lock", 1000)
        wait_until(lambda: time.time() - (config.run_dir / ".lock").stat().st_mtime < 100)


def test_a_requeued_slurm_job_follows_itself_at_once(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "17")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    left(config := tiny(), host="n7")
    assert "on n7 trains there" in problem(config), "the same allocation, and no other start of it"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with owner.owned(config):
        assert json.loads((config.run_dir / ".lock").read_text())["slurm_job"] == "17_1"
    left(config, host="n7", slurm_job="17_2", slurm_restarts=0)
    assert "on n7 trains there" in problem(config), "another job of the array"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_flock_the_record_alone_decides(monkeypatch, number):
    def no_flock(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_flock)
    config = tiny()
    with owner.owned(config):
        assert f"process {os.getpid()} on {HERE} trains there" in problem(config)
    with owner.owned(config):
        aged(config.run_dir / ".lock", 31)
        with owner.owned(config):  # the one before is taken for dead
            pass


def test_a_lock_file_that_cannot_be_read_names_nobody():
    config = tiny()
    config.run_dir.mkdir(parents=True)
    with (config.run_dir / ".lock").open("w") as lock:
        lock.write('{"host": "n')
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process trains there; wait" in problem(config)
    with owner.owned(config):
        pass


def test_another_science_in_the_directory_is_refused_with_the_difference():
    with owner.owned(config := tiny("norm=dyt", "seed=1")):
        pass
    path = config.run_dir / "config.json"
    values = json.loads(path.read_text())
    values["optim"]["lr"], values["seed"] = 0.5, 2
    path.write_text(text := json.dumps(values))
    before = sorted((item.name, item.stat().st_mtime_ns) for item in config.run_dir.iterdir() if item.name != ".lock")
    assert "(there -> here: seed 2 -> 1, optim.lr 0.5 -> 0.001); move it away" in problem(config)
    assert path.read_text() == text
    after = sorted((item.name, item.stat().st_mtime_ns) for item in config.run_dir.iterdir() if item.name != ".lock")
    assert before == after, "nothing was written"


def test_a_copied_directory_is_refused(tmp_path):
    with owner.owned(one := tiny("norm=ln")):
        pass
    other = tiny("norm=dyt")
    one.run_dir.rename(other.run_dir)
    said = problem(other)
    assert "norm.name ln -> dyt" in said
    assert "norm.alpha_init None -> 0.5" in said


def test_another_versions_science_is_refused_and_its_other_keys_are_not():
    with owner.owned(config := tiny()):
        pass
    path = config.run_dir / "config.json"
    values = json.loads(path.read_text())
    del values["machine"]["deterministic"]
    values["checkpoint"]["pace"] = 3
    path.write_text(json.dumps(values))
    assert owner.changes(config) == {"checkpoint.pace": [3, None], "machine.deterministic": [None, False]}
    values["augment"]["blur"] = 0.5
    path.write_text(json.dumps(values))
    assert "(there -> here: augment.blur 0.5 -> None)" in problem(config)
    path.write_text("{")
    assert "config.json: cannot be read (" in problem(config)


def test_what_is_no_science_may_change_and_is_noted(capsys):
    with owner.owned(tiny()):
        pass
    config = tiny("machine.workers=1", "tracking.tags=[b]", "checkpoint.keep=5")
    with owner.owned(config, step=7):
        pass
    changed = {"checkpoint.keep": [2, 5], "machine.workers": [0, 1], "tracking.tags": [[], ["b"]]}
    first, second = owner.starts(config.run_dir)
    assert first["changed"] == {}
    assert (second["changed"], second["step"]) == (changed, 7)
    said = "changed since the last start: checkpoint.keep 2 → 5, machine.workers 0 → 1, tracking.tags [] → ['b']"
    assert capsys.readouterr().out == f"{config.run_name}: {said}\n"
    with owner.owned(config):
        pass
    assert owner.starts(config.run_dir)[2]["changed"] == {}


def test_a_start_that_a_kill_cut_short_spoils_no_other(tmp_path):
    owner.record_start(tmp_path, {}, step=1)
    with (tmp_path / "starts.jsonl").open("a") as file:
        file.write('{"started": "20')
    owner.record_start(tmp_path, {}, step=2)
    assert [start["step"] for start in owner.starts(tmp_path)] == [1, 2]


def test_an_unfinished_relative_is_named_once():
    other = tiny("optim.lr=2e-3")
    with owner.owned(other):
        pass
    config = tiny("norm=ln")
    assert owner.relatives(config) is None, "it has no checkpoint"
    (other.run_dir / "checkpoints" / "step-00000044").mkdir(parents=True)
    said = owner.relatives(config)
    assert said == (
        f"this is a new run; {other.run_name} is not finished, and differs: optim.lr 0.002 there, 0.001 here"
    )
    assert owner.relatives(tiny("seed=1")) is None
    assert owner.relatives(other) is None, "it goes on"
    (other.run_dir / "result.json").write_text('{"status": "interrupted"}')
    assert owner.relatives(config) == said
    (other.run_dir / "result.json").write_text('{"status": "finished"}')
    assert owner.relatives(config) is None


def test_a_link_in_the_place_of_a_run_is_refused(tmp_path):
    config = tiny()
    (tmp_path / "runs").mkdir()
    (tmp_path / "elsewhere").mkdir()
    config.run_dir.symlink_to(tmp_path / "elsewhere")
    assert f"leads to {tmp_path}/elsewhere, out of runs_dir; remove the link" in problem(config)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_runs_dir_that_is_a_link_is_fine(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    with owner.owned(config := tiny()):
        pass
    assert (tmp_path / "disk" / config.run_name / "config.json").is_file()
