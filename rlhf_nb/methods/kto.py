"""Kahneman-Tversky Optimization: thumbs up and thumbs down, no pairs needed.

Paper    Ethayarajh et al. 2024, arXiv:2402.01306, eq. 7 and 8.
Rows     prompt, completion, label. Pairs serve too: each becomes a thumb up and a thumb down.
Models   policy (trained), reference (frozen; the saved policy it starts from; under LoRA the policy, adapter off).
Live     beta, desirable_weight, undesirable_weight, learning_rate. Raising beta keeps the policy closer to the
         reference.
Agrees   with trl.KTOTrainer, loss_type="kto", on the same rows in the same order, bit for bit;
         tests/training/test_identical.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from rlhf_nb.errors import SpecError
from rlhf_nb.methods.base import LEARNING_RATE, GradientMethod, LiveCoefficient, Trainer
from rlhf_nb.methods.dpo import BETA, log_ratios
from rlhf_nb.methods.dpo import NAMES as DPO_NAMES

if TYPE_CHECKING:
    from rlhf_nb.protocol.spec import RunSpec
    from rlhf_nb.training.context import Context

NAMES = {**DPO_NAMES, "kl": "kl/reference_point"}
SIDES = (("prompt_ids", "completion_ids"),)
DESIRABLE = LiveCoefficient(
    "desirable_weight",
    low=0.01,
    high=10.0,
    scale="log",
    meaning="Weight of thumbs up in the loss. The paper keeps (ups × this) / (downs × undesirable_weight) in 1 to 4/3.",
    writes="trainer.desirable_weight",
)
UNDESIRABLE = LiveCoefficient(
    "undesirable_weight",
    low=0.01,
    high=10.0,
    scale="log",
    meaning="Weight of thumbs down in the loss.",
    writes="trainer.undesirable_weight",
)


class KTO(GradientMethod):
    """Prefer what got a thumb up to what got a thumb down, as a person weighs gains and losses."""

    name: ClassVar[str] = "kto"
    title: ClassVar[str] = "Kahneman-Tversky optimization"
    paper: ClassVar[str] = "arXiv:2402.01306"
    rows: ClassVar[str] = "thumbs"
    models: ClassVar[str] = "policy, reference"
    has_reference: ClassVar[bool] = True
    live: ClassVar[tuple[LiveCoefficient, ...]] = (BETA, LEARNING_RATE, DESIRABLE, UNDESIRABLE)

    beta: float = Field(0.1, gt=0)
    """Anchor to the reference, dimensionless. 0.1 is the paper's default."""
    desirable_weight: float = Field(1.0, gt=0)
    """λ_D: weight of thumbs up."""
    undesirable_weight: float = Field(1.0, gt=0)
    """λ_U: weight of thumbs down."""
    learning_rate: float = Field(1e-6, ge=0)
    """Peak of the schedule. 1e-6 suits whole models of a billion parameters; LoRA wants 1e-5, the toy model 1e-4."""

    def check(self, spec: RunSpec) -> None:
        if self.rows_per_device(spec.launch.num_processes) < 2:
            raise SpecError(
                f"kto: batch_size={self.batch_size} leaves one row a micro-batch, and the reference point is "
                f"estimated from mismatched rows of one; use at least "
                f"{2 * spec.launch.num_processes * self.gradient_accumulation}"
            )

    @classmethod
    def preload(cls) -> None:
        from trl import KTOConfig, KTOTrainer  # noqa: F401

    def build_trainer(self, context: Context) -> Trainer:
        from datasets import Dataset
        from trl import KTOConfig, KTOTrainer

        from rlhf_nb.training import data, models
        from rlhf_nb.training.arguments import lora_config, training_arguments
        from rlhf_nb.training.control import BoundCoefficient
        from rlhf_nb.training.sampling import Sampler
        from rlhf_nb.training.trainer import SteeredTrainer

        policy = context.model_path(context.spec.policy)
        tokenizer = models.load_tokenizer(policy, context.emit)
        max_length = models.max_length(policy, self.max_length, context.emit)
        context.emit.stage("tokenizing rows")
        # TRL reads the rows in order, to pair each with its neighbour's completion: one shuffle mixes ups and downs.
        rows = data.shuffled(data.for_trl(context.rows, self.rows, tokenizer), self.seed)
        trainer = KTOTrainer(
            # A directory: from a model in memory TRL would take the reference from where that was once loaded.
            model=policy,
            args=KTOConfig(
                **training_arguments(context),
                max_length=max_length,
                beta=self.beta,
                desirable_weight=self.desirable_weight,
                undesirable_weight=self.undesirable_weight,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=lora_config(context, "CAUSAL_LM"),
        )
        data.say_what_fits(context, trainer.train_dataset, SIDES, max_length)

        def bound(live: LiveCoefficient) -> BoundCoefficient:
            def write(value: float) -> None:
                setattr(trainer, live.name, value)

            return BoundCoefficient(live, lambda: float(getattr(trainer, live.name)), write)

        def derive(values: dict[str, Any]) -> dict[str, float]:
            return log_ratios(values, trainer.beta)

        return SteeredTrainer(
            trainer,
            context,
            names=NAMES,
            live=[bound(live) for live in (BETA, DESIRABLE, UNDESIRABLE)],
            derive=derive,
            sampler=lambda built: Sampler.of(context, built, policy),
        )
