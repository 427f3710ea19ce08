"""label: a person compares the pairs of a data set; the answers are a data set of their own."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rlhf_nb.errors import NotFoundError, SpecError, did_you_mean
from rlhf_nb.stages.import_data import LABELS

if TYPE_CHECKING:
    from rlhf_nb.data.dataset import Dataset
    from rlhf_nb.labelling.session import LabelSession
    from rlhf_nb.workspace import Workspace

SIMULATED = {"toy-annotator": "rlhf_nb.toy.annotators:Annotator"}


def label(
    workspace: Workspace, name: str, *, mode: str = "pair", annotator: str | None = None, n: int | None = None
) -> LabelSession:
    """A session over the pairs of a data set; see `Workspace.label`.

    With RLHF_NB_AUTOLABEL set, the simulated annotator of that name answers every pair, and the provenance says so.
    """
    from rlhf_nb.labelling.items import pair_items
    from rlhf_nb.labelling.session import AUTOLABEL, LabelSession, autolabel

    if mode != "pair":
        raise SpecError(f'label: mode="{mode}" does not exist; modes: pair')
    if n is not None and n < 1:
        raise SpecError(f"label: n={n} leaves nothing to label; give 1 or more")
    data = workspace.dataset(name)
    session = LabelSession(
        workspace.store,
        name + LABELS,
        pair_items(data.rows[:n], data.kind),
        annotator=annotator or workspace.who,
        source=f"{name} {data.content_hash[:12]}",
    )
    if simulated := os.environ.get(AUTOLABEL):
        autolabel(session, chooser(simulated), name=simulated)
    return session


def chooser(name: str) -> Callable[[Any, str, str], str]:
    """How a simulated annotator chooses between two completions."""
    return annotator(name).choose


def annotator(name: str) -> Any:
    """A simulated annotator by name.

    Raises:
        NotFoundError: No such annotator.
    """
    if name not in SIMULATED:
        raise NotFoundError(f'annotator "{name}" does not exist{did_you_mean(name, SIMULATED)}  known: toy-annotator')
    import importlib

    module, _, attribute = SIMULATED[name].partition(":")
    return getattr(importlib.import_module(module), attribute)()


def labelled(workspace: Workspace, queue: str) -> Dataset:
    """The standing answers of a queue as pairs: ties and skips left out and counted."""
    from rlhf_nb.data.dataset import Dataset
    from rlhf_nb.labelling.fold import pairs_from_labels

    folded = pairs_from_labels(workspace.store.labels(queue))
    if not folded.rows:
        source = queue.removesuffix(LABELS)
        raise NotFoundError(f'"{queue}" holds no decided pair yet; %rlhf label {source} asks for some')
    return Dataset(queue, "pairs", folded.rows, summary=folded.summary, dropped=folded.dropped)
