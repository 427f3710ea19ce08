"""What a ranking says about every two of its completions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Literal

Comparison = tuple[int, int, float]
"""Places of the better and of the worse completion, and what the comparison counts."""
Ties = Literal["half", "leave_out"]


def comparisons(ranks: Sequence[float], ties: Ties = "half") -> list[Comparison]:
    """Every two places of a ranking, better first: K(K − 1)/2 of a ranking without ties.

    Args:
        ranks: Lower is better; equal ranks are ties.
        ties: half: a tie counts one half in either direction, so that it draws two scores together. leave_out: only
            strict comparisons.
    """
    found: list[Comparison] = []
    for i, j in combinations(range(len(ranks)), 2):
        if ranks[i] != ranks[j]:
            found.append((i, j, 1.0) if ranks[i] < ranks[j] else (j, i, 1.0))
        elif ties == "half":
            found += [(i, j, 0.5), (j, i, 0.5)]
    return found


def is_strict(ranks: Sequence[float]) -> bool:
    """Whether any completion is better than another."""
    return len(set(ranks)) > 1


def best_places(ranks: Sequence[float]) -> list[int]:
    """Places that nothing is better than: one, or several that tie."""
    return [place for place, rank in enumerate(ranks) if rank == min(ranks)]


def worst_places(ranks: Sequence[float]) -> list[int]:
    """Places that nothing is worse than: one, or several that tie."""
    return [place for place, rank in enumerate(ranks) if rank == max(ranks)]
