from __future__ import annotations

import inspect
import math
import re
from typing import NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_nb.compute.rundir import append_line
from rlhf_nb.errors import SpecError
from rlhf_nb.maths.preference import dpo_loss
from rlhf_nb.methods.dpo import DPO, LOSSES, SMOOTHED, TRL_LOSSES
from rlhf_nb.protocol.control import SetCoefficient
from rlhf_nb.protocol.spec import LoRA, RunModel, RunSpec
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


# --- the other losses: each step's loss, redone by its paper's formula from the logged log-ratios ---------------------


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > -30 else x


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def smoothed(margin: float, share: float) -> float:
    return -(1 - share) * log_sigmoid(margin) - share * log_sigmoid(-margin)


def robust(margin: float, share: float) -> float:
    return (-(1 - share) * log_sigmoid(margin) + share * log_sigmoid(-margin)) / (1 - 2 * share)


def exo(margin: float, share: float) -> float:
    """KL of the policy's preference to the smoothed label's."""
    return sigmoid(margin) * (log_sigmoid(margin) - math.log(1 - share)) + sigmoid(-margin) * (
        log_sigmoid(-margin) - math.log(share)
    )


def discopop(margin: float, tau: float = 0.05) -> float:
    mix = sigmoid(margin / tau)
    return -log_sigmoid(margin) * (1 - mix) + math.exp(-margin) * mix


class Pair(NamedTuple):
    """Log-ratios of the two sides, summed over their tokens."""

    chosen: float
    rejected: float
    chosen_tokens: int
    rejected_tokens: int
    chosen_logprob: float = 0.0


B, SHARE = 0.3, 0.2
FORMULAS = {
    "sigmoid": lambda p: -log_sigmoid(B * (p.chosen - p.rejected)),
    "sigmoid_norm": lambda p: -log_sigmoid(B * (p.chosen / p.chosen_tokens - p.rejected / p.rejected_tokens)),
    "ipo": lambda p: (p.chosen / p.chosen_tokens - p.rejected / p.rejected_tokens - 1 / (2 * B)) ** 2,
    "hinge": lambda p: max(0.0, 1 - B * (p.chosen - p.rejected)),
    "robust": lambda p: robust(B * (p.chosen - p.rejected), SHARE),
    "exo_pair": lambda p: exo(B * (p.chosen - p.rejected), SHARE),
    "nca_pair": lambda p: (
        -log_sigmoid(B * p.chosen) - 0.5 * log_sigmoid(-B * p.chosen) - 0.5 * log_sigmoid(-B * p.rejected)
    ),
    "bco_pair": lambda p: -log_sigmoid(B * p.chosen) - log_sigmoid(-B * p.rejected),
    "sppo_hard": lambda p: (p.chosen - 0.5 / B) ** 2 + (p.rejected + 0.5 / B) ** 2,
    "aot": lambda p: smoothed(B * (p.chosen - p.rejected), SHARE),
    "aot_unpaired": lambda p: smoothed(B * (p.chosen - p.rejected), SHARE),
    "apo_zero": lambda p: 1 - sigmoid(B * p.chosen) + sigmoid(B * p.rejected),
    "apo_down": lambda p: sigmoid(B * p.chosen) + 1 - sigmoid(B * (p.chosen - p.rejected)),
    "discopop": lambda p: discopop(B * (p.chosen - p.rejected)),
    "sft": lambda p: -p.chosen_logprob / p.chosen_tokens,
    "ipo_sum": lambda p: (p.chosen - p.rejected - 1 / (2 * B)) ** 2,
}


def test_every_loss_has_its_formula_here():
    assert set(FORMULAS) == set(LOSSES)


def test_no_loss_that_trl_has_is_missing():
    from trl import DPOTrainer

    theirs = set(re.findall(r'loss_type == "(\w+)"', inspect.getsource(DPOTrainer._compute_loss)))
    assert theirs == set(TRL_LOSSES)


def seen(job, place, trace) -> dict[int, tuple[Pair, float]]:
    """Of each step of a run over one pair: what the formulas read, and the loss."""
    (row,) = pairs(1)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    start = len(prompt_ids(row["prompt"], tokenizer))
    lengths = [len(conversation_ids(row["prompt"], row[side], tokenizer)) - start for side in ("chosen", "rejected")]
    names = ("log_ratio/chosen", "log_ratio/rejected", "logprob/chosen", "loss")
    chosen, rejected, logprob, loss = (trace(place, name) for name in names)
    return {step: (Pair(chosen[step], rejected[step], *lengths, logprob[step]), loss[step]) for step in loss}


