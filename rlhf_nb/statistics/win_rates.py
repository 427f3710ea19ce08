"""How often one policy's completion is preferred to another's."""

from __future__ import annotations

from rlhf_nb.errors import ShapeError
from rlhf_nb.statistics.intervals import Estimate, wilson


def win_rate(wins: int, losses: int, ties: int = 0, *, level: float = 0.95) -> Estimate:
    """Share of comparisons won, a tie counting one half, with Wilson's interval over all comparisons.

    A tie varies less than a win or a loss does, so with ties the interval covers more than `level`.

    Raises:
        ShapeError: no comparison, or a negative count.
    """
    if min(wins, losses, ties) < 0:
        raise ShapeError(f"wins={wins}, losses={losses}, ties={ties}: counts cannot be negative")
    n = wins + losses + ties
    if n == 0:
        raise ShapeError("0 comparisons: a win rate needs at least 1 answered pair that is not a skip")
    score = wins + ties / 2
    return Estimate(score / n, wilson(score, n, level), n)
