from __future__ import annotations

import itertools

import pytest
import torch

from rlhf_nb.errors import ShapeError
from rlhf_nb.maths.advantages import (
    flat_groups,
    gae,
    group_advantages,
    last_token,
    leave_one_out_advantages,
    returns_to_go,
    token_rewards,
)

ROW = torch.tensor([[True, True, False]])


def test_worked_example():
    # rewards 1, 2; values 0.5, 1; γ = 0.9, λ = 0.5: δ₁ = 2 − 1 = 1, δ₀ = 1 + 0.9·1 − 0.5 = 1.4, A₀ = 1.4 + 0.45 = 1.85
    rewards, values = torch.tensor([[1.0, 2.0, 7.0]]), torch.tensor([[0.5, 1.0, 7.0]])
    advantages, returns = gae(rewards, values, ROW, gamma=0.9, lam=0.5)
    torch.testing.assert_close(advantages, torch.tensor([[1.85, 1.0, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[2.35, 2.0, 0.0]]))


def test_score_stands_on_the_last_token_that_counts_and_a_row_sums_to_score_minus_beta_kl():
    kl_BT = torch.tensor([[0.1, 0.2, 9.0], [0.3, 0.0, -0.1]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    rewards = token_rewards(torch.tensor([1.0, 2.0]), kl_BT, mask, kl_coef=0.5)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 0.9, 0.0], [-0.15, 0.0, 2.05]]))
    torch.testing.assert_close(rewards.sum(1), torch.tensor([1 - 0.5 * 0.3, 2 - 0.5 * 0.2]))


def test_last_token_of_a_row_without_tokens_is_minus_one():
    assert last_token(torch.tensor([[True, True, False], [False, False, False]])).tolist() == [1, -1]
    assert token_rewards(torch.ones(1), torch.ones(1, 3), torch.zeros(1, 3, dtype=torch.bool), kl_coef=1).tolist() == [
        [0, 0, 0]
    ]


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_gae_lambda_one_is_return_minus_value(draw, mask_BT, gamma):
    rewards, values = draw(5, 7), draw(5, 7)
    advantages, returns = gae(rewards, values, mask_BT, gamma=gamma, lam=1.0)
    to_go = returns_to_go(rewards, mask_BT, gamma=gamma)
    torch.testing.assert_close(advantages, (to_go - values).masked_fill(~mask_BT, 0))
    torch.testing.assert_close(returns, to_go)


def test_gae_lambda_zero_is_the_one_step_error(draw, mask_BT):
    rewards, values = draw(5, 7), draw(5, 7)
    advantages, _ = gae(rewards, values, mask_BT, gamma=0.9, lam=0.0)
    following = torch.cat([values.masked_fill(~mask_BT, 0)[:, 1:], values.new_zeros(5, 1)], 1)
    torch.testing.assert_close(advantages, (rewards + 0.9 * following - values).masked_fill(~mask_BT, 0))


def test_gae_equals_its_definition_as_a_sum(draw):
    rewards, values = draw(2, 6), draw(2, 6)
    mask = torch.ones(2, 6, dtype=torch.bool)
    advantages, _ = gae(rewards, values, mask, gamma=0.9, lam=0.7)
    padded = torch.cat([values, values.new_zeros(2, 1)], 1)
    delta = rewards + 0.9 * padded[:, 1:] - values
    for t in range(6):
        expected = sum((0.9 * 0.7) ** k * delta[:, t + k] for k in range(6 - t))
        torch.testing.assert_close(advantages[:, t], expected)


def test_expected_advantage_is_zero_under_the_true_value():
    """Two steps, two tokens each, enumerated: V is the expectation of the return, so that E[A] = 0 at every state."""
    p = torch.tensor([0.3, 0.7], dtype=torch.float64)
    score = torch.tensor([[0.0, 1.0], [2.0, 5.0]], dtype=torch.float64)
    second = score @ p
    first = p @ second
    total = torch.zeros(2, dtype=torch.float64)
    for a, b in itertools.product(range(2), range(2)):
        rewards, values = torch.stack([score.new_zeros(()), score[a, b]])[None], torch.stack([first, second[a]])[None]
        advantages, _ = gae(rewards, values, torch.ones(1, 2, dtype=torch.bool), lam=0.4)
        total += p[a] * p[b] * advantages[0]
    torch.testing.assert_close(total, torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0)


