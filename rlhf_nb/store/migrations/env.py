"""Alembic's entry: runs the migrations inside the transaction that `rlhf_nb.store.migrate` holds."""

from __future__ import annotations

from alembic import context

from rlhf_nb.store.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
