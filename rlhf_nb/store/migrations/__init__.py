"""Alembic's scripts. Run by `rlhf_nb.store.migrate` when a workspace is opened, never by hand."""
