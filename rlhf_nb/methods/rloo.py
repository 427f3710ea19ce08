"""REINFORCE leave-one-out: a completion is one action, and the others of its prompt are its baseline.

Paper    Ahmadian et al. 2024, arXiv:2402.14740, §3.3; Kool et al. 2019.
Rows     prompt; further columns go to the reward.
Models   policy (trained); reference (frozen; the policy with its adapter off under LoRA; or none); reward. No value
         model.
Live     beta, temperature, length_penalty, the weights of a combined reward and the reward itself from the next
         rollout; learning_rate, epsilon_low, epsilon_high and entropy_coef from the next step. Raising beta keeps the
         policy closer to the reference.
Agrees   with trl.RLOOTrainer on the same completions: losses and gradients; tests/methods/test_grpo.py. In enumerable
         worlds with the optimum π_ref·exp(r/β).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from rlhf_nb.errors import SpecError
from rlhf_nb.methods.base import LiveCoefficient
from rlhf_nb.methods.grpo import EPSILON
from rlhf_nb.methods.online import ROLLOUT, OnlineMethod, without_reference

if TYPE_CHECKING:
    from rlhf_nb.protocol.spec import RunSpec
    from rlhf_nb.training.online_types import Credit, Extent, Live, Minibatch, Outputs, Rollout, TokenLosses


class RLOO(OnlineMethod):
    """Raise a completion by what it earned over the others of its prompt, each nat from the reference paid for."""

    name: ClassVar[str] = "rloo"
    title: ClassVar[str] = "REINFORCE leave-one-out"
    paper: ClassVar[str] = "arXiv:2402.14740"
    models: ClassVar[str] = "policy, reference (frozen, moving or none), reward; under LoRA all on one backbone"
    tether: ClassVar[str] = "beta"

    beta: float = Field(0.05, ge=0)
    """Score per nat of KL to the reference, taken off each completion's score: the optimum is π_ref·exp(r/β). 0 cuts
    the tether; the reference is held anyway, so that it can be raised."""
    group_size: int = Field(4, gt=0)
    """Completions of each prompt."""
    normalise_advantages: bool = False
    """Shift and scale advantages to mean 0 and variance 1 over the rollout."""
    num_iterations: int = Field(1, gt=0)
    """Passes over each rollout."""
    epsilon_low: float = Field(0.2, gt=0)
    """A completion's ratio to the policy that sampled it is clipped below 1 − this; in the first step of a rollout it
    is 1, and this is REINFORCE."""
    epsilon_high: float = Field(0.2, gt=0)
    """The ratio is clipped above 1 + this."""
    learning_rate: float = Field(1e-6, ge=0)
    """1e-6 suits whole models of a billion parameters; LoRA wants 1e-5 to 1e-4, the toy model 2e-4."""
    batch_size: int = Field(64, gt=0)
    """Completions an optimizer step sees, over all ranks; a rollout has rollout_batch_size / batch_size minibatches."""

    live: ClassVar = (
        LiveCoefficient(
            "beta",
            low=1e-4,
            high=10.0,
            scale="log",
            unit="score/nat",
            meaning="Price of moving away from the reference. Higher is closer to it.",
            enters="rollout",
            can_preview=True,
            unavailable_when=without_reference,
        ),
        *EPSILON,
        *ROLLOUT,
    )

    @property
    def each(self) -> int:
        return self.group_size

    @property
    def passes(self) -> int:
        return self.num_iterations

    def check(self, spec: RunSpec) -> None:
        super().check(spec)
        if self.group_size < 2:
            raise SpecError(
                f"rloo: group_size={self.group_size}: there are no others to leave one out of; use 2 or more, or ppo"
            )

    # --- the maths --------------------------------------------------------------------------------------------------

    def credit(self, rollout: Rollout, live: Live) -> Credit:
        """One advantage a completion, the same for each of its tokens."""
        from rlhf_nb.maths.advantages import leave_one_out_advantages, rounding
        from rlhf_nb.maths.masked import fill, masked_sum
        from rlhf_nb.training.online_types import Credit

        mask_BT = rollout.mask_BT
        kl_B = masked_sum(rollout.behavior_logprobs_BT - rollout.reference_logprobs_BT, mask_BT, 1)
        total_B = self.penalised(rollout, live) - live.beta * kl_B
        advantages_B = leave_one_out_advantages(total_B.view(-1, self.group_size)).view(-1)
        # The KL is a difference of log-probabilities that two models summed: their rounding is no advantage.
        summed_B = masked_sum(rollout.behavior_logprobs_BT.abs(), mask_BT, 1)
        smallest = rounding(total_B) + live.beta * rounding(summed_B)
        if self.normalise_advantages and (spread := advantages_B.std()) > smallest:
            advantages_B = (advantages_B - advantages_B.mean()) / spread
        advantages_BT = fill(advantages_B[:, None].expand(mask_BT.shape), mask_BT)
        return Credit(total_B, advantages_BT, advantages_BT)

    def loss(self, batch: Minibatch, outputs: Outputs, live: Live) -> TokenLosses:
        """Losses of each token: its share of its completion's, so that they sum to it."""
        from rlhf_nb.maths.policy_gradient import clipped_sequence_loss
        from rlhf_nb.training.online_types import TokenLosses

        policy = clipped_sequence_loss(
            outputs.logprobs_BT,
            batch.behavior_logprobs_BT,
            batch.advantages_BT[:, 0],
            batch.mask_BT,
            cliprange=live.epsilon_low,
            cliprange_high=live.epsilon_high,
            length_normalised=False,
        )
        total_BT = self.importance_weight(batch) * policy.loss_BT
        if live.entropy_coef:
            total_BT = total_BT - live.entropy_coef * outputs.entropy_BT
        total_BT = total_BT / batch.mask_BT.sum(1, keepdim=True).clamp(min=1)
        return TokenLosses(total_BT, {"loss/policy": policy.loss_BT, "policy/clip_fraction": policy.clipped_BT})

    def normaliser(self, extent: Extent) -> float:
        return extent.completions
