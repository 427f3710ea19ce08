"""What is asked of a run and not in force yet: said when it is read, and again when something takes its place."""

from __future__ import annotations

from typing import Any

from rlhf_nb.methods.base import LiveCoefficient
from rlhf_nb.protocol.control import Control, SetCoefficient, SetReward
from rlhf_nb.protocol.events import parse_event
from rlhf_nb.protocol.fold import RunFold
from rlhf_nb.protocol.spec import NamedReward
from rlhf_nb.training.control import BoundCoefficient, ControlLoop


class Asked:
    """A live coefficient of the rollout and one of the loss, with what people ask of them."""

    def __init__(self) -> None:
        self.values = {"kl_coef": 0.05, "learning_rate": 1e-4}
        self.lines: list[dict[str, Any]] = []
        self.fold = RunFold()
        self.loop = ControlLoop(self, self.emit)  # type: ignore[arg-type]
        self.loop.bind([self.bound("kl_coef", "rollout"), self.bound("learning_rate", "update")])

    def bound(self, name: str, enters: Any) -> BoundCoefficient:
        live = LiveCoefficient(name, low=0.0, high=1.0, enters=enters)
        return BoundCoefficient(live, lambda: self.values[name], lambda value: self.values.update({name: value}))

    def emit(self, event: Any) -> None:
        # Through JSON, as a notebook reads it.
        line = event.model_copy(update={"seq": self.fold.last_seq + 1}).model_dump_json()
        self.fold.add(parse_event(line))

    def ask(self, *controls: Control) -> None:
        self.lines += [control.model_dump(mode="json") for control in controls]

    def read(self) -> list[dict[str, Any]]:
        lines, self.lines = self.lines, []
        return lines

    @property
    def asked(self) -> dict[str, float | None]:
        return {name: event.value for name, event in self.fold.asked.items()}


def test_a_value_is_asked_from_when_it_is_read_until_it_is_in_force():
    run = Asked()
    run.ask(SetCoefficient(name="kl_coef", value=0.1))
    run.loop.boundary(2, rollout=False)
    assert run.asked == {"kl_coef": 0.1} and run.values["kl_coef"] == 0.05
    run.loop.boundary(3)
    assert run.asked == {} and run.values["kl_coef"] == 0.1


def test_a_set_that_a_later_one_overtakes_is_refused_and_names_it():
    run = Asked()
    first, second = (SetCoefficient(name="kl_coef", value=value, who="bob") for value in (0.1, 0.2))
    other = SetCoefficient(name="learning_rate", value=1e-3)
    run.ask(first, other)
    run.loop.boundary(2, rollout=False)
    run.ask(second)
    run.loop.boundary(3, rollout=False)
    assert run.fold.refused == {first.id: "superseded by a later set, kl_coef=0.2 by bob"}
    assert run.asked == {"kl_coef": 0.2}
    run.loop.boundary(4)
    assert [change.id for change in run.fold.changes] == [other.id, second.id] and run.asked == {}


def test_a_set_that_is_refused_overtakes_nothing():
    run = Asked()
    run.ask(SetCoefficient(name="kl_coef", value=0.1), SetCoefficient(name="kl_coef", value=7.0))
    run.loop.boundary(2, rollout=False)
    assert run.asked == {"kl_coef": 0.1} and list(run.fold.refused.values()) == ["kl_coef=7 is outside 0 to 1"]


def test_a_reward_that_a_later_one_overtakes_is_refused_and_names_it():
    class Slots:
        def refusal(self, control: SetReward) -> None: ...

    run = Asked()
    run.loop.rewards = Slots()  # type: ignore[assignment]
    first, second = (SetReward(part="rm", reward=NamedReward(name=name)) for name in ("regex", "toy-true"))
    run.ask(first, second)
    run.loop.boundary(2, rollout=False)
    assert run.fold.refused == {first.id: "superseded by a later set, reward toy-true"}


def test_an_old_log_says_of_a_set_only_that_it_was_read():
    line = '{"seq":1,"t":1.0,"kind":"control_acknowledged","id":"a","op":"set","step":3}'
    fold = RunFold()
    fold.add(parse_event(line))
    assert fold.acknowledged == {"a": 3} and fold.asked == {}


def test_what_was_asked_of_a_run_that_ended_is_asked_no_more():
    run = Asked()
    run.ask(SetCoefficient(name="kl_coef", value=0.1))
    run.loop.boundary(2, rollout=False)
    run.fold.add(parse_event('{"seq":99,"kind":"failed","reason":"killed"}'))
    assert run.asked == {}
