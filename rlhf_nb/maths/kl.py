"""Divergence of the policy from its reference, in nats: exact over a vocabulary, or estimated from sampled tokens.

Estimators after Schulman 2020, http://joschu.net/blog/kl-approx.html, for samples of the policy π and d = log π − log
π_ref:

    k1 = d                unbiased, can be negative        k2 = d²/2     biased by O(d³), never negative
    k3 = e^{−d} − 1 + d   unbiased, never negative

They agree as *measurements*. As *penalties* they do not: k1 in the reward leads to the optimum π_ref·exp(r/β); the
gradient of k1 in the loss is zero on average, and plain k3 in the loss leads to the forward-KL optimum
(tests/fidelity).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlhf_nb.errors import ShapeError

Estimator = Literal["k1", "k2", "k3"]


def estimate(policy_logprobs: Tensor, reference_logprobs: Tensor, estimator: Estimator = "k1") -> Tensor:
    """Per-token estimate of KL(π ‖ π_ref) at tokens that π sampled.

    Args:
        policy_logprobs: Any shape, nats.
        reference_logprobs: Same shape, nats, of the same tokens at the same temperature.

    Returns:
        Same shape, nats. Its expectation under π is the KL for k1 and k3; for k2 nearly, while π is near π_ref.

    Raises:
        ShapeError: The shapes differ.
    """
    if policy_logprobs.shape != reference_logprobs.shape:
        raise ShapeError(
            f"policy log-probabilities have shape {tuple(policy_logprobs.shape)}, "
            f"the reference's {tuple(reference_logprobs.shape)}"
        )
    difference = policy_logprobs - reference_logprobs
    match estimator:
        case "k1":
            return difference
        case "k2":
            return difference.square() / 2
        case "k3":
            return torch.expm1(-difference) + difference
    raise ValueError(f'estimator "{estimator}" is none of k1, k2, k3')


def exact(policy_logprobs_V: Tensor, reference_logprobs_V: Tensor) -> Tensor:
    """KL(π ‖ π_ref) = Σ_v π(v)·(log π(v) − log π_ref(v)), over the last dimension.

    Args:
        policy_logprobs_V: (..., V) normalised log-probabilities, nats. −inf where π is zero adds nothing.
        reference_logprobs_V: (..., V).

    Returns:
        (...), nats, ≥ 0; inf where π puts mass on what the reference never gives.

    Raises:
        ShapeError: The shapes differ.
    """
    if policy_logprobs_V.shape != reference_logprobs_V.shape:
        raise ShapeError(f"shapes {tuple(policy_logprobs_V.shape)} and {tuple(reference_logprobs_V.shape)} differ")
    probability = policy_logprobs_V.exp()
    terms = probability * (policy_logprobs_V - reference_logprobs_V)
    return torch.where(probability > 0, terms, 0.0).sum(-1)


def gibbs(reference_logprobs_N: Tensor, rewards_N: Tensor, kl_coef: float) -> Tensor:
    """log π*, the policy that maximises E[r] − β·KL(π ‖ π_ref): π* ∝ π_ref·exp(r/β).

    Ziegler et al. 2019, arXiv:1909.08593, eq. 2; Korbak et al. 2022, arXiv:2205.11275.

    Args:
        reference_logprobs_N: (..., N) over all completions of a prompt, nats.
        rewards_N: (..., N).
        kl_coef: β > 0, reward per nat.

    Returns:
        (..., N), normalised over the last dimension.
    """
    if kl_coef <= 0:
        raise ValueError(
            f"kl_coef={kl_coef}: without a tether the optimum is the best completion alone; give kl_coef > 0"
        )
    return torch.log_softmax(reference_logprobs_N + rewards_N / kl_coef, dim=-1)
