from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch

from rlhf_nb.data.rankings import comparisons
from rlhf_nb.errors import ShapeError
from rlhf_nb.maths.preference import bradley_terry_loss
from rlhf_nb.maths.rankings import bradley_terry_rankings, choices, length_correlation, length_slope, plackett_luce_loss


def bradley_terry(scores_N: torch.Tensor, *rankings: list[float], ties: str = "half") -> torch.Tensor:
    """The loss of each prompt, its rankings laid one after another as a trainer does."""
    better, worse, weight, prompt, start = [], [], [], [], 0
    for number, ranks in enumerate(rankings):
        for i, j, counts in comparisons(ranks, ties):
            better.append(start + i)
            worse.append(start + j)
            weight.append(counts)
            prompt.append(number)
        start += len(ranks)
    places = (torch.tensor(each, dtype=torch.long) for each in (better, worse))
    return bradley_terry_rankings(
        scores_N, *places, torch.tensor(weight, dtype=scores_N.dtype), torch.tensor(prompt), len(rankings)
    )


@pytest.mark.parametrize("K", range(2, 10))
def test_the_k_way_loss_is_the_mean_over_the_pairs(draw, K):
    scores = draw(K)
    ranks = torch.randperm(K, generator=torch.Generator().manual_seed(K)).tolist()
    pairs = [(i, j) for i in range(K) for j in range(K) if ranks[i] < ranks[j]]
    assert len(pairs) == K * (K - 1) // 2
    chosen, rejected = (torch.stack([scores[pair[side]] for pair in pairs]) for side in (0, 1))
    torch.testing.assert_close(bradley_terry(scores, ranks)[0], bradley_terry_loss(chosen, rejected).mean())


def test_a_worked_ranking_of_three():
    # scores 2, 1, 0 in their order: −log σ(1) = 0.3132617 twice and −log σ(2) = 0.1269280 → 0.7534514 / 3
    scores = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)
    assert bradley_terry(scores, [0, 1, 2]).item() == pytest.approx(0.2511505, abs=1e-7)
    # Plackett-Luce: log(e² + e + 1) − 2 + log(e + 1) − 1 = 0.4076059 + 0.3132617
    assert plackett_luce_loss(scores, [0, 1, 2]).item() == pytest.approx(0.7208676, abs=1e-7)


def test_a_prompt_weighs_the_same_whatever_its_k(draw):
    scores = draw(6)
    together = bradley_terry(scores, [0, 1], [2, 1, 0, 3])
    torch.testing.assert_close(together[0], bradley_terry(scores[:2], [0, 1])[0])
    torch.testing.assert_close(together[1], bradley_terry(scores[2:], [2, 1, 0, 3])[0])


