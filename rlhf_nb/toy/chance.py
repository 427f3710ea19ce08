"""Chance that is the same in every process, on every Python version.

`random.Random.random` is the one method whose sequence Python promises to keep, so every draw of the toy world goes
through it; decisions that belong to a text rather than to a place in a sequence come from a hash of that text.
`hash()` is never used: it changes with PYTHONHASHSEED.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def generator(*parts: object) -> random.Random:
    """A generator seeded by the printed form of its parts, e.g. `generator("pairs", 0)`."""
    return random.Random(int.from_bytes(_digest(parts), "big"))


def unit(*parts: object) -> float:
    """A number in [0, 1) that depends on the parts and on nothing else."""
    return (int.from_bytes(_digest(parts)[:7], "big") >> 3) / 2**53  # 53 bits fit a double exactly, so it stays below 1


def pick(rng: random.Random, items: Sequence[T]) -> T:
    return items[int(rng.random() * len(items))]


def weighted(rng: random.Random, weights: dict[T, float]) -> T:
    """A key, with probability proportional to its weight."""
    mark = rng.random() * sum(weights.values())
    for item, weight in weights.items():
        mark -= weight
        if mark < 0:
            return item
    return item


def shuffled(rng: random.Random, items: Sequence[T]) -> list[T]:
    return [item for _, _, item in sorted((rng.random(), index, item) for index, item in enumerate(items))]


def _digest(parts: tuple[object, ...]) -> bytes:
    return hashlib.sha256("\x1f".join(str(part) for part in parts).encode("utf-8", "surrogatepass")).digest()
