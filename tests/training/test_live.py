"""A coefficient moved while a run trains: in force at the step the event names, and nowhere else."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import get_scheduler

from rlhf_nb.protocol.control import Sample, SaveCheckpoint, SetCoefficient, Stop
from rlhf_nb.protocol.spec import FunctionReward
from rlhf_nb.toy import demonstrations, pairs
from rlhf_nb.training.callback import learning_rate

CONFIG = {"max_steps": 6, "batch_size": 2, "sample_tokens": 4, "max_length": 200}


def sends(path, *controls, call: int = 1) -> FunctionReward:
    """A gold reward that appends lines to control.jsonl when it is asked for the `call`th time: after a known step."""
    lines = "".join(control.model_dump_json() + "\n" for control in controls)
    source = (
        "def sends(prompts, completions, **columns):\n"
        f"    from pathlib import Path\n    path = Path({str(path)!r})\n    count = path.with_suffix('.count')\n"
        "    n = int(count.read_text()) + 1 if count.exists() else 1\n    count.write_text(str(n))\n"
        f"    if n == {call}:\n        with open(path, 'a') as handle:\n            handle.write({lines!r})\n"
        "    return [0.0] * len(completions)\n"
    )
    return FunctionReward(name="sends", source=source)


def run_with(job, method, rows, after_step, *controls, name="run", **config):
    """A run that finds the controls at the boundary after optimizer step `after_step`."""
    place = job.root / name
    # The gold reward is asked twice a sample, for the policy's completions and for the reference's.
    gold = sends(place / "control.jsonl", *controls, call=1)
    config = {**CONFIG, "sample_every": after_step, **config}
    return job(method, rows, name=name, config=config, gold=gold)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"])
def test_the_very_next_step_moves_by_the_new_rate_times_the_schedule(schedule):
    parameter = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=2, num_training_steps=10)
    trainer = type("Holder", (), {"lr_scheduler": scheduler})()
    bound = learning_rate(trainer)

    def step() -> float:
        before = parameter.item()
        parameter.grad = torch.tensor([1.0], dtype=torch.float64)
        optimizer.step()
        scheduler.step()
        return before - parameter.item()

    factor = [scheduler.lr_lambdas[0](i) for i in range(10)]
    for i in range(4):
        assert step() == pytest.approx(0.5 * factor[i], rel=1e-12, abs=1e-15)
    assert bound.read() == 0.5
    bound.write(0.125)
    assert bound.read() == 0.125
    for i in range(4, 9):
        assert step() == pytest.approx(0.125 * factor[i], rel=1e-12, abs=1e-15)


def test_the_learning_rate_changes_at_the_effective_step_and_the_loss_at_the_next(job, trace):
    rows = demonstrations(12)
    still = job("sft", rows, name="still", config={**CONFIG, "sample_every": 2, "learning_rate": 1e-3})
    control = SetCoefficient(name="learning_rate", value=1e-2, who="me", why="too slow")
    moved = run_with(job, "sft", rows, 2, control, learning_rate=1e-3)
    (change,) = [e for e in moved.events() if e.kind == "coefficient_changed"]
    assert (change.old, change.new, change.effective_step) == (1e-3, 1e-2, 3)
    assert (change.id, change.who, change.why) == (control.id, "me", "too slow")
    before, after = trace(still, "optimizer/learning_rate"), trace(moved, "optimizer/learning_rate")
    for step in range(1, 7):
        assert after[step] == pytest.approx(before[step] * (1 if step < 3 else 10), rel=1e-12)
    # Step 3's loss is taken before its update; the first loss that can differ is step 4's.
    losses, moved_losses = trace(still, "loss"), trace(moved, "loss")
    assert [losses[s] for s in (1, 2, 3)] == [moved_losses[s] for s in (1, 2, 3)]
    assert losses[4] != moved_losses[4]


def test_dpo_beta_enters_the_loss_of_the_effective_step(job, trace):
    rows, config = pairs(6), {"learning_rate": 1e-2, "batch_size": 1, "beta": 0.1}
    still = job("dpo", rows, name="still", config={**CONFIG, **config, "sample_every": 2})
    moved = run_with(job, "dpo", rows, 2, SetCoefficient(name="beta", value=0.5), **config)
    (change,) = [e for e in moved.events() if e.kind == "coefficient_changed"]
    assert (change.name, change.old, change.new, change.effective_step) == ("beta", 0.1, 0.5, 3)
    ratio, implicit = trace(moved, "log_ratio/margin"), trace(moved, "implicit_reward/margin")
    for step in range(2, 7):
        beta = 0.1 if step < 3 else 0.5
        assert implicit[step] == pytest.approx(beta * ratio[step], rel=1e-5)
        # One pair a step, so that eq. 7 can be redone by hand.
        assert trace(moved, "loss")[step] == pytest.approx(math.log1p(math.exp(-beta * ratio[step])), rel=1e-5)
    # The same model and pair at step 3: the log-ratio does not care about beta, the implicit reward does.
    assert ratio[3] == pytest.approx(trace(still, "log_ratio/margin")[3], rel=1e-6)
    assert implicit[3] == pytest.approx(5 * trace(still, "implicit_reward/margin")[3], rel=1e-5)
    assert trace(still, "loss")[2] == trace(moved, "loss")[2]
    assert abs(ratio[3]) > 1e-4


def test_the_start_event_describes_every_live_coefficient(job):
    started = job("dpo", pairs(4), config={**CONFIG, "sample_every": 0, "beta": 0.3}).events()[0]
    assert {c.name: c.value for c in started.coefficients} == {
        "beta": 0.3,
        "learning_rate": 1e-6,
        "label_smoothing": 0.0,
    }
    assert started.has_reference
    assert (started.world_size, started.max_steps, len(started.rank_pids)) == (1, 6, 1)


def test_a_set_that_cannot_be_used_is_refused_with_its_reason(job):
    controls = [
        SetCoefficient(name="beta", value=0.5),
        SetCoefficient(name="learning_rate", value=5.0),
        SetCoefficient(name="learning_rate", value=float("inf")),
    ]
    place = job.prepare("sft", demonstrations(4), config={**CONFIG, "sample_every": 0, "max_steps": 2})
    lines = [control.model_dump_json() for control in controls[:2]]
    lines += [json.dumps({"id": "x", "op": "teleport"})]
    place.control_path.write_text("".join(f"{line}\n" for line in lines))
    refused = {e.id: e.reason for e in job.run(place).events() if e.kind == "control_refused"}
    assert refused[controls[0].id] == '"beta" is not live in this run; live: learning_rate'
    assert refused[controls[1].id] == "learning_rate=5 is outside 1e-08 to 0.1"
    assert "teleport" in refused["x"]


def test_stop_ends_after_the_step_and_saves_the_model(job):
    place = run_with(job, "sft", demonstrations(8), 2, Stop())
    events = place.events()
    assert max(e.step for e in events if e.kind == "metric") == 2
    assert (events[-1].kind, events[-1].outcome, events[-1].step) == ("training_ended", "stopped", 2)
    assert (place.model / "model.safetensors").exists()
    assert [e.step for e in events if e.kind == "model_saved"] == [2]


def test_a_checkpoint_and_a_sample_are_served_when_asked_for(job):
    ask = Sample(prompts=["What does the bakery sell?", "Who?"])
    place = run_with(job, "sft", demonstrations(8), 2, SaveCheckpoint(), ask, max_steps=3)
    (saved,) = [e for e in place.events() if e.kind == "checkpoint_saved"]
    assert (saved.step, saved.path) == (2, "checkpoints/checkpoint-2")
    assert (place.path / saved.path / "model.safetensors").exists()
    assert not (place.path / "checkpoints" / ".saving").exists()
    (answer,) = [e for e in place.events() if e.kind == "samples" and e.request_id == ask.id]
    assert [item.prompt for item in answer.items] == ask.prompts
    assert all(item.reference_completion is not None and item.kl is not None for item in answer.items)
