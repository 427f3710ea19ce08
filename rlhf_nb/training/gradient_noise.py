"""How much of a gradient is signal: the agreement of minibatches that saw different completions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

COORDINATES = 1 << 16


class GradientNoise:
    """Signal-to-noise ratio ‖G‖²/tr(Σ) of a minibatch's gradient: G its expectation, Σ its covariance.

    Two minibatches of one pass are independent draws at nearly the same weights, so that E⟨g₁, g₂⟩ = ‖G‖² and
    E‖g‖² = ‖G‖² + tr(Σ). McCandlish et al. 2018, arXiv:1812.06162, call 1/ratio the noise scale in minibatches. It is
    read off a fixed sample of coordinates, so that no second copy of the gradient is held.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], coordinates: int = COORDINATES) -> None:
        self.parameters = list(parameters)
        total = sum(p.numel() for p in self.parameters)
        chance = torch.Generator().manual_seed(0)
        share = min(1.0, coordinates / max(1, total))
        self._indices = [
            torch.randint(p.numel(), (max(1, round(share * p.numel())),), generator=chance).to(p.device)
            for p in self.parameters
        ]
        self._before: Tensor | None = None
        self._dots: list[float] = []
        self._squares: list[float] = []

    def new_pass(self) -> None:
        """A pass over the same completions begins: its gradients are not independent of the last one's."""
        self._before = None

    def add(self) -> None:
        """Look at the gradient that is there now."""
        if not self.parameters:
            return
        now = torch.cat(
            [
                (p.grad.flatten()[index] if p.grad is not None else torch.zeros(len(index), device=p.device)).float()
                for p, index in zip(self.parameters, self._indices, strict=True)
            ]
        )
        if self._before is not None:
            self._dots.append(torch.dot(now, self._before).item())
            self._squares.append((now.square().sum() + self._before.square().sum()).item() / 2)
        self._before = now

    def take(self) -> float | None:
        """The ratio over all pairs since the last call, ≥ 0; None where there was no pair, or no noise in it."""
        dots, squares = self._dots, self._squares
        self._dots, self._squares, self._before = [], [], None
        if not dots:
            return None
        signal, noise = max(0.0, sum(dots) / len(dots)), sum(squares) / len(squares)
        return signal / (noise - signal) if noise > signal else None
