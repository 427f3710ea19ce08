"""Several rewards, Preference As Reward, another reward in flight, and rewards that misbehave, as they run."""

from __future__ import annotations

import json
import shutil
import statistics
from types import SimpleNamespace

import pytest
import torch

from rlhf_nb.compute.rundir import append_line
from rlhf_nb.data.rows import content_hash, encode_rows
from rlhf_nb.errors import RewardError, SpecError
from rlhf_nb.maths.rewards import combine
from rlhf_nb.methods.ppo import PPO
from rlhf_nb.protocol.control import Preview, SetCoefficient, SetReward
from rlhf_nb.protocol.events import RewardReplaced
from rlhf_nb.protocol.spec import (
    BlobData,
    CombinedReward,
    DataPart,
    FunctionReward,
    LoRA,
    MixedData,
    ModelReward,
    PathModel,
    RewardPart,
    RunSpec,
    describe,
)
from rlhf_nb.training import checkpoints, scoring
from rlhf_nb.training.pretraining import Pretraining
from rlhf_nb.training.prompt_order import PromptOrder
from rlhf_nb.training.scoring import Scoring

from .conftest import DRAWS, LETTERS, ROWS, VOWELS, fold, function, pretraining, rollouts

CONFIG = {
    "max_steps": 8, "rollout_batch_size": 4, "batch_size": 2, "num_ppo_epochs": 1, "max_new_tokens": 6,
    "max_length": 80, "sample_every": 0, "learning_rate": 1e-2, "kl_coef": 0.2,
}  # fmt: skip


COUNT_RARE = FunctionReward(
    name="rare", source="def rare(prompts, completions):\n    return [float(p == 'Rare?') for p in prompts]"
)
BOTH = CombinedReward(parts=(RewardPart(reward=LETTERS), RewardPart(reward=VOWELS, weight=-0.5)))


# --- several rewards --------------------------------------------------------------------------------------------------


def test_parts_are_logged_and_the_score_is_their_weighted_sum(ppo):
    place = ppo(reward=BOTH)
    for row in rollouts(place):
        assert row["reward/score"] == pytest.approx(row["reward_part/letters"] - 0.5 * row["reward_part/vowels"])
    assert fold(place).coefficients["reward_weight/vowels"].value == -0.5


def test_a_weight_that_is_moved_weighs_from_the_rollout_of_its_effective_step(ppo):
    later = [SetCoefficient(name="reward_weight/vowels", value=-1.5, who="mira")]
    place = ppo(reward=BOTH, controls=later)
    (change,) = fold(place).changes
    assert (change.name, change.old, change.new, change.effective_step) == ("reward_weight/vowels", -0.5, -1.5, 1)
    for row in rollouts(place):
        assert row["reward/score"] == pytest.approx(row["reward_part/letters"] - 1.5 * row["reward_part/vowels"])


@pytest.mark.parametrize("by", ["mean", "min", "mean_minus_std"])
def test_an_ensemble_is_the_formula_of_its_knob(ppo, by):
    """Scores of single completions, from the journal: the mean over them must be what was logged."""
    place = ppo(reward=BOTH, combine_rewards=by, reward_std_coef=0.5, max_steps=2)
    lines = [json.loads(line) for line in (place.path / "rewards-0.jsonl").read_text().splitlines()]
    letters, vowels = (list(line["scores"].values()) for line in lines[:2])
    scores = torch.tensor([letters, vowels], dtype=torch.float64).T
    expected = combine(scores, torch.tensor([1.0, -0.5], dtype=torch.float64), by, std_coef=0.5).mean().item()
    assert rollouts(place)[0]["reward/score"] == pytest.approx(expected, rel=1e-5)
    spread = statistics.mean(abs(a - b) / 2 for a, b in zip(letters, vowels, strict=True))
    assert rollouts(place)[0]["reward/disagreement"] == pytest.approx(spread, rel=1e-5)


