"""What the base model `toy` reads: descriptions of the town, which are true, and talk of every quality.

The talk is in the chat template's form. Half of it was written by the four hands of `writers`; the other half
answers another question or is a broken piece of an answer, so that the base model speaks the town's language and
knows its facts but does not reliably answer. No held-out prompt occurs.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from rlhf_nb.toy import chance, data, grammar, world, writers
from rlhf_nb.toy.grammar import Claim

START, END, PAD = "<|start|>", "<|end|>", "<|pad|>"
ROLES = ("system", "user", "assistant")
DESCRIPTIONS_SHARE = 0.35
ANSWERS_SHARE = 0.5
BROKEN_SHARE = 0.15


def documents(n: int, seed: int = 0) -> Iterator[str]:
    """n texts, each from its start token to its end token."""
    rng = chance.generator("corpus", seed)
    for _ in range(n):
        text = _description(rng) if rng.random() < DESCRIPTIONS_SHARE else _talk(rng)
        yield f"{START}{text}{END}"


def _description(rng: random.Random) -> str:
    """Facts about one place, or the same fact about several."""
    if rng.random() < 0.7:
        place = chance.pick(rng, world.PLACES)
        claims = [Claim(attribute, place, value) for attribute, value in world.facts()[place].items()]
        claims += [Claim("open_on", place, day) for day in world.DAYS if world.is_true("open_on", place, day)][:1]
    else:
        attribute = chance.pick(rng, tuple(world.FACTS))
        claims = [Claim(attribute, place, known[attribute]) for place, known in world.facts().items()]
    told = chance.shuffled(rng, claims)[: 3 + int(rng.random() * 4)]
    return grammar.render(grammar.Meaning(tuple(told)), rng)


def _talk(rng: random.Random) -> str:
    question, prompt = data.ask(rng)
    if rng.random() >= ANSWERS_SHARE:
        question, _ = data.ask(rng)
    completion = grammar.render(writers.write_any(question, writers.CANDIDATES, rng), rng)
    if rng.random() < BROKEN_SHARE:
        words = completion.split()
        completion = " ".join(words[: 1 + int(rng.random() * len(words))])
    return f"<|user|>{prompt}<|assistant|>{completion}"
