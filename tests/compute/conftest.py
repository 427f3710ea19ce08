"""One attached client for the whole folder: attaching once, with one warm worker, makes real processes affordable."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_nb import registry
from rlhf_nb.compute.client import Client
from rlhf_nb.compute.rundir import RunDir
from rlhf_nb.compute.supervisor import end_tree
from rlhf_nb.compute.transports.local import LocalKernel
from rlhf_nb.compute.turns import Turns
from rlhf_nb.protocol.events import TERMINAL, AnyEvent
from rlhf_nb.protocol.spec import BlobData, Launch, RunModel, RunSpec

PLUGIN = Path(__file__).parent / "plugin"
_numbers = itertools.count(1)

ROWS = b"".join(
    json.dumps({"prompt": f"Say {n}.", "completion": f"{n}."}, separators=(",", ":")).encode() + b"\n" for n in range(8)
)
BLOBS = {hashlib.sha256(ROWS).hexdigest(): ROWS}


@pytest.fixture(scope="session", autouse=True)
def probe_method() -> Iterator[None]:
    """The plugin on the path of this process and of every process it starts."""
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(PLUGIN), os.environ.get("PYTHONPATH")])))
    patch.setenv("OMP_NUM_THREADS", "1")
    patch.syspath_prepend(str(PLUGIN))
    patch.setattr(registry.methods, "_plugins", None)
    yield
    patch.undo()


def toy_spec(*, run_id: str | None = None, launch: str = "", parent: str | None = None, **config: Any) -> RunSpec:
    """A run of the probe method: `toy_spec(max_steps=5, step_s=0.01)`."""
    method = registry.methods.get("probe").create(**config)
    return RunSpec(
        run_id=run_id or f"probe-{next(_numbers)}",
        workspace_id="tests",
        method="probe",
        config=method.model_dump(),
        policy=RunModel(run_id=parent) if parent else None,
        data=BlobData(content_hash=next(iter(BLOBS)), row_kind="demonstrations", n=8, name="counting"),
        launch=Launch.parse(launch),
        created=time.time(),
    )


def until(true: Callable[[], Any], seconds: float = 150.0, what: str = "") -> Any:
    """The first truthy value of `true()`; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := true()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not true after {seconds:g} s: {what}")
        time.sleep(0.02)
    return value


def ended(client: Client, run_id: str, seconds: float = 150.0) -> AnyEvent:
    """The run's terminal event of the current attempt."""
    where = RunDir(Path(client.info.runs_root) / run_id)

    def last() -> AnyEvent | None:
        events = client.events(run_id)
        return events[-1] if events and events[-1].kind in TERMINAL and where.exit() is not None else None

    try:
        return until(last, seconds, f"{run_id} has ended")
    except AssertionError as error:
        raise AssertionError(f"{error}\n{client.status(run_id)}\n" + "\n".join(client.log_tail(run_id, 40))) from None


def metrics(client: Client, run_id: str) -> list[AnyEvent]:
    return [event for event in client.events(run_id) if event.kind == "metric"]


def first_metric(client: Client, run_id: str, seconds: float = 150.0) -> AnyEvent:
    def look() -> AnyEvent | None:
        found = metrics(client, run_id)
        return found[0] if found else None

    try:
        return until(look, seconds, f"{run_id} has a metric")
    except AssertionError as error:
        raise AssertionError(f"{error}\n{client.status(run_id)}\n" + "\n".join(client.log_tail(run_id, 40))) from None


def end_all(runs_root: Path) -> None:
    """Kill what still runs under a runs root, by the pids that its own records name."""
    for run_id in Turns(runs_root).unfinished():
        run = RunDir(runs_root / run_id)
        state = run.supervisor() or {}
        known = [state, state.get("launcher") or {}]
        known += [one for rank in run.rank_files().values() for one in (rank.get("watcher") or {}, rank)]
        for record in known:
            if record.get("pid"):
                end_tree(record["pid"])


def new_root() -> Path:
    return Path(tempfile.mkdtemp(prefix="c-")) / "runs"


@pytest.fixture(scope="session")
def attached_client() -> Iterator[Client]:
    """A client attached to a local kernel, with a standby of one rank."""
    root = new_root()
    client = Client(LocalKernel(), runs_root=str(root))
    try:
        yield client
    finally:
        client.close()
        end_all(root)


@pytest.fixture
def cold_client() -> Iterator[Client]:
    """A client of its own, without a standby."""
    root = new_root()
    client = Client(LocalKernel(), runs_root=str(root), standby=False)
    try:
        yield client
    finally:
        client.close()
        end_all(root)
