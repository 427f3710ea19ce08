from __future__ import annotations

import json
import math

import numpy as np
import pytest

from rlhf_nb.errors import ShapeError
from rlhf_nb.statistics.rankings import fit_bradley_terry, fit_plackett_luce


def wins(n: int, comparisons: list[list[int]]) -> np.ndarray:
    table = np.zeros((n, n))
    for winner, loser in comparisons:
        table[winner, loser] += 1
    return table


def test_maximum_likelihood_reproduces_the_answer_key(shared_data):
    cases = json.loads((shared_data / "answer_keys/bt_pl_fit_dev.json").read_text())
    assert len(cases) == 3
    for case in cases:
        expected = pytest.approx(case["ml_est"], abs=1e-8)
        assert fit_plackett_luce(case["data"], case["n_items"]).tolist() == expected, case["name"]
        if all(len(ranking) == 2 for ranking in case["data"]):
            assert fit_bradley_terry(wins(case["n_items"], case["data"])).tolist() == expected, case["name"]


def test_two_items_differ_by_the_log_odds_of_their_wins():
    # 3 wins to 1: θ₀ − θ₁ = log 3
    assert fit_bradley_terry([[0, 3], [1, 0]]).tolist() == pytest.approx([math.log(3) / 2, -math.log(3) / 2])
    # two ties are a win for either: 4 to 2
    difference = np.diff(fit_bradley_terry([[0, 3], [1, 0]], [[0, 2], [0, 0]]))[0]
    assert difference == pytest.approx(-math.log(2))
    assert fit_bradley_terry([[0, 3], [1, 0]], [[0, 1], [1, 0]]) == pytest.approx(
        fit_bradley_terry([[0, 3], [1, 0]], [[0, 2], [0, 0]])
    )


def test_at_the_fit_each_item_wins_as_often_as_its_strength_says():
    rng = np.random.default_rng(0)
    table = rng.integers(1, 9, (6, 6)).astype(float)
    np.fill_diagonal(table, 0)
    theta = fit_bradley_terry(table)
    met = table + table.T
    expected = (met / (1 + np.exp(theta[None, :] - theta[:, None]))).sum(1)
    np.testing.assert_allclose(expected, table.sum(1), rtol=1e-9)
    assert theta.mean() == pytest.approx(0, abs=1e-12)


def test_a_weight_of_two_is_the_ranking_twice():
    rankings = [[0, 1, 2], [2, 0, 1], [1, 2, 0], [1, 0, 2]]
    twice = fit_plackett_luce([*rankings, rankings[0]], 3)
    assert fit_plackett_luce(rankings, 3, weights=[2, 1, 1, 1]) == pytest.approx(twice, abs=1e-10)
    assert fit_plackett_luce([*rankings, [0, 2, 1]], 3, weights=[2, 1, 1, 1, 0]) == pytest.approx(twice, abs=1e-10)


def test_strengths_that_made_the_rankings_are_found_again():
    theta = np.array([1.0, 0.2, -0.3, -0.9])
    rng = np.random.default_rng(1)
    # Gumbel noise on the strengths, sorted, is a Plackett-Luce ranking.
    rankings = np.argsort(-(theta + rng.gumbel(size=(4000, 4))), axis=1).tolist()
    # Each strength's standard error is about 0.02.
    assert fit_plackett_luce(rankings, 4) == pytest.approx(theta, abs=0.08)


@pytest.mark.parametrize(
    ("n", "data", "says"),
    [
        (4, [[0, 1], [1, 0], [2, 3], [3, 2]], "items 0, 1 were never compared with the others"),
        (3, [[0, 1], [1, 0], [0, 2], [1, 2]], "items 0, 1 never lost to the others"),
        (3, [[0, 1], [1, 2], [2, 1]], "items 0 never lost to the others"),
        (1, [], "1 items: strengths are relative"),
        (2, [[0, 0]], "names an item twice"),
        (2, [[0, 2]], "one outside 0 to 1"),
    ],
)
def test_comparisons_that_fix_no_strengths_are_refused_in_words(n, data, says):
    with pytest.raises(ShapeError, match=says) as caught:
        fit_plackett_luce(data, n)
    assert "\n" not in str(caught.value)


def test_counts_that_are_none_are_refused():
    for bad in ([[0, 1, 2], [1, 0, 1]], [[0, -1], [1, 0]], [[0, math.nan], [1, 0]]):
        with pytest.raises(ShapeError):
            fit_bradley_terry(bad)