def test_a_tie_draws_two_scores_together_and_can_be_left_out(draw):
    scores = draw(3).requires_grad_()
    half = -torch.nn.functional.logsigmoid(torch.stack([scores[0] - scores[1], scores[1] - scores[0]])).mean()
    strict = -torch.nn.functional.logsigmoid(torch.stack([scores[0] - scores[2], scores[1] - scores[2]]))
    torch.testing.assert_close(bradley_terry(scores, [1, 1, 2])[0], (half + strict.sum()) / 3)
    torch.testing.assert_close(bradley_terry(scores, [1, 1, 2], ties="leave_out")[0], strict.mean())
    tied = torch.tensor([0.7, 0.7, -1.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(bradley_terry(tied, [1, 1, 2]).sum(), tied)
    torch.testing.assert_close(gradient[0], gradient[1])


@pytest.mark.parametrize("loss", [lambda s, r: bradley_terry(s, r)[0], plackett_luce_loss], ids=["bt", "pl"])
def test_adding_a_number_to_all_scores_or_shuffling_the_completions_changes_nothing(draw, loss):
    scores, ranks = draw(5), [1, 0, 3, 1, 2]
    torch.testing.assert_close(loss(scores + 7, ranks), loss(scores, ranks))
    order = [3, 0, 4, 2, 1]
    torch.testing.assert_close(loss(scores[order], [ranks[place] for place in order]), loss(scores, ranks))


def test_plackett_luce_of_two_is_bradley_terry_a_tie_included(draw):
    scores = draw(2)
    for ranks in ([0, 1], [1, 0], [4, 4]):
        torch.testing.assert_close(plackett_luce_loss(scores, ranks), bradley_terry(scores, ranks)[0])


def test_plackett_luce_chances_of_all_orders_sum_to_one(draw):
    scores = draw(4)
    chances = [math.exp(-plackett_luce_loss(scores, list(ranks)).item()) for ranks in permutations(range(4))]
    assert sum(chances) == pytest.approx(1, abs=1e-12)
    assert plackett_luce_loss(torch.zeros(9), list(range(9))).item() == pytest.approx(math.log(math.factorial(9)))


def test_tied_completions_cost_the_mean_over_the_orders_they_leave_open(draw):
    scores = draw(5)
    open_orders = [[0, *(1 + p for p in tied), 4] for tied in permutations(range(3))]
    mean = torch.stack([plackett_luce_loss(scores, ranks) for ranks in open_orders]).mean()
    torch.testing.assert_close(plackett_luce_loss(scores, [0, 1, 1, 1, 2]), mean)
    sets, weights = choices([0] * 8 + [1])
    assert len(sets) == 2**8 - 1 + 1 and sum(weights) == pytest.approx(9)


def test_gradients_at_equal_scores_are_those_of_the_formulas():
    # Bradley-Terry, K = 3: each comparison gives ∓½; the best wins 2 of 3, the middle one each way.
    scores = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(bradley_terry(scores, [0, 1, 2]).sum(), scores)
    torch.testing.assert_close(gradient, torch.tensor([-1 / 3, 0, 1 / 3], dtype=torch.float64))
    # Plackett-Luce: ⅓ − 1, ⅓ + ½ − 1, ⅓ + ½
    (gradient,) = torch.autograd.grad(plackett_luce_loss(scores, [0, 1, 2]), scores)
    torch.testing.assert_close(gradient, torch.tensor([-2 / 3, -1 / 6, 5 / 6], dtype=torch.float64))


def test_slope_and_correlation_with_length_look_within_prompts():
    prompt = torch.tensor([0, 0, 1, 1])
    scores = torch.tensor([1.0, 3.0, 10.0, 8.0], dtype=torch.float64)
    lengths = torch.tensor([10.0, 30.0, 300.0, 200.0], dtype=torch.float64)
    # deviations −1, 1, 1, −1 against −10, 10, 50, −50: 120 / 5200, and 120 / √(4 · 5200)
    assert length_slope(scores, lengths, prompt, 2).item() == pytest.approx(0.0230769, abs=1e-7)
    assert length_correlation(scores, lengths, prompt, 2).item() == pytest.approx(0.8320503, abs=1e-7)
    assert length_correlation(-scores, lengths, prompt, 2).item() == pytest.approx(-0.8320503, abs=1e-7)
    shifted = scores + torch.tensor([0.0, 0.0, 99.0, 99.0], dtype=torch.float64)
    torch.testing.assert_close(length_slope(shifted, lengths, prompt, 2), length_slope(scores, lengths, prompt, 2))


def test_lengths_or_scores_that_do_not_differ_have_no_slope_and_no_correlation():
    prompt, flat, steep = torch.tensor([0, 0, 1, 1]), torch.full((4,), 2.0), torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert length_correlation(flat, steep, prompt, 2).item() == length_correlation(steep, flat, prompt, 2).item() == 0
    scores = steep.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(length_slope(scores, flat, prompt, 2), scores)
    assert gradient.abs().max().item() == 0


def test_shapes_that_differ_are_refused():
    with pytest.raises(ShapeError):
        plackett_luce_loss(torch.zeros(3), [0, 1])
    with pytest.raises(ShapeError):
        one = torch.zeros(1, dtype=torch.long)
        bradley_terry_rankings(torch.zeros(3), one, torch.zeros(2, dtype=torch.long), torch.ones(1), one, 1)
