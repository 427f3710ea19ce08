"""What is named in a cell becomes a reference that can travel."""

from __future__ import annotations

import pytest

import rlhf_nb as rl
from rlhf_nb.errors import DataError
from rlhf_nb.stages.resolve import resolve_data


@pytest.fixture
def ws(tmp_path):
    with rl.Workspace(tmp_path / "w") as workspace:
        yield workspace


def test_pairs_serve_as_thumbs_and_rankings_as_pairs(ws):
    pairs = ws.add_data([{"prompt": "p", "chosen": "a", "rejected": "b"}], name="mine", kind="pairs")
    thumbs = resolve_data(ws, pairs, verb="kto", rows="thumbs")
    assert (thumbs.row_kind, thumbs.n, thumbs.name) == ("thumbs", 2, "mine as thumbs")
    assert ws.store.get_rows(thumbs.content_hash) == [
        {"prompt": "p", "completion": "a", "label": True},
        {"prompt": "p", "completion": "b", "label": False},
    ]
    assert resolve_data(ws, "toy-rankings", verb="dpo", rows="pairs").row_kind == "pairs"


def test_demonstrations_out_of_pairs_are_asked_for_and_not_assumed(ws):
    with pytest.raises(DataError, match="holds pairs, and sft trains on demonstrations"):
        resolve_data(ws, "toy-pairs", verb="sft", rows="demonstrations")
