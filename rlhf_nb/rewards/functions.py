"""Reward functions `f(prompts, completions, **columns) -> list[float]`: named ones, and source from a cell."""

from __future__ import annotations

import inspect
import linecache
import math
import types
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from rlhf_nb import registry
from rlhf_nb.errors import RewardError, RlhfError, SpecError, did_you_mean
from rlhf_nb.protocol.spec import FunctionReward, NamedReward

RewardFunction = Callable[..., list[float]]


def from_reference(reference: NamedReward | FunctionReward) -> RewardFunction:
    """The function a reference stands for, checked at every call."""
    if isinstance(reference, NamedReward):
        function = registry.rewards.get(reference.name)
        return checked(partial(function, **reference.config), reference.name, options=frozenset(options(function)))
    return checked(from_source(reference.source, reference.name), reference.name)


def options(function: Callable[..., Any]) -> dict[str, Any]:
    """Options of a registered reward with their defaults: its keyword-only parameters. The others are columns."""
    parameters = inspect.signature(function).parameters.values()
    return {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}


def named(name: str, config: dict[str, Any]) -> NamedReward:
    """A registered reward with its options checked and written out, so that a later default changes no old run.

    Raises:
        NotFoundError: No such reward.
        SpecError: No such option, or a value that it cannot have.
    """
    function = registry.rewards.get(name)
    known = options(function)
    hints = get_type_hints(function)
    for option, value in config.items():
        if option not in known:
            have = f"its options: {', '.join(known)}" if known else "it has no options"
            raise SpecError(f"reward {name}: no option {option}{did_you_mean(option, known)}  {have}")
        try:
            TypeAdapter(hints[option]).validate_python(value, strict=True)
        except ValidationError as error:
            raise SpecError(f"reward {name}: {option}={value!r}: {error.errors()[0]['msg'].lower()}") from None
    return NamedReward(name=name, config={**known, **config})


def from_source(source: str, name: str) -> Callable[..., Any]:
    """The last function of the source that takes prompts and completions, in a module of its own.

    It is its author's code, on its author's compute: nothing is sandboxed.
    """
    file = f"<reward {name}>"
    # Lines of the source in a traceback: the log then shows the user's own line.
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    module = types.ModuleType(f"reward_{name}")
    try:
        exec(compile(source, file, "exec"), module.__dict__)
    except Exception as error:
        raise RewardError(f"reward {name}: its source does not run: {_first_line(error)}") from error
    functions = [f for f in vars(module).values() if inspect.isfunction(f) and f.__code__.co_filename == file]
    fitting = [f for f in functions if list(inspect.signature(f).parameters)[:2] == ["prompts", "completions"]]
    if not fitting:
        raise RewardError(f"reward {name}: no function in its source begins with (prompts, completions, ...)")
    return fitting[-1]


def checked(function: Callable[..., Any], name: str, *, options: frozenset[str] = frozenset()) -> RewardFunction:
    """The same function; what it returns is one finite number per completion, or a RewardError says which is not.

    Args:
        options: Parameters that no column may set: they are the spec's, and a row is anybody's.
    """

    takes = _takes(function)
    needs = _needs(function) - options

    def score(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
        wanted = {
            column: values
            for column, values in columns.items()
            if column not in options and (takes is None or column in takes)
        }
        if missing := sorted(needs - set(wanted)):
            raise RewardError(no_column(name, missing, columns))
        try:
            returned = function(list(prompts), list(completions), **wanted)
        except RlhfError:
            raise
        except Exception as error:
            raise RewardError(f"reward {name}: {_first_line(error)}{_where(error, name)}") from error
        return finite(returned, len(completions), name)

    return score


def on_rows(function: RewardFunction, rows: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> list[float]:
    """A score for a completion of each row's prompt. The columns that all rows have go along."""
    shared = set.intersection(*(set(row) for row in rows)) - {"prompt"}
    columns = {name: [row[name] for row in rows] for name in sorted(shared)}
    return function([row["prompt"] for row in rows], list(texts), **columns)


def _takes(function: Callable[..., Any]) -> set[str] | None:
    """Names of the columns that a function can be given; None where it takes any."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return {parameter.name for parameter in parameters}


def _needs(function: Callable[..., Any]) -> set[str]:
    """Names of the columns without which a function cannot be called."""
    parameters = list(inspect.signature(function).parameters.values())
    named_ones = [each for each in parameters[2:] if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]
    return {each.name for each in named_ones if each.default is each.empty}


def require_columns(reward: NamedReward, rows: Sequence[Mapping[str, Any]]) -> None:
    """See that rows have the columns that a registered reward cannot do without.

    Raises:
        RewardError: One is missing.
    """
    function = registry.rewards.get(reward.name)
    shared = set.intersection(*(set(row) for row in rows)) - {"prompt"}
    if missing := sorted(_needs(function) - set(options(function)) - shared):
        raise RewardError(no_column(reward.name, missing, dict.fromkeys(shared)))


def no_column(name: str, missing: Sequence[str], columns: Mapping[str, Any]) -> str:
    """What to say of rows that lack one of the columns a reward reads."""
    have = f"they have {', '.join(sorted(columns))}" if columns else "they have prompts alone"
    return f"reward {name}: the rows have no column {' or '.join(missing)}; {have}: import prompts with that column"


def finite(returned: Any, n: int, name: str) -> list[float]:
    """`returned` as n finite floats.

    Raises:
        RewardError: Another number of values, or one that is not a finite number, with its index.
    """
    tolist = getattr(returned, "tolist", None)
    values = tolist() if tolist is not None else returned
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise RewardError(f"reward {name}: returned {type(returned).__name__}; return a list of {n} numbers")
    if len(values) != n:
        raise RewardError(f"reward {name}: returned {len(values)} numbers for {n} completions; return one for each")
    scores = []
    for index, value in enumerate(values):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise RewardError(
                f"reward {name}: completion {index} got {value!r}; every completion needs one finite number"
            )
        scores.append(number)
    return scores


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}".rstrip(": ")


def _where(error: BaseException, name: str) -> str:
    frame, line = error.__traceback__, None
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == f"<reward {name}>":
            line = frame.tb_lineno
        frame = frame.tb_next
    return f" (line {line} of its source)" if line else ""
