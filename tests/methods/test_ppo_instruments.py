"""Previews, the KL doctor, gradient noise, and the pause at what is not finite, as they run."""

from __future__ import annotations

import copy
import math
import threading
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from rlhf_nb.compute.listing import last_checkpoint
from rlhf_nb.compute.rundir import append_line
from rlhf_nb.errors import ComputeError
from rlhf_nb.methods.ppo import PPO
from rlhf_nb.methods.rloo import RLOO
from rlhf_nb.protocol.control import Preview, Resume, SetCoefficient, Stop
from rlhf_nb.protocol.glossary import GLOSSARY
from rlhf_nb.protocol.spec import FunctionReward
from rlhf_nb.training import actor_critic, kl_doctor, not_finite, online
from rlhf_nb.training.gradient_noise import GradientNoise
from rlhf_nb.training.online_report import Report
from rlhf_nb.training.rollout.transformers_backend import TransformersSampler

from .conftest import fold, pretraining, rollouts

CONFIG = {
    "max_steps": 8, "rollout_batch_size": 8, "batch_size": 4, "num_ppo_epochs": 1, "max_new_tokens": 6,
    "max_length": 80, "sample_every": 0, "learning_rate": 3e-3, "kl_coef": 0.2,
}  # fmt: skip


def notices(place) -> dict[str, str]:
    return {notice.code: notice.text for notice in fold(place).notices if notice.code.startswith("kl_doctor/")}


# --- previews ---------------------------------------------------------------------------------------------------------


def test_a_preview_is_answered_and_changes_nothing(ppo):
    plain, asked = ppo("plain"), ppo("asked", controls=[Preview(values=[0.1, 0.2, 1.0], prompts=4, samples=8)])
    (found,) = fold(asked).previews.values()
    assert (found.now, found.prompts, found.samples, found.step) == (0.2, 4, 8, 0)
    # Before the first step the policy is the reference: a higher price can only lead back towards it.
    assert abs(found.kl) < 1e-4 and [one.kl for one in found.predictions] == sorted(
        (one.kl for one in found.predictions), reverse=True
    )
    assert [one.reward for one in found.predictions] == sorted((one.reward for one in found.predictions), reverse=True)
    assert all(one.reward > found.reward and 1 <= one.effective <= 8 for one in found.predictions)
    assert found.gap > 0 and not found.converged
    same = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in fold(plain).table()]
    assert same == [{k: v for k, v in row.items() if not k.startswith("time/")} for row in fold(asked).table()]


@pytest.mark.parametrize(
    ("knobs", "reason"),
    [
        ({"reference": "none"}, "reference=none"),
        ({"kl_in": "loss"}, "a preview needs kl_in=reward"),
        ({"gamma": 0.9}, "gamma below 1 moves the optimum"),
        ({"entropy_coef": 0.1}, "entropy_coef=0.1 moves the optimum"),
        ({"ptx_coef": 2.0}, "ptx_coef=2 moves the optimum"),
    ],
)
def test_a_preview_that_cannot_be_right_is_refused(ppo, knobs, reason):
    rows = {"pretraining": pretraining(ppo.job)} if "ptx_coef" in knobs else {}
    place = ppo(max_steps=2, controls=[Preview(values=[0.1])], samples_per_prompt=2, **knobs, **rows)
    (refused,) = [event for event in place.events() if event.kind == "control_refused"]
    assert reason in refused.reason and not fold(place).previews
    assert "convergence/gap" not in rollouts(place)[0]


def test_a_bonus_that_comes_into_force_with_a_preview_refuses_it_and_ends_the_gap(ppo):
    asked = [SetCoefficient(name="entropy_coef", value=0.1), Preview(values=[0.1])]
    place = ppo(samples_per_prompt=2, after_step_1=asked, max_steps=4)
    (refused,) = [event for event in place.events() if event.kind == "control_refused"]
    assert "entropy_coef=0.1 moves the optimum" in refused.reason
    assert ["convergence/gap" in row for row in rollouts(place)] == [True, False]


