"""The runs of a directory in Weights & Biases: a workspace and a report, made by code."""

import json
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dytrun.config import ReportConfig
from dytrun.errors import UserError, first_line
from dytrun.pairs import Pair
from dytrun.records import write_json
from dytrun.report import Report
from dytrun.wandb_reach import abandon, default_entity, why_not

_SAVE_TIMEOUT_S = 20.0
_NEEDS = "wandb=true needs the package wandb-workspaces; say pip install 'dytrun[wandb]'"
# W&B pins no more.
_MOST_PINNED = 20


@dataclass(frozen=True)
class Place:
    """Where the runs of a directory are in W&B."""

    entity: str | None
    """None is the one that is logged in."""
    project: str
    ids: Mapping[str, str]
    """Directory name of each run that was logged → its id in W&B."""


def find(config: ReportConfig) -> Place:
    """Say where the runs of a directory were logged to, before anything is read or written.

    Raises:
        UserError: the package is missing, no run was logged, or the runs are in several projects.
    """
    try:
        import wandb_workspaces  # noqa: F401
    except ImportError as error:
        raise UserError(_NEEDS) from error
    ids, places = {}, {"project": set(), "entity": set()}
    for path in sorted(Path(config.dir).glob("*/wandb/rows.json")):
        try:
            tracking = json.loads((path.parents[1] / "config.json").read_text())["tracking"]
            ids[path.parents[1].name] = json.loads(path.read_text())["id"]
        except (OSError, ValueError, KeyError):
            continue  # the report says which runs cannot be read
        for key, found in places.items():
            found.add(getattr(config, key) or tracking[key])
    if not ids:
        raise UserError(f"wandb=true: no run of {config.dir} was logged to W&B; train with tracking.mode=auto")
    several = [f"{key}: the runs of {config.dir} are in {', '.join(map(str, sorted(found, key=str)))}; say {key}=ONE"
               for key, found in places.items() if len(found) > 1]  # fmt: skip
    if several:
        raise UserError(*several)
    return Place(places["entity"].pop(), places["project"].pop(), ids)


def save(config: ReportConfig, place: Place, found: Report) -> list[str]:
    """Save the workspace and the report, over those that were saved from this directory before; return their lines.

    Raises:
        UserError: nobody is logged in, the server is away, or it has no such project.
    """
    kept = f"{config.dir}/report.html and report.json are written"
    if problem := why_not():
        raise UserError(f"wandb=true: {problem}; nothing was saved there, so say it again then; {kept}")
    answers: queue.SimpleQueue[dict[str, str] | Exception] = queue.SimpleQueue()

    def go() -> None:
        try:
            answers.put(_save(config, place, found))
        except Exception as error:  # what wandb, its server and wandb-workspaces raise has no common root
            answers.put(error)

    threading.Thread(target=go, daemon=True, name="W&B").start()
    try:
        answer = answers.get(timeout=_SAVE_TIMEOUT_S)
    except queue.Empty:
        abandon(at_once=True)
        raise UserError(f"wandb=true: W&B's server did not answer in {_SAVE_TIMEOUT_S:g} s; {kept}") from None
    if isinstance(answer, Exception):
        raise UserError(
            f"wandb=true: W&B did not take it ({first_line(answer)}); runs that were logged offline are there "
            f"after wandb sync; {kept}"
        ) from answer
    return [f"W&B {name}: {url}" for name, url in answer.items()]


def _save(config: ReportConfig, place: Place, found: Report) -> dict[str, str]:
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    entity = place.entity or default_entity()
    record = Path(config.dir) / "wandb.json"
    # The report first: it is the one that asks whether there is such a project.
    makers = {"report": (wr.Report, document), "workspace": (ws.Workspace, workspace)}
    urls: dict[str, str] = {}
    for name, (kind, make) in makers.items():
        new, old = make(entity, place, found), _earlier(kind.from_url, record, name, f"/{entity}/{place.project}")
        for part in ("name", "sections", "settings", "runset_settings", "title", "description", "blocks"):
            if old is not None and hasattr(new, part):
                setattr(old, part, getattr(new, part))
        urls[name] = (old or new).save().url
    write_json(record, urls)
    return urls


def _earlier(load: Callable[[str], Any], record: Path, name: str, path: str) -> Any:
    """Return what was saved from this directory before, or None where it is gone or elsewhere."""
    try:
        url = json.loads(record.read_text())[name]
        return load(url) if path in url else None
    except Exception:  # a server says in many ways that it has no such thing, and a new one is then right
        return None


def workspace(entity: str, place: Place, found: Report) -> Any:
    """Make the workspace of all runs that are in the report; nothing is sent."""
    import wandb_workspaces.workspaces as ws

    panels = _panels()
    base = _ids(place, [pair.arms[0].runs for pair in found.pairs if pair.verdicts])[:_MOST_PINNED]
    names = ("comparison", "arm") if len(found.pairs) > 1 else ("arm",)
    columns = ("config:arm", "config:seed", "summary:top1", "summary:best/val/top1", "summary:images_per_s",
               "summary:data_wait_frac", "summary:peak_mem_gib")  # fmt: skip
    return ws.Workspace(
        entity=entity,
        project=place.project,
        name=_title(found),
        sections=[ws.Section(name=name, panels=items, is_open=True) for name, items in panels.items()],
        settings=ws.WorkspaceSettings(x_axis="step", max_runs=100),
        runset_settings=ws.RunsetSettings(
            filters=_filter([pair.pair_id for pair in found.pairs]),
            groupby=[ws.Config(name) for name in names],
            order=[ws.Ordering(ws.Config("arm")), ws.Ordering(ws.Config("seed"))],
            pinned_columns=list(columns),
            baseline_run=base[0] if base else None,
            pinned_runs=[*base],
        ),
    )


