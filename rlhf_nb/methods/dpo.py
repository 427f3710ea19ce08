"""Direct Preference Optimization, and its relatives that differ in the loss alone.

Paper    Rafailov et al. 2023, arXiv:2305.18290, eq. 7; of each other loss, see `loss_type`.
Rows     prompt, chosen, rejected.
Models   policy (trained), reference (frozen; the saved policy it starts from; under LoRA the policy, adapter off).
Live     beta, learning_rate; label_smoothing where the loss reads it. Raising beta keeps the policy closer to the
         reference.
Agrees   with trl.DPOTrainer, bit for bit; tests/training/test_identical.py and tests/methods/test_dpo.py. Its optimum
         is π* ∝ π_ref·exp(r/β); tests/fidelity/test_dpo.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from rlhf_nb.errors import SpecError, did_you_mean
from rlhf_nb.methods.base import LEARNING_RATE, GradientMethod, LiveCoefficient, Trainer

if TYPE_CHECKING:
    from rlhf_nb.protocol.spec import RunSpec
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


TRL_LOSSES = (
    "sigmoid", "sigmoid_norm", "ipo", "hinge", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft",
)  # fmt: skip
LOSSES = (*TRL_LOSSES, "ipo_sum")
SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")
"""Losses that read label_smoothing."""


def without_smoothing(method: DPO) -> str | None:
    if set(method.losses) & set(SMOOTHED):
        return None
    return f"loss_type={' + '.join(method.losses)} has no label smoothing; robust, exo_pair and aot have"


SMOOTHING = LiveCoefficient(
    "label_smoothing",
    low=0.0,
    high=0.49,
    meaning="Share of labels that are believed flipped.",
    writes="trainer.label_smoothing",
    unavailable_when=without_smoothing,
)


class DPO(GradientMethod):
    """Prefer what people chose, held to a reference, without a reward model."""

    name: ClassVar[str] = "dpo"
    title: ClassVar[str] = "Direct preference optimization"
    paper: ClassVar[str] = "arXiv:2305.18290"
    rows: ClassVar[str] = "pairs"
    models: ClassVar[str] = "policy, reference"
    has_reference: ClassVar[bool] = True
    live: ClassVar[tuple[LiveCoefficient, ...]] = (BETA, LEARNING_RATE, SMOOTHING)

    beta: float = Field(0.1, gt=0)
    """Anchor to the reference, dimensionless. 0.1 is the paper's default."""
    loss_type: str | tuple[str, ...] = "sigmoid"
    """One loss, or several that are added with `loss_weights`. sigmoid: DPO. sigmoid_norm: log-probabilities averaged
    over tokens (length-normalised). ipo_sum: a squared loss that cannot be driven without end, of log-probabilities
    summed over tokens (Azar et al. 2023, arXiv:2310.12036, eq. 17); ipo: the same of their averages, as TRL has it.
    hinge: SLiC, arXiv:2305.10425. robust: labels that are flipped at a known rate, arXiv:2403.00409. exo_pair
    arXiv:2402.00856, nca_pair arXiv:2402.05369, bco_pair arXiv:2404.04656, sppo_hard arXiv:2405.00675, aot and
    aot_unpaired arXiv:2406.05882, apo_zero and apo_down arXiv:2408.06266, discopop arXiv:2406.08414. sft: the chosen
    answers' negative log-likelihood a token, for use beside others, as MPO does (arXiv:2411.10442)."""
    loss_weights: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    """Weight of each loss in `loss_type`; None: 1 each."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of labels that are believed flipped; read by robust, exo_pair (which needs it above 0) and aot."""
    learning_rate: float = Field(1e-6, ge=0)
    """Peak of the schedule. 1e-6 suits whole models of a billion parameters; LoRA wants 1e-5, the toy model 1e-4."""

    def live_in(self, spec: RunSpec) -> tuple[LiveCoefficient, ...]:
        return tuple(self._smoothing if live.name == SMOOTHING.name else live for live in super().live_in(spec))

    @property
    def _smoothing(self) -> LiveCoefficient:
        # exo_pair takes its logarithm.
        return replace(SMOOTHING, low=1e-3) if "exo_pair" in self.losses else SMOOTHING

    @property
    def losses(self) -> tuple[str, ...]:
        return (self.loss_type,) if isinstance(self.loss_type, str) else self.loss_type

    @field_validator("loss_type")
    @classmethod
    def _known(cls, given: str | tuple[str, ...]) -> str | tuple[str, ...]:
        names = (given,) if isinstance(given, str) else given
        for name in names:
            if name not in LOSSES:
                raise PydanticCustomError(
                    "unknown_loss",
                    "{name} is no loss{hint}  known: {known}",
                    {"name": name, "hint": did_you_mean(name, LOSSES), "known": ", ".join(LOSSES)},
                )
        if not names or len(set(names)) != len(names):
            raise PydanticCustomError("losses", "name each loss once, and at least one")
        return given

    def check(self, spec: RunSpec) -> None:
        if self.loss_weights is not None and len(self.loss_weights) != len(self.losses):
            raise SpecError(
                f"dpo: loss_weights={list(self.loss_weights)} for {len(self.losses)} losses "
                f"({', '.join(self.losses)}); give one weight each"
            )
        if self.label_smoothing and without_smoothing(self):
            raise SpecError(
                f"dpo: label_smoothing={self.label_smoothing:g} is not read by loss_type={' + '.join(self.losses)}; "
                f"use robust, or leave it at 0"
            )
        if "exo_pair" in self.losses and not self.label_smoothing:
            raise SpecError("dpo: loss_type=exo_pair takes the logarithm of label_smoothing; give 0.001 or so")

    @classmethod
    def preload(cls) -> None:
        from trl import DPOConfig, DPOTrainer  # noqa: F401

    def build_trainer(self, context: Context) -> Trainer:
        from datasets import Dataset
        from trl import DPOConfig

        from rlhf_nb.training import data, models
        from rlhf_nb.training.arguments import lora_config, training_arguments
        from rlhf_nb.training.control import BoundCoefficient
        from rlhf_nb.training.sampling import Sampler
        from rlhf_nb.training.trainer import SteeredTrainer

        policy = context.model_path(context.spec.policy)
        tokenizer = models.load_tokenizer(policy, context.emit)
        max_length = models.max_length(policy, self.max_length, context.emit)
        context.emit.stage("tokenizing rows")
        weights = self.loss_weights or (1.0,) * len(self.losses)
        # TRL sums its own and takes no empty list.
        theirs = {name: weight for name, weight in zip(self.losses, weights, strict=True) if name != "ipo_sum"}
        theirs = theirs or {"sigmoid": 0.0}
        trainer = trainer_class()(
            # A directory: from a model in memory TRL would take the reference from where that was once loaded.
            model=policy,
            args=DPOConfig(
                **training_arguments(context),
                max_length=max_length,
                beta=self.beta,
                loss_type=list(theirs),
                loss_weights=list(theirs.values()),
                label_smoothing=self.label_smoothing,
            ),
            train_dataset=Dataset.from_list(data.for_trl(context.rows, self.rows, tokenizer)),
            processing_class=tokenizer,
            peft_config=lora_config(context, "CAUSAL_LM"),
        )
        trainer.ipo_sum_weight = sum(w for name, w in zip(self.losses, weights, strict=True) if name == "ipo_sum")
        data.say_what_fits(context, trainer.train_dataset, SIDES, max_length)
        beta = BoundCoefficient(BETA, lambda: float(trainer.beta), lambda value: setattr(trainer, "beta", value))
        smoothing = BoundCoefficient(
            self._smoothing,
            lambda: float(trainer.label_smoothing),
            lambda value: setattr(trainer, "label_smoothing", value),
            without_smoothing(self),
        )
        return SteeredTrainer(
            trainer,
            context,
            names=NAMES,
            live=[beta, smoothing],
            derive=lambda values: log_ratios(values, trainer.beta),
            sampler=lambda built: Sampler.of(context, built, policy),
        )


