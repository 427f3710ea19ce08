"""Labels add up to a data set or a win rate."""

from __future__ import annotations

import pytest

from rlhf_nb.data.rows import content_hash
from rlhf_nb.errors import NotFoundError, ShapeError
from rlhf_nb.labelling.fold import pairs_from_labels, win_rate
from rlhf_nb.labelling.session import LabelSession, autolabel


def _answer(session, *answers):
    """Answer the next tasks: "good" or "bad" for the side that holds it, or "tie" or "skip"."""
    for said in answers:
        shown = session.current
        side = {"tie": "tie", "skip": "skip"}.get(said) or ("1" if shown.first.startswith(said) else "2")
        session.submit(f"{session.annotator} {shown.task_id} {said}", side, task_id=shown.task_id)


def test_answers_become_rows_and_ties_and_skips_are_counted(session):
    _answer(session, "good", "bad", "tie", "skip", "good")
    folded = pairs_from_labels(session.labels)
    assert folded.rows == [
        {"prompt": "question 0", "chosen": "good 0", "rejected": "bad 0"},
        {"prompt": "question 1", "chosen": "bad 1", "rejected": "good 1"},
        {"prompt": "question 4", "chosen": "good 4", "rejected": "bad 4"},
    ]
    assert folded.dropped == {"tie": 1, "skip": 1}
    assert folded.summary == "3 pairs from 5 labels by mira; left out 2: skip (1), tie (1)"


def test_an_undone_answer_is_no_row(session):
    _answer(session, "good", "bad")
    session.undo("u")
    assert len(pairs_from_labels(session.labels).rows) == 1


def test_annotators_vote(store, session):
    others = [LabelSession(store, session.queue, annotator=name) for name in ("omar", "ines")]
    _answer(session, "good", "good", "good", "tie")
    _answer(others[0], "bad", "bad", "skip", "skip")
    _answer(others[1], "good")
    folded = pairs_from_labels(store.labels(session.queue))
    assert [row["chosen"] for row in folded.rows] == ["good 0", "good 2"]
    assert folded.dropped == {"annotators disagree": 1, "tie": 1}


def test_the_same_labels_have_the_same_hash_whatever_their_order(session):
    _answer(session, *["good", "bad"] * 5)
    labels = session.labels
    assert content_hash(pairs_from_labels(labels).rows) == content_hash(pairs_from_labels(labels[::-1]).rows)


def test_a_simulated_annotator_is_named_in_the_summary(session):
    autolabel(session, lambda prompt, a, b: "a", name="toy-annotator", limit=2)
    folded = pairs_from_labels(session.labels)
    assert folded.simulated == ("toy-annotator",) and folded.summary.endswith("simulated annotator: toy-annotator")


def test_no_labels_are_no_rows():
    assert pairs_from_labels([]).rows == []


def test_a_tie_is_half_a_win_and_a_skip_is_none(session):
    _answer(session, "good", "good", "good", "bad", "tie", "tie", "skip")
    estimate = win_rate(session.labels, "ppo-1")
    assert (estimate.value, estimate.n) == (4 / 6, 6)
    assert estimate.interval.low < 0.5 < estimate.value < estimate.interval.high
    assert win_rate(session.labels, "toy-sft", against="ppo-1").value == pytest.approx(2 / 6)


def test_a_win_rate_of_nothing_says_so(session):
    with pytest.raises(NotFoundError, match="no label compares 'ppo-1'; label a pair first"):
        win_rate([], "ppo-1")
    _answer(session, "skip")
    with pytest.raises(NotFoundError, match=r'no label compares .ppo1.; did you mean "ppo-1"\?'):
        win_rate(session.labels, "ppo1")
    with pytest.raises(NotFoundError, match="no label compares 'ppo-1' with 'base'"):
        win_rate(session.labels, "ppo-1", against="base")
    with pytest.raises(ShapeError, match="0 comparisons"):
        win_rate(session.labels, "ppo-1")
