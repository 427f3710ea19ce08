"""Checkpoints of online runs, taken between two rollouts: weights, optimizer, counters, generators."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from rlhf_nb.compute.rundir import storage_errors
from rlhf_nb.errors import ComputeError
from rlhf_nb.protocol.events import CheckpointSaved
from rlhf_nb.training import checkpoints, distributed, sharding

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
        torch.save(_generators(), scratch / f"generators-{trainer.context.rank}.pt")
        if said := trainer.reference_said.state():
            (scratch / f"reference-said-{trainer.context.rank}.json").write_text(json.dumps(said), encoding="utf-8")
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
                "live": vars(trainer.live),
                "moments": trainer.moments.state(),
                "rewards": trainer.scoring.state(),
            }
            (scratch / "counters.json").write_text(json.dumps(counters), encoding="utf-8")
    distributed.barrier()
    if trainer.context.is_main:
        target = checkpoints.publish(run_dir, step, scratch)
        trainer.emit.event(CheckpointSaved(step=step, path=str(target.relative_to(run_dir))))
    distributed.barrier()


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
    generators = path / f"generators-{trainer.context.rank}.pt"
    if generators.exists():
        _restore(torch.load(generators, weights_only=True))
    counters = json.loads((path / "counters.json").read_text(encoding="utf-8"))
    trainer.prompts = counters["prompts"]
    trainer.report.said = set(counters.get("said", []))
    trainer.doctor.load_state(counters.get("doctor", {}))
    # The controller moves kl_coef without an event: what the events tell of it is older.
    vars(trainer.live).update(counters.get("live", {}))
    trainer.moments.load(counters.get("moments"))
    trainer.scoring.load_state(counters.get("rewards", []))
    if (said := path / f"reference-said-{trainer.context.rank}.json").exists():
        trainer.reference_said.load_state(json.loads(said.read_text(encoding="utf-8")))
    if (path / REFERENCE).exists():
        with torch.no_grad():
            for name, weight in load_file(path / REFERENCE).items():
                trainer.reference.state()[name].copy_(weight)
    return counters["step"], counters["rollouts"]


def _generators() -> dict[str, Any]:
    """Python's, NumPy's and torch's. The loop draws from none of them, but a reward function may."""
    version, numbers, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": (version, list(numbers), gauss),
        "numpy": (torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
    }


def _restore(state: dict[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
