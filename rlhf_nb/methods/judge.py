"""AI labels: a judge says which of two completions is better, under a principle.

Paper    Bai et al. 2022, arXiv:2212.08073 §4; both orders as in Zheng et al. 2023, arXiv:2306.05685.
Rows     pairs, whose labels are set aside and compared with; completions and rankings, two by two.
Models   the judge, frozen.
Result   pairs in which both orders prefer `chosen`, each with its principle, judge and prompt; ties, flips and failures
         counted; the agreement with labels that were there before.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from rlhf_nb.data.conversions import about_completions
from rlhf_nb.errors import ComputeError, SpecError
from rlhf_nb.feedback.constitution import Constitution, Principle, draw
from rlhf_nb.methods.base import LiveCoefficient, Method, Trainer
from rlhf_nb.protocol.events import Result
from rlhf_nb.protocol.spec import describe

if TYPE_CHECKING:
    from rlhf_nb.data.rows import Row
    from rlhf_nb.feedback.judge import Comparison, Judge, Outcome
    from rlhf_nb.protocol.spec import RunSpec
    from rlhf_nb.training.context import Context
    from rlhf_nb.training.row_job import Made

FLIPS_SAID = 1 / 3
"""Share of pairs that flip with the order above which the run says so: there the place decides more than the text."""
UNANSWERED_SAID = 0.1
SILENT = 8
"""Questions without an answer, one after the other, that mean that the judge is gone."""


class JudgePairs(Method):
    """Label pairs with a judge, in both orders, and keep what it decides as a data set."""

    name: ClassVar[str] = "judge"
    title: ClassVar[str] = "AI labels"
    paper: ClassVar[str] = "arXiv:2212.08073"
    rows: ClassVar[str] = "pairs"
    also: ClassVar[tuple[str, ...]] = ("completions", "rankings")
    trains: ClassVar[bool] = False
    makes: ClassVar[str] = "pairs"
    live: ClassVar[tuple[LiveCoefficient, ...]] = ()

    constitution: Constitution | None = None
    """The principles it judges by; None asks which completion serves better."""
    principles: Literal["drawn", "each"] = "drawn"
    """drawn: every pair under one principle, drawn by its content (arXiv:2212.08073 §4.1). each: under every one, a row
    each."""
    ask: Literal["letter", "reasons"] = "letter"
    """letter: the judge answers A or B, read from log-probabilities where it gives them. reasons: it reasons first."""
    min_preference: float = Field(0.5, ge=0.5, lt=1)
    """Labels that the judge is less sure of are left out: of two completions that a principle does not tell apart it
    prefers one all the same, by its habits. For judges that give probabilities."""
    judge_tokens: int = Field(512, gt=0)
    """Longest reasoning of a chat model."""
    batch_size: int = Field(32, gt=0)
    """Rows judged together."""

    def check(self, spec: RunSpec) -> None:
        if spec.judge is None:
            raise SpecError("judge: no judge; give judge=, a chat model or rl.Endpoint(url, model=...)")
        if self.constitution is not None:
            self.constitution.saying("preference")

    def build_trainer(self, context: Context) -> Trainer:
        from rlhf_nb.feedback.job import JudgedJob
        from rlhf_nb.feedback.opening import open_judge

        assert context.spec.judge is not None
        return JudgedJob(
            PairJudge(self, context, open_judge(context, context.spec.judge, ask=self.ask, tokens=self.judge_tokens)),
            context,
        )


class PairJudge:
    def __init__(self, method: JudgePairs, context: Context, judge: Judge) -> None:
        self.method, self.context, self.judge = method, context, judge
        self.chunk = method.batch_size

    def make(self, start: int, rows: Sequence[Row]) -> Made:
        from rlhf_nb.feedback.judge import Comparison

        asked: list[tuple[Row, Comparison, str | None]] = []
        for row in rows:
            for a, b, better in candidates(row):
                for principle in self._principles(row["prompt"], a, b):
                    asked.append((row, Comparison(row["prompt"], a, b, principle), better))
        return judged(self.judge, asked, self.method.constitution, self.method.min_preference)

    def _principles(self, *key: Any) -> tuple[Principle | None, ...]:
        if self.method.constitution is None:
            return (None,)
        there = self.method.constitution.saying("preference")
        return there if self.method.principles == "each" else (draw(there, self.method.seed, *key),)

    def finish(self, made: Made) -> Made:
        report(self.context, made)
        return made

    def summary(self, made: Made) -> str:
        return summary(self.context, made, self.method.constitution)


def candidates(row: Row) -> list[tuple[str, str, str | None]]:
    """The pairs of a row's completions that differ, with which of them was labelled better before: "a", "b" or None."""
    if "chosen" in row:
        return [(row["chosen"], row["rejected"], "a")]
    texts, ranks = row["completions"], row.get("ranks")
    found: list[tuple[str, str, str | None]] = []
    for i, j in itertools.combinations(range(len(texts)), 2):
        if texts[i].strip() and texts[j].strip() and texts[i].strip() != texts[j].strip():
            one, other = (0, 0) if ranks is None else (ranks[i], ranks[j])
            found.append((texts[i], texts[j], None if one == other else "a" if one < other else "b"))
    return found


