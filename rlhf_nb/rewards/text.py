"""What the verifiers read in a completion: JSON or code in a fence, numbers."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|[-+]?\.\d+(?:[eE][-+]?\d+)?")


def fenced(text: str, *languages: str) -> str:
    """Contents of the last Markdown fence of one of the languages, or of none; without any, the text itself."""
    last = text
    language: str | None = None
    inside: list[str] = []
    # Line by line: one expression for it takes quadratic time on fences that never close.
    for line in text.splitlines(keepends=True):
        bare = line.strip()
        if language is None:
            if bare.startswith("```"):
                language, inside = bare[3:].strip().lower(), []
        elif bare == "```":
            last = "".join(inside) if language in ("", *languages) else last
            language = None
        else:
            inside.append(line)
    return last


def last_number(text: str) -> float | None:
    """The last number of a text, thousands separated by commas or not; None where there is none."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
