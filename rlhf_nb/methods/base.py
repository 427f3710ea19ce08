"""What every method declares: its knobs, its rows, its models and the coefficients that stay live."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rlhf_nb.errors import SpecError, did_you_mean, first_fault
from rlhf_nb.protocol.events import Coefficient
from rlhf_nb.protocol.spec import RewardPart, reward_parts

if TYPE_CHECKING:
    from rlhf_nb.protocol.spec import RunSpec
    from rlhf_nb.training.context import Context


class Trainer(Protocol):
    """What `build_trainer` gives. `train` runs to the end or until `context.control.stopping`."""

    def train(self) -> None: ...

    def save_model(self, directory: str) -> None:
        """Write the policy (or reward model) as safetensors with its tokenizer, loadable by plain transformers."""
        ...


@dataclass(frozen=True)
class LiveCoefficient:
    """A number that may change while the run trains."""

    name: str
    low: float
    high: float
    scale: Literal["linear", "log"] = "linear"
    unit: str = ""
    meaning: str = ""
    enters: Literal["update", "rollout", "adaptation"] = "update"
    """`update`: in force at the next optimizer step. `rollout`: at the first step of the next rollout. `adaptation`: at
    the first step of the next rollout that another one was measured for."""
    writes: str = ""
    """Dotted path from the trainer to what the loss reads: `trainer.beta`. Empty: the method binds it."""
    can_preview: bool = False
    unavailable_when: Callable[[Any], str | None] | None = None
    """Given the method, the reason why the value was frozen at construction, or None."""

    def describe(self, value: float, method: Any) -> Coefficient:
        reason = self.unavailable_when(method) if self.unavailable_when else None
        return Coefficient(
            name=self.name,
            low=self.low,
            high=self.high,
            scale=self.scale,
            value=value,
            unit=self.unit,
            meaning=self.meaning,
            unavailable_reason=reason,
            can_preview=self.can_preview and reason is None,
        )


LEARNING_RATE = LiveCoefficient(
    "learning_rate",
    low=1e-8,
    high=1e-1,
    scale="log",
    unit="1/step",
    meaning="Step size of the optimizer, before the schedule's factor.",
)


def _weight(part: RewardPart) -> LiveCoefficient:
    far = 4 * abs(part.weight) or 1.0
    return LiveCoefficient(
        f"reward_weight/{part.name}",
        low=-far if part.weight < 0 else 0.0,
        high=0.0 if part.weight < 0 else far,
        meaning=f"What the scores of {part.name} are multiplied by.",
        enters="rollout",
    )


class Method(BaseModel):
    """Base of every training method. Its fields are its knobs; `extra="forbid"` refuses a misspelt one by name."""

    # JSON has no infinity: a spec would come back with None in its place.
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    name: ClassVar[str]
    """Registry name and magic."""
    title: ClassVar[str]
    paper: ClassVar[str] = ""
    rows: ClassVar[str]
    """Kind of rows it trains on: demonstrations, pairs, prompts … Empty for a job that reads none."""
    also: ClassVar[tuple[str, ...]] = ()
    """Further kinds that it trains on as they are."""
    models: ClassVar[str] = ""
    """What is in memory while it trains, for the README's table."""
    has_reference: ClassVar[bool] = False
    """Whether a frozen reference is held, so that a tether can be drawn."""
    needs_reward: ClassVar[bool] = False
    trains: ClassVar[bool] = True
    """False for jobs that only measure, or make rows: they save no model."""
    makes: ClassVar[str] = ""
    """Kind of rows it makes, for jobs whose result is a data set. Empty: none."""
    live: ClassVar[tuple[LiveCoefficient, ...]] = (LEARNING_RATE,)

    max_steps: int = Field(100, gt=0)
    """Optimizer steps."""
    seed: int = Field(0, ge=0)
    learning_rate: float = Field(1e-4, ge=0)
    """Peak of the schedule."""
    batch_size: int = Field(8, gt=0)
    """Rows an optimizer step sees, over all ranks."""
    max_length: int = Field(512, gt=1)
    """Tokens of prompt and completion together."""
    checkpoint_every: int = Field(0, ge=0)
    """Optimizer steps between checkpoints; 0 takes one only when asked."""
    sample_every: int = Field(25, ge=0)
    """Optimizer steps between sampled completions; 0 samples none."""

    @classmethod
    def rows_in(cls, kind: str) -> str:
        """The kind it trains on when it is given rows of `kind`."""
        return kind if kind in cls.also else cls.rows

    def live_in(self, spec: RunSpec) -> tuple[LiveCoefficient, ...]:
        """The live coefficients of one run: a combined reward adds a weight for each of its parts.

        A range holds the value that the run starts with, so that a person who moved it can always go back.
        """
        parts = reward_parts(spec.reward)
        return (*map(self._holding_start, self.live), *(_weight(part) for part in parts if len(parts) > 1))

    def _holding_start(self, live: LiveCoefficient) -> LiveCoefficient:
        start = getattr(self, live.name)
        if start is None or live.low <= start <= live.high:
            return live
        return replace(live, low=min(live.low, float(start)), high=max(live.high, float(start)))

    def start_values(self, spec: RunSpec) -> dict[str, float]:
        """What the live coefficients are at the start, by name; of one that was left out, its lowest value."""
        given = {live: getattr(self, live.name) for live in self.live}
        values = {live.name: live.low if value is None else float(value) for live, value in given.items()}
        parts = reward_parts(spec.reward)
        return values | {f"reward_weight/{part.name}": part.weight for part in parts if len(parts) > 1}

    def build_trainer(self, context: Context) -> Trainer:
        """Build what trains, beside the accelerator. The only code that knows a trainer library's names."""
        raise TypeError(f"{type(self).__name__} has no trainer")

    @property
    def made_kind(self) -> str:
        """Kind of the rows that this one makes, where its knobs decide."""
        return self.makes

    quantizes: ClassVar[bool] = False
    """It can hold the base of an adapter in 4 bits."""

    def check(self, spec: RunSpec) -> None:
        """Refuse, on the notebook side and before anything starts, a combination that cannot work.

        Raises:
            SpecError: With the field, the value and the way out.
        """

    @classmethod
    def preload(cls) -> None:
        """Import what `build_trainer` needs, ahead of a job. Touches neither the accelerator nor a process group."""

    @classmethod
    def create(cls, **knobs: Any) -> Method:
        """The method from loose knobs, errors as one line.

        Raises:
            SpecError: An unknown knob (with a suggestion) or a value outside its range.
        """
        try:
            return cls(**knobs)
        except ValidationError as error:
            raise SpecError(_one_line(cls, error)) from None


