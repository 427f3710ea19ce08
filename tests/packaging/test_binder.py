"""binder/ gives a working environment: its pins are installed, its build script adds the package, its notebook runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from .conftest import PATIENT_PIP

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

PROBE = """
import importlib.metadata as m, json, rlhf_nb
names = [d.name for d in m.distributions()]
print(json.dumps({"package": rlhf_nb.__file__, "torch": m.version("torch"), "names": names}))
"""


@pytest.fixture(scope="module")
def repository(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(checkout, tmp_path_factory.mktemp("binder") / "repository"))


@pytest.fixture(scope="module")
def environment(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as Binder builds it: requirements.txt into an empty environment, then postBuild."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    # Offline, PyTorch's own index would be retried for every package; a CPU wheel must be within reach otherwise.
    lines = (repository / "binder" / "requirements.txt").read_text("utf-8").splitlines()
    requirements = folder.parent / "requirements.txt"
    requirements.write_text("\n".join(line for line in lines if not line.startswith("--")), "utf-8")
    install = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    install += ["-c", str(repository / "constraints.txt"), "-r", str(requirements)]
    done = subprocess.run(install, env={**PATIENT_PIP, **os.environ}, capture_output=True, text=True, check=False)
    if "No matching distribution found for torch==" in done.stderr and os.environ.get("CI") != "true":
        pytest.skip("no CPU build of torch within reach; with a network binder takes it from PyTorch's index")
    assert done.returncode == 0, done.stderr
    path = os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])
    variables = {**PATIENT_PIP, **os.environ, "PATH": path}
    built = subprocess.run(["bash", "binder/postBuild"], cwd=repository, env=variables, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_the_environment_holds_the_package_and_no_cuda(environment: Path, tmp_path: Path) -> None:
    command = [str(environment / "bin" / "python"), "-c", PROBE]
    said = json.loads(subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout)
    assert said["package"].startswith(str(environment)) and said["torch"].endswith("+cpu")
    assert list((Path(said["package"]).parent / "ui" / "static").glob("*.js"))
    assert not [name for name in said["names"] if name.lower().startswith(("nvidia", "cuda", "triton"))]


def test_the_quickstart_runs_in_it(environment: Path, repository: Path, tmp_path: Path) -> None:
    path = os.pathsep.join([str(environment / "bin"), os.environ["PATH"]])
    command = [str(environment / "bin" / "jupyter"), "nbconvert", "--to", "notebook", "--execute"]
    command += ["--ExecutePreprocessor.kernel_name=python3", "--ExecutePreprocessor.timeout=1200"]
    command += ["--ExecutePreprocessor.iopub_timeout=120", "--ExecutePreprocessor.startup_timeout=300"]
    command += ["--output-dir", str(tmp_path), str(repository / "notebooks" / "00_quickstart.ipynb")]
    done = subprocess.run(
        command,
        cwd=repository,
        env={**os.environ, "PATH": path, "RLHF_NB_AUTOLABEL": "toy-annotator", "JUPYTER_DATA_DIR": str(tmp_path / "j")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    cells = nbformat.read(tmp_path / "00_quickstart.ipynb", as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert "image/svg+xml" in json.dumps(code[-2].outputs), "the still picture stays in the notebook"
    said = [str(o.get("text") or o.get("data", {}).get("text/plain", "")) for cell in code for o in cell.outputs]
    table = next(text for text in said if "true, end" in text)
    assert "ppo-1" in table and "ppo-2" in table
    assert any("learning_rate" in text and "at step" in text for text in said)
    runs = repository / "notebooks" / "rlhf-workspace" / "runs"
    assert (runs / "ppo-2" / "model" / "model.safetensors").exists()
