"""The same over every transport: a kernel of ours, one that somebody else started, one behind a real server."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import zmq

from rlhf_nb import registry
from rlhf_nb.compute.client import Client
from rlhf_nb.compute.rundir import ProcessIdentity, read_json
from rlhf_nb.compute.transports import kernel_file
from rlhf_nb.compute.transports import server as server_module
from rlhf_nb.compute.transports.kernel_file import KernelFile, _Heart
from rlhf_nb.compute.transports.local import LocalKernel
from rlhf_nb.compute.transports.server import Server
from rlhf_nb.compute.transports.zmq_link import ZmqLink
from rlhf_nb.errors import AttachError
from tests.servers import jupyter_kernel, jupyter_server

from .conftest import new_root, until

TOKEN = "correct-horse-battery-staple"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a Jupyter Server with a kernelspec of its own."""
    home = tmp_path_factory.mktemp("server")
    env = dict(os.environ, JUPYTER_RUNTIME_DIR=str(home / "run"), JUPYTER_PATH=str(home / "share"))
    spec = home / "share" / "kernels" / "rlhf"
    spec.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "RLHF", "language": "python"}))
    command = [sys.executable, "-m", "jupyter_server", f"--ServerApp.root_dir={home}"]
    with jupyter_server(command, token=TOKEN, log=home / "log.txt", env=env) as (url, _):
        yield url


def test_a_server_answers_pushes_and_keeps_its_token_out_of_urls(server: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    root = new_root()
    launcher = Server(f"{server}/lab?token={TOKEN}")
    assert launcher.url == server
    assert TOKEN not in json.dumps(launcher.to_dict()) + repr(launcher) + launcher.name
    client = Client(launcher, runs_root=str(root), standby=False)
    try:
        write_log(root, "probe-old", 5000)
        events = client.events("probe-old")
        assert [event.seq for event in events] == list(range(1, 5001))
        got: list[int] = []
        client.subscribe("probe-old", 4000, lambda batch: got.extend(event.seq for event in batch))
        until(lambda: len(got) >= 1000, 20)
        assert got == list(range(4001, 5001))
        # The line drops; what is written meanwhile arrives once it stands again, each event once.
        client._connection._link._cut()  # type: ignore[union-attr]
        write_log(root, "probe-old", 10)
        until(lambda: len(got) >= 1010, 30)
        assert got == list(range(4001, 5011))
        assert client.request("info")["pid"] == client.info.agent_pid
    finally:
        client.close()
    assert TOKEN not in caplog.text


def test_a_server_with_a_wrong_token_says_so(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUPYTER_TOKEN", "wrong")
    with pytest.raises(AttachError, match="the token in JUPYTER_TOKEN was refused") as caught:
        Client(Server(server))
    assert "\n" not in str(caught.value)


def test_a_server_without_such_a_kernelspec_says_so(server: str) -> None:
    with pytest.raises(AttachError, match="--kernel NAME chooses another"):
        Client(Server(f"{server}?token={TOKEN}", kernel="nonesuch"))


def test_no_server_at_all_says_so() -> None:
    with pytest.raises(AttachError, match="does not answer"):
        Client(Server("http://127.0.0.1:9"))


@pytest.fixture
def kernel() -> Iterator[tuple[str, Any]]:
    """The connection file of a kernel that somebody else started, and that somebody's client."""
    with jupyter_kernel() as (manager, client):
        yield manager.connection_file, client


def test_requests_are_answered_while_a_cell_of_that_kernel_runs(kernel: tuple[str, Any]) -> None:
    file, kernel = kernel
    client = None
    try:
        launcher = KernelFile(file)
        root = new_root()
        client = Client(launcher, runs_root=str(root), standby=False)
        write_log(root, "probe-old", 5)
        got: list[int] = []
        client.subscribe("probe-old", 0, lambda batch: got.extend(event.seq for event in batch))
        kernel.execute("import time; print('running', flush=True); time.sleep(30)")
        until(lambda: kernel.get_iopub_msg(timeout=10)["msg_type"] == "stream", 20)
        for n in range(3):
            # What a thread of the agent sends must not draw the next request into the busy shell.
            write_log(root, "probe-old", 5)
            until(lambda n=n: len(got) == 10 + 5 * n, 10)
            assert [row["run_id"] for row in client.request("runs", timeout=10)] == ["probe-old"]
    finally:
        if client is not None:
            client.close()


@pytest.fixture
def heart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any, Any]]:
    """A heart of a kernel that this test plays, its socket of echoes, and a clock that the test moves."""
    now = [1000.0]
    monkeypatch.setattr(kernel_file.time, "monotonic", lambda: now[0])
    kernel = zmq.Context.instance().socket(zmq.ROUTER)
    kernel.linger = 0
    kernel.bind(f"ipc://{tmp_path}/k-5")
    heart = _Heart({"transport": "ipc", "ip": f"{tmp_path}/k", "hb_port": 5})
    yield heart, kernel, now
    heart.close()
    kernel.close()


