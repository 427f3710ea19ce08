"""What runs inside the attached Jupyter kernel: submit, tail, control, restart. It never trains and imports no torch.

A client executes `start(...)` once and from then on speaks over a comm. A request is `{"id", "op", ...}`; its answer
`{"re": id, "ok": bool, "result" | "error"}`. Events travel unasked: `{"sub", "first", "last"}` with the JSON lines,
exactly as they are in the log, as a binary buffer.
"""

from __future__ import annotations

import contextvars
import hashlib
import os
import re
import shutil
import subprocess
import threading
import time
import traceback
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import rlhf_nb
from rlhf_nb.compute import launch as launching
from rlhf_nb.compute import listing, standby
from rlhf_nb.compute.connection import TARGET, WIRE
from rlhf_nb.compute.rundir import (
    EventWriter,
    LineTail,
    RunDir,
    append_line,
    storage_errors,
    write_json,
)
from rlhf_nb.compute.supervisor import Lock, ensure_supervised, hand_over, parent_state, reap, start_supervisor
from rlhf_nb.compute.turns import Turns
from rlhf_nb.errors import ComputeError, NotFoundError, RlhfError, RunIdTakenError, SpecError, did_you_mean
from rlhf_nb.protocol.control import parse_control
from rlhf_nb.protocol.events import TERMINAL, Resumed
from rlhf_nb.protocol.spec import BlobData, Launch, RunSpec

CHUNK = 1 << 20
"""Bytes of events in one message."""
BLOB_CHUNK = 4 << 20
"""Bytes of rows in one message."""
PUSH_S = 0.025
"""Seconds between two pushes to one subscriber, except while it catches up."""
LOOK_S = 0.008
SILENT_S = 60.0
"""Seconds after the last sign of a client until nothing is sent to it: a killed notebook says no farewell."""
PUT_AWAY_S = 30.0
"""Seconds a restart waits until the attempt before it is put away; its client waits twice as long for the answer."""
VERDICT_S = 3.0
"""Seconds to wait for a supervisor's verdict on a run whose processes are gone."""
_SEQ = re.compile(rb'"seq": ?(\d+)')
_BLOB_NAME = re.compile(r"[0-9a-f]{16,128}")
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

_agent: Agent | None = None


def default_runs_root() -> Path:
    return Path(os.environ.get("RLHF_NB_RUNS") or "~/.local/share/rlhf_nb/runs").expanduser()


def start(
    comm_manager: Any, *, runs_root: str | None = None, launch: list[str] | None = None, keep_standby: bool = True
) -> None:
    """Called once in the kernel by whoever attaches; again, it changes launch flags and standby of the same agent."""
    global _agent
    root = Path(runs_root).expanduser().resolve() if runs_root else default_runs_root().resolve()
    if _agent is not None and _agent.runs_root != root:
        _agent.close()
        _agent = None
    flags = Launch(flags=tuple(launch or ()))
    if _agent is None:
        _agent = Agent(root, flags, keep_standby)
    else:
        _agent.configure(flags, keep_standby)
    comm_manager.register_target(TARGET, _agent.connect)


