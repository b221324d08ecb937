"""Runs → arms → pairs. Two runs are compared only if their science differs in the norm and the seed alone."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from dytrun.errors import UserError
from dytrun.records import RunResult, difference, whole_lines
from dytrun.stats import Difference, Sample, paired_difference, sample

# Settings of a norm that need no mention in the name of an arm.
_USUAL: dict[str, Any] = {
    "rules": [], "shift_init": None, "learn_alpha": True, "per_channel_alpha": False, "affine": True,
    "types": ["layernorm"], "include": None, "exclude": [],
}  # fmt: skip


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
    alpha_init: float | None
    runs: list[str]
    status: dict[str, int]
    top1: Sample | None
    ema_top1: Sample | None
    val_loss: Sample | None
    top1_difference: Difference | None
    images_per_s: float | None
    """Median over the runs."""
    speed_ratio: float | None
    """Over the baseline; None where device, ranks or compilation differ, or nothing was measured."""
    peak_mem_gib: float | None
    data_wait_frac: float | None
    norm_impl: list[str]
    device: list[str]
    published: list[dict[str, Any]]
    """What the runs' experiment pages expect, with what the runs have changed of those recipes."""


@dataclass(frozen=True)
class Pair:
    """Arms that differ in the norm alone, the baseline first."""

    pair_id: str
    model: str
    data: str
    arms: list[Arm]
    verdicts: list[str]


def pair_runs(runs: Sequence[Run], asked: str | None, confidence: float) -> tuple[list[Pair], list[str]]:
    """Sort runs into pairs; say which comparisons are not made, and why. `asked` is the norm of the baseline."""
    refused = []
    if asked is not None and asked not in (norms := sorted({run.result.norm for run in runs})):
        refused.append(f"no run has norm={asked}, the baseline; there are runs with {', '.join(norms)}")
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.result.pair_id, []).append(run)
    pairs = []
    for pair_id, members in sorted(groups.items()):
        baseline = _baseline(members, asked)
        fingerprints = {run.result.data_fingerprint for run in members if run.result.data_fingerprint}
        if len(fingerprints) > 1:
            refused.append(
                f"{pair_id}: its runs saw different images (data fingerprints {', '.join(sorted(fingerprints))})"
            )
            continue
        pairs.append(_pair(pair_id, members, baseline, confidence))
        refused += _missing_twin(members, baseline, runs)
    return pairs, refused


def _baseline(members: Sequence[Run], asked: str | None) -> str:
    """Return the norm that the others of a pair are compared with: ln, else rms, else the first, if none is asked for.

    A lone norm has no other to be compared with; it lacks the one that its model usually has.
    """
    norms = sorted({run.result.norm for run in members})
    usual = "rms" if members[0].result.science["data"].get("name") == "text" else "ln"
    return asked or next((one for one in ("ln", "rms") if one in norms), norms[0] if len(norms) > 1 else usual)


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


def _pair(pair_id: str, members: list[Run], baseline: str, confidence: float) -> Pair:
    by_arm: dict[str, list[Run]] = {}
    for run in members:
        by_arm.setdefault(_label(_told(run.result.science)), []).append(run)
    first = members[0].result
    # A norm with several settings is no baseline: it is not one arm.
    candidates = [label for label, runs in by_arm.items() if runs[0].result.norm == baseline]
    chosen = candidates[0] if len(candidates) == 1 else None
    base = by_arm[chosen] if chosen else []
    ordered = sorted(by_arm.items(), key=lambda item: (item[0] != chosen, *_place(item[0], item[1][0].result)))
    arms = [_arm(label, runs, [] if label == chosen else base, confidence) for label, runs in ordered]
    verdicts = _verdicts([arm for arm in arms if arm.label != chosen], str(chosen)) if base else []
    splits = {(run.result.ranks, run.result.machine.get("batch_per_rank")) for run in members if run.result.machine}
    if verdicts and len(splits) > 1 and "mixup" in first.science.get("augment", {}):
        verdicts.append("Its runs split the batch differently over ranks or micro-batches, so images were mixed with "
                        "other partners: the arms differ in that too.")  # fmt: skip
    return Pair(pair_id, first.model, first.science["data"]["name"], arms, verdicts)


