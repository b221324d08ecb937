"""W&B under fire, with the real wandb in real processes: kills, dead, deaf and slow servers, full disks, a key."""

import json
import os
import signal
import statistics
import subprocess
from pathlib import Path

import pytest
from wandb_runs import KEY, numbered, parts, rows_of, served, sync, wandb_id
from wandb_server import requests_of

BLOCK = 32 * 1024  # bytes; wandb writes its file in such
REFUSED = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"}


def assert_no_key(run_dir: Path) -> None:
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    assert any(path.name == "debug-internal.log" for path in files)
    assert any(path.suffix == ".wandb" for path in files)
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


def test_killed_offline_runs_are_whole_after_a_sync(tmp_path, track, serve):
    run_dir = tmp_path / "run"
    (killed,) = track({"dir": run_dir, "do": [["log", 1, 1000], ["signal", None, "SIGKILL"]]})
    assert killed["code"] == -signal.SIGKILL
    assert "no API key" in killed["notes"][0]
    (part,) = parts(run_dir)
    (file,) = part.glob("*.wandb")
    os.truncate(file, (file.stat().st_size - 1) // BLOCK * BLOCK)  # a block that has not reached the disk
    assert 0 < len(rows_of(part)) < 1000
    (resumed,) = track({"dir": run_dir, "position": [950, True], "do": [["log", 951, 1010], ["finish", True, False]]})
    assert resumed["code"] == 0
    assert rows_of(*parts(run_dir)) == numbered(1010)
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 1010

    _, address = serve("well", tmp_path / "server")
    sync([str(part) for part in parts(run_dir)], address, tmp_path)
    assert served(tmp_path / "server", wandb_id(run_dir)) == numbered(1010)

    # What is synced stays, and the next part goes on after it; a part that is not is superseded.
    for last in (1012, 1015):
        track({"dir": run_dir, "position": [1010, True], "do": [["log", 1011, last], ["signal", None, "SIGKILL"]]})
    track({"dir": run_dir, "position": [1015, True], "do": [["log", 1016, 1020], ["finish", True, False]]})
    assert [len(rows_of(part)) for part in parts(run_dir)] == [1010, 10]
    sync([str(part) for part in parts(run_dir)], address, tmp_path)
    assert served(tmp_path / "server", wandb_id(run_dir)) == numbered(1020)


def test_a_server_that_is_none_costs_seconds_and_no_run(tmp_path, track, serve):
    hows = ("refused", "500", "never", "dribble", "deaf")
    addresses = {how: serve(how, tmp_path / f"server-{how}")[1] for how in hows if how != "refused"}
    addresses["refused"] = REFUSED["WANDB_BASE_URL"]
    requests = [
        {"dir": tmp_path / how, "env": {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": addresses[how]},
         "is_patient": False, "do": [["log", 1, 20], ["finish", True, False]]}
        for how in hows
    ]  # fmt: skip
    asked_for = {
        "dir": tmp_path / "asked",
        "env": REFUSED,
        "overrides": ["tracking.mode=online"],
        "is_patient": False,
        "do": [],
    }
    *all_seen, refused = track(*requests, asked_for)
    assert refused["error"].startswith("tracking.mode: W&B cannot be reached")
    assert refused["start_s"] < 60  # ours are 10; W&B's own would be 90
    for how, seen in zip(hows, all_seen, strict=True):
        assert seen["code"] == 0, how
        assert seen["start_s"] < 20, how  # ours are 5
        assert max(seen["log_s"]) < 1, how
        said = {"refused": "refused", "500": "it answers 500", "never": "no answer", "dribble": "no answer",
                "deaf": "W&B did not answer"}[how]  # fmt: skip
        (note,) = [note for note in seen["notes"] if note.startswith("W&B offline")]
        assert said in note
        assert "wandb sync" in note
        (part,) = parts(tmp_path / how)
        assert part.name.endswith(wandb_id(tmp_path / how))
        assert rows_of(part) == numbered(20)
        assert_no_key(tmp_path / how)


def test_a_server_gets_each_record_once_whatever_dies(tmp_path, track, serve):
    run_dir, folder = tmp_path / "run", tmp_path / "server"
    server, address = serve("well", folder)
    port = int(address.rpartition(":")[2])
    online = {"dir": run_dir, "env": {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": address}}

    # The run is killed: some records are on the server, the others nowhere but in metrics.jsonl.
    track(online | {"do": [["log", 1, 30], ["wait", str(folder / "sent.jsonl"), "train/loss"], ["log", 31, 50],
                           ["signal", None, "SIGKILL"]]})  # fmt: skip
    run_id = wandb_id(run_dir)
    assert 0 < len(served(folder, run_id)) < 50
    # It goes on from an older checkpoint than the server's last row.
    (seen,) = track(online | {"position": [25, True], "do": [["log", 26, 60], ["finish", False, True]]})
    assert served(folder, run_id) == numbered(60)
    assert any("preempting" in json.dumps(request["body"]) for request in requests_of(folder))

    # The server dies in mid-run.
    (seen,) = track(online | {"position": [60, True], "is_patient": False,
                              "do": [["log", 61, 260], ["signal", server.pid, "SIGKILL"], ["log", 261, 460],
                                     ["finish", False, True]]})  # fmt: skip
    before, after = seen["log_s"][:200], seen["log_s"][200:]
    assert statistics.median(after) < max(3 * statistics.median(before), 0.005)
    assert max(after) < 1
    assert seen["finish_s"] < 15  # ours are 3; in full it would be 60
    assert seen["gone"] - seen["done"] < 15, "the end of the process does not wait for W&B either"
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 460
    assert_no_key(run_dir)

    # Nobody knows how much it got, and it cannot be asked: a whole run under another id, for who wants to sync.
    track(online | {"position": [460, True], "do": [["log", 461, 470], ["finish", False, True]]})
    assert [part.name.rpartition("_")[2].partition("-")[2] for part in parts(run_dir)] == [f"{run_id}-offline"]
    assert rows_of(*parts(run_dir)) == numbered(470)

    # It is back.
    serve("well", folder, port)
    (seen,) = track(online | {"position": [465, True], "do": [["log", 466, 480], ["finish", True, False]]})
    assert seen["notes"][0].startswith("W&B: http")
    assert served(folder, run_id) == numbered(480)
    assert parts(run_dir) == []  # the offline part is superseded: a sync would make a second run of it
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 481))
    assert_no_key(run_dir)


def test_a_slow_server_and_a_full_disk_of_wandb_slow_no_step(tmp_path, track, serve):
    _, address = serve("slow", tmp_path / "server")
    full = tmp_path / "full" / "wandb"
    full.mkdir(parents=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", full], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
    try:
        slow, filled = track(
            {"dir": tmp_path / "slow", "is_patient": False, "env": {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": address},
             # However long this machine takes to start W&B: the run is open there in its middle.
             "do": [["log", 1, 150], ["wait", str(tmp_path / "slow" / "wandb" / "rows.json"), '"rows": null'],
                    ["log", 151, 300], ["finish", False, True]]},
            {"dir": full.parent,
             "do": [["log", 1, 50], ["fill", str(full)], ["log", 51, 3000], ["finish", True, False]]},
        )  # fmt: skip
    finally:
        subprocess.run(["umount", full], check=True)
    assert any(note.startswith("W&B: http") for note in slow["notes"])
    assert filled["notes"][-1].startswith("W&B is left out from here (not all records could be written to ")
    for name, seen, count in (("slow", slow, 300), ("full", filled, 3000)):
        assert seen["code"] == 0, name
        assert max(seen["log_s"]) < 1, name
        assert seen["finish_s"] < 30, name  # W&B's own five seconds to write, and a busy machine's
        assert len((tmp_path / name / "metrics.jsonl").read_text().splitlines()) == count
