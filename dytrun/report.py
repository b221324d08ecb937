"""Runs → pairs → table and JSON. Two runs are compared only if their science differs in the norm and the seed alone."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from dytrun import page
from dytrun.errors import UserError
from dytrun.records import RunResult, whole_lines, write_json
from dytrun.stats import Difference, Sample, paired_difference, sample

# From this share of waiting on, a speed says more about the loader than about the norm.
_DATA_BOUND = 0.1

COLUMNS = (
    "pair", "model", "data", "norm", "n", "top-1 %", "difference to baseline", "EMA top-1 %", "images/s", "× baseline",
           "peak GiB", "data wait", "norm implementation",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One directory of runs/."""

    name: str
    result: RunResult
    records: list[dict[str, Any]]
    """Lines of metrics.jsonl."""


@dataclass(frozen=True)
class Arm:
    """All seeds of one norm within a pair."""

    label: str
    runs: list[str]
    status: dict[str, int]
    top1: Sample | None
    ema_top1: Sample | None
    top1_difference: Difference | None
    images_per_s: float | None
    """Median over the runs."""
    speed_ratio: float | None
    """Over the baseline; None where device, ranks or compilation differ, or nothing was measured."""
    peak_mem_gib: float | None
    data_wait_frac: float | None
    norm_impl: list[str]
    device: list[str]


@dataclass(frozen=True)
class Pair:
    """Arms that differ in the norm alone, the baseline first."""

    pair_id: str
    model: str
    data: str
    arms: list[Arm]
    verdicts: list[str]


@dataclass(frozen=True)
class Report:
    """What a directory of runs says."""

    directory: str
    baseline: str
    confidence: float
    pairs: list[Pair]
    refused: list[str]
    """Comparisons that were not made, and why."""

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return the table's columns and rows; a column in which no row has anything is left out."""
        rows = [_row(pair, arm) for pair in self.pairs for arm in pair.arms]
        used = [number for number in range(len(COLUMNS)) if any(row[number] not in ("", "–") for row in rows)]
        return [COLUMNS[number] for number in used], [[row[number] for number in used] for row in rows]

    def verdicts(self) -> list[str]:
        """Return a sentence for each arm that was compared with the baseline."""
        return [f"{pair.model} on {pair.data} (pair {pair.pair_id}): {verdict}" for pair in self.pairs
                for verdict in pair.verdicts]  # fmt: skip

    def remarks(self) -> list[str]:
        """Return what belongs under the table: where speeds were measured, and what was not compared."""
        arms = [arm for pair in self.pairs for arm in pair.arms]
        devices = sorted({device for arm in arms for device in arm.device})
        lines = [f"Speed and memory were measured on: {device}" for device in devices]
        if max((arm.data_wait_frac or 0 for arm in arms), default=0) > _DATA_BOUND:
            lines.append(
                "Where the data wait is large, the images/s may say more about the loader than about the norm."
            )
        return lines + [f"Not compared: {reason}" for reason in self.refused]


def build(directory: Path, baseline: str, confidence: float) -> Report:
    """Read the runs of a directory, pair them, and write report.json and report.html beside them.

    Raises:
        UserError: there is no run with a result.
    """
    runs, refused = load_runs(directory)
    if baseline not in (norms := sorted({run.result.norm for run in runs})):
        refused.append(f"no run has norm={baseline}, the baseline; there are runs with {', '.join(norms)}")
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.result.pair_id, []).append(run)
    pairs = []
    for pair_id, members in sorted(groups.items()):
        fingerprints = {run.result.data_fingerprint for run in members if run.result.data_fingerprint}
        if len(fingerprints) > 1:
            refused.append(
                f"{pair_id}: its runs saw different images (data fingerprints {', '.join(sorted(fingerprints))})"
            )
            continue
        pairs.append(_pair(pair_id, members, baseline, confidence))
        refused += _missing_twin(members, baseline, runs)
    report = Report(str(directory), baseline, confidence, pairs, refused)
    write_json(directory / "report.json", asdict(report))
    page.write(directory / "report.html", report.verdicts(), report.table(), report.remarks(), _curves(pairs, runs))
    return report


