"""The events of a run: the one log, `events.jsonl`, one JSON object a line.

`seq` counts from 1 without gaps over the whole life of a run, attempts included; `t` is Unix seconds at the writer.
`step` and `max_steps` always count optimizer steps. Rank 0 writes while it lives; the supervisor writes the last event.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from rlhf_nb.protocol.spec import OneReward, RowKind, describe

State = Literal["waiting", "starting", "running", "paused", "finished", "stopped", "failed"]
TERMINAL: frozenset[str] = frozenset({"finished", "stopped", "failed"})


class Event(BaseModel):
    # Readers of an old package meet events of a newer one: unknown fields are kept, not refused.
    model_config = ConfigDict(extra="allow")
    seq: int = 0
    t: float = 0.0


class Coefficient(BaseModel):
    """What a slider needs to know of a live coefficient. Events carry only this, never code."""

    name: str
    low: float
    high: float
    scale: Literal["linear", "log"] = "linear"
    value: float
    unit: str = ""
    meaning: str = ""
    """One line, saying which way is closer to the reference where that applies."""
    unavailable_reason: str | None = None
    can_preview: bool = False
    """Whether the run can say where another value would lead."""


class Started(Event):
    """Rank 0 has its models' world: the first line of every attempt."""

    kind: Literal["started"] = "started"
    attempt: int = 1
    world_size: int
    rank_pids: list[int] = []
    device: str = ""
    """`NVIDIA H200 139 GiB` or `CPU, 2 threads`."""
    warm: bool = False
    """True where a standby took the job."""
    versions: dict[str, str] = {}
    max_steps: int | None = None
    has_reference: bool = False
    coefficients: list[Coefficient] = []


class Stage(Event):
    """What a worker is doing before and between steps, for the header: `loading models`, `saving`."""

    kind: Literal["stage"] = "stage"
    text: str


class Metric(Event):
    """Numbers of one optimizer step, or of one rollout (then `rollout` is set as well)."""

    kind: Literal["metric"] = "metric"
    step: int
    max_steps: int | None = None
    rollout: int | None = None
    values: dict[str, float | None]
    """`area/name` → value. None stands for a number that is not finite; its text is in `not_finite`."""
    not_finite: dict[str, str] = {}


class SampleItem(BaseModel):
    prompt: str
    completion: str
    reference_completion: str | None = None
    """The reference's (SFT's) completion of the same prompt."""
    score: float | None = None
    reference_score: float | None = None
    gold: float | None = None
    reference_gold: float | None = None
    length: int | None = None
    """Tokens."""
    kl: float | None = None
    """Nats, summed over the completion: log π(y|x) − log π_ref(y|x)."""


class Samples(Event):
    kind: Literal["samples"] = "samples"
    step: int
    items: list[SampleItem]
    request_id: str | None = None
    """Set where a person asked (`run.sample`)."""


class CoefficientChanged(Event):
    """Recorded where the value is used: `effective_step` is the first optimizer step whose loss or update used it."""

    kind: Literal["coefficient_changed"] = "coefficient_changed"
    id: str
    name: str
    old: float
    new: float
    effective_step: int
    who: str = ""
    why: str = ""
    follows: str = ""
    """Id of the change that made this one, where nobody asked for it by itself."""


class RewardReplaced(Event):
    """A part of the run's reward is another one from this step on."""

    kind: Literal["reward_replaced"] = "reward_replaced"
    id: str
    part: str
    """Name of the part, as the run began with it."""
    old: str
    new: OneReward
    shift: float
    """Added to the new one's scores, so that their mean over the rollout before is what it was: a reward model is
    defined only up to a constant, and the value model has learnt the old one's."""
    effective_step: int
    who: str = ""
    why: str = ""

    def __str__(self) -> str:
        where = f"reward {self.part}: {self.old} → {describe(self.new)} at step {self.effective_step}"
        return f"{where}, its scores shifted by {self.shift:+.3g}"


class Prediction(BaseModel):
    """Where the run would settle at one value of a coefficient."""

    value: float
    reward: float
    """Expected score that is optimised, before the KL."""
    kl: float
    """Nats a completion, to the reference."""
    effective: float
    """Completions a prompt that carry the answer."""


EFFECTIVE_ENOUGH = 4.0
"""Effective completions a prompt below which a prediction is not to be trusted, and is not shown as one."""


