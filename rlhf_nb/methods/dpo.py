"""Direct Preference Optimization.

Paper    Rafailov et al. 2023, arXiv:2305.18290, eq. 7.
Rows     prompt, chosen, rejected.
Models   policy (trained), reference (frozen; the saved policy it starts from; under LoRA the policy, adapter off).
Live     beta, learning_rate. Raising beta keeps the policy closer to the reference.
Agrees   with trl.DPOTrainer, loss_type="sigmoid", bit for bit; tests/training/test_identical.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from rlhf_nb.methods.base import LEARNING_RATE, GradientMethod, LiveCoefficient, Trainer

if TYPE_CHECKING:
    from rlhf_nb.training.context import Context

NAMES = {
    "rewards/chosen": "implicit_reward/chosen",
    "rewards/rejected": "implicit_reward/rejected",
    "rewards/margins": "implicit_reward/margin",
    "rewards/accuracies": "implicit_reward/accuracy",
    "logps/chosen": "logprob/chosen",
    "logps/rejected": "logprob/rejected",
    "logits/chosen": "logit/chosen",
    "logits/rejected": "logit/rejected",
}
SIDES = (("prompt_ids", "chosen_ids"), ("prompt_ids", "rejected_ids"))
"""Columns of TRL's tokenized rows that make up a sequence."""
BETA = LiveCoefficient(
    "beta",
    low=1e-3,
    high=10.0,
    scale="log",
    unit="",
    meaning="Anchor to the reference: higher keeps the policy closer to it.",
    # TRL copies beta at construction; writing args.beta afterwards has no effect.
    writes="trainer.beta",
)


class DPO(GradientMethod):
    """Prefer what people chose, held to a reference, without a reward model."""

    name: ClassVar[str] = "dpo"
    title: ClassVar[str] = "Direct preference optimization"
    paper: ClassVar[str] = "arXiv:2305.18290"
    rows: ClassVar[str] = "pairs"
    has_reference: ClassVar[bool] = True
    live: ClassVar[tuple[LiveCoefficient, ...]] = (BETA, LEARNING_RATE)

    beta: float = Field(0.1, gt=0)
    """Anchor to the reference, dimensionless. 0.1 is the paper's default."""
    learning_rate: float = Field(1e-6, ge=0)
    """Peak of the schedule. 1e-6 suits whole models of a billion parameters; LoRA wants 1e-5, the toy model 1e-4."""

    @classmethod
    def preload(cls) -> None:
        from trl import DPOConfig, DPOTrainer  # noqa: F401

    def build_trainer(self, context: Context) -> Trainer:
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        from rlhf_nb.training import data, models
        from rlhf_nb.training.arguments import lora_config, training_arguments
        from rlhf_nb.training.control import BoundCoefficient
        from rlhf_nb.training.sampling import Sampler
        from rlhf_nb.training.trainer import SteeredTrainer

        policy = context.model_path(context.spec.policy)
        tokenizer = models.load_tokenizer(policy, context.emit)
        max_length = models.max_length(policy, self.max_length, context.emit)
        context.emit.stage("tokenizing rows")
        trainer = DPOTrainer(
            # A directory: from a model in memory TRL would take the reference from where that was once loaded.
            model=policy,
            args=DPOConfig(
                **training_arguments(context),
                max_length=max_length,
                beta=self.beta,
                loss_type="sigmoid",
            ),
            train_dataset=Dataset.from_list(data.for_trl(context.rows, self.rows, tokenizer)),
            processing_class=tokenizer,
            peft_config=lora_config(context, "CAUSAL_LM"),
        )
        data.say_what_fits(context, trainer.train_dataset, SIDES, max_length)
        beta = BoundCoefficient(BETA, lambda: float(trainer.beta), lambda value: setattr(trainer, "beta", value))
        return SteeredTrainer(
            trainer,
            context,
            names=NAMES,
            live=[beta],
            derive=lambda values: log_ratios(values, trainer.beta),
            sampler=lambda built: Sampler.of(context, built, policy),
        )


def log_ratios(values: dict[str, Any], beta: float) -> dict[str, float]:
    """Implicit rewards in nats: they rescale with beta, so curves before and after a slider move are not comparable."""
    return {
        f"log_ratio/{side}": values[f"implicit_reward/{side}"] / beta
        for side in ("chosen", "rejected", "margin")
        if f"implicit_reward/{side}" in values
    }
