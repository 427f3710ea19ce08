"""The notebook's side of the attached compute: requests to the agent, and events from it."""

from __future__ import annotations

import contextlib
import hashlib
import queue
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rlhf_nb.compute.connection import Connection, ConnectionLostError
from rlhf_nb.compute.transports.base import Launcher
from rlhf_nb.errors import ComputeError, RlhfError
from rlhf_nb.protocol.control import Control
from rlhf_nb.protocol.events import AnyEvent, parse_event
from rlhf_nb.protocol.spec import Launch, RunSpec

if TYPE_CHECKING:
    from rlhf_nb.protocol.fold import RunFold

ATTACH_S = 120.0
REQUEST_S = 60.0
PING_S = 15.0
"""Seconds between two signs of life; after `agent.SILENT_S` without one the agent sends nothing more."""
BLOB_CHUNK = 4 << 20

Callback = Callable[[list[AnyEvent]], None]


@dataclass(frozen=True, repr=False)
class AttachInfo:
    """What is attached, as it is said in one line."""

    name: str
    kind: str
    device: str
    threads: int
    versions: dict[str, str]
    runs_root: str
    seconds: float
    """From attach to the agent's first answer."""
    standby: str
    """ready | warming | taken | off | failed"""
    standby_seconds: float | None
    standby_reason: str
    launch: tuple[str, ...]
    host: str
    agent_pid: int

    def line(self) -> str:
        """`attached local · CPU, 2 threads · torch 2.13 trl 1.16 · standby ready in 5.1 s`"""
        packages = " ".join(
            f"{name} {_short(self.versions[name])}" for name in ("torch", "trl") if name in self.versions
        )
        match self.standby:
            case "ready":
                standby = f"standby ready in {self.standby_seconds:.1f} s"
            case "off" | "failed":
                standby = f"standby {self.standby}" + (f" ({self.standby_reason})" if self.standby_reason else "")
            case _:
                standby = f"standby {self.standby}"
        parts = [f"attached {self.name}", self.device, packages or "no torch: pip install 'rlhf-nb[train]'", standby]
        if self.launch:
            parts.insert(2, f"launch {' '.join(self.launch)}")
        return " · ".join(parts)

    __repr__ = __str__ = line


def _short(number: str) -> str:
    return ".".join(number.split("+")[0].split(".")[:2])


class Subscription:
    """Events of one run, pushed. `close` ends it; a gap or a new agent is healed by asking again from the last seq."""

    def __init__(self, client: Client, run_id: str, since: int, callback: Callback) -> None:
        self.id, self.run_id, self.last_seq = uuid.uuid4().hex, run_id, since
        self._client, self._callback = client, callback
        self._taking = threading.Lock()
        self.closed = False

    def close(self) -> None:
        self._client._unsubscribe(self)

    def _take(self, first: int, content: bytes) -> bool:
        """Deliver what is new; False where lines are missing before it."""
        # A client that takes over asks again while a batch of the one before may still be on its way to the callback.
        with self._taking:
            if first > self.last_seq + 1:
                return False
            events = [event for event in parse_lines(content) if event.seq > self.last_seq]
            if events and not self.closed:
                self.last_seq = events[-1].seq
                self._callback(events)
            return True


def parse_lines(content: bytes) -> list[AnyEvent]:
    return [parse_event(line) for line in content.splitlines() if line]


