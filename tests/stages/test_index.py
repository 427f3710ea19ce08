"""The workspace's index of a run: filled from its events, whatever fails in between."""

from __future__ import annotations

from unittest.mock import Mock

import pytest

import rlhf_nb as rl
from rlhf_nb.errors import StoreLockedError
from rlhf_nb.protocol.events import Finished, ModelSaved, Started

EVENTS = [
    Started(seq=1, world_size=1, max_steps=3),
    ModelSaved(seq=2, step=3, path="model", content_hash="abc"),
    Finished(seq=3, t=5.0, step=3),
]


def answer(client: Mock) -> Mock:
    client.events.side_effect = lambda run_id, since: [event for event in EVENTS if event.seq > since]
    return client


@pytest.mark.parametrize("call", ["add_model", "update_run", "add_events"])
def test_a_database_that_is_locked_half_way_is_filled_by_the_next_process(ws, tmp_path, monkeypatch, call):
    ws.train(rl.SFT(), base="toy", data="toy-demonstrations")
    answer(ws._client)
    monkeypatch.setattr(ws.store, call, Mock(side_effect=StoreLockedError("another process writes")))
    with pytest.warns(UserWarning, match="its index waits"):
        ws.run("sft-1").fold
    with rl.Workspace(tmp_path / "w") as later:
        later._client = answer(Mock(alive=True))
        later.run("sft-1").fold
        later._client = None
        found = later.store.run("sft-1")
        assert (found.state, found.summary["step"], found.last_seq) == ("finished", 0, 3) and found.finished
        assert later.store.model("sft-1").content_hash == "abc"
        assert [row.action for row in later.store.audit(subject="sft-1")][-2:] == ["model_saved", "finished"]
        assert len(later.store.events("sft-1")) == 3


def test_a_run_is_indexed_once_however_often_it_is_read(ws):
    ws.train(rl.SFT(), base="toy", data="toy-demonstrations")
    answer(ws._client)
    for _ in range(2):
        ws.run("sft-1").fold
        ws._runs.clear()
        ws.run_index._indexed.clear()
    assert [row.action for row in ws.store.audit(subject="sft-1")] == ["submit", "model_saved", "finished"]
