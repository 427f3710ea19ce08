"""Reward functions `f(prompts, completions, **columns) -> list[float]`: named ones, and source from a cell."""

from __future__ import annotations

import inspect
import linecache
import math
import types
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from rlhf_nb import registry
from rlhf_nb.errors import RewardError, RlhfError
from rlhf_nb.protocol.spec import FunctionReward, NamedReward

RewardFunction = Callable[..., list[float]]


def from_reference(reference: NamedReward | FunctionReward) -> RewardFunction:
    """The function a reference stands for, checked at every call."""
    if isinstance(reference, NamedReward):
        function = registry.rewards.get(reference.name)
        return checked(partial(function, **reference.config) if reference.config else function, reference.name)
    return checked(from_source(reference.source, reference.name), reference.name)


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


def checked(function: Callable[..., Any], name: str) -> RewardFunction:
    """The same function; what it returns is one finite number per completion, or a RewardError says which is not."""

    takes = _takes(function)

    def score(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
        wanted = {column: values for column, values in columns.items() if takes is None or column in takes}
        try:
            returned = function(list(prompts), list(completions), **wanted)
        except RlhfError:
            raise
        except Exception as error:
            raise RewardError(f"reward {name}: {_first_line(error)}{_where(error, name)}") from error
        return finite(returned, len(completions), name)

    return score


def _takes(function: Callable[..., Any]) -> set[str] | None:
    """Names of the columns that a function can be given; None where it takes any."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return {parameter.name for parameter in parameters}


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
