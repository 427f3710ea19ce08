"""Best-of-n from samples: every subset enumerated, ties shared, unbiased where the base is known."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch

from rlhf_nb.errors import ShapeError
from rlhf_nb.maths.best_of_n import best_of_n, best_of_n_mean


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_it_is_the_mean_over_every_subset(n):
    scores = torch.tensor([[0.3, -1.0, 2.0, 0.7, 0.1, -0.4], [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]])
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [0.5, -0.5, 1.5, 2.5, 0.0, 9.0]])
    kept = [
        [value[max(subset, key=lambda index: score[index])].item() for subset in combinations(range(6), n)]
        for score, value in zip(scores, values, strict=True)
    ]
    expected = torch.tensor(kept, dtype=torch.float64).mean(1)
    torch.testing.assert_close(best_of_n_mean(scores, values, n), expected)


def test_completions_of_one_score_are_kept_equally_often():
    # Of the subsets {0,1} {0,2} {1,2}: the tie of 0 and 1 gives (10 + 20)/2, the others keep 0 and 1.
    found = best_of_n_mean(torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[10.0, 20.0, 99.0]]), 2)
    assert found.item() == pytest.approx((15 + 10 + 20) / 3)


def test_it_is_unbiased_for_the_best_of_n_policy():
    """The average over every equally likely draw of N = 4 samples is what best-of-n gives, ties included."""
    scores, values = torch.tensor([0.0, 1.0, 1.0]), torch.tensor([2.0, -1.0, 5.0])
    draws = torch.tensor(list(product(range(3), repeat=4)))
    base = torch.full((3,), 1 / 3, dtype=torch.float64).log()
    for n in (1, 2, 3, 4):
        exact = (best_of_n(base, scores.double(), n).exp() * values).sum()
        torch.testing.assert_close(best_of_n_mean(scores[draws], values[draws], n).mean(), exact)


def test_best_of_one_is_the_mean_and_best_of_all_the_maximum():
    scores = torch.randn(7, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(best_of_n_mean(scores, scores, 1), scores.mean(1))
    torch.testing.assert_close(best_of_n_mean(scores, scores, 64), scores.amax(1))


def test_what_cannot_be_told_is_refused():
    with pytest.raises(ShapeError, match="n=5: of 4"):
        best_of_n_mean(torch.zeros(1, 4), torch.zeros(1, 4), 5)
    with pytest.raises(ShapeError, match="differ"):
        best_of_n_mean(torch.zeros(1, 4), torch.zeros(1, 5), 2)
