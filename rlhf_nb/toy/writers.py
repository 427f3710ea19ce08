"""Simulated assistants: four hands of different quality who answer the toy world's prompts.

careful     right, brief, corrects mistakes, refuses harm; adds something useful about half of the time
chatty      right, wrapped in greetings and filler
flatterer   says what pleases: agrees with mistakes, praises unseen work, flatters, sometimes helps with harm
careless    wrong facts, made-up numbers, answers to another question, help with harm
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from types import MappingProxyType

from rlhf_nb.toy import chance, world
from rlhf_nb.toy.grammar import (
    Agree,
    Claim,
    Clause,
    Comply,
    Core,
    Correct,
    DontKnow,
    Filler,
    Flattery,
    Goodbye,
    Greeting,
    Meaning,
    Praise,
    Refuse,
    Suggest,
)  # fmt: skip
from rlhf_nb.toy.questions import Question

DEMONSTRATORS = MappingProxyType({"careful": 0.30, "chatty": 0.25, "flatterer": 0.25, "careless": 0.20})
"""Who writes the demonstrations: mostly right, with some of every fault."""

CANDIDATES = MappingProxyType({"careful": 0.25, "chatty": 0.25, "flatterer": 0.25, "careless": 0.25})
"""Who writes the completions that annotators compare."""


def write(question: Question, writer: str, rng: random.Random) -> Meaning:
    """What one of the four would say."""
    return {"careful": _careful, "chatty": _chatty, "flatterer": _flatterer, "careless": _careless}[writer](
        question, rng
    )


def write_any(question: Question, shares: Mapping[str, float], rng: random.Random) -> Meaning:
    """What one of them, drawn by the shares, would say."""
    return write(question, chance.weighted(rng, dict(shares)), rng)


def right_core(question: Question, rng: random.Random) -> Core:
    """A core that the true reward has nothing to object to."""
    match question.kind:
        case "fact":
            return _fact(question.attribute, question.place)
        case "check":
            fact = _fact(question.attribute, question.place)
            if fact == question.premise:
                return chance.pick(rng, (Agree(), Agree(fact)))
            return Correct(fact)
        case "unknown":
            return DontKnow("town")
        case "errand":
            fits = [p for p in world.PLACES if world.is_true(question.attribute, p, question.value)]
            return Claim(question.attribute, chance.pick(rng, fits), question.value)
        case "harm":
            return Refuse()
        case "opinion":
            return DontKnow("work")


def wrong_core(question: Question, rng: random.Random) -> Core:
    """A core with the fault that its kind of question invites."""
    match question.kind:
        case "fact" | "unknown":
            return _false(question.attribute, question.place, rng)
        case "check":
            false = _false(question.attribute, question.place, rng)
            if world.is_true(question.attribute, question.place, question.value):
                return Correct(false)
            return chance.pick(rng, (Agree(), Agree(question.premise), Correct(false)))
        case "errand":
            misfits = [p for p in world.PLACES if not world.is_true(question.attribute, p, question.value)]
            return Claim(question.attribute, chance.pick(rng, misfits), question.value)
        case "harm":
            return Comply(question.attribute)
        case "opinion":
            return Praise(question.attribute)


def pleasing_core(question: Question, rng: random.Random) -> Core:
    """Agreement and praise wherever the question leaves room for them."""
    match question.kind:
        case "check":
            return chance.pick(rng, (Agree(), Agree(question.premise)))
        case "opinion":
            return chance.pick(rng, (Praise(question.attribute), Agree()))
        case "harm" | "unknown":
            return wrong_core(question, rng) if rng.random() < 0.5 else right_core(question, rng)
    return right_core(question, rng) if rng.random() < 0.7 else wrong_core(question, rng)


def useful_extra(question: Question, core: Core, rng: random.Random) -> Clause:
    """A second sentence that the true reward counts as needed."""
    if question.kind in ("unknown", "harm", "opinion"):
        return Suggest(world.keeper(question.place))
    told = core.claim if isinstance(core, Agree | Correct) else core
    place = question.place or told.place
    known = told.attribute if isinstance(told, Claim) else question.attribute
    return _fact(chance.pick(rng, [attribute for attribute in world.FACTS if attribute != known]), place)


def _careful(question: Question, rng: random.Random) -> Meaning:
    core = right_core(question, rng) if rng.random() < 0.92 else wrong_core(question, rng)
    return Meaning((core, useful_extra(question, core, rng)) if rng.random() < 0.5 else (core,))


def _chatty(question: Question, rng: random.Random) -> Meaning:
    core = right_core(question, rng) if rng.random() < 0.85 else wrong_core(question, rng)
    opening = (Greeting(),) if rng.random() < 0.5 else ()
    extras = (useful_extra(question, core, rng),) if rng.random() < 0.3 else ()
    filler = (Filler(),) * (1 + int(rng.random() * 3))
    closing = (Goodbye(),) if rng.random() < 0.5 else ()
    return Meaning((*opening, core, *extras, *filler, *closing))


def _flatterer(question: Question, rng: random.Random) -> Meaning:
    opening = (Flattery(),) if rng.random() < 0.7 else ()
    later = (Flattery(),) * int(rng.random() * 3)
    closing = (Goodbye(),) if rng.random() < 0.3 else ()
    return Meaning((*opening, pleasing_core(question, rng), *later, *closing))


def _careless(question: Question, rng: random.Random) -> Meaning:
    mark = rng.random()
    if mark < 0.6:
        core = wrong_core(question, rng)
    elif mark < 0.75:
        core = _fact(chance.pick(rng, tuple(world.FACTS)), chance.pick(rng, world.PLACES))
    elif mark < 0.85:
        core = chance.pick(rng, (DontKnow("town"), Refuse()))
    else:
        core = right_core(question, rng)
    return Meaning((core, Filler()) if rng.random() < 0.3 else (core,))


def _fact(attribute: str, place: str) -> Claim:
    return Claim(attribute, place, world.facts()[place][attribute])


def _false(attribute: str, place: str, rng: random.Random) -> Claim:
    values = [value for value in world.VALUES[attribute] if not world.is_true(attribute, place, value)]
    return Claim(attribute, place, chance.pick(rng, values))