def load_runs(directory: Path) -> tuple[list[Run], list[str]]:
    """Read every run that has a result; say which directories have none, or one that cannot be read.

    Raises:
        UserError: the directory is missing, or none of its runs has a result.
    """
    runs, problems = [], []
    for path in sorted(directory.glob("*/config.json")):
        name = path.parent.name
        try:
            result = RunResult.load(path.with_name("result.json"))
            records = [json.loads(line) for line in whole_lines(path.with_name("metrics.jsonl"))]
            runs.append(Run(name, result, records))
        except FileNotFoundError:
            problems.append(f"{name}: no result yet (running, or stopped: type its command again)")
        except (OSError, ValueError, TypeError) as error:
            problems.append(f"{name}: its files cannot be read ({error}); train it again")
    if not directory.is_dir():
        raise UserError(f"{directory}: no directory; give the one that holds the runs: dytrun report [DIR]")
    if (directory / "config.json").is_file():
        raise UserError(f"{directory}: a run, not a directory of runs; say dytrun report {directory.parent}")
    if not runs:
        more = f"; {problems[0]}" if problems else ""
        raise UserError(f"{directory}: no finished run there{more}; give a directory of runs, or train one: "
                        "dytrun train experiment=quickstart")  # fmt: skip
    return runs, problems


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return what differs between two sciences besides norm and seed: `key (value, value)`."""
    left, right = _flat(one), _flat(other)
    keys = [key for key in sorted(left.keys() | right.keys()) if key != "seed" and not key.startswith("norm.")]
    return [f"{key} ({left.get(key)}, {right.get(key)})" for key in keys if left.get(key) != right.get(key)]


def _pair(pair_id: str, members: list[Run], baseline: str, confidence: float) -> Pair:
    by_arm: dict[str, list[Run]] = {}
    for run in members:
        by_arm.setdefault(_label(run.result), []).append(run)
    first = members[0].result
    # A norm with several settings is no baseline: it is not one arm.
    candidates = [label for label, runs in by_arm.items() if runs[0].result.norm == baseline]
    chosen = candidates[0] if len(candidates) == 1 else None
    base = by_arm[chosen] if chosen else []
    ordered = sorted(by_arm.items(), key=lambda item: (item[0] != chosen, item[0]))
    arms = [_arm(label, runs, [] if label == chosen else base, confidence) for label, runs in ordered]
    verdicts = [_verdict(arm, str(chosen)) for arm in arms if arm.label != chosen and base]
    splits = {(run.result.ranks, run.result.machine.get("batch_per_rank")) for run in members if run.result.machine}
    if verdicts and len(splits) > 1 and (first.science["augment"]["mixup"] or first.science["augment"]["cutmix"]):
        verdicts.append("Its runs split the batch differently over ranks or micro-batches, so images were mixed with "
                        "other partners: the arms differ in that too.")  # fmt: skip
    return Pair(pair_id, first.model, first.science["data"]["name"], arms, verdicts)


def _arm(label: str, runs: list[Run], base: list[Run], confidence: float) -> Arm:
    results = [run.result for run in runs]
    ended = {result.seed: result for result in results if result.status == "finished" and result.top1 is not None}
    top1 = {seed: result.top1 for seed, result in ended.items() if result.top1 is not None}
    ema = [result.ema_top1 for result in ended.values() if result.ema_top1 is not None]
    base_top1 = {run.result.seed: run.result.top1 for run in base
                 if run.result.status == "finished" and run.result.top1 is not None}  # fmt: skip
    speed = _median([result.images_per_s for result in results])
    base_speed = _median([run.result.images_per_s for run in base])
    is_comparable = bool(base) and len({_setting(result) for result in results + [run.result for run in base]}) == 1
    return Arm(
        label=label,
        runs=[run.name for run in runs],
        status={status: sum(result.status == status for result in results) for status in {r.status for r in results}},
        top1=sample(list(top1.values())) if top1 else None,
        ema_top1=sample(ema) if ema else None,
        top1_difference=paired_difference(top1, base_top1, confidence) if base else None,
        images_per_s=speed,
        speed_ratio=speed / base_speed if is_comparable and speed and base_speed else None,
        peak_mem_gib=_median([result.peak_mem_gib for result in results]),
        data_wait_frac=_median([result.data_wait_frac for result in results]),
        norm_impl=sorted({result.norm_impl for result in results if result.norm_impl}),
        device=sorted({f"{result.device} × {result.ranks}" for result in results if result.device}),
    )


def _verdict(arm: Arm, baseline: str) -> str:
    found = arm.top1_difference
    if found is None:
        return f"{arm.label} against {baseline}: no seed has a finished run of both."
    size = f"{arm.label} is {abs(found.mean):.2f} points {'above' if found.mean >= 0 else 'below'} {baseline} in top-1"
    if found.low is None or found.high is None:
        if found.n == 1:
            return f"{size} with one seed (n = 1): that says nothing about chance. Train more seeds."
        return f"{size} for each of n = {found.n} seeds alike: no interval can be had. Train more seeds."
    interval = f"{100 * found.confidence:.0f} % interval {found.low:+.2f} to {found.high:+.2f}, n = {found.n} seeds"
    if found.is_beyond_chance:
        return f"{size} ({interval}): larger than chance."
    return f"{size} ({interval}): not larger than chance. That is no proof that the two are equal."


def _missing_twin(members: list[Run], baseline: str, runs: list[Run]) -> list[str]:
    """Say which runs come nearest to the twins that a lone arm lacks, and what keeps them from being twins."""
    labels = {run.result.norm for run in members}
    if baseline in labels and len(labels) > 1:
        return []
    mine = members[0]
    others = [run for run in runs if run.result.pair_id != mine.result.pair_id and run.result.norm not in labels
              and (baseline in labels or run.result.norm == baseline)]  # fmt: skip
    if not others:
        wanted = "another norm" if baseline in labels else f"norm={baseline}"
        return [f"{mine.name}: nothing to compare it with; train the same with {wanted}"]
    nearest = min(others, key=lambda run: len(difference(mine.result.science, run.result.science)))
    keys = difference(mine.result.science, nearest.result.science)
    return [f"{mine.name} and {nearest.name} differ in more than the norm, so they are not compared: {'; '.join(keys)}"]


def _row(pair: Pair, arm: Arm) -> list[str]:
    found = arm.top1_difference
    gap = "" if found is None else f"{found.mean:+.2f}"
    if found is not None and found.low is not None:
        gap += f" [{found.low:+.2f}, {found.high:+.2f}]"
    elif found is not None:
        gap += f" (n = {found.n})"
    unfinished = ", ".join(f"{count} {status}" for status, count in sorted(arm.status.items()) if status != "finished")
    return [
        pair.pair_id,
        pair.model,
        pair.data,
        arm.label,
        str(arm.top1.n if arm.top1 else 0) + (f" ({unfinished})" if unfinished else ""),
        _spread(arm.top1),
        gap,
        _spread(arm.ema_top1),
        f"{arm.images_per_s:,.0f}" if arm.images_per_s else "–",
        f"{arm.speed_ratio:.2f}" if arm.speed_ratio else "",
        f"{arm.peak_mem_gib:.2f}" if arm.peak_mem_gib else "–",
        f"{100 * arm.data_wait_frac:.0f} %" if arm.data_wait_frac is not None else "–",
        "; ".join(arm.norm_impl),
    ]


def _curves(pairs: list[Pair], runs: list[Run]) -> list[page.Curve]:
    by_name = {run.name: run for run in runs}
    curves = []
    for pair in pairs:
        for arm in pair.arms:
            for run in (by_name[name] for name in arm.runs):
                for metric in ("val/top1", "train/loss"):
                    points = [(line["epoch"], line[metric]) for line in run.records if line.get(metric) is not None]
                    curves.append(page.Curve(pair.pair_id, f"{pair.model} on {pair.data}", arm.label,
                                             run.result.seed, metric, points))  # fmt: skip
    return curves


def _label(result: RunResult) -> str:
    """Name an arm by its norm and the norm's settings."""
    settings = {key: value for key, value in result.science["norm"].items() if key != "name"}
    return " ".join([result.norm, *(f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
                                    for key, value in settings.items())])  # fmt: skip


def _setting(result: RunResult) -> tuple[Any, ...]:
    """What must be equal for two speeds to be comparable."""
    return result.device, result.ranks, result.versions.get("torch"), *sorted(result.machine.items())


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _spread(found: Sample | None) -> str:
    if found is None:
        return "–"
    return f"{found.mean:.2f}" + (f" ± {found.std:.2f}" if found.std is not None else "")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
