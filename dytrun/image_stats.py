"""Two arms image by image: exact McNemar test, bootstrap interval, equality within a margin, seeds against images."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import binomtest, norm

from dytrun.stats import Equivalence

# Enough that the interval's ends move by less than a hundredth of its width with another seed.
_DRAWS = 10_000
_SEED = 0
# With fewer differing images the bootstrap's percentiles are coarse and skewed, and cover 90 to 94 % instead of 95.
_MANY = 100


@dataclass(frozen=True)
class RunPair:
    """Two runs of one seed, image by image."""

    seed: int
    only_arm: int
    """Images that only the arm's run got right."""
    only_baseline: int
    difference: float
    """In points."""
    p: float
    """Of McNemar's exact test, two-sided: about these two runs, not about other seeds."""


@dataclass(frozen=True)
class ImageComparison:
    """What the images say of an arm and the baseline, given the runs that there are: nothing about other seeds."""

    num_images: int
    only_arm: int
    """Images that the arm alone got right, summed over the pairs of runs."""
    only_baseline: int
    difference: float
    """In points, the mean over the pairs of runs."""
    low: float | None
    high: float | None
    """Bootstrap over images; None where too few images differ for one."""
    p: float | None
    """Of McNemar's exact test for one pair of runs; None for several, which share their images: see `pairs`."""
    p_holm: float | None
    """`p` corrected for the arms that are compared at a time."""
    confidence: float
    n_pairs: int
    pairs: list[RunPair]
    reason: str | None
    """Why there is no interval."""

    @property
    def is_beyond_chance(self) -> bool | None:
        """Whether the two runs differ by more than the images' chance, all arms considered; None for several pairs."""
        p = self.p if self.p_holm is None else self.p_holm
        return None if p is None else p <= 1 - self.confidence


@dataclass(frozen=True)
class Spread:
    """What the difference of two runs owes to the seeds, and what to the images; standard deviations in points."""

    seed_std: float
    """From seed to seed, on these images."""
    image_std: float
    """From one validation set of this size to another, the runs staying the same."""
    mean_std: float
    """Of the mean over all pairs of runs: its standard error over new seeds and new images at once."""
    seeds_alone: float
    """The part of it that no number of images takes away."""
    images_alone: float
    """The part of it that no number of seeds takes away."""
    more: str
    """`seeds` or `images`, whichever has the larger part in `mean_std`; `either` where neither stands out."""


def compare_images(
    arm: Bool[np.ndarray, "pairs images"], baseline: Bool[np.ndarray, "pairs images"], seeds: Sequence[int],
    confidence: float,
) -> ImageComparison:  # fmt: skip
    """Compare the hits of runs pair by pair and image by image.

    Nothing is assumed but that the images are a sample: each image's mean difference over the pairs is resampled, by
    bootstrap. The pairs share their images, so they are never counted as more of them. Where fewer images differ than
    McNemar's exact test needs to find anything, no interval is honest and none is given.

    Args:
        arm: hit or miss of each run of the arm.
        baseline: the same of the baseline's runs, seed by seed.
        seeds: one a pair.
        confidence: of the interval.
    """
    pairs = [_run_pair(seed, one, other) for seed, one, other in zip(seeds, arm, baseline, strict=True)]
    num, total = arm.shape[1], (arm.astype(np.int64) - baseline).sum(0)
    values, counts = np.unique(total, return_counts=True)
    ends, low, high, reason = interval(values, counts, confidence), None, None, None
    if ends is not None:
        low, high = (100 / len(pairs) * end for end in ends)
    else:
        moved, needed = int(counts[values != 0].sum()), fewest_discordant(confidence)
        reason = (f"{moved or 'no'} image{'' if moved == 1 else 's'} of {num:,} told the runs apart, and fewer than "
                  f"{needed} cannot show a difference at {100 * confidence:g} %")  # fmt: skip
    return ImageComparison(
        num_images=num,
        only_arm=sum(pair.only_arm for pair in pairs),
        only_baseline=sum(pair.only_baseline for pair in pairs),
        difference=100 * int(total.sum()) / (num * len(pairs)),
        low=low,
        high=high,
        p=pairs[0].p if len(pairs) == 1 else None,
        p_holm=None,
        confidence=confidence,
        n_pairs=len(pairs),
        pairs=pairs,
        reason=reason,
    )


def mcnemar(only_arm: int, only_baseline: int) -> float:
    """Return McNemar's exact two-sided p (binomial over the images on which two runs differ); 1 if there are none."""
    num = only_arm + only_baseline
    return float(binomtest(only_arm, num).pvalue) if num else 1.0


def fewest_discordant(confidence: float) -> int:
    """Return how many images must differ before McNemar's exact test can reject at all: 6 at 95 %."""
    return 1 + math.ceil(-math.log2(1 - confidence) - 1e-12)


