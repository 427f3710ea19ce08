from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from rlhf_nb.errors import RewardError, SpecError
from rlhf_nb.rewards.model import RewardModelScorer

PROMPTS = [
    "Who?",
    "What does the bakery sell?",
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Bye"}],
]
COMPLETIONS = ["Anna.", "The bakery sells bread. You could ask Ben. I hope this helps!", "Bye."]


def save_reward_model(base: Path, target: Path, labels: int = 1) -> Path:
    import shutil

    shutil.copytree(base, target)
    config = LlamaConfig.from_pretrained(base, num_labels=labels)
    torch.manual_seed(1)
    LlamaForSequenceClassification(config).save_pretrained(target)
    return target


@pytest.fixture
def reward_model(tiny_model: Path, tmp_path: Path) -> Path:
    return save_reward_model(tiny_model, tmp_path / "rm")


def test_a_score_does_not_depend_on_what_else_is_in_the_batch(reward_model):
    together = RewardModelScorer.load(str(reward_model), batch_size=3).score(PROMPTS, COMPLETIONS)
    alone = RewardModelScorer.load(str(reward_model), batch_size=1).score(PROMPTS, COMPLETIONS)
    assert together == pytest.approx(alone, rel=1e-5)
    assert len(set(together)) == 3


def test_scores_come_back_in_the_order_of_the_completions(reward_model):
    scorer = RewardModelScorer.load(str(reward_model), batch_size=2)
    forward = scorer.score(PROMPTS, COMPLETIONS)
    assert scorer.score(PROMPTS[::-1], COMPLETIONS[::-1]) == pytest.approx(forward[::-1], rel=1e-5)
    assert scorer.score([], []) == []


def test_it_scores_the_last_token_of_the_conversation(reward_model):
    scorer = RewardModelScorer.load(str(reward_model))
    model, tokenizer = scorer.model, scorer.tokenizer
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Anna."}]
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    with torch.no_grad():
        hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
        expected = float(model.score(hidden)[0])
    assert scorer.score(["Who?"], ["Anna."]) == pytest.approx([expected], rel=1e-5)


def test_of_a_conversation_that_is_too_long_it_reads_the_end_and_says_so_once(reward_model):
    scorer, said = RewardModelScorer.load(str(reward_model)), []
    scorer.max_length = 24
    scorer.emit = SimpleNamespace(notice=lambda *words: said.append(words))
    prompt = "A long story. " * 20
    one, other, short = scorer.score([prompt, prompt, "Hi"], ["Anna.", "Bert.", "x"])
    assert one != other
    scorer.max_length = None
    assert scorer.score(["Hi"], ["x"]) == pytest.approx([short], rel=1e-5)
    scorer.max_length = 24
    scorer.score([prompt], ["Anna."])
    ((code, text, level),) = said
    assert (code, level) == ("reward_model_cut", "warning")
    assert text.startswith("reward model rm reads 24 tokens, and 2 of 3 conversations are longer")


def test_two_labels_are_refused_in_one_line(tiny_model, tmp_path):
    path = save_reward_model(tiny_model, tmp_path / "two", labels=2)
    with pytest.raises(SpecError, match=r'reward model "two" has num_labels=2; a reward is one number'):
        RewardModelScorer.load(str(path))


def test_a_language_model_is_refused_as_a_reward_model(tiny_model):
    with pytest.raises(SpecError, match=r'reward model "tiny" is LlamaForCausalLM, which has no score head'):
        RewardModelScorer.load(str(tiny_model))


def strip(path: Path, *tokens: str) -> None:
    file = path / "tokenizer_config.json"
    config = json.loads(file.read_text())
    for token in tokens:
        config.pop(token, None)
    file.write_text(json.dumps(config))
    (path / "special_tokens_map.json").unlink(missing_ok=True)


@pytest.mark.parametrize("recorded", [True, False])
def test_a_tokenizer_without_a_pad_token_changes_no_score(reward_model, recorded):
    before = RewardModelScorer.load(str(reward_model)).score(PROMPTS, COMPLETIONS)
    strip(reward_model, "pad_token")
    if not recorded:
        file = reward_model / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "pad_token_id": None}))
    scorer = RewardModelScorer.load(str(reward_model))
    assert scorer.tokenizer.pad_token == scorer.tokenizer.eos_token
    assert scorer.score(PROMPTS, COMPLETIONS) == pytest.approx(before, rel=1e-5)


def test_without_pad_and_end_token_it_is_refused(reward_model):
    strip(reward_model, "pad_token", "eos_token")
    with pytest.raises(SpecError, match=r"tokenizer of rm: no pad token and no end token; set pad_token"):
        RewardModelScorer.load(str(reward_model))


def test_a_score_that_is_not_finite_is_named(reward_model):
    scorer = RewardModelScorer.load(str(reward_model))
    with torch.no_grad():
        scorer.model.score.weight.fill_(float("nan"))
    with pytest.raises(RewardError, match=r"reward rm: completion 0 got nan"):
        scorer.score(PROMPTS, COMPLETIONS)