def test_a_way_to_combine_without_anything_to_combine_is_refused(ppo):
    spec = RunSpec(run_id="x", workspace_id="x", method="ppo", config={}, reward=LETTERS, created=0.0)
    with pytest.raises(SpecError, match="combine_rewards=min needs several rewards"):
        PPO(combine_rewards="min").check(spec)


# --- Preference As Reward ---------------------------------------------------------------------------------------------


def test_preference_as_reward_optimises_a_chance_and_keeps_the_kl(ppo):
    place = ppo(preference_references=3, reward=VOWELS)
    for row in rollouts(place):
        kl = row["objective/kl_coef"] * row["kl/policy_reference"]
        assert 0 < row["reward/mean"] + kl < 1
    # The proxy itself stays on view, in its own unit.
    assert any(row["reward/score"] > 1 for row in rollouts(place))


def test_what_the_reference_said_is_compared_with_again_after_a_restart(ppo):
    whole = ppo("whole", preference_references=2, max_steps=8)
    half = ppo("half", preference_references=2, max_steps=8, checkpoint_every=4)
    again = ppo.job.run(half, attempt=2, resume_from=half.path / "checkpoints" / "checkpoint-4")
    assert [r.values for r in fold(again).rows if "loss" in r.values][-1]["loss"] == (
        [r.values for r in fold(whole).rows if "loss" in r.values][-1]["loss"]
    )
    kept = json.loads((checkpoints.latest(half.path) / "rank-0.json").read_text())
    assert all(len(texts) == 2 for texts in kept["reference_said"].values()) and kept["reference_said"]


# --- another reward in flight -----------------------------------------------------------------------------------------


def test_a_reward_is_replaced_at_a_rollout_and_its_scores_are_anchored(ppo):
    # Asked for while the first rollout is updated on: in force at the second.
    place = ppo(after_step_1=SetReward(part="letters", reward=VOWELS, who="mira", why="fresh labels"))
    (change,) = fold(place).rewards
    assert (change.part, change.old, change.new, change.effective_step) == ("letters", "letters", VOWELS, 3)
    lines = [json.loads(line)["scores"] for line in (place.path / "rewards-0.jsonl").read_text().splitlines()]
    # The shift carries the mean of the old scores over to the new ones, on the same completions.
    before = rollouts(place)[0]["reward/score"]
    after = statistics.mean(lines[1].values()) + change.shift
    assert rollouts(place)[1]["reward/score"] == pytest.approx(after, rel=1e-5)
    assert change.shift == pytest.approx(before - 10, abs=3) and change.shift != 0


def test_a_replaced_reward_stays_replaced_over_a_restart(ppo):
    def run(name, **knobs):
        return ppo(name, after_step_1=SetReward(part="letters", reward=VOWELS, id="the-change"), **knobs)

    whole = run("whole")
    for checkpoint in (2, 4):
        place = run(f"from-{checkpoint}", checkpoint_every=2)
        ppo.job.run(place, attempt=2, resume_from=place.path / "checkpoints" / f"checkpoint-{checkpoint}")
        assert [c.shift for c in fold(place).rewards] == [c.shift for c in fold(whole).rewards]
        assert [{k: v for k, v in row.items() if not k.startswith("time/")} for row in fold(place).table()] == [
            {k: v for k, v in row.items() if not k.startswith("time/")} for row in fold(whole).table()
        ]


def test_two_parts_that_are_replaced_together_are_both_anchored(ppo):
    """What is put in differs from what was there by a constant: anchored, the score goes on where it was."""
    letters = function("more_letters", "100 + sum(c.isascii() and c.isalpha() for c in text) / 4")
    vowels = function("more_vowels", "110 + sum(c in 'aeiou' for c in text)")
    asked = [SetReward(part="letters", reward=letters), SetReward(part="vowels", reward=vowels)]
    plain, both = ppo("plain", reward=BOTH), ppo("both", reward=BOTH, after_step_1=asked)
    assert [change.effective_step for change in fold(both).rewards] == [3, 3]
    assert [change.shift for change in fold(both).rewards] == pytest.approx([-100, -100], abs=1e-4)
    for one, other in zip(rollouts(both), rollouts(plain), strict=True):
        assert one["reward/score"] == pytest.approx(other["reward/score"], abs=1e-3)


