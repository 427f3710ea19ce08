"""Who may die while a run goes on: the agent, the supervisor, the launcher, the notebook."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from rlhf_nb.compute.client import Client
from rlhf_nb.compute.rundir import ProcessIdentity, RunDir, append_line, read_json, write_json
from rlhf_nb.compute.standby import Standby
from rlhf_nb.compute.supervisor import end_tree, ensure_supervised
from rlhf_nb.compute.transports.local import LocalKernel
from rlhf_nb.protocol.control import SetCoefficient, Stop

from .conftest import BLOBS, end_all, ended, first_metric, metrics, new_root, toy_spec, until


def place(client: Client, run_id: str) -> RunDir:
    return RunDir(Path(client.info.runs_root) / run_id)


def test_a_killed_agent_is_replaced_and_no_event_is_lost_or_seen_twice(attached_client: Client) -> None:
    client = attached_client
    spec = toy_spec(max_steps=100_000)
    client.submit(spec, BLOBS)
    first_metric(client, spec.run_id)
    got: list[int] = []
    subscription = client.subscribe(spec.run_id, 0, lambda batch: got.extend(event.seq for event in batch))
    until(lambda: len(got) > 5)
    before = client.info.agent_pid
    os.kill(before, signal.SIGKILL)
    until(lambda: client.info.agent_pid != before, 60, "another agent has been attached")
    assert client.status(spec.run_id)["state"] == "running"
    seen = len(got)
    until(lambda: len(got) > seen + 20, 60, "events go on")
    asked = Stop()
    client.control(spec.run_id, asked)
    last = ended(client, spec.run_id)
    assert last.kind == "stopped"
    until(lambda: got[-1] == last.seq, 20)
    assert got == list(range(1, last.seq + 1))
    subscription.close()


def test_killed_launcher_and_supervisor_leave_the_worker_working_and_another_supervisor_sees_its_end(
    attached_client: Client,
) -> None:
    client = attached_client
    spec = toy_spec(max_steps=100_000)
    client.submit(spec, BLOBS)
    first_metric(client, spec.run_id)
    run = place(client, spec.run_id)
    launcher = until(lambda: (run.supervisor() or {}).get("launcher"), 60, "the supervisor says what it watches")
    os.kill(launcher["pid"], signal.SIGKILL)
    steps = len(metrics(client, spec.run_id))
    until(lambda: len(metrics(client, spec.run_id)) > steps + 5)
    assert client.status(spec.run_id)["state"] == "running"
    old = (run.supervisor() or {})["pid"]
    os.kill(old, signal.SIGKILL)
    until(lambda: (run.supervisor() or {})["pid"] != old, 60, "another supervisor has adopted the run")
    assert client.status(spec.run_id)["state"] == "running"
    steps = len(metrics(client, spec.run_id))
    until(lambda: len(metrics(client, spec.run_id)) > steps)
    client.control(spec.run_id, Stop())
    last = ended(client, spec.run_id)
    assert last.kind == "stopped"
    events = client.events(spec.run_id)
    assert any(event.kind == "notice" and event.code == "supervisor_lost" for event in events)
    assert [event.seq for event in events] == list(range(1, last.seq + 1))


def test_supervisor_and_worker_killed_together_still_make_a_failed_run(attached_client: Client) -> None:
    client = attached_client
    spec = toy_spec(max_steps=100_000)
    client.submit(spec, BLOBS)
    first_metric(client, spec.run_id)
    run = place(client, spec.run_id)
    rank = run.rank_files()[0]
    os.kill((run.supervisor() or {})["pid"], signal.SIGKILL)
    os.kill(rank["watcher"]["pid"], signal.SIGKILL)
    # The trainer goes with its watcher, and nobody is left who saw it.
    until(lambda: not run.alive(), 20)
    row = client.status(spec.run_id)
    assert (row["state"], row["alive"]) == ("failed", False)
    last = ended(client, spec.run_id)
    assert last.kind == "failed"
    assert last.reason == "rank 0 and its watcher are gone; how they ended is not known"


def test_a_failed_run_restarts_from_its_last_checkpoint(attached_client: Client) -> None:
    client = attached_client
    spec = toy_spec(max_steps=12, die="error", die_at=9, checkpoint_every=4, step_s=0)
    client.submit(spec, BLOBS)
    last = ended(client, spec.run_id)
    assert (last.kind, last.step) == ("failed", 9), last
    append_line(place(client, spec.run_id).control_path, SetCoefficient(name="learning_rate", value=0.5).model_dump())
    assert client.resume(spec.run_id) == {"attempt": 2, "from_step": 8}
    assert client.status(spec.run_id)["state"] in ("waiting", "starting", "running")
    assert ended(client, spec.run_id).kind == "finished"
    events = client.events(spec.run_id)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    second = events[next(i for i, event in enumerate(events) if event.kind == "resumed") :]
    assert (second[0].from_step, second[0].attempt) == (8, 2)
    assert [event.step for event in second if event.kind == "metric"] == [9, 10, 11, 12]
    assert read_json(place(client, spec.run_id).path / "exit.1.json")["outcome"] == "failed"


def test_a_control_line_that_nobody_can_read_any_more_is_refused(attached_client: Client) -> None:
    client = attached_client
    spec = toy_spec(max_steps=100_000, step_s=0.01)
    client.submit(spec, BLOBS)
    pid = (first_metric(client, spec.run_id), place(client, spec.run_id).rank_files()[0]["pid"])[1]
    os.kill(pid, signal.SIGSTOP)
    asked = SetCoefficient(name="learning_rate", value=0.5)
    client.control(spec.run_id, asked)
    os.kill(pid, signal.SIGKILL)
    assert ended(client, spec.run_id).kind == "failed"
    refused = [event for event in client.events(spec.run_id) if event.kind == "control_refused"]
    assert [(event.id, event.reason) for event in refused] == [(asked.id, "the run failed before this was read")]


KILLED_AFTER_LAUNCH = """
import os, signal, sys
from rlhf_nb.compute import supervisor
launch = supervisor._launch
def launch_and_die(*arguments):
    launch(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
supervisor._launch = launch_and_die
supervisor.main(sys.argv[1:])
"""


def test_a_supervisor_killed_before_it_could_say_what_it_launched_leaves_one_job(tmp_path: Path) -> None:
    runs_root = tmp_path / "runs"
    run = RunDir(runs_root / "probe-orphan")
    (runs_root / ".blobs").mkdir(parents=True)
    for name, content in BLOBS.items():
        (runs_root / ".blobs" / f"{name}.jsonl").write_bytes(content)
    run.create(toy_spec(run_id=run.run_id, max_steps=20))
    write_json(run.attempt_path, {"attempt": 1, "resume_from": None})
    try:
        killed = subprocess.run([sys.executable, "-c", KILLED_AFTER_LAUNCH, str(run.path)])
        assert killed.returncode == -signal.SIGKILL
        assert (run.supervisor() or {}).get("launcher") is None
        orphan = run.launcher()
        assert orphan is not None and run.alive(), "the launcher that nobody wrote down is found"
        assert ensure_supervised(run.path)
        known = until(lambda: (run.supervisor() or {}).get("launcher"), 60, "another supervisor watches")
        assert known == orphan.to_dict()
        until(run.said_its_end, what="the run has ended")
        events = run.events()
        assert [event.kind for event in events if event.kind in ("started", "finished")] == ["started", "finished"]
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        assert [event.step for event in events if event.kind == "metric"] == list(range(1, 21))
        assert not (run.exit() or {})["out_of_memory"]
    finally:
        end_all(runs_root)
        if (left := run.launcher()) is not None and left.alive():
            end_tree(left.pid)


@pytest.mark.parametrize("standby", [False, True])
def test_a_launcher_that_nobody_recorded_is_known_by_its_command(tmp_path: Path, standby: bool) -> None:
    run = RunDir(tmp_path / "probe-1")
    run.create(toy_spec(run_id="probe-1"))
    warm = tmp_path / ".standby" / "warm"
    given = {"phase": "computing", "attempt": 1} | ({"standby": "warm"} if standby else {})
    write_json(run.supervisor_path, {"pid": 2**22 - 1, "created": 1.0} | given)
    assert run.launcher() is None and not run.alive()
    worker = ["rlhf_nb.compute.worker", *(("--standby", str(warm)) if standby else ("--run", str(run.path)))]
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", *worker]) as process:
        try:
            found = until(run.launcher, 10)
            assert found.pid == process.pid and run.alive()
            assert RunDir(tmp_path / "probe-11").launcher() is None
        finally:
            process.kill()


NOTEBOOK = """
import sys, time
from tests.compute.conftest import BLOBS, toy_spec, first_metric
from rlhf_nb.compute.client import Client
from rlhf_nb.compute.transports.local import LocalKernel
client = Client(LocalKernel(), runs_root=sys.argv[1])
client.submit(toy_spec(run_id="survivor", max_steps=100_000), BLOBS)
first_metric(client, "survivor")
client.wait_standby(120)
print(client.info.agent_pid, flush=True)
time.sleep(600)
"""


def test_a_run_outlives_its_notebook_and_an_idle_standby_does_not(tmp_path: Path) -> None:
    root = new_root()
    script = tmp_path / "notebook.py"
    script.write_text(textwrap.dedent(NOTEBOOK))
    env = dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), env["PYTHONPATH"]])
    notebook = subprocess.Popen([sys.executable, str(script), str(root)], stdout=subprocess.PIPE, env=env, text=True)
    client = None
    try:
        assert notebook.stdout is not None
        agent = ProcessIdentity.of(int(notebook.stdout.readline()))
        idle = [standby for standby in Standby.all(root) if standby.offer is not None]
        ranks = [ProcessIdentity.from_dict(rank) for one in idle for rank in RunDir(one.path).rank_files().values()]
        assert len(idle) == len(ranks) == 1
        notebook.kill()
        notebook.wait()
        until(lambda: not agent.alive(), 30, "the agent has left")
        until(lambda: not any(rank and rank.alive() for rank in ranks), 30, "the idle standby has left")
        client = Client(LocalKernel(), runs_root=str(root), standby=False)
        assert [(row["run_id"], row["state"]) for row in client.runs()] == [("survivor", "running")]
        seqs = [event.seq for event in client.events("survivor")]
        assert seqs == list(range(1, len(seqs) + 1))
        client.control("survivor", Stop())
        assert ended(client, "survivor").kind == "stopped"
    finally:
        notebook.kill()
        notebook.communicate()
        if client is not None:
            client.close()
        end_all(root)
