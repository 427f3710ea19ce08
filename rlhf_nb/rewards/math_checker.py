"""math-verify in a process of its own, which is killed when it hangs.

math-verify stops itself by the wall clock, under which a right answer would score 0 on a busy machine: here it is the
child's CPU time that is limited. A signal's handler does not stop 9^9^9^9, which one call into C computes: the kernel
does. The child ends by itself when its parent does, and after `IDLE_S` without a question.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any

from rlhf_nb.errors import RewardError

IDLE_S = 5.0
STEPS = 4
"""Reading, reading again, comparing, and one to spare: what a question may take is so many times its limit."""
PATIENCE = 4.0
"""How much longer than its CPU time a question may take by the clock: the child may be starved, or stopped."""
START_S = 60
"""CPU seconds for the first one, before anything is asked."""
MEMORY_BYTES = 4 << 30
TAIL = 10_000
"""Characters from the end of a completion that are read: the answer stands last."""
START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from rlhf_nb.rewards import math_checker as m; m.serve()"
)


class Checker:
    """Asks the child, and starts another when it is gone."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def verdicts(self, pairs: Sequence[tuple[str, str]], *, timeout: int) -> list[bool]:
        """Whether each text's final answer is its reference."""
        with self._lock:
            try:
                return [self._ask(reference, text[-TAIL:], timeout) for reference, text in pairs]
            except BaseException:
                # reward_timeout, or Ctrl-C: what the child still says would be taken for the next question's answer.
                self.close()
                raise

    def _ask(self, reference: str, text: str, timeout: int) -> bool:
        question = json.dumps([reference, text, timeout]).encode() + b"\n"
        # Twice: an idle child may have left just now. No right answer kills two.
        for _ in range(2):
            process = self._running()
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(question)
                process.stdin.flush()
            except BrokenPipeError:
                self.close()
                continue
            if not select.select([process.stdout], [], [], PATIENCE * STEPS * timeout)[0]:
                self.close()
                return False
            if answer := process.stdout.readline():
                return bool(json.loads(answer))
            self.close()
            if process.returncode == -signal.SIGXCPU:
                break
        return False

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            command = [sys.executable, "-c", START, json.dumps(sys.path)]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={}, cwd="/")
            assert self._process.stdout is not None
            if self._process.stdout.readline() != b"ready\n":
                self.close()
                raise RewardError("reward math-answer: math-verify cannot be imported; pip install math-verify")
        return self._process

    def close(self) -> None:
        """End the child."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            with suppress(BrokenPipeError):
                assert stream is not None
                stream.close()


checker = Checker()


class _LateError(BaseException):
    """Of no kind that math-verify or SymPy would take for an expression they cannot read."""


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """_LateError in a block that takes more CPU seconds of this process."""

    def late(*_: Any) -> None:
        raise _LateError

    signal.signal(signal.SIGPROF, late)
    # Again every second: a bare `except` around the slow line may swallow the first.
    signal.setitimer(signal.ITIMER_PROF, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def serve() -> None:
    """The child: one question a line, one verdict a line."""
    import resource

    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    @lru_cache(maxsize=4096)
    def read(text: str, timeout: int) -> Any:
        with _within(timeout):
            return parse(text, parsing_timeout=None)

    def judged(reference: str, text: str, timeout: int) -> bool:
        end = int(time.process_time() + STEPS * timeout) + 1
        most = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (end if most == resource.RLIM_INFINITY else min(end, most), most))
        right = read(reference, timeout)
        with _within(timeout):
            said = parse(text, parsing_timeout=None)
        with _within(timeout):
            return bool(verify(right, said, timeout_seconds=None))

    # What is read first takes as long as hundreds after it: grammars are built.
    judged(r"\boxed{\frac{1}{2}}", r"\boxed{0.5}", START_S)
    # Unbuffered: select sees no buffer.
    questions = os.fdopen(0, "rb", buffering=0)
    out.write("ready\n")
    while select.select([0], [], [], IDLE_S)[0]:
        line = questions.readline()
        if not line:
            break
        try:
            verdict = judged(*json.loads(line))
        except (Exception, _LateError):  # noqa: BLE001 - hostile text; whatever it broke, it is not the right answer
            verdict = False
        out.write(json.dumps(verdict) + "\n")
