"""What every rollout backend takes and gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Completions:
    """Sampled completions, padded on the right to the longest of them."""

    tokens_BT: Tensor  # noqa: N815
    """(B, T) int; what stands after a row's end does not count."""
    mask_BT: Tensor  # noqa: N815
    """(B, T) bool; the end token counts, whatever the pad token is."""
    behavior_logprobs_BT: Tensor  # noqa: N815
    """(B, T) nats, under the policy and at the temperature that sampled; 0 outside the mask."""
    ended_B: Tensor  # noqa: N815
    """(B,) bool: ended by an end token, not cut at the limit."""
    values_BT: Tensor | None = None  # noqa: N815
    """(B, T) of the value head, before each token, where the sampler read it on its way; 0 outside the mask."""


class Sampler(Protocol):
    end_tokens: list[int]

    def refresh(self, version: int) -> None:
        """Before sampling: have the policy's weights of now. They are the same for the same version."""
        ...

    def close(self) -> None:
        """Give back what is held outside the trainer."""
        ...

    def sample(self, prompts: Sequence[Sequence[int]], uniforms_BT: np.ndarray, *, temperature: float) -> Completions:
        """One completion of each prompt.

        Args:
            prompts: Token ids, at least one each.
            uniforms_BT: (B, max_new_tokens) in [0, 1): all the chance there is. Token t of row b is the inverse of its
                distribution's cumulative sum at `uniforms_BT[b, t]`.
            temperature: > 0.
        """
        ...


def uniforms(seed: int, stream: int, rows: Sequence[int], positions: int) -> np.ndarray:
    """(rows, positions) uniform numbers, each keyed by (seed, stream, row, position).

    Philox is a counter: a row's numbers are the same whichever rank draws them and whatever was drawn before. Salmon
    et al. 2011, doi:10.1145/2063384.2063405.

    Args:
        stream: Which rollout, or another number below 2⁶⁴ for chance that must not meet a rollout's.
        rows: Global row numbers.
    """
    drawn = np.empty((len(rows), positions))
    for index, row in enumerate(rows):
        generator = np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, row, 0]))
        drawn[index] = generator.random(positions)
    return drawn
