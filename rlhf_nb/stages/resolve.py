"""From what a person may write for a model, data or a reward to the reference that travels in a spec."""

from __future__ import annotations

import ast
import builtins
import inspect
import math
import re
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from rlhf_nb import registry
from rlhf_nb.data.conversions import CONVERSIONS, GIVES, SERVES, convert
from rlhf_nb.data.importers import counted, nothing_left, summarize
from rlhf_nb.data.rows import COLUMNS, KINDS
from rlhf_nb.errors import DataError, NotFoundError, RlhfError, SpecError, did_you_mean, first_fault
from rlhf_nb.protocol.spec import (
    BlobData,
    CombinedReward,
    DataPart,
    DataRef,
    FunctionReward,
    HubModel,
    MixedData,
    ModelRef,
    ModelReward,
    NamedData,
    NamedModel,
    NamedReward,
    PathModel,
    RewardPart,
    RewardRef,
    RunData,
    RunModel,
    describe,
)
from rlhf_nb.rewards.functions import named

if TYPE_CHECKING:
    from rlhf_nb.data.dataset import Dataset
    from rlhf_nb.workspace import Workspace

NAMED_MODELS = ("toy", "toy-sft")
NAMED_DATA = {
    "toy-demonstrations": "demonstrations",
    "toy-pairs": "pairs",
    "toy-rankings": "rankings",
    "toy-thumbs": "thumbs",
    "toy-prompts": "prompts",
    "toy-candour-demonstrations": "demonstrations",
    "toy-candour-pairs": "pairs",
    "toy-sums-demonstrations": "demonstrations",
    "toy-sums": "prompts",
}
_MODEL_KINDS = (NamedModel, RunModel, PathModel, HubModel)


def is_run(value: Any) -> bool:
    from rlhf_nb.run import Run

    return isinstance(value, Run)


def resolve_model(workspace: Workspace, value: Any, *, verb: str, role: str) -> ModelRef:
    """A Run, a reference, a name, a directory or a hub id as a model reference.

    Raises:
        NotFoundError: Nothing has that name; the message suggests the nearest.
    """
    if is_run(value):
        return value.model
    if isinstance(value, _MODEL_KINDS):
        return value
    if isinstance(value, Path):
        value = str(value)
    if not isinstance(value, str) or not value:
        raise SpecError(f"{verb}: {role}={value!r} is no model; give a run, a name, a directory or a hub id")
    if value in NAMED_MODELS:
        return NamedModel(name=value)
    if value in workspace.run_ids():
        if not registry.methods.get(workspace.spec(value).method).trains:
            raise SpecError(f"{verb}: {role} {value} trains nothing and saves no model; %rlhf models lists models")
        return RunModel(run_id=value)
    if _there(value, "config.json") or _there(value, "adapter_config.json"):
        return PathModel(path=str(Path(value).expanduser().resolve()))
    if (found := _there(value)) and found.is_dir():
        raise SpecError(f'{verb}: {role} "{value}" is a directory without config.json; save a model there first')
    # A hub id is owner/name; anything with more slashes or a leading dot was meant as a path.
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w.-]+)?", value):
        repo, _, revision = value.partition("@")
        return HubModel(repo_id=repo, revision=revision or None)
    known = [*NAMED_MODELS, *workspace.run_ids()]
    hint = did_you_mean(value, known)
    raise NotFoundError(f'{verb}: {role} "{value}" does not exist in this workspace{hint}  %rlhf models lists them.')


def _there(text: str, *below: str) -> Path | None:
    """What a text names on this machine, if anything. What no file can be called names nothing."""
    # A text with options, or somebody's words, may be longer than a path can be, or begin with ~ and no user.
    try:
        path = Path(text, *below).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):
        return None


