"""Jupyter servers and kernels for the tests: on ports that nobody else is given, ended with what they started."""

from __future__ import annotations

import contextlib
import random
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from jupyter_client import BlockingKernelClient, KernelManager
from traitlets.config import Config

# Below what Linux hands out on its own, so that between choosing a port and listening on it no connection takes it.
PORTS = range(20000, 32768)
READY_S = 120
CHANNELS = ("shell", "iopub", "stdin", "hb", "control")


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    while True:
        port = random.SystemRandom().choice(PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def kernel_ports() -> Config:
    """Settings of a kernel manager. The ports that it finds on its own are anybody's until its kernel listens."""
    ports: set[int] = set()
    while len(ports) < len(CHANNELS):
        ports.add(free_port())
    given = {f"{channel}_port": port for channel, port in zip(CHANNELS, ports, strict=True)}
    return Config(KernelManager={"cache_ports": False, **given})


@contextlib.contextmanager
def jupyter_kernel(**start: Any) -> Iterator[tuple[KernelManager, BlockingKernelClient]]:
    """A kernel that answers; `start` is what its process gets, such as `cwd`."""
    manager = KernelManager(kernel_name="python3", config=kernel_ports())
    manager.start_kernel(**start)
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=READY_S)
        yield manager, client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


@contextlib.contextmanager
def jupyter_server(
    command: Sequence[str], *, token: str, log: Path, env: Mapping[str, str], cwd: Path | None = None
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """`command` (any Jupyter application) on a port of 127.0.0.1: its URL once it answers, and its process."""
    port = free_port()
    arguments = [*command, "--allow-root", "--no-browser", "--ip=127.0.0.1", f"--ServerApp.port={port}"]
    arguments += ["--ServerApp.port_retries=0", f"--IdentityProvider.token={token}"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            arguments, stdout=output, stderr=output, env=dict(env), cwd=cwd, start_new_session=True
        )
    try:
        # Not the file that it writes of itself: that is there before it listens.
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + READY_S
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/api/status?token={token}", timeout=5).close()
                break
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the server does not answer: {log.read_text()[-3000:]}")
            time.sleep(0.1)
        yield url, process
    finally:
        end_tree(process.pid)
        process.wait(20)


def end_tree(pid: int, patience_s: float = 10.0) -> None:
    """Terminate a process and what it started, then kill what is left."""
    try:
        parent = psutil.Process(pid)
        tree = [*parent.children(recursive=True), parent]
        parent.terminate()
    except psutil.NoSuchProcess:
        return
    _, alive = psutil.wait_procs(tree, timeout=patience_s)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=5)
