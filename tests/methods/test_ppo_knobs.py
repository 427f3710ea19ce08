"""PPO's choices beyond the plain algorithm, as they run: controller, references, no value model, groups, schedules."""

from __future__ import annotations

import math
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlhf_nb.compute.rundir import append_line
from rlhf_nb.errors import SpecError
from rlhf_nb.maths.controllers import adapted_kl_coef
from rlhf_nb.methods.ppo import PPO
from rlhf_nb.protocol.control import SetCoefficient
from rlhf_nb.protocol.glossary import GLOSSARY
from rlhf_nb.protocol.spec import FunctionReward, LoRA, RunSpec
from rlhf_nb.training import checkpoints, models, online
from rlhf_nb.training.actor_critic import trunk_and_head
from rlhf_nb.training.online_samples import SampleTable
from rlhf_nb.training.rollout.transformers_backend import TransformersSampler

from .conftest import DRAWS, LETTERS, ROWS, fold, killed, rollouts, same_to_the_bit

CONFIG = {
    "max_steps": 16, "rollout_batch_size": 4, "batch_size": 2, "num_ppo_epochs": 2, "max_new_tokens": 6,
    "max_length": 80, "sample_every": 0, "learning_rate": 1e-2, "kl_coef": 0.2,
}  # fmt: skip
# --- the controller ---------------------------------------------------------------------------------------------------


def test_the_controller_moves_kl_coef_by_its_formula_and_the_run_says_what_it_used(ppo):
    place = ppo(kl_target=0.02, kl_horizon=40)
    rows = rollouts(place)
    assert len(rows) == 4 and rows[0]["objective/kl_coef"] == 0.2
    for before, after in pairwise(rows):
        expected = adapted_kl_coef(
            before["objective/kl_coef"], before["kl/policy_reference"], target=0.02, completions=4, horizon=40
        )
        assert after["objective/kl_coef"] == pytest.approx(expected, rel=1e-6) != before["objective/kl_coef"]
    assert fold(place).coefficients["kl_coef"].value == rows[-1]["objective/kl_coef"]


@pytest.mark.parametrize("start", [50.0, 0.2, 1e-6])
def test_the_controller_leaves_a_kl_coef_that_it_was_started_with_where_the_kl_is_right(start):
    method = PPO(kl_coef=start, kl_target=0.5)
    live = SimpleNamespace(kl_coef=start, kl_target=0.5, kl_controller=1.0)
    method.adapt([0.5, 64], live)
    assert live.kl_coef == start
    for kl in (5.0, 0.0):
        method.adapt([kl, 64], live)
        assert live.kl_coef == pytest.approx(start, rel=2e-3)


def test_a_kl_coef_set_by_hand_holds_the_controller_until_it_is_released(ppo):
    place = ppo(kl_target=0.02, kl_horizon=40, controls=[SetCoefficient(name="kl_coef", value=0.5, who="mira")])
    held = next(e for e in fold(place).changes if e.name == "kl_controller")
    assert (held.old, held.new, held.effective_step, held.who) == (1.0, 0.0, 1, "mira")
    assert {row["objective/kl_coef"] for row in rollouts(place)} == {0.5}
    both = [SetCoefficient(name="kl_coef", value=0.5), SetCoefficient(name="kl_controller", value=1.0)]
    place = ppo("released", kl_target=0.02, kl_horizon=40, controls=both)
    released = rollouts(place)
    assert released[0]["objective/kl_coef"] == 0.5 != released[1]["objective/kl_coef"]
    # Nothing was measured before the first rollout that the controller could have read.
    steps = {(e.name, e.new): e.effective_step for e in fold(place).changes}
    assert steps == {("kl_coef", 0.5): 1, ("kl_controller", 0.0): 1, ("kl_controller", 1.0): 5}


def test_a_kl_coef_set_after_a_restart_is_not_let_go_by_a_release_that_came_later_before_it(ppo):
    place = ppo(kl_target=0.02, kl_horizon=40, checkpoint_every=4, controls=[SetCoefficient(name="kl_coef", value=0.5)])
    append_line(place.control_path, SetCoefficient(name="kl_controller", value=1.0).model_dump(mode="json"))
    ppo.job.run(place, attempt=2, resume_from=checkpoints.directory(place.path, 8))
    assert [e.effective_step for e in fold(place).changes if (e.name, e.new) == ("kl_controller", 1.0)] == [9]
    append_line(place.control_path, SetCoefficient(name="kl_coef", value=0.7).model_dump(mode="json"))
    ppo.job.run(place, attempt=3, resume_from=checkpoints.directory(place.path, 4))
    assert [row["objective/kl_coef"] for row in rollouts(place)] == [0.5, 0.7, 0.7, 0.7]


