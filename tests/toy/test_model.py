"""The shipped base model, its tokenizer, and what supervised fine-tuning makes of it."""

from __future__ import annotations

import json
import statistics

import pytest

from rlhf_nb import toy
from rlhf_nb.toy import chance, corpus, data, grammar

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Whichever asks first trains toy-sft.
pytestmark = pytest.mark.timeout(1200)

CHAT = [{"role": "user", "content": "Where is the bakery?"}]


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(toy.model_path())


@pytest.fixture(scope="module")
def model():
    return transformers.AutoModelForCausalLM.from_pretrained(toy.model_path())


def test_it_is_small_untied_and_loads_as_float32(model):
    assert model.num_parameters() <= 5_000_000
    assert sum(file.stat().st_size for file in toy.model_path().iterdir()) <= 8_000_000
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.get_input_embeddings().weight.data_ptr() != model.get_output_embeddings().weight.data_ptr()
    assert not model.config.tie_word_embeddings
    assert model.config.max_position_embeddings >= 256
    assert not list(toy.model_path().glob("*.bin"))


def test_special_tokens_are_distinct_and_model_and_tokenizer_agree_on_them(model, tokenizer):
    ids = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert len({*ids, tokenizer.unk_token_id}) == 4
    assert [model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id] == ids
    generation = model.generation_config
    assert [generation.pad_token_id, generation.bos_token_id, generation.eos_token_id] == ids
    assert len(tokenizer) == model.config.vocab_size <= 1024
    assert tokenizer.model_max_length == model.config.max_position_embeddings


@pytest.mark.parametrize("text", [
    "", " ", "Where is the bakery?", "  two  spaces ", "line\nbreak\r\n\ttab", "Zürich, ¿qué? Œuvre", "日本語の文",
    "مرحبا",
    "👩‍👩‍👧 emoji", "\u0000\u0007", "a\u0301 is not á", "\u202eright to left", "<script>alert(1)</script>",
    "x" * 3000,
])  # fmt: skip
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_random_code_points_survive_the_tokenizer(tokenizer):
    rng = chance.generator("unicode")
    for _ in range(200):
        points = (int(rng.random() * 0x110000) for _ in range(20))
        text = "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_chat_template_renders_each_turn_once(tokenizer):
    prompt = "<|start|><|user|>Where is the bakery?<|assistant|>"
    assert tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == prompt
    chat = [{"role": "system", "content": "Be kind."}, *CHAT, {"role": "assistant", "content": "On Mill Lane."}, *CHAT]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == (
        "<|start|><|system|>Be kind.<|user|>Where is the bakery?<|assistant|>On Mill Lane.<|end|>"
        "<|user|>Where is the bakery?"
    )
    answered = tokenizer.apply_chat_template(
        chat[1:3], return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    said = [token for token, mask in zip(answered["input_ids"], answered["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(said) == "On Mill Lane.<|end|>"


def test_a_prompts_tokens_are_the_beginning_of_the_whole_chats_tokens(tokenizer):
    for row in toy.demonstrations(200):
        chat = [{"role": "user", "content": row["prompt"]}]
        full = [*chat, {"role": "assistant", "content": row["completion"]}]
        before = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        whole = tokenizer.apply_chat_template(full)["input_ids"]
        assert whole[: len(before)] == before
        assert tokenizer.decode(whole[len(before) :]) == row["completion"] + tokenizer.eos_token


def test_prompts_and_completions_take_few_tokens(tokenizer):
    rows = toy.demonstrations(2000)
    completions = [len(tokenizer(row["completion"]).input_ids) + 1 for row in rows]
    assert max(len(tokenizer(row["prompt"]).input_ids) for row in rows) <= 30
    assert sum(length > toy.COMPLETION_TOKENS for length in completions) / len(rows) <= 0.002
    assert 10 <= statistics.mean(completions) <= 40


def test_no_held_out_prompt_is_in_what_the_base_model_read():
    texts = list(corpus.documents(3000))
    assert all(text.startswith("<|start|>") and text.endswith("<|end|>") for text in texts)
    asked = [text.split("<|user|>")[1].split("<|assistant|>")[0] for text in texts if "<|user|>" in text]
    assert 1500 < len(asked) < 2500
    assert not any(map(data.is_held_out, asked))


def test_the_base_model_speaks_the_towns_language_but_answers_badly(toy_sft, sample):
    prompts = [row["prompt"] for row in toy.held_out_prompts(300, seed=1)]
    base, tuned = (toy.true_reward(prompts, sample(path, prompts)) for path in (toy.model_path(), toy_sft))
    assert sum(reward > 0 for reward in base) > 150
    assert statistics.mean(base) + 0.05 < statistics.mean(tuned)


def test_at_least_95_percent_of_500_samples_from_toy_sft_parse_and_their_reward_leaves_room(toy_sft, sample):
    prompts = [row["prompt"] for row in toy.held_out_prompts(500)]
    completions = sample(toy_sft, prompts)
    share = sum(grammar.parse(completion) is not None for completion in completions) / 500
    reward = statistics.mean(toy.true_reward(prompts, completions))
    print(json.dumps({"parse": share, "true_reward": round(reward, 4)}))
    assert share >= 0.95
    assert 0.45 < reward < 0.8


def test_toy_sft_is_a_plain_saved_directory(toy_sft):
    assert (toy_sft / "model.safetensors").is_file()
    tuned = transformers.AutoTokenizer.from_pretrained(toy_sft)
    assert tuned.chat_template == transformers.AutoTokenizer.from_pretrained(toy.model_path()).chat_template
