"""Odds Ratio Preference Optimization: demonstrations and preferences in one loss, no reference.

Paper    Hong et al. 2024, arXiv:2403.07691, eq. 6 and 7.
Rows     prompt, chosen, rejected.
Models   policy (trained). No reference: the likelihood of the chosen answers is what holds it.
Live     beta, the paper's λ: weight of the odds ratio beside the likelihood. It is no tether; higher prefers harder.
Agrees   with trl.experimental.orpo.ORPOTrainer, bit for bit; tests/training/test_identical.py. As there, the likelihood
         is of the prompt's tokens too; the paper's eq. 6 takes the answer's alone.
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
    "logps/chosen": "logprob_mean/chosen",
    "logps/rejected": "logprob_mean/rejected",
    "logits/chosen": "logit/chosen",
    "logits/rejected": "logit/rejected",
    "nll_loss": "loss/nll",
    "log_odds_ratio": "loss/log_odds_ratio",
    "log_odds_chosen": "odds/log_ratio",
}
SIDES = (("chosen_input_ids",), ("rejected_input_ids",))
LAMBDA = LiveCoefficient(
    "beta",
    low=1e-3,
    high=10.0,
    scale="log",
    meaning="Weight of the odds ratio beside the likelihood (λ). Not a tether: higher prefers harder.",
    writes="trainer.beta",
)


class ORPO(GradientMethod):
    """Learn the chosen answers and to prefer them to the rejected ones, in one stage and without a reference."""

    name: ClassVar[str] = "orpo"
    title: ClassVar[str] = "Odds ratio preference optimization"
    paper: ClassVar[str] = "arXiv:2403.07691"
    rows: ClassVar[str] = "pairs"
    models: ClassVar[str] = "policy"
    live: ClassVar[tuple[LiveCoefficient, ...]] = (LAMBDA, LEARNING_RATE)

    beta: float = Field(0.1, gt=0)
    """λ, weight of the odds ratio, dimensionless. 0.1 is the paper's default."""
    learning_rate: float = Field(8e-6, ge=0)
    """Peak of the schedule. 8e-6 is the paper's for models of a billion parameters; the toy model takes 1e-3."""

    @classmethod
    def preload(cls) -> None:
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer  # noqa: F401

    def build_trainer(self, context: Context) -> Trainer:
        from datasets import Dataset
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        from rlhf_nb.training import data, models
        from rlhf_nb.training.arguments import lora_config, model_arguments, training_arguments
        from rlhf_nb.training.control import BoundCoefficient
        from rlhf_nb.training.sampling import Sampler
        from rlhf_nb.training.trainer import SteeredTrainer

        policy = context.model_path(context.spec.policy)
        tokenizer = models.load_tokenizer(policy, context.emit)
        max_length = models.max_length(policy, self.max_length, context.emit)
        context.emit.stage("tokenizing rows")
        trainer = ORPOTrainer(
            # A model: from a directory TRL would load it with device_map="auto", which splits it over all devices.
            model=models.load_model(policy, **model_arguments(context)),
            args=ORPOConfig(**training_arguments(context, reads_model=False), max_length=max_length, beta=self.beta),
            train_dataset=Dataset.from_list(data.for_trl(context.rows, self.rows, tokenizer)),
            processing_class=tokenizer,
            peft_config=lora_config(context, "CAUSAL_LM"),
        )
        data.say_what_fits(context, trainer.train_dataset, SIDES, max_length, already_cut=True)
        beta = BoundCoefficient(LAMBDA, lambda: float(trainer.beta), lambda value: setattr(trainer, "beta", value))
        return SteeredTrainer(
            trainer,
            context,
            names=NAMES,
            live=[beta],
            derive=lambda values: mean_margin(values, trainer.beta),
            sampler=lambda built: Sampler.of(context, built, policy),
        )


def mean_margin(values: dict[str, Any], beta: float) -> dict[str, float]:
    """The margin in nats a token: implicit rewards rescale with beta."""
    margin = values.get("implicit_reward/margin")
    return {} if margin is None else {"logprob_mean/margin": margin / beta}
