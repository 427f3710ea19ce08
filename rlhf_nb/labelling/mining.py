"""Where a reward model is wrong about what a policy says: completions that it scores high and people reject."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from rlhf_nb.data.rows import Row, fault, prompt_key
from rlhf_nb.errors import DataError

AGREES = "the reward model agrees"


def highest(scored: Iterable[Mapping[str, Any]], n: int) -> list[Row]:
    """The n rows whose best completion scores highest, in that order: what to have labelled first.

    Args:
        scored: Rows of kind `completions` with their `scores`.
    """
    rows = [dict(row) for row in _checked(scored)]
    return sorted(rows, key=lambda row: -max(row["scores"]))[:n]


def mined_pairs(
    scored: Iterable[Mapping[str, Any]], labels: Iterable[Mapping[str, Any]], kind: str, *, per_prompt: int = 1
) -> tuple[list[Row], dict[str, int]]:
    """Pairs whose rejected side scores as high as the chosen one or higher: what the reward model has to unlearn.

    Args:
        scored: Rows of kind `completions` with their `scores`, by the reward model in question.
        labels: Fresh labels of some of them: `pairs`, or `thumbs`, where each thumb down is held against the thumbs up
            of its prompt.
        per_prompt: At most so many pairs of a prompt, the largest errors first.

    Returns:
        Rows of kind `pairs` with `chosen_score` and `rejected_score`, largest error of all first; and reason → count.

    Raises:
        DataError: Completions without scores, or labels of another kind.
    """
    scores: dict[tuple[str, str], float] = {}
    for row in _checked(scored):
        for text, score in zip(row["completions"], row["scores"], strict=True):
            scores[prompt_key(row["prompt"]), text.strip()] = float(score)
    dropped: Counter[str] = Counter()
    found: dict[str, list[Row]] = {}
    for prompt, chosen, rejected in _judged(labels, kind, dropped):
        key = prompt_key(prompt)
        sides = [scores.get((key, text.strip())) for text in (chosen, rejected)]
        if sides[0] is None or sides[1] is None:
            dropped["not among the scored completions"] += 1
        elif sides[1] < sides[0]:
            dropped[AGREES] += 1
        elif reason := fault("pairs", pair := {"prompt": prompt, "chosen": chosen, "rejected": rejected}):
            dropped[reason] += 1
        else:
            found.setdefault(key, []).append({**pair, "chosen_score": sides[0], "rejected_score": sides[1]})
    kept: list[Row] = []
    for pairs in found.values():
        pairs.sort(key=_error)
        kept += pairs[:per_prompt]
        if more := len(pairs) - per_prompt:
            dropped["further errors of a prompt"] += max(0, more)
    return sorted(kept, key=_error), {reason: count for reason, count in dropped.items() if count}


def _error(pair: Row) -> float:
    return pair["chosen_score"] - pair["rejected_score"]


def _judged(labels: Iterable[Mapping[str, Any]], kind: str, dropped: Counter[str]) -> Iterable[tuple[Any, str, str]]:
    """(prompt, better, worse) of what the labels say."""
    if kind == "pairs":
        yield from ((row["prompt"], row["chosen"], row["rejected"]) for row in labels)
        return
    if kind != "thumbs":
        raise DataError(f"labels={kind}: fresh labels are pairs or thumbs of the scored completions")
    by_prompt: dict[str, tuple[Any, list[str], list[str]]] = {}
    for row in labels:
        _, ups, downs = by_prompt.setdefault(prompt_key(row["prompt"]), (row["prompt"], [], []))
        (ups if row["label"] else downs).append(row["completion"])
    for prompt, ups, downs in by_prompt.values():
        if downs and not ups:
            dropped["nothing approved to hold it against"] += len(downs)
        yield from ((prompt, up, down) for down in downs for up in ups)


def _checked(scored: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    rows = list(scored)
    for index, row in enumerate(rows):
        texts, scores = row.get("completions"), row.get("scores")
        if not isinstance(texts, list) or not isinstance(scores, list) or len(texts) != len(scores) or not texts:
            raise DataError(f"row {index}: completions with one score each are needed; sample them with a reward")
    return rows
