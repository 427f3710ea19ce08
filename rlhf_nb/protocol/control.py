"""What a person asks of a live run: lines of `control.jsonl`, appended by the agent, read between optimizer steps."""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from rlhf_nb.protocol.spec import OneReward


class Control(BaseModel):
    model_config = ConfigDict(extra="allow")
    id: str = Field(default_factory=lambda: uuid.uuid4().hex)
    t: float = Field(default_factory=time.time)
    who: str = ""
    why: str = ""


class SetCoefficient(Control):
    op: Literal["set"] = "set"
    name: str
    value: float


class SetReward(Control):
    """Another reward from the next rollout on, in place of a part of the run's reward."""

    op: Literal["set_reward"] = "set_reward"
    part: str
    """Name of the part that is replaced, as the run began with it."""
    reward: OneReward


class Pause(Control):
    op: Literal["pause"] = "pause"


class Resume(Control):
    op: Literal["resume"] = "resume"


class Stop(Control):
    """End after the current step; the model is saved and the run counts as done."""

    op: Literal["stop"] = "stop"


class SaveCheckpoint(Control):
    op: Literal["checkpoint"] = "checkpoint"


class Sample(Control):
    """Ask for completions of a prompt at the next step boundary; the answer is a `samples` event with this id."""

    op: Literal["sample"] = "sample"
    prompts: list[str]


class Preview(Control):
    """Ask where other values of a coefficient would lead; the answer is a `previewed` event with this id."""

    op: Literal["preview"] = "preview"
    name: str = "kl_coef"
    """The tether: `kl_coef`, or `beta` where a method calls it so."""
    values: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(min_length=1, max_length=100)
    prompts: int = Field(8, gt=0, le=1024)
    samples: int = Field(16, ge=2, le=1024)
    """Completions of each prompt."""


AnyControl = Annotated[
    SetCoefficient | SetReward | Pause | Resume | Stop | SaveCheckpoint | Sample | Preview, Field(discriminator="op")
]
_ADAPTER: TypeAdapter[AnyControl] = TypeAdapter(AnyControl)


def parse_control(line: str | bytes | dict) -> AnyControl:
    return _ADAPTER.validate_python(line) if isinstance(line, dict) else _ADAPTER.validate_json(line)
