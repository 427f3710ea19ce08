"""What the reference says to each prompt, sampled once in a run: what Preference As Reward compares with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlhf_nb.training.rollout.base import uniforms

if TYPE_CHECKING:
    from rlhf_nb.training.online import OnlineTrainer

STREAM = 1 << 62
"""Far above any rollout's number: it draws no number that training draws."""


class ReferenceSaid:
    def __init__(self, trainer: OnlineTrainer) -> None:
        self.trainer = trainer
        self._texts: dict[int, list[str]] = {}

    def __call__(self, indices: Sequence[int]) -> list[list[str]]:
        """R texts for each prompt, by its number among the rows. The same ones for the whole run."""
        new = sorted({index for index in indices if index not in self._texts})
        if new:
            self._sample(new)
        return [self._texts[index] for index in indices]

    def _sample(self, indices: list[int]) -> None:
        trainer, method = self.trainer, self.trainer.method
        R = method.compared_with
        keys = [index * R + each for index in indices for each in range(R)]
        noise = uniforms(method.seed, STREAM, keys, method.max_new_tokens)
        prompts = [trainer.prompt_ids[index] for index in indices for _ in range(R)]
        with trainer.reference.open() as (trunk, head):
            sampled = trainer.make_sampler(trunk, head).sample(prompts, noise, temperature=method.temperature)
        texts = trainer.texts(sampled.tokens_BT, sampled.mask_BT)
        self._texts.update({index: texts[at * R : (at + 1) * R] for at, index in enumerate(indices)})

    def state(self) -> dict[str, Any]:
        """For a checkpoint: sampled again in another batch, a tie may fall otherwise."""
        return {str(index): texts for index, texts in self._texts.items()}

    def load_state(self, state: dict[str, Any]) -> None:
        self._texts = {int(index): texts for index, texts in state.items()}
