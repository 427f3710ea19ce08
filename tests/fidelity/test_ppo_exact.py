"""PPO's own credit and loss, on every completion of an enumerable world, reach π* ∝ π_ref·exp(r/β); faults do not.

No sampling noise: each completion weighs as much as the policy gives it, and the value model is the true value. What is
left is the algorithm itself, so the optimum can be asked for to a thousandth, and each fault must miss it.
"""

from __future__ import annotations

import ast
import inspect
import math
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlhf_nb.maths import advantages, kl
from rlhf_nb.maths.controllers import RunningMoments
from rlhf_nb.maths.masked import masked_mean, masked_var
from rlhf_nb.maths.reweighting import tilted
from rlhf_nb.methods.ppo import PPO
from rlhf_nb.training.actor_critic import Reference
from rlhf_nb.training.online_types import Credit, Minibatch, Outputs, Read, Rollout
from rlhf_nb.training.pretraining import Pretraining

TESTS = Path(__file__).resolve().parents[1]
SHARE = 2e-3
"""Of KL(π_ref ‖ π*): what may be left. A tenth more β, the weakest fault planted here, leaves several times as much."""
CLOSE = 5e-4
"""The same where PPO's own optimum is asked for: at β = 0.1 a tenth more β leaves no more than SHARE."""
LEAST = 1e-4
"""Nats of KL(π ‖ π*) that may be left even where that share is less."""
SHORT = 2e-2
"""Of what the policy's KL could buy over the reference: the reward it may lack."""
SEEDS = (0, 1, 2)
GRID = [
    pytest.param(beta, ends, id=f"{beta}-{'ended' if ends else 'fixed'}")
    for beta in (0.1, 0.25, 0.5, 1.0)
    for ends in (True, False)
]
"""β, and whether a token ends completions or all have one length."""


def optimise(method: PPO, world, steps: int = 400, rate: float = 0.2, *, live=None, moments=None, also=None):
    """Gradient steps on the expected PPO loss, from the reference; (log π, log π*, log π_ref), each (P, N), all at the
    method's temperature.

    Args:
        live: Where a controller leaves its coefficient.
        moments: Of the scores of 256 completions drawn at each step, for a method that normalises scores.
        also: Given the logits, adds to their gradient what does not come of the rollout.
    """
    tokens, mask, ended = world.completions()
    rewards, states = world.rewards(), world.states()
    live = live or live_of(method)
    logits = world.reference_logits().requires_grad_()
    reference = world.token_logprobs(logits.detach() / method.temperature)
    optimizer = torch.optim.Adam([logits], lr=rate)
    P = len(rewards)
    count = logits.shape[1]
    row_mask, row_states = mask.repeat(P, 1), (states + torch.arange(P)[:, None, None] * count).flatten(0, 1)
    # Unbiased, so that paying it out is no more than a baseline: no value model, everything still to come.
    true = method.model_copy(update={"lam": 1.0, "whiten_advantages": False})
    chance = world.generator(11)

    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, 2 * (1 - step / steps))
        now = world.token_logprobs(logits / method.temperature)
        old = now.detach()
        weights = old.sum(-1).exp()
        rollout = Rollout(
            tokens_BL=tokens.repeat(P, 1), attention_mask_BL=row_mask, mask_BT=row_mask,
            behavior_logprobs_BT=old.flatten(0, 1), reference_logprobs_BT=reference.flatten(0, 1),
            values_BT=torch.zeros(row_mask.shape, dtype=torch.float64), sampler_logprobs_BT=old.flatten(0, 1), score_B=rewards.flatten(), gold_B=None,
            ended_B=ended.repeat(P), temperature=method.temperature,
        )  # fmt: skip
        drawn = torch.multinomial(weights.flatten(), 256, replacement=True, generator=chance)
        if moments is not None:
            moments.add(method.compared(rollout)[drawn])
            rollout = replace(rollout, score_shift=moments.mean, score_spread=moments.spread)
        # The true value of a state: the expected sum of what is still to be earned there.
        to_go = true.credit(rollout, live).returns_BT
        share = (weights.flatten()[:, None] * row_mask).flatten()
        mass = torch.zeros(P * count, dtype=torch.float64).index_add(0, row_states.flatten(), share)
        sums = torch.zeros(P * count, dtype=torch.float64).index_add(0, row_states.flatten(), share * to_go.flatten())
        values = (sums / mass.clamp(min=1e-300))[row_states]

        rollout = replace(rollout, values_BT=values)
        credit = method.credit(rollout, live)
        batch = as_minibatch(rollout, credit)
        everywhere = (logits / method.temperature).log_softmax(-1)
        entropy = -(everywhere.exp() * everywhere).sum(-1).flatten()[row_states]
        losses = method.loss(batch, Outputs(now.flatten(0, 1), entropy, values), live)
        optimizer.zero_grad()
        ((losses.loss_BT.sum(-1) * weights.flatten()).sum() / share.sum()).backward()
        if also is not None:
            also(logits)
        optimizer.step()
        if (measured := method.measured(rows(rollout, drawn))) is not None:
            method.adapt(measured, live)
    final = world.token_logprobs(logits.detach() / method.temperature).sum(-1)
    return final, kl.gibbs(reference.sum(-1), rewards, method.kl_coef), reference.sum(-1)