def test_a_target_that_is_set_moves_kl_coef_at_its_effective_step(ppo):
    place = ppo(kl_target=0.02, kl_horizon=40, checkpoint_every=4)
    before = rollouts(place)
    append_line(place.control_path, SetCoefficient(name="kl_target", value=50).model_dump(mode="json"))
    ppo.job.run(place, attempt=2, resume_from=checkpoints.directory(place.path, 8))
    (change,) = fold(place).changes
    assert (change.name, change.effective_step) == ("kl_target", 9)
    after = rollouts(place)
    assert after[2]["step"] == 9 and after[:2] == before[:2]
    now, kl = after[1]["objective/kl_coef"], after[1]["kl/policy_reference"]
    expected = adapted_kl_coef(now, kl, target=50, completions=4, horizon=40)
    assert after[2]["objective/kl_coef"] == pytest.approx(expected) != before[2]["objective/kl_coef"]


def test_without_a_target_the_controller_s_handles_say_why_they_are_grey(ppo):
    place = ppo(max_steps=1, controls=[SetCoefficient(name="kl_target", value=3.0)])
    coefficients = fold(place).coefficients
    for name in ("kl_target", "kl_controller"):
        assert "start it with kl_target" in coefficients[name].unavailable_reason
    (refused,) = [e for e in place.events() if e.kind == "control_refused"]
    assert "start it with kl_target" in refused.reason


# --- references -------------------------------------------------------------------------------------------------------


def test_without_a_reference_no_kl_is_claimed_and_kl_coef_says_why_it_is_grey(ppo):
    place = ppo(reference="none", sample_every=8)
    assert all(i.kl is None and i.reference_completion is None for e in fold(place).samples for i in e.items)
    assert len(fold(place).samples) == 2
    folded = fold(place)
    assert not folded.started.has_reference
    assert not {name for row in folded.rows for name in row.values} & {"kl/policy_reference", "objective/kl_coef"}
    assert "reference=none" in folded.coefficients["kl_coef"].unavailable_reason
    for row in rollouts(place):
        assert row["reward/mean"] == pytest.approx(row["reward/score"])


def test_a_reference_that_follows_is_nearer_than_one_that_stays(ppo):
    stays, follows = ppo("stays", kl_coef=0.0), ppo("follows", kl_coef=0.0, reference="ema", reference_decay=0.5)
    # Both policies move the same way: at β = 0 the reference is only looked at.
    assert fold(stays).rows[-2].values["loss"] == fold(follows).rows[-2].values["loss"]
    assert rollouts(follows)[-1]["kl/policy_reference"] < 0.8 * rollouts(stays)[-1]["kl/policy_reference"]


# --- no value model, groups, schedules --------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [None, LoRA(r=4)])
@pytest.mark.parametrize("group", [1, 2])
def test_without_a_value_model_it_trains_and_claims_no_values(ppo, adapter, group):
    place = ppo(value_model="none", samples_per_prompt=group, adapter=adapter)
    names = {name for row in fold(place).rows for name in row.values}
    assert not {name for name in names if name.startswith("value/") or name == "loss/value"}
    assert names <= set(GLOSSARY)
    for name in ("vf_coef", "cliprange_value"):
        assert "value_model=none" in fold(place).coefficients[name].unavailable_reason
    assert fold(place).rows[0].values["reward/mean"] > 0
    assert max(row.values.get("optimizer/grad_norm", 0.0) for row in fold(place).rows) > 0


