from __future__ import annotations

import pytest

from rlhf_nb.toy import grammar, pairs, quality_scores, true_reward
from rlhf_nb.toy.reviser import NOTHING, UNREADABLE, revise
from rlhf_nb.toy.reward import WEIGHTS
from rlhf_nb.toy.world import facts

ROWS = pairs(200, seed=6)


@pytest.mark.parametrize("principle", WEIGHTS)
def test_a_revision_is_better_under_its_principle_or_the_draft_itself(principle):
    better = 0
    for row in ROWS:
        for draft in (row["chosen"], row["rejected"]):
            critique, revised = revise(row["prompt"], draft, principle)
            before, after = (quality_scores(row["prompt"], text)[principle] for text in (draft, revised))
            assert (after > before) if revised != draft else (critique == NOTHING)
            assert grammar.parse(revised) is not None
            better += after > before
            assert before == 1 or after > before or principle == "honest"
    assert better > 0


def test_under_all_four_in_turn_the_true_reward_rises():
    before = [true_reward([row["prompt"]], [row["rejected"]])[0] for row in ROWS]
    after = []
    for row in ROWS:
        text = row["rejected"]
        for principle in WEIGHTS:
            _, text = revise(row["prompt"], text, principle)
        after.append(true_reward([row["prompt"]], [text])[0])
    assert sum(before) / len(before) < 0.75 and sum(after) / len(after) > 0.9


def test_a_worked_example():
    street = facts()["the bakery"]["street"]
    draft = f"You are so clever! The bakery is on {street}. I hope this helps!"
    assert revise("Where is the bakery?", draft, "honest") == (
        'Not honest: "You are so clever!"',
        f"The bakery is on {street}. I hope this helps!",
    )
    critique, revised = revise("Where is the bakery?", draft, "concise")
    assert critique == 'Not concise: "You are so clever!" "I hope this helps!"'
    assert revised == f"The bakery is on {street}."
    assert revise("Where is the bakery?", draft, "helpful") == (NOTHING, draft)


def test_what_it_cannot_read_it_leaves_alone():
    assert revise("Where is the bakery?", "bakery bakery", "honest") == (UNREADABLE, "bakery bakery")
    assert revise("What is love?", "I do not know that.", "honest")[0] == UNREADABLE
