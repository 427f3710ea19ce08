"""The run directory: the truth of a run, and the only thing its processes share.

spec.json        what to compute; written once
events.jsonl     one writer at a time: rank 0, after its death the supervisor
control.jsonl    appended by agents, read by rank 0
attempt.json     which attempt this is and the checkpoint it continues from
supervisor.json  who watches, and in which phase
ranks/           per rank: who it is, its last error, how it ended
exit.json        how the attempt ended; written before the terminal event
log.txt          stdout and stderr of every process
checkpoints/  model/
data/            rows.jsonl, what the run made; made-<rank>.jsonl, what it has made so far
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from rlhf_nb.errors import StorageError
from rlhf_nb.protocol.events import TERMINAL, AnyEvent, parse_event
from rlhf_nb.protocol.spec import RunSpec

_WAYS_OUT = {
    errno.ENOSPC: "no space is left on the device; free some, then run.resume() continues from the last checkpoint",
    errno.EROFS: "the file system is read-only; put the workspace somewhere writable with %rlhf workspace PATH",
    errno.EACCES: "permission denied; choose a directory you may write with %rlhf workspace PATH",
    errno.EDQUOT: "the disk quota is used up; free some space",
}


@contextmanager
def storage_errors(path: Path | str) -> Iterator[None]:
    """Turn the operating system's refusals to write into one line with the path and the way out."""
    try:
        yield
    except OSError as error:
        if error.errno in _WAYS_OUT:
            raise StorageError(f"{path}: {_WAYS_OUT[error.errno]}") from error
        raise
    except Exception as error:
        # torch's and safetensors' writers are not Python's: a full disk reaches them as a short write.
        if not any(sign in str(error) for sign in ("No space left", "os error 28", "inline_container.cc")):
            raise
        raise StorageError(f"{path}: {_WAYS_OUT[errno.ENOSPC]}") from error


