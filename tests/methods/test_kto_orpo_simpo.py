"""The preference methods without pairs or without a reference: as they run, as they are steered, as they resume.

The learning rate's test takes DPO along.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlhf_nb.data.conversions import pairs_to_thumbs
from rlhf_nb.errors import SpecError
from rlhf_nb.maths.preference import kto_loss, orpo_loss, simpo_loss
from rlhf_nb.methods.kto import KTO
from rlhf_nb.methods.simpo import SimPO
from rlhf_nb.protocol.control import SetCoefficient
from rlhf_nb.protocol.glossary import GLOSSARY
from rlhf_nb.protocol.spec import FunctionReward, Launch, LoRA, RunSpec
from rlhf_nb.registry import methods
from rlhf_nb.toy import pairs, thumbs
from rlhf_nb.training import checkpoints

CONFIG = {
    "max_steps": 6,
    "batch_size": 2,
    "sample_every": 0,
    "learning_rate": 1e-3,
    "max_length": 200,
    "sample_tokens": 4,
}


@pytest.fixture
def job(job, tiny_model_maker):
    job.model = tiny_model_maker("still", dropout=0.0)
    return job


def mixed(n: int, seed: int = 0) -> list[dict]:
    """Thumbs of which, after KTO's fixed shuffle, every batch of two holds one up and one down."""
    ups, downs = ([row for row in thumbs(40 * n) if row["label"] is label][:n] for label in (True, False))
    return alternating(ups, downs, seed)


def alternating(ups: list[dict], downs: list[dict], seed: int = 0) -> list[dict]:
    wanted = [row for pair in zip(ups, downs, strict=True) for row in pair]
    rows: list[dict] = [{}] * len(wanted)
    for place, index in enumerate(np.random.default_rng([seed, len(wanted)]).permutation(len(wanted))):
        rows[index] = wanted[place]
    return rows


ROWS = {"kto": mixed(6), "orpo": pairs(12), "simpo": pairs(12)}


def values(place) -> dict[int, dict[str, float]]:
    return {e.step: e.values for e in place.events() if e.kind == "metric" and "loss" in e.values}


def predicted(method: str, seen: dict[str, float], *, batch: int = 1, **live: float) -> float:
    """The loss of a step from its other metrics and the coefficients in force."""

    def t(value: float) -> torch.Tensor:
        return torch.tensor([value], dtype=torch.float64)

    if method == "kto":
        h = torch.cat([t(seen["log_ratio/chosen"]), t(seen["log_ratio/rejected"])])
        weights = {k: v for k, v in live.items() if k.endswith("_weight")}
        loss = kto_loss(h, torch.tensor([True, False]), t(seen["kl/reference_point"]), beta=live["beta"], **weights)
        return loss.mean().item()
    if method == "orpo":
        term = orpo_loss(t(seen["logprob_mean/chosen"]), t(seen["logprob_mean/rejected"]), beta=live["beta"])
        return seen["loss/nll"] + term.item()
    margin = t(seen["logprob_mean/margin"])
    # One chosen completion a step: the likelihood a token is its mean log-probability.
    likelihood = -seen["logprob_mean/chosen"] * live.pop("cpo_alpha")
    return simpo_loss(margin, t(0.0), **live).item() + likelihood


