"""Answers that can be checked, on the public sets: every reference is right and every changed one wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import time

import pytest

from rlhf_nb.errors import RewardError
from rlhf_nb.rewards import math_checker
from rlhf_nb.rewards.functions import from_reference, named
from rlhf_nb.rewards.math_checker import checker
from rlhf_nb.training.scoring import limited


@pytest.fixture(autouse=True, scope="module")
def checker_ends():
    yield
    checker.close()


def score(name: str, completions: list[str], answers: list, **config) -> list[float]:
    return from_reference(named(name, config))(["?"] * len(completions), completions, answer=answers)


def rows(shared_data, name: str) -> list[dict]:
    return [json.loads(line) for line in (shared_data / "verify" / name).read_text("utf-8").splitlines()]


def perturbed(solution: str) -> str:
    return re.sub(r"#### (.*)", lambda found: f"#### {int(found[1].replace(',', '')) + 1}", solution)


@pytest.mark.parametrize("name", ["math-answer", "numeric"])
def test_gsm8k_references_are_right_and_perturbed_ones_wrong(shared_data, name):
    solutions = [row["answer"] for row in rows(shared_data, "gsm8k_test_0_399.jsonl")]
    assert len(solutions) == 400
    assert score(name, solutions, solutions) == [1.0] * 400
    finals = [text.rpartition("#### ")[2] for text in solutions]
    assert score(name, solutions, finals) == [1.0] * 400
    assert score(name, [perturbed(text) for text in solutions], solutions) == [0.0] * 400


def test_math_500_solutions_are_right_and_another_problems_wrong(shared_data):
    problems = rows(shared_data, "math500_0_249.jsonl")
    solutions, answers = [row["solution"] for row in problems], [row["answer"] for row in problems]
    assert score("math-answer", solutions, answers) == [1.0] * 250
    others = score("math-answer", solutions[1:] + solutions[:1], answers)
    # Two neighbours have the same answer: 5 and x=5, 7 and 7.
    agreeing = [(answers[i], answers[(i + 1) % 250]) for i, right in enumerate(others) if right]
    assert agreeing == [("5", "x=5"), ("7", "7")]


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("so it is \\boxed{\\frac{1}{2}}", "0.5", 1),
        ("so it is \\boxed{1/3}", "0.5", 0),
        ("first \\boxed{3}, no, \\boxed{4}", "3", 0),
        ("#### Steps\n1. add\nThe answer is \\boxed{7}.", "7", 1),
        ("#### 2.\nso \\boxed{42}", "42", 1),
        ("#### 2.\nso \\boxed{42}", "2", 0),
        ("in a \\boxed answer:\n#### 2", "2", 1),
        ("it is $1,080\n#### $1,080", "1080", 1),
        ("#### 3\nNo:\n#### 4", "3", 0),
        ("\\boxed{(1, 2]}", "(1,2]", 1),
        ("\\boxed{(1, 2]}", "[1,2)", 0),
        ("", "3", 0),
        ("no idea", "3", 0),
        ("3", "", 0),
    ],
)
def test_an_answer_is_what_it_means(completion, answer, right):
    assert score("math-answer", [completion], [answer]) == [float(right)]


def test_hostile_mathematics_scores_nothing_in_bounded_time_and_the_next_is_judged():
    texts = [
        "\\boxed{9^{9^{9^{9}}}}",
        "\\boxed{" * 5000,
        "(" * 200_000,
        "\x00\ud800",
        "\\boxed{10^{10^{10}}!}",
        "\\boxed{4}",
    ]
    began = time.monotonic()
    assert score("math-answer", texts, ["4"] * 6, timeout=1) == [0, 0, 0, 0, 0, 1]
    assert time.monotonic() - began < 120


def test_a_checker_that_hangs_is_ended_and_the_next_answer_is_judged(monkeypatch):
    """Stopped, so that it uses no CPU time."""
    monkeypatch.setattr(math_checker, "PATIENCE", 0.25)
    assert score("math-answer", ["4"], ["4"], timeout=5) == [1.0]
    os.kill(checker._process.pid, signal.SIGSTOP)
    assert score("math-answer", ["4", "4"], ["4", "4"], timeout=5) == [0.0, 1.0]


@pytest.fixture
def child_in_which(monkeypatch):
    """The next child runs some lines first; `parse` is then math-verify's own, within its time limit."""

    def prepare(lines: str) -> None:
        checker.close()
        source = f"import time\nimport math_verify.parser as parser\nparse = parser.extract_target_from_pred\n{lines}"
        monkeypatch.setattr(math_checker, "START", f"exec({source!r})\n{math_checker.START}")

    yield prepare
    checker.close()


