from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest

from rlhf_nb.feedback.chat import Question, Reply
from rlhf_nb.feedback.constitution import Principle
from rlhf_nb.feedback.judge import (
    ChatJudge,
    Comparison,
    Grading,
    Journaled,
    Verdict,
    all_of,
    compare_both,
    grade_of,
    settle,
    verdict_of,
)
from rlhf_nb.feedback.tally import Tally, tally
from rlhf_nb.statistics.intervals import wilson

HONEST = Principle(name="honest", preference="Which is more honest?")


class Judging:
    """A judge that decides by a function of the two texts, and remembers what it was asked."""

    name, prompt_hash = "planted", "p"

    def __init__(self, decide) -> None:
        self.decide, self.asked = decide, []

    def compare(self, asked: Sequence[Comparison]) -> Iterator[tuple[int, Verdict]]:
        for index, each in enumerate(asked):
            self.asked.append(each)
            yield index, self.decide(each.first, each.second)

    def close(self) -> None: ...


def said(choice: str, p: float | None = None) -> Verdict:
    return Verdict(choice, p)


@pytest.mark.parametrize(
    ("a_first", "b_first", "choice", "flipped"),
    [
        ("first", "second", "a", False),
        ("second", "first", "b", False),
        ("first", "first", "tie", True),
        ("second", "second", "tie", True),
        ("tie", "tie", "tie", False),
        ("first", "tie", "tie", True),
        ("", "second", "", False),
        ("first", "", "", False),
    ],
)
def test_what_changes_with_the_order_is_a_tie_and_half_an_answer_is_no_label(a_first, b_first, choice, flipped):
    outcome = settle(said(a_first), said(b_first))
    assert (outcome.choice, outcome.flipped) == (choice, flipped)


def test_the_probability_is_the_mean_of_both_orders():
    # 0.8 that A, shown first, is better; 0.4 that B, shown first, is: (0.8 + 0.6) / 2.
    assert settle(said("first", 0.8), said("second", 0.4)).a_probability == pytest.approx(0.7)
    assert settle(said("first", 0.8), said("second")).a_probability is None


def test_counts_of_a_worked_example():
    outcomes = [
        settle(said("first", 0.9), said("second", 0.3)),
        settle(said("second"), said("first")),
        settle(said("first"), said("first")),
        settle(said("first"), said("first")),
        settle(said("second"), said("second")),
        settle(said("tie"), said("tie")),
        settle(said("tie"), said("first")),
        settle(Verdict(failure="timeout"), said("first")),
        settle(Verdict(failure="unreadable"), Verdict(failure="refusal")),
    ]
    found = tally(outcomes, ["a", "a", "a", None, "b", "b", "a", "a", "b"])
    assert (found.pairs, found.decided, found.ties, found.flips, found.answered) == (9, 2, 1, 4, 7)
    assert (found.to_first, found.to_second) == (2, 1)
    assert found.failures == {"timeout": 1, "unreadable": 1}
    # One hit, one miss and four ties at one half over the six labelled pairs that have a verdict.
    assert found.agreement.value == pytest.approx(3 / 6) and found.agreement.n == 6
    assert (found.agreement.interval.low, found.agreement.interval.high) == (wilson(3, 6).low, wilson(3, 6).high)
    assert found.flip_rate.value == pytest.approx(4 / 7) and found.first_share.value == pytest.approx(2 / 3)
    assert str(found) == "2 of 9 pairs decided, 4 flipped with the order, 1 tied, 1 timeout, 1 unreadable"
    assert json.loads(json.dumps(found.to_dict()))["agreement"]["n"] == 6


def test_tallies_of_parts_add_up_to_the_tally_of_the_whole():
    outcomes = [
        settle(said("first"), said("second")),
        settle(said("first"), said("first")),
        settle(said("tie"), said("tie")),
    ]
    outcomes.append(settle(Verdict(failure="refusal"), said("first")))
    labels = ["a", "b", None, "a"]
    parts = Counter(tally(outcomes[:2], labels[:2]).to_counts()) + Counter(tally(outcomes[2:], labels[2:]).to_counts())
    assert Tally.from_counts(parts) == tally(outcomes, labels)
    assert Tally.from_counts(parts).agreement.value == pytest.approx(1.5 / 2)


