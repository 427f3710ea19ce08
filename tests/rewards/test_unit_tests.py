"""Code rewards: what is right passes, what is wrong does not, and what cheats does not."""

from __future__ import annotations

import ast
import json
import os
import time

import pytest

from rlhf_nb.errors import RewardError, SpecError, UnavailableError
from rlhf_nb.rewards import sandbox
from rlhf_nb.rewards.functions import from_reference, named

try:
    WHY_NOT = sandbox.require("isolated") and ""
except UnavailableError as refusal:
    WHY_NOT = str(refusal)
# A green CI means that they ran.
pytestmark = pytest.mark.skipif(bool(WHY_NOT) and os.environ.get("CI") != "true", reason=WHY_NOT)


def rows(shared_data, name: str) -> list[dict]:
    return [json.loads(line) for line in (shared_data / "verify" / name).read_text("utf-8").splitlines()]


def score(completions: list[str], config: dict | None = None, prompts: list | None = None, **columns) -> list[float]:
    reward = from_reference(named("unit-tests", config or {}))
    return reward(prompts or ["?"] * len(completions), completions, **columns)


def one(code: str, *tests: str, **config) -> float:
    return score([code], config, test_list=[list(tests)])[0]


def mbpp(tasks: list[dict], codes: list[str]) -> list[float]:
    return score(codes, test_list=[t["test_list"] for t in tasks], test_imports=[t["test_imports"] for t in tasks])


def human_eval(tasks: list[dict], completions: list[str]) -> list[float]:
    columns = {name: [task[name] for task in tasks] for name in ("test", "entry_point")}
    return score(completions, prompts=[task["prompt"] for task in tasks], **columns)


class ReturnsNothing(ast.NodeTransformer):
    def visit_Return(self, node):
        return ast.copy_location(ast.Return(ast.Constant(None)), node)


class FlipsOne(ast.NodeTransformer):
    """Turns the first comparison or sum round."""

    SWAPS = {
        ast.Lt: ast.GtE, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.GtE: ast.Lt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
        ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add,
    }  # fmt: skip
    done = False

    def swap(self, node):
        self.generic_visit(node)
        op = node.ops[0] if isinstance(node, ast.Compare) else node.op
        if not self.done and type(op) in self.SWAPS:
            new = self.SWAPS[type(op)]()
            if isinstance(node, ast.Compare):
                node.ops[0] = new
            else:
                node.op = new
            self.done = True
        return node

    visit_Compare = visit_BinOp = swap  # noqa: N815 - ast calls them so


def mutants(codes: list[str], transformer: type[ast.NodeTransformer]) -> list[tuple[int, str]]:
    """What a transformer makes of each program that it changes."""
    made = []
    for index, code in enumerate(codes):
        tree = ast.parse(code)
        before = ast.unparse(tree)
        after = ast.unparse(ast.fix_missing_locations(transformer().visit(tree)))
        if after != before:
            made.append((index, after))
    return made


@pytest.mark.slow
def test_mbpp_solutions_pass_and_their_mutants_do_not(shared_data):
    tasks = rows(shared_data, "mbpp_sanitized_first200.jsonl")
    codes = [task["code"] for task in tasks]
    assert mbpp(tasks, codes) == [1.0] * 200
    empty = mutants(codes, ReturnsNothing)
    assert sum(mbpp([tasks[index] for index, _ in empty], [code for _, code in empty])) == 0
    flipped = mutants(codes, FlipsOne)
    passed = sum(mbpp([tasks[index] for index, _ in flipped], [code for _, code in flipped]))
    # A few flips change nothing that three tests see.
    assert len(flipped) > 120 and passed / len(flipped) < 0.1, (passed, len(flipped))


def test_human_eval_solutions_pass_as_bodies_and_whole_and_mutants_do_not(shared_data):
    tasks = rows(shared_data, "humaneval_0_63.jsonl")
    bodies = [task["canonical_solution"] for task in tasks]
    assert human_eval(tasks, bodies) == [1.0] * 64
    assert human_eval(tasks, [body.strip() for body in bodies]) == [1.0] * 64
    whole = [task["prompt"] + body for task, body in zip(tasks, bodies, strict=True)]
    assert human_eval(tasks, [f"Here it is:\n```python\n{code}```\nDone." for code in whole]) == [1.0] * 64
    empty = mutants(whole, ReturnsNothing)
    assert len(empty) == 64 and sum(human_eval(tasks, [code for _, code in empty])) == 0


DOUBLE = "def double(x):\n    return 2 * x"
TESTS = ("assert double(2) == 4", "assert double([1]) == [1, 1]", "assert double('a') == 'aa'")