def test_the_advantage_without_a_value_model_is_score_less_group_mean_less_the_kl_to_come():

    from rlhf_nb.training.online_types import Rollout

    mask = torch.tensor([[True, True], [True, False]])
    behavior, reference = torch.tensor([[-1.0, -2.0], [-1.0, 0.0]]), torch.tensor([[-1.5, -2.25], [-1.0, 0.0]])
    rollout = Rollout(
        tokens_BL=mask, attention_mask_BL=mask, mask_BT=mask, behavior_logprobs_BT=behavior,
        reference_logprobs_BT=reference, values_BT=torch.zeros(2, 2), sampler_logprobs_BT=behavior,
        score_B=torch.tensor([3.0, 1.0]), gold_B=None,
        ended_B=torch.tensor([True, True]), temperature=1.0,
    )  # fmt: skip
    method = PPO(kl_coef=0.2, value_model="none", samples_per_prompt=2, whiten_advantages=False)
    credit = method.credit(
        rollout, SimpleNamespace(**dict.fromkeys(("length_penalty", "kl_coef"), 0.0) | {"kl_coef": 0.2})
    )
    # k1 = 0.5 and 0.25; the group's mean is 2: 1 − 0.2·(0.5 + 0.25) = 0.85, 1 − 0.2·0.25 = 0.95, and −1.
    torch.testing.assert_close(credit.advantages_BT, torch.tensor([[0.85, 0.95], [-1.0, 0.0]]))
    # What is optimised is reported without the baseline.
    torch.testing.assert_close(credit.total_B, torch.tensor([3.0 - 0.15, 1.0]))


def test_a_rollout_holds_so_many_completions_of_each_prompt(ppo):
    seen = ppo.job.root / "seen"
    source = (
        "def note(prompts, completions):\n"
        f"    with open({str(seen)!r}, 'a') as f:\n        f.write('|'.join(prompts) + '\\n')\n"
        "    return [float(i) for i in range(len(prompts))]"
    )
    ppo(reward=FunctionReward(name="note", source=source), samples_per_prompt=2, max_steps=8)
    first, second = (line.split("|") for line in seen.read_text().splitlines())
    assert first[0] == first[1] != first[2] == first[3]
    assert not set(first) & set(second)


def test_the_temperature_falls_along_its_schedule_and_the_policy_gets_surer(ppo):
    rows = rollouts(ppo(temperature=1.0, temperature_end=0.2, learning_rate=0.0))
    assert [row["objective/temperature"] for row in rows] == pytest.approx([1.0, 0.8, 0.6, 0.4])
    entropies = [row["policy/entropy"] for row in rows]
    assert entropies == sorted(entropies, reverse=True)


def test_samples_are_drawn_at_the_temperature_of_their_step(ppo, monkeypatch):
    drawn: list[tuple[int, float]] = []
    genuine = SampleTable._sample

    def sample(self, sampler, ids, stream, keys, temperature):
        drawn.append((self.trainer.step, temperature))
        return genuine(self, sampler, ids, stream, keys, temperature)

    monkeypatch.setattr(SampleTable, "_sample", sample)
    place = ppo(temperature=1.0, temperature_end=0.2, sample_every=4)
    last = place.spec().config["max_steps"]
    assert drawn and all(t == pytest.approx(1.0 - 0.8 * step / last) for step, t in drawn)


def test_scores_are_normalised_by_all_that_were_seen(ppo):
    plain, normal = (
        ppo("plain", learning_rate=0.0, kl_coef=0.0),
        ppo("normal", learning_rate=0.0, kl_coef=0.0, score_normalisation="running"),
    )
    (a, *_), (b, *_) = rollouts(plain), rollouts(normal)
    assert a["reward/score"] == b["reward/score"], "the raw score is what is logged"
    assert b["reward/mean"] == pytest.approx(0, abs=1e-6), "the first rollout's scores are shifted by their own mean"


def test_a_run_ends_with_its_model_once_the_score_is_reached(ppo):
    place = ppo(stop_at_score=0.0)
    assert any(e.kind == "notice" and e.code == "score_reached" for e in place.events())
    assert fold(place).outcome == "finished" and (place.model / "model.safetensors").exists()
    assert max(fold(place).step, 0) == 0


def test_kl_in_the_loss_is_logged_and_weighed(ppo):
    place = ppo(kl_in="loss", value_model="none")
    for event in place.events():
        if event.kind == "metric" and "loss" in event.values:
            values = event.values
            assert values["loss"] == pytest.approx(values["loss/policy"] + 0.2 * values["loss/kl"], abs=1e-6)
    for row in rollouts(place):
        expected = row["reward/score"] - 0.2 * row["kl/policy_reference"]
        assert row["reward/mean"] == pytest.approx(expected, abs=1e-5)
    assert abs(row["kl/policy_reference"]) > 0.01


