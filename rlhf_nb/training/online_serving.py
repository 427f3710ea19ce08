"""What a person asks an online run for, answered at the boundaries of its loop: samples, previews, checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_nb.training import sharding
from rlhf_nb.training.preview import answer as answer_preview

if TYPE_CHECKING:
    from rlhf_nb.training.online import OnlineTrainer


class Serving:
    def __init__(self, trainer: OnlineTrainer) -> None:
        self.trainer = trainer
        self.between_rollouts = True
        """A checkpoint is weights, optimizer and counters only where no rollout is half used."""
        self._used_up_at = self._waiting_for = 0
        """Step after which the rollout is used up, unless its passes end early; and the one that a person was told."""

    def rollout_begins(self) -> None:
        method = self.trainer.method
        self.between_rollouts = False
        self._used_up_at = min(method.max_steps, self.trainer.step + method.passes * method.num_mini_batches)

    def all(self) -> None:
        """Samples and previews at any boundary, checkpoints between rollouts."""
        loop = self.trainer.context.control
        if loop.sample_requests or loop.preview_requests:
            with sharding.gathered(self.trainer.module):
                self._questions()
        self.checkpoint()

    def checkpoint(self) -> None:
        trainer, loop = self.trainer, self.trainer.context.control
        if loop.checkpoint_requested and self.between_rollouts:
            loop.checkpoint_requested.clear()
            trainer.save_checkpoint()
        elif loop.checkpoint_requested and loop.stopping:
            loop.checkpoint_requested.clear()
            trainer.emit.notice(
                "checkpoint_missed",
                "the run was stopped within a rollout and checkpoints are taken between rollouts: none was taken here",
            )
        elif loop.checkpoint_requested and self._waiting_for != self._used_up_at:
            self._waiting_for = self._used_up_at
            trainer.emit.notice(
                "checkpoint_waits",
                f"checkpoints are taken between rollouts: this one after step {self._used_up_at} at the latest",
            )

    def _questions(self) -> None:
        trainer, loop = self.trainer, self.trainer.context.control
        requests, previews = list(loop.sample_requests), list(loop.preview_requests)
        loop.sample_requests.clear()
        loop.preview_requests.clear()
        for request in requests:
            trainer.samples.answer(request)
        if trainer.context.is_main:
            for preview in previews:
                trainer.emit.event(answer_preview(trainer, preview))
