"""The label log: committed before acknowledged, never edited."""

from __future__ import annotations

import pytest

from rlhf_nb.errors import NotFoundError, StoreError

ITEMS = [{"prompt": f"p{i}", "a": "x", "b": "y"} for i in range(4)]


@pytest.fixture
def tasks(store):
    return store.create_tasks("hh", ITEMS, source="data:hh@1")


def test_tasks_keep_the_order_of_their_items(store, tasks):
    assert [task.item["prompt"] for task in store.tasks("hh")] == ["p0", "p1", "p2", "p3"]
    assert store.task(tasks[1]).source == "data:hh@1"
    assert store.queues() == ["hh"]


def test_running_the_cell_again_makes_no_new_tasks(store, tasks):
    assert store.create_tasks("hh", [*ITEMS, {"prompt": "p4", "a": "x", "b": "y"}])[:4] == tasks
    assert len(store.tasks("hh")) == 5


def test_the_same_item_twice_is_two_tasks(store):
    one, two = store.create_tasks("twice", [ITEMS[0], ITEMS[0]])
    assert one != two
    assert store.create_tasks("twice", [ITEMS[0], ITEMS[0]]) == [one, two]


def test_a_label_is_there_when_the_call_returns(store, target, tasks):
    from rlhf_nb.store import Store

    store.submit_label(
        tasks[0],
        "c1",
        "a",
        annotator="mira",
        seconds=1.5,
        rubric={"honest": "a"},
        side={"first": "b"},
        provenance={"tool": "t"},
    )
    with Store.open(target) as other:
        (found,) = other.labels("hh")
    assert (found.task.id, found.label.choice, found.label.seconds) == (tasks[0], "a", 1.5)
    assert (found.label.rubric, found.label.side, found.label.provenance) == (
        {"honest": "a"},
        {"first": "b"},
        {"tool": "t"},
    )


def test_a_resend_gives_the_row_that_is_there(store, tasks):
    first = store.submit_label(tasks[0], "c1", "a", annotator="mira")
    assert store.submit_label(tasks[0], "c1", "a", annotator="mira") == first
    assert len(store.label_log("hh")) == 1


def test_a_client_id_of_another_answer_is_refused(store, tasks):
    store.submit_label(tasks[0], "c1", "a", annotator="mira")
    with pytest.raises(StoreError, match="client_id='c1' was used for task"):
        store.submit_label(tasks[1], "c1", "a", annotator="mira")


def test_undo_appends_a_row_and_the_task_is_next_again(store, tasks):
    label = store.submit_label(tasks[0], "c1", "a", annotator="mira")
    assert store.next_task("hh", "mira").id == tasks[1]
    undo = store.undo_label(tasks[0], "c2", annotator="mira")
    assert (undo.choice, undo.supersedes) == (None, label.id)
    assert store.undo_label(tasks[0], "c2", annotator="mira") == undo
    assert store.labels("hh") == []
    assert store.next_task("hh", "mira").id == tasks[0]
    assert [row.id for row in store.label_log("hh")] == [label.id, undo.id]


def test_nothing_can_be_taken_back_twice(store, tasks):
    with pytest.raises(StoreError, match="no answer to take back"):
        store.undo_label(tasks[0], "c0", annotator="mira")
    store.submit_label(tasks[0], "c1", "a", annotator="mira")
    store.undo_label(tasks[0], "c2", annotator="mira")
    with pytest.raises(StoreError, match="no answer to take back"):
        store.undo_label(tasks[0], "c3", annotator="mira")


def test_a_second_thought_supersedes_the_first(store, tasks):
    first = store.submit_label(tasks[0], "c1", "a", annotator="mira")
    second = store.submit_label(tasks[0], "c2", "b", annotator="mira")
    assert second.supersedes == first.id
    assert [each.label.choice for each in store.labels("hh")] == ["b"]
    assert store.label_progress("hh", "mira").done == 1


def test_annotators_do_not_see_each_other(store, tasks):
    store.submit_label(tasks[0], "c1", "a", annotator="mira")
    store.submit_label(tasks[1], "c2", "skip", annotator="mira")
    store.submit_label(tasks[0], "c3", "tie", annotator="omar")
    assert store.next_task("hh", "mira").id == tasks[2]
    assert store.next_task("hh", "omar").id == tasks[1]
    progress = store.label_progress("hh", "mira")
    assert (progress.done, progress.total, progress.remaining, progress.choices) == (2, 4, 2, {"a": 1, "skip": 1})
    assert [(each.task.position, each.label.annotator) for each in store.labels("hh")] == [
        (0, "mira"),
        (0, "omar"),
        (1, "mira"),
    ]
    assert len(store.labels("hh", annotator="omar")) == 1


def test_a_finished_queue_has_no_next_task(store, tasks):
    for number, task in enumerate(tasks):
        store.submit_label(task, f"c{number}", "a", annotator="mira")
    assert store.next_task("hh", "mira") is None


def test_an_unknown_queue_or_task_is_named(store, tasks):
    with pytest.raises(NotFoundError, match=r"no labelling queue 'hhh' in this workspace; did you mean \"hh\"\?"):
        store.next_task("hhh", "mira")
    with pytest.raises(NotFoundError, match="no labelling task 999"):
        store.submit_label(999, "c1", "a", annotator="mira")
    with pytest.raises(NotFoundError, match="no labelling task 999"):
        store.task(999)


def test_an_empty_answer_is_refused(store, tasks):
    with pytest.raises(StoreError, match="choice=''"):
        store.submit_label(tasks[0], "c1", "", annotator="mira")


@pytest.mark.parametrize("statement", ["UPDATE labels SET choice = 'b'", "DELETE FROM labels"])
def test_the_database_itself_refuses_to_edit_labels(store, tasks, statement):
    store.submit_label(tasks[0], "c1", "a", annotator="mira")
    with pytest.raises(StoreError, match="labels is append-only"), store._write() as connection:
        connection.exec_driver_sql(statement)
    assert store.labels("hh")[0].label.choice == "a"
