"""Adapters of every method: what is saved, whose base they belong to, merged, taken off, and in 4 bits."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import rlhf_nb as rl
from rlhf_nb.errors import SpecError
from rlhf_nb.protocol.spec import FunctionReward, LoRA, PathModel
from rlhf_nb.toy import demonstrations, pairs, prompts, thumbs
from rlhf_nb.training import adapters, models

ROWS = {
    "sft": demonstrations(4),
    "dpo": pairs(4),
    "kto": thumbs(8),
    "orpo": pairs(4),
    "simpo": pairs(4),
    "online-dpo": prompts(4),
    "reward": pairs(4),
}
LETTERS = FunctionReward(
    name="letters", source="def f(prompts, completions, **c):\n    return [len(x) for x in completions]"
)
CONFIG = {"max_steps": 2, "batch_size": 2, "sample_every": 0, "learning_rate": 1e-2, "max_length": 200}
LORA = LoRA(r=4, alpha=8)


def load(path, method=""):
    if method == "reward":
        return AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
    return AutoModelForCausalLM.from_pretrained(path)


def weights(path, method=""):
    return load(path, method).state_dict()


def with_adapter(base, adapter, method=""):
    return PeftModel.from_pretrained(load(base, method), adapter).merge_and_unload().state_dict()


@pytest.mark.parametrize("quantize", ["none", "4bit"])
@pytest.mark.parametrize("method", ROWS)
def test_every_method_saves_the_base_in_full_with_its_adapter_merged_in(
    job, tiny_model_maker, monkeypatch, method, quantize
):
    # On a CPU its gradients are wrong, and it is refused; what stands on what, and what is saved, is the same there.
    monkeypatch.setattr(models, "FOUR_BIT_DEVICES", ("cpu", "cuda"))
    # Blocks of 64 numbers share a scale.
    job.model = tiny_model_maker("wide", hidden_size=64, intermediate_size=128, dropout=0.0)
    packed = []
    from rlhf_nb.training.trainer import SteeredTrainer

    train = SteeredTrainer.train

    def watched(self):
        packed.append(sum(type(p).__name__ == "Params4bit" for p in self.trainer.model.parameters()))
        train(self)

    monkeypatch.setattr(SteeredTrainer, "train", watched)
    reward = {"reward": LETTERS} if method == "online-dpo" else {}
    adapter = LORA.model_copy(update={"quantize": quantize})
    place = job(method, ROWS[method], config=CONFIG, adapter=adapter, **reward)
    # Seven linear layers in each of two blocks.
    assert packed == [14 if quantize == "4bit" else 0]
    saved, start = weights(place.model, method), weights(job.model, method)
    for name, expected in with_adapter(job.model, place.model / "adapter", method).items():
        torch.testing.assert_close(saved[name], expected, msg=name)
    moved = {name for name in start if not torch.equal(saved[name], start[name])}
    # A reward model's head is new, and trained whole.
    assert moved and all("proj" in name or (method == "reward" and name == "score.weight") for name in moved)
    assert json.loads((place.model / "adapter" / "base.json").read_text())["name"] == "wide"


def test_four_bits_on_a_cpu_are_refused_in_words_and_so_are_members_on_one_base(job, tmp_path):
    with (
        rl.Workspace(tmp_path / "w") as ws,
        pytest.raises(SpecError, match="quantize=4bit: members=3 stand on a base in full; use quantize=none"),
    ):
        ws.train(rl.RewardModel(members=3), base="toy", data="toy-pairs", adapter=LoRA(quantize="4bit"))
    with pytest.raises(SpecError, match="no gradient goes through bitsandbytes' 4-bit layers on cpu; it needs CUDA"):
        job("dpo", ROWS["dpo"], config=CONFIG, adapter=LoRA(quantize="4bit"))


@pytest.fixture
def lora(job):
    return job("sft", ROWS["sft"], config=CONFIG, adapter=LORA)


def test_taking_the_adapter_off_a_merged_model_gives_the_base_back(job, lora, tmp_path):
    adapters.unmerge(lora.model, lora.model / "adapter", tmp_path / "off")
    off, base, merged = weights(tmp_path / "off"), weights(job.model), weights(lora.model)
    for name in base:
        # One float32 sum and its difference.
        torch.testing.assert_close(off[name], base[name], rtol=0, atol=1e-7, msg=name)
    assert max((merged[name] - base[name]).abs().max() for name in base) > 1e-3
    assert (tmp_path / "off" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"target_modules": ["q_proj"], "use_dora": True}, r"more than a product of two matrices at .*\.q_proj"),
        ({"target_modules": ["embed_tokens"]}, r"more than a product of two matrices at .*\.embed_tokens"),
        ({"target_modules": ["q_proj"], "bias": "all"}, "trained biases or tokens"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [3]}, "trained biases or tokens"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "trained lm_head whole"),
        ({"target_modules": ["q_proj"], "init_lora_weights": "pissa"}, r"began as a part of its base \(pissa\)"),
        ({"target_modules": ["q_proj"], "init_lora_weights": "olora"}, r"began as a part of its base \(olora\)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_an_adapter_that_is_more_than_a_product_is_not_taken_off(tiny_model, tmp_path, settings, says):
    adapter = tmp_path / "adapter"
    get_peft_model(load(tiny_model), LoraConfig(r=2, task_type="CAUSAL_LM", **settings)).save_pretrained(adapter)
    with pytest.raises(SpecError, match=f'adapter "adapter" .*{says}.*; take the base itself') as said:
        adapters.unmerge(tiny_model, adapter, tmp_path / "off")
    assert "\n" not in str(said.value) and not (tmp_path / "off").exists()


def test_a_stage_that_starts_from_an_adapter_starts_from_what_it_makes_of_its_base(job, lora, monkeypatch, tmp_path):
    monkeypatch.setenv("RLHF_NB_CACHE", str(tmp_path / "cache"))
    still = {**CONFIG, "max_steps": 1, "learning_rate": 0.0}
    adapter = PathModel(path=str(lora.model / "adapter"))
    place = job("sft", ROWS["sft"], name="next", config=still, policy=adapter, adapter=LORA)
    merged, again = weights(lora.model), weights(place.model)
    assert all(torch.equal(merged[name], again[name]) for name in merged)
    # Stacked: the second adapter belongs to the first one's merged model, not to the base below.
    note = json.loads((place.model / "adapter" / "base.json").read_text())
    assert note["fingerprint"] == adapters.fingerprint(lora.model) != adapters.fingerprint(job.model)
    with pytest.raises(SpecError, match='adapter "adapter" was trained on "adapter" and the base here'):
        adapters.check_base(place.model / "adapter", job.model)


def test_a_base_of_the_same_shape_and_other_weights_is_refused_with_both_names(job, lora, tiny_model_maker):
    other = tiny_model_maker("other")
    state = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        state.lm_head.weight += 1e-3
    state.save_pretrained(other)
    with pytest.raises(
        SpecError, match=r'was trained on "tiny" and the base here, .*/other, has other weights'
    ) as said:
        adapters.merge(other, lora.model / "adapter", other.parent / "merged")
    assert "\n" not in str(said.value)
    # The same weights somewhere else are the same base.
    shutil.copytree(job.model, other.parent / "copy")
    adapters.check_base(lora.model / "adapter", other.parent / "copy")