def resolve_data(workspace: Workspace, value: Any, *, verb: str, rows: str, also: tuple[str, ...] = ()) -> DataRef:
    """A Dataset or a name as a data reference of the kind the method trains on.

    A method that needs prompts takes the distinct prompts of any kind of rows; pairs serve as thumbs and rankings as
    pairs. Other conversions lose or assume something, and are asked for: "NAME as KIND". What a conversion left out is
    counted in the reference.

    Args:
        rows: The kind that it trains on.
        also: Further kinds that it takes as they are.

    Raises:
        DataError: Rows of another kind; the message names what is needed and how to get it from these.
    """
    if isinstance(value, MixedData):
        return value
    if isinstance(value, Mapping):
        return _mixture(workspace, value, verb=verb, rows=rows)
    asked = ""
    if isinstance(value, str) and (found := re.fullmatch(r"(.+\S)\s+as\s+(\w+)", value)) and found[2] in KINDS:
        value, asked = found[1], found[2]
    if isinstance(value, RunData) or is_run(value) or (isinstance(value, str) and value in workspace.run_ids()):
        made = _made_by(workspace, value, verb=verb, wanted=asked or rows, also=() if asked else also)
        if isinstance(made, RunData):
            return made
        value = made
    if isinstance(value, (NamedData, BlobData)):
        kind, reference = (NAMED_DATA[value.name] if isinstance(value, NamedData) else value.row_kind), value
        # By its hash: the name may stand for other rows by now.
        dataset = None if isinstance(value, NamedData) else _kept(workspace, value)
    elif isinstance(value, str) and value in NAMED_DATA:
        kind, reference, dataset = NAMED_DATA[value], NamedData(name=value), None
    else:
        dataset = workspace.dataset(value) if isinstance(value, str) else value
        if not hasattr(dataset, "content_hash"):
            raise SpecError(f"{verb}: data={value!r} is no data set; give a name or what ws.import_data returned")
        kind, reference = dataset.kind, None
    if asked and asked != rows and rows != "prompts" and asked not in also:
        raise DataError(f'{verb}: data "{value} as {asked}": {verb} trains on {_needed(rows, also)}')
    to = asked or (kind if kind in also else rows)
    if kind == to:
        if reference is not None:
            return reference
        assert dataset is not None
        return workspace.keep_rows(dataset.rows, kind, dataset.name, origin=dataset)
    name = getattr(dataset, "name", None) or getattr(reference, "name", "") or str(value)
    if (kind, to) not in CONVERSIONS or not (asked or to == "prompts" or (kind, to) in SERVES):
        raise DataError(f'{verb}: data "{name}" holds {kind}, and {verb} trains on {_way_out(name, kind, rows, also)}')
    source = dataset if dataset is not None else workspace.dataset(name)
    converted, dropped = convert(source.rows, kind, to)
    if not converted:
        raise DataError(f"{verb}: {nothing_left(name, to, len(source.rows), kind, dropped)}")
    kept = workspace.keep_rows(converted, to, name if to == "prompts" else f"{name} as {to}", origin=source)
    said = summarize(len(converted), to, f"{counted(len(source.rows), kind)} of {name}", dropped)
    return kept.model_copy(update={"converted": said})


def _kept(workspace: Workspace, value: BlobData) -> Dataset:
    from rlhf_nb.data.dataset import Dataset

    digest = value.content_hash
    return Dataset(value.name, value.row_kind, lambda: workspace.store.get_rows(digest), content_hash=digest, n=value.n)


def _needed(rows: str, also: tuple[str, ...]) -> str:
    return " or ".join(f"{kind} ({', '.join(COLUMNS[kind])})" for kind in (rows, *also))


def _way_out(name: str, kind: str, rows: str, also: tuple[str, ...]) -> str:
    """What is needed, and which conversions from what there is lead there."""
    ways = [f'"{name} as {to}" takes {GIVES[kind, to]}' for to in (rows, *also) if (kind, to) in GIVES]
    otherwise = f"nothing like it can be made of {kind}; %rlhf data lists what there is"
    return f"{_needed(rows, also)}; {', '.join(ways) or otherwise}"


