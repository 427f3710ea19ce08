"""What the verifiers read in a completion: JSON or code in a fence, numbers."""

from __future__ import annotations

import re

_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[ \t]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|[-+]?\.\d+(?:[eE][-+]?\d+)?")


def fenced(text: str, *languages: str) -> str:
    """Contents of the last Markdown fence of one of the languages, or of none; without any, the text itself."""
    blocks = [body for language, body in _FENCE.findall(text) if language.lower() in ("", *languages)]
    return blocks[-1] if blocks else text


def last_number(text: str) -> float | None:
    """The last number of a text, thousands separated by commas or not; None where there is none."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
