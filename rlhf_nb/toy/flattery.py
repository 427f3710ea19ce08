"""Candour against flattery: for what people ask fishing for agreement, an honest answer and one that only pleases.

mistaken   the user claims something false    "No, the bakery is on Mill Lane."   against   "Yes, you are right."
right      the user claims something true     "Yes, ..." and a fact               against   "Yes, ..." and a compliment
unknown    nobody can know                    "I do not know that."               against   a made-up number or name
opinion    the user's work was never seen     "I have not seen it, ..."           against   "Your poem is the best ..."

Both answers of a pair are as long: length tells nothing, so what is learnt is not a preference for one. Those who are
right are among them so that contradicting is not what is learnt either.
"""

from __future__ import annotations

import random
import re
from types import MappingProxyType
from typing import Literal

from rlhf_nb.toy import chance, grammar, world, writers
from rlhf_nb.toy.grammar import Agree, Claim, Correct, DontKnow, Flattery, Meaning, Praise, Suggest
from rlhf_nb.toy.questions import Question

Situation = Literal["mistaken", "right", "unknown", "opinion"]
SHARES = MappingProxyType({"mistaken": 0.35, "right": 0.15, "unknown": 0.25, "opinion": 0.25})
"""How often each situation occurs in the data sets of candour."""
_OPENS_WITH_A_NUMBER = re.compile(rf"(?:^|[.!?] )(?:{'|'.join(map(str.capitalize, world.NUMBERS))})\b")
TRIES = 40
"""Flattering answers that are drawn for one candid answer before another candid one is drawn."""


def situation(question: Question) -> Situation | None:
    """Which of the four a question is; None for one that does not fish for agreement."""
    if question.kind == "check":
        return "right" if world.is_true(question.attribute, question.place, question.value) else "mistaken"
    return question.kind if question.kind in ("unknown", "opinion") else None


def length(text: str) -> int:
    """Words and punctuation marks: the toy tokenizer's tokens, but for a number at the start of a sentence."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def candid(question: Question, rng: random.Random) -> str:
    """An answer that the true reward has nothing to object to, brief or with something useful behind it."""
    core = writers.right_core(question, rng)
    if isinstance(core, Agree):
        core = Agree(_fact(question))
    more = rng.random() < 0.6
    if isinstance(core, DontKnow):
        return grammar.render(Meaning((core, Suggest(world.keeper(question.place))) if more else (core,)), rng)
    if isinstance(core, Correct) and rng.random() < 0.3:
        return grammar.render(Meaning((Correct(), _fact(question))), rng)
    return grammar.render(Meaning((core, writers.useful_extra(question, core, rng)) if more else (core,)), rng)


def flattering(question: Question, rng: random.Random) -> str:
    """An answer that says what pleases."""
    match situation(question):
        case "mistaken" | "right":
            core = chance.pick(rng, (Agree(), Agree(question.premise)))
        case "opinion":
            core = chance.pick(rng, (Praise(question.attribute), Agree()))
        case _:
            core = Claim(question.attribute, question.place, chance.pick(rng, world.VALUES[question.attribute]))
    # Agreeing with somebody who is right pleases nobody by itself.
    fewest = 1 if situation(question) == "right" else 0
    compliments = fewest + int(rng.random() * (3 - fewest))
    before = compliments > 0 and rng.random() < 0.5
    meaning = Meaning((*(Flattery(),) * before, core, *(Flattery(),) * (compliments - before)))
    # "Eighty" is three tokens and " eighty" one: such a wording would be the longer one.
    while _OPENS_WITH_A_NUMBER.search(text := grammar.render(meaning, rng)):
        pass
    return text


def candid_and_flattering(question: Question, rng: random.Random) -> tuple[str, str]:
    """The two answers of a pair, equally long."""
    while True:
        honest = candid(question, rng)
        for _ in range(TRIES):
            pleasing = flattering(question, rng)
            if length(pleasing) == length(honest):
                return honest, pleasing


def _fact(question: Question) -> Claim:
    return Claim(question.attribute, question.place, world.facts()[question.place][question.attribute])
