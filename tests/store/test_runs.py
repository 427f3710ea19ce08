"""The index of runs: ids, state, idempotent events."""

from __future__ import annotations

import math

import pytest

from rlhf_nb.errors import NotFoundError, StoreError


def test_run_ids_count_up_by_method(store):
    assert [store.next_run_id(m) for m in ("ppo", "dpo", "ppo")] == ["ppo-1", "dpo-1", "ppo-2"]


def test_an_id_that_was_taken_but_not_used_is_no_run(store):
    run_id = store.next_run_id("ppo")
    assert store.runs() == []
    with pytest.raises(NotFoundError):
        store.run(run_id)


def test_a_run_directory_without_a_row_keeps_its_id(directory_store):
    (directory_store.directory / "runs" / "ppo-1").mkdir(parents=True)
    assert directory_store.next_run_id("ppo") == "ppo-2"


def test_a_run_is_entered_once(store):
    run_id = store.next_run_id("dr-grpo")
    run = store.add_run(run_id, spec={"beta": 0.1}, title="first", place="/runs/dr-grpo-1", attach="local")
    assert (run.method, run.number, run.state, run.last_seq) == ("dr-grpo", 1, "waiting", -1)
    assert store.add_run(run_id, spec={"beta": 9.9}) == run == store.run(run_id)
    assert store.runs() == [run]


def test_a_run_found_in_a_directory_is_entered_under_its_own_id(store):
    assert store.add_run("ppo-7").number == 7
    assert store.next_run_id("ppo") == "ppo-8"
    assert store.add_run("my run").method == "my run"
    assert store.add_run("final-v2b", method="ppo").method == "ppo"
    assert store.add_run("final-v2c", method="ppo").run_id == "final-v2c"
    assert store.next_run_id("ppo") == "ppo-9"


def test_state_changes_and_summary_merges(store):
    store.add_run("ppo-1", summary={"steps": 1})
    store.update_run("ppo-1", state="running", summary={"reward": 0.5}, last_seq=10)
    run = store.update_run("ppo-1", last_seq=3)
    assert (run.state, run.summary, run.last_seq) == ("running", {"steps": 1, "reward": 0.5}, 10)
    assert [r.run_id for r in store.runs(state="running")] == ["ppo-1"]
    assert store.runs(method="dpo") == []


def test_a_run_that_has_begun_keeps_its_row(store):
    for run_id, state in (("ppo-1", "waiting"), ("ppo-2", "running")):
        store.add_run(run_id, spec={"beta": 0.1}, title="first", state=state)
        store.forget_run(run_id)
    assert [run.run_id for run in store.runs()] == ["ppo-2"]


def test_a_row_that_was_taken_back_is_no_run_until_it_is_entered_again(store):
    store.add_run("ppo-1", spec={"beta": 0.1})
    store.forget_run("ppo-1")
    with pytest.raises(NotFoundError, match="no run 'ppo-1'"):
        store.update_run("ppo-1", state="running")
    assert store.runs() == []
    store.add_run("ppo-1", spec={"beta": 0.2}, title="again", attach="local")
    run = store.update_run("ppo-1", state="running")
    assert (run.state, run.spec, run.title, run.attach) == ("running", {"beta": 0.2}, "again", "local")


def test_a_run_without_a_spec_gets_it_when_it_is_entered_again(store):
    store.add_run("ppo-1", state="running")
    run = store.add_run("ppo-1", spec={"beta": 0.1}, title="first", place="/runs/ppo-1", attach="local")
    assert (run.state, run.spec, run.title, run.place) == ("running", {"beta": 0.1}, "first", "/runs/ppo-1")


def test_an_unknown_run_or_field_is_named(store):
    store.add_run("ppo-1")
    with pytest.raises(NotFoundError, match=r"no run 'pp-1' in this workspace; did you mean \"ppo-1\"\?"):
        store.update_run("pp-1", state="failed")
    with pytest.raises(StoreError, match=r"no field 'stat' to change; did you mean \"state\"\?"):
        store.update_run("ppo-1", stat="failed")


def test_events_are_indexed_once_whatever_the_overlap(store):
    store.add_run("ppo-1")
    events = [{"seq": seq, "type": "metrics", "values": {"loss": seq / 2}} for seq in range(2500)]
    assert store.add_events("ppo-1", events[:1500]) == 1500
    assert store.add_events("ppo-1", events[1000:]) == 1000
    assert store.add_events("ppo-1", events) == 0
    assert store.events("ppo-1") == events
    assert store.events("ppo-1", since=2498) == events[2498:]
    assert store.events("ppo-1", limit=2) == events[:2]
    assert store.run("ppo-1").last_seq == 2499


def test_events_keep_not_a_number_and_null_characters(store):
    store.add_events("ppo-1", [{"seq": 0, "loss": math.nan, "text": "a\x00b\ud83d"}])
    (event,) = store.events("ppo-1")
    assert math.isnan(event["loss"]) and event["text"] == "a\x00b\ud83d"


def test_no_events_are_no_change(store):
    assert store.add_events("ppo-1", []) == 0
    assert store.events("ppo-1") == []


def test_attaches_are_noted_in_order(store):
    one = store.add_attach("local", {"device": "cpu", "ranks": 2})
    two = store.add_attach("server https://gpu", {})
    assert store.attaches() == [one, two]