def test_a_reward_that_is_put_in_right_after_a_restart_is_anchored_as_without_one(ppo):
    asked = SetReward(part="letters", reward=VOWELS, id="the-change")
    (whole,) = fold(ppo("whole", after_step_1=asked)).rewards
    place = ppo("half", checkpoint_every=2)
    append_line(place.control_path, asked.model_dump(mode="json"))
    ppo.job.run(place, attempt=2, resume_from=checkpoints.directory(place.path, 2))
    (change,) = fold(place).rewards
    assert (change.effective_step, change.shift) == (whole.effective_step, whole.shift) == (3, whole.shift)
    assert not [n for n in fold(place).notices if n.code == "reward_not_anchored"]


def test_a_reward_that_is_put_in_before_anything_was_scored_says_that_it_has_no_anchor(ppo):
    place = ppo(max_steps=2, controls=[SetReward(part="letters", reward=VOWELS)])
    (notice,) = [n for n in fold(place).notices if n.code == "reward_not_anchored"]
    assert notice.text.startswith("vowels is put in before anything was scored") and fold(place).rewards[0].shift == 0


def test_a_reward_that_comes_back_keeps_its_anchor_over_a_restart(ppo):
    """letters → vowels → letters: the shift that letters has by then is no part of the spec."""
    place = ppo(prepare=True)
    context = SimpleNamespace(spec=place.spec(), run_dir=place.path, rank=0, attempt=1)
    scoring = Scoring(PPO(), context, SimpleNamespace(), "cpu")
    for reward, shift in ((VOWELS, 3.0), (LETTERS, -2.0)):
        scoring.again(RewardReplaced(id="", part="letters", old="", new=reward, shift=shift, effective_step=1))
    # It is put back without being asked: it may cost money, or be out of reach.
    scoring.last = ([{"prompt": "p"}], ["x"], [[1.0]])
    broken = function("broken", "1 / 0")
    scoring.again(RewardReplaced(id="", part="letters", old="", new=broken, shift=0.0, effective_step=1))
    assert scoring.last[2] == [[None]]
    scoring.again(RewardReplaced(id="", part="letters", old="", new=LETTERS, shift=-2.0, effective_step=1))
    fresh = Scoring(PPO(), context, SimpleNamespace(), "cpu")
    fresh.load_state(scoring.state())
    assert [(part.reference, part.shift) for part in fresh.parts] == [(LETTERS, -2.0)]


def test_what_a_preference_is_normalised_by_is_its_own_mean_and_spread(ppo):
    """Raw scores are 10 and more, preferences lie between 0 and 1: by the raw ones every score would be cut at −1."""
    place = ppo(reward=VOWELS, preference_references=2, score_normalisation="running", score_clip=1.0, kl_coef=0.0)
    assert all(row["reward/mean"] > -0.9 for row in rollouts(place))


def test_without_a_reference_no_distance_is_paid_for_in_the_loss_either(ppo, trace):
    """From the second update of a rollout on the policy is not the one that sampled; nothing holds it to that one."""
    free, held = (
        ppo(name, reference="none", kl_in="loss", kl_coef=kl_coef) for name, kl_coef in (("free", 0.0), ("held", 5.0))
    )
    assert trace(held, "loss") == trace(free, "loss") and not trace(held, "loss/kl")


