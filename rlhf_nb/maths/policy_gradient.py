"""Clipped surrogate losses. Each returns the loss of every token; reduce them with a mean over the *global* batch's
tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_nb.errors import ShapeError
from rlhf_nb.maths.masked import check_mask, fill


@dataclass(frozen=True)
class Clipped:
    """Per-token losses, and where clipping took the gradient away. Both are zero or False outside the mask."""

    loss_BT: Tensor  # noqa: N815
    clipped_BT: Tensor  # noqa: N815
    """(B, T) bool, within the mask: the clipped branch is the larger loss, so that this token's gradient is zero."""


def clipped_policy_loss(
    logprobs_BT: Tensor,
    behavior_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    cliprange: float,
    cliprange_high: float | None = None,
) -> Clipped:
    """PPO's surrogate, negated: max(−ρA, −clip(ρ, 1−ε, 1+ε)·A) with ρ = exp(log π − log π_behavior).

    Schulman et al. 2017, arXiv:1707.06347, eq. 7; with two ranges DAPO's, Yu et al. 2025, arXiv:2503.14476, eq. 8.

    Args:
        logprobs_BT: (B, T) nats, of the policy in training; gradients flow here only.
        behavior_logprobs_BT: (B, T) nats, of the policy that sampled, at the same temperature.
        advantages_BT: (B, T).
        mask_BT: (B, T) bool.
        cliprange: ε > 0.
        cliprange_high: ε above 1, where it is another one than below.

    Raises:
        ShapeError: The shapes differ, or the mask is not bool.
    """
    if not logprobs_BT.shape == behavior_logprobs_BT.shape == advantages_BT.shape:
        raise ShapeError(
            f"log-probabilities {tuple(logprobs_BT.shape)}, behavior {tuple(behavior_logprobs_BT.shape)} and "
            f"advantages {tuple(advantages_BT.shape)} differ in shape"
        )
    behavior_BT, advantages_BT = fill(behavior_logprobs_BT, mask_BT).detach(), fill(advantages_BT, mask_BT).detach()
    ratio_BT = torch.exp(fill(logprobs_BT, mask_BT) - behavior_BT)
    plain_BT = -advantages_BT * ratio_BT
    high = cliprange if cliprange_high is None else cliprange_high
    clipped_BT = -advantages_BT * ratio_BT.clamp(1 - cliprange, 1 + high)
    return Clipped(fill(torch.maximum(plain_BT, clipped_BT), mask_BT), (clipped_BT > plain_BT) & mask_BT)


def clipped_sequence_loss(
    logprobs_BT: Tensor,
    behavior_logprobs_BT: Tensor,
    advantages_B: Tensor,
    mask_BT: Tensor,
    *,
    cliprange: float,
    cliprange_high: float | None = None,
    length_normalised: bool,
) -> Clipped:
    """The clipped surrogate with one ratio a completion, which is then the action.

    `length_normalised`: ρ = exp(mean over tokens of log π − log π_behavior), GSPO, Zheng et al. 2025, arXiv:2507.18071,
    eqs. 5 and 7. Else ρ = π(y|x)/π_behavior(y|x), as RLOO has it, Ahmadian et al. 2024, arXiv:2402.14740.

    Args:
        logprobs_BT: (B, T) nats, of the policy in training; gradients flow here only.
        behavior_logprobs_BT: (B, T) nats, of the policy that sampled, at the same temperature.
        advantages_B: (B,).
        mask_BT: (B, T) bool.
        cliprange: ε > 0.
        cliprange_high: ε above 1, where it is another one than below.

    Returns:
        `loss_BT`: each token carries its completion's loss whole, so that a mean over a row's tokens is that loss.

    Raises:
        ShapeError: The shapes differ, or the mask is not bool.
    """
    check_mask(logprobs_BT, mask_BT)
    if advantages_B.shape != mask_BT.shape[:1]:
        raise ShapeError(f"advantages have shape {tuple(advantages_B.shape)} for {mask_BT.shape[0]} completions")
    log_ratio_B = (fill(logprobs_BT, mask_BT) - fill(behavior_logprobs_BT, mask_BT).detach()).sum(1)
    if length_normalised:
        log_ratio_B = log_ratio_B / mask_BT.sum(1).clamp(min=1)
    ratio_B, advantages_B = log_ratio_B.exp(), advantages_B.detach()
    high = cliprange if cliprange_high is None else cliprange_high
    plain_B, near_B = -advantages_B * ratio_B, -advantages_B * ratio_B.clamp(1 - cliprange, 1 + high)
    loss_BT = torch.maximum(plain_B, near_B)[:, None].expand(mask_BT.shape)
    return Clipped(fill(loss_BT, mask_BT), (near_B > plain_B)[:, None] & mask_BT)


def clipped_value_loss(
    values_BT: Tensor, old_values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor, *, cliprange_value: float
) -> Clipped:
    """½·max((V − R)², (clip(V, V_old ± ε) − R)²).

    Schulman et al.'s baselines; Huang et al. 2024, arXiv:2403.17031, and TRL 1.12 have the same ½ and the same maximum.

    Args:
        values_BT: (B, T), gradients flow here only.
        old_values_BT: (B, T), when the rollout was made.
        returns_BT: (B, T).
        mask_BT: (B, T) bool.
        cliprange_value: ε > 0, in units of reward; inf switches the clipping off.

    Raises:
        ShapeError: The shapes differ, or the mask is not bool.
    """
    check_mask(values_BT, mask_BT)
    values_BT = fill(values_BT, mask_BT)
    old_BT, returns_BT = fill(old_values_BT, mask_BT).detach(), fill(returns_BT, mask_BT).detach()
    near_BT = torch.minimum(torch.maximum(values_BT, old_BT - cliprange_value), old_BT + cliprange_value)
    plain_BT, clipped_BT = (values_BT - returns_BT).square(), (near_BT - returns_BT).square()
    return Clipped(fill(torch.maximum(plain_BT, clipped_BT) / 2, mask_BT), (clipped_BT > plain_BT) & mask_BT)


def truncated_importance(
    trainer_logprobs_BT: Tensor, sampler_logprobs_BT: Tensor, mask_BT: Tensor, *, cap: float
) -> Tensor:
    """min(π_trainer/π_sampler, cap) of each token: the weight of its loss where another engine sampled than trains.

    Truncated importance sampling, Ionides 2008, doi:10.1198/106186008X320456; for samplers that round otherwise than
    the trainer, Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training".

    Args:
        trainer_logprobs_BT: (B, T) nats, before the rollout's first update.
        sampler_logprobs_BT: (B, T) nats, of the same tokens at the same temperature.
        mask_BT: (B, T) bool.
        cap: > 0. inf leaves the expectation exact and the variance unbounded.

    Returns:
        (B, T), in (0, cap]; min(1, cap) outside the mask. No gradient flows through it.
    """
    check_mask(trainer_logprobs_BT, mask_BT)
    trainer_BT, sampler_BT = fill(trainer_logprobs_BT, mask_BT), fill(sampler_logprobs_BT, mask_BT)
    return (trainer_BT - sampler_BT).detach().exp().clamp(max=cap)
