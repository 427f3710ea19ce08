"""Runs Python that nobody trusts: a completion's code, and the tests of a data set.

Every run is a process of its own (`jail.py`): empty environment, no descriptor but its pipes, limits on CPU, wall-clock
time, memory, processes, open files and what it writes, killed whole when its time is up or when whoever asked dies.

Where the kernel has seccomp, a filter refuses the system calls that look into other processes, mount, hold keys or
reach the parts of the kernel in which holes are found; `require` says whether it does.

isolated  Beside that: namespaces for users, mounts, processes, network, IPC and host name; no capability; user nobody.
          Seen: the interpreter's own libraries, /usr and the system's libraries, read-only; an empty /work of
          `work_bytes`, gone with the run; /dev/null, zero, random, urandom. Not seen: anything else, /proc among it; no
          network. Linux ≥ 5.14 with user namespaces.
weak      Only the limits and the filter. Files that the user can read, and the network, stay in reach; root becomes
          nobody. It may start no process: a user's limit counts all that the user runs.
"""

from __future__ import annotations

import json
import os
import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from rlhf_nb.errors import UnavailableError
from rlhf_nb.rewards.jail import NOBODY, NOT_BUILT

Level = Literal["isolated", "weak"]
Ended = Literal["itself", "time", "output", "killed", "unbuilt"]
JAIL = Path(__file__).with_name("jail.py")


@dataclass(frozen=True)
class Limits:
    wall_s: float = 10.0
    cpu_s: int = 5
    """CPU seconds of one process."""
    memory_bytes: int = 512 << 20
    """Address space of one process."""
    processes: int = 4
    """Processes and threads at once, two of them the sandbox's own; with `memory_bytes` the bound on all memory. Weak
    has one process, whatever this says."""
    open_files: int = 64
    file_bytes: int = 8 << 20
    """Size of one file."""
    work_bytes: int = 16 << 20
    """Size of all files together (isolated)."""
    output_bytes: int = 64 << 10
    """Standard output and error together; a run that writes more is ended."""


@dataclass(frozen=True)
class Outcome:
    ended: Ended
    """itself: it ran to an end; time: past `wall_s`; output: past `output_bytes`; killed: by a signal, for one the CPU
    limit's; unbuilt: it did not run, for want of a wall that `output` names."""
    status: int
    """Exit status; -1 unless it ended itself."""
    output: bytes
    seconds: float

    def built(self) -> Outcome:
        """Itself.

        Raises:
            UnavailableError: It did not run.
        """
        if self.ended == "unbuilt":
            said = self.output.decode("utf-8", "replace").strip()
            raise UnavailableError(f"the sandbox could not be built this time: {said}; try again")
        return self


def require(level: Level) -> str:
    """What the level means here, in words for the run's log. Found out once.

    Raises:
        UnavailableError: It cannot be had here, with the wall that could not be built; or that could not be found out
            in time, and is tried again when it is next asked for.
    """
    reason = _missing(level)
    if reason and level == "isolated":
        raise UnavailableError(
            f'sandbox="isolated": {reason}; allow unprivileged user namespaces on this machine, or say sandbox="weak": '
            f"limits alone, with files and network in reach"
        )
    if reason:
        raise UnavailableError(f'sandbox="weak": {reason}; use an interpreter that every user can read')
    filtered = "a seccomp filter" if _filtered(level) else "no seccomp filter on this kernel"
    if level == "isolated":
        return f"isolated: own user, mount, PID, network, IPC and UTS namespaces, no capabilities, {filtered}"
    return f"weak: limits and {filtered}; the code can read files and reach the network"


PROBE = "import ctypes\nprint('up', ctypes.CDLL(None).prctl(21, 0, 0, 0, 0))"
"""PR_GET_SECCOMP is 2 under a filter."""
PROBE_S = 30.0


def _missing(level: Level) -> str:
    """Why a level cannot be had on this machine, or nothing."""
    said = _probed(level)
    return "" if said.startswith("up ") else said


def _filtered(level: Level) -> bool:
    return _probed(level) == "up 2"


