"""The labelling queue and the label log. A label is never edited: undo and second thoughts are new rows."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import sqlalchemy as sa

from rlhf_nb.data.rows import canonical_json
from rlhf_nb.errors import NotFoundError, StoreError, did_you_mean
from rlhf_nb.store.database import Database, now
from rlhf_nb.store.records import Labelled, LabelRow, Progress, Task
from rlhf_nb.store.schema import labels, tasks


class Labels(Database):
    """Each answer is one committed row before the caller hears of it."""

    def create_tasks(
        self, queue: str, items: Iterable[Mapping[str, Any]], *, mode: str = "pair", source: str = ""
    ) -> list[int]:
        """Put items in a queue and give their task ids, in order.

        An item that is in the queue already keeps its task, so a cell may be run again; the same item twice in one call
        is two tasks.

        Args:
            source: the data set or run the items come from.
        """
        wanted: list[tuple[str, dict[str, Any]]] = []
        seen: Counter[str] = Counter()
        for item in items:
            key = hashlib.sha256(canonical_json([mode, item]).encode("utf-8")).hexdigest()
            seen[key] += 1
            wanted.append((f"{key}#{seen[key]}", dict(item)))
        with self._write(serial=f"tasks {queue}") as connection:
            known = dict(
                connection.execute(sa.select(tasks.c.item_key, tasks.c.id).where(tasks.c.queue == queue)).all()
            )
            position = connection.execute(
                sa.select(sa.func.max(tasks.c.position)).where(tasks.c.queue == queue)
            ).scalar()
            position = -1 if position is None else position
            created, new = now(), []
            for key, item in wanted:
                if key not in known:
                    position += 1
                    new.append(
                        {
                            "queue": queue,
                            "position": position,
                            "mode": mode,
                            "source": source,
                            "item_key": key,
                            "item": item,
                            "created": created,
                        }
                    )
            if new:
                connection.execute(tasks.insert(), new)
                known = dict(
                    connection.execute(sa.select(tasks.c.item_key, tasks.c.id).where(tasks.c.queue == queue)).all()
                )
        return [known[key] for key, _ in wanted]

    def task(self, task_id: int) -> Task:
        """A task by id.

        Raises:
            NotFoundError: no such task.
        """
        with self._read() as connection:
            row = connection.execute(sa.select(tasks).where(tasks.c.id == task_id)).first()
        if row is None:
            raise NotFoundError(f"no labelling task {task_id} in this workspace; run the label cell again")
        return _task(row)

    def tasks(self, queue: str) -> list[Task]:
        """A queue's tasks, in order."""
        with self._read() as connection:
            return [
                _task(row)
                for row in connection.execute(sa.select(tasks).where(tasks.c.queue == queue).order_by(tasks.c.position))
            ]

    def queues(self) -> list[str]:
        """Names of the queues there are."""
        with self._read() as connection:
            return list(connection.execute(sa.select(tasks.c.queue).distinct().order_by(tasks.c.queue)).scalars())

    def next_task(self, queue: str, annotator: str) -> Task | None:
        """The first task of a queue this annotator has no standing answer to; None when all are answered.

        Raises:
            NotFoundError: no such queue.
        """
        standing = _standing(annotator)
        query = (
            sa.select(tasks)
            .outerjoin(standing, standing.c.task_id == tasks.c.id)
            .where(tasks.c.queue == queue, standing.c.task_id.is_(None))
            .order_by(tasks.c.position)
            .limit(1)
        )
        with self._read() as connection:
            row = connection.execute(query).first()
            if (
                row is None
                and connection.execute(sa.select(tasks.c.id).where(tasks.c.queue == queue).limit(1)).first() is None
            ):
                known = connection.execute(sa.select(tasks.c.queue).distinct()).scalars().all()
                raise NotFoundError(f"no labelling queue {queue!r} in this workspace{did_you_mean(queue, known)}")
        return None if row is None else _task(row)

    def submit_label(
        self,
        task_id: int,
        client_id: str,
        choice: str,
        *,
        annotator: str,
        seconds: float | None = None,
        rubric: Mapping[str, Any] | None = None,
        side: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> LabelRow:
        """Keep an answer; it is on disk when this returns.

        A resend with the same `client_id` gives the row that is there, so a caller that got an error may try again.
        An answer to a task this annotator has answered before supersedes the earlier one.

        Args:
            choice: what was chosen, sides already un-randomised.
            seconds: from showing the task to the answer.
            side: how the sides were shown.

        Raises:
            StoreLockedError, StorageError: nothing was written; send the same `client_id` again.
            StoreError: the `client_id` was used for another task.
        """
        if not isinstance(choice, str) or not choice:
            raise StoreError(f"choice={choice!r}: an answer is a non-empty text; to take one back, use undo_label")
        return self._append_label(
            task_id,
            client_id,
            annotator,
            choice=choice,
            seconds=seconds,
            rubric=rubric,
            side=side,
            provenance=provenance,
        )

    def undo_label(
        self, task_id: int, client_id: str, *, annotator: str, provenance: Mapping[str, Any] | None = None
    ) -> LabelRow:
        """Take back this annotator's standing answer to a task, by a row that supersedes it.

        Raises:
            StoreError: there is no standing answer.
        """
        return self._append_label(task_id, client_id, annotator, choice=None, provenance=provenance)

    def label_log(self, queue: str) -> list[LabelRow]:
        """Every row, superseded ones too, in the order they were written."""
        query = sa.select(labels).join(tasks, tasks.c.id == labels.c.task_id).where(tasks.c.queue == queue)
        with self._read() as connection:
            return [_label(row) for row in connection.execute(query.order_by(labels.c.id))]

    def labels(self, queue: str, *, annotator: str | None = None) -> list[Labelled]:
        """The fold over the log: for each task and annotator the answer that stands, by task order and annotator."""
        with self._read() as connection:
            by_id = {
                row.id: _task(row)
                for row in connection.execute(sa.select(tasks).where(tasks.c.queue == queue).order_by(tasks.c.position))
            }
            query = (
                sa.select(labels)
                .join(tasks, tasks.c.id == labels.c.task_id)
                .where(tasks.c.queue == queue)
                .order_by(labels.c.id)
            )
            if annotator is not None:
                query = query.where(labels.c.annotator == annotator)
            last = {(row.task_id, row.annotator): _label(row) for row in connection.execute(query)}
        standing = [Labelled(by_id[task_id], label) for (task_id, _), label in last.items() if label.choice is not None]
        return sorted(standing, key=lambda each: (each.task.position, each.label.annotator))

    def label_progress(self, queue: str, annotator: str) -> Progress:
        """How many tasks of a queue this annotator has answered, and how."""
        standing = _standing(annotator)
        query = (
            sa.select(standing.c.choice, sa.func.count())
            .join(tasks, tasks.c.id == standing.c.task_id)
            .where(tasks.c.queue == queue)
            .group_by(standing.c.choice)
        )
        with self._read() as connection:
            choices = {str(choice): int(n) for choice, n in connection.execute(query)}
            total = connection.execute(sa.select(sa.func.count()).where(tasks.c.queue == queue)).scalar_one()
        return Progress(done=sum(choices.values()), total=total, choices=choices)

    def _append_label(
        self, task_id: int, client_id: str, annotator: str, *, choice: str | None, **fields: Any
    ) -> LabelRow:
        resent = sa.select(labels).where(labels.c.client_id == client_id)
        with self._write(serial="labels") as connection:
            row = connection.execute(resent).first()
            if row is not None:
                if (row.task_id, row.annotator, row.choice is None) != (task_id, annotator, choice is None):
                    raise StoreError(
                        f"client_id={client_id!r} was used for task {row.task_id}; a new answer needs a new client_id"
                    )
                return _label(row)
            if connection.execute(sa.select(tasks.c.id).where(tasks.c.id == task_id)).first() is None:
                raise NotFoundError(f"no labelling task {task_id} in this workspace; run the label cell again")
            before = connection.execute(
                sa.select(labels.c.id, labels.c.choice)
                .where(labels.c.task_id == task_id, labels.c.annotator == annotator)
                .order_by(labels.c.id.desc())
                .limit(1)
            ).first()
            standing = before.id if before is not None and before.choice is not None else None
            if choice is None and standing is None:
                raise StoreError(f"task {task_id}: {annotator} has no answer to take back")
            values: dict[str, Any] = {
                "task_id": task_id,
                "client_id": client_id,
                "choice": choice,
                "supersedes": standing,
                "annotator": annotator,
                "seconds": fields.get("seconds"),
                "rubric": dict(fields.get("rubric") or {}),
                "side": dict(fields.get("side") or {}),
                "provenance": dict(fields.get("provenance") or {}),
                "created": now(),
            }
            key = connection.execute(labels.insert().values(values).returning(labels.c.id)).scalar_one()
        return LabelRow(id=key, **values)


def _standing(annotator: str) -> sa.Subquery:
    """Task ids and choices of an annotator's standing answers."""
    newest = sa.select(sa.func.max(labels.c.id)).where(labels.c.annotator == annotator).group_by(labels.c.task_id)
    return (
        sa.select(labels.c.task_id, labels.c.choice)
        .where(labels.c.id.in_(newest), labels.c.choice.is_not(None))
        .subquery()
    )


def _task(row: sa.Row) -> Task:
    fields = dict(row._mapping)
    fields.pop("item_key")
    return Task(**fields)


def _label(row: sa.Row) -> LabelRow:
    return LabelRow(**row._mapping)
