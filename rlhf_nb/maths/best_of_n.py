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


def best_of_n_mean(scores_PN: Tensor, values_PN: Tensor, n: int) -> Tensor:
    """(P,) mean value of what best-of-n keeps, from N samples of the base policy for each prompt.

    The mean over all subsets of n of the N samples, without drawing any: unbiased for every n ≤ N. Nakano et al. 2021,
    arXiv:2112.09332, appendix I. Of completions of one score each is kept as often as the others.

    Args:
        scores_PN: (P, N) what is maximised.
        values_PN: (P, N) what is reported: the same scores, or the true reward of the same completions.
        n: 1 to N.

    Raises:
        ShapeError: The shapes differ, or n is outside 1 to N: more than all there is cannot be told without bias.
    """
    if scores_PN.shape != values_PN.shape:
        raise ShapeError(f"scores {tuple(scores_PN.shape)} and values {tuple(values_PN.shape)} differ")
    N = scores_PN.shape[-1]
    if not 1 <= n <= N:
        raise ShapeError(f"n={n}: of {N} samples a prompt the best of 1 to {N} can be told")
    # Share of the subsets of n that lie within the m lowest samples; whole numbers, so that nothing overflows.
    within = torch.tensor([math.comb(m, n) / math.comb(N, n) for m in range(N + 1)], dtype=torch.float64)
    other, mine = scores_PN.unsqueeze(-2), scores_PN.unsqueeze(-1)
    at_most_PN = (other <= mine).sum(-1)
    below_PN = (other < mine).sum(-1)
    weights_PN = (within[at_most_PN] - within[below_PN]) / (at_most_PN - below_PN)
    return (weights_PN * values_PN.double()).sum(-1)


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
