"""`%rlhf wait` at the top of a cell awaits: while it does, the kernel hears its widgets, and sliders work.

A cell that blocks keeps every message of a view waiting behind it. ipykernel 7 lets widget messages through while a
cell awaits, so the line is rewritten before it runs; inside a function it stays a plain call, which blocks.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

_LINE = re.compile(r"get_ipython\(\)\.run_line_magic\('rlhf', (?P<words>'wait(?: .*)?')\)\s*")
_CALL = "await get_ipython().magics_manager.magics['line']['rlhf'].wait({words})\n"


def transform(lines: list[str]) -> list[str]:
    """An IPython input transformer: lines of a cell, after its magics became calls."""
    found = [_LINE.fullmatch(line) for line in lines]
    return [_CALL.format(words=m["words"]) if m else line for line, m in zip(lines, found, strict=True)]


def register(shell: InteractiveShell) -> None:
    """In a kernel; a terminal has no widgets that could wait."""
    if hasattr(shell, "kernel") and transform not in shell.input_transformers_post:
        shell.input_transformers_post.append(transform)


def unregister(shell: InteractiveShell) -> None:
    if transform in shell.input_transformers_post:
        shell.input_transformers_post.remove(transform)


def expanded(line: str) -> Any:
    """The line with `{run}` and `$run` replaced from the notebook's variables, as IPython does for a magic."""
    from IPython.core.getipython import get_ipython

    shell = get_ipython()
    return shell.var_expand(line) if shell is not None else line
