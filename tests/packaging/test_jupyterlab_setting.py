"""A real JupyterLab server of this environment serves the setting that live widgets need."""

from __future__ import annotations

import json
import os
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import jupyter_server

TOKEN = "setting"
PLUGIN = "@jupyterlab/apputils-extension:kernels-settings"


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[str]:
    """URL of a running `jupyter lab`, ended afterwards."""
    env = {
        **os.environ,
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "user"),
    }
    command = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={tmp_path}"]
    with jupyter_server(command, token=TOKEN, log=tmp_path / "lab.log", env=env) as (url, _):
        yield url


@pytest.mark.slow
def test_jupyterlab_serves_comms_over_subshells_as_disabled_by_default(lab: str) -> None:
    if not Path(sys.prefix, "share/jupyter/lab/settings/overrides.d/rlhf_nb.json").is_file():
        pytest.fail("rlhf-nb is not installed in this environment: pip install -e .")
    url = f"{lab}/lab/api/settings/{urllib.parse.quote(PLUGIN, safe='@:/')}"
    request = urllib.request.Request(url, headers={"Authorization": f"token {TOKEN}"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        served = json.load(answer)
    assert served["schema"]["properties"]["commsOverSubshells"]["default"] == "disabled"
