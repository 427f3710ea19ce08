from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlhf_nb.errors import ComputeError, DataError, RewardError, SpecError
from rlhf_nb.methods.ppo import PPO
from rlhf_nb.protocol.control import Pause, Resume, Sample, SaveCheckpoint, SetCoefficient, Stop
from rlhf_nb.protocol.glossary import GLOSSARY
from rlhf_nb.protocol.spec import FunctionReward, Launch, LoRA, NamedReward, RunSpec
from rlhf_nb.training import checkpoints

from .conftest import LETTERS, ROWS, fold, rollouts

CONFIG = {
    "max_steps": 8, "rollout_batch_size": 4, "batch_size": 2, "num_ppo_epochs": 2, "max_new_tokens": 6,
    "max_length": 80, "sample_every": 0, "learning_rate": 3e-3, "kl_coef": 0.2,
}  # fmt: skip


def sends(path, *controls, call: int) -> FunctionReward:
    """The reward above; asked for the `call`th time, which is in a known rollout, it appends control lines."""
    lines = "".join(control.model_dump_json() + "\n" for control in controls)
    body = LETTERS.source.split("\n", 1)[1]
    source = (
        "def sends(prompts, completions):\n"
        f"    from pathlib import Path\n    path = Path({str(path)!r})\n    count = path.with_suffix('.count')\n"
        "    n = int(count.read_text()) + 1 if count.exists() else 1\n    count.write_text(str(n))\n"
        f"    if n == {call}:\n        with open(path, 'a') as handle:\n            handle.write({lines!r})\n{body}"
    )
    return FunctionReward(name="sends", source=source)


def by_step(place) -> dict[int, dict[str, float]]:
    """Metrics of each rollout, by its first step."""
    return {row["step"]: row for row in rollouts(place)}


def table(place) -> dict[int, dict[str, float]]:
    return {row["step"]: row for row in fold(place).table()}


def without_times(place) -> list[dict]:
    rows = table(place).values()
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


# --- the algorithm, as it runs ----------------------------------------------------------------------------------------


def test_a_step_counts_optimizer_steps_and_a_rollout_has_epochs_times_minibatches_of_them(ppo):
    place = ppo()
    metrics = [e for e in place.events() if e.kind == "metric"]
    assert sorted({e.step for e in metrics}) == list(range(1, 9))
    assert [(e.step, e.rollout) for e in metrics if "reward/mean" in e.values] == [(1, 0), (5, 1)]
    assert [(e.step, e.rollout) for e in metrics if "time/update_s" in e.values] == [(4, 0), (8, 1)]
    assert [e for e in place.events() if e.kind == "training_ended"][0].outcome == "finished"
    unknown = {name for e in metrics for name in e.values} - set(GLOSSARY)
    assert not unknown


@pytest.mark.parametrize("adapter", [None, LoRA(r=4)])
@pytest.mark.parametrize("value_model", ["own", "policy_trunk"])
def test_the_policy_starts_at_the_reference_and_its_reward_is_score_minus_beta_kl(ppo, adapter, value_model):
    place = ppo(adapter=adapter, value_model=value_model, max_steps=12, learning_rate=1e-2)
    rows = by_step(place)
    assert rows[1]["kl/policy_reference"] == pytest.approx(0, abs=1e-5)
    assert abs(rows[9]["kl/policy_reference"]) > 1e-3
    for row in rows.values():
        assert row["reward/mean"] == pytest.approx(row["reward/score"] - 0.2 * row["kl/policy_reference"], abs=1e-6)


def test_before_the_first_update_the_ratio_is_one_and_nothing_is_clipped(ppo):
    first, second = (table(ppo(batch_size=4))[step] for step in (1, 2))
    assert first["policy/approx_kl"] == pytest.approx(0, abs=1e-9) and first["policy/clip_fraction"] == 0
    # At ratio one the loss is the mean advantage, and that is whitened.
    assert first["loss/policy"] == pytest.approx(0, abs=1e-6)
    assert second["policy/approx_kl"] > 1e-6


def test_the_reward_of_what_the_policy_says_rises(ppo):
    knobs = {"max_steps": 80, "rollout_batch_size": 32, "batch_size": 32, "num_ppo_epochs": 2, "kl_coef": 0.01}
    rows = by_step(ppo(**knobs, learning_rate=1e-2))
    scores = [row["reward/score"] for row in rows.values()]
    assert sum(scores[-5:]) / 5 > 1.5 * sum(scores[:5]) / 5


