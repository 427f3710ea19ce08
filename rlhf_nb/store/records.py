"""What the store hands out: frozen records, with no database behind them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class DatasetRecord:
    """One version of a data set. The rows lie under `content_hash`."""

    name: str
    version: int
    kind: str
    content_hash: str
    n: int
    source: str
    summary: str
    dropped: dict[str, int]
    created: str

    @property
    def node(self) -> str:
        """Its name in the lineage."""
        return f"data:{self.name}@{self.version}"


@dataclass(frozen=True)
class RunRecord:
    """The index's view of a run; its run directory is the truth."""

    run_id: str
    method: str
    number: int
    state: str
    title: str | None
    spec: dict[str, Any] | None
    place: str | None
    attach: str | None
    last_seq: int
    summary: dict[str, Any]
    created: str
    finished: str | None


@dataclass(frozen=True)
class ModelRecord:
    """A saved model directory."""

    id: int
    name: str
    run_id: str | None
    role: str
    path: str
    content_hash: str | None
    info: dict[str, Any]
    created: str


@dataclass(frozen=True)
class Edge:
    """`child` was made from `parent`; `relation` says how: "trained on", "policy", "reward", "labelled from"."""

    child: str
    parent: str
    relation: str
    created: str


@dataclass(frozen=True)
class Task:
    """One thing to be labelled."""

    id: int
    queue: str
    position: int
    mode: str
    source: str
    item: dict[str, Any]
    created: str


@dataclass(frozen=True)
class LabelRow:
    """One row of the label log. `choice` is None when the row takes back the row it supersedes."""

    id: int
    task_id: int
    client_id: str
    choice: str | None
    supersedes: int | None
    annotator: str
    seconds: float | None
    rubric: dict[str, Any]
    side: dict[str, Any]
    provenance: dict[str, Any]
    created: str


@dataclass(frozen=True)
class Labelled:
    """A task with the label that stands, after undos and second thoughts."""

    task: Task
    label: LabelRow


@dataclass(frozen=True)
class Progress:
    """How far one annotator is in a queue. `done` counts every answered task, ties and skips among them."""

    done: int
    total: int
    choices: dict[str, int] = field(default_factory=dict)

    @property
    def remaining(self) -> int:
        return self.total - self.done


@dataclass(frozen=True)
class AttachRecord:
    """An attach, as it was made."""

    id: int
    target: str
    info: dict[str, Any]
    created: str


@dataclass(frozen=True)
class AuditRow:
    """One link of the audit chain: `hash` covers the row's content and `previous`."""

    seq: int
    created: str
    who: str
    action: str
    subject: str
    detail: dict[str, Any]
    previous: str
    hash: str


@dataclass(frozen=True)
class AuditCheck:
    """The outcome of walking the chain. Truthy when it is whole.

    A chain whose last rows were cut off is whole in itself: compare `head` with one noted earlier.
    """

    ok: bool
    n: int
    head: str
    broken_seq: int | None = None
    reason: str | None = None

    def __bool__(self) -> bool:
        return self.ok
