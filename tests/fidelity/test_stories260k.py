"""A pretrained policy that none of us made: a 260,000-parameter Llama of children's stories, and PPO on it.

Its file is converted to Hugging Face's format here, and must say what its reference implementation says.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf_nb.protocol.fold import RunFold
from rlhf_nb.protocol.spec import FunctionReward, PathModel

BEGIN = 1


def read_weights(path: Path) -> tuple[LlamaConfig, dict[str, torch.Tensor]]:
    """The layout of llama2.c's first file version: seven integers, then float32 arrays layer after layer."""
    raw = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocabulary, length = struct.unpack("7i", raw[:28])
    numbers = torch.frombuffer(bytearray(raw[28:]), dtype=torch.float32)
    at, kv_dim = 0, dim // heads * kv_heads

    def take(*shape: int) -> torch.Tensor:
        nonlocal at
        found = numbers[at : at + math.prod(shape)].reshape(shape).clone()
        at += math.prod(shape)
        return found

    def halves(weight: torch.Tensor, n: int) -> torch.Tensor:
        """Rotary pairs lie next to each other there, and half a head apart in transformers."""
        rows, columns = weight.shape
        return weight.view(n, rows // n // 2, 2, columns).transpose(1, 2).reshape(rows, columns)

    embedding = take(vocabulary, dim)
    stacks = {
        "input_layernorm": take(layers, dim), "self_attn.q_proj": take(layers, dim, dim),
        "self_attn.k_proj": take(layers, kv_dim, dim), "self_attn.v_proj": take(layers, kv_dim, dim),
        "self_attn.o_proj": take(layers, dim, dim), "post_attention_layernorm": take(layers, dim),
        "mlp.gate_proj": take(layers, hidden, dim), "mlp.down_proj": take(layers, dim, hidden),
        "mlp.up_proj": take(layers, hidden, dim),
    }  # fmt: skip
    weights = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding, "model.norm.weight": take(dim)}
    for name, stack in stacks.items():
        for layer, weight in enumerate(stack):
            n = {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads}.get(name)
            weights[f"model.layers.{layer}.{name}.weight"] = halves(weight, n) if n else weight
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=dim, intermediate_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=length, rms_norm_eps=1e-5,
        rope_theta=10000.0, tie_word_embeddings=True, bos_token_id=BEGIN, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return config, weights


def read_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    raw, at, pieces = path.read_bytes(), 4, []
    while at < len(raw):
        score, size = struct.unpack("fI", raw[at : at + 8])
        pieces.append((raw[at + 8 : at + 8 + size].decode(), score))
        at += 8 + size
    names = ["<unk>", "<s>", "</s>", *(piece for piece, _ in pieces[3:])]
    numbers = {name: number for number, name in enumerate(names)}
    # A piece may be made of any two pieces that spell it; the earlier a piece was learnt, the earlier it is made.
    merges = [
        (piece[:cut], piece[cut:])
        for piece, _ in sorted(pieces[259:], key=lambda one: -one[1])
        for cut in range(1, len(piece))
        if piece[:cut] in numbers and piece[cut:] in numbers
    ]
    made = Tokenizer(models.BPE(numbers, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Prepend(" ")
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BEGIN)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<unk>")


@pytest.fixture(scope="module")
def stories(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stories")
    config, weights = read_weights(shared_data / "lm" / "stories260K.bin")
    model = LlamaForCausalLM(config)
    model.load_state_dict(weights)
    model.save_pretrained(folder)
    read_tokenizer(shared_data / "lm" / "tok512.bin").save_pretrained(folder)
    return folder


@torch.no_grad()
def test_it_says_what_its_reference_implementation_says(stories, shared_data):
    model = LlamaForCausalLM.from_pretrained(stories).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(stories)
    for golden in json.loads((shared_data / "answer_keys" / "stories260K_golden_dev.json").read_text()):
        ids = golden["token_ids"]
        prompt = tokenizer(golden["prompt"])["input_ids"]
        assert prompt == ids[: len(prompt)]
        said = torch.tensor([prompt])
        while said.shape[1] < len(ids):
            said = torch.cat([said, model(said).logits[:, -1:].argmax(-1)], 1)
        assert said[0].tolist() == ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == golden["greedy_text"]
        scores = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        nll = -scores.gather(1, torch.tensor(ids[1:])[:, None]).sum().item()
        assert nll == pytest.approx(golden["sum_nll_nats"], abs=1e-3)


def test_ppo_raises_a_simple_reward_at_a_bounded_kl(stories, job):
    """Commas, at most three of them: anybody can check the count."""
    reward = FunctionReward(
        name="commas",
        source="def commas(prompts, completions):\n    return [min(3, text.count(',')) for text in completions]",
    )
    rows = [
        {"prompt": p} for p in ("Once upon a time", "One day, a girl", "Tom had a ball", "The sun was", "A big dog")
    ]
    config = {
        "max_steps": 80, "rollout_batch_size": 64, "batch_size": 32, "num_ppo_epochs": 2, "max_new_tokens": 24,
        "max_length": 64, "sample_every": 0, "learning_rate": 1e-3, "kl_coef": 0.1,
    }  # fmt: skip
    place = job("ppo", rows, config=config, reward=reward, policy=PathModel(path=str(stories)))
    folded = RunFold()
    for event in place.events():
        folded.add(event)
    rollouts = [row for row in folded.table() if "reward/score" in row]
    first, last = (
        {name: sum(row[name] for row in rows) / 3 for name in ("reward/score", "reward/mean", "kl/policy_reference")}
        for rows in (rollouts[:3], rollouts[-3:])
    )
    assert last["reward/score"] > first["reward/score"] + 0.5
    # What the tether costs is paid out of what was gained: β·KL stays below the gain, which is at most 3.
    assert last["reward/mean"] > first["reward/mean"] + 0.2
    assert 0 < last["kl/policy_reference"] < 3 / config["kl_coef"]
    assert not [
        notice for notice in folded.notices if notice.code.startswith("kl_doctor/") and notice.level == "warning"
    ]
