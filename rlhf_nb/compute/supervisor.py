"""Watches one run from submit to its terminal event, detached from notebook and agent.

    python -m rlhf_nb.compute.supervisor RUN_DIR                  waits for parents and its turn, launches, watches
    python -m rlhf_nb.compute.supervisor --standby DIR -- FLAGS   launches first, then supervises the run it is given

One supervisor a run, held by a lock on `.supervisor.lock`. Any process may start another at any time with
`ensure_supervised`: where the first is gone, the new one adopts the processes by pid and creation time.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from rlhf_nb.compute import launch as launching
from rlhf_nb.compute import postmortem, standby
from rlhf_nb.compute.rundir import EventWriter, LineTail, ProcessIdentity, RunDir, read_json, write_json
from rlhf_nb.compute.turns import Turns
from rlhf_nb.protocol.events import (
    ControlAcknowledged,
    ControlRefused,
    Event,
    Failed,
    Finished,
    Notice,
    Stage,
    Stopped,
)

POLL_S = 0.05
IMPORT_S = 60.0
"""Seconds after which a supervisor that has been started and does not supervise is given up on."""
GRACE_S = 5.0
"""Seconds the other ranks get to leave after one has fallen, and the launcher after its ranks."""


def ensure_supervised(run_dir: Path | str) -> bool:
    """Start a supervisor for a run that has not ended and has none. True where one was started."""
    run = RunDir(run_dir)
    if not run.attempt_path.exists() or run.supervised() or (run.exit() is not None and run.said_its_end()):
        return False
    if _locked(run) or _on_its_way(run):
        return False
    start_supervisor(run)
    return True


_started: list[tuple[subprocess.Popen[bytes], Path, float]] = []
"""With the run and when. Detached, but still children: they are reaped when the next one starts, and by `reap`."""


def start_supervisor(run: RunDir) -> None:
    with open(run.log_path, "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "rlhf_nb.compute.supervisor", str(run.path)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    reap()
    _started.append((process, run.path, time.monotonic()))


def reap() -> None:
    """Take leave of supervisors that have ended, so that they do not stay as zombies."""
    _started[:] = [one for one in _started if one[0].poll() is None]


def _on_its_way(run: RunDir) -> bool:
    """True where this process has started a supervisor that imports, and so holds no lock yet."""
    return any(
        path == run.path and process.poll() is None and time.monotonic() - at < IMPORT_S
        for process, path, at in _started
    )


def parent_state(runs_root: Path, parent: str) -> tuple[str, str]:
    """Whether a parent's model, or the rows it made, can be used: `ready`, `pending` or `failed` with the reason."""
    run = RunDir(Path(runs_root) / parent)
    if not run.spec_path.exists():
        return "failed", f"its parent {parent} is not on this compute; run it here, or give a directory"
    ended = run.exit()
    if ended is None:
        return "pending", ""
    if ended["outcome"] == "failed":
        return "failed", f"its parent {parent} failed: {ended['reason']}"
    if not run.model.is_dir() and not run.rows_path.exists():
        return "failed", f"its parent {parent} was stopped before it had saved a model or rows"
    return "ready", ""


class Lock:
    """The right to supervise one run, for as long as this process lives or until `release`."""

    def __init__(self, run: RunDir) -> None:
        self._path = run.supervisor_lock
        self._descriptor: int | None = None

    def take(self, timeout: float = 0.0) -> bool:
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        deadline = time.monotonic() + timeout
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._descriptor = descriptor
                return True
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    os.close(descriptor)
                    return False
                time.sleep(0.01)

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _locked(run: RunDir) -> bool:
    probe = Lock(run)
    free = probe.take()
    probe.release()
    return not free


