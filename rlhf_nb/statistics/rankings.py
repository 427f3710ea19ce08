"""Strengths of a handful of items from who was preferred to whom: tabular Bradley-Terry and Plackett-Luce fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from rlhf_nb.errors import ShapeError

TOLERANCE = 1e-12


def fit_bradley_terry(
    wins_II: Sequence[Sequence[float]] | np.ndarray, ties_II: Sequence[Sequence[float]] | np.ndarray | None = None
) -> np.ndarray:
    """Maximum-likelihood strengths θ with P(i beats j) = σ(θ_i − θ_j). Bradley and Terry 1952.

    Args:
        wins_II: (I, I): how often item i was preferred to item j. Weighted comparisons need not be whole numbers.
        ties_II: (I, I): how often i and j tied, counted once for the two (in either place, or split over both); a tie
            is half a win for either.

    Returns:
        (I,) log strengths, nats, with mean 0.

    Raises:
        ShapeError: Not square, negative or not finite; or no maximum exists (see `check_connected`).
    """
    wins = _square(wins_II, "wins")
    if ties_II is not None:
        ties = _square(ties_II, "ties")
        if ties.shape != wins.shape:
            raise ShapeError(f"wins have shape {wins.shape} and ties {ties.shape}")
        wins = wins + (ties + ties.T) / 2
    np.fill_diagonal(wins, 0.0)
    check_connected(wins)
    met = wins + wins.T
    won = wins.sum(1)

    def chances(strengths: np.ndarray) -> np.ndarray:
        return (met / (strengths[:, None] + strengths[None, :])).sum(1)

    return _minorise_maximise(won, chances)


def fit_plackett_luce(
    rankings: Sequence[Sequence[int]], n_items: int, weights: Sequence[float] | None = None
) -> np.ndarray:
    """Maximum-likelihood strengths from rankings of some or all of the items. Plackett 1975; Luce 1959.

    Args:
        rankings: Each a list of item numbers, 0 to n_items − 1, best first, without repeats. A ranking of two is a
            comparison, so that pairs alone give Bradley-Terry.
        weights: What each ranking counts; 1 where left out.

    Returns:
        (n_items,) log strengths, nats, with mean 0.

    Raises:
        ShapeError: An item that is not there or twice in a ranking; or no maximum exists (see `check_connected`).
    """
    weight_R = np.ones(len(rankings)) if weights is None else np.asarray(weights, dtype=float)
    if weight_R.shape != (len(rankings),) or not np.isfinite(weight_R).all() or (weight_R < 0).any():
        raise ShapeError(f"{len(rankings)} rankings need as many finite weights ≥ 0; got {weight_R.tolist()[:8]}")
    beaten = np.zeros((n_items, n_items))
    won = np.zeros(n_items)
    stages: list[np.ndarray] = []
    stage_weights: list[float] = []
    for number, (ranking, weight) in enumerate(zip(rankings, weight_R, strict=True)):
        items = np.asarray(ranking, dtype=int)
        if len(set(items.tolist())) != len(items) or (len(items) and not 0 <= items.min() <= items.max() < n_items):
            raise ShapeError(f"ranking {number}: {list(ranking)} names an item twice or one outside 0 to {n_items - 1}")
        for place in range(len(items) - 1):
            won[items[place]] += weight
            beaten[items[place], items[place + 1 :]] += weight
            stages.append(items[place:])
            stage_weights.append(float(weight))
    check_connected(beaten)
    member_SI = np.zeros((len(stages), n_items))
    for row, items in enumerate(stages):
        member_SI[row, items] = 1.0
    weight_S = np.asarray(stage_weights)

    def chances(strengths: np.ndarray) -> np.ndarray:
        return member_SI.T @ (weight_S / (member_SI @ strengths))

    return _minorise_maximise(won, chances)


def check_connected(wins_II: np.ndarray) -> None:
    """Refuse comparisons under which no finite strengths are the most likely ones. Ford 1957.

    However the items are split in two, each side must have won against the other; else one side's strengths grow
    without end (it never lost) or cannot be placed (the sides never met).

    Raises:
        ShapeError: It names the items of the side that never lost, or that never met the others.
    """
    n = len(wins_II)
    if n < 2:
        raise ShapeError(f"{n} items: strengths are relative, so that at least 2 are needed")
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import connected_components

    graph = csr_matrix(wins_II > 0)
    pieces, weak = connected_components(graph, directed=True, connection="weak")
    if pieces > 1:
        alone = np.flatnonzero(weak == weak[0]) if (weak == weak[0]).sum() <= n / 2 else np.flatnonzero(weak != weak[0])
        raise ShapeError(
            f"items {_named(alone)} were never compared with the others: their strengths have no common scale; fit "
            f"them apart, or compare across"
        )
    pieces, strong = connected_components(graph, directed=True, connection="strong")
    if pieces > 1:
        lost = np.zeros(pieces, dtype=bool)
        for winner, loser in zip(*np.nonzero(wins_II > 0), strict=True):
            if strong[winner] != strong[loser]:
                lost[strong[loser]] = True
        unbeaten = np.flatnonzero(strong == int(np.flatnonzero(~lost)[0]))
        raise ShapeError(
            f"items {_named(unbeaten)} never lost to the others: no finite strength is the most likely; leave them "
            f"out, or add comparisons (half a win either way for each pair is a common prior)"
        )


def _minorise_maximise(
    won_I: np.ndarray, chances: Callable[[np.ndarray], np.ndarray], most: int = 100_000
) -> np.ndarray:
    """Hunter 2004, Annals of Statistics 32: each strength becomes wins / chances; the likelihood never falls."""
    strengths = np.ones(len(won_I))
    for _ in range(most):
        new = won_I / chances(strengths)
        new /= np.exp(np.log(new).mean())
        done = np.abs(np.log(new) - np.log(strengths)).max() < TOLERANCE
        strengths = new
        if done:
            break
    else:
        raise ShapeError(f"strengths still moved after {most:,} rounds: some item lost almost never; see its wins")
    return np.log(strengths)


def _square(counts: Sequence[Sequence[float]] | np.ndarray, what: str) -> np.ndarray:
    found = np.array(counts, dtype=float)
    if found.ndim != 2 or found.shape[0] != found.shape[1]:
        raise ShapeError(f"{what} have shape {found.shape}; one row and one column an item are needed")
    if not np.isfinite(found).all() or (found < 0).any():
        raise ShapeError(f"{what} hold a count that is negative or not finite")
    return found


def _named(items: np.ndarray, most: int = 8) -> str:
    shown = ", ".join(map(str, items[:most]))
    return shown + (f" and {len(items) - most} more" if len(items) > most else "")
