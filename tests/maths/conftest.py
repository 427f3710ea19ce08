"""The last TRL that had a PPO, as source: its own lines are run on our tensors."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

VERSION = "1.12.0"
TRAINER = "trl/experimental/ppo/ppo_trainer.py"


class TrlPpo:
    """Functions and passages of TRL 1.12's `ppo_trainer.py`, without importing the package: another TRL is installed
    here."""

    def __init__(self, source: str) -> None:
        self.source = source
        functions = [
            n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name.startswith("masked_")
        ]
        self.namespace: dict[str, Any] = {"torch": torch}
        exec(compile(ast.Module(functions, []), TRAINER, "exec"), self.namespace)

    def function(self, name: str) -> Callable[..., Any]:
        return self.namespace[name]

    def run(self, first: str, last: str, **names: Any) -> dict[str, Any]:
        """Execute the passage from the line that starts with `first` to the one that starts with `last`, both
        included."""
        lines = self.source.splitlines()
        start = next(i for i, line in enumerate(lines) if line.strip().startswith(first))
        end = next(i for i in range(start, len(lines)) if lines[i].strip().startswith(last))
        scope = self.namespace | names
        exec(textwrap.dedent("\n".join(lines[start : end + 1])), scope)
        return scope


@pytest.fixture(scope="session")
def trl_ppo(request: pytest.FixtureRequest) -> TrlPpo:
    folder = Path(request.config.cache.mkdir(f"trl-{VERSION}"))
    wheel = folder / f"trl-{VERSION}-py3-none-any.whl"
    if not wheel.exists():
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), f"trl=={VERSION}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode:
            reason = f"trl {VERSION} cannot be downloaded: {done.stderr.strip().splitlines()[-1:]}"
            if os.environ.get("CI") == "true":
                pytest.fail(reason)
            pytest.skip(reason)
    return TrlPpo(zipfile.ZipFile(wheel).read(TRAINER).decode())


def random_mask(rows: int, tokens: int, generator: torch.Generator) -> torch.Tensor:
    lengths = torch.randint(1, tokens + 1, (rows, 1), generator=generator)
    return torch.arange(tokens) < lengths


@pytest.fixture
def draw() -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def mask_BT() -> torch.Tensor:
    return random_mask(5, 7, torch.Generator().manual_seed(3))
