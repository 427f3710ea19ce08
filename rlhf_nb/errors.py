"""Every error this package raises on purpose.

One root, `RlhfError`; each error is also the builtin a caller would expect to catch. A message is one line: what
happened, with the field and the value, and the way out. In a notebook the line is all that is shown: IPython asks an
exception that has `_render_traceback_` for its own rendering.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError


class RlhfError(Exception):
    """Root of the package's errors."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


class SpecError(RlhfError, ValueError):
    """A knob, flag or argument has a value that cannot be used."""


class DataError(RlhfError, ValueError):
    """Rows, a file or a data set cannot be used."""


class ShapeError(RlhfError, ValueError):
    """A tensor or array has a shape for which the quantity does not exist."""


class NotFoundError(RlhfError, LookupError):
    """A name that resolves to nothing. The message suggests the nearest one."""


class ComputeError(RlhfError, RuntimeError):
    """The attached compute, its agent or a worker did not do what was asked."""


class RunIdTakenError(ComputeError):
    """The attached compute has another run of that id: workspaces that share it count their runs each for itself."""


class AttachError(ComputeError):
    """Nothing is attached, or attaching failed."""


class ElsewhereError(ComputeError, LookupError):
    """A run that is not on the attached compute; the message says where it was seen last."""


class RunFailedError(ComputeError):
    """A run ended in the state `failed`; the message carries its cause."""


class WaitTimeoutError(RlhfError, TimeoutError):
    """What was waited for has not come yet; it still may."""


class UnavailableError(RlhfError, RuntimeError):
    """Something that exists cannot be used here, with the reason."""


class StoreError(RlhfError, RuntimeError):
    """The workspace's database refused or could not keep something."""


class SchemaError(StoreError):
    """The database was written by a newer version of this package."""


class StoreLockedError(StoreError, TimeoutError):
    """Another process held the database's write lock past the time-out."""


class StorageError(RlhfError, OSError):
    """The file system refused a write (no space, read-only, permissions)."""

    def __str__(self) -> str:
        # OSError.__str__ with two arguments would print "[Errno 28] ..." and hide the way out.
        return str(self.args[0]) if self.args else ""


class RewardError(RlhfError, ValueError):
    """A reward function or reward model returned something that is not one finite number per completion."""


def first_fault(error: ValidationError) -> tuple[str, Any, str]:
    """Of what a model of pydantic's refused first: the field, its value, and what it "should be ..."."""
    first = error.errors()[0]
    # pydantic says "Input should be greater than 0"; the value belongs beside it.
    said = first["msg"].lower().replace("input should", "should")
    return ".".join(str(part) for part in first["loc"]) or "?", first["input"], said


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean "x"?` for the nearest known name, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f'; did you mean "{near[0]}"?' if near else ""
