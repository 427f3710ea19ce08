"""Intervals: published numbers, exact coverage over every outcome, and the edges."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom, binomtest, ttest_1samp

from rlhf_nb.errors import ShapeError
from rlhf_nb.statistics.intervals import clopper_pearson, mean, paired_difference, wilson


def test_wilson_worked_example():
    # 8 of 10, z = 1.96: centre (0.8 + 0.19207) / 1.38415 = 0.7167, half 0.2265
    interval = wilson(8, 10)
    assert (interval.low, interval.high) == pytest.approx((0.4902, 0.9433), abs=5e-5)


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (3, 7), (50, 60), (999, 1000)])
@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_both_intervals_match_scipy(successes, n, level):
    test = binomtest(successes, n)
    for ours, method in ((wilson, "wilson"), (clopper_pearson, "exact")):
        theirs = test.proportion_ci(level, method)
        interval = ours(successes, n, level)
        assert (interval.low, interval.high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.9])
def test_the_exact_interval_covers_at_least_its_level(share):
    n = 25
    covered = sum(binom.pmf(k, n, share) for k in range(n + 1) if share in clopper_pearson(k, n))
    assert covered >= 0.95


def test_wilson_covers_its_level_on_average():
    n, shares = 25, np.linspace(0.01, 0.99, 99)
    coverage = [sum(binom.pmf(k, n, p) for k in range(n + 1) if p in wilson(k, n)) for p in shares]
    assert np.mean(coverage) == pytest.approx(0.95, abs=0.01)


def test_the_edges_are_exact():
    assert wilson(0, 5).low == 0.0 and wilson(5, 5).high == 1.0
    assert clopper_pearson(0, 5).low == 0.0 and clopper_pearson(5, 5).high == 1.0


def test_more_observations_are_narrower_and_a_higher_level_wider():
    width = lambda interval: interval.high - interval.low  # noqa: E731
    assert width(wilson(50, 100)) < width(wilson(5, 10)) < width(wilson(5, 10, 0.99))


@pytest.mark.parametrize(("successes", "n", "level"), [(0, 0, 0.95), (3, 2, 0.95), (-1, 2, 0.95), (1, 2, 95)])
def test_what_has_no_interval_is_refused(successes, n, level):
    for interval in (wilson, clopper_pearson):
        with pytest.raises(ShapeError):
            interval(successes, n, level)
    with pytest.raises(ShapeError, match="needs a whole number"):
        clopper_pearson(1.5, 3)


def test_a_paired_difference_is_that_of_the_means():
    rng = np.random.default_rng(3)
    one, other = rng.integers(0, 2, 400), rng.integers(0, 2, 400)
    estimate = paired_difference(one, other)
    difference = one - other
    assert estimate.value == pytest.approx(one.mean() - other.mean())
    error = difference.std() / 20
    assert estimate.interval.low == pytest.approx(estimate.value - 1.96 * error, abs=error / 5)
    assert estimate.interval.high == pytest.approx(estimate.value + 1.96 * error, abs=error / 5)
    assert estimate == paired_difference(one, other)
    assert paired_difference(other, one).value == -estimate.value


def test_pairing_removes_what_both_share():
    hard = np.tile([0.0, 1.0], 50)
    assert paired_difference(hard, hard).interval.high == 0.0


def test_unpaired_scores_are_refused():
    for one, other in (([1], [1, 2]), ([], [])):
        with pytest.raises(ShapeError, match="a paired difference needs"):
            paired_difference(one, other)


def test_an_estimate_reads_as_a_line():
    assert str(paired_difference([1, 1], [0, 0])) == "1.000 [1.000, 1.000] n=2"


def test_the_interval_of_a_mean_matches_scipy():
    values = [0.31, 0.27, 0.4, 0.22, 0.35]
    theirs = ttest_1samp(values, 0).confidence_interval(0.95)
    found = mean(values)
    assert (found.value, found.n) == (pytest.approx(0.31), 5)
    assert (found.interval.low, found.interval.high) == pytest.approx((theirs.low, theirs.high))


@pytest.mark.parametrize("values", [[], [1.0], [1.0, float("nan")]])
def test_a_mean_without_spread_has_no_interval(values):
    with pytest.raises(ShapeError, match="at least 2 finite"):
        mean(values)
