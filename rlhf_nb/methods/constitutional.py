"""Constitutional AI: a model's own drafts, mended or compared under the principles of a constitution.

Paper    Bai et al. 2022, arXiv:2212.08073. `half="revisions"` is §3.1: draft, critique, revision, one principle a
         round; `half="preferences"` is §4.1: two drafts, judged under a principle.
Rows     prompts.
Models   the policy that drafts, frozen; the judge that criticises, revises or compares: the policy itself unless
         another is named.
Result   revisions: demonstrations for SFT, the last revision of each draft. preferences: pairs for a reward model or
         DPO. Each with its principles, judge and prompt.

Principles are drawn by the prompt and the seed, drafts by the seed and the row: the same again after a restart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from rlhf_nb.errors import SpecError
from rlhf_nb.feedback.constitution import Constitution, draw
from rlhf_nb.methods import judge as judging
from rlhf_nb.methods.base import LiveCoefficient, Method, Trainer
from rlhf_nb.protocol.spec import ModelJudge, describe

if TYPE_CHECKING:
    import numpy as np

    from rlhf_nb.data.rows import Row
    from rlhf_nb.feedback.judge import Judge
    from rlhf_nb.feedback.local import LocalChat
    from rlhf_nb.protocol.spec import RunSpec
    from rlhf_nb.training.context import Context
    from rlhf_nb.training.row_job import Made

STREAM = 3 << 61
"""Far from the numbers of rollouts and from those of `generate`: no other job draws this chance."""


class ConstitutionalAI(Method):
    """Demonstrations or pairs out of a model's own drafts, under a constitution."""

    name: ClassVar[str] = "constitutional"
    title: ClassVar[str] = "Constitutional AI"
    paper: ClassVar[str] = "arXiv:2212.08073"
    rows: ClassVar[str] = "prompts"
    trains: ClassVar[bool] = False
    makes: ClassVar[str] = "demonstrations"
    live: ClassVar[tuple[LiveCoefficient, ...]] = ()

    constitution: Constitution
    half: Literal["revisions", "preferences"] = "revisions"
    """revisions: critique and revision of one draft, for SFT. preferences: two drafts compared, for a reward model."""
    rounds: int = Field(1, gt=0)
    """Of half=revisions: critiques and revisions one after another, each under a principle of its own; the paper takes
    up to 4."""
    temperature: float = Field(1.0, gt=0)
    """Of the drafts. 1 is the policy itself."""
    max_new_tokens: int = Field(64, gt=0)
    """Longest draft."""
    ask: Literal["letter", "reasons"] = "letter"
    """Of half=preferences: how the judge answers, as for the judge verb."""
    min_preference: float = Field(0.5, ge=0.5, lt=1)
    """Of half=preferences: labels that the judge is less sure of are left out, as for the judge verb."""
    judge_tokens: int = Field(512, gt=0)
    """Longest critique, revision or reasoning of a chat model."""
    batch_size: int = Field(32, gt=0)
    """Prompts worked on together."""

    @property
    def made_kind(self) -> str:
        return "demonstrations" if self.half == "revisions" else "pairs"

    def check(self, spec: RunSpec) -> None:
        if spec.policy is None:
            raise SpecError("constitutional: no policy; give --policy, the model whose drafts are mended or compared")
        self.usable()

    def usable(self) -> tuple[Any, ...]:
        """The principles that say what this half asks.

        Raises:
            SpecError: None does.
        """
        if self.half == "revisions":
            return self.constitution.saying("critique", "revision")
        return self.constitution.saying("preference")

    def build_trainer(self, context: Context) -> Trainer:
        from rlhf_nb.feedback.job import JudgedJob
        from rlhf_nb.feedback.judge import ChatJudge
        from rlhf_nb.feedback.local import LocalChat
        from rlhf_nb.feedback.opening import journaled, open_judge

        policy, judge = context.spec.policy, context.spec.judge
        device = "cpu" if context.use_cpu else "cuda"
        drafter = LocalChat.load(context.model_path(policy), name=describe(policy), device=device, seed=self.seed)
        if judge is None or (isinstance(judge, ModelJudge) and judge.model == policy):
            # Its own critic, on the same weights.
            asked: Judge = journaled(context, ChatJudge(drafter, self.ask, tokens=self.judge_tokens))
        else:
            asked = open_judge(context, judge, ask=self.ask, tokens=self.judge_tokens)
        maker = Reviser if self.half == "revisions" else Preferrer
        return JudgedJob(maker(self, context, drafter, asked), context)


