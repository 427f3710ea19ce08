"""What is asked of a run and not in force yet: said when it is read, and again when something takes its place."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_nb.errors import RewardError
from rlhf_nb.methods.base import LiveCoefficient
from rlhf_nb.protocol.control import Control, SetCoefficient, SetReward
from rlhf_nb.protocol.events import CoefficientChanged, RewardReplaced, parse_event
from rlhf_nb.protocol.fold import RunFold
from rlhf_nb.protocol.spec import NamedReward
from rlhf_nb.training.control import BoundCoefficient, ControlLoop


class Asked:
    """A live coefficient of the rollout and one of the loss, with what people ask of them."""

    def __init__(self, **restarted: Any) -> None:
        self.values = {"kl_coef": 0.05, "learning_rate": 1e-4}
        self.lines: list[dict[str, Any]] = []
        self.fold = RunFold()
        self.loop = ControlLoop(self, self.emit, **restarted)  # type: ignore[arg-type]
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


def in_force(run: Asked, last: int) -> list[tuple[str, int]]:
    """Ids of changes with their steps, where every third step begins a rollout."""
    for step in range(11, last + 1):
        run.loop.boundary(step, rollout=step % 3 == 2)
    return [(change.id, change.effective_step) for change in run.fold.changes]


def recorded(name: str, step: int) -> CoefficientChanged:
    return CoefficientChanged(id="old", name=name, old=0.05, new=0.001, effective_step=step, who="me", seq=5)


@pytest.mark.parametrize("name", ["kl_coef", "learning_rate"])
def test_what_a_person_sets_after_a_restart_is_not_overridden_by_what_came_later_before_it(name):
    run = Asked(replay=[recorded(name, 17)])
    run.ask(SetCoefficient(id="new", name=name, value=0.5))
    assert in_force(run, 20) == [("new", 11)] and run.values[name] == 0.5


def test_what_was_let_go_later_before_a_restart_does_not_take_back_what_a_person_sets_after_it():
    run = Asked(replay=[recorded("learning_rate", 17), recorded("kl_coef", 18)])
    run.loop.holds = {"kl_coef": "learning_rate"}
    run.ask(SetCoefficient(id="new", name="kl_coef", value=0.5))
    assert in_force(run, 20) == [("new", 11)]


def test_a_set_that_was_read_before_the_restart_comes_after_what_was_in_force_then():
    run = Asked(replay=[recorded("kl_coef", 14)], asked={"pending": 16})
    run.ask(SetCoefficient(id="pending", name="kl_coef", value=0.5))
    assert in_force(run, 20) == [("old", 14), ("pending", 14)] and run.values["kl_coef"] == 0.5
    # Read at 12, it had overtaken what an attempt before that one had come to at 14.
    run = Asked(replay=[recorded("kl_coef", 14)], asked={"pending": 12})
    run.ask(SetCoefficient(id="pending", name="kl_coef", value=0.5))
    assert in_force(run, 20) == [("pending", 11)]


def test_a_reward_that_a_person_puts_in_after_a_restart_stays_and_one_that_cannot_be_put_in_leaves_the_old_one():
    def replaced(control: Any, step: int) -> RewardReplaced:
        if control.reward.name == "broken":
            raise RewardError("it does not load")
        return RewardReplaced(id=control.id, part="rm", old="a", new=control.reward, shift=0.0, effective_step=step)

    old = replaced(SetReward(id="old", part="rm", reward=NamedReward(name="regex")), 17)
    stood: list[str] = []
    for name, stays in (("toy-true", ["new"]), ("broken", ["old"])):
        run = Asked(replay=[old])
        again = SimpleNamespace(refusal=lambda _: None, replace=replaced, again=lambda change: stood.append(change.id))
        run.loop.rewards = again
        run.ask(SetReward(id="new", part="rm", reward=NamedReward(name=name)))
        in_force(run, 20)
        assert [change.id for change in run.fold.rewards] == stays
    assert stood == ["old"]
