"""Means, intervals and paired tests over seeds."""

import math
from collections.abc import Mapping
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

    @property
    def is_beyond_chance(self) -> bool | None:
        """Whether the interval leaves out 0; None where there is no interval."""
        return None if self.low is None or self.high is None else not self.low <= 0 <= self.high


def sample(values: list[float]) -> Sample:
    """Summarise at least one value (sample standard deviation, n - 1)."""
    return Sample(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


def paired_difference(arm: Mapping[int, float], baseline: Mapping[int, float], confidence: float) -> Difference | None:
    """Compare two arms seed by seed: mean of (arm - baseline) and its two-sided t interval.

    Only seeds that both arms have count; None where there are none.
    """
    differences = [arm[seed] - baseline[seed] for seed in sorted(arm.keys() & baseline.keys())]
    if not differences:
        return None
    mean, n = fmean(differences), len(differences)
    # Equal differences are a coincidence of coarse counts, not a certainty: an interval without width would claim one.
    if n == 1 or stdev(differences) == 0:
        return Difference(mean, None, None, n, confidence)
    half = float(student_t.ppf(0.5 + confidence / 2, n - 1)) * stdev(differences) / math.sqrt(n)
    return Difference(mean, mean - half, mean + half, n, confidence)