def live_of(method: PPO) -> SimpleNamespace:
    return SimpleNamespace(**{coefficient.name: getattr(method, coefficient.name) for coefficient in method.live})


def as_minibatch(rollout: Rollout, credit: Credit) -> Minibatch:
    read = {field.name: getattr(rollout, field.name) for field in fields(Read)}
    return Minibatch(**read, advantages_BT=credit.advantages_BT, returns_BT=credit.returns_BT)


def rows(rollout: Rollout, index: torch.Tensor) -> Rollout:
    """Some of its completions."""
    tensors = {f.name: getattr(rollout, f.name) for f in fields(rollout) if f.name.endswith(("_BT", "_BL", "_B"))}
    return replace(rollout, **{name: t[index] for name, t in tensors.items() if t is not None})


def left_over(method: PPO, world, **settings) -> float:
    """KL(π ‖ π*) as a share of KL(π_ref ‖ π*), the worst of the prompts."""
    policy, star, reference = optimise(method, world, **settings)
    return (kl.exact(policy, star) / kl.exact(reference, star)).max().item()


def ppo(beta: float, **knobs) -> PPO:
    """The pure objective. Whitening would take its statistics from completions that here do not weigh the same."""
    return PPO(kl_coef=beta, whiten_advantages=False, lam=0.95, **knobs)


def reaches_the_optimum(method: PPO, make_world, ends: bool, shortfall) -> None:
    for world in (make_world(seed=seed, ends=ends) for seed in SEEDS):
        policy, star, reference = optimise(method, world, 400 if method.kl_coef == 0.1 else 200)
        left, distance = kl.exact(policy, star), kl.exact(reference, star)
        assert (left <= (CLOSE * distance).clamp(min=LEAST)).all(), f"seed {world.seed}: {left} of {distance} nats"
        assert (shortfall(policy, reference, world.rewards()) <= SHORT).all()


@pytest.mark.parametrize(("beta", "ends"), GRID)
def test_ppo_reaches_the_gibbs_policy(make_world, shortfall, beta, ends):
    reaches_the_optimum(ppo(beta), make_world, ends, shortfall)


def test_a_policy_on_the_frontier_lacks_nothing_and_one_beside_it_lacks_more_than_is_allowed(world, shortfall):
    reference = world.token_logprobs(world.reference_logits()).sum(-1)
    best = kl.gibbs(reference, world.rewards(), 0.25)
    assert shortfall(best, reference, world.rewards()).abs().max() < 1e-6
    half = torch.logaddexp(best, reference) - math.log(2)
    assert (shortfall(half, reference, world.rewards()) > SHORT).all()


@pytest.mark.parametrize(("beta", "ends"), GRID)
def test_what_is_asked_for_is_too_much_for_a_tenth_more_beta(make_world, beta, ends):
    for world in (make_world(seed=seed, ends=ends) for seed in SEEDS):
        reference = world.token_logprobs(world.reference_logits()).sum(-1)
        star, other = (kl.gibbs(reference, world.rewards(), at) for at in (beta, 1.1 * beta))
        assert (kl.exact(other, star) > 2 * (CLOSE * kl.exact(reference, star)).clamp(min=LEAST)).any()


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
    policy, plain, reference = optimise(ppo(0.25, **{knob: value}), world)
    _, mask, ended = world.completions()
    star = kl.gibbs(reference, moved(world.rewards(), mask, ended), 0.25)
    assert worst(policy, star, reference) <= SHARE < worst(policy, plain, reference) / 2