START = {
    "kto": {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
    "orpo": {"beta": 0.1},
    "simpo": {"beta": 2.0, "gamma": 1.0, "label_smoothing": 0.0, "cpo_alpha": 0.0},
}
BATCH = {"kto": 2, "orpo": 1, "simpo": 1}


@pytest.mark.parametrize("method", ROWS)
def test_the_loss_is_the_paper_s_by_our_own_maths(job, method):
    place = job(method, ROWS[method], config={**CONFIG, "batch_size": BATCH[method]})
    steps = values(place)
    assert len(steps) == 6 and len({row["loss"] for row in steps.values()}) == 6
    for row in steps.values():
        assert row["loss"] == pytest.approx(predicted(method, row, **START[method]), rel=2e-4, abs=2e-5)
        assert set(row) <= set(GLOSSARY)


def sends(path, control) -> FunctionReward:
    """A gold reward, asked for the first samples: after step 2."""
    source = (
        "def sends(prompts, completions):\n    import os\n"
        f"    mark = {str(path) + '.sent'!r}\n"
        "    if not os.path.exists(mark):\n        open(mark, 'w').close()\n"
        f"        with open({str(path)!r}, 'a') as handle:\n"
        f"            handle.write({control.model_dump_json() + chr(10)!r})\n"
        "    return [0.0] * len(prompts)"
    )
    return FunctionReward(name="sends", source=source)


MOVES = [
    ("kto", "beta", 0.5), ("kto", "desirable_weight", 3.0), ("kto", "undesirable_weight", 0.2), ("orpo", "beta", 1.0),
    ("simpo", "beta", 5.0), ("simpo", "gamma", 0.1), ("simpo", "label_smoothing", 0.3),
    ("simpo", "cpo_alpha", 0.5),
]  # fmt: skip


@pytest.mark.parametrize(("method", "name", "new"), MOVES)
def test_a_moved_coefficient_is_in_the_loss_of_the_step_that_the_event_names_and_in_none_before(job, method, name, new):
    config = {**CONFIG, "batch_size": BATCH[method], "max_steps": 4}
    still = values(job(method, ROWS[method], name="still", config=config))
    control = SetCoefficient(name=name, value=new)
    path = job.root / "moved" / "control.jsonl"
    place = job(method, ROWS[method], name="moved", config={**config, "sample_every": 2}, gold=sends(path, control))
    (change,) = [e for e in place.events() if e.kind == "coefficient_changed"]
    assert (change.name, change.old, change.new, change.effective_step) == (name, START[method][name], new, 3)
    moved = values(place)
    for step in (1, 2):
        assert moved[step]["loss"] == still[step]["loss"]
    # Until step 3's update both runs hold the same weights: its loss follows from what the other one measured there.
    live = {**START[method], name: new}
    assert moved[3]["loss"] == pytest.approx(predicted(method, still[3], **live), rel=2e-4, abs=2e-5)
    assert abs(moved[3]["loss"] - still[3]["loss"]) > 1e-3


def test_every_live_coefficient_of_the_loss_is_moved_here():
    moved = {(method, name) for method, name, _ in MOVES}
    assert moved == {
        (method, live.name) for method in ROWS for live in methods.get(method).live if live.name != "learning_rate"
    }


@pytest.mark.parametrize("method", ["dpo", *ROWS])
def test_a_moved_learning_rate_scales_the_step_that_the_event_names_and_none_before(job, method):
    """Plain gradient descent: from the same weights and batch, the step is the rate times one and the same gradient."""
    rows = pairs(12) if method == "dpo" else ROWS[method]
    config = {
        **CONFIG, "max_steps": 3, "checkpoint_every": 1, "sample_every": 2, "optimizer": "sgd", "max_grad_norm": 0,
        "lr_scheduler": "constant", "learning_rate": 0.01,
    }  # fmt: skip
    still = job(method, rows, name="still", config=config)
    path = job.root / "moved" / "control.jsonl"
    control = SetCoefficient(name="learning_rate", value=0.05)
    place = job(method, rows, name="moved", config=config, gold=sends(path, control))
    (change,) = [e for e in place.events() if e.kind == "coefficient_changed"]
    assert (change.name, change.old, change.new, change.effective_step) == ("learning_rate", 0.01, 0.05, 3)

    def weights(run, step):
        return load_file(checkpoints.directory(run.path, step) / "model.safetensors")

    before = weights(still, 2)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(place, 2).items())
    slow, fast = weights(still, 3), weights(place, 3)
    furthest = 0.0
    for name, start in before.items():
        expected = start + 5 * (slow[name] - start)
        # A step is a difference of two float32 weights of order 1: five roundings of it are 5 · 1e-7.
        torch.testing.assert_close(fast[name], expected, rtol=1e-5, atol=2e-6)
        furthest = max(furthest, (fast[name] - start).abs().max().item())
    assert furthest > 1e-4