def test_padding_contents_never_change_the_advantages(draw, mask_BT):
    rewards, values, kl_BT = draw(5, 7), draw(5, 7), draw(5, 7)
    bad = [x.masked_fill(~mask_BT, float("nan")) for x in (rewards, values, kl_BT)]
    for clean, dirty in zip(gae(rewards, values, mask_BT), gae(*bad[:2], mask_BT), strict=True):
        assert torch.equal(clean, dirty)
    assert torch.equal(returns_to_go(rewards, mask_BT), returns_to_go(bad[0], mask_BT))
    scores = draw(5)
    assert torch.equal(
        token_rewards(scores, kl_BT, mask_BT, kl_coef=0.1), token_rewards(scores, bad[2], mask_BT, kl_coef=0.1)
    )


def test_gae_matches_trl(trl_ppo, draw, mask_BT):
    # TRL leaves γ·V at EOS+1 to its padding; with padded values and rewards at 0 the recursions are the same.
    rewards, values = (draw(5, 7).masked_fill(~mask_BT, 0) for _ in range(2))
    args = type("Args", (), {"gamma": 0.97, "lam": 0.9})
    scope = trl_ppo.run(
        "lastgaelam = 0", "returns = advantages", rewards=rewards, values=values, responses=rewards, args=args
    )
    advantages, returns = gae(rewards, values, mask_BT, gamma=0.97, lam=0.9)
    torch.testing.assert_close(advantages[mask_BT], scope["advantages"][mask_BT])
    torch.testing.assert_close(returns[mask_BT], scope["returns"][mask_BT])


def test_group_advantages_worked_example():
    rewards = torch.tensor([[1.0, 3.0], [2.0, 2.0]])
    torch.testing.assert_close(group_advantages(rewards, scale="none"), torch.tensor([[-1.0, 1.0], [0.0, 0.0]]))
    torch.testing.assert_close(group_advantages(rewards), torch.tensor([[-(0.5**0.5), 0.5**0.5], [0.0, 0.0]]))


def test_group_rows_sum_to_zero_and_nan_stays_nan(draw):
    rewards = draw(3, 4)
    rewards[1, 2] = float("nan")
    advantages = group_advantages(rewards)
    assert advantages.isnan().sum() == 1 and advantages[1, 2].isnan()
    torch.testing.assert_close(advantages.nansum(1), torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)


def test_rewards_equal_but_for_rounding_give_no_advantage():
    nearly = torch.tensor([[0.1 + 0.2, 0.3, 0.3]], dtype=torch.float64)
    assert group_advantages(nearly).abs().max() == 0


def test_a_group_of_one_is_refused():
    with pytest.raises(ShapeError, match="G ≥ 2"):
        group_advantages(torch.zeros(3, 1))


def test_scores_for_another_number_of_completions_are_refused():
    with pytest.raises(ShapeError, match="2 completions"):
        token_rewards(torch.zeros(3), torch.zeros(2, 4), torch.ones(2, 4, dtype=torch.bool), kl_coef=0.1)


def test_left_out_each_is_compared_with_the_mean_of_the_others():
    # 3 against 1/3, 0 against 4/3, 1 against 1.
    rewards = torch.tensor([[3.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    expected = torch.tensor([[8 / 3, -4 / 3, -4 / 3, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(leave_one_out_advantages(rewards), expected)


def test_a_group_is_flat_where_nothing_but_rounding_tells_its_rewards_apart():
    rewards = torch.tensor([[0.1 + 0.2, 0.3], [0.0, 0.0], [0.0, 1e-9]], dtype=torch.float64)
    assert flat_groups(rewards).tolist() == [True, True, False]


def test_leaving_one_out_of_one_is_refused():
    with pytest.raises(ShapeError, match="G ≥ 2"):
        leave_one_out_advantages(torch.zeros(3, 1))