class GradientMethod(Method):
    """What methods share that take plain gradient steps over rows, through transformers' Trainer."""

    quantizes: ClassVar[bool] = True

    weight_decay: float = Field(0.0, ge=0)
    """Decoupled (AdamW, arXiv:1711.05101), per step and unit of learning rate; biases and norms are left out."""
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps over which the learning rate rises from 0."""
    lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"] = "linear"
    """Schedule after the warm-up, a factor on `learning_rate`. linear and cosine end at 0."""
    optimizer: Literal["adamw", "sgd", "adafactor"] = "adamw"
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients are scaled down to this L2 norm; 0 leaves them."""
    gradient_accumulation: int = Field(1, gt=0)
    """Micro-batches an optimizer step is split into, to save memory; `batch_size` stays what a step sees."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a fifth slower."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 computes in bfloat16 (autocast) and keeps float32 weights."""
    sample_tokens: int = Field(64, gt=0)
    """Longest completion sampled while training, in tokens."""

    def rows_per_device(self, world_size: int) -> int:
        """Rows in one micro-batch of one rank.

        Raises:
            SpecError: `batch_size` does not split evenly over ranks and micro-batches.
        """
        parts = world_size * self.gradient_accumulation
        if self.batch_size % parts:
            raise SpecError(
                f"{self.name}: batch_size={self.batch_size} does not split over {world_size} ranks × "
                f"{self.gradient_accumulation} micro-batches; use a multiple of {parts}"
            )
        return self.batch_size // parts


def _one_line(cls: type[Method], error: ValidationError) -> str:
    field, given, said = first_fault(error)
    if error.errors()[0]["type"] == "extra_forbidden":
        known = list(cls.model_fields)
        return f'{cls.name}: "{field}" is no knob of {cls.name}{did_you_mean(field, known)}  known: {", ".join(known)}'
    return f"{cls.name}: {field}={given!r}: {said}"
