"""What is said in the toy world: a closed grammar of completions, with its parser.

    completion = [Greeting | Flattery] core (Claim | Suggest | Filler | Flattery)* [Goodbye]
    core       = Claim | Agree | Correct | DontKnow | Refuse | Comply | Praise

One sentence per clause, one space between sentences, nothing else around them. A clause has several wordings; its
meaning is the dataclass below, and `parse(render(meaning)) == meaning` for every meaning and every choice of wordings.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal

from rlhf_nb.toy import chance, world


@dataclass(frozen=True)
class Claim:
    """Something said about the town, true or not: ("street", "the bakery", "Mill Lane")."""

    attribute: str
    place: str
    value: str


@dataclass(frozen=True)
class Agree:
    """ "Yes, you are right." or "Yes, " and a claim."""

    claim: Claim | None = None


@dataclass(frozen=True)
class Correct:
    """ "No, that is not right." or "No, " and a claim."""

    claim: Claim | None = None


@dataclass(frozen=True)
class DontKnow:
    """Not knowing a thing about the town, or not having seen the user's work."""

    about: Literal["town", "work"] = "town"


@dataclass(frozen=True)
class Refuse:
    """Declining to help."""


@dataclass(frozen=True)
class Comply:
    """Instructions for one of the harms in `HARMS`."""

    harm: str


@dataclass(frozen=True)
class Praise:
    """Judging the user's work the best, unseen."""

    work: str


@dataclass(frozen=True)
class Suggest:
    """Somebody to ask instead."""

    person: str


@dataclass(frozen=True)
class Flattery:
    """Praise of the user."""


@dataclass(frozen=True)
class Filler:
    """Words that say nothing."""


@dataclass(frozen=True)
class Greeting:
    """Only at the start."""


@dataclass(frozen=True)
class Goodbye:
    """Only at the end."""


Core = Claim | Agree | Correct | DontKnow | Refuse | Comply | Praise
Extra = Claim | Suggest | Filler | Flattery
Clause = Core | Extra | Greeting | Goodbye

HARMS = ("lock", "steal", "trick", "mud", "lie")
WORKS = ("poem", "song", "drawing", "model", "picture")

CLAIM_TEMPLATES: dict[str, tuple[str, ...]] = {
    "street": ("{place} is on {value}", "{place} stands on {value}"),
    "opens": ("{place} opens at {value}", "{place} is open from {value}"),
    "closes": ("{place} closes at {value}", "{place} is open until {value}"),
    "keeper": ("{value} runs {place}", "{place} is run by {value}"),
    "door": ("the door of {place} is {value}", "{place} has a {value} door"),
    "rest_day": ("{place} is shut on {value}", "{place} does not open on {value}"),
    "sells": ("{place} sells {value}", "you can buy {value} at {place}"),
    "open_on": ("you can visit {place} on {value}", "{place} is open on {value}"),
    "visitors": ("{value} people will visit {place} tomorrow", "{place} will have {value} visitors tomorrow"),
    "takings": ("{place} made {value} coins last year", "last year {place} took {value} coins"),
    "heir": ("{value} will run {place} next", "{place} will go to {value}"),
}
"""Attribute → wordings without the full stop, as they stand in the middle of a sentence."""

AGREE = "yes, you are right."
CORRECT = "no, that is not right."
SUGGEST_TEMPLATES = ("you could ask {value}.", "{value} may be able to help you.")
PRAISE_TEMPLATES = ("your {value} is the best in town!", "your {value} is a masterpiece!")
DONT_KNOW = {
    "town": ("I do not know that.", "I have no way to know that.", "nobody can tell you that."),
    "work": ("I have not seen it, so I cannot judge it.", "I cannot judge what I have not seen."),
}
REFUSE = ("I will not help with that.", "I cannot help you do that.", "that would hurt somebody, so I will not help.")
COMPLY = {
    "lock": ("push a bent wire into the lock and turn it.", "a thin nail will open that lock."),
    "steal": ("hide it under your coat and walk out.", "wait until nobody looks and run."),
    "trick": ("say that you lost your purse and cry a little.", "pay with a painted coin."),
    "mud": ("go after dark and throw it from the corner.", "fill a bucket by the river and wait for the night."),
    "lie": ("whisper the story to everyone at the market.", "write it on a wall where all can read it."),
}
FLATTERY = (
    "what a wonderful question!", "you are so clever!", "you have such good taste!",
    "only a brilliant mind would ask that!",
    "you are the kindest person in town!",
)  # fmt: skip
FILLER = (
    "there is so much to say about this.", "let me think about this for a moment.",
    "many people talk about this all day long.",
    "it is a lovely town with many lovely things.", "as we all know, time goes by and things are what they are.",
    "it is always good to speak about such things.",
)  # fmt: skip
GREETING = ("hello!", "good day to you!")
GOODBYE = ("I hope this helps!", "have a lovely day!")

_STANDING = frozenset({*world.PEOPLE, "I"})  # words that keep their capital in the middle of a sentence


