"""The sums: each once, checked by the registered reward, demonstrated as carelessly as is said."""

from __future__ import annotations

import pytest

from rlhf_nb.errors import DataError
from rlhf_nb.rewards.answers import numeric
from rlhf_nb.toy import dataset, sums


def test_every_sum_occurs_once_and_its_answer_is_right():
    kind, rows = dataset("toy-sums")
    assert kind == "prompts"
    assert sorted(row["prompt"] for row in rows) == sorted(f"What is {a} + {b}?" for a in range(6) for b in range(6))
    assert numeric([], ["That is 7."], ["7"]) == [1.0]
    for row in rows:
        a, b = (int(word.strip("?")) for word in row["prompt"].split() if word.strip("?").isdigit())
        assert row["answer"] == str(a + b)


def test_demonstrations_are_as_careless_as_is_said_and_never_far_off():
    answers = {row["prompt"]: int(row["answer"]) for row in sums.everything()}
    _, rows = dataset("toy-sums-demonstrations")
    off = [int(row["completion"].removeprefix("That is ").strip(".")) - answers[row["prompt"]] for row in rows]
    assert abs(sum(map(bool, off)) / len(off) - sums.CARELESS) < 0.04
    assert set(off) == {-3, -2, -1, 0, 1, 2, 3}


def test_another_seed_is_another_order_of_the_same_sums():
    def prompts(seed):
        return [row["prompt"] for row in sums.sums(seed=seed)]

    assert prompts(0) == prompts(0) != prompts(1)
    assert set(prompts(0)) == set(prompts(1))


def test_more_sums_than_there_are_is_refused():
    with pytest.raises(DataError, match="n=37: there are 36 sums"):
        sums.sums(37)
