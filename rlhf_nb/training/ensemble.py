"""Several reward models that train in one run: whole models, or adapters and heads on one backbone.

Saved as one directory of safetensors:

    config.json, tokenizer …   what each member is
    ensemble.json              {"members": ["member-0", …], "backbone": "backbone" or null}
    member-0/ …                a whole model; under LoRA its adapter and head
    backbone/                  under LoRA: the weights that all of them stand on

There are no weights beside `config.json`, so that plain transformers refuses the directory instead of taking a member
for the whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_nb.training import models
from rlhf_nb.training.actor_critic import same_weights
from rlhf_nb.training.trainer import SteeredTrainer

FILE = models.ENSEMBLE
BACKBONE = "backbone"


class Ensemble(nn.Module):
    """M sequence classifiers with one label, to a trainer one model."""

    def __init__(self, members: Sequence[Any]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def _each(self) -> list[Any]:
        return list(self.members)

    @property
    def config(self) -> Any:
        return self.members[0].config

    def forward(self, input_ids: Tensor, attention_mask: Tensor, rows_M: Sequence[int], **kwargs: Any) -> Any:
        """
        Args:
            input_ids, attention_mask: (N, T), the rows of the first member first.
            rows_M: How many rows are each member's.

        Returns:
            Its `logits` are (N, 1), each row scored by its member alone.
        """
        from transformers.modeling_outputs import SequenceClassifierOutput

        parts = zip(self.members, input_ids.split(rows_M), attention_mask.split(rows_M), strict=True)
        logits = [member(input_ids=ids, attention_mask=mask, **kwargs).logits for member, ids, mask in parts]
        return SequenceClassifierOutput(logits=torch.cat(logits))

    # A backbone that members share would be in a checkpoint M times, and it never changes: only what trains is kept.

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        trained = {name for name, parameter in self.named_parameters(remove_duplicate=False) if parameter.requires_grad}
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if name in trained}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        found = super().load_state_dict(state_dict, strict=False, assign=assign)
        found.missing_keys[:] = [name for name in found.missing_keys if name in self.state_dict()]
        if strict and (found.missing_keys or found.unexpected_keys):
            raise RuntimeError(f"not the weights of this ensemble: {(found.missing_keys + found.unexpected_keys)[:3]}")
        return found

    # What a trainer asks of a model beside its numbers.

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        for member in self._each():
            member.gradient_checkpointing_enable(**kwargs)

    def enable_input_require_grads(self) -> None:
        for member in self._each():
            member.enable_input_require_grads()

    def add_model_tags(self, tags: Any) -> None:
        for member in self._each():
            member.add_model_tags(tags)


def load_members(path: str, seeds: Sequence[int], lora: Callable[[], Any] | None) -> Ensemble:
    """An untrained member a seed: its head, and its adapter, are drawn from that seed, as in a run of its own.

    Args:
        lora: Gives a member's adapter configuration; None trains whole models.
    """
    from peft import get_peft_model
    from transformers import AutoModelForSequenceClassification, set_seed
    from transformers.utils import logging

    members: list[Any] = []
    trunk = None
    for seed in seeds:
        set_seed(seed)
        said = logging.get_verbosity()
        # A language model's head goes and a score's comes: meant, and else reported for every member.
        logging.set_verbosity_error()
        member = models.load_model(path, AutoModelForSequenceClassification, num_labels=1)
        logging.set_verbosity(said)
        if lora is not None:
            # PEFT changes a trunk in place: each member gets a copy of its structure, on the first one's weights.
            trunk = member.base_model if trunk is None else trunk
            setattr(member, member.base_model_prefix, same_weights(trunk))
            member = get_peft_model(member, lora())
        members.append(member)
    return Ensemble(members)


class SteeredEnsemble(SteeredTrainer):
    def save_model(self, directory: str) -> None:
        """The layout at the top of this file. On rank 0."""
        if not self.context.is_main:
            return
        target = Path(directory)
        whole = self.trainer.accelerator.unwrap_model(self.trainer.model)
        names = [f"member-{number}" for number in range(len(whole.members))]
        adapters = self.context.spec.adapter is not None
        for name, member in zip(names, whole.members, strict=True):
            member.save_pretrained(str(target / name))
        first = whole.members[0]
        if adapters:
            # The trunk below the adapter, under its plain names.
            plain = same_weights(first).unload()
            plain.save_pretrained(str(target / BACKBONE))
            first = plain
        config = first.config
        config.architectures = [type(first).__name__]
        config.save_pretrained(str(target))
        self.trainer.processing_class.save_pretrained(str(target))
        (target / FILE).write_text(
            json.dumps({"members": names, "backbone": BACKBONE if adapters else None}), encoding="utf-8"
        )
