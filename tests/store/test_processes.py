"""Several processes on one workspace, and processes that die."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from rlhf_nb.errors import StoreLockedError
from rlhf_nb.store import Store

ITEMS = [{"prompt": f"p{i}", "a": "x", "b": "y"} for i in range(400)]


def _together(start_python, code, target, count=4):
    """Run the code in several processes that wait for one word before they begin."""
    processes = [start_python(code, target, str(number)) for number in range(count)]
    for process in processes:
        assert process.stdout.readline().strip() == "ready"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=120)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0] * count
    return outputs


PRELUDE = """
import sys
from rlhf_nb.store import Store
from rlhf_nb.store import store as loaded
print("ready", flush=True)
sys.stdin.readline()
"""
# Three others before it may take longer than a person would wait, on a machine that does other things too.
OPEN = "with Store.open(sys.argv[1], lock_timeout_s=60) as store:"


def test_several_processes_may_make_the_same_workspace(start_python, target):
    code = PRELUDE + OPEN + "print(store.workspace_id)"
    outputs = _together(start_python, code, target)
    assert len({word for words in outputs for word in words}) == 1


def test_run_ids_are_never_given_twice(start_python, store, target):
    code = PRELUDE + OPEN + "print(*[store.next_run_id('ppo') for _ in range(10)])"
    taken = [word for words in _together(start_python, code, target) for word in words]
    assert sorted(taken, key=lambda run_id: int(run_id[4:])) == [f"ppo-{number}" for number in range(1, 41)]


def test_the_audit_chain_has_one_order(start_python, store, target):
    append = "for i in range(10): store.append_audit('set', sys.argv[2], {'i': i})"
    code = PRELUDE + OPEN + f"\n    {append}"
    _together(start_python, code, target)
    check = store.verify_audit()
    assert check.ok and check.n == 40


def test_the_same_dataset_from_many_is_one_version(start_python, store, target):
    add = "store.add_dataset('p', 'prompts', [{'prompt': 'x'}] * 50)"
    code = PRELUDE + OPEN + f"print({add}.version)"
    assert _together(start_python, code, target) == [["1"]] * 4


def test_the_same_answer_sent_by_many_is_one_row(start_python, store, target):
    (task,) = store.create_tasks("hh", ITEMS[:1])
    submit = f"store.submit_label({task}, 'same', 'a', annotator='mira')"
    code = PRELUDE + OPEN + f"print({submit}.id)"
    ids = {word for words in _together(start_python, code, target) for word in words}
    assert len(ids) == len(store.label_log("hh")) == 1


def test_threads_share_a_store(store):
    store.create_tasks("hh", ITEMS[:40])
    tasks = store.tasks("hh")

    def answer(part):
        for task in tasks[part::4]:
            store.submit_label(task.id, f"c{task.id}", "a", annotator="mira")

    threads = [threading.Thread(target=answer, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.label_progress("hh", "mira").done == 40


def test_labels_survive_kill_9_of_the_process_that_writes_them(start_python, store, target):
    store.create_tasks("hh", ITEMS)
    process = start_python(
        """
        import sys
        from rlhf_nb.store import Store
        store = Store.open(sys.argv[1])
        while (task := store.next_task("hh", "mira")) is not None:
            print(store.submit_label(task.id, f"c{task.id}", "a", annotator="mira").client_id, flush=True)
        """,
        target,
    )
    acknowledged = [process.stdout.readline().strip() for _ in range(20)]
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=30) == -signal.SIGKILL
    acknowledged += process.stdout.read().split()
    with Store.open(target) as again:
        kept = [row.client_id for row in again.label_log("hh")]
        # The one whose acknowledgement was on its way may be there too.
        assert kept[: len(acknowledged)] == acknowledged and len(kept) - len(acknowledged) in (0, 1)
        if again.directory is not None:
            with again._read() as connection:
                assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
        task = again.next_task("hh", "mira")
        assert again.submit_label(task.id, "afterwards", "b", annotator="mira").id


HOLD = """
import sys
from rlhf_nb.store import Store
store = Store.open(sys.argv[1])
with store._write(serial="labels") as connection:
    connection.exec_driver_sql("INSERT INTO meta (key, value) VALUES ('half', 'done')")
    print("holding", flush=True)
    sys.stdin.readline()
"""


def test_a_lock_held_too_long_is_said_and_the_answer_can_be_sent_again(start_python, target):
    with Store.open(target, lock_timeout_s=0.3) as store:
        (task,) = store.create_tasks("hh", ITEMS[:1])
        holder = start_python(HOLD, target)
        assert holder.stdout.readline().strip() == "holding"
        with pytest.raises(
            StoreLockedError, match=r"another process held its write lock for more than 0.3 s"
        ) as caught:
            store.submit_label(task, "c1", "a", annotator="mira")
        assert store.location in str(caught.value) and "\n" not in str(caught.value)
        assert isinstance(caught.value, TimeoutError)
        assert store.label_progress("hh", "mira").done == 0  # readers pass
        holder.send_signal(signal.SIGKILL)
        holder.wait(timeout=30)
        deadline = time.monotonic() + 30
        while True:  # PostgreSQL notices a dead client in its own time
            try:
                store.submit_label(task, "c1", "a", annotator="mira")
                break
            except StoreLockedError:
                assert time.monotonic() < deadline
        assert [row.client_id for row in store.label_log("hh")] == ["c1"]
        assert store.keep_first("half", "not there") == "not there"
