"""Magics as they are typed, in a shell that raises again what a cell would show."""

from __future__ import annotations

import atexit
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

from rlhf_nb import workspace


class Shell:
    """Types cells. An error of a cell is raised here, so that a test sees what a person would."""

    def __init__(self, shell: InteractiveShell) -> None:
        self.shell = shell

    def run(self, cell: str) -> Any:
        result = self.shell.run_cell(cell, store_history=False)
        if not result.success:
            raise result.error_before_exec or result.error_in_exec
        return result.result

    def complete(self, text: str) -> list[str]:
        # As a kernel asks for it: the word is cut out of the line by IPython.
        return list(self.shell.complete(None, text, len(text))[1])


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shell]:
    monkeypatch.chdir(tmp_path)
    InteractiveShell.clear_instance()
    made = InteractiveShell.instance(config=Config(HistoryManager={"enabled": False}))
    atexit.unregister(made.atexit_operations)
    made.run_line_magic("load_ext", "rlhf_nb")
    yield Shell(made)
    workspace.use(None)
    InteractiveShell.clear_instance()