def _arm(label: str, runs: list[Run], base: list[Run], confidence: float) -> Arm:
    results = [run.result for run in runs]
    ended = {result.seed: result for result in results if result.status == "finished" and result.top1 is not None}
    top1 = {seed: result.top1 for seed, result in ended.items() if result.top1 is not None}
    ema = [result.ema_top1 for result in ended.values() if result.ema_top1 is not None]
    losses = [result.val_loss for result in ended.values() if result.val_loss is not None]
    base_top1 = {run.result.seed: run.result.top1 for run in base
                 if run.result.status == "finished" and run.result.top1 is not None}  # fmt: skip
    speed = _median([result.images_per_s for result in results])
    base_speed = _median([run.result.images_per_s for run in base])
    is_comparable = bool(base) and len({_setting(result) for result in results + [run.result for run in base]}) == 1
    return Arm(
        label=label,
        alpha_init=results[0].alpha_init,
        runs=[run.name for run in runs],
        status={status: sum(result.status == status for result in results) for status in {r.status for r in results}},
        top1=sample(list(top1.values())) if top1 else None,
        ema_top1=sample(ema) if ema else None,
        val_loss=sample(losses) if losses else None,
        top1_difference=paired_difference(top1, base_top1, confidence) if base else None,
        images_per_s=speed,
        speed_ratio=speed / base_speed if is_comparable and speed and base_speed else None,
        peak_mem_gib=_median([result.peak_mem_gib for result in results]),
        data_wait_frac=_median([result.data_wait_frac for result in results]),
        norm_impl=sorted({result.norm_impl for result in results if result.norm_impl}),
        device=sorted({f"{result.device} × {result.ranks}" for result in results if result.device}),
        published=_published(results),
    )


def _verdicts(arms: Sequence[Arm], baseline: str) -> list[str]:
    """Return a sentence an arm; those with one seed share one, because they all say the same: nothing."""
    single = [arm for arm in arms if arm.top1_difference is not None and arm.top1_difference.n == 1]
    if len(single) < 2:
        return [_verdict(arm, baseline) for arm in arms]
    shared = (
        f"{len(single)} arms have one seed each (n = 1), so their differences from {baseline}, in the table, say "
        "nothing about chance. Train more seeds."
    )
    return [*(_verdict(arm, baseline) for arm in arms if arm not in single), shared]


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


def _missing_twin(members: Sequence[Run], baseline: str, runs: Sequence[Run]) -> list[str]:
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

    def unlike(one: Run, other: Run) -> list[tuple[str, Any, Any]]:
        found = difference(one.result.science, other.result.science)
        return [item for item in found if not item[0].startswith("norm.")]

    nearest = min(others, key=lambda run: len(unlike(mine, run)))
    keys = [f"{key} ({one}, {other})" for key, one, other in unlike(mine, nearest)]
    return [f"{mine.name} and {nearest.name} differ in more than the norm, so they are not compared: {'; '.join(keys)}"]


def _published(results: Sequence[RunResult]) -> list[dict[str, Any]]:
    found = []
    for result in results:
        if result.published is not None and dict(result.published) not in found:
            found.append(dict(result.published))
    return found


def _told(science: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a norm without the types that it replaces, where they are the only ones of the model."""
    norm = dict(science["norm"])
    if science["model"].get("name") == "llama" and norm.get("types") == ["rmsnorm"]:
        del norm["types"]
    return norm


def _label(norm: Mapping[str, Any]) -> str:
    """Name an arm by its norm and those of its settings that are not the usual ones."""
    settings = {key: value for key, value in norm.items() if key != "name" and _USUAL.get(key, ...) != value}
    return " ".join([norm["name"], *(f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
                                     for key, value in settings.items())])  # fmt: skip


def _place(label: str, result: RunResult) -> tuple[str, float, str]:
    """Return where an arm stands in the table: by norm, then by alpha_init."""
    return result.norm, result.alpha_init or 0.0, label


def _setting(result: RunResult) -> tuple[Any, ...]:
    """What must be equal for two speeds to be comparable."""
    return result.device, result.ranks, result.versions.get("torch"), *sorted(result.machine.items())


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