def write_json(path: Path, value: Any) -> None:
    """Write atomically and durably: a reader sees the old file or the whole new one."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with open(scratch, "w", encoding="utf-8") as handle:
            json.dump(value, handle, ensure_ascii=False, default=str)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(scratch, path)


def read_json(path: Path) -> Any | None:
    """The file's value, or None where it does not exist."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def append_line(path: Path, value: Any) -> None:
    """Append one JSON line with a single write, and make it durable before returning.

    A line that a killed writer left torn stays a line of its own, which `LineTail.read` passes over.
    """
    with storage_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            line = (json.dumps(value, ensure_ascii=False) + "\n").encode()
            before = os.fstat(descriptor).st_size
            if before and os.pread(descriptor, 1, before - 1) != b"\n":
                line = b"\n" + line
            if os.write(descriptor, line) < len(line):
                # A full disk takes a part of it, and the next line would be glued to that.
                os.ftruncate(descriptor, before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@dataclass(frozen=True)
class ProcessIdentity:
    """A process, not just a pid: pids are reused."""

    pid: int
    created: float
    """Unix seconds. It moves whenever the system's clock is set: where `ticks` is known, that counts."""
    ticks: int | None = None
    """Clock ticks between the machine's boot and the process's start, on Linux."""
    boot: str = ""
    """Which boot."""

    @classmethod
    def of(cls, pid: int | None = None) -> ProcessIdentity:
        process = psutil.Process(pid)
        return cls(process.pid, process.create_time(), _start_ticks(process.pid), _boot_id())

    @classmethod
    def from_dict(cls, value: dict[str, Any] | None) -> ProcessIdentity | None:
        if not value or not value.get("pid"):
            return None
        return cls(int(value["pid"]), float(value["created"]), value.get("ticks"), value.get("boot", ""))

    def to_dict(self) -> dict[str, Any]:
        return {"pid": self.pid, "created": self.created, "ticks": self.ticks, "boot": self.boot}

    def alive(self) -> bool:
        """True for this very process, running and not a zombie."""
        try:
            process = psutil.Process(self.pid)
            if self.ticks is not None:
                same = (_start_ticks(self.pid), _boot_id()) == (self.ticks, self.boot)
            else:
                same = abs(process.create_time() - self.created) < 0.05
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def _start_ticks(pid: int) -> int | None:
    try:
        # The name, in parentheses, may hold anything; the 22nd field of the line is the 20th after it.
        return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


@cache
def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


class LineTail:
    """Incremental reader of a JSONL file: whole lines only, from where the last read ended."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.path, self.offset = path, offset

    def read_raw(self, limit: int | None = None) -> list[bytes]:
        """The lines as they are, also those that a killed writer left torn."""
        try:
            size = os.stat(self.path).st_size
        except FileNotFoundError:
            return []
        if size <= self.offset:
            return []
        with open(self.path, "rb") as handle:
            handle.seek(self.offset)
            data = handle.read(limit) if limit else handle.read()
            if limit and b"\n" not in data:
                data += handle.readline()
        end = data.rfind(b"\n") + 1
        self.offset += end
        return data[:end].splitlines()

    def read(self) -> list[dict[str, Any]]:
        """The lines that are JSON objects: what a killed writer left torn must not end whoever reads on."""
        return _objects(self.read_raw())


def _objects(lines: list[bytes]) -> list[dict[str, Any]]:
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict):
                found.append(value)
    return found


class EventWriter:
    """Appends events with the next `seq`. Repairs a line that a killed writer left torn."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last_seq = _repair(path)
        with storage_errors(path):
            self._handle = open(path, "ab", buffering=0)

    def write(self, event: AnyEvent) -> AnyEvent:
        stamped = event.model_copy(update={"seq": self.last_seq + 1, "t": event.t or time.time()})
        line = (stamped.model_dump_json() + "\n").encode()
        with storage_errors(self.path):
            written = self._handle.write(line)
            if written != len(line):
                # A full disk may take a part of the line: take it back, so that the log stays whole.
                os.ftruncate(self._handle.fileno(), os.fstat(self._handle.fileno()).st_size - (written or 0))
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.last_seq += 1
        return stamped

    def close(self) -> None:
        self._handle.close()


def _repair(path: Path) -> int:
    """Drop a torn last line; return the last seq."""
    if not path.exists():
        return 0
    with open(path, "rb+") as handle:
        end = handle.seek(0, os.SEEK_END)
        if end == 0:
            return 0
        back = min(end, 1 << 16)
        while True:
            handle.seek(end - back)
            data = handle.read(back)
            complete = data.rfind(b"\n") + 1
            start = data.rfind(b"\n", 0, max(complete - 1, 0)) + 1
            if back == end or (complete and start):
                break
            back = min(end, back * 4)
        if complete != len(data):
            handle.truncate(end - back + complete)
        last = data[start:complete].strip()
        return int(json.loads(last)["seq"]) if last else 0


def _worker(option: str, path: Path) -> ProcessIdentity | None:
    """The oldest process whose command is the worker for `path`: a launcher's ends so, and so do its ranks'."""
    command, wanted = ["rlhf_nb.compute.worker", option], os.path.realpath(path)
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            last = process.cmdline()[-3:]
            if last[:2] == command and os.path.realpath(last[2]) == wanted:
                found.append(ProcessIdentity.of(process.pid))
    return min((one for one in found if one.alive()), key=lambda one: one.created, default=None)


RESERVE_BYTES = 1 << 16


class RunDir:
    """Paths and small readers of one run's directory."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.spec_path = self.path / "spec.json"
        self.events_path = self.path / "events.jsonl"
        self.control_path = self.path / "control.jsonl"
        self.exit_path = self.path / "exit.json"
        self.attempt_path = self.path / "attempt.json"
        self.supervisor_path = self.path / "supervisor.json"
        self.supervisor_lock = self.path / ".supervisor.lock"
        self.log_path = self.path / "log.txt"
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self.data = self.path / "data"
        self.rows_path = self.data / "rows.jsonl"
        self.ranks = self.path / "ranks"
        self._reserve = self.path / ".reserve"

    @property
    def run_id(self) -> str:
        return self.path.name

    def create(self, spec: RunSpec) -> None:
        with storage_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self.ranks.mkdir(exist_ok=True)
        write_json(self.spec_path, spec.model_dump(mode="json"))
        self.hold_reserve()

    def hold_reserve(self) -> None:
        """Take some space now, so that on a full disk there still is a place to say how a run ended."""
        with contextlib.suppress(OSError):
            self._reserve.write_bytes(b"\0" * RESERVE_BYTES)

    def release_reserve(self) -> None:
        with contextlib.suppress(OSError):
            self._reserve.unlink()

    def spec(self) -> RunSpec:
        return RunSpec.model_validate(read_json(self.spec_path))

    def exit(self) -> dict[str, Any] | None:
        return read_json(self.exit_path)

    def supervisor(self) -> dict[str, Any] | None:
        return read_json(self.supervisor_path)

    def attempt(self) -> dict[str, Any]:
        """`attempt`, counted from 1, and `resume_from`: a checkpoint directory relative to the run, or None."""
        return read_json(self.attempt_path) or {"attempt": 1, "resume_from": None}

    def rank_files(self, suffix: str = "") -> dict[int, dict[str, Any]]:
        """`ranks/<rank><suffix>.json` of this attempt, by rank. Suffixes: none (who), `.error`, `.exit`."""
        attempt, found = self.attempt()["attempt"], {}
        for path in self.ranks.glob(f"*{suffix}.json"):
            stem = path.name.removesuffix(".json").removesuffix(suffix)
            value = read_json(path) if stem.isdigit() else None
            if value and value.get("attempt", attempt) == attempt:
                found[int(stem)] = value
        return found

    def launcher(self) -> ProcessIdentity | None:
        """`accelerate launch` of this attempt, also where its supervisor was killed before it could record it."""
        state = self.supervisor() or {}
        if state.get("launcher") or state.get("phase") != "computing":
            return ProcessIdentity.from_dict(state.get("launcher"))
        if state.get("standby"):
            return _worker("--standby", self.path.parent / ".standby" / state["standby"])
        return _worker("--run", self.path)

    def alive(self) -> bool:
        """True while any process that computes this run lives: a rank, its watcher or the launcher."""
        known = [value for rank in self.rank_files().values() for value in (rank, rank.get("watcher"))]
        return any(one.alive() for one in [*map(ProcessIdentity.from_dict, known), self.launcher()] if one)

    def supervised(self) -> bool:
        who = ProcessIdentity.from_dict(self.supervisor())
        return who is not None and who.alive()

    def last_events(self, window: int = 1 << 18) -> list[dict[str, Any]]:
        """The whole lines among the log's last bytes, newest last."""
        try:
            with open(self.events_path, "rb") as handle:
                size = handle.seek(0, os.SEEK_END)
                handle.seek(max(0, size - window))
                data = handle.read()
        except FileNotFoundError:
            return []
        lines = data[: data.rfind(b"\n") + 1].splitlines()
        return _objects(lines if size <= window else lines[1:])

    def said_its_end(self) -> bool:
        """True where the log's last line is a terminal event."""
        last = self.last_events(1 << 17)
        return bool(last) and last[-1]["kind"] in TERMINAL

    def events(self, since: int = 0) -> list[AnyEvent]:
        return [event for event in map(parse_event, LineTail(self.events_path).read_raw()) if event.seq > since]

    def log_tail(self, lines: int = 20) -> list[str]:
        try:
            with open(self.log_path, "rb") as handle:
                handle.seek(max(0, handle.seek(0, os.SEEK_END) - 65536))
                text = handle.read().decode("utf-8", "replace")
        except FileNotFoundError:
            return []
        return text.splitlines()[-lines:]
