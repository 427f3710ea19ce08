"""Rows of one kind from another, with what was lost counted."""

from __future__ import annotations

import pytest

from rlhf_nb.data.conversions import (
    convert,
    pairs_to_thumbs,
    rankings_to_ends,
    rankings_to_pairs,
    rankings_to_thumbs,
    to_chat,
)
from rlhf_nb.data.dataset import Dataset
from rlhf_nb.errors import DataError


def test_a_ranking_of_k_gives_every_strict_pair_better_first():
    rows, dropped = rankings_to_pairs([{"prompt": "p", "completions": ["b", "a", "c"], "ranks": [1, 0, 2], "tree": 7}])
    assert [(row["chosen"], row["rejected"]) for row in rows] == [("a", "b"), ("b", "c"), ("a", "c")]
    assert all(row["tree"] == 7 for row in rows) and dropped == {}


def test_equal_ranks_and_equal_texts_give_no_pair():
    rows, dropped = rankings_to_pairs([{"prompt": "p", "completions": ["a", "b", "c", "c"], "ranks": [0, 0, 1, 2]}])
    assert len(rows) == 4
    assert dropped == {"equal ranks": 1, "identical chosen and rejected": 1}


def test_a_pair_gives_a_thumb_each_way():
    rows, dropped = pairs_to_thumbs([{"prompt": "p", "chosen": "c", "rejected": "r"}])
    assert rows == [
        {"prompt": "p", "completion": "c", "label": True},
        {"prompt": "p", "completion": "r", "label": False},
    ]
    assert dropped == {}


RANKED = [
    {"prompt": "p", "completions": ["b", "a", "c", "d"], "ranks": [1, 0, 2, 2], "tree": 7},
    {"prompt": "q", "completions": ["x", "y"], "ranks": [3, 3]},
    {"prompt": "r", "completions": ["s", " s"], "ranks": [0, 1]},
]


def test_a_ranking_gives_its_two_ends_as_one_pair():
    rows, dropped = rankings_to_ends(RANKED)
    assert rows == [{"prompt": "p", "chosen": "a", "rejected": "c", "tree": 7}]
    assert dropped == {"every completion has the same rank": 1, "identical chosen and rejected": 1}
    ends = Dataset("mine", "rankings", RANKED).to("pairs", only="best_and_worst")
    assert ends.rows == rows and ends.dropped == dropped
    with pytest.raises(DataError, match="only='best_and_worst' is for rankings as pairs, and these are rankings"):
        Dataset("mine", "rankings", RANKED).to("thumbs", only="best_and_worst")


def test_a_ranking_gives_thumbs_at_its_ends_and_counts_what_lies_between():
    rows, dropped = rankings_to_thumbs(RANKED[:2])
    assert [(row["completion"], row["label"]) for row in rows] == [("a", True), ("c", False), ("d", False)]
    assert dropped == {"neither best nor worst": 1, "every completion has the same rank": 1}


def test_a_ranking_gives_its_best_as_a_demonstration_unless_several_tie():
    assert convert(RANKED, "rankings", "demonstrations") == (
        [{"prompt": "p", "completion": "a"}, {"prompt": "r", "completion": "s"}],
        {"several tie for the best": 1},
    )


def test_scored_completions_are_ranked_by_score_and_the_best_is_preferred():
    scored = [{"prompt": "p", "completions": ["a", "b", "c", "a"], "scores": [1.0, 3.0, 1.0, 1.0], "answer": "7"}]
    rankings, dropped = convert(scored, "completions", "rankings")
    assert rankings == [{"prompt": "p", "completions": ["a", "b", "c"], "ranks": [1, 0, 1], "answer": "7"}]
    assert dropped == {"repeated completion": 1}
    pairs, dropped = convert(scored, "completions", "pairs")
    assert [(row["chosen"], row["rejected"]) for row in pairs] == [("b", "a"), ("b", "c")]
    assert dropped == {"repeated completion": 1, "equal ranks": 1}
    assert convert(scored, "completions", "demonstrations")[0] == [{"prompt": "p", "completion": "b"}]


