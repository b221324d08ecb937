"""What reaches W&B: a server process, an upload after the fact, its terminal viewer. The real wandb throughout."""

import json
import re
import shlex
import signal
from pathlib import Path

import pytest
from wandb_runs import KEY, leet, parts, sync, wandb_id
from wandb_server import history_of, run_of

OVERRIDES = ["model=vit_ti", "norm=dyt", "epochs=20", "optim.warmup_epochs=0", "seed=3", "tracking.tags=[mine]"]
SITES = [f"blocks.{depth}.norm1" for depth in range(3)]


def online(run_dir: Path, address: str, **more) -> dict:
    env = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": address}
    return {"dir": run_dir, "env": env, "overrides": OVERRIDES} | more


def truth(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def ours(rows: list[dict]) -> list[dict]:
    """Rows of W&B's history without what is W&B's own, and without charts."""
    return [{name: value for name, value in row.items() if name[0] != "_" and not name.startswith("sites/")}
            for row in rows]  # fmt: skip


def charts(folder: Path, run_id: str) -> list[dict]:
    """Every chart of the sites that a server has, oldest first."""
    rows = [row["sites/over steps"] for row in history_of(folder, run_id) if "sites/over steps" in row]
    return [json.loads((folder / "files" / run_id / row["path"]).read_text()) for row in rows]


def test_metrics_config_and_summary_arrive_and_a_list_of_runs_can_be_read(tmp_path, track, serve):
    run_dir, folder = tmp_path / "run", tmp_path / "server"
    _, address = serve("well", folder)
    track(online(run_dir, address, do=[["epochs", 1, 20], ["finish", True, False]]))
    run_id = wandb_id(run_dir)
    assert ours(history_of(folder, run_id)) == truth(run_dir)
    assert len(truth(run_dir)) == 60

    run = run_of(folder, run_id)
    assert run["displayName"] == "dyt α0=0.5 s3 · vit_tiny_patch16_224 digits"
    assert run["groupName"].startswith("vit_tiny_patch16_224-digits-")
    assert (run["jobType"], run["tags"]) == ("train", ["vit_tiny_patch16_224", "dyt", "digits", "mine"])
    config = run["config"]
    assert (config["norm"]["name"], config["norm"]["alpha_init"]) == ("dyt", 0.5)
    assert (config["model"]["name"], config["seed"], config["arm"]) == ("vit_tiny_patch16_224", 3, "dyt alpha_init=0.5")
    assert (config["comparison"], config["pair_id"]) == (run["groupName"], run["groupName"].rpartition("-")[2])
    assert config["directory"].startswith("vit_tiny_patch16_224-dyt-digits-s3-")
    assert not [key for key in config if "." in key]  # W&B would not find such a column
    assert KEY not in (folder / "sent.jsonl").read_text()
    assert config["_wandb"]["pinned_keys"] == ["arm", "seed", "comparison", "directory"]

    summary = run["summary"]
    assert (summary["val/top1"], summary["best/val/top1"]) == (77.0, 90.0)
    assert (summary["top1"], summary["status"]) == (75.0, "finished")

    # W&B's own codes: 1 is the name, 6 the options, of which 2 is hidden.
    metrics = {item["1"]: item["6"] for item in config["_wandb"]["m"] if "1" in item}
    assert {name for name, options in metrics.items() if 2 in options and name.startswith("norm/")} == {
        f"norm/alpha/{site}" for site in SITES
    }
    drawn = charts(folder, run_id)
    assert len(drawn) == 10
    assert [trace["name"] for trace in drawn[-1]["data"]] == SITES
    assert drawn[-1]["data"][2]["x"] == list(range(1, 21))
    assert drawn[-1]["data"][2]["y"] == pytest.approx([2.5 + step / 100 for step in range(1, 21)], rel=1e-3)


def test_a_resumed_run_keeps_its_name_its_best_and_the_beginning_of_its_chart(tmp_path, track, serve):
    run_dir, folder = tmp_path / "run", tmp_path / "server"
    _, address = serve("well", folder)
    track(online(run_dir, address, do=[["epochs", 1, 9], ["finish", False, False]]))
    before = run_of(folder, wandb_id(run_dir))
    track(online(run_dir, address, position=[8, True], do=[["epochs", 9, 15], ["finish", True, False]]))
    run_id = wandb_id(run_dir)
    assert ours(history_of(folder, run_id)) == truth(run_dir)
    assert len(truth(run_dir)) == 45
    run = run_of(folder, run_id)
    for name in ("displayName", "groupName", "tags"):
        assert run[name] == before[name]
    mine = {key: value for key, value in run["config"].items() if key != "_wandb"}
    assert mine == {key: value for key, value in before["config"].items() if key != "_wandb"}
    # All evaluations after the resumption are worse than the best before it.
    assert (run["summary"]["val/top1"], run["summary"]["best/val/top1"]) == (82.0, 90.0)
    assert charts(folder, run_id)[-1]["data"][0]["x"] == list(range(1, 16))


@pytest.mark.kill
def test_nothing_is_lost_when_a_server_is_killed_and_the_run_is_synced_later(tmp_path, track, serve):
    run_dir, folder = tmp_path / "run", tmp_path / "server"
    server, address = serve("well", folder)
    sent = str(folder / "sent.jsonl")
    (seen,) = track(online(run_dir, address, do=[["epochs", 1, 10], ["wait", sent, "val/top1"],
                                                 ["signal", server.pid, "SIGKILL"], ["epochs", 11, 20],
                                                 ["finish", True, False]],
                           overrides=[*OVERRIDES, "tracking.mode=online"]))  # fmt: skip
    assert server.wait() == -signal.SIGKILL
    assert seen["code"] == 0
    assert seen["finish_s"] < 80
    run_id = wandb_id(run_dir)
    assert 0 < len(history_of(folder, run_id)) < 60
    assert seen["notes"][-1].startswith("W&B's server did not take all of the run. W&B offline: 127.0.0.1 is out of ")

    # What it says to do brings all of it, each record once; what the server had of the run stays as it was.
    serve("well", folder, int(address.rpartition(":")[2]))
    (command,) = re.findall("Upload it: wandb sync (.*)", seen["notes"][-1])
    sync(shlex.split(command), address, tmp_path)
    whole = f"{run_id}-offline"
    assert ours(history_of(folder, whole)) == truth(run_dir)
    run = run_of(folder, whole)
    assert (run["summary"]["best/val/top1"], run["summary"]["status"]) == (90.0, "finished")
    assert run["displayName"] == run_of(folder, run_id)["displayName"]
    assert charts(folder, whole)[-1]["data"][0]["x"] == list(range(1, 21))


def test_the_terminal_viewer_reads_what_the_run_wrote(tmp_path, track):
    run_dir = tmp_path / "run"
    track({"dir": run_dir, "overrides": OVERRIDES, "do": [["epochs", 1, 20], ["finish", True, False]]})
    (part,) = parts(run_dir)
    records = leet(part)
    assert ours([one["history"]["item"] for one in records if one["type"] == "history"]) == truth(run_dir)
    # What W&B itself measures of the machine: the GPU is among it where there is one.
    assert any("memory_percent" in one["stats"]["item"] for one in records if one["type"] == "stats")