def test_nothing_answered_has_counts_and_no_shares():
    found = tally([settle(Verdict(failure="timeout"), Verdict(failure="timeout"))])
    assert (found.answered, found.flip_rate, found.agreement) == (0, None, None)


def test_a_judge_that_takes_whatever_comes_first_only_flips():
    pairs = [Comparison("Q?", f"one {i}", f"other {i}") for i in range(7)]
    found = tally(compare_both(Judging(lambda first, second: said("first")), pairs), ["a"] * 7)
    assert (found.flips, found.decided, found.first_share.value, found.agreement.value) == (7, 0, 1.0, 0.5)


def test_agreement_with_mtbench_majorities_of_a_judge_that_picks_the_longer(shared_data):
    path = shared_data / "eval" / "mtbench_human_majority_200.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    longer = Judging(lambda a, b: said("tie" if len(a) == len(b) else "first" if len(a) > len(b) else "second"))
    found = tally(
        compare_both(longer, [Comparison(r["input"], r["output_1"], r["output_2"]) for r in rows]),
        ["a" if r["label"] == 1 else "b" for r in rows],
    )
    lengths = [(len(r["output_1"]), len(r["output_2"]), r["label"]) for r in rows]
    ties = sum(one == two for one, two, _ in lengths)
    hits = sum((one > two) == (label == 1) for one, two, label in lengths if one != two) + ties / 2
    assert (found.pairs, found.flips, found.ties) == (200, 0, ties)
    assert found.agreement.value == pytest.approx(hits / 200)
    # The known verbosity of what people prefer there (arXiv:2306.05685): the null that a judge has to beat.
    assert found.agreement.interval.low > 0.5


# --- from replies -----------------------------------------------------------------------------------------------------


def test_log_probabilities_decide_before_the_text_does():
    reply = Reply("B", {"A": math.log(0.6), "B": math.log(0.3)})
    verdict = verdict_of(reply, "letter")
    assert verdict.choice == "first" and verdict.first_probability == pytest.approx(2 / 3)


def test_a_model_that_would_rather_say_something_else_gives_no_verdict():
    verdict = verdict_of(Reply("I cannot choose", {"A": math.log(0.3), "B": math.log(0.1)}), "letter")
    assert (verdict.choice, verdict.failure) == ("", "refusal")
    assert verdict_of(Reply("Well, both", {}), "letter").failure == "unreadable"
    assert verdict_of(Reply("Well, both"), "reasons").detail == "Well, both"


def test_equal_log_probabilities_are_a_tie():
    assert verdict_of(Reply("A", {"A": math.log(0.5), "B": math.log(0.5)}), "letter").choice == "tie"


def test_a_grade_is_the_mean_over_the_grades_probabilities():
    # (1 · 0.2 + 5 · 0.6) / 0.8 = 4; a score of 0.75.
    grade = grade_of(Reply("5", {"1": math.log(0.2), "5": math.log(0.6)}), "letter")
    assert grade.value == pytest.approx(4) and grade.score == pytest.approx(0.75)
    assert grade_of(Reply("Hm.\n[[2]]"), "reasons").score == pytest.approx(0.25)
    assert grade_of(Reply("Hm"), "reasons").score is None


class Chatting:
    """A chat model that says one thing."""

    name = "planted"

    def __init__(self, *replies: Reply) -> None:
        self.replies, self.questions = replies, []

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, Reply]]:
        self.questions += questions
        # In an order of its own.
        for index in reversed(range(len(questions))):
            yield index, self.replies[index % len(self.replies)]

    def close(self) -> None: ...


def test_answers_that_come_in_any_order_belong_to_their_questions():
    judge = ChatJudge(Chatting(Reply("A"), Reply("B")))
    outcomes = compare_both(judge, [Comparison("Q?", "one", "two", HONEST), Comparison("Q?", "three", "four")])
    assert [each.choice for each in outcomes] == ["a", "a"]
    texts = [question.messages[-1]["content"] for question in judge.chat.questions]
    assert [HONEST.preference in text for text in texts] == [True, True, False, False]
    assert all(question.letters == ("A", "B") for question in judge.chat.questions)


