"""The tables of a workspace. `migrations/versions` builds them; a test holds the two equal.

`labels` and `audit` take no UPDATE and no DELETE: triggers, made by the migration, refuse them.
"""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa
from sqlalchemy.types import TypeDecorator

HEAD = "0001"
"""The schema version this package reads and writes; a test compares it with Alembic's."""


class Json(TypeDecorator):
    """A JSON value in a text column.

    PostgreSQL's own json types refuse U+0000, which models do emit, and SQLite has none. Metric events may hold NaN:
    Python's spelling of it is kept.
    """

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> str | None:
        # ensure_ascii: lone surrogates and U+0000 become escapes, which every database keeps.
        return None if value is None else json.dumps(value, sort_keys=True, separators=(",", ":"))

    def process_result_value(self, value: str | None, dialect: Any) -> Any:
        return None if value is None else json.loads(value)


metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)
# SQLite numbers rows by itself only for a column declared exactly INTEGER.
Id = sa.BigInteger().with_variant(sa.Integer, "sqlite")

meta = sa.Table(
    "meta",
    metadata,
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)

blobs = sa.Table(
    "blobs",
    metadata,
    sa.Column("hash", sa.Text, primary_key=True),
    sa.Column("n_rows", sa.Integer, nullable=False),
    sa.Column("n_bytes", sa.BigInteger, nullable=False),
    sa.Column("created", sa.Text, nullable=False),
)

blob_parts = sa.Table(
    "blob_parts",
    metadata,
    sa.Column("hash", sa.Text, sa.ForeignKey("blobs.hash"), primary_key=True),
    sa.Column("part", sa.Integer, primary_key=True),
    sa.Column("data", sa.LargeBinary, nullable=False),
)

datasets = sa.Table(
    "datasets",
    metadata,
    sa.Column("id", Id, primary_key=True, autoincrement=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("content_hash", sa.Text, sa.ForeignKey("blobs.hash"), nullable=False, index=True),
    sa.Column("n", sa.Integer, nullable=False),
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("summary", sa.Text, nullable=False),
    sa.Column("dropped", Json, nullable=False),
    sa.Column("created", sa.Text, nullable=False),
    sa.UniqueConstraint("name", "version"),
)

models = sa.Table(
    "models",
    metadata,
    sa.Column("id", Id, primary_key=True, autoincrement=True),
    sa.Column("name", sa.Text, nullable=False, index=True),
    sa.Column("run_id", sa.Text, index=True),
    sa.Column("role", sa.Text, nullable=False),
    sa.Column("path", sa.Text, nullable=False),
    sa.Column("content_hash", sa.Text),
    sa.Column("info", Json, nullable=False),
    sa.Column("created", sa.Text, nullable=False),
)

lineage = sa.Table(
    "lineage",
    metadata,
    sa.Column("child", sa.Text, primary_key=True),
    sa.Column("parent", sa.Text, primary_key=True, index=True),
    sa.Column("relation", sa.Text, primary_key=True),
    sa.Column("created", sa.Text, nullable=False),
)

runs = sa.Table(
    "runs",
    metadata,
    sa.Column("run_id", sa.Text, primary_key=True),
    sa.Column("method", sa.Text, nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("title", sa.Text),
    sa.Column("spec", Json),
    sa.Column("place", sa.Text),
    sa.Column("attach", sa.Text),
    sa.Column("last_seq", sa.BigInteger, nullable=False),
    sa.Column("summary", Json, nullable=False),
    sa.Column("created", sa.Text, nullable=False),
    sa.Column("finished", sa.Text),
    sa.UniqueConstraint("method", "number"),
)

run_events = sa.Table(
    "run_events",
    metadata,
    sa.Column("run_id", sa.Text, primary_key=True),
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("event", Json, nullable=False),
)

tasks = sa.Table(
    "tasks",
    metadata,
    sa.Column("id", Id, primary_key=True, autoincrement=True),
    sa.Column("queue", sa.Text, nullable=False),
    sa.Column("position", sa.Integer, nullable=False),
    sa.Column("mode", sa.Text, nullable=False),
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("item_key", sa.Text, nullable=False),
    sa.Column("item", Json, nullable=False),
    sa.Column("created", sa.Text, nullable=False),
    sa.UniqueConstraint("queue", "position"),
    sa.UniqueConstraint("queue", "item_key"),
)

labels = sa.Table(
    "labels",
    metadata,
    sa.Column("id", Id, primary_key=True, autoincrement=True),
    sa.Column("task_id", Id, sa.ForeignKey("tasks.id"), nullable=False),
    sa.Column("client_id", sa.Text, nullable=False, unique=True),
    sa.Column("choice", sa.Text),
    sa.Column("supersedes", Id, sa.ForeignKey("labels.id")),
    sa.Column("annotator", sa.Text, nullable=False),
    sa.Column("seconds", sa.Float),
    sa.Column("rubric", Json, nullable=False),
    sa.Column("side", Json, nullable=False),
    sa.Column("provenance", Json, nullable=False),
    sa.Column("created", sa.Text, nullable=False),
    sa.Index("ix_labels_task_id_annotator_id", "task_id", "annotator", "id"),
)

attaches = sa.Table(
    "attaches",
    metadata,
    sa.Column("id", Id, primary_key=True, autoincrement=True),
    sa.Column("target", sa.Text, nullable=False),
    sa.Column("info", Json, nullable=False),
    sa.Column("created", sa.Text, nullable=False),
)

audit = sa.Table(
    "audit",
    metadata,
    sa.Column("seq", Id, primary_key=True, autoincrement=False),
    sa.Column("created", sa.Text, nullable=False),
    sa.Column("who", sa.Text, nullable=False),
    sa.Column("action", sa.Text, nullable=False),
    sa.Column("subject", sa.Text, nullable=False, index=True),
    sa.Column("detail", sa.Text, nullable=False),
    sa.Column("previous", sa.Text, nullable=False),
    sa.Column("hash", sa.Text, nullable=False),
)
