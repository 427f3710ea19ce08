"""One rollout of an online run: sampled, scored, read; over all ranks, the same bits on each.

Every rank samples and scores its rows; then the parts are put together, so that every rank holds the whole. Groups
from which nothing can be learnt are replaced by those of other prompts, where the method asks for it.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_nb.training import distributed
from rlhf_nb.training.online_types import Drawn, Rollout
from rlhf_nb.training.rollout.base import Completions, uniforms
from rlhf_nb.training.rollout.transformers_backend import pad_left

if TYPE_CHECKING:
    from rlhf_nb.training.online import OnlineTrainer


def collect(trainer: OnlineTrainer) -> tuple[Rollout, dict[str, float]]:
    """Sample, score and read a rollout, over all ranks, and replace groups as the method wants it."""
    method, temperature = trainer.method, trainer.temperature
    rows, seconds = _sampled(trainer, trainer.next_prompts(method.rollout_batch_size // method.each), 0, temperature)
    drawn, replaced = list(rows), 0
    for attempt in range(method.resamplings + 1):
        wasted = _wasted(trainer, rows) if method.resamplings else []
        if not wasted or attempt == method.resamplings:
            break
        more, also = _sampled(trainer, trainer.next_prompts(len(wasted)), len(drawn), temperature)
        for at, group in enumerate(wasted):
            rows[group * method.each : (group + 1) * method.each] = more[at * method.each : (at + 1) * method.each]
        drawn, replaced = drawn + more, replaced + len(wasted)
        seconds = {name: seconds[name] + also[name] for name in seconds}
    rollout = _together(trainer, rows, temperature)
    if method.resamplings:
        golds = _numbers(trainer, drawn, "gold") if trainer.scoring.gold is not None else None
        scores_B = trainer.scoring.combined(_numbers(trainer, drawn, "scores"))
        rollout = replace(rollout, drawn=Drawn(scores_B, golds, replaced, len(wasted)))
    return rollout, seconds


def _wasted(trainer: OnlineTrainer, rows: list[dict[str, Any]]) -> list[int]:
    score_PG = trainer.scoring.combined(_numbers(trainer, rows, "scores")).view(-1, trainer.method.each)
    return trainer.method.wasted(score_PG).nonzero().squeeze(1).tolist()


def _sampled(
    trainer: OnlineTrainer, indices: list[int], first: int, temperature: float
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """What all ranks together sampled, scored and read of some prompts: one dict a completion, in their order.

    Args:
        first: Number of the first completion in the rollout: its chance is keyed by it.
    """
    began = time.perf_counter()
    mine = list(range(trainer.context.rank, len(indices), trainer.context.world_size))
    prompts = [trainer.prompt_ids[indices[row]] for row in mine]
    if trainer.context.is_main:
        trainer.sampler.refresh(trainer.step)
    distributed.barrier()
    refreshed_at = sampled_at = scored_at = time.perf_counter()
    part: dict[str, Any] = {}
    if mine:
        noise = uniforms(
            trainer.method.seed, trainer.rollouts, [first + row for row in mine], trainer.method.max_new_tokens
        )
        sampled = trainer.sampler.sample(prompts, noise, temperature=temperature)
        sampled_at = time.perf_counter()
        texts = trainer.texts(sampled.tokens_BT, sampled.mask_BT)
        asked, at = [trainer.rows[indices[row]] for row in mine], [first + row for row in mine]
        part = {
            "scores": trainer.scoring.rollout(trainer.rollouts, asked, texts, at),
            "gold": trainer.scoring.rollout_golds(trainer.rollouts, asked, texts, at),
            "reference_scores": trainer.reference_scores([indices[row] for row in mine], at),
        }
        scored_at = time.perf_counter()
        part |= _read_all(trainer, prompts, sampled, temperature)
    parts = distributed.gather_objects({k: v.cpu() if isinstance(v, Tensor) else v for k, v in part.items()})
    # Row g came from rank g mod world.
    world = len(parts)
    rows = [
        {name: values[g // world] for name, values in parts[g % world].items() if values is not None}
        for g in range(len(indices))
    ]
    return rows, {
        "time/rollout_s": sampled_at - refreshed_at,
        **({"time/sync_s": refreshed_at - began} if trainer.method.rollout_backend != "transformers" else {}),
        "time/score_s": scored_at - sampled_at,
        "time/reference_s": time.perf_counter() - scored_at,
    }


def _read_all(
    trainer: OnlineTrainer, prompts: list[list[int]], sampled: Completions, temperature: float
) -> dict[str, Any]:
    """Completions beside what policy, reference and value model say of their tokens."""
    tokens_BP, seen_BP = pad_left(prompts, trainer.tokenizer.pad_token_id, trainer.device)
    tokens_BL = torch.cat([tokens_BP, sampled.tokens_BT], 1)
    attention_mask_BL = torch.cat([seen_BP, sampled.mask_BT], 1)
    behavior, reference, values = [], [], []
    for rows in torch.arange(len(prompts), device=trainer.device).split(trainer.micro(len(prompts))):
        part = (tokens_BL[rows], attention_mask_BL[rows], sampled.mask_BT[rows])
        said, value = _read(trainer, sampled, rows, part, temperature)
        there = trainer.reference.logprobs(*part, temperature=temperature)
        behavior.append(said)
        reference.append(said if there is None else there)
        values.append(value)
    return {
        "prompts": prompts,
        "tokens": sampled.tokens_BT,
        "mask": sampled.mask_BT,
        "sampler": sampled.behavior_logprobs_BT,
        "behavior": torch.cat(behavior),
        "reference": torch.cat(reference),
        "values": torch.cat(values),
        "ended": sampled.ended_B,
    }


@torch.no_grad()
def _read(
    trainer: OnlineTrainer, sampled: Completions, rows: Tensor, part: tuple[Tensor, Tensor, Tensor], temperature: float
) -> tuple[Tensor, Tensor]:
    """(B, T) log-probabilities and values of some completions: the sampler's own where they are believed."""
    believed = sampled.behavior_logprobs_BT[rows] if trainer.method.importance_cap is None else None
    if believed is not None and sampled.values_BT is not None:
        return believed, sampled.values_BT[rows]
    said, _, value = trainer.module(*part, temperature=temperature, with_policy=believed is None, with_entropy=False)
    return said if believed is None else believed, value.masked_fill(~part[2], 0.0)