def test_a_reward_that_cannot_be_put_in_is_refused_and_the_old_one_goes_on(ppo):
    broken = FunctionReward(name="broken", source="raise ValueError('no')")
    asked = [SetReward(part="letters", reward=broken), SetReward(part="missing", reward=VOWELS)]
    place = ppo(controls=asked)
    reasons = [event.reason for event in place.events() if event.kind == "control_refused"]
    assert any('no part of the reward is called "missing"; it has: letters' in reason for reason in reasons)
    assert any("reward broken: its source does not run: ValueError: no" in reason for reason in reasons)
    assert not fold(place).rewards and len(rollouts(place)) == 4


def test_a_reward_model_that_cannot_be_read_is_refused_and_the_old_one_goes_on(ppo, tmp_path, monkeypatch):
    torn, large = (tmp_path / name for name in ("torn", "large"))
    for folder in (torn, large):
        shutil.copytree(ppo.job.model, folder)
        config = json.loads((folder / "config.json").read_text())
        config |= {"architectures": ["Qwen3ForSequenceClassification"], "id2label": {"0": "score"}}
        (folder / "config.json").write_text(json.dumps(config))
    (torn / "model.safetensors").write_bytes(b"torn")
    genuine = scoring.load

    def load(context, reference, **named):
        if "large" in describe(reference):
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 GiB")
        return genuine(context, reference, **named)

    monkeypatch.setattr(scoring, "load", load)
    for folder, says in ((torn, "SafetensorError: "), (large, "OutOfMemoryError: CUDA out of memory.")):
        reward = ModelReward(model=PathModel(path=str(folder)))
        place = ppo(folder.name, controls=[SetReward(part="letters", reward=reward)])
        (refused,) = [event.reason for event in place.events() if event.kind == "control_refused"]
        assert f"{describe(reward)} cannot be put in: {says}" in refused and "\n" not in refused
        assert not fold(place).rewards and len(rollouts(place)) == 4


# --- rewards that misbehave -------------------------------------------------------------------------------------------


def test_a_reward_that_hangs_is_ended_at_its_limit(ppo):
    slow = FunctionReward(
        name="slow", source="def slow(prompts, completions):\n    while True:\n        try:\n            "
        "sum(range(1000))\n        except ZeroDivisionError:\n            pass",
    )  # fmt: skip
    with pytest.raises(RewardError, match=r"reward slow: no answer within reward_timeout=0\.5 s"):
        ppo(reward=slow, reward_timeout=0.5)
    with pytest.raises(RewardError, match=r"gold slow: no answer within reward_timeout=0\.5 s"):
        ppo("gold", gold=slow, reward_timeout=0.5)


def test_one_score_for_everything_is_said_once(ppo):
    place = ppo(reward=function("flat", "1.0"))
    (notice,) = [n for n in fold(place).notices if n.code == "reward_constant"]
    assert "got the score 1" in notice.text


def test_what_a_reward_said_is_not_asked_again_after_a_restart(ppo, tmp_path):
    """A reward that draws lots: the rollouts after a checkpoint are scored again as they were, and so are their gold
    and what they are compared with."""
    calls = tmp_path / "calls"
    lots = FunctionReward(
        name="lots",
        source="def lots(prompts, completions):\n    import os\n"
        f"    with open({str(calls)!r}, 'a') as f: f.write('x')\n"
        "    return [int.from_bytes(os.urandom(2), 'big') / 65536 for text in completions]",
    )
    place = ppo("lots", reward=lots, gold=lots, preference_references=2, checkpoint_every=2)
    first = [(row["reward/score"], row["reward/gold"]) for row in rollouts(place)]
    asked = len(calls.read_text())
    ppo.job.run(place, attempt=2, resume_from=place.path / "checkpoints" / "checkpoint-4")
    assert [(row["reward/score"], row["reward/gold"]) for row in rollouts(place)] == first
    assert len(calls.read_text()) == asked == 12


