"""Code is right when its tests pass. Tests and completion run in two sandboxes and talk through a socket.

A completion in one process with its tests need not be right to pass: it can leave with status 0, return an object that
equals everything, redefine `sorted`, or read the expected values off the stack. Here the tests call the completion's
functions from another sandbox; arguments and results travel as JSON and arrive as plain built-in values, and what the
tests expect never comes near the completion. The price: arguments and results are numbers, texts, bytes, lists, tuples,
sets, dicts and iterators of those. Tests that need a completion's classes, or pass it functions, fail.
"""

from __future__ import annotations

import ast
import os
import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from rlhf_nb.errors import RewardError
from rlhf_nb.rewards.functions import no_column
from rlhf_nb.rewards.sandbox import Jail, Level, Limits, require
from rlhf_nb.rewards.text import fenced

TEST_COLUMNS = ("test_list", "test", "tests")
PASSED, UNREADABLE = "passed", "unreadable: "


def unit_tests(
    prompts: Sequence[Any],
    completions: Sequence[str],
    *,
    sandbox: Level = "isolated",
    score: Literal["all", "share"] = "all",
    timeout: float = 10.0,
    memory_mb: int = 512,
    **columns: Any,
) -> list[float]:
    """Whether the code in a completion passes its row's tests. The registered reward `unit-tests`.

    The code is the last fenced block, or the whole completion. Columns are MBPP's and HumanEval's: `test_list`, `test`
    or `tests`, a text or a list of them; `test_imports`, lines to run before each; `entry_point`, the function that a
    `test` checks with `check(candidate)`, for which the prompt is the function's head where it is Python.

    Args:
        sandbox: isolated, or weak where that cannot be had: `rlhf_nb.rewards.sandbox` says what each keeps out.
        score: all: 1 if every test passes, else 0. share: the share that passes; what comes after a test that does not
            end counts as failed.
        timeout: Seconds for all tests of a completion. CPU time ends at the same number.
        memory_mb: MiB of address space for a process; the tests have as much.

    Raises:
        RewardError: No tests, or tests that are no Python.
        UnavailableError: Code cannot be isolated here.
    """
    ready(sandbox)
    limits = Limits(wall_s=timeout, cpu_s=max(1, int(timeout)), memory_bytes=memory_mb << 20)
    found = next((column for column in TEST_COLUMNS if column in columns), None)
    if found is None:
        raise RewardError(no_column("unit-tests", TEST_COLUMNS, columns))
    rows = [{name: values[index] for name, values in columns.items()} for index in range(len(completions))]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            work = [
                pool.submit(share_passed, prompt, completion, row[found], row, level=sandbox, limits=limits)
                for prompt, completion, row in zip(prompts, completions, rows, strict=True)
            ]
            shares = [each.result() for each in work]
        except BaseException:
            # reward_timeout, or Ctrl-C: what has not begun does not begin.
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [float(share == 1.0) if score == "all" else share for share in shares]


def ready(sandbox: Level = "isolated", **_: Any) -> str:
    """What the sandbox keeps out here, for the run's log; refused before the run starts where it cannot be had."""
    return require(sandbox)


unit_tests.ready = ready  # type: ignore[attr-defined]


def share_passed(
    prompt: Any, completion: str, tests: str | Sequence[str], row: Mapping[str, Any], *, level: Level, limits: Limits
) -> float:
    """The share of its tests that one completion passes, in [0, 1]."""
    tests = [tests] if isinstance(tests, str) else list(tests)
    if not any(test.strip() for test in tests):
        raise RewardError("reward unit-tests: a row has no test; leave it out, nothing could fail there")
    entry_point = str(row.get("entry_point") or "")
    if entry_point:
        if not entry_point.isidentifier():
            raise RewardError(f"reward unit-tests: entry_point={entry_point[:60]!r} is no name of a function")
        tests = [f"{test}\n\ncheck({entry_point})" for test in tests]
    imports = row.get("test_imports") or []
    setup = imports if isinstance(imports, str) else "\n".join(imports)
    solution = f"PROGRAMS = {programs(prompt, completion, entry_point)!r}\n{SERVE}"
    asking = f"SETUP, TESTS = {setup!r}, {tests!r}\n{ASK}"
    here, there = socket.socketpair()
    with here, there, Jail(solution, level=level, limits=limits, channel=here) as solving:
        with Jail(asking, level=level, limits=limits, channel=there) as testing:
            # Ours go, so that each sees the other's end.
            here.close()
            there.close()
            lines = testing.wait().built().output.decode("utf-8", "replace").splitlines()
        if solving.process.poll() is not None:
            solving.wait().built()
    if unreadable := next((line for line in lines if line.startswith(UNREADABLE)), ""):
        raise RewardError(f"reward unit-tests: {unreadable}; correct the row")
    return lines.count(PASSED) / len(tests)


