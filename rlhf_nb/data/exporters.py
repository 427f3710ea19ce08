"""Rows to a file."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlhf_nb.data.rows import encode_rows
from rlhf_nb.errors import DataError, StorageError


def write_rows(rows: Iterable[Mapping[str, Any]], path: str | Path) -> Path:
    """Write rows to .jsonl, .jsonl.gz or .parquet; the file appears whole or not at all.

    In Parquet, a prompt that is messages in some rows and text in others is written as JSON text in all.

    Raises:
        DataError: another extension, or no rows.
        StorageError: the place cannot be written.
    """
    path = Path(path).expanduser()
    plain = [dict(row) for row in rows]
    if not plain:
        raise DataError(f"{path}: 0 rows to export; nothing was written")
    name = path.name.lower()
    if name.endswith((".jsonl", ".jsonl.gz")):
        data = encode_rows(plain)
        # mtime=0: the same rows give the same file.
        data = gzip.compress(data, mtime=0) if name.endswith(".gz") else data
    elif name.endswith(".parquet"):
        data = _parquet(plain)
    else:
        raise DataError(
            f"{path}: cannot export to {path.suffix or 'a name without extension'!r}; use .jsonl, .jsonl.gz or .parquet"
        )
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True) if partial.parent.is_dir() else None
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another place"
        ) from None
    return path


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = {}
    for column in columns:
        values = [row.get(column) for row in rows]
        try:
            table[column] = pyarrow.array(values)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, pyarrow.ArrowNotImplementedError):
            table[column] = pyarrow.array([None if v is None else json.dumps(v, ensure_ascii=False) for v in values])
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(table), sink)
    return sink.getvalue().to_pybytes()