@pytest.mark.parametrize("loss_type", FORMULAS)
def test_the_loss_is_its_paper_s(job, trace, loss_type):
    knobs = {"label_smoothing": SHARE} if loss_type in SMOOTHED else {}
    place = job("dpo", pairs(1), config={**CONFIG, "batch_size": 1, "beta": B, "loss_type": loss_type, **knobs})
    steps = seen(job, place, trace)
    for step, (pair, loss) in steps.items():
        assert loss == pytest.approx(FORMULAS[loss_type](pair), rel=2e-4, abs=1e-5), f"step {step}"
    assert len(steps) == 3 and steps[3][0].chosen != 0.0


@pytest.mark.parametrize("adapter", [None, LoRA(r=4)])
def test_losses_are_added_with_their_weights(job, trace, adapter):
    losses, weights = ["sigmoid", "ipo_sum", "sft"], [0.8, 0.5, 0.2]
    knobs = {"loss_type": losses, "loss_weights": weights, "beta": B, "batch_size": 1}
    place = job("dpo", pairs(1), config={**CONFIG, **knobs}, adapter=adapter)
    steps = seen(job, place, trace)
    for pair, loss in steps.values():
        expected = sum(w * FORMULAS[name](pair) for name, w in zip(losses, weights, strict=True))
        assert loss == pytest.approx(expected, rel=2e-4)
    assert steps[3][0].chosen != 0.0


def test_the_paper_s_ipo_pulls_a_pair_to_its_margin_and_no_further(job, trace):
    """1/(2β) nats, where eq. 17 is zero; the sigmoid loss of the same pair goes on."""
    config = {**CONFIG, "batch_size": 1, "beta": 0.25, "max_steps": 60, "learning_rate": 1e-3}
    ipo = trace(job("dpo", pairs(1), name="ipo", config={**config, "loss_type": "ipo_sum"}), "log_ratio/margin")
    assert ipo[60] == pytest.approx(2.0, abs=0.1)
    sigmoid = trace(job("dpo", pairs(1), name="sigmoid", config=config), "log_ratio/margin")
    assert sigmoid[60] > 3 * ipo[60]


def test_label_smoothing_is_live_where_the_loss_reads_it_and_says_why_where_not(job, trace):
    config = {**CONFIG, "batch_size": 1, "beta": B, "loss_type": "robust", "label_smoothing": 0.0}
    place = job.prepare("dpo", pairs(1), config=config)
    append_line(place.control_path, SetCoefficient(name="label_smoothing", value=SHARE).model_dump())
    job.run(place)
    (change,) = [event for event in place.events() if event.kind == "coefficient_changed"]
    assert (change.new, change.effective_step) == (SHARE, 1)
    margin = trace(place, "log_ratio/margin")
    for step in (1, 2, 3):
        assert trace(place, "loss")[step] == pytest.approx(FORMULAS["robust"](Pair(margin[step], 0.0, 1, 1)), rel=2e-4)
    plain = job.prepare("dpo", pairs(1), name="plain", config={**config, "loss_type": "sigmoid"})
    append_line(plain.control_path, SetCoefficient(name="label_smoothing", value=SHARE).model_dump())
    (refused,) = [event for event in job.run(plain).events() if event.kind == "control_refused"]
    assert "loss_type=sigmoid has no label smoothing" in refused.reason


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"label_smoothing": 0.1}, "label_smoothing=0.1 is not read by loss_type=sigmoid"),
        ({"loss_type": "exo_pair"}, "exo_pair takes the logarithm of label_smoothing"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, r"loss_weights=\[1.0\] for 2 losses"),
    ],
)
def test_knobs_that_cannot_act_are_refused(knobs, says):
    spec = RunSpec(run_id="x", workspace_id="x", method="dpo", config={}, created=0.0)
    with pytest.raises(SpecError, match=says):
        DPO(**knobs).check(spec)


def test_a_loss_that_takes_the_logarithm_of_a_share_cannot_be_moved_to_none():
    spec = RunSpec(run_id="x", workspace_id="x", method="dpo", config={}, created=0.0)
    lows = {
        loss: {live.name: live.low for live in DPO(loss_type=loss, label_smoothing=0.1).live_in(spec)}
        for loss in ("exo_pair", "robust")
    }
    assert (lows["exo_pair"]["label_smoothing"], lows["robust"]["label_smoothing"]) == (1e-3, 0.0)


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"loss_type": "sigmod"}, r"dpo: loss_type='sigmod': sigmod is no loss.*sigmoid"),
        ({"loss_type": ["sft", "sft"]}, "name each loss once"),
        ({"loss_type": ["sft", "ipo"], "loss_weights": [1, -1]}, "loss_weights.1=-1"),
    ],
)
def test_a_loss_that_does_not_exist_is_one_line(knobs, says):
    with pytest.raises(SpecError, match=says):
        DPO.create(**knobs)


def test_several_losses_survive_the_spec_s_json():
    method = DPO(loss_type=("sigmoid", "sft"), loss_weights=(1.0, 0.1))
    assert DPO.create(**method.model_dump(mode="json")) == method
