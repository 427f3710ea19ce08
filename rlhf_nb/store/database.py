"""The connection all parts of the store share: open, read, write, close."""

from __future__ import annotations

import contextlib
import datetime
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import sqlalchemy as sa

from rlhf_nb.errors import StoreError
from rlhf_nb.store import engine as engines
from rlhf_nb.store import migrate, schema
from rlhf_nb.store.borders import database_border

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

LOCK_TIMEOUT_S = 5.0


def now() -> str:
    """UTC, ISO 8601, microseconds."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")


class Database:
    """A workspace's database. Every public call is one transaction; any thread and any process may call."""

    def __init__(self, place: engines.Place, lock_timeout_s: float) -> None:
        self._place = place
        self._lock_timeout_s = lock_timeout_s
        self._closed = False
        self._engine = engines.make_engine(place, lock_timeout_s)

    @classmethod
    def open(cls, target: str | Path, *, lock_timeout_s: float = LOCK_TIMEOUT_S) -> Self:
        """Open or make the workspace at a directory (its `workspace.db`) or a database URL.

        Args:
            target: a directory, made if it is missing; or `postgresql://USER:PASSWORD@HOST/DATABASE`.
            lock_timeout_s: how long a write waits for another process's write, in seconds.

        Raises:
            SchemaError: the database is newer than this package, or is no workspace.
            StorageError: the place cannot be written.
            StoreLockedError: another process kept the write lock past the time-out.
            StoreError: the database server does not answer.
        """
        database = cls(engines.locate(target), lock_timeout_s)
        try:
            with engines.opening(database._place, lock_timeout_s):
                migrate.upgrade(database._engine, database._place)
            database.workspace_id = database.keep_first("workspace_id", str(uuid.uuid4()))
            database.keep_first("created", now())
        except BaseException:
            database.close()
            raise
        return database

    workspace_id: str
    """A UUID given at creation: copies of a workspace share it, two workspaces never do."""

    @property
    def directory(self) -> Path | None:
        """The workspace's directory; None when it lives in a database server."""
        return self._place.directory

    @property
    def location(self) -> str:
        """The file, or the URL without its password."""
        return self._place.shown

    def keep_first(self, key: str, value: str) -> str:
        """Keep a value under a key unless one is there; give the one that is there."""
        query = sa.select(schema.meta.c.value).where(schema.meta.c.key == key)
        with self._read() as connection:
            found = connection.execute(query).scalar()
        if found is not None:
            return found
        with self._write() as connection:
            connection.execute(self._insert(schema.meta).values(key=key, value=value).on_conflict_do_nothing())
            return connection.execute(query).scalar_one()

    def kept(self, prefix: str) -> list[str]:
        """The keys of `keep_first` that begin so, without the beginning, in alphabetical order."""
        key = schema.meta.c.key
        query = sa.select(key).where(key.startswith(prefix, autoescape=True)).order_by(key)
        with self._read() as connection:
            return [str(found).removeprefix(prefix) for found in connection.execute(query).scalars()]

    def close(self) -> None:
        """Give back the connections. Closing twice is fine."""
        self._closed = True
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.location!r})"

    @contextlib.contextmanager
    def _read(self) -> Iterator[Connection]:
        """One consistent view."""
        self._refuse_when_closed()
        with database_border(self.location, self._lock_timeout_s), self._engine.connect() as connection:
            if not self._place.is_sqlite:
                # PostgreSQL's default lets two queries of one transaction see different states.
                connection.execution_options(isolation_level="REPEATABLE READ")
            with connection.begin():
                yield connection

    @contextlib.contextmanager
    def _write(self, serial: str | None = None) -> Iterator[Connection]:
        """One transaction, durable when the block has ended.

        Args:
            serial: a name; blocks of the same name run one after the other. SQLite has one writer anyway.
        """
        self._refuse_when_closed()
        with (
            database_border(self.location, self._lock_timeout_s),
            self._engine.connect().execution_options(**{engines.WRITE: True}) as connection,
            connection.begin(),
        ):
            if serial and not self._place.is_sqlite:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtext(f"rlhf_nb {serial}"))))
            yield connection

    def _insert(self, table: sa.Table) -> Any:
        """An INSERT of the right dialect: both know ON CONFLICT."""
        if self._place.is_sqlite:
            from sqlalchemy.dialects.sqlite import insert
        else:
            from sqlalchemy.dialects.postgresql import insert  # type: ignore[assignment]
        return insert(table)

    def _refuse_when_closed(self) -> None:
        if self._closed:
            raise StoreError(f"workspace {self.location} is closed; open it again")


def default_who() -> str:
    """The user's name, for audit rows and labels that were not given one."""
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):
        # A container's user id often has no name.
        return f"uid {os.getuid()}"
