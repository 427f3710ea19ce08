"""train: words become a run spec, and the spec goes to the attached compute."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

from rlhf_nb.errors import RunIdTakenError, SpecError
from rlhf_nb.methods.base import Method
from rlhf_nb.protocol.spec import (
    BlobData,
    FunctionReward,
    Launch,
    LoRA,
    NamedData,
    NamedReward,
    RunData,
    RunSpec,
    data_parts,
    reward_parts,
)
from rlhf_nb.rewards.functions import require_columns
from rlhf_nb.rewards.trial import tried
from rlhf_nb.stages.resolve import resolve_data, resolve_model, resolve_reward

if TYPE_CHECKING:
    from rlhf_nb.run import Run
    from rlhf_nb.workspace import Workspace

TRIAL_S = 10.0
"""Seconds that a reward function is given to score a few samples before a run; a slower one is not tried."""


def train(
    workspace: Workspace,
    method: Method,
    *,
    policy: Any = None,
    base: Any = None,
    data: Any = None,
    prompts: Any = None,
    reward: Any = None,
    gold: Any = None,
    pretraining: Any = None,
    adapter: LoRA | None = None,
    launch: str | None = None,
    title: str = "",
) -> Run:
    """Start a run of `method`; see `Workspace.train`."""
    if not isinstance(method, Method):
        raise SpecError(f"train: method={method!r} is no method; give rl.SFT(...), rl.DPO(...) or another")
    verb = method.name
    if policy is not None and base is not None:
        raise SpecError(f"{verb}: policy and base name the same model; give one of them")
    if data is not None and prompts is not None:
        raise SpecError(f"{verb}: data and prompts name the same rows; give one of them")
    role = "policy" if base is None else "base"
    model = policy if base is None else base
    rows = data if prompts is None else prompts
    if model is None:
        raise SpecError(f"{verb}: no model to train; give --base or --policy, a name that %rlhf models lists")
    if rows is None:
        raise SpecError(f"{verb}: no rows to train on; give --data (or --prompts), a name that %rlhf data lists")
    if method.needs_reward and reward is None:
        raise SpecError(f"{verb}: no reward; give --reward RUN, a reward model's run, or a name such as toy-true")
    if not method.needs_reward and reward is not None:
        raise SpecError(f"{verb}: takes no reward, it trains on {method.rows}; leave --reward away, or use %rlhf ppo")
    if pretraining is not None and "ptx_coef" not in type(method).model_fields:
        raise SpecError(f"{verb}: keeps up no pretraining data; leave it away, or use %rlhf ppo")
    spec = RunSpec(
        run_id="",
        workspace_id=workspace.id,
        method=verb,
        config=method.model_dump(mode="json"),
        policy=resolve_model(workspace, model, verb=verb, role=role),
        data=resolve_data(workspace, rows, verb=verb, rows=method.rows, also=method.also),
        reward=resolve_reward(workspace, reward, verb=verb) if reward is not None else None,
        gold=resolve_reward(workspace, gold, verb=verb, role="gold") if gold is not None else None,
        pretraining=resolve_data(workspace, pretraining, verb=verb, rows="demonstrations")
        if pretraining is not None
        else None,
        adapter=adapter,
        launch=Launch.parse(workspace.launch_flags if launch is None else launch),
        label_as=title,
        who=workspace.who,
        created=time.time(),
    )
    if spec.adapter is not None and spec.adapter.quantize != "none" and not method.quantizes:
        raise SpecError(
            f"{verb}: adapter quantize={spec.adapter.quantize}: {verb} trains on a base in full; use quantize=none"
        )
    method.check(spec)
    try_rewards(workspace, spec, timeout=min(TRIAL_S, getattr(method, "reward_timeout", 0) or TRIAL_S))
    return submit(workspace, spec)


def try_rewards(workspace: Workspace, spec: RunSpec, *, timeout: float = TRIAL_S) -> None:
    """Functions score a few samples; of registered rewards it is seen that the rows have their columns.

    Raises:
        RewardError: With the line of the function, or the column that is missing.
    """
    parts = [part.reward for part in (*reward_parts(spec.reward), *reward_parts(spec.gold))]
    for reward in parts:
        for each in data_parts(spec.data):
            rows = _some_rows(workspace, each.data)
            if not rows:
                continue
            if isinstance(reward, FunctionReward):
                tried(reward, rows, timeout=timeout)
            elif isinstance(reward, NamedReward):
                require_columns(reward, rows)


def _some_rows(workspace: Workspace, data: NamedData | BlobData | RunData, n: int = 3) -> list[dict[str, Any]]:
    if isinstance(data, RunData):
        # They may not exist yet, and they are where the run is.
        return []
    if isinstance(data, NamedData):
        return list(workspace.dataset(data.name).rows[:n])
    return workspace.store.get_rows(data.content_hash)[:n]


def submit(workspace: Workspace, spec: RunSpec) -> Run:
    """Number the run only when everything about it has been checked, so that a typo takes no number."""
    workspace.client  # noqa: B018 - raises where nothing is attached
    while True:
        numbered = spec.model_copy(update={"run_id": workspace.store.next_run_id(spec.method)})
        with contextlib.suppress(RunIdTakenError):
            return workspace.submit(numbered)