# --- resuming, and what is refused ------------------------------------------------------------------------------------


def test_a_run_with_all_of_it_resumes_to_the_bit(ppo):
    knobs = {
        "kl_target": 0.02, "kl_horizon": 40, "reference": "ema", "score_normalisation": "running",
        "temperature_end": 0.5, "samples_per_prompt": 2, "checkpoint_every": 4, "sample_every": 4,
    }  # fmt: skip
    whole = ppo("whole", **knobs)
    again = ppo("again", **knobs)
    ppo.job.run(again, attempt=2, resume_from=checkpoints.directory(again.path, 8))
    (resumed,) = [e for e in again.events() if e.kind == "resumed"]
    assert resumed.from_step == 8

    def numbers(place) -> list[dict[str, float]]:
        return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in fold(place).table()]

    assert numbers(again) == numbers(whole) and all(math.isfinite(v) for row in numbers(whole) for v in row.values())
    a, b = (load_file(place.model / "model.safetensors") for place in (again, whole))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("knobs", "spec", "says"),
    [
        ({"kl_in": "loss", "kl_estimator": "k1"}, {}, "no penalty at all"),
        ({"kl_in": "loss", "kl_estimator": "k3"}, {}, "forward KL"),
        ({"kl_in": "reward", "kl_estimator": "k3"}, {}, "use kl_estimator=k1"),
        ({"samples_per_prompt": 3}, {}, "whole groups of samples_per_prompt=3"),
        ({"reference": "none", "kl_target": 3.0}, {}, "kl_target=3 needs a reference"),
        ({"reference": "ema"}, {"adapter": LoRA()}, "reference=ema averages whole models"),
        ({"kl_target": 3.0, "kl_coef": 0.0}, {}, "start with kl_coef > 0"),
        ({"kl_target": 3.0, "kl_horizon": 12}, {}, "kl_horizon=12 lets one rollout of 64 take kl_coef to 0"),
        ({"value_model": "none", "whiten_rewards": True}, {}, "use whiten_advantages"),
        ({"value_model": "none", "gamma": 0.9}, {}, "gamma=0.9 discounts towards a value model"),
    ],
)
def test_what_does_not_lead_where_it_should_is_refused_with_the_reason(knobs, spec, says):
    with pytest.raises(SpecError, match=says) as caught:
        PPO.create(**knobs).check(RunSpec(run_id="r", workspace_id="w", method="ppo", config={}, created=0.0, **spec))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("resumes", [[4], [8, 4], [4, 8]])
def test_what_was_moved_after_the_checkpoint_is_moved_again_at_its_step(ppo, resumes):
    knobs = {"kl_target": 0.5, "kl_horizon": 400, "checkpoint_every": 4, "max_steps": 24}
    sets = [SetCoefficient(name="kl_coef", value=0.7, who="mira"), SetCoefficient(name="cliprange", value=0.4)]

    def moved(name: str):
        """The lines arrive while the third rollout is scored: cliprange counts from step 10, kl_coef from step 13."""
        path = ppo.job.root / name / "control.jsonl"
        lines = "".join(control.model_dump_json() + "\n" for control in sets)
        body = LETTERS.source.split("\n", 1)[1]
        source = (
            "def sends(prompts, completions):\n    import os\n"
            f"    mark = {str(path)!r} + '.calls'\n"
            "    with open(mark, 'a') as calls:\n        calls.write('x')\n"
            f"    if os.path.getsize(mark) == 3:\n        with open({str(path)!r}, 'a') as handle:\n"
            f"            handle.write({lines!r})\n{body}"
        )
        return ppo(name, reward=FunctionReward(name="sends", source=source), **knobs)

    whole, again = moved("whole"), moved("again")
    steps = {e.name: e.effective_step for e in fold(whole).changes}
    assert steps == {"cliprange": 10, "kl_coef": 13, "kl_controller": 13}
    for attempt, step in enumerate(resumes, 2):
        ppo.job.run(again, attempt=attempt, resume_from=checkpoints.directory(again.path, step))

    def numbers(place) -> list[dict[str, float]]:
        return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in fold(place).table()]

    assert numbers(again) == numbers(whole)
    assert [(e.id, e.name, e.old, e.new, e.effective_step, e.who) for e in fold(again).changes if not e.follows] == [
        (control.id, control.name, *values, steps[control.name], control.who)
        for control, values in zip(sets[::-1], ((0.2, 0.4), (fold(whole).changes[1].old, 0.7)), strict=True)
    ]
    a, b = (load_file(place.model / "model.safetensors") for place in (again, whole))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_an_infinite_knob_is_refused_where_it_is_written():
    """In a spec it would come back as None: no correction where all was wanted."""
    for knob in ("cliprange_value", "importance_cap"):
        with pytest.raises(SpecError, match=f"ppo: {knob}=inf: .*finite number"):
            PPO.create(**{knob: float("inf")})


