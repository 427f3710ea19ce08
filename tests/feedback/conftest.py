"""A chat server on loopback that speaks the OpenAI-compatible form and says what a test plants."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from rlhf_nb.protocol.spec import Endpoint

NEVER = object()
"""The server keeps such a question until it ends."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    # Of more than 5 that come at once, which is the default, the others would wait for a second or more.
    request_queue_size = 128


class ChatServer:
    """`answer(body)` gives the reply: a text, `(status, body)`, `NEVER`, or a whole choice as a dict."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.ends = threading.Event()
        self.answer: Callable[[dict[str, Any]], Any] = lambda body: "A"
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                owner.requests.append(body)
                owner.headers.append({"path": self.path, "port": str(self.client_address[1]), **dict(self.headers)})
                said = owner.answer(body)
                if said is NEVER:
                    owner.ends.wait(60)
                    said = "A"
                status, headers, reply = 200, {}, said
                if isinstance(said, tuple):
                    status, reply = said[0], said[1]
                    headers = said[2] if len(said) > 2 else {}
                elif isinstance(said, str):
                    reply = {"choices": [{"message": {"content": said}, "finish_reason": "stop"}]}
                elif isinstance(said, dict):
                    reply = {"choices": [said]}
                data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                try:
                    self.send_response(status)
                    for name, value in {"Content-Length": str(len(data)), **headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the judge waited no longer

            def log_message(self, *_: Any) -> None:
                pass

        self.http = Server(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}/v1"

    def endpoint(self, **settings: Any) -> Endpoint:
        return Endpoint(**{"url": self.url, "model": "planted", "retries": 2, "timeout_s": 5, **settings})

    def close(self) -> None:
        self.ends.set()
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def chat_server() -> Iterator[ChatServer]:
    server = ChatServer()
    yield server
    server.close()


def shown(body: dict[str, Any]) -> tuple[str, str, str]:
    """The prompt and the completions A and B that a request shows, read as its judge would: by the marks."""
    text = body["messages"][-1]["content"]
    tag = re.search(r"<prompt ([0-9a-f]{8})>", text)[1]
    parts = [re.search(rf"<{name} {tag}>\n(.*?)\n</{name} {tag}>", text, re.DOTALL) for name in
             ("prompt", "completion A", "completion B")]  # fmt: skip
    return tuple(part[1] if part else "" for part in parts)


@pytest.fixture(scope="session")
def read_shown() -> Callable[[dict[str, Any]], tuple[str, str, str]]:
    return shown