class Client:
    """Thread-safe. Callbacks of subscriptions come from a thread of the client's own, one after another.

    Where this side started the kernel and it dies, the client starts another and goes on: the new agent reads the run
    directories, and every subscription continues after the last seq it delivered.
    """

    def __init__(
        self,
        launcher: Launcher,
        *,
        runs_root: str | None = None,
        launch: Launch | None = None,
        standby: bool = True,
        timeout: float = ATTACH_S,
    ) -> None:
        """Attach.

        Args:
            runs_root: Where runs live on the compute side; None leaves it to that side.
            launch: Flags with which a standby is kept.
            timeout: Seconds until the agent must have answered.

        Raises:
            AttachError: No kernel, no answer, or a kernel without this package.
        """
        self.launcher = launcher
        self._setup = {"runs_root": runs_root, "launch": list((launch or Launch()).flags), "keep_standby": standby}
        self._timeout = timeout
        self._lock = threading.RLock()
        self._subscriptions: dict[str, Subscription] = {}
        self._deliveries: queue.SimpleQueue[tuple[Subscription, dict[str, Any], bytes] | None] = queue.SimpleQueue()
        self._listeners: list[Callable[[AttachInfo], None]] = []
        self._closed = False
        self._lost: str | None = None
        """Why there is no connection, once no other could be made."""
        self._connected = threading.Event()
        self._reason = ""
        self._connection: Connection | None = None
        self._ended = threading.Event()
        for target, name in ((self._deliver, "rlhf-events"), (self._ping, "rlhf-ping")):
            threading.Thread(target=target, name=name, daemon=True).start()
        try:
            self.info = self._connect()
        except BaseException:
            self.close()
            raise

    @classmethod
    def attach(
        cls,
        launcher: Launcher,
        *,
        runs_root: str | None = None,
        launch: Launch | None = None,
        standby: bool = True,
        workspace_id: str = "",
    ) -> Client:
        return cls(launcher, runs_root=runs_root, launch=launch, standby=standby)

    def _connect(self) -> AttachInfo:
        began = time.monotonic()
        connection = Connection(self.launcher, self._from_agent, lambda reason: self._gone(connection, reason))
        self._connection = connection
        try:
            connection.open(self._timeout, **self._setup)
            said = connection.request("info", None, REQUEST_S, {})
        except BaseException:
            connection.close(kill=True)
            raise
        info = AttachInfo(
            name=self.launcher.name,
            kind=self.launcher.kind,
            device=said["device"],
            threads=said["threads"],
            versions=said["versions"],
            runs_root=said["runs_root"],
            seconds=round(time.monotonic() - began, 3),
            launch=tuple(said["launch"]),
            host=said["host"],
            agent_pid=said["pid"],
            **_standby_fields(said["standby"]),
        )
        self._connected.set()
        return info

    def _gone(self, connection: Connection, reason: str) -> None:
        """The connection is lost, unless it never stood or was closed."""
        if self._closed or connection is not self._connection or not self._connected.is_set():
            return
        self._connected.clear()
        self._reason = reason
        threading.Thread(target=self._attach_again, args=(connection, reason), name="rlhf-attach", daemon=True).start()

    def _attach_again(self, old: Connection, reason: str) -> None:
        old.close(kill=True)
        for pause in (0.0, 1.0, 3.0):
            time.sleep(pause)
            if self._closed:
                return
            try:
                info = self._connect()
            except (RlhfError, OSError):
                continue
            if self._closed:
                if self._connection is not None:
                    self._connection.close(kill=True)
                return
            self._tell(info)
            for subscription in list(self._subscriptions.values()):
                self._send_subscribe(subscription)
            return
        self._lost = reason
        self._connected.set()

    def _live(self, timeout: float) -> Connection:
        """The connection; while another is being made, wait for it."""
        if self._closed:
            raise ComputeError("detached; %rlhf attach local attaches again")
        if not self._connected.wait(timeout):
            raise ComputeError(f"{self.launcher.name}: {self._reason}; attaching again takes longer than {timeout:g} s")
        if self._lost is not None:
            raise ComputeError(f"{self._lost}; %rlhf attach starts another, and runs go on")
        assert self._connection is not None
        return self._connection

    def wait_standby(self, timeout: float = 60.0) -> AttachInfo:
        """Wait until the standby is ready, off or failed, or the time is over; the info as it is then."""
        deadline = time.monotonic() + timeout
        while self.info.standby in ("warming", "taken") and time.monotonic() < deadline and self.alive:
            time.sleep(0.02)
        return self.info

    def on_info(self, listener: Callable[[AttachInfo], None]) -> None:
        """Call `listener` whenever the standby's state or the agent changes."""
        self._listeners.append(listener)

    # Receiving --------------------------------------------------------------------------------------------------------

    def _from_agent(self, data: dict[str, Any], content: bytes) -> None:
        if "sub" in data:
            subscription = self._subscriptions.get(data["sub"])
            if subscription is not None:
                self._deliveries.put((subscription, data, content))
        elif "reconnected" in data:
            for subscription in list(self._subscriptions.values()):
                self._send_subscribe(subscription)
        elif "standby" in data and hasattr(self, "info"):
            self._tell(replace(self.info, **_standby_fields(data["standby"])))

    def _tell(self, info: AttachInfo) -> None:
        self.info = info
        for listener in list(self._listeners):
            listener(info)

    def _deliver(self) -> None:
        while (item := self._deliveries.get()) is not None:
            subscription, data, content = item
            if subscription.closed or subscription._client is not self:
                continue
            try:
                if not subscription._take(data["first"], content):
                    self._send_subscribe(subscription)
            except Exception:  # noqa: BLE001
                # A callback's fault is its own; the next batch and the other subscribers still get theirs.
                traceback.print_exc()

    def _ping(self) -> None:
        while not self._ended.wait(PING_S):
            # A line that is down is the link's affair; the agent must hear again once it stands.
            with contextlib.suppress(Exception):
                if self._connection is not None and self._connection.alive:
                    self._connection.ping()

    # Requests ---------------------------------------------------------------------------------------------------------

    def request(self, op: str, content: bytes | None = None, *, timeout: float = REQUEST_S, **arguments: Any) -> Any:
        """One request to the agent and its result. The agent's errors are raised here as what they are."""
        try:
            return self._live(timeout).request(op, content, timeout, arguments)
        except ConnectionLostError:
            # Every request may be made twice: runs, rows and control lines carry ids.
            return self._live(timeout).request(op, content, timeout, arguments)

    def submit(self, spec: RunSpec, blobs: dict[str, bytes] | None = None) -> None:
        """Send rows that are not there yet, then the spec. Submitting the same run again changes nothing.

        Raises:
            StorageError: The compute side cannot write.
        """
        blobs = blobs or {}
        names = list(blobs)
        if names:
            for name, there in zip(names, self.request("has_blob", hashes=names), strict=True):
                if not there:
                    self._put_blob(name, blobs[name])
        self.request("submit", spec=spec.model_dump(mode="json"))

    def _put_blob(self, name: str, content: bytes) -> None:
        found = hashlib.sha256(content).hexdigest()
        if not found.startswith(name):
            raise ComputeError(f"rows have content hash {found[:12]}, the spec says {name[:12]}")
        for offset in range(0, max(1, len(content)), BLOB_CHUNK):
            piece = content[offset : offset + BLOB_CHUNK]
            self.request("put_blob", piece, name=name, offset=offset, last=offset + BLOB_CHUNK >= len(content))

    def rows(self, run_id: str) -> bytes:
        """The rows a run made, as canonical JSONL."""
        pieces: list[bytes] = []
        while True:
            said, piece = self.request("rows", run_id=run_id, offset=sum(map(len, pieces)))
            pieces.append(piece)
            if not said["more"]:
                return b"".join(pieces)

    def runs(self) -> list[dict[str, Any]]:
        """Every run on the compute side, oldest first."""
        return self.request("runs")

    def spec(self, run_id: str) -> RunSpec:
        return RunSpec.model_validate(self.request("spec", run_id=run_id))

    def status(self, run_id: str) -> dict[str, Any]:
        """One row of `runs`."""
        return self.request("status", run_id=run_id)

    def state(self, run_id: str, fold: RunFold) -> str:
        """waiting | starting | running | paused | finished | stopped | failed. The processes have the last word."""
        if fold.is_terminal:
            return fold.state
        row = self.status(run_id)
        started = fold.started is not None and fold.started.attempt == row["attempt"]
        return fold.state if started and row["state"] in ("running", "paused") else str(row["state"])

    def events(self, run_id: str, since: int = 0) -> list[AnyEvent]:
        """Every event after `since`."""
        found: list[AnyEvent] = []
        said, content = self.request("events", run_id=run_id, since=since)
        while said["more"]:
            # The agent reads the next piece while this one is parsed.
            connection = self._live(REQUEST_S)
            try:
                coming = connection.begin("events", {"run_id": run_id, "since": said["last"]})
                found += parse_lines(content)
                said, content = connection.answer(coming, "events", REQUEST_S)
            except ConnectionLostError:
                return found + self.events(run_id, found[-1].seq if found else since)
        return found + parse_lines(content)

    def subscribe(self, run_id: str, since: int, callback: Callback) -> Subscription:
        """`callback` with every event after `since`, in order, each once, until `close`."""
        subscription = Subscription(self, run_id, since, callback)
        self._subscriptions[subscription.id] = subscription
        try:
            self.request("subscribe", sub=subscription.id, run_id=run_id, since=since)
        except BaseException:
            self._subscriptions.pop(subscription.id, None)
            raise
        return subscription

    def release(self) -> list[Subscription]:
        """Every subscription, open and silent, for the client that comes after this one; see `adopt`."""
        with self._lock:
            released, self._subscriptions = list(self._subscriptions.values()), {}
        return released

    def adopt(self, subscriptions: Iterable[Subscription]) -> None:
        """Go on with what another client released, after the last seq each has had. One whose run is not here waits."""
        for subscription in subscriptions:
            if not subscription.closed:
                subscription._client = self
                self._subscriptions[subscription.id] = subscription
                self._send_subscribe(subscription)

    def _send_subscribe(self, subscription: Subscription) -> None:
        """Ask again from the last seq, without waiting for the answer."""
        arguments = {"sub": subscription.id, "run_id": subscription.run_id, "since": subscription.last_seq}
        if self._connection is not None:
            self._connection.post("subscribe", arguments)

    def _unsubscribe(self, subscription: Subscription) -> None:
        subscription.closed = True
        known = self._subscriptions.pop(subscription.id, None)
        if known is not None and self._connection is not None and self._connection.alive:
            self._connection.post("unsubscribe", {"sub": subscription.id})

    def control(self, run_id: str, control: Control) -> None:
        """Returns when the line is durable in the run's directory."""
        self.request("control", run_id=run_id, control=control.model_dump(mode="json"))

    def resume(self, run_id: str) -> dict[str, Any]:
        """A new attempt of a failed or stopped run, from its last checkpoint: `attempt`, `from_step`."""
        return self.request("restart", run_id=run_id)

    def log_tail(self, run_id: str, lines: int = 20) -> list[str]:
        return self.request("log_tail", run_id=run_id, lines=lines)

    def doctor(self) -> list[dict[str, Any]]:
        """Checks of the compute side: dicts of `check`, `ok`, `text`."""
        return self.request("doctor")

    # The end ----------------------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """True while requests have a way to the agent, also while another kernel is being started."""
        return not self._closed and self._lost is None

    def close(self, kill_agent: bool = True) -> None:
        """Let go. With `kill_agent`, a kernel that this attach started ends, and an idle standby too; runs go on."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for subscription in self._subscriptions.values():
                subscription.closed = True
            self._subscriptions.clear()
        self._ended.set()
        self._connected.set()
        if self._connection is not None:
            self._connection.close(kill=kill_agent)
        self._deliveries.put(None)


def _standby_fields(said: dict[str, Any]) -> dict[str, Any]:
    return {
        "standby": said["state"],
        "standby_seconds": said.get("seconds"),
        "standby_reason": said.get("reason", ""),
    }
