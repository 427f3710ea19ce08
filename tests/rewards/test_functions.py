from __future__ import annotations

import numpy as np
import pytest

from rlhf_nb.errors import NotFoundError, RewardError, SpecError
from rlhf_nb.protocol.spec import FunctionReward, NamedReward
from rlhf_nb.rewards.functions import from_reference, named

HEAD = "def f(prompts, completions, **columns):\n"


def call(body: str, n: int = 3, **columns):
    reward = from_reference(FunctionReward(name="mine", source=HEAD + f"    {body}"))
    return reward([f"p{i}" for i in range(n)], [f"c{i}" * (i + 1) for i in range(n)], **columns)


def test_it_gives_one_float_for_each_completion():
    assert call("return [len(c) for c in completions]") == [2.0, 4.0, 6.0]
    assert call("import numpy\n    return numpy.arange(len(prompts))") == [0.0, 1.0, 2.0]
    assert all(type(v) is float for v in call("return [1, True, 2.5]"))


def test_further_columns_arrive_by_name():
    assert call("return columns['weight']", weight=[3, 4, 5]) == [3.0, 4.0, 5.0]


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ("return [1.0]", "reward mine: returned 1 numbers for 3 completions; return one for each"),
        ("return [1, float('nan'), 2]", "reward mine: completion 1 got nan; every completion needs one finite number"),
        ("return [1, 2, float('inf')]", "reward mine: completion 2 got inf; every completion needs one finite number"),
        ("return [1, None, 2]", "reward mine: completion 1 got None; every completion needs one finite number"),
        ("return ['a', 1, 2]", "reward mine: completion 0 got 'a'; every completion needs one finite number"),
        ("return None", "reward mine: returned NoneType; return a list of 3 numbers"),
        ("return 'abc'", "reward mine: returned str; return a list of 3 numbers"),
        ("x = 1\n    return [x / 0]", "reward mine: ZeroDivisionError: division by zero (line 3 of its source)"),
        ("raise ValueError('one\\ntwo')", "reward mine: ValueError: one (line 2 of its source)"),
    ],
)
def test_what_is_no_finite_number_is_one_line_that_says_which(body, line):
    with pytest.raises(RewardError) as caught:
        call(body)
    assert str(caught.value) == line


def test_helpers_may_stand_beside_the_function():
    source = (
        "import math\nSCALE = 2\ndef helper(x):\n    return x * SCALE\n"
        + HEAD
        + "    return [helper(len(c)) for c in completions]"
    )
    assert from_reference(FunctionReward(name="mine", source=source))(["p"], ["abc"]) == [6.0]


def test_a_source_without_a_fitting_function_is_refused():
    with pytest.raises(RewardError, match=r"no function in its source begins with \(prompts, completions"):
        from_reference(FunctionReward(name="mine", source="def f(x):\n    return x"))
    with pytest.raises(RewardError, match=r"its source does not run: ModuleNotFoundError"):
        from_reference(FunctionReward(name="mine", source="import no_such_module"))


def test_toy_true_resolves_by_name_and_a_typo_is_answered_with_the_nearest():
    reward = from_reference(NamedReward(name="toy-true"))
    assert 0.0 <= reward(["Who runs the bakery?"], ["I do not know that."])[0] <= 1.0
    with pytest.raises(NotFoundError, match='did you mean "toy-true"'):
        from_reference(NamedReward(name="toy-tru"))


def test_a_numpy_scalar_list_is_taken():
    assert from_reference(
        FunctionReward(name="mine", source=HEAD + "    import numpy\n    return [numpy.float32(0.5)]")
    )(["p"], ["c"]) == [float(np.float32(0.5))]


def test_a_missing_column_is_one_line_that_names_it():
    source = "def f(prompts, completions, answer, **columns):\n    return [1.0 for _ in completions]"
    for reward, name in (
        (from_reference(FunctionReward(name="mine", source=source)), "mine"),
        (from_reference(NamedReward(name="exact-match")), "exact-match"),
    ):
        with pytest.raises(RewardError) as caught:
            reward(["p"], ["c"], level=[1], subject=["x"])
        assert str(caught.value) == (
            f"reward {name}: the rows have no column answer; they have level, subject: import prompts with that column"
        )


def test_options_are_written_out_and_no_column_sets_one():
    reward = named("exact-match", {})
    assert reward.config == {"ignore_case": False}
    assert from_reference(reward)(["p"], ["A"], answer=["a"], ignore_case=[True]) == [0.0]
    assert from_reference(named("exact-match", {"ignore_case": True}))(["p"], ["A"], answer=["a"]) == [1.0]


@pytest.mark.parametrize(
    ("name", "config", "line"),
    [
        (
            "exact-match",
            {"ignorecase": True},
            'no option ignorecase; did you mean "ignore_case"?  its options: ignore_case',
        ),
        ("toy-true", {"x": 1}, "no option x  it has no options"),
        ("numeric", {"tolerance": "big"}, "tolerance='big': input should be a valid number"),
        ("regex", {"match": "all"}, "match='all': input should be 'search' or 'full'"),
    ],
)
def test_an_option_that_cannot_be_is_one_line(name, config, line):
    with pytest.raises(SpecError) as caught:
        named(name, config)
    assert str(caught.value) == f"reward {name}: {line}"
