"""The guard in tests/conftest.py, run in a session of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

CONFTEST = Path(__file__).resolve().parents[1] / "conftest.py"


def run_session(folder: Path, source: str, *args: str) -> subprocess.CompletedProcess[str]:
    (folder / "conftest.py").write_bytes(CONFTEST.read_bytes())
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: needs a device\n", "utf-8")
    (folder / "test_inner.py").write_text(source, "utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *args, str(folder)]
    # This session may be one process of several: the one inside is not.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(command, cwd=folder, env=alone, capture_output=True, text=True, check=False, timeout=120)


LEAVES_A_DETACHED_PROCESS = """
import subprocess, sys
from pathlib import Path

# The middle process ends at once, so that init adopts the sleeper, as it does a supervisor.
MIDDLE = '''
import subprocess, sys
quiet = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True, **quiet).pid)
'''

def test_passes():
    pid = subprocess.run([sys.executable, "-c", MIDDLE], capture_output=True, text=True, check=True).stdout
    Path(__file__).with_name("pid").write_text(pid)
"""


def ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_detached_process_left_behind_fails_the_session_names_it_and_is_ended(tmp_path: Path) -> None:
    done = run_session(tmp_path, LEAVES_A_DETACHED_PROCESS)
    assert done.returncode == 1, done.stdout
    assert "1 passed" in done.stdout
    assert "processes left running by tests" in done.stdout
    assert "time.sleep(600)" in done.stdout
    pid, deadline = int((tmp_path / "pid").read_text()), time.monotonic() + 20
    while not (gone := ended(pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert gone


def test_a_session_that_ends_what_it_starts_passes(tmp_path: Path) -> None:
    done = run_session(tmp_path, "import subprocess\ndef test_it():\n    subprocess.run(['true'], check=True)\n")
    assert done.returncode == 0, done.stdout
    assert "left running" not in done.stdout


NEEDS_DATA = "def test_reads(shared_data):\n    pass\n"


def test_absent_public_data_skips_with_the_path(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("RLHF_NB_DATA", str(tmp_path / "nowhere"))
    monkeypatch.delenv("CI", raising=False)
    done = run_session(tmp_path, NEEDS_DATA, "-rs")
    assert done.returncode == 0, done.stdout
    assert "1 skipped" in done.stdout
    assert "nowhere" in done.stdout


def test_absent_public_data_fails_under_ci(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("RLHF_NB_DATA", str(tmp_path / "nowhere"))
    monkeypatch.setenv("CI", "true")
    done = run_session(tmp_path, NEEDS_DATA)
    assert done.returncode == 1, done.stdout
    assert "set RLHF_NB_DATA" in done.stdout


GPU_TEST = "import pytest\n@pytest.mark.gpu\ndef test_fast():\n    pass\ndef test_other():\n    pass\n"


def test_gpu_tests_are_counted_aloud_where_no_device_is_seen(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = run_session(tmp_path, GPU_TEST)
    assert "1 passed, 1 deselected" in done.stdout
    assert "1 gpu tests not run" in done.stdout