def test_kto_trains_on_pairs_as_a_thumb_up_and_a_thumb_down_each(job):
    converted, dropped = pairs_to_thumbs(pairs(6))
    ups, downs = ([row for row in converted if row["label"] is label] for label in (True, False))
    assert len(ups) == len(downs) == 6 and not dropped
    place = job("kto", alternating(ups, downs), config={**CONFIG, "batch_size": 2})
    steps = values(place)
    assert len(steps) == 6
    for row in steps.values():
        assert row["loss"] == pytest.approx(predicted("kto", row, **START["kto"]), rel=2e-4, abs=2e-5)


@pytest.mark.parametrize("method", ROWS)
def test_the_margin_is_told_in_nats_whatever_beta_is(job, method):
    name = "log_ratio/margin" if method == "kto" else "logprob_mean/margin"
    config = {**CONFIG, "batch_size": BATCH[method], "max_steps": 2}
    for beta in (0.5, 2.0):
        row = values(job(method, ROWS[method], name=f"at-{beta}", config={**config, "beta": beta}))[2]
        assert row["implicit_reward/margin"] == pytest.approx(beta * row[name], rel=1e-5) and row[name] != 0.0
        chosen, rejected = (row[f"{name.partition('/')[0]}/{side}"] for side in ("chosen", "rejected"))
        assert row[name] == pytest.approx(chosen - rejected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("method", ROWS)
def test_a_resumed_run_equals_one_that_never_stopped(job, method):
    config = {**CONFIG, "checkpoint_every": 3, "lr_scheduler": "cosine"}
    whole = job(method, ROWS[method], name="whole", config=config)
    again = job(method, ROWS[method], name="again", config=config)
    job.run(again, attempt=2, resume_from=checkpoints.directory(again.path, 3))
    assert {k: v["loss"] for k, v in values(again).items()} == {k: v["loss"] for k, v in values(whole).items()}
    a, b = (load_file(place.model / "model.safetensors") for place in (again, whole))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("method", ROWS)
def test_lora_saves_a_policy_that_plain_transformers_loads(job, method):
    place = job(method, ROWS[method], config={**CONFIG, "max_steps": 2}, adapter=LoRA(r=4))
    assert AutoModelForCausalLM.from_pretrained(place.model).num_parameters() == sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(job.model).parameters()
    )


def test_only_kto_claims_a_reference(job):
    started = {
        method: job(method, ROWS[method], name=method, config={**CONFIG, "max_steps": 1}).events()[0] for method in ROWS
    }
    assert {method: event.has_reference for method, event in started.items()} == {
        "kto": True,
        "orpo": False,
        "simpo": False,
    }
    kto = values(job("kto", ROWS["kto"], name="start", config={**CONFIG, "max_steps": 1}))[1]
    assert kto["log_ratio/chosen"] == 0.0 == kto["log_ratio/rejected"] and kto["loss"] == pytest.approx(0.5, abs=1e-6)


def test_a_batch_of_one_has_no_reference_point(job):
    with pytest.raises(SpecError, match=r"kto: batch_size=2 leaves one row a micro-batch.*use at least 4"):
        KTO(batch_size=2).check(
            RunSpec(
                run_id="r",
                workspace_id="w",
                method="kto",
                config={},
                created=0.0,
                launch=Launch.parse("--num_processes 2"),
            )
        )


def test_a_bad_knob_is_one_line():
    with pytest.raises(SpecError, match=r"simpo: label_smoothing=0.9: should be less than or equal to 0.5"):
        SimPO.create(label_smoothing=0.9)
    assert math.isfinite(SimPO().beta)
