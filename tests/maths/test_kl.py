from __future__ import annotations

import math

import pytest
import torch

from rlhf_nb.errors import ShapeError
from rlhf_nb.maths import kl

P = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
Q = torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64).log()


def test_worked_example():
    # 0.5·ln 2 + 0.3·ln 1.2 + 0.2·ln 0.4
    assert kl.exact(P, Q).item() == pytest.approx(0.5 * math.log(2) + 0.3 * math.log(1.2) + 0.2 * math.log(0.4))


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_equal_exact_kl_over_a_three_token_vocabulary(estimator):
    expected = (P.exp() * kl.estimate(P, Q, estimator)).sum()
    torch.testing.assert_close(expected, kl.exact(P, Q), rtol=1e-12, atol=0)


def test_k2_is_right_to_second_order():
    near = (P + 1e-3 * torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)).log_softmax(-1)
    expected = (P.exp() * kl.estimate(P, near, "k2")).sum()
    assert expected.item() == pytest.approx(kl.exact(P, near).item(), rel=1e-2)
    assert expected.item() > 0


def test_k2_and_k3_are_never_negative_and_k1_can_be():
    assert (kl.estimate(P, Q, "k1") < 0).any()
    assert (kl.estimate(P, Q, "k2") >= 0).all() and (kl.estimate(P, Q, "k3") >= 0).all()


def test_every_estimator_is_zero_at_the_reference():
    for estimator in ("k1", "k2", "k3"):
        assert (kl.estimate(P, P, estimator) == 0).all()
    assert kl.exact(P, P) == 0


def test_a_token_the_policy_never_gives_adds_nothing():
    sure = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64).log()
    assert kl.exact(sure, Q).item() == pytest.approx(math.log(4))
    assert kl.exact(Q, sure).item() == math.inf


def test_matches_trl(trl_ppo, draw):
    # TRL's padding handling stands apart; only its estimator lines run here.
    reference, policy = draw(4, 6), draw(4, 6)
    for estimator in ("k1", "k3"):
        args = type("Args", (), {"kl_estimator": estimator, "kl_coef": 0.3})
        scope = trl_ppo.run(
            "logr = ref_logprobs", "non_score_reward =", ref_logprobs=reference, logprobs=policy, args=args
        )
        torch.testing.assert_close(kl.estimate(policy, reference, estimator), scope["kl"])


def test_gibbs_is_better_than_any_other_policy_by_beta_times_the_kl(draw):
    reference, rewards, beta = draw(8).log_softmax(-1), draw(8), 0.3
    star = kl.gibbs(reference, rewards, beta)

    def objective(policy):
        return (policy.exp() * rewards).sum() - beta * kl.exact(policy, reference)

    for _ in range(5):
        other = draw(8).log_softmax(-1)
        torch.testing.assert_close(
            objective(star) - objective(other), beta * kl.exact(other, star), rtol=1e-10, atol=1e-12
        )


def test_gibbs_without_a_tether_is_refused():
    with pytest.raises(ValueError, match="kl_coef=0"):
        kl.gibbs(P, Q, 0)


def test_shapes_that_differ_are_refused():
    for call in (kl.estimate, kl.exact):
        with pytest.raises(ShapeError):
            call(torch.zeros(2), torch.zeros(3))
