"""The two forms of reward over distance: planted coefficients, peaks in closed form, seeds, and the edges."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlhf_nb.errors import DataError, ShapeError
from rlhf_nb.statistics.over_optimisation import Fit, fit, fit_over_seeds

DISTANCES = np.array([0.2, 0.5, 1.0, 1.7, 2.4, 4.0])
LAWS = {
    "reinforcement_learning": lambda d, a, b: d * (a - b * np.log(d)),
    "best_of_n": lambda d, a, b: d * (a - b * d),
}
FORMS = sorted(LAWS)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("a", "b"), [(1.0, 0.5), (0.3, 0.9), (-0.2, 0.1), (0.7, -0.4)])
def test_planted_coefficients_are_recovered_exactly(form, a, b):
    found = fit(DISTANCES, LAWS[form](DISTANCES, a, b), form)
    assert (found.a, found.b) == pytest.approx((a, b), abs=1e-12)
    assert (
        found.residual == pytest.approx(0, abs=1e-12) and found.n == 6 and (found.nearest, found.furthest) == (0.2, 4.0)
    )
    np.testing.assert_allclose(found.reward(DISTANCES), LAWS[form](DISTANCES, a, b), atol=1e-12)


def test_worked_example():
    # d = 1, 2, 4 and R = d(1 − 0.25d): 0.75, 1, 0; highest at a/(2b) = 2, where R = a²/(4b) = 1.
    found = fit([1, 2, 4], [0.75, 1.0, 0.0], "best_of_n")
    assert (found.a, found.b, found.peak.distance, found.peak.reward) == pytest.approx((1, 0.25, 2, 1))
    assert "d*=2, R(d*)=1" in str(found) and "outside" not in str(found)


@pytest.mark.parametrize(("form", "a", "b"), [("reinforcement_learning", 0.9, 0.6), ("best_of_n", 0.9, 0.6)])
def test_the_peak_is_where_the_curve_is_highest(form, a, b):
    found = Fit(form, a, b, residual=0.0, n=6, nearest=0.2, furthest=4.0)
    expected = math.exp(a / b - 1) if form == "reinforcement_learning" else a / (2 * b)
    grid = np.linspace(1e-3, 4, 400_001)
    assert found.peak.distance == pytest.approx(expected)
    assert grid[found.reward(grid).argmax()] == pytest.approx(found.peak.distance, abs=2e-5)
    assert found.peak.reward == pytest.approx(found.reward(grid).max(), abs=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_at_the_reference_the_reward_is_zero(form):
    assert fit(DISTANCES, np.sin(DISTANCES), form).reward([0.0, 1.0])[0] == 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("b", [-0.1, 0.0])
def test_without_a_bend_there_is_no_peak_and_it_says_so(form, b):
    found = Fit(form, a=0.5, b=b, residual=0.0, n=6, nearest=0.2, furthest=4.0)
    assert found.peak is None and "does not bend down" in str(found)


def test_a_best_of_n_reward_that_falls_from_the_start_has_no_peak():
    found = Fit("best_of_n", a=-0.1, b=0.2, residual=0.0, n=6, nearest=0.2, furthest=2.0)
    assert found.peak is None and "falls from the start" in str(found)
    # With the logarithm there is always a rise near 0, however short.
    assert Fit("reinforcement_learning", -0.1, 0.2, 0.0, 6, 0.2, 2.0).peak.distance == pytest.approx(math.exp(-1.5))


@pytest.mark.parametrize("points", [[0.1, 0.2, 0.3], [2.0, 3.0, 4.0]])
def test_a_peak_outside_the_data_says_that_it_is(points):
    found = fit(points, LAWS["best_of_n"](np.array(points), 1.0, 0.5), "best_of_n")
    assert found.peak.distance == pytest.approx(1.0) and not found.peak_within and "outside the data" in str(found)


def test_a_peak_too_far_for_a_float_lies_at_infinity():
    assert Fit("reinforcement_learning", 1.0, 1e-4, 0.0, 6, 0.2, 2.0).peak.distance == math.inf


@pytest.mark.parametrize(
    ("distance", "reward", "error", "says"),
    [
        ([1, 2], [1, 2], ShapeError, "2 points"),
        ([], [], ShapeError, "0 points"),
        ([1, 2, 3], [1, 2], ShapeError, r"\(3,\) and rewards \(2,\)"),
        ([0, 1, 2], [0, 1, 2], DataError, "distance 0 is 0"),
        ([1, -2, 3], [0, 1, 2], DataError, "distance 1 is -2"),
        ([1, 2, math.nan], [0, 1, 2], DataError, "distance 2 is not finite"),
        ([1, 2, 3], [0, math.inf, 2], DataError, "reward 1 is not finite"),
        ([2, 2, 2], [0, 1, 2], ShapeError, "cannot be told apart"),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_points_that_determine_no_fit_are_refused_with_the_reason(distance, reward, error, says, form):
    with pytest.raises(error, match=says):
        fit(distance, reward, form)


def test_a_form_nobody_knows_is_refused():
    with pytest.raises(DataError, match="dpo"):
        fit([1, 2, 3], [1, 2, 3], "dpo")


@pytest.mark.parametrize("form", FORMS)
def test_seeds_that_agree_leave_no_interval(form):
    found = fit_over_seeds([(DISTANCES, LAWS[form](DISTANCES, 0.8, 0.5))] * 3, form, resamples=50)
    for estimate, planted in ((found.a, 0.8), (found.b, 0.5), (found.peak_distance, found.fit.peak.distance)):
        assert (estimate.value, estimate.interval.low, estimate.interval.high) == pytest.approx((planted,) * 3)
    assert found.a.n == 3 and found.fit.n == 18 and found.without_peak == 0


@pytest.mark.parametrize("form", FORMS)
def test_whole_seeds_are_resampled_and_not_points(form):
    """Two seeds, each exact with its own a: of two draws a quarter holds the first alone and a quarter the second."""
    curves = [(DISTANCES, LAWS[form](DISTANCES, a, 0.5)) for a in (0.4, 1.2)]
    found = fit_over_seeds(curves, form)
    assert found.a.value == pytest.approx(0.8)
    assert (found.a.interval.low, found.a.interval.high) == pytest.approx((0.4, 1.2))
    assert (found.b.interval.low, found.b.interval.high) == pytest.approx((0.5, 0.5))


def test_a_resample_that_never_bends_down_has_its_peak_at_infinity():
    law = LAWS["reinforcement_learning"]
    curves = [(DISTANCES, law(DISTANCES, 0.5, b)) for b in (0.9, -0.3)]
    found = fit_over_seeds(curves, "reinforcement_learning")
    assert found.fit.b == pytest.approx(0.3) and found.without_peak == pytest.approx(0.25, abs=0.04)
    assert found.peak_distance.interval.high == math.inf and math.isfinite(found.peak_distance.interval.low)


def test_where_the_fit_has_no_peak_no_interval_pretends_one():
    curves = [(DISTANCES, LAWS["best_of_n"](DISTANCES, 0.5, b)) for b in (0.1, -0.3)]
    found = fit_over_seeds(curves, "best_of_n")
    assert found.peak_distance is None and found.peak_reward is None and found.without_peak > 0.5


def test_one_seed_has_no_interval_over_seeds():
    with pytest.raises(ShapeError, match="1 seeds"):
        fit_over_seeds([(DISTANCES, DISTANCES)], "best_of_n")
