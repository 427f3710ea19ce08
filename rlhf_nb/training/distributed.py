"""What ranks tell each other outside the training step itself."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


def start(use_cpu: bool) -> tuple[int, int]:
    """Join the process group that the launcher describes; (rank, world size) as they really are."""
    from accelerate import PartialState

    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    # Given a backend, accelerate looks for a process group even where there is one process.
    state = PartialState(cpu=use_cpu) if alone or not use_cpu else PartialState(cpu=True, backend="gloo")
    return state.process_index, state.num_processes


def rank_pids() -> list[int]:
    """Process id of every rank, by rank."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return [os.getpid()]
    pids: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    return pids


def broadcaster() -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]] | None:
    """Gives rank 0's list on every rank; None for one process.

    Costs one int64 a call. Objects travel only when there are any, always over gloo: a broadcast on the accelerator's
    own group would make the host wait for the device at every step.
    """
    import torch
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
    count = torch.zeros(1, dtype=torch.int64)

    def broadcast(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        count[0] = len(lines)
        dist.broadcast(count, 0, group=group)
        if count.item() == 0:
            return []
        box = [lines]
        dist.broadcast_object_list(box, 0, group=group, device=torch.device("cpu"))
        return box[0]

    return broadcast


def gather_objects(mine: Any) -> list[Any]:
    """Every rank's object, by rank, on every rank. Objects cross as pickles: keep tensors in them on the CPU."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [mine]
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, mine)
    return everybody


def barrier() -> None:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def stop() -> None:
    """Leave the process group, so that the ranks end quietly."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
