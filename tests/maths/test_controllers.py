from __future__ import annotations

import math

import pytest
import torch

from rlhf_nb.maths.controllers import RunningMoments, adapted_kl_coef


def test_at_the_target_nothing_moves():
    assert adapted_kl_coef(0.05, 6.0, target=6.0, completions=64, horizon=10_000) == 0.05


def test_worked_example():
    # KL 10 % above the target, 100 completions of a horizon of 1000: 0.2 · (1 + 0.1 · 0.1) = 0.202
    assert adapted_kl_coef(0.2, 6.6, target=6.0, completions=100, horizon=1000) == pytest.approx(0.202)


@pytest.mark.parametrize(
    ("kl", "factor"), [(1e9, 1.02), (float("inf"), 1.02), (float("nan"), 1.02), (0.0, 0.98), (-5.0, 0.98)]
)
def test_an_error_counts_for_a_fifth_at_most(kl, factor):
    assert adapted_kl_coef(1.0, kl, target=6.0, completions=100, horizon=1000) == pytest.approx(factor)


def test_it_stays_within_its_bounds():
    assert adapted_kl_coef(9.99, 100.0, target=1.0, completions=1000, horizon=1000) == 10.0
    assert adapted_kl_coef(1.01e-4, 0.0, target=1.0, completions=1000, horizon=1000) == 1e-4


def test_it_settles_where_the_kl_is_the_target():
    """A world whose KL is 1/β: the controller must find β = 1/target."""
    beta = 1.0
    for _ in range(4000):
        beta = adapted_kl_coef(beta, 1 / beta, target=5.0, completions=64, horizon=1000)
    assert beta == pytest.approx(0.2, rel=1e-3)


def test_moments_are_those_of_all_values_however_they_were_cut():
    values = torch.randn(100, generator=torch.Generator().manual_seed(0)) * 3 + 7
    whole, parts = RunningMoments(), RunningMoments()
    whole.add(values)
    for part in values.split(13):
        parts.add(part)
    for moments in (whole, parts):
        assert moments.mean == pytest.approx(values.double().mean().item(), rel=1e-12)
        assert moments.spread == pytest.approx(values.double().std().item(), rel=1e-12)
    again = RunningMoments()
    again.load(parts.state())
    again.add(torch.tensor([1.0]))
    parts.add(torch.tensor([1.0]))
    assert again.state() == parts.state()


@pytest.mark.parametrize("values", [[], [3.0], [2.0, 2.0, 2.0], [float("nan")]])
def test_where_there_is_no_spread_dividing_by_it_changes_nothing(values):
    moments = RunningMoments()
    moments.add(torch.tensor(values))
    assert moments.spread == 1.0 and math.isfinite(moments.mean)
