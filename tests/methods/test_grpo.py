"""GRPO, its presets and RLOO: TRL's steps on TRL's completions, groups sampled again, restarts, live coefficients."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlhf_nb import registry
from rlhf_nb.errors import SpecError
from rlhf_nb.methods.base import Method
from rlhf_nb.protocol.control import Preview, SaveCheckpoint, SetCoefficient
from rlhf_nb.protocol.spec import LoRA, RunSpec
from rlhf_nb.training import online
from rlhf_nb.training.rollout.base import Completions
from rlhf_nb.training.rollout.transformers_backend import pad_left
from tests.methods.conftest import LETTERS, ROWS, asking, fold, function, rollouts

CONFIG = {
    "max_steps": 4, "rollout_batch_size": 8, "batch_size": 8, "group_size": 4, "num_iterations": 2, "max_new_tokens": 6,
    "max_length": 80, "sample_every": 0, "learning_rate": 1e-3,
}  # fmt: skip
CHAT = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]
LOUD = function("loud", "1000 * sum(c.isascii() and c.isalpha() for c in text)")
"""TRL adds 1e-4 to a group's standard deviation: beside this reward it vanishes in float32."""
EVENS = function("evens", "float(sum(c.isascii() and c.isalpha() for c in text) % 5 == 0)")


@pytest.fixture
def run(job, tiny_model_maker, monkeypatch):
    """Runs a method of groups; knobs and parts of the spec by name."""
    job.model = tiny_model_maker("still", dropout=0.0)

    def start(method="grpo", *, name="run", rows=ROWS, reward=LETTERS, prepare=False, after_step_1=None, **knobs):
        spec = {key: knobs.pop(key) for key in {"adapter", "gold", "launch"} & knobs.keys()}
        place = job.prepare(method, rows, name=name, config={**CONFIG, **knobs}, reward=reward, **spec)
        with monkeypatch.context() as patch:
            if after_step_1 is not None:
                from rlhf_nb.compute.rundir import EventWriter

                patch.setattr(EventWriter, "write", asking(place, after_step_1))
            return place if prepare else job.run(place)

    start.job = job
    return start


# --- TRL's steps ------------------------------------------------------------------------------------------------------

SAME = {
    # ours → (knobs of ours, TRL's trainer, its arguments beyond the common ones, reward)
    "grpo": ({}, "GRPO", {"beta": 0.04, "loss_type": "grpo"}, LOUD),
    "grpo, batch": (
        {"scale_rewards": "batch", "loss_type": "dapo", "beta": 0.2},
        "GRPO",
        {"beta": 0.2, "loss_type": "dapo", "scale_rewards": "batch"},
        LOUD,
    ),
    "dr-grpo": ({"beta": 0.1}, "GRPO", {"beta": 0.1, "loss_type": "dr_grpo", "scale_rewards": "none"}, LETTERS),
    "gspo": (
        {},
        "GRPO",
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
        LOUD,
    ),
    "dapo": ({"overlong_cache": 0, "dynamic_sampling": 0}, "GRPO", {"loss_type": "dapo", "epsilon_high": 0.28}, LOUD),
    "rloo": ({}, "RLOO", {"beta": 0.05}, LETTERS),
}


def trl_run(kind: str, model: Path, reward, folder: Path, **arguments):
    """Every rollout's completions, as tokens, and the trained policy's weights."""
    import trl
    from datasets import Dataset

    scope: dict = {}
    exec(reward.source, scope)
    said: list[list[list[int]]] = []

    def score(prompts, completions, completion_ids, **columns):
        said.append(completion_ids)
        return scope[reward.name](prompts, [completion[0]["content"] for completion in completions])

    trainer = getattr(trl, f"{kind}Trainer")(
        model=str(model),
        reward_funcs=score,
        args=getattr(trl, f"{kind}Config")(
            output_dir=str(folder), max_steps=4, per_device_train_batch_size=8, num_generations=4, num_iterations=2,
            max_completion_length=6, learning_rate=1e-2, lr_scheduler_type="constant", adam_epsilon=1e-5,
            weight_decay=0.0, max_grad_norm=1.0, shuffle_dataset=False, gradient_checkpointing=False, bf16=False,
            use_cpu=True, report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True, **arguments,
        ),
        train_dataset=Dataset.from_list(CHAT),
    )  # fmt: skip
    trainer.train()
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    return said, norms, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