def discounted(world, beta: float, gamma: float) -> torch.Tensor:
    """log π*, (P, N): π*(a|s) ∝ π_ref(a|s)·exp(Q(s, a)/β), Q = r + γ·V(s′), V(s) = β·log Σ_a π_ref(a|s)·exp(Q/β)."""
    tokens, mask, _ = world.completions()
    reference = world.reference_logits().log_softmax(-1)
    P, S, V = reference.shape
    last = advantages.last_token(mask)[:, None]
    Q, values = torch.zeros_like(reference), torch.zeros(P, S, dtype=torch.float64)
    Q[:, world.states().gather(1, last)[:, 0], tokens.gather(1, last)[:, 0]] = world.rewards()
    for state in reversed(range(S)):
        for token in range(V):
            after = state * V + 1 + token
            if after < S and not (world.ends and token == 0):
                Q[:, state, token] = gamma * values[:, after]
        values[:, state] = beta * (reference[:, state] + Q[:, state] / beta).logsumexp(-1)
    return world.token_logprobs(reference + Q / beta).sum(-1)


@pytest.mark.parametrize("ends", [True, False])
def test_a_discount_moves_the_optimum_to_the_one_of_discounted_values(make_world, ends):
    world, beta = make_world(ends=ends), 0.25
    policy, plain, reference = optimise(ppo(beta, gamma=0.8), world)
    torch.testing.assert_close(discounted(world, beta, 1.0), plain)
    assert worst(policy, discounted(world, beta, 0.8), reference) <= SHARE < worst(policy, plain, reference) / 2


def test_normalised_scores_move_the_optimum_to_the_one_at_beta_times_their_deviation(world):
    beta, moments = 0.5, RunningMoments()
    policy, plain, reference = optimise(ppo(beta, score_normalisation="running"), world, moments=moments)
    star = kl.gibbs(reference, world.rewards(), beta * moments.spread)
    assert worst(policy, star, reference) <= SHARE < worst(policy, plain, reference) / 2


def test_a_controller_moves_the_optimum_to_the_tethered_policy_of_its_kl(world):
    method = ppo(0.25, kl_target=0.4, kl_horizon=20_000)
    live = live_of(method)
    policy, plain, reference = optimise(method, world, live=live)
    assert kl.exact(policy, reference).mean().item() == pytest.approx(0.4, rel=0.05)
    star = kl.gibbs(reference, world.rewards(), live.kl_coef)
    assert worst(policy, star, reference) <= SHARE < worst(policy, plain, reference) / 2


def test_a_reference_that_follows_takes_the_optimum_further_towards_the_reward_with_each_rollout(make_world):
    """Each rollout is long enough here to reach its optimum: after n moves of the reference it is
    π_0·exp((1 + n·(1 − decay))·r/β)."""
    beta, decay = 1.0, 0.75
    method = ppo(beta, reference="ema", reference_decay=decay)
    start = make_world(T=1).reference_logits()
    policy, mine = (torch.nn.ParameterList([start.clone()]) for _ in range(2))
    follower = Reference(policy, mine)

    class Now(make_world):
        def reference_logits(self):
            return mine[0].detach().clone()

    world, first = Now(T=1), start.log_softmax(-1)[:, 0]
    for moves in range(4):
        found, _, _ = optimise(method, world, 200)
        star = kl.gibbs(first, world.rewards(), beta / (1 + moves * (1 - decay)))
        assert worst(found, star, first) <= SHARE
        policy[0].data.copy_(found[:, None])
        follower.follow(policy, method.reference_decay)
    assert worst(found, kl.gibbs(first, world.rewards(), beta), first) > 0.1


