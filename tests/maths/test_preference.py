from __future__ import annotations

import math

import pytest
import torch

from rlhf_nb.errors import ShapeError
from rlhf_nb.maths.preference import bradley_terry_loss, dpo_loss, ipo_loss, preference_probability, sequence_logprobs


def test_at_the_reference_loss_is_log_two(draw):
    chosen, rejected = draw(4), draw(4)
    torch.testing.assert_close(
        dpo_loss(chosen, rejected, chosen, rejected, beta=0.3), torch.full((4,), math.log(2), dtype=torch.float64)
    )


def test_gradient_on_chosen_at_the_reference_is_minus_half_beta(draw):
    chosen, rejected = draw(4).requires_grad_(), draw(4).requires_grad_()
    dpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), beta=0.3).sum().backward()
    torch.testing.assert_close(chosen.grad, torch.full((4,), -0.15, dtype=torch.float64))
    torch.testing.assert_close(rejected.grad, torch.full((4,), 0.15, dtype=torch.float64))


def test_worked_example():
    # margin = 0.5 · ((−10 − −11) − (−12 − −11)) = 1  →  −log σ(1) = 0.3132617
    values = [torch.tensor([v], dtype=torch.float64) for v in (-10.0, -12.0, -11.0, -11.0)]
    assert dpo_loss(*values, beta=0.5).item() == pytest.approx(0.3132617, abs=1e-7)
    # smoothing 0.1: 0.9 · 0.3132617 + 0.1 · 1.3132617
    assert dpo_loss(*values, beta=0.5, label_smoothing=0.1).item() == pytest.approx(0.4132617, abs=1e-7)


def test_swapping_chosen_and_rejected_swaps_the_probability(draw):
    a, b, c, d = (draw(4) for _ in range(4))
    torch.testing.assert_close(
        torch.exp(-dpo_loss(a, b, c, d, beta=0.7)) + torch.exp(-dpo_loss(b, a, d, c, beta=0.7)),
        torch.ones(4, dtype=torch.float64),
    )


def test_ipo_worked_example():
    # h = (−10 − −11) − (−12 − −11) = 2, asked for 1/(2·0.5) = 1  →  (2 − 1)² = 1
    values = [torch.tensor([v], dtype=torch.float64) for v in (-10.0, -12.0, -11.0, -11.0)]
    assert ipo_loss(*values, beta=0.5).item() == 1.0
    # At the margin it asks for nothing is left, and its gradient is zero there.
    assert ipo_loss(*values, beta=0.25).item() == 0.0


def test_ipo_at_the_reference_asks_for_its_margin(draw):
    chosen, rejected = draw(4).requires_grad_(), draw(4).requires_grad_()
    loss = ipo_loss(chosen, rejected, chosen.detach(), rejected.detach(), beta=0.2)
    torch.testing.assert_close(loss, torch.full((4,), 6.25, dtype=torch.float64))
    loss.sum().backward()
    # d/dh (h − 1/2β)² at h = 0 is −1/β.
    torch.testing.assert_close(chosen.grad, torch.full((4,), -5.0, dtype=torch.float64))
    torch.testing.assert_close(rejected.grad, torch.full((4,), 5.0, dtype=torch.float64))


def test_bradley_terry_is_minus_log_preference_probability(draw):
    chosen, rejected = draw(4), draw(4)
    torch.testing.assert_close(bradley_terry_loss(chosen, rejected), -preference_probability(chosen - rejected).log())
    assert bradley_terry_loss(
        *[torch.tensor([v]) for v in (2.0, 1.0)], margins_B=torch.tensor([1.0])
    ).item() == pytest.approx(math.log(2))


def test_sum_and_mean_of_token_logprobs_ignore_padding():
    logprobs = torch.tensor([[-1.0, -2.0, float("nan")], [float("nan")] * 3])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    assert sequence_logprobs(logprobs, mask).tolist() == [-3.0, 0.0]
    assert sequence_logprobs(logprobs, mask, average=True).tolist() == [-1.5, 0.0]


def test_shapes_that_differ_are_refused():
    with pytest.raises(ShapeError):
        dpo_loss(torch.zeros(2), torch.zeros(2), torch.zeros(2), torch.zeros(1), beta=0.1)
    with pytest.raises(ShapeError):
        bradley_terry_loss(torch.zeros(2), torch.zeros(3))
