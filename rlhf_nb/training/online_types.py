"""What passes between the loop of online methods and a method: a rollout, the credit it earns, a minibatch, losses.

Shapes: B completions, P prompt tokens, T completion tokens, L = P + T, M parts of the reward, R reference completions.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol

from torch import Tensor


class Live(Protocol):
    """Live coefficients as they are now, by name."""

    def __getattr__(self, name: str) -> float: ...

    def __setattr__(self, name: str, value: float) -> None: ...


@dataclass(frozen=True)
class Read:
    """Completions, and what the models said of their tokens when they were sampled."""

    tokens_BL: Tensor  # noqa: N815
    """(B, P + T) prompts padded on the left, completions on the right."""
    attention_mask_BL: Tensor  # noqa: N815
    mask_BT: Tensor  # noqa: N815
    """(B, T) bool: completion tokens that count, the end token with them."""
    behavior_logprobs_BT: Tensor  # noqa: N815
    reference_logprobs_BT: Tensor  # noqa: N815
    values_BT: Tensor  # noqa: N815
    sampler_logprobs_BT: Tensor  # noqa: N815
    """As the sampler gave them. Where `importance_cap` is given, `behavior_logprobs_BT` are the trainer's own of the
    same tokens instead."""


@dataclass(frozen=True)
class Rollout(Read):
    """Completions of all ranks, in the order of their global rows. Tensors lie on this rank's device."""

    score_B: Tensor  # noqa: N815
    """(B,) as the reward gave it."""
    gold_B: Tensor | None  # noqa: N815
    ended_B: Tensor  # noqa: N815
    temperature: float
    parts_BM: Tensor | None = None  # noqa: N815
    """(B, M) scores by each part of a combined reward, before weights."""
    reference_score_BR: Tensor | None = None  # noqa: N815
    """(B, R) scores of what the reference said to the same prompt."""
    drawn: Drawn | None = None
    """Where groups were replaced by others: all that was sampled, to be told what the policy does."""
    score_shift: float = 0.0
    """Mean of the scores so far, where they are normalised."""
    score_spread: float = 1.0
    """Their standard deviation."""


@dataclass(frozen=True)
class Drawn:
    score_B: Tensor  # noqa: N815
    """Of every completion, those that were replaced with them."""
    gold_B: Tensor | None  # noqa: N815
    replaced: int
    """Groups that gave way to those of other prompts."""
    left: int
    """Groups from which nothing can be learnt, when the budget was spent."""


@dataclass(frozen=True)
class Credit:
    total_B: Tensor  # noqa: N815
    """(B,) what is optimised, summed over a completion: score, penalties and KL."""
    advantages_BT: Tensor  # noqa: N815
    returns_BT: Tensor  # noqa: N815


@dataclass(frozen=True)
class Minibatch(Read):
    """This rank's rows of one optimizer step."""

    advantages_BT: Tensor  # noqa: N815
    returns_BT: Tensor  # noqa: N815

    def rows(self, index: Tensor) -> Minibatch:
        return Minibatch(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def trimmed(self) -> Minibatch:
        """Without the columns in which no row has a token."""
        T = self.mask_BT.shape[1]
        P = self.tokens_BL.shape[1] - T
        first = int(self.attention_mask_BL[:, :P].any(0).long().argmax())
        last = int(self.mask_BT.any(0).long().sum())
        cut = {name: getattr(self, name)[:, first : P + last] for name in ("tokens_BL", "attention_mask_BL")}
        rest = {f.name: getattr(self, f.name)[:, :last] for f in fields(self) if f.name.endswith("_BT")}
        return Minibatch(**cut, **rest)


@dataclass(frozen=True)
class Extent:
    """Of a minibatch over all ranks."""

    tokens: int
    """Completion tokens that count."""
    completions: int


@dataclass(frozen=True)
class Outputs:
    """What the models say now of a minibatch's tokens."""

    logprobs_BT: Tensor  # noqa: N815
    entropy_BT: Tensor  # noqa: N815
    values_BT: Tensor  # noqa: N815


@dataclass(frozen=True)
class TokenLosses:
    loss_BT: Tensor  # noqa: N815
    """Its sum over the global minibatch, divided by the method's `normaliser`, is minimised."""
    metrics: dict[str, Tensor]
    """Name → (B, T); the mean over the global minibatch's tokens is logged."""
