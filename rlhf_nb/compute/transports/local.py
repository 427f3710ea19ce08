"""`local`: a real Jupyter kernel on this machine, reached over ipc sockets as a remote one is over the network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rlhf_nb.compute.rundir import ProcessIdentity, read_json, write_json
from rlhf_nb.compute.transports.zmq_link import ZmqLink
from rlhf_nb.errors import AttachError

START_S = 60.0
_LONGEST_SOCKET = 90
"""Bytes: a Unix socket's path has room for 107, and the kernel appends its own suffix."""


@dataclass(frozen=True)
class LocalKernel:
    """Starts a kernel with this Python. It ends with the notebook; runs do not."""

    kind: ClassVar[str] = "local"
    is_local: ClassVar[bool] = True
    python: str = sys.executable

    @property
    def name(self) -> str:
        return "local"

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "python": self.python}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> LocalKernel:
        return cls(python=value.get("python", sys.executable))

    def connect(self) -> ZmqLink:
        """Start the kernel and wait until its sockets exist.

        Raises:
            AttachError: It did not come up; the message carries its last line.
        """
        from jupyter_client.connect import write_connection_file

        folder = Path(_short_folder())
        _sweep(folder.parent)
        file, info = write_connection_file(
            str(folder / "k.json"), transport="ipc", ip=str(folder / "k"), key=os.urandom(32).hex().encode()
        )
        log_path = folder / "log.txt"
        with open(log_path, "wb") as log:
            process = subprocess.Popen(
                [
                    self.python,
                    "-Xfrozen_modules=off",
                    "-m",
                    "ipykernel_launcher",
                    "-f",
                    file,
                    "--HistoryManager.enabled=False",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=_environment(),
            )

        write_json(folder / "kernel.json", ProcessIdentity.of(process.pid).to_dict())

        def last_words(heard: float = 0.0) -> str | None:
            code = process.poll()
            if code is None:
                return None
            how = f"signal {-code}" if code < 0 else f"code {code}"
            text = log_path.read_text(errors="replace").strip() if log_path.exists() else ""
            said = text.splitlines()[-1].strip() if text and code > 0 else ""
            return f"the local kernel ended with {how}" + (f": {said}" if said else "")

        def end(kill: bool) -> None:
            if kill and process.poll() is None:
                process.terminate()
                try:
                    process.wait(3)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            if process.poll() is not None:
                shutil.rmtree(folder, ignore_errors=True)

        last_socket = Path(f"{info['ip']}-{info['iopub_port']}")
        deadline = time.monotonic() + START_S
        while not last_socket.exists():
            gone = last_words()
            if gone is not None or time.monotonic() > deadline:
                end(True)
                raise AttachError(f"attach local: {gone or f'the kernel did not come up in {START_S:g} s'}")
            time.sleep(0.01)
        return ZmqLink(dict(info, transport="ipc"), is_alive=last_words, end=end)


def _environment() -> dict[str, str]:
    env = dict(os.environ)
    env["JPY_PARENT_PID"] = str(os.getpid())
    env["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
    env.pop("MPLBACKEND", None)
    return env


def _sweep(base: Path) -> None:
    """Remove the sockets of kernels that ended together with a killed notebook."""
    for file in base.glob("rlhf-*/kernel.json"):
        try:
            kernel = ProcessIdentity.from_dict(read_json(file))
            if kernel is not None and not kernel.alive():
                shutil.rmtree(file.parent, ignore_errors=True)
        except (OSError, ValueError):
            continue  # somebody else's


def _short_folder() -> str:
    for base in (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp"):
        if base and os.path.isdir(base) and os.access(base, os.W_OK) and len(base.encode()) < _LONGEST_SOCKET - 20:
            return tempfile.mkdtemp(prefix="rlhf-", dir=base)
    return tempfile.mkdtemp(prefix="rlhf-")