def test_pretraining_rows_move_the_optimum_to_that_of_the_objective_with_their_likelihood_in_it(make_world):
    """E[r] − β·KL + ptx_coef·(mean log π of a row's token), here for one token after each prompt."""
    world, beta, coef = make_world(T=1), 0.25, 0.05
    said = [[0, 1], [0, 1], [0, 2], [1, 4]]
    method = ppo(beta, ptx_coef=coef, batch_size=len(said))

    def likelihood(logits):
        """Of rows as the policy would read them: a prompt of one token, its number, and one token."""
        return lambda tokens_BL: logits[tokens_BL[:, 0], 0].log_softmax(-1).gather(1, tokens_BL[:, 1:])

    kept = Pretraining.__new__(Pretraining)
    kept.ids = said

    def also(logits):
        kept.trainer = SimpleNamespace(
            method=method, step=0, live=live_of(method), device="cpu",
            model=lambda tokens_BL, *_, **__: (likelihood(logits)(tokens_BL), None, None),
            context=SimpleNamespace(rank=0, world_size=1), tokenizer=SimpleNamespace(pad_token_id=0),
            shares=lambda n: [(torch.arange(n), True)], accelerator=SimpleNamespace(backward=torch.Tensor.backward),
        )  # fmt: skip
        kept.backward()

    policy, plain, reference = optimise(method, world, also=also)
    logits = reference[:, None].clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def lost():
        optimizer.zero_grad()
        logprobs = logits[:, 0].log_softmax(-1)
        gained = (logprobs.exp() * world.rewards()).sum(-1) - beta * kl.exact(logprobs, reference)
        value = -gained.mean() - coef * likelihood(logits)(torch.tensor(said)).mean()
        value.backward()
        return value

    optimizer.step(lost)
    star = logits.detach()[:, 0].log_softmax(-1)
    assert worst(policy, star, reference) <= SHARE < worst(policy, plain, reference) / 2
    assert (
        likelihood(policy[:, None])(torch.tensor(said)).mean() > likelihood(plain[:, None])(torch.tensor(said)).mean()
    )


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_tempered_policy_comes_to_the_gibbs_policy_of_the_tempered_reference(world, temperature):
    policy, _, _ = optimise(ppo(0.25, temperature=temperature), world)
    tempered = world.token_logprobs(world.reference_logits() / temperature).sum(-1)
    assert worst(policy, kl.gibbs(tempered, world.rewards(), 0.25), tempered) <= SHARE


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_for_one_token_what_is_saved_is_then_the_gibbs_policy_at_beta_over_the_temperature(make_world, temperature):
    world, beta = make_world(T=1), 0.25
    tempered, _, _ = optimise(ppo(beta, temperature=temperature), world)
    saved, reference = (temperature * tempered).log_softmax(-1), world.token_logprobs(world.reference_logits()).sum(-1)
    assert worst(saved, kl.gibbs(reference, world.rewards(), beta / temperature), reference) <= SHARE
    assert worst(saved, kl.gibbs(reference, world.rewards(), beta), reference) > 2 * SHARE


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


@pytest.mark.parametrize(("T", "least", "most"), [(1, -LEAST, SHARE), (2, 2 * SHARE, 0.05)])
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


@pytest.mark.parametrize(("beta", "ends"), GRID)
def test_without_a_value_model_it_reaches_the_same_optimum(make_world, shortfall, beta, ends):
    """Returns are whitened, as they are unless a person says otherwise."""
    reaches_the_optimum(PPO(kl_coef=beta, value_model="none"), make_world, ends, shortfall)


# --- knobs that leave the optimum where it is -------------------------------------------------------------------------


@pytest.mark.parametrize("knobs", [{"whiten_rewards": True}, {"whiten_advantages": True}, {"lam": 0.5}], ids=str)
def test_it_leaves_the_optimum_where_it_is(world, knobs):
    """Completions are of unlike length: what whitening paid by the token would be seen."""
    method = PPO(**{"kl_coef": 0.25, "whiten_advantages": False, **knobs})
    assert left_over(method, world) <= SHARE


def test_rewards_whitened_with_their_mean_added_back_pay_for_length(monkeypatch, make_world):
    """As in TRL 1.12: every token earns m·(1 − 1/s). Where all completions have one length it cancels."""

    def added_back(values, mask, *, shift_mean):
        mean = masked_mean(values, mask)
        return ((values - mean) * torch.rsqrt(masked_var(values, mask) + 1e-8) + mean).masked_fill(~mask, 0.0)

    monkeypatch.setattr("rlhf_nb.maths.masked.masked_whiten", added_back)
    method = ppo(0.25, whiten_rewards=True)
    assert left_over(method, make_world(ends=False)) <= SHARE
    assert left_over(method, make_world()) > 100 * SHARE


@pytest.mark.parametrize("knob", ["whiten_rewards", "whiten_advantages"])
def test_beta_in_the_loss_is_in_units_of_what_was_whitened(make_world, knob):
    """For one token, where KL in the loss leads to a Gibbs policy. Statistics are of each completion once."""
    world, beta = make_world(T=1), 0.5
    method = PPO(**{"kl_coef": beta, "kl_in": "loss", "whiten_advantages": False, knob: True})
    policy, plain, reference = optimise(method, world)
    rewards = world.rewards()
    baseline = (policy.exp() * rewards).sum(-1, keepdim=True) if knob == "whiten_advantages" else 0.0
    star = kl.gibbs(reference, rewards, beta * (rewards - baseline).std().item())
    assert worst(policy, star, reference) <= SHARE < worst(policy, plain, reference) / 2


