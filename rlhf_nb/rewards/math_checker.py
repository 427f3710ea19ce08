"""math-verify in a process of its own, which is killed when it hangs.

math-verify stops itself with SIGALRM, and so does a run's `reward_timeout`: in one process each would disarm the other.
Nor does an alarm stop 9^9^9^9, which one call into C computes. The child ends by itself when its parent does, and after
`IDLE_S` without a question.
"""

from __future__ import annotations

import json
import logging
import os
import select
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

from rlhf_nb.errors import RewardError

IDLE_S = 5.0
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
            # Three steps of `timeout` each, and one to spare.
            if not select.select([process.stdout], [], [], 4.0 * timeout)[0]:
                self.close()
                return False
            if answer := process.stdout.readline():
                return bool(json.loads(answer))
            self.close()
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


def serve() -> None:
    """The child: one question a line, one verdict a line."""
    import resource

    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    @lru_cache(maxsize=4096)
    def read(text: str, timeout: int) -> Any:
        return parse(text, parsing_timeout=timeout)

    def judged(reference: str, text: str, timeout: int) -> bool:
        return bool(verify(read(reference, timeout), parse(text, parsing_timeout=timeout), timeout_seconds=timeout))

    # Unbuffered: select sees no buffer.
    questions = os.fdopen(0, "rb", buffering=0)
    out.write("ready\n")
    while select.select([0], [], [], IDLE_S)[0]:
        line = questions.readline()
        if not line:
            break
        try:
            verdict = judged(*json.loads(line))
        except Exception:  # noqa: BLE001 - hostile text; whatever it broke, it is not the right answer
            verdict = False
        out.write(json.dumps(verdict) + "\n")
