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
    _same_shape(policy_chosen_B, policy_rejected_B, reference_chosen_B, reference_rejected_B)
    margin_B = implicit_rewards(policy_chosen_B, reference_chosen_B, beta=beta) - implicit_rewards(
        policy_rejected_B, reference_rejected_B, beta=beta
    )
    return -(1 - label_smoothing) * functional.logsigmoid(margin_B) - label_smoothing * functional.logsigmoid(-margin_B)


def ipo_loss(
    policy_chosen_B: Tensor,
    policy_rejected_B: Tensor,
    reference_chosen_B: Tensor,
    reference_rejected_B: Tensor,
    *,
    beta: float,
) -> Tensor:
    """(h − 1/(2β))² for each pair, h the difference of the two sides' log-ratios to the reference.

    Identity preference optimization, Azar et al. 2023, arXiv:2310.12036, eq. 17, whose τ is β here: each pair asks for
    a margin of 1/(2β) nats and for no more. Of summed log-probabilities it is the paper's; of averages over tokens it
    is TRL's `loss_type="ipo"`.

    Args:
        policy_chosen_B: (B,) log-probability of the chosen completion, nats. Likewise the others.
        beta: Strength of the tether, > 0. Larger asks for a smaller margin.

    Returns:
        (B,) ≥ 0, nats². 1/(4β²) where the policy equals the reference.

    Raises:
        ShapeError: The shapes differ.
    """
    _same_shape(policy_chosen_B, policy_rejected_B, reference_chosen_B, reference_rejected_B)
    margin_B = (policy_chosen_B - reference_chosen_B) - (policy_rejected_B - reference_rejected_B)
    return (margin_B - 1 / (2 * beta)).square()


def _same_shape(*tensors: Tensor) -> None:
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) != 1:
        raise ShapeError(f"log-probabilities of chosen and rejected differ in shape: {sorted(shapes)}")


def kto_loss(
    log_ratios_B: Tensor,
    labels_B: Tensor,
    reference_point: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Each row's loss under thumbs up and down.

    Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8: λ_D·(1 − σ(β(h − z₀))) for a thumb up, λ_U·(1 − σ(β(z₀ − h))) for a
    thumb down, h = log π(y|x) − log π_ref(y|x). TRL: `loss_type="kto"`.

    Args:
        log_ratios_B: (B,) h, nats.
        labels_B: (B,) bool, True is a thumb up.
        reference_point: z₀ ≥ 0, nats; no gradient flows through it.
        beta: Anchor to the reference, > 0.

    Returns:
        (B,) in [0, λ]. λ/2 where h = z₀.

    Raises:
        ShapeError: The shapes differ.
    """
    if log_ratios_B.shape != labels_B.shape:
        raise ShapeError(f"log-ratios have shape {tuple(log_ratios_B.shape)}, labels {tuple(labels_B.shape)}")
    gain_B = beta * (log_ratios_B - reference_point)
    up_B = desirable_weight * torch.sigmoid(-gain_B)
    down_B = undesirable_weight * torch.sigmoid(gain_B)
    return torch.where(labels_B, up_B, down_B)


def orpo_loss(chosen_mean_B: Tensor, rejected_mean_B: Tensor, *, beta: float) -> Tensor:
    """The odds-ratio term of ORPO; the likelihood term −chosen_mean stands beside it.

    Hong et al. 2024, arXiv:2403.07691, eq. 7: −λ·log σ(log odds(y_w) − log odds(y_l)), odds p = p/(1 − p).

    Args:
        chosen_mean_B, rejected_mean_B: (B,) log-probabilities averaged over tokens, < 0, nats a token.
        beta: λ, weight of the term.

    Returns:
        (B,) ≥ 0, nats. beta·log 2 for equal sides.
    """

    def log_odds(mean_B: Tensor) -> Tensor:
        return mean_B - torch.log1p(-mean_B.exp())

    return -beta * torch.nn.functional.logsigmoid(log_odds(chosen_mean_B) - log_odds(rejected_mean_B))


def simpo_loss(
    chosen_mean_B: Tensor, rejected_mean_B: Tensor, *, beta: float, gamma: float, label_smoothing: float = 0.0
) -> Tensor:
    """−log σ(β·(mean log π(y_w) − mean log π(y_l)) − γ), smoothed where labels are believed flipped.

    Meng et al. 2024, arXiv:2405.14734, eq. 6. TRL: CPOTrainer, `loss_type="simpo"`, `cpo_alpha=0`.

    Args:
        chosen_mean_B, rejected_mean_B: (B,) log-probabilities averaged over tokens, nats a token.
        beta: Scale, tokens a nat.
        gamma: Margin asked for.

    Returns:
        (B,) nats; log 2 where the margin is exactly gamma.
    """
    logit_B = beta * (chosen_mean_B - rejected_mean_B) - gamma
    right, flipped = torch.nn.functional.logsigmoid(logit_B), torch.nn.functional.logsigmoid(-logit_B)
    return -(1 - label_smoothing) * right - label_smoothing * flipped


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
