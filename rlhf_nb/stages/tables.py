"""The small tables that `%rlhf` prints and the Python API returns."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlhf_nb import registry
from rlhf_nb.errors import ComputeError, ElsewhereError, NotFoundError
from rlhf_nb.protocol.events import TERMINAL
from rlhf_nb.stages.resolve import NAMED_DATA, NAMED_MODELS

if TYPE_CHECKING:
    from rlhf_nb.workspace import Workspace


class Table:
    """Rows with a heading, aligned as text, plain as HTML. `.rows` is a list of dicts."""

    def __init__(self, columns: Sequence[str], rows: Sequence[dict[str, Any]], *, lines: Sequence[str] = ()) -> None:
        self.columns, self.rows, self.lines = list(columns), list(rows), list(lines)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Any:
        return iter(self.rows)

    def _cells(self) -> list[list[str]]:
        return [[_text(row.get(column)) for column in self.columns] for row in self.rows]

    def __repr__(self) -> str:
        cells = self._cells()
        out = list(self.lines)
        if cells:
            widths = [max(len(head), *(len(r[i]) for r in cells)) for i, head in enumerate(self.columns)]
            out += [
                "  ".join(part.ljust(width) for part, width in zip(line, widths, strict=True)).rstrip()
                for line in [self.columns, *cells]
            ]
        return "\n".join(out)

    def _repr_html_(self) -> str:
        # Names come from people and files: escaped, as everything that is shown.
        head = "".join(f'<th style="text-align:left">{html.escape(c)}</th>' for c in self.columns)
        body = "".join(
            "<tr>" + "".join(f'<td style="text-align:left">{html.escape(c)}</td>' for c in row) + "</tr>"
            for row in self._cells()
        )
        lines = "".join(f"<div>{html.escape(line)}</div>" for line in self.lines)
        return lines + (f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" if body else "")


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _run_rows(workspace: Workspace, ids: list[str]) -> list[dict[str, Any]]:
    rows = []
    for run_id in ids:
        try:
            spec = workspace.spec(run_id)
        except NotFoundError:
            continue
        run = workspace.run(run_id)
        try:
            fold, state = run.fold, run.state
        except ComputeError as error:
            # Nothing attached, or the run is not there: the index is what there is.
            seen = f"{workspace.store.run(run_id).state} (last seen)"
            if isinstance(error, ElsewhereError):
                seen += ", not on the attached compute"
            rows.append({"run": run_id, "what": spec.title, "state": seen, "step": ""})
            continue
        died = f": {fold.failure.reason}" if state == "failed" and fold.failure else ""
        of = f"/{fold.max_steps}" if fold.max_steps else ""
        rows.append({"run": run_id, "what": spec.title, "state": f"{state}{died}", "step": f"{fold.step}{of}"})
    return rows


def runs(workspace: Workspace) -> Table:
    """Every run, oldest first."""
    ids = workspace.run_ids()
    return Table(["run", "what", "state", "step"], _run_rows(workspace, ids), lines=() if ids else ("no runs yet",))


def status(workspace: Workspace, most: int = 8) -> Table:
    """What is attached, which workspace, and the runs: the unfinished ones and the last few."""
    ids = workspace.run_ids()
    rows = _run_rows(workspace, ids[-most:])
    older = [run_id for run_id in ids[:-most] if workspace.store_state(run_id) not in TERMINAL]
    rows = _run_rows(workspace, older) + rows
    # Reading the runs may have attached this workspace again, after a kernel restart.
    info = workspace.attached
    lines = [
        info.line() if info is not None else workspace.unattached,
        f"workspace {workspace.location} · {len(ids)} run{'s' * (len(ids) != 1)}",
    ]
    if len(ids) > len(rows):
        lines.append(f"{len(ids) - len(rows)} older runs: %rlhf runs")
    return Table(["run", "what", "state", "step"], rows, lines=lines)


def models(workspace: Workspace) -> Table:
    """Models that resolve by name: the toy ones and those that runs saved or will save."""
    rows: list[dict[str, Any]] = [{"model": name, "from": "always there", "state": ""} for name in NAMED_MODELS]
    for run_id in workspace.run_ids():
        spec = workspace.spec(run_id)
        if spec.method in registry.methods and registry.methods.get(spec.method).trains:
            rows.append({"model": run_id, "from": spec.title, "state": workspace.store_state(run_id)})
    rows += [{"model": name, "from": "reward function", "state": ""} for name in registry.rewards.names()]
    rows += [
        {"model": name, "from": "reward function, from a cell", "state": ""} for name in workspace.reward_functions
    ]
    return Table(["model", "from", "state"], rows)


def datasets(workspace: Workspace) -> Table:
    """Data that resolves by name."""
    rows: list[dict[str, Any]] = [
        {"data": name, "kind": kind, "rows": None, "summary": "toy world"} for name, kind in NAMED_DATA.items()
    ]
    kept = workspace.store.datasets()
    for run_id in workspace.run_ids():
        spec = workspace.spec(run_id)
        if spec.method in registry.methods and run_id not in {record.name for record in kept}:
            kind = registry.methods.get(spec.method).create(**spec.config).made_kind
            state = workspace.store_state(run_id)
            rows += [{"data": run_id, "kind": kind, "rows": None, "summary": f"{spec.title}: {state}"}] if kind else []
    for record in kept:
        rows.append({"data": record.name, "kind": record.kind, "rows": record.n, "summary": record.summary})
    return Table(["data", "kind", "rows", "summary"], rows)