def look(heart: Any, now: list[float], seconds: float, heard: float = 0.0) -> str | None:
    """What the heart says when the link is idle for so long."""
    for _ in range(int(seconds / 0.25)):
        now[0] += 0.25
        if gone := heart.gone(heard):
            return gone
    return None


def test_a_kernel_whose_link_was_busy_is_not_taken_for_dead(heart: tuple[Any, Any, Any]) -> None:
    heart, kernel, now = heart
    assert look(heart, now, 1.5) is None
    kernel.send_multipart(kernel.recv_multipart())
    assert heart._socket.poll(2000)
    assert look(heart, now, 0.25) is None
    now[0] += 25  # events came without a pause, so that nobody looked
    assert heart.gone(now[0]) is None
    kernel.send_multipart(kernel.recv_multipart())
    assert heart._socket.poll(2000)
    assert look(heart, now, 1) is None


def test_a_kernel_that_sends_messages_lives_also_where_its_heartbeat_cannot_be_reached(
    heart: tuple[Any, Any, Any],
) -> None:
    heart, _, now = heart
    for _ in range(5):
        assert look(heart, now, 15, heard=now[0]) is None


def test_a_silent_kernel_is_gone_after_twenty_seconds(heart: tuple[Any, Any, Any]) -> None:
    heart, _, now = heart
    assert look(heart, now, 20) is None
    assert look(heart, now, 3) == "the kernel has been silent for 20 s"


def test_whether_a_link_is_alive_is_asked_without_its_heart(tmp_path: Path) -> None:
    info = {"key": "k", "signature_scheme": "hmac-sha256"}
    ended: list[bool] = []
    link = ZmqLink(info, is_alive=lambda heard: pytest.fail("asked from another thread"), end=ended.append)
    assert link.alive
    link.close(kill=True)
    link.close(kill=True)
    assert not link.alive and ended == [True]


SESSIONS = "from rlhf_nb.compute import agent; print(f'sessions {len(agent._agent.sessions)}')"


def test_a_connection_that_only_seemed_lost_leaves_no_session_in_the_agent(kernel: tuple[str, Any]) -> None:
    file, kernel = kernel
    client = None

    def sessions() -> int:
        kernel.execute(SESSIONS)
        while True:
            message = kernel.get_iopub_msg(timeout=20)
            said = message["content"].get("text", "")
            if message["msg_type"] == "stream" and said.startswith("sessions"):
                return int(said.split()[1])

    try:
        client = Client(KernelFile(file), runs_root=str(new_root()), standby=False)
        assert sessions() == 1
        for _ in range(2):
            before = client._connection
            before._link._is_alive = lambda heard: "the kernel has been silent"  # type: ignore[union-attr]
            until(lambda before=before: client._connection is not before and client._connected.is_set(), 60)
            assert client.runs() == []
        until(lambda: sessions() == 1, 20, "the sessions of the connections before it are gone")
    finally:
        if client is not None:
            client.close()


def test_a_file_that_is_no_connection_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "k.json").write_text("{}")
    with pytest.raises(AttachError, match="is no Jupyter connection file"):
        Client(KernelFile(str(tmp_path / "k.json")))
    with pytest.raises(AttachError, match="does not exist"):
        Client(KernelFile(str(tmp_path / "none.json")))


SOUND: dict[str, Any] = {"key": "k3y", "ip": "127.0.0.1", "transport": "tcp", "signature_scheme": "hmac-sha256"}
SOUND |= {"shell_port": 9, "iopub_port": 9, "control_port": 9, "hb_port": 9}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[]", "it holds a list, not an object"),
        ("<html>", "Expecting value"),
        (json.dumps(SOUND | {"shell_port": "9"}), "shell_port='9' is no port"),
        (json.dumps(SOUND | {"hb_port": 70000}), "hb_port=70000 is no port"),
        (json.dumps(SOUND | {"key": 5}), "key is no text"),
        (json.dumps(SOUND | {"transport": "udp"}), "transport='udp' is neither tcp nor ipc"),
        (json.dumps(SOUND | {"signature_scheme": "none"}), "signature_scheme='none' is none that this Python knows"),
    ],
)
def test_what_is_wrong_with_a_connection_file_is_said_and_its_key_is_not(
    tmp_path: Path, content: str, says: str
) -> None:
    (tmp_path / "k.json").write_text(content)
    with pytest.raises(AttachError) as caught:
        KernelFile(str(tmp_path / "k.json")).connect()
    message = str(caught.value)
    assert f"{tmp_path / 'k.json'} is no Jupyter connection file ({says}" in message
    assert "k3y" not in message and "\n" not in message and "%connect_info" in message


