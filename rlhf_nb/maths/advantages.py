"""Credit: from a score per completion to an advantage per token."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlhf_nb.errors import ShapeError
from rlhf_nb.maths.masked import check_mask, fill


def last_token(mask_BT: Tensor) -> Tensor:
    """(B,) index of each row's last token that counts; −1 for a row without any."""
    positions = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    return torch.where(mask_BT, positions, -1).amax(dim=1)


def token_rewards(scores_B: Tensor, kl_BT: Tensor, mask_BT: Tensor, *, kl_coef: float) -> Tensor:
    """What PPO optimises: −β·k1 at every token, and the score at the last one.

    Ziegler et al. 2019, arXiv:1909.08593, eq. 2. TRL 1.12 places the score one token after EOS; here it stands on the
    last token that counts, which is EOS itself, or the last token of a completion cut at its limit.

    Args:
        scores_B: (B,) of the whole completion, penalties included.
        kl_BT: (B, T) per-token k1, nats, of the policy that sampled.
        mask_BT: (B, T) bool.
        kl_coef: β, score per nat.

    Returns:
        (B, T); 0 where the mask is False. A row sums to score − β·Σ k1. A row without tokens is 0: its score is lost.

    Raises:
        ShapeError: The shapes do not fit.
    """
    check_mask(kl_BT, mask_BT)
    if scores_B.shape != mask_BT.shape[:1]:
        raise ShapeError(f"scores have shape {tuple(scores_B.shape)} for {mask_BT.shape[0]} completions")
    rewards_BT = -kl_coef * fill(kl_BT, mask_BT)
    last_B = last_token(mask_BT)
    is_last_BT = torch.arange(mask_BT.shape[1], device=mask_BT.device) == last_B[:, None]
    return rewards_BT + torch.where(is_last_BT, scores_B[:, None].to(rewards_BT.dtype), 0.0)


def returns_to_go(rewards_BT: Tensor, mask_BT: Tensor, *, gamma: float = 1.0) -> Tensor:
    """(B, T) discounted sum of the rewards from each token on; 0 where the mask is False."""
    rewards_BT = fill(rewards_BT, mask_BT)
    running_B = torch.zeros_like(rewards_BT[:, 0])
    returns = []
    for t in reversed(range(rewards_BT.shape[1])):
        running_B = rewards_BT[:, t] + gamma * running_B
        returns.append(running_B)
    return fill(torch.stack(returns[::-1], dim=1), mask_BT)


def gae(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation over completions that end.

    Schulman et al. 2015, arXiv:1506.02438, eq. 16. δ_t = r_t + γ·V_{t+1} − V_t and A_t = δ_t + γλ·A_{t+1}; the value
    after the last token is 0, whether the completion ended by itself or was cut: its score has judged it as it is.

    Args:
        rewards_BT: (B, T).
        values_BT: (B, T), V_t before token t is taken.
        mask_BT: (B, T) bool; a row's True tokens are contiguous.
        gamma: Discount per token, in (0, 1].
        lam: λ in [0, 1]: 0 trusts the value model most, 1 gives return − value.

    Returns:
        (advantages_BT, returns_BT); returns are advantages + values. Both 0 where the mask is False.

    Raises:
        ShapeError: The shapes differ, or the mask is not bool.
    """
    check_mask(values_BT, mask_BT)
    rewards_BT, values_BT = fill(rewards_BT, mask_BT), fill(values_BT, mask_BT)
    advantage_B = next_value_B = torch.zeros_like(rewards_BT[:, 0])
    advantages = []
    for t in reversed(range(rewards_BT.shape[1])):
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        advantage_B = delta_B + gamma * lam * advantage_B
        next_value_B = values_BT[:, t]
        advantages.append(advantage_B)
    advantages_BT = fill(torch.stack(advantages[::-1], dim=1), mask_BT)
    return advantages_BT, fill(advantages_BT + values_BT, mask_BT)


def group_advantages(rewards_PG: Tensor, *, scale: Literal["none", "std"] = "std") -> Tensor:
    """Advantage of each completion over the others for the same prompt.

    GRPO, arXiv:2402.03300 §4.1; `scale="none"` is Dr. GRPO, arXiv:2503.20783.

    Args:
        rewards_PG: (P, G) float, any unit. NaN marks a completion no reward function scored.
        scale: Divide by the group's sample standard deviation, or only centre.

    Returns:
        (P, G). Rows sum to 0. A group whose rewards are all equal gives zeros; NaN stays NaN.

    Raises:
        ShapeError: G < 2, where a group baseline does not exist.
    """
    if rewards_PG.ndim != 2 or rewards_PG.shape[1] < 2:
        raise ShapeError(f"rewards have shape {tuple(rewards_PG.shape)}; a group baseline needs (P, G) with G ≥ 2")
    scored_PG = ~rewards_PG.isnan()
    count_P1 = scored_PG.sum(1, keepdim=True)
    filled_PG = fill(rewards_PG, scored_PG)
    mean_P1 = filled_PG.sum(1, keepdim=True) / count_P1.clamp(min=1)
    centred_PG = fill(filled_PG - mean_P1, scored_PG)
    if scale == "std":
        std_P1 = (centred_PG.square().sum(1, keepdim=True) / (count_P1 - 1).clamp(min=1)).sqrt()
        smallest_P1 = rounding(filled_PG, dim=1)
        centred_PG = torch.where(std_P1 > smallest_P1, centred_PG / std_P1.clamp(min=1e-12), 0.0)
    return centred_PG.masked_fill(~scored_PG, float("nan"))


def rounding(values: Tensor, *, dim: int | None = None) -> Tensor:
    """The spread that rounding alone can give numbers of this size. Dividing by less would invent an advantage.

    Args:
        values: Float, any shape, finite.
        dim: Along which they are compared, kept with length 1; None compares all.
    """
    largest = values.abs().amax() if dim is None else values.abs().amax(dim, keepdim=True)
    return 4 * torch.finfo(values.dtype).eps * largest


def leave_one_out_advantages(rewards_PG: Tensor) -> Tensor:
    """Each completion's reward less the mean of the others' for the same prompt: G/(G − 1) times the centred one.

    RLOO, Ahmadian et al. 2024, arXiv:2402.14740, §3.3; Kool et al. 2019.

    Args:
        rewards_PG: (P, G) float, finite, any unit.

    Returns:
        (P, G). Rows sum to 0.

    Raises:
        ShapeError: G < 2, where there are no others.
    """
    if rewards_PG.ndim != 2 or rewards_PG.shape[1] < 2:
        raise ShapeError(f"rewards have shape {tuple(rewards_PG.shape)}; leaving one out needs (P, G) with G ≥ 2")
    G = rewards_PG.shape[1]
    return (rewards_PG - rewards_PG.mean(1, keepdim=True)) * (G / (G - 1))


def flat_groups(rewards_PG: Tensor) -> Tensor:
    """(P,) bool: groups whose rewards are all one, up to rounding: every advantage in them is 0."""
    spread_P = rewards_PG.amax(1) - rewards_PG.amin(1)
    return spread_P <= 4 * torch.finfo(rewards_PG.dtype).eps * rewards_PG.abs().amax(1)
