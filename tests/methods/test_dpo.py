from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_nb.errors import SpecError
from rlhf_nb.maths.preference import dpo_loss
from rlhf_nb.methods.dpo import DPO
from rlhf_nb.protocol.spec import LoRA, RunModel
from rlhf_nb.toy import demonstrations, pairs
from rlhf_nb.training.data import conversation_ids, prompt_ids
from rlhf_nb.training.sampling import sequence_logprobs

CONFIG = {"max_steps": 3, "batch_size": 2, "sample_every": 0, "learning_rate": 1e-2, "max_length": 400}


@pytest.fixture
def job(job, tiny_model_maker):
    # TRL switches dropout modules off and leaves the attention's own on: the policy would never be the reference.
    job.model = tiny_model_maker("still", dropout=0.0)
    return job


def test_at_the_reference_the_loss_is_log_two_and_every_log_ratio_is_zero(job, trace):
    place = job("dpo", pairs(4), config=CONFIG)
    assert trace(place, "loss")[1] == pytest.approx(math.log(2), rel=1e-6)
    assert trace(place, "log_ratio/margin")[1] == 0.0
    assert trace(place, "log_ratio/margin")[3] != 0.0


@pytest.mark.parametrize("adapter", [None, LoRA(r=4)])
def test_the_reference_is_the_saved_policy_it_starts_from(job, trace, adapter):
    sft = job("sft", demonstrations(6), name="sft-1", config=CONFIG)
    place = job(
        "dpo",
        pairs(1),
        name="dpo-1",
        policy=RunModel(run_id="sft-1"),
        config={**CONFIG, "batch_size": 1},
        adapter=adapter,
    )
    (row,) = pairs(1)
    tokenizer = AutoTokenizer.from_pretrained(sft.model)
    reference = AutoModelForCausalLM.from_pretrained(sft.model)
    prompt = prompt_ids(row["prompt"], tokenizer)

    def logprob(model, side):
        return sequence_logprobs(
            model, [prompt], [conversation_ids(row["prompt"], row[side], tokenizer)[len(prompt) :]]
        )[0]

    # Step 1: the policy still is the reference.
    for side in ("chosen", "rejected"):
        assert trace(place, f"logprob/{side}")[1] == pytest.approx(logprob(reference, side), rel=1e-5)
        said = trace(place, f"logprob/{side}")[3] - trace(place, f"log_ratio/{side}")[3]
        assert said == pytest.approx(logprob(reference, side), rel=1e-4)


def test_the_loss_is_equation_seven_of_our_own_maths(job, trace):
    place = job("dpo", pairs(3), config={**CONFIG, "batch_size": 1, "beta": 0.4})
    for step in (2, 3):
        reference = {
            s: trace(place, f"logprob/{s}")[step] - trace(place, f"log_ratio/{s}")[step] for s in ("chosen", "rejected")
        }
        policy = {s: trace(place, f"logprob/{s}")[step] for s in ("chosen", "rejected")}
        loss = dpo_loss(
            torch.tensor([policy["chosen"]]), torch.tensor([policy["rejected"]]),
            torch.tensor([reference["chosen"]]), torch.tensor([reference["rejected"]]), beta=0.4,
        )  # fmt: skip
        loss = loss[0] if isinstance(loss, tuple) else loss
        assert trace(place, "loss")[step] == pytest.approx(float(loss.mean()), rel=1e-3)


def test_lora_saves_a_policy_that_plain_transformers_loads(job):
    place = job("dpo", pairs(4), config=CONFIG, adapter=LoRA(r=4))
    assert AutoModelForCausalLM.from_pretrained(place.model).num_parameters() == sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(job.model).parameters()
    )
    assert (place.model / "adapter" / "adapter_config.json").exists()


def test_samples_carry_the_tether(job, trace):
    place = job("dpo", pairs(4), config={**CONFIG, "sample_every": 3, "sample_tokens": 6})
    assert set(trace(place, "kl/policy_reference")) == {3}
    (samples,) = [e for e in place.events() if e.kind == "samples"]
    assert trace(place, "kl/policy_reference")[3] == pytest.approx(
        sum(i.kl for i in samples.items) / len(samples.items)
    )


def test_beta_must_be_positive():
    with pytest.raises(SpecError, match=r"dpo: beta=-1: should be greater than 0"):
        DPO.create(beta=-1)
