"""From a file, a folder or a hub id to raw records: plain dicts of JSON values, no meaning attached yet."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rlhf_nb.errors import DataError, NotFoundError, UnavailableError, did_you_mean

Record = dict[str, Any]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(/[\w./-]+)?")
_TOO_MANY = "cells without a header"
_JSON_COLUMNS = re.compile(r"prompt|chosen|rejected|completions?|ranks|messages|conversations?")


def read_records(source: Any, *, split: str | None = None) -> tuple[list[Record], str]:
    """Read everything a source holds.

    Args:
        source: a path; a hub id `owner/name` or `owner/name/folder`; rows already in memory (a list of dicts, a pandas
            DataFrame, a `datasets.Dataset`).
        split: which split of a hub or saved data set; "train" where there is one, or the only one.

    Returns:
        The records, and where they are from, for people to read.

    Raises:
        NotFoundError: no such file; names the nearest one beside it.
        DataError: it cannot be read, with the line or the byte where that is known.
    """
    if not isinstance(source, str | Path):
        return _in_memory(source), "rows in memory"
    path = Path(source).expanduser()
    if path.is_dir():
        records = _saved_datasets_folder(path, split)
    elif path.exists():
        records = _file(path)
    elif (
        isinstance(source, str)
        and _HUB_ID.fullmatch(source)
        and not _suffix(path)
        and not Path(source.split("/")[0]).exists()
    ):
        records = _hub(source, split)
    else:
        raise _missing(path)
    if not records:
        raise DataError(f"{source} has 0 rows; nothing to import")
    return plain_records(records), str(source)


def plain_records(records: Iterable[Mapping[str, Any]]) -> list[Record]:
    """Records as JSON values only: dates as text, NaN as null, halves of characters replaced."""
    return [{str(key): _plain(value, str(key)) for key, value in record.items()} for record in records]


def _plain(value: Any, column: str) -> Any:
    if isinstance(value, str):
        # A JSON file may hold half of a surrogate pair, which UTF-8 has no bytes for.
        return value if value.isascii() else value.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(inner, column) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, column) for inner in value]
    if isinstance(value, bytes | bytearray | memoryview):
        raise DataError(f"column {column!r} holds bytes, which a row cannot keep; remove the column, then import again")
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return _plain(value.tolist(), column)
    return str(value)


def _in_memory(source: Any) -> list[Record]:
    if hasattr(source, "to_dict") and hasattr(source, "columns"):
        records = source.to_dict("records")
    elif hasattr(source, "to_list"):
        records = source.to_list()
    elif isinstance(source, Iterable) and not isinstance(source, Mapping | bytes):
        records = list(source)
    else:
        raise DataError(f"cannot import a {type(source).__name__}; give a path, a hub id, or a list of dicts")
    if not records:
        raise DataError("0 rows given; nothing to import")
    if not all(isinstance(record, Mapping) for record in records):
        bad = next(index for index, record in enumerate(records) if not isinstance(record, Mapping))
        raise DataError(f"row {bad} is a {type(records[bad]).__name__}; every row must be a dict")
    return plain_records(records)


def _suffix(path: Path) -> str:
    """`.jsonl` of both x.jsonl and x.jsonl.gz; empty when it is none of the known ones."""
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in _READERS if name.endswith(suffix)), "")


def _missing(path: Path) -> NotFoundError:
    folder = path.parent
    if not folder.is_dir():
        return NotFoundError(f"no file {path}: its folder {folder} does not exist")
    hint = did_you_mean(path.name, (each.name for each in folder.iterdir()))
    return NotFoundError(f"no file {path}{hint or '; check the path, or give a hub id such as owner/name'}")


def _file(path: Path) -> list[Record]:
    suffix = _suffix(path)
    if not suffix:
        known = ", ".join(_READERS)
        raise DataError(
            f"{path}: file type {path.suffix or 'without extension'!r} is not known; known: {known}, each also .gz"
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    if not data:
        raise DataError(f"{path} is empty (0 bytes); export it again")
    if data.startswith(b"\x1f\x8b"):
        data = _gunzip(path, data)
    elif path.name.lower().endswith(".gz"):
        raise DataError(f"{path} is named .gz but is not gzip; rename it to what it is, or download it again")
    return _READERS[suffix](path, data)


def _gunzip(path: Path, data: bytes) -> bytes:
    try:
        unpacked = gzip.decompress(data)
    except EOFError:
        raise DataError(
            f"{path} is cut off: the gzip stream ends too early at byte {len(data):,}; download it again"
        ) from None
    except (OSError, zlib.error) as error:
        raise DataError(f"{path} is a damaged gzip file ({error}); download it again") from None
    if not unpacked:
        raise DataError(f"{path} is empty once unpacked (0 bytes); export it again")
    return unpacked


def _text(path: Path, data: bytes) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path} is UTF-16; convert it: iconv -f UTF-16 -t UTF-8 {path.name}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path} line {line}: byte 0x{data[error.start]:02x} is not UTF-8; if it is Latin-1, convert it: "
            f"iconv -f LATIN1 -t UTF-8 {path.name}"
        ) from None


def _jsonl(path: Path, data: bytes) -> list[Record]:
    records = []
    # Not splitlines(): it also splits at U+2028, which JSON allows inside strings.
    for number, line in enumerate(_text(path, data).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            cause = getattr(error, "msg", None) or type(error).__name__
            at = f" at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else ""
            raise DataError(f"{path} line {number} is not JSON ({cause}{at}); repair or remove that line") from None
        if not isinstance(record, dict):
            raise DataError(
                f"{path} line {number} is a {_json_name(record)}; every line must be an object with named columns"
            )
        records.append(record)
    return records


def _json(path: Path, data: bytes) -> list[Record]:
    try:
        value = json.loads(_text(path, data))
    except (ValueError, RecursionError) as error:
        if data.lstrip().startswith(b"{") and b"\n" in data.strip():
            return _jsonl(path, data)  # many .json files hold one object a line
        where = f" (line {error.lineno}: {error.msg})" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(
            f"{path} is not JSON{where}; repair it, or name it .jsonl if it holds one object a line"
        ) from None
    if isinstance(value, dict):
        lists = [inner for inner in value.values() if isinstance(inner, list) and inner and isinstance(inner[0], dict)]
        if len(lists) == 1 and "prompt" not in value and "messages" not in value and "conversations" not in value:
            value = lists[0]
        else:
            value = [value]
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise DataError(f"{path} holds a {_json_name(value)}; a list of objects is needed, one a row")
    return value


def _json_name(value: Any) -> str:
    names = {
        dict: "object",
        list: "list",
        str: "text",
        bool: "boolean",
        int: "number",
        float: "number",
        type(None): "null",
    }
    return names.get(type(value), type(value).__name__)


def _csv(path: Path, data: bytes) -> list[Record]:
    text = _text(path, data)
    header = text.split("\n", 1)[0]
    delimiter = max((",", ";", "\t"), key=header.count)
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, restkey=_TOO_MANY, strict=True)
    records = []
    try:
        for record in reader:
            if _TOO_MANY in record:
                raise DataError(
                    f"{path} line {reader.line_num}: more cells than the header has ({len(reader.fieldnames or ())}); "
                    "quote cells that hold the delimiter"
                )
            # The unnamed column is the row numbers that pandas writes.
            records.append({key: _cell(key, value) for key, value in record.items() if key})
    except csv.Error as error:
        where = f"{path} line {reader.reader.line_num}"
        raise DataError(f"{where} is not CSV ({error}); quote cells that hold quotes or line ends") from None
    if not records:
        raise DataError(f"{path} has a header and 0 rows; nothing to import")
    return records


def _cell(column: str, value: str | None) -> Any:
    """A cell as text; messages and lists, which CSV can only hold as JSON text, as themselves."""
    if value and value[0] in "[{" and _JSON_COLUMNS.fullmatch(column):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _parquet(path: Path, data: bytes) -> list[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        cause = str(error).strip().splitlines()[0]
        raise DataError(f"{path} is not a sound Parquet file ({cause}); download it again") from None


_READERS: dict[str, Callable[[Path, bytes], list[Record]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}


def _saved_datasets_folder(path: Path, split: str | None) -> list[Record]:
    if not any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json", "state.json")):
        files = sorted(each.name for each in path.iterdir() if each.is_file() and _suffix(each))
        hint = (
            f"name one of its files: {', '.join(files[:4])}"
            if files
            else "save one with datasets' save_to_disk, or name a file"
        )
        raise DataError(f"{path} is a folder, but no saved data set; {hint}")
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # noqa: BLE001 - datasets raises whatever its readers raise
        raise DataError(f"{path} cannot be loaded as a saved data set ({_first_line(error)}); save it again") from None
    return _one_split(loaded, split, str(path)).to_list()


def _hub(source: str, split: str | None) -> list[Record]:
    import datasets

    owner, name, *folder = source.split("/", 2)
    repo = f"{owner}/{name}"
    try:
        _ask_hub(repo)
        loaded = datasets.load_dataset(repo, data_dir=folder[0] if folder else None)
    except Exception as error:  # noqa: BLE001 - datasets, huggingface_hub and httpx each have their own
        raise _hub_error(repo, error) from None
    return _one_split(loaded, split, source).to_list()


def _ask_hub(repo: str) -> None:
    """Fail within seconds when there is no network or no such data set; load_dataset retries for half a minute."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    # Told to stay offline, load_dataset may still find the data set in its cache.
    with contextlib.suppress(OfflineModeIsEnabled):
        HfApi().dataset_info(repo, timeout=10)


