"""Which of the scored completions is kept, held to best-of-n's closed form and to cases that can be counted."""

from __future__ import annotations

from itertools import product

import pytest

from rlhf_nb.data.dataset import Dataset
from rlhf_nb.data.selection import ALL_EQUAL, select
from rlhf_nb.errors import DataError

OUTCOMES = ("a", "b", "c", "d")
PROBABILITIES = (0.4, 0.3, 0.2, 0.1)
SCORES = (0.0, 1.0, 1.0, 2.0)
"""b and c tie."""


def row(*scores: float, prompt: str = "p", **columns):
    texts = [f"{prompt} says {i}" for i in range(len(scores))]
    return {"prompt": prompt, "completions": texts, "scores": list(scores), "completion_ended": [True], **columns}


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_best_of_n_kept_over_an_enumerated_world_has_best_of_ns_distribution(n):
    import torch

    from rlhf_nb.maths.best_of_n import best_of_n

    reached = dict.fromkeys(OUTCOMES, 0.0)
    for drawn in product(range(4), repeat=n):
        chance = torch.tensor([PROBABILITIES[i] for i in drawn], dtype=torch.float64).prod().item()
        rows = [{"prompt": "p", "completions": [OUTCOMES[i] for i in drawn], "scores": [SCORES[i] for i in drawn]}]
        ((one,), dropped) = select(rows, "best", drop_ties=False)
        assert not dropped
        reached[one["completion"]] += chance
    base = torch.tensor(PROBABILITIES, dtype=torch.float64)
    scores = torch.tensor(SCORES, dtype=torch.float64)
    closed = best_of_n(base.log(), scores, n).exp()
    assert list(reached.values()) == pytest.approx(closed.tolist(), abs=1e-12)
    # The expected maximum of n draws: Σ s·(F(s)ⁿ − F(s⁻)ⁿ) = 0·0.4ⁿ + 1·(0.9ⁿ − 0.4ⁿ) + 2·(1 − 0.9ⁿ).
    expected = (0.9**n - 0.4**n) + 2 * (1 - 0.9**n)
    mean = sum(reached[text] * score for text, score in zip(OUTCOMES, SCORES, strict=True))
    assert mean == pytest.approx(expected, abs=1e-12)


def test_the_best_keeps_the_prompts_columns_and_drops_those_of_other_completions():
    made, dropped = select([row(0.0, 3.0, 1.0, answer="7")], "best")
    assert made == [{"prompt": "p", "answer": "7", "completion": "p says 1", "score": 3.0}]
    assert dropped == {}


def test_what_was_said_of_other_completions_is_no_part_of_those_kept():
    said = {"margin": 3, "weight": 2.0, "annotator": "anna", "chosen_score": 9, "rejected_score": 1, "golds": [1, 2]}
    made, _ = select([row(0.0, 3.0, **said, agrees=True, preference=0.9, judge="m", answer="7")], "best_and_worst")
    sides = {"chosen": "p says 1", "rejected": "p says 0", "chosen_score": 3.0, "rejected_score": 0.0}
    assert made == [{"prompt": "p", "answer": "7", **sides}]


def test_the_ends_make_a_pair_and_prompts_without_two_ends_are_counted():
    rows = [row(1.0, 3.0, 2.0), row(2.0, 2.0, prompt="q"), row(5.0, prompt="one")]
    made, dropped = select(rows, "best_and_worst")
    assert made == [
        {"prompt": "p", "chosen": "p says 1", "rejected": "p says 0", "chosen_score": 3.0, "rejected_score": 1.0}
    ]
    assert dropped == {ALL_EQUAL: 2}
    same = {"prompt": "r", "completions": ["x", "x "], "scores": [0.0, 1.0]}
    assert select([same], "best_and_worst") == ([], {"identical chosen and rejected": 1})


def test_where_all_score_the_same_there_is_no_best_unless_a_policy_is_wanted():
    rows = [row(2.0, 2.0), row(1.0, prompt="one"), {"prompt": "e", "completions": ["", "x"], "scores": [1.0, 0.0]}]
    made, dropped = select(rows, "best")
    assert [one["prompt"] for one in made] == ["one"]
    assert dropped == {ALL_EQUAL: 1, "empty completion": 1}
    made, _ = select(rows, "best", drop_ties=False)
    assert [one["completion"] for one in made] == ["p says 0", "one says 0"]


def test_a_threshold_keeps_all_that_are_good_enough_each_text_once():
    rows = [row(0.5, 1.0, 0.4), {"prompt": "q", "completions": ["x", "x", "y"], "scores": [1.0, 1.0, 0.0]}]
    made, dropped = select(rows, "threshold", threshold=0.5)
    assert [(one["prompt"], one["completion"], one["score"]) for one in made] == [
        ("p", "p says 0", 0.5),
        ("p", "p says 1", 1.0),
        ("q", "x", 1.0),
    ]
    assert dropped == {"completions that score below 0.5": 2, "repeated completion": 1}


def test_the_top_fraction_is_taken_over_all_prompts_and_rounded_up():
    rows = [row(9.0, 8.0, 1.0), row(2.0, 2.0, prompt="q")]
    made, dropped = select(rows, "top_fraction", fraction=0.5)
    assert [one["score"] for one in made] == [9.0, 8.0, 2.0]
    # Of the two that tie at the border the first stays.
    assert made[-1]["completion"] == "q says 0"
    assert dropped == {"completions below the top 0.5": 2}
    assert len(select(rows, "top_fraction", fraction=1.0)[0]) == 5
    assert len(select(rows, "top_fraction", fraction=1e-12)[0]) == 1


@pytest.mark.parametrize(("fraction", "kept"), [(0.07, 7), (0.29, 29), (0.071, 8), (0.55, 55)])
def test_a_whole_number_of_completions_is_not_rounded_up(fraction, kept):
    rows = [row(float(number), prompt=str(number)) for number in range(100)]
    assert len(select(rows, "top_fraction", fraction=fraction)[0]) == kept


def test_completions_without_scores_are_refused_and_so_is_a_threshold_left_out():
    with pytest.raises(DataError, match="row 0: keep=best needs completions with their scores"):
        select([{"prompt": "p", "completions": ["x"]}], "best")
    with pytest.raises(DataError, match="threshold=None: keep=threshold needs"):
        select([row(1.0)], "threshold")
    with pytest.raises(DataError, match="fraction=0: keep=top_fraction needs"):
        select([row(1.0)], "top_fraction", fraction=0)
    with pytest.raises(DataError, match="'mine': keep=best leaves no demonstrations of its 1 prompts"):
        Dataset("mine", "completions", [row(1.0, 1.0)]).select("best")
    with pytest.raises(DataError, match="'mine' holds prompts: select works on completions"):
        Dataset("mine", "prompts", [{"prompt": "p"}]).select("best")


def test_a_data_set_of_completions_becomes_pairs_that_say_where_they_are_from():
    pairs = Dataset("mine", "completions", [row(1.0, 2.0), row(1.0, 1.0, prompt="q")]).select("best_and_worst")
    assert (pairs.name, pairs.kind, len(pairs)) == ("mine-best-and-worst", "pairs", 1)
    assert pairs.summary == f"1 pair from mine, best_and_worst; dropped 1: {ALL_EQUAL} (1)"
