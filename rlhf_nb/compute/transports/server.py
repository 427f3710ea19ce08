"""`server URL`: a kernel behind a Jupyter Server, alone or in a hub, over its websocket."""

from __future__ import annotations

import json
import os
import queue
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit, urlunsplit

from rlhf_nb.compute.transports.base import RECONNECTED, Channel, OnLost, OnMessage
from rlhf_nb.errors import AttachError
from rlhf_nb.protocol.spec import VARIABLE

HTTP_S = 20.0
START_S = 90.0
"""Seconds for the websocket to open: Jupyter Server first waits, up to 60 s, for a kernel that is still starting."""
PULSE_S = 15.0
_CHANNELS = ("iopub", "shell", "control")


@dataclass(frozen=True)
class Server:
    """A Jupyter Server with this package in one of its kernels. Who has its token can run code there.

    The token is read from the environment variable `token_env`, or taken out of a URL that carries one. It travels in
    the Authorization header: a hub refuses URL tokens on the websocket, and URLs end up in logs.
    """

    url: str
    kernel: str = "rlhf"
    """Name of the kernelspec to start, where no kernel of that name runs yet."""
    token_env: str = "JUPYTER_TOKEN"
    token: str = field(default="", repr=False, compare=False)
    kind: ClassVar[str] = "server"
    is_local: ClassVar[bool] = False

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            sound = False
        if not sound:
            raise AttachError(
                f"attach server: {_without_secrets(self.url)!r} is no http(s) URL of a Jupyter Server; "
                "write it as http://localhost:8888"
            )
        if not VARIABLE.fullmatch(self.token_env):
            raise AttachError(
                "attach server: token_env is the NAME of an environment variable, in capitals such as JUPYTER_TOKEN, "
                "not the token; export the token under such a name first"
            )
        found = parse_qs(parts.query).get("token", [""])[0]
        # /lab, /tree and their like are pages of the server whose address people copy.
        path = parts.path.split("/lab")[0].split("/tree")[0].rstrip("/")
        object.__setattr__(self, "url", urlunsplit((parts.scheme, parts.netloc.rsplit("@", 1)[-1], path, "", "")))
        object.__setattr__(self, "token", self.token or found or os.environ.get(self.token_env, ""))

    @property
    def name(self) -> str:
        return f"server {self.url}"

    def to_dict(self) -> dict[str, Any]:
        """Without the token: it is never written anywhere."""
        return {"kind": self.kind, "url": self.url, "kernel": self.kernel, "token_env": self.token_env}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Server:
        return cls(value["url"], kernel=value["kernel"], token_env=value["token_env"])

    def connect(self) -> WebSocketLink:
        """A link to the running kernel of this name, or to a new one.

        Raises:
            AttachError: No answer, no right to enter, or no such kernelspec.
        """
        listed = self._ask("GET", "api/kernels")
        if not isinstance(listed, list) or not all(map(_is_kernel, listed)):
            raise self._no_jupyter("api/kernels")
        found = [kernel for kernel in listed if kernel["name"] == self.kernel]
        mine = not found
        kernel = found[0] if found else self._ask("POST", "api/kernels", {"name": self.kernel})
        if not _is_kernel(kernel):
            raise self._no_jupyter("api/kernels")

        def end(kill: bool) -> None:
            if kill and mine:
                try:
                    self._ask("DELETE", f"api/kernels/{kernel['id']}")
                except AttachError:
                    pass  # the server is gone, and its kernels with it

        endpoint = f"ws{self.url.removeprefix('http')}/api/kernels/{kernel['id']}/channels"
        return WebSocketLink(endpoint, self._headers(), end)

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"token {self.token}"} if self.token else {}

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        import requests

        try:
            answer = requests.request(
                method, f"{self.url}/{path}", json=body, headers=self._headers(), timeout=HTTP_S, allow_redirects=False
            )
        except requests.RequestException as error:
            raise AttachError(f"attach server: {self.url} does not answer ({type(error).__name__})") from None
        if answer.status_code in (301, 302, 401, 403):
            how = f"the token in {self.token_env} was refused" if self.token else f"put a token into {self.token_env}"
            raise AttachError(f"attach server: {self.url} lets nobody in without a valid token; {how}")
        if not answer.ok:
            said = _message(answer.text)
            raise AttachError(
                f"attach server: {self.url} answers {answer.status_code} to {path}"
                + (f": {said}" if said else "")
                + (f'; is there a kernelspec "{self.kernel}"? --kernel NAME chooses another' if body else "")
            )
        try:
            return answer.json() if answer.content else None
        except ValueError:
            raise self._no_jupyter(path) from None

    def _no_jupyter(self, path: str) -> AttachError:
        return AttachError(
            f"attach server: {self.url} answers {path} as no Jupyter Server does; "
            "give the address that its start prints, up to /lab or /tree"
        )


