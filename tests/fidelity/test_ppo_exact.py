"""PPO's own credit and loss, on every completion of an enumerable world, reach π* ∝ π_ref·exp(r/β); faults do not.

No sampling noise: each completion weighs as much as the policy gives it, and the value model is the true value. What is
left is the algorithm itself, so the optimum can be asked for to a thousandth, and each fault must miss it.
"""

from __future__ import annotations

from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch

from rlhf_nb.maths import advantages, kl
from rlhf_nb.maths.reweighting import tilted
from rlhf_nb.methods.ppo import PPO
from rlhf_nb.training.online_types import Minibatch, Outputs, Read, Rollout

SHARE = 2e-3
"""Of KL(π_ref ‖ π*): what may be left. A tenth more β, the weakest fault planted here, leaves several times as much."""


def optimise(method: PPO, world, steps: int = 800, rate: float = 0.03):
    """Gradient steps on the expected PPO loss, from the reference; (log π, log π*, log π_ref), each (P, N)."""
    tokens, mask, ended = world.completions()
    rewards, states = world.rewards(), world.states()
    live = SimpleNamespace(**{coefficient.name: getattr(method, coefficient.name) for coefficient in method.live})
    logits = world.reference_logits().requires_grad_()
    reference = world.token_logprobs(logits.detach())
    optimizer = torch.optim.Adam([logits], lr=rate)
    P = len(rewards)
    count = logits.shape[1]
    row_mask, row_states = mask.repeat(P, 1), (states + torch.arange(P)[:, None, None] * count).flatten(0, 1)

    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, 2 * (1 - step / steps))
        now = world.token_logprobs(logits)
        old = now.detach()
        weights = old.sum(-1).exp()
        # The true value of a state: the expected sum of what is still to be earned there.
        sampled = Rollout(
            tokens_BL=tokens.repeat(P, 1), attention_mask_BL=row_mask, mask_BT=row_mask,
            behavior_logprobs_BT=old.flatten(0, 1), reference_logprobs_BT=reference.flatten(0, 1),
            values_BT=torch.zeros(row_mask.shape, dtype=torch.float64), sampler_logprobs_BT=old.flatten(0, 1), score_B=rewards.flatten(), gold_B=None,
            ended_B=ended.repeat(P), temperature=1.0,
        )  # fmt: skip
        earned = advantages.token_rewards(
            method.penalised(sampled, live),
            kl.estimate(old, reference).flatten(0, 1),
            row_mask,
            kl_coef=method.kl_coef if method.kl_in == "reward" else 0.0,
        )
        to_go = advantages.returns_to_go(earned, row_mask)
        share = (weights.flatten()[:, None] * row_mask).flatten()
        mass = torch.zeros(P * count, dtype=torch.float64).index_add(0, row_states.flatten(), share)
        sums = torch.zeros(P * count, dtype=torch.float64).index_add(0, row_states.flatten(), share * to_go.flatten())
        values = (sums / mass.clamp(min=1e-300))[row_states]

        rollout = replace(sampled, values_BT=values)
        credit = method.credit(rollout, live)
        read = {field.name: getattr(rollout, field.name) for field in fields(Read)}
        batch = Minibatch(**read, advantages_BT=credit.advantages_BT, returns_BT=credit.returns_BT)
        everywhere = logits.log_softmax(-1)
        entropy = -(everywhere.exp() * everywhere).sum(-1).flatten()[row_states]
        losses = method.loss(batch, Outputs(now.flatten(0, 1), entropy, values), live)
        optimizer.zero_grad()
        (losses.loss_BT.sum(-1) * weights.flatten()).sum().backward()
        optimizer.step()
    final = world.token_logprobs(logits.detach()).sum(-1)
    return final, kl.gibbs(reference.sum(-1), rewards, method.kl_coef), reference.sum(-1)


def left_over(method: PPO, world, **settings) -> float:
    """KL(π ‖ π*) as a share of KL(π_ref ‖ π*), the worst of the prompts."""
    policy, star, reference = optimise(method, world, **settings)
    return (kl.exact(policy, star) / kl.exact(reference, star)).max().item()


def ppo(beta: float, **knobs) -> PPO:
    """The pure objective. Whitening would take its statistics from completions that here do not weigh the same."""
    return PPO(kl_coef=beta, whiten_advantages=False, lam=0.95, **knobs)


