"""bf16: what computes in it, what is held in it, and what stays in float32."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rlhf_nb.protocol.spec import LoRA, ModelReward, PathModel
from rlhf_nb.rewards.model import RewardModelScorer
from rlhf_nb.training import actor_critic, models
from rlhf_nb.training.precision import halve_frozen

from .conftest import ROWS, fold, rollouts

CONFIG = {
    "max_steps": 4, "rollout_batch_size": 4, "batch_size": 2, "max_new_tokens": 6, "max_length": 80,
    "sample_every": 0, "learning_rate": 1e-2, "kl_coef": 0.2,
}  # fmt: skip


def small(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2)).eval()
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=kind == "tied",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2"])
def test_frozen_weights_in_half_the_memory_change_no_output_and_no_gradient(kind):
    tokens = torch.arange(12).reshape(2, 6)
    found = []
    for halved in (False, True):
        torch.manual_seed(1)
        model = get_peft_model(small(kind), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        if halved:
            halve_frozen(model)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(tokens).logits
        logits.float().logsumexp(-1).sum().backward()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert {p.dtype for p in trained.values()} == {torch.float32}
        found.append((logits, {name: p.grad for name, p in trained.items()}))
        embedding = model.get_base_model().get_input_embeddings().weight
        low = [n for n, p in model.named_parameters() if p.dtype == torch.bfloat16]
        assert embedding.dtype == torch.float32 and bool(low) == halved
    (plain, gradients), (same, again) = found
    assert torch.equal(plain, same) and gradients.keys() == again.keys()
    assert all(torch.equal(gradients[name], again[name]) for name in gradients)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux")
def test_a_model_of_which_nothing_trains_keeps_no_file_of_weights_in_memory(tmp_path):
    def mapped() -> bool:
        return str(tmp_path) in Path("/proc/self/maps").read_text()

    small("llama").save_pretrained(tmp_path)
    model = models.load_model(str(tmp_path)).requires_grad_(False)
    assert mapped(), "or there is nothing to let go of"
    halve_frozen(model)
    assert not mapped()


@pytest.mark.parametrize("adapter", [None, LoRA(r=4)], ids=["full", "lora"])
def test_bf16_computes_in_bf16_and_keeps_what_matters_in_fp32(ppo, adapter):
    plain, low = ppo("plain", adapter=adapter), ppo("low", adapter=adapter, precision="bf16")
    gaps = [
        row.values["rollout/logprob_mismatch"] for row in fold(low).rows if "rollout/logprob_mismatch" in row.values
    ]
    assert gaps and max(gaps) < 0.05
    assert not [n for n in fold(low).notices if n.code == "kl_doctor/mismatch"]
    one, other = (rollouts(place)[0]["reward/score"] for place in (plain, low))
    assert one == pytest.approx(other, abs=0.5)
    saved = load_file(low.model / "model.safetensors")
    assert {str(weight.dtype) for weight in saved.values()} == {"torch.float32"}
    losses = [[r.values["loss"] for r in fold(p).rows if "loss" in r.values] for p in (plain, low)]
    assert losses[0] != losses[1] and all(math.isfinite(value) for value in losses[1])


@pytest.mark.parametrize(
    ("adapter", "value_model"),
    [(None, "own"), (LoRA(r=4), "own"), (LoRA(r=4), "policy_trunk")],
    ids=["full", "two adapters", "shared trunk"],
)
def test_what_nothing_trains_is_held_in_half_the_memory_and_the_run_is_the_same_to_the_bit(
    ppo, monkeypatch, adapter, value_model
):
    knobs = {"adapter": adapter, "precision": "bf16", "value_model": value_model}
    held = []

    def watched(module):
        halve_frozen(module)
        held.append({p.dtype for n, p in module.named_parameters() if "q_proj" in n and not p.requires_grad})

    monkeypatch.setattr(actor_critic, "halve_frozen", watched)
    low = ppo("low", **knobs)
    monkeypatch.setattr(actor_critic, "halve_frozen", lambda module: None)
    whole = ppo("whole", **knobs)
    assert held == [{torch.bfloat16}]
    untimed = [
        [{n: v for n, v in row.values.items() if not n.startswith("time/")} for row in fold(place).rows]
        for place in (low, whole)
    ]
    assert untimed[0] == untimed[1] and untimed[0]
    assert all(
        torch.equal(weight, load_file(whole.model / "model.safetensors")[name])
        for name, weight in load_file(low.model / "model.safetensors").items()
    )


def test_an_average_of_the_policy_moves_in_float32(ppo):
    low = ppo("low", precision="bf16", reference="ema", reference_decay=0.5, checkpoint_every=2)
    kept = [load_file(path) for path in Path(low.path).rglob("reference.safetensors")]
    assert kept and {w.dtype for one in kept for w in one.values()} == {torch.float32}


@pytest.mark.parametrize("adapter", [None, LoRA(r=2)], ids=["alone", "on the policy's backbone"])
def test_a_reward_model_computes_in_bf16_too_and_its_score_stays_fine(ppo, job, adapter, monkeypatch):
    pairs = [{"prompt": row["prompt"], "chosen": "It is far.", "rejected": "zzz"} for row in ROWS]
    config = {"max_steps": 4, "batch_size": 2, "max_length": 80, "learning_rate": 1e-2}
    rm = job("reward", pairs, name="rm", config=config, adapter=adapter)
    reward = ModelReward(model=PathModel(path=str(rm.model)))
    said = {}
    genuine = RewardModelScorer.score

    def heard(self, prompts, completions):
        scores = genuine(self, prompts, completions)
        said.setdefault(self.bf16, []).extend(zip(prompts, completions, scores, strict=True))
        return scores

    monkeypatch.setattr(RewardModelScorer, "score", heard)
    run = ppo("low", adapter=adapter, precision="bf16", reward=reward)
    assert any(n.code == "shared_backbone" for n in fold(run).notices) == (adapter is not None)
    assert list(said) == [True]
    prompts, completions, scores = (list(each) for each in zip(*said[True], strict=True))
    exact = genuine(RewardModelScorer.load(str(rm.model)), prompts, completions)
    assert scores == pytest.approx(exact, abs=0.05) and scores != exact
    # A head in bfloat16 gives nothing else than bfloat16's numbers.
    assert any(score != torch.tensor(score).bfloat16().item() for score in scores)
