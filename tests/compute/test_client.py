"""The client: errors as what they are, idempotent submits, long replays."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from rlhf_nb.compute.client import Client
from rlhf_nb.compute.connection import Connection
from rlhf_nb.compute.rundir import RunDir, write_json
from rlhf_nb.compute.transports.local import LocalKernel
from rlhf_nb.errors import ComputeError, NotFoundError, RunIdTakenError
from rlhf_nb.protocol.control import Pause, Resume, SetCoefficient, Stop
from rlhf_nb.protocol.events import Metric
from rlhf_nb.protocol.fold import RunFold

from .conftest import BLOBS, ended, first_metric, new_root, toy_spec, until


def test_an_error_of_the_agent_is_raised_as_its_own_class(attached_client: Client) -> None:
    with pytest.raises(NotFoundError, match='run "nobody" is not on the attached compute'):
        attached_client.events("nobody")
    with pytest.raises(ComputeError, match="knows no 'dance'"):
        attached_client.request("dance")


def test_the_doctor_finds_this_machine_sound(attached_client: Client) -> None:
    checks = {check["check"]: check for check in attached_client.doctor()}
    assert checks["packages"]["ok"]
    assert "torch 2" in checks["packages"]["text"]
    assert checks["device"]["text"] == attached_client.info.device


def test_a_live_run_is_steered_and_submitting_it_again_changes_nothing(
    attached_client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    client = attached_client
    assert client.wait_standby(150).standby == "ready"
    spec = toy_spec(max_steps=100_000)
    began = time.perf_counter()
    client.submit(spec, BLOBS)
    first_metric(client, spec.run_id)
    to_metric = time.perf_counter() - began
    client.submit(spec, BLOBS)
    with pytest.raises(RunIdTakenError, match="exists on the attached compute with another spec"):
        client.submit(spec.model_copy(update={"who": "somebody else"}))

    fold = RunFold()
    subscription = client.subscribe(spec.run_id, 0, lambda batch: [fold.add(event) for event in batch])
    until(lambda: fold.rows)
    waits = []
    for value in (0.1, 0.01, 0.001):
        asked = SetCoefficient(name="learning_rate", value=value)
        began = time.perf_counter()
        client.control(spec.run_id, asked)
        until(lambda asked=asked: asked.id in fold.acknowledged)
        waits.append(time.perf_counter() - began)
        until(lambda value=value: fold.coefficients["learning_rate"].value == value)
    refused = SetCoefficient(name="learning_rate", value=1e9)
    client.control(spec.run_id, refused)
    until(lambda: refused.id in fold.refused)
    client.control(spec.run_id, Pause())
    until(lambda: fold.state == "paused")
    assert client.status(spec.run_id)["state"] == client.state(spec.run_id, fold) == "paused"
    client.control(spec.run_id, Resume())
    until(lambda: fold.state == "running")
    assert client.state(spec.run_id, fold) == "running"
    client.control(spec.run_id, Stop())
    assert ended(client, spec.run_id).kind == "stopped"
    until(lambda: fold.is_terminal)
    assert (Path(client.info.runs_root) / spec.run_id / "model" / "config.json").exists()
    with pytest.raises(ComputeError, match="has ended: pause has nothing to act on"):
        client.control(spec.run_id, Pause())
    subscription.close()
    assert fold.started is not None
    assert fold.started.warm
    # One job each: the next one has been started by then.
    assert client.wait_standby(150).standby == "ready"
    assert "standby ready in" in client.info.line()
    with capsys.disabled():
        print(
            f"\n  warm submit → first metric {to_metric:.3f} s; set → acknowledged {max(waits) * 1000:.0f} ms at most"
        )


def test_a_hundred_thousand_events_are_replayed_whole(
    attached_client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    client = attached_client
    run = RunDir(Path(client.info.runs_root) / "long-1")
    run.create(toy_spec(run_id="long-1"))
    n = 100_000
    values = {"loss/total": 0.123456789, "reward/mean": 1.23456789, "kl/policy_reference": 0.0123456789}
    line = Metric(step=1, max_steps=n, values=values, t=1.0).model_dump_json().encode() + b"\n"
    with open(run.events_path, "wb") as handle:
        for seq in range(1, n + 1):
            handle.write(line.replace(b'"seq":0', b'"seq":%d' % seq))
    write_json(run.exit_path, {"attempt": 1, "outcome": "finished", "reason": "", "seconds": 1.0, "step": 1})
    began = time.perf_counter()
    events = client.events("long-1")
    asked = time.perf_counter() - began
    assert [event.seq for event in events] == list(range(1, n + 1))
    got: list[int] = []
    began = time.perf_counter()
    subscription = client.subscribe("long-1", 0, lambda batch: got.extend(event.seq for event in batch))
    until(lambda: len(got) >= n, 60)
    pushed = time.perf_counter() - began
    assert got == list(range(1, n + 1))
    subscription.close()
    with capsys.disabled():
        print(f"\n  100,000 events: asked for in {asked:.2f} s, pushed in {pushed:.2f} s")


def test_a_callback_that_raises_harms_nobody_else(attached_client: Client, capfd: pytest.CaptureFixture[str]) -> None:
    client = attached_client
    run = RunDir(Path(client.info.runs_root) / "short-1")
    run.create(toy_spec(run_id="short-1"))
    write_json(run.exit_path, {"attempt": 1, "outcome": "finished", "reason": "", "seconds": 1.0, "step": 1})
    run.events_path.write_bytes(Metric(seq=1, step=1, values={}).model_dump_json().encode() + b"\n")

    def fail(batch: list[object]) -> None:
        raise ValueError("a callback's own fault")

    got: list[int] = []
    bad = client.subscribe("short-1", 0, fail)
    good = client.subscribe("short-1", 0, lambda batch: got.extend(event.seq for event in batch))
    until(lambda: got == [1], 20)
    assert "a callback's own fault" in capfd.readouterr().err
    bad.close()
    good.close()


def test_a_detached_client_says_how_to_attach() -> None:
    from rlhf_nb.compute.transports.local import LocalKernel

    from .conftest import new_root

    client = Client(LocalKernel(), runs_root=str(new_root()), standby=False)
    client.close()
    assert not client.alive
    with pytest.raises(ComputeError, match="%rlhf attach local attaches again"):
        client.runs()


def test_a_kernel_that_answers_before_it_can_make_a_subshell_is_attached(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Path(__file__).parent / "slow_kernel"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(slow), os.environ["PYTHONPATH"]]))
    connection = Connection(LocalKernel(), lambda data, content: None, lambda reason: None)
    try:
        connection.open(30, runs_root=str(new_root()), keep_standby=False)
        assert connection.subshell is not None
    finally:
        connection.close(kill=True)
