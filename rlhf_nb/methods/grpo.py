"""Group Relative Policy Optimization, and what came of it: Dr. GRPO, GSPO, DAPO.

Papers   GRPO: Shao et al. 2024, arXiv:2402.03300, eqs. 3 and 21. Dr. GRPO: Liu et al. 2025, arXiv:2503.20783. GSPO:
         Zheng et al. 2025, arXiv:2507.18071. DAPO: Yu et al. 2025, arXiv:2503.14476.
Rows     prompt; further columns go to the reward.
Models   policy (trained); reference (frozen; the policy with its adapter off under LoRA; or none); reward. No value
         model: the other completions of a prompt are the baseline.
Live     beta, learning_rate, epsilon_low, epsilon_high and entropy_coef from the next step; temperature,
         length_penalty, the weights of a combined reward and the reward itself from the next rollout. Raising beta
         keeps the policy closer to the reference.
Agrees   with trl.GRPOTrainer on the same completions: losses and gradients; tests/methods/test_grpo.py. The loop is
         ours (training/online.py): TRL's samples no group again, loses its rollouts on resume and freezes the
         temperature into its fused head.

Of one rollout's completions each is credited with how much better it did than its group; then `num_iterations` passes
in minibatches of `batch_size`, an optimizer step each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from rlhf_nb.errors import SpecError
from rlhf_nb.methods.base import LiveCoefficient
from rlhf_nb.methods.online import ROLLOUT, OnlineMethod, kl_penalty, without_reference

if TYPE_CHECKING:
    from rlhf_nb.protocol.spec import RunSpec
    from rlhf_nb.training.online_types import Credit, Extent, Live, Minibatch, Outputs, Rollout, TokenLosses

BETA = LiveCoefficient(
    "beta",
    low=1e-4,
    high=10.0,
    scale="log",
    unit="score/nat",
    meaning="Price of moving away from the reference. Higher is closer to it.",
    unavailable_when=without_reference,
)
EPSILON = (
    LiveCoefficient(
        "epsilon_low", low=1e-4, high=1.0, scale="log", meaning="How far a step may lower a completion's odds."
    ),
    LiveCoefficient(
        "epsilon_high", low=1e-4, high=10.0, scale="log", meaning="How far a step may raise a completion's odds."
    ),
)


class GRPO(OnlineMethod):
    """Raise what scored better than its group, lower what scored worse, within a clip and a tether."""

    name: ClassVar[str] = "grpo"
    title: ClassVar[str] = "Group relative policy optimization"
    paper: ClassVar[str] = "arXiv:2402.03300"
    models: ClassVar[str] = "policy, reference (frozen, moving or none), reward; under LoRA all on one backbone"
    tether: ClassVar[str] = "beta"

    beta: float = Field(0.04, ge=0)
    """Price of a nat of KL to the reference, in the loss: beside advantages in standard deviations of a group, so that
    it means another thing in every group. 0.04 is the paper's. 0 cuts the tether; the reference is held anyway, so
    that the KL is seen and beta can be raised."""
    kl_estimator: Literal["ratio_k3", "k2"] = "ratio_k3"
    """What beta multiplies. The paper's plain k3 leads to the optimum of the forward KL; times the importance ratio it
    is the reverse KL's, token by token."""
    group_size: int = Field(8, gt=0)
    """Completions of each prompt: G."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Advantages are divided by the standard deviation of the group's scores, or of all of the rollout
    (arXiv:2508.08221), or left in units of the score: dividing by the group's gives easy and hard prompts more
    weight."""
    loss_type: Literal["grpo", "dapo", "dr_grpo"] = "grpo"
    """grpo: mean over a completion's tokens, then over completions, so that a token of a long one counts less. dapo:
    mean over all tokens. dr_grpo: sum of tokens divided by max_new_tokens, a constant."""
    importance: Literal["token", "sequence"] = "token"
    """Whose ratio to the policy that sampled is clipped: each token's, or the whole completion's, length-normalised."""
    num_iterations: int = Field(1, gt=0)
    """Passes over each rollout: μ."""
    epsilon_low: float = Field(0.2, gt=0)
    """The ratio is clipped below 1 − this."""
    epsilon_high: float = Field(0.2, gt=0)
    """The ratio is clipped above 1 + this."""
    dynamic_sampling: int = Field(0, ge=0)
    """Groups whose scores are all equal teach nothing: up to so many times they are replaced by groups of the next
    prompts. What is left then stays in."""
    overlong_cache: int | None = Field(0, ge=0)
    """Tokens before max_new_tokens in which a completion is punished, growing linearly to −1 at the limit; 0 is off,
    None a fifth of the limit. Moves the optimum to that of the punished score."""
    learning_rate: float = Field(1e-6, ge=0)
    """1e-6 suits whole models of a billion parameters; LoRA wants 1e-5 to 1e-4, the toy model 2e-4."""
    rollout_batch_size: int = Field(64, gt=0)
    """Completions of one rollout, over all ranks: rollout_batch_size / group_size prompts."""
    batch_size: int = Field(64, gt=0)
    """Completions an optimizer step sees, over all ranks; a rollout has rollout_batch_size / batch_size minibatches."""

    live: ClassVar = (BETA, *EPSILON, *ROLLOUT)

    @property
    def each(self) -> int:
        return self.group_size

    @property
    def passes(self) -> int:
        return self.num_iterations

    @property
    def resamplings(self) -> int:
        return self.dynamic_sampling

    def check(self, spec: RunSpec) -> None:
        super().check(spec)
        if self.group_size < 2:
            raise SpecError(
                f"{self.name}: group_size={self.group_size}: a group of one has nothing to be compared with; use 2 or "
                f"more, or ppo"
            )
        if self.importance == "sequence" and self.loss_type != "grpo":
            raise SpecError(
                f"{self.name}: importance=sequence with loss_type={self.loss_type} would count a completion once for "
                f"each of its tokens; use loss_type=grpo"
            )
        if (self.overlong_cache or 0) > self.max_new_tokens:
            raise SpecError(
                f"{self.name}: overlong_cache={self.overlong_cache} is more than max_new_tokens={self.max_new_tokens}; "
                f"a fifth of it is usual"
            )

    def preview_refusal(self, live: Live) -> str | None:
        return f"{self.name} holds its KL in the loss: the optimum is not known in closed form; rloo and ppo can tell"

    # --- the maths --------------------------------------------------------------------------------------------------

    def penalised(self, rollout: Rollout, live: Live) -> Any:
        """(B,) the score that is optimised: less what a cut or overlong completion and each token cost."""
        from rlhf_nb.maths.rewards import overlong_penalty

        score_B = super().penalised(rollout, live)
        cache = self.max_new_tokens // 5 if self.overlong_cache is None else self.overlong_cache
        if not cache:
            return score_B
        return score_B + overlong_penalty(rollout.mask_BT.sum(1), limit=self.max_new_tokens, cache=cache)

    def credit(self, rollout: Rollout, live: Live) -> Credit:
        """One advantage a completion, the same for each of its tokens."""
        from rlhf_nb.maths.advantages import group_advantages, rounding
        from rlhf_nb.maths.masked import fill, masked_sum
        from rlhf_nb.training.online_types import Credit

        mask_BT, score_B = rollout.mask_BT, self.penalised(rollout, live)
        groups_PG = score_B.view(-1, self.group_size)
        advantages_B = group_advantages(groups_PG, scale="std" if self.scale_rewards == "group" else "none").view(-1)
        if self.scale_rewards == "batch" and (spread := score_B.std()) > rounding(score_B):
            advantages_B = advantages_B / spread
        advantages_BT = fill(advantages_B[:, None].expand(mask_BT.shape), mask_BT)
        kl_B = masked_sum(rollout.behavior_logprobs_BT - rollout.reference_logprobs_BT, mask_BT, 1)
        return Credit(score_B - live.beta * kl_B, advantages_BT, advantages_BT)

    def loss(self, batch: Minibatch, outputs: Outputs, live: Live) -> TokenLosses:
        """Losses of each token: policy + beta·KL − entropy_coef·entropy, weighted as `loss_type` says."""
        from rlhf_nb.maths.policy_gradient import clipped_policy_loss, clipped_sequence_loss
        from rlhf_nb.training.online_types import TokenLosses

        clip = {"cliprange": live.epsilon_low, "cliprange_high": live.epsilon_high}
        if self.importance == "token":
            policy = clipped_policy_loss(
                outputs.logprobs_BT, batch.behavior_logprobs_BT, batch.advantages_BT, batch.mask_BT, **clip
            )
        else:
            policy = clipped_sequence_loss(
                outputs.logprobs_BT,
                batch.behavior_logprobs_BT,
                batch.advantages_BT[:, 0],
                batch.mask_BT,
                length_normalised=True,
                **clip,
            )
        weight_BT = self.importance_weight(batch)
        total_BT = weight_BT * policy.loss_BT
        metrics = {"loss/policy": policy.loss_BT, "policy/clip_fraction": policy.clipped_BT}
        if live.beta and self.has_reference:
            penalty_BT = kl_penalty(batch, outputs.logprobs_BT, self.kl_estimator)
            total_BT = total_BT + live.beta * weight_BT * penalty_BT
            metrics["loss/kl"] = penalty_BT
        if live.entropy_coef:
            total_BT = total_BT - live.entropy_coef * outputs.entropy_BT
        if self.loss_type == "grpo":
            total_BT = total_BT / batch.mask_BT.sum(1, keepdim=True).clamp(min=1)
        return TokenLosses(total_BT, metrics)

    def normaliser(self, extent: Extent) -> float:
        match self.loss_type:
            case "grpo":
                return extent.completions
            case "dapo":
                return extent.tokens
            case "dr_grpo":
                return extent.completions * self.max_new_tokens


