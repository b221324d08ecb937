"""Several arms measured in turn in one process, and what may be concluded of their ratios.

The machine drifts: clocks, heat, neighbours. So every round measures every arm once, in an order that changes from
round to round, ratios are taken within a round, and the baseline stands in the list twice: how far its two ratios are
from 1 is the instrument's own error, and a difference that is not larger than that is none.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binom


@dataclass(frozen=True)
class Ratio:
    """Median of the ratios of the rounds, and its interval; no interval where there are too few rounds for one."""

    median: float
    low: float | None
    high: float | None
    n: int

    def __str__(self) -> str:
        interval = "" if self.low is None else f" [{self.low:.3f}, {self.high:.3f}]"
        return f"{self.median:.3f}{interval}"

    def is_beyond(self, itself: "Ratio | None") -> bool | None:
        """Whether the whole interval is further from 1 than the baseline is from itself; None where nobody knows."""
        if self.low is None or self.high is None or itself is None or itself.low is None or itself.high is None:
            return None
        error = max(abs(itself.low - 1), abs(itself.high - 1))
        return self.low - 1 > error or 1 - self.high > error


def in_turn(measures: Sequence[Callable[[], Any]], rounds: int) -> np.ndarray:
    """Call every measure once a round; return what they said, (arms, rounds), or (arms, rounds, n) for n values.

    Every round has an order of its own, drawn from a fixed seed, so that no arm always follows the same other one and
    finds the caches and the clock as that one leaves them.
    """
    random = np.random.default_rng(0)
    found: list[list[Any]] = [[None] * rounds for _ in measures]
    for number in range(rounds):
        for arm in random.permutation(len(measures)):
            found[arm][number] = measures[arm]()
    return np.array(found)


def ratio(arm: np.ndarray, baseline: np.ndarray, confidence: float) -> Ratio:
    """Return the median of arm / baseline over the rounds, with an interval that assumes nothing of their distribution.

    The interval runs between the two order statistics that hold the true median with at least that confidence
    (binomial, exact).
    """
    values = np.sort(arm / baseline)
    n = len(values)
    # The k-th smallest and the k-th largest leave the median out with probability 2 P(Binomial(n, 1/2) < k).
    k = int(binom.ppf((1 - confidence) / 2, n, 0.5))
    while k > 0 and 2 * binom.cdf(k - 1, n, 0.5) > 1 - confidence:
        k -= 1
    if k == 0:
        return Ratio(float(np.median(values)), None, None, n)
    return Ratio(float(np.median(values)), float(values[k - 1]), float(values[n - k]), n)


def verdict(name: str, found: Ratio, baseline: str, itself: Ratio | None) -> str:
    """Say in a sentence what a ratio of times allows to be said.

    Args:
        name: of the arm.
        found: its time over the baseline's.
        baseline: its name.
        itself: the baseline over itself, the instrument's error; None where it was not measured.
    """
    against = f"{name}: {found} of {baseline}'s time"
    if itself is None:
        return f"{against}; {baseline} was not measured against itself, so the instrument's error is not known"
    is_beyond = found.is_beyond(itself)
    if is_beyond is None or found.low is None or found.high is None:
        return f"{against}; too few rounds ({found.n}) for an interval, nothing may be concluded"
    if not is_beyond:
        return f"{against}; no larger than the error of the measurement ({baseline} against itself {itself})"
    faster = "faster" if found.median < 1 else "slower"
    low, high = sorted((abs(found.low - 1), abs(found.high - 1)))
    return f"{against}: {100 * low:.1f} to {100 * high:.1f} % {faster} ({baseline} against itself {itself})"


def median_ms(times: np.ndarray) -> float:
    """Median over rounds."""
    return float(np.median(times))
