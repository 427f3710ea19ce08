"""Losses on several ranked completions of a prompt: how a reward model is fitted to rankings.

K completions of a prompt, K ≥ 2. Each is scored once, whatever the number of comparisons that it is in.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, groupby

import torch
from torch import Tensor
from torch.nn import functional

from rlhf_nb.errors import ShapeError


def bradley_terry_rankings(
    scores_N: Tensor,
    better_C: Tensor,
    worse_C: Tensor,
    weights_C: Tensor,
    prompt_C: Tensor,
    n_prompts: int,
    *,
    margins_C: Tensor | None = None,
) -> Tensor:
    """Mean over a prompt's comparisons of −log σ(r_better − r_worse − margin), for each prompt.

    Ouyang et al. 2022, arXiv:2203.02155, eq. 1: 1 / (K choose 2) · Σ log σ over all comparisons of a prompt in one
    batch element. Comparisons as separate rows let one completion take K − 1 steps in an epoch, and overfit (§3.5).

    Args:
        scores_N: (N,) scores of the completions of all prompts, one after another.
        better_C, worse_C: (C,) places in `scores_N`.
        weights_C: (C,) what each comparison counts: 1, or ½ for either direction of a tie.
        prompt_C: (C,) which prompt it belongs to, 0 to n_prompts − 1.
        margins_C: (C,) how far apart the scores should be, as in Llama 2, arXiv:2307.09288, eq. 2.

    Returns:
        (n_prompts,) ≥ 0, nats; log 2 where all scores of a prompt are equal, 0 for a prompt without a comparison.

    Raises:
        ShapeError: The comparisons' shapes differ.
    """
    shapes = {tuple(t.shape) for t in (better_C, worse_C, weights_C, prompt_C)}
    if len(shapes) != 1 or scores_N.ndim != 1:
        raise ShapeError(f"scores have shape {tuple(scores_N.shape)}, parts of the comparisons {sorted(shapes)}")
    difference_C = scores_N[better_C] - scores_N[worse_C]
    losses_C = -functional.logsigmoid(difference_C if margins_C is None else difference_C - margins_C)
    return prompt_mean(losses_C, prompt_C, n_prompts, weights_C)


def prompt_mean(values_C: Tensor, prompt_C: Tensor, n_prompts: int, weights_C: Tensor | None = None) -> Tensor:
    """(n_prompts,) weighted mean of what belongs to each prompt; 0 for a prompt to which nothing does."""
    weights_C = torch.ones_like(values_C) if weights_C is None else weights_C
    totals_P = values_C.new_zeros(n_prompts).index_add(0, prompt_C, weights_C * values_C)
    counts_P = values_C.new_zeros(n_prompts).index_add(0, prompt_C, weights_C)
    return totals_P / counts_P.clamp(min=torch.finfo(counts_P.dtype).tiny)


def choices(ranks: Sequence[float]) -> tuple[list[list[int]], list[float]]:
    """The sets of completions that a Plackett-Luce ranking chooses from, and how often each.

    A ranking without ties chooses its best of K, the next of the K − 1 that are left, and so on. Of m tied completions
    the order is open: each of the sets that some order would leave counts its share of the m! orders.

    Returns:
        (S sets of places, S weights); the weights sum to K. At most 2^m − 1 sets for m tied completions.
    """
    order = sorted(range(len(ranks)), key=lambda place: ranks[place])
    sets: list[list[int]] = []
    weights: list[float] = []
    done = 0
    for _, tied in groupby(order, key=lambda place: ranks[place]):
        group = list(tied)
        done += len(group)
        for size in range(len(group), 0, -1):
            left = list(combinations(group, size))
            sets += [[*places, *order[done:]] for places in left]
            weights += [1 / len(left)] * len(left)
    return sets, weights


def plackett_luce_loss(scores_K: Tensor, ranks_K: Sequence[float]) -> Tensor:
    """−log of the probability of a whole ranking: of choosing its best, then the best of the rest, and so on.

    Plackett 1975 and Luce 1959: Π_k exp(r_k) / Σ_{j ≥ k} exp(r_j). Where completions tie, the mean of −log likelihood
    over all orders that the ties leave open; of two completions, ½ for either direction, as in Bradley-Terry.

    Args:
        scores_K: (K,) scores of one prompt's completions.
        ranks_K: K ranks, lower is better.

    Returns:
        Scalar ≥ 0, nats: log K! where all scores are equal. For K = 2, Bradley-Terry's loss.

    Raises:
        ShapeError: Not one rank for each score.
    """
    if scores_K.shape != (len(ranks_K),):
        raise ShapeError(f"{tuple(scores_K.shape)} scores for {len(ranks_K)} ranks")
    sets, weights = choices(ranks_K)
    open_SK = torch.zeros(len(sets), len(ranks_K), dtype=torch.bool)
    for row, places in enumerate(sets):
        open_SK[row, places] = True
    weights_S = scores_K.new_tensor(weights)
    left_SK = scores_K.expand(len(sets), -1).masked_fill(~open_SK.to(scores_K.device), -torch.inf)
    return (weights_S * torch.logsumexp(left_SK, 1)).sum() - scores_K.sum()


def length_slope(scores_N: Tensor, lengths_N: Tensor, prompt_N: Tensor, n_prompts: int) -> Tensor:
    """Slope of a straight line through scores against lengths, both as deviations from the mean of their prompt.

    What is the same for all completions of a prompt decides no preference, so it does not count. Chen et al. 2024,
    arXiv:2402.07319, hold down the correlation instead; its gradient grows without bound as scores draw together, as
    a new head's are, and a small model then learns nothing else.

    Args:
        scores_N, lengths_N: (N,) float.
        prompt_N: (N,) which prompt each belongs to.

    Returns:
        Scalar, score per unit of length; 0, with a zero gradient, where lengths do not differ within any prompt.
    """
    score_N, length_N = (within(each, prompt_N, n_prompts) for each in (scores_N, lengths_N))
    square = length_N.square().sum()
    return (score_N * length_N).sum() / square.clamp(min=torch.finfo(square.dtype).tiny)


def length_correlation(scores_N: Tensor, lengths_N: Tensor, prompt_N: Tensor, n_prompts: int) -> Tensor:
    """Pearson correlation of scores with lengths, both as deviations from the mean of their prompt.

    Args: as `length_slope`.

    Returns:
        Scalar in [−1, 1]; 0 where scores or lengths do not differ within any prompt.
    """
    score_N, length_N = (within(each, prompt_N, n_prompts) for each in (scores_N, lengths_N))
    square = score_N.square().sum() * length_N.square().sum()
    return (score_N * length_N).sum() * torch.rsqrt(square.clamp(min=torch.finfo(square.dtype).tiny))


def within(values_N: Tensor, prompt_N: Tensor, n_prompts: int) -> Tensor:
    """(N,) values less the mean of their prompt."""
    return values_N - prompt_mean(values_N, prompt_N, n_prompts)[prompt_N]
