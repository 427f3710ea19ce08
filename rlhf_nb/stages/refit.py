"""refit: a round against a reward model's errors. What it scores high and people reject joins what it is fitted to."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rlhf_nb import registry
from rlhf_nb.data.conversions import convert
from rlhf_nb.data.dataset import Dataset
from rlhf_nb.data.importers import counted
from rlhf_nb.errors import DataError, SpecError
from rlhf_nb.protocol.spec import BlobData, describe

if TYPE_CHECKING:
    from rlhf_nb.run import Run
    from rlhf_nb.workspace import Workspace

MINED = "-mined"


def refit(
    workspace: Workspace,
    model: Any,
    *,
    scored: Any,
    labels: Any,
    per_prompt: int = 1,
    weight: float = 1.0,
    **knobs: Any,
) -> Run:
    """Mine, add, train again from the same start; see `Workspace.refit`."""
    run_id = str(getattr(model, "id", model))
    spec = workspace.run(run_id).spec
    data = with_mined(workspace, run_id, scored=scored, labels=labels, per_prompt=per_prompt, weight=weight)
    method = registry.methods.get(spec.method).create(**{**spec.config, **knobs})
    launch, title = shlex.join(spec.launch.flags), f"{run_id}, refitted"
    return workspace.train(method, base=spec.policy, data=data, adapter=spec.adapter, launch=launch, title=title)


def with_mined(
    workspace: Workspace, run_id: str, *, scored: Any, labels: Any, per_prompt: int = 1, weight: float = 1.0
) -> BlobData:
    """The rows that a reward model was fitted to, and after them its errors. The errors are kept as `RUN-mined`.

    Raises:
        SpecError: The run fitted no reward model.
        DataError: No error was found; the message counts what the labels say instead.
    """
    from rlhf_nb.labelling.mining import mined_pairs
    from rlhf_nb.stages.lineage import note_origin

    spec = workspace.spec(run_id)
    if spec.method != "reward":
        raise SpecError(f"refit: {run_id} is a {spec.method} run; give the run of a reward model")
    said = _data(workspace, scored, "scored", ("completions",))
    judged = _labels(workspace, labels, said)
    mined, dropped = mined_pairs(said.rows, judged.rows, judged.kind, per_prompt=per_prompt)
    counts = ", ".join(f"{reason} ({count:,})" for reason, count in dropped.items())
    if not mined:
        raise DataError(
            f"refit: no error of {run_id} is among {counted(len(judged), judged.kind)}: {counts or 'no label'}"
        )
    errors = workspace.add_data(mined, name=f"{run_id}{MINED}", kind="pairs", source=f"errors of {run_id}")
    old = _data(workspace, spec.data, "data", ("pairs", "rankings"))
    new, _ = convert([{**row, "weight": weight} if weight != 1 else row for row in mined], "pairs", old.kind)
    name = f"{describe(spec.data)} + {len(mined):,} errors of {run_id}"
    kept = workspace.keep_rows([*old.rows, *new], old.kind, name, origin=old)
    for made, of in ((kept, errors), (errors, said), (errors, judged)):
        note_origin(workspace, made.name, made.content_hash, of)
    left_out = f"; of {counted(len(judged), judged.kind)}, left out: {counts}" if counts else ""
    told = f"{counted(len(old), old.kind)} and {counted(len(mined), 'mined pairs')}{left_out}"
    return kept.model_copy(update={"converted": told})


def _labels(workspace: Workspace, labels: Any, said: Dataset) -> Dataset:
    """Thumbs by a function or a simulated annotator on every completion; else rows that are there."""
    from rlhf_nb.stages.label import SIMULATED, annotator

    thumb: Callable[[Any, str], bool] | None = labels if callable(labels) and not hasattr(labels, "rows") else None
    if isinstance(labels, str) and labels in SIMULATED:
        thumb = annotator(labels).thumb
    if thumb is None:
        return _data(workspace, labels, "labels", ("pairs", "thumbs"))
    asked = [(row["prompt"], text) for row in said.rows for text in dict.fromkeys(row["completions"]) if text.strip()]
    rows = [{"prompt": p, "completion": text, "label": bool(thumb(p, text))} for p, text in asked]
    return Dataset(labels if isinstance(labels, str) else getattr(labels, "__name__", "labels"), "thumbs", rows)


def _data(workspace: Workspace, value: Any, role: str, kinds: tuple[str, ...]) -> Dataset:
    """A data set, by its handle, its name, a reference or a run that made it; or loose rows of the one kind."""
    if isinstance(value, list):
        if len(kinds) > 1:
            raise SpecError(f"refit: {role}: loose rows may be {' or '.join(kinds)}; name a data set")
        return Dataset(role, kinds[0], value)
    if isinstance(value, BlobData):
        found = Dataset(value.name, value.row_kind, workspace.store.get_rows(value.content_hash))
    elif isinstance(value, Dataset):
        found = value
    else:
        found = workspace.dataset(_name(value))
    if found.kind not in kinds:
        raise DataError(f'refit: {role} "{found.name}" holds {found.kind}; {" or ".join(kinds)} are needed')
    return found


def _name(value: Any) -> str:
    """What a data set, a run or a reference to either is called."""
    return str(next((found for of in ("name", "id", "run_id") if (found := getattr(value, of, None))), value))
