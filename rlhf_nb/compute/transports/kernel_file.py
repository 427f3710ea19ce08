"""`kernel CONNECTION_FILE`: a kernel that somebody else started and whose connection file can be read here."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rlhf_nb.compute.transports.zmq_link import ZmqLink
from rlhf_nb.errors import AttachError

_SILENT_S = 20.0


@dataclass(frozen=True)
class KernelFile:
    """Anyone who can read the file can run code in that kernel."""

    path: str
    kind: ClassVar[str] = "kernel"
    is_local: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return f"kernel {Path(self.path).stem}"

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "path": self.path}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> KernelFile:
        return cls(value["path"])

    def connect(self) -> ZmqLink:
        """
        Raises:
            AttachError: The file is missing or is no connection file.
        """
        path = Path(self.path).expanduser()
        try:
            info = json.loads(path.read_text(encoding="utf-8"))
            for field in (
                "key",
                "signature_scheme",
                "transport",
                "ip",
                "shell_port",
                "iopub_port",
                "control_port",
                "hb_port",
            ):
                info[field]
        except FileNotFoundError:
            raise AttachError(
                f"attach kernel: {path} does not exist; jupyter --runtime-dir is where kernels keep theirs"
            ) from None
        except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise AttachError(f"attach kernel: {path} is no Jupyter connection file ({error})") from None
        heart = _Heart(info)
        return ZmqLink(info, is_alive=heart.gone, end=lambda kill: heart.close())


class _Heart:
    """The kernel's heartbeat. It has no process here to ask; its echo is what says that it lives."""

    def __init__(self, info: dict[str, Any]) -> None:
        separator = "-" if info["transport"] == "ipc" else ":"
        self._url = f"{info['transport']}://{info['ip']}{separator}{info['hb_port']}"
        self._heard = self._asked = time.monotonic()
        self._waiting = False
        self._socket: Any = None

    def gone(self) -> str | None:
        """Called by the link every quarter of a second when it is idle; one beat goes out every second."""
        import zmq

        now = time.monotonic()
        if self._socket is None:
            self._socket = zmq.Context.instance().socket(zmq.DEALER)
            self._socket.linger = 0
            self._socket.connect(self._url)
        if now - self._asked > 1:
            self._asked = now
            self._socket.send_multipart([b"", b"beat"], zmq.NOBLOCK)
        while self._socket.poll(0):
            self._socket.recv_multipart()
            self._heard = now
        if now - self._heard > _SILENT_S:
            return f"the kernel has been silent for {_SILENT_S:g} s"
        return None

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