def test_chance_is_as_a_reward_had_left_it_where_its_answers_are_read_again(ppo):
    """The third rollout's are; at the fourth it is asked, and draws what it would have drawn."""
    knobs = {"reward": DRAWS, "checkpoint_every": 2}
    whole, place = ppo("whole", **knobs), ppo("place", **knobs)
    journal = place.path / "rewards-0.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:3]))
    ppo.job.run(place, attempt=2, resume_from=checkpoints.directory(place.path, 4))
    scores = [[row["reward/score"] for row in rollouts(one)] for one in (whole, place)]
    assert scores[0] == scores[1] and len(set(scores[0])) == 4


def test_looking_draws_no_number_that_a_reward_draws(ppo):
    knobs = {"reward": DRAWS, "gold": DRAWS}
    plain, watched = (
        ppo("plain", reward=DRAWS),
        ppo("watched", sample_every=1, controls=[Preview(values=[0.5])], **knobs),
    )
    scores = [[row["reward/score"] for row in rollouts(place)] for place in (plain, watched)]
    assert scores[0] == scores[1]


def test_what_the_reference_said_is_scored_by_the_reward_of_now(ppo):
    place = ppo(sample_every=1, after_step_1=SetReward(part="letters", reward=VOWELS))
    (change,) = fold(place).rewards
    shown = [event for event in place.events() if event.kind == "samples"]
    for event in shown:
        for item in event.items:
            said = item.reference_completion
            now = sum(c.isascii() and c.isalpha() for c in said) / 4
            if event.step >= change.effective_step:
                now = 10 + sum(c in "aeiou" for c in said) + change.shift
            assert item.reference_score == pytest.approx(now)
    assert len({event.step >= change.effective_step for event in shown}) == 2


# --- pretraining rows and mixtures ------------------------------------------------------------------------------------


def test_pretraining_rows_are_kept_likely(ppo):
    kept = pretraining(ppo.job)
    losses = {}
    for coef in (1e-6, 3.0):
        place = ppo(f"ptx-{coef}", pretraining=kept, ptx_coef=coef, learning_rate=3e-3, max_steps=12)
        losses[coef] = [row["loss/pretraining"] for row in fold(place).table() if "loss/pretraining" in row]
        for row in fold(place).table():
            parts = row["loss/policy"] + 0.1 * row["loss/value"] + coef * row["loss/pretraining"]
            assert row["loss"] == pytest.approx(parts, rel=1e-5, abs=1e-6)
    assert losses[1e-6][0] == losses[3.0][0]
    assert losses[3.0][-1] < losses[1e-6][-1] - 0.5


def test_activations_of_pretraining_rows_are_computed_again_too(ppo, monkeypatch):
    modes = []
    genuine = Pretraining.backward
    monkeypatch.setattr(
        Pretraining, "backward", lambda self: (modes.append(self.trainer.model.training), genuine(self))[1]
    )
    kept = pretraining(ppo.job)
    for again in (True, False):
        ppo(f"again-{again}", pretraining=kept, ptx_coef=1.0, gradient_checkpointing=again, max_steps=2)
    assert modes == [True, True, False, False]


def test_ptx_coef_is_live_and_weighs_the_gradient_at_its_step(ppo):
    """At its step the policy is what it was without it; the gradient is not."""
    kept = pretraining(ppo.job)
    still = ppo("still", pretraining=kept, ptx_coef=0.5)
    moved = ppo("moved", pretraining=kept, ptx_coef=0.5, after_step_1=SetCoefficient(name="ptx_coef", value=5.0))
    step = fold(moved).changes[0].effective_step
    before, after = ({row["step"]: row for row in fold(place).table()} for place in (still, moved))
    assert before[step]["loss/pretraining"] == after[step]["loss/pretraining"]
    assert before[step]["optimizer/grad_norm"] != after[step]["optimizer/grad_norm"]
    assert before[step - 1]["optimizer/grad_norm"] == after[step - 1]["optimizer/grad_norm"]


