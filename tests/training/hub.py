"""A stand-in for the hub: a real HTTP server that takes a repository and keeps what is pushed to it."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Large files go through its LFS store, the others in the commit, as on the hub itself."""

    def __init__(self, *, refuses: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.refuses = refuses
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.tokens: set[str] = set()
        self.asked: list[str] = []
        self._stored: dict[str, bytes] = {}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._note()
        self._say({"id": "me/polite", "modelId": "me/polite", "sha": SHA, "private": True, "tags": [], "siblings": []})

    def do_POST(self) -> None:
        self._note()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.refuses:
            self._say({"error": "You have read-only access"}, self.server.refuses)
        elif self.path.endswith("/repos/create"):
            self.server.created.append(json.loads(body))
            self._say({"url": f"{self.server.url}/me/polite", "id": "1"})
        elif "/preupload/" in self.path:
            self._say({"files": [self._mode(one) for one in json.loads(body)["files"]]})
        elif self.path.endswith("/objects/batch"):
            self._say({"objects": [self._room(one) for one in json.loads(body)["objects"]], "transfer": "basic"})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                self._take(json.loads(line))
            self._say({"commitUrl": f"{self.server.url}/me/polite/commit/{SHA}", "commitOid": SHA, "hookOutput": ""})
        else:
            self._say({})

    def do_PUT(self) -> None:
        self.server._stored[self.path.rsplit("/", 1)[1]] = self.rfile.read(int(self.headers["Content-Length"]))
        self._say({})

    def _note(self) -> None:
        self.server.asked.append(self.path)
        self.server.tokens.add(self.headers.get("Authorization", ""))

    def _mode(self, file: dict[str, Any]) -> dict[str, Any]:
        large = file["path"].endswith(".safetensors")
        return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}

    def _room(self, one: dict[str, Any]) -> dict[str, Any]:
        upload = {"href": f"{self.server.url}/store/{one['oid']}"}
        return {"oid": one["oid"], "size": one["size"], "actions": {"upload": upload}}

    def _take(self, line: dict[str, Any]) -> None:
        value = line["value"]
        if line["key"] == "file":
            self.server.files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            self.server.files[value["path"]] = self.server._stored[value["oid"]]

    def _say(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
