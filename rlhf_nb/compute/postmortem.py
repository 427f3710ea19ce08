"""How an attempt ended: which rank fell first, how, and what speaks for memory."""

from __future__ import annotations

import re
import signal
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlhf_nb.compute.rundir import RunDir

LOG_LINES = 20
_PASSED_ON = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
_COLLECTIVE = re.compile(
    r"gloo|NCCL|DistBackendError|DistNetworkError|DistStoreError|[Cc]onnection (closed|reset|refused)"
)
_ELASTIC_NOISE = re.compile(r"^(\s|\[|=|-|Traceback|Root Cause|Failures|E\d{4} |W\d{4} |I\d{4} |The following values)")


@dataclass
class Exit:
    """What `exit.json` holds."""

    attempt: int
    outcome: str
    """finished | stopped | failed"""
    reason: str = ""
    """One line; empty where nothing went wrong."""
    code: int | None = None
    signal: str | None = None
    rank: int | None = None
    out_of_memory: bool = False
    oom_evidence: str | None = None
    step: int = 0
    seconds: float = 0.0
    ended_at: float = 0.0
    adopted: bool = False
    """True where a second supervisor saw the end: the first was gone."""
    log_tail: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine(
    run: RunDir,
    *,
    asked: int,
    launcher_code: int | None,
    oom_kills: int,
    adopted: bool,
    ended: frozenset[int] = frozenset(),
) -> Exit:
    """Read the ranks' records and the log after every process has ended.

    Args:
        asked: Ranks that should have run.
        launcher_code: How `accelerate launch` ended, as subprocess gives it; None where that is not known.
        oom_kills: Processes the kernel ended for memory in this container since the run began.
        ended: Ranks that the supervisor ended after another had fallen.
    """
    attempt = run.attempt()["attempt"]
    outcome, step = _last_word(run)
    tail = run.log_tail(LOG_LINES)
    result = Exit(attempt, outcome or "failed", step=step, log_tail=tail, adopted=adopted)
    fallen = _first_to_fall(run, ended)
    if fallen is not None:
        result.rank, result.code = fallen["rank"], fallen["code"]
        result.signal = _signal_name(fallen["signal"]) if fallen["signal"] else None
    if outcome:
        # The model was saved before that last line: dying on the way out loses nothing.
        result.reason = f"ended by {result.signal} after training had ended" if result.signal else ""
        result.code = 0 if result.code is None and not result.signal else result.code
        return result
    errors = run.rank_files(".error")
    error = errors.get(result.rank) if result.rank is not None else None
    result.oom_evidence = _memory(error, result.signal, oom_kills)
    result.out_of_memory = result.oom_evidence is not None
    if fallen is None:
        _without_a_fall(run, result, asked, launcher_code)
    elif error is not None:
        said = error["message"] or error["type"]
        result.reason = said if error["ours"] else f"{error['type']}: {error['message']}".rstrip(": ")
        if len(run.rank_files()) > 1:
            result.reason = f"rank {result.rank}: {result.reason}"
    elif result.signal:
        result.reason = f"rank {result.rank} was ended by {result.signal}"
    else:
        result.reason = f"rank {result.rank} left with exit code {result.code}"
    if result.out_of_memory:
        result.reason += f"; out of memory ({result.oom_evidence}): lower batch_size or max_length"
    elif result.signal == "SIGKILL":
        result.reason += "; no sign of an out-of-memory kill was found"
    return result


def _without_a_fall(run: RunDir, result: Exit, asked: int, launcher_code: int | None) -> None:
    exits, known = run.rank_files(".exit"), run.rank_files()
    if exits and len(exits) >= min(asked, len(known) or asked):
        result.rank, result.code = 0, 0
        result.reason = "every rank left with exit code 0 but training had not ended; see its log"
    elif known:
        result.rank = min(rank for rank in known if rank not in exits)
        result.reason = f"rank {result.rank} and its watcher are gone; how they ended is not known"
    else:
        if launcher_code is not None and launcher_code < 0:
            result.signal = _signal_name(-launcher_code)
        else:
            result.code = launcher_code
        how = result.signal or (f"code {launcher_code}" if launcher_code is not None else "an unknown code")
        last = _telling_line(result.log_tail)
        result.reason = f"accelerate launch ended with {how} before any rank started" + (f": {last}" if last else "")


def _first_to_fall(run: RunDir, ended: frozenset[int]) -> dict[str, Any] | None:
    """The rank that fell by itself. The others fall because of it: their collective breaks, or they are ended.

    Times alone do not tell: on a busy machine the survivor's broken collective is recorded before the victim's end is.
    """
    errors = run.rank_files(".error")
    fallen = [record for record in run.rank_files(".exit").values() if record["signal"] or record["code"]]

    def order(record: dict[str, Any]) -> tuple[int, float]:
        error = errors.get(record["rank"])
        at = min(record["at"], error["at"]) if error else record["at"]
        if record["rank"] in ended or record["signal"] in _PASSED_ON:
            return 4, at
        if error is not None and _COLLECTIVE.search(f"{error['type']} {error['message']}"):
            return 3, at
        if record["signal"] == signal.SIGABRT:  # how a communication library ends a rank whose peer is gone
            return 2, at
        return (0 if record["signal"] else 1), at

    return min(fallen, key=order) if fallen else None


def _last_word(run: RunDir) -> tuple[str | None, int]:
    """How rank 0 meant to end in this attempt, or None; and the last optimizer step."""
    step, outcome, looking = 0, None, True
    for event in reversed(run.last_events()):
        if looking and event["kind"] == "training_ended":
            outcome, looking = event["outcome"], False
        elif event["kind"] in ("started", "failed", "stopped", "finished"):
            looking = False
        if event["kind"] in ("metric", "training_ended"):
            return outcome, max(step, int(event.get("step") or 0))
    return outcome, step


def _memory(error: dict[str, Any] | None, signal_name: str | None, oom_kills: int) -> str | None:
    if error is not None and error.get("oom_evidence"):
        return str(error["oom_evidence"])
    if signal_name == "SIGKILL" and oom_kills > 0:
        return f"the container's oom_kill count rose by {oom_kills}"
    return None


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _telling_line(lines: list[str]) -> str:
    return next((line.strip()[:200] for line in reversed(lines) if line.strip() and not _ELASTIC_NOISE.match(line)), "")


def oom_kills() -> int:
    """Processes the kernel has ended for memory in this process's control group, so far. 0 where it cannot be read."""
    for path in _memory_files():
        try:
            for line in path.read_text().splitlines():
                name, _, count = line.partition(" ")
                if name == "oom_kill":
                    return int(count)
        except (OSError, ValueError):
            continue
    return 0


def _memory_files() -> list[Path]:
    candidates: list[Path] = []
    try:
        groups = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in groups:
        _, controllers, group = line.split(":", 2)
        # In a container the group's own path may lie outside the mount; then the mount's root is the container.
        if controllers == "memory":
            candidates += [
                Path(f"/sys/fs/cgroup/memory{group}/memory.oom_control"),
                Path("/sys/fs/cgroup/memory/memory.oom_control"),
            ]
        elif not controllers:
            candidates += [Path(f"/sys/fs/cgroup{group}/memory.events"), Path("/sys/fs/cgroup/memory.events")]
    return candidates