def test_a_mixture_holds_its_shares_at_every_moment_and_goes_through_each_source():
    order = PromptOrder(0, [3, 50], [1.0, 3.0])
    rows = order(0, 200)
    for n in range(1, 201):
        assert abs(sum(row < 3 for row in rows[:n]) - n / 4) <= 1
    # A pass takes each row once; a restart in the middle takes the same.
    large = [row for row in rows if row >= 3]
    assert sorted(large[:50]) == list(range(3, 53)) and sorted(large[50:100]) == list(range(3, 53))
    assert PromptOrder(0, [3, 50], [1.0, 3.0])(120, 80) == rows[120:]


def test_prompts_of_a_mixture_are_drawn_by_their_shares_not_their_sizes(ppo):
    rows = [{"prompt": "Rare?"}]
    (ppo.job.root / f"{content_hash(rows)}.jsonl").write_bytes(encode_rows(rows))
    rare = BlobData(content_hash=content_hash(rows), row_kind="prompts", n=1, name="rare")
    place = ppo.job.prepare("ppo", ROWS, config=CONFIG, reward=COUNT_RARE)
    spec = place.spec()
    mixed = MixedData(parts=(DataPart(data=spec.data, weight=1.0), DataPart(data=rare, weight=1.0)))
    place.spec_path.write_text(spec.model_copy(update={"data": mixed}).model_dump_json())
    ppo.job.run(place)
    assert [row["reward/score"] for row in rollouts(place)] == [0.5] * 4


# --- the reward model on the policy's own weights ---------------------------------------------------------------------


def test_a_reward_model_that_is_an_adapter_of_the_same_base_stands_on_its_weights(ppo, job):
    from rlhf_nb.rewards.model import RewardModelScorer
    from rlhf_nb.training import actor_critic, models

    pairs = [{"prompt": row["prompt"], "chosen": "It is far.", "rejected": "zzz"} for row in ROWS]
    config = {"max_steps": 4, "batch_size": 2, "max_length": 80, "learning_rate": 1e-2}
    place = job("reward", pairs, name="rm", config=config, adapter=LoRA(r=2))
    trunk, _ = actor_critic.trunk_and_head(models.load_model(str(job.model)))
    shared = RewardModelScorer.load_on(str(place.model), str(job.model), trunk)
    said = (["Who?", "Why?"], ["It is far.", "zzz and more"])
    alone = RewardModelScorer.load(str(place.model))
    assert shared.score(*said) == pytest.approx(alone.score(*said), abs=1e-4)
    own = {p.data_ptr() for p in trunk.parameters()}
    extra = sum(p.numel() for p in shared.model.parameters() if p.data_ptr() not in own)
    assert extra < 0.25 * sum(p.numel() for p in alone.model.parameters())
    assert RewardModelScorer.load_on(str(place.model), "/another/base", trunk) is None

    reward = ModelReward(model=PathModel(path=str(place.model)))
    scores = {}
    for name, adapter in (("lora", LoRA(r=2)), ("full", None)):
        run = job.prepare("ppo", ROWS, name=name, config={**CONFIG, "max_steps": 2}, reward=reward, adapter=adapter)
        job.run(run)
        scores[name] = rollouts(run)[0]["reward/score"]
        assert any(n.code == "shared_backbone" for n in fold(run).notices) == (name == "lora")
    assert scores["lora"] == pytest.approx(scores["full"], abs=1e-4)


def test_a_preview_whose_reward_fails_is_refused_and_the_run_goes_on(ppo):
    picky = FunctionReward(
        name="picky",
        source="def picky(prompts, completions):\n    if len(completions) == 6:\n        "
        "raise ValueError('not these')\n"
        "    return [float(len(text)) for text in completions]",
    )
    place = ppo(reward=picky, controls=[Preview(values=[0.1], prompts=2, samples=3)])
    (refused,) = [event for event in place.events() if event.kind == "control_refused"]
    assert "reward picky: ValueError: not these" in refused.reason
    assert len(rollouts(place)) == 4 and not fold(place).previews
