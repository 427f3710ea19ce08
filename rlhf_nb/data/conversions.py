"""One kind of rows from another, with a count of what could not come along."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import combinations
from typing import Any

from rlhf_nb.data.formats import Drop, transcript_messages
from rlhf_nb.data.rows import COLUMNS, Row, fault, prompt_key
from rlhf_nb.errors import DataError

Converted = tuple[list[Row], dict[str, int]]

_JUDGED = {column for columns in COLUMNS.values() for column in columns} - {"prompt"}
_JUDGED |= {"details", "scores", "golds", "completion_lengths", "completion_ended"}
"""Columns about completions that somebody else gave."""


def about_completions(column: str) -> bool:
    """Whether a column belongs to completions and not to the prompt."""
    return column in _JUDGED


def pairs_to_thumbs(rows: Iterable[Mapping[str, Any]]) -> Converted:
    """Each pair gives a thumb up and a thumb down; the same thumb of a prompt and completion is kept once."""
    return _distinct_thumbs(
        (row["prompt"], row[side], side == "chosen") for row in rows for side in ("chosen", "rejected")
    )


def rankings_to_pairs(rows: Iterable[Mapping[str, Any]]) -> Converted:
    """Every two completions with different ranks: K(K-1)/2 of a ranking without ties."""
    pairs: list[Row] = []
    dropped: Counter[str] = Counter()
    for row in rows:
        extra = {k: v for k, v in row.items() if k not in ("prompt", "completions", "ranks", "details")}
        for (one, one_rank), (two, two_rank) in combinations(zip(row["completions"], row["ranks"], strict=True), 2):
            chosen, rejected = (one, two) if one_rank < two_rank else (two, one)
            pair = {"prompt": row["prompt"], "chosen": chosen, "rejected": rejected, **extra}
            reason = "equal ranks" if one_rank == two_rank else fault("pairs", pair)
            if reason:
                dropped[reason] += 1
            else:
                pairs.append(pair)
    return pairs, dict(dropped)


def pairs_to_demonstrations(rows: Iterable[Mapping[str, Any]]) -> Converted:
    """The chosen completion of each pair."""
    return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows], {}


def thumbs_to_demonstrations(rows: Iterable[Mapping[str, Any]]) -> Converted:
    """Completions with a thumb up."""
    rows = list(rows)
    good = [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows if row["label"]]
    return good, {"thumb down": len(rows) - len(good)} if len(good) < len(rows) else {}


def to_prompts(rows: Iterable[Mapping[str, Any]]) -> Converted:
    """Each prompt once, with what its first row says beside: a verifier reads the answer or the tests from there."""
    rows = list(rows)
    distinct: dict[str, Row] = {}
    for row in rows:
        kept = {column: value for column, value in row.items() if column not in _JUDGED}
        distinct.setdefault(prompt_key(row["prompt"]), kept)
    prompts = list(distinct.values())
    return prompts, {"repeated prompt": len(rows) - len(prompts)} if len(prompts) < len(rows) else {}


def to_chat(rows: Iterable[Mapping[str, Any]]) -> Converted:
    """Rows whose text prompts are HH transcripts, with chat messages instead; other rows stay as they are."""
    converted: list[Row] = []
    dropped: Counter[str] = Counter()
    for row in rows:
        if not isinstance(row["prompt"], str) or "\n\nHuman:" not in row["prompt"]:
            converted.append(dict(row))
            continue
        try:
            prompt = transcript_messages(row["prompt"])
        except Drop as reason:
            dropped[str(reason)] += 1
            continue
        texts = {key: row[key].strip() for key in ("chosen", "rejected", "completion") if isinstance(row.get(key), str)}
        converted.append({**row, "prompt": prompt, **texts})
    return converted, dict(dropped)


def _distinct_thumbs(thumbs: Iterable[tuple[Any, str, bool]]) -> Converted:
    rows: list[Row] = []
    seen: set[tuple[str, str, bool]] = set()
    dropped: Counter[str] = Counter()
    for prompt, completion, label in thumbs:
        key = (repr(prompt), completion, label)
        if key in seen:
            dropped["repeated thumb"] += 1
            continue
        seen.add(key)
        rows.append({"prompt": prompt, "completion": completion, "label": label})
    return rows, dict(dropped)


CONVERSIONS: dict[tuple[str, str], Callable[[Iterable[Mapping[str, Any]]], Converted]] = {
    ("pairs", "thumbs"): pairs_to_thumbs,
    ("rankings", "pairs"): rankings_to_pairs,
    ("pairs", "demonstrations"): pairs_to_demonstrations,
    ("thumbs", "demonstrations"): thumbs_to_demonstrations,
    ("demonstrations", "prompts"): to_prompts,
    ("pairs", "prompts"): to_prompts,
    ("rankings", "prompts"): to_prompts,
    ("thumbs", "prompts"): to_prompts,
    ("completions", "prompts"): to_prompts,
}


def convert(rows: Iterable[Mapping[str, Any]], from_kind: str, to_kind: str) -> Converted:
    """Rows of another kind.

    Raises:
        DataError: that kind does not contain what the other needs.
    """
    if from_kind == to_kind:
        return [dict(row) for row in rows], {}
    if (from_kind, to_kind) not in CONVERSIONS:
        ways = [to for start, to in CONVERSIONS if start == from_kind]
        out = f"it can become {', '.join(ways)}" if ways else "nothing else can be made of it"
        raise DataError(f"{from_kind} cannot become {to_kind}: {out}")
    return CONVERSIONS[from_kind, to_kind](rows)
