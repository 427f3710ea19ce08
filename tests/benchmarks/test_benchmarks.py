"""The benchmarks start, and their statistics are right. How fast anything is, is no test: run the scripts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SCRIPTS = (
    "import_cost",
    "first_metric",
    "overhead",
    "control_latency",
    "replay",
    "pixels",
    "ppo_vs_trl",
    "roofline",
    "lora_learning",
    "grpo_vs_trl",
    "arithmetic",
    "kway",
)


@pytest.fixture
def common(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(HERE))
    import common

    yield common
    sys.modules.pop("common", None)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_benchmark_says_what_it_measures(name: str) -> None:
    done = subprocess.run([sys.executable, HERE / f"{name}.py", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(option in done.stdout for option in ("--quick", "--json", "--repeats", "Must:"))


def test_every_script_stands_in_the_readme() -> None:
    readme = (HERE / "README.md").read_text()
    assert all(f"{name}.py" in readme for name in SCRIPTS)


def test_quartiles_lie_between_order_statistics(common) -> None:
    # 1 2 3 10: a quarter of the way is 0.75 past the first, i.e. 1.75; 95 % is 0.85 past the third: 3 + 0.85 * 7.
    found = common.summary([10.0, 1.0, 3.0, 2.0])
    assert (found["median"], found["q1"], found["q3"], found["n"]) == (2.5, 1.75, 4.75, 4)
    assert found["p95"] == pytest.approx(8.95)
    assert common.summary([7.0])["q1"] == common.summary([7.0])["p95"] == 7.0
    with pytest.raises(ValueError, match="no values"):
        common.percentile([], 0.5)


def test_ratios_are_taken_between_neighbours_in_time(common) -> None:
    # The machine got twice as slow for the second pair: both ratios are still a half.
    found = common.ratios([1.0, 2.0], [2.0, 4.0])
    assert found["median"] == found["min"] == found["max"] == 0.5
    assert common.ratios([1.0, 9.0, 2.0], [2.0, 3.0, 8.0])["of_medians"] == pytest.approx(2 / 3)


def test_arms_take_turns_and_every_other_round_is_reversed(common) -> None:
    order: list[str] = []
    found = common.interleave(3, {"a": lambda: order.append("a") or 1.0, "b": lambda: order.append("b") or 2.0})
    assert "".join(order) == "abbaab"
    assert found == {"a": [1.0] * 3, "b": [2.0] * 3}


def test_slope_is_the_growth_of_a_lag(common) -> None:
    assert common.slope([0.0, 1.0, 2.0], [5.0, 5.5, 6.0]) == pytest.approx(0.5)
