"""Alembic's entry: runs the migrations inside the transaction that `rlhf_nb.store.migrate` holds."""

from __future__ import annotations

from alembic import context

from rlhf_nb.store.schema import metadata

# transactional_ddl: Alembic believes SQLite cannot, and would otherwise expect each statement to commit by itself.
context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, transactional_ddl=True)
with context.begin_transaction():
    context.run_migrations()