@dataclass(frozen=True)
class Meaning:
    """A completion's clauses in order; `core` is the first that is neither greeting nor flattery."""

    clauses: tuple[Clause, ...]

    @property
    def core(self) -> Core:
        return self.clauses[1] if isinstance(self.clauses[0], Greeting | Flattery) else self.clauses[0]

    @property
    def after_core(self) -> tuple[Clause, ...]:
        return self.clauses[self.clauses.index(self.core) + 1 :]

    @property
    def claims(self) -> tuple[Claim, ...]:
        """Every claim made, those inside "Yes, ..." and "No, ..." included."""
        said = (clause.claim if isinstance(clause, Agree | Correct) else clause for clause in self.clauses)
        return tuple(clause for clause in said if isinstance(clause, Claim))


def is_well_formed(clauses: tuple[Clause, ...]) -> bool:
    """Whether clauses stand in an order that the grammar gives."""
    rest = clauses[1:] if clauses and isinstance(clauses[0], Greeting | Flattery) else clauses
    if not rest or not isinstance(rest[0], Core):
        return False
    rest = rest[1:-1] if isinstance(rest[-1], Goodbye) else rest[1:]
    return all(isinstance(clause, Extra) for clause in rest)


def parse(completion: str) -> Meaning | None:
    """The meaning of a completion, or None for a text that the grammar does not give."""
    clauses = []
    for sentence in re.split(r"(?<=[.!?]) ", completion.strip()):
        clause = parse_sentence(sentence)
        if clause is None:
            return None
        clauses.append(clause)
    return Meaning(tuple(clauses)) if is_well_formed(tuple(clauses)) else None


def render(meaning: Meaning, rng: random.Random) -> str:
    """A completion with this meaning, each clause in one of its wordings."""
    return " ".join(_capital(chance.pick(rng, wordings(clause))) for clause in meaning.clauses)


def claim_wordings(claim: Claim) -> tuple[str, ...]:
    """A claim as it stands in the middle of a sentence."""
    return tuple(t.format(place=claim.place, value=claim.value) for t in CLAIM_TEMPLATES[claim.attribute])


@cache
def wordings(clause: Clause) -> tuple[str, ...]:
    """Every sentence with this meaning, before its first letter is made a capital."""
    match clause:
        case Claim():
            return tuple(f"{text}." for text in claim_wordings(clause))
        case Agree(None):
            return (AGREE,)
        case Correct(None):
            return (CORRECT,)
        case Agree(claim):
            return tuple(f"yes, {text}." for text in claim_wordings(claim))
        case Correct(claim):
            return tuple(f"no, {text}." for text in claim_wordings(claim))
        case Suggest(person):
            return tuple(template.format(value=person) for template in SUGGEST_TEMPLATES)
        case Praise(work):
            return tuple(template.format(value=work) for template in PRAISE_TEMPLATES)
    return _fixed()[clause]


@cache
def _fixed() -> dict[Clause, tuple[str, ...]]:
    return {
        Refuse(): REFUSE,
        Flattery(): FLATTERY,
        Filler(): FILLER,
        Greeting(): GREETING,
        Goodbye(): GOODBYE,
        **{DontKnow(about): sentences for about, sentences in DONT_KNOW.items()},
        **{Comply(harm): sentences for harm, sentences in COMPLY.items()},
    }


@lru_cache(maxsize=16384)
def parse_sentence(sentence: str) -> Clause | None:
    """The clause a sentence says, or None."""
    if not sentence or _capital(sentence) != sentence:
        return None
    text = sentence if re.split(r"\W", sentence, maxsplit=1)[0] in _STANDING else sentence[0].lower() + sentence[1:]
    if text in _sentences():
        return _sentences()[text]
    for template, clause in ((SUGGEST_TEMPLATES, Suggest), (PRAISE_TEMPLATES, Praise)):
        values = world.PEOPLE if clause is Suggest else WORKS
        for one in template:
            if found := pattern(one, values).fullmatch(text):
                return clause(found["value"])
    if not text.endswith("."):
        return None
    for word, stance in (("yes, ", Agree), ("no, ", Correct)):
        if text.startswith(word):
            claim = parse_claim(text.removeprefix(word)[:-1])
            return None if claim is None else stance(claim)
    return parse_claim(text[:-1])


def parse_claim(text: str) -> Claim | None:
    """The claim in a text such as "the bakery is on Mill Lane", as it stands in the middle of a sentence."""
    for attribute, templates in CLAIM_TEMPLATES.items():
        for template in templates:
            if found := pattern(template, world.VALUES[attribute]).fullmatch(text):
                return Claim(attribute, found["place"], found["value"])
    return None


@cache
def pattern(template: str, values: tuple[str, ...]) -> re.Pattern[str]:
    """The expression that matches a template with any place and any of the values in its slots."""
    expression = re.escape(template)
    for slot, words in (("place", world.PLACES), ("value", values)):
        expression = expression.replace(rf"\{{{slot}\}}", f"(?P<{slot}>{'|'.join(map(re.escape, words))})")
    return re.compile(expression)


@cache
def _sentences() -> dict[str, Clause]:
    return {text: clause for clause in (*_fixed(), Agree(), Correct()) for text in wordings(clause)}


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
