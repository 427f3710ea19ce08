"""Checkpoints of online runs, taken between two rollouts: weights, optimizer, counters, generators."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from rlhf_nb.compute.rundir import storage_errors
from rlhf_nb.errors import ComputeError
from rlhf_nb.protocol.events import CheckpointSaved
from rlhf_nb.training import checkpoints, distributed, rng, sharding

if TYPE_CHECKING:
    from rlhf_nb.training.online import OnlineTrainer


REFERENCE = "reference.safetensors"


def save_checkpoint(trainer: OnlineTrainer) -> None:
    """Write `checkpoints/checkpoint-STEP`, whole or not at all. Every rank calls it."""
    run_dir, step = trainer.context.run_dir, trainer.step
    scratch = run_dir / "checkpoints" / checkpoints.SCRATCH / f"checkpoint-{step}"
    if trainer.context.is_main:
        shutil.rmtree(scratch, ignore_errors=True)
        with storage_errors(scratch):
            scratch.mkdir(parents=True)
    # Only what trains: the rest is read from where the policy came from.
    trained = {n: p for n, p in trainer.module.named_parameters() if p.requires_grad}
    weights = {n: sharding.whole(p.detach()).cpu() for n, p in trained.items()}
    optimizer = (
        sharding.optimizer_state(trainer.module, trainer.optimizer.optimizer)
        if trainer.sharded
        else trainer.optimizer.state_dict()
    )
    distributed.barrier()
    with storage_errors(scratch):
        mine: dict[str, Any] = {
            "generators": rng.generators(),
            "reference_said": trainer.reference_said.state(),
            **_kept_by_rank(trainer),
        }
        (scratch / f"rank-{trainer.context.rank}.json").write_text(json.dumps(mine), encoding="utf-8")
        if trainer.context.is_main:
            save_file(weights, scratch / "trained.safetensors")
            torch.save(optimizer, scratch / "optimizer.pt")
            if trainer.method.reference == "ema":
                save_file({n: p.detach().cpu() for n, p in trainer.reference.state().items()}, scratch / REFERENCE)
            counters: dict[str, Any] = {
                "step": step,
                "rollouts": trainer.rollouts,
                "prompts": trainer.prompts,
                "said": sorted(trainer.report.said),
                "doctor": trainer.doctor.state(),
                "moments": trainer.moments.state(),
                "samples": trainer.samples.state(),
                **_kept(trainer),
            }
            (scratch / "counters.json").write_text(json.dumps(counters), encoding="utf-8")
    distributed.barrier()
    if trainer.context.is_main:
        target = checkpoints.publish(run_dir, step, scratch)
        trainer.emit.event(CheckpointSaved(step=step, path=str(target.relative_to(run_dir))))
    distributed.barrier()


def _kept(trainer: OnlineTrainer) -> dict[str, Any]:
    """Of the counters, what still holds where a run goes back by itself: what people and the controller came to."""
    return {"live": vars(trainer.live), "measured": trainer.measured, "rewards": trainer.scoring.state()}


def _kept_by_rank(trainer: OnlineTrainer) -> dict[str, Any]:
    return {"scored": trainer.scoring.last}


def note_kept(path: Path, trainer: OnlineTrainer) -> None:
    """Write into a checkpoint that was gone back to what was kept: a restart from it has the same. Every rank calls
    it."""
    noted = [(path / f"rank-{trainer.context.rank}.json", _kept_by_rank(trainer))]
    if trainer.context.is_main:
        noted.append((path / "counters.json", _kept(trainer)))
    for file, kept in noted:
        if not file.exists():
            continue
        before = json.loads(file.read_text(encoding="utf-8"))
        with storage_errors(file):
            fresh = file.with_suffix(".tmp")
            fresh.write_text(json.dumps(before | kept), encoding="utf-8")
            os.replace(fresh, file)


def load_checkpoint(path: Path, trainer: OnlineTrainer) -> tuple[int, int]:
    """Put a checkpoint's state into a trainer; (optimizer steps taken, rollouts used up).

    Raises:
        ComputeError: Its weights are not those that this spec trains.
    """
    weights = load_file(path / "trained.safetensors")
    trained = {n: p for n, p in trainer.module.named_parameters() if p.requires_grad}
    if weights.keys() != trained.keys():
        odd = sorted(weights.keys() ^ trained.keys())
        raise ComputeError(f"{path.name} holds other weights than this run trains ({odd[0]}); start the run anew")
    for name, parameter in trained.items():
        sharding.put(parameter, weights[name])
    optimizer = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
    if trainer.sharded:
        sharding.load_optimizer_state(trainer.module, trainer.optimizer.optimizer, optimizer)
    else:
        trainer.optimizer.load_state_dict(optimizer)
    counters = json.loads((path / "counters.json").read_text(encoding="utf-8"))
    trainer.prompts = counters["prompts"]
    trainer.report.said = set(counters.get("said", []))
    trainer.doctor.load_state(counters.get("doctor", {}))
    # The controller moves kl_coef without an event: what the events tell of it is older.
    vars(trainer.live).update(counters.get("live", {}))
    trainer.moments.load(counters.get("moments"))
    trainer.scoring.load_state(counters.get("rewards", []))
    trainer.measured = counters.get("measured")
    trainer.scoring.journal.forget(counters["rollouts"])
    trainer.samples.load_state(counters.get("samples", {}))
    if (kept := path / f"rank-{trainer.context.rank}.json").exists():
        mine = json.loads(kept.read_text(encoding="utf-8"))
        rng.put_back(mine["generators"])
        trainer.reference_said.load_state(mine["reference_said"])
        trainer.scoring.last = mine["scored"]
    if (path / REFERENCE).exists():
        with torch.no_grad():
            for name, weight in load_file(path / REFERENCE).items():
                trainer.reference.state()[name].copy_(weight)
    return counters["step"], counters["rollouts"]
