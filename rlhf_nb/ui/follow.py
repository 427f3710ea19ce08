"""A run as its panel sees it: the fold of its events, what was asked and is not yet in effect, and the header line."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from rlhf_nb.protocol.events import AnyEvent, Samples
from rlhf_nb.protocol.fold import MetricRow, RunFold
from rlhf_nb.protocol.widget import Change, Controls, HumanPoint, Slider, Status

SPEED_WINDOW_S = 20.0
SHOWN_CHANGES = 200


@dataclass
class Asked:
    control_id: str
    value: float


@dataclass
class Follower:
    """Thread-safe: events come from the client's thread, questions from the kernel's threads."""

    run_id: str
    title: str = ""
    method: str = ""
    fold: RunFold = field(default_factory=RunFold)
    asked: dict[str, Asked] = field(default_factory=dict)
    """By this panel. The run itself says what others asked, and what was asked before this panel was made."""
    human: dict[int, HumanPoint] = field(default_factory=dict)
    metrics: list[str] = field(default_factory=list)
    """In the order they were first seen."""
    lock: threading.RLock = field(default_factory=threading.RLock)

    def take(self, events: Iterable[AnyEvent]) -> list[AnyEvent]:
        """Fold events in; those that were new."""
        with self.lock:
            fresh = [event for event in events if self.fold.add(event)]
            for event in fresh:
                if event.kind == "metric":
                    self.metrics.extend(name for name in event.values if name not in self.metrics)
                elif event.kind == "coefficient_changed":
                    self._settle(event.id)
                elif event.kind == "control_refused":
                    self._settle(event.id)
                elif event.kind in ("finished", "stopped", "failed"):
                    self.asked.clear()
            return fresh

    def ask(self, name: str, control_id: str, value: float) -> None:
        """Remember what was asked until the run uses it or refuses; the run may have been faster than this call."""
        with self.lock:
            done = control_id in self.fold.refused or any(change.id == control_id for change in self.fold.changes)
            if not done and not self.fold.is_terminal:
                self.asked[name] = Asked(control_id, value)

    def _settle(self, control_id: str) -> None:
        self.asked = {name: asked for name, asked in self.asked.items() if asked.control_id != control_id}

    def rows(self, first: int) -> tuple[int, list[MetricRow], list[str]]:
        """Generation, rows from `first` on, and every metric's name."""
        with self.lock:
            return self.fold.generation, self.fold.rows[first:], list(self.metrics)

    def newest_samples(self, step: int | None = None) -> Samples | None:
        """What was sampled at a step, by default the last: the run's own, then what people asked for."""
        with self.lock:
            at = step if step is not None else next(reversed(self.sample_steps()), None)
            found = [samples for samples in self.fold.samples if samples.items and samples.step == at]
            own = [samples for samples in found if samples.request_id is None][-1:]
            shown = own + [samples for samples in found if samples.request_id is not None]
            if not shown:
                return None
            items = [item for samples in shown for item in samples.items]
            return shown[0].model_copy(update={"items": items, "seq": max(samples.seq for samples in shown)})

    def drawn_samples(self) -> Samples | None:
        """The run's own newest: a win rate is not of prompts that somebody picked."""
        with self.lock:
            own = (samples for samples in reversed(self.fold.samples) if samples.items and samples.request_id is None)
            return next(own, None)

    def sample_steps(self) -> list[int]:
        with self.lock:
            return list(dict.fromkeys(samples.step for samples in self.fold.samples if samples.items))

    def status(self, state: str, *, watching: int = 0, trouble: str = "") -> Status:
        """The header.

        Args:
            state: what the run says of itself where its events do not: waiting or starting.
        """
        with self.lock:
            fold, now = self.fold, time.time()
            speed = steps_per_second(fold.rows) if fold.state == "running" else None
            left = fold.max_steps - fold.step if fold.max_steps else None
            end = fold.ended_at or now
            started = fold.started
            return Status(
                run_id=self.run_id,
                title=self.title,
                method=self.method,
                state=fold.state if fold.state != "waiting" else state,
                stage=fold.stage if not fold.is_terminal else "",
                step=fold.step,
                max_steps=fold.max_steps,
                steps_per_s=speed,
                eta_s=left / speed if speed and left is not None else None,
                seconds=max(0.0, end - fold.started_at) if fold.started_at else None,
                attempt=fold.attempt,
                device=started.device if started else "",
                world_size=started.world_size if started else None,
                warm=bool(started and started.warm),
                watching=watching,
                has_reference=bool(started and started.has_reference),
                failure=_failure(fold),
                failure_log=fold.failure.log_tail[-12:] if fold.failure else [],
                trouble=trouble,
                notices=[notice.text for notice in fold.notices[-3:]],
                checkpoint_step=fold.checkpoints[-1].step if fold.checkpoints else None,
                model_saved=fold.model is not None,
                rows=len(fold.rows),
                generation=fold.generation,
                now=now,
            )

    def controls(self) -> Controls:
        with self.lock:
            fold = self.fold
            sliders = [
                Slider(
                    **coefficient.model_dump(include=set(Slider.model_fields) - {"asked"}),
                    asked=self._asked(name),
                )
                for name, coefficient in fold.coefficients.items()
            ]
            newest = self.drawn_samples()
            return Controls(
                sliders=sliders,
                changes=[self._change(change) for change in fold.changes[-SHOWN_CHANGES:]],
                human=[self.human[step] for step in sorted(self.human)],
                sample_steps=self.sample_steps(),
                can_label=newest is not None and any(item.reference_completion is not None for item in newest.items),
            )

    def _asked(self, name: str) -> float | None:
        # What was asked here may not have been read yet; once it is, the two agree, or the run refused one of them.
        asked = self.asked.get(name) or self.fold.asked.get(name)
        return asked.value if asked is not None else None

    def _change(self, change: Any) -> Change:
        return Change(
            id=change.id,
            name=change.name,
            old=change.old,
            new=change.new,
            step=change.effective_step,
            who=change.who,
            why=change.why,
            t=change.t,
            cell="" if change.follows else set_cell(self.run_id, change.name, change.new),
            follows=change.follows,
        )


def steps_per_second(rows: list[MetricRow]) -> float | None:
    """Over the last seconds of rows, so that a pause or a slow start does not linger."""
    if len(rows) < 2:
        return None
    last = rows[-1]
    first = last
    for row in reversed(rows):
        if last.t - row.t > SPEED_WINDOW_S:
            break
        first = row
    if first is last:
        first = rows[-2]
    return (last.step - first.step) / (last.t - first.t) if last.t > first.t and last.step > first.step else None


def set_cell(run_id: str, name: str, value: float) -> str:
    return f"%rlhf set {run_id} {name}={value:.6g}"


def preview_cell(run_id: str, name: str, value: float) -> str:
    return f"%rlhf preview {run_id} {name}={value:.6g}"


def _failure(fold: RunFold) -> str:
    if fold.failure is None:
        return ""
    failure = fold.failure
    text = failure.reason
    if failure.out_of_memory and "memory" not in text:
        text += " (out of memory)"
    return text
