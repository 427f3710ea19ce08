"""Several scores as one, and Preference As Reward, against worked examples."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_nb.errors import ShapeError
from rlhf_nb.maths.rewards import combine, overlong_penalty, preference_as_reward

SCORES = torch.tensor([[1.0, 3.0], [2.0, -2.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("by", "expected"),
    [("sum", [2.5, 1.0]), ("mean", [1.25, 0.5]), ("min", [1.0, -1.0]), ("mean_minus_std", [1.125, -0.25])],
)
def test_weighted_scores_become_one(by, expected):
    weights = torch.tensor([1.0, 0.5], dtype=torch.float64)
    assert combine(SCORES, weights, by, std_coef=0.5).tolist() == pytest.approx(expected)


def test_without_disagreement_every_ensemble_is_its_member():
    same = SCORES[:, :1].expand(-1, 3)
    for by in ("mean", "min", "mean_minus_std"):
        assert torch.equal(combine(same, torch.ones(3, dtype=torch.float64), by, std_coef=2.0), SCORES[:, 0])


def test_a_weight_that_is_missing_is_refused():
    with pytest.raises(ShapeError, match=r"\(2, 2\) for \(3,\) weights"):
        combine(SCORES, torch.ones(3, dtype=torch.float64))


def test_preference_as_reward_is_the_mean_chance_to_be_preferred():
    score = torch.tensor([0.0, 100.0, -100.0], dtype=torch.float64)
    references = torch.tensor([[0.0, math.log(3.0)]] * 3, dtype=torch.float64)
    assert preference_as_reward(score, references).tolist() == pytest.approx([(0.5 + 0.25) / 2, 1.0, 0.0])
    # Only differences count, as in what a reward model was fitted to.
    torch.testing.assert_close(preference_as_reward(score + 7, references + 7), preference_as_reward(score, references))


def test_a_reference_that_said_nothing_is_refused():
    with pytest.raises(ShapeError, match=r"\(2, 0\) for 2 scores"):
        preference_as_reward(torch.zeros(2), torch.zeros(2, 0))


def test_the_overlong_punishment_grows_over_the_cache_to_minus_one():
    # limit 10, cache 4: free up to 6 tokens.
    assert overlong_penalty(torch.tensor([1, 6, 7, 8, 10]), limit=10, cache=4).tolist() == [0, 0, -0.25, -0.5, -1]


@pytest.mark.parametrize("cache", [0, 11])
def test_a_cache_that_does_not_fit_the_limit_is_refused(cache):
    with pytest.raises(ShapeError, match=f"cache={cache}"):
        overlong_penalty(torch.tensor([1]), limit=10, cache=cache)
