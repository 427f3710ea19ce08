"""Waiting for parents, queueing for a turn, standby: what happens before a run computes."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest

from rlhf_nb.compute.client import Client
from rlhf_nb.compute.rundir import ProcessIdentity, RunDir, write_json
from rlhf_nb.compute.standby import Standby
from rlhf_nb.compute.turns import Turns
from rlhf_nb.protocol.control import SetCoefficient, Stop

from .conftest import BLOBS, ended, first_metric, metrics, toy_spec, until


def end_of(client: Client, run_id: str) -> str:
    return ended(client, run_id).kind


def test_runs_compute_one_at_a_time_in_the_order_they_came_and_a_child_waits_for_its_parent(
    attached_client: Client,
) -> None:
    client = attached_client
    assert client.wait_standby(120).standby == "ready"
    first = toy_spec(max_steps=100_000)
    second, third = (toy_spec(max_steps=2) for _ in range(2))
    # Submitted before its parent computes, and before the third; it waits, and overtakes nobody.
    child = toy_spec(max_steps=2, parent=second.run_id)
    client.submit(first, BLOBS)
    first_metric(client, first.run_id)
    for spec, phase in ((second, "queued"), (child, "waiting"), (third, "queued")):
        client.submit(spec, BLOBS)
        until(lambda spec=spec, phase=phase: client.status(spec.run_id)["phase"] == phase, what=phase)
    assert client.status(child.run_id)["state"] == "waiting"
    assert metrics(client, second.run_id) == []
    # A line written while it waits is acted on at its first step.
    client.control(child.run_id, SetCoefficient(name="learning_rate", value=0.02))
    client.control(first.run_id, Stop())
    assert end_of(client, first.run_id) == "stopped"
    for spec in (second, third, child):
        assert end_of(client, spec.run_id) == "finished"

    def span(run_id: str) -> tuple[float, float]:
        events = client.events(run_id)
        return next(event.t for event in events if event.kind == "started"), events[-1].t

    spans = sorted((span(spec.run_id), spec.run_id) for spec in (first, second, child, third))
    assert all(before[1] <= after[0] for (before, _), (after, _) in itertools.pairwise(spans))
    order = [run_id for _, run_id in spans]
    assert order.index(first.run_id) < order.index(second.run_id) < order.index(third.run_id)
    assert order.index(second.run_id) < order.index(child.run_id)
    said = [event.text for event in client.events(child.run_id) if event.kind == "stage"]
    assert f"waiting for {second.run_id}" in said
    changed = next(event for event in client.events(child.run_id) if event.kind == "coefficient_changed")
    assert (changed.new, changed.effective_step) == (0.02, 1)


def test_other_launch_flags_start_cold_and_say_so(attached_client: Client) -> None:
    # What the client heard last may be of the standby that the run before has taken.
    root = Path(attached_client.info.runs_root)
    until(lambda: any(standby.ready() for standby in Standby.all(root)), 120, "a standby is ready")
    spec = toy_spec(max_steps=2, launch="--mixed_precision no")
    attached_client.submit(spec, BLOBS)
    assert end_of(attached_client, spec.run_id) == "finished"
    events = attached_client.events(spec.run_id)
    assert not next(event for event in events if event.kind == "started").warm
    said = [event.text for event in events if event.kind == "stage"]
    assert "starting cold: the standby was launched with no flags, this run wants --mixed_precision no" in said


def test_a_child_of_a_failed_parent_fails_and_names_it(attached_client: Client) -> None:
    parent = toy_spec(die="our_error", step_s=0)
    child = toy_spec(parent=parent.run_id)
    grandchild = toy_spec(parent=child.run_id)
    for spec in (parent, child, grandchild):
        attached_client.submit(spec, BLOBS)
    reason = "rows: none fits max_length=4; raise max_length"
    assert ended(attached_client, parent.run_id).reason == reason
    assert ended(attached_client, child.run_id).reason == f"its parent {parent.run_id} failed: {reason}"
    assert ended(attached_client, grandchild.run_id).kind == "failed"


def test_a_child_whose_parent_never_was_fails_and_says_so(attached_client: Client) -> None:
    spec = toy_spec(parent="nobody-1")
    attached_client.submit(spec, BLOBS)
    last = ended(attached_client, spec.run_id)
    assert last.reason.startswith("its parent nobody-1 is not on this compute")


def test_a_stopped_parent_with_a_model_counts_as_finished_and_one_without_does_not(attached_client: Client) -> None:
    client = attached_client
    parent = toy_spec(max_steps=100_000)
    child, stopped = (toy_spec(max_steps=2, parent=parent.run_id) for _ in range(2))
    orphan = toy_spec(parent=stopped.run_id)
    for spec in (parent, child, stopped, orphan):
        client.submit(spec, BLOBS)
    asked = Stop()
    client.control(stopped.run_id, asked)
    # It never computed, so there is no model.
    assert end_of(client, stopped.run_id) == "stopped"
    events = client.events(stopped.run_id)
    assert any(event.kind == "control_acknowledged" and event.id == asked.id for event in events)
    assert not any(event.kind == "started" for event in events)
    assert (
        ended(client, orphan.run_id).reason
        == f"its parent {stopped.run_id} was stopped before it had saved a model or rows"
    )
    first_metric(client, parent.run_id)
    client.control(parent.run_id, Stop())
    assert end_of(client, parent.run_id) == "stopped"
    assert end_of(client, child.run_id) == "finished"


def test_a_stopped_run_that_is_resumed_behind_another_waits_for_its_turn(attached_client: Client) -> None:
    client = attached_client
    first, other = (toy_spec(max_steps=100_000, checkpoint_every=5) for _ in range(2))
    client.submit(first, BLOBS)
    first_metric(client, first.run_id)
    client.control(first.run_id, Stop())
    assert end_of(client, first.run_id) == "stopped"
    client.submit(other, BLOBS)
    first_metric(client, other.run_id)
    client.resume(first.run_id)
    until(lambda: client.status(first.run_id)["phase"] in ("queued", "ended"), 60)
    time.sleep(1)
    assert client.status(first.run_id)["phase"] == "queued", client.events(first.run_id)[-3:]
    steps = len(metrics(client, first.run_id))
    client.control(other.run_id, Stop())
    assert end_of(client, other.run_id) == "stopped"
    until(lambda: len(metrics(client, first.run_id)) > steps)
    client.control(first.run_id, Stop())
    assert end_of(client, first.run_id) == "stopped"


@pytest.mark.parametrize(
    ("phases", "who", "ahead"),
    [
        ({"a": "computing", "b": "queued"}, "b", "a"),
        ({"a": "queued", "b": "queued"}, "b", "a"),
        ({"a": "queued", "b": "queued"}, "a", None),
        ({"a": "waiting", "b": "queued"}, "b", None),
        ({"a": "ended", "b": "queued"}, "b", None),
        ({"a": "queued", "b": "queued", "c": "computing"}, "a", "c"),
    ],
)
def test_whose_turn_it_is(tmp_path: Path, phases: dict[str, str], who: str, ahead: str | None) -> None:
    turns = Turns(tmp_path)
    for position, (name, phase) in enumerate(phases.items()):
        turns.enter(name, time.time() + position)
        write_json(RunDir(tmp_path / name).supervisor_path, {**ProcessIdentity.of().to_dict(), "phase": phase})
    with turns.lock():
        assert turns.ahead_of(who) == ahead


def test_a_run_whose_processes_are_gone_keeps_nobody_waiting(tmp_path: Path) -> None:
    turns = Turns(tmp_path)
    for position, name in enumerate(("a", "b")):
        turns.enter(name, time.time() + position)
    gone = {"pid": 2**22 - 1, "created": 1.0, "phase": "computing", "launcher": {"pid": 2**22 - 1, "created": 1.0}}
    write_json(RunDir(tmp_path / "a").supervisor_path, gone)
    with turns.lock():
        assert turns.ahead_of("b") is None