def test_thumbs_up_meet_thumbs_down_of_their_prompt_once_each():
    thumbs = [
        ("p", "a", True),
        ("p", "b", False),
        (" p", "c", True),
        ("p", "d", True),
        ("p", "e", False),
        ("q", "f", True),
    ]
    given = [dict(zip(("prompt", "completion", "label"), each, strict=True)) for each in thumbs]
    rows, dropped = convert(given, "thumbs", "pairs")
    assert [(row["chosen"], row["rejected"]) for row in rows] == [("a", "b"), ("c", "e")]
    assert dropped == {"thumb without its opposite for the same prompt": 2}


def test_a_pair_is_a_ranking_of_two_and_back_again():
    pairs = [{"prompt": "p", "chosen": "c", "rejected": "r", "weight": 2.0}]
    rankings, _ = convert(pairs, "pairs", "rankings")
    assert rankings == [{"prompt": "p", "completions": ["c", "r"], "ranks": [0, 1], "weight": 2.0}]
    assert convert(rankings, "rankings", "pairs") == (pairs, {})


def test_transcripts_become_chat_messages():
    row = {"prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", "chosen": " d", "rejected": " e"}
    (chat,), dropped = to_chat([row])
    assert chat == {
        "prompt": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ],
        "chosen": "d",
        "rejected": "e",
    }
    rows, dropped = to_chat([{"prompt": "plain"}, {"prompt": "x\n\nHuman: open end"}])
    assert rows == [{"prompt": "plain"}] and dropped == {"not a transcript that waits for the Assistant": 1}


def test_prompts_keep_what_a_verifier_reads_and_no_completion():
    rows = [
        {"prompt": "2+2", "completion": "2+2=4 #### 4", "answer": "4", "level": 1},
        {"prompt": " 2+2", "completion": "five", "answer": "5"},
        {"prompt": "1+1", "completion": "two", "answer": "2"},
    ]
    prompts, dropped = convert(rows, "demonstrations", "prompts")
    assert prompts == [{"prompt": "2+2", "answer": "4", "level": 1}, {"prompt": "1+1", "answer": "2"}]
    assert dropped == {"repeated prompt": 1}
    pairs = [{"prompt": "p", "chosen": "c", "rejected": "r", "tests": ["assert True"]}]
    assert convert(pairs, "pairs", "prompts")[0] == [{"prompt": "p", "tests": ["assert True"]}]


OF_THE_COMPARISON = {
    "margin": 3,
    "weight": 2,
    "annotator": "anna",
    "preference": 0.9,
    "judge": "m",
    "principle": "kind",
}
OF_THE_SIDES = {"chosen_score": 9, "rejected_score": 1, "score": 9, "scores": [9, 1], "golds": [9, 1], "draft": "d"}
SAID = {
    **OF_THE_COMPARISON,
    **OF_THE_SIDES,
    "agrees": True,
    "judge_prompt": "0a",
    "constitution": "0b",
    "critiques": [],
}


@pytest.mark.parametrize("kind", ["pairs", "demonstrations", "rankings", "thumbs"])
def test_what_was_said_of_completions_does_not_outlive_them(kind):
    sides = {"chosen": "c", "rejected": "r", "completion": "c", "label": True, "completions": ["c"], "ranks": [0]}
    prompts, _ = convert([{"prompt": "p", **sides, **SAID, "answer": "7", "tree": 4}], kind, "prompts")
    assert prompts == [{"prompt": "p", "answer": "7", "tree": 4}]


def test_margin_weight_and_annotator_stay_with_a_comparison_and_scores_of_its_sides_do_not():
    pair = {"prompt": "p", "chosen": "c", "rejected": "r", **OF_THE_COMPARISON, **OF_THE_SIDES}
    ranked, _ = convert([pair], "pairs", "rankings")
    assert ranked == [{"prompt": "p", "completions": ["c", "r"], "ranks": [0, 1], **OF_THE_COMPARISON}]
    back, _ = convert(ranked, "rankings", "pairs")
    assert back == [{"prompt": "p", "chosen": "c", "rejected": "r", **OF_THE_COMPARISON}]


def test_the_same_kind_is_left_as_it_is():
    rows = [{"prompt": "p"}]
    assert convert(rows, "prompts", "prompts") == (rows, {})
    with pytest.raises(DataError, match="prompts cannot become pairs: nothing else can be made of it"):
        convert(rows, "prompts", "pairs")
