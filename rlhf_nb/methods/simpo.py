"""Simple Preference Optimization: the margin of mean log-probabilities, no reference.

Paper    Meng et al. 2024, arXiv:2405.14734, eq. 6.
Rows     prompt, chosen, rejected.
Models   policy (trained). No reference: a small learning rate is all that holds it.
Live     beta (scale of the margin), gamma (margin that is asked for, in units of the implicit reward), label_smoothing,
         cpo_alpha (likelihood of the chosen beside), learning_rate. None of them is a tether.
Agrees   with trl.experimental.cpo.CPOTrainer, loss_type="simpo", bit for bit;
         tests/training/test_identical.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from rlhf_nb.methods.base import LEARNING_RATE, GradientMethod, LiveCoefficient, Trainer
from rlhf_nb.methods.orpo import NAMES, SIDES, mean_margin

if TYPE_CHECKING:
    from rlhf_nb.training.context import Context

BETA = LiveCoefficient(
    "beta",
    low=0.1,
    high=50.0,
    scale="log",
    unit="tokens/nat",
    meaning="Scale of the mean log-probability margin. Not a tether: higher is a steeper loss.",
    writes="trainer.beta",
)
GAMMA = LiveCoefficient(
    "gamma",
    low=0.0,
    high=10.0,
    meaning="Margin asked for between the implicit rewards of chosen and rejected.",
    # TRL's loss reads simpo_gamma / beta at every step.
    writes="trainer.simpo_gamma",
)
SMOOTHING = LiveCoefficient(
    "label_smoothing",
    low=0.0,
    high=0.5,
    meaning="Share of labels taken to be flipped.",
    writes="trainer.label_smoothing",
)
ALPHA = LiveCoefficient(
    "cpo_alpha",
    low=0.0,
    high=10.0,
    meaning="Weight of the chosen answers' negative log-likelihood a token, which keeps them likely. 0: plain SimPO.",
    # TRL reads it twice a step: whether the likelihood is computed at all, and its weight.
    writes="trainer.cpo_alpha",
)


class SimPO(GradientMethod):
    """Widen the margin between chosen and rejected, a token's worth each, without a reference."""

    name: ClassVar[str] = "simpo"
    title: ClassVar[str] = "Simple preference optimization"
    paper: ClassVar[str] = "arXiv:2405.14734"
    rows: ClassVar[str] = "pairs"
    models: ClassVar[str] = "policy"
    live: ClassVar[tuple[LiveCoefficient, ...]] = (BETA, GAMMA, LEARNING_RATE, SMOOTHING, ALPHA)

    beta: float = Field(2.0, gt=0)
    """Scale of the mean log-probability, tokens a nat. 2.0 to 2.5 in the paper."""
    gamma: float = Field(1.0, ge=0)
    """Target margin of the implicit rewards; the paper sets gamma/beta between 0.3 and 0.5."""
    label_smoothing: float = Field(0.0, ge=0, le=0.5)
    """Share of labels taken to be flipped."""
    cpo_alpha: float = Field(0.0, ge=0)
    """Weight of the chosen answers' negative log-likelihood a token: CPO-SimPO, after arXiv:2401.08417. 0: SimPO alone,
    whose chosen answers may grow less likely as long as the rejected ones do so faster."""
    learning_rate: float = Field(1e-6, ge=0)
    """Peak of the schedule. 3e-7 to 1e-6 in the paper: without a reference, more undoes the model. The toy model takes
    1e-4."""

    @classmethod
    def preload(cls) -> None:
        from trl.experimental.cpo import CPOConfig, CPOTrainer  # noqa: F401

    def build_trainer(self, context: Context) -> Trainer:
        from datasets import Dataset
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        from rlhf_nb.training import data, models
        from rlhf_nb.training.arguments import lora_config, model_arguments, training_arguments
        from rlhf_nb.training.control import BoundCoefficient
        from rlhf_nb.training.sampling import Sampler
        from rlhf_nb.training.trainer import SteeredTrainer

        policy = context.model_path(context.spec.policy)
        tokenizer = models.load_tokenizer(policy, context.emit)
        max_length = models.max_length(policy, self.max_length, context.emit)
        context.emit.stage("tokenizing rows")
        trainer = CPOTrainer(
            # A model: from a directory TRL would load it with device_map="auto", which splits it over all devices.
            model=models.load_model(policy, **model_arguments(context)),
            args=CPOConfig(
                **training_arguments(context, reads_model=False),
                max_length=max_length,
                loss_type="simpo",
                cpo_alpha=self.cpo_alpha,
                beta=self.beta,
                simpo_gamma=self.gamma,
                label_smoothing=self.label_smoothing,
            ),
            train_dataset=Dataset.from_list(data.for_trl(context.rows, self.rows, tokenizer)),
            processing_class=tokenizer,
            peft_config=lora_config(context, "CAUSAL_LM"),
        )
        data.say_what_fits(context, trainer.train_dataset, SIDES, max_length, already_cut=True)

        def bound(live: LiveCoefficient) -> BoundCoefficient:
            attribute = live.writes.removeprefix("trainer.")

            def write(value: float) -> None:
                setattr(trainer, attribute, value)

            return BoundCoefficient(live, lambda: float(getattr(trainer, attribute)), write)

        return SteeredTrainer(
            trainer,
            context,
            names=NAMES,
            live=[bound(live) for live in (BETA, GAMMA, SMOOTHING, ALPHA)],
            derive=lambda values: mean_margin(values, trainer.beta),
            sampler=lambda built: Sampler.of(context, built, policy),
        )
