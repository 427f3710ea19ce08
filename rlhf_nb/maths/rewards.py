"""From several scores of a completion to the one number that is optimised."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlhf_nb.errors import ShapeError

Combination = Literal["sum", "mean", "min", "mean_minus_std"]


def combine(scores_BM: Tensor, weights_M: Tensor, by: Combination = "sum", *, std_coef: float = 1.0) -> Tensor:
    """(B,) one score from M.

    Ensembles: Coste et al. 2024, arXiv:2310.02743, §3: mean, worst case and uncertainty-weighted (they subtract the
    variance, here it is the standard deviation, which is in units of score).

    Args:
        scores_BM: (B, M), a column for each reward.
        weights_M: (M,) each column is multiplied by its own first.
        by: sum; mean; min, the worst case; mean_minus_std, the mean less `std_coef` times the members' spread.
        std_coef: λ ≥ 0, for mean_minus_std. The spread is the population's: two members that differ by d have d/2.

    Raises:
        ShapeError: Not (B, M) with a weight for each column.
    """
    if scores_BM.ndim != 2 or weights_M.shape != scores_BM.shape[1:]:
        raise ShapeError(f"scores have shape {tuple(scores_BM.shape)} for {tuple(weights_M.shape)} weights")
    weighted_BM = scores_BM * weights_M
    if by == "sum":
        return weighted_BM.sum(1)
    if by == "min":
        return weighted_BM.amin(1)
    mean_B = weighted_BM.mean(1)
    return mean_B if by == "mean" else mean_B - std_coef * weighted_BM.std(1, correction=0)


def preference_as_reward(score_B: Tensor, reference_score_BR: Tensor) -> Tensor:
    """(B,) in (0, 1): how surely a completion is preferred to what the reference says to the same prompt.

    Preference As Reward, Fu et al. 2025, arXiv:2502.18770, eq. 4: the mean over R reference completions of
    σ(r(x, y) − r(x, y_ref)). Bounded, so that no completion can earn without end from a proxy's error.

    Raises:
        ShapeError: Not (B, R) reference scores with R ≥ 1.
    """
    if reference_score_BR.ndim != 2 or len(reference_score_BR) != len(score_B) or not reference_score_BR.shape[1]:
        raise ShapeError(f"reference scores have shape {tuple(reference_score_BR.shape)} for {len(score_B)} scores")
    return torch.sigmoid(score_B[:, None] - reference_score_BR).mean(1)


def overlong_penalty(lengths_B: Tensor, *, limit: int, cache: int) -> Tensor:
    """DAPO's soft overlong punishment: 0 up to limit − cache tokens, then falling linearly to −1 at the limit.

    Yu et al. 2025, arXiv:2503.14476, eq. 13.

    Args:
        lengths_B: (B,) tokens of each completion.
        limit: Tokens a completion may have.
        cache: Tokens before the limit in which the punishment grows; 1 ≤ cache ≤ limit.

    Returns:
        (B,) float, in [−1, 0].

    Raises:
        ShapeError: The cache does not fit the limit.
    """
    if not 1 <= cache <= limit:
        raise ShapeError(f"cache={cache} tokens before a limit of {limit}: it is between 1 and the limit")
    over_B = lengths_B.to(torch.float32) - (limit - cache)
    return -(over_B / cache).clamp(0.0, 1.0)