def trainer_class() -> Any:
    """trl.DPOTrainer, and the paper's IPO beside its losses."""
    from trl import DPOTrainer

    from rlhf_nb.maths.preference import ipo_loss

    class WithSummedIPO(DPOTrainer):
        ipo_sum_weight = 0.0

        def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
            if not self.ipo_sum_weight:
                return super()._compute_loss(model, inputs, return_outputs)
            said: list[Any] = []

            def policy(**named: Any) -> Any:
                said.append(model(**named))
                return said[-1]

            # Where the reference's part is precomputed TRL finds it in the batch: that is how both see the same.
            reference = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
            inputs = {**inputs, "ref_chosen_logps": reference[0], "ref_rejected_logps": reference[1]}
            self.precompute_ref_logps = True
            try:
                loss = super()._compute_loss(policy, inputs, False)
            finally:
                self.precompute_ref_logps = False
            tokens = inputs["completion_mask"].shape[1] - 1
            chosen_B, rejected_B = said[0].log_probs[:, -tokens:].sum(1).chunk(2)
            summed_B = ipo_loss(chosen_B, rejected_B, *reference, beta=self.beta)
            return loss + self.ipo_sum_weight * summed_B.mean()

    return WithSummedIPO


def log_ratios(values: dict[str, Any], beta: float) -> dict[str, float]:
    """Implicit rewards in nats: they rescale with beta, so curves before and after a slider move are not comparable."""
    return {
        f"log_ratio/{side}": values[f"implicit_reward/{side}"] / beta
        for side in ("chosen", "rejected", "margin")
        if f"implicit_reward/{side}" in values
    }
