"""constraints.txt, binder/ and package-lock.json pin one set of versions, and name no machine's own mirror."""

from __future__ import annotations

import importlib.metadata
import json
import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from .conftest import ROOT


def pins(path: str) -> dict[str, Version]:
    """Name -> version of every `name==version` line."""
    lines = (ROOT / path).read_text("utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if "==" in line and not line.startswith(("#", "-"))]
    return {canonicalize_name(item.name): Version(next(iter(item.specifier)).version) for item in requirements}


def declared(*extras: str) -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = project["dependencies"] + [line for extra in extras for line in project["optional-dependencies"][extra]]
    return {canonicalize_name(item.name): item for item in map(Requirement, lines) if item.name != "rlhf-nb"}


def test_every_declared_dependency_is_pinned_inside_its_range() -> None:
    pinned = pins("constraints.txt")
    for name, requirement in declared("train", "postgres", "dev").items():
        assert name in pinned, f"{name} is not in constraints.txt"
        assert requirement.specifier.contains(pinned[name]), (
            f"{name}=={pinned[name]} is outside {requirement.specifier}"
        )


def test_constraints_carry_no_local_version_so_that_they_hold_on_every_machine() -> None:
    assert not [name for name, version in pins("constraints.txt").items() if version.local]


def test_what_is_installed_here_is_what_constraints_pin() -> None:
    pinned = pins("constraints.txt")
    for name in declared("train"):
        assert Version(importlib.metadata.version(name)).public == pinned[name].public, name


def test_binder_pins_what_the_notebooks_need_at_the_versions_of_the_constraints() -> None:
    binder, constraints = pins("binder/requirements.txt"), pins("constraints.txt")
    assert set(binder) == set(declared("train"))
    assert {name: version.public for name, version in binder.items()} == {
        name: constraints[name].public for name in binder
    }


def test_binder_takes_torch_without_cuda() -> None:
    assert pins("binder/requirements.txt")["torch"].local == "cpu"


def test_the_lock_file_names_no_download_host() -> None:
    lock = json.loads((ROOT / "widgets" / "package-lock.json").read_text("utf-8"))
    assert not [name for name, package in lock["packages"].items() if "resolved" in package]
    assert all("integrity" in package for name, package in lock["packages"].items() if name)


@pytest.mark.parametrize("name", ["esbuild", "typescript", "@anywidget/types"])
def test_what_decides_the_built_javascript_is_pinned_exactly(name: str) -> None:
    package = json.loads((ROOT / "widgets" / "package.json").read_text("utf-8"))
    wanted = {**package["dependencies"], **package["devDependencies"]}[name]
    assert re.fullmatch(r"\d+\.\d+\.\d+", wanted)