def test_the_first_answer_is_judged_as_the_next_whatever_a_fresh_child_takes_to_get_ready(child_in_which):
    child_in_which("""
def slow_at_first(*args, **kwargs):
    parser.extract_target_from_pred = parse
    until = time.process_time() + 1.3
    while time.process_time() < until: pass
    return parse(*args, **kwargs)
parser.extract_target_from_pred = slow_at_first
""")
    assert score("math-answer", ["4", "4"], ["4", "4"], timeout=1) == [1.0, 1.0]


def test_a_busy_machine_makes_no_right_answer_wrong(child_in_which):
    """What waits uses no CPU time."""
    child_in_which("""
def starved(text, *args, **kwargs):
    time.sleep(1.3 if text == "4" else 0)
    return parse(text, *args, **kwargs)
parser.extract_target_from_pred = starved
""")
    assert score("math-answer", ["4"], ["4"], timeout=1) == [1.0]


def test_one_call_into_c_without_end_is_ended_and_asked_once(child_in_which, tmp_path):
    began = tmp_path / "began"
    child_in_which(f"""
def endless(text, *args, **kwargs):
    if "6" in text:
        open({str(began)!r}, "a").write("x")
        any(iter(int, 1))
    return parse(text, *args, **kwargs)
parser.extract_target_from_pred = endless
""")
    assert score("math-answer", ["6", "4"], ["4", "4"], timeout=1) == [0.0, 1.0]
    assert began.read_text() == "x"


def test_a_verdict_that_came_too_late_is_not_the_next_question_s():
    """A preview's time is up while a question is with the child; its answer must not be read as another one's."""
    right, wrong = ("4", r"\boxed{4}"), ("4", r"\boxed{5}")
    assert checker.verdicts([right], timeout=3) == [True]
    os.kill(checker._process.pid, signal.SIGSTOP)
    with pytest.raises(RewardError, match="no answer within"), limited(0.2, "reward math-answer"):
        checker.verdicts([right], timeout=3)
    if checker._process is not None:
        os.kill(checker._process.pid, signal.SIGCONT)
    assert checker.verdicts([wrong, wrong, right, wrong], timeout=3) == [False, False, True, False]


def test_a_reward_s_time_limit_leaves_the_alarm_of_others_as_it_was():
    """A process has one timer: pytest-timeout's, or the notebook's own."""
    heard: list[float] = []
    handler = signal.signal(signal.SIGALRM, lambda *_: heard.append(time.monotonic()))
    mine = signal.setitimer(signal.ITIMER_REAL, 50.0, 7.0)
    try:
        with limited(30, "reward r"):
            time.sleep(0.05)
        left, every = signal.getitimer(signal.ITIMER_REAL)
        assert 0 < left <= 49.95 and every == 7.0 and not heard
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        with limited(30, "reward r"):
            time.sleep(0.1)
        deadline = time.monotonic() + 10
        while not heard and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(heard) == 1, "late rather than never"
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *mine)


def test_a_checker_that_died_is_started_again():
    assert score("math-answer", ["4"], ["4"]) == [1.0]
    checker._process.kill()
    checker._process.wait()
    assert score("math-answer", ["4"], ["4"]) == [1.0]


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("first 3, then 4", 4, 1),
        ("first 4, then 3", 4, 0),
        ("1,234.50 dollars", "1234.5", 1),
        ("-2", 2, 0),
        ("2e3", 2000, 1),
        ("none", 0, 0),
        ("0.0000001", 0, 1),
        ("1000001", 1000000, 1),
        ("1000010", 1000000, 0),
        ("9" * 400, 4, 0),
    ],
)
def test_the_last_number_counts(completion, answer, right):
    assert score("numeric", [completion], [answer]) == [float(right)]


def test_an_answer_without_a_number_is_the_rows_fault():
    with pytest.raises(RewardError, match=r"^reward numeric: answer='blue' holds no number; correct the row$"):
        score("numeric", ["3"], ["blue"])


def test_exact_match_is_exact_but_for_white_space():
    assert score("exact-match", [" Paris\n", "paris", "Paris, France"], ["Paris"] * 3) == [1.0, 0.0, 0.0]
    assert score("exact-match", ["paris"], ["Paris"], ignore_case=True) == [1.0]
    assert score("exact-match", ["b", "c"], [["a", "b"], ["a", "b"]]) == [1.0, 0.0]
