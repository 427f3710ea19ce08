"""Attach, submit, watch, steer, end: the loop over real processes."""

from __future__ import annotations

from rlhf_nb.compute.client import Client
from rlhf_nb.protocol.control import SetCoefficient

from .conftest import BLOBS, ended, first_metric, toy_spec


def test_a_cold_run_is_submitted_steered_and_finishes(cold_client: Client) -> None:
    spec = toy_spec(max_steps=40)
    cold_client.submit(spec, BLOBS)
    assert cold_client.events(spec.run_id) == [] or cold_client.status(spec.run_id)["state"] in ("waiting", "starting")
    first_metric(cold_client, spec.run_id)
    assert cold_client.status(spec.run_id)["state"] == "running"
    asked = SetCoefficient(name="learning_rate", value=0.01, who="me")
    cold_client.control(spec.run_id, asked)
    last = ended(cold_client, spec.run_id)
    events = cold_client.events(spec.run_id)
    changed = next(event for event in events if event.kind == "coefficient_changed")
    assert (changed.id, changed.new, changed.who) == (asked.id, 0.01, "me")
    rates = {event.step: event.values["learning_rate"] for event in events if event.kind == "metric"}
    assert rates[changed.effective_step] == 0.01 != rates[changed.effective_step - 1]
    assert last.kind == "finished"
    assert last.step == 40
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    started = next(event for event in events if event.kind == "started")
    assert (started.world_size, started.warm) == (1, False)
    row = cold_client.status(spec.run_id)
    assert (row["state"], row["alive"]) == ("finished", False)
