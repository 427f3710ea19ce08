"""What another kl_coef would lead to, told before anybody moves it: from completions drawn for the purpose."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from rlhf_nb.maths.masked import masked_sum
from rlhf_nb.maths.reweighting import gap_variance, tilted
from rlhf_nb.protocol.control import Preview
from rlhf_nb.protocol.events import Prediction, Previewed
from rlhf_nb.training.rollout.base import uniforms
from rlhf_nb.training.rollout.transformers_backend import pad_left

if TYPE_CHECKING:
    from rlhf_nb.training.online import OnlineTrainer
    from rlhf_nb.training.online_types import Rollout

STREAM = 3 << 60
"""Far above any rollout's number: a preview never draws a number that training draws."""
NEAR = 0.05
"""Nats from the optimum at which the run counts as converged: Var(r − β·log ratio)/(2β²) ≈ KL(π‖π*)."""


def answer(trainer: OnlineTrainer, request: Preview) -> Previewed:
    """Rank 0 draws and scores; the policy's own optimum at each β is read off by weights."""
    rollout = _drawn(trainer, request)
    score_PG = trainer.method.penalised(rollout, trainer.live).view(-1, request.samples)
    log_ratio_B = masked_sum(rollout.behavior_logprobs_BT - rollout.reference_logprobs_BT, rollout.mask_BT, 1)
    log_ratio_PG = log_ratio_B.view(-1, request.samples)
    now, at = getattr(trainer.live, trainer.method.tether), trainer.method.settles_at
    variance = gap_variance(score_PG, log_ratio_PG, at(now))
    near = now > 0 and variance / (2 * at(now) ** 2) < NEAR
    predictions = []
    for value in request.values:
        found = tilted(score_PG, log_ratio_PG, at(value), converged_at=at(now) if near else None)
        predictions.append(Prediction(value=value, reward=found.reward, kl=found.kl, effective=found.effective))
    return Previewed(
        id=request.id,
        name=request.name,
        step=trainer.step,
        now=now,
        reward=score_PG.mean().item(),
        kl=log_ratio_PG.mean().item(),
        gap=variance / (2 * at(now)) if now > 0 else None,
        converged=near,
        prompts=len(score_PG),
        samples=request.samples,
        predictions=predictions,
    )


def _drawn(trainer: OnlineTrainer, request: Preview) -> Rollout:
    from rlhf_nb.training.online_types import Rollout

    method, temperature = trainer.method, trainer.temperature
    chance = np.random.default_rng([method.seed, trainer.step, 5])
    P = min(request.prompts, len(trainer.rows))
    chosen = chance.choice(len(trainer.rows), P, replace=False).tolist()
    indices = [index for index in chosen for _ in range(request.samples)]
    prompts = [trainer.prompt_ids[index] for index in indices]
    noise = uniforms(method.seed, STREAM + trainer.step, range(len(indices)), method.max_new_tokens)
    trainer.sampler.refresh(trainer.step)
    sampled = trainer.sampler.sample(prompts, noise, temperature=temperature)
    texts = trainer.texts(sampled.tokens_BT, sampled.mask_BT)
    scores_BM = torch.tensor(trainer.scoring.scores([trainer.rows[index] for index in indices], texts))
    compared = trainer.reference_scores(indices)
    tokens_BP, seen_BP = pad_left(prompts, trainer.tokenizer.pad_token_id, trainer.device)
    tokens_BL = torch.cat([tokens_BP, sampled.tokens_BT], 1)
    seen_BL = torch.cat([seen_BP, sampled.mask_BT], 1)
    parts = torch.arange(len(indices), device=trainer.device).split(trainer.micro(len(indices)))
    reference = [
        trainer.reference.logprobs(tokens_BL[rows], seen_BL[rows], sampled.mask_BT[rows], temperature=temperature)
        for rows in parts
    ]
    return Rollout(
        tokens_BL=tokens_BL,
        attention_mask_BL=seen_BL,
        mask_BT=sampled.mask_BT,
        behavior_logprobs_BT=sampled.behavior_logprobs_BT,
        reference_logprobs_BT=torch.cat([part for part in reference if part is not None]),
        values_BT=torch.zeros_like(sampled.behavior_logprobs_BT),
        sampler_logprobs_BT=sampled.behavior_logprobs_BT,
        score_B=trainer.scoring.combined(scores_BM).to(trainer.device),
        gold_B=None,
        ended_B=sampled.ended_B,
        temperature=temperature,
        reference_score_BR=trainer.scoring.combined(torch.tensor(compared)).to(trainer.device) if compared else None,
        score_shift=trainer.moments.mean if method.normalises_scores else 0.0,
        score_spread=trainer.moments.spread if method.normalises_scores else 1.0,
    )