def programs(prompt: Any, completion: str, entry_point: str) -> list[str]:
    """What the Python of a completion may be; the first that compiles is meant.

    Behind a prompt that is the head of the function asked for: a whole function or a body; or a body that lost its
    first indentation, because the loop strips what it samples.
    """
    code = fenced(completion, "python", "py", "python3")
    if not entry_point or not isinstance(prompt, str) or not _is_python(prompt):
        return [code]
    head = prompt.rstrip("\n")
    return [f"{head}\n\n{code}", f"{head}\n    {code}"]


def _is_python(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


WIRE = """
import json, socket
from itertools import islice

def encode(value):
    kinds = ((list, "l"), (tuple, "t"), (set, "s"), (frozenset, "f"))
    if value is None or isinstance(value, bool):
        return value
    for plain in (int, float, str):
        if isinstance(value, plain):
            return plain(value)
    for kind, tag in kinds:
        if isinstance(value, kind):
            return [tag, [encode(each) for each in value]]
    if isinstance(value, dict):
        return ["d", [[encode(key), encode(each)] for key, each in value.items()]]
    if isinstance(value, complex):
        return ["c", [value.real, value.imag]]
    if isinstance(value, (bytes, bytearray)):
        return ["b", list(value)]
    if isinstance(value, range):
        return ["r", [value.start, value.stop, value.step]]
    if hasattr(value, "__next__"):
        return ["i", [encode(each) for each in islice(value, 100000)]]
    raise TypeError(f"{type(value).__name__} cannot pass between a completion and its tests")

def decode(value):
    if not isinstance(value, list):
        return value
    tag, inside = value
    if tag == "d":
        return {decode(key): decode(each) for key, each in inside}
    if tag in "cr":
        return {"c": complex, "r": range}[tag](*inside)
    make = {"l": list, "t": tuple, "s": set, "f": frozenset, "b": bytes, "i": iter}[tag]
    return make([decode(each) for each in inside])

LONGEST = 1 << 22
stream = socket.socket(fileno=RLHF_CHANNEL).makefile("rwb")

def send(message):
    stream.write(json.dumps(message).encode() + b"\\n")
    stream.flush()

def receive():
    line = stream.readline(LONGEST)
    if not line.endswith(b"\\n"):
        raise EOFError("the other side has gone")
    return json.loads(line)
"""

SERVE = (
    WIRE
    + """
import types

def compiled():
    for program in PROGRAMS:
        try:
            return compile(program, "<completion>", "exec")
        except SyntaxError:
            continue
    raise SystemExit(1)

module = types.ModuleType("solution")
exec(compiled(), module.__dict__)
while True:
    name, args, kwargs = receive()
    args = [decode(each) for each in args]
    kwargs = {key: decode(each) for key, each in kwargs.items()}
    try:
        value = getattr(module, name)(*args, **kwargs)
        # A function may change what it was given, and be tested for that.
        send(["value", encode(value), [encode(each) for each in args]])
    except BaseException as error:
        send(["error", type(error).__name__, str(error)[:1000]])
"""
)
"""In the completion's sandbox: run it once, then call its functions as asked."""

ASK = (
    WIRE
    + '''
import ast, builtins, os, sys

def asks(name):
    def proxy(*args, **kwargs):
        send([name, [encode(each) for each in args], {key: encode(each) for key, each in kwargs.items()}])
        kind, said, after = receive()
        if kind == "error":
            known = getattr(builtins, str(said), None)
            is_error = isinstance(known, type) and issubclass(known, Exception)
            raise (known if is_error else RuntimeError)(after)
        for given, now in zip(args, after):
            if isinstance(given, list):
                given[:] = decode(now)
            elif isinstance(given, (dict, set)):
                changed = decode(now)
                given.clear()
                given.update(changed)
        return decode(said)
    return proxy

def globals_for(tree):
    """A proxy for every name that a test uses and Python does not have: a completion replaces no built-in, unless the
    tests use nothing else, as those of MBPP's task 126, a function called sum."""
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    used = names - set(dir(builtins)) or names
    dotted = [node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    spelt = {node.id for node in dotted if isinstance(node, ast.Name)}
    modules = {name: __import__(name) for name in used & spelt & set(sys.stdlib_module_names)}
    return {**{name: asks(name) for name in used}, **modules, "__name__": "tests"}

def say(text):
    os.write(1, text.encode() + b"\\n")

try:
    trees = [ast.parse(SETUP + "\\n" + test) for test in TESTS]
    codes = [compile(tree, "<tests>", "exec") for tree in trees]
except (SyntaxError, ValueError) as error:
    say(f"unreadable: {type(error).__name__}: {error}")
    sys.exit()
sys.stdout = sys.stderr = open(os.devnull, "w")
for tree, code in zip(trees, codes):
    try:
        exec(code, globals_for(tree))
    except EOFError:
        break
    except BaseException:
        continue
    say("passed")
'''
)
"""In the tests' sandbox: run each, with the completion's functions at the other end of the socket."""
