"""Saved models and what was made from what."""

from __future__ import annotations

import pytest

from rlhf_nb.errors import NotFoundError


def test_a_model_is_found_by_name_and_by_run(store):
    model = store.add_model("polite", "/runs/dpo-1/model", run_id="dpo-1", content_hash="ab", info={"adapter": "lora"})
    assert store.model("polite") == store.model("dpo-1") == model


def test_a_name_means_the_newest_model(store):
    old = store.add_model("rm", "/a", role="reward")
    assert store.add_model("rm", "/a", role="reward") == old
    new = store.add_model("rm", "/b", role="reward")
    assert store.model("rm") == new
    assert store.models() == [new] == store.models(role="reward")
    assert store.models(role="policy") == []


def test_an_unknown_model_suggests_the_nearest(store):
    store.add_model("polite", "/a")
    with pytest.raises(NotFoundError, match=r"no model 'polit' in this workspace; did you mean \"polite\"\?"):
        store.model("polit")


def test_lineage_walks_up_nearest_first(store):
    edges = [
        ("model:ppo-1", "model:sft-1", "policy"),
        ("model:ppo-1", "model:rm-1", "reward"),
        ("model:rm-1", "data:hh@1", "trained on"),
    ]
    for edge in [*edges, edges[0], ("model:other", "data:x@1", "trained on")]:
        store.add_lineage(*edge)
    assert [(e.child, e.parent, e.relation) for e in store.lineage("model:ppo-1")] == edges
    assert len(store.lineage()) == 4
    assert store.lineage("data:hh@1") == []


def test_a_cycle_in_the_lineage_ends(store):
    store.add_lineage("a", "b", "policy")
    store.add_lineage("b", "a", "policy")
    assert [(e.child, e.parent) for e in store.lineage("a")] == [("a", "b"), ("b", "a")]
