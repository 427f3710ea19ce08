"""export: a model as a directory that other programs load, with a card that says what it was made from."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_nb import registry
from rlhf_nb.errors import RunFailedError, SpecError
from rlhf_nb.protocol.spec import HubModel, RunModel, RunSpec, describe
from rlhf_nb.stages.lineage import Node, lineage
from rlhf_nb.stages.resolve import resolve_model
from rlhf_nb.stages.train import submit

if TYPE_CHECKING:
    from rlhf_nb.run import Run
    from rlhf_nb.workspace import Workspace


@dataclass(frozen=True)
class Exported:
    """What an export wrote, on the compute host."""

    run: Run
    directory: str
    files: tuple[str, ...]
    size: int
    """Bytes."""
    url: str
    """Of the commit on the hub; empty where nothing was pushed."""

    def __repr__(self) -> str:
        where = f"{self.directory}: {len(self.files)} files, {self.size / 2**20:.1f} MiB"
        return f"{where} · {self.url}" if self.url else where


def export(
    workspace: Workspace,
    model: Any,
    directory: str | Path | None = None,
    *,
    form: str = "merged",
    push: str = "",
    private: bool = True,
    timeout: float | None = None,
) -> Exported:
    """Submit, wait and return what was written; see `Workspace.export`."""
    reference = resolve_model(workspace, model, verb="export", role="model")
    spec = workspace.spec(reference.run_id) if isinstance(reference, RunModel) else None
    if form in ("adapter", "base") and spec is not None and spec.adapter is None:
        raise SpecError(f"export: {spec.run_id} trained all its weights and has no adapter; use form=merged")
    base = _on_the_hub(spec.policy) if spec is not None else ""
    told = lineage(workspace, model, public=True)
    method = registry.methods.get("export").create(
        directory=str(Path(directory).expanduser().absolute()) if directory is not None else "",
        form=form,
        push=push,
        private=private,
        base=base if form == "adapter" else "",
        card=card(told, spec, form=form, base=base, name=describe(reference)),
    )
    job = RunSpec(
        run_id="",
        workspace_id=workspace.id,
        method=method.name,
        config=method.model_dump(mode="json"),
        policy=reference,
        who=workspace.who,
        created=time.time(),
    )
    method.check(job)
    run = submit(workspace, job).wait(timeout)
    result = run.fold.result
    if result is None:
        raise RunFailedError(f"{run.id} finished without a result; its log says why: {run.log_tail(3)}")
    found = result.detail
    return Exported(run, found["directory"], tuple(found["files"]), int(result.value), found["url"])


def _on_the_hub(reference: Any) -> str:
    if not isinstance(reference, HubModel):
        return ""
    return f"{reference.repo_id}@{reference.revision}" if reference.revision else reference.repo_id


def card(node: Node, spec: RunSpec | None, *, form: str, base: str, name: str) -> str:
    """README.md of an exported model: what the hub reads at its top, and the lineage as text."""
    head = ["---", "library_name: peft" if form == "adapter" else "library_name: transformers"]
    if base:
        head.append(f"base_model: {base.partition('@')[0]}")
    head += ["tags:", "- rlhf_nb"]
    if spec is not None:
        head += [f"- {spec.method}"]
    what = f"Trained with {registry.methods.get(spec.method).title.lower()}." if spec is not None else ""
    # A name may hold anything: the fence is longer than any run of backticks inside.
    text = "\n".join(node.lines())
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    parts = [*head, "---", "", f"# {' '.join(name.split())}", "", what, "", "## Lineage", "", fence, text, fence, ""]
    return "\n".join(parts)
