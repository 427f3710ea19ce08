from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from rlhf_nb.errors import DataError
from rlhf_nb.methods.reward_model import RewardModel
from rlhf_nb.protocol.spec import LoRA, RunModel
from rlhf_nb.rewards.model import RewardModelScorer
from rlhf_nb.toy import demonstrations, pairs

CONFIG = {"max_steps": 3, "batch_size": 2, "learning_rate": 1e-2, "max_length": 400}
EASY = [{"prompt": f"Question {i}?", "chosen": "Yes, of course.", "rejected": "zzzz"} for i in range(8)]


@pytest.mark.parametrize("adapter", [None, LoRA(r=4)])
def test_it_learns_easy_pairs_and_saves_a_classifier_with_one_label(job, trace, adapter):
    place = job("reward", EASY, config={**CONFIG, "max_steps": 20, "batch_size": 4}, adapter=adapter)
    assert trace(place, "pairs/accuracy")[20] == 1.0
    assert trace(place, "pairs/margin")[20] > 0.1
    model = AutoModelForSequenceClassification.from_pretrained(place.model)
    assert model.config.num_labels == 1
    scorer = RewardModelScorer.load(str(place.model))
    chosen = scorer.score(["Question 3?"] * 2, ["Yes, of course.", "zzzz"])
    assert chosen[0] > chosen[1]


def test_the_loss_is_minus_log_sigmoid_of_the_margin(job, trace):
    place = job("reward", pairs(4), config={**CONFIG, "batch_size": 1})
    margin = torch.tensor(list(trace(place, "pairs/margin").values()))
    expected = -torch.nn.functional.logsigmoid(margin)
    torch.testing.assert_close(torch.tensor(list(trace(place, "loss").values())), expected, atol=1e-6, rtol=1e-5)


def test_pairs_that_are_too_long_are_dropped_and_counted(job):
    long = {"prompt": "Why?", "chosen": "because " * 60, "rejected": "No."}
    place = job("reward", [*pairs(4), long], config={**CONFIG, "max_steps": 1})
    (notice,) = [e for e in place.events() if e.kind == "notice" and e.code == "rows_dropped"]
    assert notice.text == "1 of 5 pairs do not fit in max_length=400 tokens and were dropped"
    assert notice.level == "warning"


def test_no_pair_left_is_refused(job):
    with pytest.raises(DataError, match=r"reward: none of the 4 pairs fits in max_length=5 tokens; raise max_length"):
        job("reward", pairs(4), config={**CONFIG, "max_length": 5})


def test_identical_completions_are_refused_with_the_row(job):
    rows = [*pairs(2), {"prompt": "Hm?", "chosen": "Same.", "rejected": "Same. "}]
    with pytest.raises(DataError, match=r'data "mine", row 2: identical chosen and rejected'):
        job("reward", rows, config=CONFIG)


def test_one_pair_trains(job, trace):
    assert len(trace(job("reward", pairs(1), config=CONFIG), "loss")) == 3


def test_it_declares_no_reference_and_its_live_coefficients(job):
    started = job("reward", pairs(2), config={**CONFIG, "max_steps": 1}).events()[0]
    assert not started.has_reference
    assert {c.name: c.value for c in started.coefficients} == {
        "learning_rate": 1e-2,
        "center_rewards_coefficient": 0.0,
    }
    assert [RewardModel.rows_in(kind) for kind in ("pairs", "rankings", "thumbs")] == ["pairs", "rankings", "pairs"]


def test_it_starts_from_the_sft_model_it_is_given(job):
    sft = job("sft", demonstrations(4), name="sft-1", config={"max_steps": 2, "sample_every": 0, "learning_rate": 1e-2})
    frozen = {**CONFIG, "max_steps": 1, "learning_rate": 0.0}
    place = job("reward", pairs(2), name="reward-1", config=frozen, policy=RunModel(run_id="sft-1"))
    trunk, taught, base = (load_file(path / "model.safetensors") for path in (place.model, sft.model, job.model))
    shared = [name for name in taught if name in trunk]
    assert len(shared) == len(taught) - 1, "all but the language model's head"
    assert all(torch.equal(trunk[name], taught[name]) for name in shared)
    assert not torch.equal(trunk["model.embed_tokens.weight"], base["model.embed_tokens.weight"])


def test_a_tokenizer_without_a_pad_token_is_padded_with_its_end_and_scored_as_trained(job, trace, tiny_model_maker):
    job.model = tiny_model_maker("no-pad", pad_token_id=None, dropout=0.0)
    file = job.model / "tokenizer_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "pad_token"}))
    config = {**CONFIG, "max_steps": 1, "batch_size": 8, "learning_rate": 0.0}
    place = job("reward", EASY, config=config)
    (notice,) = [e for e in place.events() if e.kind == "notice"]
    assert notice.text == "tokenizer of no-pad has no pad token; its end token <end> pads"
    scorer = RewardModelScorer.load(str(place.model))
    prompts = [row["prompt"] for row in EASY]
    chosen, rejected = (scorer.score(prompts, [row[side] for row in EASY]) for side in ("chosen", "rejected"))
    margin = sum(c - r for c, r in zip(chosen, rejected, strict=True)) / len(EASY)
    assert margin == pytest.approx(trace(place, "pairs/margin")[1], rel=1e-4)
