"""KTO, ORPO and SimPO: closed forms, worked examples, gradients."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_nb.errors import ShapeError
from rlhf_nb.maths.preference import kto_loss, orpo_loss, simpo_loss


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_kto_at_the_reference_point_is_half_of_each_weight():
    loss = kto_loss(t(0.3, 0.3), torch.tensor([True, False]), t(0.3)[0], beta=0.7, desirable_weight=2.0)
    torch.testing.assert_close(loss, t(1.0, 0.5))


def test_kto_worked_example():
    # β(h − z₀) = 0.5·(2 − 1) = 0.5: σ(−0.5) = 0.3775407 for a thumb up; 1.33·σ(0.5) = 0.8278709 for a thumb down
    loss = kto_loss(t(2, 2), torch.tensor([True, False]), t(1)[0], beta=0.5, undesirable_weight=1.33)
    torch.testing.assert_close(loss, t(0.37754066879814546, 0.8278709104984668))


def test_kto_raises_what_got_a_thumb_up_and_lowers_what_got_a_thumb_down():
    h = t(0.1, 0.1).requires_grad_()
    kto_loss(h, torch.tensor([True, False]), t(0.0)[0], beta=0.1).sum().backward()
    assert h.grad[0] < 0 < h.grad[1]
    assert h.grad[0] == pytest.approx(-0.1 * torch.sigmoid(t(0.01))[0].item() * torch.sigmoid(t(-0.01))[0].item())


def test_kto_refuses_labels_of_another_shape():
    with pytest.raises(ShapeError, match="labels"):
        kto_loss(t(1, 2), torch.tensor([True]), t(0)[0], beta=0.1)


def test_orpo_of_equal_sides_is_beta_log_two():
    torch.testing.assert_close(orpo_loss(t(-1.5), t(-1.5), beta=0.3), t(0.3 * math.log(2)))


def test_orpo_worked_example():
    # p = 0.5 has odds 1, p = 0.2 has odds 0.25: log odds ratio log 4, −log σ(log 4) = log(1 + 1/4)
    torch.testing.assert_close(orpo_loss(t(math.log(0.5)), t(math.log(0.2)), beta=1.0), t(math.log(1.25)))


def test_orpo_near_certainty_stays_finite():
    assert torch.isfinite(orpo_loss(t(-1e-7), t(-30.0), beta=1.0)).all()


def test_simpo_at_its_margin_is_log_two():
    torch.testing.assert_close(simpo_loss(t(-1.0), t(-1.5), beta=2.0, gamma=1.0), t(math.log(2)))


def test_simpo_worked_example():
    # 2·(−1 − −2) − 0.5 = 1.5: −log σ(1.5) = 0.2014133; smoothed by 0.1: 0.9·0.2014133 + 0.1·1.7014133
    torch.testing.assert_close(simpo_loss(t(-1.0), t(-2.0), beta=2.0, gamma=0.5), t(0.20141327798275246))
    smooth = simpo_loss(t(-1.0), t(-2.0), beta=2.0, gamma=0.5, label_smoothing=0.1)
    torch.testing.assert_close(smooth, t(0.35141327798275245))


def test_simpo_raises_the_chosen_as_much_as_it_lowers_the_rejected():
    chosen, rejected = t(-1.0).requires_grad_(), t(-2.0).requires_grad_()
    simpo_loss(chosen, rejected, beta=2.0, gamma=0.5).sum().backward()
    assert chosen.grad.item() == pytest.approx(-rejected.grad.item()) and chosen.grad.item() < 0
