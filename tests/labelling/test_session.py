"""One annotator in a queue: blind sides, committed answers, undo, resume."""

from __future__ import annotations

import pytest

from rlhf_nb.errors import DataError, NotFoundError, StoreLockedError
from rlhf_nb.labelling.items import model_items, pair_items
from rlhf_nb.labelling.session import AUTOLABEL, LabelSession, autolabel
from rlhf_nb.store import Store


def test_the_first_task_shows_both_sides_and_no_source(session):
    shown = session.current
    assert (shown.prompt, shown.position, shown.total) == ("question 0", 0, 60)
    assert {shown.first, shown.second} == {"good 0", "bad 0"}
    assert "ppo" not in repr(shown) and "toy-sft" not in repr(shown)


def test_sides_are_the_same_each_time_and_differ_between_annotators(store, session):
    again = LabelSession(store, session.queue, annotator="mira")
    other = LabelSession(store, session.queue, annotator="omar")
    tasks = store.tasks(session.queue)
    orders = [session.order(task) for task in tasks]
    assert orders == [again.order(task) for task in tasks]
    assert orders != [other.order(task) for task in tasks]
    assert 15 < orders.count(("a", "b")) < 45


def test_a_choice_is_kept_for_the_side_that_was_shown(session, good):
    for number in range(60):
        shown = session.current
        ack = session.submit(f"c{number}", good(shown), task_id=shown.task_id, seconds=1.0)
        assert ack.saved and ack.task_id == shown.task_id
    assert session.current is None
    assert [each.label.choice for each in session.labels] == ["a"] * 60
    assert {each.label.side["first"] for each in session.labels} == {"a", "b"}
    for each in session.labels:
        side = each.label.side
        assert side[side["chosen"]] == "a"


@pytest.mark.parametrize(("said", "kept"), [("tie", "tie"), ("t", "tie"), ("skip", "skip"), ("S", "skip")])
def test_ties_and_skips_have_no_side(session, said, kept):
    session.submit("c", said)
    assert session.labels[0].label.choice == kept
    assert session.progress.choices == {kept: 1}


@pytest.mark.parametrize(("letter", "number"), [("A", "1"), ("B", "2"), ("a", 1), ("b", 2)])
def test_letters_mean_the_sides_as_shown(store, session, letter, number):
    session.submit("c1", letter)
    session.undo("u")
    session.submit("c2", number)
    choices = [row.choice for row in store.label_log(session.queue) if row.choice]
    assert choices[0] == choices[1]


def test_the_provenance_says_who_when_how_and_with_what(session):
    from rlhf_nb import __version__

    session.submit("c", "1", seconds=2.5)
    label = session.labels[0].label
    assert label.annotator == "mira" and label.seconds == 2.5 and label.created.endswith("+00:00")
    assert label.provenance["tool"] == f"rlhf_nb {__version__}"
    assert label.provenance["mode"] == "pair" and label.provenance["seed"] == 0
    assert "simulated" not in label.provenance


def test_a_rubric_is_unrandomised_like_the_choice(session):
    shown = session.current
    first = "a" if shown.first.startswith("good") else "b"
    second = "b" if first == "a" else "a"
    session.submit("c", "1", rubric={"helpful": "1", "honest": "2", "harmless": "tie", "concise": 3})
    assert session.labels[0].label.rubric == {"helpful": first, "honest": second, "harmless": "tie", "concise": 3}


def test_a_resend_is_the_same_answer(session):
    shown = session.current
    first = session.submit("c", "1", task_id=shown.task_id)
    assert session.submit("c", "1", task_id=shown.task_id) == first
    assert session.progress.done == 1


def test_undo_brings_the_last_task_back(session):
    tasks = []
    for number in range(3):
        tasks.append(session.current.task_id)
        session.submit(f"c{number}", "1")
    assert session.undo("u1").task_id == tasks[2] == session.current.task_id
    assert session.undo("u1").task_id == tasks[2]  # a resend takes back nothing more
    assert session.progress.done == 2
    assert session.undo("u2").task_id == tasks[1] == session.current.task_id
    assert session.undo("u3").task_id == tasks[0]
    assert session.undo("u4") is None


def test_undo_never_touches_another_annotator(store, session):
    other = LabelSession(store, session.queue, annotator="omar")
    session.submit("c1", "1")
    other.submit("c2", "2")
    session.undo("u")
    assert (session.progress.done, other.progress.done) == (0, 1)


def test_a_new_session_goes_on_at_the_first_unanswered_task(session, good):
    directory = session.store.directory
    for number in range(5):
        session.submit(f"c{number}", "1")
    shown = session.current
    session.store.close()
    with Store.open(directory) as store:
        again = LabelSession(store, session.queue, annotator="mira")
        assert again.current == shown
        assert again.progress.done == 5


