"""Where another β would lead, against the enumerated optimum."""

from __future__ import annotations

import pytest
import torch

from rlhf_nb.errors import ShapeError
from rlhf_nb.maths import kl
from rlhf_nb.maths.reweighting import gap_variance, tilted

P, N = 3, 40


@pytest.fixture
def bandit():
    """(log π_ref, r), each (P, N): one choice among N."""
    chance = torch.Generator().manual_seed(0)
    reference = torch.randn(P, N, generator=chance, dtype=torch.float64).log_softmax(-1)
    return reference, torch.rand(P, N, generator=chance, dtype=torch.float64)


def draw(policy, G, seed=1):
    return torch.multinomial(policy.exp(), G, replacement=True, generator=torch.Generator().manual_seed(seed))


def truth(reference, rewards, beta):
    star = kl.gibbs(reference, rewards, beta)
    return (star.exp() * rewards).sum(-1).mean().item(), kl.exact(star, reference).mean().item()


@pytest.mark.parametrize(("now", "then"), [(0.5, 0.5), (0.5, 0.25), (0.5, 1.0), (1.0, 0.3)])
@pytest.mark.parametrize("converged", [False, True])
def test_the_prediction_is_the_enumerated_optimum(bandit, now, then, converged):
    reference, rewards = bandit
    policy = kl.gibbs(reference, rewards, now)
    chosen = draw(policy, 20_000)
    found = tilted(
        rewards.gather(1, chosen), (policy - reference).gather(1, chosen), then, converged_at=now if converged else None
    )
    reward, nats = truth(reference, rewards, then)
    assert found.reward == pytest.approx(reward, abs=0.01)
    assert found.kl == pytest.approx(nats, abs=0.02)


def test_it_holds_from_a_policy_that_is_no_optimum_and_the_converged_form_does_not(bandit):
    reference, rewards = bandit
    policy = (
        reference + torch.randn(P, N, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    ).log_softmax(-1)
    chosen = draw(policy, 20_000)
    scores, ratios = rewards.gather(1, chosen), (policy - reference).gather(1, chosen)
    reward, nats = truth(reference, rewards, 0.3)
    found = tilted(scores, ratios, 0.3)
    assert found.reward == pytest.approx(reward, abs=0.02) and found.kl == pytest.approx(nats, abs=0.05)
    assert abs(tilted(scores, ratios, 0.3, converged_at=0.5).reward - reward) > 0.03


def test_the_effective_sample_shrinks_with_the_distance(bandit):
    reference, rewards = bandit
    policy = kl.gibbs(reference, rewards, 1.0)
    chosen = draw(policy, 64)
    scores, ratios = rewards.gather(1, chosen), (policy - reference).gather(1, chosen)
    sizes = [tilted(scores, ratios, beta).effective for beta in (1.0, 0.3, 0.1, 0.01)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == pytest.approx(64) and sizes[-1] < 8


def test_the_gap_is_zero_exactly_at_the_optimum(bandit):
    reference, rewards = bandit
    star = kl.gibbs(reference, rewards, 0.25)
    everything = torch.arange(N).expand(P, N)
    assert gap_variance(rewards, (star - reference).gather(1, everything), 0.25) < 1e-24
    assert gap_variance(rewards, torch.zeros_like(rewards), 0.25) == pytest.approx(rewards.var(1).mean().item())


def test_near_the_optimum_the_gap_is_what_is_still_to_be_gained(bandit):
    """J(π*) − J(π) = β·KL(π‖π*), and Var/(2β) to second order."""
    reference, rewards = bandit
    beta = 0.25
    star = kl.gibbs(reference, rewards, beta)
    noise = torch.randn(P, N, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    policy = (star + 0.05 * noise).log_softmax(-1)
    chosen = draw(policy, 200_000)
    found = gap_variance(rewards.gather(1, chosen), (policy - reference).gather(1, chosen), beta) / (2 * beta)
    assert found == pytest.approx(beta * kl.exact(policy, star).mean().item(), rel=0.1)


def test_one_completion_a_prompt_predicts_nothing():
    with pytest.raises(ShapeError, match="G ≥ 2"):
        tilted(torch.zeros(3, 1), torch.zeros(3, 1), 0.5)
