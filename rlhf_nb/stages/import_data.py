"""import: files, saved data sets and hub ids become rows with a name and a content hash."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_nb.errors import DataError, NotFoundError, did_you_mean
from rlhf_nb.stages.resolve import NAMED_DATA

if TYPE_CHECKING:
    from rlhf_nb.data import Dataset
    from rlhf_nb.workspace import Workspace

LABELS = "-labels"


def import_data(
    workspace: Workspace, source: str | Path, *, name: str, kind: str | None = None, split: str = "train"
) -> Dataset:
    """Read, keep and return; see `Workspace.import_data`."""
    from rlhf_nb.data import Dataset, read_rows

    _refuse_taken(name)
    found = read_rows(source, kind=kind, split=split)
    record = workspace.store.add_dataset(
        name, found.kind, found.rows, source=os.fspath(source), summary=found.summary, dropped=found.dropped
    )
    workspace.audit(
        "import", name, {"source": os.fspath(source), "summary": found.summary, "hash": record.content_hash}
    )
    return Dataset(name=name, kind=found.kind, rows=found.rows, summary=found.summary, content_hash=record.content_hash)


def add_data(
    workspace: Workspace, rows: Iterable[Mapping[str, Any]], *, name: str, kind: str, source: str = ""
) -> Dataset:
    """Keep rows made in Python; see `Workspace.add_data`."""
    from rlhf_nb.data import Dataset

    _refuse_taken(name)
    rows = [dict(row) for row in rows]
    if not rows:
        raise DataError(f'data "{name}" has no rows; give at least one')
    summary = f"{len(rows):,} {kind}"
    record = workspace.store.add_dataset(name, kind, rows, source=source, summary=summary, dropped={})
    workspace.audit("add-data", name, {"source": source, "hash": record.content_hash})
    return Dataset(name=name, kind=kind, rows=rows, summary=summary, content_hash=record.content_hash)


def _refuse_taken(name: str) -> None:
    if name in NAMED_DATA:
        raise DataError(f'data name "{name}" always means the toy world\'s; choose another with --as')


def dataset(workspace: Workspace, name: str) -> Dataset:
    """A data set by name; see `Workspace.dataset`."""
    from rlhf_nb.data import Dataset

    if name in NAMED_DATA:
        from rlhf_nb import toy

        kind, rows = toy.dataset(name)
        return Dataset(name=name, kind=kind, rows=rows, summary=f"{len(rows):,} {kind} of the toy world")
    queues = workspace.store.queues()
    if name.endswith(LABELS) and name in queues:
        from rlhf_nb.stages.label import labelled

        return labelled(workspace, name)
    try:
        record = workspace.store.dataset(name)
    except NotFoundError:
        known = [*NAMED_DATA, *(r.name for r in workspace.store.datasets()), *(q for q in queues if q.endswith(LABELS))]
        raise NotFoundError(f'data "{name}" does not exist{did_you_mean(name, known)}  %rlhf data lists them') from None
    return Dataset(
        name=name,
        kind=record.kind,
        rows=lambda: workspace.store.get_rows(record.content_hash),
        summary=record.summary,
        content_hash=record.content_hash,
        n=record.n,
    )