def test_the_first_value_loss_is_half_the_mean_squared_return(ppo):
    """The value head starts at zero: at the reference, with λ = 1, every token's return is the score."""
    first = table(ppo(batch_size=4, lam=1.0))[1]
    assert first["value/explained_variance"] == pytest.approx(0, abs=1e-6)
    assert first["loss/value"] > 0


@pytest.mark.parametrize("rows", [1, 3])
def test_micro_batches_change_nothing_but_memory(ppo, rows):
    whole, split = (
        ppo("whole", batch_size=4, max_steps=6),
        ppo("split", batch_size=4, max_steps=6, micro_batch_size=rows),
    )
    for a, b in zip(without_times(whole), without_times(split), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


def test_passes_over_a_rollout_end_once_the_policy_has_moved_far_enough(ppo):
    place = ppo(target_kl=1e-7, batch_size=4, num_ppo_epochs=4, max_steps=6)
    # Step 1 of a rollout still is the policy that sampled, step 2 is beyond the target.
    assert list(by_step(place)) == [1, 3, 5]


def test_the_learning_rate_falls_to_zero_on_a_linear_schedule(ppo, trace):
    rates = trace(ppo(lr_scheduler="linear"), "optimizer/learning_rate")
    assert rates == pytest.approx({step: 3e-3 * (1 - (step - 1) / 8) for step in range(1, 9)})


def test_a_length_penalty_and_a_missing_end_are_taken_off_the_score(ppo):
    row = by_step(ppo(length_penalty=0.1, missing_eos_penalty=2.0, max_steps=1))[1]
    expected = row["reward/score"] - 0.1 * row["completion/length_mean"] - 2 * row["completion/truncated_fraction"]
    assert row["reward/mean"] == pytest.approx(expected, abs=1e-5)
    assert row["completion/truncated_fraction"] > 0


def test_scores_are_clipped_before_penalties(ppo):
    row = by_step(ppo(score_clip=0.25, max_steps=1, rollout_batch_size=8))[1]
    assert row["reward/score"] > row["reward/mean"] > -0.25
    assert row["reward/mean"] <= 0.25 + 1e-6


def test_prompts_come_round_in_another_order_each_pass_and_each_as_often(ppo):
    source = (
        "def note(prompts, completions):\n    import json\n"
        f"    with open({str(ppo.job.root / 'seen')!r}, 'a') as f:\n        f.write(json.dumps(prompts) + '\\n')\n"
        "    return [0.0] * len(prompts)"
    )
    ppo(
        reward=FunctionReward(name="note", source=source),
        rollout_batch_size=6,
        batch_size=6,
        num_ppo_epochs=1,
        max_steps=3,
    )
    passes = [json.loads(line) for line in (ppo.job.root / "seen").read_text().splitlines()]
    everything = sorted(row["prompt"] for row in ROWS)
    assert all(sorted(prompts) == everything for prompts in passes)
    assert passes[0] != passes[1]


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [None, LoRA(r=4)])
def test_plain_transformers_loads_the_policy_that_was_trained(ppo, adapter):
    place = ppo(adapter=adapter, learning_rate=1e-2)
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (ppo.job.model, place.model))
    assert before.state_dict().keys() == after.state_dict().keys()
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert (place.model / "tokenizer.json").exists()
    assert (place.model / "adapter").exists() == (adapter is not None)


def test_a_reward_model_scores_what_the_policy_says(ppo):
    from rlhf_nb.protocol.spec import ModelReward, PathModel
    from rlhf_nb.toy import pairs

    scorer = ppo.job("reward", pairs(4), name="rm", config={"max_steps": 1, "batch_size": 2, "max_length": 400})
    place = ppo(reward=ModelReward(model=PathModel(path=str(scorer.model))), gold=LETTERS, max_steps=2)
    row = by_step(place)[1]
    assert math.isfinite(row["reward/score"]) and row["reward/gold"] >= 0 and row["reward/gold"] != row["reward/score"]


# --- steering ---------------------------------------------------------------------------------------------------------


def changes(place) -> dict[str, tuple[int, float, float]]:
    return {e.name: (e.effective_step, e.old, e.new) for e in place.events() if e.kind == "coefficient_changed"}


