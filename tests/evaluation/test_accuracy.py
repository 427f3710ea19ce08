from __future__ import annotations

import pytest

from rlhf_nb.errors import DataError, SpecError
from rlhf_nb.evaluation.accuracy import accuracy
from rlhf_nb.protocol.spec import RunModel
from rlhf_nb.statistics.intervals import wilson
from rlhf_nb.toy import pairs

EASY = [{"prompt": f"Question {i}?", "chosen": "Yes, of course.", "rejected": "zzzz"} for i in range(8)]


def test_a_trained_reward_model_is_measured_beside_the_longer_text(job):
    job(
        "reward", EASY, name="rm-1", config={"max_steps": 20, "batch_size": 4, "learning_rate": 1e-2, "max_length": 200}
    )
    rows = [*EASY, {"prompt": "Question 9?", "chosen": "zzzz", "rejected": "Yes, of course."}]
    place = job("evaluate", rows, name="evaluate-1", policy=RunModel(run_id="rm-1"))
    (result,) = [e for e in place.events() if e.kind == "result"]
    assert (result.name, result.n, result.value) == ("accuracy", 9, pytest.approx(8 / 9))
    assert result.interval == pytest.approx((wilson(8, 9).low, wilson(8, 9).high))
    # Here the longer text is the chosen one just as often as the model is right.
    assert result.detail["longer_accuracy"] == pytest.approx(8 / 9)
    assert result.detail["longer_interval"] == pytest.approx(result.interval)
    assert result.detail["ties"] == 0
    events = place.events()
    assert (events[-1].kind, events[-1].outcome) == ("training_ended", "finished")
    assert not place.model.exists()
    assert not events[0].coefficients


def test_a_tie_counts_one_half_and_is_counted():
    rows = [{"chosen": "ab", "rejected": "a"}, {"chosen": "a", "rejected": "ab"}, {"chosen": "ab", "rejected": "cd"}]
    result = accuracy(rows, [1.0, 2.0, 0.5], [0.0, 2.0, 1.0])
    assert result.value == pytest.approx(0.5)
    assert result.detail["ties"] == 1
    assert result.detail["longer_accuracy"] == pytest.approx(0.5)


def test_one_pair_has_an_accuracy_and_an_interval_that_says_how_little_it_means():
    result = accuracy([{"chosen": "ab", "rejected": "a"}], [1.0], [0.0])
    assert result.value == 1.0
    assert result.interval[0] < 0.25


def test_a_language_model_has_no_accuracy(job):
    with pytest.raises(SpecError, match="has no score head"):
        job("evaluate", pairs(2))


def test_other_rows_are_refused(job):
    with pytest.raises(DataError, match='data "toy-prompts" holds prompts, and this method trains on pairs'):
        job("evaluate", "toy-prompts")