def test_a_run_killed_twenty_times_in_every_phase_equals_one_that_never_was(ppo):
    knobs = {
        "max_steps": 160, "checkpoint_every": 1, "kl_target": 0.5, "kl_horizon": 400, "learning_rate": 1e-3,
        "sample_every": 10, "reward": DRAWS, "gold": LETTERS,
    }  # fmt: skip
    whole = ppo("whole", **knobs)
    place = ppo("killed", prepare=True, **knobs)
    (said,) = killed(place, each=5)
    assert said["deaths"] >= 20
    same_to_the_bit(place, whole)


# --- memory and precision ---------------------------------------------------------------------------------------------


def test_policy_reference_and_values_stand_on_one_set_of_weights_under_lora(job, tiny_model_maker):
    from rlhf_nb.training import actor_critic

    place = job.prepare("ppo", ROWS, config=CONFIG, reward=LETTERS, adapter=LoRA(r=2))
    context = SimpleNamespace(spec=place.spec())
    path = str(tiny_model_maker("still", dropout=0.0))
    module, reference = actor_critic.load(context, path, value_model="own")
    alone = sum(p.numel() for p in actor_critic.models.load_model(path).parameters())
    held = {p.data_ptr(): p.numel() for p in module.parameters()}
    adapters = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert sum(held.values()) == alone + adapters and reference.state() == {}
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    assert any(name.startswith("critic.") for name in names) and any(name.startswith("policy.") for name in names)
    # Two adapters, not one: what the values learn leaves the policy as it is.
    tokens, seen = torch.randint(3, 50, (2, 9)), torch.ones(2, 9, dtype=torch.bool)
    before = module(tokens, seen, seen[:, :4], with_values=False)[0]
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if name.startswith("critic.") and weight.requires_grad:
                weight.add_(torch.randn_like(weight))
    assert torch.equal(module(tokens, seen, seen[:, :4], with_values=False)[0], before)


@pytest.mark.parametrize("knobs", [{"value_model": "own"}, {"value_model": "policy_trunk"}], ids=str)
@pytest.mark.parametrize("adapter", [None, LoRA(r=4)], ids=["full", "lora"])
def test_activations_that_are_computed_again_change_no_number(ppo, adapter, knobs):
    def numbers(place):
        return [
            {k: v for k, v in row.values.items() if not k.startswith("time/")} for row in fold(place).rows
        ]  # fmt: skip

    plain = ppo("plain", max_steps=4, adapter=adapter, **knobs)
    again = ppo("again", max_steps=4, adapter=adapter, gradient_checkpointing=True, **knobs)
    for one, other in zip(numbers(plain), numbers(again), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)


def test_dropout_of_the_base_model_stays_out_where_activations_are_computed_again(ppo, job, tiny_model_maker):
    job.model = tiny_model_maker("drops", dropout=0.3)
    plain, again = ppo("plain", max_steps=2), ppo("again", max_steps=2, gradient_checkpointing=True)
    first, second = (fold(place).rows[-2].values["loss"] for place in (plain, again))
    assert first == pytest.approx(second, rel=1e-4, abs=1e-6)


# --- a sampler that computes otherwise than the trainer ---------------------------------------------------------------


def test_where_sampler_and_trainer_agree_the_correction_changes_nothing_but_rounding(ppo):
    plain, corrected = rollouts(ppo("plain")), rollouts(ppo("corrected", importance_cap=2.0))
    for before, after in zip(plain, corrected, strict=True):
        for name in ("loss", "reward/score", "kl/policy_reference"):
            assert after[name] == pytest.approx(before[name], rel=1e-3, abs=1e-4), name
        assert after["policy/importance_weight"] == pytest.approx(1.0, abs=1e-4)


