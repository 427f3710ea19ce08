"""`kernel CONNECTION_FILE`: a kernel that somebody else started and whose connection file can be read here."""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rlhf_nb.compute.transports.zmq_link import ZmqLink
from rlhf_nb.errors import AttachError

_SILENT_S = 20.0
_AWAY_S = 3.0


@dataclass(frozen=True)
class KernelFile:
    """Anyone who can read the file can run code in that kernel."""

    path: str | os.PathLike[str]
    kind: ClassVar[str] = "kernel"
    is_local: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return f"kernel {Path(self.path).stem}"

    def to_dict(self) -> dict[str, Any]:
        # os.path: a home that is not known is what `connect` says, in words.
        return {"kind": self.kind, "path": str(Path(os.path.expanduser(self.path)).absolute())}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> KernelFile:
        return cls(value["path"])

    def connect(self) -> ZmqLink:
        """
        Raises:
            AttachError: The file is missing, cannot be read or is no connection file.
        """
        path = Path(self.path)
        try:
            path = path.expanduser()
            info = json.loads(path.read_text(encoding="utf-8"))
            wrong = _wrong_field(info)
        except FileNotFoundError:
            raise AttachError(
                f"attach kernel: {path} does not exist; jupyter --runtime-dir is where kernels keep theirs"
            ) from None
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise AttachError(
                f"attach kernel: {path} cannot be read ({reason}); give a kernel's own file, such as kernel-123.json "
                "in jupyter --runtime-dir"
            ) from None
        except ValueError as error:
            wrong = str(error).splitlines()[0]
        if wrong:
            raise AttachError(
                f"attach kernel: {path} is no Jupyter connection file ({wrong}); "
                "%connect_info in that kernel names its own"
            )
        heart = _Heart(info)
        return ZmqLink(info, is_alive=heart.gone, end=lambda kill: heart.close())


def _wrong_field(info: Any) -> str:
    """What a connection file must hold and this one does not; never its key."""
    if not isinstance(info, dict):
        return f"it holds a {type(info).__name__}, not an object"
    for name in ("key", "ip"):
        if not isinstance(info.get(name), str):
            return f"{name} is no text"
    if info.get("transport") not in ("tcp", "ipc"):
        return f"transport={info.get('transport')!r} is neither tcp nor ipc"
    scheme = info.get("signature_scheme")
    if not isinstance(scheme, str) or scheme.removeprefix("hmac-") not in hashlib.algorithms_guaranteed:
        return f"signature_scheme={scheme!r} is none that this Python knows, such as hmac-sha256"
    for name in ("shell_port", "iopub_port", "control_port", "hb_port"):
        if type(info.get(name)) is not int or not 0 < info[name] < 65536:
            return f"{name}={info.get(name)!r} is no port"
    return ""


class _Heart:
    """The kernel's heartbeat. It has no process here to ask; its echo, or any message, is what says that it lives."""

    def __init__(self, info: dict[str, Any]) -> None:
        separator = "-" if info["transport"] == "ipc" else ":"
        self._url = f"{info['transport']}://{info['ip']}{separator}{info['hb_port']}"
        self._asked = self._looked = time.monotonic()
        self._unanswered: float | None = None
        """When the oldest beat without an echo was sent."""
        self._socket: Any = None

    def gone(self, heard: float) -> str | None:
        """Called by the link's thread, which alone may use the socket, while it is idle; a beat goes out every second.

        Args:
            heard: When the kernel's last message came.
        """
        import zmq

        now = time.monotonic()
        if self._socket is None:
            self._socket = zmq.Context.instance().socket(zmq.DEALER)
            self._socket.linger = 0
            self._socket.connect(self._url)
        while self._socket.poll(0):
            self._socket.recv_multipart()
            self._unanswered = None
        if now - self._looked > _AWAY_S:
            # The link was busy with messages, or this process was stopped: nobody has listened for an echo meanwhile.
            self._unanswered = None
        self._looked = now
        if now - self._asked > 1:
            self._asked = now
            self._socket.send_multipart([b"", b"beat"], zmq.NOBLOCK)
            self._unanswered = now if self._unanswered is None else self._unanswered
        if self._unanswered is not None and now - max(self._unanswered, heard) > _SILENT_S:
            return f"the kernel has been silent for {_SILENT_S:g} s"
        return None

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
