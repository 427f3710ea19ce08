"""Where another β would lead, from completions of the policy as it is: no training, only weights.

The optimum of r − β·KL(π‖π_ref) is π*_β ∝ π_ref·exp(r/β) for each prompt. A completion that the policy π sampled counts
for π*_β with weight exp(r/β)·π_ref/π, normalised over the completions of its prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_nb.errors import ShapeError


@dataclass(frozen=True)
class Tilted:
    """Means over prompts."""

    reward: float
    """E over π*_β of r, score."""
    kl: float
    """KL(π*_β ‖ π_ref), nats a completion."""
    effective: float
    """Effective completions a prompt, 1/Σw², between 1 and G: how much of the sample carries the answer."""


def tilted(scores_PG: Tensor, log_ratio_PG: Tensor, beta: float, *, converged_at: float | None = None) -> Tilted:
    """Reward and KL of the optimum at β, by self-normalised importance weights.

    Args:
        scores_PG: (P, G) r of G completions of each of P prompts, sampled from π.
        log_ratio_PG: (P, G) log π(y|x) − log π_ref(y|x), nats.
        beta: β > 0, score per nat.
        converged_at: The β at which π is its optimum. The weights are then exp(r/β − r/β_now): the ratio is taken from
            the scores, which leaves the noise of the policy's own errors out.

    Raises:
        ShapeError: The shapes differ, or a prompt has fewer than two completions.
    """
    _check(scores_PG, log_ratio_PG)
    if beta <= 0:
        raise ValueError(f"beta={beta}: without a tether there is no optimum; give beta > 0")
    scores_PG, log_ratio_PG = scores_PG.double(), log_ratio_PG.double()
    if converged_at is not None:
        # At the optimum r/β − log ratio is log Z, one number a prompt.
        log_z_P1 = (scores_PG / converged_at - log_ratio_PG).mean(1, keepdim=True)
        log_ratio_PG = scores_PG / converged_at - log_z_P1
    log_weights_PG = scores_PG / beta - log_ratio_PG
    log_z_P = log_weights_PG.logsumexp(1) - torch.tensor(float(scores_PG.shape[1]), dtype=torch.float64).log()
    weights_PG = log_weights_PG.softmax(1)
    reward_P = (weights_PG * scores_PG).sum(1)
    # KL = E[log π*/π_ref] = E[r]/β − log Z; noise may take the estimate below what a KL can be.
    kl_P = (reward_P / beta - log_z_P).clamp(min=0)
    effective_P = 1 / weights_PG.square().sum(1)
    return Tilted(reward_P.mean().item(), kl_P.mean().item(), effective_P.mean().item())


def gap_variance(scores_PG: Tensor, log_ratio_PG: Tensor, beta: float) -> float:
    """Mean over prompts of the variance of r − β·log(π/π_ref) within a prompt, score²: zero exactly at the optimum.

    There r − β·log(π/π_ref) is β·log Z(x), the same for every completion. Near it, Var/(2β) is what is still to be
    gained, J(π*) − J(π) = β·KL(π‖π*).

    Args:
        scores_PG: (P, G), G ≥ 2.
        log_ratio_PG: (P, G) nats.
        beta: β ≥ 0; at 0 it is the variance of the scores.

    Raises:
        ShapeError: The shapes differ, or a prompt has fewer than two completions.
    """
    _check(scores_PG, log_ratio_PG)
    return (scores_PG.double() - beta * log_ratio_PG.double()).var(1).mean().item()


def _check(scores_PG: Tensor, log_ratio_PG: Tensor) -> None:
    if scores_PG.ndim != 2 or scores_PG.shape != log_ratio_PG.shape or scores_PG.shape[1] < 2:
        raise ShapeError(
            f"scores {tuple(scores_PG.shape)} and log-ratios {tuple(log_ratio_PG.shape)}: both are (P, G), G ≥ 2"
        )
