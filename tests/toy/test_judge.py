from __future__ import annotations

import math

import pytest

from rlhf_nb.errors import SpecError
from rlhf_nb.feedback.constitution import Principle, load
from rlhf_nb.feedback.judge import Comparison, Grading, all_of, compare_both
from rlhf_nb.feedback.tally import tally
from rlhf_nb.toy import Annotator, pairs, quality_scores, true_reward
from rlhf_nb.toy.judge import ToyJudge

ROWS = pairs(300, seed=5)
COMPARISONS = [Comparison(row["prompt"], row["chosen"], row["rejected"]) for row in ROWS]
FAIR = ToyJudge(length_bias=0, sycophancy=0, position_bias=0)


def test_without_biases_it_answers_by_the_true_reward():
    outcomes = compare_both(FAIR, COMPARISONS)
    for row, outcome in zip(ROWS, outcomes, strict=True):
        one, other = true_reward([row["prompt"]] * 2, [row["chosen"], row["rejected"]])
        assert outcome.choice == ("tie" if one == other else "a" if one > other else "b")
        assert not outcome.flipped


@pytest.mark.parametrize("principle", load("toy-town").principles, ids=lambda p: p.name)
def test_without_biases_it_answers_principle_by_principle(principle):
    asked = [Comparison(each.prompt, each.first, each.second, principle) for each in COMPARISONS]
    for each, outcome in zip(asked, compare_both(FAIR, asked), strict=True):
        one, other = (quality_scores(each.prompt, text)[principle.name] for text in (each.first, each.second))
        assert outcome.choice == ("tie" if one == other else "a" if one > other else "b")


def test_verdicts_flip_exactly_where_the_position_bias_exceeds_the_difference():
    judge = ToyJudge(position_bias=0.1)
    outcomes = compare_both(judge, COMPARISONS)
    near = [abs(judge.utility(c.prompt, c.first) - judge.utility(c.prompt, c.second)) < 0.1 for c in COMPARISONS]
    assert [each.flipped for each in outcomes] == near and 0 < sum(near) < len(near)
    assert tally(outcomes).first_share.value == 1.0


def test_asking_in_both_orders_cancels_the_position_in_the_probability():
    # sigmoid((d + b) / t) and 1 - sigmoid((-d + b) / t): at d = 0 their mean is one half whatever the bias.
    row = ROWS[0]
    (outcome,) = compare_both(ToyJudge(position_bias=0.3), [Comparison(row["prompt"], row["chosen"], row["chosen"])])
    assert outcome.a_probability == pytest.approx(0.5) and outcome.flipped
    (verdict,) = all_of(ToyJudge(position_bias=0.3, noise=0.15).compare([Comparison("?", "x", "x")]), 1)
    assert verdict.first_probability == pytest.approx(1 / (1 + math.exp(-2)))


def test_its_biases_are_the_annotators():
    judge, annotator = ToyJudge(), Annotator()
    for row in ROWS[:50]:
        assert judge.utility(row["prompt"], row["chosen"]) == pytest.approx(
            annotator.utility(row["prompt"], row["chosen"])
        )


def test_a_grade_is_the_utility_held_within_its_range():
    row = ROWS[0]
    (grade,) = all_of(FAIR.grade([Grading(row["prompt"], row["chosen"])]), 1)
    assert grade.score == pytest.approx(true_reward([row["prompt"]], [row["chosen"]])[0])
    (grade,) = all_of(ToyJudge(length_bias=99).grade([Grading(row["prompt"], row["chosen"])]), 1)
    assert grade.score == 1.0


def test_a_chat_is_judged_by_its_last_user_message():
    row = ROWS[0]
    chat = [{"role": "user", "content": row["prompt"]}]
    assert FAIR.utility(chat, row["chosen"]) == FAIR.utility(row["prompt"], row["chosen"])


def test_other_principles_and_knobs_are_refused():
    with pytest.raises(SpecError, match='knows the principles helpful, honest, harmless, concise, and "kind" is none'):
        FAIR.utility("?", "x", Principle(name="kind", preference="Which is kinder?"))
    with pytest.raises(SpecError, match='no knob positionbias; did you mean "position_bias"'):
        ToyJudge.create(positionbias=1)
    with pytest.raises(SpecError, match="noise=0"):
        ToyJudge.create(noise=0)


def test_a_changed_judge_has_another_name():
    assert (ToyJudge().name, ToyJudge(position_bias=0.2).name) == ("toy-annotator", "toy-annotator(position_bias=0.2)")
