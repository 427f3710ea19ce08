"""The index of runs, their events and the attaches. The run directories are the truth: this can be refilled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import sqlalchemy as sa

from rlhf_nb.data.rows import canonical_json
from rlhf_nb.errors import NotFoundError, StoreError, did_you_mean
from rlhf_nb.store.audit import Audit
from rlhf_nb.store.database import now
from rlhf_nb.store.records import AttachRecord, RunRecord
from rlhf_nb.store.schema import attaches, run_events, runs

RESERVED = "reserved"
"""State of a row that only holds a run id; `runs()` leaves it out."""

_CHANGEABLE = ("state", "title", "spec", "place", "attach", "last_seq", "summary", "finished")
_BATCH = 1000
Link = tuple[str, str, Mapping[str, Any]]
"""Action, who, detail."""


class Runs(Audit):
    """Rows here may change: they mirror files that are append-only themselves."""

    def next_run_id(self, method: str) -> str:
        """A run id nobody has had, such as "ppo-7". It is taken at once, so two processes never get the same.

        A run directory of that name also counts as taken: the index may have been lost.
        """
        with self._write(serial="runs") as connection:
            highest = (
                connection.execute(sa.select(sa.func.max(runs.c.number)).where(runs.c.method == method)).scalar() or 0
            )
            number = highest + 1
            while self.directory is not None and (self.directory / "runs" / f"{method}-{number}").exists():
                number += 1
            run_id = f"{method}-{number}"
            connection.execute(runs.insert().values(_blank(run_id, method, number)))
        return run_id

    def add_run(
        self,
        run_id: str,
        *,
        method: str | None = None,
        state: str = "waiting",
        spec: Mapping[str, Any] | None = None,
        title: str | None = None,
        place: str | None = None,
        attach: str | None = None,
        summary: Mapping[str, Any] | None = None,
        created: str | None = None,
    ) -> RunRecord:
        """Enter a run, under an id of `next_run_id` or one found in a run directory. Entering it again changes nothing.

        A row that has no spec gets this one.

        Args:
            place: its run directory, as the compute host names it.
            attach: the attach it computes on.
        """
        stem, _, tail = run_id.rpartition("-")
        method = method or stem or run_id
        number = int(tail) if tail.isdigit() and stem == method else 0
        values = {
            "state": state,
            "spec": None if spec is None else dict(spec),
            "title": title,
            "place": place,
            "attach": attach,
            "summary": dict(summary or {}),
        }
        with self._write(serial="runs") as connection:
            if number == 0:
                lowest = connection.execute(
                    sa.select(sa.func.min(runs.c.number)).where(runs.c.method == method)
                ).scalar()
                # Ids of another shape get negative numbers: they never push the count that next_run_id gives.
                number = min(lowest or 0, 0) - 1
            blank = _blank(run_id, method, number)
            connection.execute(self._insert(runs).values(blank).on_conflict_do_nothing(index_elements=["run_id"]))
            change = runs.update().where(runs.c.run_id == run_id, runs.c.state == RESERVED)
            connection.execute(change.values(**values, created=created or blank["created"]))
            if spec is not None:
                lacking = runs.update().where(runs.c.run_id == run_id, runs.c.spec.is_(None))
                connection.execute(lacking.values({key: values[key] for key in ("spec", "title", "place", "attach")}))
            return _run(connection.execute(sa.select(runs).where(runs.c.run_id == run_id)).one())

    def update_run(self, run_id: str, **changes: Any) -> RunRecord:
        """Change what the index says of a run.

        Args:
            changes: of `state`, `title`, `spec`, `place`, `attach`, `last_seq`, `summary`, `finished`.

        `summary` is merged into the one there; `last_seq` never goes back.

        Raises:
            NotFoundError: no such run.
        """
        unknown = sorted(set(changes) - set(_CHANGEABLE))
        if unknown:
            raise StoreError(f"a run has no field {unknown[0]!r} to change{did_you_mean(unknown[0], _CHANGEABLE)}")
        with self._write(serial="runs") as connection:
            # A row that only holds an id is no run: a state alone would make it one that has no spec.
            row = connection.execute(sa.select(runs).where(runs.c.run_id == run_id, runs.c.state != RESERVED)).first()
            if row is None:
                raise self._no_run(run_id, connection)
            if "summary" in changes:
                changes["summary"] = {**row.summary, **changes["summary"]}
            if "last_seq" in changes:
                changes["last_seq"] = max(row.last_seq, changes["last_seq"])
            if changes:
                connection.execute(runs.update().where(runs.c.run_id == run_id).values(**changes))
            return _run(connection.execute(sa.select(runs).where(runs.c.run_id == run_id)).one())

    def forget_run(self, run_id: str) -> None:
        """Take back the entry of a run that was never begun and has no event. Its id stays taken."""
        never = (runs.c.state == "waiting", runs.c.last_seq < 0)
        change = runs.update().where(runs.c.run_id == run_id, *never)
        with self._write(serial="runs") as connection:
            connection.execute(change.values(state=RESERVED, spec=None, title=None, place=None, attach=None))

    def run(self, run_id: str) -> RunRecord:
        """A run by id.

        Raises:
            NotFoundError: no such run.
        """
        with self._read() as connection:
            row = connection.execute(sa.select(runs).where(runs.c.run_id == run_id, runs.c.state != RESERVED)).first()
            if row is None:
                raise self._no_run(run_id, connection)
        return _run(row)

    def runs(self, *, method: str | None = None, state: str | None = None) -> list[RunRecord]:
        """Runs, oldest first."""
        query = sa.select(runs).where(runs.c.state != RESERVED).order_by(runs.c.created, runs.c.run_id)
        if method is not None:
            query = query.where(runs.c.method == method)
        if state is not None:
            query = query.where(runs.c.state == state)
        with self._read() as connection:
            return [_run(row) for row in connection.execute(query)]

    def add_events(
        self,
        run_id: str,
        events: Iterable[Mapping[str, Any]],
        *,
        audited: Mapping[int, Link] | None = None,
        last_seq: int = -1,
    ) -> int:
        """Index events of a run. Those whose `seq` is there already change nothing.

        Args:
            events: dicts, or pydantic models, each with an integer `seq`.
            last_seq: How far the log was read, where that is further than the last of these.
            audited: By `seq`, what the audit chain gets for an event: with it or not at all, and once, whoever indexes
                the run beside.

        Returns:
            How many were new.
        """
        # A slow source must not hold the write lock.
        events = [event if isinstance(event, Mapping) else event.model_dump(mode="json") for event in events]
        batch, last = [], last_seq
        new: list[int] = []
        audited = audited or {}
        # Drivers do not agree on the row count of many inserts; what comes back is what was new.
        insert = self._insert(run_events).on_conflict_do_nothing().returning(run_events.c.seq)
        with self._write(serial="audit" if audited else None) as connection:
            for event in events:
                last = max(last, event["seq"])
                batch.append({"run_id": run_id, "seq": event["seq"], "event": dict(event)})
                if len(batch) == _BATCH:
                    new += connection.execute(insert, batch).scalars().all()
                    batch = []
            if batch:
                new += connection.execute(insert, batch).scalars().all()
            for seq in sorted(set(new) & audited.keys()):
                action, who, detail = audited[seq]
                self._append(connection, action, run_id, canonical_json(dict(detail)), who)
            if last >= 0:
                connection.execute(
                    runs.update().where(runs.c.run_id == run_id, runs.c.last_seq < last).values(last_seq=last)
                )
        return len(new)

    def events(self, run_id: str, since: int = 0, limit: int | None = None) -> list[dict[str, Any]]:
        """Indexed events with `seq` ≥ `since`, in order."""
        query = sa.select(run_events.c.event).where(run_events.c.run_id == run_id, run_events.c.seq >= since)
        with self._read() as connection:
            return list(connection.execute(query.order_by(run_events.c.seq).limit(limit)).scalars())

    def add_attach(self, target: str, info: Mapping[str, Any] | None = None) -> AttachRecord:
        """Note an attach: what was attached, and what it said of itself."""
        values: dict[str, Any] = {"target": target, "info": dict(info or {}), "created": now()}
        with self._write() as connection:
            key = connection.execute(attaches.insert().values(values).returning(attaches.c.id)).scalar_one()
        return AttachRecord(id=key, **values)

    def attaches(self) -> list[AttachRecord]:
        """Attaches, oldest first."""
        with self._read() as connection:
            return [
                AttachRecord(**row._mapping) for row in connection.execute(sa.select(attaches).order_by(attaches.c.id))
            ]

    def _no_run(self, run_id: str, connection: sa.Connection) -> NotFoundError:
        known = connection.execute(sa.select(runs.c.run_id).where(runs.c.state != RESERVED)).scalars().all()
        return NotFoundError(f"no run {run_id!r} in this workspace{did_you_mean(run_id, known) or '; see %rlhf runs'}")


def _blank(run_id: str, method: str, number: int) -> dict[str, Any]:
    return {
        "run_id": run_id,
        "method": method,
        "number": number,
        "state": RESERVED,
        "last_seq": -1,
        "summary": {},
        "created": now(),
    }


def _run(row: sa.Row) -> RunRecord:
    return RunRecord(**row._mapping)
