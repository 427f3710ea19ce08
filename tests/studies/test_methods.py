"""The study of methods: planted results are read back, what failed stays in, what is committed is whole."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf_nb import registry
from rlhf_nb.studies import methods as study
from rlhf_nb.studies.methods import __main__ as making

ROOT = Path(__file__).resolve().parents[2]


def planted(failed: int = 0) -> dict:
    """Two seeds; DPO is 0.1 and 0.2 above its start, GRPO fails in the first `failed` of them."""
    seeds = []
    for index, gain in enumerate((0.1, 0.2)):
        start = {"true": 0.5, "proxy": 1.0, "proxy_std": 2.0, "kl": 0.0, "length": 20.0}
        run = {**start, "state": "finished", "true": 0.5 + gain, "proxy": 1.0 + 4 * gain, "kl": 3.0, "train_s": 7.0}
        lost = {"state": "failed", "reason": "it fell over"}
        seeds.append({"seed": index, "start": start, "runs": {"DPO": run, "GRPO": lost if index < failed else run}})
    made = {"machine": "one core", "threads": "1"}
    return {"made_with": made, "arms": ["DPO", "GRPO"], "tuned": {"DPO": 1e-4, "GRPO": 3e-4}, "seeds": seeds}


def test_a_line_is_the_mean_over_seeds_less_the_start_of_each():
    dpo, _ = study.table(planted()).rows
    # Mean 0.15; Student's t with one degree of freedom: 12.706 · 0.0707 / √2 = 0.635.
    assert dpo["true reward over toy-sft"] == "0.150 [−0.485, 0.785]"
    # 4 · 0.15 in units of a spread of 2.
    assert dpo["proxy over toy-sft (std)"].startswith("0.300 [")
    assert (dpo["tokens"], dpo["seconds"], dpo["learning rate"], dpo["seeds"]) == (20.0, 7.0, 1e-4, 2)


def test_time_is_counted_once_whether_or_not_a_rollout_is_part_of_a_step():
    def fold(rows):
        return SimpleNamespace(table=lambda: rows)

    # Online DPO samples and scores within its step; ours before it.
    within = fold([{"time/step_s": 3.0, "time/score_s": 1.0}, {"time/step_s": 2.0}])
    apart = fold([{"time/rollout_s": 2.0, "time/score_s": 1.0, "time/step_s": 3.0}, {"time/step_s": 2.0}])
    assert (making._seconds(within), making._seconds(apart)) == (5.0, 8.0)


@pytest.mark.parametrize("failed", [1, 2])
def test_a_run_that_failed_is_counted_and_never_averaged(failed):
    _, grpo = study.table(planted(failed)).rows
    assert (grpo["seeds"], grpo["failed"]) == (2 - failed, failed)
    assert "true reward over toy-sft" not in grpo


def test_every_arm_is_a_method_that_takes_its_knobs_and_its_rows():
    for arm in study.ARMS:
        cls = registry.methods.get(arm.method)
        cls.create(**arm.knobs, max_steps=study.STEPS, batch_size=study.BATCH, learning_rate=arm.rates[0])
        assert cls.rows == arm.rows
    assert len({arm.name for arm in study.ARMS}) == len(study.ARMS)


def test_every_method_that_trains_a_policy_has_an_arm():
    classes = [registry.methods.get(name) for name in registry.methods.names()]
    # A plugin's is its own to measure.
    ours = {method.name for method in classes if method.trains and method.__module__.startswith("rlhf_nb.methods.")}
    assert ours - {"reward"} <= {arm.method for arm in study.ARMS}


def test_what_is_committed_was_made_with_these_settings():
    if not (resources.files(study) / "results.json").is_file():
        pytest.skip("no results are committed yet")
    results = study.load()
    assert results["settings"] == json.loads(json.dumps(study.SETTINGS))
    assert [one["seed"] for one in results["seeds"]] == list(study.SEEDS)
    assert set(results["arms"]) == {arm.name for arm in study.ARMS} | {f"best of {study.BEST_OF}"}
    for one in results["seeds"]:
        assert set(one["runs"]) == set(results["arms"])
    assert not results["made_with"]["uncommitted"]
    assert study.markdown(results) in (ROOT / "README.md").read_text()
