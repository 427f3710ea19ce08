"""A real JupyterLab server of this environment serves the setting that live widgets need."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

PLUGIN = "@jupyterlab/apputils-extension:kernels-settings"


def _answering(runtime: Path) -> str | None:
    """URL of the server that wrote its file under `runtime`, once it answers."""
    for file in runtime.glob("jpserver-*.json"):
        with contextlib.suppress(OSError, ValueError):
            url: str = json.loads(file.read_text())["url"]
            with urllib.request.urlopen(f"{url}api", timeout=5):
                return url
    return None


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[str]:
    """URL of a running `jupyter lab` on a free port, ended afterwards."""
    runtime = tmp_path / "runtime"
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        "--ip=127.0.0.1",
        "--ServerApp.port=0",
    ]
    command += ["--IdentityProvider.token=t", f"--ServerApp.root_dir={tmp_path}"]
    environment = {**os.environ, "JUPYTER_RUNTIME_DIR": str(runtime), "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "user")}
    with (tmp_path / "lab.log").open("wb") as log:
        server = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 120
        # The file is written before the server listens.
        while not (url := _answering(runtime)):
            assert server.poll() is None, (tmp_path / "lab.log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "lab.log").read_text()
            time.sleep(0.1)
        yield url
    finally:
        server.terminate()
        server.wait(timeout=30)


@pytest.mark.slow
def test_jupyterlab_serves_comms_over_subshells_as_disabled_by_default(lab: str) -> None:
    if not Path(sys.prefix, "share/jupyter/lab/settings/overrides.d/rlhf_nb.json").is_file():
        pytest.fail("rlhf-nb is not installed in this environment: pip install -e .")
    url = f"{lab}lab/api/settings/{urllib.parse.quote(PLUGIN, safe='@:/')}"
    request = urllib.request.Request(url, headers={"Authorization": "token t"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        served = json.load(answer)
    assert served["schema"]["properties"]["commsOverSubshells"]["default"] == "disabled"
