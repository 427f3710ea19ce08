"""Fold of a run's events into what a person sees: state, metrics, coefficients, interventions.

One fold serves the panel, `run.metrics()`, `%rlhf` and the supervisor, so that none of them can disagree.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rlhf_nb.protocol.events import (
    TERMINAL,
    AnyEvent,
    CheckpointSaved,
    Coefficient,
    CoefficientChanged,
    ControlAcknowledged,
    ControlRefused,
    DataSaved,
    Failed,
    Finished,
    Metric,
    ModelSaved,
    Notice,
    Paused,
    Previewed,
    Result,
    Resumed,
    RewardReplaced,
    Samples,
    Stage,
    Started,
    State,
    Stopped,
    TrainingEnded,
)


@dataclass
class MetricRow:
    """One metric event that no later attempt superseded."""

    seq: int
    t: float
    step: int
    rollout: int | None
    values: dict[str, float]


@dataclass
class RunFold:
    state: State = "waiting"
    stage: str = ""
    last_seq: int = 0
    step: int = 0
    max_steps: int | None = None
    attempt: int = 1
    started_at: float | None = None
    ended_at: float | None = None
    started: Started | None = None
    rows: list[MetricRow] = field(default_factory=list)
    generation: int = 0
    """Grows when rows were superseded by a restart: a view that holds older rows must take a fresh snapshot."""
    coefficients: dict[str, Coefficient] = field(default_factory=dict)
    """By name, with the value in effect."""
    changes: list[CoefficientChanged] = field(default_factory=list)
    previews: dict[str, Previewed] = field(default_factory=dict)
    """By the id of the control that asked."""
    rewards: list[RewardReplaced] = field(default_factory=list)
    """Rewards that took the place of others."""
    samples: list[Samples] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)
    checkpoints: list[CheckpointSaved] = field(default_factory=list)
    result: Result | None = None
    results: list[Result] = field(default_factory=list)
    model: ModelSaved | None = None
    data: DataSaved | None = None
    """The rows it made."""
    acknowledged: dict[str, int] = field(default_factory=dict)
    """Control id → step at which it was read."""
    refused: dict[str, str] = field(default_factory=dict)
    """Control id → reason."""
    asked: dict[str, ControlAcknowledged] = field(default_factory=dict)
    """By name: a value that was read and is not in force yet."""
    failure: Failed | None = None
    held: str = ""
    """Why the run has paused by itself, until it goes on."""
    outcome: str | None = None

    @property
    def is_terminal(self) -> bool:
        return self.state in TERMINAL

    def add(self, event: AnyEvent) -> bool:
        """Take one event; False where it was already taken (events are idempotent on `seq`)."""
        if event.seq <= self.last_seq:
            return False
        self.last_seq = event.seq
        match event:
            case Started():
                self._start(event)
            case Stage():
                self.stage = event.text
            case Metric():
                self._metric(event)
            case Samples():
                self.samples.append(event)
            case CoefficientChanged():
                self.changes.append(event)
                self._settle(event.id)
                if event.name in self.coefficients:
                    self.coefficients[event.name] = self.coefficients[event.name].model_copy(
                        update={"value": event.new}
                    )
            case Previewed():
                self.previews[event.id] = event
            case RewardReplaced():
                self.rewards.append(event)
            case ControlAcknowledged():
                self.acknowledged[event.id] = event.step
                if event.name is not None and event.value is not None:
                    self.asked[event.name] = event
            case ControlRefused():
                self.refused[event.id] = event.reason
                self._settle(event.id)
            case Paused():
                self.state = "paused"
            case Resumed():
                self._resume(event)
            case CheckpointSaved():
                self.checkpoints.append(event)
            case ModelSaved():
                self.model = event
            case DataSaved():
                self.data = event
            case Notice():
                self.notices.append(event)
                if event.code == "not_finite":
                    self.held = event.text
            case Result():
                self.result = event
                self.results.append(event)
            case TrainingEnded():
                self.outcome = event.outcome
            case Finished() | Stopped() | Failed():
                self.state = event.kind
                self.ended_at = event.t
                # A restart reads what was not in force again, and acknowledges it again.
                self.asked = {}
                self.failure = event if isinstance(event, Failed) else None
        return True

    def _settle(self, control_id: str) -> None:
        self.asked = {name: asked for name, asked in self.asked.items() if asked.id != control_id}

    def _start(self, event: Started) -> None:
        self.state = "running"
        self.failure, self.outcome, self.ended_at = None, None, None
        self.started, self.attempt, self.max_steps = event, event.attempt, event.max_steps
        self.started_at = self.started_at or event.t
        self.coefficients = {c.name: c for c in event.coefficients}

    def _metric(self, event: Metric) -> None:
        self.step = max(self.step, event.step) if self.rows else event.step
        self.max_steps = event.max_steps or self.max_steps
        values = {k: float("nan") if v is None else v for k, v in event.values.items()}
        self.rows.append(MetricRow(event.seq, event.t, event.step, event.rollout, values))
        if (used := values.get("objective/kl_coef")) is not None and "kl_coef" in self.coefficients:
            # A controller moves it without asking; the metric says what the rollout used.
            self.coefficients["kl_coef"] = self.coefficients["kl_coef"].model_copy(update={"value": used})

    def _resume(self, event: Resumed) -> None:
        self.state = "running"
        self.attempt = event.attempt
        self.held = ""
        if event.from_step is None:
            return
        if self.started is None or self.started.attempt < event.attempt:
            # Restarted, and perhaps behind other runs: whether it waits or starts is its supervisor's to say.
            self.state = "waiting"
        self.failure, self.outcome, self.ended_at = None, None, None
        kept = [row for row in self.rows if row.step <= event.from_step]
        if len(kept) != len(self.rows):
            self.rows, self.generation = kept, self.generation + 1
        self.changes = [change for change in self.changes if change.effective_step <= event.from_step]
        self.rewards = [change for change in self.rewards if change.effective_step <= event.from_step]
        self.samples = [sample for sample in self.samples if sample.step <= event.from_step]
        self.step = event.from_step

    def table(self) -> list[dict[str, Any]]:
        """One dict a step, every metric of that step merged; the last write wins."""
        steps: dict[int, dict[str, Any]] = {}
        for row in self.rows:
            merged = steps.setdefault(row.step, {"step": row.step})
            if row.rollout is not None:
                merged["rollout"] = row.rollout
            merged.update(row.values)
        return [steps[step] for step in sorted(steps)]