def _numbers(trainer: OnlineTrainer, rows: list[dict[str, Any]], name: str) -> Tensor:
    return torch.tensor([row[name] for row in rows], dtype=rows[0]["behavior"].dtype, device=trainer.device)


def _together(trainer: OnlineTrainer, rows: list[dict[str, Any]], temperature: float) -> Rollout:
    """One rollout, the same bits on every rank."""
    T = max(len(row["tokens"]) for row in rows)

    def padded(name: str) -> Tensor:
        whole = [torch.nn.functional.pad(row[name], (0, T - len(row[name]))) for row in rows]
        return torch.stack(whole).to(trainer.device)

    scores_BM = _numbers(trainer, rows, "scores")
    tokens_BP, seen_BP = pad_left([row["prompts"] for row in rows], trainer.tokenizer.pad_token_id, trainer.device)
    mask_BT = padded("mask")
    return Rollout(
        tokens_BL=torch.cat([tokens_BP, padded("tokens")], 1),
        attention_mask_BL=torch.cat([seen_BP, mask_BT], 1),
        mask_BT=mask_BT,
        behavior_logprobs_BT=padded("behavior"),
        reference_logprobs_BT=padded("reference"),
        values_BT=padded("values"),
        sampler_logprobs_BT=padded("sampler"),
        score_B=trainer.scoring.combined(scores_BM),
        parts_BM=scores_BM,
        reference_score_BR=trainer.scoring.combined(_numbers(trainer, rows, "reference_scores"))
        if trainer.method.compared_with
        else None,
        gold_B=_numbers(trainer, rows, "gold") if trainer.scoring.gold is not None else None,
        ended_B=torch.stack([row["ended"] for row in rows]).to(trainer.device),
        temperature=temperature,
    )