class Supervisor:
    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.spec = run.spec()
        self.runs_root = run.path.parent
        self.turns = Turns(self.runs_root)
        self.launcher: subprocess.Popen[bytes] | None = None
        self.adopted = False
        self._said = ""
        self._controls = LineTail(run.control_path)

    # Phases ---------------------------------------------------------------------------------------------------------

    def supervise(self) -> None:
        """From wherever the run is to its end."""
        if self.run.exit() is not None:
            self._append_terminal(self.run.exit() or {})
            return
        before = self.run.supervisor() or {}
        if before.get("phase") == "computing" and before.get("pid") != os.getpid() and self.run.supervised():
            # Handed to a standby while this process was starting: its supervisor waits for the lock.
            return
        if before.get("phase") == "computing":
            launcher = self.run.launcher()
            if launcher is not None or self.run.rank_files():
                self._adopt(before, launcher)
                return
        outcome = self._wait_for_parents() or self._wait_for_turn()
        if outcome is not None:
            self._conclude(outcome)
        elif self.launcher is not None:
            self.watch()

    def _wait_for_parents(self) -> postmortem.Exit | None:
        looked = 0.0
        while True:
            pending = []
            for parent in self.spec.parents:
                state, reason = parent_state(self.runs_root, parent)
                if state == "failed":
                    return self._exit("failed", reason)
                if state == "pending":
                    pending.append(parent)
            if not pending:
                return None
            self._phase("waiting", waits_for=pending)
            self._say(f"waiting for {', '.join(pending)}")
            if self._stop_asked():
                return self._exit("stopped", "stopped while it waited; there is no model")
            if time.monotonic() - looked > 2:
                looked = time.monotonic()
                for parent in pending:
                    ensure_supervised(self.runs_root / parent)
            time.sleep(POLL_S)

    def _wait_for_turn(self) -> postmortem.Exit | None:
        """Wait, then hand the job to a standby (this process is then done) or launch cold."""
        self._phase("queued")
        looked = time.monotonic()
        while True:
            with self.turns.lock():
                ahead = self.turns.ahead_of(self.run.run_id)
                if ahead is None:
                    return self._begin()
            self._say(f"queued behind {ahead}")
            if self._stop_asked():
                return self._exit("stopped", "stopped while it was queued; there is no model")
            if time.monotonic() - looked > 2:
                looked = time.monotonic()
                ensure_supervised(self.runs_root / ahead)
            time.sleep(POLL_S)

    def _begin(self) -> postmortem.Exit | None:
        """Under the turns' lock: from here on the run computes. What cannot be launched at all has ended."""
        taken, reason = standby.claim(self.runs_root, self.spec.launch)
        if taken is not None:
            hand_over(self.run, taken)
            return None
        self._say(f"starting cold: {reason}")
        # Said first: killed before it knows the launcher, this process leaves one that the next supervisor looks for.
        self._phase("computing", oom_kills=postmortem.oom_kills())
        launch, arguments = self.spec.launch, ["--run", str(self.run.path)]
        try:
            with open(self.run.log_path, "ab") as log:
                self.launcher = _launch(launching.command(launch, arguments), launch, log, self.run.path)
        except (OSError, ValueError) as error:
            # Raised, it would be met again by every supervisor that took this one's place.
            return self._exit("failed", f"launch={' '.join(launch.flags)!r} starts no process: {error}")
        self._phase("computing", launcher=ProcessIdentity.of(self.launcher.pid).to_dict())
        return None

    def take_over(self, launcher: subprocess.Popen[bytes], standby_path: Path) -> None:
        """A standby's supervisor becomes the run's."""
        self.launcher = launcher
        self._phase(
            "computing",
            launcher=ProcessIdentity.of(launcher.pid).to_dict(),
            oom_kills=postmortem.oom_kills(),
            standby=standby_path.name,
        )

    def _adopt(self, before: dict[str, Any], launcher: ProcessIdentity | None) -> None:
        self.adopted = True
        found = {"launcher": launcher.to_dict()} if launcher is not None else {}
        self._phase("computing", oom_kills=before.get("oom_kills", postmortem.oom_kills()), **found)
        self.watch()

    # Watching -------------------------------------------------------------------------------------------------------

    def watch(self) -> None:
        asked = self.spec.launch.num_processes
        state = self.run.supervisor() or {}
        launcher = ProcessIdentity.from_dict(state.get("launcher"))
        fell_at: float | None = None
        code: int | None = None
        ended: set[int] = set()
        while True:
            exits = self.run.rank_files(".exit")
            if len(exits) >= asked:
                break
            code = self.launcher.poll() if self.launcher is not None else None
            if not self.run.alive():
                # A watcher writes its record and then leaves: nothing that was alive a moment ago is missed.
                break
            if any(record["signal"] or record["code"] for record in exits.values()):
                fell_at = fell_at or time.monotonic()
                if time.monotonic() - fell_at > GRACE_S:
                    ended |= self.run.rank_files().keys() - exits.keys()
                    self._end_everything(launcher)
            time.sleep(POLL_S)
        result = postmortem.examine(
            self.run,
            asked=asked,
            launcher_code=code,
            oom_kills=postmortem.oom_kills() - int(state.get("oom_kills") or 0),
            adopted=self.adopted,
            ended=frozenset(ended),
        )
        self._conclude(result)
        # Torch takes up to seconds to put itself away; nobody needs to wait for the launcher to do so.
        self._end_launcher(launcher)
        self._remove_standby(state)

    def _end_launcher(self, launcher: ProcessIdentity | None) -> None:
        deadline = time.monotonic() + GRACE_S
        while launcher is not None and launcher.alive():
            if self.launcher is not None and self.launcher.poll() is not None:
                return
            if time.monotonic() > deadline:
                end_tree(launcher.pid)
            time.sleep(POLL_S)

    def _end_everything(self, launcher: ProcessIdentity | None) -> None:
        known = [value for rank in self.run.rank_files().values() for value in (rank, rank["watcher"])]
        for identity in [*map(ProcessIdentity.from_dict, known), launcher]:
            if identity is not None and identity.alive():
                end_tree(identity.pid)

    def _remove_standby(self, state: dict[str, Any]) -> None:
        if state.get("standby"):
            standby.Standby(self.runs_root / ".standby" / state["standby"]).remove()

    # The end --------------------------------------------------------------------------------------------------------

    def _exit(self, outcome: str, reason: str) -> postmortem.Exit:
        return postmortem.Exit(self.run.attempt()["attempt"], outcome, reason, log_tail=self.run.log_tail(5))

    def _conclude(self, result: postmortem.Exit) -> None:
        now = time.time()
        result.ended_at = now
        since = (self.run.supervisor() or {}).get("computing_since")
        result.seconds = round(now - since, 3) if since else 0.0
        self.run.release_reserve()
        write_json(self.run.exit_path, result.to_dict())
        self._append_terminal(result.to_dict())

    def _append_terminal(self, ended: dict[str, Any]) -> None:
        """Idempotent: a supervisor that died between exit.json and here is made good by the next."""
        if not self.run.said_its_end():
            events: list[Event] = []
            if ended["adopted"]:
                text = "the run's supervisor was gone; another watched it to its end"
                events.append(Notice(level="warning", code="supervisor_lost", text=text))
            if ended["outcome"] != "failed" and ended["reason"]:
                events.append(Notice(level="warning", code="ended", text=ended["reason"]))
            events += self._unread_controls(ended)
            events.append(_terminal(ended))
            self._write(*events)
        self._phase("ended")
        self.turns.leave(self.run.run_id)

    def _unread_controls(self, ended: dict[str, Any]) -> list[Event]:
        """Nobody will read these: whoever waits for them must hear so. A stop of a run that was stopped was obeyed."""
        reason = f"the run {ended['outcome']} before this was read"
        return [
            ControlAcknowledged(id=name, op=op, step=ended["step"])
            if (op, ended["outcome"]) == ("stop", "stopped")
            else ControlRefused(id=name, op=op, reason=reason)
            for name, op in self._unanswered(LineTail(self.run.control_path).read()).items()
        ]

    def _unanswered(self, lines: list[dict[str, Any]]) -> dict[str, str]:
        """Id and op of the control lines to which the log has no answer, from this attempt or an earlier one."""
        asked = {line["id"]: str(line.get("op", "?")) for line in lines if isinstance(line.get("id"), str)}
        if asked:
            for event in LineTail(self.run.events_path).read_raw():
                if b'"kind":"control_' in event:
                    for name in [name for name in asked if name.encode() in event]:
                        del asked[name]
        return asked

    # Small things ---------------------------------------------------------------------------------------------------

    def _phase(self, phase: str, **more: Any) -> None:
        before = self.run.supervisor() or {}
        me = ProcessIdentity.of()
        if before.get("phase") == phase and before.get("pid") == me.pid and not more.keys() - {"waits_for"}:
            return
        since = before.get("computing_since") if phase != "computing" or self.adopted else time.time()
        names = ("launcher", "oom_kills", "standby") if phase == "computing" else ()
        kept: dict[str, Any] = {name: before[name] for name in names if name in before}
        state: dict[str, Any] = {
            **me.to_dict(),
            "phase": phase,
            "since": time.time(),
            "attempt": self.run.attempt()["attempt"],
            **kept,
            **more,
        }
        write_json(self.run.supervisor_path, state | {"computing_since": since})

    def _say(self, text: str) -> None:
        if text != self._said:
            self._said = text
            self._write(Stage(text=text))

    def _write(self, *events: Any) -> None:
        """Only while no rank 0 lives: the log has one writer at a time."""
        writer = EventWriter(self.run.events_path)
        try:
            for event in events:
                writer.write(event)
        finally:
            writer.close()

    def _stop_asked(self) -> bool:
        """True for a stop that no earlier attempt obeyed or refused. It is acknowledged together with the end."""
        return bool(self._unanswered([line for line in self._controls.read() if line.get("op") == "stop"]))


