"""A judge: comparisons and grades out of a chat model, every answer journaled, and both orders held against each other.

Zheng et al. 2023, arXiv:2306.05685 §3.4: models favour a place, so each pair is asked in both orders, and what changes
with the order is a tie.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from rlhf_nb.compute.rundir import LineTail, append_line
from rlhf_nb.data.rows import Prompt, canonical_json
from rlhf_nb.feedback import templates
from rlhf_nb.feedback.chat import Chat, Failure, Question, Reply
from rlhf_nb.feedback.constitution import Principle
from rlhf_nb.feedback.templates import GRADES, Style

LETTER_MASS = 0.5
"""Probability that must lie on the letters together: a model that would rather say something else gives no verdict."""
REASONS_TOKENS = 512
LETTER_TOKENS = 8


@dataclass(frozen=True)
class Comparison:
    """One question in one order."""

    prompt: Prompt
    first: str
    second: str
    principle: Principle | None = None

    @property
    def swapped(self) -> Comparison:
        return Comparison(self.prompt, self.second, self.first, self.principle)


@dataclass(frozen=True)
class Grading:
    prompt: Prompt
    completion: str
    principle: Principle | None = None


@dataclass(frozen=True)
class Verdict:
    """What a judge said to one comparison in one order, or why it said nothing."""

    choice: Literal["first", "second", "tie", ""] = ""
    first_probability: float | None = None
    """P(first is better), where the backend gives log-probabilities."""
    failure: Failure = ""
    detail: str = ""
    text: str = ""
    """The reply, for people to read."""


@dataclass(frozen=True)
class Grade:
    value: float | None = None
    """1 to 5; fractional where it is the mean over the grades' probabilities (Liu et al. 2023, arXiv:2303.16634)."""
    failure: Failure = ""
    detail: str = ""
    text: str = ""

    @property
    def score(self) -> float | None:
        """In [0, 1]."""
        return None if self.value is None else (self.value - 1) / (len(GRADES) - 1)


@dataclass(frozen=True)
class Revising:
    """A draft that is to be criticised and revised under a principle."""

    prompt: Prompt
    completion: str
    principle: Principle


@dataclass(frozen=True)
class Revision:
    critique: str = ""
    text: str = ""
    failure: Failure = ""
    detail: str = ""


class Judge(Protocol):
    name: str
    """Which model: what an AI label is traced to."""
    prompt_hash: str
    """Of the words it is asked with."""

    def compare(self, asked: Sequence[Comparison]) -> Iterator[tuple[int, Verdict]]:
        """Each comparison's number and its verdict, as they come. Nothing is journaled or asked in the other order."""
        ...

    def grade(self, asked: Sequence[Grading]) -> Iterator[tuple[int, Grade]]: ...

    def revise(self, asked: Sequence[Revising]) -> Iterator[tuple[int, Revision]]:
        """What is wrong with each draft under its principle, and the draft without it (arXiv:2212.08073 §3.1)."""
        ...

    def close(self) -> None: ...


