"""What every method declares: its knobs, its rows, its models and the coefficients that stay live."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rlhf_nb.errors import SpecError, did_you_mean
from rlhf_nb.protocol.events import Coefficient

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
    enters: Literal["update", "rollout"] = "update"
    """`update`: in force at the next optimizer step. `rollout`: at the first step of the next rollout."""
    writes: str = ""
    """Dotted path from the trainer to what the loss reads: `trainer.beta`. Empty: the method binds it."""
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
        )


LEARNING_RATE = LiveCoefficient(
    "learning_rate",
    low=1e-8,
    high=1e-1,
    scale="log",
    unit="1/step",
    meaning="Step size of the optimizer, before the schedule's factor. 0 freezes the model.",
)


class Method(BaseModel):
    """Base of every training method. Its fields are its knobs; `extra="forbid"` refuses a misspelt one by name."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    name: ClassVar[str]
    """Registry name and magic."""
    title: ClassVar[str]
    paper: ClassVar[str] = ""
    rows: ClassVar[str]
    """Kind of rows it trains on: demonstrations, pairs, prompts …"""
    has_reference: ClassVar[bool] = False
    """Whether a frozen reference is held, so that a tether can be drawn."""
    needs_reward: ClassVar[bool] = False
    trains: ClassVar[bool] = True
    """False for jobs that only measure: they save no model."""
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

    def build_trainer(self, context: Context) -> Trainer:
        """Build what trains, beside the accelerator. The only code that knows a trainer library's names."""
        raise TypeError(f"{type(self).__name__} has no trainer")

    def check(self, spec: RunSpec) -> None:
        """Refuse, on the notebook side and before anything starts, a combination that cannot work.

        Raises:
            SpecError: With the field, the value and the way out.
        """

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


def _one_line(cls: type[Method], error: ValidationError) -> str:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"]) or "?"
    if first["type"] == "extra_forbidden":
        known = list(cls.model_fields)
        return f'{cls.name}: "{field}" is no knob of {cls.name}{did_you_mean(field, known)}  known: {", ".join(known)}'
    # pydantic says "Input should be greater than 0"; the value belongs beside it.
    return f"{cls.name}: {field}={first['input']!r}: {first['msg'].lower().replace('input should', 'should')}"
