"""What a user gets from `pip install .`, from the wheel and from the sdist, on a machine without Node."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from .conftest import ROOT, Distributions

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def members(archive: Path) -> dict[str, bytes]:
    """Path inside the distribution (the sdist's top folder stripped) -> contents."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist() if not name.endswith("/")}
    with tarfile.open(archive) as sdist:
        files = [member for member in sdist.getmembers() if member.isfile()]
        return {member.name.partition("/")[2]: sdist.extractfile(member).read() for member in files}  # type: ignore[union-attr]


@pytest.fixture(scope="session")
def wheel(distributions: Distributions) -> dict[str, bytes]:
    return members(distributions.wheel)


@pytest.fixture(scope="session")
def sdist(distributions: Distributions) -> dict[str, bytes]:
    return members(distributions.sdist)


def built_widgets() -> set[str]:
    source = ROOT / "widgets" / "src"
    scripts = {f"rlhf_nb/ui/static/{path.stem}.js" for path in source.glob("*.ts") if not path.name.endswith(".d.ts")}
    return scripts | {f"rlhf_nb/ui/static/{path.name}" for path in source.glob("*.css")}


def notebooks() -> set[str]:
    return {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}


def test_every_widget_is_built_into_wheel_and_sdist(wheel: dict[str, bytes], sdist: dict[str, bytes]) -> None:
    for archive in (wheel, sdist):
        assert {name for name in archive if name.startswith("rlhf_nb/ui/static/")} == built_widgets()
        assert all(archive[name].strip() for name in built_widgets())


def test_a_built_widget_is_one_module_with_no_imports_left(wheel: dict[str, bytes]) -> None:
    for name in built_widgets():
        if name.endswith(".js"):
            assert b"export{" in wheel[name] or b"export default" in wheel[name]
            assert not wheel[name].lstrip().startswith(b"import")
            assert b"sourceMappingURL" not in wheel[name]


def test_every_notebook_is_in_wheel_and_sdist(wheel: dict[str, bytes], sdist: dict[str, bytes]) -> None:
    in_wheel = {name.removeprefix("rlhf_nb/notebooks/") for name in wheel if name.startswith("rlhf_nb/notebooks/")}
    assert {name for name in in_wheel if name.endswith(".ipynb")} == notebooks()
    assert {name.removeprefix("notebooks/") for name in sdist if name.endswith(".ipynb")} >= notebooks()


def test_every_module_and_data_file_of_the_package_is_in_the_wheel(wheel: dict[str, bytes], checkout: Path) -> None:
    expected = {path.relative_to(checkout).as_posix() for path in (checkout / "rlhf_nb").rglob("*") if path.is_file()}
    assert {name for name in expected if "__pycache__" not in name} - set(wheel) == set()


def test_the_wheel_carries_the_kernelspec_that_a_remote_attach_starts(wheel: dict[str, bytes]) -> None:
    (spec,) = (name for name in wheel if name.endswith(".data/data/share/jupyter/kernels/rlhf/kernel.json"))
    # "python" is replaced by the Jupyter server's own interpreter; an absolute path would be the build machine's.
    assert json.loads(wheel[spec])["argv"] == ["python", "-m", "ipykernel_launcher", "-f", "{connection_file}"]


def test_the_wheel_carries_the_jupyterlab_setting(wheel: dict[str, bytes]) -> None:
    (name,) = (
        name for name in wheel if name.endswith(".data/data/share/jupyter/lab/settings/overrides.d/rlhf_nb.json")
    )
    setting = json.loads(wheel[name])["@jupyterlab/apputils-extension:kernels-settings"]
    assert setting == {"commsOverSubshells": "disabled"}


def test_a_wheel_made_from_the_sdist_has_the_same_files(distributions: Distributions, wheel: dict[str, bytes]) -> None:
    again = members(distributions.wheel_from_sdist)
    assert {name: data for name, data in again.items() if not name.endswith("/RECORD")} == {
        name: data for name, data in wheel.items() if not name.endswith("/RECORD")
    }


def test_no_development_file_travels(wheel: dict[str, bytes], sdist: dict[str, bytes]) -> None:
    for archive in (wheel, sdist):
        assert not [name for name in archive if "node_modules" in name or "__pycache__" in name or ".venv" in name]
    assert not [name for name in wheel if name.startswith(("tests/", "widgets/", "notebooks/"))]


def test_the_installed_wheel_puts_its_files_where_jupyter_looks(distributions: Distributions, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [
        "pip",
        "--python",
        str(python),
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        str(distributions.wheel),
    ]
    subprocess.run([sys.executable, "-m", *install], check=True)
    # From a folder of its own: in the repository `import rlhf_nb` would find the work tree instead.
    code = (
        "import importlib.metadata as m, rlhf_nb; print(rlhf_nb.__file__, rlhf_nb.__version__ == m.version('rlhf-nb'))"
    )
    said = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert str(tmp_path / "venv") in said
    assert said.rstrip().endswith("True")
    assert (tmp_path / "venv/share/jupyter/kernels/rlhf/kernel.json").is_file()
    assert (tmp_path / "venv/share/jupyter/lab/settings/overrides.d/rlhf_nb.json").is_file()
