"""The frozen context a method trains in: spec, models, rows, emit, control. No Jupyter, no path but the run's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_nb.compute.rundir import EventWriter
from rlhf_nb.methods.base import Method
from rlhf_nb.protocol.events import AnyEvent, Metric, Notice, SampleItem, Samples, Stage
from rlhf_nb.protocol.spec import RunSpec
from rlhf_nb.training.control import ControlLoop


class Emitter:
    """Writes events on rank 0; does nothing on the others, so that every rank runs the same code."""

    def __init__(self, writer: EventWriter | None, max_steps: int | None = None) -> None:
        self._writer, self.max_steps = writer, max_steps

    def event(self, event: AnyEvent) -> None:
        if self._writer is not None:
            self._writer.write(event)

    def metric(self, step: int, values: dict[str, float], *, rollout: int | None = None) -> None:
        """Numbers of an optimizer step. JSON has no NaN: a number that is not finite travels as None with its text."""
        if self._writer is None:
            return
        finite = {k: float(v) if math.isfinite(v) else None for k, v in values.items()}
        odd = {k: str(float(v)) for k, v in values.items() if not math.isfinite(v)}
        self.event(Metric(step=step, max_steps=self.max_steps, rollout=rollout, values=finite, not_finite=odd))

    def stage(self, text: str) -> None:
        self.event(Stage(text=text))

    def notice(self, code: str, text: str, level: str = "info") -> None:
        self.event(Notice(code=code, text=text, level=level))

    def samples(self, step: int, items: list[SampleItem], request_id: str | None = None) -> None:
        self.event(Samples(step=step, items=items, request_id=request_id))


@dataclass(frozen=True)
class Context:
    spec: RunSpec
    method: Method
    run_dir: Path
    emit: Emitter
    control: ControlLoop
    rows: list[dict[str, Any]]
    """Training rows, of kind `row_kind`."""
    model_path: Callable[[Any], str]
    """ModelRef → local directory that `from_pretrained` takes. Models pass between stages as directories."""
    row_kind: str = ""
    """One of the kinds the method declares; prompts for online methods."""
    mixture: tuple[tuple[int, float], ...] = ()
    """Of rows from several data sets: how many each gave, one after another, and its share of what is drawn."""
    held_out: list[dict[str, Any]] | None = None
    pretraining: list[dict[str, Any]] | None = None
    rank: int = 0
    world_size: int = 1
    use_cpu: bool = True
    attempt: int = 1
    resume_from: Path | None = None
    """Checkpoint directory to continue from."""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def is_main(self) -> bool:
        return self.rank == 0
