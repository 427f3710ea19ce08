"""Attach, submit, watch, steer, end: the loop over real processes."""

from __future__ import annotations

from rlhf_nb.compute.client import Client
from rlhf_nb.protocol.control import SetCoefficient, Stop
from rlhf_nb.protocol.events import AnyEvent

from .conftest import BLOBS, ended, first_metric, metrics, toy_spec, until


def test_a_cold_run_is_submitted_steered_and_stopped(cold_client: Client) -> None:
    spec = toy_spec(max_steps=100_000)
    cold_client.submit(spec, BLOBS)
    assert cold_client.events(spec.run_id) == [] or cold_client.status(spec.run_id)["state"] in ("waiting", "starting")
    first_metric(cold_client, spec.run_id)
    assert cold_client.status(spec.run_id)["state"] == "running"
    asked = SetCoefficient(name="learning_rate", value=0.01, who="me")
    cold_client.control(spec.run_id, asked)

    def moved() -> list[AnyEvent]:
        return [event for event in cold_client.events(spec.run_id) if event.kind == "coefficient_changed"]

    (changed,) = until(moved)
    until(lambda: metrics(cold_client, spec.run_id)[-1].step >= changed.effective_step)
    cold_client.control(spec.run_id, Stop())
    last = ended(cold_client, spec.run_id)
    events = cold_client.events(spec.run_id)
    assert (changed.id, changed.new, changed.who) == (asked.id, 0.01, "me")
    rates = {event.step: event.values["learning_rate"] for event in events if event.kind == "metric"}
    assert rates[changed.effective_step] == 0.01 != rates[changed.effective_step - 1]
    assert last.kind == "stopped"
    assert last.step == max(rates)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    started = next(event for event in events if event.kind == "started")
    assert (started.world_size, started.warm) == (1, False)
    row = cold_client.status(spec.run_id)
    assert (row["state"], row["alive"]) == ("stopped", False)
