"""How often the report's 95 % intervals hold what they should, on simulated runs of one and the same norm.

Every image has a difficulty of its own, the same for all runs; whether a run gets it right is a draw of its own. With
`seed_std` a run is also better or worse on all images. There is no difference between the arms, so an interval over
seeds should hold 0; one over images should hold the difference that the two runs have over all images there could be,
which is 0 without `seed_std`. To run it: python tests/coverage.py [TRIALS [IMAGES …]]
"""

import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri

from dytrun.image_stats import interval
from dytrun.stats import paired_difference

CONFIDENCE = 0.95
# Images of equal chance of each level of difficulty.
LEVELS = 200
_GRID = ndtri((np.arange(LEVELS) + 0.5) / LEVELS)


@dataclass(frozen=True)
class Setting:
    """What is simulated."""

    num_images: int
    disagreement: float
    """Share of the images on which two runs differ."""
    accuracy: float
    seed_std: float
    """Of a run's accuracy over all images, in points."""
    num_seeds: int


@dataclass(frozen=True)
class Share:
    """Of the trials, in percent."""

    covered: float
    missed: float
    without: float
    """No interval was given."""

    @property
    def coverage(self) -> float:
        """Of the intervals that were given."""
        return 100 * self.covered / (self.covered + self.missed)


def seeds(setting: Setting, trials: int, seed: int = 0) -> Share:
    """Try the t interval over seeds; all runs of a trial see the same images."""
    rng = np.random.default_rng(seed)
    mean, slope, unit = _model(setting)
    shifts = rng.normal(0, unit * setting.seed_std, (trials, 2, setting.num_seeds))
    images = rng.multinomial(setting.num_images, np.full(LEVELS, 1 / LEVELS), size=trials)
    top1 = np.empty(shifts.shape)
    for one in np.ndindex(2, setting.num_seeds):
        chances = ndtr(mean + slope * _GRID + shifts[:, one[0], one[1], None])
        top1[:, one[0], one[1]] = 100 * rng.binomial(images, chances).sum(1) / setting.num_images
    found = [paired_difference(dict(enumerate(arm)), dict(enumerate(base)), CONFIDENCE) for arm, base in top1]
    return _share([(one.low, one.high, 0.0) for one in found])


def images(setting: Setting, trials: int, seed: int = 0) -> Share:
    """Try the interval over images; the images of each trial are new ones, and so are the runs."""
    rng = np.random.default_rng(seed)
    mean, slope, unit = _model(setting)
    tried = []
    for _ in range(trials):
        shifts = rng.normal(0, unit * setting.seed_std, (2, setting.num_seeds, 1))
        arm, base = ndtr(mean + slope * _GRID + shifts)
        cells, truth = np.ones((LEVELS, 1)), 100 * float((arm - base).mean())
        for p, q in zip(arm, base, strict=True):  # the sum over pairs of (hit - hit), for each level
            one = np.stack([q * (1 - p), p * q + (1 - p) * (1 - q), p * (1 - q)], 1)
            wide = np.zeros((LEVELS, cells.shape[1] + 2))
            for step in range(3):
                wide[:, step : step + cells.shape[1]] += cells * one[:, step, None]
            cells = wide
        chances = cells.mean(0)
        counts = rng.multinomial(setting.num_images, chances / chances.sum())
        values = np.arange(-setting.num_seeds, setting.num_seeds + 1)
        kept = counts > 0
        ends = _interval(tuple(values[kept].tolist()), tuple(counts[kept].tolist()))
        low, high = (None, None) if ends is None else (100 * end / setting.num_seeds for end in ends)
        tried.append((low, high, truth))
    return _share(tried)


@functools.cache
def _interval(values: tuple[int, ...], counts: tuple[int, ...]) -> tuple[float, float] | None:
    return interval(np.array(values), np.array(counts), CONFIDENCE)


def _model(setting: Setting) -> tuple[float, float, float]:
    """Return mean and slope of a run's probit over difficulty, and what a point of accuracy is in it."""

    def mean_of(slope: float) -> float:
        return float(ndtri(setting.accuracy)) * (1 + slope**2) ** 0.5

    def disagreement(slope: float) -> float:
        chances = ndtr(mean_of(slope) + slope * _GRID)
        return float((2 * chances * (1 - chances)).mean())

    slope = brentq(lambda slope: disagreement(slope) - setting.disagreement, 0.01, 100)
    step = 1e-3
    higher = float(ndtr(mean_of(slope) + step + slope * _GRID).mean())
    lower = float(ndtr(mean_of(slope) - step + slope * _GRID).mean())
    return mean_of(slope), slope, 2 * step / (100 * (higher - lower))


def _share(tried: list[tuple[float | None, float | None, float]]) -> Share:
    without = sum(low is None for low, _, _ in tried)
    covered = sum(low <= truth <= high for low, high, truth in tried if low is not None and high is not None)
    missed = len(tried) - without - covered
    return Share(*(100 * count / len(tried) for count in (covered, missed, without)))


def settings(num_images: int) -> Iterator[Setting]:
    """Go through twins to strangers, runs without and with a level of their own, one to five seeds."""
    for disagreement in (0.01, 0.05, 0.2):
        yield Setting(num_images, disagreement, 0.8, 0.0, 1)
        for num_seeds in (1, 2, 3, 5):
            yield Setting(num_images, disagreement, 0.8, 0.3, num_seeds)


def main() -> None:
    """Print the table, for validation sets of digits' to ImageNet's size unless others are named."""
    trials, *sizes = [int(word) for word in sys.argv[1:]] or [2_000]
    _print("| images | they differ on | seed std | seeds | over seeds: holds 0 | none | over images: holds | none |")
    _print("|---|---|---|---|---|---|---|---|")
    for one in (one for size in sizes or (360, 2_000, 10_000, 50_000) for one in settings(size)):
        over = seeds(one, trials) if one.num_seeds > 1 else None
        by = images(one, trials)
        said = [f"{over.coverage:.1f} %", f"{over.without:.1f} %"] if over else ["–", "–"]
        said += [f"{by.coverage:.1f} %", f"{by.without:.1f} %"]
        _print(f"| {one.num_images:,} | {100 * one.disagreement:g} % | {one.seed_std:g} | {one.num_seeds} | "
               f"{' | '.join(said)} |")  # fmt: skip


def _print(line: str) -> None:
    print(line, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
