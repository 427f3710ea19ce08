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


def test_nan_under_the_mask_changes_neither_value_nor_gradient(draw, mask_BT):
    clean = draw(5, 7).requires_grad_()
    dirty = clean.detach().masked_fill(~mask_BT, float("nan")).requires_grad_()
    for function in (masked_sum, masked_mean, masked_var, lambda v, m: masked_whiten(v, m).pow(3).sum()):
        a, b = function(clean, mask_BT), function(dirty, mask_BT)
        assert a == b
        ga, gb = torch.autograd.grad(a, clean)[0], torch.autograd.grad(b, dirty)[0]
        assert torch.equal(ga, gb) and gb.isfinite().all()


def test_whitened_values_have_mean_zero_and_sample_variance_one(draw, mask_BT):
    white = masked_whiten(3 + 2 * draw(5, 7), mask_BT)[mask_BT]
    assert white.mean().item() == pytest.approx(0, abs=1e-12) and white.var().item() == pytest.approx(1, abs=1e-7)


def test_whitening_without_the_shift_keeps_the_mean(draw, mask_BT):
    values = 3 + 2 * draw(5, 7)
    assert masked_whiten(values, mask_BT, shift_mean=False)[mask_BT].mean().item() == pytest.approx(
        values[mask_BT].mean().item()
    )


def test_equal_values_whiten_to_zero_and_one_value_too():
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert masked_whiten(torch.full((2, 3), 0.7), mask).abs().max() < 1e-2
    one = torch.zeros(2, 3, dtype=torch.bool).index_fill(1, torch.tensor([0]), True) & torch.tensor([[True], [False]])
    assert masked_whiten(torch.full((2, 3), 0.7), one).abs().max() < 1e-6


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
    for shift in (True, False):
        theirs = trl_ppo.function("masked_whiten")(values, mask_BT, shift_mean=shift)
        torch.testing.assert_close(masked_whiten(values, mask_BT, shift_mean=shift)[mask_BT], theirs[mask_BT])