@pytest.mark.parametrize(("beta", "seed"), [(0.1, 0), (0.1, 1), (0.25, 2), (1.0, 0)])
def test_ppo_reaches_the_gibbs_policy(make_world, beta, seed):
    assert left_over(ppo(beta), make_world(seed=seed)) <= SHARE


def test_a_policy_that_is_not_optimal_loses_beta_times_its_divergence_from_the_one_that_is(world):
    beta = 0.25
    policy, star, reference = optimise(ppo(beta), world, steps=60)
    rewards = world.rewards()

    def objective(logprobs):
        return (logprobs.exp() * rewards).sum(-1) - beta * kl.exact(logprobs, reference)

    torch.testing.assert_close(
        objective(star) - objective(policy), beta * kl.exact(policy, star), rtol=1e-9, atol=1e-12
    )


# --- planted faults: each must be seen --------------------------------------------------------------------------------


def test_a_tenth_more_beta_is_seen(monkeypatch, world):
    genuine = advantages.token_rewards
    monkeypatch.setattr(
        advantages, "token_rewards", lambda s, k, m, *, kl_coef: genuine(s, k, m, kl_coef=1.1 * kl_coef)
    )
    assert left_over(ppo(0.25), world) > 2 * SHARE


def test_a_wrong_sign_of_the_kl_is_seen(monkeypatch, world):
    genuine = kl.estimate
    monkeypatch.setattr(kl, "estimate", lambda p, q, estimator="k1": genuine(q, p, estimator))
    assert left_over(ppo(1.0), world, steps=300) > 0.1


def test_a_score_one_token_after_the_end_is_seen(monkeypatch, world):
    """As in TRL 1.12: where there is room, the score stands on the padding, and is lost there."""

    def late(scores, kl_BT, mask, *, kl_coef):
        rewards = -kl_coef * kl_BT.masked_fill(~mask, 0.0)
        at = (advantages.last_token(mask) + 1).clamp(max=mask.shape[1] - 1)
        return (rewards + torch.nn.functional.one_hot(at, mask.shape[1]) * scores[:, None]).masked_fill(~mask, 0.0)

    monkeypatch.setattr(advantages, "token_rewards", late)
    assert left_over(ppo(0.25), world) > 2 * SHARE


def test_a_kl_that_earlier_tokens_get_no_credit_for_is_seen(monkeypatch, world):
    """Token-local: with γ and λ at 0 for the KL alone, a prefix is not blamed for the divergence it leads to."""
    genuine = PPO.credit

    def local(self, rollout, live):
        scores_only = genuine(self, rollout, SimpleNamespace(**{**vars(live), "kl_coef": 0.0}))
        k1 = kl.estimate(rollout.behavior_logprobs_BT, rollout.reference_logprobs_BT).masked_fill(~rollout.mask_BT, 0.0)
        mixed = scores_only.advantages_BT - live.kl_coef * k1
        return type(scores_only)(scores_only.total_B, mixed, scores_only.returns_BT)

    monkeypatch.setattr(PPO, "credit", local)
    assert left_over(ppo(0.25), world) > 2 * SHARE


# --- knobs that move the optimum say so -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "knobs",
    [
        {"gamma": 0.9},
        {"length_penalty": 0.1},
        {"missing_eos_penalty": 0.5},
        {"score_clip": 0.5},
        {"score_scale": 2.0},
        {"length_normalised": True},
        {"entropy_coef": 0.1},
    ],
    ids=str,
)
def test_a_knob_that_moves_the_optimum_does_move_it(world, knobs):
    assert left_over(ppo(0.25, **knobs), world) > 2 * SHARE


def worst(policy, star, reference) -> float:
    return (kl.exact(policy, star) / kl.exact(reference, star)).max().item()


MOVED = {
    "length_penalty": (0.1, lambda reward, mask, ended: reward - 0.1 * mask.sum(1)),
    "missing_eos_penalty": (0.5, lambda reward, mask, ended: reward - 0.5 * ~ended),
    "score_clip": (0.5, lambda reward, mask, ended: reward.clamp(-0.5, 0.5)),
    "score_scale": (2.0, lambda reward, mask, ended: 2 * reward),
    "length_normalised": (True, lambda reward, mask, ended: reward / mask.sum(1)),
}
"""Knob → value, and the reward whose Gibbs policy is then the optimum."""