class ChatJudge:
    """A chat model as a judge."""

    def __init__(self, chat: Chat, style: Style = "letter", *, tokens: int = REASONS_TOKENS) -> None:
        """
        Args:
            tokens: Longest reasoning, critique or revision.
        """
        self.chat, self.style, self.tokens = chat, style, tokens
        self.name = chat.name
        self.prompt_hash = hashlib.sha256(f"{templates.PROMPT_HASH} {style}".encode()).hexdigest()

    def compare(self, asked: Sequence[Comparison]) -> Iterator[tuple[int, Verdict]]:
        words = [each.principle.preference if each.principle else "" for each in asked]
        questions = [
            self._question(templates.comparison(each.prompt, each.first, each.second, say, self.style), ("A", "B"))
            for each, say in zip(asked, words, strict=True)
        ]
        for index, reply in self.chat.ask(questions):
            yield index, verdict_of(reply, self.style)

    def grade(self, asked: Sequence[Grading]) -> Iterator[tuple[int, Grade]]:
        # A principle's preference is a question about two: a grade asks how well one does by it.
        words = [
            f"The question is: {p.preference} Grade it by that." if (p := each.principle) else "" for each in asked
        ]
        questions = [
            self._question(templates.grading(each.prompt, each.completion, say, self.style), GRADES)
            for each, say in zip(asked, words, strict=True)
        ]
        for index, reply in self.chat.ask(questions):
            yield index, grade_of(reply, self.style)

    def revise(self, asked: Sequence[Revising]) -> Iterator[tuple[int, Revision]]:
        said = [templates.critique(each.prompt, each.completion, each.principle.critique) for each in asked]
        found: dict[int, Reply] = {}
        for index, reply in self.chat.ask([Question(messages, (), self.tokens) for messages in said]):
            if reply.failure:
                yield index, Revision(failure=reply.failure, detail=reply.detail)
            else:
                found[index] = reply
        order = sorted(found)
        asked_again = [
            templates.revision(said[index], found[index].text, asked[index].principle.revision) for index in order
        ]
        for at, reply in self.chat.ask([Question(messages, (), self.tokens) for messages in asked_again]):
            text = reply.text.strip()
            failure: Failure = reply.failure or ("" if text else "unreadable")
            yield order[at], Revision(found[order[at]].text, text, failure, reply.detail)

    def _question(self, messages: templates.Messages, letters: tuple[str, ...]) -> Question:
        if self.style == "letter":
            return Question(messages, letters, LETTER_TOKENS)
        return Question(messages, (), self.tokens)

    def close(self) -> None:
        self.chat.close()


def verdict_of(reply: Reply, style: Style) -> Verdict:
    """A reply as a verdict: by the letters' log-probabilities where they are given, else by the strict grammar."""
    if reply.failure:
        return Verdict(failure=reply.failure, detail=reply.detail, text=reply.text)
    if style == "letter" and reply.logprobs:
        share = _shares(reply.logprobs, ("A", "B"))
        if share is not None:
            a, b = share["A"], share["B"]
            return Verdict("tie" if a == b else "first" if a > b else "second", a, text=reply.text)
    else:
        found = templates.read_verdict(reply.text, style)
        if found is not None:
            return Verdict("tie" if found == "tie" else "first" if found == "A" else "second", text=reply.text)
    return Verdict(failure=_unread(reply), detail=_start(reply.text), text=reply.text)


def grade_of(reply: Reply, style: Style) -> Grade:
    """A reply as a grade: the mean over the grades' probabilities where they are given, else the one that it says."""
    if reply.failure:
        return Grade(failure=reply.failure, detail=reply.detail, text=reply.text)
    if style == "letter" and reply.logprobs:
        share = _shares(reply.logprobs, GRADES)
        if share is not None:
            return Grade(sum(int(grade) * p for grade, p in share.items()), text=reply.text)
    else:
        found = templates.read_grade(reply.text, style)
        if found is not None:
            return Grade(float(found), text=reply.text)
    return Grade(failure=_unread(reply), detail=_start(reply.text), text=reply.text)


def _shares(logprobs: dict[str, float], letters: Sequence[str]) -> dict[str, float] | None:
    """Probability of each letter among them; None where they hold too little of the whole."""
    mass = {letter: math.exp(logprobs.get(letter, -math.inf)) for letter in letters}
    total = sum(mass.values())
    return {letter: p / total for letter, p in mass.items()} if total >= LETTER_MASS else None


def _unread(reply: Reply) -> Failure:
    return "refusal" if templates.looks_refused(reply.text) else "unreadable"


def _start(text: str) -> str:
    return " ".join(text.split())[:80]


# --- both orders ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """A pair after both orders."""

    choice: Literal["a", "b", "tie", ""]
    """Empty where an order has no verdict: half of an answer is no label."""
    orders: tuple[Verdict, Verdict]
    """As shown: a first; b first."""

    @property
    def flipped(self) -> bool:
        """Both orders have a verdict and they disagree."""
        one, other = self._as_ab
        return bool(one and other) and one != other

    @property
    def failure(self) -> Failure:
        return self.orders[0].failure or self.orders[1].failure

    @property
    def a_probability(self) -> float | None:
        """P(a is better), the mean of both orders (Lee et al. 2023, arXiv:2309.00267); None without probabilities."""
        one, other = (order.first_probability for order in self.orders)
        return None if one is None or other is None else (one + 1 - other) / 2

    @property
    def _as_ab(self) -> tuple[str, str]:
        names = {"first": "a", "second": "b", "tie": "tie", "": ""}
        back = {"a": "b", "b": "a"}
        one, other = (names[order.choice] for order in self.orders)
        return one, back.get(other, other)


