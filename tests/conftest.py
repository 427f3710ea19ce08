"""What every test gets: an offline, isolated environment, the shared public data, and a guard against leftovers.

The environment is set at import, before any test module imports datasets, transformers or Jupyter.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]

# Kept short: ipc sockets live under it, and a Unix socket's path may not exceed 107 bytes.
SCRATCH = Path(tempfile.mkdtemp(prefix="rlhf-"))

# Every process that a test starts inherits this, detached ones included, so that the guard finds what init adopted.
MARK = "RLHF_NB_TEST_SESSION"
IS_XDIST_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if not IS_XDIST_WORKER:
    os.environ[MARK] = uuid.uuid4().hex

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A developer's own Jupyter settings, kernels, profile and caches neither help nor suffer.
for variable, folder in {
    "HF_HOME": "hf",
    "IPYTHONDIR": "ipython",
    "JUPYTER_CONFIG_DIR": "config",
    "JUPYTER_DATA_DIR": "data",
    "JUPYTER_RUNTIME_DIR": "run",
    "RLHF_NB_RUNS": "runs",
}.items():
    os.environ[variable] = str(SCRATCH / folder)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of public data sets: RLHF_NB_DATA, by default ../shared/data beside the repository.

    Without it the test is skipped and says so; under CI=true it fails, so that a green run means it ran.
    """
    path = Path(os.environ.get("RLHF_NB_DATA", ROOT.parent / "shared" / "data")).resolve()
    if not path.is_dir():
        reason = f"no public data at {path}; set RLHF_NB_DATA to a folder that holds prefs/, lm/, ..."
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return path


deselected_gpu = pytest.StashKey[int]()
leftovers = pytest.StashKey[list[str]]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu:
        return
    import torch

    if torch.cuda.is_available():
        return
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    config.stash[deselected_gpu] = len(gpu)
    config.hook.pytest_deselected(items=gpu)


def _left_running(patience_s: float = 10.0) -> list[psutil.Process]:
    """Children of this process and processes that carry this session's mark, after giving them time to end."""
    deadline = time.monotonic() + patience_s
    while True:
        found = [process for process in _candidates() if not _is_bookkeeping(process)]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def _candidates() -> Iterator[psutil.Process]:
    me = psutil.Process()
    children = {child.pid for child in me.children(recursive=True)}
    for process in psutil.process_iter():
        try:
            if process.pid == me.pid or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if process.pid in children or process.environ().get(MARK) == os.environ[MARK]:
                yield process
        except psutil.Error:
            continue


def _is_bookkeeping(process: psutil.Process) -> bool:
    """multiprocessing's own tracker and xdist's workers live as long as the session's interpreter."""
    try:
        return any("resource_tracker" in part or "exec(eval(sys.stdin" in part for part in process.cmdline())
    except psutil.Error:
        return True


def _describe(process: psutil.Process) -> str:
    try:
        return f"pid {process.pid}, parent {process.ppid()}: {' '.join(process.cmdline())[:200]}"
    except psutil.Error:
        return f"pid {process.pid}"


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if not IS_XDIST_WORKER and (found := _left_running()):
        session.config.stash[leftovers] = [_describe(process) for process in found]
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        if session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
    shutil.rmtree(SCRATCH, ignore_errors=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if count := config.stash.get(deselected_gpu, 0):
        terminalreporter.section("GPU")
        terminalreporter.line(f"{count} gpu tests not run: torch sees no CUDA device here")
    if lines := config.stash.get(leftovers, []):
        terminalreporter.section("processes left running by tests", red=True)
        for line in lines:
            terminalreporter.line(line)
        terminalreporter.line("the session fails: end what a test starts", red=True)
