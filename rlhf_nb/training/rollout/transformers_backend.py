"""Rollouts with transformers models: our own decode loop over the model that is being trained."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from rlhf_nb.maths.logprobs import position_ids
from rlhf_nb.training.rollout.base import Completions

COMPACT_AT = 0.75
"""Finished rows leave the batch, and the cache with them, once this share or less is still alive. Copying has its
price."""


def pad_left(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, P) tokens padded on the left, and their bool mask."""
    width = max(map(len, rows))
    tokens_BP = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    mask_BP = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows], device=device)
    return tokens_BP, mask_BP


def pick(logprobs_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """(B,) the token at which each row's cumulative probability passes its uniform number. Never one of probability
    0."""
    # float64: over a large vocabulary the rounding of a float32 sum exceeds many a token's probability.
    cumulative_BV = logprobs_BV.double().exp().cumsum(-1)
    at_B1 = uniforms_B[:, None] * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, at_B1, right=True).squeeze(1).clamp(max=logprobs_BV.shape[1] - 1)


class TransformersSampler:
    def __init__(
        self,
        trunk: nn.Module,
        head: nn.Module,
        *,
        end_tokens: Collection[int],
        pad_token: int,
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        """
        Args:
            trunk: Tokens → hidden states, with a key-value cache.
            head: Hidden states → logits.
            end_tokens: Tokens that end a completion. They may contain the pad token: pads are known by mask alone.
        """
        self.trunk, self.head, self.pad_token = trunk, head, pad_token
        self.end_tokens = sorted(end_tokens)
        self.bf16 = precision == "bf16"

    def refresh(self, version: int) -> None:
        """It samples from the trained model itself."""

    def close(self) -> None:
        """It holds nothing."""

    def sample(self, prompts: Sequence[Sequence[int]], uniforms_BT: np.ndarray, *, temperature: float) -> Completions:
        device = next(self.trunk.parameters()).device
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            return self._sample(prompts, uniforms_BT, temperature)

    def _sample(self, prompts: Sequence[Sequence[int]], uniforms_BT: np.ndarray, temperature: float) -> Completions:
        device = next(self.trunk.parameters()).device
        B, T = uniforms_BT.shape
        chance_BT = torch.from_numpy(uniforms_BT).to(device)
        ends = torch.tensor(self.end_tokens, device=device)
        tokens_BT = torch.full((B, T), self.pad_token, device=device)
        mask_BT = torch.zeros(B, T, dtype=torch.bool, device=device)
        ended_B = torch.zeros(B, dtype=torch.bool, device=device)

        inputs, seen = pad_left(prompts, self.pad_token, device)
        positions = position_ids(seen)
        cache = DynamicCache(config=self.trunk.config)
        rows = torch.arange(B, device=device)
        logprobs_BT: Tensor | None = None
        width = 0
        for t in range(T):
            hidden = self.trunk(
                input_ids=inputs, attention_mask=seen, position_ids=positions, past_key_values=cache, use_cache=True
            ).last_hidden_state[:, -1]
            logits = self.head(hidden)
            logits = logits if logits.dtype == torch.float64 else logits.float()
            logprobs = torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)
            token = pick(logprobs, chance_BT[rows, t])
            if logprobs_BT is None:
                logprobs_BT = torch.zeros(B, T, dtype=logits.dtype, device=device)

            # A row that ended and has not left yet still gets tokens: they are not kept.
            alive = ~ended_B[rows]
            kept = rows[alive]
            tokens_BT[kept, t] = token[alive]
            mask_BT[kept, t] = True
            logprobs_BT[kept, t] = logprobs.gather(1, token[:, None]).squeeze(1)[alive]
            ended_B[kept] = torch.isin(token, ends)[alive]
            width = t + 1

            alive = ~ended_B[rows]
            count = int(alive.sum())
            if count == 0:
                break
            if count <= COMPACT_AT * len(rows):
                index = alive.nonzero().squeeze(1)
                cache.batch_select_indices(index)
                rows, token, seen, positions = rows[index], token[index], seen[index], positions[index]
            inputs = token[:, None]
            seen = torch.cat([seen, seen.new_ones(len(rows), 1)], dim=1)
            positions = positions[:, -1:] + 1
        assert logprobs_BT is not None
        return Completions(tokens_BT[:, :width], mask_BT[:, :width], logprobs_BT[:, :width], ended_B)