def test_coefficients_of_the_update_act_at_the_next_step_and_those_of_the_rollout_at_the_next_rollout(ppo):
    update = {"learning_rate": 1e-5, "cliprange": 0.3, "cliprange_value": 0.5, "vf_coef": 0.7, "entropy_coef": 0.05}
    rollout = {"kl_coef": 1.5, "temperature": 0.1, "length_penalty": 0.03}
    asked = [SetCoefficient(name=name, value=value) for name, value in (update | rollout).items()]
    # The reward is asked while the rollout is made whose first boundary has passed: the next boundary is before step 2.
    place = ppo(reward=sends(ppo.job.root / "run/control.jsonl", *asked, call=1), max_steps=12)
    found = changes(place)
    assert {name: found[name][0] for name in update} == dict.fromkeys(update, 2)
    assert {name: found[name][0] for name in rollout} == dict.fromkeys(rollout, 5)
    assert {name: new for name, (_, _, new) in found.items()} == update | rollout
    started = place.events()[0]
    live = {c.name: c.value for c in started.coefficients if not c.unavailable_reason}
    assert live == {name: old for name, (_, old, _) in found.items()}

    rows = table(place)
    # Each metric follows from the coefficient that the event says was in force.
    for step, row in rows.items():
        new = step >= 2
        vf, entropy = (0.7, 0.05) if new else (0.1, 0.0)
        expected = row["loss/policy"] + vf * row["loss/value"] - entropy * row["policy/entropy"]
        assert row["loss"] == pytest.approx(expected, abs=1e-6)
        assert row["optimizer/learning_rate"] == (1e-5 if new else 3e-3)
    for step, row in by_step(place).items():
        beta, price = (1.5, 0.03) if step >= 5 else (0.2, 0.0)
        expected = row["reward/score"] - beta * row["kl/policy_reference"] - price * row["completion/length_mean"]
        assert row["reward/mean"] == pytest.approx(expected, abs=1e-5)
        assert row["objective/kl_coef"] == beta
    assert rows[5]["policy/entropy"] < rows[4]["policy/entropy"] - 0.5


def test_without_a_tether_the_reference_is_there_and_the_tether_can_be_raised(ppo):
    asked = SetCoefficient(name="kl_coef", value=2.0)
    place = ppo(reward=sends(ppo.job.root / "run/control.jsonl", asked, call=2), kl_coef=0.0, max_steps=12)
    assert changes(place)["kl_coef"] == (9, 0.0, 2.0)
    row = by_step(place)[9]
    assert row["reward/mean"] == pytest.approx(row["reward/score"] - 2 * row["kl/policy_reference"], abs=1e-6)


def test_stop_ends_after_the_step_and_the_model_is_saved(ppo):
    place = ppo(reward=sends(ppo.job.root / "run/control.jsonl", Stop(), call=1))
    assert max(table(place)) == 1 and place.events()[-1].outcome == "stopped"
    assert (place.model / "model.safetensors").exists()


def test_a_pause_goes_on_where_it_was_and_changes_nothing(ppo):
    whole = ppo("whole")
    place = ppo(controls=[Pause(), Sample(prompts=["Who?"]), SaveCheckpoint(), Resume()])
    kinds = [e.kind for e in place.events()]
    assert kinds.count("samples") == 1 and kinds.count("checkpoint_saved") == 1
    assert without_times(place) == without_times(whole)


def test_a_checkpoint_asked_for_within_a_rollout_is_taken_at_its_end(ppo):
    place = ppo(reward=sends(ppo.job.root / "run/control.jsonl", SaveCheckpoint(), call=1))
    (saved,) = [e for e in place.events() if e.kind == "checkpoint_saved"]
    assert saved.step == 4 and (place.path / saved.path / "trained.safetensors").exists()


# --- resuming ---------------------------------------------------------------------------------------------------------


def dies(trap) -> FunctionReward:
    body = LETTERS.source.split("\n", 1)[1]
    source = (
        "def dies(prompts, completions):\n    import os\n"
        f"    trap = {str(trap)!r}\n"
        "    if os.path.exists(trap) and not os.path.getsize(trap):\n"
        "        os.remove(trap)\n        raise RuntimeError('the machine is gone')\n"
        f"    if os.path.exists(trap):\n        os.truncate(trap, os.path.getsize(trap) - 1)\n{body}"
    )
    return FunctionReward(name="dies", source=source)


