"""Rewards that hold a completion against a form: a regular expression, a JSON schema. 1 if it fits, else 0."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal, NoReturn

from rlhf_nb.errors import RewardError
from rlhf_nb.rewards.functions import no_column
from rlhf_nb.rewards.text import fenced


def regex(
    prompts: Sequence[Any],
    completions: Sequence[str],
    regex: Sequence[str] | None = None,
    *,
    pattern: str = "",
    match: Literal["search", "full"] = "search",
    timeout: float = 1.0,
) -> list[float]:
    """1 where the pattern is found. The registered reward `regex`.

    The syntax is the `regex` library's, which can be timed: patterns with nested repeats take for ever on texts that
    are made for it.

    Args:
        regex: Each row's own pattern, where no `pattern` is given for all.
        match: search: anywhere. full: the whole completion, without white space around.
        timeout: Seconds for one completion; what takes longer scores 0.

    Raises:
        RewardError: No pattern, or one that cannot be read.
    """
    import regex as library

    patterns = [pattern] * len(completions) if pattern else regex
    if patterns is None:
        raise RewardError(f'{no_column("regex", ["regex"], {})}, or give one for all: regex(pattern="...")')
    scores = []
    for one, completion in zip(patterns, completions, strict=True):
        try:
            compiled = library.compile(one)
        except (library.error, TypeError) as error:
            raise RewardError(f"reward regex: pattern={one!r}: {error}; correct it") from None
        try:
            if match == "full":
                found = compiled.fullmatch(completion.strip(), timeout=timeout)
            else:
                found = compiled.search(completion, timeout=timeout)
        except TimeoutError:
            found = None
        scores.append(float(found is not None))
    return scores


def json_schema(
    prompts: Sequence[Any],
    completions: Sequence[str],
    json_schema: Sequence[Any] | None = None,
    *,
    schema: str | dict[str, Any] = "",
) -> list[float]:
    """1 where the completion is JSON that its schema allows. The registered reward `json-schema`.

    Read is the last fenced block, or the whole completion. NaN and Infinity are no JSON.

    Args:
        json_schema: Each row's own schema, an object or its text, where no `schema` is given for all. Its `$schema`
            names the draft; without one it is 2020-12. A `$ref` to elsewhere is never fetched.

    Raises:
        RewardError: No schema, or one that is none.
    """
    from jsonschema.validators import Draft202012Validator

    schemas = [schema] * len(completions) if schema else json_schema
    if schemas is None:
        missing = no_column("json-schema", ["json_schema"], {})
        raise RewardError(f"{missing}, or give one for all: json-schema(schema={{...}})")
    validators: dict[str, Any] = {}
    scores = []
    for one, completion in zip(schemas, completions, strict=True):
        key = one if isinstance(one, str) else json.dumps(one, sort_keys=True)
        if key not in validators:
            validators[key] = _validator(key, Draft202012Validator)
        scores.append(float(_allowed(completion, validators[key])))
    return scores


def _validator(text: str, default: Any) -> Any:
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for
    from referencing import Registry

    try:
        schema = json.loads(text)
        cls = validator_for(schema, default=default)
        cls.check_schema(schema)
    except SchemaError as error:
        raise RewardError(f"reward json-schema: schema {text[:60]!r}: {error.message}; correct it") from None
    except ValueError as error:
        raise RewardError(f"reward json-schema: schema {text[:60]!r} is not JSON: {error}") from None
    return cls(schema, registry=Registry())


def _allowed(completion: str, validator: Any) -> bool:
    from referencing.exceptions import Unresolvable

    try:
        value = json.loads(fenced(completion, "json"), parse_constant=_no_json)
        return bool(validator.is_valid(value))
    except Unresolvable as error:
        raise RewardError(f"reward json-schema: $ref {error.ref!r} is not in the schema; write it out there") from None
    except (ValueError, RecursionError):
        return False


def _no_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
