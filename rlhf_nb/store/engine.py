"""Opening a database: one place that knows SQLite from PostgreSQL."""

from __future__ import annotations

import contextlib
import re
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa
from sqlalchemy.engine import URL, make_url

from rlhf_nb.errors import SpecError, StoreError, StoreLockedError, UnavailableError
from rlhf_nb.store.borders import database_border, storage_border

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

DATABASE_FILE = "workspace.db"
_SECRET = re.compile("pass|secret|key|token|conninfo", re.IGNORECASE)
"""Among libpq's parameters: password, passfile, sslpassword, sslkey, oauth_client_secret, scram_client_key, ..."""
WRITE = "rlhf_nb_write"
"""Execution option of a connection whose transaction takes the write lock at once."""


@dataclass(frozen=True)
class Place:
    """Where a workspace's database is."""

    url: URL
    directory: Path | None
    shown: str
    """The file, or the URL without its password: safe to print."""
    secrets: dict[str, str] = field(default_factory=dict, repr=False)
    """What the URL's query had for the driver that nobody may see; `url` is without it."""

    @property
    def is_sqlite(self) -> bool:
        return self.url.get_backend_name() == "sqlite"


def locate(target: str | Path) -> Place:
    """Read a directory or a database URL.

    Raises:
        SpecError: a URL of a database that is not supported, or one that cannot be read.
        StorageError: the directory cannot be made.
    """
    if isinstance(target, Path) or not re.match(r"^[a-zA-Z][a-zA-Z0-9+]*://", target):
        return _file_place(Path(target).expanduser().absolute() / DATABASE_FILE)
    try:
        url = make_url(target)
    except (sa.exc.ArgumentError, ValueError):
        raise SpecError(
            f"workspace {target.split('://')[0]}://...: not a database URL; write postgresql://USER@HOST/DATABASE"
        ) from None
    backend = url.get_backend_name()
    if backend in ("postgresql", "postgres"):
        secrets = {name: value for name, value in url.normalized_query.items() if _SECRET.search(name)}
        url = url.difference_update_query(secrets)
        given = {name: values[-1] for name, values in secrets.items()}
        return Place(url.set(drivername="postgresql+psycopg"), None, url.render_as_string(hide_password=True), given)
    if backend == "sqlite" and url.database and url.database != ":memory:":
        return _file_place(Path(url.database).expanduser().absolute())
    raise SpecError(
        f"workspace URL scheme {backend!r} is not supported; use a directory, or postgresql://USER@HOST/DATABASE"
    )


def _file_place(file: Path) -> Place:
    with storage_border(file.parent, "cannot make the workspace directory"):
        file.parent.mkdir(parents=True, exist_ok=True)
    return Place(URL.create("sqlite", database=str(file)), file.parent, str(file))


def make_engine(place: Place, lock_timeout_s: float) -> Engine:
    """An engine whose connections are durable and wait at most `lock_timeout_s` for another writer."""
    return _sqlite_engine(place, lock_timeout_s) if place.is_sqlite else _postgres_engine(place, lock_timeout_s)


def _sqlite_engine(place: Place, lock_timeout_s: float) -> Engine:
    engine = sa.create_engine(place.url, connect_args={"timeout": lock_timeout_s, "check_same_thread": False})

    @sa.event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, _record: object) -> None:
        # The driver's own implicit BEGIN is deferred and skips DDL; `begin` below says it instead.
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout={int(lock_timeout_s * 1000)}")
        _switch_to_wal(cursor, lock_timeout_s)
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        # A deferred transaction that later writes fails at once with SQLITE_BUSY, whatever the busy time-out.
        write = connection.get_execution_options().get(WRITE)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine


def _switch_to_wal(cursor: sqlite3.Cursor, lock_timeout_s: float) -> None:
    deadline = time.monotonic() + lock_timeout_s
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            # SQLite does not call its busy handler for this switch when two processes make the file together.
            if not error.sqlite_errorname.startswith("SQLITE_BUSY") or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _postgres_engine(place: Place, lock_timeout_s: float) -> Engine:
    try:
        import psycopg  # noqa: F401
    except ImportError:
        raise UnavailableError("a PostgreSQL workspace needs its driver: pip install 'rlhf-nb[postgres]'") from None
    timeouts = f"-c lock_timeout={int(lock_timeout_s * 1000)}"
    return sa.create_engine(
        place.url,
        pool_pre_ping=True,
        connect_args={**place.secrets, "options": timeouts, "connect_timeout": max(2, int(lock_timeout_s))},
    )


@contextlib.contextmanager
def opening(place: Place, lock_timeout_s: float) -> Iterator[None]:
    """Like `database_border`, for the first contact: a server that does not answer is said as such."""
    try:
        with database_border(place.shown, lock_timeout_s):
            yield
    except StoreLockedError:
        raise
    except StoreError as error:
        if place.is_sqlite or not isinstance(error.__cause__, sa.exc.OperationalError):
            raise
        raise StoreError(
            f"cannot open the workspace {error}; check that the server runs and the URL's user, host and database"
        ) from error
