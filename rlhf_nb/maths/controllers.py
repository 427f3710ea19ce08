"""What adjusts itself between rollouts: the KL controller, and the moments of the scores so far."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor


def adapted_kl_coef(
    kl_coef: float, kl: float, *, target: float, completions: int, horizon: float, low: float = 1e-4, high: float = 10.0
) -> float:
    """The next β of a proportional controller in log space.

    Ziegler et al. 2019, arXiv:1909.08593, §2.2: e = clip(KL/target − 1, −0.2, 0.2), β ← β·(1 + e·completions/horizon).

    Args:
        kl_coef: β that the measured completions were sampled under, score per nat.
        kl: Measured KL to the reference, nats a completion.
        target: Wanted KL, nats a completion, > 0.
        completions: How many were measured.
        horizon: Completions over which a lasting error of one is corrected e-fold.
        low, high: Bounds of what is returned.

    Returns:
        β for the next rollout, within [low, high].
    """
    error = min(0.2, max(-0.2, kl / target - 1)) if math.isfinite(kl) else 0.2
    return min(high, max(low, kl_coef * (1 + error * completions / horizon)))


class RunningMoments:
    """Mean and standard deviation of all values so far.

    Chan et al. 1983: parts are combined without a second pass, so that how they were cut changes nothing but rounding.
    """

    def __init__(self) -> None:
        self.count, self.mean, self._squares = 0, 0.0, 0.0

    def add(self, values: Tensor) -> None:
        """Values of all ranks, any shape; those that are not finite are left out."""
        kept = values.detach().double().flatten()
        kept = kept[kept.isfinite()]
        n = len(kept)
        if n == 0:
            return
        mean = kept.mean().item()
        squares = (kept - mean).square().sum().item()
        total, shift = self.count + n, mean - self.mean
        self._squares += squares + shift**2 * self.count * n / total
        self.mean += shift * n / total
        self.count = total

    @property
    def spread(self) -> float:
        """Sample standard deviation; 1 where there is none yet, so that dividing by it changes nothing."""
        spread = math.sqrt(self._squares / (self.count - 1)) if self.count > 1 else 0.0
        return spread if spread > 1e-8 else 1.0

    def state(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean, "squares": self._squares}

    def load(self, state: dict[str, Any] | None) -> None:
        if state is not None:
            self.count, self.mean, self._squares = state["count"], state["mean"], state["squares"]
