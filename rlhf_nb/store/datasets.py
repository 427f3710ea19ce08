"""Rows by content hash, and the named, versioned data sets that point at them."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import sqlalchemy as sa

from rlhf_nb.data.rows import KINDS, Row, decode_rows, encode_rows
from rlhf_nb.errors import DataError, NotFoundError, StoreError, did_you_mean
from rlhf_nb.store.database import Database, now
from rlhf_nb.store.records import DatasetRecord
from rlhf_nb.store.schema import blob_parts, blobs, datasets

PART_BYTES = 8 * 2**20
"""A blob is cut here, so that no single value nears a database's limit."""


class Datasets(Database):
    """Rows are kept as zlib-compressed canonical JSONL."""

    def put_rows(self, rows: Iterable[Mapping[str, Any]]) -> str:
        """Keep rows under their content hash, which is returned. Rows that are already kept cost one look-up."""
        encoded = encode_rows(rows)
        key = hashlib.sha256(encoded).hexdigest()
        with self._read() as connection:
            if connection.execute(sa.select(blobs.c.hash).where(blobs.c.hash == key)).scalar() is not None:
                return key
        packed = zlib.compress(encoded, 6)
        parts = [packed[start : start + PART_BYTES] for start in range(0, len(packed), PART_BYTES)]
        header = {"hash": key, "n_rows": encoded.count(b"\n"), "n_bytes": len(encoded), "created": now()}
        with self._write() as connection:
            # What was returned, not rowcount: psycopg's is -1 after a plain INSERT, for a row that was there as well.
            claim = self._insert(blobs).values(header).on_conflict_do_nothing().returning(blobs.c.hash)
            if connection.execute(claim).scalar() is not None:
                connection.execute(
                    blob_parts.insert(),
                    [{"hash": key, "part": number, "data": part} for number, part in enumerate(parts)],
                )
        return key

    def get_rows(self, content_hash: str) -> list[Row]:
        """The rows under a content hash.

        Raises:
            NotFoundError: nothing is kept under it.
            StoreError: what is kept does not have that hash any more.
        """
        return decode_rows(self.get_encoded(content_hash))

    def get_encoded(self, content_hash: str) -> bytes:
        """The canonical JSONL under a content hash, as it is sent to a compute host."""
        query = sa.select(blob_parts.c.data).where(blob_parts.c.hash == content_hash).order_by(blob_parts.c.part)
        with self._read() as connection:
            parts = connection.execute(query).scalars().all()
        if not parts:
            raise NotFoundError(f"no rows with content hash {content_hash[:12]}… in {self.location}; import them again")
        try:
            encoded = zlib.decompress(b"".join(bytes(part) for part in parts))
        except zlib.error:
            encoded = b""
        if hashlib.sha256(encoded).hexdigest() != content_hash:
            raise StoreError(
                f"the rows kept as {content_hash[:12]}… in {self.location} are damaged; import them under a new name"
            )
        return encoded

    def add_dataset(
        self,
        name: str,
        kind: str,
        rows: Iterable[Mapping[str, Any]],
        source: str = "",
        summary: str = "",
        dropped: Mapping[str, int] | None = None,
    ) -> DatasetRecord:
        """Name some rows. The same rows under the same name give the record that is there; other rows, a new version.

        Raises:
            DataError: no rows, or a kind that does not exist.
        """
        if kind not in KINDS:
            raise DataError(f"kind={kind!r} is not a kind of rows{did_you_mean(kind, KINDS)} Kinds: {', '.join(KINDS)}")
        rows = list(rows)
        if not rows:
            raise DataError(f"data set {name!r} has 0 rows; nothing was kept")
        content = self.put_rows(rows)
        with self._write(serial="datasets") as connection:
            latest = connection.execute(
                sa.select(datasets).where(datasets.c.name == name).order_by(datasets.c.version.desc()).limit(1)
            ).first()
            if latest is not None and latest.content_hash == content and latest.kind == kind:
                return _record(latest)
            values: dict[str, Any] = {
                "name": name,
                "version": 1 if latest is None else latest.version + 1,
                "kind": kind,
                "content_hash": content,
                "n": len(rows),
                "source": source,
                "summary": summary,
                "dropped": dict(dropped or {}),
                "created": now(),
            }
            connection.execute(datasets.insert().values(values))
        return DatasetRecord(**values)

    def dataset(self, name: str, version: int | None = None) -> DatasetRecord:
        """A data set by name; its newest version unless one is asked for.

        Raises:
            NotFoundError: no such name or version.
        """
        query = sa.select(datasets).where(datasets.c.name == name).order_by(datasets.c.version.desc()).limit(1)
        if version is not None:
            query = query.where(datasets.c.version == version)
        with self._read() as connection:
            row = connection.execute(query).first()
            names = connection.execute(sa.select(datasets.c.name).distinct()).scalars().all() if row is None else ()
        if row is None:
            wanted = f"data set {name!r}" + (f" version {version}" if version is not None and name in names else "")
            hint = did_you_mean(name, (n for n in names if n != name))
            raise NotFoundError(f"no {wanted} in this workspace{hint or '; see %rlhf data'}")
        return _record(row)

    def dataset_by_hash(self, content_hash: str, name: str) -> DatasetRecord | None:
        """The data set that has these rows, by the first characters of their hash: of that name, else the oldest."""
        query = sa.select(datasets).where(datasets.c.content_hash.startswith(content_hash, autoescape=True))
        with self._read() as connection:
            rows = connection.execute(query.order_by(datasets.c.name != name, datasets.c.id).limit(1)).all()
        return _record(rows[0]) if rows else None

    def datasets(self) -> list[DatasetRecord]:
        """The newest version of every data set, by name."""
        newest = sa.select(sa.func.max(datasets.c.id)).group_by(datasets.c.name)
        with self._read() as connection:
            rows = connection.execute(
                sa.select(datasets).where(datasets.c.id.in_(newest)).order_by(datasets.c.name)
            ).all()
        return [_record(row) for row in rows]


def _record(row: sa.Row) -> DatasetRecord:
    fields = dict(row._mapping)
    fields.pop("id")
    return DatasetRecord(**fields)
