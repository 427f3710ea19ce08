"""Supervised fine-tuning on demonstrations.

Paper    Ouyang et al. 2022, arXiv:2203.02155, step 1.
Rows     prompt, completion.
Models   policy (trained). No reference: nothing holds it back.
Live     learning_rate.
Agrees   with trl.SFTTrainer, bit for bit; tests/training/test_identical.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from rlhf_nb.methods.base import GradientMethod, Trainer

if TYPE_CHECKING:
    from rlhf_nb.training.context import Context


class SFT(GradientMethod):
    """Teach a model to answer as the demonstrations do."""

    name: ClassVar[str] = "sft"
    title: ClassVar[str] = "Supervised fine-tuning"
    paper: ClassVar[str] = "arXiv:2203.02155"
    rows: ClassVar[str] = "demonstrations"
    models: ClassVar[str] = "policy"

    learning_rate: float = Field(2e-5, ge=0)
    """Peak of the schedule. 2e-5 suits whole models of a billion parameters; LoRA wants 1e-4, the toy model 1e-3."""
    completion_only: bool = True
    """The loss counts completion tokens only; False also teaches the prompts."""
    loss_type: Literal["nll", "dft"] = "nll"
    """nll: negative log-likelihood. dft weights each token by its own probability, arXiv:2508.05629."""
    packing: bool = False
    """Fill every sequence to `max_length` with several rows. The rows of a step then vary."""

    @classmethod
    def preload(cls) -> None:
        from trl import SFTConfig, SFTTrainer  # noqa: F401

    def build_trainer(self, context: Context) -> Trainer:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        from rlhf_nb.training import data, models
        from rlhf_nb.training.arguments import lora_config, training_arguments
        from rlhf_nb.training.sampling import Sampler
        from rlhf_nb.training.trainer import SteeredTrainer

        policy = context.model_path(context.spec.policy)
        tokenizer = models.load_tokenizer(policy, context.emit)
        max_length = models.max_length(policy, self.max_length, context.emit)
        context.emit.stage("tokenizing rows")
        trainer = SFTTrainer(
            model=policy,
            args=SFTConfig(
                **training_arguments(context),
                max_length=max_length,
                completion_only_loss=self.completion_only,
                loss_type=self.loss_type,
                packing=self.packing,
            ),
            train_dataset=Dataset.from_list(data.for_trl(context.rows, self.rows, tokenizer)),
            processing_class=tokenizer,
            peft_config=lora_config(context, "CAUSAL_LM"),
        )
        if not self.packing:
            data.say_what_fits(context, trainer.train_dataset, (("input_ids",),), max_length, already_cut=True)
        return SteeredTrainer(trainer, context, sampler=lambda built: Sampler.of(context, built, policy))