class Agent:
    def __init__(self, runs_root: Path, launch: Launch, keep_standby: bool) -> None:
        self.runs_root = runs_root
        self.blobs = runs_root / ".blobs"
        with storage_errors(runs_root):
            self.blobs.mkdir(parents=True, exist_ok=True)
        self.turns = Turns(runs_root)
        self.launch, self.keep_standby = launch, keep_standby
        self.sessions: list[Session] = []
        self.pool = ThreadPoolExecutor(8, thread_name_prefix="rlhf-agent")
        self.offsets: dict[str, Offsets] = {}
        self._children: list[subprocess.Popen[bytes]] = []
        self._standby: tuple[standby.Standby, subprocess.Popen[bytes]] | None = None
        self._standby_problem = ""
        self._closing = threading.Event()
        self._restarting = threading.Lock()
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._monitor, self._push)]
        for thread in self._threads:
            thread.start()

    def configure(self, launch: Launch, keep_standby: bool) -> None:
        if launch != self.launch or not keep_standby:
            self._dismiss()
        self.launch, self.keep_standby, self._standby_problem = launch, keep_standby, ""

    def connect(self, comm: Any, message: dict[str, Any]) -> None:
        data = message["content"]["data"]
        session = Session(self, comm, compress=bool(data.get("compress")))
        self.sessions.append(session)
        session.send({"hello": WIRE})

    def listening(self) -> list[Session]:
        return [session for session in self.sessions if not session.silent]

    def close(self) -> None:
        self._closing.set()
        self._dismiss()

    # Background -----------------------------------------------------------------------------------------------------

    def _monitor(self) -> None:
        for run_id in listing.forgotten(self.runs_root):
            self.turns.enter(run_id, time.time())
        standby.sweep(self.runs_root)
        looked = 0.0
        while not self._closing.is_set():
            try:
                self._children = [child for child in self._children if child.poll() is None]
                reap()
                if time.monotonic() - looked > 1:
                    looked = time.monotonic()
                    for run_id in self.turns.unfinished():
                        ensure_supervised(self.runs_root / run_id)
                self._tend_standby()
                state = self.standby_state()
                for session in self.listening():
                    if session.standby != state:
                        session.standby = state
                        session.send({"standby": state})
            except Exception:  # noqa: BLE001
                # A full disk or a vanished directory must not end the watching; the next look may succeed.
                traceback.print_exc()
            self._closing.wait(0.1)

    def _tend_standby(self) -> None:
        if self._standby is not None:
            mine, process = self._standby
            left = process.poll() is not None
            if mine.taken:
                # It reads nothing from its stdin any more.
                self._children.append(process)
                self._standby = None
            elif left:
                last = RunDir(mine.path).log_tail(1)
                self._standby_problem = last[0] if last else f"it left with code {process.returncode}"
                mine.remove()
                self._standby = None
        wanted = self.keep_standby and not self._standby_problem and self._standby is None
        if wanted and not self._run_is_starting() and standby.memory_allows():
            self._standby = standby.start(self.runs_root, self.launch)

    def _dismiss(self) -> None:
        if self._standby is not None:
            _, process = self._standby
            if process.stdin is not None:
                process.stdin.close()
            self._children.append(process)
            self._standby = None

    def _run_is_starting(self) -> bool:
        """A run that computes and has no metric yet: a standby that imports now would only slow it down."""
        for run_id in self.turns.unfinished():
            run = RunDir(self.runs_root / run_id)
            if (run.supervisor() or {}).get("phase") == "computing" and not listing.has_metric(run):
                return True
        return False

    def standby_state(self) -> dict[str, Any]:
        if self._standby is not None:
            mine = self._standby[0]
            seconds = mine.seconds_to_ready() if mine.ready() else None
            return {"state": "ready", "seconds": round(seconds, 2)} if seconds is not None else {"state": "warming"}
        if not self.keep_standby:
            return {"state": "off", "reason": "standby=False"}
        if self._standby_problem:
            return {"state": "failed", "reason": self._standby_problem}
        if not standby.memory_allows():
            return {"state": "off", "reason": f"less than {standby.MEMORY_NEEDED >> 30} GiB of memory are free"}
        return {"state": "warming"} if not self._run_is_starting() else {"state": "taken"}

    def _push(self) -> None:
        while not self._closing.is_set():
            busy, listening = False, self.listening()
            for session in listening:
                for subscription in list(session.subscriptions.values()):
                    try:
                        busy |= subscription.push()
                    except Exception:  # noqa: BLE001 - one subscriber's log must not silence the others
                        traceback.print_exc()
                        session.subscriptions.pop(subscription.name, None)
            if not busy:
                time.sleep(LOOK_S if any(session.subscriptions for session in listening) else 0.05)

    # Requests -------------------------------------------------------------------------------------------------------

    def run_dir(self, run_id: str) -> RunDir:
        run = RunDir(self.runs_root / run_id)
        if not _RUN_ID.fullmatch(run_id) or not run.spec_path.exists():
            known = listing.run_ids(self.runs_root)
            raise NotFoundError(f'run "{run_id}" is not on the attached compute{did_you_mean(run_id, known)}')
        return run

    def op_info(self) -> dict[str, Any]:
        return {
            **launching.host(),
            "runs_root": str(self.runs_root),
            "pid": os.getpid(),
            "standby": self.standby_state(),
            "launch": list(self.launch.flags),
            "package": rlhf_nb.__version__,
        }

    def op_has_blob(self, hashes: list[str]) -> list[bool]:
        return [self._blob(name).exists() for name in hashes]

    def _blob(self, name: str) -> Path:
        if not _BLOB_NAME.fullmatch(name):
            raise ComputeError(f"{name!r} is no content hash")
        return self.blobs / f"{name}.jsonl"

    def op_put_blob(self, name: str, offset: int, last: bool, content: bytes) -> None:
        """One piece. The last one verifies the hash and makes the blob visible under its name."""
        target = self._blob(name)
        scratch = target.with_suffix(f".{threading.get_native_id() if last and not offset else 'part'}")
        with storage_errors(self.blobs):
            with open(scratch, "r+b" if offset else "wb") as handle:
                handle.seek(offset)
                handle.write(content)
                if last:
                    handle.flush()
                    os.fsync(handle.fileno())
            if last:
                with open(scratch, "rb") as handle:
                    found = hashlib.file_digest(handle, "sha256").hexdigest()
                if not found.startswith(name):
                    scratch.unlink()
                    raise ComputeError(
                        f"rows arrived damaged: content hash {found[:12]}, expected {name[:12]}; submit again"
                    )
                os.replace(scratch, target)

    def op_rows(self, run_id: str, offset: int) -> tuple[dict[str, Any], bytes]:
        """One piece of the rows a run made."""
        path = self.run_dir(run_id).rows_path
        with open(path, "rb") as handle:
            handle.seek(offset)
            piece = handle.read(BLOB_CHUNK)
            return {"more": handle.tell() < os.fstat(handle.fileno()).st_size}, piece

    def op_submit(self, spec: dict[str, Any]) -> dict[str, Any]:
        asked = RunSpec.model_validate(spec)
        if not _RUN_ID.fullmatch(asked.run_id):
            raise SpecError(f"run_id={asked.run_id!r} cannot name a directory; letters, digits, dots and dashes")
        run = RunDir(self.runs_root / asked.run_id)
        if run.attempt_path.exists():
            if run.spec() != asked:
                raise RunIdTakenError(
                    f"run {asked.run_id} exists on the attached compute with another spec; choose another id"
                )
            return {"created": False}
        for rows in asked.data_sets:
            if isinstance(rows, BlobData) and not self._blob(rows.content_hash).exists():
                raise ComputeError(f'data "{rows.name}" has not arrived on the compute; import it again')
        lock = Lock(run)
        try:
            run.create(asked)
            lock.take()
            # The attempt comes last: a directory without it was never submitted, and submitting again completes it.
            self.turns.enter(asked.run_id, time.time())
            write_json(run.attempt_path, {"attempt": 1, "resume_from": None})
            self._begin(run, asked, lock)
        except OSError:
            self.turns.leave(asked.run_id)
            shutil.rmtree(run.path, ignore_errors=True)
            raise
        finally:
            lock.release()
        return {"created": True}

    def _begin(self, run: RunDir, spec: RunSpec, lock: Lock) -> None:
        """Straight to a standby where nothing is in the way, which saves a process start; else through a supervisor.

        Args:
            lock: Held: until the standby's supervisor is known as the run's, whoever looks for runs without one would
                start another, and the job be done twice.
        """
        if all(parent_state(self.runs_root, parent)[0] == "ready" for parent in spec.parents):
            with self.turns.lock():
                if self.turns.ahead_of(run.run_id) is None:
                    taken, _ = standby.claim(self.runs_root, spec.launch)
                    if taken is not None:
                        hand_over(run, taken)
                        return
        lock.release()
        start_supervisor(run)

    def op_runs(self) -> list[dict[str, Any]]:
        return listing.runs(self.runs_root)

    def op_spec(self, run_id: str) -> dict[str, Any]:
        return self.run_dir(run_id).spec().model_dump(mode="json")

    def op_status(self, run_id: str) -> dict[str, Any]:
        """One row. Where the processes have just gone, it waits for the supervisor to write how they ended."""
        run = self.run_dir(run_id)
        deadline = time.monotonic() + VERDICT_S
        while True:
            row = listing.describe(run)
            if row["phase"] == "ended" or row["state"] not in TERMINAL or time.monotonic() > deadline:
                return row
            time.sleep(0.02)

    def op_events(self, run_id: str, since: int) -> tuple[dict[str, Any], bytes]:
        reader = Reader(self, self.run_dir(run_id), since)
        data, first, last = reader.chunk()
        return {"first": first, "last": last, "more": reader.more}, data

    def op_control(self, run_id: str, control: dict[str, Any]) -> None:
        line = parse_control(control).model_dump(mode="json")
        run = self.run_dir(run_id)
        if run.exit() is not None:
            raise ComputeError(f"{run_id} has ended: {line['op']} has nothing to act on")
        append_line(run.control_path, line)

    def op_restart(self, run_id: str) -> dict[str, Any]:
        """A new attempt from the last checkpoint, or from the start where there is none."""
        run = self.run_dir(run_id)
        with self._restarting:
            ended = run.exit()
            if ended is None:
                raise ComputeError(f"{run_id} has not ended; %rlhf pause and %rlhf resume act on a live run")
            if ended["outcome"] == "finished":
                raise ComputeError(f"{run_id} has finished; train from its model instead: policy={run_id}")
            lock = Lock(run)
            # Its supervisor keeps the lock until the launcher has left or been ended, which may take seconds.
            if not lock.take(timeout=PUT_AWAY_S):
                raise ComputeError(f"{run_id} is still being put away; try again in a few seconds")
            try:
                attempt = int(ended["attempt"]) + 1
                checkpoint, step = listing.last_checkpoint(run)
                with storage_errors(run.path):
                    for path in run.ranks.glob("*.json"):
                        path.unlink()
                    run.hold_reserve()
                    write_json(run.attempt_path, {"attempt": attempt, "resume_from": checkpoint})
                    os.replace(run.exit_path, run.path / f"exit.{ended['attempt']}.json")
                    run.supervisor_path.unlink(missing_ok=True)
                    writer = EventWriter(run.events_path)
                    writer.write(Resumed(step=step, attempt=attempt, from_step=step))
                    writer.close()
                self.turns.enter(run_id, time.time())
                self._begin(run, run.spec(), lock)
            finally:
                lock.release()
        return {"attempt": attempt, "from_step": step}

    def op_log_tail(self, run_id: str, lines: int) -> list[str]:
        return self.run_dir(run_id).log_tail(lines)

    def op_doctor(self) -> list[dict[str, Any]]:
        return listing.doctor(self.runs_root, self.standby_state())


