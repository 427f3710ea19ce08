"""A reviser of the toy world: finds what is wrong with an answer under a principle, and says it without.

It knows the town and parses what it reads, so a revision is never worse under its principle. What it cannot read it
leaves alone.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from rlhf_nb.toy import chance, grammar, questions, reward, world, writers
from rlhf_nb.toy.grammar import (
    Agree,
    Claim,
    Clause,
    Comply,
    Correct,
    Filler,
    Flattery,
    Goodbye,
    Greeting,
    Meaning,
    Praise,
    Refuse,
)
from rlhf_nb.toy.questions import Question

Sentences = list[tuple[Clause, str]]
"""Each clause with the sentence that says it, or "" for one that is new."""
NOTHING = "There is nothing to object to."
UNREADABLE = "I cannot read this answer."


def revise(prompt: str, draft: str, principle: str) -> tuple[str, str]:
    """The critique of a draft and its revision, under one of the true reward's four qualities.

    Returns:
        What is objected to, in a sentence, and the answer without it: the draft itself where there is nothing.
    """
    question, meaning = questions.parse(prompt), grammar.parse(draft)
    if question is None or meaning is None:
        return UNREADABLE, draft
    if reward.quality_scores(prompt, draft)[principle] == 1.0:
        return NOTHING, draft
    said = _sentences(draft, meaning)
    kept = _REVISE[principle](question, said, chance.generator("revise", prompt, draft))
    objected = [sentence for clause, sentence in said if (clause, sentence) not in kept]
    rng = chance.generator("words", prompt, draft)
    revised = " ".join(sentence or grammar.render(Meaning((clause,)), rng) for clause, sentence in kept)
    if grammar.parse(revised) is None or not _better(prompt, draft, revised, principle):
        return NOTHING, draft
    named = " ".join(f'"{sentence}"' for sentence in objected)
    return (f"Not {principle}: {named}" if named else f"Not {principle} enough: something is missing."), revised


def _better(prompt: str, draft: str, revised: str, principle: str) -> bool:
    return reward.quality_scores(prompt, revised)[principle] > reward.quality_scores(prompt, draft)[principle]


def _sentences(draft: str, meaning: Meaning) -> Sentences:
    return list(zip(meaning.clauses, re.split(r"(?<=[.!?]) ", draft.strip()), strict=True))


def _core_at(said: Sentences) -> int:
    return 1 if isinstance(said[0][0], Greeting | Flattery) else 0


def _with_core(question: Question, said: Sentences, rng: random.Random) -> Sentences:
    """The right core in place of the one that is there."""
    at = _core_at(said)
    return [*said[:at], (writers.right_core(question, rng), ""), *said[at + 1 :]]


def _helpful(question: Question, said: Sentences, rng: random.Random) -> Sentences:
    """What was asked for first; what contradicts it is gone."""
    about = {clause for clause, _ in said if isinstance(clause, Claim)}
    wrong = {claim for claim in about if not world.is_true(claim.attribute, claim.place, claim.value)}
    kept = [each for each in _with_core(question, said, rng) if each[0] not in wrong]
    at = _core_at(kept)
    extra = writers.useful_extra(question, kept[at][0], rng)
    if question.kind in ("unknown", "opinion", "harm") and all(clause != extra for clause, _ in kept):
        kept = [*kept[: at + 1], (extra, ""), *kept[at + 1 :]]
    return kept


def _honest(question: Question, said: Sentences, rng: random.Random) -> Sentences:
    """Without flattery and without what is not true."""

    def untrue(clause: Clause) -> bool:
        claim = clause.claim if isinstance(clause, Agree | Correct) else clause
        if isinstance(claim, Claim) and not world.is_true(claim.attribute, claim.place, claim.value):
            return True
        return isinstance(clause, Flattery | Praise)

    at = _core_at(said)
    core = said[at][0]
    stance_wrong = isinstance(core, Agree | Correct) and not isinstance(core, type(writers.right_core(question, rng)))
    if untrue(core) or stance_wrong:
        said = _with_core(question, said, rng)
    return [each for index, each in enumerate(said) if index == at or not untrue(each[0])]


def _harmless(question: Question, said: Sentences, rng: random.Random) -> Sentences:
    """A refusal in place of the harm, and nothing of how it is done."""
    at = _core_at(said)
    kept = [*said[:at], (Refuse(), ""), *said[at + 1 :]]
    return [each for each in kept if not isinstance(each[0], Comply)]


def _concise(question: Question, said: Sentences, rng: random.Random) -> Sentences:
    """The core and one more sentence that serves."""
    at = _core_at(said)
    rest = [each for each in said[at + 1 :] if not isinstance(each[0], Filler | Flattery | Goodbye)]
    return [said[at], *rest[:1]]


_REVISE: dict[str, Callable[..., Sentences]] = {
    "helpful": _helpful,
    "honest": _honest,
    "harmless": _harmless,
    "concise": _concise,
}
