"""Intervals for what was estimated from few labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import beta, norm
from scipy.stats import t as student

from rlhf_nb.errors import ShapeError


@dataclass(frozen=True)
class Interval:
    """`low` to `high`, covering the true value in a share `level` of repetitions."""

    low: float
    high: float
    level: float = 0.95

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return f"[{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Estimate:
    """A value, its interval and how many observations it rests on."""

    value: float
    interval: Interval
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f} {self.interval} n={self.n:,}"


def wilson(successes: float, n: int, level: float = 0.95) -> Interval:
    """Wilson's score interval of a share. Wilson 1927; Brown, Cai and DasGupta 2001 recommend it for small n.

    Args:
        successes: 0 to n. May be fractional, when ties count one half: the interval is then wider than it need be.
        n: trials.

    Raises:
        ShapeError: n = 0, where no share exists, or successes outside 0 to n.
    """
    _check(successes, n, level)
    z2 = float(norm.ppf(0.5 + level / 2)) ** 2
    share = successes / n
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    # At 0 and n the bound is 0 or 1 exactly; floating point misses it by 1e-17.
    low = 0.0 if successes == 0 else float(centre - half)
    high = 1.0 if successes == n else float(centre + half)
    return Interval(low, high, level)


def clopper_pearson(successes: int, n: int, level: float = 0.95) -> Interval:
    """The exact interval of a share: never covers less than `level`, and often more. Clopper and Pearson 1934.

    Raises:
        ShapeError: n = 0, successes outside 0 to n, or not a whole number.
    """
    _check(successes, n, level)
    if successes != int(successes):
        raise ShapeError(f"successes={successes}: the exact interval needs a whole number; with half ties use wilson")
    tail = (1 - level) / 2
    low = 0.0 if successes == 0 else float(beta.ppf(tail, successes, n - successes + 1))
    high = 1.0 if successes == n else float(beta.ppf(1 - tail, successes + 1, n - successes))
    return Interval(low, high, level)


def mean(values: Sequence[float], *, level: float = 0.95) -> Estimate:
    """Mean of few values, one a seed, with Student's t interval (1908): exact where they are normal.

    Args:
        values: (N,), any unit.

    Raises:
        ShapeError: Fewer than 2 values, which have no spread, or one that is not finite.
    """
    found = np.asarray(values, dtype=float)
    if found.size < 2 or not np.isfinite(found).all():
        raise ShapeError(f"values={list(values)}: an interval of a mean needs at least 2 finite values")
    centre = float(found.mean())
    half = float(student.ppf(0.5 + level / 2, found.size - 1) * found.std(ddof=1) / np.sqrt(found.size))
    return Estimate(centre, Interval(centre - half, centre + half, level), found.size)


def paired_difference(
    one: Sequence[float], other: Sequence[float], *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Estimate:
    """Mean of `one - other` over the same items, with a percentile bootstrap interval that resamples items.

    Args:
        one, other: (N,) scores of two systems on the same items.

    Raises:
        ShapeError: lengths differ, or there are no items.
    """
    difference = np.asarray(one, dtype=float) - np.asarray(other, dtype=float) if len(one) == len(other) else None
    if difference is None or difference.size == 0:
        raise ShapeError(
            f"{len(one)} and {len(other)} scores: a paired difference needs the same items of both, at least 1"
        )
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    # In slices: resamples x N indices at once would be 8 GB for 100,000 items.
    size = max(1, 5_000_000 // difference.size)
    for start in range(0, resamples, size):
        count = min(size, resamples - start)
        means[start : start + count] = difference[rng.integers(0, difference.size, (count, difference.size))].mean(
            axis=1
        )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(difference.mean()), Interval(float(low), float(high), level), difference.size)


def _check(successes: float, n: int, level: float) -> None:
    if n < 1:
        raise ShapeError(f"n={n}: a share needs at least 1 observation")
    if not 0 <= successes <= n:
        raise ShapeError(f"successes={successes} lies outside 0 to n={n}")
    if not 0 < level < 1:
        raise ShapeError(f"level={level} lies outside 0 to 1; 0.95 is usual")
