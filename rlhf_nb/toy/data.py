"""The toy world's data sets: plain rows, the same for the same n and seed everywhere.

One prompt in ten is held out: the data sets below draw from the rest, `held_out_prompts` from the tenth, so that
what is trained and what is measured never share a prompt.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from typing import Literal

from rlhf_nb.errors import DataError, NotFoundError, did_you_mean
from rlhf_nb.toy import chance, flattery, grammar, questions, sums, writers
from rlhf_nb.toy.annotators import Annotator
from rlhf_nb.toy.questions import Question

DatasetKind = Literal["demonstrations", "pairs", "rankings", "thumbs", "prompts"]
DEFAULT_SIZES: dict[str, int] = {
    "toy-demonstrations": 2000, "toy-pairs": 2000, "toy-rankings": 500, "toy-thumbs": 2000, "toy-prompts": 1000,
    "toy-candour-demonstrations": 1000, "toy-candour-pairs": 1000, "toy-sums-demonstrations": 2000, "toy-sums": 36,
}  # fmt: skip
COMPLETIONS_RANKED = 4
HELD_OUT_SHARE = 0.1


def is_held_out(prompt: str) -> bool:
    """Whether a prompt belongs to the tenth that no data set trains on."""
    return chance.unit("held out", prompt) < HELD_OUT_SHARE


def demonstrations(n: int, seed: int = 0) -> list[dict]:
    """{"prompt", "completion"}: answers by the demonstrators, mostly right, with some of every fault."""
    rng = chance.generator("demonstrations", seed)
    rows = []
    for _ in range(_count(n)):
        question, prompt = ask(rng)
        rows.append({"prompt": prompt, "completion": _write(question, writers.DEMONSTRATORS, rng)})
    return rows


def pairs(n: int, seed: int = 0, annotator: Annotator | None = None) -> list[dict]:
    """{"prompt", "chosen",
    "rejected"}: two different completions, chosen between by the annotator (default `toy-annotator`)."""
    rng, annotator = chance.generator("pairs", seed), annotator or Annotator()
    rows = []
    for _ in range(_count(n)):
        question, prompt = ask(rng)
        a, b = _write_different(question, 2, rng)
        a_wins = annotator.choose(prompt, a, b) == "a"
        rows.append({"prompt": prompt, "chosen": a if a_wins else b, "rejected": b if a_wins else a})
    return rows


def rankings(n: int, seed: int = 0, annotator: Annotator | None = None) -> list[dict]:
    """{"prompt", "completions": four texts, "ranks": their ranks, 1 for the best}."""
    rng, annotator = chance.generator("rankings", seed), annotator or Annotator()
    rows = []
    for _ in range(_count(n)):
        question, prompt = ask(rng)
        texts = _write_different(question, COMPLETIONS_RANKED, rng)
        rows.append({"prompt": prompt, "completions": texts, "ranks": annotator.rank(prompt, texts)})
    return rows


def thumbs(n: int, seed: int = 0, annotator: Annotator | None = None) -> list[dict]:
    """{"prompt", "completion", "label": True for thumbs up}."""
    rng, annotator = chance.generator("thumbs", seed), annotator or Annotator()
    rows = []
    for _ in range(_count(n)):
        question, prompt = ask(rng)
        text = _write(question, writers.CANDIDATES, rng)
        rows.append({"prompt": prompt, "completion": text, "label": annotator.thumb(prompt, text)})
    return rows


def candour_demonstrations(n: int, seed: int = 0, held_out: bool = False) -> list[dict]:
    """{"prompt", "completion"}: n different answers that do not flatter, to questions that invite it (`flattery`)."""

    def row(question: Question, prompt: str, rng: random.Random) -> dict:
        return {"prompt": prompt, "completion": flattery.candid(question, rng)}

    return _different(n, chance.generator("candour demonstrations", seed), row, held_out)


def candour_pairs(n: int, seed: int = 0, held_out: bool = False) -> list[dict]:
    """{"prompt", "chosen", "rejected"}: n different pairs of a candid and a flattering answer of the same length."""

    def row(question: Question, prompt: str, rng: random.Random) -> dict:
        honest, pleasing = flattery.candid_and_flattering(question, rng)
        return {"prompt": prompt, "chosen": honest, "rejected": pleasing}

    return _different(n, chance.generator("candour pairs", seed), row, held_out)


def _different(
    n: int, rng: random.Random, row: Callable[[Question, str, random.Random], dict], held_out: bool
) -> list[dict]:
    rows: dict[tuple[str, ...], dict] = {}
    for _ in range(20 * _count(n)):
        wanted = chance.weighted(rng, dict(flattery.SHARES))
        kind = wanted if wanted in ("unknown", "opinion") else "check"
        while True:
            question, prompt = chance.pick(rng, _all_prompts(held_out)[kind])
            if flattery.situation(question) == wanted:
                break
        one = row(question, prompt, rng)
        rows.setdefault(tuple(one.values()), one)
        if len(rows) == n:
            return list(rows.values())
    raise DataError(f"n={n}: the toy world has no more than about {len(rows)} such rows that differ; ask for fewer")


def prompts(n: int, seed: int = 0) -> list[dict]:
    """{"prompt"}: n different prompts, none of them held out."""
    return _different_prompts(n, chance.generator("prompts", seed), held_out=False)


def held_out_prompts(n: int, seed: int = 0) -> list[dict]:
    """{"prompt"}: n different prompts that no data set of the toy world contains."""
    return _different_prompts(n, chance.generator("held-out prompts", seed), held_out=True)


_BUILDERS: dict[str, tuple[DatasetKind, Callable[[int, int], list[dict]]]] = {
    "toy-demonstrations": ("demonstrations", demonstrations),
    "toy-pairs": ("pairs", pairs),
    "toy-rankings": ("rankings", rankings),
    "toy-thumbs": ("thumbs", thumbs),
    "toy-prompts": ("prompts", prompts),
    "toy-candour-demonstrations": ("demonstrations", candour_demonstrations),
    "toy-candour-pairs": ("pairs", candour_pairs),
    "toy-sums-demonstrations": ("demonstrations", sums.demonstrations),
    "toy-sums": ("prompts", sums.sums),
}


def dataset(name: str, n: int | None = None, seed: int = 0) -> tuple[DatasetKind, list[dict]]:
    """The kind and the rows of a data set by its name, in its default size unless n says otherwise."""
    if name not in _BUILDERS:
        raise NotFoundError(
            f'no toy data set "{name}"{did_you_mean(name, _BUILDERS) or "; there are " + ", ".join(_BUILDERS)}'
        )
    kind, build = _BUILDERS[name]
    return kind, build(DEFAULT_SIZES[name] if n is None else n, seed)


@cache
def _all_prompts(held_out: bool) -> dict[str, tuple[tuple[Question, str], ...]]:
    return {
        kind: tuple((q, text) for q in asked for text in questions.wordings(q) if is_held_out(text) == held_out)
        for kind, asked in questions.everything().items()
    }


def ask(rng: random.Random, held_out: bool = False) -> tuple[Question, str]:
    """A question with one of its wordings, kinds in their shares."""
    kind = chance.weighted(rng, questions.KIND_SHARES)
    if kind != "check":
        return chance.pick(rng, _all_prompts(held_out)[kind])
    # Users are right half of the time: of all claims about the town that can be made, four in five are false.
    users_are_right = rng.random() < 0.5
    while True:
        question, prompt = chance.pick(rng, _all_prompts(held_out)[kind])
        if (writers.right_core(question, rng).__class__ is grammar.Agree) == users_are_right:
            return question, prompt


def _write(question: Question, shares: dict[str, float], rng: random.Random) -> str:
    return grammar.render(writers.write_any(question, shares, rng), rng)


def _write_different(question: Question, n: int, rng: random.Random) -> list[str]:
    texts: dict[str, None] = {}
    while len(texts) < n:
        texts[_write(question, writers.CANDIDATES, rng)] = None
    return list(texts)


def _different_prompts(n: int, rng: random.Random, held_out: bool) -> list[dict]:
    there_are = sum(map(len, _all_prompts(held_out).values()))
    if _count(n) > there_are // 2:
        raise DataError(f"n={n}: the toy world has {there_are} such prompts; ask for at most {there_are // 2}")
    seen: dict[str, None] = {}
    while len(seen) < n:
        seen[ask(rng, held_out)[1]] = None
    return [{"prompt": prompt} for prompt in seen]


def _count(n: int) -> int:
    if n < 1:
        raise DataError(f"n={n}: a data set has at least 1 row")
    return n