# --- and no knob is left out ------------------------------------------------------------------------------------------

MOVES = {
    "kl_coef": "test_ppo_reaches_the_gibbs_policy",
    "kl_in": "test_kl_in_the_loss_reaches_the_gibbs_policy_for_one_token_and_only_nearly_for_more",
    "kl_target": "test_a_controller_moves_the_optimum_to_the_tethered_policy_of_its_kl",
    "preference_references": "test_preference_as_reward_moves_to_the_gibbs_policy_of_the_chance_to_be_preferred",
    "score_normalisation": "test_normalised_scores_move_the_optimum_to_the_one_at_beta_times_their_deviation",
    "gamma": "test_a_discount_moves_the_optimum_to_the_one_of_discounted_values",
    "reference": "test_a_reference_that_follows_takes_the_optimum_further_towards_the_reward_with_each_rollout",
    "temperature": "test_the_tempered_policy_comes_to_the_gibbs_policy_of_the_tempered_reference",
    "ptx_coef": "test_pretraining_rows_move_the_optimum_to_that_of_the_objective_with_their_likelihood_in_it",
    "entropy_coef": "test_a_token_entropy_bonus_leads_to_the_optimum_of_the_sequence_bonus_only_for_one_token",
    "samples_per_prompt": "fidelity/test_groups_exact.py::"
    "test_ppo_with_the_group_s_mean_for_a_baseline_settles_at_g_over_g_minus_one_times_beta",
    "combine_rewards": "maths/test_rewards.py::test_weighted_scores_become_one",
    **dict.fromkeys(MOVED, "test_it_moves_to_the_gibbs_policy_of_the_reward_that_its_docstring_names"),
}
STAYS = {
    **dict.fromkeys(("whiten_rewards", "whiten_advantages", "lam"), "test_it_leaves_the_optimum_where_it_is"),
    "value_model": "test_without_a_value_model_it_reaches_the_same_optimum",
}
"""Knob → the test that enumerates it."""
PART_OF = {
    "kl_estimator": "kl_in", "kl_horizon": "kl_target", "reference_decay": "reference",
    "temperature_end": "temperature", "reward_std_coef": "combine_rewards",
}  # fmt: skip
ON_THE_WAY = {
    "max_steps", "seed", "learning_rate", "batch_size", "max_length", "checkpoint_every", "sample_every",
    "reward_timeout", "rollout_batch_size", "max_new_tokens", "rollout_backend", "vllm_url", "vllm_memory",
    "vllm_transfer", "cuda_graphs", "importance_cap", "target_kl", "max_grad_norm", "optimizer", "lr_scheduler",
    "on_not_finite", "stop_at_score", "precision", "gradient_checkpointing", "micro_batch_size", "num_ppo_epochs", "cliprange", "cliprange_value",
    "vf_coef",
}  # fmt: skip
"""No part of what is maximised: how far a run goes, how fast and on what."""


def said_of(knob: str) -> str:
    """Its docstring; empty without one."""
    owner = next(one for one in PPO.__mro__ if knob in inspect.get_annotations(one))
    body = ast.parse(inspect.getsource(owner)).body[0].body
    at = next(i for i, node in enumerate(body) if isinstance(node, ast.AnnAssign) and node.target.id == knob)
    after = body[at + 1]
    return after.value.value if isinstance(after, ast.Expr) else ""


def test_every_knob_says_whether_it_moves_the_optimum_and_a_test_enumerates_it():
    kinds = [set(kind) for kind in (MOVES, STAYS, PART_OF, ON_THE_WAY)]
    assert set().union(*kinds) == set(PPO.model_fields) and sum(map(len, kinds)) == len(PPO.model_fields)
    assert set(PART_OF.values()) <= set(MOVES)
    for knob, test in (MOVES | STAYS).items():
        # The temperature's says what the tether holds to what.
        assert "optimum" in said_of(knob) or "tether" in said_of(knob), knob
        file, _, name = test.rpartition("::")
        source = (TESTS / file if file else Path(__file__)).read_text(encoding="utf-8")
        assert f"def {name}(" in source, f"{knob}: {test}"
    assert not [knob for knob in ON_THE_WAY if "optimum" in said_of(knob)]
