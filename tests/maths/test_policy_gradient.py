from __future__ import annotations

import itertools
import math

import pytest
import torch

from rlhf_nb.errors import ShapeError
from rlhf_nb.maths.masked import masked_mean
from rlhf_nb.maths.policy_gradient import (
    clipped_policy_loss,
    clipped_sequence_loss,
    clipped_value_loss,
    truncated_importance,
)

ON = torch.ones(1, 1, dtype=torch.bool)


def one(*values: float) -> list[torch.Tensor]:
    return [torch.tensor([[v]], dtype=torch.float64) for v in values]


def test_worked_example():
    # ρ = 1.5, A = 2, ε = 0.2: −min(3, 2.4) = −2.4, clipped. ρ = 1.5, A = −2: −min(−3, −2.4) = 3, not clipped.
    for advantage, loss, clipped in ((2, -2.4, True), (-2, 3.0, False)):
        new, old, A = one(math.log(1.5), 0.0, advantage)
        result = clipped_policy_loss(new, old, A, ON, cliprange=0.2)
        assert result.loss_BT.item() == pytest.approx(loss) and result.clipped_BT.item() is clipped


def test_the_range_above_one_may_be_wider_than_the_one_below():
    # ε 0.2 and 0.5. ρ = 1.4, A = 1: inside the wider range, −1.4. ρ = 0.7, A = −1: below 0.8, clipped: 0.8.
    for ratio, advantage, loss, clipped in ((1.4, 1, -1.4, False), (0.7, -1, 0.8, True)):
        new, old, A = one(math.log(ratio), 0.0, advantage)
        result = clipped_policy_loss(new, old, A, ON, cliprange=0.2, cliprange_high=0.5)
        assert result.loss_BT.item() == pytest.approx(loss) and result.clipped_BT.item() is clipped


@pytest.mark.parametrize(("length_normalised", "ratio"), [(True, math.exp(0.1)), (False, math.exp(0.2))])
def test_a_completion_s_ratio_is_the_exponential_of_the_mean_or_of_the_sum(length_normalised, ratio):
    # Two tokens that count, 0.3 and −0.1 nats apart; the third is padding. A = 2.
    new = torch.tensor([[0.3, -0.1, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False]])
    result = clipped_sequence_loss(
        new, torch.zeros_like(new), torch.tensor([2.0], dtype=torch.float64), mask, cliprange=0.5,
        length_normalised=length_normalised,
    )  # fmt: skip
    assert result.loss_BT.tolist() == [pytest.approx([-2 * ratio, -2 * ratio, 0.0])]
    assert not result.clipped_BT.any()


def test_one_token_a_completion_makes_token_and_completion_the_same(draw):
    new, old, advantages = draw(6, 1), draw(6, 1), draw(6, 1)
    mask = torch.ones(6, 1, dtype=torch.bool)
    token = clipped_policy_loss(new, old, advantages, mask, cliprange=0.2, cliprange_high=0.3)
    for normalised in (True, False):
        whole = clipped_sequence_loss(
            new, old, advantages[:, 0], mask, cliprange=0.2, cliprange_high=0.3, length_normalised=normalised
        )
        torch.testing.assert_close(whole.loss_BT, token.loss_BT)
        assert torch.equal(whole.clipped_BT, token.clipped_BT)


def test_what_stands_in_the_pads_never_changes_a_completion_s_loss(draw, mask_BT):
    new, old, advantages = draw(5, 7), draw(5, 7), draw(5)
    dirty = [tensor.masked_fill(~mask_BT, float("nan")) for tensor in (new, old)]
    settings = {"cliprange": 0.2, "length_normalised": True}
    torch.testing.assert_close(
        clipped_sequence_loss(*dirty, advantages, mask_BT, **settings).loss_BT,
        clipped_sequence_loss(new, old, advantages, mask_BT, **settings).loss_BT,
    )


def test_advantages_of_another_number_of_completions_are_refused(draw, mask_BT):
    with pytest.raises(ShapeError, match="5 completions"):
        clipped_sequence_loss(draw(5, 7), draw(5, 7), draw(4), mask_BT, cliprange=0.2, length_normalised=True)


