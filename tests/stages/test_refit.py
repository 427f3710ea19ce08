"""A round against a reward model's errors, from its data to a model that no longer makes them."""

from __future__ import annotations

import pytest

import rlhf_nb as rl
from rlhf_nb.errors import DataError, SpecError
from rlhf_nb.methods.reward_model import RewardModel
from rlhf_nb.protocol.spec import BlobData, NamedModel, RunSpec
from rlhf_nb.rewards.model import RewardModelScorer
from rlhf_nb.stages.refit import with_mined

OLD = [{"prompt": f"Is {i}?", "chosen": "so so so yes", "rejected": "no!"} for i in range(12)]
"""Every chosen answer is the longer one too: what is long and wrong was never seen."""
SAID = [{"prompt": f"And {i}?", "completions": ["yes", "so so so so no!", "so yes", "no!"]} for i in range(12)]


@pytest.fixture
def ws(tmp_path):
    with rl.Workspace(tmp_path / "w") as workspace:
        yield workspace


def approved(prompt, completion) -> bool:
    return completion.endswith("yes")


def remember(ws, rows, kind: str, run_id: str = "reward-1", method: str = "reward") -> None:
    data = ws.keep_rows(rows, kind, "old")
    config = RewardModel().model_dump(mode="json")
    spec = RunSpec(run_id=run_id, workspace_id="w", method=method, config=config, policy=NamedModel(name="toy"),
                   data=data, created=0.0)  # fmt: skip
    ws.run_index.remember(spec)


def test_errors_join_the_data_they_were_missing_from(ws):
    remember(ws, OLD, "pairs")
    scored = [{**row, "scores": [0.0, 2.0, 1.0, -1.0]} for row in SAID]
    data = with_mined(ws, "reward-1", scored=scored, labels=approved, weight=2.0)
    assert isinstance(data, BlobData) and (data.row_kind, data.n) == ("pairs", 24)
    assert data.converted == (
        "12 pairs and 12 mined pairs; of 48 thumbs, left out: the reward model agrees (24), further errors of a "
        "prompt (12)"
    )
    rows = ws.store.get_rows(data.content_hash)
    assert rows[:12] == OLD
    assert {k: rows[12][k] for k in ("chosen", "rejected", "weight")} == {
        "chosen": "yes", "rejected": "so so so so no!", "weight": 2.0,
    }  # fmt: skip
    assert ws.dataset("reward-1-mined").rows[0]["rejected_score"] == 2.0


def test_errors_join_rankings_as_rankings_of_two_and_labels_may_be_a_data_set(ws):
    remember(ws, [{"prompt": "p", "completions": ["a", "b", "c"], "ranks": [0, 1, 1]}], "rankings")
    ws.add_data([{"prompt": "q", "chosen": "x", "rejected": "y"}], name="fresh", kind="pairs")
    scored = [{"prompt": "q", "completions": ["x", "y"], "scores": [0.0, 1.0]}]
    data = with_mined(ws, "reward-1", scored=scored, labels="fresh")
    assert ws.store.get_rows(data.content_hash)[1]["completions"] == ["x", "y"] and data.row_kind == "rankings"
    edges = {edge.parent.partition("#")[0] for edge in ws.store.lineage(f"{data.name}#{data.content_hash[:16]}")}
    assert edges == {"old", "reward-1-mined", "scored", "fresh"}


def test_a_round_without_an_error_is_refused_and_says_what_the_labels_were(ws):
    remember(ws, OLD, "pairs")
    remember(ws, OLD, "pairs", run_id="dpo-1", method="dpo")
    right = [{**row, "scores": [2.0, 0.0, 3.0, -1.0]} for row in SAID]
    with pytest.raises(DataError, match=r"no error of reward-1 is among 48 thumbs: the reward model agrees \(48\)"):
        with_mined(ws, "reward-1", scored=right, labels=approved)
    with pytest.raises(SpecError, match="dpo-1 is a dpo run; give the run of a reward model"):
        with_mined(ws, "dpo-1", scored=right, labels=approved)
    with pytest.raises(DataError, match='labels "toy-demonstrations" holds demonstrations; pairs or thumbs are needed'):
        with_mined(ws, "reward-1", scored=right, labels="toy-demonstrations")


@pytest.mark.slow
def test_a_reward_model_that_is_refitted_no_longer_prefers_what_it_was_fooled_by(ws, tiny_model_maker):
    model = tiny_model_maker("still", dropout=0.0)
    ws.attach("local", standby=False, launch="--num_cpu_threads_per_process 1")
    config = {"max_steps": 30, "batch_size": 12, "learning_rate": 3e-3, "max_length": 100}
    first = ws.train(rl.RewardModel(**config), base=str(model), data=ws.add_data(OLD, name="old", kind="pairs"))

    def scores(run) -> list[dict]:
        scorer = RewardModelScorer.load(str(ws.runs_root / run.id / "model"))
        return [{**r, "scores": scorer.score([r["prompt"]] * 4, r["completions"])} for r in SAID]

    def fooled(rows) -> float:
        """Share of what is approved that scores below the long wrong answer."""
        return sum(row["scores"][1] > row["scores"][place] for row in rows for place in (0, 2)) / (2 * len(rows))

    before = scores(first.wait(120))
    second = ws.refit(first, scored=before, labels=approved, per_prompt=2)
    after = scores(second.wait(120))
    assert fooled(before) > 0.5 and fooled(after) == 0
    assert second.spec.config == first.spec.config and second.spec.policy == first.spec.policy
    said = [event.text for event in second.events() if event.kind == "notice" and event.code == "rows_converted"]
    assert said and said[0].startswith("12 pairs and ")
