"""What each command does with a valid configuration, and what a person is shown of it."""

import re
import shlex
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from dytrun import compose, launch, owner, terminal, watch
from dytrun.bench_config import BenchConfig
from dytrun.config import EvalConfig, ProbeConfig, Published, ReplayConfig, ReportConfig, RunConfig
from dytrun.errors import UserError
from dytrun.pack_config import PackConfig, VerifyConfig
from dytrun.records import RunResult, difference
from dytrun.task import Ending

# ImageNet-1K's; a pack of so many is offered to data=imagenet.
_IMAGENET_CLASSES = 1000
# Of a damaged pack no more lines are printed.
_MOST_PROBLEMS = 20


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
        terminal.accuracies(title, found["accuracy"], "bytes" if found["unit"] == "windows" else "images")


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
    columns = (
        "rank",
        "loss",
        "first module with numbers that are not finite",
        f"{found['unit']} whose loss is not finite",
    )
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


def probe(config: ProbeConfig) -> None:
    """Look at the norms of a run, print the table, write the page, and give it to W&B if that was asked for."""
    from dytrun import probe as instrument  # with torch and matplotlib

    trained = instrument.config_of(config)
    out = instrument.target(config)
    found = instrument.look(config, trained, terminal.line)
    figures = instrument.keep(out, found)
    table = found.table()
    terminal.table(table.title, table.columns, table.rows, table.notes)
    terminal.line(f"{out}/probe.html, probe.json and figures/ written")
    if config.wandb:
        terminal.line(instrument.share(out, trained, found, figures))


def pack(config: PackConfig) -> None:
    """Make a pack and say what it came to, and how to train on it."""
    from dytrun.pack import pack as make  # with Pillow and NumPy

    made = make(config)
    manifest, splits = made.manifest, made.manifest.splits
    num = sum(one.num for one in splits.values())
    files = [file for one in splits.values() for file in (*one.shards, one.index)]
    size = sum(file.bytes for file in files)
    rows = [
        ("made from", str(manifest.made_from)),
        ("holds", f"{', '.join(f'{name} {one.num:,}' for name, one in splits.items())} images in "
         f"{len(manifest.classes):,} classes; {size / 2**20:,.1f} MiB in {len(files) + 1} files"),
    ]  # fmt: skip
    if kept := sum(len(one.unreadable) for one in splits.values()):
        rows.append(("unreadable", f"{kept} image(s), packed as they are; pack.json names them"))
    if made.num_kept:
        rows.append(("took", f"{made.seconds:,.1f} s; {made.num_kept:,} of the images were there already"))
    elif not made.was_there:
        rows.append(("took", f"{made.seconds:,.1f} s: {num / made.seconds:,.0f} images/s, "
                     f"{size / 2**20 / made.seconds:,.1f} MiB/s"))  # fmt: skip
    name = "imagenet" if len(manifest.classes) == _IMAGENET_CLASSES else "folder"
    root = str(Path(config.out).resolve())
    if not re.fullmatch(r"[\w./-]+", root):  # as the grammar of key=value wants it
        root = compose.quoted(root)
    typed = f"dytrun train data={name} {shlex.quote(f'data.root={root}')}"
    for key in ("train_split", "val_split"):
        typed += f" data.{key}={value}" if (value := getattr(config, key)) != key.partition("_")[0] else ""
    rows.append(("to train", typed if len(splits) == 2 else f"it lacks {' and '.join(_missing(config, splits))}"))
    terminal.pairs(f"{config.out}: {'complete already' if made.was_there else 'packed'}", rows)


def _missing(config: PackConfig, splits: Collection[str]) -> list[str]:
    return [split for split in (config.train_split, config.val_split) if split not in splits]


def verify(config: VerifyConfig) -> None:
    """Read every byte of a pack and say that all is well.

    Raises:
        UserError: what is damaged, a line each.
    """
    from dytrun import shards

    path = Path(config.dir)
    manifest = shards.open_pack(path)
    num = sum(one.num for one in manifest.splits.values())
    with terminal.moving(f"verifying {path}", num) as report:
        problems = shards.verify(path, manifest, report)
    if problems:
        rest = [f"{path}: {len(problems) - _MOST_PROBLEMS} more"] if len(problems) > _MOST_PROBLEMS else []
        raise UserError(*problems[:_MOST_PROBLEMS], *rest, f"{path}: damaged; remove it, and pack it again")
    size = sum(shard.bytes for one in manifest.splits.values() for shard in one.shards)
    terminal.line(f"{path}: {num:,} images, {size / 2**20:,.1f} MiB, all as they were packed ({manifest.made_from})")


def close_sweep(config: ReportConfig, num_runs: int) -> None:
    """Print the table of a directory of runs after a sweep into it, if any of its runs came to a result."""
    if list(Path(config.dir).glob("*/result.json")):
        show_report(config)
        terminal.line(f"{num_runs} run(s) asked for; all runs of {config.dir} are in the table")


def show_report(config: ReportConfig) -> None:
    """Make the report of a directory of runs and print its table, and in W&B if that is wanted; or show the
    runs as they go, and make none.
    """
    if config.watch:
        if config.wandb:
            raise UserError("watch, wandb: one shows the runs as they go, the other makes a report; say one of them")
        watch.watch(Path(config.dir))
        return
    from dytrun import dashboard, report  # it takes a second, and a run does without

    place = dashboard.find(config) if config.wandb else None
    found = report.build(config)
    columns, rows = found.table()
    terminal.table(f"runs in {config.dir}", columns, rows, [*found.verdicts(), *found.remarks()])
    terminal.line(f"{config.dir}/report.html and report.json written")
    if place is not None:
        for line in dashboard.save(config, place, found):
            terminal.line(line)
