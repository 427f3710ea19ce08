"""Items of a pair queue: a prompt and two completions, `a` and `b`, and what is known of where they come from.

`a_from` and `b_from` name a source (a model, or "chosen" and "rejected" of a data set). They are kept with the task
and never shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

from rlhf_nb.data.rows import is_prompt
from rlhf_nb.errors import DataError

Item = dict[str, Any]


def pair_items(rows: Iterable[Mapping[str, Any]], kind: str) -> list[Item]:
    """Items from the rows of a data set: one a pair, one for every two completions of a ranking or of one prompt.

    Raises:
        DataError: rows of a kind that holds no two completions of a prompt.
    """
    if kind == "pairs":
        return [_item(row["prompt"], row["chosen"], row["rejected"], "chosen", "rejected") for row in rows]
    if kind == "rankings":
        return [
            _item(
                row["prompt"],
                row["completions"][i],
                row["completions"][j],
                f"rank {row['ranks'][i]}",
                f"rank {row['ranks'][j]}",
            )
            for row in rows
            for i, j in combinations(range(len(row["completions"])), 2)
        ]
    if kind == "completions":
        return [
            _item(row["prompt"], row["completions"][i], row["completions"][j], f"completion {i}", f"completion {j}")
            for row in rows
            for i, j in combinations(range(len(row["completions"])), 2)
            # Nothing to choose between.
            if row["completions"][i].strip() != row["completions"][j].strip()
        ]
    raise DataError(f"{kind} hold no two completions of a prompt to compare; label pairs, rankings or completions")


def model_items(prompts: Sequence[Any], one: Sequence[str], other: Sequence[str], names: tuple[str, str]) -> list[Item]:
    """Items that compare two models on the same prompts. Identical completions leave nothing to choose: left out.

    Args:
        one, other: a completion of each prompt, in order.
        names: what the two models are called in `win_rate`.

    Raises:
        DataError: lengths differ, or the two names are the same.
    """
    if not len(prompts) == len(one) == len(other):
        raise DataError(
            f"{len(prompts)} prompts, {len(one)} and {len(other)} completions: one of each a prompt is needed"
        )
    if names[0] == names[1]:
        raise DataError(f"both models are called {names[0]!r}; a win rate needs two names")
    triples = zip(prompts, one, other, strict=True)
    return [_item(prompt, a, b, *names) for prompt, a, b in triples if a.strip() != b.strip()]


def _item(prompt: Any, a: str, b: str, a_from: str, b_from: str) -> Item:
    return {"prompt": prompt, "a": a, "b": b, "a_from": a_from, "b_from": b_from}


def check_items(items: Iterable[Mapping[str, Any]]) -> list[Item]:
    """Items as dicts.

    Raises:
        DataError: an item without a prompt or without two texts.
    """
    checked = []
    for index, item in enumerate(items):
        if not is_prompt(item.get("prompt")):
            raise DataError(f"item {index}: prompt={item.get('prompt')!r} is neither text nor messages")
        for side in ("a", "b"):
            if not isinstance(item.get(side), str):
                raise DataError(f"item {index}: {side}={item.get(side)!r} is not text; a pair item has prompt, a and b")
        checked.append(dict(item))
    return checked
