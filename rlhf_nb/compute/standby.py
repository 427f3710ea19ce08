"""A launch that has already imported everything and waits for one job.

`.standby/<id>/` holds, in the order of its life: `owner.json` (its supervisor), `offer.json` (launch flags; whoever
renames it has the standby), `ranks/<rank>.json` once a rank is ready, `job.json` (the run it takes). After that it is
the run's own launcher and supervisor; the directory goes when the run ends.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from rlhf_nb.compute.rundir import ProcessIdentity, RunDir, read_json, write_json
from rlhf_nb.protocol.spec import Launch

MEMORY_NEEDED = 4 << 30
"""Bytes that must be free. A standby costs about 435 MB a rank, and the run it is kept for needs the rest."""


@dataclass(frozen=True)
class Standby:
    path: Path

    @classmethod
    def all(cls, runs_root: Path) -> list[Standby]:
        folder = Path(runs_root) / ".standby"
        return [cls(path) for path in sorted(folder.iterdir())] if folder.is_dir() else []

    @property
    def owner(self) -> ProcessIdentity | None:
        return ProcessIdentity.from_dict(read_json(self.path / "owner.json"))

    @property
    def offer(self) -> dict[str, Any] | None:
        """`flags` and `ranks` while it is free, else None."""
        return read_json(self.path / "offer.json")

    @property
    def taken(self) -> bool:
        """Whether somebody has claimed it. The directory goes with the run, which may have ended since."""
        return (self.path / "claimed.json").exists() or not self.path.exists()

    def ready(self) -> bool:
        offer = self.offer
        return offer is not None and len(RunDir(self.path).rank_files()) >= offer["ranks"]

    def seconds_to_ready(self) -> float | None:
        """From its start until its last rank had imported everything."""
        ranks, started = RunDir(self.path).rank_files(), read_json(self.path / "started.json")
        return max(rank["ready"] for rank in ranks.values()) - started["at"] if ranks and started else None

    def claim(self) -> bool:
        """Take it for one job. True for exactly one caller."""
        owner = self.owner
        if owner is None or not owner.alive():
            return False
        try:
            os.rename(self.path / "offer.json", self.path / "claimed.json")
        except FileNotFoundError:
            return False
        return True

    def announce(self, run_dir: Path) -> None:
        write_json(self.path / "job.json", {"run_dir": str(run_dir), "at": time.time()})

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def claim(runs_root: Path, launch: Launch) -> tuple[Standby | None, str]:
    """A standby with the same launch flags, already claimed, or None and the reason in words."""
    reason = "no standby was waiting"
    for standby in Standby.all(runs_root):
        offer = standby.offer
        if offer is None:
            continue
        if tuple(offer["flags"]) != launch.flags:
            have, want = " ".join(offer["flags"]) or "no flags", " ".join(launch.flags) or "no flags"
            reason = f"the standby was launched with {have}, this run wants {want}"
        elif standby.claim():
            return standby, ""
    return None, reason


def start(runs_root: Path, launch: Launch) -> tuple[Standby, subprocess.Popen[bytes]]:
    """Start one, detached. It leaves when the returned process's stdin is closed, unless it has a job by then."""
    offer = {"flags": list(launch.flags), "ranks": launch.num_processes}
    path = Path(runs_root) / ".standby" / uuid.uuid4().hex[:12]
    (path / "ranks").mkdir(parents=True)
    write_json(path / "started.json", {"at": time.time()})
    with open(path / "log.txt", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "rlhf_nb.compute.supervisor", "--standby", str(path), "--", *launch.flags],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    # Offered at once: a run that comes while it imports is still faster with it than with a second import beside it.
    write_json(path / "owner.json", ProcessIdentity.of(process.pid).to_dict())
    write_json(path / "offer.json", offer)
    return Standby(path), process


def memory_allows() -> bool:
    return psutil.virtual_memory().available >= MEMORY_NEEDED


def sweep(runs_root: Path) -> None:
    """Remove what standbys that are gone left behind."""
    for standby in Standby.all(runs_root):
        started = read_json(standby.path / "started.json")
        owner = standby.owner
        young = started is not None and time.time() - started["at"] < 30
        if (owner is None and not young) or (owner is not None and not owner.alive()):
            if not any(_alive(rank) for rank in RunDir(standby.path).rank_files().values()):
                standby.remove()


def _alive(record: dict[str, Any]) -> bool:
    who = ProcessIdentity.from_dict(record)
    return who is not None and who.alive()