def test_a_preview_is_drawn_in_pieces_of_a_rollout_and_says_what_one_batch_says(ppo, monkeypatch):
    sizes: list[int] = []
    genuine = TransformersSampler.sample

    def sample(self: Any, prompts: Any, *arguments: Any, **named: Any) -> Any:
        sizes.append(len(prompts))
        return genuine(self, prompts, *arguments, **named)

    monkeypatch.setattr(TransformersSampler, "sample", sample)
    asked = Preview(values=[0.1, 1.0], prompts=3, samples=8)
    knobs = {"controls": [asked], "max_steps": 1, "batch_size": 8}
    small, large = ppo("small", **knobs), ppo("large", **knobs, rollout_batch_size=24)
    assert sizes == [8, 8, 8, 8, 24, 24]
    (one,), (other,) = (fold(place).previews.values() for place in (small, large))
    for a, b in zip((one, *one.predictions), (other, *other.predictions), strict=True):
        assert (a.reward, a.kl) == pytest.approx((b.reward, b.kl), rel=1e-4, abs=1e-6)


def test_a_preview_that_memory_does_not_hold_is_refused_and_the_run_goes_on(ppo, monkeypatch):
    genuine = TransformersSampler.sample
    calls: list[int] = []

    def sample(self: Any, prompts: Any, *arguments: Any, **named: Any) -> Any:
        calls.append(len(prompts))
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return genuine(self, prompts, *arguments, **named)

    monkeypatch.setattr(TransformersSampler, "sample", sample)
    place = ppo(controls=[Preview(values=[0.1], prompts=4, samples=8)])
    (refused,) = [event for event in place.events() if event.kind == "control_refused"]
    assert "prompts=4 with samples=8 of each are more than memory holds" in refused.reason
    assert len(rollouts(place)) == 4


def test_what_it_would_settle_at_is_the_optimum_that_the_method_comes_to():
    """The group's mean holds a share of each score: tests/fidelity/test_groups_exact.py enumerates where that leads."""
    light = PPO(value_model="none", samples_per_prompt=4, rollout_batch_size=8, whiten_advantages=False)
    assert light.settles_at(0.3) == pytest.approx(0.4)
    assert PPO(samples_per_prompt=4).settles_at(0.3) == PPO(value_model="none").settles_at(0.3) == 0.3
    assert RLOO().settles_at(0.3) == 0.3


def test_the_gap_is_logged_where_a_prompt_has_several_completions(ppo):
    assert all(row["convergence/gap"] > 0 for row in rollouts(ppo("groups", samples_per_prompt=4)))
    assert all("convergence/gap" not in row for row in rollouts(ppo("alone")))


LENGTH = FunctionReward(
    name="length", source="def length(prompts, completions):\n    return [float(len(prompt)) for prompt in prompts]"
)


def test_a_reward_that_depends_on_the_prompt_alone_leaves_nothing_to_gain(ppo):
    """Every completion of a prompt is then worth the same: the reference is the optimum at every price."""
    place = ppo(reward=LENGTH, samples_per_prompt=4, max_steps=2, controls=[Preview(values=[0.1, 1.0], samples=8)])
    assert rollouts(place)[0]["convergence/gap"] < 1e-8 < rollouts(place)[0]["reward/std"]
    (found,) = fold(place).previews.values()
    for one in found.predictions:
        assert one.reward == pytest.approx(found.reward, rel=1e-6) and one.reward > 1
        assert one.kl < 1e-4 and one.effective == pytest.approx(8, rel=1e-4)


# --- gradient noise, the KL of an update ------------------------------------------------------------------------------


def test_the_ratio_is_that_of_gradients_whose_noise_is_known():
    weight = nn.Parameter(torch.zeros(2000))
    noise = GradientNoise([weight], coordinates=2000)
    signal = torch.randn(2000, generator=torch.Generator().manual_seed(1))
    chance = torch.Generator().manual_seed(2)
    for _ in range(300):
        noise.new_pass()
        for _ in range(2):
            weight.grad = signal + 2.0 * torch.randn(2000, generator=chance)
            noise.add()
    # ‖G‖² = 2000 and tr(Σ) = 4·2000.
    assert noise.take() == pytest.approx(0.25, rel=0.1)
    assert noise.take() is None


