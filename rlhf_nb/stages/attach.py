"""attach: the compute side's Jupyter kernel, started or found, with its agent."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_nb import registry
from rlhf_nb.errors import AttachError, SpecError
from rlhf_nb.protocol.spec import Launch

if TYPE_CHECKING:
    from rlhf_nb.compute.client import Client
    from rlhf_nb.compute.transports.base import Launcher
    from rlhf_nb.workspace import Workspace


def attach(workspace: Workspace, target: Any, *, launch: str, standby: bool) -> Client:
    """A client of the agent at `target`.

    Raises:
        NotFoundError: No launcher of that name.
        AttachError: The kernel did not come up or does not hold this package, or a launcher cannot be written down.
    """
    from rlhf_nb.compute.client import Client

    if isinstance(target, (str, Path)):
        text = str(target)
        if text.endswith(".json") and text not in registry.launchers:
            target = registry.launchers.get("kernel")(text)
        else:
            target = registry.launchers.get(text)()
    if not hasattr(target, "connect"):
        raise SpecError(f'attach: {target!r} is no launcher; give "local", rl.Server(url, ...) or rl.KernelFile(path)')
    described(target)
    runs_root = str(workspace.runs_root.resolve()) if workspace.runs_root is not None and target.is_local else None
    return Client.attach(
        target, runs_root=runs_root, workspace_id=workspace.id, launch=Launch.parse(launch), standby=standby
    )


def described(launcher: Launcher) -> dict[str, Any]:
    """What a workspace notes of a launcher: its `to_dict`, with its kind.

    Raises:
        AttachError: That is no JSON.
    """
    try:
        said = {"kind": launcher.kind, **launcher.to_dict()}
        json.dumps(said)
    except Exception as error:  # noqa: BLE001 - a launcher may come from any package
        raise AttachError(
            f"attach {launcher.name}: {type(launcher).__name__}.to_dict() gives no JSON object "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason'}); "
            "it must hold only text, numbers, lists and dicts"
        ) from None
    return said


def line(launcher: Mapping[str, Any], launch: str = "") -> str:
    """The magic that attaches a launcher again, from its `to_dict`: no token is in it."""
    match launcher["kind"]:
        case "local":
            words = ["local"]
        case "server":
            from rlhf_nb.compute.transports.server import Server

            words = ["server", launcher["url"]]
            words += ["--kernel", launcher["kernel"]] if launcher["kernel"] != Server.kernel else []
            words += ["--token-env", launcher["token_env"]] if launcher["token_env"] != Server.token_env else []
        case "kernel":
            words = ["kernel", launcher["path"]]
        case kind:
            return f"attaching {kind} as before (ws.attach)"
    # One word: argparse takes a `--cpu` that stands alone for a flag of the magic.
    flags = f" --launch={shlex.quote(launch)}" if launch else ""
    return f"%rlhf attach {shlex.join(words)}{flags}"
