"""Which compute a workspace speaks to, and what it says of runs that are on another one."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import rlhf_nb as rl
from rlhf_nb.compute.client import Client
from rlhf_nb.compute.rundir import EventWriter, RunDir, write_json
from rlhf_nb.compute.transports.local import LocalKernel
from rlhf_nb.compute.transports.server import Server
from rlhf_nb.errors import AttachError, ComputeError, ElsewhereError, NotFoundError, StorageError
from rlhf_nb.magics import parser
from rlhf_nb.protocol.events import Finished, Resumed, Started
from rlhf_nb.protocol.spec import NamedData, NamedModel, RunSpec

FAR = "https://gpu.example"


class Far(Server):
    """A server, as far as anybody can tell: the kernel it gives is this machine's, and runs lie in RLHF_NB_RUNS."""

    def connect(self) -> Any:
        return LocalKernel().connect()


def spec(ws: rl.Workspace, run_id: str) -> RunSpec:
    config = rl.SFT().model_dump(mode="json")
    models = {"policy": NamedModel(name="toy"), "data": NamedData(name="toy-demonstrations")}
    return RunSpec(run_id=run_id, workspace_id=ws.id, method="sft", config=config, created=0.0, **models)


def finished_run(root: Path, made: RunSpec) -> RunDir:
    """A run directory, as a run that has finished leaves it."""
    place = RunDir(root / made.run_id)
    place.create(made)
    write_json(place.attempt_path, {"attempt": 1, "resume_from": None})
    append(place, Started(world_size=1), Finished(step=3))
    end = {"attempt": 1, "outcome": "finished", "reason": "", "seconds": 1.0, "step": 3}
    write_json(place.exit_path, end)
    return place


def append(place: RunDir, *events: Any) -> None:
    writer = EventWriter(place.events_path)
    for event in events:
        writer.write(event)
    writer.close()


@pytest.fixture
def far_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RLHF_NB_RUNS", str(tmp_path / "far"))
    return tmp_path / "far"


def test_runs_of_another_compute_are_listed_as_last_seen_and_say_where_they_are(tmp_path: Path, far_root: Path) -> None:
    with rl.Workspace(tmp_path / "w") as ws:
        # Submitted by a kernel that died before it could note it; and one of somebody else's workspace.
        finished_run(far_root, spec(ws, "sft-1"))
        finished_run(far_root, spec(ws, "sft-9").model_copy(update={"workspace_id": "another"}))
        finished_run(tmp_path / "w" / "runs", spec(ws, "sft-2"))
        finished_run(tmp_path / "w" / "runs", spec(ws, "sft-3"))
        ws.attach(Far(f"{FAR}/lab?token=sesame"), standby=False)
        assert sorted(ws.run_ids()) == ["sft-1", "sft-2", "sft-3"]
        assert ws.run("sft-1").state == "finished"
        ws.attach("local", standby=False, replace=True)
        assert [ws.run(name).state for name in ("sft-2", "sft-3")] == ["finished", "finished"]
        shutil.rmtree(tmp_path / "w" / "runs" / "sft-3")

        states = {row["run"]: row["state"] for row in ws.runs()}
        away = "finished (last seen), not on the attached compute"
        assert states == {"sft-1": away, "sft-2": "finished", "sft-3": away}
        assert {row["run"] for row in ws.status()} == set(states)
        for act in (lambda run: run.state, lambda run: run.wait(timeout=1), lambda run: run.panel()):
            with pytest.raises(ElsewhereError) as caught:
                act(ws.run("sft-1"))
            assert str(caught.value) == (
                "sft-1 is not on local, the attached compute; it was last seen finished on server "
                f"{FAR}; %rlhf attach server {FAR} --replace attaches that"
            )
        with pytest.raises(ElsewhereError, match="sft-3 is not on local, the attached compute; it was last seen fin"):
            ws.run("sft-3").wait(timeout=1)
        kept = b"".join(path.read_bytes() for path in (tmp_path / "w").glob("workspace.db*"))
        assert b"gpu.example" in kept and b"sesame" not in kept