def hand_over(run: RunDir, taken: standby.Standby) -> None:
    """Give a run to a claimed standby, whose supervisor is from here on the run's. Call it under the turns' lock."""
    owner = taken.owner
    assert owner is not None, "a claimed standby has an owner"
    state = {**owner.to_dict(), "phase": "computing", "since": time.time(), "computing_since": time.time()}
    write_json(run.supervisor_path, state | {"attempt": run.attempt()["attempt"], "standby": taken.path.name})
    taken.announce(run.path)


def _terminal(ended: dict[str, Any]) -> Event:
    match ended["outcome"]:
        case "finished":
            return Finished(step=ended["step"], seconds=ended["seconds"])
        case "stopped":
            return Stopped(step=ended["step"], seconds=ended["seconds"])
    same = ("reason", "code", "signal", "out_of_memory", "oom_evidence", "rank", "step", "log_tail")
    return Failed(**{name: ended[name] for name in same})


def _launch(command: list[str], launch: Any, log: Any, directory: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        cwd=directory,
        env=launching.environment(launch),
        process_group=0,
    )


def end_tree(pid: int) -> None:
    """SIGKILL a process and everything under it."""
    try:
        top = psutil.Process(pid)
        everyone = [*top.children(recursive=True), top]
    except psutil.NoSuchProcess:
        return
    for process in everyone:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            pass


