"""What a launcher and a link are. A launcher is configuration; `connect` gives the link to one live kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

Channel = Literal["shell", "control"]
OnMessage = Callable[[dict[str, Any]], None]
OnLost = Callable[[str], None]

RECONNECTED = "rlhf_reconnected"
"""Type of a message that a link makes itself when a dropped line stands again."""


class Link(Protocol):
    """Messages to and from one kernel, as the Jupyter protocol has them. Thread-safe."""

    compress: bool
    """Whether events are worth compressing on the way: a server limits the bytes a second."""

    def start(self, on_message: OnMessage, on_lost: OnLost) -> None:
        """Begin to receive. Both callbacks come from the link's own thread: `on_message` with every message of shell,
        control and iopub, `on_lost` once, with the reason in words."""
        ...

    def send(
        self,
        kind: str,
        content: dict[str, Any],
        *,
        channel: Channel = "shell",
        subshell: str | None = None,
        buffers: list[bytes] | None = None,
    ) -> str:
        """Queue one message; returns its id."""
        ...

    @property
    def alive(self) -> bool: ...

    def close(self, *, kill: bool) -> None:
        """Stop receiving; with `kill`, also end the kernel if the launcher started it."""
        ...


class Launcher(Protocol):
    """Starts or finds the kernel. Outside packages add their own through the entry-point group `rlhf_nb.launchers`."""

    kind: str
    """Registry name."""
    is_local: bool
    """True where the kernel sees the notebook's file system, so that runs live in the workspace."""

    @property
    def name(self) -> str:
        """For people: `local`, `https://gpu.example.org`."""
        ...

    def connect(self) -> Link: ...

    def to_dict(self) -> dict[str, Any]: ...

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Launcher: ...
