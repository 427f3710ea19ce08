"""Groups of two, all of them, in an enumerable world: where RLOO, GRPO and PPO without a value model settle.

Every pair of completions of a prompt weighs as much as the policy gives it, so that nothing is left to chance.
"""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace

import torch

from rlhf_nb.maths import kl
from rlhf_nb.methods.grpo import GRPO
from rlhf_nb.methods.online import OnlineMethod
from rlhf_nb.methods.ppo import PPO
from rlhf_nb.methods.rloo import RLOO
from rlhf_nb.training.online_types import Extent, Minibatch, Outputs, Read, Rollout

SHARE = 2e-3
"""Of KL(π_ref ‖ π*): what may be left."""


def settle(method: OnlineMethod, world, steps: int = 400, rate: float = 0.05):
    """Gradient steps on the expected loss, from the reference; (log π, log π_ref, rewards), each (P, N)."""
    tokens, mask, ended = world.completions()
    rewards, N = world.rewards(), len(tokens)
    P = len(rewards)
    first, second = torch.meshgrid(torch.arange(N), torch.arange(N), indexing="ij")
    pair = torch.stack([first.flatten(), second.flatten()], 1)
    rows = (torch.arange(P)[:, None, None] * N + pair).flatten()
    live = SimpleNamespace(**{coefficient.name: getattr(method, coefficient.name) for coefficient in method.live})
    logits = world.reference_logits().requires_grad_()
    reference = world.token_logprobs(logits.detach()).flatten(0, 1)
    optimizer = torch.optim.Adam([logits], lr=rate)
    row_mask, extent = mask.repeat(P, 1)[rows], Extent(tokens=0, completions=1)
    assert method.each == 2
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, 2 * (1 - step / steps))
        now = world.token_logprobs(logits)
        old = now.detach().flatten(0, 1)
        chance = old.sum(-1).exp().view(P, N)
        weights = (chance[:, first.flatten()] * chance[:, second.flatten()]).flatten().repeat_interleave(2) / 2
        rollout = Rollout(
            tokens_BL=tokens.repeat(P, 1)[rows], attention_mask_BL=row_mask, mask_BT=row_mask,
            behavior_logprobs_BT=old[rows], reference_logprobs_BT=reference[rows],
            values_BT=torch.zeros(row_mask.shape, dtype=torch.float64), sampler_logprobs_BT=old[rows],
            score_B=rewards.flatten()[rows], gold_B=None, ended_B=ended.repeat(P)[rows], temperature=1.0,
        )  # fmt: skip
        credit = method.credit(rollout, live)
        read = {field.name: getattr(rollout, field.name) for field in fields(Read)}
        batch = Minibatch(**read, advantages_BT=credit.advantages_BT, returns_BT=credit.returns_BT)
        said = now.flatten(0, 1)[rows]
        losses = method.loss(batch, Outputs(said, torch.zeros_like(said), torch.zeros_like(said)), live)
        # A method whose divisor counts tokens sees one completion here: what it divides by is no part of the optimum.
        scale = method.normaliser(extent) or 1.0
        optimizer.zero_grad()
        ((losses.loss_BT.sum(-1) * weights).sum() / scale).backward()
        optimizer.step()
    return world.token_logprobs(logits.detach()).sum(-1), reference.view(P, N, -1).sum(-1), rewards


def left_over(method: OnlineMethod, world, beta: float, **settings) -> float:
    """KL(π ‖ π*(beta)) as a share of KL(π_ref ‖ π*), the worst of the prompts."""
    policy, reference, rewards = settle(method, world, **settings)
    star = kl.gibbs(reference, rewards, beta)
    return (kl.exact(policy, star) / kl.exact(reference, star)).max().item()


def test_rloo_reaches_the_gibbs_policy(make_world):
    assert left_over(RLOO(beta=0.25, group_size=2), make_world(V=3, T=2), 0.25) <= SHARE


def test_a_tenth_more_beta_is_seen(make_world):
    assert left_over(RLOO(beta=0.275, group_size=2), make_world(V=3, T=2), 0.25) > 2 * SHARE


def test_for_one_token_grpo_without_scaling_settles_at_g_over_g_minus_one_times_beta(make_world):
    """A group's mean holds the completion itself, so that advantages shrink by (G − 1)/G and the tether does not."""
    method = GRPO(beta=0.2, group_size=2, scale_rewards="none", loss_type="dr_grpo")
    assert left_over(method, make_world(V=4, T=1), 0.4) <= SHARE
    assert left_over(method, make_world(V=4, T=1), 0.2) > 10 * SHARE


def test_for_more_tokens_grpo_s_tether_is_token_local_and_a_mean_over_each_completion_moves_further(make_world):
    world = make_world(V=3, T=2)
    constant = left_over(GRPO(beta=0.2, group_size=2, scale_rewards="none", loss_type="dr_grpo"), world, 0.4)
    each = left_over(GRPO(beta=0.2, group_size=2, scale_rewards="none", loss_type="grpo"), world, 0.4)
    assert SHARE < constant < 0.1
    assert each > 1.1 * constant


def test_scaled_by_its_group_s_spread_no_tether_is_worth_the_same_in_two_worlds(make_world):
    """Ten times the reward, and the policy settles at the same place: beta is in standard deviations of a group."""

    class Louder(make_world):
        def rewards(self):
            return 10 * super().rewards()

    method = GRPO(beta=0.2, group_size=2)
    quiet, _, _ = settle(method, make_world(V=4, T=1))
    loud, _, _ = settle(method, Louder(V=4, T=1))
    torch.testing.assert_close(quiet, loud, rtol=0, atol=1e-6)


def test_ppo_with_the_group_s_mean_for_a_baseline_settles_at_g_over_g_minus_one_times_beta(make_world):
    method = PPO(kl_coef=0.2, value_model="none", samples_per_prompt=2, whiten_advantages=False)
    world = make_world(V=3, T=2, prompts=1)
    assert left_over(method, world, 0.4) <= SHARE
    assert left_over(method, world, 0.2) > 10 * SHARE
