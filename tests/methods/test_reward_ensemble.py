"""Reward models that train together: each is what it would be alone, and all of them are one reward."""

from __future__ import annotations

import pytest
import torch

from rlhf_nb.errors import SpecError
from rlhf_nb.maths.rewards import combine
from rlhf_nb.methods.reward_model import RewardModel, fold
from rlhf_nb.protocol.spec import LoRA, ModelReward, PathModel
from rlhf_nb.rewards.ensemble import EnsembleScorer, load_reward_model
from rlhf_nb.rewards.model import RewardModelScorer
from rlhf_nb.toy import pairs, rankings
from rlhf_nb.training.rankings import Ranked

CONFIG = {"max_steps": 3, "batch_size": 4, "learning_rate": 1e-2, "max_length": 300, "seed": 3, "max_grad_norm": 0.2}
ROWS = rankings(4)
PROMPTS = [row["prompt"] for row in ROWS]
TEXTS = [row["completions"][0] for row in ROWS]


@pytest.fixture
def still(job, tiny_model_maker):
    job.model = tiny_model_maker("still", dropout=0.0)
    return job


@pytest.mark.parametrize("adapter", [None, LoRA(r=2)], ids=["whole", "lora"])
def test_a_member_is_what_a_run_alone_with_its_seed_would_be(still, trace, adapter):
    config = {**CONFIG, "center_rewards_coefficient": 0.1}
    place = still("reward", ROWS, kind="rankings", config={**config, "members": 2}, adapter=adapter)
    found = EnsembleScorer.load(str(place.model)).score_members(PROMPTS, TEXTS)
    losses = []
    for member, seed in enumerate((3, 4)):
        # Every step sees all rows, so that their order does not matter.
        lone = still(
            "reward", ROWS, kind="rankings", name=f"lone-{seed}", config={**config, "seed": seed}, adapter=adapter
        )
        expected = RewardModelScorer.load(str(lone.model)).score(PROMPTS, TEXTS)
        assert found[member] == pytest.approx(expected, rel=1e-3, abs=1e-5)
        losses.append(list(trace(lone, "loss").values()))
    assert found[0] != pytest.approx(found[1], rel=0.1)
    mean = [sum(each) / 2 for each in zip(*losses, strict=True)]
    assert list(trace(place, "loss").values()) == pytest.approx(mean, rel=1e-4)


def test_members_under_lora_are_saved_as_adapters_on_one_backbone(still):
    place = still("reward", ROWS, kind="rankings", config={**CONFIG, "members": 3, "max_steps": 1}, adapter=LoRA(r=2))
    files = {
        str(path.relative_to(place.model)): path.stat().st_size for path in place.model.rglob("*") if path.is_file()
    }
    assert "model.safetensors" not in files, "plain transformers must not take a member for the whole"
    weights = {name: size for name, size in files.items() if not name.endswith((".json", ".jinja", ".md"))}
    assert sorted(weights) == [
        "backbone/model.safetensors", *(f"member-{number}/adapter_model.safetensors" for number in range(3))
    ]  # fmt: skip
    assert all(size < weights["backbone/model.safetensors"] / 2 for name, size in weights.items() if "member" in name)
    members = EnsembleScorer.load(str(place.model)).members
    trunks = [next(iter(dict(member.model.named_parameters()).values())).data_ptr() for member in members]
    assert len(set(trunks)) == 1, "one copy of the backbone in memory"


@pytest.mark.parametrize("over", ["mean", "min", "mean_minus_std"])
def test_an_ensemble_is_one_reward_over_its_members(still, over):
    place = still("reward", ROWS, kind="rankings", config={**CONFIG, "members": 3, "max_steps": 1})
    scorer = load_reward_model(str(place.model), over=over, std_coef=0.5)
    scores = torch.tensor(scorer.score_members(PROMPTS, TEXTS), dtype=torch.float64)
    expected = combine(scores.T, torch.ones(3, dtype=torch.float64), over, std_coef=0.5)
    assert scorer(PROMPTS, TEXTS, other=["x"] * 4) == pytest.approx(expected.tolist())
    assert scorer([], []) == []
    assert scores.std(0).min() > 1e-3


