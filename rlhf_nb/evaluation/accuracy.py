"""Accuracy of a reward model on pairs it was not trained on.

Rows     prompt, chosen, rejected.
Models   the reward model, frozen.
Result   share of pairs in which the chosen completion scores higher, a tie counting one half, with Wilson's 95 %
         interval; beside it the null that any length-biased model reaches: always pick the longer text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from rlhf_nb.methods.base import LiveCoefficient, Method, Trainer
from rlhf_nb.protocol.events import Result

if TYPE_CHECKING:
    from rlhf_nb.training.context import Context

CHUNK = 64
"""Pairs scored between two looks at control and two words on progress."""


class Evaluate(Method):
    """Measure how often a reward model agrees with the people who chose."""

    name: ClassVar[str] = "evaluate"
    title: ClassVar[str] = "Reward model accuracy"
    rows: ClassVar[str] = "pairs"
    trains: ClassVar[bool] = False
    live: ClassVar[tuple[LiveCoefficient, ...]] = ()

    batch_size: int = Field(16, gt=0)
    """Texts scored at once."""

    def build_trainer(self, context: Context) -> Trainer:
        return Evaluator(self, context)


class Evaluator:
    step = 0

    def __init__(self, method: Evaluate, context: Context) -> None:
        from rlhf_nb.rewards.ensemble import load_reward_model

        self.context = context
        device = "cpu" if context.use_cpu else "cuda"
        path = context.model_path(context.spec.policy)
        self.scorer = load_reward_model(path, device=device, emit=context.emit, batch_size=method.batch_size)

    def train(self) -> None:
        """Score both sides of every pair on rank 0 and emit the result."""
        rows, control = self.context.rows, self.context.control
        control.bind([])
        scores: dict[str, list[float]] = {"chosen": [], "rejected": []}
        for start in range(0, len(rows), CHUNK):
            control.boundary(1)
            if control.stopping:
                return
            if not self.context.is_main:
                continue
            chunk = rows[start : start + CHUNK]
            self.context.emit.stage(f"scoring pairs {start + 1} to {start + len(chunk)} of {len(rows)}")
            prompts = [row["prompt"] for row in chunk]
            for side, found in scores.items():
                found += self.scorer.score(prompts, [row[side] for row in chunk])
        if self.context.is_main:
            self.context.emit.event(accuracy(rows, scores["chosen"], scores["rejected"]))

    def save_model(self, directory: str) -> None:
        raise TypeError("an evaluation saves no model")


def accuracy(rows: list[dict[str, Any]], chosen_scores: list[float], rejected_scores: list[float]) -> Result:
    """The result of scores already taken, pair by pair."""
    from rlhf_nb.statistics.accuracy import pick_the_longer, preference_accuracy

    found = preference_accuracy(chosen_scores, rejected_scores)
    longer = pick_the_longer([row["chosen"] for row in rows], [row["rejected"] for row in rows])
    margins = [c - r for c, r in zip(chosen_scores, rejected_scores, strict=True)]
    return Result(
        name="accuracy",
        value=found.value,
        interval=(found.interval.low, found.interval.high),
        n=found.n,
        detail={
            "longer_accuracy": longer.value,
            "longer_interval": (longer.interval.low, longer.interval.high),
            "ties": sum(margin == 0 for margin in margins),
            "margin_mean": sum(margins) / len(margins),
        },
    )
