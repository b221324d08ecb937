"""Tests and intervals against published figures, against statsmodels and SciPy, and on runs without a difference."""

from dataclasses import replace

import numpy as np
import pytest
from coverage import Setting, images, seeds
from scipy import stats as scipy_stats
from scipy.optimize import minimize_scalar
from statsmodels.stats.contingency_tables import mcnemar as oracle_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_paired

from dytrun.image_stats import bootstrap, compare_images, equivalent_images, fewest_discordant, mcnemar, spread
from dytrun.stats import equivalence, holm, paired_difference

# Hours of sleep that ten patients gained with two drugs: Student, The probable error of a mean (Biometrika 6, 1908).
DRUG_1 = (0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0)
DRUG_2 = (1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4)


def by_seed(values) -> dict[int, float]:
    return {number: float(value) for number, value in enumerate(values)}


def pair(only_arm: int, only_baseline: int, num: int) -> tuple[np.ndarray, np.ndarray]:
    """One pair of runs over `num` images, which agree on all the others."""
    arm, base = np.ones((1, num), bool), np.ones((1, num), bool)
    base[0, :only_arm] = False
    arm[0, only_arm : only_arm + only_baseline] = False
    return arm, base


@pytest.mark.parametrize(
    ("more", "less", "p"),
    [
        (7, 1, 0.0703),  # Fagerland, Lydersen and Laake, BMC Medical Research Methodology 13:91 (2013), Table 1
        (12, 2, 0.0129),  # Armitage and Berry, Statistical Methods in Medical Research (1994), p. 127; Liddell's exact
    ],
)
def test_mcnemar_gives_what_is_published(more, less, p):
    assert mcnemar(more, less) == pytest.approx(p, abs=5e-5)
    assert mcnemar(less, more) == mcnemar(more, less)
    assert mcnemar(0, 0) == 1


def test_mcnemar_is_statsmodels():
    rng = np.random.default_rng(0)
    for more, less in rng.integers(0, 60, (50, 2)):
        expected = oracle_mcnemar([[5, more], [less, 5]], exact=True).pvalue if more + less else 1.0
        assert mcnemar(int(more), int(less)) == pytest.approx(float(expected), abs=1e-12)


def test_the_paired_t_test_gives_students_figures():
    found = paired_difference(by_seed(DRUG_1), by_seed(DRUG_2), 0.95)
    # R's documentation of t.test: t = -4.0621, df = 9, p-value = 0.002833, -2.4598858 -0.7001142
    assert found.p == pytest.approx(0.002833, abs=5e-7)
    assert (found.low, found.high) == (pytest.approx(-2.4598858, abs=1e-7), pytest.approx(-0.7001142, abs=1e-7))
    assert found.is_beyond_chance is True


def test_two_one_sided_tests_give_what_is_published():
    # TOSTER's vignette on the same data, bounds ±0.5: t(9) = -2.777, p = 0.989: not shown.
    found = equivalence(by_seed(DRUG_1), by_seed(DRUG_2), 0.5, 0.95)
    assert found.p == pytest.approx(0.989, abs=5e-4)
    assert not found.is_equal
    # By hand for ±3: (3 - 1.58) / (1.229995 / 10 ** 0.5) = 3.650771 with 9 degrees of freedom.
    found = equivalence(by_seed(DRUG_1), by_seed(DRUG_2), 3.0, 0.95)
    assert found.p == pytest.approx(float(scipy_stats.t.sf(3.650771, 9)), rel=1e-5)
    assert found.is_equal


def test_two_one_sided_tests_are_statsmodels():
    rng = np.random.default_rng(1)
    for _ in range(50):
        arm, base = rng.normal(80, 0.3, (2, int(rng.integers(2, 9))))
        margin = float(rng.uniform(0.05, 1))
        found = equivalence(by_seed(arm), by_seed(base), margin, 0.95)
        assert found.p == pytest.approx(ttost_paired(arm, base, -margin, margin)[0], rel=1e-9)
        assert paired_difference(by_seed(arm), by_seed(base), 0.95).p == pytest.approx(
            scipy_stats.ttest_rel(arm, base).pvalue, rel=1e-9
        )


