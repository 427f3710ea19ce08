from __future__ import annotations

import pytest
import torch

from rlhf_nb.errors import ShapeError
from rlhf_nb.maths.masked import masked_mean, masked_sum, masked_var, masked_whiten


def test_worked_example():
    values, mask = (
        torch.tensor([[1.0, 2.0, 9.0], [6.0, 9.0, 9.0]]),
        torch.tensor([[True, True, False], [True, False, False]]),
    )
    assert masked_sum(values, mask) == 9 and masked_mean(values, mask) == 3
    assert masked_mean(values, mask, 1).tolist() == [1.5, 6.0]
    assert masked_var(values, mask) == pytest.approx(7.0)  # (4 + 1 + 9) / 2


def only_divided(values, mask):
    return masked_whiten(values, mask, shift_mean=False).pow(3).sum()


def test_nan_under_the_mask_changes_neither_value_nor_gradient(draw, mask_BT):
    clean = draw(5, 7).requires_grad_()
    dirty = clean.detach().masked_fill(~mask_BT, float("nan")).requires_grad_()
    for function in (masked_sum, masked_mean, masked_var, lambda v, m: masked_whiten(v, m).pow(3).sum(), only_divided):
        a, b = function(clean, mask_BT), function(dirty, mask_BT)
        assert a == b
        ga, gb = torch.autograd.grad(a, clean)[0], torch.autograd.grad(b, dirty)[0]
        assert torch.equal(ga, gb) and gb.isfinite().all()


def test_whitened_values_have_mean_zero_and_sample_variance_one(draw, mask_BT):
    white = masked_whiten(3 + 2 * draw(5, 7), mask_BT)[mask_BT]
    assert white.mean().item() == pytest.approx(0, abs=1e-12) and white.var().item() == pytest.approx(1, abs=1e-7)


def test_whitening_without_the_shift_only_divides(draw, mask_BT):
    values = 3 + 2 * draw(5, 7)
    white = masked_whiten(values, mask_BT, shift_mean=False)
    assert white[mask_BT].var().item() == pytest.approx(1, abs=1e-7) and not white[~mask_BT].any()
    torch.testing.assert_close(white[mask_BT], values[mask_BT] / values[mask_BT].std(), rtol=1e-7, atol=0)


def test_without_the_shift_a_row_s_sum_stays_in_proportion_whatever_its_length():
    # Rows sum to 2 and to 3, over one token and over three.
    values, mask = (
        torch.tensor([[2.0, 0.0, 0.0], [1.0, 0.0, 2.0]]),
        torch.tensor([[True, False, False], [True, True, True]]),
    )
    first, second = masked_whiten(values, mask, shift_mean=False).sum(1)
    assert (second / first).item() == pytest.approx(1.5)


@pytest.mark.parametrize("n", [1, 1000, 100_000])
def test_equal_values_stay_without_the_shift(n):
    """Their deviation is rounding, and no unit to measure them in."""
    values = torch.full((1, n), 0.7)
    assert torch.equal(masked_whiten(values, torch.ones(1, n, dtype=torch.bool), shift_mean=False), values)
    none = torch.zeros(1, n, dtype=torch.bool)
    assert not masked_whiten(values, none, shift_mean=False).any()


def test_equal_values_whiten_to_zero_and_one_value_too():
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert masked_whiten(torch.full((2, 3), 0.7), mask).abs().max() < 1e-2
    one = torch.zeros(2, 3, dtype=torch.bool).index_fill(1, torch.tensor([0]), True) & torch.tensor([[True], [False]])
    assert masked_whiten(torch.full((2, 3), 0.7), one).abs().max() < 1e-6


@pytest.mark.parametrize(("value", "n"), [(100.1, 777), (0.1, 3001)])
def test_equal_values_whose_mean_rounds_whiten_to_zero(value, n):
    assert not masked_whiten(torch.full((1, n), value), torch.ones(1, n, dtype=torch.bool)).any()


def test_no_token_that_counts_gives_zero_and_no_gradient():
    values = torch.full((2, 2), float("nan"), requires_grad=True)
    mean = masked_mean(values, torch.zeros(2, 2, dtype=torch.bool))
    mean.backward()
    assert mean == 0 and torch.equal(values.grad, torch.zeros(2, 2))


@pytest.mark.parametrize("mask", [torch.ones(2, 3), torch.ones(3, 2, dtype=torch.bool)])
def test_a_float_mask_or_another_shape_is_refused(mask):
    with pytest.raises(ShapeError, match="mask has"):
        masked_mean(torch.zeros(2, 3), mask)


def test_matches_trl(trl_ppo, draw, mask_BT):
    values = draw(5, 7)
    torch.testing.assert_close(masked_mean(values, mask_BT), trl_ppo.function("masked_mean")(values, mask_BT))
    torch.testing.assert_close(masked_var(values, mask_BT), trl_ppo.function("masked_var")(values, mask_BT))
    theirs = trl_ppo.function("masked_whiten")
    torch.testing.assert_close(masked_whiten(values, mask_BT)[mask_BT], theirs(values, mask_BT)[mask_BT])
    # TRL adds the mean back after it has divided. Both are the values over one deviation, up to a constant a token.
    ours, kept = masked_whiten(values, mask_BT, shift_mean=False), theirs(values, mask_BT, shift_mean=False)
    mean = masked_mean(values, mask_BT)
    more = (mean * (1 - torch.rsqrt(masked_var(values, mask_BT) + 1e-8))).expand_as(values)
    torch.testing.assert_close((kept - ours)[mask_BT], more[mask_BT])
