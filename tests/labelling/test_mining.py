"""A reward model's errors on what a policy says: found, counted, and unlearnt by fitting again with them."""

from __future__ import annotations

import pytest

from rlhf_nb.errors import DataError
from rlhf_nb.labelling.mining import highest, mined_pairs

SCORED = [
    {"prompt": "p", "completions": ["a", "b", "c", "d"], "scores": [1.0, 3.0, 2.0, 0.0]},
    {"prompt": "q", "completions": ["x", "y"], "scores": [5.0, 4.5]},
]


def test_what_scores_highest_is_labelled_first():
    assert [row["prompt"] for row in highest(SCORED, 2)] == ["q", "p"]
    assert [row["prompt"] for row in highest(SCORED, 1)] == ["q"]


def test_pairs_in_which_the_rejected_side_scores_as_high_are_errors():
    labels = [
        {"prompt": "p", "chosen": "a", "rejected": "b "},
        {"prompt": "p", "chosen": "c", "rejected": "d"},
        {"prompt": " q", "chosen": "y", "rejected": "x"},
        {"prompt": "q", "chosen": "y", "rejected": "never said"},
    ]
    rows, dropped = mined_pairs(SCORED, labels, "pairs")
    assert [(row["chosen"], row["rejected"].strip(), row["chosen_score"], row["rejected_score"]) for row in rows] == [
        ("a", "b", 1.0, 3.0), ("y", "x", 4.5, 5.0)
    ]  # fmt: skip
    assert dropped == {"the reward model agrees": 1, "not among the scored completions": 1}


def test_a_thumb_down_is_held_against_the_thumbs_up_of_its_prompt_the_largest_error_first():
    ups, downs = {"a", "d"}, {"b", "c", "x", "y"}
    labels = [
        {"prompt": row["prompt"], "completion": text, "label": text in ups}
        for row in SCORED for text in row["completions"] if text in ups | downs
    ]  # fmt: skip
    rows, dropped = mined_pairs(SCORED, labels, "thumbs", per_prompt=2)
    assert [(row["chosen"], row["rejected"]) for row in rows] == [("d", "b"), ("a", "b")]
    assert dropped == {"nothing approved to hold it against": 2, "further errors of a prompt": 2}


def test_equal_scores_of_what_people_tell_apart_are_an_error():
    scored = [{"prompt": "p", "completions": ["a", "b"], "scores": [1.0, 1.0]}]
    assert len(mined_pairs(scored, [{"prompt": "p", "chosen": "a", "rejected": "b"}], "pairs")[0]) == 1


def test_completions_without_scores_and_labels_of_another_kind_are_refused():
    with pytest.raises(DataError, match="row 0: completions with one score each are needed"):
        mined_pairs([{"prompt": "p", "completions": ["a"]}], [], "pairs")
    with pytest.raises(DataError, match="labels=demonstrations: fresh labels are pairs or thumbs"):
        mined_pairs(SCORED, [], "demonstrations")
