"""One run computes at a time under a runs root; the others queue in the order they were submitted.

`.active/<run id>` marks every run that has not ended, so that no reader walks the finished ones. Who computes is said
by the runs' own `supervisor.json`; the lock only makes looking and taking one act.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf_nb.compute.rundir import RunDir, read_json, storage_errors, write_json


class Turns:
    def __init__(self, runs_root: Path) -> None:
        self.runs_root = Path(runs_root)
        self.active = self.runs_root / ".active"

    def enter(self, run_id: str, submitted: float) -> None:
        write_json(self.active / run_id, {"submitted": submitted})

    def leave(self, run_id: str) -> None:
        (self.active / run_id).unlink(missing_ok=True)

    def unfinished(self) -> list[str]:
        """Runs that have not ended, in the order they were submitted."""
        found: list[tuple[float, str]] = []
        try:
            names = os.listdir(self.active)
        except FileNotFoundError:
            return []
        for name in names:
            value = None if name.startswith(".") else read_json(self.active / name)
            if value is not None:
                found.append((value["submitted"], name))
        return [name for _, name in sorted(found)]

    @contextmanager
    def lock(self) -> Iterator[None]:
        with storage_errors(self.runs_root):
            self.runs_root.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.runs_root / ".turns.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def ahead_of(self, run_id: str) -> str | None:
        """The run that must end or start before `run_id` may compute, or None. Call it under the lock.

        A run that computes is ahead of everyone, also while its supervisor is dead. Among those that are ready, the one
        submitted first goes first; one that waits for a parent, or whose supervisor is gone, keeps nobody waiting.
        """
        first: str | None = None
        for other in self.unfinished():
            run = RunDir(self.runs_root / other)
            state: dict[str, Any] = run.supervisor() or {}
            phase = state.get("phase")
            if other != run_id and phase == "computing" and (run.supervised() or run.alive()):
                return other
            if first is None and (other == run_id or (phase == "queued" and run.supervised())):
                first = other
        return None if first in (None, run_id) else first
