"""The same over every transport: a kernel of ours, one that somebody else started, one behind a real server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from jupyter_client.manager import start_new_kernel

from rlhf_nb import registry
from rlhf_nb.compute.client import Client
from rlhf_nb.compute.rundir import ProcessIdentity, read_json
from rlhf_nb.compute.transports.kernel_file import KernelFile
from rlhf_nb.compute.transports.local import LocalKernel
from rlhf_nb.compute.transports.server import Server
from rlhf_nb.errors import AttachError

from .conftest import new_root, until

TOKEN = "correct-horse-battery-staple"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Jupyter Server on a port the system chose; its URL."""
    home = tmp_path_factory.mktemp("server")
    info = home / "run"
    info.mkdir()
    env = dict(os.environ, JUPYTER_RUNTIME_DIR=str(info), JUPYTER_TOKEN=TOKEN, JUPYTER_PATH=str(home / "share"))
    spec = home / "share" / "kernels" / "rlhf"
    spec.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "RLHF", "language": "python"}))
    log = open(home / "log.txt", "wb")
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "jupyter_server",
            "--port=0",
            "--no-browser",
            "--allow-root",
            f"--ServerApp.root_dir={home}",
        ],
        env=env,
        stdout=log,
        stderr=log,
    )
    try:
        found = until(lambda: list(info.glob("jpserver-*.json")), 60, "the server has written its file")
        until(lambda: found[0].read_text().strip(), 10)
        yield json.loads(found[0].read_text())["url"].rstrip("/")
    finally:
        process.send_signal(signal.SIGINT)
        process.terminate()
        process.wait(20)
        log.close()


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


def test_requests_are_answered_while_a_cell_of_that_kernel_runs() -> None:
    manager, kernel = start_new_kernel(kernel_name="python3")
    client = None
    try:
        launcher = KernelFile(manager.connection_file)
        client = Client(launcher, runs_root=str(new_root()), standby=False)
        busy = threading.Event()
        kernel.execute("import time; print('running', flush=True); time.sleep(30)")
        until(lambda: kernel.get_iopub_msg(timeout=10)["msg_type"] == "stream", 20)
        assert not busy.is_set()
        assert client.request("runs", timeout=10) == []
    finally:
        if client is not None:
            client.close()
        manager.shutdown_kernel(now=True)
        kernel.stop_channels()


def test_a_file_that_is_no_connection_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "k.json").write_text("{}")
    with pytest.raises(AttachError, match="is no Jupyter connection file"):
        Client(KernelFile(str(tmp_path / "k.json")))
    with pytest.raises(AttachError, match="does not exist"):
        Client(KernelFile(str(tmp_path / "none.json")))


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
