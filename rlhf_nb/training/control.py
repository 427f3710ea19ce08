"""The one place that polls control and applies it: between optimizer steps, the same on every rank."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import ValidationError

from rlhf_nb.errors import RlhfError
from rlhf_nb.protocol.control import (
    AnyControl,
    Pause,
    Preview,
    Resume,
    Sample,
    SaveCheckpoint,
    SetCoefficient,
    SetReward,
    Stop,
    parse_control,
)
from rlhf_nb.protocol.events import (
    Coefficient,
    CoefficientChanged,
    ControlAcknowledged,
    ControlRefused,
    Paused,
    Resumed,
    RewardReplaced,
)
from rlhf_nb.protocol.spec import describe

if TYPE_CHECKING:
    from rlhf_nb.compute.rundir import LineTail
    from rlhf_nb.methods.base import LiveCoefficient

POLL_WHILE_PAUSED_S = 0.05


def of(asked: SetCoefficient | CoefficientChanged | SetReward | RewardReplaced) -> tuple[str, str]:
    """What a set, or the change that came of one, is a set of."""
    return ("reward", asked.part) if isinstance(asked, SetReward | RewardReplaced) else ("coefficient", asked.name)


class RewardSlots(Protocol):
    """A run's reward, part by part."""

    def refusal(self, control: SetReward) -> str | None: ...

    def replace(self, control: SetReward, step: int) -> RewardReplaced: ...

    def again(self, change: RewardReplaced) -> None: ...


@dataclass
class BoundCoefficient:
    """A live coefficient tied to the attribute that the loss really reads."""

    coefficient: LiveCoefficient
    read: Callable[[], float]
    write: Callable[[float], None]
    unavailable_reason: str | None = None
    waits: Callable[[], bool] | None = None
    """Whether nothing reads it yet at the boundary that has come."""

    def enters_now(self, rollout: bool) -> bool:
        """
        Args:
            rollout: A new one starts at the boundary.
        """
        return (rollout or self.coefficient.enters == "update") and not (self.waits is not None and self.waits())

    def describe(self, method: Any) -> Coefficient:
        described = self.coefficient.describe(self.read(), method)
        if self.unavailable_reason:
            return described.model_copy(update={"unavailable_reason": self.unavailable_reason})
        return described


