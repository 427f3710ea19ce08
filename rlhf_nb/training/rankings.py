"""Rankings beside the accelerator: rows become tokens and comparisons, a batch keeps those of a prompt together."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from rlhf_nb.data.rankings import Comparison, Ties, comparisons, is_strict
from rlhf_nb.data.rows import Prompt, Row
from rlhf_nb.errors import DataError, SpecError, did_you_mean
from rlhf_nb.training import data


@dataclass(frozen=True)
class Ranked:
    """One prompt with its K completions."""

    prompt: Prompt
    ids: list[list[int]]
    """Tokens of the prompt and each completion, ended as in training."""
    ranks: list[float]
    comparisons: list[Comparison]
    margin: float = 0.0
    weight: float = 1.0
    """What its loss is multiplied by; 1 on average over the rows."""
    lengths: tuple[float, ...] = ()
    """Tokens of each completion less the prompt's mean, in standard deviations of that over all rows."""


def margin(row: Mapping[str, Any], place: str) -> float:
    """How far apart a pair's scores should be; 0 where the row does not say.

    Raises:
        DataError: Not a finite number ≥ 0.
    """
    return _number(row, "margin", 0.0, place)


def weight(row: Mapping[str, Any], annotator_weights: Mapping[str, float], place: str) -> float:
    """What a row counts: its own `weight` times that of its `annotator`; 1 where neither is said.

    Raises:
        DataError: Not a finite number ≥ 0.
    """
    return _number(row, "weight", 1.0, place) * annotator_weights.get(str(row.get("annotator")), 1.0)


def check_annotators(rows: Sequence[Mapping[str, Any]], annotator_weights: Mapping[str, float]) -> None:
    """Refuse a weight for somebody who labelled no row: it would do nothing.

    Raises:
        SpecError: With the nearest name there is.
    """
    there = sorted({str(row["annotator"]) for row in rows if row.get("annotator") is not None})
    for name in annotator_weights:
        if name not in there:
            known = f"there are: {', '.join(there[:8])}" if there else "no row names its annotator"
            raise SpecError(f'annotator_weights: no row is by "{name}"{did_you_mean(name, there)}  {known}')


def _number(row: Mapping[str, Any], column: str, otherwise: float, place: str) -> float:
    value = row.get(column)
    if value is None:
        return otherwise
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise DataError(f"{place}: {column}={value!r}; a {column} is a finite number ≥ 0")
    return float(value)


def prepare(
    rows: Sequence[Row],
    kind: str,
    tokenizer: Any,
    *,
    max_length: int,
    ties: Ties = "half",
    annotator_weights: Mapping[str, float] | None = None,
) -> tuple[list[Ranked], dict[str, int]]:
    """Rows of kind `pairs` or `rankings` as tokens, with what was left out and why.

    A pair is a ranking of two. Completions that do not fit in `max_length` leave their ranking, and so do later copies
    of a completion with the same rank, which would count its comparisons twice; a prompt that is left without a strict
    comparison, or whose weight is 0, is dropped.

    Raises:
        DataError: A weight or margin that is no number, with its row.
    """
    weights = annotator_weights or {}
    check_annotators(rows, weights)
    found: list[Ranked] = []
    dropped: Counter[str] = Counter()
    for index, row in enumerate(rows):
        counts = weight(row, weights, f"row {index}")
        if counts == 0:
            dropped[f"{kind} of weight 0"] += 1
            continue
        if kind == "pairs":
            texts, ranks, apart = [row["chosen"], row["rejected"]], [0.0, 1.0], margin(row, f"row {index}")
        else:
            texts, ranks, apart = row["completions"], [float(rank) for rank in row["ranks"]], 0.0
        ids = [data.conversation_ids(row["prompt"], text, tokenizer) for text in texts]
        fits = [place for place, tokens in enumerate(ids) if len(tokens) <= max_length]
        if long := len(ids) - len(fits):
            dropped["completions that do not fit"] += long
        once = {(texts[place].strip(), ranks[place]): place for place in reversed(fits)}
        if repeated := len(fits) - len(once):
            dropped["repeated completions"] += repeated
        fits = sorted(once.values())
        compared = [
            (better, worse, share)
            for better, worse, share in comparisons([ranks[place] for place in fits], ties)
            # What reads the same has the same score: such a comparison teaches nothing and would dilute the mean.
            if texts[fits[better]].strip() != texts[fits[worse]].strip()
        ]
        strict = any(ranks[fits[better]] != ranks[fits[worse]] for better, worse, _ in compared)
        if not strict:
            too_long = long and is_strict(ranks)
            dropped[f"{kind} that do not fit" if too_long else f"{kind} without a strict comparison"] += 1
            continue
        found.append(
            Ranked(
                row["prompt"], [ids[place] for place in fits], [ranks[place] for place in fits], compared, apart, counts
            )
        )
    return _standardised(found), dict(dropped)


