"""Bringing a database to this package's schema, once, whoever opens it first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

from rlhf_nb.errors import SchemaError
from rlhf_nb.store.engine import WRITE, Place
from rlhf_nb.store.schema import HEAD

if TYPE_CHECKING:
    from alembic.config import Config
    from sqlalchemy.engine import Connection, Engine

MIGRATIONS = Path(__file__).parent / "migrations"
_LOCK_KEY = 0x726C6866  # "rlhf"; PostgreSQL's advisory lock for opening


def upgrade(engine: Engine, place: Place) -> None:
    """Create or upgrade the schema; do nothing when it is current.

    The check and the upgrade share one transaction that holds the write lock, so several processes may open at once
    and one that dies half way leaves the old schema.

    Raises:
        SchemaError: the schema is newer than this package, or the database belongs to something else.
    """
    with engine.connect() as connection:
        if _version(connection, place) == HEAD:
            return
    # Loaded here: others wait for the write lock only so long, and this takes seconds on a slow disk.
    from alembic import command

    config = alembic_config()
    with engine.connect().execution_options(**{WRITE: True}) as connection, connection.begin():
        if not place.is_sqlite:
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK_KEY)))
        if _version(connection, place) != HEAD:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")


def alembic_config() -> Config:
    """Alembic's configuration for the migrations shipped here."""
    from alembic.config import Config

    config = Config()
    # ConfigParser reads a % as the start of an interpolation.
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    return config


def _version(connection: Connection, place: Place) -> str | None:
    names = set(sa.inspect(connection).get_table_names())
    if "alembic_version" not in names:
        if names:
            raise SchemaError(
                f"{place.shown} holds other tables ({', '.join(sorted(names)[:3])}) and no workspace; choose another"
            )
        return None
    version = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
    if version is not None and version > HEAD:
        raise SchemaError(
            f'{place.shown} has schema "{version}", newer than "{HEAD}", the newest this version of rlhf_nb knows; '
            "upgrade rlhf_nb, or open another workspace"
        )
    return version
