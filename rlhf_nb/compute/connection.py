"""One live connection to the agent in a Jupyter kernel: set up over plain Jupyter messages, then spoken over a comm."""

from __future__ import annotations

import threading
import time
import uuid
import zlib
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

from rlhf_nb import errors
from rlhf_nb.compute.transports.base import RECONNECTED, Launcher
from rlhf_nb.errors import AttachError, ComputeError, RlhfError

TARGET = "rlhf_nb.agent"
WIRE = 1
"""Version of the messages between client and agent; both sides must speak the same."""

SUBSHELL_TRIES = 20

OnData = Callable[[dict[str, Any], bytes], None]


class ConnectionLostError(ComputeError):
    """The kernel or its agent is gone; what was asked may or may not have been done."""


class Connection:
    """Thread-safe. It lives once: after `on_lost` or `close` another is made."""

    def __init__(self, launcher: Launcher, on_data: OnData, on_lost: Callable[[str], None]) -> None:
        """
        Args:
            on_data: Unasked messages of the agent, with their buffer; called from the link's thread.
            on_lost: Called once, from any thread, with the reason in words.
        """
        self._launcher, self._on_data, self._on_lost = launcher, on_data, on_lost
        self._lock = threading.RLock()
        self._waiting: dict[str, Future[Any]] = {}
        self._hello = threading.Event()
        self._wire: int | None = None
        self.subshell: str | None = None
        self._comm = uuid.uuid4().hex
        self._lost: str | None = None
        self._closed = self._left = False
        self._link = launcher.connect()

    def open(self, timeout: float, **setup: Any) -> None:
        """Start the agent in the kernel, or find it, and speak with it.

        Raises:
            AttachError: No answer, no package there, or another version of it.
        """
        deadline = time.monotonic() + timeout
        self._link.start(self._received, self._gone)
        # On the control channel, which answers while a cell runs; and never `wait_for_ready`, which waits for silence.
        # Asked again and again: ipykernel 6 never reads a control message that came before its control thread ran.
        said = self._ask("kernel_info_request", {}, deadline, again_s=0.3, channel="control")
        features = said.get("supported_features") or []
        if "kernel subshells" in features:
            # While a cell runs, the main shell answers when it ends; a subshell answers at once.
            self.subshell = self._new_subshell(deadline)
        arguments = ", ".join(f"{name}={value!r}" for name, value in setup.items())
        code = (
            "import rlhf_nb.compute.agent as _agent\n"
            f"_agent.start(get_ipython().kernel.comm_manager, {arguments})\n"
            "del _agent"
        )
        execute = {"code": code, "silent": True, "store_history": False, "allow_stdin": False, "stop_on_error": False}
        done = self._ask("execute_request", execute, deadline, subshell=self.subshell)
        if done.get("status") != "ok":
            raise self._setup_error(done)
        while not self._hello.is_set():
            # A subscriber that has only just connected may miss the first answer.
            self._comm = uuid.uuid4().hex
            self._send("comm_open", {"compress": self._link.compress}, target_name=TARGET)
            if self._hello.wait(0.5):
                break
            self._raise_if_lost()
            if time.monotonic() > deadline:
                raise AttachError(f"attach {self._launcher.name}: the kernel runs but its agent does not answer")
            self._send("comm_close", {})
        if self._wire != WIRE:
            raise AttachError(
                f"attach {self._launcher.name}: its rlhf_nb speaks version {self._wire}, this one {WIRE}; "
                "install the same version on both sides"
            )
        self.ping()

    def _new_subshell(self, deadline: float) -> str | None:
        """A subshell's id; None where the kernel promises subshells and makes none.

        ipykernel 7 reads the control channel a moment before it can make one: a request in that moment gets no answer
        or an error. It is sent again; a subshell too many is an idle thread.
        """
        for _ in range(SUBSHELL_TRIES):
            said = self._ask("create_subshell_request", {}, deadline, again_s=1.0, channel="control")
            if made := said.get("subshell_id"):
                return str(made)
            time.sleep(0.1)
        return None

    def _setup_error(self, reply: dict[str, Any]) -> RlhfError:
        name, value = reply.get("ename", "Error"), reply.get("evalue", "")
        if name == "ModuleNotFoundError" and "rlhf_nb" in value:
            return AttachError(
                f"attach {self._launcher.name}: its Python has no rlhf_nb; pip install 'rlhf-nb[train]' there"
            )
        return as_error(name, value)

    def _ask(
        self, kind: str, content: dict[str, Any], deadline: float, *, again_s: float = 0.0, **options: Any
    ) -> dict[str, Any]:
        """A plain Jupyter request and its reply; sent again every `again_s` seconds where that is harmless."""
        future: Future[Any] = Future()
        sent = 0.0
        while True:
            if not sent or (again_s and time.monotonic() - sent > again_s):
                sent = time.monotonic()
                with self._lock:
                    self._waiting[self._link.send(kind, content, **options)] = future
            try:
                return future.result(0.1)
            except FutureTimeoutError:
                self._raise_if_lost()
                if time.monotonic() > deadline:
                    raise AttachError(
                        f"attach {self._launcher.name}: no answer from the kernel; it may be busy with a cell, or gone"
                    ) from None

    def request(self, op: str, content: bytes | None, timeout: float, arguments: dict[str, Any]) -> Any:
        """One request and its result: the value, or (value, bytes) where the answer carries a buffer.

        Raises:
            ConnectionLostError: The kernel went away before it answered.
            RlhfError: What the agent raised, as the same class.
        """
        return self.answer(self.begin(op, arguments, content), op, timeout)

    def begin(self, op: str, arguments: dict[str, Any], content: bytes | None = None) -> Future[Any]:
        """Send a request; `answer` waits for its result."""
        future: Future[Any] = Future()
        asked = uuid.uuid4().hex
        with self._lock:
            if self._lost is not None:
                raise ConnectionLostError(self._lost)
            self._waiting[asked] = future
        self.post(op, arguments, content, asked)
        return future

    def answer(self, future: Future[Any], op: str, timeout: float) -> Any:
        try:
            return future.result(timeout)
        except FutureTimeoutError:
            with self._lock:
                self._waiting = {name: one for name, one in self._waiting.items() if one is not future}
            raise ComputeError(
                f"{op}: no answer from {self._launcher.name} after {timeout:g} s; is its kernel busy?"
            ) from None

    def post(self, op: str, arguments: dict[str, Any], content: bytes | None = None, asked: str | None = None) -> None:
        """Send a request without waiting for its answer."""
        buffers = None if content is None else [content]
        self._send("comm_msg", {"id": asked or uuid.uuid4().hex, "op": op, **arguments}, buffers=buffers)

    def ping(self) -> None:
        """Say that this side lives. Without a subshell the agent hears nothing while a cell runs, and is not told."""
        if self.subshell is not None:
            self.post("ping", {})

    def _leave(self) -> None:
        """Tell the agent, so that it keeps nothing for this connection; also when it only seems to be gone."""
        if self._hello.is_set() and not self._left:
            self._left = True
            self._send("comm_close", {})

    def _send(self, kind: str, data: dict[str, Any], *, buffers: list[bytes] | None = None, **more: Any) -> None:
        content = {"comm_id": self._comm, "data": data, **more}
        self._link.send(kind, content, subshell=self.subshell, buffers=buffers)

    def _received(self, message: dict[str, Any]) -> None:
        kind, content = message["header"]["msg_type"], message["content"]
        if kind == RECONNECTED:
            self._fail_waiting("the line to the server was down")
            self._on_data({"reconnected": True}, b"")
        if kind in ("comm_msg", "comm_close"):
            if content.get("comm_id") == self._comm:
                self._from_agent(kind, content.get("data") or {}, message.get("buffers") or [])
        elif kind.endswith("_reply"):
            with self._lock:
                future = self._waiting.pop(message["parent_header"].get("msg_id", ""), None)
            if future is not None and not future.done():
                future.set_result(content)

    def _from_agent(self, kind: str, data: dict[str, Any], buffers: list[Any]) -> None:
        if kind == "comm_close":
            # Before the first answer this is the kernel's way to say that the target is not there yet.
            if self._hello.is_set():
                self._left = True
                self._gone("the agent has closed the connection")
            return
        content = bytes(buffers[0]) if buffers else b""
        if data.get("z"):
            content = zlib.decompress(content)
        if "hello" in data:
            self._wire = data["hello"]
            self._hello.set()
        elif "re" not in data:
            self._on_data(data, content)
        else:
            with self._lock:
                future = self._waiting.pop(data["re"], None)
            if future is None:
                return
            if data["ok"]:
                future.set_result((data["result"], content) if buffers else data["result"])
            else:
                future.set_exception(as_error(data["error"]["type"], data["error"]["message"]))

    def _gone(self, reason: str) -> None:
        with self._lock:
            if self._lost is not None:
                return
            self._lost = reason
        self._leave()
        self._fail_waiting(reason)
        self._on_lost(reason)

    def _fail_waiting(self, reason: str) -> None:
        with self._lock:
            waiting, self._waiting = list(self._waiting.values()), {}
        for future in waiting:
            if not future.done():
                future.set_exception(ConnectionLostError(reason))

    def _raise_if_lost(self) -> None:
        if self._lost is not None:
            raise AttachError(f"attach {self._launcher.name}: {self._lost}")

    @property
    def alive(self) -> bool:
        return self._lost is None and not self._closed and self._link.alive

    def close(self, *, kill: bool) -> None:
        if self._closed:
            return
        self._leave()
        self._closed = True
        self._link.close(kill=kill)
        self._gone("detached")


def as_error(name: str, message: str) -> RlhfError:
    """An error of the other side as the same class here; one that is not ours becomes a ComputeError that names it."""
    found = getattr(errors, name, None)
    if isinstance(found, type) and issubclass(found, RlhfError):
        return found(message)
    return ComputeError(f"the attached compute: {name}: {message.splitlines()[0] if message else ''}")
