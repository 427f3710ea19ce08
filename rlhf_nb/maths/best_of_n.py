"""Best-of-n: draw n completions, keep the one with the highest score. Its policy in closed form."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_nb.errors import ShapeError


def best_of_n(logprobs_N: Tensor, scores_N: Tensor, n: int) -> Tensor:
    """log-probability of each outcome under best-of-n of a base policy over N outcomes.

    The best of n is at most s with probability F(s)ⁿ, F the base's probability of a score of at most s; outcomes of one
    score share what falls to it as the base shares it, which is what taking the first of the best does.

    Args:
        logprobs_N: (…, N) of the base policy, summing to one.
        scores_N: (…, N).
        n: ≥ 1.

    Returns:
        (…, N) nats.

    Raises:
        ShapeError: The shapes differ.
    """
    if logprobs_N.shape != scores_N.shape:
        raise ShapeError(f"log-probabilities {tuple(logprobs_N.shape)} for scores {tuple(scores_N.shape)}")
    if n < 1:
        raise ValueError(f"n={n}: best of how many? give n ≥ 1")
    probs_N = logprobs_N.exp()
    other, mine = scores_N.unsqueeze(-2), scores_N.unsqueeze(-1)
    at_most_N = (probs_N.unsqueeze(-2) * (other <= mine)).sum(-1).clamp(max=1)
    below_N = (probs_N.unsqueeze(-2) * (other < mine)).sum(-1)
    level_N = at_most_N - below_N
    return (at_most_N**n - below_N**n).log() + logprobs_N - level_N.log()


def kl_bound(n: int) -> float:
    """log n − (n − 1)/n, nats: the most that best-of-n may be away from its base, reached where no two outcomes tie and
    none is likely. An upper bound, not the KL: Beirami et al. 2024, arXiv:2401.01879."""
    return math.log(n) - (n - 1) / n


def win_rate(policy_logprobs_N: Tensor, base_logprobs_N: Tensor, scores_N: Tensor) -> Tensor:
    """(…) chance that a draw of the policy scores higher than a draw of the base, a tie counting half."""
    higher = scores_N.unsqueeze(-1) > scores_N.unsqueeze(-2)
    level = scores_N.unsqueeze(-1) == scores_N.unsqueeze(-2)
    wins_NN = higher.to(base_logprobs_N.dtype) + 0.5 * level.to(base_logprobs_N.dtype)
    return torch.einsum("...i,...ij,...j->...", policy_logprobs_N.exp(), wins_NN, base_logprobs_N.exp())