def test_holm_gives_the_worked_example_and_is_statsmodels():
    # Wikipedia, Holm-Bonferroni method: with 0.01, 0.04, 0.03, 0.005 the first and the last are rejected at 0.05.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.2, None, 0.01]) == [0.2, None, 0.02]
    assert holm([None]) == [None]
    rng = np.random.default_rng(2)
    for _ in range(10):
        values = rng.uniform(0, 0.3, int(rng.integers(1, 12)))
        assert holm([float(p) for p in values]) == pytest.approx(multipletests(values, method="holm")[1].tolist())


def test_equality_of_two_runs_is_the_score_test_of_a_constrained_likelihood():
    """The variance under the hypothesis, found by maximising the likelihood instead of by its closed form."""
    for more, less, num, margin in ((12, 9, 2_000, 0.8), (0, 0, 360, 0.2), (3, 40, 5_000, 1.0), (5, 0, 400, 2.0)):

        def expected(more, less, num=num, bound=margin / 100):
            def unlikely(rate):
                rest = num - more - less
                terms = ((more, rate + bound), (less, rate), (rest, 1 - bound - 2 * rate))
                return -sum(count * np.log(chance) for count, chance in terms if count)

            low, high = 1e-12, (1 - bound) / 2 - 1e-12
            rate = minimize_scalar(unlikely, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
            error = np.sqrt(num * (2 * rate + bound - bound**2))
            return float(scipy_stats.norm.cdf((more - less - num * bound) / error))

        found = equivalent_images(compare_images(*pair(more, less, num), [0], 0.95), margin)
        assert found.p == pytest.approx(max(expected(more, less), expected(less, more)), rel=1e-3)


def test_two_identical_runs_are_equal_on_many_images_and_not_on_few():
    for num, is_equal in ((360, False), (50_000, True)):
        found = compare_images(*pair(0, 0, num), [0], 0.95)
        assert (found.difference, found.low, found.high, found.p) == (0, None, None, 1.0)
        assert "no image" in found.reason
        assert equivalent_images(found, 0.2).is_equal is is_equal


def test_equality_is_claimed_wrongly_as_often_as_it_says():
    """At a true difference of exactly the margin, two one-sided tests may say `equal` in 5 % of the trials."""
    drawn = np.random.default_rng(3).multinomial(20_000, [0.006, 0.004, 0.99], size=2_000)  # 0.2 points apart
    found = compare_images(*pair(1, 1, 20_000), [0], 0.95)
    claimed = sum(equivalent_images(replace(found, only_arm=int(more), only_baseline=int(less)), 0.2).is_equal
                  for more, less, _ in drawn)  # fmt: skip
    assert 0.035 <= claimed / 2_000 <= 0.065


def test_the_bootstrap_is_scipys_with_less_work():
    values = np.repeat([-1.0, 0.0, 1.0], [20, 940, 40])
    expected = scipy_stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=0)
    found = bootstrap(np.array([-1.0, 0.0, 1.0]), np.array([20, 940, 40]), 0.95)
    assert found == pytest.approx(tuple(expected.confidence_interval), abs=5e-4)
    assert found == bootstrap(np.array([-1.0, 0.0, 1.0]), np.array([20, 940, 40]), 0.95)


def test_too_few_differing_images_give_no_interval_and_a_reason():
    assert [fewest_discordant(level) for level in (0.9, 0.95, 0.99)] == [5, 6, 8]
    for needed in (5, 6, 8):  # the first number with which McNemar's test can reject at all
        level = {5: 0.9, 6: 0.95, 8: 0.99}[needed]
        assert mcnemar(needed, 0) <= 1 - level < mcnemar(needed - 1, 0)
    few = compare_images(*pair(5, 0, 360), [0], 0.95)
    assert (few.low, few.high, few.p) == (None, None, 0.0625)
    assert few.reason == "5 images of 360 told the runs apart, and fewer than 6 cannot show a difference at 95 %"
    enough = compare_images(*pair(6, 0, 360), [0], 0.95)
    assert enough.low > 0 and enough.reason is None
    # (7 - 1) / 360, and 1.959964 standard errors: by hand.
    some = compare_images(*pair(7, 1, 360), [0], 0.95)
    error = 100 * ((8 - 36 / 360) ** 0.5) / 360
    assert (some.low, some.high) == pytest.approx((100 * 6 / 360 - 1.959964 * error, 100 * 6 / 360 + 1.959964 * error))
    many = compare_images(*pair(70, 40, 2_000), [0], 0.95)
    assert (many.low, many.high) == pytest.approx(
        tuple(100 * end for end in bootstrap(np.array([-1.0, 0.0, 1.0]), np.array([40, 1_890, 70]), 0.95))
    )


