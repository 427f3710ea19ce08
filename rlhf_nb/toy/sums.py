"""Sums of two small numbers: a task with one right answer, for rewards that check it.

The demonstrations know how a sum is answered and are careless about it: a stated share of them is off by one to three.
A model fitted to them answers in their form and is right no more often than they are, so that a reward which checks
the answer has something to raise.
"""

from __future__ import annotations

from rlhf_nb.errors import DataError
from rlhf_nb.toy import chance

LARGEST = 5
CARELESS = 0.5
"""Share of the demonstrations that are wrong."""


def everything() -> list[dict]:
    """Every sum of two numbers from 0 to 5 once: `prompt`, and `answer` as text."""
    numbers = range(LARGEST + 1)
    return [{"prompt": f"What is {a} + {b}?", "answer": str(a + b)} for a in numbers for b in numbers]


def sums(n: int = (LARGEST + 1) ** 2, seed: int = 0) -> list[dict]:
    """{"prompt", "answer"}: n different sums, in an order drawn by the seed.

    Raises:
        DataError: More than there are, or fewer than one.
    """
    rows = everything()
    if not 1 <= n <= len(rows):
        raise DataError(f"n={n}: there are {len(rows)} sums of two numbers up to {LARGEST}; ask for 1 to {len(rows)}")
    return chance.shuffled(chance.generator("sums", seed), rows)[:n]


def demonstrations(n: int = 2000, seed: int = 0) -> list[dict]:
    """{"prompt", "completion"}: n answers, a `CARELESS` share of them wrong by one to three.

    Raises:
        DataError: n below 1.
    """
    if n < 1:
        raise DataError(f"n={n}: a data set has at least 1 row")
    rng, there_are, rows = chance.generator("sums demonstrations", seed), tuple(everything()), []
    for _ in range(n):
        row = chance.pick(rng, there_are)
        right = int(row["answer"])
        near = tuple(right + off for off in (-3, -2, -1, 1, 2, 3) if right + off >= 0)
        said = chance.pick(rng, near) if rng.random() < CARELESS else right
        rows.append({"prompt": row["prompt"], "completion": f"That is {said}."})
    return rows
