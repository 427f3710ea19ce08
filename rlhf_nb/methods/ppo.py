"""Proximal Policy Optimization on a learned or given reward, tethered to a reference.

Papers   Schulman et al. 2017, arXiv:1707.06347 (the clipped loss); Ziegler et al. 2019, arXiv:1909.08593 (KL in the
         reward); Ouyang et al. 2022, arXiv:2203.02155; Huang et al. 2024, arXiv:2403.17031 (the details that matter;
         tests/methods/test_ppo_details.py says of each where it is).
Rows     prompt.
Models   policy (trained); reference (frozen; the policy with its adapter off under LoRA); value model (trained);
         reward. Without a value model (`value_model="none"`) it is REINFORCE++ (Hu et al. 2025, arXiv:2501.03262).
Live     kl_coef, kl_target, kl_controller, temperature, length_penalty, reward_std_coef, the weights of a combined
         reward and the reward itself from the next rollout; learning_rate, cliprange, cliprange_value, vf_coef and
         entropy_coef from the next step. Raising kl_coef keeps the policy closer to the reference.
Agrees   with the maths of TRL 1.12, the last that had a PPO (tests/maths); in enumerable worlds with the optimum
         π_ref·exp(r/β) (tests/fidelity). Not with four of TRL's faults: here the score stands on the last token that
         counts and not one after it, padding enters no average, the end token counts when it is also the pad token,
         and minibatches are honoured with any gradient accumulation.

One rollout: sample completions of `rollout_batch_size` prompts, score them, give credit to tokens; then
`num_ppo_epochs` passes over them in minibatches of `batch_size`, an optimizer step each.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from rlhf_nb.errors import SpecError
from rlhf_nb.methods.base import LEARNING_RATE, LiveCoefficient
from rlhf_nb.methods.online import (
    ENTROPY,
    LENGTH_PENALTY,
    PRETRAINING,
    REWARD_STD,
    TEMPERATURE,
    OnlineMethod,
    kl_penalty,
    without_reference,
)

if TYPE_CHECKING:
    from rlhf_nb.protocol.spec import RunSpec
    from rlhf_nb.training.online_types import Credit, Live, Minibatch, Outputs, Rollout, TokenLosses


PENALTIES = {"reward": "k1", "loss": "ratio_k3"}
"""Where β·KL is taken → the estimator that `kl_estimator="auto"` means there."""
REFUSED = {
    ("reward", "k2"): "only k1 in the reward has a gradient of its own that is zero on average; use kl_estimator=k1",
    ("reward", "k3"): "only k1 in the reward has a gradient of its own that is zero on average; use kl_estimator=k1",
    ("reward", "ratio_k3"): "the importance ratio belongs into the loss; use kl_in=loss, or kl_estimator=k1",
    ("loss", "k1"): "k1 in the loss is no penalty at all, its gradient is zero on average; use kl_in=reward",
    ("loss", "k3"): "plain k3 in the loss converges to the optimum of the forward KL, half a nat away at beta=0.1; "
    "use ratio_k3 or k2, or kl_in=reward",
}
"""Penalties that do not lead where a person who asks for them wants to go."""


def without_controller(method: PPO) -> str | None:
    return "no controller moves kl_coef in this run; start it with kl_target" if method.kl_target is None else None


def without_values(method: PPO) -> str | None:
    return "value_model=none: there is no value loss" if method.value_model == "none" else None


class PPO(OnlineMethod):
    """Raise the reward of what the policy says, and pay for every nat it moves away from the reference."""

    name: ClassVar[str] = "ppo"
    title: ClassVar[str] = "Proximal policy optimization"
    paper: ClassVar[str] = "arXiv:1707.06347"
    models: ClassVar[str] = (
        "policy, value (or none), reference (frozen, moving or none), reward; under LoRA all on one backbone"
    )
    tether: ClassVar[str] = "kl_coef"
    group_knob: ClassVar[str] = "samples_per_prompt"

    # The objective. With γ = 1, temperature 1 and no penalty, bonus or whitening of rewards its optimum is
    # π_ref·exp(r/β). Every knob that moves it says so; tests/fidelity/test_ppo_exact.py enumerates where to.
    kl_coef: float = Field(0.05, ge=0)
    """β, score per nat of KL to the reference: the optimum is π_ref·exp(r/β). 0 cuts the tether; the reference is held
    anyway, so that it can be raised."""
    kl_in: Literal["reward", "loss"] = "reward"
    """reward: −β·k1 at each token, credited to the tokens before it. loss: β times an estimate that is differentiated;
    token-local, so that a prefix gets no credit for the divergence it leads to: the optimum moves, except for
    completions of one token."""
    kl_estimator: Literal["auto", "k1", "k2", "k3", "ratio_k3"] = "auto"
    """auto: k1 in the reward, ratio_k3 in the loss. Estimators that do not lead to the tethered optimum are refused."""
    kl_target: float | None = Field(None, gt=0)
    """Nats a completion. Given, a controller moves kl_coef to hold the measured KL there (Ziegler et al. 2019, §2.2),
    and the optimum with it; a kl_coef set by hand holds the controller until kl_controller is set to 1."""
    kl_horizon: int = Field(10_000, gt=0)
    """Completions over which an error of the controller is corrected e-fold; its step is
    1 + clip(KL/kl_target − 1, ±0.2)·completions/kl_horizon."""
    preference_references: int = Field(0, ge=0)
    """M ≥ 1: Preference As Reward (arXiv:2502.18770): the score is the mean over M completions of the reference to the
    same prompt of σ(r(x, y) − r(x, y_ref)), between 0 and 1. Moves the optimum to that of this score; β is then in
    units of it, so that a smaller one is usual."""
    score_normalisation: Literal["none", "running"] = "none"
    """running: scores are shifted and divided by the mean and standard deviation of all scores so far. Moves the
    optimum to the one at β times that deviation, which changes as the policy does."""
    score_scale: float = Field(1.0, gt=0)
    """Scores are multiplied by this. Moves the optimum as dividing β by it would."""
    score_clip: float | None = Field(None, gt=0)
    """Scores are then clipped to ± this. Moves the optimum: beyond it completions earn the same."""
    length_normalised: bool = False
    """Divide the score by the completion's tokens. Moves the optimum towards short completions of high scores and long
    ones of low scores."""

    # The rollout
    samples_per_prompt: int = Field(1, gt=0)
    """G completions of each prompt in a rollout. Without a value model their mean score is the baseline, each
    completion's own in it: that moves the optimum to the one at β·G/(G − 1)."""

    # Credit
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount a token. Below 1 the optimum moves: a token is paid less for the score, and less for the KL, the further
    ahead they are. At each token it is π_ref·exp(Q/β) with Q = r + γ·V(s′), V(s) = β·log Σ_a π_ref(a|s)·exp(Q/β) and
    r the score at the last token, else 0."""
    lam: float = Field(0.95, ge=0, le=1)
    """λ of generalized advantage estimation. Below 1 the optimum stays as far as the values are true."""
    whiten_rewards: bool = False
    """Divide token rewards by their standard deviation over the rollout. The optimum stays, since the KL in them is
    divided along; with kl_in=loss it is the one at β times that deviation. entropy_coef and ptx_coef are in its units
    too."""
    whiten_advantages: bool = True
    """Shift and scale advantages to mean 0 and variance 1 over the rollout's tokens. The optimum stays; with kl_in=loss
    it is the one at β times their deviation. entropy_coef and ptx_coef are in its units too."""

    # The update
    num_ppo_epochs: int = Field(2, gt=0)
    """Passes over each rollout."""
    cliprange: float = Field(0.2, gt=0)
    """ε of the clipped policy loss."""
    cliprange_value: float = Field(0.2, gt=0)
    """How far a value may move in one rollout, in score."""
    vf_coef: float = Field(0.1, ge=0)
    """Weight of the value loss."""
    value_model: Literal["own", "policy_trunk", "none"] = "own"
    """own: a second trunk from the policy's start. policy_trunk: a head on the policy's, half the work; value errors
    then pull at the policy too, by vf_coef. none: no value model, the light variant; a token's advantage is the score
    less the KL still to come, less the mean score of its prompt where samples_per_prompt is above 1. But for that mean
    the optimum is the same."""

    live: ClassVar = (
        LiveCoefficient(
            "kl_coef",
            low=1e-4,
            high=10.0,
            scale="log",
            unit="score/nat",
            meaning="Price of moving away from the reference. Higher is closer to it.",
            enters="rollout",
            can_preview=True,
            unavailable_when=without_reference,
        ),
        LEARNING_RATE,
        TEMPERATURE,
        ENTROPY,
        LiveCoefficient(
            "cliprange", low=0.01, high=1.0, scale="log", meaning="How far a step may move a token's odds."
        ),
        LiveCoefficient(
            "cliprange_value",
            low=0.01,
            high=100.0,
            scale="log",
            unit="score",
            meaning="How far a value may move.",
            unavailable_when=without_values,
        ),
        LiveCoefficient(
            "vf_coef",
            low=1e-3,
            high=10.0,
            scale="log",
            meaning="Weight of the value loss.",
            unavailable_when=without_values,
        ),
        LENGTH_PENALTY,
        PRETRAINING,
        REWARD_STD,
        LiveCoefficient(
            "kl_target",
            low=0.01,
            high=1000.0,
            scale="log",
            unit="nats",
            meaning="KL a completion at which the controller holds the policy.",
            enters="adaptation",
            unavailable_when=without_controller,
        ),
        LiveCoefficient(
            "kl_controller",
            low=0.0,
            high=1.0,
            meaning="1: the controller moves kl_coef. 0: kl_coef stays as it was set by hand.",
            enters="adaptation",
            unavailable_when=without_controller,
        ),
    )

    @property
    def kl_controller(self) -> float:
        """Whether the controller runs at the start."""
        return float(self.kl_target is not None)

    @property
    def penalty(self) -> str:
        """The estimator in force."""
        return PENALTIES[self.kl_in] if self.kl_estimator == "auto" else self.kl_estimator

    @property
    def each(self) -> int:
        return self.samples_per_prompt

    @property
    def passes(self) -> int:
        return self.num_ppo_epochs

    @property
    def values(self) -> Literal["own", "policy_trunk", "none"]:
        return self.value_model

    @property
    def compared_with(self) -> int:
        return self.preference_references

    @property
    def normalises_scores(self) -> bool:
        return self.score_normalisation == "running"

    def check(self, spec: RunSpec) -> None:
        super().check(spec)
        if reason := REFUSED.get((self.kl_in, self.kl_estimator)):
            raise SpecError(f"ppo: kl_in={self.kl_in} with kl_estimator={self.kl_estimator}: {reason}")
        if self.preference_references and self.reference != "frozen":
            raise SpecError(
                f"ppo: preference_references={self.preference_references} compares with what the reference says, and "
                f"reference={self.reference} does not stay; use reference=frozen"
            )
        if self.reference == "none" and self.kl_target is not None:
            raise SpecError(
                f"ppo: kl_target={self.kl_target:g} needs a reference to measure KL to; use reference=frozen"
            )
        if self.kl_target is not None and self.kl_coef == 0:
            raise SpecError("ppo: kl_coef=0 with kl_target: the controller multiplies kl_coef; start with kl_coef > 0")
        if self.kl_horizon <= 0.2 * self.rollout_batch_size:
            raise SpecError(
                f"ppo: kl_horizon={self.kl_horizon} lets one rollout of {self.rollout_batch_size} take kl_coef to 0; "
                f"use more than {0.2 * self.rollout_batch_size:g}, 10000 is usual"
            )
        if self.value_model == "none" and self.whiten_rewards:
            raise SpecError(
                "ppo: whiten_rewards scales what a value model learns; with value_model=none use whiten_advantages"
            )
        if self.value_model == "none" and self.gamma < 1:
            raise SpecError(
                f"ppo: gamma={self.gamma:g} discounts towards a value model; use gamma=1 or value_model=own"
            )

    def preview_refusal(self, live: Live) -> str | None:
        if self.kl_in == "loss":
            return "kl_in=loss: its optimum is not known in closed form; a preview needs kl_in=reward"
        if self.gamma < 1:
            return "gamma below 1 moves the optimum to where no completion's score alone tells it; leave it out"
        return super().preview_refusal(live)

    def settles_at(self, tether: float) -> float:
        # The group's mean holds a share 1/G of each score itself.
        G = self.samples_per_prompt
        return tether * G / (G - 1) if self.value_model == "none" and G > 1 else tether

    # --- the maths --------------------------------------------------------------------------------------------------

    def compared(self, rollout: Rollout) -> Any:
        from rlhf_nb.maths.rewards import preference_as_reward

        if rollout.reference_score_BR is None:
            return rollout.score_B
        return preference_as_reward(rollout.score_B, rollout.reference_score_BR)

    def penalised(self, rollout: Rollout, live: Live) -> Any:
        """(B,) the score that is optimised: preferred to the reference's, normalised, scaled, clipped, less what a cut
        completion and each token cost."""
        score_B = (self.compared(rollout) - rollout.score_shift) / rollout.score_spread * self.score_scale
        if self.score_clip is not None:
            score_B = score_B.clamp(-self.score_clip, self.score_clip)
        if self.length_normalised:
            score_B = score_B / rollout.mask_BT.sum(1).clamp(min=1)
        return super().penalised(replace(rollout, score_B=score_B), live)

    def credit(self, rollout: Rollout, live: Live) -> Credit:
        """From scores to an advantage and a return for each token; once a rollout, over all ranks' completions."""
        from rlhf_nb.maths import kl
        from rlhf_nb.maths.advantages import gae, group_advantages, returns_to_go, token_rewards
        from rlhf_nb.maths.masked import masked_whiten
        from rlhf_nb.training.online_types import Credit

        mask_BT = rollout.mask_BT
        kl_BT = kl.estimate(rollout.behavior_logprobs_BT, rollout.reference_logprobs_BT, "k1")
        kl_coef = live.kl_coef if self.kl_in == "reward" else 0.0
        score_B = self.penalised(rollout, live)
        rewards_BT = token_rewards(score_B, kl_BT, mask_BT, kl_coef=kl_coef)
        # Wherever it is charged, the KL is paid for.
        total_B = token_rewards(score_B, kl_BT, mask_BT, kl_coef=live.kl_coef).sum(1)
        if self.value_model == "none":
            if self.samples_per_prompt > 1:
                groups_PG = score_B.view(-1, self.samples_per_prompt)
                score_B = group_advantages(groups_PG, scale="none").view(-1)
                rewards_BT = token_rewards(score_B, kl_BT, mask_BT, kl_coef=kl_coef)
            returns_BT = returns_to_go(rewards_BT, mask_BT)
            return Credit(
                total_B, masked_whiten(returns_BT, mask_BT) if self.whiten_advantages else returns_BT, returns_BT
            )
        if self.whiten_rewards:
            rewards_BT = masked_whiten(rewards_BT, mask_BT, shift_mean=False)
        advantages_BT, returns_BT = gae(rewards_BT, rollout.values_BT, mask_BT, gamma=self.gamma, lam=self.lam)
        if self.whiten_advantages:
            advantages_BT = masked_whiten(advantages_BT, mask_BT)
        return Credit(total_B, advantages_BT, returns_BT)

    def loss(self, batch: Minibatch, outputs: Outputs, live: Live) -> TokenLosses:
        """Losses of each token. The optimizer sees policy + vf_coef·value − entropy_coef·entropy, a mean over
        tokens."""
        from rlhf_nb.maths.policy_gradient import clipped_policy_loss, clipped_value_loss
        from rlhf_nb.training.online_types import TokenLosses

        policy = clipped_policy_loss(
            outputs.logprobs_BT,
            batch.behavior_logprobs_BT,
            batch.advantages_BT,
            batch.mask_BT,
            cliprange=live.cliprange,
        )
        total_BT, metrics = policy.loss_BT, {"loss/policy": policy.loss_BT, "policy/clip_fraction": policy.clipped_BT}
        weight_BT = self.importance_weight(batch)
        total_BT = total_BT * weight_BT
        if self.value_model != "none":
            value = clipped_value_loss(
                outputs.values_BT,
                batch.values_BT,
                batch.returns_BT,
                batch.mask_BT,
                cliprange_value=live.cliprange_value,
            )
            total_BT = total_BT + live.vf_coef * value.loss_BT
            metrics |= {"loss/value": value.loss_BT, "value/clip_fraction": value.clipped_BT}
        if self.kl_in == "loss" and self.has_reference:
            penalty_BT = kl_penalty(batch, outputs.logprobs_BT, "k2" if self.penalty == "k2" else "ratio_k3")
            total_BT = total_BT + live.kl_coef * weight_BT * penalty_BT
            metrics["loss/kl"] = penalty_BT
        if live.entropy_coef:
            total_BT = total_BT - live.entropy_coef * outputs.entropy_BT
        return TokenLosses(total_BT, metrics)

    def measured(self, rollout: Rollout) -> list[float] | None:
        """KL to the reference, nats a completion, and of how many."""
        from rlhf_nb.maths.masked import masked_sum

        if self.kl_target is None:
            return None
        kl_B = masked_sum(rollout.behavior_logprobs_BT - rollout.reference_logprobs_BT, rollout.mask_BT, 1)
        return [kl_B.mean().item(), len(kl_B)]

    def adapt(self, measured: list[float], live: Live) -> None:
        """Move kl_coef towards the KL that is wanted, unless a person holds it."""
        from rlhf_nb.maths.controllers import adapted_kl_coef

        if live.kl_controller < 0.5:
            return
        kl, completions = measured
        live.kl_coef = adapted_kl_coef(
            live.kl_coef,
            kl,
            target=live.kl_target,
            completions=int(completions),
            horizon=self.kl_horizon,
            low=min(1e-4, self.kl_coef),
            high=max(10.0, self.kl_coef),
        )
