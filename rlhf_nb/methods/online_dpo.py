"""Online DPO: two completions of each prompt by the policy of now, the reward says which is chosen, a step of DPO.

Paper    Guo et al. 2024, arXiv:2402.04792 (online AI feedback); the loss is DPO's, arXiv:2305.18290, eq. 7.
Rows     prompt; further columns go to the reward.
Models   policy (trained); reference (frozen; where the policy starts; under LoRA the policy, adapter off); reward.
Live     beta, learning_rate, temperature, missing_eos_penalty, the weights of a combined reward and the reward itself:
         all from the next step, since every step samples anew. Raising beta keeps the policy closer to the reference.
Agrees   with trl.experimental.online_dpo.OnlineDPOTrainer, bit for bit; tests/training/test_identical.py and
         tests/methods/test_online_dpo.py.

Only the order of the two rewards counts: a reward that is scaled or shifted teaches the same. What TRL logs as
`objective/kl` sums over padding too; the charts' KL is taken from the two completions' own log-ratios.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from rlhf_nb.errors import SpecError
from rlhf_nb.methods.base import LEARNING_RATE, GradientMethod, LiveCoefficient, Trainer
from rlhf_nb.methods.dpo import NAMES as DPO_NAMES
from rlhf_nb.methods.dpo import log_ratios
from rlhf_nb.methods.online import REWARD_STD, TEMPERATURE
from rlhf_nb.protocol.spec import reward_parts

if TYPE_CHECKING:
    from rlhf_nb.protocol.spec import RunSpec
    from rlhf_nb.training.context import Context

NAMES = {
    **DPO_NAMES,
    # Sums over padding, and what stands beside under names of ours: left out.
    "objective/kl": "", "objective/entropy": "", "objective/non_score_reward": "", "objective/rlhf_reward": "",
    "objective/scores": "", "objective/scores_margin": "pairs/margin", "val/contain_eos_token": "", "beta": "",
}  # fmt: skip
BETA = LiveCoefficient(
    "beta",
    low=1e-3,
    high=10.0,
    scale="log",
    meaning="Anchor to the reference: higher keeps the policy closer to it.",
    # trainer.beta is a property without a setter, args.beta is copied at construction.
    writes="trainer._beta",
)
MISSING_EOS = LiveCoefficient(
    "missing_eos_penalty",
    low=0.0,
    high=100.0,
    unit="score",
    meaning="Taken off the score of a completion that was cut at max_new_tokens.",
    writes="trainer.args.missing_eos_penalty",
)


class OnlineDPO(GradientMethod):
    """DPO on pairs that the policy itself just wrote and a reward has ordered."""

    name: ClassVar[str] = "online-dpo"
    title: ClassVar[str] = "Online direct preference optimization"
    paper: ClassVar[str] = "arXiv:2402.04792"
    rows: ClassVar[str] = "prompts"
    models: ClassVar[str] = "policy, reference, reward"
    has_reference: ClassVar[bool] = True
    needs_reward: ClassVar[bool] = True
    live: ClassVar[tuple[LiveCoefficient, ...]] = (BETA, LEARNING_RATE, TEMPERATURE, MISSING_EOS, REWARD_STD)

    beta: float = Field(0.1, gt=0)
    """Anchor to the reference, dimensionless. 0.1 is the paper's."""
    loss_type: Literal["sigmoid", "ipo_sum"] = "sigmoid"
    """sigmoid: DPO. ipo_sum: the paper's IPO, on log-probabilities summed over tokens (what TRL calls ipo here)."""
    temperature: float = Field(0.9, gt=0)
    """Of sampling alone: the loss takes log-probabilities at temperature 1. 0.9 is the paper's."""
    max_new_tokens: int = Field(48, gt=0)
    """Longest completion, in tokens."""
    missing_eos_penalty: float = Field(0.0, ge=0)
    """Taken off the score of a completion that was cut at `max_new_tokens`."""
    combine_rewards: Literal["sum", "mean", "min", "mean_minus_std"] = "sum"
    """Of several rewards: how their weighted scores become one."""
    reward_std_coef: float = Field(1.0, ge=0)
    """λ of combine_rewards=mean_minus_std."""
    reward_timeout: float = Field(600.0, ge=0)
    """Seconds a reward may take over one rank's part of a step; 0 waits for ever."""
    batch_size: int = Field(8, gt=0)
    """Prompts an optimizer step sees, over all ranks; each gets two completions."""
    learning_rate: float = Field(5e-7, ge=0)
    """Peak of the schedule. 5e-7 suits whole models of a billion parameters; LoRA wants 1e-5, the toy model 1e-4."""

    def check(self, spec: RunSpec) -> None:
        self.rows_per_device(spec.launch.num_processes)
        if self.max_new_tokens >= self.max_length:
            raise SpecError(
                f"online-dpo: max_new_tokens={self.max_new_tokens} leaves no room for a prompt in "
                f"max_length={self.max_length}; lower it"
            )
        if self.combine_rewards != "sum" and len(reward_parts(spec.reward)) < 2:
            raise SpecError(
                f"online-dpo: combine_rewards={self.combine_rewards} needs several rewards and there is one; "
                f"give reward=[first, second]"
            )

    @classmethod
    def preload(cls) -> None:
        from importlib.util import find_spec

        # TRL's file imports vLLM where there is one, which would cost every standby its seconds.
        if find_spec("vllm") is None:
            from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer  # noqa: F401

    def build_trainer(self, context: Context) -> Trainer:
        from datasets import Dataset
        from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

        from rlhf_nb.training import models
        from rlhf_nb.training.arguments import lora_config, model_arguments, training_arguments
        from rlhf_nb.training.control import BoundCoefficient
        from rlhf_nb.training.online_pairs import PairScoring, trainer_rows
        from rlhf_nb.training.sampling import Sampler
        from rlhf_nb.training.trainer import SteeredTrainer

        policy = context.model_path(context.spec.policy)
        tokenizer = models.load_tokenizer(policy, context.emit)
        max_length = models.max_length(policy, self.max_length, context.emit)
        scoring = PairScoring(self, context)
        trainer = OnlineDPOTrainer(
            # A model: from a directory TRL would load it with device_map="auto", which splits it over all devices.
            model=models.load_model(policy, **model_arguments(context)),
            reward_funcs=[scoring],
            args=OnlineDPOConfig(
                **training_arguments(context, reads_model=False),
                max_length=max_length,
                max_new_tokens=self.max_new_tokens,
                beta=self.beta,
                loss_type="ipo" if self.loss_type == "ipo_sum" else self.loss_type,
                temperature=self.temperature,
                missing_eos_penalty=self.missing_eos_penalty,
            ),
            train_dataset=Dataset.from_list(trainer_rows(context, tokenizer, max_length)),
            processing_class=tokenizer,
            peft_config=lora_config(context, "CAUSAL_LM"),
        )
        scoring.watch(trainer)

        def set_temperature(value: float) -> None:
            # Sampling reads the generation configuration; what it falls back on lies in the keywords beside it.
            trainer.temperature = trainer.generation_config.temperature = value
            trainer.generation_kwargs["temperature"] = value

        def write(live: LiveCoefficient) -> BoundCoefficient:
            match live.name:
                case "beta":
                    return BoundCoefficient(live, lambda: trainer._beta, lambda value: setattr(trainer, "_beta", value))
                case "temperature":
                    return BoundCoefficient(live, lambda: trainer.generation_config.temperature, set_temperature)
                case "missing_eos_penalty":
                    args = trainer.args
                    return BoundCoefficient(
                        live,
                        lambda: args.missing_eos_penalty,
                        lambda value: setattr(args, "missing_eos_penalty", value),
                    )
            return scoring.bound(live)

        def derive(values: dict[str, Any]) -> dict[str, float]:
            ratios = log_ratios(values, trainer._beta)
            # Both completions are the policy's own: the mean of their log-ratios is k1.
            kl = (ratios["log_ratio/chosen"] + ratios["log_ratio/rejected"]) / 2
            return {**ratios, "kl/policy_reference": kl, **scoring.metrics(kl, trainer._beta)}

        return SteeredTrainer(
            trainer,
            context,
            names=NAMES,
            live=[write(live) for live in self.live_in(context.spec) if live.name != LEARNING_RATE.name],
            derive=derive,
            sampler=lambda built: Sampler.of(context, built, policy, score=scoring.look, gold=scoring.look_at_gold),
        )
