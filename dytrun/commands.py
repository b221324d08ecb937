"""What each command does with a valid configuration, and what a person is shown of it."""

import os
from dataclasses import replace
from pathlib import Path

from dytrun import launch, report, terminal
from dytrun.config import EvalConfig, Published, RunConfig
from dytrun.records import difference

# What a sweep's closing table is made with; `dytrun report` takes others.
_BASELINE, _CONFIDENCE = "ln", 0.95


def train(config: RunConfig, page: RunConfig | None) -> str:
    """Plan a run, train it or say that there is nothing left to do, and return its status.

    `page` is what the run's experiment says by itself, if it is about a published result: how far the run is from
    that recipe is written down beside the expected figure.

    Raises:
        UserError: an input was wrong.
        launch.Failed, launch.Stopped: as `launch.train`.
    """
    if config.published is not None and page is not None:
        config = config.model_copy(update={"published": _compared(config, page)})
    if not config.dry_run and (done := launch.previous(config)) is not None:
        if _is_first():
            if config.published is not None and done.published is None:
                # The same science, typed without its page the first time.
                done = replace(done, published=config.published.model_dump())
                done.save(config.run_dir / "result.json")
            terminal.line(f"{config.run_dir}: {done.status} already; remove the directory to train it again")
            terminal.result(done)
        return done.status
    outline = launch.plan(config)
    if _is_first():
        terminal.pairs("plan (nothing was touched)" if config.dry_run else "plan", outline.rows)
    if config.dry_run:
        terminal.table("sites", outline.site_columns, outline.sites, [])
        return "planned"
    result = launch.train(config)
    if _is_first():
        terminal.result(result)
    return result.status


def _compared(config: RunConfig, page: RunConfig) -> Published | None:
    """Say what of a run's science is not as on the page; another norm has other settings, and is one difference."""
    found = difference(config.science(), page.science())
    if config.norm.name != page.norm.name:
        found = [item for item in found if item[0] == "norm.name" or not item[0].startswith("norm.")]
    differs = [f"{key} {here}, there {there}" for key, here, there in found]
    return page.published and page.published.model_copy(update={"differs": differs})


def evaluate(config: EvalConfig) -> None:
    """Evaluate a checkpoint and print the counts."""
    found = launch.evaluate(config)
    if found:
        title = f"{config.dir}, {config.checkpoint} checkpoint (step {found['step']:,})"
        terminal.accuracies(title, found["accuracy"])


def close_sweep(runs_dir: Path, num_runs: int) -> None:
    """Print the table of a directory of runs after a sweep into it, if any of its runs came to a result."""
    if list(runs_dir.glob("*/result.json")):
        show_report(runs_dir, _BASELINE, _CONFIDENCE)
        terminal.line(f"{num_runs} runs asked for; all runs of {runs_dir} are in the table")


def show_report(directory: Path, baseline: str, confidence: float) -> None:
    """Make the report of a directory of runs and print its table."""
    found = report.build(directory, baseline, confidence)
    columns, rows = found.table()
    terminal.table(f"runs in {directory}", columns, rows, [*found.verdicts(), *found.remarks()])
    terminal.line(f"{directory}/report.html and report.json written")


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"
