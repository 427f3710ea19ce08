"""Checkpoints of a run: whole directories only, found by step. Imports no torch."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from rlhf_nb.compute.rundir import storage_errors

SCRATCH = ".saving"
"""Folder inside `checkpoints/` where one is written before it is renamed into place."""


def directory(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"checkpoint-{step}"


def step_of(path: Path) -> int:
    """The optimizer step after which a checkpoint was taken."""
    return int(path.name.rsplit("-", 1)[1])


def newest_first(run_dir: Path) -> list[Path]:
    """Whole checkpoints. One that was being written when its process died is not among them."""
    folder = run_dir / "checkpoints"
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=step_of, reverse=True)


def latest(run_dir: Path) -> Path | None:
    """The checkpoint with the largest step, or None."""
    return next(iter(newest_first(run_dir)), None)


def publish(run_dir: Path, step: int, written: Path) -> Path:
    """Rename a whole checkpoint into its place; an older one of the same step gives way."""
    target = directory(run_dir, step)
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        old = _put_aside(target)
        os.replace(written, target)
        shutil.rmtree(old, ignore_errors=True)
    return target


def discard(path: Path) -> None:
    """Take a checkpoint out of the list at once, whatever happens while its files go."""
    shutil.rmtree(_put_aside(path), ignore_errors=True)


def _put_aside(path: Path) -> Path:
    # No name that a trainer of transformers would take for one of its checkpoints.
    aside = path.parent / SCRATCH / f"old-{path.name}"
    shutil.rmtree(aside, ignore_errors=True)
    if path.exists():
        aside.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, aside)
    return aside
