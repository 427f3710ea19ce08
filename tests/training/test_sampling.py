from __future__ import annotations

import inspect
import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_nb.training.data import prompt_ids
from rlhf_nb.training.rng import undisturbed
from rlhf_nb.training.sampling import Sampler, generate, sequence_logprobs

PROMPTS = ["Who?", "What does the bakery sell?", [{"role": "user", "content": "Hi"}]]


@pytest.fixture(scope="module")
def policy(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def reference(policy):
    torch.manual_seed(9)
    return type(policy)(policy.config)


def test_kl_is_the_log_probability_under_the_policy_minus_that_under_the_reference(policy, reference, tokenizer):
    sampler = Sampler(
        policy, tokenizer, PROMPTS, max_new_tokens=1, max_length=512, reference=lambda: nullcontext(reference)
    )
    completions = generate(policy, tokenizer, PROMPTS, max_new_tokens=1, max_length=512, seed=5)
    for item, prompt, completion in zip(sampler.items(PROMPTS, seed=5), PROMPTS, completions, strict=True):
        ids, (token,) = torch.tensor([prompt_ids(prompt, tokenizer)]), completion.ids
        with torch.no_grad():
            ours, theirs = (m.eval()(ids).logits[0, -1].log_softmax(-1)[token] for m in (policy, reference))
        assert item.kl == pytest.approx(float(ours - theirs), abs=1e-5)
        assert abs(item.kl) > 1e-3
        assert item.length == 1
    assert sampler.metrics(sampler.items(PROMPTS, seed=5))["completion/length_mean"] == 1.0


def test_log_probabilities_do_not_depend_on_the_padding_around_them(policy):
    prompts, completions = [[5, 6, 7], [8] * 30], [[9, 10], [11] * 17]
    together = sequence_logprobs(policy, prompts, completions)
    alone = [sequence_logprobs(policy, [p], [c])[0] for p, c in zip(prompts, completions, strict=True)]
    assert together == pytest.approx(alone, rel=1e-5)


def test_only_the_logits_that_predict_completions_are_made(policy, monkeypatch):
    shapes = []
    forward = type(policy).forward
    signature = inspect.signature(forward)

    def watched(self, *args, **named):
        out = forward(self, *args, **named)
        shapes.append(tuple(out.logits.shape[:2]))
        return out

    watched.__signature__ = signature
    monkeypatch.setattr(type(policy), "forward", watched)
    sequence_logprobs(policy, [[5] * 60] * 3, [[6] * 4] * 3)
    assert shapes == [(3, 5)]


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_what_a_model_s_generation_config_favours_or_forbids_stays_out_of_the_samples(tiny_model, tokenizer, adapter):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    if adapter:
        model = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM"))

    def said():
        with undisturbed(model):
            found = generate(model, tokenizer, PROMPTS * 4, max_new_tokens=20, max_length=512, seed=3)
        return [completion.ids for completion in found]

    plain = said()
    stated = model.generation_config
    stated.update(repetition_penalty=5.0, min_p=0.9, no_repeat_ngram_size=1, typical_p=0.3, suppress_tokens=[7, 8, 9])
    assert said() == plain
    assert model.generation_config is stated and stated.repetition_penalty == 5.0
    # Its end tokens still end a completion.
    token = max(plain[0])
    stated.eos_token_id = [token]
    assert all(token not in ids[:-1] for ids in said()) and any(ids[-1] == token for ids in said())


def test_a_completion_stops_at_the_end_token_and_does_not_show_it(policy, tokenizer):
    held = policy.lm_head.weight.data.clone()
    try:
        with torch.no_grad():
            policy.lm_head.weight[tokenizer.eos_token_id] = 50 * policy.lm_head.weight.mean(0)
        with undisturbed(policy):
            said = generate(policy, tokenizer, ["Who?"] * 40, max_new_tokens=400, max_length=512, seed=1)
    finally:
        policy.lm_head.weight.data.copy_(held)
    ended = [c for c in said if c.ended]
    assert ended
    assert all(c.ids[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in c.ids[:-1] for c in ended)
    assert all("<end>" not in c.text and "<pad>" not in c.text for c in said)


def test_sampling_leaves_every_generator_and_every_mode_as_it_was(policy, reference, tokenizer):
    policy.train()
    policy.model.layers[0].eval()
    sampler = Sampler(
        policy, tokenizer, PROMPTS, max_new_tokens=3, max_length=512, reference=lambda: nullcontext(reference),
        gold=lambda prompts, completions: [random.random() + np.random.random() for _ in prompts],
    )  # fmt: skip
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    expected = torch.rand(3).tolist(), random.random(), np.random.random()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    items = sampler.items(PROMPTS, seed=2)
    assert (torch.rand(3).tolist(), random.random(), np.random.random()) == expected
    assert policy.training
    assert not policy.model.layers[0].training
    assert policy.model.layers[1].training
    assert all(item.gold is not None and item.reference_gold is not None for item in items)
    policy.train()


def test_the_reference_is_asked_once_for_each_prompt(policy, reference, tokenizer):
    sampler = Sampler(
        policy, tokenizer, PROMPTS, max_new_tokens=6, max_length=512, reference=lambda: nullcontext(reference)
    )
    first, later = sampler.items(PROMPTS, seed=1), sampler.items(PROMPTS, seed=2)
    assert [i.reference_completion for i in first] == [i.reference_completion for i in later]
    assert [i.completion for i in first] != [i.completion for i in later]
