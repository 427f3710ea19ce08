"""Saved models, and what was made from what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from rlhf_nb.errors import NotFoundError, did_you_mean
from rlhf_nb.store.database import Database, now
from rlhf_nb.store.records import Edge, ModelRecord
from rlhf_nb.store.schema import lineage, models


class Models(Database):
    """Models are directories; the store knows their paths and hashes, never their weights."""

    def add_model(
        self,
        name: str,
        path: str,
        *,
        run_id: str | None = None,
        role: str = "policy",
        content_hash: str | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> ModelRecord:
        """Enter a saved model. The newest of a name is the one the name means; the same entry twice is one."""
        values: dict[str, Any] = {
            "name": name,
            "run_id": run_id,
            "role": role,
            "path": str(path),
            "content_hash": content_hash,
            "info": dict(info or {}),
        }
        with self._write(serial="models") as connection:
            latest = connection.execute(
                sa.select(models).where(models.c.name == name).order_by(models.c.id.desc()).limit(1)
            ).first()
            if latest is not None and all(getattr(latest, key) == value for key, value in values.items()):
                return ModelRecord(**latest._mapping)
            values["created"] = now()
            key = connection.execute(models.insert().values(values).returning(models.c.id)).scalar_one()
        return ModelRecord(id=key, **values)

    def model(self, name: str) -> ModelRecord:
        """The newest model of a name, or the model of a run id.

        Raises:
            NotFoundError: neither.
        """
        query = (
            sa.select(models).where(sa.or_(models.c.name == name, models.c.run_id == name)).order_by(models.c.id.desc())
        )
        with self._read() as connection:
            row = connection.execute(query.limit(1)).first()
            known = connection.execute(sa.select(models.c.name).distinct()).scalars().all() if row is None else ()
        if row is None:
            raise NotFoundError(
                f"no model {name!r} in this workspace{did_you_mean(name, known) or '; see %rlhf models'}"
            )
        return ModelRecord(**row._mapping)

    def models(self, *, role: str | None = None) -> list[ModelRecord]:
        """The newest model of every name, oldest first."""
        newest = sa.select(sa.func.max(models.c.id)).group_by(models.c.name)
        query = sa.select(models).where(models.c.id.in_(newest)).order_by(models.c.id)
        if role is not None:
            query = query.where(models.c.role == role)
        with self._read() as connection:
            return [ModelRecord(**row._mapping) for row in connection.execute(query)]

    def add_lineage(self, child: str, parent: str, relation: str) -> None:
        """Note that `child` was made from `parent`. Noting it again changes nothing."""
        values = {"child": child, "parent": parent, "relation": relation, "created": now()}
        with self._write() as connection:
            connection.execute(self._insert(lineage).values(values).on_conflict_do_nothing())

    def lineage(self, of: str | None = None) -> list[Edge]:
        """Every edge above `of`, nearest first; the whole graph without it. A cycle is walked once."""
        with self._read() as connection:
            edges = [Edge(**row._mapping) for row in connection.execute(sa.select(lineage).order_by(lineage.c.created))]
        if of is None:
            return edges
        above: dict[str, list[Edge]] = {}
        for edge in edges:
            above.setdefault(edge.child, []).append(edge)
        found, seen, frontier = [], {of}, [of]
        while frontier:
            level = [edge for child in frontier for edge in above.get(child, ())]
            found += level
            frontier = list(dict.fromkeys(edge.parent for edge in level if edge.parent not in seen))
            seen.update(frontier)
        return found
