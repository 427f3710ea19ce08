"""Which prompt each completion of a run answers: of those that fit, in passes over all or over each source of a mix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_nb.errors import DataError, SpecError
from rlhf_nb.training import data

if TYPE_CHECKING:
    from rlhf_nb.training.context import Context


@dataclass(frozen=True)
class Fitting:
    """Prompts that leave room for a completion."""

    room: int
    """Tokens that a prompt may have."""
    kept: list[int]
    """Their numbers among the run's rows."""
    ids: list[list[int]]
    """Their tokens."""
    order: PromptOrder
    """Over the kept ones."""


def prompts_that_fit(context: Context, tokenizer: Any, max_length: int) -> Fitting:
    """The run's prompts without those that are empty or leave no room for a completion; these are counted and said.

    Args:
        max_length: Tokens of prompt and completion together.

    Raises:
        SpecError: No prompt could fit.
        DataError: None fits, or none of a part of the mixture.
    """
    method: Any = context.method
    room = max_length - method.max_new_tokens
    if room < 1:
        raise SpecError(
            f"{method.name}: max_new_tokens={method.max_new_tokens} leaves no room for a prompt in {max_length} "
            f"tokens; lower it"
        )
    ids = [data.prompt_ids(row["prompt"], tokenizer) for row in context.rows]
    fits = [0 < len(tokens) <= room for tokens in ids]
    kept = [index for index, fit in enumerate(fits) if fit]
    if not kept:
        raise DataError(
            f"{method.name}: none of {len(ids)} prompts has between 1 and {room} tokens, what max_length={max_length} "
            f"leaves beside max_new_tokens={method.max_new_tokens}"
        )
    if dropped := len(ids) - len(kept):
        context.emit.notice(
            "prompts_dropped",
            f"{dropped} of {len(ids)} prompts are empty or longer than {room} tokens and were dropped",
            "warning",
        )
    sizes, weights, first = [], [], 0
    for count, weight in context.mixture or ((len(ids), 1.0),):
        sizes.append(sum(fits[first : first + count]))
        weights.append(weight)
        first += count
    if not all(sizes):
        raise DataError(f"{method.name}: a part of the mixture has no prompt of at most {room} tokens; leave it out")
    return Fitting(room, kept, [ids[index] for index in kept], PromptOrder(method.seed, sizes, weights))


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