def _made_by(workspace: Workspace, value: Any, *, verb: str, wanted: str, also: tuple[str, ...]) -> RunData | Dataset:
    """The rows a run makes: by its id where they are of the right kind, so that they need neither exist nor travel."""
    run_id = getattr(value, "run_id", None) or str(value)
    spec = workspace.spec(run_id)
    kind = registry.methods.get(spec.method).create(**spec.config).made_kind
    if not kind:
        raise SpecError(
            f"{verb}: data {run_id} is a {spec.method} run and makes no rows; %rlhf data lists what there is"
        )
    if kind in (wanted, *also) or wanted == "prompts":
        return RunData(run_id=run_id, row_kind=kind)
    run = workspace.run(run_id)
    if run.state not in ("finished", "stopped"):
        raise DataError(
            f"{verb}: data {run_id} will hold {kind}, and {verb} trains on {wanted}; wait for it, then convert"
        )
    return run.data


def _mixture(workspace: Workspace, value: Mapping[Any, Any], *, verb: str, rows: str) -> DataRef:
    if rows != "prompts":
        raise SpecError(
            f"{verb}: data={dict(value)!r}: only prompts are drawn in shares; put the rows into one data set"
        )
    parts = []
    for one, weight in value.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise SpecError(f"{verb}: prompts {one}={weight!r}: a share is a number above 0")
        reference = resolve_data(workspace, one, verb=verb, rows=rows)
        assert isinstance(reference, NamedData | BlobData | RunData)
        parts.append(DataPart(data=reference, weight=float(weight)))
    if len(parts) < 2:
        raise SpecError(f"{verb}: prompts={dict(value)!r}: one data set needs no share; give its name")
    return MixedData(parts=tuple(parts))


def resolve_reward(workspace: Workspace, value: Any, *, verb: str, role: str = "reward") -> RewardRef:
    """A reward-model run, a registered name, a named function of this workspace, or a function; several of them as a
    list, as a dict with their weights, or as text: `reward-1,reward-2` or `reward-1=1,length=-0.1`."""
    if isinstance(value, CombinedReward):
        return value
    parts = _several(value)
    if parts is None:
        return _one_reward(workspace, value, verb=verb, role=role)
    if role == "gold":
        raise SpecError(f"{verb}: gold={value!r}: one reward is plotted as the true one; give one")
    made = []
    for one, weight in parts:
        number = _number(weight)
        if not isinstance(number, int | float) or isinstance(number, bool) or not math.isfinite(number):
            raise SpecError(f"{verb}: reward {one}={weight!r}: a weight is one finite number; write {one}=0.5")
        made.append(RewardPart(reward=_one_reward(workspace, one, verb=verb, role=role), weight=float(number)))
    if len(made) < 2:
        if made and made[0].weight == 1:
            return made[0].reward
        raise SpecError(f"{verb}: reward={value!r}: one reward needs no weight; score_scale multiplies its scores")
    for at, part in enumerate(made):
        same = [each for each in made[:at] if describe(each.reward) == describe(part.reward)]
        if any(each.reward == part.reward for each in same):
            raise SpecError(f"{verb}: reward {part.name} is named twice; name it once, with the sum of the weights")
        if same:
            made[at] = part.model_copy(update={"called": f"{part.name}-{len(same) + 1}"})
    return CombinedReward(parts=tuple(made))


def _number(weight: Any) -> Any:
    """A weight as it was written, as a number where it is one."""
    try:
        return float(weight) if isinstance(weight, str) else weight
    except ValueError:
        return weight


def _several(value: Any) -> list[tuple[Any, Any]] | None:
    """Rewards with their weights, where a value names several."""
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, list | tuple):
        return [(one, 1.0) for one in value]
    if isinstance(value, str) and ("," in value or "=" in value) and not _there(value):
        parts = _written(value)
        return None if len(parts) == 1 and parts[0][1] == "" else [(name, weight or 1.0) for name, weight in parts]
    return None


