"""Proximal Policy Optimization on a learned or given reward, tethered to a reference.

Papers   Schulman et al. 2017, arXiv:1707.06347 (the clipped loss); Ziegler et al. 2019, arXiv:1909.08593 (KL in the
         reward); Ouyang et al. 2022, arXiv:2203.02155; Huang et al. 2024, arXiv:2403.17031 (the details that matter).
Rows     prompt.
Models   policy (trained); reference (frozen; the policy with its adapter off under LoRA); value model (trained);
         reward.
Live     kl_coef, temperature and length_penalty from the next rollout; learning_rate, cliprange, cliprange_value,
         vf_coef and entropy_coef from the next step. Raising kl_coef keeps the policy closer to the reference.
Agrees   with the maths of TRL 1.12, the last that had a PPO (tests/maths); in enumerable worlds with the optimum
         π_ref·exp(r/β) (tests/fidelity). Not with four of TRL's faults: here the score stands on the last token that
         counts and not one after it, padding enters no average, the end token counts when it is also the pad token,
         and minibatches are honoured with any gradient accumulation.

One rollout: sample completions of `rollout_batch_size` prompts, score them, give credit to tokens; then
`num_ppo_epochs` passes over them in minibatches of `batch_size`, an optimizer step each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from rlhf_nb.errors import SpecError
from rlhf_nb.methods.base import LEARNING_RATE, LiveCoefficient, Method, Trainer

if TYPE_CHECKING:
    from rlhf_nb.protocol.spec import RunSpec
    from rlhf_nb.training.context import Context
    from rlhf_nb.training.online import Credit, Live, Minibatch, Outputs, Rollout, TokenLosses


class PPO(Method):
    """Raise the reward of what the policy says, and pay for every nat it moves away from the reference."""

    name: ClassVar[str] = "ppo"
    title: ClassVar[str] = "Proximal policy optimization"
    paper: ClassVar[str] = "arXiv:1707.06347"
    rows: ClassVar[str] = "prompts"
    has_reference: ClassVar[bool] = True
    needs_reward: ClassVar[bool] = True

    # The objective. With γ = 1, temperature 1 and no penalty, bonus or whitening of rewards its optimum is
    # π_ref·exp(r/β).
    kl_coef: float = Field(0.05, ge=0)
    """β, score per nat of KL to the reference. 0 cuts the tether; the reference is held anyway, so that it can be
    raised."""
    temperature: float = Field(1.0, gt=0)
    """Of sampling. Every log-probability is taken at it, so that the tether holds the tempered policy to the tempered
    reference."""
    score_clip: float | None = Field(None, gt=0)
    """Scores are clipped to ± this before anything else."""
    missing_eos_penalty: float = Field(0.0, ge=0)
    """Taken off the score of a completion that was cut at `max_new_tokens`."""
    length_penalty: float = Field(0.0, ge=0)
    """Taken off the score for every token."""
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of the mean token entropy in the loss, a bonus. Moves the optimum towards flatter policies."""

    # The rollout
    rollout_batch_size: int = Field(64, gt=0)
    """Completions of one rollout, over all ranks."""
    max_new_tokens: int = Field(48, gt=0)
    """Longest completion, in tokens."""

    # Credit
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount a token. Below 1 the optimum moves: late tokens are paid less for the score, and less for their KL."""
    lam: float = Field(0.95, ge=0, le=1)
    """λ of generalized advantage estimation."""
    whiten_rewards: bool = False
    """Scale token rewards to unit variance over the rollout. Moves the optimum: β is then in other units."""
    whiten_advantages: bool = True
    """Shift and scale advantages to mean 0 and variance 1 over the rollout's tokens."""

    # The update
    learning_rate: float = Field(1e-5, ge=0)
    """1e-5 suits whole models of a billion parameters; LoRA wants 1e-4, the toy model 2e-4."""
    batch_size: int = Field(32, gt=0)
    """Completions an optimizer step sees, over all ranks; a rollout has rollout_batch_size / batch_size minibatches."""
    num_ppo_epochs: int = Field(2, gt=0)
    """Passes over each rollout."""
    cliprange: float = Field(0.2, gt=0)
    """ε of the clipped policy loss."""
    cliprange_value: float = Field(0.2, gt=0)
    """How far a value may move in one rollout, in score."""
    vf_coef: float = Field(0.1, ge=0)
    """Weight of the value loss."""
    target_kl: float | None = Field(None, gt=0)
    """End a rollout's passes once a step's mean KL to the policy that sampled exceeds this, nats a token."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients are scaled down to this L2 norm, the policy's and a value model's of its own apart; 0 leaves them."""
    lr_scheduler: Literal["constant", "linear"] = "constant"
    """linear falls to 0 at max_steps."""
    value_model: Literal["own", "policy_trunk"] = "own"
    """own: a second trunk from the policy's start. policy_trunk: a head on the policy's, half the work; value errors
    then pull at the policy too, by vf_coef."""
    micro_batch_size: int = Field(0, ge=0)
    """Completions of one forward and backward pass on one rank, to save memory; 0 takes a minibatch whole."""

    live: ClassVar = (
        LiveCoefficient(
            "kl_coef",
            low=1e-4,
            high=10.0,
            scale="log",
            unit="score/nat",
            meaning="Price of moving away from the reference. Higher is closer to it.",
            enters="rollout",
        ),
        LEARNING_RATE,
        LiveCoefficient(
            "cliprange", low=0.01, high=1.0, scale="log", meaning="How far a step may move a token's odds."
        ),
        LiveCoefficient(
            "cliprange_value", low=0.01, high=100.0, scale="log", unit="score", meaning="How far a value may move."
        ),
        LiveCoefficient("vf_coef", low=1e-3, high=10.0, scale="log", meaning="Weight of the value loss."),
        LiveCoefficient(
            "entropy_coef", low=0.0, high=0.1, unit="1/nat", meaning="Bonus on entropy. Higher explores more."
        ),
        LiveCoefficient("temperature", low=0.1, high=2.0, meaning="Of sampling. Lower is surer.", enters="rollout"),
        LiveCoefficient(
            "length_penalty",
            low=0.0,
            high=0.1,
            unit="score/token",
            meaning="Taken off the score for each token. Higher is shorter.",
            enters="rollout",
        ),
    )

    @property
    def num_mini_batches(self) -> int:
        return self.rollout_batch_size // self.batch_size

    def check(self, spec: RunSpec) -> None:
        if self.rollout_batch_size % self.batch_size:
            raise SpecError(
                f"ppo: rollout_batch_size={self.rollout_batch_size} is no multiple of batch_size={self.batch_size}; "
                f"use {self.batch_size * max(1, round(self.rollout_batch_size / self.batch_size))}"
            )
        if self.batch_size < spec.launch.num_processes:
            raise SpecError(
                f"ppo: batch_size={self.batch_size} leaves some of {spec.launch.num_processes} ranks without a "
                f"completion; use at least {spec.launch.num_processes}"
            )
        if self.max_new_tokens >= self.max_length:
            raise SpecError(
                f"ppo: max_new_tokens={self.max_new_tokens} leaves no room for a prompt in max_length={self.max_length}"
            )
        if spec.adapter is not None and spec.adapter.dropout:
            raise SpecError(
                f"ppo: adapter dropout={spec.adapter.dropout} makes the ratio of the policy to itself differ from one; "
                f"use dropout=0"
            )

    # --- the maths --------------------------------------------------------------------------------------------------

    def penalised(self, rollout: Rollout, live: Live) -> Any:
        """(B,) the score that is optimised: clipped, less what a cut completion and each token cost."""
        score_B = rollout.score_B
        if self.score_clip is not None:
            score_B = score_B.clamp(-self.score_clip, self.score_clip)
        cut_B = (~rollout.ended_B).to(score_B.dtype)
        return score_B - self.missing_eos_penalty * cut_B - live.length_penalty * rollout.mask_BT.sum(1)

    def credit(self, rollout: Rollout, live: Live) -> Credit:
        """From scores to an advantage and a return for each token; once a rollout, over all ranks' completions."""
        from rlhf_nb.maths import kl
        from rlhf_nb.maths.advantages import gae, token_rewards
        from rlhf_nb.maths.masked import masked_whiten
        from rlhf_nb.training.online import Credit

        mask_BT = rollout.mask_BT
        kl_BT = kl.estimate(rollout.behavior_logprobs_BT, rollout.reference_logprobs_BT, "k1")
        rewards_BT = token_rewards(self.penalised(rollout, live), kl_BT, mask_BT, kl_coef=live.kl_coef)
        total_B = rewards_BT.sum(1)
        if self.whiten_rewards:
            rewards_BT = masked_whiten(rewards_BT, mask_BT, shift_mean=False)
        advantages_BT, returns_BT = gae(rewards_BT, rollout.values_BT, mask_BT, gamma=self.gamma, lam=self.lam)
        if self.whiten_advantages:
            advantages_BT = masked_whiten(advantages_BT, mask_BT)
        return Credit(total_B, advantages_BT, returns_BT)

    def loss(self, batch: Minibatch, outputs: Outputs, live: Live) -> TokenLosses:
        """Losses of each token. The optimizer sees policy + vf_coef·value − entropy_coef·entropy, a mean over
        tokens."""
        from rlhf_nb.maths import kl
        from rlhf_nb.maths.policy_gradient import clipped_policy_loss, clipped_value_loss
        from rlhf_nb.training.online import TokenLosses

        policy = clipped_policy_loss(
            outputs.logprobs_BT,
            batch.behavior_logprobs_BT,
            batch.advantages_BT,
            batch.mask_BT,
            cliprange=live.cliprange,
        )
        value = clipped_value_loss(
            outputs.values_BT, batch.values_BT, batch.returns_BT, batch.mask_BT, cliprange_value=live.cliprange_value
        )
        total_BT = policy.loss_BT + live.vf_coef * value.loss_BT
        if live.entropy_coef:
            total_BT = total_BT - live.entropy_coef * outputs.entropy_BT
        return TokenLosses(
            total_BT,
            {
                "loss": total_BT,
                "loss/policy": policy.loss_BT,
                "loss/value": value.loss_BT,
                "policy/clip_fraction": policy.clipped_BT,
                "value/clip_fraction": value.clipped_BT,
                "policy/approx_kl": kl.estimate(batch.behavior_logprobs_BT, outputs.logprobs_BT, "k3"),
                "policy/entropy": outputs.entropy_BT,
            },
        )

    # --- the loop ---------------------------------------------------------------------------------------------------

    @classmethod
    def preload(cls) -> None:
        import rlhf_nb.training.online  # noqa: F401

    def build_trainer(self, context: Context) -> Trainer:
        from rlhf_nb.training.online import OnlineTrainer

        return OnlineTrainer(self, context)