def test_every_rollout_says_what_its_update_did(ppo):
    place = ppo(max_steps=4)
    rows = [row.values for row in fold(place).rows if "policy/update_kl" in row.values]
    assert len(rows) == 2 and all(row["policy/update_kl"] > 0 and row["optimizer/gradient_snr"] >= 0 for row in rows)
    assert {name for row in fold(place).rows for name in row.values} <= set(GLOSSARY)
    firsts = [row.values for row in fold(place).rows if "rollout/logprob_mismatch" in row.values]
    assert len(firsts) == 2 and all(row["rollout/logprob_mismatch"] < 1e-5 for row in firsts)
    still = ppo("still", learning_rate=0.0, max_steps=2)
    assert [r.values["policy/update_kl"] for r in fold(still).rows if "policy/update_kl" in r.values][0] < 1e-9


def test_the_kl_of_an_update_is_k3_from_the_policy_that_sampled_summed_over_tokens_that_count(ppo, monkeypatch):
    expected = []
    genuine = Report._update_kl

    def watched(self, rollout):
        trainer = self.trainer
        with torch.no_grad():
            now, _, _ = trainer.module(rollout.tokens_BL, rollout.attention_mask_BL, rollout.mask_BT)
        rows = []
        for row in range(4):
            log_ratio = [(now[row, t] - rollout.behavior_logprobs_BT[row, t]).item() for t in range(now.shape[1])]
            counted = [d for d, on in zip(log_ratio, rollout.mask_BT[row].tolist(), strict=True) if on]
            rows.append(sum(math.exp(d) - 1 - d for d in counted))
        expected.append(sum(rows) / 4)
        return genuine(self, rollout)

    monkeypatch.setattr(Report, "_update_kl", watched)
    place = ppo(max_steps=4, learning_rate=3e-2)
    said = [row.values["policy/update_kl"] for row in fold(place).rows if "policy/update_kl" in row.values]
    assert said == pytest.approx(expected, rel=1e-3) and min(said) > 1e-4


# --- the KL doctor: each fault is planted, and named ------------------------------------------------------------------


def test_a_sound_run_hears_nothing_from_the_doctor(ppo):
    assert not set(notices(ppo())) - {"kl_doctor/noise"}


def test_dropout_is_found(ppo, job, tiny_model_maker, monkeypatch):
    job.model = tiny_model_maker("drops", dropout=0.3)
    monkeypatch.setattr(online.OnlineTrainer, "train", switched(online.OnlineTrainer.train))
    assert "dropout=0.3 is on in" in notices(ppo(max_steps=2))["kl_doctor/start"]


def switched(train: Any) -> Any:
    def with_dropout(self: Any) -> None:
        self.module.policy.train()
        train(self)

    return with_dropout


def test_another_reference_is_found(ppo, job, tiny_model_maker, monkeypatch):
    genuine = actor_critic.load

    def load(*arguments: Any, **named: Any) -> Any:
        module, reference = genuine(*arguments, **named)
        with torch.no_grad():
            for weight in reference.state().values():
                weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
        return module, reference

    monkeypatch.setattr(actor_critic, "load", load)
    assert "the reference is another model" in notices(ppo(max_steps=2))["kl_doctor/start"]


def test_another_temperature_in_the_sampler_is_found(ppo, monkeypatch):
    genuine = TransformersSampler.sample
    monkeypatch.setattr(
        TransformersSampler, "sample", lambda self, p, u, *, temperature: genuine(self, p, u, temperature=1.5)
    )
    found = notices(ppo(max_steps=4))
    assert "drawn at temperature 1.5 and are scored at 1" in found["kl_doctor/mismatch"]
    assert "drawn at temperature 1.5" in found["kl_doctor/start"]


