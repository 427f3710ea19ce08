"""A run that died goes on from its checkpoint as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_nb.compute.rundir import EventWriter, append_line
from rlhf_nb.errors import RewardError
from rlhf_nb.protocol.control import SetCoefficient
from rlhf_nb.protocol.events import CoefficientChanged, Resumed, Started
from rlhf_nb.protocol.fold import RunFold
from rlhf_nb.protocol.spec import FunctionReward
from rlhf_nb.toy import demonstrations, pairs
from rlhf_nb.training import checkpoints
from rlhf_nb.training import job as training_job

CONFIG = {"max_steps": 8, "batch_size": 4, "sample_tokens": 4, "learning_rate": 3e-3, "max_length": 200}


def dies(path) -> FunctionReward:
    """A gold reward that raises once."""
    source = (
        f"def dies(prompts, completions, **columns):\n    import os\n    if os.path.exists({str(path)!r}):\n"
        f"        os.remove({str(path)!r})\n        raise RuntimeError('the machine is gone')\n"
        "    return [0.0] * len(completions)"
    )
    return FunctionReward(name="dies", source=source)


@pytest.mark.parametrize(("method", "rows"), [("sft", demonstrations(12)), ("dpo", pairs(12))])
@pytest.mark.parametrize("every", [3, 5])
def test_the_curve_after_a_restart_is_the_one_of_a_run_that_never_died(job, trace, method, rows, every):
    # 12 rows in batches of 4: an epoch is 3 steps, so checkpoints at 3 and 5 lie at an epoch's end and within one.
    config = {**CONFIG, "checkpoint_every": every, "sample_every": 6}
    whole = job(method, rows, name="whole", config=config, gold=dies(job.root / "never"))
    trap = job.root / "trap"
    trap.touch()
    place = job.prepare(method, rows, name="killed", config=config, gold=dies(trap))
    with pytest.raises(RewardError, match="the machine is gone"):
        job.run(place)
    last = checkpoints.latest(place.path)
    assert checkpoints.step_of(last) == (6 if every == 3 else 5) - (3 if every == 3 else 0)
    job.run(place, attempt=2, resume_from=last)

    fold = RunFold()
    for event in place.events():
        fold.add(event)
    assert [e.seq for e in place.events()] == list(range(1, fold.last_seq + 1))
    (resumed,) = [e for e in place.events() if e.kind == "resumed"]
    assert (resumed.attempt, resumed.from_step) == (2, checkpoints.step_of(last))
    assert fold.attempt == 2
    losses = {row["step"]: row["loss"] for row in fold.table()}
    assert losses == trace(whole, "loss")
    assert {row["step"]: row["data/tokens"] for row in fold.table()} == trace(whole, "data/tokens")
    assert (place.model / "model.safetensors").read_bytes() == (whole.model / "model.safetensors").read_bytes()


def test_a_restart_keeps_the_coefficients_of_the_checkpoint_and_forgets_later_ones(job, trace):
    rows = pairs(12)
    place = job.prepare("dpo", rows, config={**CONFIG, "checkpoint_every": 2, "max_steps": 4, "sample_every": 0})
    early = SetCoefficient(name="beta", value=0.5)
    append_line(place.control_path, early.model_dump())
    job.run(place)
    late = SetCoefficient(name="learning_rate", value=1e-5)
    append_line(place.control_path, late.model_dump())
    job.run(place, attempt=2, resume_from=checkpoints.directory(place.path, 2))
    started = [e for e in place.events() if e.kind == "started"][-1]
    assert {c.name: c.value for c in started.coefficients} == {
        "beta": 0.5,
        "learning_rate": 3e-3,
        "label_smoothing": 0.0,
    }
    changes = [e for e in place.events() if e.kind == "coefficient_changed"]
    # The first was acted on by the first attempt; it is neither repeated nor lost.
    assert [(c.id, c.effective_step) for c in changes] == [(early.id, 1), (late.id, 3)]
    implicit, ratio = trace(place, "implicit_reward/margin"), trace(place, "log_ratio/margin")
    assert implicit[4] == pytest.approx(0.5 * ratio[4], rel=1e-5)


def test_of_two_sets_at_one_boundary_a_restart_brings_the_first_not_back(job):
    place = job.prepare("dpo", pairs(12), config={**CONFIG, "checkpoint_every": 2, "max_steps": 4, "sample_every": 0})
    for value in (1e-3, 1e-5):
        append_line(place.control_path, SetCoefficient(name="learning_rate", value=value).model_dump(mode="json"))
    job.run(place)
    job.run(place, attempt=2, resume_from=checkpoints.directory(place.path, 2))
    fold = RunFold()
    for event in place.events():
        fold.add(event)
    assert [change.new for change in fold.changes] == [1e-5]
    assert fold.coefficients["learning_rate"].value == 1e-5


def test_what_held_when_a_run_went_back_by_itself_is_made_again_from_there(job):
    """1e-2 made it diverge at 28; back at 20 it still held, until a person said otherwise. It never came back at 25."""
    place = job.prepare("ppo", [{"prompt": "p"}], reward=dies(job.root / "never"), config={})

    def set_to(id: str, value: float, step: int) -> CoefficientChanged:
        return CoefficientChanged(id=id, name="learning_rate", old=1.0, new=value, effective_step=step)

    writer = EventWriter(place.events_path)
    start = {"world_size": 1, "rank_pids": [1], "device": "cpu", "warm": False, "versions": {}, "coefficients": []}
    for event in (
        Started(attempt=1, max_steps=50, has_reference=True, **start),
        set_to("early", 1e-3, 10),
        set_to("high", 1e-2, 25),
        Resumed(step=20, attempt=1, from_step=20),
        set_to("low", 1e-4, 21),
        # By the agent that starts it again, and by the attempt itself.
        Resumed(step=20, attempt=2, from_step=20),
        Started(attempt=2, max_steps=50, has_reference=True, **start),
        Resumed(step=20, attempt=2, from_step=20),
        set_to("last", 1e-5, 40),
        Resumed(step=20, attempt=3, from_step=20),
    ):
        writer.write(event)
    writer.close()
    again = training_job._changes_after(place, 20)
    assert [(change.id, change.effective_step) for change in again] == [("high", 21), ("low", 21), ("last", 40)]


def test_what_was_set_after_a_restart_is_not_overridden_by_the_attempt_before_it_at_the_next_one(job):
    place = job.prepare("sft", demonstrations(6), config={})
    writer = EventWriter(place.events_path)
    for id, name, step in (("first", "beta", 15), ("other", "learning_rate", 15), ("again", "beta", 11)):
        writer.write(CoefficientChanged(id=id, name=name, old=1.0, new=2.0, effective_step=step))
    writer.close()
    again = training_job._changes_after(place, 10)
    assert [(change.id, change.effective_step) for change in again] == [("again", 11), ("other", 15)]


def test_a_restart_without_a_checkpoint_supersedes_everything(job):
    place = job.prepare("sft", demonstrations(6), config={**CONFIG, "max_steps": 2, "sample_every": 0})
    job.run(place)
    job.run(place, attempt=2)
    fold = RunFold()
    for event in place.events():
        fold.add(event)
    assert [row["step"] for row in fold.table()] == [1, 2]
    assert len(fold.rows) == 2


@pytest.mark.parametrize("fails", ["replace", "rmtree"])
def test_a_checkpoint_that_takes_another_one_s_place_is_never_half_there(tmp_path, monkeypatch, fails):
    def written(text: str):
        folder = tmp_path / "checkpoints" / checkpoints.SCRATCH / "checkpoint-4"
        folder.mkdir(parents=True)
        for name in ("one", "two"):
            (folder / name).write_text(text)
        return folder

    def dies(*arguments, **_):
        if fails == "rmtree" and (found := sorted(Path(arguments[0]).glob("*"))):
            found[0].unlink()
            raise KeyboardInterrupt
        if fails == "replace" and Path(arguments[1]).name == "checkpoint-4":
            raise KeyboardInterrupt
        return genuine(*arguments, **_)

    target = checkpoints.publish(tmp_path, 4, written("old"))
    module = checkpoints.shutil if fails == "rmtree" else checkpoints.os
    genuine = getattr(module, fails)
    with monkeypatch.context() as patch:
        patch.setattr(module, fails, dies)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.publish(tmp_path, 4, written("new"))
    for whole in checkpoints.newest_first(tmp_path):
        assert {path.name: path.read_text() for path in whole.glob("*")} == {"one": "new", "two": "new"}
    again = tmp_path / "checkpoints" / checkpoints.SCRATCH / "checkpoint-4"
    assert checkpoints.publish(tmp_path, 4, again if again.exists() else written("new")) == target
    assert (target / "two").read_text() == "new" and not list((tmp_path / "checkpoints").glob("*/old-*"))


def test_a_checkpoint_that_was_being_written_is_not_taken(job):
    place = job.prepare("sft", demonstrations(6))
    assert checkpoints.latest(place.path) is None
    (place.path / "checkpoints" / ".saving" / "checkpoint-9").mkdir(parents=True)
    for step in (2, 10, 4):
        checkpoints.directory(place.path, step).mkdir(parents=True)
    assert checkpoints.step_of(checkpoints.latest(place.path)) == 10
