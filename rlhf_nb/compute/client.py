"""The notebook's side of the attached compute: requests to the agent, and events from it."""

from __future__ import annotations

import hashlib
import queue
import threading
import time
import uuid
import zlib
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rlhf_nb import errors
from rlhf_nb.compute.transports.base import Launcher, Link
from rlhf_nb.errors import AttachError, ComputeError, RlhfError
from rlhf_nb.protocol.control import Control
from rlhf_nb.protocol.events import AnyEvent, parse_event
from rlhf_nb.protocol.spec import Launch, RunSpec

if TYPE_CHECKING:
    from rlhf_nb.protocol.fold import RunFold

ATTACH_S = 60.0
REQUEST_S = 60.0
BLOB_CHUNK = 4 << 20
_TARGET = "rlhf_nb.agent"
_WIRE = 1

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
        self.closed = False

    def close(self) -> None:
        self._client._unsubscribe(self)

    def _take(self, first: int, content: bytes) -> bool:
        """Deliver what is new; False where lines are missing before it."""
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
    """Thread-safe. Callbacks of subscriptions come from a thread of the client's own, one after another."""

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
        self._runs_root, self._launch, self._standby = runs_root, launch or Launch(), standby
        self._lock = threading.RLock()
        self._answers: dict[str, Future[Any]] = {}
        self._subscriptions: dict[str, Subscription] = {}
        self._deliveries: queue.SimpleQueue[tuple[Subscription, dict[str, Any], bytes] | None] = queue.SimpleQueue()
        self._listeners: list[Callable[[AttachInfo], None]] = []
        self._lost: str | None = None
        self._closed = False
        self._hello = threading.Event()
        self._subshell: str | None = None
        self._comm = uuid.uuid4().hex
        self.info: AttachInfo = None  # type: ignore[assignment]
        began = time.monotonic()
        self._link: Link = launcher.connect()
        threading.Thread(target=self._deliver, name="rlhf-events", daemon=True).start()
        try:
            self._link.start(self._received, self._gone)
            self._open(began + timeout)
            self.info = self._describe(self.request("info"), time.monotonic() - began)
        except BaseException:
            self.close(kill_agent=True)
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

    # Attaching ------------------------------------------------------------------------------------------------------------

    def _open(self, deadline: float) -> None:
        # On the control channel, which answers while a cell runs; and never `wait_for_ready`, which waits for silence.
        features = self._ask("kernel_info_request", {}, deadline, channel="control").get("supported_features") or []
        if "kernel subshells" in features:
            self._subshell = self._ask("create_subshell_request", {}, deadline, channel="control").get("subshell_id")
        setup = {
            "code": (
                "import rlhf_nb.compute.agent as _agent\n"
                f"_agent.start(get_ipython().kernel.comm_manager, runs_root={self._runs_root!r}, "
                f"launch={list(self._launch.flags)!r}, keep_standby={self._standby!r})\n"
                "del _agent"
            ),
            "silent": True,
            "store_history": False,
            "allow_stdin": False,
            "stop_on_error": False,
        }
        done = self._ask("execute_request", setup, deadline, subshell=self._subshell)
        if done.get("status") != "ok":
            raise self._setup_error(done)
        while not self._hello.is_set():
            # A subscriber that has just connected may miss the first answer.
            self._comm = uuid.uuid4().hex
            self._send_comm("comm_open", {"compress": self._link.compress}, target_name=_TARGET)
            if self._hello.wait(0.5):
                break
            self._raise_if_lost()
            if time.monotonic() > deadline:
                raise AttachError(f"attach {self.launcher.name}: the kernel runs but its agent does not answer")

    def _setup_error(self, reply: dict[str, Any]) -> RlhfError:
        name, value = reply.get("ename", "Error"), reply.get("evalue", "")
        if name == "ModuleNotFoundError" and "rlhf_nb" in value:
            return AttachError(
                f"attach {self.launcher.name}: that kernel's Python has no rlhf_nb; there, pip install 'rlhf-nb[train]'"
            )
        return _as_error(name, value)

    def _ask(self, kind: str, content: dict[str, Any], deadline: float, **options: Any) -> dict[str, Any]:
        """A plain Jupyter request and its reply, by the id of the message."""
        future: Future[Any] = Future()
        with self._lock:
            name = self._link.send(kind, content, **options)
            self._answers[name] = future
        while True:
            try:
                return future.result(0.25)
            except FutureTimeoutError:
                self._raise_if_lost()
                if time.monotonic() > deadline:
                    raise AttachError(
                        f"attach {self.launcher.name}: no answer from the kernel; it may be busy with a cell, or gone"
                    ) from None

    def _describe(self, said: dict[str, Any], seconds: float) -> AttachInfo:
        standby = said["standby"]
        return AttachInfo(
            name=self.launcher.name,
            kind=self.launcher.kind,
            device=said["device"],
            threads=said["threads"],
            versions=said["versions"],
            runs_root=said["runs_root"],
            seconds=round(seconds, 3),
            standby=standby["state"],
            standby_seconds=standby.get("seconds"),
            standby_reason=standby.get("reason", ""),
            launch=tuple(said["launch"]),
            host=said["host"],
            agent_pid=said["pid"],
        )

    def wait_standby(self, timeout: float = 60.0) -> AttachInfo:
        """Wait until the standby is ready, off or failed, or the time is over; the info as it is then."""
        deadline = time.monotonic() + timeout
        while self.info.standby in ("warming", "taken") and time.monotonic() < deadline and self.alive:
            time.sleep(0.05)
        return self.info

    def on_info(self, listener: Callable[[AttachInfo], None]) -> None:
        """Call `listener` whenever the standby's state changes."""
        self._listeners.append(listener)

    # Receiving ------------------------------------------------------------------------------------------------------------

    def _received(self, message: dict[str, Any]) -> None:
        kind = message["header"]["msg_type"]
        content = message["content"]
        if kind in ("comm_msg", "comm_close"):
            if content.get("comm_id") == self._comm:
                self._from_agent(kind, content.get("data") or {}, message.get("buffers") or [])
        elif kind.endswith("_reply"):
            with self._lock:
                future = self._answers.pop(message["parent_header"].get("msg_id", ""), None)
            if future is not None:
                future.set_result(content)

    def _from_agent(self, kind: str, data: dict[str, Any], buffers: list[Any]) -> None:
        content = bytes(buffers[0]) if buffers else b""
        if data.get("z"):
            content = zlib.decompress(content)
        if kind == "comm_close":
            if self._hello.is_set():
                self._gone("the agent closed the connection")
        elif "hello" in data:
            self._hello.set()
        elif "re" in data:
            with self._lock:
                future = self._answers.pop(data["re"], None)
            if future is None:
                return
            if data["ok"]:
                future.set_result((data["result"], content) if buffers else data["result"])
            else:
                future.set_exception(_as_error(data["error"]["type"], data["error"]["message"]))
        elif "sub" in data:
            subscription = self._subscriptions.get(data["sub"])
            if subscription is not None:
                self._deliveries.put((subscription, data, content))
        elif "standby" in data and self.info is not None:
            said = data["standby"]
            self.info = replace(
                self.info,
                standby=said["state"],
                standby_seconds=said.get("seconds"),
                standby_reason=said.get("reason", ""),
            )
            for listener in list(self._listeners):
                listener(self.info)

    def _deliver(self) -> None:
        while True:
            item = self._deliveries.get()
            if item is None:
                return
            subscription, data, content = item
            if subscription.closed:
                continue
            try:
                if not subscription._take(data["first"], content):
                    self._send_subscribe(subscription)
            except Exception:
                # A callback's fault is its own; the next batch and the other subscribers still get theirs.
                import traceback

                traceback.print_exc()

    def _gone(self, reason: str) -> None:
        with self._lock:
            if self._lost is not None:
                return
            self._lost = reason
            waiting, self._answers = list(self._answers.values()), {}
        for future in waiting:
            if not future.done():
                future.set_exception(ComputeError(f"{reason}; %rlhf attach starts another, and runs go on"))

    def _raise_if_lost(self) -> None:
        if self._lost is not None:
            raise AttachError(f"attach {self.launcher.name}: {self._lost}")

    # Requests -------------------------------------------------------------------------------------------------------------

    def request(self, op: str, content: bytes | None = None, *, timeout: float = REQUEST_S, **arguments: Any) -> Any:
        """One request to the agent and its result. The agent's errors are raised here as what they are."""
        if self._closed:
            raise ComputeError("detached; %rlhf attach local attaches again")
        future: Future[Any] = Future()
        asked = uuid.uuid4().hex
        with self._lock:
            if self._lost is not None:
                raise ComputeError(f"{self._lost}; %rlhf attach starts another, and runs go on")
            self._answers[asked] = future
        self._send_comm(
            "comm_msg", {"id": asked, "op": op, **arguments}, buffers=None if content is None else [content]
        )
        try:
            return future.result(timeout)
        except FutureTimeoutError:
            with self._lock:
                self._answers.pop(asked, None)
            raise ComputeError(
                f"{op}: no answer from {self.launcher.name} after {timeout:g} s; is its kernel busy?"
            ) from None

    def _send_comm(self, kind: str, data: dict[str, Any], *, buffers: list[bytes] | None = None, **more: Any) -> None:
        content = {"comm_id": self._comm, "data": data, **more}
        self._link.send(kind, content, subshell=self._subshell, buffers=buffers)

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
        if row["state"] in ("running", "paused") and fold.started is not None and fold.attempt == row["attempt"]:
            return fold.state
        return row["state"]

    def events(self, run_id: str, since: int = 0) -> list[AnyEvent]:
        """Every event after `since`."""
        found: list[AnyEvent] = []
        more = True
        while more:
            said, content = self.request("events", run_id=run_id, since=since)
            found += parse_lines(content)
            since, more = said["last"] or since, said["more"]
        return found

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

    def _send_subscribe(self, subscription: Subscription) -> None:
        """Ask again from the last seq, without waiting for the answer."""
        asked = {"id": uuid.uuid4().hex, "op": "subscribe", "sub": subscription.id}
        self._send_comm("comm_msg", {**asked, "run_id": subscription.run_id, "since": subscription.last_seq})

    def _unsubscribe(self, subscription: Subscription) -> None:
        subscription.closed = True
        if self._subscriptions.pop(subscription.id, None) is not None and self.alive:
            self._send_comm("comm_msg", {"id": uuid.uuid4().hex, "op": "unsubscribe", "sub": subscription.id})

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

    # The end --------------------------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        return not self._closed and self._lost is None and self._link.alive

    def close(self, kill_agent: bool = True) -> None:
        """Let go. With `kill_agent`, a kernel that this attach started ends, and an idle standby with it; runs go on."""
        if self._closed:
            return
        with self._lock:
            for subscription in self._subscriptions.values():
                subscription.closed = True
            self._subscriptions.clear()
        if self.alive and self._hello.is_set():
            self._send_comm("comm_close", {})
        self._closed = True
        self._link.close(kill=kill_agent)
        self._gone("detached")
        self._deliveries.put(None)


def _as_error(name: str, message: str) -> RlhfError:
    found = getattr(errors, name, None)
    if isinstance(found, type) and issubclass(found, RlhfError):
        return found(message)
    return ComputeError(f"the attached compute: {name}: {message.splitlines()[0] if message else ''}")
