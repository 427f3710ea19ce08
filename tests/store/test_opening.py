"""Opening a workspace: made once, upgraded under a lock, refused in words."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote_plus

import pytest
import sqlalchemy as sa

from rlhf_nb.errors import SchemaError, SpecError, StorageError, StoreError
from rlhf_nb.store import Store
from rlhf_nb.store.engine import locate, make_engine

ROOT = Path(__file__).resolve().parents[2]


def test_a_workspace_keeps_its_id(target):
    with Store.open(target) as store:
        first = store.workspace_id
    with Store.open(target) as store:
        assert store.workspace_id == first


def test_two_workspaces_have_different_ids(tmp_path):
    with Store.open(tmp_path / "one") as one, Store.open(tmp_path / "other") as other:
        assert one.workspace_id != other.workspace_id


def test_the_directory_is_made_with_its_parents(tmp_path):
    with Store.open(tmp_path / "a" / "b%20" / "ü") as store:
        assert store.directory == tmp_path / "a" / "b%20" / "ü"
        assert (store.directory / "workspace.db").is_file()


def test_sqlite_is_durable_and_lets_readers_pass(directory_store):
    with directory_store._read() as connection:
        pragma = lambda name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()  # noqa: E731
        assert pragma("journal_mode") == "wal"
        assert pragma("synchronous") == 2  # FULL
        assert pragma("foreign_keys") == 1


def test_what_is_kept_under_a_beginning_is_listed_as_it_is_written(store):
    for key in ("round b", "round a", "round_a", "rounds", "round 100 %"):
        store.keep_first(key, "x")
    assert store.kept("round ") == ["100 %", "a", "b"] and store.kept("round_") == ["a"] and store.kept("no") == []


def test_the_migrations_build_exactly_the_declared_tables(store):
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    from rlhf_nb.store.schema import metadata

    with store._read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_the_declared_head_is_the_newest_migration():
    from alembic.script import ScriptDirectory

    from rlhf_nb.store.migrate import alembic_config
    from rlhf_nb.store.schema import HEAD

    assert ScriptDirectory.from_config(alembic_config()).get_heads() == [HEAD]


def test_a_newer_schema_is_refused_in_words_and_left_alone(target):
    with Store.open(target) as store:
        store.append_audit("import", "hh")
        engine = store._engine
        with engine.begin() as connection:
            connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9000'")
        with pytest.raises(SchemaError, match=r'has schema "9000", newer than "0001".*upgrade rlhf_nb'):
            Store.open(target)
        with engine.begin() as connection:
            assert connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar() == "9000"
            assert connection.exec_driver_sql("SELECT count(*) FROM audit").scalar() == 1


def test_a_database_of_something_else_is_refused_and_left_alone(tmp_path):
    with sqlite3.connect(tmp_path / "workspace.db") as connection:
        connection.execute("CREATE TABLE recipes (name TEXT)")
    connection.close()
    with pytest.raises(SchemaError, match="holds other tables \\(recipes\\) and no workspace"):
        Store.open(tmp_path)
    with sqlite3.connect(tmp_path / "workspace.db") as connection:
        assert [row[0] for row in connection.execute("SELECT name FROM sqlite_master")] == ["recipes"]
    connection.close()


def test_a_file_that_is_no_database_is_refused(tmp_path):
    (tmp_path / "workspace.db").write_text("these are not the bytes you are looking for" * 100)
    with pytest.raises(SchemaError, match=r"workspace.db is not a sound SQLite database"):
        Store.open(tmp_path)


def test_a_file_in_the_way_of_the_directory_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        StorageError, match=r"cannot make the workspace directory .*file.*: a file of that name is in the way"
    ):
        Store.open(tmp_path / "file")


def test_an_interrupted_creation_is_started_again(tmp_path):
    sqlite3.connect(tmp_path / "workspace.db").close()
    (tmp_path / "workspace.db").touch()
    with Store.open(tmp_path) as store:
        assert store.datasets() == []


def test_a_failed_upgrade_leaves_nothing_behind(target, monkeypatch):
    def power_cut(*_):
        raise RuntimeError("after the tables, before the triggers")

    monkeypatch.setattr("alembic.op.execute", power_cut)
    with pytest.raises(RuntimeError):
        Store.open(target)
    monkeypatch.undo()
    place = locate(target)
    engine = make_engine(place, 1.0)
    with engine.connect() as connection:
        assert sa.inspect(connection).get_table_names() == []
    engine.dispose()
    with Store.open(target) as store:
        assert store.verify_audit()


def test_a_closed_workspace_says_so(store):
    store.close()
    store.close()
    with pytest.raises(StoreError, match="is closed; open it again"):
        store.runs()


@pytest.mark.parametrize("url", ["mysql://u@h/d", "sqlite://", "postgresql+nonsense://u@h:port/d"])
def test_other_databases_are_refused(url):
    with pytest.raises(SpecError, match="workspace"):
        Store.open(url)


def test_a_server_that_does_not_answer_is_one_line_without_the_password(tmp_path):
    with pytest.raises(StoreError) as caught:
        Store.open(f"postgresql://me:hunter2@/db?host={tmp_path}", lock_timeout_s=0.5)
    message = str(caught.value)
    assert "cannot open the workspace" in message and "check that the server runs" in message
    assert "hunter2" not in message and "\n" not in message


def test_a_password_is_never_shown(postgres_server):
    with Store.open(postgres_server()) as store:
        assert store.directory is None
        assert "secret" not in repr(store) and "secret" not in store.location


SECRETS = "password=hunter2&sslpassword=hunter3&passfile=/hunter4&oauth_client_secret=hunter5&scram_client_key=hunter6"


def test_what_is_secret_in_a_query_is_given_to_the_driver_and_never_shown(tmp_path):
    url = f"postgresql://me@/db?host={tmp_path}&sslmode=disable&{SECRETS}"
    place = locate(url)
    assert place.shown == f"postgresql://me@/db?host={quote_plus(str(tmp_path))}&sslmode=disable"
    assert place.secrets == dict(pair.split("=") for pair in SECRETS.split("&"))
    given: list[dict[str, object]] = []
    engine = make_engine(place, 1.0)
    sa.event.listen(engine, "do_connect", lambda dialect, record, args, params: given.append(params))
    with pytest.raises(sa.exc.OperationalError) as refused, engine.connect():
        pass
    assert given[0].items() >= place.secrets.items() and given[0]["host"] == str(tmp_path)
    with pytest.raises(StoreError) as caught:
        Store.open(url, lock_timeout_s=0.5)
    assert "hunter" not in repr(place) + repr(engine) + str(refused.value) + str(caught.value)


def test_a_password_in_the_query_opens_the_workspace(postgres_server):
    with Store.open(f"{postgres_server().replace(':secret@', '@')}&password=secret") as store:
        assert store.verify_audit() and "secret" not in store.location + repr(store)


def test_importing_the_package_loads_no_database_library():
    code = (
        "import sys, rlhf_nb.store, rlhf_nb.data.importers, rlhf_nb.data.dataset, rlhf_nb.labelling.session, "
        "rlhf_nb.labelling.fold, rlhf_nb.statistics\n"
        "heavy = {'sqlalchemy', 'alembic', 'pandas', 'pyarrow', 'datasets', 'numpy', 'scipy', 'torch'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


BEGINS = """
import sys
import sqlalchemy as sa
from rlhf_nb.store import Store
from rlhf_nb.store.engine import WRITE
loaded = []
@sa.event.listens_for(sa.Engine, "begin")
def begin(connection):
    if connection.get_execution_options().get(WRITE):
        loaded.append("alembic.command" in sys.modules)
Store.open(sys.argv[1]).close()
print(loaded[0])
"""


def test_nobody_waits_for_the_write_lock_while_alembic_loads(tmp_path):
    found = subprocess.run(
        [sys.executable, "-c", BEGINS, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "True"


def test_opening_a_current_workspace_does_not_load_alembic(tmp_path):
    Store.open(tmp_path).close()
    code = "import sys; from rlhf_nb.store import Store; Store.open(sys.argv[1]); print('alembic' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