class Session:
    """One client's comm. Requests run on the agent's threads, so that a slow disk never holds up the kernel.

    A client that pings and then falls silent is sent nothing until it is heard again, from where it was: a laptop may
    have slept. One that never pings, since its kernel hears nothing while a cell runs, is sent everything.
    """

    def __init__(self, agent: Agent, comm: Any, compress: bool) -> None:
        self.agent, self.comm, self.compress = agent, comm, compress
        self.subscriptions: dict[str, Subscription] = {}
        self.standby: dict[str, Any] | None = None
        """The standby as this client last heard of it."""
        self._heard, self._pings = time.monotonic(), False
        self._sending = threading.Lock()
        # ipykernel takes the parent of what a thread sends from the cell that runs, and from then on hands the comm's
        # requests to that cell's shell: as if it were always said in answer to the comm's opening, it stays in its own.
        self._context = contextvars.copy_context()
        comm.on_msg(self._received)
        comm.on_close(lambda _: self.close())

    def close(self) -> None:
        self.subscriptions.clear()
        if self in self.agent.sessions:
            self.agent.sessions.remove(self)

    @property
    def silent(self) -> bool:
        return self._pings and time.monotonic() - self._heard > SILENT_S

    def send(self, data: dict[str, Any], content: bytes | None = None) -> None:
        if content is not None and self.compress:
            data, content = {**data, "z": True}, zlib.compress(content, 1)
        with self._sending:
            self._context.run(self.comm.send, data, buffers=None if content is None else [content])

    def _received(self, message: dict[str, Any]) -> None:
        self._heard = time.monotonic()
        request = dict(message["content"]["data"])
        self._pings |= request.get("op") == "ping"
        buffers = message.get("buffers") or []
        if buffers:
            request["content"] = bytes(buffers[0])
        self.agent.pool.submit(self._answer, request)

    def _answer(self, request: dict[str, Any]) -> None:
        asked, op = request.pop("id"), request.pop("op")
        content: bytes | None = None
        try:
            result = self._handler(op)(**request)
            if isinstance(result, tuple):
                result, content = result
            self.send({"re": asked, "ok": True, "result": result}, content)
        except Exception as error:  # noqa: BLE001 - it travels to whoever asked
            if not isinstance(error, RlhfError):
                traceback.print_exc()
            said = {"type": type(error).__name__, "message": str(error)}
            self.send({"re": asked, "ok": False, "error": said})

    def _handler(self, op: str) -> Callable[..., Any]:
        match op:
            case "subscribe":
                return self._subscribe
            case "ping":
                return lambda: None
            case "unsubscribe":
                return lambda sub: self.subscriptions.pop(sub, None) and None
        handler = getattr(self.agent, f"op_{op}", None)
        if handler is None:
            raise ComputeError(f"the agent knows no {op!r}: notebook and compute have different versions of rlhf_nb")
        return handler

    def _subscribe(self, sub: str, run_id: str, since: int) -> None:
        self.subscriptions[sub] = Subscription(self, sub, Reader(self.agent, self.agent.run_dir(run_id), since))


