"""Rows and their kinds: what a data set of human feedback can hold, and its one canonical encoding.

| kind | columns |
|---|---|
| `demonstrations` | `prompt`, `completion` |
| `pairs` | `prompt`, `chosen`, `rejected` |
| `rankings` | `prompt`, `completions`, `ranks` (0 is best; equal ranks are ties) |
| `thumbs` | `prompt`, `completion`, `label` |
| `prompts` | `prompt` |
| `completions` | `prompt`, `completions` (what a model said; `scores` beside where they were scored) |

A prompt is a string, or a list of chat messages `{"role", "content"}`. A completion is always one string: what the
assistant says next. Further columns are kept as they are. `to_trl` gives the shape TRL's trainers want.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rlhf_nb.errors import DataError

Row = dict[str, Any]
Prompt = str | list[dict[str, str]]

COLUMNS: dict[str, tuple[str, ...]] = {
    "demonstrations": ("prompt", "completion"),
    "pairs": ("prompt", "chosen", "rejected"),
    "rankings": ("prompt", "completions", "ranks"),
    "thumbs": ("prompt", "completion", "label"),
    "prompts": ("prompt",),
    "completions": ("prompt", "completions"),
}
KINDS = tuple(COLUMNS)
COMPLETION_COLUMNS = ("completion", "chosen", "rejected")


def canonical_json(value: Any) -> str:
    """The one JSON text of a value: keys sorted, no spaces, UTF-8 characters as themselves.

    Raises:
        DataError: NaN or infinity, a lone surrogate, or an object that JSON has no form for.
    """
    try:
        text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"text holds {error.object[error.start]!r}, half of a character; replace it before hashing"
        ) from None
    except (TypeError, ValueError) as error:
        raise DataError(
            f"a value has no canonical JSON form ({error}); use text, numbers, booleans, lists or null"
        ) from None
    return text


def encode_rows(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Canonical JSONL, one row a line, each line ended."""
    lines = []
    for index, row in enumerate(rows):
        try:
            lines.append(canonical_json(row))
        except DataError as error:
            raise DataError(f"row {index}: {error}") from None
    return "".join(f"{line}\n" for line in lines).encode("utf-8")


def decode_rows(data: bytes) -> list[Row]:
    """The rows of `encode_rows`. Splits on newline alone: U+2028 and friends stand unescaped inside strings."""
    return [json.loads(line) for line in data.split(b"\n") if line]


def content_hash(rows: Iterable[Mapping[str, Any]]) -> str:
    """SHA-256, in hex, of the canonical JSONL. The order of the rows counts; the order of the columns does not."""
    return hashlib.sha256(encode_rows(rows)).hexdigest()


def is_messages(value: Any) -> bool:
    """A non-empty list of `{"role": str, "content": str}`."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in value
        )
    )


def is_prompt(value: Any) -> bool:
    """A string with something in it, or messages."""
    return (isinstance(value, str) and bool(value.strip())) or is_messages(value)


def prompt_key(prompt: Prompt) -> str:
    """What two rows have in common when they have the same prompt: surrounding white space does not count."""
    return prompt.strip() if isinstance(prompt, str) else canonical_json(prompt)


def prompt_text(prompt: Prompt) -> str:
    """A prompt as plain text for people to read. Not what a model is given: that is its chat template's work."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def fault(kind: str, row: Mapping[str, Any]) -> str | None:
    """Why a row cannot be one of its kind, in a few words; None when it can."""
    for column in COLUMNS[kind]:
        if column not in row or row[column] is None:
            return f"no {column}"
    if not is_prompt(row["prompt"]):
        return (
            "empty prompt"
            if row["prompt"] in ("", []) or isinstance(row["prompt"], str)
            else "prompt is neither text nor messages"
        )
    for column in COMPLETION_COLUMNS:
        if column in COLUMNS[kind]:
            if not isinstance(row[column], str):
                return f"{column} is not text"
            if not row[column].strip():
                return f"empty {column}"
    if kind == "pairs" and row["chosen"].strip() == row["rejected"].strip():
        return "identical chosen and rejected"
    if kind == "thumbs" and not isinstance(row["label"], bool):
        return "label is not true or false"
    if kind == "rankings":
        return _ranking_fault(row["completions"], row["ranks"])
    if kind == "completions":
        return _completions_fault(row["completions"], row.get("scores"))
    return None


def _completions_fault(completions: Any, scores: Any) -> str | None:
    # What a model said may be empty: it counts among the others.
    if not isinstance(completions, list) or not completions or not all(isinstance(c, str) for c in completions):
        return "completions is not a list of texts"
    if scores is None:
        return None
    if not isinstance(scores, list) or not all(isinstance(s, int | float) and not isinstance(s, bool) for s in scores):
        return "scores is not a list of numbers"
    return None if len(scores) == len(completions) else "scores and completions differ in length"


def _ranking_fault(completions: Any, ranks: Any) -> str | None:
    if not isinstance(completions, list) or not all(isinstance(c, str) and c.strip() for c in completions):
        return "completions is not a list of texts"
    if not isinstance(ranks, list) or not all(isinstance(r, int | float) and not isinstance(r, bool) for r in ranks):
        return "ranks is not a list of numbers"
    if len(ranks) != len(completions):
        return "ranks and completions differ in length"
    if len(completions) < 2:
        return "fewer than 2 completions"
    return None


def to_trl(row: Mapping[str, Any]) -> Row:
    """A row with its completions as messages when its prompt is messages: TRL refuses a mixture."""
    if isinstance(row["prompt"], str):
        return dict(row)
    wrapped = {
        c: [{"role": "assistant", "content": row[c].strip()}] for c in COMPLETION_COLUMNS if isinstance(row.get(c), str)
    }
    return {**row, **wrapped}


def iter_prompts(rows: Iterable[Mapping[str, Any]]) -> Iterator[Prompt]:
    """Each prompt once, in order of first appearance."""
    seen: set[str] = set()
    for row in rows:
        key = prompt_key(row["prompt"])
        if key not in seen:
            seen.add(key)
            yield row["prompt"]
