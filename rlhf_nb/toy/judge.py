"""A judge of the toy world who errs in known ways: what an AI labeller does, with the truth beside it.

It answers by principle. Under one of the toy constitution's four, its utility of a completion is that quality of the
true reward plus the annotator's own biases (`annotators`); without a principle it is the annotator's utility. The
completion shown first gains `position_bias` on top, so that verdicts between near equals change with the order:

    P(first is better) = sigmoid((utility(first) - utility(second) + position_bias) / noise)

It draws no lots: the verdict is whichever is likelier. Its revisions (`reviser`) know the town and have no bias.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from rlhf_nb.errors import SpecError, did_you_mean
from rlhf_nb.feedback.constitution import Principle
from rlhf_nb.feedback.judge import Comparison, Grade, Grading, Revising, Revision, Verdict
from rlhf_nb.toy import reviser, reward
from rlhf_nb.toy.annotators import WORDS_NOTICED, pleasantries

ASKED = hashlib.sha256(b"toy-annotator, which reads no words").hexdigest()


@dataclass(frozen=True)
class ToyJudge:
    """The defaults are the judge `toy-annotator`: the annotator's biases, and a liking for what it reads first."""

    length_bias: float = 0.08
    """Utility for ten more words."""
    sycophancy: float = 0.15
    """Utility for one pleasantry."""
    position_bias: float = 0.05
    """Utility for being shown first."""
    noise: float = 0.15
    """Temperature of the probability; larger is less sure."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if not math.isfinite(getattr(self, field.name)):
                raise SpecError(f"judge toy-annotator: {field.name}={getattr(self, field.name)}: give a finite number")
        if self.noise <= 0:
            raise SpecError(f"judge toy-annotator: noise={self.noise}: a temperature is above 0")

    instant: ClassVar[bool] = True

    @classmethod
    def create(cls, **config: float) -> ToyJudge:
        """From loose knobs.

        Raises:
            SpecError: No such knob, or a value that it cannot have.
        """
        known = [field.name for field in fields(cls)]
        for name in config:
            if name not in known:
                raise SpecError(
                    f"judge toy-annotator: no knob {name}{did_you_mean(name, known)}  known: {', '.join(known)}"
                )
        return cls(**config)

    @property
    def name(self) -> str:
        changed = [f"{f.name}={getattr(self, f.name):g}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"toy-annotator({', '.join(changed)})" if changed else "toy-annotator"

    @property
    def prompt_hash(self) -> str:
        return ASKED

    @staticmethod
    def require(principles: Sequence[Principle]) -> None:
        """
        Raises:
            SpecError: One of the principles is none of the toy world's.
        """
        for principle in principles:
            if principle.name not in reward.WEIGHTS:
                raise SpecError(
                    f'judge toy-annotator: it knows the principles {", ".join(reward.WEIGHTS)}, and "{principle.name}" '
                    f"is none of them"
                )

    def utility(self, prompt: Any, completion: str, principle: Principle | None = None) -> float:
        """How well it likes a completion under a principle, in units of true reward.

        Raises:
            SpecError: The principle is none of the toy world's.
        """
        asked = reward.text_of(prompt, role="user")
        words = min(len(completion.split()), WORDS_NOTICED)
        biases = self.length_bias * words / 10 + self.sycophancy * pleasantries(asked, completion)
        if principle is None:
            return reward.reward(asked, completion) + biases
        self.require((principle,))
        return reward.quality_scores(asked, completion)[principle.name] + biases

    def compare(self, asked: Sequence[Comparison]) -> Iterator[tuple[int, Verdict]]:
        for index, each in enumerate(asked):
            one, other = (self.utility(each.prompt, text, each.principle) for text in (each.first, each.second))
            edge = one - other + self.position_bias
            choice = "tie" if edge == 0 else "first" if edge > 0 else "second"
            yield index, Verdict(choice, 1 / (1 + math.exp(-max(min(edge / self.noise, 500), -500))))

    def grade(self, asked: Sequence[Grading]) -> Iterator[tuple[int, Grade]]:
        for index, each in enumerate(asked):
            liking = self.utility(each.prompt, each.completion, each.principle)
            yield index, Grade(1 + 4 * min(max(liking, 0.0), 1.0))

    def revise(self, asked: Sequence[Revising]) -> Iterator[tuple[int, Revision]]:
        for index, each in enumerate(asked):
            self.require((each.principle,))
            prompt = reward.text_of(each.prompt, role="user")
            yield index, Revision(*reviser.revise(prompt, each.completion, each.principle.name))

    def close(self) -> None:
        """It holds nothing."""
