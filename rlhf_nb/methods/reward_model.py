"""A reward model from pairs: the Bradley-Terry likelihood of what people chose.

Paper    Ouyang et al. 2022, arXiv:2203.02155, eq. 1; centring, Eisenstein et al. 2023, arXiv:2312.09244.
Rows     prompt, chosen, rejected.
Models   the base with a new head that gives one score; all of it is trained. No reference.
Live     learning_rate.
Agrees   with trl.RewardTrainer, bit for bit; tests/training/test_identical.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from rlhf_nb.methods.base import GradientMethod, Trainer

if TYPE_CHECKING:
    from rlhf_nb.training.context import Context

NAMES = {
    "min_reward": "score/min",
    "mean_reward": "score/mean",
    "max_reward": "score/max",
    "accuracy": "pairs/accuracy",
    "margin": "pairs/margin",
}


class RewardModel(GradientMethod):
    """Learn one score for a completion, so that chosen ones score higher than rejected ones."""

    name: ClassVar[str] = "reward"
    title: ClassVar[str] = "Reward model"
    paper: ClassVar[str] = "arXiv:2203.02155"
    rows: ClassVar[str] = "pairs"
    models: ClassVar[str] = "reward model"

    learning_rate: float = Field(1e-4, ge=0)
    """Peak of the schedule. 1e-4 is TRL's; whole models of a billion parameters want 1e-5."""
    center_rewards_coefficient: float | None = Field(None, ge=0)
    """Weight of (r_chosen + r_rejected)², which keeps scores around 0. 0.01 in the paper; None leaves it out."""
    sample_every: int = Field(0, ge=0, le=0)
    """A reward model writes no completions."""

    @classmethod
    def preload(cls) -> None:
        from trl import RewardConfig, RewardTrainer  # noqa: F401

    def build_trainer(self, context: Context) -> Trainer:
        from datasets import Dataset
        from trl import RewardConfig, RewardTrainer

        from rlhf_nb.training import data, models
        from rlhf_nb.training.arguments import lora_config, training_arguments
        from rlhf_nb.training.trainer import SteeredTrainer

        base = context.model_path(context.spec.policy)
        tokenizer = models.load_tokenizer(base, context.emit)
        max_length = models.max_length(base, self.max_length, context.emit)
        context.emit.stage("tokenizing rows")
        trainer = RewardTrainer(
            model=base,
            args=RewardConfig(
                **training_arguments(context),
                max_length=max_length,
                center_rewards_coefficient=self.center_rewards_coefficient,
            ),
            train_dataset=Dataset.from_list(data.for_trl(context.rows, self.rows, tokenizer)),
            processing_class=tokenizer,
            # The head is new, so an adapter alone would leave it random.
            peft_config=lora_config(context, "SEQ_CLS", modules_to_save=["score"]),
        )
        data.say_what_fits(context, trainer.train_dataset, (("chosen_ids",), ("rejected_ids",)), max_length)
        return SteeredTrainer(trainer, context, names=NAMES)