def _written(text: str) -> list[tuple[str, str]]:
    """`a=1,b(option="x, y")` as names, with the options behind them, and weights; a weight left out is empty."""
    parts, at = [], 0
    while at < len(text):
        found = re.compile(r"[^,=(]*").match(text, at)
        assert found is not None
        end = _call_end(text, found.end()) if text[found.end() :].startswith("(") else found.end()
        stop = text.find(",", end)
        stop = len(text) if stop < 0 else stop
        name, weight = text[at:end].strip(), text[end:stop].strip()
        if weight and not weight.startswith("="):
            raise SpecError(f"reward {text!r}: {weight!r} after {name}; write {name}=0.5, and a comma between rewards")
        if name:
            parts.append((name, weight[1:].strip()))
        at = stop + 1
    return parts


def _call_end(text: str, start: int) -> int:
    """Where the options that open at `start` close. A bracket in a quoted pattern closes nothing."""
    for at in range(start, len(text)):
        if text[at] == ")":
            try:
                ast.parse(f"f{text[start : at + 1]}", mode="eval")
            except SyntaxError:
                continue
            return at + 1
    raise SpecError(f"reward {text!r}: options are written as in Python: NAME(option=value), texts in quotes")


def _with_options(text: str) -> tuple[str, dict[str, Any]] | None:
    """`regex(pattern="^yes")` as a name with its options; None for a plain name."""
    found = re.fullmatch(r"([\w-]+)(\(.*\))", text, re.DOTALL)
    if found is None:
        return None
    try:
        call = ast.parse(f"f{found[2]}", mode="eval").body
        assert isinstance(call, ast.Call)
        if call.args or any(each.arg is None for each in call.keywords):
            raise ValueError
        config = {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}
    except (SyntaxError, ValueError):
        raise SpecError(
            f"reward {text}: options are written as in Python: NAME(option=value), texts in quotes"
        ) from None
    return found[1], config


def _model_with_options(
    workspace: Workspace, name: str, options: dict[str, Any], *, verb: str, role: str
) -> ModelReward:
    """`reward-1(over="min")`: an ensemble, and how its members become one score."""
    plain = _one_reward(workspace, name, verb=verb, role=role)
    assert isinstance(plain, ModelReward) and isinstance(plain.model, RunModel)
    known = [option for option in ModelReward.model_fields if option not in ("kind", "model")]
    for option in options:
        if option not in known:
            have = f"its options: {', '.join(known)}"
            raise SpecError(f"{role} {name}: no option {option}{did_you_mean(option, known)}  {have}")
    try:
        made = ModelReward(model=plain.model, **options)
    except ValidationError as error:
        field, given, said = first_fault(error)
        raise SpecError(f"{role} {name}: {field}={given!r}: {said}") from None
    if workspace.spec(plain.model.run_id).config.get("members", 1) < 2:
        raise SpecError(
            f"{role} {name}: its options are for the members of an ensemble, and it is one model; leave them out, or "
            f"train with --set members=5"
        )
    return made


def _named(workspace: Workspace, name: str, config: dict[str, Any]) -> NamedReward:
    if name == "judge":
        from rlhf_nb.stages.judge import reward_options

        config = reward_options(workspace, config)
    return named(name, config)


