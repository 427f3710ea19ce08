"""Completion of `%rlhf`: verbs, flags, and the names that would be right in that place."""

from __future__ import annotations

from typing import Any

from rlhf_nb import registry, workspace
from rlhf_nb.errors import RlhfError
from rlhf_nb.feedback import constitution
from rlhf_nb.magics import parser
from rlhf_nb.protocol.spec import reward_parts
from rlhf_nb.stages.resolve import NAMED_DATA, NAMED_MODELS

_RUN_VERBS = frozenset({"watch", "set", "preview", "pause", "resume", "stop", "checkpoint", "wait", "sample"})


def complete(shell: Any, event: Any) -> list[str]:
    """IPython's `complete_command` hook."""
    text = event.line[: len(event.line)] if event.text_until_cursor is None else event.text_until_cursor
    words = text[text.index("%rlhf") :].split()
    before = words[1:] if text.endswith(" ") else words[1:-1]
    last = "" if text.endswith(" ") else words[-1]
    try:
        return [name for name in candidates(before) if name.startswith(last)]
    except RlhfError:
        return []


def candidates(before: list[str]) -> list[str]:
    """What may come after these words."""
    if not before:
        return [*parser.verbs(), *parser.CELL_VERBS]
    verb = before[0]
    if verb in parser.CELL_VERBS:
        return []
    words = parser.parser(verb)
    last = before[-1]
    if last in ("--policy", "--base"):
        return _models()
    if last in ("--data", "--prompts", "--pretraining"):
        return _data()
    if last in ("--reward", "--gold"):
        return [*registry.rewards.names(), *_runs(method="reward"), *_functions()]
    if last == "--judge":
        return [*registry.judges.names(), *_models()]
    if last == "--constitution":
        return constitution.shipped()
    if last == "--half":
        return ["revisions", "preferences"]
    if last == "--adapter":
        return ["lora"]
    if last == "--kind":
        return sorted(set(NAMED_DATA.values()))
    if parser.is_training(verb):
        knobs = [f"{name}=" for name in registry.methods.get(verb).model_fields] if "--set" in before else []
        return [*words.flags(), *knobs]
    if verb == "attach" and len(before) == 1:
        return ["local", "server", "kernel"]
    if verb in _RUN_VERBS:
        if len(before) == 1:
            return _runs()
        if verb == "preview":
            return [*(f"{name}=" for name in _tethers(before[1])), *words.flags()]
        if verb != "set":
            return words.flags()
        return [*(f"{name}=" for name in _coefficients(before[1])), *_slots(before[1])]
    if verb == "judge" and len(before) == 1:
        return _data()
    if verb == "label" and len(before) == 1:
        return [name for name in _data() if name != "toy-prompts"]
    if verb == "export" and len(before) == 1:
        return _models()
    if verb == "lineage" and len(before) == 1:
        return list(dict.fromkeys([*NAMED_MODELS, *_runs(), *_data()]))
    if verb == "evaluate" and len(before) == 1:
        return _runs(method="reward")
    return words.flags()


def _open() -> Any:
    # Completing must not create a workspace on disk.
    return workspace.opened()


def _runs(method: str | None = None) -> list[str]:
    ws = _open()
    if ws is None:
        return []
    return [run_id for run_id in ws.run_ids() if method is None or ws.spec(run_id).method == method]


def _models() -> list[str]:
    ws = _open()
    return [*NAMED_MODELS, *(r for r in _runs() if ws and parser.is_training(ws.spec(r).method))]


def _data() -> list[str]:
    ws = _open()
    if ws is None:
        return list(NAMED_DATA)
    made = [run_id for run_id in ws.run_ids() if registry.methods.get(ws.spec(run_id).method).makes]
    return [*NAMED_DATA, *dict.fromkeys([*(record.name for record in ws.store.datasets()), *made])]


def _functions() -> list[str]:
    ws = _open()
    return list(ws.reward_functions) if ws is not None else []


def _slots(run_id: str) -> list[str]:
    """`reward=`, or one word for each part of a combined reward."""
    ws = _open()
    if ws is None or run_id not in ws.run_ids():
        return []
    names = [part.name for part in reward_parts(ws.spec(run_id).reward)]
    return [f"reward/{name}=" for name in names] if len(names) > 1 else ["reward="] * len(names)


def _tethers(run_id: str) -> list[str]:
    ws = _open()
    if ws is None or run_id not in ws.run_ids():
        return []
    return [live.name for live in registry.methods.get(ws.spec(run_id).method).live if live.can_preview]


def _coefficients(run_id: str) -> list[str]:
    ws = _open()
    if ws is None or run_id not in ws.run_ids():
        return []
    live = ws.run(run_id).fold.coefficients
    return list(live) or [c.name for c in registry.methods.get(ws.spec(run_id).method).live]
