"""Models that are not built as Llama is: samplers and trainers say what they say themselves, or refuse them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rlhf_nb.errors import SpecError
from rlhf_nb.feedback.local import LocalChat
from rlhf_nb.protocol.spec import LoRA
from rlhf_nb.training import actor_critic, models
from rlhf_nb.training.actor_critic import ActorCritic, chances, check_trunk_and_head, trunk_and_head, without_dropout
from rlhf_nb.training.completer import completer
from rlhf_nb.training.rollout.base import uniforms
from rlhf_nb.training.rollout.transformers_backend import TransformersSampler, pad_left

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.3,
}  # fmt: skip
LINEAR = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
EYES = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
BUILT: dict[str, dict] = {
    "granite": {"logits_scaling": 8.0},
    "cohere": {},
    "gemma2": {"head_dim": 8, "sliding_window": 6, "final_logit_softcapping": 3.0},
    "gemma3": {
        "text_config": SIZES | {"head_dim": 8, "sliding_window": 6}, "vision_config": EYES, "mm_tokens_per_image": 4,
        "image_token_index": 96, "boi_token_index": 95, "eoi_token_index": 94,
    },
    "qwen3_5_text": {"head_dim": 8} | LINEAR,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.1},
    "falcon": {"hidden_dropout": 0.2},
    "starcoder2": {"residual_dropout": 0.2, "attention_dropout": 0.3},
}  # fmt: skip
"""Logits that are scaled or capped, eyes, states of linear attention and convolutions, dropout that is no module."""
CLOSE = 2e-5
"""Nats: of float32, in which the worst of these is 2e-6 off. What was wrong before was 0.02 off and more."""
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15], [16, 17, 18], [19, 20]]


def built(kind: str, **settings):
    torch.manual_seed(0)
    sizes = {} if kind == "gemma3" else SIZES
    config = AutoConfig.for_model(kind, **{**sizes, **BUILT.get(kind, {}), **settings})
    return AutoModelForCausalLM.from_config(config).float().eval()


def sampled(model):
    """Completions, and the rows that they stand in as a trainer reads them."""
    # Rows end at different tokens, so that the batch gets smaller.
    sampler = TransformersSampler(*trunk_and_head(model), end_tokens=range(20, 60), pad_token=0)
    said = sampler.sample(PROMPTS, uniforms(3, 0, range(6), 9), temperature=1.0)
    tokens_BP, seen_BP = pad_left(PROMPTS, 0, torch.device("cpu"))
    return said, (torch.cat([tokens_BP, said.tokens_BT], 1), torch.cat([seen_BP, said.mask_BT], 1), said.mask_BT)


@pytest.mark.parametrize("kind", BUILT)
@torch.no_grad()
def test_sampler_and_trainer_give_the_log_probabilities_of_the_model_itself(kind):
    model = built(kind)
    check_trunk_and_head(model)
    said, rows = sampled(model)
    assert said.ended_B.any() and len(set(said.mask_BT.sum(1).tolist())) > 1
    read, _, _ = ActorCritic(model, None, None)(*rows)
    torch.testing.assert_close(read, said.behavior_logprobs_BT, rtol=0, atol=CLOSE)
    for row, prompt in enumerate(PROMPTS):
        ids = said.tokens_BT[row][said.mask_BT[row]].tolist()
        logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        own = logits.log_softmax(-1)[range(len(ids)), ids]
        np.testing.assert_allclose(said.behavior_logprobs_BT[row, : len(ids)], own, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("kind", ["opt", "falcon", "starcoder2"])
@torch.no_grad()
def test_without_dropout_train_mode_computes_what_eval_mode_does(kind):
    model = built(kind)
    actor = ActorCritic(model, None, None)
    _, rows = sampled(model)
    still = actor(*rows)[0]
    assert not torch.equal(actor.train()(*rows)[0], still) and list(chances(actor))
    stated = model.config.to_dict()
    without_dropout(actor)
    assert torch.equal(actor(*rows)[0], still) and not list(chances(actor))
    assert model.config.to_dict() == stated, "what is saved keeps its rates"


@pytest.mark.parametrize("adapter", [None, LoRA(r=2)], ids=["full", "lora"])
def test_of_a_model_with_eyes_everything_that_trains_gets_a_gradient(tmp_path, adapter):
    built("gemma3").save_pretrained(tmp_path / "eyes")
    context = SimpleNamespace(spec=SimpleNamespace(adapter=adapter))
    module, _ = actor_critic.load(context, str(tmp_path / "eyes"), value_model="own")
    torch.nn.init.normal_(module.value_head.weight)
    rows = (torch.randint(3, 90, (2, 9)), torch.ones(2, 9, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool))
    logprobs, _, values = module(*rows)
    (logprobs.sum() + values.sum()).backward()
    trained = {name: each.grad is not None for name, each in module.named_parameters() if each.requires_grad}
    assert all(trained.values()) and any("language_model" in name for name in trained)
    assert not any("vision" in name for name in trained)
    # What trains beside online methods is frozen the same way, and a model of text alone stays as it is.
    whole, plain = models.load_model(str(tmp_path / "eyes")), built("granite")
    for each in (whole, plain):
        models.freeze_beside_text(each)
    frozen = {name.split(".")[1] for name, each in whole.named_parameters() if not each.requires_grad}
    assert frozen == {"vision_tower", "multi_modal_projector"} and all(p.requires_grad for p in plain.parameters())


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("hyperclovax", "HyperCLOVAXForCausalLM changes its logits after its output embedding"),
        ("mamba", "MambaForCausalLM decodes with a state of its own"),
    ],
)
def test_what_is_not_followed_is_refused_wherever_it_would_sample(tiny_model, tmp_path, kind, says):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = built(kind, vocab_size=len(tokenizer), **({"logits_scaling": 3.0} if kind == "hyperclovax" else {}))
    model.save_pretrained(tmp_path / kind)
    tokenizer.save_pretrained(tmp_path / kind)
    with pytest.raises(SpecError, match=says):
        completer(str(tmp_path / kind), device=torch.device("cpu"))
    with pytest.raises(SpecError, match=says):
        LocalChat.load(str(tmp_path / kind), name="judge", device="cpu")
    context = SimpleNamespace(spec=SimpleNamespace(adapter=None))
    with pytest.raises(SpecError, match=says):
        actor_critic.load(context, str(tmp_path / kind), value_model="none")


@pytest.mark.gpu
def test_a_model_on_the_accelerator_is_looked_at_there():
    check_trunk_and_head(built("granite").cuda())