def _one_reward(
    workspace: Workspace, value: Any, *, verb: str, role: str
) -> NamedReward | ModelReward | FunctionReward:
    if isinstance(value, NamedReward):
        return _named(workspace, value.name, value.config)
    if isinstance(value, (ModelReward, FunctionReward)):
        return value
    if isinstance(value, str):
        if value in registry.rewards:
            return _named(workspace, value, {})
        if (with_options := _with_options(value)) is not None:
            name, options = with_options
            if name in workspace.run_ids():
                return _model_with_options(workspace, name, options, verb=verb, role=role)
            return _named(workspace, name, options)
        if value in workspace.reward_functions:
            return workspace.reward_functions[value]
    elif callable(value) and not is_run(value) and not isinstance(value, _MODEL_KINDS):
        return function_reward(value)
    try:
        model = resolve_model(workspace, value, verb=verb, role=role)
    except NotFoundError:
        known = [*registry.rewards.names(), *workspace.reward_functions, *workspace.run_ids()]
        raise NotFoundError(
            f'{verb}: {role} "{value}" does not exist in this workspace{did_you_mean(value, known)}  '
            f"%rlhf models lists reward models; %%rlhf reward-function NAME makes one from a cell."
        ) from None
    if isinstance(model, RunModel):
        method = workspace.spec(model.run_id).method
        if method != "reward":
            raise SpecError(f"{verb}: {role} {model.run_id} is a {method} run; a reward model comes from %rlhf reward")
    return ModelReward(model=model)


def function_reward(function: Callable[..., Any], name: str | None = None) -> FunctionReward:
    """Source of a plain function, checked so that it runs alone: no closure, no global of the notebook.

    Raises:
        SpecError: A lambda, a closure, a method, or a function that uses a name it does not import.
    """
    label = str(name or getattr(function, "__name__", "?"))
    if not inspect.isfunction(function) or function.__name__ == "<lambda>":
        raise SpecError(
            f"reward {label}: a lambda or an object cannot travel; write def f(prompts, completions, **columns)"
        )
    if function.__closure__:
        names = ", ".join(function.__code__.co_freevars)
        raise SpecError(f"reward {label}: a closure over {names} cannot travel; pass columns or put the values inside")
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        raise SpecError(f"reward {label}: its source cannot be read; define it in a cell or a file") from None
    return reward_from_source(source, label)


def reward_from_source(source: str, name: str) -> FunctionReward:
    """Check the source of a reward: it parses and defines one function that takes prompts and completions.

    Raises:
        SpecError: Names the line or the missing parameter.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise SpecError(f"reward {name}: line {error.lineno}: {error.msg}") from None
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    if not functions:
        raise SpecError(f"reward {name}: no function; write def f(prompts, completions, **columns): return [...]")
    function = functions[-1]
    parameters = [argument.arg for argument in function.args.posonlyargs + function.args.args]
    if parameters[:2] != ["prompts", "completions"]:
        raise SpecError(
            f"reward {name}: {function.name}({', '.join(parameters)}) must begin with (prompts, completions, **columns)"
        )
    if function.args.kwarg is None and len(parameters) == 2:
        raise SpecError(f"reward {name}: {function.name} must end with **columns, the other columns of the rows")
    missing = _free_names(source, name)
    if missing:
        raise SpecError(
            f"reward {name}: {', '.join(sorted(missing))} is defined outside the function; import or define it inside"
        )
    return FunctionReward(name=name, source=source)


def _free_names(source: str, name: str) -> set[str]:
    """Globals the functions of a source read that neither it nor Python defines."""
    import symtable

    def free(table: symtable.SymbolTable) -> set[str]:
        found = {s.get_name() for s in table.get_symbols() if s.is_global() and s.is_referenced()}
        for child in table.get_children():
            found |= free(child)
        return found

    module = symtable.symtable(source, name, "exec")
    # Wherever it stands there: in a try, under an if, as the target of a loop.
    defined = {s.get_name() for s in module.get_symbols() if s.is_assigned() or s.is_imported()}
    defined |= set(dir(builtins)) | {"__name__", "__file__"}
    return {n for child in module.get_children() for n in free(child)} - defined


def one_line(error: BaseException) -> str:
    """An error as a person reads it: ours as they are, others with their type and first line."""
    text = str(error).strip().splitlines()
    if isinstance(error, RlhfError):
        return text[0] if text else type(error).__name__
    return f"{type(error).__name__}: {text[0] if text else ''}".rstrip(": ")
