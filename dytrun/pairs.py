"""Runs → arms → pairs. Two runs are compared only if their science differs in the norm and the seed alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dytrun.contrast import Arm, Rule, contrasts
from dytrun.errors import UserError
from dytrun.labels import arm_label
from dytrun.records import RunResult, difference
from dytrun.runs import Run
from dytrun.verdict import of_arms, of_losses, of_pair


@dataclass(frozen=True)
class Pair:
    """Arms that differ in the norm alone, the baseline first."""

    pair_id: str
    model: str
    data: str
    arms: list[Arm]
    verdict: str
    """What the pair says, in a sentence."""
    verdicts: list[str]
    """What each arm says; none where there is no baseline."""


def pair_runs(runs: Sequence[Run], asked: str | None, rule: Rule) -> tuple[list[Pair], list[str]]:
    """Sort runs into pairs; say which comparisons are not made, and why. `asked` is the norm of the baseline.

    Raises:
        UserError: no run has that norm.
    """
    refused = []
    if asked is not None and asked not in (norms := sorted({run.result.norm for run in runs})):
        raise UserError(f"baseline: no run has norm={asked}; there are runs with {', '.join(norms)}")
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.result.pair_id, []).append(run)
    pairs = []
    for pair_id, members in sorted(groups.items()):
        if unlike := _other_images(members):
            refused.append(f"{pair_id}: {unlike}")
            continue
        baseline = _baseline(members, asked)
        pairs.append(_pair(pair_id, members, baseline, rule))
        unknown = [run.name for run in members if run.hits is not None and not run.result.data_fingerprint]
        if unknown:
            refused.append(f"which images they saw is not known, so not image by image: {', '.join(unknown)}")
        refused += _missing_twin(members, baseline, runs)
    return pairs, refused


def _baseline(members: Sequence[Run], asked: str | None) -> str:
    """Return the norm that the others of a pair are compared with: ln, else rms, else the first, if none is asked for.

    A lone norm has no other to be compared with; it lacks the one that its model usually has.
    """
    norms = sorted({run.result.norm for run in members})
    usual = "rms" if members[0].result.science["data"].get("name") == "text" else "ln"
    return asked or next((one for one in ("ln", "rms") if one in norms), norms[0] if len(norms) > 1 else usual)


def _pair(pair_id: str, members: list[Run], baseline: str, rule: Rule) -> Pair:
    by_arm: dict[str, list[Run]] = {}
    for run in members:
        by_arm.setdefault(arm_label(run.result.science), []).append(run)
    first = members[0].result
    # A norm with several settings is no baseline: it is not one arm.
    candidates = [label for label, runs in by_arm.items() if runs[0].result.norm == baseline]
    chosen = candidates[0] if len(candidates) == 1 else None
    ordered = sorted(by_arm.items(), key=lambda item: (item[0] != chosen, *_place(item[0], item[1][0].result)))
    arms = contrasts(dict(ordered), chosen, rule)
    if chosen:
        verdict, verdicts = of_pair(arms[0], arms[1:]), of_arms(arms[0], arms[1:])
    else:
        there = f"{baseline} has {len(candidates)} settings here" if candidates else f"no run of {baseline}"
        verdict, verdicts = f"Nothing is compared: {there}.", []
    splits = {(run.result.ranks, run.result.machine.get("batch_per_rank")) for run in members if run.result.machine}
    if verdicts and len(splits) > 1 and "mixup" in first.science.get("augment", {}):
        verdicts.append("Its runs split the batch differently over ranks or micro-batches, so images were mixed with "
                        "other partners: the arms differ in that too.")  # fmt: skip
    data = str(first.science["data"].get("name"))
    if data == "text":
        verdict, *verdicts = (said.replace("top-1", "next-byte top-1") for said in (verdict, *verdicts))
        verdicts += of_losses(arms[0], arms[1:]) if chosen else []
    return Pair(pair_id, first.model, data, arms, verdict, verdicts)


def _other_images(members: Sequence[Run]) -> str | None:
    """Say if the runs of a pair did not all see the same images, or text."""
    what = "text" if members[0].result.science["data"].get("name") == "text" else "images"
    fingerprints = sorted({run.result.data_fingerprint for run in members if run.result.data_fingerprint})
    if len(fingerprints) > 1:
        return f"its runs saw different {what} (data fingerprints {', '.join(fingerprints)})"
    numbers = sorted({run.result.num_val for run in members if run.result.num_val is not None})
    if len(numbers) > 1:
        of = " and ".join(f"{num:,}" for num in numbers)
        return f"its runs were validated on different {what} ({of} {'bytes' if what == 'text' else 'of them'})"
    return None


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


def _place(label: str, result: RunResult) -> tuple[str, float, str]:
    """Return where an arm stands in the table: by norm, then by alpha_init."""
    return result.norm, result.alpha_init or 0.0, label
