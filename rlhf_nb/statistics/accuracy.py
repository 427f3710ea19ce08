"""Accuracy of a preference model on held-out pairs, and the null it has to beat."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from rlhf_nb.errors import ShapeError
from rlhf_nb.statistics.intervals import Estimate, wilson


def preference_accuracy(
    chosen_scores: Sequence[float], rejected_scores: Sequence[float], *, level: float = 0.95
) -> Estimate:
    """Share of pairs in which the chosen completion scores higher; equal scores count one half.

    Args:
        chosen_scores, rejected_scores: (N,) finite scores of the same pairs.

    Raises:
        ShapeError: lengths differ, there are no pairs, or a score is not finite.
    """
    return _mean(preference_hits(chosen_scores, rejected_scores), level)


def preference_hits(chosen_scores: Sequence[float], rejected_scores: Sequence[float]) -> np.ndarray:
    """(N,) 1 where the chosen completion scores higher, 0.5 where both score the same, else 0."""
    chosen, rejected = np.asarray(chosen_scores, dtype=float), np.asarray(rejected_scores, dtype=float)
    if chosen.shape != rejected.shape or chosen.ndim != 1 or chosen.size == 0:
        raise ShapeError(
            f"{chosen.shape} chosen and {rejected.shape} rejected scores: 1 of each is needed for every pair"
        )
    if not (np.isfinite(chosen).all() and np.isfinite(rejected).all()):
        bad = int(np.flatnonzero(~(np.isfinite(chosen) & np.isfinite(rejected)))[0])
        raise ShapeError(f"pair {bad} has a score that is not finite; accuracy over it does not exist")
    return (np.sign(chosen - rejected) + 1) / 2


def pick_the_longer(chosen: Iterable[str], rejected: Iterable[str], *, level: float = 0.95) -> Estimate:
    """Accuracy of always preferring the longer text, in characters; equal lengths count one half.

    A reward model that does not clearly beat this (or its complement, where people preferred the shorter) may have
    learned length alone.
    """
    return preference_accuracy([len(text) for text in chosen], [len(text) for text in rejected], level=level)


def _mean(hits: np.ndarray, level: float) -> Estimate:
    score = float(hits.sum())
    return Estimate(score / hits.size, wilson(score, hits.size, level), int(hits.size))