def document(entity: str, place: Place, found: Report) -> Any:
    """Make the report: what was found in words, then a part for each comparison; nothing is sent."""
    import wandb_workspaces.reports.v2 as wr

    blocks: list[Any] = [wr.H1("What the runs say")]
    if verdicts := found.verdicts():
        blocks.append(wr.UnorderedList(items=list(verdicts)))
    blocks.append(wr.MarkdownBlock(_markdown(*found.table())))
    blocks += [wr.P(remark) for remark in found.remarks()]
    for pair in found.pairs:
        blocks += [wr.H1(f"{pair.model} on {pair.data} ({pair.pair_id})")]
        for name, panels in _panels().items():
            # Ungrouped: the curves group by arm themselves, and a run comparer wants runs.
            runs = wr.Runset(entity=entity, project=place.project, name=_runset_name(pair),
                             filters=_filter([pair.pair_id]), order=[wr.OrderBy(wr.Config("arm"), ascending=True)],
                             pinned_columns=["run:displayName", "config:arm.value", "summary:top1"])  # fmt: skip
            blocks += [wr.H2(name), wr.PanelGrid(runsets=[runs], panels=panels)]
    return wr.Report(project=place.project, entity=entity, title=_title(found), blocks=blocks, width="fluid",
                     description="Made by dytrun report wandb=true; made again, it is written over.")  # fmt: skip


def _panels() -> dict[str, list[Any]]:
    """Return the panels by section; curves are means over the seeds of an arm, with their standard deviation."""
    import wandb_workspaces.reports.v2 as wr

    by_arm: dict[str, Any] = {"groupby": wr.Config("arm"), "groupby_aggfunc": "mean", "groupby_rangefunc": "stddev",
                              "max_runs_to_show": 100}  # fmt: skip
    alpha, top1 = wr.Config("norm.alpha_init"), wr.SummaryMetric("top1")
    column = wr.ParallelCoordinatesPlotColumn
    return {
        "Accuracy": [
            wr.LinePlot(title="top-1 %, mean ± std over seeds", x="epoch", y=["val/top1"], **by_arm),
            wr.LinePlot(title="top-1 % of the moving average", x="epoch", y=["ema/top1"], **by_arm),
            wr.LinePlot(title="training loss", x="step", y=["train/loss"], smoothing_type="none", **by_arm),
            wr.BarPlot(title="last top-1 %", metrics=["val/top1"], groupby=wr.Config("arm"), groupby_aggfunc="mean",
                       groupby_rangefunc="stddev"),
        ],
        "What the norms do": [
            wr.LinePlot(title=title, x="step", metric_regex=f"^norm/{kind}/.*", max_runs_to_show=10)
            for kind, title in (("alpha", "alpha of every site"), ("input_std", "std of every site's input"),
                                ("saturation", "saturated share of every site"))
        ],
        "Sweeps": [
            wr.ScatterPlot(title="alpha_init and top-1 %", x=alpha, y=top1),
            wr.ParallelCoordinatesPlot(title="What leads to top-1", columns=[
                column(wr.Config("norm.name")), column(alpha), column(wr.Config("seed")),
                column(wr.Config("optim.lr"), log=True), column(top1),
            ]),
            wr.ParameterImportancePlot(with_respect_to="top1"),
        ],
        "Speed and memory": [
            wr.ScatterPlot(title="images/s and top-1 %", x=wr.SummaryMetric("images_per_s"), y=top1),
            wr.LinePlot(title="images/s", x="step", y=["perf/images_per_s"], **by_arm),
            wr.LinePlot(title="step, ms", x="step", y=["perf/step_ms"], **by_arm),
            wr.LinePlot(title="share of time waiting for images", x="step", y=["perf/data_wait_frac"], **by_arm),
            wr.BarPlot(title="peak memory, GiB", metrics=["perf/peak_mem_gib"], groupby=wr.Config("arm"),
                       groupby_aggfunc="mean", groupby_rangefunc="minmax"),
        ],
        "What differs": [wr.RunComparer(diff_only="split", layout=wr.Layout(w=24, h=12))],
    }  # fmt: skip


def _filter(pair_ids: Sequence[str]) -> str:
    """Return W&B's expression for the runs of some comparisons."""
    return f"Config('pair_id') in {list(pair_ids)}"


def _runset_name(pair: Pair) -> str:
    return f"{pair.model}-{pair.data}-{pair.pair_id}"


def _title(found: Report) -> str:
    """Return what the saved views are called, after the directory."""
    return f"dytrun {Path(found.directory).resolve().name}"[:128]


def _ids(place: Place, arms: Sequence[Sequence[str]]) -> list[str]:
    """Return the ids of the first run of each arm that was logged; `arms` are names of runs."""
    logged = [[place.ids[name] for name in runs if name in place.ids] for runs in arms]
    return [ids[0] for ids in logged if ids]


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
