"""generate: completions of a model as a data set, made beside the accelerator."""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING, Any

from rlhf_nb import registry
from rlhf_nb.data.rows import decode_rows
from rlhf_nb.errors import ComputeError, NotFoundError, SpecError, UnavailableError
from rlhf_nb.methods.base import Method
from rlhf_nb.protocol.spec import JudgeRef, Launch, MixedData, RunSpec
from rlhf_nb.stages.resolve import resolve_data, resolve_model, resolve_reward
from rlhf_nb.stages.train import submit, try_rewards

if TYPE_CHECKING:
    from rlhf_nb.data.dataset import Dataset
    from rlhf_nb.run import Run
    from rlhf_nb.workspace import Workspace


def generate(
    workspace: Workspace,
    model: Any,
    *,
    prompts: Any,
    reward: Any = None,
    gold: Any = None,
    launch: str | None = None,
    title: str = "",
    **settings: Any,
) -> Run:
    """Start the job; see `Workspace.generate`."""
    method = registry.methods.get("generate").create(**settings)
    return make_rows(workspace, method, model=model, data=prompts, reward=reward, gold=gold, launch=launch, title=title)


def make_rows(
    workspace: Workspace,
    method: Method,
    *,
    model: Any,
    data: Any,
    reward: Any = None,
    gold: Any = None,
    judge: JudgeRef | None = None,
    launch: str | None = None,
    title: str = "",
) -> Run:
    """Start a job that makes rows and return its handle at once.

    Args:
        model: What `policy=` takes; None for a job that asks no model of ours.
        judge: Who compares, criticises or revises, for a job that asks for that.
        data: Rows of the kind the method reads.

    Raises:
        SpecError, NotFoundError, DataError: With the field, the value and the way out.
    """
    verb = method.name
    rows = resolve_data(workspace, data, verb=verb, rows=method.rows, also=method.also)
    if isinstance(rows, MixedData):
        raise SpecError(
            f"{verb}: data={dict(data)!r}: every row is used once, so shares mean nothing; give one data set"
        )
    spec = RunSpec(
        run_id="",
        workspace_id=workspace.id,
        method=verb,
        config=method.model_dump(mode="json"),
        policy=resolve_model(workspace, model, verb=verb, role="policy") if model is not None else None,
        data=rows,
        reward=resolve_reward(workspace, reward, verb=verb) if reward is not None else None,
        gold=resolve_reward(workspace, gold, verb=verb, role="gold") if gold is not None else None,
        judge=judge,
        launch=Launch.parse(workspace.launch_flags if launch is None else launch),
        label_as=title,
        who=workspace.who,
        created=time.time(),
    )
    method.check(spec)
    try_rewards(workspace, spec)
    return submit(workspace, spec)


def made_rows(workspace: Workspace, run: Run) -> Dataset:
    """The rows a run made, brought here once and kept under the run's id.

    Raises:
        SpecError: A run that makes no rows.
        UnavailableError: It has saved none yet.
        ComputeError: They arrived damaged.
    """
    from rlhf_nb.data.dataset import Dataset

    method = registry.methods.get(run.spec.method).create(**run.spec.config)
    if not method.made_kind:
        raise SpecError(f"{run.id} is a {method.name} run and makes no rows; run.model is what it saves")
    try:
        kept = Dataset.from_store(workspace.store, run.id)
    except NotFoundError:
        kept = None
    try:
        saved = run.fold.data
    except ComputeError:
        # Nothing attached: what was brought here before is what there is.
        if kept is None:
            raise
        return kept
    if saved is None:
        raise UnavailableError(
            f"{run.id} is {run.state} and has saved no rows yet; wait for it, or give the run itself as data="
        )
    if kept is not None and kept.content_hash == saved.content_hash:
        return kept
    content = workspace.client.rows(run.id)
    if (found := hashlib.sha256(content).hexdigest()) != saved.content_hash:
        raise ComputeError(
            f"{run.id}: its rows arrived with content hash {found[:12]}, and {saved.content_hash[:12]} was saved; "
            f"ask again, or run it again"
        )
    workspace.store.add_dataset(
        run.id, saved.row_kind, decode_rows(content), source=run.id, summary=saved.summary, dropped=saved.dropped
    )
    return Dataset.from_store(workspace.store, run.id)