def run_standby(path: Path, flags: tuple[str, ...]) -> None:
    from rlhf_nb.protocol.spec import Launch

    launch = Launch(flags=flags)
    mine = standby.Standby(path)
    with open(path / "log.txt", "ab") as log:
        launcher = _launch(launching.command(launch, ["--standby", str(path)]), launch, log, path)
    while not (path / "job.json").exists():
        readable, _, _ = select.select([sys.stdin], [], [], POLL_S)
        closed = bool(readable) and not os.read(sys.stdin.fileno(), 1)
        if closed or launcher.poll() is not None:
            try:
                os.rename(path / "offer.json", path / "withdrawn.json")
            except FileNotFoundError:
                # Somebody has claimed it: the job file is about to appear.
                _wait_for(path / "job.json", 10)
                if (path / "job.json").exists():
                    break
            if launcher.poll() is None:
                end_tree(launcher.pid)
                launcher.wait()
                mine.remove()
            return
    _let_go_of_stdin()
    job: dict[str, Any] = read_json(path / "job.json") or {}
    run = RunDir(job["run_dir"])
    lock = Lock(run)
    if lock.take(timeout=10):
        _write_to(run.log_path)
        supervisor = Supervisor(run)
        supervisor.take_over(launcher, path)
        supervisor.watch()


def _wait_for(path: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def _let_go_of_stdin() -> None:
    descriptor = os.open(os.devnull, os.O_RDONLY)
    os.dup2(descriptor, 0)
    os.close(descriptor)


def _write_to(log_path: Path) -> None:
    descriptor = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def main(argv: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["--standby"]:
        run_standby(Path(arguments[1]), tuple(arguments[3:]))
        return
    run = RunDir(Path(arguments[0]).resolve())
    lock = Lock(run)
    if lock.take():
        Supervisor(run).supervise()


if __name__ == "__main__":
    main()