@pytest.mark.parametrize("adapter", [None, LoRA(r=4)])
def test_a_resumed_run_equals_one_that_never_stopped(ppo, adapter):
    knobs = {"max_steps": 16, "checkpoint_every": 5, "adapter": adapter, "lr_scheduler": "linear", "target_kl": 0.5}
    whole = ppo("whole", reward=dies(ppo.job.root / "never"), **knobs)
    trap = ppo.job.root / "trap"
    trap.write_text("xxx")
    place = ppo("killed", reward=dies(trap), prepare=True, **knobs)
    with pytest.raises(RewardError, match="the machine is gone"):
        ppo.job.run(place)
    last = checkpoints.latest(place.path)
    # Asked for every 5 steps, taken at the next end of a rollout.
    assert checkpoints.step_of(last) == 12
    early = checkpoints.directory(place.path, 8)
    ppo.job.run(place, attempt=2, resume_from=early)
    (resumed,) = [e for e in place.events() if e.kind == "resumed"]
    assert (resumed.attempt, resumed.from_step) == (2, 8)
    assert without_times(place) == without_times(whole)
    a, b = (load_file(p.model / "model.safetensors") for p in (place, whole))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_stopped_within_a_rollout_and_resumed_equals_one_that_never_stopped(ppo):
    """Its rollout has four minibatches; the stop comes after the second rollout's second."""
    whole = ppo("whole", checkpoint_every=1)
    asked = [Stop(), SaveCheckpoint()]
    reward = sends(ppo.job.root / "run/control.jsonl", *asked, call=2)
    place = ppo(reward=reward, checkpoint_every=1)
    assert max(table(place)) == 5 and fold(place).outcome == "stopped"
    assert [e.step for e in place.events() if e.kind == "checkpoint_saved"] == [4]
    codes = {notice.code for notice in fold(place).notices}
    assert "checkpoint_missed" in codes and "checkpoint_waits" not in codes
    ppo.job.run(place, attempt=2, resume_from=checkpoints.latest(place.path))
    assert without_times(place) == without_times(whole)
    a, b = (load_file(p.model / "model.safetensors") for p in (place, whole))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_stop_at_a_rollout_s_end_leaves_its_checkpoint(ppo):
    place = ppo(target_kl=1e-7, after_step_1=Stop(), checkpoint_every=1, batch_size=4, num_ppo_epochs=1)
    assert [e.step for e in place.events() if e.kind == "checkpoint_saved"] == [1]


def test_a_set_and_a_checkpoint_at_one_boundary_are_told_apart_after_a_restart(ppo):
    """The checkpoint is of the step before the one at which the set comes into force."""
    asked = [SetCoefficient(name="kl_coef", value=0.7), SaveCheckpoint()]
    reward = sends(ppo.job.root / "run/control.jsonl", *asked, call=1)
    place = ppo(reward=reward, kl_target=0.5, kl_horizon=400)

    def changed() -> list[tuple]:
        return [(c.name, c.old, c.new, c.effective_step) for c in fold(place).changes]

    before = changed()
    assert before == [("kl_coef", 0.2, 0.7, 5), ("kl_controller", 1.0, 0.0, 5)]
    ppo.job.run(place, attempt=2, resume_from=checkpoints.directory(place.path, 4))
    assert changed() == before and fold(place).coefficients["kl_controller"].value == 0.0


def test_a_checkpoint_of_another_model_is_refused(ppo):
    place = ppo(checkpoint_every=4, max_steps=4)
    other = ppo("other", adapter=LoRA(r=4), prepare=True)
    with pytest.raises(ComputeError, match="checkpoint-4 holds other weights than this run trains"):
        ppo.job.run(other, attempt=2, resume_from=checkpoints.latest(place.path))


# --- samples ----------------------------------------------------------------------------------------------------------


def test_samples_hold_both_completions_of_fixed_and_of_fresh_prompts(ppo):
    rows = [{"prompt": f"Number {n}?"} for n in range(20)]
    place = ppo(rows=rows, sample_every=4, gold=LETTERS, learning_rate=1e-2)
    first, second = (e for e in place.events() if e.kind == "samples")
    assert (first.step, second.step) == (4, 8)
    for event in (first, second):
        assert len(event.items) == 8
        for item in event.items:
            assert item.reference_completion is not None and item.score == item.gold
            assert item.reference_score == item.reference_gold
            assert item.length > 0 and math.isfinite(item.kl)
    assert [i.prompt for i in first.items[:4]] == [i.prompt for i in second.items[:4]]
    assert {i.prompt for i in first.items[4:]} != {i.prompt for i in second.items[4:]}
    assert [i.reference_completion for i in first.items[:4]] == [i.reference_completion for i in second.items[:4]]
    assert any(item.completion != item.reference_completion for item in second.items)


def test_looking_at_samples_leaves_the_training_as_it_is(ppo):
    plain, watched = ppo("plain"), ppo("watched", sample_every=1)
    assert without_times(plain) == without_times(watched)