class Offsets:
    """Where in a log a seq begins, as far as it was read: a reader that asks for the newest skips what is old."""

    def __init__(self) -> None:
        self._marks: list[tuple[int, int]] = [(0, 0)]
        self._lock = threading.Lock()

    def add(self, last_seq: int, offset: int) -> None:
        with self._lock:
            if last_seq > self._marks[-1][0]:
                self._marks.append((last_seq, offset))
                if len(self._marks) > 4096:
                    self._marks = self._marks[::2] + self._marks[-1:]

    def before(self, since: int) -> int:
        with self._lock:
            return next(offset for seq, offset in reversed(self._marks) if seq <= since)


class Reader:
    """Chunks of whole lines of one run's log, after `since`."""

    def __init__(self, agent: Agent, run: RunDir, since: int) -> None:
        self.since, self.more = since, False
        self._offsets = agent.offsets.setdefault(run.run_id, Offsets())
        self._tail = LineTail(run.events_path, self._offsets.before(since))

    def chunk(self) -> tuple[bytes, int, int]:
        """Lines, first and last seq. Empty with first = last = 0 where there is nothing new."""
        while True:
            before = self._tail.offset
            lines = self._tail.read_raw(CHUNK)
            # A read that filled the chunk; a short one has come to the end of the log.
            self.more = self._tail.offset - before > CHUNK // 2
            if not lines:
                return b"", 0, 0
            last = _seq(lines[-1])
            self._offsets.add(last, self._tail.offset)
            if last <= self.since:
                continue
            if _seq(lines[0]) <= self.since:
                lines = [line for line in lines if _seq(line) > self.since]
            self.since = last
            return b"\n".join(lines), _seq(lines[0]), last


def _seq(line: bytes) -> int:
    found = _SEQ.search(line, 0, 64)
    if found is None:
        raise ComputeError(f"a line of the log has no seq: {line[:80]!r}")
    return int(found.group(1))


class Subscription:
    def __init__(self, session: Session, name: str, reader: Reader) -> None:
        self.session, self.name, self.reader = session, name, reader
        self._pushed = 0.0

    def push(self) -> bool:
        """Send what is new. True while there is more to catch up with."""
        if time.monotonic() - self._pushed < PUSH_S and not self.reader.more:
            return False
        data, first, last = self.reader.chunk()
        if not data:
            return False
        self._pushed = time.monotonic()
        self.session.send({"sub": self.name, "first": first, "last": last}, data)
        return self.reader.more