def test_a_sampler_that_differs_is_found_in_the_only_rollout_and_without_a_reference(ppo, monkeypatch):
    genuine = TransformersSampler.sample
    monkeypatch.setattr(
        TransformersSampler, "sample", lambda self, p, u, *, temperature: genuine(self, p, u, temperature=1.5)
    )
    found = notices(ppo(max_steps=1, reference="none", kl_coef=0.0))
    assert list(found) == ["kl_doctor/mismatch"]
    assert "drawn at temperature 1.5 and are scored at 1" in found["kl_doctor/mismatch"]


def test_a_sampler_with_yesterday_s_weights_is_found(ppo, monkeypatch):
    genuine = online.OnlineTrainer.make_sampler
    monkeypatch.setattr(
        online.OnlineTrainer,
        "make_sampler",
        lambda self, trunk, head, values=None, **_: genuine(self, copy.deepcopy(trunk), copy.deepcopy(head), values),
    )
    found = notices(ppo(max_steps=6, learning_rate=2e-2))
    assert "it samples from weights of before" in found["kl_doctor/mismatch"]


def test_tokens_after_the_end_token_are_found(ppo, monkeypatch):
    genuine = TransformersSampler.sample

    def sample(self: Any, *arguments: Any, **named: Any) -> Any:
        said = genuine(self, *arguments, **named)
        # An end token in the middle that nobody stopped at.
        said.tokens_BT[:, 1] = self.end_tokens[0]
        return said

    monkeypatch.setattr(TransformersSampler, "sample", sample)
    found = notices(ppo(max_steps=4))
    assert "count tokens after their end token" in found["kl_doctor/mismatch"]


def test_a_tokenizer_of_another_model_is_found(ppo, monkeypatch):
    genuine = online.models.load_tokenizer

    def load(*arguments: Any, **named: Any) -> Any:
        tokenizer = genuine(*arguments, **named)
        tokenizer.add_tokens([f"<extra-{n}>" for n in range(400)])
        return tokenizer

    monkeypatch.setattr(online.models, "load_tokenizer", load)
    monkeypatch.setattr(kl_doctor, "TOLERANCE", {torch.float32: -1.0})
    assert "give the tokenizer it was trained with" in notices(ppo(max_steps=2))["kl_doctor/start"]


def test_a_policy_that_never_moves_is_said_with_its_reason(ppo):
    assert "learning_rate is 0" in notices(ppo(learning_rate=0.0))["kl_doctor/stuck"]


def test_a_policy_that_runs_away_is_said_with_its_way_out(ppo):
    assert (
        "raise kl_coef, or lower learning_rate" in notices(ppo(learning_rate=0.3, kl_coef=0.0))["kl_doctor/exploding"]
    )


def test_the_noise_of_k1_is_told_from_a_fault(ppo, monkeypatch):
    """A reading a little below zero, within its error; k3 of the same completions is not negative."""
    genuine = online.OnlineTrainer.collect

    def collect(self: Any) -> Any:
        rollout, seconds = genuine(self)
        if self.step:
            sign = torch.ones_like(rollout.behavior_logprobs_BT)
            sign[::2] = -1.0
            noisy = rollout.behavior_logprobs_BT - (0.3 * sign - 0.02) * rollout.mask_BT
            rollout = online.replace(rollout, reference_logprobs_BT=noisy + 0.05 * rollout.mask_BT)
        return rollout, seconds

    monkeypatch.setattr(online.OnlineTrainer, "collect", collect)
    assert "noise of k1 on 8 completions; k3 on the same reads" in notices(ppo(max_steps=4))["kl_doctor/noise"]


# --- what is not finite -----------------------------------------------------------------------------------------------


def held(place: Any, job: Any, *then: Any) -> None:
    """Run beside a person who waits for the pause and then asks for something."""

    def person() -> None:
        deadline = time.monotonic() + 60
        while fold(place).state != "paused" and time.monotonic() < deadline:
            time.sleep(0.02)
        for control in then:
            append_line(place.control_path, control.model_dump(mode="json"))

    watching = threading.Thread(target=person)
    watching.start()
    job.run(place)
    watching.join()


