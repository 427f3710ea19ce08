"""Saved models and what was made from what."""

from __future__ import annotations

from unittest.mock import Mock

import pytest

from rlhf_nb.errors import NotFoundError, StoreError
from rlhf_nb.protocol.events import RewardReplaced
from rlhf_nb.protocol.fold import RunFold
from rlhf_nb.protocol.spec import CombinedReward, ModelReward, NamedReward, RewardPart, RunModel, RunSpec
from rlhf_nb.workspace import Workspace


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


@pytest.mark.parametrize("killed_at", ["add_lineage", "add_events", "_append", "update_run"])
def test_a_reward_put_into_a_run_that_trains_enters_lineage_and_audit_once(tmp_path, monkeypatch, killed_at):
    def replaced(seq: int, new: ModelReward | NamedReward) -> RewardReplaced:
        return RewardReplaced(
            seq=seq, t=1.0, id=f"c-{seq}", part="rm-1", old="rm-1", new=new, shift=0.0, effective_step=9
        )

    rm_2 = ModelReward(model=RunModel(run_id="rm-2"))
    events = [replaced(1, NamedReward(name="toy-true")), replaced(2, rm_2), replaced(3, rm_2)]
    fold = RunFold()
    for event in events:
        fold.add(event)
    spec = RunSpec(run_id="ppo-1", workspace_id="w", method="ppo", config={}, created=0.0)
    with Workspace(tmp_path / "project") as ws:
        ws.store.add_run("ppo-1", method="ppo", spec=spec.model_dump(mode="json"))
        with monkeypatch.context() as first, pytest.raises(StoreError):
            first.setattr(ws.store, killed_at, Mock(side_effect=StoreError("killed")))
            ws.index(ws.run("ppo-1"), fold, events)
        ws.index(ws.run("ppo-1"), fold, events)
        with Workspace(tmp_path / "project") as beside:
            beside.index(beside.run("ppo-1"), fold, events)
        assert [(e.child, e.parent, e.relation) for e in ws.store.lineage()] == [("ppo-1", "rm-2", "model")]
        assert [one.detail["seq"] for one in ws.store.audit(action="reward_replaced")] == [1, 2, 3]
        assert ws.store.verify_audit().ok


def test_a_run_needs_the_models_of_its_policy_its_rewards_and_its_gold_each_once():
    sft, rm_1, rm_2 = (RunModel(run_id=run_id) for run_id in ("sft-1", "rm-1", "rm-2"))
    both = CombinedReward(parts=tuple(RewardPart(reward=ModelReward(model=model)) for model in (rm_2, rm_1)))
    spec = RunSpec(run_id="ppo-1", workspace_id="w", method="ppo", config={}, created=0.0, policy=sft, reward=both,
                   gold=ModelReward(model=rm_1))  # fmt: skip
    assert spec.parents == ("sft-1", "rm-2", "rm-1")
    assert spec.model_copy(update={"policy": None, "gold": None, "reward": NamedReward(name="toy-true")}).parents == ()
