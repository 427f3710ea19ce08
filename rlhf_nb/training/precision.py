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
    for one in module.modules():
        # Kinds of them may pack their weights, or compute in a precision of their own.
        if type(one) not in (nn.Linear, Conv1D):
            continue
        for parameter in one.parameters(recurse=False):
            if not parameter.requires_grad and parameter.dtype == torch.float32 and id(parameter) not in looked_up:
                # In place: whoever shares the weights has the same ones afterwards.
                parameter.data = parameter.data.bfloat16()


class OwnPrecision(nn.Module):
    """A module that computes in the precision of its weights, whatever autocast casts around it."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(hidden.device.type, enabled=False):
            return self.inside(hidden.to(next(self.inside.parameters()).dtype), *args, **kwargs)
