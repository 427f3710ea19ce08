"""The audit chain: who changed what, each row's hash covering the row before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from rlhf_nb.data.rows import canonical_json
from rlhf_nb.store.database import Database, default_who, now
from rlhf_nb.store.records import AuditCheck, AuditRow
from rlhf_nb.store.schema import audit


class Audit(Database):
    """Shows edits made behind the store's back. It does not stop them: who can write the file can rebuild the chain."""

    def append_audit(
        self, action: str, subject: str, detail: Mapping[str, Any] | None = None, who: str | None = None
    ) -> AuditRow:
        """Add a link.

        Args:
            action: a verb: "import", "set", "label", "attach", "stop".
            subject: what it was done to: a run id, a data set's name.
            detail: anything JSON has a form for.
            who: the user's name when not given.
        """
        text = canonical_json(dict(detail or {}))
        with self._write(serial="audit") as connection:
            return self._append(connection, action, subject, text, who)

    def _append(self, connection: sa.Connection, action: str, subject: str, detail: str, who: str | None) -> AuditRow:
        """Inside a transaction that is serial in "audit"."""
        last = connection.execute(sa.select(audit.c.seq, audit.c.hash).order_by(audit.c.seq.desc()).limit(1)).first()
        seq, previous = (1, self._genesis()) if last is None else (last.seq + 1, last.hash)
        fields = {"created": now(), "who": who or default_who(), "action": action, "subject": subject}
        values = {"seq": seq, **fields, "detail": detail, "previous": previous}
        values["hash"] = _link(values)
        connection.execute(audit.insert().values(values))
        return _row(values)

    def audit(
        self, *, subject: str | None = None, action: str | None = None, limit: int | None = None
    ) -> list[AuditRow]:
        """Links, oldest first; with `limit`, the newest so many."""
        query = sa.select(audit).order_by(audit.c.seq.desc()).limit(limit)
        if subject is not None:
            query = query.where(audit.c.subject == subject)
        if action is not None:
            query = query.where(audit.c.action == action)
        with self._read() as connection:
            return [_row(dict(row._mapping)) for row in reversed(connection.execute(query).all())]

    def verify_audit(self, *, expected_head: str | None = None) -> AuditCheck:
        """Walk the chain from its start.

        Args:
            expected_head: a hash noted earlier; it must still be in the chain, so that cutting off the end is seen too.
        """
        previous, count, seen = self._genesis(), 0, expected_head is None
        with self._read() as connection:
            for row in connection.execute(sa.select(audit).order_by(audit.c.seq)).mappings():
                reason = None
                if row["seq"] != count + 1:
                    reason = f"row {count + 1} is missing"
                elif row["previous"] != previous:
                    reason = "it does not follow the row before"
                elif row["hash"] != _link(dict(row)):
                    reason = "its content does not have its hash"
                if reason is not None:
                    return AuditCheck(False, count, previous, broken_seq=row["seq"], reason=reason)
                previous, count = row["hash"], count + 1
                seen = seen or previous == expected_head
        if not seen:
            return AuditCheck(
                False,
                count,
                previous,
                broken_seq=count + 1,
                reason=f"the noted head {expected_head} is not in the chain",
            )
        return AuditCheck(True, count, previous)

    def _genesis(self) -> str:
        # Another workspace's chain cannot be pasted in whole.
        return hashlib.sha256(f"rlhf_nb audit {self.workspace_id}".encode()).hexdigest()


def _link(row: Mapping[str, Any]) -> str:
    content = {key: row[key] for key in ("seq", "created", "who", "action", "subject", "detail")}
    return hashlib.sha256((row["previous"] + canonical_json(content)).encode("utf-8")).hexdigest()


def _row(fields: Mapping[str, Any]) -> AuditRow:
    return AuditRow(**{**fields, "detail": json.loads(fields["detail"])})
