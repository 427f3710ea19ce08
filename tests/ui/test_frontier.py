"""The picture of several runs: its dots are the runs' own numbers."""

from __future__ import annotations

from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from rlhf_nb.errors import SpecError
from rlhf_nb.protocol.events import Metric
from rlhf_nb.protocol.fold import RunFold
from rlhf_nb.ui.frontier import COLOURS, Frontier


def run(*steps: dict[str, float]) -> SimpleNamespace:
    fold = RunFold()
    for number, values in enumerate(steps, start=1):
        fold.add(Metric(seq=number, t=0.0, step=number, values=values))
    return SimpleNamespace(fold=fold)


def test_a_dot_is_a_sampled_step_and_a_negative_kl_is_told_as_none():
    sampled = run(
        {"loss": 1.0},
        {"kl/policy_reference": 4.0, "reward/gold": 0.5},
        {"kl/policy_reference": -0.1, "reward/gold": 0.6},
    )
    picture = Frontier({"dpo <b>": sampled, "kto": run({"kl/policy_reference": 1.0, "reward/gold": 0.4})})
    assert picture.points == {"dpo <b>": [(2.0, 0.5), (0.0, 0.6)], "kto": [(1.0, 0.4)]}
    ElementTree.fromstring(picture.svg)
    assert "dpo &lt;b&gt;" in picture.svg and COLOURS[1] in picture.svg
    assert picture._repr_mimebundle_()["text/plain"].endswith("dpo <b> 0.600 at √KL 0.00; kto 0.400 at √KL 1.00")


def test_a_run_that_was_never_measured_is_named():
    with pytest.raises(SpecError, match=r"dpo: no step has both kl/policy_reference and reward/gold"):
        Frontier({"dpo": run({"loss": 1.0})})
    with pytest.raises(SpecError, match="7 runs in one picture"):
        Frontier({str(i): run({"kl/policy_reference": 1.0, "reward/gold": 1.0}) for i in range(7)})