def _is_kernel(said: Any) -> bool:
    return isinstance(said, dict) and isinstance(said.get("id"), str) and isinstance(said.get("name"), str)


def _without_secrets(url: str) -> str:
    """Scheme, host, port and path of what may be no URL at all: a token is in the query, a password before the @."""
    shown, *cut = re.split(r"[?#]", url, maxsplit=1)
    scheme, slashes, rest = shown.rpartition("://")
    # An @ in what was cut off: the rest may be the half of a password that has a ? in it.
    return scheme + slashes + ("..." if "@" in "".join(cut) else rest.rpartition("@")[2])


def _message(text: str) -> str:
    try:
        return str(json.loads(text).get("message", "")).splitlines()[0]
    except (ValueError, AttributeError, IndexError):
        return ""


class WebSocketLink:
    """jupyter-kernel-client's websocket. A dropped line is made again; the server keeps messages meanwhile."""

    compress = True

    def __init__(self, endpoint: str, headers: dict[str, str], end: Callable[[bool], None]) -> None:
        from jupyter_kernel_client.wsclient import KernelWebSocketClient

        # No token argument: the client would put it into the URL. An interval of 0 would mean dead after a drop.
        self._client = KernelWebSocketClient(
            endpoint, token=None, headers=headers, reconnect_interval=1, timeout=START_S
        )
        self._end = end
        self._closing = threading.Event()
        self._lost = False
        self._opened = 0
        self._heard = time.monotonic()
        self._sending = threading.Lock()

    def start(self, on_message: OnMessage, on_lost: OnLost) -> None:
        client, on_open = self._client, self._client._on_open

        def opened(app: Any) -> None:
            on_open(app)
            self._opened += 1
            if self._opened > 1:
                # What was asked or pushed while the line was down may be lost.
                on_message({"header": {"msg_type": RECONNECTED}, "parent_header": {}, "content": {}})

        client._on_open = opened
        # Its thread is no daemon unless the one that starts it is, and would keep the notebook's kernel from ending.
        starter = threading.Thread(target=client.start_channels, daemon=True)
        starter.start()
        starter.join()
        client.timeout = HTTP_S
        if not client.channels_running:
            client.stop_channels()
            raise AttachError(f"attach server: no websocket within {START_S:g} s; does a proxy in between allow it?")
        for name in _CHANNELS:
            arguments = (getattr(client, f"{name}_channel"), on_message, on_lost)
            threading.Thread(target=self._read, args=arguments, name=f"rlhf-{name}", daemon=True).start()
        threading.Thread(target=self._pulse, name="rlhf-pulse", daemon=True).start()

    def _read(self, channel: Any, on_message: OnMessage, on_lost: OnLost) -> None:
        while not self._closing.is_set():
            try:
                message = channel.get_msg(timeout=0.5)
            except queue.Empty:
                continue
            self._heard = time.monotonic()
            if message["header"]["msg_type"] == "status":
                state = message["content"].get("execution_state")
                if state in ("dead", "restarting") and not self._lost:
                    self._lost = True
                    on_lost("the server's kernel died" if state == "dead" else "the server's kernel was restarted")
                continue
            on_message(message)

    def _pulse(self) -> None:
        """A line that died without a word (a laptop slept, a proxy forgot) is cut, so that it is made again."""
        while not self._closing.wait(PULSE_S):
            if time.monotonic() - self._heard > 3 * PULSE_S:
                self._heard = time.monotonic()
                self._cut()
            else:
                self.send("kernel_info_request", {}, channel="control")

    def _cut(self) -> None:
        app = self._client.kernel_socket
        try:
            # Shut down, not closed: a closed descriptor would never wake the thread that waits on it.
            app.sock.sock.shutdown(socket.SHUT_RDWR)
        except (AttributeError, OSError):
            pass  # it is down already, and being made again

    def send(
        self,
        kind: str,
        content: dict[str, Any],
        *,
        channel: Channel = "shell",
        subshell: str | None = None,
        buffers: list[bytes] | None = None,
    ) -> str:
        from websocket import WebSocketException

        message = self._client.session.msg(kind, content)
        if subshell is not None:
            message["header"]["subshell_id"] = subshell
        if buffers:
            message["buffers"] = buffers
        name = message["header"]["msg_id"]
        with self._sending:
            if self._client.connection_ready.wait(0 if self._closing.is_set() else HTTP_S):
                try:
                    getattr(self._client, f"{channel}_channel").send(message)
                except (WebSocketException, OSError, AttributeError):
                    pass  # lost with the line; whoever waits for its answer asks again when the line stands
        return name

    @property
    def alive(self) -> bool:
        return not self._lost and not self._closing.is_set()

    def close(self, *, kill: bool) -> None:
        if not self._closing.is_set():
            self._closing.set()
            self._client.stop_channels()
            self._end(kill)