def test_ppo_optimises_the_worst_member_on_its_own_backbone(still, trace):
    members = {**CONFIG, "members": 2, "max_steps": 1}
    reward = still("reward", ROWS, kind="rankings", name="rm", config=members, adapter=LoRA(r=2))
    config = {"max_steps": 1, "rollout_batch_size": 2, "batch_size": 2, "num_ppo_epochs": 1, "max_new_tokens": 4,
              "max_length": 300, "sample_every": 0}  # fmt: skip
    scores = {}
    for over in ("mean", "min"):
        model = ModelReward(model=PathModel(path=str(reward.model)), over=over)
        prompts = [{"prompt": prompt} for prompt in PROMPTS]
        place = still("ppo", prompts, name=over, config=config, reward=model, adapter=LoRA(r=2))
        scores[over] = trace(place, "reward/score")[1]
        assert [e for e in place.events() if e.kind == "notice" and e.code == "shared_backbone"]
    assert scores["min"] < scores["mean"]


def test_a_fold_is_left_out_by_exactly_one_member_and_a_prompt_is_in_one_fold():
    items = [Ranked(f"Question {i // 2}?", [[1], [2]], [0, 1], [(0, 1, 1.0)]) for i in range(40)]
    columns = list(zip(*RewardModel(members=4, members_by="fold")._places(items, [0, 1, 2, 3]), strict=True))
    left_out = [set(range(40)) - set(column) for column in columns]
    assert sorted(place for each in left_out for place in each) == list(range(40))
    assert all((place ^ 1) in each for each in left_out for place in each)
    assert len({len(set(column)) for column in columns}) > 1 and len({len(column) for column in columns}) == 1
    assert fold("Who?", 4, 0) == fold(" Who? ", 4, 0)
    shuffled = list(zip(*RewardModel(members=2)._places(items, [0, 1]), strict=True))
    assert sorted(shuffled[0]) == sorted(shuffled[1]) == list(range(40)) and shuffled[0] != shuffled[1]


def test_members_and_the_length_term_resume_to_the_same_curve(still, trace):
    config = {**CONFIG, "members": 2, "max_steps": 4, "batch_size": 2, "length_debias": 1.0, "checkpoint_every": 2}
    place = still("reward", ROWS, kind="rankings", config=config, adapter=LoRA(r=2))
    whole = {name: trace(place, name) for name in ("loss", "length/term", "score/mean")}
    again = still.run(place, attempt=2, resume_from=place.path / "checkpoints" / "checkpoint-2")
    for name, curve in whole.items():
        assert trace(again, name) == curve, name
    assert len([e for e in again.events() if e.kind == "resumed"]) == 1
    assert abs(whole["length/term"][4]) > 1e-4


def test_an_ensemble_is_evaluated_and_is_no_policy(still):
    place = still("reward", ROWS, kind="rankings", name="rm", config={**CONFIG, "members": 2, "max_steps": 1})
    model = PathModel(path=str(place.model))
    rows = pairs(4)
    (result,) = [e for e in still("evaluate", rows, name="e", policy=model).events() if e.kind == "result"]
    scorer = load_reward_model(str(place.model))
    sides = [scorer([row["prompt"] for row in rows], [row[side] for row in rows]) for side in ("chosen", "rejected")]
    assert result.detail["margin_mean"] == pytest.approx(sum(c - r for c, r in zip(*sides, strict=True)) / 4, rel=1e-5)
    for method in ("reward", "ppo"):
        with pytest.raises(SpecError, match="is an ensemble of 2 reward models, which only scores"):
            reward = None if method == "reward" else ModelReward(model=model)
            still(method, rows, name=method, config={"max_steps": 1}, policy=model, reward=reward)


def test_members_are_asked_for_where_there_are_some(still):
    single = still("reward", ROWS, kind="rankings", config={**CONFIG, "max_steps": 1})
    with pytest.raises(SpecError, match="over=min is over the members of an ensemble, and this is one model"):
        load_reward_model(str(single.model), over="min")
    with pytest.raises(SpecError, match="members_by=fold needs parts to leave out"):
        RewardModel(members_by="fold").check(None)
