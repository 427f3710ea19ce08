"""How much of a gradient is signal: the agreement of minibatches that saw different completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from rlhf_nb.training import sharding

COORDINATES = 1 << 16


class GradientNoise:
    """Signal-to-noise ratio ‖G‖²/tr(Σ) of a minibatch's gradient: G its expectation, Σ its covariance.

    Two minibatches of one pass are independent draws at nearly the same weights, so that E⟨g₁, g₂⟩ = ‖G‖² and
    E‖g‖² = ‖G‖² + tr(Σ). McCandlish et al. 2018, arXiv:1812.06162, call 1/ratio the noise scale in minibatches. It is
    read off a fixed sample of coordinates, so that no second copy of the gradient is held. Where gradients are sharded,
    each rank reads those of them that it holds.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        coordinates: int = COORDINATES,
        total: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """
        Args:
            parameters: All that train; sharded ones as they are sharded.
            total: Adds up a tensor over the ranks among which they are sharded.
        """
        self.parameters, self._total = list(parameters), total
        chance = torch.Generator().manual_seed(0)
        share = min(1.0, coordinates / max(1, sum(p.numel() for p in self.parameters)))
        drawn = [torch.randint(p.numel(), (max(1, round(share * p.numel())),), generator=chance) for p in parameters]
        self._indices = [
            index[(first <= index) & (index < last)].to(p.device) - first
            for p, index in zip(self.parameters, drawn, strict=True)
            for first, last in [sharding.held(p)]
        ]
        self._before: Tensor | None = None
        self._pairs: list[Tensor] = []

    def new_pass(self) -> None:
        """A pass over the same completions begins: its gradients are not independent of the last one's."""
        self._before = None

    def add(self) -> None:
        """Look at the gradient that is there now."""
        if not self.parameters:
            return
        gradients = (sharding.part(p.grad) if p.grad is not None else None for p in self.parameters)
        now = torch.cat(
            [
                g.flatten()[index].float() if g is not None else torch.zeros(len(index), device=index.device)
                for g, index in zip(gradients, self._indices, strict=True)
            ]
        )
        if self._before is not None:
            squares = (now.square().sum() + self._before.square().sum()) / 2
            self._pairs.append(torch.stack([torch.dot(now, self._before), squares]).double())
        self._before = now

    def take(self) -> float | None:
        """The ratio over all pairs since the last call, ≥ 0; None where there was no pair, or no noise in it.

        Ranks that share gradients call it together.
        """
        pairs, self._pairs, self._before = self._pairs, [], None
        if not pairs:
            return None
        means = torch.stack(pairs).mean(0)
        dot, noise = (means if self._total is None else self._total(means)).tolist()
        signal = max(0.0, dot)
        return signal / (noise - signal) if noise > signal else None
