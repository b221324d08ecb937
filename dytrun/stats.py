"""Means, intervals and tests over seeds: paired differences, equality within a margin, several arms at a time."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.stats import t as student_t


@dataclass(frozen=True)
class Sample:
    """Mean and spread over n runs; `std` is None for one run, which has none."""

    mean: float
    std: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """Mean paired difference over n seeds, with its t interval; none for one seed or where all are equal."""

    mean: float
    low: float | None
    high: float | None
    n: int
    confidence: float
    p: float | None
    """Of the two-sided paired t test; None where there is no interval."""
    p_holm: float | None = None
    """The same, corrected for the arms that are compared at a time; None until that is done."""

    @property
    def is_beyond_chance(self) -> bool | None:
        """Whether the difference is larger than chance, all arms considered; None where there is no interval."""
        p = self.p if self.p_holm is None else self.p_holm
        return None if p is None else p <= 1 - self.confidence


@dataclass(frozen=True)
class Equivalence:
    """Whether two arms are equal within ±margin points, by two one-sided tests (Schuirmann 1987).

    A difference that is not larger than chance shows no equality; this does, at the level 1 - confidence.
    """

    margin: float
    p: float
    """The larger one of the two tests'."""
    is_equal: bool
    """By `p_holm`, once there is one."""
    how: str
    """What the tests are over."""
    p_holm: float | None = None
    """`p` corrected for the arms that are compared at a time."""


def sample(values: list[float]) -> Sample:
    """Summarise at least one value (sample standard deviation, n - 1)."""
    return Sample(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


def paired_difference(arm: Mapping[int, float], baseline: Mapping[int, float], confidence: float) -> Difference | None:
    """Compare two arms seed by seed: mean of (arm - baseline), its two-sided t interval and the t test's p.

    Only seeds that both arms have count; None where there are none. The interval speaks of other seeds on these
    images. It holds what it promises where the differences are normal; where they are a few whole images it is wider
    than need be (`tests/coverage.py`).
    """
    differences = _differences(arm, baseline)
    if not differences:
        return None
    mean, n, error = fmean(differences), len(differences), _standard_error(differences)
    if error is None:
        return Difference(mean, None, None, n, confidence, None)
    half = reach(n, confidence) * error
    p = 2 * float(student_t.sf(abs(mean) / error, n - 1))
    return Difference(mean, mean - half, mean + half, n, confidence, p)


def reach(n: int, confidence: float) -> float:
    """Return how many standard errors the interval of n differences goes to either side: 12.7, 4.3, 3.2, … at 95 %."""
    return float(student_t.ppf(0.5 + confidence / 2, n - 1))


def equivalence(
    arm: Mapping[int, float], baseline: Mapping[int, float], margin: float, confidence: float
) -> Equivalence | None:
    """Test over seeds whether two arms are equal within ±margin; None where the differences have no spread."""
    differences = _differences(arm, baseline)
    error = _standard_error(differences)
    if error is None:
        return None
    mean, n = fmean(differences), len(differences)
    p = float(student_t.sf((margin - abs(mean)) / error, n - 1))  # the nearer bound has the larger p
    return Equivalence(margin, p, p <= 1 - confidence, f"over {n} seeds")


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Correct p values for being several, by Holm's step-down (1979); None is no test and stays None."""
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        corrected[place] = largest
    return corrected


def _differences(arm: Mapping[int, float], baseline: Mapping[int, float]) -> list[float]:
    return [arm[seed] - baseline[seed] for seed in sorted(arm.keys() & baseline.keys())]


def _standard_error(differences: Sequence[float]) -> float | None:
    """Return the standard error of the mean, in the values' unit; None for one value, or where all are equal."""
    # Equal differences are a coincidence of coarse counts, not a certainty: an interval without width would claim one.
    # They may differ in their last bits all the same.
    if len(differences) < 2 or math.isclose(max(differences), min(differences), rel_tol=0, abs_tol=1e-9):
        return None
    return stdev(differences) / math.sqrt(len(differences))
