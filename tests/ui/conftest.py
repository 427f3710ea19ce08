"""A run whose events a test writes: the interface of `rlhf_nb.run.Run`, with no compute behind it."""

from __future__ import annotations

import itertools
import math
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from rlhf_nb.errors import UnavailableError
from rlhf_nb.protocol.events import (
    AnyEvent,
    Coefficient,
    CoefficientChanged,
    Metric,
    Paused,
    Prediction,
    Previewed,
    Resumed,
    SampleItem,
    Samples,
    Started,
    TrainingEnded,
)
from rlhf_nb.protocol.fold import RunFold


class _Subscription:
    def __init__(self, run: ReplayedRun, callback: Callable) -> None:
        self._run, self._callback = run, callback

    def close(self) -> None:
        with self._run.lock:
            self._run.callbacks = [each for each in self._run.callbacks if each is not self._callback]


class _Pending:
    def __init__(self, control_id: str) -> None:
        self.id = control_id


class ReplayedRun:
    """Events by `emit`; `set` takes effect at the next step, as in a real run."""

    def __init__(self, run_id: str = "ppo-7", **started: Any) -> None:
        self.id, self.lock = run_id, threading.RLock()
        self.log: list[AnyEvent] = []
        self.callbacks: list[Callable] = []
        self._seq, self._ids = itertools.count(1), itertools.count(1)
        self._asked: list[tuple[str, str, float, str]] = []
        self._asked_ops: list[str] = []
        self.fold = RunFold()
        self.started = started

    class spec:  # noqa: N801 - an attribute of the interface, not a class to use
        title, method = "toy-sft → rm-2", "ppo"

    @property
    def state(self) -> str:
        return self.fold.state

    def emit(self, *events: AnyEvent) -> None:
        with self.lock:
            for event in events:
                event.seq, event.t = next(self._seq), event.t or time.time()
                self.fold.add(event)
            self.log.extend(events)
            callbacks = list(self.callbacks)
        for callback in callbacks:
            callback(list(events))

    def start(self, **fields: Any) -> None:
        fields = (
            {
                "world_size": 1,
                "device": "CPU, 2 threads",
                "max_steps": 400,
                "coefficients": [learning_rate()],
            }
            | self.started
            | fields
        )
        self.emit(Started(**fields))

    def step(self, step: int, **values: float) -> None:
        """One optimizer step; what was asked comes into effect before it."""
        with self.lock:
            asked, self._asked = self._asked, []
        for control_id, name, value, why in asked:
            old = self.fold.coefficients[name].value
            self.emit(
                CoefficientChanged(
                    id=control_id, name=name, old=old, new=value, effective_step=step, who="alice", why=why
                )
            )
        named = {name.replace("__", "/"): value for name, value in values.items()}
        self.emit(Metric(step=step, max_steps=400, values=named))

    # -- the interface -------------------------------------------------------------------------------------------------

    def subscribe(self, callback: Callable, since: int = 0) -> _Subscription:
        with self.lock:
            past = [event for event in self.log if event.seq > since]
            self.callbacks.append(callback)
        if past:
            callback(past)
        return _Subscription(self, callback)

    def events(self, since: int = 0) -> list[AnyEvent]:
        with self.lock:
            return [event for event in self.log if event.seq > since]

    def set(self, name: str, value: float, why: str = "") -> _Pending:
        live = self.fold.coefficients[name]
        if live.unavailable_reason:
            raise UnavailableError(f"{self.id}: {name}: {live.unavailable_reason}")
        control_id = f"control-{next(self._ids)}"
        with self.lock:
            self._asked.append((control_id, name, value, why))
        return _Pending(control_id)

    def preview(self, name: str, value: float, *, values: Sequence[float]) -> _Pending:
        """Answered before the call returns, as a run on this machine may do."""
        live = self.fold.coefficients[name]
        predictions = [Prediction(value=one, reward=1.0, kl=2.0, effective=8.0) for one in values]
        self.emit(
            Previewed(
                id="the-preview", name=name, step=self.fold.step, now=live.value, reward=0.5, kl=1.0, prompts=8,
                samples=16, predictions=predictions,
            )
        )  # fmt: skip
        return _Pending("the-preview")

    def pause(self) -> _Pending:
        self.emit(Paused(step=self.fold.step))
        return _Pending("pause")

    def resume(self) -> _Pending:
        self.emit(Resumed(step=self.fold.step))
        return _Pending("resume")

    def stop(self) -> _Pending:
        self.emit(TrainingEnded(outcome="stopped", step=self.fold.step))
        return _Pending("stop")

    def checkpoint(self) -> _Pending:
        return _Pending("checkpoint")

    def log_tail(self, lines: int) -> list[str]:
        return [f"step {row.step}: ok" for row in self.fold.rows[-lines:]]


def learning_rate(value: float = 1e-4) -> Coefficient:
    return Coefficient(
        name="learning_rate", low=1e-8, high=1e-1, scale="log", value=value, unit="1/step", meaning="Step size."
    )


def ppo_step(run: ReplayedRun, step: int, chance: random.Random) -> None:
    """A step of a run that learns, drifts and in the end over-optimises."""
    done = step / 400
    kl = 14 * done**1.1 * (0.9 + 0.2 * chance.random())
    run.step(
        step,
        reward__mean=1.4 * (1 - math.exp(-4 * done)) + chance.gauss(0, 0.06),
        gold__mean=1.1 * (1 - math.exp(-5 * done)) - 0.9 * done**2 + chance.gauss(0, 0.06),
        kl__policy_reference=kl,
        loss=0.7 * math.exp(-3 * done) + 0.05 * chance.random(),
        policy__entropy=2.2 - 1.1 * done + chance.gauss(0, 0.03),
        completion__length_mean=18 + 9 * done + chance.gauss(0, 1),
        optimizer__learning_rate=run.fold.coefficients["learning_rate"].value * (1 - done),
        optimizer__grad_norm=1 + chance.random(),
        time__step_s=0.24 + 0.02 * chance.random(),
    )


def samples(step: int, n: int = 6) -> Samples:
    items = [
        SampleItem(
            prompt=f"Where is the bakery, and when does it open? ({number})",
            reference_completion="The bakery is in Mill Lane. I think it opens at some time in the morning, maybe.",
            completion="The bakery is in Mill Lane, beside the bridge. It opens at seven, and the bread is warm.",
            score=0.4 + 0.1 * number,
            reference_score=0.2,
            gold=0.7,
            reference_gold=0.3,
            length=21 + number,
            kl=3.2 + 0.4 * number,
        )
        for number in range(n)
    ]
    return Samples(step=step, items=items)


@pytest.fixture
def run() -> ReplayedRun:
    return ReplayedRun()


@pytest.fixture
def chance() -> random.Random:
    return random.Random(0)


@pytest.fixture
def ppo(run: ReplayedRun, chance: random.Random) -> Callable[[int], ReplayedRun]:
    """A PPO run with so many steps."""

    def make(steps: int) -> ReplayedRun:
        run.start(has_reference=True, coefficients=[learning_rate()])
        for step in range(1, steps + 1):
            ppo_step(run, step, chance)
        return run

    return make


@pytest.fixture(name="samples")
def _samples() -> Callable[..., Samples]:
    return samples