def _hub_error(repo: str, error: Exception) -> Exception:
    said = f"{type(error).__name__}: {error}"
    causes = (
        " ".join(type(each).__name__ for each in (error, error.__cause__, error.__context__) if each is not None) + said
    )
    if re.search("Offline|ConnectionError|ConnectError|Timeout|MaxRetry|resolve|LocalEntryNotFound", causes):
        return UnavailableError(
            f"{repo} is not a file here, and the Hugging Face hub cannot be reached; check the network "
            "(and HF_HUB_OFFLINE), or download the file and give its path"
        )
    if re.search("NotFound|doesn't exist|401|Gated", causes):
        return NotFoundError(
            f"the hub has no data set {repo!r} that you may read; check the id, or log in with huggingface-cli"
        )
    return DataError(
        f"hub data set {repo} cannot be loaded ({_first_line(error)}); download one of its files and give its path"
    )


def _one_split(loaded: Any, split: str | None, source: str) -> Any:
    if not hasattr(loaded, "keys"):
        if split is not None and str(loaded.split) != split:
            raise DataError(f"split={split!r}: {source} is a single split; leave split out")
        return loaded
    names = list(loaded)
    wanted = split or ("train" if "train" in names else names[0] if len(names) == 1 else None)
    if wanted is None or wanted not in names:
        asked = f"split={split!r} is not in" if split else "choose a split of"
        raise DataError(f"{asked} {source}; it has {', '.join(names)}{did_you_mean(split or '', names)}")
    return loaded[wanted]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
