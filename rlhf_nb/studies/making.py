"""What studies share: parts that are made once and kept, and what they were made with."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import rlhf_nb

DIGITS = 5


class Parts:
    """One JSON file a finished part."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def __call__(self, name: str, make: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
        file = self.directory / f"{name}.json"
        if not file.exists():
            began = time.monotonic()
            made = {**make(*arguments), "seconds": round(time.monotonic() - began, 1)}
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(made), encoding="utf-8")
            partial.replace(file)
            print(f"{name}: {made['seconds']:.0f} s", flush=True)
        return json.loads(file.read_text(encoding="utf-8"))


def made_with(study: str) -> dict[str, Any]:
    """Commit, versions, machine and the policy that everything started from."""
    from rlhf_nb.training.models import content_hash, toy_sft_path

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(rlhf_nb.__file__).parent, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    found = {name: version(name) for name in ("torch", "transformers", "trl", "numpy", "scipy")}
    return {
        "command": f"python -m rlhf_nb.studies.{study} DIRECTORY",
        "commit": git("rev-parse", "HEAD"),
        "uncommitted": git("status", "--porcelain", "--", "."),
        "python": platform.python_version(),
        **found,
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "toy-sft": content_hash(toy_sft_path()),
        "began": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
