"""RLHF that you steer while it runs, from a notebook.

%load_ext rlhf_nb
%rlhf attach local
run = %rlhf sft --base toy --data toy-demonstrations

import rlhf_nb as rl
ws = rl.Workspace("project")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Workspace": "rlhf_nb.workspace",
    "Run": "rlhf_nb.run",
    "Applied": "rlhf_nb.run",
    "LoRA": "rlhf_nb.protocol.spec",
    "Endpoint": "rlhf_nb.protocol.spec",
    "Constitution": "rlhf_nb.feedback.constitution",
    "Principle": "rlhf_nb.feedback.constitution",
    "SFT": "rlhf_nb.methods.sft",
    "RewardModel": "rlhf_nb.methods.reward_model",
    "DPO": "rlhf_nb.methods.dpo",
    "KTO": "rlhf_nb.methods.kto",
    "ORPO": "rlhf_nb.methods.orpo",
    "SimPO": "rlhf_nb.methods.simpo",
    "OnlineDPO": "rlhf_nb.methods.online_dpo",
    "PPO": "rlhf_nb.methods.ppo",
    "GRPO": "rlhf_nb.methods.grpo",
    "DrGRPO": "rlhf_nb.methods.grpo",
    "GSPO": "rlhf_nb.methods.grpo",
    "DAPO": "rlhf_nb.methods.grpo",
    "RLOO": "rlhf_nb.methods.rloo",
    "Dataset": "rlhf_nb.data.dataset",
    "Server": "rlhf_nb.compute.transports.server",
    "KernelFile": "rlhf_nb.compute.transports.kernel_file",
    "RlhfError": "rlhf_nb.errors",
    "SpecError": "rlhf_nb.errors",
    "DataError": "rlhf_nb.errors",
    "NotFoundError": "rlhf_nb.errors",
    "UnavailableError": "rlhf_nb.errors",
    "RunFailedError": "rlhf_nb.errors",
}

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell


def __getattr__(name: str) -> Any:
    # Names are imported at first use: %load_ext must cost no pandas, bokeh or SQLAlchemy.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


def load_ipython_extension(shell: InteractiveShell) -> None:
    from rlhf_nb.magics import load

    load(shell)


def unload_ipython_extension(shell: InteractiveShell) -> None:
    from rlhf_nb.magics import unload

    unload(shell)