@pytest.mark.parametrize(
    "cheat",
    [
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "print('passed'); print('passed'); print('passed')",
        "import os; os.write(1, b'passed\\n' * 3)",
        "class Any:\n    __eq__ = lambda *_: True\ndef double(x): return Any()",
        "class Any(int):\n    __eq__ = lambda *_: True\ndef double(x): return Any(5)",
        "def double(x): raise SystemExit(0)",
        "def double(x): raise AssertionError",
        "def check(*_): pass\ndef double(x): return 0",
        "import builtins, sys\ndef double(x):\n    f = sys._getframe(1)\n    return f.f_globals.get('TESTS')",
        "import os\ndef double(x):\n    os.write(RLHF_CHANNEL, b'passed')",
        "import gc\n[s.write(b'[\"value\", 4, []]\\n' * 9) for s in gc.get_objects() if hasattr(s, 'makefile')]",
        "def double(x):\n    while True: pass",
        "import os\nwhile True: os.fork()",
        "import socket\nsocket.create_connection(('127.0.0.1', 9))\ndef double(x): return 2 * x",
        "open('/usr/mine', 'w')\ndef double(x): return 2 * x",
        "def double(x): return '9' * (1 << 23)",
        "def double(x):\n    x = []\n    for _ in range(10**5): x = [x]\n    return x",
        "",
        "def double(x) return",
    ],
)
def test_what_cheats_or_attacks_scores_nothing(cheat):
    began = time.monotonic()
    assert one(cheat, *TESTS, score="share", timeout=3.0) == 0.0
    assert time.monotonic() - began < 10
    assert one(DOUBLE, *TESTS) == 1.0


def test_a_completion_replaces_no_built_in_of_the_tests():
    code = "def f(x): return [0]\ndef sorted(x): return [1]\ndef set(x): return [1]"
    assert one(code, "assert sorted(f(1)) == sorted([3])") == 0.0
    assert one(code, "assert set(f(1)) == set([3])") == 0.0


def test_what_the_tests_expect_never_reaches_the_completion():
    code = """
import gc
def f(x):
    said = [o for o in gc.get_objects() if isinstance(o, (str, bytes, tuple, list))]
    return any("hunter" + "2" in str(o) for o in said) or open("/work/f", "w").write("x")
"""
    assert one(code, 'assert f(1) == 1 and "hunter2"') == 1.0


def test_values_pass_both_ways_as_they_are():
    code = "def same(x):\n    return x"
    values = "[None, True, 1, -2.5, float('inf'), 'ü\\n', b'b', (1, [2]), {1}, frozenset({3}), {(1, 2): {'a': 4}}, 1j]"
    check = f"for v in {values}:\n    assert same(v) == v and type(same(v)) is type(v)"
    assert one(code, check, "assert next(same(iter([7]))) == 7", "assert same(10**1000) == 10**1000") == 1.0


def test_a_function_may_change_what_it_is_given_and_raise():
    code = "def grow(x):\n    x.append(1)\ndef fail():\n    raise ValueError('no')"
    grown = "x = [0]\ngrow(x)\nassert x == [0, 1]"
    raised = "try:\n    fail()\nexcept ValueError as error:\n    assert str(error) == 'no'\nelse:\n    assert False"
    assert one(code, grown, raised) == 1.0


def test_all_or_the_share_that_passes():
    code = "def double(x):\n    return 2 * x if x != [1] else []"
    assert one(code, *TESTS) == 0.0
    assert one(code, *TESTS, score="share") == pytest.approx(2 / 3)


def test_rows_that_cannot_be_tested_are_one_line():
    with pytest.raises(RewardError, match=r"^reward unit-tests: the rows have no column test_list or test or tests"):
        score([DOUBLE], answer=["x"])
    with pytest.raises(RewardError, match=r"^reward unit-tests: unreadable: SyntaxError: .*; correct the row$"):
        one(DOUBLE, "assert double(")
    with pytest.raises(RewardError, match="a row has no test; leave it out"):
        one(DOUBLE, " ")
    with pytest.raises(RewardError, match="entry_point='os; x' is no name of a function"):
        score([DOUBLE], test=["def check(c): pass"], entry_point=["os; x"])


def test_no_row_can_weaken_the_sandbox(monkeypatch):
    asked = []
    monkeypatch.setattr("rlhf_nb.rewards.unit_tests.require", lambda level: asked.append(level) or "")
    score([DOUBLE], test_list=[[TESTS[0]]], sandbox=["weak"])
    assert asked == ["isolated"]


def test_the_spec_says_which_sandbox():
    assert named("unit-tests", {}).config["sandbox"] == "isolated"
    assert named("unit-tests", {"sandbox": "weak"}).config["sandbox"] == "weak"
    with pytest.raises(SpecError, match="sandbox='none': input should be 'isolated' or 'weak'"):
        named("unit-tests", {"sandbox": "none"})


def test_code_is_refused_before_the_run_where_it_cannot_be_isolated(monkeypatch):
    from types import SimpleNamespace

    from rlhf_nb.rewards.resolve import load

    said = []
    context = SimpleNamespace(emit=SimpleNamespace(notice=lambda code, text: said.append(text)))
    load(context, named("unit-tests", {}))
    assert said[0].startswith("reward unit-tests: isolated: own user, mount, PID, network")
    monkeypatch.setattr(sandbox, "_missing", lambda level: "unshare: Operation not permitted")
    with pytest.raises(UnavailableError, match="unshare: Operation not permitted"):
        load(context, named("unit-tests", {}))
