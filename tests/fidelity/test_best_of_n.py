"""Best-of-n on the enumerable worlds: its win rate and KL exactly, beside the bound that is often taken for the KL."""

from __future__ import annotations

import json

import pytest
import torch

from rlhf_nb.maths import kl
from rlhf_nb.maths.best_of_n import best_of_n, kl_bound, win_rate

SIZES = (1, 2, 4, 16, 64)


def base(world):
    return world.token_logprobs(world.reference_logits()).sum(-1), world.rewards()


@pytest.mark.parametrize("n", SIZES)
def test_it_is_a_distribution_and_it_is_what_drawing_gives(world, n):
    reference, rewards = base(world)
    policy = best_of_n(reference, rewards, n)
    torch.testing.assert_close(policy.exp().sum(-1), torch.ones(len(policy), dtype=torch.float64))
    draws = 20_000
    drawn = torch.multinomial(reference.exp(), draws * n, replacement=True, generator=world.generator(3)).view(
        -1, draws, n
    )
    scores = rewards.gather(1, drawn.flatten(1)).view(drawn.shape)
    kept = drawn.gather(-1, scores.argmax(-1, keepdim=True)).squeeze(-1)
    found = rewards.gather(1, kept).mean(-1)
    torch.testing.assert_close(found, (policy.exp() * rewards).sum(-1), rtol=0, atol=0.01)


@pytest.mark.parametrize("n", SIZES)
def test_without_ties_it_wins_n_times_in_n_plus_one_draws_and_its_kl_stays_under_the_bound(world, n):
    """P(win) is n/(n+1) where an outcome hardly ever meets itself; here ties of an outcome with itself count half."""
    reference, rewards = base(world)
    policy = best_of_n(reference, rewards, n)
    exact = kl.exact(policy, reference)
    assert (exact <= kl_bound(n) + 1e-9).all()
    if n > 1:
        assert (exact < kl_bound(n) - 1e-3).all(), "on a small world the bound is not reached"
    rate = win_rate(policy, reference, rewards)
    assert ((rate <= n / (n + 1) + 1e-9) & (rate >= 0.5 - 1e-9)).all()


def test_on_many_unlikely_outcomes_the_bound_is_the_kl_and_the_win_rate_n_over_n_plus_one():
    N = 4000
    reference = torch.full((N,), -torch.log(torch.tensor(float(N), dtype=torch.float64)).item(), dtype=torch.float64)
    rewards = torch.rand(N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for n in (2, 4, 16):
        policy = best_of_n(reference, rewards, n)
        assert kl.exact(policy, reference).item() == pytest.approx(kl_bound(n), abs=0.01)
        assert win_rate(policy, reference, rewards).item() == pytest.approx(n / (n + 1), abs=1e-3)


def test_equal_scores_leave_the_base_as_it_is(world):
    reference, rewards = base(world)
    policy = best_of_n(reference, torch.zeros_like(rewards), 16)
    torch.testing.assert_close(policy, reference)
    torch.testing.assert_close(win_rate(policy, reference, torch.zeros_like(rewards)), torch.full((2,), 0.5).double())


def test_the_bound_is_the_published_one(shared_data):
    for row in json.loads((shared_data / "answer_keys" / "best_of_n_kl.json").read_text()):
        assert kl_bound(row["n"]) == pytest.approx(row["kl_nats"], abs=1e-12)


def test_at_the_same_kl_the_gibbs_policy_earns_more(world):
    """Best-of-n is near the frontier of reward and KL, and never above it."""
    reference, rewards = base(world)
    for n in (2, 4, 16):
        policy = best_of_n(reference, rewards, n)
        spent, earned = kl.exact(policy, reference), (policy.exp() * rewards).sum(-1)
        for prompt in range(len(rewards)):
            low, high = 1e-3, 1e3
            for _ in range(60):
                beta = (low * high) ** 0.5
                star = kl.gibbs(reference[prompt : prompt + 1], rewards[prompt : prompt + 1], beta)
                low, high = (
                    (beta, high) if kl.exact(star, reference[prompt : prompt + 1]) > spent[prompt] else (low, beta)
                )
            best = (star.exp() * rewards[prompt]).sum().item()
            assert earned[prompt].item() <= best + 1e-6