def test_gradient_at_the_behavior_policy_is_the_policy_gradient(draw, mask_BT):
    logprobs, advantages = (-draw(5, 7).abs()).requires_grad_(), draw(5, 7)
    clipped_policy_loss(logprobs, logprobs.detach(), advantages, mask_BT, cliprange=0.2).loss_BT.sum().backward()
    torch.testing.assert_close(logprobs.grad, (-advantages).masked_fill(~mask_BT, 0))


def test_expected_gradient_is_the_gradient_of_the_expected_reward():
    """Over a three-token vocabulary, enumerated: ∇ Σ π r equals −∇ loss at the policy that sampled."""
    logits = torch.tensor([0.2, -0.4, 0.9], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([1.0, 0.2, -0.5], dtype=torch.float64)
    logprobs = logits.log_softmax(-1)
    expected = torch.autograd.grad((logprobs.exp() * rewards).sum(), logits, retain_graph=True)[0]
    loss = sum(
        logprobs[v].exp().detach()
        * clipped_policy_loss(
            logprobs[v].view(1, 1), logprobs[v].detach().view(1, 1), rewards[v].view(1, 1), ON, cliprange=0.2
        ).loss_BT.sum()
        for v in range(3)
    )
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], -expected)


def test_gradient_vanishes_exactly_where_a_token_is_counted_as_clipped(draw):
    logprobs, behavior, advantages = draw(40, 5).requires_grad_(), draw(40, 5), draw(40, 5)
    mask = torch.ones(40, 5, dtype=torch.bool)
    result = clipped_policy_loss(logprobs, behavior, advantages, mask, cliprange=0.2)
    result.loss_BT.sum().backward()
    assert (
        torch.equal(logprobs.grad == 0, result.clipped_BT) and result.clipped_BT.any() and not result.clipped_BT.all()
    )


def test_value_loss_worked_example():
    # V = 2, V_old = 1, R = 3, ε = 0.5: V clips to 1.5; ½·max(1, 2.25) = 1.125, and the gradient is gone.
    value, old, target = one(2.0, 1.0, 3.0)
    value.requires_grad_()
    result = clipped_value_loss(value, old, target, ON, cliprange_value=0.5)
    result.loss_BT.sum().backward()
    assert result.loss_BT.item() == 1.125 and result.clipped_BT.item() is True and value.grad.item() == 0


def test_value_loss_without_clipping_is_half_the_squared_error(draw, mask_BT):
    values, old, returns = draw(5, 7).requires_grad_(), draw(5, 7), draw(5, 7)
    result = clipped_value_loss(values, old, returns, mask_BT, cliprange_value=math.inf)
    result.loss_BT.sum().backward()
    torch.testing.assert_close(values.grad, (values - returns).detach().masked_fill(~mask_BT, 0))
    assert not result.clipped_BT.any()


def test_padding_contents_never_change_losses_gradients_or_clip_fractions(draw, mask_BT):
    tensors = [draw(5, 7) for _ in range(3)]
    bad = [t.masked_fill(~mask_BT, float("nan")) for t in tensors]
    for loss, kwargs in ((clipped_policy_loss, {"cliprange": 0.2}), (clipped_value_loss, {"cliprange_value": 0.2})):
        grads, results = [], []
        for first, *rest in (tensors, bad):
            leaf = first.clone().requires_grad_()
            result = loss(leaf, *rest, mask_BT, **kwargs)
            masked_mean(result.loss_BT, mask_BT).backward()
            grads.append(leaf.grad)
            results.append(result)
        assert torch.equal(results[0].loss_BT, results[1].loss_BT) and torch.equal(*grads)
        assert torch.equal(results[0].clipped_BT, results[1].clipped_BT) and not results[1].clipped_BT[~mask_BT].any()


def test_a_row_at_a_time_sums_to_the_whole_batch(draw, mask_BT):
    new, old, advantages = draw(5, 7), draw(5, 7), draw(5, 7)
    whole = clipped_policy_loss(new, old, advantages, mask_BT, cliprange=0.2).loss_BT.sum()
    rows = sum(
        clipped_policy_loss(new[[i]], old[[i]], advantages[[i]], mask_BT[[i]], cliprange=0.2).loss_BT.sum()
        for i in range(5)
    )
    torch.testing.assert_close(whole, rows)


