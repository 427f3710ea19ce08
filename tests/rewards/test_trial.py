"""A reward function is tried on samples before a run takes a number."""

from __future__ import annotations

import time

import pytest

import rlhf_nb as rl
from rlhf_nb.errors import AttachError, RewardError, SpecError
from rlhf_nb.protocol.spec import FunctionReward
from rlhf_nb.rewards.trial import COMPLETIONS, tried

ROWS = [{"prompt": "1+1?", "answer": "2"}, {"prompt": "2+2?", "answer": "4", "level": 1}]


def trial(body: str, rows=ROWS, timeout: float = 20.0):
    source = f"def mine(prompts, completions, **columns):\n    {body}"
    return tried(FunctionReward(name="mine", source=source), rows, timeout=timeout)


def test_it_scores_samples_of_the_runs_own_prompts_with_the_columns_that_all_have():
    body = 'assert sorted(columns) == ["answer"], columns\n    print("noise")\n    return [len(p) for p in prompts]'
    assert trial(body) == [4.0] * len(COMPLETIONS)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return [1 / len(c) for c in completions]", "ZeroDivisionError: division by zero (line 2 of its source)"),
        ("return [1.0]", "returned 1 numbers for 3 completions; return one for each; tried on 3 completions before"),
        ("return columns['gold']", "KeyError: 'gold' (line 2 of its source)"),
        ("import os; os._exit(3)", "it ended its process with status 3"),
    ],
)
def test_what_would_fail_in_the_run_fails_before_it(body, says):
    with pytest.raises(RewardError) as caught:
        trial(body)
    assert str(caught.value).startswith("reward mine: ") and says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_tried_here_is_left_to_the_run():
    began = time.monotonic()
    assert trial("import time; time.sleep(60)", timeout=0.5) is None
    assert time.monotonic() - began < 30
    assert trial("import only_the_compute_has_it") is None


@pytest.fixture
def ws(tmp_path):
    with rl.Workspace(tmp_path / "w") as workspace:
        workspace.add_data(ROWS, name="sums", kind="prompts")
        yield workspace


def test_a_run_is_refused_in_the_cell_that_asks_for_it(ws, monkeypatch):
    # What has not answered by then is left to the run.
    monkeypatch.setattr("rlhf_nb.stages.train.TRIAL_S", 120.0)

    def train(reward, prompts="sums"):
        return ws.train(rl.PPO(), policy="toy-sft", prompts=prompts, reward=reward)

    ws.reward_function("shaky", "def f(prompts, completions, **columns):\n    return [1 / len(c) for c in completions]")
    with pytest.raises(RewardError, match=r"^reward shaky: ZeroDivisionError"):
        train("shaky")
    with pytest.raises(RewardError, match=r"^reward shaky: ZeroDivisionError"):
        train("toy-true,shaky", {"sums": 1, "toy-prompts": 1})
    with pytest.raises(RewardError, match=r"^reward numeric: the rows have no column answer; they have "):
        train("numeric", "toy-prompts")
    # Nothing is attached: what got so far passed its trial.
    with pytest.raises(AttachError):
        train("numeric")
    assert ws.run_ids() == []


def test_a_function_cannot_take_a_registered_name(ws):
    with pytest.raises(SpecError, match=r"^reward-function numeric: a registered reward is called so; give another"):
        ws.reward_function("numeric", "def f(prompts, completions, **columns):\n    return [1.0 for _ in completions]")
