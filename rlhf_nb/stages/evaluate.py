"""evaluate: how often a reward model agrees with the pairs, as a run on the attached compute."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_nb import registry
from rlhf_nb.errors import RunFailedError
from rlhf_nb.protocol.spec import Launch, RunSpec
from rlhf_nb.stages.resolve import resolve_data, resolve_model
from rlhf_nb.stages.train import submit

if TYPE_CHECKING:
    from rlhf_nb.run import Run
    from rlhf_nb.workspace import Workspace


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found."""

    run: Run
    value: float
    """Share of pairs in which the chosen completion scores higher; a tie counts one half."""
    interval: tuple[float, float]
    """95 %, Wilson."""
    n: int
    detail: dict[str, Any]

    def __repr__(self) -> str:
        low, high = self.interval
        text = f"accuracy {self.value:.3f}  95 % [{low:.3f}, {high:.3f}]  n={self.n}"
        null = self.detail.get("longer_accuracy")
        if null is not None:
            nl, nh = self.detail.get("longer_interval", (float("nan"), float("nan")))
            text += f"   ·   picking the longer: {null:.3f}  [{nl:.3f}, {nh:.3f}]"
        return f"{self.run.spec.title}: {text}"


def evaluate(workspace: Workspace, model: Any, *, data: Any, timeout: float | None = None) -> Evaluation:
    """Submit, wait and return the result; see `Workspace.evaluate`."""
    method = registry.methods.get("evaluate").create()
    spec = RunSpec(
        run_id="",
        workspace_id=workspace.id,
        method=method.name,
        config=method.model_dump(mode="json"),
        policy=resolve_model(workspace, model, verb="evaluate", role="model"),
        data=resolve_data(workspace, data, verb="evaluate", rows=method.rows),
        launch=Launch.parse(workspace.launch_flags),
        who=workspace.who,
        created=time.time(),
    )
    run = submit(workspace, spec).wait(timeout)
    result = run.fold.result
    if result is None or result.interval is None:
        raise RunFailedError(f"{run.id} finished without a result; its log says why: {run.log_tail(3)}")
    return Evaluation(run, result.value, result.interval, result.n, result.detail)
