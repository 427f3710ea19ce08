"""The cell that a run could have been started with: what its spec says, in the public words."""

from __future__ import annotations

import ast
import re
import shlex
from typing import Any

from rlhf_nb import registry
from rlhf_nb.protocol import spec as specs


def as_code(spec: specs.RunSpec) -> str:
    """Python that submits the same run, given `ws`, the run's workspace with a compute attached.

    A knob that has today's default is left out. Rows are named by their content hash, since a name may stand for others
    by now. A job that trains nothing is submitted as its spec.
    """
    method = registry.methods.get(spec.method)
    if not method.trains:
        fresh = spec.model_copy(update={"run_id": ""})
        call = f"submit(ws, {fresh!r})"
        return "\n".join(["from rlhf_nb.stages.train import submit", *_imports(call), "", call, ""])
    ours = method.__module__.startswith("rlhf_nb.")
    made = _call(f"rl.{method.__name__}" if ours else f"registry.methods.get({spec.method!r})", method, spec.config)
    arguments = [made]
    functions: list[str] = []
    rows = "prompts" if method.rows == "prompts" else "data"
    named: list[tuple[str, Any]] = [("policy", spec.policy), (rows, spec.data)]
    for role, value in (*named, ("pretraining", spec.pretraining), ("reward", spec.reward), ("gold", spec.gold)):
        if value is not None:
            arguments.append(f"{role}={_reference(value, functions)}")
    if spec.adapter is not None:
        arguments.append(f"adapter={_call('rl.LoRA', specs.LoRA, spec.adapter.model_dump())}")
    # Said even where there are none: the attach may have some.
    arguments.append(f"launch={shlex.join(spec.launch.flags)!r}")
    if spec.label_as:
        arguments.append(f"title={spec.label_as!r}")
    call = "ws.train(\n" + "".join(f"    {one},\n" for one in arguments) + ")"
    imports = ["import rlhf_nb as rl", *([] if ours else ["from rlhf_nb import registry"]), *_imports(call)]
    return "\n".join([*imports, "", *functions, call, ""])


def _call(name: str, cls: Any, values: dict[str, Any]) -> str:
    """A constructor of that name with what differs from its defaults."""
    plain = {name: field.get_default(call_default_factory=True) for name, field in cls.model_fields.items()}
    said = [f"{name}={value!r}" for name, value in values.items() if name != "kind" and value != plain[name]]
    return f"{name}({', '.join(said)})"


def _reference(value: Any, functions: list[str]) -> str:
    """A model, data or a reward in the shortest words that mean nothing else; `functions` collects definitions."""
    match value:
        case specs.NamedModel() | specs.NamedData():
            return repr(value.name)
        case specs.NamedReward() if not value.config:
            return repr(value.name)
        case specs.RunModel():
            return f"ws.run({value.run_id!r})"
        case specs.HubModel():
            return repr(value.repo_id + (f"@{value.revision}" if value.revision else ""))
        case specs.ModelReward(over="mean", std_coef=1.0):
            return _reference(value.model, functions)
        case specs.FunctionReward() if _defines_only(value):
            if value.source not in functions:
                functions.append(value.source)
            return value.name
    return repr(value)


def _defines_only(reward: specs.FunctionReward) -> bool:
    """Whether the source is one function of the reward's name, which a cell can hold as it stands."""
    body = ast.parse(reward.source).body
    return len(body) == 1 and isinstance(body[0], ast.FunctionDef) and body[0].name == reward.name


def _imports(call: str) -> list[str]:
    """For the references that are written out."""
    used = sorted(
        {name for name in re.findall(r"(?<![.\w])([A-Z]\w+)\(", call) if isinstance(getattr(specs, name, None), type)}
    )
    return [f"from rlhf_nb.protocol.spec import {', '.join(used)}"] if used else []