@pytest.mark.parametrize("knob", MOVED)
def test_it_moves_to_the_gibbs_policy_of_the_reward_that_its_docstring_names(world, knob):
    value, moved = MOVED[knob]
    policy, _, reference = optimise(ppo(0.25, **{knob: value}), world)
    _, mask, ended = world.completions()
    assert worst(policy, kl.gibbs(reference, moved(world.rewards(), mask, ended), 0.25), reference) <= SHARE


@pytest.mark.parametrize("now", [0.5, 2.0])
def test_what_a_preview_foresees_is_what_then_happens(make_world, now):
    """Completions of the policy trained at one β, reweighted, against the policy that is then trained at another."""
    world, then, G = make_world(seed=1), 0.25, 4000
    before, _, reference = optimise(ppo(now), world)
    after, _, _ = optimise(ppo(then), world)
    chosen = torch.multinomial(before.exp(), G, replacement=True, generator=world.generator(7))
    rewards = world.rewards()
    found = tilted(rewards.gather(1, chosen), (before - reference).gather(1, chosen), then)
    assert found.reward == pytest.approx((after.exp() * rewards).sum(-1).mean().item(), abs=0.02)
    assert found.kl == pytest.approx(kl.exact(after, reference).mean().item(), abs=0.05)


def test_preference_as_reward_moves_to_the_gibbs_policy_of_the_chance_to_be_preferred(monkeypatch, world):
    """Three completions of the reference for each prompt, the same ones throughout, as a run keeps them."""
    beta, rewards = 0.1, world.rewards()
    references = rewards[:, :3]
    chance = torch.sigmoid(rewards[:, :, None] - references[:, None]).mean(-1)
    genuine = PPO.penalised
    row_references = references.repeat_interleave(rewards.shape[1], 0)
    monkeypatch.setattr(
        PPO, "penalised", lambda self, r, live: genuine(self, replace(r, reference_score_BR=row_references), live)
    )
    policy, plain, reference = optimise(ppo(beta, preference_references=3), world)
    assert worst(policy, kl.gibbs(reference, chance, beta), reference) <= SHARE < worst(policy, plain, reference)


@pytest.mark.parametrize(("T", "least", "most"), [(1, 0.0, SHARE), (2, 2 * SHARE, 0.05)])
def test_a_token_entropy_bonus_leads_to_the_optimum_of_the_sequence_bonus_only_for_one_token(
    make_world, T, least, most
):
    """A bonus c on the entropy of whole completions moves the optimum to ∝ π_ref^{β/(β+c)}·exp(r/(β+c))."""
    world, beta, bonus = make_world(T=T), 0.25, 0.05
    policy, plain, reference = optimise(ppo(beta, entropy_coef=bonus), world)
    star = torch.log_softmax((beta * reference + world.rewards()) / (beta + bonus), -1)
    assert least <= worst(policy, star, reference) < most < worst(policy, plain, reference)


# --- KL in the loss ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["ratio_k3", "k2"])
def test_kl_in_the_loss_reaches_the_gibbs_policy_for_one_token_and_only_nearly_for_more(make_world, estimator):
    method = ppo(0.25, kl_in="loss", kl_estimator=estimator)
    assert left_over(method, make_world(T=1)) <= SHARE
    assert 2 * SHARE < left_over(method, make_world(T=3)) < 0.1


@pytest.mark.parametrize(("estimator", "least"), [("k1", 0.4), ("k3", 0.05)])
def test_the_penalties_that_are_refused_do_not_lead_there_even_for_one_token(monkeypatch, make_world, estimator, least):
    """k1 in the loss is no penalty; plain k3 leads to the optimum of the forward KL."""
    monkeypatch.setattr(
        "rlhf_nb.methods.ppo.kl_penalty",
        lambda batch, logprobs, _: kl.estimate(logprobs, batch.reference_logprobs_BT, estimator),
    )
    assert left_over(ppo(0.1, kl_in="loss"), make_world(T=1)) > least


# --- without a value model --------------------------------------------------------------------------------------------


def test_without_a_value_model_it_reaches_the_same_optimum(world):
    assert left_over(ppo(0.25, value_model="none"), world) <= SHARE