class DrGRPO(GRPO):
    """GRPO without its two biases: towards long wrong completions, and towards easy and hard prompts."""

    name: ClassVar[str] = "dr-grpo"
    title: ClassVar[str] = "GRPO done right"
    paper: ClassVar[str] = "arXiv:2503.20783"

    beta: float = Field(0.0, ge=0)
    """Price of a nat of KL to the reference, in the loss. The paper has no tether."""
    scale_rewards: Literal["group", "batch", "none"] = "none"
    loss_type: Literal["grpo", "dapo", "dr_grpo"] = "dr_grpo"


class GSPO(GRPO):
    """GRPO whose ratio, clip and credit are all a completion's."""

    name: ClassVar[str] = "gspo"
    title: ClassVar[str] = "Group sequence policy optimization"
    paper: ClassVar[str] = "arXiv:2507.18071"

    beta: float = Field(0.0, ge=0)
    """Price of a nat of KL to the reference, in the loss. The paper's runs have no tether."""
    importance: Literal["token", "sequence"] = "sequence"
    epsilon_low: float = Field(3e-4, gt=0)
    """A mean over tokens moves far less than a token: the paper's clips are small."""
    epsilon_high: float = Field(4e-4, gt=0)


class DAPO(GRPO):
    """GRPO with a wider clip above, every token counted alike, flat groups sampled again and no tether."""

    name: ClassVar[str] = "dapo"
    title: ClassVar[str] = "Decoupled clip and dynamic sampling policy optimization"
    paper: ClassVar[str] = "arXiv:2503.14476"

    beta: float = Field(0.0, ge=0)
    """Price of a nat of KL to the reference, in the loss. The paper has no tether."""
    epsilon_high: float = Field(0.28, gt=0)
    """Wider above than below, so that unlikely tokens can rise."""
    loss_type: Literal["grpo", "dapo", "dr_grpo"] = "dapo"
    dynamic_sampling: int = Field(4, ge=0)
    """Groups whose scores are all equal teach nothing: up to so many times they are replaced by groups of the next
    prompts. What is left then stays in. The paper sets no limit."""
    overlong_cache: int | None = Field(None, ge=0)
    """Tokens before max_new_tokens in which a completion is punished, growing linearly to −1 at the limit. None: a
    fifth of the limit, the paper's share. 0 is off."""