class ControlLoop:
    """Reads `control.jsonl` on rank 0, broadcasts, and applies on every rank at the boundary before a step.

    A method calls `boundary(step)` on every rank before each optimizer step. A coefficient of the loss is written there
    and is in force at that step; a coefficient of the rollout waits for `boundary(step, rollout=True)`, the first step
    of a rollout.
    """

    def __init__(
        self,
        tail: LineTail | None,
        emit: Callable[[Any], None],
        *,
        broadcast: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] | None = None,
        seen: frozenset[str] = frozenset(),
        values: Mapping[str, float] | None = None,
        replay: Sequence[CoefficientChanged | RewardReplaced] = (),
        asked: Mapping[str, int] | None = None,
    ) -> None:
        """
        Args:
            tail: Reader of control.jsonl on rank 0, None elsewhere.
            broadcast: Given rank 0's list of control dicts, returns the same list on every rank. None for one process.
            seen: Ids of lines that an earlier attempt already acted on.
            values: Of a restarted run: what its coefficients were at the checkpoint, written when they are bound.
            replay: Of a restarted run: changes that came into force after the checkpoint, in their order. Each is made
                again at the step that its event names, whoever asked for it and wherever its line stands; unless by
                then a person has asked for something else.
            asked: Of a restarted run: ids of sets that an earlier attempt read and that were not in force yet, with the
                step at which it did. Changes from before that step come first again.
        """
        self._values = dict(values or {})
        self._tail, self._emit, self._broadcast, self._seen = tail, emit, broadcast, set(seen)
        self._bound: dict[str, BoundCoefficient] = {}
        self._waiting: dict[str, SetCoefficient] = {}
        self._waiting_reward: dict[str, SetReward] = {}
        self._replay, self._asked = list(replay), dict(asked or {})
        self.stopping = False
        self.paused = False
        self.checkpoint_requested: list[str] = []
        """Ids of checkpoint requests that the trainer has yet to serve."""
        self.sample_requests: list[Sample] = []
        self.preview_requests: list[Preview] = []

    def bind(self, coefficients: list[BoundCoefficient]) -> None:
        self._bound = {bound.coefficient.name: bound for bound in coefficients}
        for name, value in self._values.items():
            if name in self._bound and not self._bound[name].unavailable_reason:
                self._bound[name].write(value)

    def describe(self, method: Any) -> list[Coefficient]:
        return [bound.describe(method) for bound in self._bound.values()]

    def boundary(self, step: int, *, rollout: bool = True) -> None:
        """Poll, acknowledge and apply before optimizer step `step` (counted from 1). Blocks while paused.

        Args:
            rollout: True where a new rollout starts at this step (always, for methods without rollouts).
        """
        self._take(step)
        if self.paused and not self.stopping:
            with self.around_pause():
                self._wait(step)
        if self.checkpoint_requested and self.on_checkpoint is not None:
            self.on_checkpoint()
        self._make_again(step, rollout)
        self._apply(step, rollout)

    on_idle: Callable[[], None] | None = None
    """Set by a trainer that can serve checkpoint and sample requests while paused."""
    on_checkpoint: Callable[[], None] | None = None
    """Set by a trainer whose checkpoints hold what coefficients are: those of step S are then taken before anything
    comes into force at S + 1, and a restart from there makes it anew."""
    on_change: Callable[[CoefficientChanged], None] | None = None
    """Called after a coefficient that a person asked for was written."""
    preview_refusal: Callable[[], str | None] | None = None
    """Set by a trainer that can say where a coefficient would lead; gives the reason where it cannot."""
    holds: Mapping[str, str] = MappingProxyType({})
    """Set by a trainer: a set of the first coefficient also decides on the second, a controller of it."""
    rewards: RewardSlots | None = None
    """Set by a trainer whose reward can be replaced between two rollouts."""
    around_pause: Callable[[], AbstractContextManager[None]] = nullcontext
    """Set by a trainer that keeps pauses out of its step times."""

    def _wait(self, step: int) -> None:
        self._emit(Paused(step=step - 1))
        while self.paused and not self.stopping:
            time.sleep(POLL_WHILE_PAUSED_S)
            self._take(step)
            # A checkpoint or sample asked for during the pause must not wait for its end.
            if self.on_idle is not None and (
                self.checkpoint_requested or self.sample_requests or self.preview_requests
            ):
                self.on_idle()
        if not self.stopping:
            self._emit(Resumed(step=step - 1))

    def _poll(self) -> list[AnyControl]:
        lines: list[dict[str, Any]] = []
        if self._tail is not None:
            lines = [line for line in self._tail.read() if line.get("id") not in self._seen]
        if self._broadcast is not None:
            lines = self._broadcast(lines)
        return [control for line in lines if (control := self._parse(line)) is not None]

    def _parse(self, line: dict[str, Any]) -> AnyControl | None:
        """A line that this version cannot read is refused: a newer notebook must not end a run."""
        try:
            return parse_control(line)
        except ValidationError as error:
            reason = f"this run cannot read it ({error.errors()[0]['msg'].lower()})"
            self._emit(ControlRefused(id=str(line.get("id", "")), op=str(line.get("op", "?")), reason=reason))
            return None

    def _take(self, step: int) -> None:
        for control in self._poll():
            self._seen.add(control.id)
            name, value = None, None
            match control:
                case SetCoefficient():
                    reason = self._refusal(control)
                    if reason:
                        self._emit(ControlRefused(id=control.id, op=control.op, reason=reason))
                        continue
                    what = f"{control.name}={control.value:g}"
                    self._supersede(self._waiting.get(control.name), what, control.who)
                    self._waiting[control.name] = control
                    name, value = control.name, control.value
                case SetReward():
                    reason = self.rewards.refusal(control) if self.rewards else "this run optimises no reward"
                    if reason:
                        self._emit(ControlRefused(id=control.id, op=control.op, reason=reason))
                        continue
                    what = f"reward {describe(control.reward)}"
                    self._supersede(self._waiting_reward.get(control.part), what, control.who)
                    self._waiting_reward[control.part] = control
                case Pause():
                    self.paused = True
                case Resume():
                    self.paused = False
                case Stop():
                    self.stopping = True
                case SaveCheckpoint():
                    self.checkpoint_requested.append(control.id)
                case Sample():
                    self.sample_requests.append(control)
                case Preview():
                    reason = self.preview_refusal() if self.preview_refusal else "this method has nothing to preview"
                    if not reason and not self._can_preview(control.name):
                        reason = f'"{control.name}" cannot be previewed'
                    if reason:
                        self._emit(ControlRefused(id=control.id, op=control.op, reason=reason))
                        continue
                    self.preview_requests.append(control)
            self._emit(ControlAcknowledged(id=control.id, op=control.op, step=step, name=name, value=value))

    def _supersede(self, earlier: SetCoefficient | SetReward | None, what: str, who: str) -> None:
        """Of two sets at one boundary the later one comes into force; whoever waits for the first hears it."""
        if earlier is not None:
            reason = f"superseded by a later set, {what}" + (f" by {who}" if who else "")
            self._emit(ControlRefused(id=earlier.id, op=earlier.op, reason=reason))

    def _can_preview(self, name: str) -> bool:
        bound = self._bound.get(name)
        return bound is not None and bound.coefficient.can_preview

    def _refusal(self, control: SetCoefficient) -> str | None:
        bound = self._bound.get(control.name)
        if bound is None:
            return f'"{control.name}" is not live in this run; live: {", ".join(self._bound) or "nothing"}'
        live = bound.coefficient
        if bound.unavailable_reason:
            return bound.unavailable_reason
        if not math.isfinite(control.value) or not live.low <= control.value <= live.high:
            return f"{control.name}={control.value:g} is outside {live.low:g} to {live.high:g}"
        return None

    def _apply(self, step: int, rollout: bool) -> None:
        if rollout and self.rewards is not None:
            for wanted in list(self._waiting_reward.values()):
                if self._comes_later(wanted):
                    continue
                del self._waiting_reward[wanted.part]
                try:
                    self._emit(self.rewards.replace(wanted, step))
                    self._overtake(wanted)
                except RlhfError as error:
                    self._emit(ControlRefused(id=wanted.id, op=wanted.op, reason=str(error).splitlines()[0]))
        for name, control in list(self._waiting.items()):
            bound = self._bound[name]
            if not bound.enters_now(rollout) or self._comes_later(control):
                continue
            del self._waiting[name]
            self._overtake(control)
            self._write(bound, control.value, step, id=control.id, who=control.who, why=control.why)

    def _comes_later(self, control: SetCoefficient | SetReward) -> bool:
        """Whether a change is yet to be made again that was in force before the control was read."""
        since = self._asked.get(control.id, 0)
        return any(of(change) == of(control) and change.effective_step < since for change in self._replay)

    def _overtake(self, control: SetCoefficient | SetReward) -> None:
        """It comes into force: what an earlier attempt had come to afterwards does not come back."""
        gone = {of(control), ("coefficient", self.holds.get(getattr(control, "name", ""), ""))}
        self._replay = [change for change in self._replay if of(change) not in gone]

    def _make_again(self, step: int, rollout: bool) -> None:
        for change in list(self._replay):
            if isinstance(change, RewardReplaced):
                if rollout and change.effective_step <= step and self.rewards is not None:
                    self._replay.remove(change)
                    self.rewards.again(change)
                    self._emit(change.model_copy(update={"seq": 0, "t": 0.0}))
                continue
            bound = self._bound.get(change.name)
            if change.effective_step > step or (bound is not None and not bound.enters_now(rollout)):
                continue
            self._replay.remove(change)
            if bound is not None:
                self._write(bound, change.new, step, id=change.id, who=change.who, why=change.why)

    def _write(self, bound: BoundCoefficient, value: float, step: int, *, id: str, who: str, why: str) -> None:
        old = bound.read()
        bound.write(value)
        name = bound.coefficient.name
        change = CoefficientChanged(id=id, name=name, old=old, new=value, effective_step=step, who=who, why=why)
        self._emit(change)
        if self.on_change is not None:
            self.on_change(change)