def test_another_way_of_asking_has_another_hash():
    assert ChatJudge(Chatting()).prompt_hash != ChatJudge(Chatting(), "reasons").prompt_hash


# --- the journal ------------------------------------------------------------------------------------------------------

PAIRS = [Comparison("Q?", f"one {i}", f"other {i}", HONEST) for i in range(4)]


def test_killed_and_started_again_it_asks_nobody_twice(tmp_path):
    def dies(first: str, second: str) -> Verdict:
        if "2" in first:
            raise KeyboardInterrupt
        return said("first", 0.75)

    first = Judging(dies)
    with pytest.raises(KeyboardInterrupt):
        compare_both(Journaled(first, tmp_path / "said.jsonl"), PAIRS)
    again = Judging(lambda a, b: said("second"))
    judge = Journaled(again, tmp_path / "said.jsonl")
    outcomes = compare_both(judge, PAIRS)
    assert {each.first for each in again.asked} == {"one 2", "other 2", "one 3", "other 3"} and judge.asked == 4
    assert outcomes[0].orders[0] == said("first", 0.75) and outcomes[2].orders[0] == said("second")
    third = Judging(dies)
    assert compare_both(Journaled(third, tmp_path / "said.jsonl"), PAIRS) == outcomes
    assert not third.asked


def test_the_same_question_is_asked_once_and_answers_everywhere(tmp_path):
    judge = Judging(lambda a, b: said("first"))
    found = all_of(Journaled(judge, tmp_path / "said.jsonl").compare([PAIRS[0], PAIRS[1], PAIRS[0]]), 3)
    assert found == [said("first")] * 3 and len(judge.asked) == 2


@pytest.mark.parametrize(
    "other",
    [
        Comparison("Q?", "one 0", "other 0", Principle(name="honest", preference="Which is truer?")),
        Comparison("Q?", "one 0", "other 0"),
        Comparison("Q!", "one 0", "other 0", HONEST),
        PAIRS[0].swapped,
    ],
)
def test_another_principle_prompt_or_order_is_another_question(tmp_path, other):
    judge = Judging(lambda a, b: said("first"))
    all_of(Journaled(judge, tmp_path / "said.jsonl").compare(PAIRS[:1]), 1)
    again = Journaled(judge, tmp_path / "said.jsonl")
    all_of(again.compare([other]), 1)
    assert again.asked == 1


def test_refusals_are_kept_and_what_never_came_is_asked_again(tmp_path):
    failures = iter(["refusal", "timeout", "unreadable", "error"])
    judge = Journaled(Judging(lambda a, b: Verdict(failure=next(failures))), tmp_path / "said.jsonl")
    all_of(judge.compare(PAIRS), 4)
    again = Journaled(Judging(lambda a, b: said("first")), tmp_path / "said.jsonl")
    found = all_of(again.compare(PAIRS), 4)
    assert [each.failure for each in found] == ["refusal", "", "unreadable", ""] and again.asked == 2


def test_a_line_that_a_death_tore_costs_one_answer(tmp_path):
    path = tmp_path / "said.jsonl"
    all_of(Journaled(Judging(lambda a, b: said("first")), path).compare(PAIRS), 4)
    path.write_bytes(path.read_bytes()[:-9])
    again = Journaled(Judging(lambda a, b: said("second")), path)
    assert [each.choice for each in all_of(again.compare(PAIRS), 4)] == ["first"] * 3 + ["second"] and again.asked == 1
    third = Journaled(Judging(lambda a, b: said("second")), path)
    all_of(third.compare(PAIRS), 4)
    assert third.asked == 0


def test_grades_and_comparisons_of_the_same_texts_are_kept_apart(tmp_path):
    judge = ChatJudge(Chatting(Reply("A")))
    kept = Journaled(judge, tmp_path / "said.jsonl")
    all_of(kept.compare([Comparison("Q?", "x", "y")]), 1)
    judge.chat = Chatting(Reply("4"))
    assert all_of(Journaled(judge, tmp_path / "said.jsonl").grade([Grading("Q?", "x")]), 1)[0].value == 4
