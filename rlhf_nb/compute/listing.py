"""Runs as rows: what `%rlhf runs` lists, read from the run directories, and the compute's own health."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import psutil

from rlhf_nb.compute import launch as launching
from rlhf_nb.compute.rundir import LineTail, ProcessIdentity, RunDir

_ENDED: dict[tuple[str, int], dict[str, Any]] = {}


def run_ids(runs_root: Path) -> list[str]:
    try:
        return [
            e.name
            for e in os.scandir(runs_root)
            if not e.name.startswith(".") and (Path(e.path) / "spec.json").exists()
        ]
    except FileNotFoundError:
        return []


def forgotten(runs_root: Path) -> list[str]:
    """Runs without an end that no marker names: a directory copied here, or a marker lost with a full disk."""
    marked = runs_root / ".active"
    return [
        name
        for name in run_ids(runs_root)
        if not (runs_root / name / "exit.json").exists()
        and (runs_root / name / "attempt.json").exists()
        and not (marked / name).exists()
    ]


def runs(runs_root: Path) -> list[dict[str, Any]]:
    """One dict a run, oldest first; see `describe`."""
    return sorted((describe(RunDir(runs_root / name)) for name in run_ids(runs_root)), key=lambda row: row["created"])


def describe(run: RunDir) -> dict[str, Any]:
    """`run_id, method, title, created, state, phase, attempt, stage, step, reason, seconds, alive`, and the spec."""
    ended = run.exit()
    key = (str(run.path), run.exit_path.stat().st_mtime_ns) if ended is not None else None
    if key in _ENDED:
        return _ENDED[key]
    if ended is not None and not run.said_its_end():
        # Until the terminal event is there, a reader of the events would find no reason for the end.
        ended = None
    spec = run.spec()
    row: dict[str, Any] = {
        "run_id": run.run_id,
        "method": spec.method,
        "title": spec.title,
        "label_as": spec.label_as,
        "who": spec.who,
        "workspace_id": spec.workspace_id,
        "parents": list(spec.parents),
        "created": spec.created,
        "attempt": run.attempt()["attempt"],
        "spec": spec.model_dump(mode="json"),
        "reason": "",
        "seconds": None,
        "step": None,
        "alive": False,
    }
    if ended is not None and key is not None:
        row |= {"state": ended["outcome"], "phase": "ended", "reason": ended["reason"]}
        row |= {"seconds": ended["seconds"], "step": ended["step"]}
        _ENDED[key] = row
        return row
    watcher = run.supervisor() or {}
    phase = watcher.get("phase", "waiting")
    ranks = [ProcessIdentity.from_dict(rank) for rank in run.rank_files().values()]
    begun = bool(ranks)
    row |= {"phase": phase, "alive": any(rank and rank.alive() for rank in ranks) if begun else run.supervised()}
    state, step, stage = _live(run) if phase == "computing" else ("waiting", None, "")
    if phase in ("computing", "ended") and not row["alive"]:
        # A supervisor is about to write how it ended; until then nobody may read that it runs.
        state, row["reason"] = _meant(run) or "failed", "its processes are gone"
    return row | {"state": state, "step": step, "stage": stage}


def _meant(run: RunDir) -> str | None:
    """How rank 0 meant to end, if it said so."""
    last = run.last_events(1 << 16)
    return last[-1]["outcome"] if last and last[-1]["kind"] == "training_ended" else None


def _live(run: RunDir) -> tuple[str, int | None, str]:
    """State of a run that computes, from the end of its log."""
    state, step, stage = None, None, ""
    for event in reversed(run.last_events(1 << 16)):
        kind = event["kind"]
        if kind == "metric" and step is None:
            step = event["step"]
        if kind == "stage" and not stage and state is None:
            stage = event["text"]
        if state is None and kind in ("paused", "resumed", "started", "metric"):
            # A restart is announced before its processes run.
            restarting = kind == "resumed" and event.get("from_step") is not None
            state = {"paused": "paused"}.get(kind, "starting" if restarting else "running")
        if state is not None and step is not None:
            break
    return state or "starting", step, stage


def has_metric(run: RunDir) -> bool:
    """Whether this attempt has reported a metric."""
    for event in reversed(run.last_events(1 << 16)):
        if event["kind"] == "metric":
            return True
        if event["kind"] in ("started", "finished", "stopped", "failed"):
            return False
    return False


def last_checkpoint(run: RunDir) -> tuple[str | None, int]:
    """The newest checkpoint that is still there, relative to the run, and its step; (None, 0) without one."""
    for raw in reversed(LineTail(run.events_path).read_raw()):
        if b'"kind":"checkpoint_saved"' in raw:
            event = json.loads(raw)
            if (run.path / event["path"]).is_dir():
                return event["path"], int(event["step"])
    return None, 0


def doctor(runs_root: Path, standby: dict[str, Any]) -> list[dict[str, Any]]:
    """Checks of the compute side: `check, ok, text`."""
    disk = shutil.disk_usage(runs_root)
    memory = psutil.virtual_memory()
    found = launching.versions()
    missing = [name for name in ("torch", "trl", "transformers", "accelerate") if name not in found]
    unfinished = [row for row in runs(runs_root) if row["phase"] != "ended"]
    gone = [row["run_id"] for row in unfinished if not row["alive"]]
    return [
        {"check": "device", "ok": True, "text": launching.device()},
        {
            "check": "packages",
            "ok": not missing,
            "text": f"missing: {', '.join(missing)}; pip install 'rlhf-nb[train]'"
            if missing
            else " ".join(f"{name} {number}" for name, number in found.items()),
        },
        {"check": "disk", "ok": disk.free > 2 << 30, "text": f"{disk.free / 2**30:.1f} GiB free at {runs_root}"},
        {"check": "memory", "ok": memory.available > 2 << 30, "text": f"{memory.available / 2**30:.1f} GiB free"},
        {
            "check": "standby",
            "ok": standby["state"] != "failed",
            "text": " ".join(str(value) for value in standby.values()),
        },
        {
            "check": "runs",
            "ok": not gone,
            "text": f"{', '.join(gone)}: no process lives" if gone else f"{len(unfinished)} not ended",
        },
        {"check": "clock", "ok": True, "text": time.strftime("%Y-%m-%d %H:%M:%S %Z"), "at": time.time()},
    ]