def test_asked_for_samples_come_back_under_the_request_s_id(ppo):
    request = Sample(prompts=["Who?", "  "])
    place = ppo(controls=[request])
    (event,) = [e for e in place.events() if e.kind == "samples"]
    assert event.request_id == request.id and [i.prompt for i in event.items] == ["Who?"] and event.step == 0


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"kl_coef": -1}, r"ppo: kl_coef=-1: should be greater than or equal to 0"),
        ({"temperature": 0}, r"ppo: temperature=0: should be greater than 0"),
        ({"kl_coeff": 0.1}, r'ppo: "kl_coeff" is no knob of ppo; did you mean "kl_coef"\?'),
    ],
)
def test_a_bad_knob_is_one_line(knobs, message):
    with pytest.raises(SpecError, match=message):
        PPO.create(**knobs)


@pytest.mark.parametrize(
    ("knobs", "spec", "message"),
    [
        ({"rollout_batch_size": 30}, {}, "rollout_batch_size=30 is no multiple of batch_size=32; use 32"),
        ({"batch_size": 2}, {"launch": Launch.parse("--num_processes 4")}, "batch_size=2 leaves some of 4 ranks"),
        ({"max_new_tokens": 600}, {}, "max_new_tokens=600 leaves no room for a prompt in max_length=512"),
        ({}, {"adapter": LoRA(dropout=0.1)}, "adapter dropout=0.1"),
    ],
)
def test_a_combination_that_cannot_work_is_refused_before_anything_starts(knobs, spec, message):
    method = PPO.create(**knobs)
    with pytest.raises(SpecError, match=message):
        method.check(RunSpec(run_id="r", workspace_id="w", method="ppo", config={}, created=0.0, **spec))


@pytest.mark.parametrize("value", ["float('nan')", "float('inf')"])
def test_a_reward_that_is_not_finite_ends_the_run_by_name(ppo, value):
    source = f"def odd(prompts, completions):\n    return [0.0, {value}, 0.0, 0.0]"
    with pytest.raises(RewardError, match=r"reward odd: completion 1 got (nan|inf)"):
        ppo(reward=FunctionReward(name="odd", source=source))


def test_a_reward_that_returns_another_count_ends_the_run(ppo):
    source = "def short(prompts, completions):\n    return [0.0]"
    with pytest.raises(RewardError, match="reward short: returned 1 numbers for 4 completions"):
        ppo(reward=FunctionReward(name="short", source=source))


def test_one_constant_reward_for_all_trains_on(ppo):
    source = "def flat(prompts, completions):\n    return [1.0] * len(prompts)"
    rows = table(ppo(reward=FunctionReward(name="flat", source=source)))
    assert all(math.isfinite(value) for row in rows.values() for value in row.values())


def test_a_run_whose_completions_are_all_cut_says_so_once_and_goes_on(ppo):
    place = ppo(max_new_tokens=1)
    (notice,) = [e for e in place.events() if e.kind == "notice" and e.code == "all_truncated"]
    assert "max_new_tokens=1" in notice.text
    assert max(table(place)) == 8


def test_prompts_that_leave_no_room_are_dropped_and_counted(ppo):
    place = ppo(rows=[*ROWS, {"prompt": "far too long " * 20}])
    (notice,) = [e for e in place.events() if e.kind == "notice" and e.code == "prompts_dropped"]
    assert notice.text.startswith("1 of 7 prompts are empty or longer than 74 tokens")
    with pytest.raises(DataError, match="none of 1 prompts has between 1 and 74 tokens"):
        ppo("none", rows=[{"prompt": "far too long " * 20}])


def test_a_reward_that_cannot_judge_a_bare_prompt_leaves_its_samples_without_score(ppo):
    source = "def keyed(prompts, completions, answer):\n    return [float(a) for a in answer]"
    rows = [{**row, "answer": index} for index, row in enumerate(ROWS)]
    place = ppo(rows=rows, reward=FunctionReward(name="keyed", source=source), controls=[Sample(prompts=["Who?"])])
    (event,) = [e for e in place.events() if e.kind == "samples"]
    assert event.items[0].score is None and event.items[0].completion
    assert by_step(place)[1]["reward/score"] > 0


def test_a_loss_that_is_not_finite_stops_before_the_weights_and_says_where_it_began(ppo):
    with pytest.raises(ComputeError, match=r"at step \d+: first not finite is .*lower learning_rate \(now 1e\+30\)"):
        ppo(learning_rate=1e30, on_not_finite="fail")


def test_no_reward_is_said(ppo):
    with pytest.raises(SpecError, match="ppo: no reward"):
        ppo(reward=None)


# --- the toy world ----------------------------------------------------------------------------------------------------


def test_the_true_reward_of_the_toy_world_is_a_reward_here(ppo):
    place = ppo(reward=NamedReward(name="toy-true"), gold=NamedReward(name="toy-true"), max_steps=2)
    row = by_step(place)[1]
    assert row["reward/score"] == row["reward/gold"]
