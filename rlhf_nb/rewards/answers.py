"""Rewards that compare the end of a completion with the row's `answer`: 1 for right, 0 for anything else."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from rlhf_nb.errors import RewardError
from rlhf_nb.rewards.math_checker import checker
from rlhf_nb.rewards.text import last_number

_BOXED = re.compile(r"\\boxed\s*\{")
_HASHES = re.compile(r"####[ \t$]*(-?[\d.,]*\d)[ \t%.]*$", re.MULTILINE)


def math_answer(
    prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[Any], *, timeout: int = 3
) -> list[float]:
    """1 where the final answer is mathematically the row's `answer`. The registered reward `math-answer`.

    Compared by math-verify: 1/2, 0.5 and its LaTeX are one answer. The final answer is the last boxed one, GSM8K's
    `#### n`, or else what math-verify finds towards the end of the text. `answer` may be bare, or a worked solution
    that ends so itself.

    Args:
        timeout: CPU seconds for reading one answer, and again for comparing. What takes longer scores 0.

    Returns:
        0 also for every completion of a row whose own `answer` math-verify cannot read.
    """
    pairs = [(_reference(str(one)), _final(completion)) for one, completion in zip(answer, completions, strict=True)]
    return [float(verdict) for verdict in checker.verdicts(pairs, timeout=timeout)]


def _final(text: str) -> str:
    # Of several boxed ones math-verify takes the last; a heading with a number is no answer beside one.
    if _BOXED.search(text):
        return text
    found = _HASHES.findall(text)
    return f"\\boxed{{{found[-1].replace(',', '')}}}" if found else text


def _reference(answer: str) -> str:
    final = _final(answer)
    return final if "\\boxed" in final else f"\\boxed{{{final}}}"


def numeric(
    prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[Any], *, tolerance: float = 1e-6
) -> list[float]:
    """1 where the last number of the completion is the last number of the row's `answer`. The registered `numeric`.

    Args:
        tolerance: Largest difference that is still right, relative to the larger number; absolute for an answer of 0.

    Raises:
        RewardError: A row's `answer` holds no number.
    """
    scores = []
    for one, completion in zip(answer, completions, strict=True):
        wanted = float(one) if isinstance(one, int | float) else last_number(str(one))
        if wanted is None:
            raise RewardError(f"reward numeric: answer={str(one)[:60]!r} holds no number; correct the row")
        said = last_number(completion)
        right = said is not None and math.isclose(said, wanted, rel_tol=tolerance, abs_tol=0 if wanted else tolerance)
        scores.append(float(right))
    return scores


def exact_match(
    prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[Any], *, ignore_case: bool = False
) -> list[float]:
    """1 where the completion is the row's `answer`, or one of them if it is a list. The registered `exact-match`.

    White space around and its amount inside do not count.
    """

    def key(text: Any) -> str:
        joined = " ".join(str(text).split())
        return joined.casefold() if ignore_case else joined

    return [
        float(key(completion) in {key(each) for each in (one if isinstance(one, list | tuple) else [one])})
        for one, completion in zip(answer, completions, strict=True)
    ]