class Replayed:
    """A sampler that says what another one said."""

    def __init__(self, trainer: online.OnlineTrainer, said: list[list[list[int]]]) -> None:
        self.trainer, self.said, self.end_tokens = trainer, list(said), []

    def refresh(self, version: int) -> None: ...

    def close(self) -> None: ...

    def sample(self, prompts, uniforms_BT, *, temperature):
        rows, T = self.said.pop(0), uniforms_BT.shape[1]
        width = max(map(len, rows))
        tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
        tokens_BP, seen_BP = pad_left(prompts, 0, torch.device("cpu"))
        with torch.no_grad():
            logprobs, _, _ = self.trainer.module(
                torch.cat([tokens_BP, tokens], 1), torch.cat([seen_BP, mask], 1), mask, temperature=temperature
            )
        return Completions(tokens, mask, logprobs, mask.sum(1) < T)


@pytest.mark.parametrize("case", SAME)
def test_on_its_completions_it_takes_the_steps_that_trl_takes(run, tmp_path, monkeypatch, trace, case):
    """Two rollouts, two passes over each, so that the ratio is not one and the clip is at work."""
    knobs, kind, arguments, reward = SAME[case]
    said, norms, theirs = trl_run(kind, run.job.model, reward, tmp_path / "trl", **arguments)
    build = online.OnlineTrainer.__init__

    def replaying(self, *args, **kwargs):
        build(self, *args, **kwargs)
        self.sampler = Replayed(self, said)
        self.prompt_order = lambda first, n: [(first + i) % len(ROWS) for i in range(n)]

    monkeypatch.setattr(online.OnlineTrainer, "__init__", replaying)
    place = run(case.split(",")[0], rows=CHAT, reward=reward, learning_rate=1e-2, **knobs)
    assert len(said) == 2
    torch.testing.assert_close(list(trace(place, "optimizer/grad_norm").values()), norms, rtol=2e-3, atol=1e-6)
    from transformers import AutoModelForCausalLM

    def weights(path):
        return dict(AutoModelForCausalLM.from_pretrained(path).named_parameters())

    ours, start = weights(place.model), weights(run.job.model)
    moved = math.sqrt(sum((theirs[name] - start[name]).square().sum().item() for name in start))
    apart = math.sqrt(sum((theirs[name] - ours[name]).square().sum().item() for name in start))
    # Adam divides by the gradient's own size, so that rounding in a gradient near 0 is a share of a whole step.
    assert moved > 0.1
    assert apart < 2e-3 * moved


# --- groups that teach nothing ----------------------------------------------------------------------------------------


def test_flat_groups_give_way_to_those_of_the_next_prompts_within_the_budget(run):
    place = run("dapo", reward=EVENS, dynamic_sampling=6, max_steps=3, num_iterations=1, overlong_cache=0)
    seen = rollouts(place)
    assert sum(row["group/replaced"] for row in seen) > 0
    assert all(row["group/flat_left"] == 0 for row in seen)
    # The mean is over all that was sampled: what was kept alone would have no group that is all right or all wrong.
    assert any(row["group/flat_fraction"] > 0 for row in seen)


def test_a_reward_that_never_differs_spends_the_budget_and_says_so(run):
    place = run("dapo", reward=function("same", "1.0"), dynamic_sampling=2, max_steps=1, num_iterations=1)
    (row,) = rollouts(place)
    assert (row["group/replaced"], row["group/flat_left"], row["group/flat_fraction"]) == (4, 2, 1.0)
    assert [e.code for e in place.events() if e.kind == "notice"].count("reward_constant") == 1


def test_without_a_budget_flat_groups_stay_and_move_nothing(run, trace):
    place = run("dr-grpo", reward=function("same", "1.0"), max_steps=1, num_iterations=1)
    assert trace(place, "optimizer/grad_norm") == {1: 0.0}


@pytest.mark.parametrize(
    ("method", "knobs"), [("grpo", {"scale_rewards": "batch"}), ("rloo", {"normalise_advantages": True, "beta": 0.05})]
)
def test_one_score_for_all_is_no_advantage_however_it_is_scaled(run, trace, method, knobs):
    """The mean of 64 times 0.1 is not 0.1: divided by a spread of rounding it would be an advantage of one."""
    tenth = function("tenth", "0.1")
    place = run(method, reward=tenth, max_steps=1, rollout_batch_size=64, batch_size=64, group_size=8, **knobs)
    assert trace(place, "optimizer/grad_norm")[1] < 1e-4


def test_each_step_says_what_watching_it_costs(run, trace):
    place = run("grpo", max_steps=4)
    hooks, steps = trace(place, "time/hooks_s"), trace(place, "time/step_s")
    assert hooks.keys() == steps.keys() == {1, 2, 3, 4}
    assert all(0 < hooks[step] < steps[step] for step in steps)