@cache
def _probed(level: Level) -> str:
    """What a run of a level says of itself, or why there was none."""
    if not sys.platform.startswith("linux"):
        return f"needs Linux and this is {sys.platform}"
    with Jail(PROBE, level=level, limits=Limits(wall_s=PROBE_S)) as jail:
        outcome = jail.wait()
    if outcome.ended == "time":
        # Raised, and so not remembered: the machine is busy now.
        raise UnavailableError(
            f'sandbox="{level}": it could not be tried within {PROBE_S:g} s on this machine, which is busy; try again'
        )
    said = outcome.output.decode("utf-8", "replace").strip().splitlines()
    return said[-1] if said else f"its first process ended with status {outcome.status}"


def run(source: str, *, level: Level = "isolated", limits: Limits = Limits()) -> Outcome:
    """Run source as a script, and wait for its end.

    Raises:
        UnavailableError: The level cannot be had here.
    """
    require(level)
    with Jail(source, level=level, limits=limits) as jail:
        return jail.wait().built()


class Jail:
    """One run. A context manager: whatever still runs at its end is killed."""

    def __init__(
        self,
        source: str,
        *,
        level: Level = "isolated",
        limits: Limits = Limits(),
        channel: socket.socket | None = None,
    ) -> None:
        """Starts it.

        Args:
            channel: A socket that the source may talk through: the global RLHF_CHANNEL is its descriptor.
        """
        self.limits = limits
        self.work = None if level == "isolated" else tempfile.mkdtemp(prefix="rlhf-weak-")
        if self.work is not None and os.getuid() == 0:
            os.chown(self.work, NOBODY, NOBODY)
        settings = {
            "parent": os.getpid(),
            "isolated": level == "isolated",
            "visible": _visible(),
            "channel": channel.fileno() if channel is not None else None,
            "memory_bytes": limits.memory_bytes,
            "file_bytes": limits.file_bytes,
            "work_bytes": limits.work_bytes,
            "open_files": limits.open_files,
            # What a process starts would outlive it, where no PID namespace ends with it.
            "processes": limits.processes if level == "isolated" else 0,
            "cpu_s": limits.cpu_s,
        }
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(JAIL), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={},
            cwd=self.work or "/",
            start_new_session=True,
            pass_fds=() if channel is None else (channel.fileno(),),
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            # All of it is read before anything that is not ours runs, so this cannot be held up.
            self.process.stdin.write(source.encode("utf-8", "replace"))
            self.process.stdin.close()
        except BrokenPipeError:
            pass

    def wait(self) -> Outcome:
        """Until it ends, or is ended at a limit."""
        stream = self.process.stdout
        assert stream is not None
        output = b""
        ended: Ended = "itself"
        with selectors.DefaultSelector() as selector:
            selector.register(stream, selectors.EVENT_READ)
            while True:
                left = self.began + self.limits.wall_s - time.monotonic()
                if left <= 0 or not selector.select(left):
                    ended = "time"
                    break
                chunk = os.read(stream.fileno(), 1 << 16)
                output += chunk
                if len(output) > self.limits.output_bytes:
                    ended = "output"
                    break
                if not chunk:
                    break
        if ended == "itself":
            # It may have closed its output and gone on.
            try:
                self.process.wait(max(0.0, self.began + self.limits.wall_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                ended = "time"
        self.kill()
        status = self.process.returncode if ended == "itself" else -1
        if ended == "itself" and not 0 <= status < NOT_BUILT:
            ended, status = ("unbuilt" if status == NOT_BUILT else "killed"), -1
        return Outcome(ended, status, output[: self.limits.output_bytes], time.monotonic() - self.began)

    def kill(self) -> None:
        """End it; the kernel ends everything inside with its first process."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None and not stream.closed:
                stream.close()
        if self.work is not None:
            shutil.rmtree(self.work, ignore_errors=True)

    def __enter__(self) -> Jail:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def _visible() -> list[str]:
    """What the interpreter needs to run, each path once. Not its prefix: that may be a home directory, or /."""
    own = [os.path.join(prefix, "lib") for prefix in (sys.base_prefix, sys.base_exec_prefix)]
    wanted = ["/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", *own, os.path.dirname(os.__file__)]
    kept: list[str] = []
    for path in wanted:
        inside = any(Path(path).is_relative_to(other) for other in kept)
        if not inside and (os.path.exists(path) or os.path.islink(path)):
            kept.append(path)
    return kept
