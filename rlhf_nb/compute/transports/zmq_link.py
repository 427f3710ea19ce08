"""A link over ZeroMQ, for a kernel whose connection file can be read here."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from rlhf_nb.compute.transports.base import Channel, OnLost, OnMessage

_LOOK_MS = 250


class ZmqLink:
    """One thread owns the sockets, which may not be shared; others hand it messages through a queue and a pipe."""

    compress = False

    def __init__(
        self,
        info: dict[str, Any],
        *,
        is_alive: Callable[[float], str | None],
        end: Callable[[bool], None] = lambda kill: None,
    ) -> None:
        """
        Args:
            info: What a Jupyter connection file holds.
            is_alive: None while the kernel lives, else why it does not; called in the link's thread, at least every
                quarter of a second in which no message comes, with the time (`time.monotonic`) of the last one.
            end: Called at close with `kill`.
        """
        from jupyter_client.session import Session

        key = info["key"]
        self._session = Session(
            key=key.encode() if isinstance(key, str) else key, signature_scheme=info["signature_scheme"]
        )
        self._info, self._is_alive, self._end = info, is_alive, end
        self._queue: deque[tuple[Channel, dict[str, Any], list[bytes] | None]] = deque()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        self._closing = threading.Event()
        self._lost = self._ended = False
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def start(self, on_message: OnMessage, on_lost: OnLost) -> None:
        self._thread = threading.Thread(target=self._loop, args=(on_message, on_lost), name="rlhf-link", daemon=True)
        self._thread.start()

    def send(
        self,
        kind: str,
        content: dict[str, Any],
        *,
        channel: Channel = "shell",
        subshell: str | None = None,
        buffers: list[bytes] | None = None,
    ) -> str:
        with self._lock:
            message = self._session.msg(kind, content)
            if subshell is not None:
                message["header"]["subshell_id"] = subshell
            self._queue.append((channel, message, buffers))
            if not self._closing.is_set():
                try:
                    os.write(self._wake_write, b".")
                except BlockingIOError:
                    pass  # the pipe is full of wake-ups already
        return message["header"]["msg_id"]

    @property
    def alive(self) -> bool:
        """As the link's thread last saw it: `is_alive` may use a socket of that thread."""
        return not self._lost and not self._closing.is_set()

    def close(self, *, kill: bool) -> None:
        with self._lock:
            # The thread closes by itself when the kernel is gone; what the launcher left is still to be put away.
            first, self._ended = not self._ended, True
            if not self._closing.is_set():
                self._closing.set()
                try:
                    os.write(self._wake_write, b".")
                except BlockingIOError:
                    pass
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(5)
        if first:
            self._end(kill)

    def _url(self, port: int) -> str:
        separator = "-" if self._info["transport"] == "ipc" else ":"
        return f"{self._info['transport']}://{self._info['ip']}{separator}{port}"

    def _loop(self, on_message: OnMessage, on_lost: OnLost) -> None:
        import zmq

        context = zmq.Context()
        sockets: dict[str, Any] = {}
        try:
            for name, kind in (("shell", zmq.DEALER), ("control", zmq.DEALER), ("iopub", zmq.SUB)):
                socket = sockets[name] = context.socket(kind)
                socket.linger = 200
                # No limit: a burst of events waits here instead of being dropped.
                socket.rcvhwm = 0
                if kind == zmq.SUB:
                    socket.subscribe(b"")
                else:
                    socket.identity = self._session.bsession
                socket.connect(self._url(self._info[f"{name}_port"]))
            poller = zmq.Poller()
            for socket in sockets.values():
                poller.register(socket, zmq.POLLIN)
            poller.register(self._wake_read, zmq.POLLIN)
            heard = time.monotonic()
            while True:
                ready = dict(poller.poll(_LOOK_MS))
                if self._wake_read in ready:
                    os.read(self._wake_read, 4096)
                self._flush(sockets)
                speaking = [socket for socket in sockets.values() if socket in ready]
                for socket in speaking:
                    heard = time.monotonic()
                    self._drain(socket, on_message)
                if self._closing.is_set():
                    return
                gone = None if speaking else self._is_alive(heard)
                if gone is not None:
                    self._lost = True
                    on_lost(gone)
                    # A farewell, for a kernel that is only slow.
                    self._flush(sockets)
                    return
        finally:
            for socket in sockets.values():
                socket.close()
            context.term()
            with self._lock:
                self._closing.set()
                os.close(self._wake_read)
                os.close(self._wake_write)

    def _flush(self, sockets: dict[str, Any]) -> None:
        while self._queue:
            channel, message, buffers = self._queue.popleft()
            self._session.send(sockets[channel], message, buffers=buffers)

    def _drain(self, socket: Any, on_message: OnMessage) -> None:
        import zmq

        for _ in range(200):
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                _, parts = self._session.feed_identities(frames)
                message = self._session.deserialize(parts)
            except ValueError:
                continue  # a wrong signature or a duplicate: not for us
            on_message(message)