def test_a_sampler_of_another_policy_is_weighted_and_its_rollout_read_by_the_trainer(ppo, monkeypatch):
    genuine = TransformersSampler.sample
    monkeypatch.setattr(
        TransformersSampler, "sample", lambda self, p, u, *, temperature: genuine(self, p, u, temperature=3.0)
    )
    believed, corrected = rollouts(ppo("believed"))[0], rollouts(ppo("corrected", importance_cap=1.5))[0]
    # Before the first step policy and reference are one model; who believes the sampler reads a distance.
    assert abs(believed["kl/policy_reference"]) > 0.01 and abs(corrected["kl/policy_reference"]) < 1e-4
    assert "policy/importance_weight" not in believed and 0 < corrected["policy/importance_weight"] < 1.5
    assert corrected["policy/importance_weight"] != pytest.approx(1.0, abs=1e-3)
    assert corrected["rollout/logprob_mismatch"] == pytest.approx(believed["rollout/logprob_mismatch"], rel=1e-4)


# --- fewer bits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value_model", ["own", "policy_trunk"])
def test_a_base_in_4_bits_is_one_for_all_and_the_saved_model_is_the_base_in_full_with_the_adapter(
    ppo, tiny_model_maker, monkeypatch, value_model
):
    # On a CPU its gradients are wrong, and it is refused; who stands on what, and what is saved, is the same there.
    monkeypatch.setattr(models, "FOUR_BIT_DEVICES", ("cpu", "cuda"))
    # Blocks of 64 numbers share a scale.
    ppo.job.model = tiny_model_maker("wide", hidden_size=64, intermediate_size=128, dropout=0.0)
    kinds = []
    build = online.OnlineTrainer._optimizer

    def watched(self, trained):
        trunk, _ = trunk_and_head(self.module.policy)
        packed = {p.data_ptr() for p in trunk.parameters() if type(p).__name__ == "Params4bit"}
        everywhere = {p.data_ptr() for p in self.module.parameters() if type(p).__name__ == "Params4bit"}
        kinds.append((len(packed), len(everywhere), sum(p.requires_grad for p in trunk.parameters())))
        return build(self, trained)

    monkeypatch.setattr(online.OnlineTrainer, "_optimizer", watched)
    place = ppo(adapter=LoRA(r=4, quantize="4bit"), value_model=value_model, max_steps=8, checkpoint_every=4)
    # Seven linear layers in each of two blocks; the value model stands on the same.
    assert kinds[0][0] == kinds[0][1] == 14 and kinds[0][2] == 28
    assert max(row["optimizer/grad_norm"] for row in fold(place).table() if "optimizer/grad_norm" in row) > 0
    assert all(
        row["rollout/logprob_mismatch"] < 1e-3 for row in fold(place).table() if "rollout/logprob_mismatch" in row
    )

    base = AutoModelForCausalLM.from_pretrained(ppo.job.model)
    merged = PeftModel.from_pretrained(base, str(place.model / "adapter")).merge_and_unload()
    saved = AutoModelForCausalLM.from_pretrained(place.model)
    for (name, here), there in zip(saved.named_parameters(), merged.parameters(), strict=True):
        torch.testing.assert_close(here, there, msg=name)
    start = AutoModelForCausalLM.from_pretrained(ppo.job.model)
    assert any(not torch.equal(a, b) for a, b in zip(saved.parameters(), start.parameters(), strict=True))
    again = ppo.job.run(place, attempt=2, resume_from=checkpoints.directory(place.path, 4))
    assert fold(again).table()[-1]["step"] == 8


def test_what_fewer_bits_need_is_said_where_it_is_missing(ppo, monkeypatch):
    with pytest.raises(SpecError, match="optimizer=adamw_8bit needs a CUDA device and this one is cpu; use"):
        ppo("eight", optimizer="adamw_8bit")
    with pytest.raises(SpecError, match="use rollout_backend=transformers"):
        place = ppo("both", prepare=True, adapter=LoRA(quantize="4bit"))
        PPO(rollout_backend="vllm").check(place.spec())
    with pytest.raises(SpecError, match="no gradient goes through bitsandbytes' 4-bit layers on cpu; it needs CUDA"):
        ppo("cpu", adapter=LoRA(quantize="4bit"))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(SpecError, match=r"adapter quantize=4bit: bitsandbytes cannot be imported .* use quantize=none"):
        ppo("missing", adapter=LoRA(quantize="4bit"))