def test_several_pairs_share_their_images():
    """The same two runs thrice say no more than once: seeds are no images."""
    arm, base = pair(30, 12, 500)
    once = compare_images(arm, base, [0], 0.95)
    thrice = compare_images(np.repeat(arm, 3, 0), np.repeat(base, 3, 0), [0, 1, 2], 0.95)
    assert (thrice.difference, thrice.low, thrice.high) == pytest.approx((once.difference, once.low, once.high))
    assert thrice.p is None and thrice.is_beyond_chance is None
    assert [(one.seed, one.p) for one in thrice.pairs] == [(seed, once.p) for seed in range(3)]
    assert (thrice.only_arm, thrice.n_pairs) == (90, 3)


def test_variance_is_split_between_seeds_and_images():
    rng = np.random.default_rng(4)
    # Pairs that differ in their level alone, on many images: what differs between seeds is the seeds' doing.
    shift = rng.random((4, 1)) * 0.4
    by_seeds = spread(rng.random((4, 20_000)) < 0.4 + shift, rng.random((4, 20_000)) < 0.6)
    assert by_seeds.more == "seeds"
    assert by_seeds.seed_std > 5 * by_seeds.image_std
    # All pairs differ on the same images: more seeds would tell the same again.
    arm, base = pair(30, 12, 500)
    by_images = spread(np.repeat(arm, 3, 0), np.repeat(base, 3, 0))
    assert (by_images.more, by_images.seed_std) == ("images", 0.0)
    assert by_images.image_std == pytest.approx(100 * np.std(arm[0] * 1.0 - base[0], ddof=1) / 500**0.5)
    assert by_images.mean_std == pytest.approx(by_images.image_std) == by_images.images_alone
    assert by_images.seeds_alone == 0
    assert spread(arm, base) is None


def test_the_variance_components_are_those_of_an_anova():
    """By statsmodels, of which the mean squares of seeds, images and the rest are asked."""
    from pandas import DataFrame
    from statsmodels.formula.api import ols
    from statsmodels.stats.anova import anova_lm

    rng = np.random.default_rng(5)
    arm, base = rng.random((2, 3, 30)) < np.array([0.7, 0.5])[:, None, None]
    differences = 100.0 * (arm * 1 - base * 1)
    seed, image = np.indices(differences.shape)
    columns = {"value": differences.ravel(), "seed": seed.ravel(), "image": image.ravel()}
    table = anova_lm(ols("value ~ C(seed) + C(image)", DataFrame(columns)).fit())
    mean_squares = table["sum_sq"] / table["df"]
    found = spread(arm, base)
    assert found.seed_std**2 * 30 == pytest.approx(mean_squares["C(seed)"])
    total = mean_squares["C(seed)"] + mean_squares["C(image)"] - mean_squares["Residual"]
    largest = max(total, mean_squares["C(seed)"], mean_squares["C(image)"])
    assert found.mean_std**2 * 90 == pytest.approx(largest)
    own = [max(0.0, mean_squares[name] - mean_squares["Residual"]) for name in ("C(seed)", "C(image)")]
    assert [found.seeds_alone**2 * 90, found.images_alone**2 * 90] == pytest.approx(own)


@pytest.mark.parametrize("setting", [Setting(360, 0.05, 0.95, 0.0, 1), Setting(2_000, 0.1, 0.8, 0.3, 1)], ids=repr)
def test_the_interval_over_images_covers_what_it_says(setting):
    found = images(setting, 2_000)
    assert 93 <= found.coverage <= 97
    assert found.without == 0


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_the_interval_over_seeds_covers_what_it_says(num_seeds):
    found = seeds(Setting(50_000, 0.1, 0.8, 0.2, num_seeds), 2_000)
    assert 93 <= found.coverage <= 97
    assert found.without < 0.5
