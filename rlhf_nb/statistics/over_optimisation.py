"""How reward goes with the distance from the reference: the two forms of Gao, Schulman and Hilton 2023,
arXiv:2210.10760, §3.

    reinforcement learning   R(d) = d·(a − b·log d)    highest at d* = exp(a/b − 1), where R = b·d*
    best-of-n                R(d) = d·(a − b·d)        highest at d* = a/(2b),       where R = a²/(4b)

d = √KL(π‖π_ref), √nats; R is the reward less the reference's, so that R(0) = 0. Both are linear in a and b: ordinary
least squares finds them, and there is nothing to start or to tune.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from rlhf_nb.errors import DataError, ShapeError
from rlhf_nb.statistics.intervals import Estimate, Interval

Form = Literal["reinforcement_learning", "best_of_n"]
FEWEST_POINTS = 3
"""Two points determine a and b, and leave nothing to be wrong about."""


@dataclass(frozen=True)
class Peak:
    distance: float
    """d*, √nats."""
    reward: float
    """R(d*), unit of the reward, above the reference's."""


@dataclass(frozen=True)
class Fit:
    form: Form
    a: float
    """Reward per √nat at the start (best-of-n) or at d = 1 (reinforcement learning)."""
    b: float
    """How fast it bends down. At 0 or below nothing bends down."""
    residual: float
    """Root mean square of what the fit leaves, unit of the reward."""
    n: int
    nearest: float
    furthest: float
    """The smallest and the largest d that were fitted, √nats: what lies outside is extrapolated."""

    def reward(self, distance: ArrayLike) -> np.ndarray:
        """R(d), shape of `distance`; 0 at d = 0."""
        d = np.asarray(distance, dtype=float)
        return _design(np.where(d > 0, d, 1.0), self.form) @ (self.a, self.b) * (d > 0)

    @property
    def peak(self) -> Peak | None:
        """Where the reward is highest; None where the form has no peak at d > 0, see `no_peak`."""
        if self.no_peak:
            return None
        try:
            d = math.exp(self.a / self.b - 1) if self.form == "reinforcement_learning" else self.a / (2 * self.b)
        except OverflowError:
            d = math.inf
        return Peak(d, float(self.b * d if self.form == "reinforcement_learning" else self.a * d / 2))

    @property
    def no_peak(self) -> str:
        """Why there is none; empty where there is one."""
        if self.b <= 0:
            return f"no peak: b={self.b:.3g} is not above 0, the reward does not bend down"
        if self.form == "best_of_n" and self.a <= 0:
            return f"no peak: a={self.a:.3g} is not above 0, the reward falls from the start"
        return ""

    @property
    def peak_within(self) -> bool:
        """Whether there is a peak, and it lies among the points that were fitted."""
        return self.peak is not None and self.nearest <= self.peak.distance <= self.furthest

    def __str__(self) -> str:
        law = "d·(a − b·log d)" if self.form == "reinforcement_learning" else "d·(a − b·d)"
        peak = self.no_peak or f"d*={self.peak.distance:.3g}, R(d*)={self.peak.reward:.3g}"  # type: ignore[union-attr]
        outside = " (outside the data)" if self.peak is not None and not self.peak_within else ""
        return f"R = {law}, a={self.a:.3g}, b={self.b:.3g}, n={self.n}; {peak}{outside}"


@dataclass(frozen=True)
class FitOverSeeds:
    """One fit to the points of all seeds, with percentile intervals that resample whole seeds.

    Of S seeds there are only (2S−1)!/(S!(S−1)!) different resamples, 126 for five, and such an interval is too narrow:
    read it as a lower bound on the uncertainty.
    """

    fit: Fit
    a: Estimate
    b: Estimate
    peak_distance: Estimate | None
    """d*, √nats. A resample that never bends down counts as a peak at infinity. None where the fit has no peak."""
    peak_reward: Estimate | None
    without_peak: float
    """Share of resamples that have no peak."""


