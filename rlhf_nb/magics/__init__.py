"""`%rlhf` and `%%rlhf`: parse, call one public function, display. They hold nothing but the current workspace."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

ASSIGNED = r"\s*[\w.\[\]'\"]+\s*=\s*%rlhf\b"
"""`run = %rlhf ppo ...`"""


def load(shell: InteractiveShell) -> None:
    """Register the magic and its completer; what `%load_ext rlhf_nb` calls."""
    from rlhf_nb.magics import awaiting
    from rlhf_nb.magics.completion import complete
    from rlhf_nb.magics.magic import RlhfMagic

    shell.register_magic_function(RlhfMagic(), "line_cell", "rlhf")
    awaiting.register(shell)
    for key in ("%rlhf", "%%rlhf"):
        shell.set_hook("complete_command", complete, str_key=key)
    shell.set_hook("complete_command", complete, re_key=ASSIGNED)


def unload(shell: InteractiveShell) -> None:
    """Take the magic away and close its workspace; runs go on."""
    from rlhf_nb import workspace
    from rlhf_nb.magics import awaiting

    awaiting.unregister(shell)
    for kind in ("line", "cell"):
        shell.magics_manager.magics[kind].pop("rlhf", None)
    for key in ("%rlhf", "%%rlhf"):
        shell.strdispatchers["complete_command"].strs.pop(key, None)
    shell.strdispatchers["complete_command"].regexs.pop(re.compile(ASSIGNED), None)
    workspace.use(None)
