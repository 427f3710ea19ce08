"""What of bf16 is not autocast's: weights that nothing trains, and heads that stay as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def halve_frozen(module: nn.Module) -> None:
    """Keep matrices that nothing trains as autocast makes them of float32 at every use, here once: half the memory, and
    no output changes. What is looked up by row, an embedding, stays."""
    looked_up = {id(one.weight) for one in module.modules() if isinstance(one, nn.Embedding)}
    apart = {one for kept in module.modules() if isinstance(kept, OwnPrecision) for one in kept.modules()}
    # Exactly these types: others pack their weights, or compute in a precision of their own.
    plain = [one for one in module.modules() if type(one) in (nn.Linear, Conv1D) and one not in apart]
    cast = {id(p) for one in plain for p in one.parameters(recurse=False) if p.dtype == torch.float32} - looked_up
    # In place: whoever shares the weights has the same ones afterwards.
    for parameter in module.parameters():
        if id(parameter) in cast and not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
        elif parameter.device.type == "cpu":
            # One tensor that lies in the file it was read from keeps all of the file in memory.
            parameter.data = parameter.data.clone()


class OwnPrecision(nn.Module):
    """A module that computes in the precision of its weights, whatever autocast casts around it."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(hidden.device.type, enabled=False):
            return self.inside(hidden.to(next(self.inside.parameters()).dtype), *args, **kwargs)