def test_a_restart_after_the_pause_takes_the_checkpoint_that_was_good(ppo, monkeypatch):
    """The one of step 6 is beyond use, the run is back at 4, and a person stops it there."""
    place = ppo(prepare=True, checkpoint_every=2, max_steps=8)
    genuine = online.OnlineTrainer.update

    def update(self: Any, *arguments: Any, **named: Any) -> Any:
        if self.step == 5 and self.context.attempt == 1:
            self.live.learning_rate = 1e30
        return genuine(self, *arguments, **named)

    monkeypatch.setattr(online.OnlineTrainer, "update", update)
    held(place, ppo.job, Stop())
    path, step = last_checkpoint(place)
    assert step == 4
    # What led there was kept, as it is where nobody stops the run.
    append_line(place.control_path, SetCoefficient(name="learning_rate", value=1e-3).model_dump(mode="json"))
    ppo.job.run(place, attempt=2, resume_from=place.path / path)
    assert fold(place).state != "paused" and [row["step"] for row in fold(place).table() if "loss" in row][-1] == 8


def test_a_loss_that_is_not_finite_pauses_at_the_last_good_checkpoint_and_goes_on(ppo):
    """The rate is raised beyond reason once, and put back while the run waits."""
    place = ppo(prepare=True, checkpoint_every=2, max_steps=8)
    append_line(place.control_path, SetCoefficient(name="kl_coef", value=0.1).model_dump(mode="json"))
    trainers: list[Any] = []
    genuine = online.OnlineTrainer.update

    def update(self: Any, *arguments: Any, **named: Any) -> Any:
        trainers.append(self)
        if self.live.learning_rate > 1e-3 and self.step in (3, 5):
            # Two rewards that were put in: one is in the checkpoint of step 4, the other came after it.
            self.scoring.parts = [replace(part, shift=float(self.step)) for part in self.scoring.parts]
        if self.step == 5 and self.live.learning_rate > 1e-3:
            self.live.learning_rate = 1e30
        return genuine(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(online.OnlineTrainer, "update", update)
        held(place, ppo.job, SetCoefficient(name="learning_rate", value=1e-3), Resume())
    seen = fold(place)
    (text,) = [n.text for n in seen.notices if n.code == "not_finite"]
    # The checkpoint of step 6 holds finite weights of the size of the rate, with which nothing finite can be said.
    assert "the run is back at its checkpoint of step 4 and paused" in text
    assert "first not finite is" in text and seen.held == ""
    steps = [row["step"] for row in seen.table() if "loss" in row]
    assert steps == list(range(1, 9)) and seen.coefficients["learning_rate"].value == 1e-3
    # What a person put in still holds.
    assert trainers[-1].scoring.parts[0].shift == 5.0


def test_a_reference_that_says_nothing_finite_is_named(ppo, monkeypatch):
    genuine = online.OnlineTrainer.collect

    def collect(self: Any) -> Any:
        rollout, seconds = genuine(self)
        broken_BT = rollout.reference_logprobs_BT.clone()
        broken_BT[:, 0] = float("nan")
        return replace(rollout, reference_logprobs_BT=broken_BT), seconds

    monkeypatch.setattr(online.OnlineTrainer, "collect", collect)
    with pytest.raises(ComputeError, match="at step 1: first not finite is reference logprobs"):
        ppo(on_not_finite="fail")


def test_what_is_not_finite_on_one_rank_alone_is_named_by_all(ppo, monkeypatch):
    genuine, found = online.OnlineTrainer.collect, not_finite.distributed.gather_objects

    def collect(self: Any) -> Any:
        rollout, seconds = genuine(self)
        return replace(rollout, values_BT=torch.full_like(rollout.values_BT, torch.nan)), seconds

    def gathered(mine: Any) -> list[Any]:
        # Another rank's rows: sound but for what was computed earlier.
        return [mine, ["reference logprobs"]] if mine == ["values"] else found(mine)

    monkeypatch.setattr(online.OnlineTrainer, "collect", collect)
    monkeypatch.setattr(not_finite.distributed, "gather_objects", gathered)
    with pytest.raises(ComputeError, match="at step 1: first not finite is reference logprobs"):
        ppo(on_not_finite="fail")


def test_without_a_checkpoint_it_pauses_where_it_is_if_the_policy_still_speaks(ppo, monkeypatch):
    genuine = online.OnlineTrainer._norms

    def norms(self: Any) -> Any:
        if self.step == 3:
            parameters = dict(self.module.named_parameters())
            parameters["policy.model.norm.weight"].grad[0] = float("nan")
        return genuine(self)

    monkeypatch.setattr(online.OnlineTrainer, "_norms", norms)
    place = ppo(prepare=True)
    held(place, ppo.job, Stop())
    (text,) = [n.text for n in fold(place).notices if n.code == "not_finite"]
    assert "no checkpoint was taken yet, so the weights stay as after step 3 and paused" in text
    # One gradient of many, though their norm is a norm of all.
    assert "first not finite is the gradient of policy.model.norm.weight" in text


def test_the_controller_moves_kl_coef_once_for_each_rollout_that_was_measured(ppo, monkeypatch):
    """The second rollout is broken off, and the third one has no measurement to go by."""
    broken: list[int] = []
    moved: list[float] = []
    norms, adapt = online.OnlineTrainer._norms, PPO.adapt

    def nan_once(self: Any) -> Any:
        if self.step == 3 and not broken:
            broken.append(self.step)
            dict(self.module.named_parameters())["policy.model.norm.weight"].grad[0] = float("nan")
        return norms(self)

    monkeypatch.setattr(online.OnlineTrainer, "_norms", nan_once)

    left: list[int] = []
    collect = online.OnlineTrainer.collect

    def watched(self: Any) -> Any:
        left.append(len(self.noise._pairs))
        return collect(self)

    monkeypatch.setattr(online.OnlineTrainer, "collect", watched)

    def counted(self: Any, measured: list[float], live: Any) -> None:
        moved.append(measured[0])
        adapt(self, measured, live)

    monkeypatch.setattr(PPO, "adapt", counted)
    place = ppo(prepare=True, kl_target=0.02, kl_horizon=40)
    held(place, ppo.job, Resume())
    assert [row["step"] for row in rollouts(place)] == [1, 3, 4, 6, 8] and len(moved) == 3
    # Nor is anything left of its gradients.
    assert set(left) == {0}


def test_what_was_kept_at_the_pause_is_kept_by_a_restart_too(ppo, monkeypatch):
    """Back from step 7 at 4: kl_coef had moved twice since, and the measurement by which it would move is used up."""
    norms = online.OnlineTrainer._norms

    def nan(self: Any) -> Any:
        if self.step == 7 and self.context.attempt == 1:
            dict(self.module.named_parameters())["policy.model.norm.weight"].grad[0] = float("nan")
        return norms(self)

    monkeypatch.setattr(online.OnlineTrainer, "_norms", nan)
    place = ppo(prepare=True, kl_target=0.02, kl_horizon=40, checkpoint_every=4)
    held(place, ppo.job, Stop())
    moved = [
        event.values["objective/kl_coef"]
        for event in place.events()
        if "objective/kl_coef" in getattr(event, "values", ())
    ]
    assert len(set(moved)) == 4
    path, step = last_checkpoint(place)
    ppo.job.run(place, attempt=2, resume_from=place.path / path)
    after = {row["step"]: row["objective/kl_coef"] for row in rollouts(place)}
    assert step == 4 and after[5] == moved[-1] != after[7]


def test_a_policy_that_no_longer_speaks_and_was_never_kept_is_a_failed_run(ppo):
    with pytest.raises(ComputeError, match=r"at step \d+: first not finite is .*lower learning_rate \(now 1e\+30\)"):
        ppo(learning_rate=1e30)
