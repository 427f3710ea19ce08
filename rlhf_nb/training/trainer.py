"""A trainer of transformers or TRL, steered: our callback in it, resumable, its model saved for plain transformers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_nb.compute.rundir import storage_errors
from rlhf_nb.training import adapters, checkpoints, distributed, models
from rlhf_nb.training.callback import Steering
from rlhf_nb.training.control import BoundCoefficient

if TYPE_CHECKING:
    from rlhf_nb.training.context import Context
    from rlhf_nb.training.sampling import Sampler


class SteeredTrainer:
    def __init__(
        self,
        trainer: Any,
        context: Context,
        *,
        names: dict[str, str] | None = None,
        live: list[BoundCoefficient] | None = None,
        derive: Callable[[dict[str, float]], dict[str, float]] | None = None,
        sampler: Callable[[Any], Sampler] | None = None,
    ) -> None:
        """
        Args:
            trainer: A transformers.Trainer with `logging_steps=1` and `save_strategy="no"`.
            names: The trainer's metric names → ours, beyond those of every trainer.
            live: Live coefficients beside the learning rate.
            derive: Further metrics of a step from those it has, by our names.
            sampler: Given the trainer, what samples completions; None where the model writes none.
        """
        from transformers.trainer_callback import PrinterCallback

        self.trainer, self.context = trainer, context
        trainer.remove_callback(PrinterCallback)
        models.freeze_beside_text(trainer.model)
        self.callback = Steering(
            context,
            trainer,
            names=names or {},
            live=live or [],
            derive=derive or (lambda values: {}),
            sampler=sampler(trainer) if sampler else None,
        )
        trainer.add_callback(self.callback)

    def train(self) -> None:
        resume_from = self.context.resume_from
        self._clear_scratch()
        # Whatever writes in there, this callback or the Trainer by itself, writes checkpoints.
        with storage_errors(self.context.run_dir / "checkpoints"):
            self.trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
        self._clear_scratch()

    def _clear_scratch(self) -> None:
        # The Trainer lists this folder at its end, on every rank: nobody takes it away before all have.
        distributed.barrier()
        if self.context.is_main:
            shutil.rmtree(self.context.run_dir / "checkpoints" / checkpoints.SCRATCH, ignore_errors=True)
        distributed.barrier()

    @property
    def step(self) -> int:
        return int(self.trainer.state.global_step)

    def save_model(self, directory: str) -> None:
        """Whole weights as safetensors with the tokenizer. An adapter is merged in, and kept beside in `adapter/`."""
        trainer = self.trainer
        accelerator = trainer.accelerator
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        # Gathering shards is a collective: every rank takes part, rank 0 writes.
        weights = accelerator.get_state_dict(trainer.model_wrapped) if sharded else None
        if not self.context.is_main:
            return
        model = accelerator.unwrap_model(trainer.model)
        if self.context.spec.adapter is not None:
            adapter = Path(directory) / "adapter"
            model.save_pretrained(str(adapter), state_dict=weights)
            if self.context.spec.adapter.quantize != "none":
                # Merged into the packed weights it would be rounded with them.
                model = adapters.on_base(self.context.model_path(self.context.spec.policy), adapter, model)
            model, weights = model.merge_and_unload(), None
        model.save_pretrained(directory, state_dict=weights)
        trainer.processing_class.save_pretrained(directory)