def interval(
    values: Int[np.ndarray, " kinds"], counts: Int[np.ndarray, " kinds"], confidence: float
) -> tuple[float, float] | None:
    """Return the interval over images of the mean of a sample in which `values` stand `counts` times.

    The bootstrap's percentiles; where less than 100 values are not 0, its standard interval (mean ± z standard
    errors, which for a mean need no draws; Efron and Tibshirani 1993, section 13.2), which then covers better
    (`tests/coverage.py`); None where they are too few for any.
    """
    moved, num = int(counts[values != 0].sum()), int(counts.sum())
    if moved < fewest_discordant(confidence):
        return None
    if moved >= _MANY:
        return bootstrap(values.astype(float), counts, confidence)
    mean = float(values @ counts) / num
    error = math.sqrt((float(values**2 @ counts) / num - mean**2) / num)
    reach = float(norm.ppf(0.5 + confidence / 2)) * error
    return mean - reach, mean + reach


def bootstrap(
    values: Float[np.ndarray, " kinds"], counts: Int[np.ndarray, " kinds"], confidence: float
) -> tuple[float, float]:
    """Return the bootstrap's percentile interval of that mean; 10,000 draws, always the same ones.

    Drawing n of n values with replacement is one multinomial draw of their counts: exact, and as cheap for 50,000
    images as for 50.
    """
    num = int(counts.sum())
    drawn = np.random.default_rng(_SEED).multinomial(num, counts / num, size=_DRAWS) @ values / num
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def equivalent_images(found: ImageComparison, margin: float) -> Equivalence:
    """Test for one pair of runs whether they are equal within ±margin points on images like these.

    Two one-sided score tests for paired proportions (Tango, Statistics in Medicine 17, 1998; Nam, Biometrics 53,
    1997): they hold with few differing images too, and with none, where an estimated variance would be 0.
    """
    bound = margin / 100
    above = _score(found.only_arm, found.only_baseline, found.num_images, bound)
    below = _score(found.only_baseline, found.only_arm, found.num_images, bound)
    p = float(norm.cdf(max(above, below)))
    return Equivalence(margin, p, p <= 1 - found.confidence, "image by image, for one pair of runs")


def spread(arm: Bool[np.ndarray, "pairs images"], baseline: Bool[np.ndarray, "pairs images"]) -> Spread | None:
    """Split the variance of the difference between seeds and images; None for less than two pairs of runs.

    Two-way random effects, seeds crossed with images, one value a cell: difference[s, i] = mean + seed[s] + image[i]
    + rest[s, i], by the mean squares of Cornfield and Tukey (Annals of Mathematical Statistics 27, 1956; Searle,
    Casella and McCulloch, Variance Components, 1992, section 4.3). The mean's variance over both is
    (MS_seeds + MS_images - MS_rest) / (S N), of which the seeds' own part is (MS_seeds - MS_rest) / (S N).
    """
    differences = 100.0 * (arm.astype(np.int64) - baseline)
    num_seeds, num_images = differences.shape
    if num_seeds < 2 or num_images < 2:
        return None
    by_seed, by_image = differences.mean(1), differences.mean(0)
    ms_seeds = num_images * float(by_seed.var(ddof=1))
    ms_images = num_seeds * float(by_image.var(ddof=1))
    rest = differences - by_seed[:, None] - by_image + differences.mean()
    ms_rest = float((rest**2).sum()) / ((num_seeds - 1) * (num_images - 1))
    cells = num_seeds * num_images
    seeds, images = max(0.0, ms_seeds - ms_rest), max(0.0, ms_images - ms_rest)
    more = "either" if seeds == images == 0 else "seeds" if seeds > images else "images"
    return Spread(
        seed_std=math.sqrt(ms_seeds / num_images),
        image_std=math.sqrt(float(differences.var(axis=1, ddof=1).mean()) / num_images),
        mean_std=math.sqrt(max(ms_seeds + ms_images - ms_rest, ms_seeds, ms_images) / cells),
        seeds_alone=math.sqrt(seeds / cells),
        images_alone=math.sqrt(images / cells),
        more=more,
    )


def _run_pair(seed: int, arm: Bool[np.ndarray, " images"], baseline: Bool[np.ndarray, " images"]) -> RunPair:
    only_arm, only_baseline = int((arm & ~baseline).sum()), int((baseline & ~arm).sum())
    difference = 100 * (only_arm - only_baseline) / len(arm)
    return RunPair(seed, only_arm, only_baseline, difference, mcnemar(only_arm, only_baseline))


def _score(more: int, less: int, num: int, bound: float) -> float:
    """Return the score statistic of (more - less) / num against `bound`, 0 < bound < 1: below 0 where it is smaller."""
    b = (2 * num - more + less) * bound - more - less
    c = -less * bound * (1 - bound)
    rate = (math.sqrt(b * b - 8 * num * c) - b) / (4 * num)  # of `less`, under the hypothesis
    return (more - less - num * bound) / math.sqrt(num * (2 * rate + bound * (1 - bound)))
