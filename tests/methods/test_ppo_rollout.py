"""Sampling: what the decode loop gives is what the model says, whatever shares the batch."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, MistralConfig

from rlhf_nb.errors import SpecError
from rlhf_nb.maths.logprobs import position_ids
from rlhf_nb.methods.ppo import PPO
from rlhf_nb.training.actor_critic import ActorCritic, Reference, trunk_and_head
from rlhf_nb.training.rollout import cuda_graphs
from rlhf_nb.training.rollout.base import uniforms
from rlhf_nb.training.rollout.cuda_graphs import GraphSampler
from rlhf_nb.training.rollout.transformers_backend import TransformersSampler, buckets, pad_left, pick, roomy_cache

from .conftest import LETTERS, ROWS

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15]]
ENDS = set(range(20, 90))
"""Many end tokens, so that completions of a random model end at different places."""


@pytest.fixture
def model(tiny_model_maker):
    path = tiny_model_maker("still", dropout=0.0)
    return AutoModelForCausalLM.from_pretrained(path).double().eval()


@pytest.fixture
def sampler(model):
    return TransformersSampler(*trunk_and_head(model), end_tokens=ENDS, pad_token=1)


def naive(model, prompt, chance, temperature):
    """One row, no cache, no padding."""
    tokens, logprobs = list(prompt), []
    for u in chance:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens])).logits[0, -1] / temperature
        cumulative = logits.softmax(-1).cumsum(-1)
        token = int((cumulative <= u * cumulative[-1]).sum())
        logprobs.append(logits.log_softmax(-1)[token].item())
        tokens.append(token)
        if token in ENDS:
            break
    return tokens[len(prompt) :], logprobs


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_tokens_and_logprobs_are_those_of_each_row_decoded_alone(model, sampler, temperature):
    chance = uniforms(3, 0, range(4), 9)
    sampled = sampler.sample(PROMPTS, chance, temperature=temperature)
    lengths = set()
    for row, prompt in enumerate(PROMPTS):
        tokens, logprobs = naive(model, prompt, chance[row], temperature)
        mask = sampled.mask_BT[row]
        assert sampled.tokens_BT[row][mask].tolist() == tokens
        np.testing.assert_allclose(sampled.behavior_logprobs_BT[row][mask].numpy(), logprobs, rtol=1e-9)
        assert bool(sampled.ended_B[row]) == (tokens[-1] in ENDS)
        assert mask.tolist() == [True] * len(tokens) + [False] * (mask.numel() - len(tokens))
        lengths.add(len(tokens))
    assert len(lengths) > 1


def test_prompts_of_unlike_length_are_decoded_apart_and_come_back_in_their_order(model, sampler, monkeypatch):
    prompts = [[5] * 40, [6, 7], [8] * 38, [9], [10] * 14]
    chance = uniforms(4, 0, range(5), 9)
    widths = []
    genuine = TransformersSampler._sample
    monkeypatch.setattr(
        TransformersSampler,
        "_sample",
        lambda self, p, u, t: widths.append(sorted(map(len, p))) or genuine(self, p, u, t),
    )
    sampled = sampler.sample(prompts, chance, temperature=1.0)
    assert widths == [[1, 2], [14], [38, 40]]
    for row, prompt in enumerate(prompts):
        tokens, logprobs = naive(model, prompt, chance[row], 1.0)
        mask = sampled.mask_BT[row]
        assert sampled.tokens_BT[row][mask].tolist() == tokens and bool(sampled.ended_B[row]) == (tokens[-1] in ENDS)
        np.testing.assert_allclose(sampled.behavior_logprobs_BT[row][mask].numpy(), logprobs, rtol=1e-9)


def test_a_bucket_pads_nobody_beyond_twice_its_length():
    lengths = np.random.default_rng(0).integers(1, 400, 60).tolist()
    found = buckets(lengths, 16)
    assert sorted(row for rows in found for row in rows) == list(range(60))
    for rows in found:
        inside = [lengths[row] + 16 for row in rows]
        assert max(inside) <= 2 * min(inside) and rows == sorted(rows)
    assert buckets([3, 3, 3], 1) == [[0, 1, 2]]


def test_values_that_come_with_the_tokens_are_those_of_the_trainer(model):
    actor = ActorCritic(model, None, 32).double().eval()
    torch.nn.init.normal_(actor.value_head.weight)
    sampler = TransformersSampler(*trunk_and_head(model), end_tokens=ENDS, pad_token=1, value_head=actor.value_head)
    sampled = sampler.sample(PROMPTS, uniforms(3, 0, range(4), 9), temperature=0.7)
    tokens_BP, seen_BP = pad_left(PROMPTS, 1, torch.device("cpu"))
    with torch.no_grad():
        _, _, values = actor(
            torch.cat([tokens_BP, sampled.tokens_BT], 1), torch.cat([seen_BP, sampled.mask_BT], 1), sampled.mask_BT
        )
    torch.testing.assert_close(sampled.values_BT, values.masked_fill(~sampled.mask_BT, 0.0))
    assert sampled.values_BT[sampled.mask_BT].abs().min() > 0


def test_in_bf16_values_come_in_float32_from_trainer_and_sampler_alike(model):
    actor = ActorCritic(model.float(), None, 32, "bf16").eval()
    torch.nn.init.normal_(actor.value_head.weight, std=0.05)
    torch.nn.init.constant_(actor.value_head.bias, 5.0)
    sampler = TransformersSampler(
        *trunk_and_head(model), end_tokens=(), pad_token=1, precision="bf16", value_head=actor.value_head
    )
    sampled = sampler.sample(PROMPTS, uniforms(3, 0, range(4), 9), temperature=1.0)
    tokens_BP, seen_BP = pad_left(PROMPTS, 1, torch.device("cpu"))
    with torch.no_grad():
        _, _, values = actor(
            torch.cat([tokens_BP, sampled.tokens_BT], 1), torch.cat([seen_BP, sampled.mask_BT], 1), sampled.mask_BT
        )
    for each in (values, sampled.values_BT):
        # About 5, bfloat16 knows steps of 1/32 only.
        assert each.dtype == torch.float32 and (each * 32).frac().abs().max() > 0.01


def test_under_autocast_keys_are_kept_as_values_are(model):
    cache = roomy_cache(model.config, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model.float().model(input_ids=torch.tensor([[3, 4, 5]]), past_key_values=cache, use_cache=True)
    assert {each.dtype for layer in cache.layers for each in (layer.keys, layer.values)} == {torch.bfloat16}


def test_the_end_token_counts_where_it_is_also_the_pad_token(model):
    sampler = TransformersSampler(*trunk_and_head(model), end_tokens=ENDS | {1}, pad_token=25)
    sampled = sampler.sample(PROMPTS, uniforms(3, 0, range(4), 9), temperature=1.0)
    assert sampled.ended_B.any()
    for row in sampled.ended_B.nonzero().flatten().tolist():
        kept = sampled.tokens_BT[row][sampled.mask_BT[row]].tolist()
        assert kept[-1] in ENDS | {1} and not set(kept[:-1]) & (ENDS | {1})


def test_a_row_s_chance_does_not_depend_on_which_rows_are_drawn_with_it():
    whole = uniforms(7, 2, range(6), 5)
    np.testing.assert_array_equal(uniforms(7, 2, [1, 3, 5], 5), whole[[1, 3, 5]])
    np.testing.assert_array_equal(uniforms(7, 2, range(6), 3), whole[:, :3])
    for other in (uniforms(8, 2, range(6), 5), uniforms(7, 3, range(6), 5), uniforms(7, 1 << 60, range(6), 5)):
        assert not np.isin(other, whole).any()
    assert whole.min() >= 0 and whole.max() < 1


def test_tokens_are_picked_with_their_probabilities():
    logprobs = torch.tensor([0.5, 0.0, 0.3, 0.2], dtype=torch.float64).log()
    even = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    counts = pick(logprobs.expand(1000, 4), even).bincount(minlength=4)
    assert counts.tolist() == [500, 0, 300, 200]
    assert pick(logprobs[None], torch.zeros(1, dtype=torch.float64)).item() == 0
    assert pick(logprobs[None], torch.full((1,), 1 - 2**-53, dtype=torch.float64)).item() == 3


def test_the_trained_module_reads_the_logprobs_that_the_sampler_gave(model, sampler):
    sampled = sampler.sample(PROMPTS, uniforms(3, 0, range(4), 9), temperature=0.7)
    tokens_BP, seen_BP = pad_left(PROMPTS, 1, torch.device("cpu"))
    row = (torch.cat([tokens_BP, sampled.tokens_BT], 1), torch.cat([seen_BP, sampled.mask_BT], 1), sampled.mask_BT)
    module = ActorCritic(model, None, 32).double()
    logprobs = module(*row, temperature=0.7)[0]
    torch.testing.assert_close(logprobs, sampled.behavior_logprobs_BT, rtol=1e-9, atol=1e-12)
    theirs = Reference(None, model).logprobs(*row, temperature=0.7)
    torch.testing.assert_close(theirs, sampled.behavior_logprobs_BT, rtol=1e-9, atol=1e-12)
    # What stands under the pads, on either side, changes nothing.
    noise = torch.where(row[1], row[0], torch.randint(300, row[0].shape) % 260)
    again = module(noise, *row[1:], temperature=0.7)[0]
    torch.testing.assert_close(again, logprobs, rtol=1e-9, atol=1e-12)


def test_values_are_read_before_the_token_they_value(model):
    module = ActorCritic(model, None, 32).double()
    torch.nn.init.ones_(module.value_head.weight)
    tokens = torch.randint(2, 200, (2, 7))
    seen = torch.ones(2, 7, dtype=torch.bool)
    mask = torch.ones(2, 3, dtype=torch.bool)
    before = module(tokens, seen, mask)[2]
    changed = tokens.clone()
    changed[:, 5] += 1
    after = module(changed, seen, mask)[2]
    torch.testing.assert_close(after[:, :2], before[:, :2], rtol=1e-12, atol=1e-12)
    assert (after[:, 2] != before[:, 2]).all()


def test_positions_ignore_the_padding():
    assert position_ids(torch.tensor([[False, True, True]])).tolist() == [[0, 0, 1]]


# --- a static cache, and on a GPU a graph a step ----------------------------------------------------------------------


def same(left, right, **tolerance) -> None:
    assert torch.equal(left.mask_BT, right.mask_BT) and torch.equal(left.ended_B, right.ended_B)
    assert torch.equal(left.tokens_BT, right.tokens_BT)
    torch.testing.assert_close(left.behavior_logprobs_BT, right.behavior_logprobs_BT, **tolerance)
    if left.values_BT is not None:
        torch.testing.assert_close(left.values_BT, right.values_BT, **tolerance)


def both(model, head=None, ends=ENDS, **settings):
    settings = {"end_tokens": ends, "pad_token": 1, "value_head": head, **settings}
    static = partial(GraphSampler, room=64, limit=40)
    return [kind(*trunk_and_head(model), **settings) for kind in (TransformersSampler, static)]


EXACT = {"rtol": 1e-9, "atol": 1e-12}


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_static_cache_gives_the_same_completions(model, monkeypatch, temperature):
    """Looks are close together and lanes few, so that lanes are given up on the way, some of them half empty."""
    monkeypatch.setattr(cuda_graphs, "LOOK_EVERY", 3)
    monkeypatch.setattr(cuda_graphs, "FEWEST", 1)
    head = torch.nn.Linear(32, 1).double()
    plain, static = both(model, head)
    prompts = [PROMPTS[row % 4] for row in range(13)]
    chance = uniforms(5, 0, range(13), 40)
    left = plain.sample(prompts, chance, temperature=temperature)
    same(left, static.sample(prompts, chance, temperature=temperature), **EXACT)
    assert len(static._lanes.steps) > 1 and left.mask_BT.sum(1).unique().numel() > 3
    # The next rollout is written over the last: what was returned stays, what was written does not.
    other = uniforms(6, 0, range(9), 25)
    kept, lanes = static.sample(prompts, chance, temperature=temperature), static._lanes
    same(plain.sample(prompts[:9], other, temperature=1.0), static.sample(prompts[:9], other, temperature=1.0), **EXACT)
    assert static._lanes is lanes, "the same space"
    same(left, kept, **EXACT)
    few = [prompts[:3], chance[:3, :7]]
    same(plain.sample(*few, temperature=1.0), static.sample(*few, temperature=1.0), **EXACT)
    longer = [[*prompt, *range(30, 170)] for prompt in prompts]
    same(plain.sample(longer, chance, temperature=1.0), static.sample(longer, chance, temperature=1.0), **EXACT)
    assert static._lanes is lanes, "rows that do not fit go another way"
    more = uniforms(7, 0, range(40), 9)
    same(
        plain.sample(prompts[:4] * 10, more, temperature=1.0),
        static.sample(prompts[:4] * 10, more, temperature=1.0),
        **EXACT,
    )
    assert static._lanes is not lanes and static._lanes.rows > lanes.rows


def test_completions_that_never_end_fill_their_rows_and_one_token_is_a_completion_too(model):
    plain, static = both(model, ends=())
    for T in (1, 2, 17):
        chance = uniforms(5, T, range(4), T)
        sampled = static.sample(PROMPTS, chance, temperature=1.0)
        same(plain.sample(PROMPTS, chance, temperature=1.0), sampled, **EXACT)
        assert sampled.mask_BT.all() and sampled.mask_BT.shape == (4, T)


def test_steps_that_are_kept_follow_the_weights_and_forget_what_was_not_finite(model):
    plain, static = both(model)
    chance = uniforms(5, 0, range(4), 9)
    before = static.sample(PROMPTS, chance, temperature=1.0)
    start = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    same(plain.sample(PROMPTS, chance, temperature=1.0), static.sample(PROMPTS, chance, temperature=1.0), **EXACT)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
        static.sample(PROMPTS, chance, temperature=1.0)
        for name, parameter in model.named_parameters():
            parameter.copy_(start[name])
    same(before, static.sample(PROMPTS, chance, temperature=1.0), **EXACT)
    # Put elsewhere, a graph would not find them.
    lanes = static._lanes
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 2)
    same(plain.sample(PROMPTS, chance, temperature=1.0), static.sample(PROMPTS, chance, temperature=1.0), **EXACT)
    assert static._lanes is not lanes


@pytest.mark.parametrize("adapter", [False, True])
def test_in_bf16_it_reads_the_weights_of_now_too(model, adapter):
    policy = model.float()
    if adapter:
        policy = get_peft_model(policy, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    trainer, (_, static) = ActorCritic(policy, None, None, "bf16"), both(policy, precision="bf16", ends=())
    tokens_BP, seen_BP = pad_left(PROMPTS, 1, torch.device("cpu"))
    said = []
    for _ in range(2):
        sampled = static.sample(PROMPTS, uniforms(5, 0, range(4), 9), temperature=1.0)
        row = (torch.cat([tokens_BP, sampled.tokens_BT], 1), torch.cat([seen_BP, sampled.mask_BT], 1), sampled.mask_BT)
        with torch.no_grad():
            torch.testing.assert_close(trainer(*row)[0], sampled.behavior_logprobs_BT, rtol=0, atol=0.1)
        said.append(sampled.behavior_logprobs_BT[:, 0])
        with torch.no_grad():
            for parameter in policy.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter))
    assert (said[0] - said[1]).abs().max() > 0.2


def test_what_a_graph_cannot_hold_is_refused_in_one_line(tiny_model_maker, job):
    with pytest.raises(SpecError, match="attention is eager, and a graph needs sdpa"):
        both(AutoModelForCausalLM.from_pretrained(tiny_model_maker("still"), attn_implementation="eager"))
    config = MistralConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=16, sliding_window=4,
    )  # fmt: skip
    with pytest.raises(SpecError, match=r"keep other things than all keys \(DynamicSlidingWindowLayer\)"):
        both(AutoModelForCausalLM.from_config(config))
    job.model = tiny_model_maker("still", dropout=0.0)
    with pytest.raises(SpecError, match="ppo: cuda_graphs=True needs a CUDA device and this one is cpu; leave it out"):
        job("ppo", ROWS, config={"cuda_graphs": True, "max_length": 80}, reward=LETTERS)
    with pytest.raises(SpecError, match="cuda_graphs=True is of rollout_backend=transformers; vllm has its own"):
        PPO(cuda_graphs=True, rollout_backend="vllm").check(job.prepare("ppo", ROWS, reward=LETTERS).spec())


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_graphs_on_a_gpu_give_what_the_loop_gives(model, precision):
    policy = model.float().cuda()
    plain, static = both(policy, precision=precision)
    chance = uniforms(5, 0, range(4), 40)
    for _ in range(2):
        left, right = (one.sample(PROMPTS, chance, temperature=0.8) for one in (plain, static))
        # bf16 may flip a token whose chance lies at an edge: the first is read from the same prefill.
        torch.testing.assert_close(left.behavior_logprobs_BT[:, 0], right.behavior_logprobs_BT[:, 0], rtol=0, atol=0.05)
        if precision == "fp32":
            same(left, right, rtol=0, atol=1e-4)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    assert static.capture
    # More rows: other lanes, other graphs, another pool.
    more = uniforms(5, 0, range(40), 40)
    left, right = (one.sample(PROMPTS * 10, more, temperature=0.8) for one in (plain, static))
    torch.testing.assert_close(left.behavior_logprobs_BT[:, 0], right.behavior_logprobs_BT[:, 0], rtol=0, atol=0.05)
