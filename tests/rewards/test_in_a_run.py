"""Verifiable rewards in a real run: columns reach them, the log says what the sandbox keeps out, a refusal ends it."""

from __future__ import annotations

import pytest

from rlhf_nb.errors import RlhfError, UnavailableError
from rlhf_nb.rewards import sandbox
from rlhf_nb.rewards.functions import named
from rlhf_nb.rewards.math_checker import checker

CONFIG = {
    "max_steps": 2, "num_ppo_epochs": 1, "rollout_batch_size": 4, "batch_size": 4, "max_new_tokens": 8,
    "max_length": 120, "sample_every": 0,
}  # fmt: skip
ROWS = [{"prompt": f"{n}+{n}?", "answer": str(2 * n)} for n in range(4)]
TESTED = [{"prompt": f"Write f{n}.", "test_list": [f"assert f{n}(1) == 1"]} for n in range(4)]


def notices(place) -> dict[str, str]:
    return {event.code: event.text for event in place.events() if event.kind == "notice"}


def test_math_answer_is_asked_with_each_rows_answer(job, trace, monkeypatch):
    asked = []
    real = checker.verdicts

    def verdicts(pairs, *, timeout):
        asked.extend(pairs)
        return real(pairs, timeout=timeout)

    monkeypatch.setattr(checker, "verdicts", verdicts)
    try:
        place = job("ppo", ROWS, config=CONFIG, reward=named("math-answer", {}))
    finally:
        checker.close()
    assert {reference for reference, _ in asked} == {f"\\boxed{{{2 * n}}}" for n in range(4)}
    assert trace(place, "reward/score").keys() == {1, 2}
    assert place.spec().reward.config == {"timeout": 3}


def test_code_runs_in_the_sandbox_and_the_log_says_what_is_kept_out(job):
    try:
        said = sandbox.require("isolated")
    except UnavailableError as refusal:
        pytest.skip(str(refusal))
    place = job("ppo", TESTED, config=CONFIG, reward=named("unit-tests", {"timeout": 5.0}))
    assert notices(place)["reward_ready"] == f"reward unit-tests: {said}"
    assert place.spec().reward.config["sandbox"] == "isolated"


def test_a_run_whose_code_cannot_be_isolated_does_not_start(job, monkeypatch):
    monkeypatch.setattr(sandbox, "_missing", lambda level: "unshare: Operation not permitted")
    with pytest.raises(RlhfError, match=r'sandbox="isolated": unshare: Operation not permitted; allow'):
        job("ppo", TESTED, config=CONFIG, reward=named("unit-tests", {}))
