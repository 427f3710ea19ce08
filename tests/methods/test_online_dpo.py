"""Online DPO on a random model, as the worker runs it: the policy's own pairs, ordered by a reward, live, resumed."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_nb.compute.rundir import append_line
from rlhf_nb.errors import DataError, SpecError
from rlhf_nb.methods.online_dpo import OnlineDPO
from rlhf_nb.protocol.control import Sample, SetCoefficient, SetReward
from rlhf_nb.protocol.glossary import GLOSSARY
from rlhf_nb.protocol.spec import CombinedReward, FunctionReward, LoRA, RewardPart, RunSpec
from rlhf_nb.training import checkpoints
from rlhf_nb.training.data import prompt_ids
from rlhf_nb.training.online_pairs import PairScoring, tied_share
from rlhf_nb.training.sampling import sequence_logprobs
from tests.methods.conftest import LETTERS, ROWS, VOWELS, asking, fold, function

CONFIG = {
    "max_steps": 4, "batch_size": 2, "sample_every": 0, "learning_rate": 1e-3, "max_length": 200, "max_new_tokens": 8,
    "sample_tokens": 4,
}  # fmt: skip
MINUS_LETTERS = function("minus_letters", "-sum(c.isascii() and c.isalpha() for c in text) / 4")


@pytest.fixture
def run(job, tiny_model_maker, monkeypatch):
    job.model = tiny_model_maker("still", dropout=0.0)

    def start(name="run", *, rows=ROWS, reward=LETTERS, after_step_1=None, prepare=False, controls=(), **knobs):
        spec = {key: knobs.pop(key) for key in ("adapter", "gold") if key in knobs}
        place = job.prepare("online-dpo", rows, name=name, config={**CONFIG, **knobs}, reward=reward, **spec)
        for control in controls:
            append_line(place.control_path, control.model_dump(mode="json"))
        if prepare:
            return place
        with monkeypatch.context() as patch:
            if after_step_1 is not None:
                from rlhf_nb.compute.rundir import EventWriter

                patch.setattr(EventWriter, "write", asking(place, after_step_1))
            return job.run(place)

    start.job = job
    return start


def steps(place) -> dict[int, dict[str, float]]:
    return {row["step"]: row for row in fold(place).table()}


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo_sum"])
def test_the_loss_is_the_paper_s_on_the_pair_that_was_sampled(run, loss_type):
    seen = steps(run(batch_size=1, loss_type=loss_type, beta=0.4, learning_rate=1e-2))
    formula = {"sigmoid": lambda h: -log_sigmoid(0.4 * h), "ipo_sum": lambda h: (h - 1 / 0.8) ** 2}[loss_type]
    assert seen[1]["log_ratio/margin"] == 0.0 and seen[4]["log_ratio/margin"] != 0.0
    for row in seen.values():
        # TRL rounds this trainer's loss to four digits.
        assert row["loss"] == pytest.approx(formula(row["log_ratio/margin"]), abs=6e-5)
        assert row["implicit_reward/margin"] == pytest.approx(0.4 * row["log_ratio/margin"], rel=1e-5)
        assert set(row) - {"step", "rollout"} <= set(GLOSSARY)


def test_the_opposite_reward_exchanges_chosen_and_rejected(run):
    """Frozen, the policy says the same whatever the reward."""
    frozen = {"learning_rate": 0, "batch_size": 1, "max_steps": 8, "max_new_tokens": 16}
    for_it, against = steps(run("for", **frozen)), steps(run("against", reward=MINUS_LETTERS, **frozen))
    untied = [step for step, row in for_it.items() if not row["pairs/tied"]]
    assert len(untied) >= 3
    for step in untied:
        assert for_it[step]["logprob/chosen"] == against[step]["logprob/rejected"]
        assert for_it[step]["logprob/rejected"] == against[step]["logprob/chosen"]
        assert for_it[step]["reward/score"] == -against[step]["reward/score"]
        assert for_it[step]["pairs/margin"] > 0


def test_the_policy_moves_towards_the_reward_and_away_from_the_reference(run):
    place = run(max_steps=40, batch_size=16, learning_rate=5e-3, max_new_tokens=4, lr_scheduler="constant")
    seen = steps(place)
    first, last = (sum(seen[step]["reward/score"] for step in range(at, at + 5)) / 5 for at in (1, 36))
    assert last > first + 0.1
    assert seen[1]["kl/policy_reference"] == 0.0 and seen[40]["kl/policy_reference"] > 0.01
    assert seen[40]["reward/mean"] == pytest.approx(
        seen[40]["reward/score"] - 0.1 * seen[40]["kl/policy_reference"], rel=1e-6
    )


def test_pairs_and_kl_are_those_of_the_tokens_that_were_said_and_of_no_padding(run, monkeypatch):
    """Redone from the completions of a step, its weights and the reference; most completions end before the limit."""
    model = AutoModelForCausalLM.from_pretrained(run.job.model)
    with torch.no_grad():
        model.lm_head.weight[1] *= 40
    model.save_pretrained(run.job.model)
    asked: list[tuple[list[int], list[list[int]]]] = []
    genuine = PairScoring.__call__

    def recorded(self, *, row, completion_ids, **named):
        asked.append((row, completion_ids))
        return genuine(self, row=row, completion_ids=completion_ids, **named)

    monkeypatch.setattr(PairScoring, "__call__", recorded)
    place = run(max_steps=3, batch_size=6, learning_rate=1e-2, checkpoint_every=2)
    tokenizer = AutoTokenizer.from_pretrained(run.job.model)
    reference = AutoModelForCausalLM.from_pretrained(run.job.model)
    policy = AutoModelForCausalLM.from_pretrained(checkpoints.directory(place.path, 2))
    rows, completions = asked[2]
    prompts = [prompt_ids(ROWS[index]["prompt"], tokenizer) for index in rows]
    said = [ids[: ids.index(1) + 1] if 1 in ids else ids for ids in completions]
    assert len({len(ids) for ids in said}) > 1
    ours, theirs = (torch.tensor(sequence_logprobs(one, prompts, said)) for one in (policy, reference))
    row = steps(place)[3]
    assert row["kl/policy_reference"] == pytest.approx((ours - theirs).mean().item(), rel=1e-3)
    assert row["completion/length_mean"] == pytest.approx(sum(map(len, said)) / len(said))
    texts = tokenizer.batch_decode(said, skip_special_tokens=True)
    letters = [sum(c.isascii() and c.isalpha() for c in text) for text in texts]
    assert letters[:6] != letters[6:]
    chosen = [i if letters[i] >= letters[i + 6] else i + 6 for i in range(6)]
    assert row["logprob/chosen"] == pytest.approx(ours[chosen].mean().item(), rel=1e-4)


def test_beta_enters_the_loss_of_the_effective_step(run):
    still = steps(run("still", batch_size=1, learning_rate=1e-2))
    place = run("moved", batch_size=1, learning_rate=1e-2, after_step_1=SetCoefficient(name="beta", value=2.0))
    moved = steps(place)
    (change,) = fold(place).changes
    assert (change.name, change.old, change.new, change.effective_step) == ("beta", 0.1, 2.0, 2)
    assert moved[1]["loss"] == still[1]["loss"]
    assert moved[2]["log_ratio/margin"] == pytest.approx(still[2]["log_ratio/margin"], rel=1e-6) != 0.0
    assert moved[2]["loss"] == pytest.approx(-log_sigmoid(2.0 * still[2]["log_ratio/margin"]), abs=6e-5)
    assert abs(moved[2]["loss"] - still[2]["loss"]) > 1e-3


def test_the_learning_rate_scales_the_effective_step(run):
    config = {
        "optimizer": "sgd", "max_grad_norm": 0, "lr_scheduler": "constant", "learning_rate": 0.01, "max_steps": 2,
        "checkpoint_every": 1,
    }  # fmt: skip
    still = run("still", **config)
    moved = run("moved", after_step_1=SetCoefficient(name="learning_rate", value=0.05), **config)
    (change,) = fold(moved).changes
    assert (change.name, change.effective_step) == ("learning_rate", 2)

    def weights(place, step):
        return load_file(checkpoints.directory(place.path, step) / "model.safetensors")

    start, slow, fast = weights(still, 1), weights(still, 2), weights(moved, 2)
    for name, before in start.items():
        torch.testing.assert_close(fast[name], before + 5 * (slow[name] - before), rtol=1e-5, atol=2e-6)
    assert max((fast[name] - start[name]).abs().max().item() for name in start) > 1e-4


def test_the_temperature_enters_the_completions_of_the_effective_step(run):
    """Frozen weights, completions that all reach the limit: one that was always so cold draws the same at that step."""
    frozen = {"learning_rate": 0, "max_steps": 3}
    still, cold = (steps(run(f"at-{t}", temperature=t, **frozen)) for t in (0.9, 0.1))
    place = run("moved", temperature=0.9, after_step_1=SetCoefficient(name="temperature", value=0.1), **frozen)
    moved = steps(place)
    (change,) = fold(place).changes
    assert (change.name, change.old, change.new, change.effective_step) == ("temperature", 0.9, 0.1, 2)
    assert all(row["completion/truncated_fraction"] == 1.0 for row in (*still.values(), *cold.values()))
    said = ("logprob/chosen", "logprob/rejected", "reward/score")
    assert [moved[1][name] for name in said] == [still[1][name] for name in said]
    for step in (2, 3):
        assert [moved[step][name] for name in said] == [cold[step][name] for name in said]
        assert moved[step]["logprob/chosen"] != still[step]["logprob/chosen"]


def test_the_missing_eos_penalty_enters_the_reward_of_the_effective_step(run):
    frozen = {"learning_rate": 0, "max_steps": 3}
    still = steps(run("still", **frozen))
    place = run("moved", after_step_1=SetCoefficient(name="missing_eos_penalty", value=7.0), **frozen)
    moved = steps(place)
    (change,) = fold(place).changes
    assert (change.name, change.old, change.new, change.effective_step) == ("missing_eos_penalty", 0.0, 7.0, 2)
    for step in (1, 2, 3):
        cut = still[step]["completion/truncated_fraction"]
        assert cut > 0 and moved[step]["reward/score"] == still[step]["reward/score"]
        penalty = 7.0 if step > 1 else 0.0
        assert moved[step]["reward/mean"] == pytest.approx(still[step]["reward/mean"] - penalty * cut)


def test_pairs_are_tied_after_the_penalty():
    pair = {"score": [1.0, 2.0], "ended": [True, False], "penalty": 1.0}
    assert tied_share([pair]) == 1.0 and tied_share([{**pair, "penalty": 0.5}]) == 0.0


def test_weights_of_a_combined_reward_are_live(run):
    reward = CombinedReward(parts=(RewardPart(reward=LETTERS), RewardPart(reward=VOWELS, weight=0.5)))
    place = run(reward=reward, max_steps=3, after_step_1=SetCoefficient(name="reward_weight/vowels", value=2.0))
    (change,) = fold(place).changes
    assert (change.name, change.old, change.new, change.effective_step) == ("reward_weight/vowels", 0.5, 2.0, 2)
    for step, row in steps(place).items():
        weight = 0.5 if step == 1 else 2.0
        expected = row["reward_part/letters"] + weight * row["reward_part/vowels"]
        assert row["reward/score"] == pytest.approx(expected)


def test_the_reward_itself_can_be_replaced_and_stays_replaced_after_a_restart(run):
    control = SetReward(part="letters", reward=MINUS_LETTERS, why="the opposite")
    config = {"max_steps": 4, "checkpoint_every": 3, "learning_rate": 0}
    whole = run("whole", after_step_1=control, **config)
    (change,) = fold(whole).rewards
    assert change.effective_step == 2
    still = steps(run("still", **config))
    for step, row in steps(whole).items():
        expected = still[step]["reward/score"] if step == 1 else change.shift - still[step]["reward/score"]
        assert row["reward/score"] == pytest.approx(expected), step
    before = steps(whole)[4]
    run.job.run(whole, attempt=2, resume_from=checkpoints.directory(whole.path, 3))
    assert steps(whole)[4]["reward/score"] == before["reward/score"]


@pytest.mark.parametrize("adapter", [None, LoRA(r=4)])
def test_a_resumed_run_samples_and_learns_what_one_that_never_stopped_does(run, adapter):
    config = {"max_steps": 6, "checkpoint_every": 3, "lr_scheduler": "cosine", "sample_every": 2, "adapter": adapter}
    whole, again = run("whole", **config), run("again", **config)
    run.job.run(again, attempt=2, resume_from=checkpoints.directory(again.path, 3))
    timed = ("time/step_s", "time/hooks_s", "time/score_s")
    assert fold(again).attempt == 2
    for step, row in steps(whole).items():
        resumed = steps(again)[step]
        assert {k: v for k, v in row.items() if k not in timed} == {k: v for k, v in resumed.items() if k not in timed}
    a, b = (load_file(place.model / "model.safetensors") for place in (again, whole))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_micro_batches_are_scored_apart_and_counted_together(run):
    source = "def counting(prompts, completions):\n    return [float(len(completions))] * len(completions)"
    counting = FunctionReward(name="counting", source=source)
    row = steps(run(batch_size=4, gradient_accumulation=2, max_steps=1, reward=counting, gold=VOWELS))[1]
    assert row["reward/score"] == 4.0, "two prompts, two completions each"
    assert row["reward/gold"] >= 10.0 and row["completion/length_mean"] <= 8


def test_columns_of_a_row_reach_the_reward_and_samples_of_other_prompts_go_unscored(run):
    rows = [{**row, "wanted": index} for index, row in enumerate(ROWS)]
    source = "def wanted(prompts, completions, *, wanted):\n    return [float(w) for w in wanted]"
    ask = Sample(prompts=[ROWS[3]["prompt"], "Never seen?"])
    reward = FunctionReward(name="wanted", source=source)
    place = run(rows=rows, reward=reward, max_steps=3, batch_size=6, controls=[ask])
    assert steps(place)[3]["reward/score"] == pytest.approx(2.5)
    (answer,) = [e for e in place.events() if e.kind == "samples"]
    assert [item.score for item in answer.items] == [3.0, None]


def test_a_constant_reward_is_said_once(run):
    place = run(reward=function("same", "1.0"))
    (notice,) = [notice for notice in fold(place).notices if notice.code == "reward_constant"]
    assert "teaches nothing" in notice.text
    assert all(row["pairs/tied"] == 1.0 for row in steps(place).values())


def test_prompts_without_room_for_a_completion_are_dropped_and_counted(run):
    place = run(rows=[*ROWS, {"prompt": "very long " * 30}], max_steps=1, max_length=60)
    (notice,) = [notice for notice in fold(place).notices if notice.code == "prompts_dropped"]
    assert notice.text.startswith("1 of 7 prompts")
    with pytest.raises(DataError, match="none of 1 prompts has between 1 and 52 tokens"):
        run("none", rows=[{"prompt": "very long " * 30}], max_length=60)


def test_a_limit_that_leaves_no_prompt_is_refused():
    spec = RunSpec(run_id="r", workspace_id="w", method="online-dpo", config={}, created=0.0)
    with pytest.raises(SpecError, match="max_new_tokens=64 leaves no room for a prompt in max_length=64"):
        OnlineDPO(max_new_tokens=64, max_length=64).check(spec)
