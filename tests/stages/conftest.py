"""A workspace whose compute takes every spec and trains nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

import rlhf_nb as rl


@pytest.fixture
def ws(tmp_path: Path) -> Iterator[rl.Workspace]:
    with rl.Workspace(tmp_path / "w") as workspace:
        workspace._client = Mock(alive=True, info=SimpleNamespace(name="local", runs_root="/runs", host="gpu-1"))
        yield workspace
        workspace._client = None