def fit(distance: ArrayLike, reward: ArrayLike, form: Form) -> Fit:
    """Least squares over points.

    Args:
        distance: (N,) √KL to the reference, √nats, above 0: at 0 both forms are 0 whatever a and b.
        reward: (N,) less the reference's, any unit.
        form: Which of the two.

    Raises:
        ShapeError: Other shapes than (N,) and (N,), fewer than 3 points, or all at one distance.
        DataError: A distance that is not above 0, or a number that is not finite.
    """
    d, r = np.asarray(distance, dtype=float), np.asarray(reward, dtype=float)
    if d.ndim != 1 or d.shape != r.shape:
        raise ShapeError(f"distances {d.shape} and rewards {r.shape}: a fit needs (N,) of both")
    if len(d) < FEWEST_POINTS:
        raise ShapeError(f"{len(d)} points: a and b need at least {FEWEST_POINTS} to be more than an interpolation")
    for name, values in (("distance", d), ("reward", r)):
        if not np.isfinite(values).all():
            raise DataError(f"{name} {int(np.flatnonzero(~np.isfinite(values))[0])} is not finite; leave it out")
    if (d <= 0).any():
        at = int(np.flatnonzero(d <= 0)[0])
        raise DataError(f"distance {at} is {d[at]:g}: the fits begin above 0; leave the reference itself out")
    if np.ptp(d) <= 1e-9 * d.max():
        raise ShapeError(f"all {len(d)} points lie at d={d[0]:g}: a and b cannot be told apart; give other distances")
    x = _design(d, form)
    (a, b), *_ = np.linalg.lstsq(x, r, rcond=None)
    residual = float(np.sqrt(np.mean((r - x @ (a, b)) ** 2)))
    return Fit(form, float(a), float(b), residual, len(d), float(d.min()), float(d.max()))


def fit_over_seeds(
    curves: Sequence[tuple[ArrayLike, ArrayLike]],
    form: Form,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> FitOverSeeds:
    """One fit to the points of all seeds, and what it would have been with other seeds.

    Args:
        curves: Of each seed its (distance, reward), as `fit` takes them.

    Raises:
        ShapeError: Fewer than 2 seeds, or as `fit`.
        DataError: As `fit`.
    """
    if len(curves) < 2:
        raise ShapeError(f"{len(curves)} seeds: an interval over seeds needs at least 2")
    points = [(np.asarray(d, dtype=float), np.asarray(r, dtype=float)) for d, r in curves]
    whole = fit(*_pooled(points), form)
    rng = np.random.default_rng(seed)
    drawn = [
        fit(*_pooled([points[index] for index in indices]), form)
        for indices in rng.integers(0, len(points), (resamples, len(points)))
    ]

    def interval(values: list[float]) -> Interval:
        # inverted_cdf takes values that were drawn: between a number and infinity there is nothing to interpolate.
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
        return Interval(float(low), float(high), level)

    peak_distance = peak_reward = None
    if whole.peak is not None:
        peaks = [one.peak or Peak(0.0, 0.0) if one.b > 0 else Peak(math.inf, math.inf) for one in drawn]
        peak_distance = Estimate(whole.peak.distance, interval([peak.distance for peak in peaks]), len(points))
        peak_reward = Estimate(whole.peak.reward, interval([peak.reward for peak in peaks]), len(points))
    return FitOverSeeds(
        fit=whole,
        a=Estimate(whole.a, interval([one.a for one in drawn]), len(points)),
        b=Estimate(whole.b, interval([one.b for one in drawn]), len(points)),
        peak_distance=peak_distance,
        peak_reward=peak_reward,
        without_peak=sum(one.peak is None for one in drawn) / len(drawn),
    )


def _design(d: np.ndarray, form: Form) -> np.ndarray:
    """(…, 2): what a and b are multiplied by."""
    if form not in ("reinforcement_learning", "best_of_n"):
        raise DataError(f'form "{form}" is unknown; reinforcement_learning or best_of_n')
    return np.stack([d, -d * np.log(d) if form == "reinforcement_learning" else -d * d], axis=-1)


def _pooled(points: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([d for d, _ in points]), np.concatenate([r for _, r in points])
