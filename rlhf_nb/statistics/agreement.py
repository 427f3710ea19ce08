"""Do annotators agree more than chance would have them?"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np

from rlhf_nb.errors import ShapeError


def percent_agreement(one: Sequence[Hashable], other: Sequence[Hashable]) -> float:
    """Share of items, 0 to 1, that two annotators labelled alike.

    Raises:
        ShapeError: lengths differ or are 0.
    """
    _same_length(one, other)
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)


def cohen_kappa(one: Sequence[Hashable], other: Sequence[Hashable]) -> float:
    """Cohen's kappa of two annotators. Cohen 1960.

    Returns:
        1 for full agreement, 0 for what chance gives; NaN when both used one and the same category throughout.

    Raises:
        ShapeError: lengths differ or are 0.
    """
    observed = percent_agreement(one, other)
    n = len(one)
    expected = sum(_count(one, c) * _count(other, c) for c in set(one) | set(other)) / n**2
    return _above_chance(observed, expected)


def fleiss_kappa(counts: Sequence[Sequence[int]]) -> float:
    """Fleiss' kappa of several annotators. Fleiss 1971.

    Args:
        counts: (N, C): how many annotators gave item n the category c. Every row has the same sum, at least 2.

    Returns:
        As `cohen_kappa`; for two annotators it is Scott's pi, a little lower than Cohen's.

    Raises:
        ShapeError: rows sum differently, or to less than 2.
    """
    table, raters = _table(counts)
    shares = table.sum(axis=0) / table.sum()
    return _above_chance(_item_agreement(table, raters), float((shares**2).sum()))


def free_marginal_kappa(counts: Sequence[Sequence[int]]) -> float:
    """Randolph's kappa: chance is one in C, whatever was used. Randolph 2005. Arguments as `fleiss_kappa`."""
    table, raters = _table(counts)
    return _above_chance(_item_agreement(table, raters), 1 / table.shape[1])


def category_counts(ratings: Sequence[Sequence[Hashable]]) -> np.ndarray:
    """(N, C) counts of (N, raters) labels, for `fleiss_kappa`. Categories in sorted order of their text."""
    categories = sorted({label for row in ratings for label in row}, key=str)
    return np.array([[sum(label == c for label in row) for c in categories] for row in ratings])


def krippendorff_alpha(
    ratings: Sequence[Sequence[float | None]], level: Literal["nominal", "ordinal", "interval"] = "nominal"
) -> float:
    """Krippendorff's alpha: any number of annotators, each of whom may have skipped items. Krippendorff 2011.

    Args:
        ratings: (raters, N) numbers; None where a rater gave none. Numbers serve as names when `level` is nominal.

    Returns:
        1 for full agreement, 0 for chance; NaN when only one value occurs.

    Raises:
        ShapeError: no item has two labels.
    """
    columns = [[v for v in column if v is not None] for column in zip(*ratings, strict=True)]
    columns = [column for column in columns if len(column) >= 2]
    if not columns:
        raise ShapeError("no item has labels from two annotators; agreement does not exist")
    values = sorted({v for column in columns for v in column})
    index = {v: i for i, v in enumerate(values)}
    coincidences = np.zeros((len(values), len(values)))
    for column in columns:
        found = np.bincount([index[v] for v in column], minlength=len(values)).astype(float)
        coincidences += (np.outer(found, found) - np.diag(found)) / (len(column) - 1)
    totals = coincidences.sum(axis=0)
    distance = _distances(np.array(values, dtype=float), totals, level)
    chance = (np.outer(totals, totals) - np.diag(totals)) / (totals.sum() - 1)
    expected = float((chance * distance).sum())
    return float("nan") if expected == 0 else 1 - float((coincidences * distance).sum()) / expected


def _distances(values: np.ndarray, totals: np.ndarray, level: str) -> np.ndarray:
    if level == "nominal":
        return 1.0 - np.eye(len(values))
    if level == "interval":
        return (values[:, None] - values[None, :]) ** 2
    if level != "ordinal":
        raise ShapeError(f"level={level!r}: use nominal, ordinal or interval")
    # The rank in the middle of each value's labels.
    middles = np.cumsum(totals) - totals / 2
    return (middles[:, None] - middles[None, :]) ** 2


def _above_chance(observed: float, expected: float) -> float:
    return float("nan") if expected >= 1 else (observed - expected) / (1 - expected)


def _item_agreement(table: np.ndarray, raters: int) -> float:
    return float((((table**2).sum(axis=1) - raters) / (raters * (raters - 1))).mean())


def _table(counts: Sequence[Sequence[int]]) -> tuple[np.ndarray, int]:
    table = np.asarray(counts, dtype=float)
    if table.ndim != 2 or table.size == 0:
        raise ShapeError(f"counts has shape {table.shape}; (items, categories) is needed")
    sums = set(table.sum(axis=1).tolist())
    if len(sums) != 1 or min(sums) < 2:
        raise ShapeError(
            f"items have {sorted(sums)[:4]} labels; each needs as many, at least 2 (see krippendorff_alpha)"
        )
    return table, int(sums.pop())


def _same_length(one: Sequence[Hashable], other: Sequence[Hashable]) -> None:
    if len(one) != len(other) or not one:
        raise ShapeError(
            f"{len(one)} and {len(other)} labels: agreement needs the same items from both, and at least 1"
        )


def _count(labels: Sequence[Hashable], category: Hashable) -> int:
    return sum(label == category for label in labels)
