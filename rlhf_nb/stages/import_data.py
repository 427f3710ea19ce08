"""import: files, saved data sets and hub ids become rows with a name and a content hash."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_nb.errors import DataError, NotFoundError, did_you_mean
from rlhf_nb.stages.resolve import NAMED_DATA

if TYPE_CHECKING:
    from rlhf_nb.data.dataset import Dataset
    from rlhf_nb.workspace import Workspace

LABELS = "-labels"


def import_data(
    workspace: Workspace, source: str | Path, *, name: str, kind: str | None = None, split: str | None = None
) -> Dataset:
    """Read, keep and return; see `Workspace.import_data`."""
    from rlhf_nb.data.dataset import Dataset
    from rlhf_nb.data.importers import read_rows

    _refuse_taken(name)
    found = read_rows(source, kind=kind, split=split)
    record = workspace.store.add_dataset(
        name, found.kind, found.rows, source=os.fspath(source), summary=found.summary, dropped=found.dropped
    )
    detail = {"source": os.fspath(source), "summary": found.summary, "hash": record.content_hash}
    workspace.audit("import", name, detail)
    return Dataset.from_store(workspace.store, name)


def add_data(
    workspace: Workspace, rows: Iterable[Mapping[str, Any]], *, name: str, kind: str, source: str = ""
) -> Dataset:
    """Keep rows made in Python; see `Workspace.add_data`."""
    from rlhf_nb.data.dataset import Dataset
    from rlhf_nb.data.rows import KINDS, fault

    _refuse_taken(name)
    if kind not in KINDS:
        raise DataError(f"kind={kind!r} is not a kind of rows{did_you_mean(kind, KINDS)}  kinds: {', '.join(KINDS)}")
    rows = [dict(row) for row in rows]
    if not rows:
        raise DataError(f'data "{name}" has no rows; give at least one')
    for index, row in enumerate(rows):
        if problem := fault(kind, row):
            raise DataError(f'data "{name}", row {index}: {problem}; nothing was kept')
    record = workspace.store.add_dataset(name, kind, rows, source=source, summary=f"{len(rows):,} {kind}", dropped={})
    workspace.audit("add-data", name, {"source": source, "hash": record.content_hash})
    return Dataset.from_store(workspace.store, name)


def _refuse_taken(name: str) -> None:
    if name in NAMED_DATA:
        raise DataError(f'data name "{name}" always means the toy world\'s; choose another with --as')


def dataset(workspace: Workspace, name: str) -> Dataset:
    """A data set by name; see `Workspace.dataset`."""
    from rlhf_nb.data.dataset import Dataset

    if name in NAMED_DATA:
        from rlhf_nb import toy

        kind, rows = toy.dataset(name)
        return Dataset(name, kind, rows, summary=f"{len(rows):,} {kind} of the toy world")
    queues = [queue for queue in workspace.store.queues() if queue.endswith(LABELS)]
    if name in queues:
        from rlhf_nb.stages.label import labelled

        return labelled(workspace, name)
    if name in workspace.run_ids():
        return workspace.run(name).data
    try:
        return Dataset.from_store(workspace.store, name)
    except NotFoundError:
        known = [*NAMED_DATA, *(record.name for record in workspace.store.datasets()), *queues]
        raise NotFoundError(f'data "{name}" does not exist{did_you_mean(name, known)}  %rlhf data lists them') from None
