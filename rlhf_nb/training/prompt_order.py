"""Which prompt each completion of a run answers: passes over all prompts, or over each source of a mixture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class PromptOrder:
    """Prompt number g of a run is the same whatever came before it: a restart needs no state of it.

    Prompts are taken in passes, each pass in an order of its own. Of a mixture, after any number of prompts no source
    is more than one prompt away from its share.
    """

    def __init__(self, seed: int, sizes: Sequence[int], weights: Sequence[float] = (1.0,)) -> None:
        """
        Args:
            sizes: Prompts of each source, ≥ 1; their rows follow each other.
            weights: > 0, of each source. They are shares of the prompts, whatever the sizes.
        """
        self.seed, self.sizes = seed, list(sizes)
        self.starts = [sum(self.sizes[:i]) for i in range(len(self.sizes))]
        self.shares = np.array(weights, dtype=float) / sum(weights)
        self._taken = np.zeros(len(self.sizes), dtype=int)
        self._sources: list[tuple[int, int]] = []
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def __call__(self, first: int, n: int) -> list[int]:
        """Row numbers of prompts `first` … `first + n − 1` of the run."""
        return [self._row(g) for g in range(first, first + n)]

    def _row(self, g: int) -> int:
        source, at = (0, g) if len(self.sizes) == 1 else self._source(g)
        epoch, within = divmod(at, self.sizes[source])
        if (source, epoch) not in self._orders:
            key = [self.seed, epoch] if len(self.sizes) == 1 else [self.seed, epoch, source]
            self._orders[source, epoch] = np.random.default_rng(key).permutation(self.sizes[source])
        return self.starts[source] + int(self._orders[source, epoch][within])

    def _source(self, g: int) -> tuple[int, int]:
        """The source of prompt g, and how many prompts that source has given before."""
        while len(self._sources) <= g:
            # The source that is furthest behind its share.
            behind = self.shares * (len(self._sources) + 1) - self._taken
            source = int(behind.argmax())
            self._sources.append((source, int(self._taken[source])))
            self._taken[source] += 1
        return self._sources[g]
