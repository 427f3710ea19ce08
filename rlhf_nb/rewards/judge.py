"""A judge's grade as a reward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rlhf_nb.errors import RewardError
from rlhf_nb.protocol.spec import judge_ref

if TYPE_CHECKING:
    from rlhf_nb.feedback.judge import Judge
    from rlhf_nb.training.context import Context

UNANSWERED_AT_MOST = 0.5


def judge(
    prompts: Sequence[Any], completions: Sequence[str], *, judge: dict, principle: str = "", ask: str = "letter"
) -> list[float]:
    """The grade of each completion, from 1 to 5, brought to [0, 1]. The registered reward `judge`.

    Where the judge gives log-probabilities it is the mean over the grades' probabilities (Liu et al. 2023,
    arXiv:2303.16634). A completion without a grade (a refusal, a time-out, rambling) gets the mean of its batch, which
    moves a centred advantage least, and is counted in the run's log.

    Args:
        judge: Who grades. Written `judge(model="...")`, or `judge(url="...", model="...", token_env="...")`.
        principle: What is graded, as a question; empty asks how well the completion serves.
        ask: letter or reasons, as for the judge verb.

    Raises:
        RewardError: More than half of a batch has no grade.
    """
    raise RewardError(
        "reward judge: it is opened beside the accelerator; give it to a run as --reward 'judge(model=...)'"
    )


def opened(context: Context, config: dict[str, Any]) -> Callable[..., list[float]]:
    """The reward of a run, with its judge open."""
    from rlhf_nb.feedback.constitution import Principle
    from rlhf_nb.feedback.opening import open_judge

    who = open_judge(context, judge_ref(config["judge"]), ask=config["ask"], journal=False)
    words = config["principle"]
    return grading(who, Principle(name=words, preference=words) if words else None, say=context.emit.notice)


def grading(who: Judge, principle: Any, *, say: Callable[..., None]) -> Callable[..., list[float]]:
    """f(prompts, completions) → scores in [0, 1].

    Args:
        principle: A `Principle`, or None.
        say: Takes a code, a text and a level: what is missing is said there.
    """
    from rlhf_nb.feedback.judge import Grading, all_of

    def score(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        asked = [Grading(prompt, text, principle) for prompt, text in zip(prompts, completions, strict=True)]
        grades = all_of(who.grade(asked), len(asked))
        there = [grade.score for grade in grades if grade.score is not None]
        missing = Counter(grade.failure.replace("_", " ") for grade in grades if grade.score is None)
        if missing:
            causes = ", ".join(f"{n} {cause}" for cause, n in missing.items())
            text = f"judge {who.name}: {missing.total()} of {len(grades)} completions got no grade ({causes})"
            if missing.total() > UNANSWERED_AT_MOST * len(grades):
                details = next((grade.detail for grade in grades if grade.detail), "")
                raise RewardError(
                    f"{text}{': ' if details else ''}{details}; try the judge on a few rows first: %rlhf judge"
                )
            say("judge_unanswered", f"{text}; they get the mean of the others", "warning")
        mean = fmean(there) if there else 0.0
        return [mean if grade.score is None else grade.score for grade in grades]

    return score


judge.open = opened  # type: ignore[attr-defined]