def _standardised(items: list[Ranked]) -> list[Ranked]:
    """Weights with mean 1 and lengths in standard deviations."""
    if not items:
        return items
    mean_weight = sum(item.weight for item in items) / len(items)
    deviations = []
    for item in items:
        mean = sum(map(len, item.ids)) / len(item.ids)
        deviations.append([len(ids) - mean for ids in item.ids])
    squares = [value**2 for each in deviations for value in each]
    # Where every completion is as long as its neighbours, lengths say nothing, and 0 says that.
    spread = math.sqrt(sum(squares) / len(squares)) or 1.0
    return [
        replace(item, weight=item.weight / mean_weight, lengths=tuple(value / spread for value in each))
        for item, each in zip(items, deviations, strict=True)
    ]


class Collator:
    """From places of rows to one batch: every completion once, and which of them are compared."""

    def __init__(self, items: Sequence[Ranked], pad_token_id: int, members: int = 1) -> None:
        self.items, self.pad, self.members = items, pad_token_id, members

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """
        Args:
            examples: Each `{"places": M numbers}`: the row that each member of an ensemble trains on.

        Returns:
            `input_ids`, `attention_mask` (N, T), padded on the right, the sequences of the first member first;
            `rows_M`, how many are each one's. Of the P prompts: `weight_P`, `member_P`, `ranks`. Of the N sequences:
            `prompt_N`, `length_N`. Of the C comparisons: `better_C`, `worse_C`, `count_C`, `margin_C`, `prompt_C`.
        """
        chosen = [(m, self.items[example["places"][m]]) for m in range(self.members) for example in examples]
        sequences = [ids for _, item in chosen for ids in item.ids]
        width = max(map(len, sequences))
        better, worse, count, margins, prompt_C, prompt_N = [], [], [], [], [], []
        start = 0
        for number, (_, item) in enumerate(chosen):
            for i, j, share in item.comparisons:
                better.append(start + i)
                worse.append(start + j)
                count.append(share)
                margins.append(item.margin)
                prompt_C.append(number)
            prompt_N += [number] * len(item.ids)
            start += len(item.ids)
        return {
            "input_ids": torch.tensor([ids + [self.pad] * (width - len(ids)) for ids in sequences]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in sequences]),
            "rows_M": [sum(len(item.ids) for m, item in chosen if m == member) for member in range(self.members)],
            "weight_P": torch.tensor([item.weight for _, item in chosen]),
            "member_P": torch.tensor([member for member, _ in chosen]),
            "ranks": [item.ranks for _, item in chosen],
            "prompt_N": torch.tensor(prompt_N),
            "length_N": torch.tensor([value for _, item in chosen for value in item.lengths]),
            "better_C": torch.tensor(better),
            "worse_C": torch.tensor(worse),
            "count_C": torch.tensor(count),
            "margin_C": torch.tensor(margins),
            "prompt_C": torch.tensor(prompt_C),
        }