def test_what_listens_to_a_run_goes_on_listening_when_the_compute_is_replaced(tmp_path: Path, far_root: Path) -> None:
    with rl.Workspace(tmp_path / "w") as ws:
        place = finished_run(far_root, spec(ws, "sft-1"))
        ws.attach(Far(FAR), standby=False)
        heard: list[str] = []
        subscription = ws.run("sft-1").subscribe(lambda events: heard.extend(event.kind for event in events))
        until(lambda: heard == ["started", "finished"])
        ws.attach(Far(FAR), standby=False, replace=True)
        append(place, Resumed(step=2, attempt=2, from_step=2))
        until(lambda: heard == ["started", "finished", "resumed"])
        subscription.close()
        ws.detach()
        ws.attach(Far(FAR), standby=False)
        assert not ws.client._subscriptions


def until(true: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- with computes that only answer -----------------------------------------------------------------------------------


class FakeClient:
    host = "gpu-1"

    def __init__(self, launcher: Any, **setup: Any) -> None:
        self.launcher, self.setup, self.alive = launcher, setup, True
        self.info = SimpleNamespace(name=launcher.name, runs_root="/there", host=self.host, line=lambda: launcher.name)

    def runs(self) -> list[dict[str, Any]]:
        return []

    def events(self, run_id: str, since: int) -> list[Any]:
        return []

    def release(self) -> list[Any]:
        return []

    def adopt(self, subscriptions: list[Any]) -> None: ...

    def close(self) -> None:
        self.alive = False


class Computes:
    """Every attach, in order; those of `down` fail."""

    def __init__(self) -> None:
        self.made: list[FakeClient] = []
        self.down: set[str] = set()
        self.tried = 0

    def attach(self, launcher: Any, **setup: Any) -> FakeClient:
        self.tried += 1
        if launcher.name in self.down:
            raise AttachError(f"attach {launcher.name}: no answer")
        self.made.append(FakeClient(launcher, **setup))
        return self.made[-1]


@pytest.fixture
def computes(monkeypatch: pytest.MonkeyPatch) -> Computes:
    made = Computes()
    monkeypatch.setattr(Client, "attach", made.attach)
    return made


@pytest.fixture
def here(tmp_path: Path) -> Iterator[rl.Workspace]:
    with rl.Workspace(tmp_path / "w") as ws:
        ws.run_index.remember(spec(ws, "sft-1"))
        yield ws


def test_a_lost_server_is_tried_again_with_its_flags_and_never_becomes_this_machine(here, computes, monkeypatch):
    target = Server(FAR, kernel="big", token="sesame")
    here.attach(target, launch="--num_processes 2", standby=False)
    computes.made[-1].alive = False
    computes.down = {f"server {FAR}"}
    says = (
        rf"server {FAR} is lost, and runs there go on; "
        rf"%rlhf attach server {FAR} --kernel big --launch='--num_processes 2' attaches it again"
    )
    for _ in range(3):
        with pytest.raises(AttachError, match=says) as caught:
            here.client
        assert "\n" not in str(caught.value) and "sesame" not in str(caught.value)
    assert computes.tried == 2, "panels ask three times a second and more; the network is tried now and then"
    with pytest.raises(AttachError, match=says):
        here.train(rl.SFT(), base="toy", data="toy-demonstrations")
    assert here.attached is None and "is lost" in repr(here.status())
    computes.down = set()
    monkeypatch.setattr("rlhf_nb.workspace.RETRY_S", 0.0)
    here._retry_at = 0.0
    again = here.client
    assert again.launcher is target and here.launch_flags == "--num_processes 2"
    assert again.setup["launch"].flags == ("--num_processes", "2") and not again.setup["standby"]


def test_a_run_that_never_came_to_its_compute_is_no_run_once_that_is_attached_again(here, computes, monkeypatch):
    here.run_index.remember(spec(here, "sft-2"), FakeClient(Server(FAR)))
    here.run_index.remember(spec(here, "sft-3"), FakeClient(Server("https://another.example")))
    here.attach(Server(FAR))
    assert here.run_ids() == ["sft-1", "sft-2", "sft-3"], "its rows may still be on their way"
    monkeypatch.setattr("rlhf_nb.run_index.ARRIVES_S", 0.0)
    here.attach(Server(FAR), replace=True)
    assert here.run_ids() == ["sft-1", "sft-3"]
    assert here.store.next_run_id("sft") == "sft-4"


@pytest.fixture
def shared(here, monkeypatch):
    """A workspace in a team's database, as far as it says: where runs lie each host decides."""
    monkeypatch.setattr(rl.Workspace, "runs_root", None)
    return here


def test_a_run_that_waits_on_the_local_compute_of_another_host_keeps_its_row(shared, computes, monkeypatch):
    monkeypatch.setattr("rlhf_nb.run_index.ARRIVES_S", 0.0)
    shared.attach("local")
    shared.run_index.remember(spec(shared, "sft-2"), shared.client)
    monkeypatch.setattr(FakeClient, "host", "gpu-2")
    shared.attach("local", replace=True)
    assert shared.run_ids() == ["sft-1", "sft-2"]
    says = (
        "sft-2 is not on local, the attached compute; it was last seen waiting on local of gpu-1, and what is attached "
        "is on gpu-2"
    )
    assert str(shared.elsewhere("sft-2")) == says
    shared.attach(Server(FAR), replace=True)
    says = "waiting on local of gpu-1; %rlhf attach local there attaches that"
    assert str(shared.elsewhere("sft-2")).endswith(says)
    monkeypatch.setattr(FakeClient, "host", "gpu-1")
    shared.attach("local", replace=True)
    assert shared.run_ids() == ["sft-1"], "here it is known that it never came"


def test_a_run_that_was_sent_while_the_compute_was_asked_keeps_its_row(here, computes, monkeypatch):
    monkeypatch.setattr("rlhf_nb.run_index.ARRIVES_S", 0.0)

    def runs(client: FakeClient) -> list[dict[str, Any]]:
        here.run_index.remember(spec(here, "sft-2"), client)
        return []

    monkeypatch.setattr(FakeClient, "runs", runs)
    here.attach(Server(FAR))
    assert here.run_ids() == ["sft-1", "sft-2"]


@pytest.mark.parametrize("watched", [False, True])
def test_a_run_whose_row_was_taken_back_gets_it_again_from_whoever_reads_its_events(ws, watched):
    run = ws.train(rl.SFT(), base="toy", data="toy-demonstrations")
    ws._client.events.side_effect = lambda run_id, since: [Started(seq=since + 1, world_size=1, max_steps=3)]
    if watched:
        ws._client.events.side_effect = lambda run_id, since: []
        run.fold
        ws._client.events.side_effect = lambda run_id, since: [Started(seq=since + 1, world_size=1, max_steps=3)]
    ws.store.forget_run(run.id)
    assert ws.run_ids() == []
    run.fold
    found = ws.store.run(run.id)
    assert (found.state, found.attach, found.last_seq) == ("running", "local", 1)
    assert [row["model"] for row in ws.models().rows if row["from"] == found.title] == [run.id]


@pytest.mark.parametrize("flags", ["--cpu", "--num_processes 2", "--main_process_port=0 --cpu"])
def test_the_line_that_attaches_again_is_one_that_the_magic_takes(here, computes, flags):
    here.attach(Server(FAR), launch=flags)
    here.run_index.remember(spec(here, "sft-2"), here.client)
    computes.made[-1].alive = False
    lost = here.unattached
    here.attach("local")
    for said, start in ((lost, "runs there go on; %rlhf "), (str(here.elsewhere("sft-2")), "waiting on ")):
        words = parser.split(said.split(start)[1].split("%rlhf ")[-1].split(" attaches ")[0])
        assert parser.parser(words[0]).parse_args(words[1:]).launch == flags


def test_a_lost_server_is_reached_for_by_one_while_nobody_else_waits(here, computes, monkeypatch):
    here.attach(Server(FAR))
    lost = here.client
    lost.alive = False
    asked, answer = threading.Event(), threading.Event()

    def silent(launcher: Any, **setup: Any) -> FakeClient:
        if launcher.kind == "server":
            asked.set()
            assert answer.wait(30)
        return computes.attach(launcher, **setup)

    monkeypatch.setattr(Client, "attach", silent)
    said: list[Any] = []

    def panel() -> None:
        said.append(here.run("sft-1").fold.state)

    reaching = threading.Thread(target=panel)
    reaching.start()
    try:
        assert asked.wait(30)
        began = time.monotonic()
        with pytest.raises(AttachError, match="is lost, and runs there go on"):
            here.client
        assert "is lost" in repr(here.status()) and here.run("sft-1").id == "sft-1"
        here.attach("local")
        mine = here.client
        assert mine.launcher.kind == "local" and time.monotonic() - began < 15
    finally:
        answer.set()
        reaching.join(30)
    late = computes.made[-1]
    assert late.launcher.kind == "server" and not late.alive, "what answers too late is let go"
    assert here.client is mine and said == ["waiting"]


def test_what_is_detached_while_it_is_reached_for_stays_detached(here, computes, monkeypatch):
    here.attach(Server(FAR))
    here.client.alive = False

    def slow(launcher: Any, **setup: Any) -> FakeClient:
        here.detach()
        return computes.attach(launcher, **setup)

    monkeypatch.setattr(Client, "attach", slow)
    with pytest.raises(AttachError, match="nothing is attached"):
        here.client
    assert here.attached is None and not computes.made[-1].alive


def test_two_that_ask_for_the_local_compute_at_once_get_the_same(here, computes, monkeypatch):
    def slow(launcher: Any, **setup: Any) -> FakeClient:
        time.sleep(0.2)
        return computes.attach(launcher, **setup)

    monkeypatch.setattr(Client, "attach", slow)
    got: list[Any] = []
    asking = [threading.Thread(target=lambda: got.append(here.client)) for _ in range(3)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join(30)
    assert got == computes.made * 3


def test_a_connection_file_given_as_a_path_is_kept_as_text_and_whole(here, computes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here.attach(rl.KernelFile(Path("k.json")))
    here.detach()
    assert f"%rlhf attach kernel {tmp_path}/k.json attaches what was last" in here.unattached
    assert rl.KernelFile("~/k.json").to_dict()["path"] == str(Path.home() / "k.json")


class Odd:
    """A launcher of another package."""

    kind, name, is_local = "odd", "odd one", False

    def __init__(self, said: Any) -> None:
        self.said = said

    def connect(self) -> None: ...

    def to_dict(self) -> Any:
        return self.said


@pytest.mark.parametrize("said", [{"path": Path("k.json")}, {"made": {1}}, None, {"key": b"k"}])
def test_a_launcher_that_cannot_be_written_down_is_refused_before_it_is_attached(here, computes, said):
    says = r"attach odd one: Odd\.to_dict\(\) gives no JSON object \(TypeError: "
    with pytest.raises(AttachError, match=says) as caught:
        here.attach(Odd(said))
    assert "\n" not in str(caught.value)
    assert computes.tried == 0 and here.attached is None and here.store.attaches() == []


def test_a_launcher_that_does_not_name_its_kind_is_attached_as_before(here, computes):
    here.attach(Odd({}))
    here.detach()
    assert "nothing is attached; attaching odd as before (ws.attach) attaches what was last" in here.unattached


def test_what_somebody_else_or_another_host_attached_last_is_not_taken_for_ones_own(here, computes, monkeypatch):
    def attach(who: str, host: str, *target: Any) -> None:
        monkeypatch.setenv("JUPYTERHUB_USER", who)
        monkeypatch.setattr("platform.node", lambda: host)
        if target:
            here.attach(*target, replace=True)
            here.detach()

    attach("ada", "desk", Server(FAR))
    attach("bob", "desk", "local")
    attach("ada", "sofa", Server("https://sofa.example"))
    attach("ada", "desk")
    assert f"%rlhf attach server {FAR} attaches" in here.unattached
    attach("ada", "desk of another name")
    assert "%rlhf attach server https://sofa.example attaches" in here.unattached
    attach("eve", "desk")
    assert here.unattached == "nothing is attached; %rlhf attach local starts compute here"
    here.store.add_attach("server", {"launcher": Server("https://old.example").to_dict(), "launch": ""})
    assert "%rlhf attach server https://old.example attaches" in here.unattached, "nobody noted whose it was"


def test_a_compute_whose_runs_cannot_be_read_is_attached_all_the_same(here, computes, monkeypatch):
    row = {"run_id": "sft-2", "workspace_id": here.id, "state": "running", "spec": {"of": "a newer version"}}
    monkeypatch.setattr(FakeClient, "runs", lambda client: [row])
    with pytest.warns(UserWarning, match=f"server {FAR} is attached; its runs could not be listed: "):
        here.attach(Server(FAR))
    assert here.attached is not None and here.run_ids() == ["sft-1"]


def test_a_lost_server_is_attached_by_hand_without_replacing_it(here, computes):
    here.attach(Server(FAR))
    computes.made[-1].alive = False
    assert here.attach(Server(FAR)).name == f"server {FAR}"
    with pytest.raises(AttachError, match="is attached already and stays"):
        here.attach("local")


def test_a_lost_local_compute_comes_back_with_its_flags(here, computes):
    here.attach("local", launch="--num_processes 2")
    computes.made[-1].alive = False
    assert here.client is computes.made[1] and here.launch_flags == "--num_processes 2"


def test_after_a_restart_of_the_notebook_local_comes_back_with_its_flags_and_a_server_is_named(tmp_path, computes):
    with rl.Workspace(tmp_path / "w") as ws:
        ws.run_index.remember(spec(ws, "sft-1"))
        assert ws.client is computes.made[0], "of a workspace that never attached anything"
        ws.attach("local", launch="--num_processes 2", replace=True)
    with rl.Workspace(tmp_path / "w") as ws:
        assert ws.client.launcher.kind == "local" and ws.launch_flags == "--num_processes 2"
        ws.attach(Server(FAR, token="sesame", token_env="GPU_TOKEN"), replace=True)
    tried = computes.tried
    with rl.Workspace(tmp_path / "w") as ws:
        says = f"nothing is attached; %rlhf attach server {FAR} --token-env GPU_TOKEN attaches what was last"
        with pytest.raises(AttachError, match=says):
            ws.client
        assert says in repr(ws.status()) and ws.runs().rows[0]["state"] == "waiting (last seen)"
    assert computes.tried == tried


@pytest.mark.parametrize("there", ["nobody knows", "refused", "another's"])
def test_a_run_is_known_before_it_is_sent_and_a_refused_one_gives_its_row_back(ws, there):
    def spec_there(run_id: str) -> RunSpec:
        raise NotFoundError(run_id) if there == "refused" else ComputeError("no answer after 60 s")

    ws._client.submit.side_effect = StorageError("no space is left on the device")
    ws._client.spec.side_effect = spec_there
    if there == "another's":
        ws._client.spec.side_effect = lambda run_id: spec(ws, run_id)
    with pytest.raises(StorageError):
        ws.train(rl.SFT(), base="toy", data="toy-demonstrations")
    assert ws.run_ids() == (["sft-1"] if there == "nobody knows" else [])
    ws._client.submit.side_effect = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        ws.train(rl.SFT(), base="toy", data="toy-demonstrations")
    # A kernel that dies between the two leaves no more than this.
    assert ws.run_ids()[-1] == "sft-2" and ws.spec("sft-2").method == "sft"