def test_matches_trl(trl_ppo, draw, mask_BT):
    new, old, advantages, values, old_values, returns = (draw(5, 7) for _ in range(6))
    args = type("Args", (), {"cliprange": 0.2, "cliprange_value": 0.3, "vf_coef": 0.1})
    micro_batch_inds = torch.arange(5)
    common = {
        "args": args, "micro_batch_inds": micro_batch_inds, "padding_mask": ~mask_BT, "padding_mask_p1": ~mask_BT,
        "vpred": values, "mb_values": old_values, "mb_return": returns, "new_logprobs": new, "mb_logprobs": old,
        "mb_advantage": advantages,
    }  # fmt: skip
    scope = trl_ppo.run("vpredclipped = torch.clamp", "loss = pg_loss", **common)
    policy = clipped_policy_loss(new, old, advantages, mask_BT, cliprange=0.2)
    value = clipped_value_loss(values, old_values, returns, mask_BT, cliprange_value=0.3)
    torch.testing.assert_close(masked_mean(policy.loss_BT, mask_BT), scope["pg_loss"])
    torch.testing.assert_close(masked_mean(value.loss_BT, mask_BT), scope["vf_loss"])
    torch.testing.assert_close(masked_mean(value.clipped_BT.double(), mask_BT), scope["vf_clipfrac"].double())
    theirs = masked_mean((scope["pg_losses2"] > scope["pg_losses"]).double(), mask_BT)
    torch.testing.assert_close(masked_mean(policy.clipped_BT.double(), mask_BT), theirs)


def test_shapes_that_differ_are_refused():
    for shapes in itertools.permutations([(2, 3), (2, 3), (3, 2)]):
        with pytest.raises(ShapeError):
            clipped_policy_loss(*(torch.zeros(s) for s in shapes), torch.ones(2, 3, dtype=torch.bool), cliprange=0.2)


# --- another engine samples than trains -------------------------------------------------------------------------------


def test_weighted_by_importance_the_gradient_is_that_of_the_trainer_s_policy_whoever_sampled():
    """Over a three-token vocabulary, enumerated, with a sampler at temperature 2."""
    logits = torch.tensor([[0.2, -0.4, 0.9]], dtype=torch.float64).T.requires_grad_()
    logprobs = logits.log_softmax(0)
    sampler, on = (logits.detach() / 2).log_softmax(0), torch.ones(3, 1, dtype=torch.bool)
    rewards = torch.tensor([[1.0], [0.2], [-0.5]], dtype=torch.float64)
    expected = torch.autograd.grad((logprobs.exp() * rewards).sum(), logits, retain_graph=True)[0]

    def gradient(cap: float | None) -> torch.Tensor:
        loss = clipped_policy_loss(logprobs, logprobs.detach(), rewards, on, cliprange=0.2).loss_BT
        if cap is not None:
            loss = loss * truncated_importance(logprobs, sampler, on, cap=cap)
        return -torch.autograd.grad((sampler.exp() * loss).sum(), logits, retain_graph=True)[0]

    torch.testing.assert_close(gradient(math.inf), expected)
    torch.testing.assert_close(gradient(2.0), expected)
    assert not torch.allclose(gradient(None), expected) and not torch.allclose(gradient(1.0), expected)


def test_importance_is_one_where_both_agree_capped_where_they_do_not_and_never_read_from_pads(draw, mask_BT):
    logprobs = -draw(5, 7).abs()
    weight = truncated_importance(logprobs, logprobs.masked_fill(~mask_BT, math.nan), mask_BT, cap=2.0)
    assert (weight == 1).all()
    weight = truncated_importance(logprobs, logprobs - 1.0, mask_BT, cap=2.0)
    assert (weight[mask_BT] == 2.0).all() and not weight.requires_grad
    torch.testing.assert_close(
        truncated_importance(logprobs, logprobs + 0.5, mask_BT, cap=2.0)[mask_BT],
        torch.full_like(logprobs, math.exp(-0.5))[mask_BT],
    )
