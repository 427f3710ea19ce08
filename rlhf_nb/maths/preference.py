"""Losses on pairs of completions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from rlhf_nb.errors import ShapeError
from rlhf_nb.maths.masked import masked_mean, masked_sum


def implicit_rewards(policy_logprobs: Tensor, reference_logprobs: Tensor, *, beta: float) -> Tensor:
    """β·(log π(y|x) − log π_ref(y|x)), from *summed* sequence log-probabilities. arXiv:2305.18290, eq. 5 without its
    constant."""
    return beta * (policy_logprobs - reference_logprobs)


def dpo_loss(
    policy_chosen_B: Tensor,
    policy_rejected_B: Tensor,
    reference_chosen_B: Tensor,
    reference_rejected_B: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """−log σ(β·((log π − log π_ref)(y_w) − (log π − log π_ref)(y_l))) for each pair.

    Rafailov et al. 2023, arXiv:2305.18290, eq. 7; `label_smoothing` is conservative DPO (Mitchell 2023): the share of
    labels that are believed flipped. TRL: `loss_type="sigmoid"`.

    Args:
        policy_chosen_B: (B,) log-probability of the whole chosen completion, nats, *summed* over its tokens. Likewise
            the others.
        beta: Strength of the tether, dimensionless. Larger keeps the policy closer to the reference.
        label_smoothing: In [0, 0.5).

    Returns:
        (B,) ≥ 0, nats. log 2 where the policy equals the reference.

    Raises:
        ShapeError: The shapes differ.
    """
    shapes = {tuple(t.shape) for t in (policy_chosen_B, policy_rejected_B, reference_chosen_B, reference_rejected_B)}
    if len(shapes) != 1:
        raise ShapeError(f"log-probabilities of chosen and rejected differ in shape: {sorted(shapes)}")
    margin_B = implicit_rewards(policy_chosen_B, reference_chosen_B, beta=beta) - implicit_rewards(
        policy_rejected_B, reference_rejected_B, beta=beta
    )
    return -(1 - label_smoothing) * functional.logsigmoid(margin_B) - label_smoothing * functional.logsigmoid(-margin_B)


def bradley_terry_loss(
    chosen_scores_B: Tensor, rejected_scores_B: Tensor, *, margins_B: Tensor | None = None
) -> Tensor:
    """−log σ(r_w − r_l − margin) for each pair: how a reward model is fitted.

    Bradley and Terry 1952; Ouyang et al. 2022, arXiv:2203.02155, eq. 1; margins as in Llama 2, arXiv:2307.09288, eq. 2.

    Returns:
        (B,) ≥ 0, nats. log 2 for equal scores.

    Raises:
        ShapeError: The shapes differ.
    """
    if chosen_scores_B.shape != rejected_scores_B.shape:
        raise ShapeError(f"{tuple(chosen_scores_B.shape)} chosen scores for {tuple(rejected_scores_B.shape)} rejected")
    difference_B = chosen_scores_B - rejected_scores_B
    return -functional.logsigmoid(difference_B if margins_B is None else difference_B - margins_B)


def sequence_logprobs(logprobs_BT: Tensor, mask_BT: Tensor, *, average: bool = False) -> Tensor:
    """(B,) log-probability of each completion: the sum over its tokens (DPO), or their mean (ORPO, SimPO). Nats; 0 for
    no token."""
    return (masked_mean if average else masked_sum)(logprobs_BT, mask_BT, 1)


def preference_probability(difference: Tensor) -> Tensor:
    """σ(r_a − r_b): the Bradley-Terry probability that a is preferred."""
    return torch.sigmoid(difference)