def test_a_connection_file_that_cannot_be_read_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, **_: Any) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    with pytest.raises(AttachError, match=r"cannot be read \(Is a directory\); give a kernel's own file"):
        KernelFile(str(tmp_path)).connect()
    with pytest.raises(AttachError, match=r"~nobody-here/k\.json cannot be read"):
        KernelFile("~nobody-here/k.json").connect()
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(AttachError, match=r"k\.json cannot be read \(Permission denied\)"):
        KernelFile(str(tmp_path / "k.json")).connect()


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("localhost:8888/lab?token=SECRET", "'localhost:8888/lab'"),
        ("localhost:8888#token=SECRET", "'localhost:8888'"),
        ("me:SECRET@localhost:8888", "'localhost:8888'"),
        ("ftp://me:SECRET@host/lab?token=SECRET", "'ftp://host/lab'"),
        ("http://[::1/?token=SECRET", "'http://[::1/'"),
        ("http://me:SECRET@host:port/", "'http://host:port/'"),
        ("http://host:99999999/?token=SECRET", "'http://host:99999999/'"),
        ("http://:8888/?token=SECRET", "'http://:8888/'"),
        ("?token=SECRET", "''"),
        ("me:SEC?RET@localhost:8888", "'...'"),
    ],
)
def test_an_address_that_is_no_url_is_named_without_its_secrets(url: str, named: str) -> None:
    with pytest.raises(AttachError) as caught:
        Server(url)
    says = f"attach server: {named} is no http(s) URL of a Jupyter Server; write it as http://localhost:8888"
    assert str(caught.value) == says


@pytest.mark.parametrize(
    ("answers", "asked"),
    [
        ({"GET": "<html>Welcome</html>"}, 1),
        ({"GET": "[1]"}, 1),
        ({"GET": '{"kernels": []}'}, 1),
        ({"GET": ""}, 1),
        ({"GET": "[]", "POST": '{"name": "rlhf"}'}, 2),
        ({"GET": "[]", "POST": "[]"}, 2),
    ],
)
def test_a_page_that_is_no_jupyter_server_is_said_to_be_none(answers: dict[str, str], asked: int) -> None:
    heard: list[str] = []

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            heard.append(self.command)
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answers[self.command].encode())

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Page) as page:
        threading.Thread(target=page.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{page.server_port}"
        try:
            with pytest.raises(AttachError) as caught:
                Server(f"{url}/lab?token=SECRET").connect()
        finally:
            page.shutdown()
    says = f"attach server: {url} answers api/kernels as no Jupyter Server does; "
    assert str(caught.value) == says + "give the address that its start prints, up to /lab or /tree"
    assert len(heard) == asked


def test_a_server_may_wait_for_its_kernel_before_it_opens_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            time.sleep(5 * server_module.HTTP_S)
            key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
            self.send_response(101)
            self.send_header("Upgrade", "websocket")
            self.send_header("Connection", "Upgrade")
            self.send_header("Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(key.encode()).digest()).decode())
            self.end_headers()
            self.rfile.read(1)  # the client's farewell
            self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    monkeypatch.setattr(server_module, "HTTP_S", 0.1)
    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as slow:
        threading.Thread(target=slow.serve_forever, daemon=True).start()
        link = server_module.WebSocketLink(f"ws://127.0.0.1:{slow.server_port}/", {}, lambda kill: None)
        try:
            link.start(lambda message: None, lambda reason: None)
            assert link.alive
        finally:
            link.close(kill=False)
            slow.shutdown()


def test_a_python_that_does_not_start_a_kernel_says_so() -> None:
    with pytest.raises(AttachError, match="attach local: the local kernel ended with code"):
        Client(LocalKernel(python="/bin/false"))


def test_what_a_killed_notebook_left_is_swept_by_the_next_attach() -> None:
    link = LocalKernel().connect()
    folder = Path(link._info["ip"]).parent
    identity = ProcessIdentity.from_dict(read_json(folder / "kernel.json"))
    assert identity is not None
    os.kill(identity.pid, signal.SIGKILL)
    until(lambda: not identity.alive(), 20)
    LocalKernel().connect().close(kill=True)
    assert not folder.exists()
    link.close(kill=True)


@pytest.mark.parametrize("launcher", [LocalKernel(), KernelFile("/k.json"), Server("http://localhost:8888")])
def test_launchers_survive_a_dict(launcher: LocalKernel | KernelFile | Server) -> None:
    again = registry.launchers.get(launcher.kind).from_dict(json.loads(json.dumps(launcher.to_dict())))
    assert again == launcher


def write_log(root: Path, run_id: str, n: int) -> None:
    """Append `n` metric events to a run that never was, as its rank 0 would have."""
    from rlhf_nb.compute.rundir import EventWriter, RunDir, write_json
    from rlhf_nb.protocol.events import Metric

    from .conftest import toy_spec

    run = RunDir(root / run_id)
    if not run.spec_path.exists():
        run.create(toy_spec(run_id=run_id))
        write_json(run.exit_path, {"attempt": 1, "outcome": "finished", "reason": "", "seconds": 1.0, "step": 1})
    writer = EventWriter(run.events_path)
    for _ in range(n):
        writer.write(Metric(step=1, values={"loss/total": 0.5}))
    writer.close()


def test_a_token_in_place_of_its_variable_is_refused_and_not_repeated():
    with pytest.raises(AttachError, match="the NAME of an environment variable") as refused:
        Server("http://localhost:8888", token_env="ab12ef34")
    assert "ab12ef34" not in str(refused.value)
