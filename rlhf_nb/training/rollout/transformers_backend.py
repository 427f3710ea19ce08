"""Rollouts with transformers models: our own decode loop over the model that is being trained."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from rlhf_nb.maths.logprobs import position_ids
from rlhf_nb.training.rollout.base import Completions

COMPACT_AT = 0.75
"""Finished rows leave the batch, and the cache with them, once this share or less is still alive. Copying has its
price."""
WIDEST = 2.0
"""A row is padded to at most so many times its own length: beyond that, prompts are decoded in several batches."""


def pad_left(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, P) tokens padded on the left, and their bool mask."""
    width = max(map(len, rows))
    tokens_BP = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    mask_BP = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows], device=device)
    return tokens_BP, mask_BP


def buckets(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Rows that are decoded together, by number: their prompts are of like length.

    Args:
        lengths: Tokens of each prompt.
        limit: Tokens that a completion may have.
    """
    found: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        if not found or lengths[row] + limit > WIDEST * (lengths[found[-1][0]] + limit):
            found.append([])
        found[-1].append(row)
    return [sorted(rows) for rows in found]


def pick(logprobs_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """(B,) the token at which each row's cumulative probability passes its uniform number. Never one of probability
    0."""
    # float64: over a large vocabulary the rounding of a float32 sum exceeds many a token's probability.
    cumulative_BV = logprobs_BV.double().exp().cumsum(-1)
    at_B1 = uniforms_B[:, None] * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, at_B1, right=True).squeeze(1).clamp(max=logprobs_BV.shape[1] - 1)


class RoomyLayer(DynamicLayer):
    """Keys and values written into space that was taken once; transformers' own layer copies all of them at every
    token."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self._all: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        before = self.get_seq_length()
        # Under autocast rotary embeddings leave keys in float32, and attention would cast all of them at every token.
        key_states = key_states.to(value_states.dtype)
        if not self._all:
            self.lazy_initialization(key_states, value_states)
            self._all = [new.new_empty(*new.shape[:2], self.room, new.shape[3]) for new in (key_states, value_states)]
        for there, new in zip(self._all, (key_states, value_states), strict=True):
            there[:, :, before : before + new.shape[2]] = new
        self._look(before + key_states.shape[2])
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        width = self.get_seq_length()
        # Only what is filled: the rest of the new space is written before it is read.
        for at, there in enumerate(self._all):
            kept = there.new_empty(len(indices), *there.shape[1:])
            kept[:, :, :width] = there[indices, :, :width]
            self._all[at] = kept
        self._look(width)

    def _look(self, width: int) -> None:
        self.keys, self.values = (there[:, :, :width] for there in self._all)


def roomy_cache(config: Any, room: int) -> DynamicCache:
    """A cache whose plain layers have room for `room` tokens; sliding windows and other kinds stay transformers'."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class TransformersSampler:
    def __init__(
        self,
        trunk: nn.Module,
        head: nn.Module,
        *,
        end_tokens: Collection[int],
        pad_token: int,
        precision: Literal["fp32", "bf16"] = "fp32",
        value_head: nn.Module | None = None,
    ) -> None:
        """
        Args:
            trunk: Tokens → hidden states, with a key-value cache.
            head: Hidden states → logits.
            end_tokens: Tokens that end a completion. They may contain the pad token: pads are known by mask alone.
            value_head: Hidden states → values, where they are read off the same trunk: they come with the tokens.
        """
        self.trunk, self.head, self.value_head, self.pad_token = trunk, head, value_head, pad_token
        self.end_tokens = sorted(end_tokens)
        self.bf16 = precision == "bf16"

    def refresh(self, version: int) -> None:
        """It samples from the trained model itself."""

    def close(self) -> None:
        """It holds nothing."""

    def sample(self, prompts: Sequence[Sequence[int]], uniforms_BT: np.ndarray, *, temperature: float) -> Completions:
        device = next(self.trunk.parameters()).device
        groups = buckets([len(prompt) for prompt in prompts], uniforms_BT.shape[1])
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            parts = [self._sample([prompts[row] for row in rows], uniforms_BT[rows], temperature) for rows in groups]
        return parts[0] if len(parts) == 1 else _together(parts, groups)

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
        cache = roomy_cache(self.trunk.config, inputs.shape[1] + T)
        # States of linear attention and convolutions know no rows to select: there all stay to the end.
        compacts = all(hasattr(layer, "batch_select_indices") for layer in cache.layers)
        rows = torch.arange(B, device=device)
        logprobs_BT = values_BT = None
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
                values_BT = torch.zeros_like(logprobs_BT) if self.value_head is not None else None

            # A row that ended and has not left yet still gets tokens: they are not kept.
            alive = ~ended_B[rows]
            kept = rows[alive]
            tokens_BT[kept, t] = token[alive]
            mask_BT[kept, t] = True
            logprobs_BT[kept, t] = logprobs.gather(1, token[:, None]).squeeze(1)[alive]
            if values_BT is not None and self.value_head is not None:
                values_BT[kept, t] = self.value_head(hidden).squeeze(-1)[alive].to(values_BT.dtype)
            ended_B[kept] = torch.isin(token, ends)[alive]
            width = t + 1

            alive = ~ended_B[rows]
            count = int(alive.sum())
            if count == 0:
                break
            if compacts and count <= COMPACT_AT * len(rows):
                index = alive.nonzero().squeeze(1)
                cache.batch_select_indices(index)
                rows, token, seen, positions = rows[index], token[index], seen[index], positions[index]
            inputs = token[:, None]
            seen = torch.cat([seen, seen.new_ones(len(rows), 1)], dim=1)
            positions = positions[:, -1:] + 1
        assert logprobs_BT is not None
        values_BT = values_BT[:, :width] if values_BT is not None else None
        return Completions(tokens_BT[:, :width], mask_BT[:, :width], logprobs_BT[:, :width], ended_B, values_BT)


def _together(parts: list[Completions], groups: list[list[int]]) -> Completions:
    """Batches as one, each row where it was asked for."""
    order = torch.tensor([row for rows in groups for row in rows]).argsort().to(parts[0].tokens_BT.device)
    width = max(part.tokens_BT.shape[1] for part in parts)

    def whole(name: str) -> Tensor:
        tensors = [getattr(part, name) for part in parts]
        padded = [nn.functional.pad(each, (0, width - each.shape[1])) if each.ndim == 2 else each for each in tensors]
        return torch.cat(padded)[order]

    values = whole("values_BT") if parts[0].values_BT is not None else None
    return Completions(whole("tokens_BT"), whole("mask_BT"), whole("behavior_logprobs_BT"), whole("ended_B"), values)
