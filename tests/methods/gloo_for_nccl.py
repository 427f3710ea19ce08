"""NCCL's place taken by gloo, on both ends of vLLM's weight transfer: what stands around the wire runs for real."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo, TCPStore
from vllm.distributed.weight_transfer import nccl_common, nccl_engine


class Group:
    def __init__(self, host: str, port: int, rank: int, world: int) -> None:
        patience = timedelta(seconds=60)
        self.store = TCPStore(host, port, world, is_master=rank == 0, timeout=patience)
        self.group = ProcessGroupGloo(PrefixStore("weights", self.store), rank, world, patience)

    def broadcast(self, tensor: Any, src: int) -> None:
        options = BroadcastOptions()
        options.rootRank = src
        self.group.broadcast([tensor], options).wait()

    def destroy(self) -> None:
        del self.group


def sent(*, iterator: Any, group: Group, src: int, post_iter_func: Any, **_: Any) -> None:
    for item in iterator:
        group.broadcast(post_iter_func(item).detach().contiguous(), src)


def received(*, iterator: Any, group: Group, src: int, post_unpack_func: Any, **_: Any) -> None:
    for name, (shape, dtype) in iterator:
        tensor = torch.empty(shape, dtype=dtype)
        group.broadcast(tensor, src)
        post_unpack_func([(name, tensor)])


nccl_common.stateless_init_process_group = lambda host, port, rank, world, device: Group(host, port, rank, world)
nccl_engine.packed_nccl_broadcast_producer = sent
nccl_engine.packed_nccl_broadcast_consumer = received
torch.accelerator.current_device_index = lambda: 0
torch.cuda.synchronize = lambda device=None: None


class Extension:
    """What vLLM's worker is given to import."""
