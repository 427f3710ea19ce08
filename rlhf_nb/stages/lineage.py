"""lineage: what a model or a data set was made from, back to rows, labels and the files they came in."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf_nb import registry
from rlhf_nb.errors import NotFoundError
from rlhf_nb.protocol.spec import (
    BlobData,
    Endpoint,
    FunctionReward,
    HubModel,
    ModelJudge,
    ModelReward,
    NamedData,
    NamedModel,
    NamedReward,
    PathModel,
    RunData,
    RunModel,
    RunSpec,
    data_parts,
    describe,
    judge_ref,
    reward_parts,
)
from rlhf_nb.stages.import_data import LABELS
from rlhf_nb.stages.resolve import NAMED_DATA, NAMED_MODELS, is_run, resolve_model

if TYPE_CHECKING:
    from rlhf_nb.data.dataset import Dataset
    from rlhf_nb.data.rows import Row
    from rlhf_nb.store.records import Labelled
    from rlhf_nb.workspace import Workspace

Kind = Literal["run", "model", "data", "labels", "reward"]
_BRANCH, _LAST, _DOWN, _BLANK = "├─ ", "└─ ", "│  ", "   "


@dataclass(frozen=True)
class Node:
    """One thing in a lineage, and what it was made from. `print(node)` shows the tree."""

    name: str
    kind: Kind
    relation: str = ""
    """What it is to the node below it: policy, reward, data …"""
    what: str = ""
    """One line about it."""
    content_hash: str = ""
    parents: tuple[Node, ...] = ()
    _load: Callable[[], list[Any]] = field(default=list, repr=False, compare=False)

    @property
    def rows(self) -> list[Row]:
        """Of data that the workspace keeps: its rows."""
        return self._load() if self.kind == "data" else []

    @property
    def labels(self) -> list[Labelled]:
        """Of a labelling queue: every standing label with its task, annotator and provenance."""
        return self._load() if self.kind == "labels" else []

    def walk(self) -> Iterator[Node]:
        """This node and everything above it, nearest first; one that is reached twice comes twice."""
        level = [self]
        while level:
            yield from level
            level = [parent for node in level for parent in node.parents]

    def find(self, name: str) -> Node:
        """The nearest node of a name.

        Raises:
            NotFoundError: None has it.
        """
        for node in self.walk():
            if node.name == name:
                return node
        raise NotFoundError(f'"{name}" is not in the lineage of {self.name}')

    def lines(self) -> list[str]:
        """The tree as text. What stands there already is not unfolded again."""
        return [self._line(), *_below(self, set())]

    def _line(self) -> str:
        head = f"{self.relation} {self.name}" if self.relation else self.name
        mark = f" [{self.content_hash[:12]}]" if self.content_hash else ""
        return f"{head}{mark}" + (f" · {self.what}" if self.what else "")

    def __str__(self) -> str:
        return "\n".join(self.lines())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        # Names come from people and files.
        return f"<pre>{html.escape(str(self))}</pre>"


def _below(node: Node, seen: set[tuple[str, str, str]], indent: str = "") -> list[str]:
    lines: list[str] = []
    for parent in node.parents:
        last = parent is node.parents[-1]
        key = (parent.kind, parent.name, parent.content_hash)
        again = key in seen and parent.parents
        lines.append(indent + (_LAST if last else _BRANCH) + parent._line() + (" (above)" if again else ""))
        if not again:
            seen.add(key)
            lines += _below(parent, seen, indent + (_BLANK if last else _DOWN))
    return lines


def lineage(workspace: Workspace, of: Any, *, public: bool = False) -> Node:
    """The tree above a run, a model or a data set; see `Workspace.lineage`.

    Args:
        public: For eyes outside: no names of people, and no directories of this machine.
    """
    reader = _Reader(workspace, public)
    if is_run(of):
        return reader.run(of.id)
    if hasattr(of, "content_hash") and hasattr(of, "made_from"):
        note_origin(workspace, of.name, of.content_hash, of)
        return reader.rows(of.name, of.content_hash)
    if isinstance(of, str) and of in workspace.run_ids():
        return reader.run(of)
    data = {*NAMED_DATA, *(record.name for record in workspace.store.datasets()), *workspace.store.queues()}
    if isinstance(of, str) and of in data and of not in NAMED_MODELS:
        return lineage(workspace, workspace.dataset(of), public=public)
    return reader.model(resolve_model(workspace, of, verb="lineage", role="model"), "")


def note_origin(workspace: Workspace, name: str, content_hash: str, origin: Dataset) -> None:
    """Remember what rows were made from, as far as their handle knows."""
    key = _key(name, content_hash)
    if key != _key(origin.name, origin.content_hash):
        workspace.store.add_lineage(key, _key(origin.name, origin.content_hash), f"from {origin.kind}")
    while True:
        key = _key(origin.name, origin.content_hash)
        if origin.made_from is not None:
            above = origin.made_from
            workspace.store.add_lineage(key, _key(above.name, above.content_hash), origin.summary)
            origin = above
            continue
        if origin.name.endswith(LABELS) and origin.name in workspace.store.queues():
            workspace.store.add_lineage(key, _key(origin.name, "labels"), origin.summary)
        return


def _key(name: str, content_hash: str) -> str:
    return f"{name}#{content_hash[:16]}"


class _Reader:
    def __init__(self, workspace: Workspace, public: bool) -> None:
        self.workspace, self.public = workspace, public
        self._runs: dict[str, Node] = {}

    def run(self, run_id: str, relation: str = "") -> Node:
        if run_id not in self._runs:
            self._runs[run_id] = self._run(run_id)
        found = self._runs[run_id]
        return Node(found.name, found.kind, relation, found.what, found.content_hash, found.parents, found._load)

    def _run(self, run_id: str) -> Node:
        store = self.workspace.store
        try:
            spec = self.workspace.spec(run_id)
        except NotFoundError:
            return Node(run_id, "run", what="its spec is not in this workspace")
        content_hash = ""
        try:
            content_hash = store.model(run_id).content_hash or ""
        except NotFoundError:
            pass
        parents = list(self._parents(spec))
        named = {node.name for node in parents}
        later = [edge.parent for edge in store.lineage(run_id) if edge.child == run_id and edge.relation == "model"]
        parents += [self.run(name, "reward, put in while it trained") for name in later if name not in named]
        what = f"{spec.method}{_settings(spec, self.public)} · {self.workspace.store_state(run_id)}"
        if spec.who and not self.public:
            what += f" · {spec.who}"
        return Node(run_id, "run", "", what, content_hash, tuple(parents))

    def _parents(self, spec: RunSpec) -> Iterator[Node]:
        if spec.policy is not None:
            yield self.model(spec.policy, "policy")
        for role in ("reward", "gold"):
            for part in reward_parts(getattr(spec, role)):
                yield self._reward(part.reward, role if part.weight == 1 else f"{role} ×{part.weight:g}")
        if spec.judge is not None:
            yield self._judge(spec.judge)
        for role in ("data", "held_out", "pretraining"):
            for each in data_parts(getattr(spec, role)):
                yield self._data(each.data, role.replace("_", "-"))

    def model(self, reference: Any, relation: str) -> Node:
        match reference:
            case RunModel(run_id=run_id):
                return self.run(run_id, relation)
            case NamedModel(name="toy-sft"):
                made = (
                    Node("toy", "model", "policy", "ships with the package"),
                    self._named("toy-demonstrations", "data"),
                )
                return Node("toy-sft", "model", relation, "trained once by the shipped recipe", "", made)
            case NamedModel(name=name):
                return Node(name, "model", relation, "ships with the package")
            case PathModel(path=path):
                name = describe(reference) if self.public else path
                return Node(name, "model", relation, "a directory on the compute host")
            case HubModel(repo_id=repo_id, revision=revision):
                return Node(repo_id, "model", relation, f"from the hub, revision {revision or 'newest'}")
        raise TypeError(f"{reference!r} is no model reference")

    def _reward(self, reference: Any, relation: str) -> Node:
        match reference:
            case ModelReward(model=model):
                return self.model(model, relation)
            case NamedReward(name=name, config=config):
                if isinstance(config.get("judge"), dict):
                    # By its name alone: its reference holds a directory, or an address and where its token is.
                    config = {**config, "judge": describe(judge_ref(config["judge"]))}
                options = ", ".join(f"{option}={value!r}" for option, value in config.items())
                return Node(name, "reward", relation, f"registered{f' ({options})' if options else ''}")
            case FunctionReward(name=name, source=source):
                return Node(
                    name, "reward", relation, f"a function, {len(source.splitlines())} lines, kept with the run"
                )
        return Node(describe(reference), "reward", relation)

    def _judge(self, reference: Any) -> Node:
        if isinstance(reference, ModelJudge):
            return self.model(reference.model, "judge")
        where = "a chat model behind an address" if isinstance(reference, Endpoint) else "simulated"
        return Node(describe(reference), "model", "judge", where)

    def _data(self, reference: Any, relation: str) -> Node:
        match reference:
            case NamedData(name=name):
                return self._named(name, relation)
            case RunData(run_id=run_id):
                return self.run(run_id, relation)
            case BlobData(name=name, content_hash=content_hash):
                return self.rows(name, content_hash, relation)
        raise TypeError(f"{reference!r} is no data reference")

    def _named(self, name: str, relation: str) -> Node:
        load = lambda: self.workspace.dataset(name).rows  # noqa: E731
        return Node(name, "data", relation, f"{NAMED_DATA[name]} of the toy world", "", (), load)

    def rows(self, name: str, content_hash: str, relation: str = "") -> Node:
        """Rows by name and hash, of which the hash may be cut short."""
        store = self.workspace.store
        if name in NAMED_DATA:
            return self._named(name, relation)
        if name in self.workspace.run_ids():
            return self.run(name, relation)
        record = store.dataset_by_hash(content_hash, name)
        full = record.content_hash if record is not None else content_hash
        key = _key(name, full)
        edges = [edge for edge in store.lineage(key) if edge.child == key]
        parents, how = [], ""
        for edge in edges:
            above, _, mark = edge.parent.rpartition("#")
            how = "from labels" if self.public and mark == "labels" else edge.relation
            parents.append(self._labels(above) if mark == "labels" else self.rows(above, mark, "made from"))
        if record is not None:
            source = Path(record.source).name if self.public else record.source
            how = f"{record.summary}; {source}, {record.created[:10]}" if source else record.summary
        return Node(name, "data", relation, how, full, tuple(parents), lambda: store.get_rows(full))

    def _labels(self, queue: str) -> Node:
        store = self.workspace.store
        labels = store.labels(queue)
        by = Counter(each.label.annotator for each in labels)
        who = ", ".join(f"{annotator} ({count:,})" for annotator, count in sorted(by.items()))
        who = f"{len(by)} annotator{'s' * (len(by) != 1)}" if self.public else who
        simulated = sorted({str(name) for each in labels if (name := each.label.provenance.get("simulated"))})
        what = f"{len(labels):,} standing labels by {who}" + (
            f"; simulated: {', '.join(simulated)}" if simulated else ""
        )
        # A queue notes the data set it was filled from as `NAME HASH`.
        sources = dict.fromkeys(each.task.source for each in labels)
        asked = [source.rsplit(" ", 1) for source in sources if " " in source]
        parents = [self.rows(name, mark, "asked about") for name, mark in asked]
        return Node(queue, "labels", "labelled in", what, "", tuple(parents), lambda: store.labels(queue))


_PRIVATE = ("annotator_weights", "vllm_url")
"""Knobs that name people, or a machine."""


def _settings(spec: RunSpec, public: bool) -> str:
    """What differs from the method's defaults."""
    if spec.method not in registry.methods:
        return ""
    fields = registry.methods.get(spec.method).model_fields
    told = [
        f"{knob}={_short(value)}"
        for knob, value in spec.config.items()
        if knob in fields and fields[knob].default != value and not (public and knob in _PRIVATE)
    ]
    told += [f"adapter r={spec.adapter.r}"] if spec.adapter is not None else []
    return f" ({', '.join(told)})" if told else ""


def _short(value: Any) -> str:
    """A knob as it fits into a line; a constitution by its name."""
    text = str(value.get("name", value)) if isinstance(value, dict) else str(value)
    return text if len(text) <= 40 else f"{text[:39]}…"
