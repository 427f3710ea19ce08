"""Full disks and read-only file systems: one line, and the database stays sound."""

from __future__ import annotations

import errno
import subprocess
from pathlib import Path

import pytest

from rlhf_nb.errors import StorageError
from rlhf_nb.store import Store
from rlhf_nb.store.borders import storage_border

ROWS = [{"prompt": f"{i} {'x' * 200} {hash(('salt', i))}"} for i in range(4000)]


def _pragma_on_every_connection(store, pragma):
    """Make SQLite itself refuse, as it does when the disk is full or read-only."""
    import sqlalchemy as sa

    store._engine.dispose()
    sa.event.listen(store._engine, "connect", lambda connection, _: connection.execute(pragma))


def test_a_full_database_keeps_what_it_had(directory_store):
    (task, other) = directory_store.create_tasks(
        "hh", [{"prompt": "p", "a": "x", "b": "y"}, {"prompt": "q", "a": "x", "b": "y"}]
    )
    directory_store.submit_label(task, "c1", "a", annotator="mira")
    _pragma_on_every_connection(directory_store, "PRAGMA max_page_count=1")
    with pytest.raises(StorageError, match=r"workspace.db: no space left on its disk: free some") as caught:
        directory_store.add_dataset("big", "prompts", ROWS)
    assert caught.value.errno == errno.ENOSPC and "\n" not in str(caught.value)
    with Store.open(directory_store.directory) as again:
        assert again.datasets() == []
        assert [row.client_id for row in again.label_log("hh")] == ["c1"]
        again.submit_label(other, "c2", "a", annotator="mira")
        again.add_dataset("big", "prompts", ROWS)


def test_a_database_that_turned_read_only_says_so(directory_store):
    (task,) = directory_store.create_tasks("hh", [{"prompt": "p", "a": "x", "b": "y"}])
    _pragma_on_every_connection(directory_store, "PRAGMA query_only=ON")
    with pytest.raises(
        StorageError, match=r"workspace.db: its file system is read-only: choose another place"
    ) as caught:
        directory_store.submit_label(task, "c1", "a", annotator="mira")
    assert caught.value.errno == errno.EROFS
    assert directory_store.next_task("hh", "mira").id == task
    with Store.open(directory_store.directory) as again:
        again.submit_label(task, "c1", "a", annotator="mira")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "no space left"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EMFILE, "EMFILE"),
    ],
)
def test_the_file_system_refuses_the_directory_in_one_line(tmp_path, monkeypatch, code, words):
    def refuse(self, *_, **__):
        raise OSError(code, "refused", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StorageError, match=f"cannot make the workspace directory {tmp_path}/w.*{words}") as caught:
        Store.open(tmp_path / "w")
    assert isinstance(caught.value, OSError) and caught.value.errno == code


def test_a_storage_error_passes_a_border_unchanged(tmp_path):
    inner = StorageError("said already")
    with pytest.raises(StorageError) as caught, storage_border(tmp_path):
        raise inner
    assert caught.value is inner


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 600 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system is not permitted here; the PRAGMA tests stand for it")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_up_loses_nothing_acknowledged(small_disk):
    acknowledged = 0
    with Store.open(small_disk) as store:
        ids = store.create_tasks("hh", [{"prompt": f"p{i}", "a": "x", "b": "y"} for i in range(200)])
        with pytest.raises(StorageError, match="no space left on its disk"):
            for number, task in enumerate(ids):
                provenance = {"padding": "x" * 20_000}
                store.submit_label(task, f"c{number}", "a", annotator="mira", provenance=provenance)
                acknowledged += 1
    assert 0 < acknowledged < 200
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    with Store.open(small_disk) as store:
        assert store.label_progress("hh", "mira").done == acknowledged
        store.submit_label(ids[acknowledged], f"c{acknowledged}", "a", annotator="mira")


def test_a_workspace_on_a_read_only_disk_is_refused_in_one_line(small_disk):
    with Store.open(small_disk) as store:
        store.append_audit("import", "hh")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StorageError, match=r"workspace.db: ") as caught:
        Store.open(small_disk)
    assert "\n" not in str(caught.value)
    with pytest.raises(StorageError, match="read-only"):
        Store.open(small_disk / "new")
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    with Store.open(small_disk) as store:
        assert store.verify_audit().n == 1
