"""A clean checkout, and what is built from it without a Node on PATH."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATIENT_PIP = {"PIP_RETRIES": "8", "PIP_DEFAULT_TIMEOUT": "60"}
"""For what comes from package indexes, unless the environment says otherwise: about a minute of retries."""


@dataclass(frozen=True)
class Distributions:
    """One sdist, and a wheel each from that sdist and straight from the checkout."""

    sdist: Path
    wheel_from_sdist: Path
    wheel: Path


def copy_checkout(target: Path) -> Path:
    """What `git clone` would give if the work tree were committed: nothing that git ignores, so nothing built."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (source := ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)
    return target


def path_without_node(folder: Path) -> str:
    """A PATH on which every command is found except node and npm."""
    folder.mkdir()
    for directory in reversed(os.environ["PATH"].split(os.pathsep)):
        for command in sorted(Path(directory).iterdir()) if Path(directory).is_dir() else []:
            if command.name not in ("node", "nodejs", "npm", "npx", "corepack"):
                link = folder / command.name
                link.unlink(missing_ok=True)
                link.symlink_to(command)
    return str(folder)


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="session")
def distributions(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """Built by the ordinary front ends in isolated environments, on a machine that has no Node."""
    folder = tmp_path_factory.mktemp("dist")
    environment = {**PATIENT_PIP, **os.environ, "PATH": path_without_node(folder / "bin")}
    assert shutil.which("npm", path=environment["PATH"]) is None

    def run(*command: str) -> None:
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    run("build", "--outdir", "from-sdist", str(checkout))
    run("pip", "wheel", "--no-deps", "--wheel-dir", "direct", str(checkout))
    return Distributions(
        sdist=next(folder.glob("from-sdist/*.tar.gz")),
        wheel_from_sdist=next(folder.glob("from-sdist/*.whl")),
        wheel=next(folder.glob("direct/*.whl")),
    )
