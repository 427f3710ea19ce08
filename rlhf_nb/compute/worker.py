"""One rank, started by `accelerate launch`: a small watcher, and under it the process that trains.

The watcher forks before anything heavy is imported, so it costs a few MB. It is the parent that `waitpid` answers to,
and writes `ranks/<rank>.exit.json` with the true exit code or signal, also when launcher and supervisor are gone. Then
it ends the same way itself, so that the launcher sees what happened. If the watcher is killed, the operating system
ends the trainer with it.
"""

from __future__ import annotations

import argparse
import atexit
import ctypes
import os
import resource
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from rlhf_nb.compute.rundir import ProcessIdentity, RunDir, read_json, write_json
from rlhf_nb.errors import RlhfError, SpecError

POLL_S = 0.01
_PR_SET_PDEATHSIG = 1


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m rlhf_nb.compute.worker")
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--run", type=Path, help="run directory")
    group.add_argument("--standby", type=Path, help="directory in which a job will be announced")
    arguments = parser.parse_args(argv)
    rank = int(os.environ.get("RANK", "0"))
    watcher = ProcessIdentity.of()
    child = os.fork()
    if child == 0:
        _end_with(watcher)
        _train(arguments, rank, watcher)
    else:
        _watch(child, rank, arguments)


def _end_with(watcher: ProcessIdentity) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != watcher.pid:
            os._exit(1)


def _watch(child: int, rank: int, arguments: argparse.Namespace) -> NoReturn:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, _: _forward(child, received))
    _, status = os.waitpid(child, 0)
    ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
    place = _place(arguments)
    record = {"rank": rank, "code": code, "signal": ended_by, "at": time.time(), "attempt": place.attempt()["attempt"]}
    try:
        write_json(place.ranks / f"{rank}.exit.json", record)
    finally:
        if ended_by is None:
            os._exit(code or 0)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if ended_by != signal.SIGKILL:
            signal.signal(ended_by, signal.SIG_DFL)
        os.kill(os.getpid(), ended_by)
        os._exit(1)


def _forward(child: int, number: int) -> None:
    try:
        os.kill(child, number)
    except ProcessLookupError:
        pass


def _place(arguments: argparse.Namespace) -> RunDir:
    """The directory this rank reports to: the run's, or the standby's while it has no job."""
    if arguments.run:
        return RunDir(arguments.run)
    job = read_json(arguments.standby / "job.json")
    return RunDir(job["run_dir"] if job else arguments.standby)


def _train(arguments: argparse.Namespace, rank: int, watcher: ProcessIdentity) -> None:
    try:
        warm = arguments.standby is not None
        if warm:
            _stand_by(arguments.standby, rank, watcher)
        place = _place(arguments)
        if warm:
            _write_to_log(place.log_path)
        os.chdir(place.path)
        _introduce(place, rank, watcher)
        _run(place, rank, warm)
        leave_in_order()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else (0 if leaving.code is None else 1)
        _record_error(arguments, rank, leaving) if code else None
        _leave(code)
    except BaseException as error:  # noqa: BLE001 - whatever ends a rank is what the run's end must name
        _record_error(arguments, rank, error)
        # Not sys.exit: a process group whose other ranks are stuck would hold the interpreter's exit up for minutes.
        _leave(1)


def _introduce(place: RunDir, rank: int, watcher: ProcessIdentity, **more: Any) -> None:
    me = ProcessIdentity.of().to_dict()
    write_json(
        place.ranks / f"{rank}.json",
        {"rank": rank, **me, "watcher": watcher.to_dict(), "attempt": place.attempt()["attempt"], **more},
    )


def _run(place: RunDir, rank: int, warm: bool) -> None:
    from rlhf_nb.training import job

    world = int(os.environ.get("WORLD_SIZE", "1"))
    asked = place.spec().launch.num_processes
    if world != asked:
        raise SpecError(
            f"launch: {asked} ranks were asked for and accelerate started {world}; "
            f"use --multi_gpu --num_processes {asked} (also on CPU), or --num_processes {world}"
        )
    attempt = place.attempt()
    runs_root = place.path.parent
    job.run(
        place.path,
        blobs=runs_root / ".blobs",
        runs_root=runs_root,
        rank=rank,
        world_size=world,
        warm=warm,
        attempt=attempt["attempt"],
        resume_from=place.path / attempt["resume_from"] if attempt["resume_from"] else None,
    )
    _leave_group()


def _leave_group() -> None:
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _stand_by(standby: Path, rank: int, watcher: ProcessIdentity) -> None:
    """Import what a job needs, do slow first things, wait for a job. Touches neither CUDA nor a process group."""
    from rlhf_nb.training import job

    job.preload()
    job.warm_up()
    _introduce(RunDir(standby), rank, watcher, ready=time.time())
    announced = standby / "job.json"
    owner = ProcessIdentity.from_dict(read_json(standby / "owner.json"))
    looked = time.monotonic()
    while not announced.exists():
        time.sleep(POLL_S)
        if owner is not None and time.monotonic() - looked > 1:
            looked = time.monotonic()
            if not owner.alive() and not announced.exists():
                raise SystemExit(0)


def _write_to_log(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _record_error(arguments: argparse.Namespace, rank: int, error: BaseException) -> None:
    traceback.print_exception(error)
    place = _place(arguments)
    place.release_reserve()
    first_line = (str(error).strip().splitlines() or [""])[0]
    try:
        write_json(
            place.ranks / f"{rank}.error.json",
            {
                "rank": rank,
                "type": type(error).__name__,
                "message": first_line,
                "ours": isinstance(error, RlhfError),
                "oom_evidence": _oom_evidence(error),
                "at": time.time(),
                "attempt": place.attempt()["attempt"],
            },
        )
    except OSError:
        pass  # the traceback is in the log; a full disk must not hide the exit code


def _oom_evidence(error: BaseException) -> str | None:
    name, text = type(error).__name__, str(error)
    if name in ("OutOfMemoryError", "MemoryError"):
        return name
    # torch raises a plain RuntimeError where the CPU allocator fails.
    return "DefaultCPUAllocator" if "can't allocate memory" in text else None


def leave_in_order() -> NoReturn:
    """What the interpreter does at exit for others, without taking itself apart: with torch that costs a second."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    _leave(0)


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
