"""What each command does with a valid configuration, and what a person is shown of it."""

from dataclasses import replace
from pathlib import Path

from dytrun import launch, owner, terminal
from dytrun.bench_config import BenchConfig
from dytrun.config import EvalConfig, Published, ReplayConfig, RunConfig
from dytrun.records import RunResult, difference
from dytrun.task import Ending

# What a sweep's closing table is made with; `dytrun report` takes others.
_BASELINE, _CONFIDENCE = "ln", 0.95


def train(config: RunConfig, page: RunConfig | None) -> tuple[Ending, float | None]:
    """Plan a run, train it or say that there is nothing left to do; return how it ended and its top-1 in percent.

    `page` is what the run's experiment says by itself, if it is about a published result: how far the run is from
    that recipe is written down beside the expected figure.

    Raises:
        UserError: an input was wrong, or another process trains this run.
        ranks.Failed, ranks.Stopped: as `launch.train`.
    """
    if config.published is not None and page is not None:
        config = config.model_copy(update={"published": _compared(config, page)})
    if config.dry_run:
        if launch.is_first():
            outline = launch.plan(config)
            terminal.pairs("plan (nothing was touched)", outline.rows)
            terminal.table("sites", outline.site_columns, outline.sites, [])
        return "planned", None
    result = launch.train(config, _begin)
    if launch.is_first():
        terminal.result(result)
    return ("diverged" if result.status == "diverged" else "finished"), result.top1


def _begin(config: RunConfig) -> RunResult | None:
    """Return the result of a run that has nothing left to do, or show the plan of one that has."""
    done = launch.previous(config)
    if done is None:
        owner.check(config)  # before torch is there, and a plan that would be for nothing
        terminal.pairs("plan", launch.plan(config).rows)
    else:
        if config.published is not None and done.published is None:
            # The same science, typed without its page the first time.
            done = replace(done, published=config.published.model_dump())
            done.save(config.run_dir / "result.json")
        terminal.line(f"{config.run_dir}: {done.status} already; remove the directory to train it again")
    return done


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


def replay(config: ReplayConfig) -> bool:
    """Do the step again at which a run diverged; print what was seen, and return whether it came out as it did then."""
    found = launch.replay(config)
    if found is None:  # this is another rank than the first
        return True
    rows = [
        (str(one["rank"]), f"{one['loss']:g}", one["first_module"] or "none",
         ", ".join(map(str, one["images_not_finite"][:8])) or "none")
        for one in found["ranks"]
    ]  # fmt: skip
    recorded = ", ".join(f"{name} {value:g}" for name, value in found["recorded"].items())
    is_same = found["is_reproduced"]
    notes = [
        f"recorded: {recorded}; now: loss {found['loss']:g}, grad_norm {found['grad_norm']:g}",
        "largest gradients: " + ", ".join(f"{name} {norm:.3g}" for name, norm in found["gradients"].items()),
        "reproduced" if is_same else "not reproduced: other numbers than those that were recorded",
    ]
    columns = ("rank", "loss", "first module with numbers that are not finite", "images whose loss is not finite")
    terminal.table(f"step {found['step']:,} of {config.dir}, done again", columns, rows, notes)
    return is_same


def bench(config: BenchConfig) -> None:
    """Measure, print the table, write it as JSON."""
    from dytrun import bench as instrument  # with torch, which the other commands leave to their ranks

    path = instrument.target(config)
    found = instrument.run(config, terminal.line)
    for table in found.tables:
        terminal.table(table.title, table.columns, table.rows, table.notes)
    instrument.keep(path, config, found)
    terminal.line(f"{path} written")


def close_sweep(runs_dir: Path, num_runs: int) -> None:
    """Print the table of a directory of runs after a sweep into it, if any of its runs came to a result."""
    if list(runs_dir.glob("*/result.json")):
        show_report(runs_dir, _BASELINE, _CONFIDENCE)
        terminal.line(f"{num_runs} run(s) asked for; all runs of {runs_dir} are in the table")


def show_report(directory: Path, baseline: str, confidence: float) -> None:
    """Make the report of a directory of runs and print its table."""
    from dytrun import report  # it takes a second, and a run does without

    found = report.build(directory, baseline, confidence)
    columns, rows = found.table()
    terminal.table(f"runs in {directory}", columns, rows, [*found.verdicts(), *found.remarks()])
    terminal.line(f"{directory}/report.html and report.json written")