# --- restarts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["grpo", "dapo", "rloo"])
def test_resumed_between_rollouts_it_goes_on_as_if_it_had_never_stopped(run, method):
    """DAPO's prompts are drawn as groups need them: how many were is part of the checkpoint."""
    knobs = {"reward": EVENS, "max_steps": 6, "checkpoint_every": 2}
    whole = run(method, name="whole", **knobs)
    place = run(method, name="again", prepare=True, **knobs)
    run.job.run(place)
    checkpoint = place.checkpoints / "checkpoint-2"
    run.job.run(place, attempt=2, resume_from=checkpoint)
    assert settled(fold(place)) == settled(fold(whole))
    for one in sorted(path.name for path in whole.model.glob("*.safetensors")):
        assert (place.model / one).read_bytes() == (whole.model / one).read_bytes()


def test_a_checkpoint_asked_for_amid_a_rollout_is_taken_at_its_end_and_that_is_said_at_once(run):
    place = run("grpo", num_iterations=3, max_steps=6, after_step_1=SaveCheckpoint())
    events = [e for e in place.events() if e.kind in ("notice", "checkpoint_saved", "metric")]
    (said,) = [e for e in events if getattr(e, "code", "") == "checkpoint_waits"]
    assert "after step 3" in said.text
    assert [e.step for e in events if e.kind == "checkpoint_saved"] == [3]
    assert not [e for e in events[: events.index(said)] if e.kind == "metric" and e.step == 2 and "loss" in e.values]


def settled(folded):
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in folded.table()]


# --- live -------------------------------------------------------------------------------------------------------------


def test_beta_from_nothing_is_in_the_loss_of_the_very_next_step(run, trace):
    """TRL would have loaded no reference. Here the KL is measured at beta=0, and paid for once beta is raised."""
    free = run("grpo", name="free", beta=0.0, max_steps=3, num_iterations=3)
    asked = SetCoefficient(name="beta", value=2.0)
    held = run("grpo", name="held", beta=0.0, max_steps=3, num_iterations=3, after_step_1=asked)
    assert [e.text.split(":")[0] for e in free.events() if getattr(e, "code", "") == "no_tether"] == ["beta=0"]
    (change,) = fold(held).changes
    assert change.effective_step == 2
    loss, without, kl = trace(held, "loss"), trace(free, "loss"), trace(held, "loss/kl")
    assert loss[1] == without[1]
    assert 1 not in kl
    # grpo's mean over completions of the same length is the mean over tokens.
    lengths = {
        e.values["completion/length_mean"]
        for e in held.events()
        if "completion/length_mean" in getattr(e, "values", {})
    }
    assert lengths == {6.0}
    assert loss[2] - without[2] == pytest.approx(2.0 * kl[2], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "value", "first"), [("epsilon_low", 1e-4, 2), ("epsilon_high", 1e-4, 2), ("temperature", 0.5, 3)]
)
def test_a_coefficient_enters_where_it_is_used_first(run, trace, name, value, first):
    """Clip ranges enter the next step of the same rollout; what the rollout is made with enters the next one's."""
    still = run("grpo", name="still-run")
    moved = run("grpo", name="moved", after_step_1=SetCoefficient(name=name, value=value))
    (change,) = fold(moved).changes
    assert change.effective_step == first
    before, after = trace(still, "optimizer/grad_norm"), trace(moved, "optimizer/grad_norm")
    assert next(step for step in before if before[step] != after[step]) == first
    if name == "temperature":
        assert trace(moved, "policy/entropy")[3] < trace(still, "policy/entropy")[3]
    else:
        # So near one, every step down (or up) that wants to go further is clipped: 0.2 clips none of them.
        assert trace(still, "policy/clip_fraction")[2] == 0.0
        assert 0.1 < trace(moved, "policy/clip_fraction")[2] < 0.9


def test_a_length_penalty_costs_what_it_says_from_the_next_rollout(run, trace):
    still = run("grpo", name="still-run")
    moved = run("grpo", name="moved", after_step_1=SetCoefficient(name="length_penalty", value=0.1))
    (change,) = fold(moved).changes
    assert change.effective_step == 3
    assert trace(moved, "completion/length_mean")[3] == 6.0
    assert trace(moved, "reward/mean")[3] - trace(still, "reward/mean")[3] == pytest.approx(-0.6, abs=1e-5)
    # Completions of one length: their group's mean takes it all away again.
    assert trace(moved, "optimizer/grad_norm") == pytest.approx(trace(still, "optimizer/grad_norm"), rel=1e-4)


def test_rloo_can_tell_where_another_beta_would_lead_and_grpo_says_why_it_cannot(run):
    asked = Preview(name="beta", values=[0.05, 0.5], prompts=3, samples=4)
    told = [e for e in run("rloo", after_step_1=asked).events() if e.kind == "previewed"]
    assert [(e.name, [p.value for p in e.predictions]) for e in told] == [("beta", [0.05, 0.5])]
    assert told[0].predictions[0].kl > told[0].predictions[1].kl
    refused = [e for e in run("grpo", name="no", after_step_1=asked).events() if e.kind == "control_refused"]
    assert ["in the loss" in e.reason for e in refused] == [True]


