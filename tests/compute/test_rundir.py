"""The run directory: whole lines, one writer, and what happens when the disk says no."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import psutil
import pytest

from rlhf_nb.compute import agent as agent_module
from rlhf_nb.compute import supervisor
from rlhf_nb.compute.agent import Agent
from rlhf_nb.compute.rundir import EventWriter, LineTail, ProcessIdentity, RunDir, append_line, write_json
from rlhf_nb.compute.standby import Standby
from rlhf_nb.compute.supervisor import Supervisor, ensure_supervised
from rlhf_nb.errors import ComputeError, NotFoundError, StorageError
from rlhf_nb.protocol.control import SetCoefficient, Stop
from rlhf_nb.protocol.events import Metric, Notice
from rlhf_nb.protocol.spec import Launch

from .conftest import BLOBS, toy_spec, until


def test_a_torn_last_line_is_dropped_and_seq_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    writer = EventWriter(path)
    for step in range(3):
        writer.write(Metric(step=step, values={}))
    writer.close()
    with open(path, "ab") as handle:
        handle.write(b'{"seq":4,"t":1.0,"kind":"met')
    again = EventWriter(path)
    assert again.write(Notice(code="x", text="y")).seq == 4
    again.close()
    assert [json.loads(line)["seq"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


def test_a_line_longer_than_a_page_is_repaired_too(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    writer = EventWriter(path)
    writer.write(Notice(code="long", text="x" * 300_000))
    writer.close()
    with open(path, "ab") as handle:
        handle.write(b'{"seq":2,' + b"y" * 200_000)
    again = EventWriter(path)
    assert again.last_seq == 1
    again.close()


def test_a_tail_gives_whole_lines_only(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    tail = LineTail(path)
    assert tail.read() == []
    path.write_bytes(b'{"a":1}\n{"a":')
    assert tail.read() == [{"a": 1}]
    with open(path, "ab") as handle:
        handle.write(b"2}\n")
    assert tail.read() == [{"a": 2}]


def test_a_line_after_a_torn_one_is_whole_and_the_torn_one_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "control.jsonl"
    tail = LineTail(path)
    append_line(path, {"id": "first"})
    with open(path, "ab") as handle:
        handle.write(b'{"id":"torn","op":"st')
    assert tail.read() == [{"id": "first"}]
    append_line(path, {"id": "second"})
    append_line(path, {"id": "third"})
    assert tail.read() == [{"id": "second"}, {"id": "third"}]
    assert LineTail(path).read_raw() == [b'{"id": "first"}', b'{"id":"torn","op":"st', *LineTail(path).read_raw()[2:]]


@pytest.mark.parametrize("line", [b"{", b"7", b"null", b'"stop"', b"\xff\xfe", b"\0\0\0", b""])
def test_a_line_that_is_no_object_keeps_nobody_from_the_next(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "control.jsonl"
    path.write_bytes(line + b'\n{"op":"stop"}\n')
    assert LineTail(path).read() == [{"op": "stop"}]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_a_refused_write_is_one_line_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "write", refuse)
    with pytest.raises(StorageError) as caught:
        append_line(tmp_path / "control.jsonl", {"op": "pause"})
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "control.jsonl"))
    assert isinstance(caught.value, OSError)


@pytest.fixture
def agent(tmp_path: Path) -> agent_module.Agent:
    found = Agent(tmp_path / "runs", Launch(), keep_standby=False)
    yield found
    found.close()
    found.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_submit_that_finds_no_room_leaves_nothing_behind(
    agent: Agent, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    spec = toy_spec()
    for name, content in BLOBS.items():
        agent.op_put_blob(name, 0, True, content)

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(StorageError, match=spec.run_id):
            agent.op_submit(spec.model_dump(mode="json"))
    assert not (agent.runs_root / spec.run_id).exists()
    assert agent.op_runs() == []
    assert agent.turns.unfinished() == []


def test_rows_that_arrive_damaged_are_refused(agent: Agent) -> None:
    name = next(iter(BLOBS))
    agent.op_put_blob(name, 0, False, b"something ")
    with pytest.raises(ComputeError, match="rows arrived damaged"):
        agent.op_put_blob(name, 10, True, b"else")
    assert agent.op_has_blob([name]) == [False]
    content = BLOBS[name]
    agent.op_put_blob(name, 0, False, content[:7])
    agent.op_put_blob(name, 7, True, content[7:])
    assert agent.op_has_blob([name]) == [True]


def test_a_spec_whose_rows_never_came_is_refused(agent: Agent) -> None:
    with pytest.raises(ComputeError, match='data "counting" has not arrived'):
        agent.op_submit(toy_spec().model_dump(mode="json"))


@pytest.mark.parametrize("name", ["../escape", "", ".hidden", "a/b"])
def test_a_run_id_cannot_leave_the_runs_root(agent: Agent, name: str) -> None:
    with pytest.raises(NotFoundError):
        agent.op_spec(name)
    with pytest.raises(ValueError, match="cannot name a directory"):
        agent.op_submit(toy_spec(run_id="x").model_copy(update={"run_id": name}).model_dump(mode="json"))


def test_a_supervisor_that_died_before_its_last_line_is_made_good(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "probe-x")
    run.create(toy_spec(run_id="probe-x"))
    write_json(run.attempt_path, {"attempt": 1, "resume_from": None})
    ended = {"attempt": 1, "outcome": "failed", "reason": "the test says so", "code": 1, "signal": None, "rank": 0}
    ended |= {"out_of_memory": False, "oom_evidence": None, "step": 3, "seconds": 1.0, "adopted": False, "log_tail": []}
    write_json(run.exit_path, ended)
    assert ensure_supervised(run.path)
    until(run.said_its_end, 60)
    assert run.events()[-1].reason == "the test says so"
    until(lambda: not run.supervised(), 30)
    assert not ensure_supervised(run.path)


def test_a_torn_control_line_does_not_keep_a_run_from_its_end(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "probe-x")
    run.create(toy_spec(run_id="probe-x", parent="nobody-1"))
    write_json(run.attempt_path, {"attempt": 1, "resume_from": None})
    run.control_path.write_bytes(b'{"op":"stop","id":"torn\n')
    asked = SetCoefficient(name="learning_rate", value=0.5)
    append_line(run.control_path, asked.model_dump())
    Supervisor(run).supervise()
    events = run.events()
    assert [event.id for event in events if event.kind == "control_refused"] == [asked.id]
    assert events[-1].kind == "failed"


def test_a_stop_is_obeyed_once_and_not_by_the_attempt_after_it(tmp_path: Path) -> None:
    """Stopped while it waits, the run is started again; it waits until somebody stops it anew."""
    run = RunDir(tmp_path / "probe-x")
    parent = RunDir(tmp_path / "probe-parent")
    for one in (parent, run):
        one.create(toy_spec(run_id=one.run_id, parent=None if one is parent else parent.run_id))
    write_json(run.attempt_path, {"attempt": 1, "resume_from": None})
    first, impatient, again = Stop(), Stop(), Stop()
    append_line(run.control_path, first.model_dump())
    append_line(run.control_path, impatient.model_dump())
    Supervisor(run).supervise()
    assert (run.exit() or {})["outcome"] == "stopped"
    assert [event.id for event in run.events() if event.kind == "control_acknowledged"] == [first.id, impatient.id]

    run.exit_path.unlink()
    write_json(run.attempt_path, {"attempt": 2, "resume_from": None})
    watching = threading.Thread(target=Supervisor(run).supervise)
    watching.start()
    try:
        until(lambda: (run.supervisor() or {})["phase"] == "waiting", 10)
        time.sleep(20 * supervisor.POLL_S)
        assert run.exit() is None, "the old stops were obeyed again"
    finally:
        append_line(run.control_path, again.model_dump())
        watching.join(20)
    assert (run.exit() or {})["outcome"] == "stopped"
    acknowledged = [event.id for event in run.events() if event.kind == "control_acknowledged"]
    assert acknowledged == [first.id, impatient.id, again.id]


@pytest.fixture
def still_agent(agent: Agent) -> Agent:
    """An agent that looks at nothing on its own."""
    agent.close()
    for thread in agent._threads:
        thread.join()
    return agent


def test_a_supervisor_that_is_still_starting_is_not_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path / "probe-i")
    run.create(toy_spec(run_id="probe-i"))
    write_json(run.attempt_path, {"attempt": 1, "resume_from": None})
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    started: list[tuple[subprocess.Popen[bytes], Path, float]] = []
    monkeypatch.setattr(supervisor, "sys", SimpleNamespace(executable=str(slow)))
    monkeypatch.setattr(supervisor, "_started", started)
    try:
        assert ensure_supervised(run.path)
        assert not ensure_supervised(run.path)
        with monkeypatch.context() as later:
            later.setattr(supervisor, "IMPORT_S", 0.0)
            assert ensure_supervised(run.path), "one that hangs keeps nobody from the run"
        for process, *_ in started:
            process.kill()
            process.wait()
        assert ensure_supervised(run.path)
    finally:
        for process, *_ in started:
            process.kill()
            process.wait()


def test_a_restart_waits_until_the_attempt_before_it_is_put_away(
    still_agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(still_agent.runs_root / "probe-z")
    run.create(toy_spec(run_id="probe-z"))
    write_json(run.exit_path, {"attempt": 1, "outcome": "failed"})
    before, now = supervisor.Lock(run), [0.0]
    assert before.take()

    def sleep(seconds: float) -> None:
        now[0] += seconds
        if now[0] > 2 * supervisor.GRACE_S:
            before.release()

    monkeypatch.setattr(supervisor, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    monkeypatch.setattr(agent_module, "start_supervisor", lambda run: None)
    assert still_agent.op_restart(run.run_id) == {"attempt": 2, "from_step": 0}


@pytest.mark.parametrize(
    ("fate", "problem"),
    [
        ("its job has ended", ""),
        ("its job has ended and was put away", ""),
        ("its launcher fell", "it left with code 0"),
        ("it fell", "it left with code 0"),
    ],
)
def test_a_standby_whose_job_was_over_before_anybody_looked_has_not_failed(
    still_agent: Agent, fate: str, problem: str
) -> None:
    mine = Standby(still_agent.runs_root / ".standby" / "warm")
    write_json(mine.path / "owner.json", ProcessIdentity.of().to_dict())
    write_json(mine.path / "offer.json", {"flags": [], "ranks": 1})
    if problem == "":
        assert mine.claim()
    if fate.endswith("put away"):
        mine.remove()
    if fate == "its launcher fell":
        os.rename(mine.path / "offer.json", mine.path / "withdrawn.json")
    process = subprocess.Popen(["true"])
    process.wait()
    still_agent._standby = (mine, process)
    still_agent._tend_standby()
    assert (still_agent._standby, still_agent._standby_problem) == (None, problem)


def test_nobody_is_called_to_a_run_that_is_just_being_given_to_a_standby(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run without a supervisor is looked for all the time: between its first file and its standby, it is none."""
    spec = toy_spec()
    for name, content in BLOBS.items():
        agent.op_put_blob(name, 0, True, content)
    started: list[str] = []
    for module in (agent_module, supervisor):
        monkeypatch.setattr(module, "start_supervisor", lambda run: started.append(run.path.name))
    called: list[bool] = []

    def claim(runs_root: Path, launch: Launch) -> tuple[None, str]:
        called.append(ensure_supervised(runs_root / spec.run_id))
        return None, ""

    monkeypatch.setattr(agent_module.standby, "claim", claim)
    agent.op_submit(spec.model_dump(mode="json"))
    assert called == [False]
    assert spec.run_id in started
    assert supervisor.Lock(RunDir(agent.runs_root / spec.run_id)).take(), "free again for whoever supervises"