def judged(
    judge: Judge,
    asked: Sequence[tuple[Row, Comparison, str | None]],
    constitution: Constitution | None,
    min_preference: float = 0.5,
) -> Made:
    """Rows for what a judge decides in both orders, and the counts of everything else."""
    from rlhf_nb.feedback.judge import compare_both
    from rlhf_nb.feedback.tally import tally
    from rlhf_nb.training.row_job import Made

    outcomes = compare_both(judge, [comparison for _, comparison, _ in asked])
    orders = [order for each in outcomes for order in each.orders]
    require_answers(judge, [each.failure for each in orders], [each.detail for each in orders])
    rows, dropped = [], {"tied": 0, "flipped with the order": 0, "unsure": 0, "unanswered": 0}
    for (row, comparison, better), outcome in zip(asked, outcomes, strict=True):
        sure = outcome.a_probability
        if outcome.choice in ("a", "b") and sure is not None and max(sure, 1 - sure) < min_preference:
            dropped["unsure"] += 1
        elif outcome.choice in ("a", "b"):
            rows.append(_pair(row, comparison, outcome, better, judge, constitution))
        else:
            dropped[
                "unanswered" if not outcome.choice else "flipped with the order" if outcome.flipped else "tied"
            ] += 1
    counts = tally(outcomes, [better for _, _, better in asked]).to_counts()
    return Made(rows, {reason: n for reason, n in dropped.items() if n}, counts)


def require_answers(judge: Judge, failures: Sequence[str], details: Sequence[str]) -> None:
    """End the run where nothing came back at all: what was answered before is kept, and resuming asks the rest.

    A few questions without an answer, after others had theirs, are left out and counted: they may be the ones that the
    judge never answers, and would end every attempt anew.

    Args:
        failures: Of every question of a chunk, each order for itself.

    Raises:
        ComputeError: Every question ran into the time limit, or into the server's errors, and either so did the last
            `SILENT` of them or nothing was ever answered.
    """
    from rlhf_nb.feedback.judge import Journaled

    few = isinstance(judge, Journaled) and judge.silent < SILENT and judge.heard
    if failures and not few and all(failure in ("timeout", "error") for failure in failures):
        said = next((detail for detail in details if detail), failures[0])
        raise ComputeError(
            f"judge {judge.name}: none of {len(failures)} questions was answered ({said}); see that it runs, and resume"
        )


def _pair(
    row: Row,
    comparison: Comparison,
    outcome: Outcome,
    better: str | None,
    judge: Judge,
    constitution: Constitution | None,
) -> Row:
    won = outcome.choice == "a"
    made: Row = {name: value for name, value in row.items() if not about_completions(name)}
    made |= {
        "chosen": comparison.first if won else comparison.second,
        "rejected": comparison.second if won else comparison.first,
        "principle": comparison.principle.name if comparison.principle else "",
        **provenance(judge, constitution),
    }
    if outcome.a_probability is not None:
        made["preference"] = round(outcome.a_probability if won else 1 - outcome.a_probability, 6)
    if better is not None:
        made["agrees"] = outcome.choice == better
    return made


def provenance(judge: Judge, constitution: Constitution | None) -> Row:
    """What an AI label is traced to, beside its principle: the judge, and hashes of the words it was asked with."""
    found = {"judge": judge.name, "judge_prompt": judge.prompt_hash[:12]}
    return found | ({"constitution": constitution.content_hash[:12]} if constitution else {})


def report(context: Context, made: Made) -> None:
    """Say what the judge did: a result with the agreement, or the share decided, and a warning where it is doubtful."""
    from rlhf_nb.feedback.tally import Tally
    from rlhf_nb.statistics.intervals import Estimate, wilson

    found = Tally.from_counts(made.counts)
    share, name = found.agreement, "agreement"
    if share is None and found.pairs:
        share, name = Estimate(found.decided / found.pairs, wilson(found.decided, found.pairs), found.pairs), "decided"
    if share is not None:
        interval = (share.interval.low, share.interval.high)
        context.emit.event(Result(name=name, value=share.value, interval=interval, n=share.n, detail=found.to_dict()))
    flips, missing = found.flip_rate, found.pairs - found.answered
    if flips is not None and flips.value > FLIPS_SAID:
        context.emit.notice(
            "judge_flips", f"{flips.value:.0%} of the verdicts change with the order; they are no labels", "warning"
        )
    if missing > UNANSWERED_SAID * found.pairs:
        causes = ", ".join(f"{n} {cause.replace('_', ' ')}" for cause, n in found.failures.items())
        context.emit.notice(
            "judge_unanswered", f"{missing} of {found.pairs} pairs have no verdict: {causes}", "warning"
        )


def summary(context: Context, made: Made, constitution: Constitution | None) -> str:
    from rlhf_nb.feedback.tally import Tally

    under = f" under {constitution.name} {constitution.content_hash[:12]}" if constitution else ""
    judge = describe(context.spec.judge or context.spec.policy)
    return f"{len(made.rows):,} pairs by {judge}{under}: {Tally.from_counts(made.counts)}"
