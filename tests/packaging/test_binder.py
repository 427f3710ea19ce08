"""binder/ gives a working environment: its pins resolve without CUDA, and its build script adds the package.

The pinned versions are the ones installed here (test_pins.py), so the build script runs over this environment's
packages instead of over a second copy of 1.5 GB.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PROBE = "import rlhf_nb, torch, trl, jupyterlab; print(rlhf_nb.__file__)"


def test_the_pins_resolve_together_and_take_torch_without_cuda(checkout: Path, tmp_path: Path) -> None:
    # Offline, PyTorch's own index would be retried for every package; a CPU wheel must be within reach otherwise.
    lines = (checkout / "binder" / "requirements.txt").read_text("utf-8").splitlines()
    requirements, report = tmp_path / "requirements.txt", tmp_path / "report.json"
    requirements.write_text("\n".join(line for line in lines if not line.startswith("--")), "utf-8")
    command = ["install", "--dry-run", "--ignore-installed", "--quiet", "--report", str(report)]
    command += ["-c", str(checkout / "constraints.txt"), "-r", str(requirements)]
    done = subprocess.run([sys.executable, "-m", "pip", *command], capture_output=True, text=True, check=False)
    if "No matching distribution found for torch==" in done.stderr and os.environ.get("CI") != "true":
        pytest.skip("no CPU build of torch within reach; with a network binder takes it from PyTorch's index")
    assert done.returncode == 0, done.stderr
    chosen = {
        item["metadata"]["name"]: item["metadata"]["version"] for item in json.loads(report.read_text())["install"]
    }
    assert chosen["torch"].endswith("+cpu")
    assert not [name for name in chosen if name.startswith(("nvidia", "cuda", "triton"))]


def test_the_build_script_adds_the_package_with_its_widgets(checkout: Path, tmp_path: Path) -> None:
    environment, repository = tmp_path / "venv", tmp_path / "repository"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    packages = environment / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (packages / "zz_here.pth").write_text(sysconfig.get_path("purelib"), "utf-8")
    shutil.copytree(checkout, repository)

    path = os.pathsep.join([str(environment / "bin"), os.environ["PATH"]])
    built = subprocess.run(
        ["bash", "binder/postBuild"], cwd=repository, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stdout + built.stderr
    python = str(environment / "bin" / "python")
    said = subprocess.run([python, "-c", PROBE], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert said.startswith(str(environment))
    assert list((packages / "rlhf_nb" / "ui" / "static").glob("*.js"))
