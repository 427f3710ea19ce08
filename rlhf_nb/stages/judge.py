"""judge, constitutional: AI labels and AI demonstrations, as jobs beside the accelerator."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rlhf_nb import registry
from rlhf_nb.errors import NotFoundError, SpecError, did_you_mean
from rlhf_nb.feedback import constitution as constitutions
from rlhf_nb.feedback.constitution import Constitution, Principle
from rlhf_nb.feedback.endpoint import checked
from rlhf_nb.protocol.spec import Endpoint, JudgeRef, ModelJudge, NamedJudge, judge_ref
from rlhf_nb.stages.generate import make_rows
from rlhf_nb.stages.resolve import NAMED_MODELS, resolve_model

if TYPE_CHECKING:
    from rlhf_nb.run import Run
    from rlhf_nb.workspace import Workspace

TOY = "toy-town"


def judge(
    workspace: Workspace,
    data: Any,
    *,
    judge: Any,
    constitution: Any = None,
    principle: str = "",
    launch: str | None = None,
    title: str = "",
    **settings: Any,
) -> Run:
    """Start the job; see `Workspace.judge`."""
    who = resolve_judge(workspace, judge, verb="judge")
    by = resolve_principles(who, constitution, principle)
    method = registry.methods.get("judge").create(constitution=by, **settings)
    run = make_rows(workspace, method, model=None, data=data, judge=who, launch=launch, title=title)
    return _traced(workspace, run, by)


def constitutional(
    workspace: Workspace,
    policy: Any,
    *,
    prompts: Any,
    constitution: Any,
    judge: Any = None,
    launch: str | None = None,
    title: str = "",
    **settings: Any,
) -> Run:
    """Start the job; see `Workspace.constitutional`."""
    who = resolve_judge(workspace, judge, verb="constitutional") if judge is not None else None
    by = constitutions.load(constitution)
    method = registry.methods.get("constitutional").create(constitution=by, **settings)
    _known_to(who, method.usable())
    run = make_rows(workspace, method, model=policy, data=prompts, judge=who, launch=launch, title=title)
    return _traced(workspace, run, by)


def resolve_judge(workspace: Workspace, value: Any, *, verb: str) -> JudgeRef:
    """A chat model (a run, a name, a directory, a hub id), an `rl.Endpoint`, or a registered judge with its knobs:
    `toy-annotator(position_bias=0.2)`.

    Raises:
        NotFoundError: Nothing has that name; the message suggests the nearest.
        SpecError: An address that cannot be asked, a knob that it has not.
    """
    if isinstance(value, Endpoint):
        return checked(value)
    if isinstance(value, ModelJudge):
        return value
    if isinstance(value, NamedJudge):
        registry.judges.get(value.name).create(**value.config)
        return value
    if isinstance(value, str):
        name, config = _with_knobs(value, verb)
        if name in registry.judges:
            return resolve_judge(workspace, NamedJudge(name=name, config=config), verb=verb)
        if value.startswith(("http://", "https://")):
            raise SpecError(
                f"{verb}: an address needs the model's name there: rl.Endpoint(url, model=...), or --url URL"
            )
    try:
        return ModelJudge(model=resolve_model(workspace, value, verb=verb, role="judge"))
    except NotFoundError:
        known = [*registry.judges.names(), *NAMED_MODELS, *workspace.run_ids()]
        raise NotFoundError(
            f'{verb}: judge "{value}" does not exist{did_you_mean(str(value), known)}  a judge is a chat model, '
            f"toy-annotator, or rl.Endpoint(url, model=...)"
        ) from None


def _with_knobs(text: str, verb: str) -> tuple[str, dict[str, float]]:
    found = re.fullmatch(r"([\w-]+)\((.*)\)", text, re.DOTALL)
    if found is None:
        return text, {}
    try:
        call = ast.parse(f"f({found[2]})", mode="eval").body
        assert isinstance(call, ast.Call)
        config = {str(each.arg): float(ast.literal_eval(each.value)) for each in call.keywords if each.arg}
        if call.args or len(config) != len(call.keywords):
            raise ValueError
    except (SyntaxError, ValueError, TypeError):
        raise SpecError(f"{verb}: judge {text}: knobs are written as in Python: {found[1]}(name=0.1)") from None
    return found[1], config


def resolve_principles(who: JudgeRef, source: Any, principle: str) -> Constitution | None:
    """What a judge compares by: a constitution, the one principle of it that is named, or the words themselves.

    Raises:
        NotFoundError: No such constitution or principle.
        SpecError: It says nothing of preferences, or the judge does not know its principles.
    """
    by = _principles(who, source, principle)
    _known_to(who, by.saying("preference") if by else ())
    return by


def _principles(who: JudgeRef, source: Any, principle: str) -> Constitution | None:
    if source is None and isinstance(who, NamedJudge) and principle:
        # It knows principles by name, not by what they say.
        source = TOY
    if source is None:
        words = principle.strip()
        return Constitution(name="given", principles=(Principle(name="given", preference=words),)) if words else None
    by = constitutions.load(source)
    if not principle:
        return by
    names = [each.name for each in by.principles]
    if principle not in names:
        raise NotFoundError(
            f'judge: constitution {by.name} has no principle "{principle}"{did_you_mean(principle, names)}  '
            f"it has: {', '.join(names)}"
        )
    return by.model_copy(update={"principles": tuple(each for each in by.principles if each.name == principle)})


def _known_to(who: JudgeRef | None, principles: tuple[Principle, ...]) -> None:
    if isinstance(who, NamedJudge) and (require := getattr(registry.judges.get(who.name), "require", None)):
        require(principles)


def _traced(workspace: Workspace, run: Run, by: Constitution | None) -> Run:
    if by is not None:
        workspace.store.add_lineage(run.id, f"constitution:{by.name}@{by.content_hash[:12]}", "constitution")
    if isinstance(run.spec.judge, NamedJudge | Endpoint):
        where = "" if isinstance(run.spec.judge, NamedJudge) else f" at {run.spec.judge.url}"
        name = run.spec.judge.name if isinstance(run.spec.judge, NamedJudge) else run.spec.judge.model
        workspace.store.add_lineage(run.id, f"judge:{name}{where}", "judge")
    return run


def reward_options(workspace: Workspace, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a person writes in `judge(...)` as the options of the registered reward.

    Raises:
        SpecError, NotFoundError: No judge, or one that cannot be resolved.
    """
    given = dict(config)
    if "judge" in given:
        if isinstance(given["judge"], dict) and isinstance(there := judge_ref(given["judge"]), Endpoint):
            checked(there)
        return given
    model, url, token_env = (given.pop(name, "") for name in ("model", "url", "token_env"))
    if not model:
        raise SpecError('reward judge: no model; write judge(model="..."), or judge(url="...", model="...")')
    more = {name: given.pop(name) for name in ("timeout_s", "retries", "at_once") if name in given}
    value: Any = model
    if url:
        value = Endpoint(url=url, model=model, token_env=token_env, **more)
    elif token_env or more:
        raise SpecError("reward judge: token_env, timeout_s, retries and at_once go with url=")
    if given.get("ask", "letter") not in ("letter", "reasons"):
        raise SpecError(f"reward judge: ask={given['ask']!r}: letter or reasons")
    who = resolve_judge(workspace, value, verb="reward")
    if isinstance(who, NamedJudge) and given.get("principle"):
        _known_to(who, (Principle(name=given["principle"]),))
    return {**given, "judge": who.model_dump(mode="json")}
