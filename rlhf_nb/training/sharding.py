"""Weights that the launch shards over the ranks (FSDP2). For everything but the update they are put together again.

Sampling token by token with sharded weights would gather every layer at every token, and ranks whose completions end
early would leave the others waiting. So between updates each rank holds the policy whole; gradients, optimizer state
and, during the update, weights stay sharded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn

from rlhf_nb.errors import SpecError

if TYPE_CHECKING:
    from rlhf_nb.methods.online import OnlineMethod
    from rlhf_nb.protocol.spec import RunSpec

WHOLE = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def accelerator(use_cpu: bool, method: OnlineMethod, spec: RunSpec) -> Accelerator:
    """What the launch set up, before any model is loaded.

    Raises:
        SpecError: It shards weights in a way that the loop cannot follow.
    """
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if fsdp and os.environ.get("FSDP_VERSION") != "2":
        raise SpecError(
            "launch: FSDP 1 shards weights in a way that sampling cannot follow; use fsdp_version 2, or --multi_gpu"
        )
    found = Accelerator(cpu=use_cpu)
    on_cpu = fsdp and found.distributed_type == DistributedType.MULTI_CPU
    if found.distributed_type in WHOLE and not on_cpu:
        return found
    if not fsdp:
        raise SpecError(
            f"launch: {found.distributed_type.value} shards weights in a way that sampling cannot follow; use FSDP "
            f"with fsdp_version 2, or --multi_gpu"
        )
    if on_cpu:
        # accelerate takes FSDP for accelerators only: on a CPU it says nothing and shards nothing.
        found.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        found.state.distributed_type = DistributedType.FSDP
    if spec.adapter is not None and spec.adapter.quantize != "none":
        raise SpecError(
            f"{method.name}: adapter quantize={spec.adapter.quantize} packs weights into bytes, which FSDP does not "
            f"shard; use quantize=none"
        )
    if method.optimizer == "adamw_8bit":
        raise SpecError(
            f"{method.name}: optimizer=adamw_8bit packs its state into bytes, which FSDP does not shard; use "
            f"optimizer=adamw"
        )
    # Else transformers would load real weights on rank 0 only, also for the reference, which is nobody's shard.
    found.state.fsdp_plugin.cpu_ram_efficient_loading = False
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    return found


def settle(module: nn.Module, device: torch.device) -> None:
    """After sharding and before any other use. All ranks call it together."""
    from torch.distributed.fsdp import FSDPModule

    # The first forward settles which module is the root, and that must be the whole.
    probe = torch.zeros(1, 2, dtype=torch.long, device=device)
    seen = torch.ones_like(probe, dtype=torch.bool)
    with torch.no_grad():
        module(probe, seen, seen[:, 1:])
    if isinstance(module, FSDPModule):
        # The root's own weights stay whole after a forward.
        module.reshard()
    # Said outright: the default is the reverse of the forwards so far, and ranks decode different numbers of tokens.
    shards = [each for each in module.modules() if isinstance(each, FSDPModule) and each is not module]
    for index, each in enumerate(shards):
        each.set_modules_to_backward_prefetch([shards[max(index - 1, 0)]])
    if isinstance(module, FSDPModule) and shards:
        module.set_modules_to_backward_prefetch([shards[-1]])


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Every weight whole on every rank; nothing where they are whole anyway. All ranks enter it together."""
    from torch.distributed.fsdp import FSDPModule

    shards = [each for each in module.modules() if isinstance(each, FSDPModule)]
    for each in shards:
        each.set_reshard_after_forward(False, recurse=False)
        each.unshard()
    try:
        yield
    finally:
        for each in shards:
            each.reshard()
            each.set_reshard_after_forward(each is not module, recurse=False)


def weights_now(module: nn.Module) -> dict[str, Tensor] | None:
    """What to save of a module inside `gathered`; None where `state_dict` says it itself: of shards it makes shards."""
    from torch.distributed.fsdp import FSDPModule

    if not any(isinstance(each, FSDPModule) for each in module.modules()):
        return None
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def held(tensor: Tensor) -> tuple[int, int]:
    """First and one past the last of a tensor's elements, counted through all of it, that this rank holds."""
    from torch.distributed.tensor import DTensor, Shard

    if not isinstance(tensor, DTensor):
        return 0, tensor.numel()
    # Rows are dealt out as torch.chunk does: all ranks but the last have as many.
    assert tensor.placements == (Shard(0),), "FSDP shards rows"
    mesh = tensor.device_mesh
    rows = -(-tensor.shape[0] // mesh.size())
    first = min(mesh.get_local_rank() * rows, tensor.shape[0]) * tensor.shape[1:].numel()
    return first, first + tensor.to_local().numel()


def part(tensor: Tensor) -> Tensor:
    """What of a sharded tensor this rank holds; any other as it is."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together; any other as it is. All ranks call it together."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def put(there: Tensor, values: Tensor) -> None:
    """Write a whole tensor into one that may be sharded."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(there, DTensor):
        values = distribute_tensor(values.to(there.device), there.device_mesh, there.placements)
    there.copy_(values)


def optimizer_state(module: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Whole, on the CPU, by parameter name."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_optimizer_state_dict(module, optimizer, options=options)


def load_optimizer_state(module: nn.Module, optimizer: Any, state: dict[str, Any]) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    set_optimizer_state_dict(module, optimizer, state, options=StateDictOptions(full_state_dict=True))
