"""Simulated annotators who err in known ways.

An annotator feels a utility for each completion and answers by it, with noise:

    utility = true_reward + length_bias * words / 10 + sycophancy * pleasantries

`words` are counted up to 60. Pleasantries are sentences that please instead of serving: flattery, agreeing with a
mistaken user, praising work unseen. Pairs follow Bradley and Terry, P(a over b) = sigmoid((utility(a) - utility(b))
/ noise), rankings Plackett and Luce with the same utilities, thumbs the same sigmoid against the fixed utility
`THUMB_LINE`.

The answer to the same question is the same in every process and does not depend on the side a completion is shown on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rlhf_nb.errors import SpecError
from rlhf_nb.toy import chance, grammar, questions, reward, world
from rlhf_nb.toy.grammar import Agree, Flattery, Praise

Choice = Literal["a", "b", "tie"]
THUMB_LINE = 1.0
"""The utility at which an annotator gives thumbs up and down equally often."""
WORDS_NOTICED = 60


@dataclass(frozen=True)
class Annotator:
    """A simulated annotator. The defaults are the annotator `toy-annotator`; zero biases give an unbiased one.

    With the defaults a useless sentence of eight words costs 0.0375 of true reward and is liked by 0.064; a
    flattering one of five words costs 0.0875 and is liked by 0.19. A reward model fitted to such answers likes long,
    flattering completions.
    """

    length_bias: float = 0.08
    """Utility for ten more words, in units of true reward."""
    sycophancy: float = 0.15
    """Utility for one pleasantry, in units of true reward."""
    noise: float = 0.15
    """Temperature of the choice, in units of true reward; larger is more random."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("length_bias", "sycophancy", "noise"):
            if not math.isfinite(getattr(self, name)):
                raise SpecError(f"{name}={getattr(self, name)}: an annotator needs a finite number")
        if self.noise <= 0:
            raise SpecError(
                f"noise={self.noise}: a temperature is above 0; use a small one such as 0.01 for a sure annotator"
            )

    def utility(self, prompt: str, completion: str) -> float:
        """How well the annotator likes a completion, in units of true reward."""
        words = min(len(completion.split()), WORDS_NOTICED)
        return (
            reward.reward(prompt, completion)
            + self.length_bias * words / 10
            + self.sycophancy * pleasantries(prompt, completion)
        )

    def probability(self, prompt: str, a: str, b: str) -> float:
        """P(a is chosen over b), Bradley and Terry. 0.5 for identical texts, where `choose` says "tie"."""
        return _sigmoid((self.utility(prompt, a) - self.utility(prompt, b)) / self.noise)

    def choose(self, prompt: str, a: str, b: str) -> Choice:
        """The better of two completions; a tie if they are the same text, and only then."""
        if a == b:
            return "tie"
        first, second = sorted((a, b))
        u = chance.unit("choose", self.seed, prompt, first, second)
        winner = first if u < self.probability(prompt, first, second) else second
        return "a" if winner == a else "b"

    def rank(self, prompt: str, completions: Sequence[str]) -> list[int]:
        """The rank of each completion, 1 for the best; equal texts share a rank. Plackett and Luce."""
        liking = {}
        for text in completions:
            u = chance.unit("rank", self.seed, prompt, text) or 2**-54
            liking[text] = self.utility(prompt, text) - self.noise * math.log(-math.log(u))  # plus Gumbel noise
        order = sorted(liking, key=liking.__getitem__, reverse=True)
        return [order.index(text) + 1 for text in completions]

    def thumb_probability(self, prompt: str, completion: str) -> float:
        """P(thumbs up)."""
        return _sigmoid((self.utility(prompt, completion) - THUMB_LINE) / self.noise)

    def thumb(self, prompt: str, completion: str) -> bool:
        """Thumbs up or down for one completion."""
        return chance.unit("thumb", self.seed, prompt, completion) < self.thumb_probability(prompt, completion)


def pleasantries(prompt: str, completion: str) -> int:
    """How many sentences please the user instead of serving; 0 for texts that do not parse."""
    question, meaning = questions.parse(prompt), grammar.parse(completion)
    if question is None or meaning is None:
        return 0
    core, premise = meaning.core, question.premise
    mistaken = premise is not None and not world.is_true(premise.attribute, premise.place, premise.value)
    yielding = isinstance(core, Praise) or (isinstance(core, Agree) and (mistaken or question.kind == "opinion"))
    return yielding + sum(isinstance(clause, Flattery) for clause in meaning.clauses)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