def test_a_supervisor_that_comes_late_leaves_a_run_to_the_standby_it_was_given_to(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "probe-y")
    run.create(toy_spec(run_id="probe-y"))
    write_json(run.attempt_path, {"attempt": 1, "resume_from": None})
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as owner:
        given = ProcessIdentity.of(owner.pid).to_dict() | {"phase": "computing", "standby": "s", "attempt": 1}
        write_json(run.supervisor_path, given)
        supervisor.main([str(run.path)])
        assert run.supervisor() == given
        assert run.events() == []
        owner.kill()


def test_a_process_is_known_by_more_than_its_pid() -> None:
    me = ProcessIdentity.of()
    assert me.alive()
    assert not ProcessIdentity(me.pid, me.created - 100).alive()


def test_a_reader_starts_where_the_log_was_last_read(agent: Agent) -> None:
    run = RunDir(agent.runs_root / "probe-y")
    run.create(toy_spec(run_id="probe-y"))
    writer = EventWriter(run.events_path)
    for step in range(1000):
        writer.write(Metric(step=step, values={"loss/total": 1.0}))
    said, data = agent.op_events("probe-y", 0)
    assert (said["first"], said["last"], len(data.splitlines())) == (1, 1000, 1000)
    writer.write(Metric(step=1001, values={}))
    writer.close()
    assert agent.offsets["probe-y"].before(1000) > 50_000
    said, data = agent.op_events("probe-y", 1000)
    assert (said["first"], said["last"], len(data.splitlines())) == (1001, 1001, 1)
    # From the middle of what one read brought, and from further on than the log goes.
    said, data = agent.op_events("probe-y", 500)
    assert (said["first"], said["last"]) == (501, 1001)
    assert agent.op_events("probe-y", 5000) == ({"first": 0, "last": 0, "more": False}, b"")


