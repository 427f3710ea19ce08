"""Import: a source becomes rows of one kind, with a line that says what was found and what was dropped."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from rlhf_nb.data.conversions import CONVERSIONS, convert
from rlhf_nb.data.formats import FORMATS, Drop, Format, detect
from rlhf_nb.data.readers import read_records
from rlhf_nb.data.rows import COLUMNS, KINDS, Row, fault
from rlhf_nb.errors import DataError, did_you_mean


@dataclass(frozen=True)
class ImportResult:
    """What an import found."""

    kind: str
    rows: list[Row] = field(repr=False)
    summary: str
    """One line for people: "1,495 pairs from HH transcripts; dropped 5: empty chosen (4), ..."."""
    dropped: dict[str, int]
    """How many records each reason cost."""
    format: str
    source: str


def read_rows(source: Any, kind: str | None = None, *, split: str | None = None) -> ImportResult:
    """Read a source, detect its format and turn it into rows.

    Args:
        source: a path to .jsonl, .json, .csv, .tsv or .parquet, each also gzipped; a folder saved with `datasets`; a
            hub id `owner/name` or `owner/name/folder`; or rows in memory.
        kind: the kind wanted; found pairs become thumbs, rankings become pairs, anything becomes prompts.
        split: the split of a hub or saved data set.

    Raises:
        NotFoundError: no such file or hub id.
        DataError: it cannot be read, its columns are of no known format, or no row was left.
        UnavailableError: a hub id, and no network.
    """
    if kind is not None and kind not in KINDS:
        raise DataError(
            f"kind={kind!r} is not a kind of rows{did_you_mean(kind, KINDS) or ';'} kinds: {', '.join(KINDS)}"
        )
    records, origin = read_records(source, split=split)
    found = _choose(detect(records), kind)
    if found is None:
        raise _unknown_columns(origin, records[0], kind)
    if found.doubt is not None and (why := found.doubt(records)):
        raise DataError(f"{origin}: {why}")
    rows, dropped = _convert(records, found)
    if not rows:
        why = _reasons(dropped)
        raise DataError(
            f"{origin}: none of {len(records):,} rows is usable as {found.kind}: {why}; nothing was imported"
        )
    if kind is not None and kind != found.kind:
        before = len(rows)
        rows, lost = convert(rows, found.kind, kind)
        if not rows:
            raise DataError(f"{origin}: no {kind} can be made of {before:,} {found.kind}: {_reasons(lost)}")
        dropped.update(lost)
    made = "" if kind in (None, found.kind) else f" ({found.kind})"
    return ImportResult(
        kind=kind or found.kind,
        rows=rows,
        summary=summarize(len(rows), kind or found.kind, f"{found.name}{made}", dropped),
        dropped=dict(dropped),
        format=found.name,
        source=origin,
    )


def _choose(fitting: list[Format], kind: str | None) -> Format | None:
    """The best format that is or can become the wanted kind; else the best, so that the error can name it."""
    can = [each for each in fitting if kind in (None, each.kind) or (each.kind, kind) in CONVERSIONS]
    return next(iter(can or fitting), None)


def summarize(n: int, kind: str, origin: str, dropped: dict[str, int]) -> str:
    """The line an import shows."""
    line = f"{counted(n, kind)} from {origin}"
    return f"{line}; dropped {sum(dropped.values()):,}: {_reasons(dropped)}" if dropped else line


def counted(n: int, kind: str) -> str:
    """`1 pair`, `2,000 pairs`."""
    return f"{n:,} {kind.removesuffix('s') if n == 1 else kind}"


def nothing_left(name: str, kind: str, n: int, from_kind: str, dropped: dict[str, int]) -> str:
    """What to say where a conversion leaves no row."""
    return f'no {kind} can be made of the {counted(n, from_kind)} of "{name}": {_reasons(dropped)}'


def _convert(records: list[dict[str, Any]], found: Format) -> tuple[list[Row], Counter[str]]:
    rows: list[Row] = []
    dropped: Counter[str] = Counter()
    for record in records:
        try:
            row = found.convert(record)
        except Drop as drop:
            dropped[str(drop)] += 1
            continue
        except (KeyError, TypeError, AttributeError):
            # A record of another shape than the first one's.
            dropped["columns differ from the first row's"] += 1
            continue
        reason = fault(found.kind, row)
        if reason:
            dropped[reason] += 1
        else:
            rows.append(row)
    return rows, dropped


def _reasons(dropped: dict[str, int]) -> str:
    ordered = sorted(dropped.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{reason} ({count:,})" for reason, count in ordered)


def _unknown_columns(origin: str, first: dict[str, Any], kind: str | None) -> DataError:
    columns = list(first)
    shown = ", ".join(map(repr, columns[:8])) + (", ..." if len(columns) > 8 else "")
    wanted = [kind] if kind else ["pairs", "demonstrations"]
    needs = " or ".join(f"{each} need {', '.join(COLUMNS[each])}" for each in wanted)
    known = sorted(
        {column for columns in COLUMNS.values() for column in columns} | {"messages", "instruction", "output"}
    )
    near = [(column, get_close_matches(column.strip().lower(), known, n=1, cutoff=0.8)) for column in columns]
    hint = next(
        (f'did you mean "{match[0]}" by {column!r}? Rename it' for column, match in near if match), "rename the columns"
    )
    return DataError(f"{origin}: columns {shown} are of no known format; {needs}; {hint}, then import again")


def known_formats() -> list[tuple[str, str]]:
    """Names and kinds of the formats that are recognised, in the order they are tried."""
    return [(each.name, each.kind) for each in FORMATS]
