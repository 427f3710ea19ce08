"""DPO and IPO on enumerable worlds: with exact pair probabilities the optimum their papers derive, to a millionth of a nat.

All pairs of completions, each weighed by the probability that it is labelled so: no sampling, no optimiser noise. What
is left is the loss itself, and each fault planted in it must miss.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlhf_nb.maths import kl
from rlhf_nb.maths.preference import dpo_loss, ipo_loss, preference_probability

LEFT = 1e-6
"""KL(π ‖ π*) in nats, the worst of the prompts."""


def fitted(world, loss, beta: float, *, anchored: bool = True, iterations: int = 300) -> tuple[Tensor, Tensor, Tensor]:
    """Minimise the expected loss over all pairs, from the reference; (log π, log π_ref, r), each (P, N)."""
    rewards = world.rewards()
    P, N = rewards.shape
    first, second = torch.triu_indices(N, N, offset=1)
    says_first = preference_probability(rewards[:, first] - rewards[:, second])
    logits = world.reference_logits().requires_grad_()
    reference = world.token_logprobs(logits.detach()).sum(-1)
    anchor = reference if anchored else torch.zeros_like(reference)
    optimizer = torch.optim.LBFGS(
        [logits],
        max_iter=iterations,
        tolerance_grad=1e-12,
        tolerance_change=1e-16,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def expected() -> Tensor:
        optimizer.zero_grad()
        policy = world.token_logprobs(logits).sum(-1)

        def of(winner: Tensor, loser: Tensor) -> Tensor:
            sides = (policy[:, winner], policy[:, loser], anchor[:, winner], anchor[:, loser])
            return loss(*sides, beta=beta)

        value = (says_first * of(first, second) + (1 - says_first) * of(second, first)).mean()
        value.backward()
        return value

    optimizer.step(expected)
    return world.token_logprobs(logits.detach()).sum(-1), reference, rewards


def furthest(policy: Tensor, star: Tensor) -> float:
    return kl.exact(policy, star).max().item()


@pytest.mark.parametrize(("beta", "seed"), [(0.1, 0), (0.5, 0), (0.5, 1), (1.0, 2)])
def test_dpo_reaches_the_gibbs_policy(make_world, beta, seed):
    policy, reference, rewards = fitted(make_world(seed=seed), dpo_loss, beta)
    star = kl.gibbs(reference, rewards, beta)
    assert furthest(policy, star) < LEFT
    assert furthest(reference, star) > 1e-2, "the reference itself would pass"


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_ipo_reaches_the_reference_tilted_by_how_often_a_completion_wins(world, beta):
    """arXiv:2310.12036, §5: π* ∝ π_ref·exp(E_y′ p(y ≻ y′)/β), y′ drawn as the pairs are."""
    policy, reference, rewards = fitted(world, ipo_loss, beta)
    wins = preference_probability(rewards[:, :, None] - rewards[:, None, :]).mean(-1)
    assert furthest(policy, kl.gibbs(reference, wins, beta)) < LEFT
    assert furthest(policy, kl.gibbs(reference, rewards, beta)) > 1e-3, "it is not DPO's optimum"


# --- planted faults: each must be seen --------------------------------------------------------------------------------


def swapped(chosen, rejected, reference_chosen, reference_rejected, *, beta):
    return dpo_loss(rejected, chosen, reference_rejected, reference_chosen, beta=beta)


def wrong_sign(chosen, rejected, reference_chosen, reference_rejected, *, beta):
    return dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta=-beta)


def a_tenth_more(chosen, rejected, reference_chosen, reference_rejected, *, beta):
    return dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta=1.1 * beta)


def references_swapped(chosen, rejected, reference_chosen, reference_rejected, *, beta):
    return dpo_loss(chosen, rejected, reference_rejected, reference_chosen, beta=beta)


@pytest.mark.parametrize("fault", [swapped, wrong_sign, a_tenth_more, references_swapped])
def test_a_fault_in_the_loss_is_seen(world, fault):
    policy, reference, rewards = fitted(world, fault, 0.5, iterations=100)
    assert furthest(policy, kl.gibbs(reference, rewards, 0.5)) > 100 * LEFT


def test_a_reference_that_is_switched_off_is_seen(world):
    policy, reference, rewards = fitted(world, dpo_loss, 0.5, anchored=False)
    assert furthest(policy, kl.gibbs(reference, rewards, 0.5)) > 100 * LEFT
    assert furthest(policy, kl.gibbs(torch.zeros_like(reference), rewards, 0.5)) < LEFT, "it fits softmax(r/β) instead"