class Comm:
    """A comm whose other side is the test."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []

    def on_msg(self, callback: Callable[[dict[str, Any]], None]) -> None:
        self.receive = lambda **data: callback({"content": {"data": {"id": "1", **data}}})

    def on_close(self, callback: Callable[[dict[str, Any]], None]) -> None:
        self.close = lambda: callback({})

    def send(self, data: dict[str, Any], buffers: list[bytes] | None = None) -> None:
        self.sent.append(data)


def test_a_client_that_fell_silent_is_sent_nothing_until_it_is_heard_again(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed notebook says no farewell; a laptop that slept goes on where it was."""
    run = RunDir(agent.runs_root / "probe-y")
    run.create(toy_spec(run_id="probe-y"))
    writer = EventWriter(run.events_path)
    pings, mute = Comm(), Comm()
    for comm in (pings, mute):
        agent.connect(comm, {"content": {"data": {}}})
        comm.receive(op="subscribe", sub="s", run_id="probe-y", since=0)

    def pushed(comm: Comm) -> list[int]:
        return [seq for said in comm.sent if "sub" in said for seq in range(said["first"], said["last"] + 1)]

    pings.receive(op="ping")
    writer.write(Metric(step=1, values={}))
    until(lambda: pushed(pings) == pushed(mute) == [1], 10)
    looks = Mock(wraps=agent.listening)
    monkeypatch.setattr(agent, "listening", looks)
    for session in agent.sessions:
        session._heard -= 2 * agent_module.SILENT_S
    assert [session.comm for session in agent.listening()] == [mute]
    until(lambda: looks.call_count > 3, 10, "a look that was under way ends")
    for step in (2, 3):
        writer.write(Metric(step=step, values={}))
    until(lambda: pushed(mute) == [1, 2, 3], 10, "who never said that it would ping is sent everything")
    time.sleep(0.1)
    assert pushed(pings) == [1]
    pings.receive(op="ping")
    until(lambda: pushed(pings) == [1, 2, 3], 10)
    pings.close()
    assert len(agent.sessions) == 1
    writer.close()


def test_runs_are_listed_oldest_first_with_their_state(agent: Agent) -> None:
    for name, created in (("b", 2.0), ("a", 1.0)):
        RunDir(agent.runs_root / name).create(toy_spec(run_id=name).model_copy(update={"created": created}))
    rows = agent.op_runs()
    assert [(row["run_id"], row["state"]) for row in rows] == [("a", "waiting"), ("b", "waiting")]
    assert time.time() > rows[0]["created"]


def test_a_process_stays_itself_when_the_clock_of_the_machine_is_set(monkeypatch):
    """psutil tells a start as seconds after the boot plus the time of the boot, and the latter moves with the clock."""
    me = ProcessIdentity.of()
    kept = ProcessIdentity.from_dict(json.loads(json.dumps(me.to_dict())))
    genuine = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: genuine(self) + 1.0)
    assert kept is not None and kept.alive()
    assert not replace(kept, ticks=(kept.ticks or 0) + 1).alive() and not replace(kept, boot="another").alive()