class Previewed(Event):
    """Answer to a preview: nothing was changed."""

    kind: Literal["previewed"] = "previewed"
    id: str
    name: str
    step: int
    now: float
    """The value in force."""
    reward: float
    """Mean over the completions that were drawn, as the policy is."""
    kl: float
    gap: float | None = None
    """Score still to be gained at the value in force, Var(r − β·log(π/π_ref))/(2β); None at β = 0."""
    converged: bool = False
    """The policy is near its optimum, so that the weights were taken from the scores alone."""
    prompts: int
    samples: int
    predictions: list[Prediction]


class ControlAcknowledged(Event):
    """A control line was read (not yet used, for a coefficient)."""

    kind: Literal["control_acknowledged"] = "control_acknowledged"
    id: str
    op: str
    step: int
    name: str | None = None
    """Of a set: what is asked for, until a `coefficient_changed` or `control_refused` of this id."""
    value: float | None = None


class ControlRefused(Event):
    kind: Literal["control_refused"] = "control_refused"
    id: str
    op: str
    reason: str


class Paused(Event):
    kind: Literal["paused"] = "paused"
    step: int


class Resumed(Event):
    """A paused run goes on (`attempt` unchanged) or a restarted one continues from a checkpoint (`attempt` higher)."""

    kind: Literal["resumed"] = "resumed"
    step: int
    attempt: int = 1
    from_step: int | None = None
    """Set on a restart: the checkpoint's step. Events of an earlier attempt with a larger step are superseded."""


class CheckpointSaved(Event):
    kind: Literal["checkpoint_saved"] = "checkpoint_saved"
    step: int
    path: str
    """Relative to the run directory."""


class ModelSaved(Event):
    kind: Literal["model_saved"] = "model_saved"
    step: int
    path: str
    content_hash: str = ""


class DataSaved(Event):
    """The rows that a run has made. They lie in its directory, in the order of what they were made from."""

    kind: Literal["data_saved"] = "data_saved"
    path: str
    """Relative to the run directory."""
    row_kind: RowKind
    rows: int
    content_hash: str
    summary: str = ""
    """One line: what it holds and what made it."""
    dropped: dict[str, int] = {}
    """Reason → how many rows could not be made or were left out."""
    counts: dict[str, int] = {}
    """What else the job counted."""


class Notice(Event):
    """A line a person should read: rows dropped, a limit reached, the supervisor lost."""

    kind: Literal["notice"] = "notice"
    level: Literal["info", "warning"] = "info"
    code: str
    text: str


class Result(Event):
    """What an evaluation found."""

    kind: Literal["result"] = "result"
    name: str
    value: float
    interval: tuple[float, float] | None = None
    n: int = 0
    detail: dict[str, Any] = {}


class TrainingEnded(Event):
    """Rank 0's last line: how it meant to end. The supervisor's terminal event follows."""

    kind: Literal["training_ended"] = "training_ended"
    outcome: Literal["finished", "stopped"]
    step: int


class Finished(Event):
    kind: Literal["finished"] = "finished"
    step: int = 0
    seconds: float = 0.0


class Stopped(Event):
    kind: Literal["stopped"] = "stopped"
    step: int = 0
    seconds: float = 0.0


class Failed(Event):
    """How a run died: one line in `reason`, the evidence beside it."""

    kind: Literal["failed"] = "failed"
    reason: str
    code: int | None = None
    signal: str | None = None
    out_of_memory: bool = False
    oom_evidence: str | None = None
    rank: int | None = None
    step: int | None = None
    log_tail: list[str] = []


AnyEvent = Annotated[
    Started
    | Stage
    | Metric
    | Samples
    | CoefficientChanged
    | RewardReplaced
    | Previewed
    | ControlAcknowledged
    | ControlRefused
    | Paused
    | Resumed
    | CheckpointSaved
    | ModelSaved
    | DataSaved
    | Notice
    | Result
    | TrainingEnded
    | Finished
    | Stopped
    | Failed,
    Field(discriminator="kind"),
]
_ADAPTER: TypeAdapter[AnyEvent] = TypeAdapter(AnyEvent)


def parse_event(line: str | bytes | dict[str, Any]) -> AnyEvent:
    """One event from its JSON line or its dict."""
    return _ADAPTER.validate_python(line) if isinstance(line, dict) else _ADAPTER.validate_json(line)
