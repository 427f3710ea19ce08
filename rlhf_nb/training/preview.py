"""What another kl_coef would lead to, told before anybody moves it: from completions drawn for the purpose."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rlhf_nb.errors import RewardError
from rlhf_nb.maths.masked import masked_sum
from rlhf_nb.maths.reweighting import gap_variance, tilted
from rlhf_nb.protocol.control import Preview
from rlhf_nb.protocol.events import ControlRefused, Prediction, Previewed
from rlhf_nb.training.rollout.base import uniforms
from rlhf_nb.training.rollout.transformers_backend import pad_left

if TYPE_CHECKING:
    from rlhf_nb.training.online import OnlineTrainer
    from rlhf_nb.training.online_types import Rollout

STREAM = 3 << 60
"""Far above any rollout's number: a preview never draws a number that training draws."""
NEAR = 0.05
"""Nats from the optimum at which the run counts as converged: Var(r − β·log ratio)/(2β²) ≈ KL(π‖π*)."""


def answer(trainer: OnlineTrainer, request: Preview) -> Previewed | ControlRefused:
    """On rank 0. It is only looked at: a fault that would end the run in a rollout refuses the preview."""
    reason = trainer.method.preview_refusal(trainer.live)
    if reason is None:
        try:
            return _previewed(trainer, request)
        except RewardError as error:
            reason = str(error).splitlines()[0]
        except torch.OutOfMemoryError:
            reason = (
                f"prompts={request.prompts} with samples={request.samples} of each are more than memory holds beside "
                f"the run; ask for fewer"
            )
        # Here nothing holds what the attempt had taken.
        torch.cuda.empty_cache()
    return ControlRefused(id=request.id, op=request.op, reason=reason)


def _previewed(trainer: OnlineTrainer, request: Preview) -> Previewed:
    """The policy's own optimum at each β is read off by weights."""
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
    # Of what a rollout takes of this device it is known that it fits.
    size = max(1, min(len(indices), method.rollout_batch_size // trainer.context.world_size))
    pieces = [
        trainer.sampler.sample(prompts[at : at + size], noise[at : at + size], temperature=temperature)
        for at in range(0, len(indices), size)
    ]
    T = max(piece.tokens_BT.shape[1] for piece in pieces)

    def whole(name: str) -> Tensor:
        parts = [getattr(piece, name) for piece in pieces]
        return torch.cat([torch.nn.functional.pad(part, (0, T - part.shape[1])) for part in parts])

    tokens_BT, mask_BT, logprobs_BT = whole("tokens_BT"), whole("mask_BT"), whole("behavior_logprobs_BT")
    texts = trainer.texts(tokens_BT, mask_BT)
    scores_BM = torch.tensor(trainer.scoring.scores([trainer.rows[index] for index in indices], texts))
    compared = trainer.reference_scores(indices)
    tokens_BP, seen_BP = pad_left(prompts, trainer.tokenizer.pad_token_id, trainer.device)
    tokens_BL = torch.cat([tokens_BP, tokens_BT], 1)
    seen_BL = torch.cat([seen_BP, mask_BT], 1)
    parts = torch.arange(len(indices), device=trainer.device).split(trainer.micro(size))
    reference = [
        trainer.reference.logprobs(tokens_BL[rows], seen_BL[rows], mask_BT[rows], temperature=temperature)
        for rows in parts
    ]
    return Rollout(
        tokens_BL=tokens_BL,
        attention_mask_BL=seen_BL,
        mask_BT=mask_BT,
        behavior_logprobs_BT=logprobs_BT,
        reference_logprobs_BT=torch.cat([part for part in reference if part is not None]),
        values_BT=torch.zeros_like(logprobs_BT),
        sampler_logprobs_BT=logprobs_BT,
        score_B=trainer.scoring.combined(scores_BM).to(trainer.device),
        gold_B=None,
        ended_B=torch.cat([piece.ended_B for piece in pieces]),
        temperature=temperature,
        reference_score_BR=trainer.scoring.combined(torch.tensor(compared)).to(trainer.device) if compared else None,
        score_shift=trainer.moments.mean if method.normalises_scores else 0.0,
        score_spread=trainer.moments.spread if method.normalises_scores else 1.0,
    )
