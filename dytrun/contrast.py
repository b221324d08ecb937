"""The runs of one norm against those of the baseline: one arm of a pair, in numbers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np

from dytrun.image_stats import ImageComparison, Spread, compare_images, equivalent_images, spread
from dytrun.records import RunResult
from dytrun.runs import Run
from dytrun.stats import Difference, Equivalence, Sample, equivalence, holm, paired_difference, sample


@dataclass(frozen=True)
class Rule:
    """What counts as what."""

    confidence: float
    margin: float
    """In points of top-1."""


@dataclass(frozen=True)
class Arm:
    """All seeds of one norm within a pair."""

    label: str
    alpha_init: float | None
    runs: list[str]
    status: dict[str, int]
    top1: Sample | None
    ema_top1: Sample | None
    best_top1: Sample | None
    """Of the best evaluation of each run, which favours the arm that varies more: for the eye, not compared."""
    val_loss: Sample | None
    top1_difference: Difference | None
    ema_difference: Difference | None
    loss_difference: Difference | None
    """Of val_loss."""
    equivalence: Equivalence | None
    """Over seeds, or image by image where there is one pair of runs; None where neither can be tested."""
    images: ImageComparison | None
    """None where no seed has a correct.npz of both arms."""
    spread: Spread | None
    images_per_s: float | None
    """Median over the runs."""
    step_ms: float | None
    """The same."""
    speed_ratio: float | None
    """Over the baseline; None where device, ranks or compilation differ, or nothing was measured."""
    peak_mem_gib: float | None
    data_wait_frac: float | None
    norm_impl: list[str]
    device: list[str]
    published: list[dict[str, Any]]
    """What the runs' experiment pages expect, with what the runs have changed of those recipes."""


def contrasts(by_arm: Mapping[str, Sequence[Run]], baseline: str | None, rule: Rule) -> list[Arm]:
    """Summarise each arm, compare it with the baseline if there is one, and correct for the number of arms (Holm)."""
    base = list(by_arm[baseline]) if baseline else []
    arms = [_arm(label, list(runs), [] if label == baseline else base, rule) for label, runs in by_arm.items()]
    top1 = _corrected(arms, lambda arm: arm.top1_difference)
    ema = _corrected(arms, lambda arm: arm.ema_difference)
    loss = _corrected(arms, lambda arm: arm.loss_difference)
    same = _corrected(arms, lambda arm: arm.equivalence)
    images = _corrected(arms, lambda arm: arm.images)
    return [
        replace(
            arm,
            top1_difference=arm.top1_difference and replace(arm.top1_difference, p_holm=top1[place]),
            ema_difference=arm.ema_difference and replace(arm.ema_difference, p_holm=ema[place]),
            loss_difference=arm.loss_difference and replace(arm.loss_difference, p_holm=loss[place]),
            equivalence=arm.equivalence and _decided(arm.equivalence, same[place], rule),
            images=arm.images and replace(arm.images, p_holm=images[place]),
        )
        for place, arm in enumerate(arms)
    ]


def _arm(label: str, runs: list[Run], base: list[Run], rule: Rule) -> Arm:
    results = [run.result for run in runs]
    speed = _median([result.images_per_s for result in results])
    base_speed = _median([run.result.images_per_s for run in base])
    is_comparable = bool(base) and len({speed_setting(run.result) for run in [*runs, *base]}) == 1
    top1, ema = _by_seed(runs, lambda result: result.top1), _by_seed(runs, lambda result: result.ema_top1)
    base_top1 = _by_seed(base, lambda result: result.top1)
    loss, base_loss = (_by_seed(own, lambda result: result.val_loss) for own in (runs, base))
    images, parts = _image_by_image(runs, base, rule.confidence)
    same = equivalence(top1, base_top1, rule.margin, rule.confidence)
    if same is None and images is not None and images.n_pairs == len(top1.keys() & base_top1.keys()) == 1:
        same = equivalent_images(images, rule.margin)
    return Arm(
        label=label,
        alpha_init=results[0].alpha_init,
        runs=[run.name for run in runs],
        status={status: sum(result.status == status for result in results) for status in {r.status for r in results}},
        top1=_sample(top1),
        ema_top1=_sample(ema),
        best_top1=_sample(_by_seed(runs, lambda result: result.best_top1)),
        val_loss=_sample(loss),
        top1_difference=paired_difference(top1, base_top1, rule.confidence),
        ema_difference=paired_difference(ema, _by_seed(base, lambda result: result.ema_top1), rule.confidence),
        loss_difference=paired_difference(loss, base_loss, rule.confidence),
        equivalence=same,
        images=images,
        spread=parts,
        images_per_s=speed,
        step_ms=_median([result.step_ms_p50 for result in results]),
        speed_ratio=speed / base_speed if is_comparable and speed and base_speed else None,
        peak_mem_gib=_median([result.peak_mem_gib for result in results]),
        data_wait_frac=_median([result.data_wait_frac for result in results]),
        norm_impl=sorted({result.norm_impl for result in results if result.norm_impl}),
        device=sorted({f"{result.device} × {result.ranks}" for result in results if result.device}),
        published=_published(results),
    )


def _image_by_image(
    runs: Sequence[Run], base: Sequence[Run], confidence: float
) -> tuple[ImageComparison | None, Spread | None]:
    """Compare the hits of the seeds that have them in both arms, and on the same images for all anybody knows."""
    ours, theirs = ({run.result.seed: run for run in arm if run.hits is not None} for arm in (runs, base))
    fingerprints = {run.result.data_fingerprint for run in (*ours.values(), *theirs.values())}
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds or len(fingerprints) > 1 or None in fingerprints:
        return None, None
    arm, baseline = (np.stack([found for seed in seeds if (found := arm[seed].hits) is not None])
                     for arm in (ours, theirs))  # fmt: skip
    return compare_images(arm, baseline, seeds, confidence), spread(arm, baseline)


def _corrected(
    arms: Sequence[Arm], what: Callable[[Arm], Difference | Equivalence | ImageComparison | None]
) -> list[float | None]:
    """Return the p values of one test of all arms, corrected; None where there is none."""
    return holm([None if (found := what(arm)) is None else found.p for arm in arms])


def _decided(found: Equivalence, p_holm: float | None, rule: Rule) -> Equivalence:
    return replace(found, p_holm=p_holm, is_equal=p_holm is not None and p_holm <= 1 - rule.confidence)


def _by_seed(runs: Sequence[Run], what: Callable[[RunResult], float | None]) -> dict[int, float]:
    """Return {seed: value} of the finished runs that have one."""
    return {run.result.seed: value for run in runs
            if run.result.status == "finished" and (value := what(run.result)) is not None}  # fmt: skip


def _sample(values: Mapping[int, float]) -> Sample | None:
    return sample(list(values.values())) if values else None


def _published(results: Sequence[RunResult]) -> list[dict[str, Any]]:
    found = []
    for result in results:
        if result.published is not None and dict(result.published) not in found:
            found.append(dict(result.published))
    return found


def speed_setting(result: RunResult) -> tuple[Any, ...]:
    """What must be equal for two speeds to be comparable."""
    return result.device, result.ranks, result.versions.get("torch"), *sorted(result.machine.items())


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
