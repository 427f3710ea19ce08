"""Constitutions: the principles an AI labeller is held to, as a file with a content hash.

Bai et al. 2022, arXiv:2212.08073. A principle may say what to look for in an answer (`critique`), how to mend it
(`revision`) and which of two answers to prefer (`preference`); a job uses those that have what it needs. A file is
TOML:

    name = "my-constitution"

    [[principles]]
    name = "honest"
    critique = "Name everything in the answer that is not true."
    revision = "Rewrite the answer so that everything in it is true."
    preference = "Which answer is more honest?"

or JSON of the same form. JSON with `constitutions`, a list of `{"critic", "revision"}`, is read as well.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from rlhf_nb.data.rows import canonical_json
from rlhf_nb.errors import NotFoundError, SpecError, did_you_mean, first_fault

SHIPPED = Path(__file__).parent / "constitutions"
Part = Literal["critique", "revision", "preference"]
_SAYS = {
    "critique": "what to criticise (critique=)",
    "revision": "how to revise (revision=)",
    "preference": "which of two completions to prefer (preference=)",
}


class Principle(BaseModel):
    """One principle, in the words that a model is asked with. An empty part is one it does not say."""

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)

    name: str
    critique: str = ""
    revision: str = ""
    preference: str = ""

    @property
    def hash(self) -> str:
        """SHA-256, in hex, of its name and words."""
        return hashlib.sha256(canonical_json(self.model_dump()).encode()).hexdigest()


class Constitution(BaseModel):
    """Principles under a name. Frozen: the content hash is what an AI label is traced to."""

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)

    name: str
    source: str = ""
    """Where the words are from."""
    principles: tuple[Principle, ...]

    @property
    def content_hash(self) -> str:
        """SHA-256, in hex, of the principles in their order: neither the file's name nor its form counts."""
        words = [principle.model_dump() for principle in self.principles]
        return hashlib.sha256(canonical_json(words).encode()).hexdigest()

    def saying(self, *parts: Part) -> tuple[Principle, ...]:
        """The principles that have all these parts.

        Raises:
            SpecError: None has.
        """
        found = tuple(each for each in self.principles if all(getattr(each, part) for part in parts))
        if not found:
            lacking = " and ".join(_SAYS[part] for part in parts)
            raise SpecError(
                f"constitution {self.name}: none of its {len(self.principles)} principles says {lacking}; add it to one"
            )
        return found

    def __str__(self) -> str:
        return f"{self.name}: {len(self.principles)} principles, {self.content_hash[:12]}"


def draw(principles: tuple[Principle, ...], *key: Any) -> Principle:
    """One of the principles, each as likely, by the key alone: the same after a restart and in any order of rows."""
    digest = hashlib.sha256(canonical_json([str(part) for part in key]).encode()).digest()
    return principles[int.from_bytes(digest[:8], "big") % len(principles)]


def shipped() -> list[str]:
    """Names of the constitutions inside the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def load(source: str | Path | Mapping[str, Any] | Constitution) -> Constitution:
    """A constitution from a file, by the name of a shipped one, or from its parts.

    Raises:
        NotFoundError: No such file, and no shipped constitution of that name.
        SpecError: It holds no principle, or something that is none, named by its place.
    """
    if isinstance(source, Constitution):
        return _checked(source)
    if isinstance(source, Mapping):
        return _from_parts(dict(source), str(source.get("name") or "constitution"))
    path = Path(source).expanduser()
    if not path.suffix and str(source) in shipped():
        path = SHIPPED / f"{source}.toml"
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        known = shipped()
        raise NotFoundError(
            f'constitution "{source}" is no file here{did_you_mean(str(source), known)}  shipped: {", ".join(known)}'
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"constitution {path.name}: cannot be read: {error}") from None
    return _from_parts(_parsed(text, path), path.stem)


def _parsed(text: str, path: Path) -> dict[str, Any]:
    if path.suffix not in (".toml", ".json"):
        raise SpecError(f"constitution {path.name}: a constitution is a .toml or .json file")
    try:
        found = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (json.JSONDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        kind = path.suffix[1:].upper()
        raise SpecError(f"constitution {path.name}: not {kind}: {error}".splitlines()[0]) from None
    if not isinstance(found, dict):
        raise SpecError(
            f"constitution {path.name}: a table with principles is needed, and it holds a {type(found).__name__}"
        )
    return found


def _from_parts(parts: dict[str, Any], name: str) -> Constitution:
    if "principles" not in parts and isinstance(parts.get("constitutions"), list):
        # The form in which the critique and revision requests of the paper are passed around.
        parts = {"principles": [_critic(each) for each in parts["constitutions"]]}
    principles = parts.get("principles")
    if not principles:
        raise SpecError(f"constitution {name}: it has no principles; add [[principles]] with a name and what it says")
    try:
        numbered = [{"name": str(at), **each} for at, each in enumerate(principles, start=1)]
        made = Constitution(**{"name": name, **parts, "principles": tuple(Principle(**each) for each in numbered)})
    except ValidationError as error:
        field, given, said = first_fault(error)
        hint = did_you_mean(field, [*Principle.model_fields, *Constitution.model_fields])
        raise SpecError(f"constitution {name}: {field}={given!r}: {said}{hint}") from None
    except TypeError:
        raise SpecError(f"constitution {name}: principles is a list of tables, each with what it says") from None
    return _checked(made)


def _critic(each: Any) -> Any:
    if not isinstance(each, dict) or not {"critic", "revision"} <= each.keys():
        raise SpecError('constitution: each of "constitutions" is {"critic": ..., "revision": ...}')
    return {"critique": each["critic"], "revision": each["revision"]}


def _checked(made: Constitution) -> Constitution:
    if not made.principles:
        raise SpecError(f"constitution {made.name}: it has no principles; add one")
    if doubled := [name for name, n in Counter(each.name for each in made.principles).items() if n > 1]:
        raise SpecError(
            f'constitution {made.name}: two principles are called "{doubled[0]}"; a label names its principle'
        )
    if empty := [each.name for each in made.principles if not (each.critique or each.revision or each.preference)]:
        raise SpecError(
            f'constitution {made.name}: principle "{empty[0]}" says nothing; give it a critique, revision or preference'
        )
    return made