def test_without_a_reference_beta_is_refused_with_the_reason(run):
    place = run("rloo", reference="none", beta=0.0, max_steps=1, num_iterations=1)
    (started,) = [e for e in place.events() if e.kind == "started"]
    (beta,) = [c for c in started.coefficients if c.name == "beta"]
    assert "reference=none" in (beta.unavailable_reason or "")
    assert started.has_reference is False
    (said,) = [e.text for e in place.events() if getattr(e, "code", "") == "no_tether"]
    assert "no distance is measured" in said


# --- knobs ------------------------------------------------------------------------------------------------------------


def credit(method: Method, scores: list[float], lengths: list[int], **live):
    """What a rollout of completions with these scores earns, before any KL."""
    T = max(lengths)
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    zeros = torch.zeros(len(scores), T)
    rollout = SimpleNamespace(
        mask_BT=mask, score_B=torch.tensor(scores), behavior_logprobs_BT=zeros, reference_logprobs_BT=zeros,
        ended_B=torch.tensor([n < T for n in lengths]),
    )  # fmt: skip
    values = {one.name: getattr(method, one.name) for one in method.live} | live
    return method.credit(rollout, SimpleNamespace(**values))


def test_an_overlong_completion_is_punished_as_the_paper_s_equation_says():
    # limit 10, cache 4: 6 tokens cost nothing, 8 half, 10 all of it.
    method = registry.methods.get("dapo").create(max_new_tokens=10, overlong_cache=4, group_size=4)
    assert credit(method, [1.0, 1.0, 1.0, 1.0], [3, 6, 8, 10]).total_B.tolist() == [1.0, 1.0, 0.5, 0.0]


def test_left_open_the_cache_is_a_fifth_of_the_limit():
    method = registry.methods.get("dapo").create(max_new_tokens=10, group_size=4)
    assert credit(method, [1.0, 1.0, 1.0, 1.0], [3, 8, 9, 10]).total_B.tolist() == [1.0, 1.0, 0.5, 0.0]


def test_rloo_compares_with_the_others_alone():
    # 3 against (0 + 0 + 1) / 3; every token carries its completion's advantage.
    method = registry.methods.get("rloo").create()
    earned = credit(method, [3.0, 0.0, 0.0, 1.0], [1, 2, 2, 2]).advantages_BT
    torch.testing.assert_close(earned[:, 0], torch.tensor([8 / 3, -4 / 3, -4 / 3, 0.0]))
    assert earned[0, 1] == 0


@pytest.mark.parametrize(
    ("method", "knobs", "words"),
    [
        ("grpo", {"group_size": 1}, "group_size=1: a group of one has nothing to be compared with"),
        ("rloo", {"group_size": 1}, "group_size=1: there are no others"),
        ("grpo", {"group_size": 3, "rollout_batch_size": 8}, "whole groups of group_size=3"),
        ("gspo", {"loss_type": "dapo"}, "use loss_type=grpo"),
        ("dapo", {"overlong_cache": 99}, "overlong_cache=99 is more than max_new_tokens=6"),
        ("dapo", {"batch_size": 3}, "no multiple of batch_size=3"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(method, knobs, words):
    made = registry.methods.get(method).create(**{**CONFIG, **knobs})
    spec = RunSpec.model_construct(
        launch=SimpleNamespace(num_processes=1), adapter=None, reward=LETTERS, pretraining=None
    )
    with pytest.raises(SpecError, match=words):
        made.check(spec)


def test_an_adapter_s_reference_is_the_policy_without_it(run, trace):
    place = run("grpo", adapter=LoRA(r=4), learning_rate=0.01)
    kl = trace(place, "kl/policy_reference")
    assert kl[1] == pytest.approx(0.0, abs=1e-6)
    assert kl[3] != 0.0
    assert (place.model / "adapter" / "adapter_model.safetensors").exists()


def test_the_presets_are_what_their_papers_say():
    def knobs(name):
        made = registry.methods.get(name).create()
        return {
            k: getattr(made, k)
            for k in ("beta", "epsilon_low", "epsilon_high", "loss_type", "scale_rewards", "importance")
        }

    assert knobs("dr-grpo") == {
        "beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.2, "loss_type": "dr_grpo", "scale_rewards": "none",
        "importance": "token",
    }  # fmt: skip
    assert knobs("gspo") == {
        "beta": 0.0, "epsilon_low": 3e-4, "epsilon_high": 4e-4, "loss_type": "grpo", "scale_rewards": "group",
        "importance": "sequence",
    }  # fmt: skip
    assert knobs("dapo") == {
        "beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.28, "loss_type": "dapo", "scale_rewards": "group",
        "importance": "token",
    }  # fmt: skip