def test_an_answer_on_its_way_during_a_restart_still_means_the_side_that_was_shown(session, good):
    shown = session.current
    said = good(shown)
    again = LabelSession(session.store, session.queue, annotator="mira", seed=12345)
    assert again.seed == session.seed
    again.submit("c", said, task_id=shown.task_id)
    assert again.labels[0].label.choice == "a"


def test_an_answer_that_met_a_lock_can_be_sent_again(session):
    shown = session.current
    with Store.open(session.store.directory) as other, other._write():
        with pytest.raises(StoreLockedError):
            session.submit("c", "1", task_id=shown.task_id)
        assert session.current == shown
    session.submit("c", "1", task_id=shown.task_id)
    assert session.progress.done == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"choice": "3"}, "choice='3' is not an answer; use 1, 2, tie or skip"),
        ({"choice": ""}, "choice='' is not an answer"),
        ({"seconds": -1}, "seconds=-1 is not a time"),
        ({"seconds": float("nan")}, "seconds=nan is not a time"),
        ({"rubric": {"helpfull": "1"}}, r'criterion .helpfull. does not exist; did you mean "helpful"\?'),
    ],
)
def test_a_bad_answer_is_refused_and_nothing_kept(session, change, words):
    arguments = {"choice": "1", **change}
    with pytest.raises(DataError, match=words):
        session.submit("c", **arguments)
    assert session.store.label_log(session.queue) == []


def test_a_task_of_another_queue_is_refused(store, session):
    other = LabelSession(
        store, "other", pair_items([{"prompt": "p", "chosen": "c", "rejected": "r"}], "pairs"), annotator="mira"
    )
    with pytest.raises(NotFoundError, match="belongs to queue 'other'"):
        session.submit("c", "1", task_id=other.current.task_id)


def test_a_finished_queue_takes_no_answer(store):
    session = LabelSession(
        store, "one", pair_items([{"prompt": "p", "chosen": "c", "rejected": "r"}], "pairs"), annotator="mira"
    )
    session.submit("c1", "1")
    with pytest.raises(NotFoundError, match="has no unanswered task for mira"):
        session.submit("c2", "1")


def test_an_unknown_queue_is_said_at_once(store):
    with pytest.raises(NotFoundError, match="no labelling queue 'nothing'"):
        LabelSession(store, "nothing", annotator="mira")


def test_bad_items_are_named(store):
    for item, words in (
        ({"prompt": "", "a": "x", "b": "y"}, "item 0: prompt="),
        ({"prompt": "p", "a": "x"}, "item 0: b=None"),
    ):
        with pytest.raises(DataError, match=words):
            LabelSession(store, "bad", [item], annotator="mira")
    assert store.queues() == []


def test_a_simulated_annotator_answers_and_the_provenance_says_so(session, monkeypatch):
    monkeypatch.setenv(AUTOLABEL, "toy-annotator")
    choose = lambda prompt, a, b: "a" if a.startswith("good") else "b"  # noqa: E731
    assert autolabel(session, choose, limit=10) == 10
    assert autolabel(session, choose) == 50
    assert autolabel(session, choose) == 0
    assert session.progress.choices == {"a": 60}
    assert {each.label.provenance["simulated"] for each in session.labels} == {"toy-annotator"}


def test_a_simulated_annotator_that_answers_nonsense_is_named(session):
    with pytest.raises(DataError, match="annotator odd answered 'left'"):
        autolabel(session, lambda prompt, a, b: "left", name="odd")


def test_items_come_from_pairs_rankings_and_models():
    (item,) = pair_items([{"prompt": "p", "chosen": "c", "rejected": "r"}], "pairs")
    assert item == {"prompt": "p", "a": "c", "b": "r", "a_from": "chosen", "b_from": "rejected"}
    ranking = {"prompt": "p", "completions": ["x", "y", "z"], "ranks": [1, 0, 2]}
    assert [(i["a"], i["b"]) for i in pair_items([ranking], "rankings")] == [("x", "y"), ("x", "z"), ("y", "z")]
    assert model_items(["p", "q"], ["same", "a"], ["same ", "b"], ("m", "n")) == [
        {"prompt": "q", "a": "a", "b": "b", "a_from": "m", "b_from": "n"}
    ]
    with pytest.raises(DataError, match="demonstrations hold no two completions"):
        pair_items([], "demonstrations")
    with pytest.raises(DataError, match="2 prompts, 1 and 2 completions"):
        model_items(["p", "q"], ["a"], ["a", "b"], ("m", "n"))
    with pytest.raises(DataError, match="both models are called 'm'"):
        model_items([], [], [], ("m", "m"))
