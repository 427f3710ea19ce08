"""Where the store meets the file system and the database driver: their errors leave here as ours, in one line each."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from rlhf_nb.errors import RlhfError, SchemaError, StorageError, StoreError, StoreLockedError

_OS_WAYS_OUT = {
    errno.ENOSPC: "no space left on its disk: free some, then run the same line again",
    errno.EDQUOT: "the disk quota is used up: free some space, then run the same line again",
    errno.EROFS: "its file system is read-only: choose another place with %rlhf workspace PATH",
    errno.EACCES: "permission denied: make it writable, or choose another place with %rlhf workspace PATH",
    errno.EPERM: "permission denied: make it writable, or choose another place with %rlhf workspace PATH",
    errno.EIO: "its disk reported an input/output error: check the disk before going on",
    errno.ENOTDIR: "a part of the path is a file: choose another place with %rlhf workspace PATH",
    errno.EEXIST: "a file of that name is in the way: choose another place with %rlhf workspace PATH",
}


def storage_error(path: str | Path, code: int, action: str = "cannot write") -> StorageError:
    """The error for an operating-system code, with the path and the way out."""
    fallback = f"{errno.errorcode.get(code, code)}: check that the place exists and is writable"
    error = StorageError(f"{action} {path}: {_OS_WAYS_OUT.get(code, fallback)}")
    error.errno, error.filename = code, str(path)
    return error


@contextlib.contextmanager
def storage_border(path: str | Path, action: str = "cannot write") -> Iterator[None]:
    """Turn an OSError of the block into a StorageError that names `path`."""
    try:
        yield
    except RlhfError:
        raise
    except OSError as error:
        raise storage_error(path, error.errno or errno.EIO, action) from error


@contextlib.contextmanager
def database_border(place: str, lock_timeout_s: float) -> Iterator[None]:
    """Turn the driver's errors of the block into ours. `place` is the file, or the URL without its password."""
    from sqlalchemy import exc

    try:
        yield
    except exc.DBAPIError as error:
        raise _translated(error, place, lock_timeout_s) from error
    except exc.TimeoutError as error:
        raise StoreLockedError(
            f"{place}: no free connection within the time-out; close unused workspaces and try again"
        ) from error


def _translated(error: Exception, place: str, lock_timeout_s: float) -> Exception:
    original = getattr(error, "orig", None)
    name = getattr(original, "sqlite_errorname", None) or ""
    state = getattr(original, "sqlstate", None) or ""
    locked = StoreLockedError(
        f"{place}: another process held its write lock for more than {lock_timeout_s:g} s and nothing was written; "
        "let that process finish (or stop it), then do the same again"
    )
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")) or state in ("55P03", "57014", "40P01"):
        return locked
    if name == "SQLITE_FULL" or state in ("53100", "53200"):
        return storage_error(place, errno.ENOSPC)
    if name.startswith("SQLITE_READONLY") or state == "25006":
        return storage_error(place, errno.EROFS)
    if name.startswith("SQLITE_IOERR"):
        # SQLite reports a full disk as an I/O error when it cannot grow the -shm file.
        return storage_error(place, errno.ENOSPC if name == "SQLITE_IOERR_SHMSIZE" else errno.EIO)
    if name.startswith(("SQLITE_CANTOPEN", "SQLITE_PERM")):
        return storage_error(place, errno.EACCES, "cannot open")
    if name in ("SQLITE_NOTADB", "SQLITE_CORRUPT"):
        return SchemaError(
            f"{place} is not a sound SQLite database ({original}); move it away, or choose another workspace"
        )
    cause = str(original or error).strip().splitlines()
    return StoreError(f"{place}: {cause[0] if cause else type(error).__name__}")
