"""The workspace and the report in W&B: what is built, what a server process is sent, and how it fails."""

import base64
import json
import sys
from pathlib import Path

import pytest
from conftest import TINY, dytrun, tiny
from test_report import built, put
from wandb_runs import KEY, wandb_id
from wandb_server import views_of

from dytrun import dashboard
from dytrun.cli import main
from dytrun.dashboard import Place

ARMS = [("ln", 0, 90.0), ("ln", 1, 92.0), ("dyt", 0, 91.0), ("dyt", 1, 93.5)]


def arms(directory: Path) -> list[Path]:
    for norm, seed, top1 in ARMS:
        put(directory, f"norm={norm}", f"seed={seed}", top1=top1)
    return [tiny(f"runs_dir={directory}", f"norm={norm}", f"seed={seed}").run_dir for norm, seed, _ in ARMS]


def logged(run_dir: Path, **tracking) -> None:
    """Leave in a run what W&B leaves there."""
    (run_dir / "wandb").mkdir()
    (run_dir / "wandb" / "rows.json").write_text('{"id": "abc", "rows": 3}')
    config = json.loads((run_dir / "config.json").read_text())
    config["tracking"] |= tracking
    (run_dir / "config.json").write_text(json.dumps(config))


def panels(spec: dict) -> dict[str, dict]:
    """Panels of a workspace, by their title or, without one, their type."""
    sections = spec["section"]["panelBankConfig"]["sections"]
    found = [panel for section in sections for panel in section["panels"]]
    return {panel["config"].get("chartTitle") or panel["viewType"]: panel["config"] for panel in found}


def test_the_workspace_has_what_one_makes_by_hand(tmp_path):
    runs = arms(tmp_path)
    place = Place("someone", "norms", {path.name: f"id-{number}" for number, path in enumerate(runs)})
    model = dashboard.workspace("someone", place, built(tmp_path))._to_model()
    spec = json.loads(model.spec.model_dump_json(by_alias=True, exclude_none=True))
    found = panels(spec)
    top1 = found["top-1 %, mean ± std over seeds"]
    assert (top1["xAxis"], top1["metrics"]) == ("epoch", ["val/top1"])
    assert (top1["groupBy"], top1["groupAgg"], top1["groupArea"]) == ("arm.value", "mean", "stddev")
    assert found["training loss"]["metrics"] == ["train/loss"]
    for title, regex in (("alpha of every site", "^norm/alpha/.*"), ("std of every site's input", "^norm/input_std/.*"),
                         ("saturated share of every site", "^norm/saturation/.*")):  # fmt: skip
        assert (found[title]["metricRegex"], found[title]["useMetricRegex"]) == (regex, True)
    alpha = found["alpha_init and top-1 %"]
    assert (alpha["xAxis"], alpha["yAxis"]) == ("config:norm.value.alpha_init", "summary:top1")
    columns = [column["accessor"] for column in found["What leads to top-1"]["columns"]]
    assert columns == ["config:norm.value.name", "config:norm.value.alpha_init", "config:seed.value",
                       "config:optim.value.lr", "summary:top1"]  # fmt: skip
    speed = found["images/s and top-1 %"]
    assert (speed["xAxis"], speed["yAxis"]) == ("summary:images_per_s", "summary:top1")
    assert found["share of time waiting for images"]["metrics"] == ["perf/data_wait_frac"]
    assert found["peak memory, GiB"]["metrics"] == ["perf/peak_mem_gib"]
    assert "Run Comparer" in found
    (runset,) = spec["section"]["runSets"]
    assert base64.b64decode(runset["baselineRunId"]).decode() == "Run:v1:id-0:norms:someone"
    assert [key["name"] for key in runset["grouping"]] == ["arm.value"]
    assert built(tmp_path).pairs[0].pair_id in json.dumps(runset["filters"])