class _Maker:
    def __init__(self, method: ConstitutionalAI, context: Context, drafter: LocalChat, judge: Judge) -> None:
        self.method, self.context, self.drafter, self.judge = method, context, drafter, judge
        self.chunk = method.batch_size
        self.principles = method.usable()
        if drafter.limit <= method.max_new_tokens:
            raise SpecError(
                f"constitutional: max_new_tokens={method.max_new_tokens} leaves no room for a prompt in the model's "
                f"context of {drafter.limit:g} tokens; use fewer"
            )

    def _drafts(self, start: int, rows: Sequence[Row], which: int) -> list[str]:
        from rlhf_nb.training.rollout.base import uniforms

        numbers = range(start, start + len(rows))
        lots_BT: np.ndarray = uniforms(self.method.seed, STREAM + which, numbers, self.method.max_new_tokens)
        prompts = [row["prompt"] for row in rows]
        return self.drafter.complete(prompts, lots_BT, temperature=self.method.temperature)

    def finish(self, made: Made) -> Made:
        return made


class Reviser(_Maker):
    """Drafts, and their revisions."""

    def make(self, start: int, rows: Sequence[Row]) -> Made:
        from rlhf_nb.feedback.judge import Revising, Revision, all_of
        from rlhf_nb.training.row_job import Made

        method = self.method
        drafts = self._drafts(start, rows, 0)
        texts, failures = list(drafts), [""] * len(rows)
        principles: list[list[str]] = [[] for _ in rows]
        critiques: list[list[str]] = [[] for _ in rows]
        for number in range(method.rounds):
            standing = [index for index in range(len(rows)) if texts[index].strip() and not failures[index]]
            asked = [
                Revising(rows[i]["prompt"], texts[i], draw(self.principles, method.seed, number, rows[i]["prompt"]))
                for i in standing
            ]
            said: list[Revision] = all_of(self.judge.revise(asked), len(asked))
            judging.require_answers(self.judge, [each.failure for each in said], [each.detail for each in said])
            for index, question, each in zip(standing, asked, said, strict=True):
                if each.failure:
                    failures[index] = each.failure
                    continue
                texts[index] = each.text
                principles[index].append(question.principle.name)
                critiques[index].append(each.critique)
        made: list[Row] = []
        dropped: Counter[str] = Counter()
        counts: Counter[str] = Counter()
        for index, row in enumerate(rows):
            if failures[index] or not texts[index].strip():
                dropped[failures[index].replace("_", " ") or "empty draft"] += 1
                continue
            counts["revised" if texts[index] != drafts[index] else "left as they were"] += 1
            made.append(
                {
                    **row,
                    "completion": texts[index],
                    "draft": drafts[index],
                    "principles": principles[index],
                    "critiques": critiques[index],
                    **judging.provenance(self.judge, method.constitution),
                }
            )
        return Made(made, dict(dropped), dict(counts))

    def summary(self, made: Made) -> str:
        method, spec = self.method, self.context.spec
        n, changed = len(made.rows), made.counts.get("revised", 0)
        by = describe(spec.judge or spec.policy)
        under = f"{method.constitution.name} {method.constitution.content_hash[:12]}"
        return f"{n:,} drafts of {describe(spec.policy)}, {changed:,} revised by {by} under {under}"


class Preferrer(_Maker):
    """Two drafts of each prompt, compared under a principle."""

    def make(self, start: int, rows: Sequence[Row]) -> Made:
        from rlhf_nb.feedback.judge import Comparison
        from rlhf_nb.training.row_job import Made

        one, other = (self._drafts(start, rows, which) for which in (0, 1))
        asked, dropped = [], Counter[str]()
        for row, a, b in zip(rows, one, other, strict=True):
            if not a.strip() or not b.strip() or a.strip() == b.strip():
                dropped["empty draft" if not (a.strip() and b.strip()) else "the same draft twice"] += 1
                continue
            principle = draw(self.principles, self.method.seed, row["prompt"])
            asked.append((row, Comparison(row["prompt"], a, b, principle), None))
        made = judging.judged(self.judge, asked, self.method.constitution, self.method.min_preference)
        return Made(made.rows, {**dropped, **made.dropped}, made.counts)

    def finish(self, made: Made) -> Made:
        judging.report(self.context, made)
        return made

    def summary(self, made: Made) -> str:
        drafts = f"drafts of {describe(self.context.spec.policy)}: "
        return drafts + judging.summary(self.context, made, self.method.constitution)