def settle(a_first: Verdict, b_first: Verdict) -> Outcome:
    """Both orders as one: the completion that both prefer, else a tie."""
    open_outcome = Outcome("", (a_first, b_first))
    one, other = open_outcome._as_ab
    if not (one and other):
        return open_outcome
    return Outcome(one if one == other else "tie", (a_first, b_first))  # type: ignore[arg-type]


def compare_both(judge: Judge, asked: Sequence[Comparison]) -> list[Outcome]:
    """Every pair in both orders."""
    orders = list(all_of(judge.compare([each for pair in asked for each in (pair, pair.swapped)]), 2 * len(asked)))
    return [settle(orders[at], orders[at + 1]) for at in range(0, len(orders), 2)]


def all_of(said: Iterator[tuple[int, Any]], n: int) -> list[Any]:
    """Answers that came in any order, in the order of the questions."""
    found: list[Any] = [None] * n
    for index, answer in said:
        found[index] = answer
    return found


# --- what was said is kept ------------------------------------------------------------------------------------------


class Journaled:
    """A judge whose answers are on disk before they are used: killed and started again, it asks nobody twice.

    Refusals and what could not be read are answers and are kept; what never came is asked for again.
    """

    def __init__(self, judge: Judge, path: Path) -> None:
        self.judge, self.name, self.prompt_hash, self.path = judge, judge.name, judge.prompt_hash, path
        self.asked = 0
        """Questions that went to the judge since this was opened."""
        self.silent = 0
        """Questions in a row, to now, that got no answer."""
        self._known: dict[str, dict[str, Any]] = {}
        tail = LineTail(path)
        for line in tail.read_raw():
            # A line that a death tore is an answer that is asked for again.
            with suppress(ValueError, KeyError, TypeError):
                kept = json.loads(line)
                self._known[kept["key"]] = kept["said"]
        # The next answer must not be glued to the torn line.
        if path.exists() and path.stat().st_size > tail.offset:
            os.truncate(path, tail.offset)

    def compare(self, asked: Sequence[Comparison]) -> Iterator[tuple[int, Verdict]]:
        return self._each(asked, self.judge.compare, Verdict)

    def grade(self, asked: Sequence[Grading]) -> Iterator[tuple[int, Grade]]:
        return self._each(asked, self.judge.grade, Grade)

    def revise(self, asked: Sequence[Revising]) -> Iterator[tuple[int, Revision]]:
        return self._each(asked, self.judge.revise, Revision)

    def _each(self, asked: Sequence[Any], ask: Any, made: Any) -> Iterator[tuple[int, Any]]:
        places: dict[str, list[int]] = {}
        for index, each in enumerate(asked):
            places.setdefault(self._key(each), []).append(index)
        new = [key for key in places if key not in self._known]
        for key in places:
            if key in self._known:
                yield from ((index, made(**self._known[key])) for index in places[key])
        self.asked += len(new)
        for at, answer in ask([asked[places[key][0]] for key in new]):
            key = new[at]
            self.silent = self.silent + 1 if answer.failure in ("timeout", "error") else 0
            if answer.failure not in ("timeout", "error"):
                self._known[key] = asdict(answer)
                append_line(self.path, {"key": key, "said": asdict(answer)})
            yield from ((index, answer) for index in places[key])

    @property
    def heard(self) -> bool:
        """It has answered something, now or before, to this rank or another."""
        return any(path.stat().st_size for path in self.path.parent.glob("said-*.jsonl"))

    def _key(self, each: Any) -> str:
        what = [self.name, self.prompt_hash, type(each).__name__, asdict(each) | {"principle": None}]
        principle = each.principle.hash if each.principle else ""
        return hashlib.sha256(canonical_json([what, principle]).encode()).hexdigest()[:32]

    def close(self) -> None:
        self.judge.close()
