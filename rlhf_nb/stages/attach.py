"""attach: the compute side's Jupyter kernel, started or found, with its agent."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_nb import registry
from rlhf_nb.errors import SpecError
from rlhf_nb.protocol.spec import Launch

if TYPE_CHECKING:
    from rlhf_nb.compute.client import Client
    from rlhf_nb.workspace import Workspace


def attach(workspace: Workspace, target: Any, *, launch: str, standby: bool) -> Client:
    """A client of the agent at `target`.

    Raises:
        NotFoundError: No launcher of that name.
        AttachError: The kernel did not come up or does not hold this package.
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
    runs_root = str(workspace.runs_root.resolve()) if workspace.runs_root is not None and target.is_local else None
    return Client.attach(
        target, runs_root=runs_root, workspace_id=workspace.id, launch=Launch.parse(launch), standby=standby
    )