@pytest.mark.slow
def test_a_server_gets_a_report_and_a_workspace_and_the_next_ones_in_their_place(tmp_path, track, serve):
    folder, runs = tmp_path / "server", tmp_path / "runs"
    runs.mkdir()
    server, address = serve("well", folder)
    env = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": address, "HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    base, *_ = directories = arms(runs)
    overrides = [[*TINY, f"norm={norm}", f"seed={seed}", "tracking.mode=auto"] for norm, seed, _ in ARMS]
    track(*({"dir": path, "env": env, "overrides": words, "do": [["epochs", 1, 1], ["finish", True, False]]}
            for path, words in zip(directories, overrides, strict=True)))  # fmt: skip
    done = dytrun("report", str(runs), "wandb=true", env=env)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    urls = json.loads((runs / "wandb.json").read_text())
    assert urls["workspace"].startswith(f"{address}/someone/dytrun?nw=")
    for name, url in urls.items():
        assert f"W&B {name}: {url}" in done.stdout.replace("\n", "")

    report, workspace = views_of(folder)
    assert (report["type"], workspace["type"]) == ("runs", "project-view")
    assert (report["projectName"], workspace["entityName"]) == ("dytrun", "someone")
    pinned = base64.b64decode(workspace["spec"]["section"]["runSets"][0]["baselineRunId"]).decode()
    assert pinned == f"Run:v1:{wandb_id(base)}:dytrun:someone"
    text = json.dumps(report["spec"], ensure_ascii=False)
    (pair,) = json.loads((runs / "report.json").read_text())["pairs"]
    assert all(verdict in text for verdict in [pair["verdict"], *pair["verdicts"]])
    assert "| 91.00 ± 1.41 |" in text  # of 90 and 92
    grids = [block for block in report["spec"]["blocks"] if block["type"] == "panel-grid"]
    assert len(grids) == 5
    assert "Run Comparer" in json.dumps(grids[-1])
    assert KEY not in (folder / "sent.jsonl").read_text()

    put(runs, "norm=dyt", "seed=2", top1=95.0)
    assert dytrun("report", str(runs), "wandb=true", env=env).returncode == 0
    again = views_of(folder)
    assert [view["id"] for view in again] == [report["id"], workspace["id"]]
    assert json.loads((runs / "wandb.json").read_text()) == urls
    assert "| 93.17 ± 2.02 |" in json.dumps(again[0]["spec"], ensure_ascii=False)  # of 91, 93.5 and 95

    server.kill()
    server.wait()
    done = dytrun("report", str(runs), "wandb=true", env=env)
    assert done.returncode == 2
    assert done.stderr.startswith("dytrun: wandb=true: 127.0.0.1 is out of reach (")
    assert done.stderr.count("\n") == 1


def test_without_a_login_the_report_is_written_and_one_line_says_what_to_do(tmp_path):
    logged(arms(tmp_path)[0])
    done = dytrun("report", str(tmp_path), "wandb=true", env={"NETRC": str(tmp_path / "none")})
    assert done.returncode == 2
    assert done.stderr.startswith("dytrun: wandb=true: no API key (wandb login); nothing was saved there")
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "report.html").is_file()
    assert (tmp_path / "report.json").is_file()
    assert not (tmp_path / "wandb.json").exists()


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command in this process; return what it says to standard error."""

    def go(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["dytrun", "report", *words])
        assert main() == 2
        return capsys.readouterr().err

    return go


def test_bad_input_is_said_before_anything_is_written(tmp_path, command, monkeypatch):
    runs = arms(tmp_path)
    assert command(str(tmp_path), "wandb=true").startswith(
        f"dytrun: wandb=true: no run of {tmp_path} was logged to W&B; train with tracking.mode=auto"
    )
    logged(runs[0])
    logged(runs[1], project="other", entity="team")
    err = command(str(tmp_path), "wandb=true")
    assert f"project: the runs of {tmp_path} are in dytrun, other; say project=ONE" in err
    assert f"entity: the runs of {tmp_path} are in None, team; say entity=ONE" in err
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)  # as where the extra is not installed
    assert "pip install 'dytrun[wandb]'" in command(str(tmp_path), "wandb=true")
    assert not list(tmp_path.glob("report.*"))
