"""Rollouts without the host: a token of all rows is one replay of a captured CUDA graph.

A graph knows addresses, not values. So everything that a step reads or writes is taken once and kept: keys and values
with room for the longest row, the mask over them, tokens, chance. Weights are read where the trainer changes them in
place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import Cache
from transformers.cache_utils import StaticLayer

from rlhf_nb.errors import SpecError
from rlhf_nb.maths.logprobs import position_ids
from rlhf_nb.training.rollout.base import Completions
from rlhf_nb.training.rollout.transformers_backend import (
    RoomyLayer,
    TransformersSampler,
    pad_left,
    pick,
    roomy_cache,
)

LOOK_EVERY = 16
"""Tokens between two looks at which rows have ended: a look makes the host wait for the device."""
ROOM = 64
"""Space is taken in so many tokens: attention's kernels like round numbers."""
FEWEST = 8
"""Lanes of the narrowest step: below that, a step costs the same."""
WARM_UP = 3
"""Steps before a capture: libraries take their workspaces in the first ones."""


class KeptLayer(StaticLayer):
    """A layer of transformers' static cache on memory that is given, written at a cursor that all layers share."""

    def __init__(self, keys: Tensor, values: Tensor, cursor: Tensor) -> None:
        super().__init__(max_cache_len=keys.shape[2])
        self.keys, self.values, self.cumulative_length = keys, values, cursor
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.cumulative_length, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self.cumulative_length, value_states)
        return self.keys, self.values


class Lanes:
    """All that decoding steps touch. A lane decodes one completion; lanes whose completions have ended are given up."""

    def __init__(self, rows: int, room: int, limit: int, like: Cache, logits: Tensor, *, with_values: bool) -> None:
        """
        Args:
            rows: Lanes there are at most, and completions.
            room: Tokens of prompt and completion together.
            limit: Tokens of a completion.
            like: Keys and values of any rows, for their shapes.
            logits: Any logits, for their type.
        """
        self.rows, self.room, self.limit = rows, room, limit
        device = logits.device

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.kept = [
            tuple(there.new_zeros(rows, there.shape[1], room, there.shape[3]) for there in (layer.keys, layer.values))
            for layer in like.layers
        ]
        # Of each lane: the token last drawn, its position, and the row of the completion.
        self.token, self.position, self.row = zeros(rows), zeros(rows), zeros(rows)
        self.seen = zeros(rows, 1, 1, room, dtype=torch.bool)
        # Where in the cache the next token's keys go, and how many tokens have been drawn.
        self.cursor, self.t = zeros(1), zeros(1)
        self.temperature = zeros(1, dtype=logits.dtype)
        self.chance = zeros(rows, limit, dtype=torch.float64)
        # Of each completion.
        self.tokens, self.mask = zeros(rows, limit), zeros(rows, limit, dtype=torch.bool)
        self.logprobs = zeros(rows, limit, dtype=logits.dtype)
        self.values = zeros(rows, limit, dtype=logits.dtype) if with_values else None
        self.ended = zeros(rows, dtype=torch.bool)
        # Of these graphs alone: torch takes no new one into a pool whose graphs are all gone.
        self.pool = torch.cuda.graph_pool_handle() if logits.is_cuda else None
        self.steps: dict[int, Callable[[], None]] = {}
        """By the number of lanes that step."""

    def state(self) -> list[Tensor]:
        """What a step changes, but for keys and values: it writes those where nothing has been read yet."""
        values = [] if self.values is None else [self.values]
        mine = [self.token, self.position, self.seen, self.cursor, self.t]
        return [*mine, self.tokens, self.mask, self.logprobs, self.ended, *values]

    def cache(self, width: int) -> Cache:
        return Cache(layers=[KeptLayer(keys[:width], values[:width], self.cursor) for keys, values in self.kept])

    def fill(
        self, prompts: Cache, seen_BP: Tensor, index: Tensor, chance_BT: Tensor, temperature: float, pad: int
    ) -> None:
        """Prompts have been read: take over their keys and values.

        Args:
            index: Which prompt each of the first lanes completes.
        """
        P, width = seen_BP.shape[1], len(index)
        for layer, kept in zip(prompts.layers, self.kept, strict=True):
            for there, mine in zip((layer.keys, layer.values), kept, strict=True):
                mine[:width, :, :P] = there[index]
                # Not seen is not enough: what a diverged policy left there may be NaN, and 0 · NaN is NaN.
                mine[:width, :, P:] = 0
        self.seen.zero_()
        self.seen[:width, 0, 0, :P] = seen_BP[index]
        self.position[:width] = position_ids(seen_BP)[index, -1] + 1
        self.row.copy_(torch.arange(self.rows))
        self.cursor.fill_(P)
        self.t.zero_()
        self.temperature.fill_(temperature)
        self.chance[:width, : chance_BT.shape[1]] = chance_BT[index]
        self.tokens.fill_(pad)
        for each in (self.mask, self.logprobs, *([] if self.values is None else [self.values])):
            each.zero_()
        self.ended.copy_(torch.arange(self.rows) >= len(seen_BP))

    def narrow(self, index: Tensor) -> None:
        """Only these lanes go on, as the first ones."""
        for each in (self.token, self.position, self.row, self.seen, *(one for kept in self.kept for one in kept)):
            each[: len(index)] = each[index]


class GraphSampler(TransformersSampler):
    """As the loop that it stands for, over a static cache; on a CUDA device each step is a graph."""

    def __init__(self, trunk: Any, head: nn.Module, *, room: int, limit: int, **settings: Any) -> None:
        """
        Args:
            room: Tokens of prompt and completion for which space is taken. Always the same: what attention reads is so
                wide, whatever was sampled before. Longer rows go through the ordinary loop.
            limit: Tokens of a completion.
        """
        super().__init__(trunk, head, **settings)
        if (attention := trunk.config._attn_implementation) != "sdpa":
            raise SpecError(f"cuda_graphs: the policy's attention is {attention}, and a graph needs sdpa; leave it out")
        kinds = {type(layer) for layer in roomy_cache(trunk.config, 1).layers}
        if kinds != {RoomyLayer}:
            odd = ", ".join(sorted(kind.__name__ for kind in kinds - {RoomyLayer}))
            raise SpecError(f"cuda_graphs: layers of the policy keep other things than all keys ({odd}); leave it out")
        self.capture = next(trunk.parameters()).is_cuda
        self.room, self.limit = -(-room // ROOM) * ROOM, limit
        self._lanes: Lanes | None = None
        self._addresses: list[int] = []
        self._in_bf16 = [_low(module) if self.bf16 else {} for module in (trunk, head)]

    def _sample(self, prompts: Sequence[Sequence[int]], uniforms_BT: np.ndarray, temperature: float) -> Completions:
        if max(map(len, prompts)) + uniforms_BT.shape[1] > self.room or uniforms_BT.shape[1] > self.limit:
            return super()._sample(prompts, uniforms_BT, temperature)
        device = next(self.trunk.parameters()).device
        # Weights that autocast cast before a capture would be those of that day for ever: they are cast here.
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False):
            for module, low in zip((self.trunk, self.head), self._in_bf16, strict=True):
                for name, copy in low.items():
                    copy.copy_(module.get_parameter(name))
            return self._decoded(prompts, torch.from_numpy(uniforms_BT).to(device), temperature)

    def _decoded(self, prompts: Sequence[Sequence[int]], chance_BT: Tensor, temperature: float) -> Completions:
        B, T = chance_BT.shape
        tokens_BP, seen_BP = pad_left(prompts, self.pad_token, chance_BT.device)
        cache = roomy_cache(self.trunk.config, tokens_BP.shape[1])
        hidden_BD = self._hidden(
            input_ids=tokens_BP, attention_mask=seen_BP, position_ids=position_ids(seen_BP), past_key_values=cache
        )
        width, drawn = _width(B), 1
        lanes = self._lanes_for(width, cache, self._logits(hidden_BD[:1]))
        # Lanes without a completion repeat the last one: a row that sees nothing would be NaN.
        index = torch.arange(width, device=hidden_BD.device).clamp(max=B - 1)
        lanes.fill(cache, seen_BP, index, chance_BT, temperature, self.pad_token)
        self._draw(lanes, hidden_BD[index])
        while True:
            ended = lanes.ended[lanes.row[:width]]
            alive = (~ended).nonzero().squeeze(1)
            if len(alive) == 0 or drawn == T:
                break
            if (narrower := _width(len(alive))) < width:
                lanes.narrow(torch.cat([alive, ended.nonzero().squeeze(1)])[:narrower])
                width = narrower
            step = self._step(lanes, width)
            for _ in range(min(LOOK_EVERY, T - drawn)):
                step()
                drawn += 1
        # Copies: the next rollout is written over these.
        longest = int(lanes.mask[:B].any(0).sum())
        tokens, mask, logprobs = (one[:B, :longest].clone() for one in (lanes.tokens, lanes.mask, lanes.logprobs))
        values_BT = lanes.values[:B, :longest].clone() if lanes.values is not None else None
        return Completions(tokens, mask, logprobs, lanes.ended[:B].clone(), values_BT)

    def _lanes_for(self, rows: int, like: Cache, logits: Tensor) -> Lanes:
        modules = [self.trunk, self.head, *([] if self.value_head is None else [self.value_head])]
        addresses = [parameter.data_ptr() for module in modules for parameter in module.parameters()]
        rows = max(rows, self._lanes.rows if self._lanes is not None else 0)
        if self._lanes is None or self._lanes.rows < rows or addresses != self._addresses:
            # First let go of the old ones: there may be no space for both.
            self._lanes, self._addresses = None, addresses
            with_values = self.value_head is not None
            self._lanes = Lanes(rows, self.room, self.limit, like, logits, with_values=with_values)
        return self._lanes

    def _hidden(self, **inputs: Any) -> Tensor:
        """(B, D) at the last position."""
        low = self._in_bf16[0]
        inputs["use_cache"] = True
        said = functional_call(self.trunk, low, (), inputs) if low else self.trunk(**inputs)
        return said.last_hidden_state[:, -1]

    def _logits(self, hidden_BD: Tensor) -> Tensor:
        low = self._in_bf16[1]
        logits = functional_call(self.head, low, (hidden_BD,)) if low else self.head(hidden_BD)
        return logits if logits.dtype == torch.float64 else logits.float()

    def _draw(self, lanes: Lanes, hidden_BD: Tensor) -> None:
        """One token for each of the first lanes, and its place in the completion."""
        width = len(hidden_BD)
        logprobs_BV = torch.log_softmax(self._logits(hidden_BD) / lanes.temperature, dim=-1)
        row = lanes.row[:width]
        at = (row, lanes.t.expand(width))
        token = pick(logprobs_BV, lanes.chance[at])
        ended = lanes.ended[row]
        lanes.tokens.index_put_(at, token.masked_fill(ended, self.pad_token))
        lanes.mask.index_put_(at, ~ended)
        lanes.logprobs.index_put_(at, logprobs_BV.gather(1, token[:, None]).squeeze(1).masked_fill(ended, 0.0))
        if lanes.values is not None and self.value_head is not None:
            values = self.value_head(hidden_BD).squeeze(-1).to(lanes.values.dtype)
            lanes.values.index_put_(at, values.masked_fill(ended, 0.0))
        for end in self.end_tokens:
            ended = ended | (token == end)
        lanes.ended.index_put_((row,), ended)
        lanes.token[:width].copy_(token)
        lanes.t.add_(1)

    def _step(self, lanes: Lanes, width: int) -> Callable[[], None]:
        if width not in lanes.steps:
            cache = lanes.cache(width)

            def step() -> None:
                lanes.seen[:width].index_fill_(3, lanes.cursor, True)
                hidden_BD = self._hidden(
                    input_ids=lanes.token[:width, None],
                    attention_mask=lanes.seen[:width],
                    position_ids=lanes.position[:width, None],
                    past_key_values=cache,
                )
                lanes.cursor.add_(1)
                lanes.position[:width].add_(1)
                self._draw(lanes, hidden_BD)

            lanes.steps[width] = self._captured(lanes, step) if self.capture else step
        return lanes.steps[width]

    def _captured(self, lanes: Lanes, step: Callable[[], None]) -> Callable[[], None]:
        before = [each.clone() for each in lanes.state()]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(aside):
                for _ in range(WARM_UP):
                    step()
                    for each, was in zip(lanes.state(), before, strict=True):
                        each.copy_(was)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=lanes.pool):
                step()
        except RuntimeError as error:
            said = str(error).strip().splitlines()[0]
            raise SpecError(f"cuda_graphs: a step of the policy cannot be captured ({said}); leave it out") from error
        return graph.replay


def _width(rows: int) -> int:
    """Lanes for so many rows: powers of two, so that there are few graphs."""
    return max(FEWEST, 1 << (rows - 1).bit_length())


def _low(module: nn.Module) -> dict[str, Tensor]:
    """Room in bfloat16 for the matrices that autocast would cast, by parameter."""
    found: dict[str, Tensor] = {}
    for name, one in module.named_modules():
        if isinstance(one, nn.Linear):
            found |= dict(one.named_parameters(prefix=name, recurse=False))
    floats = {name: each for name, each in found.items() if each.dtype == torch.float32}
    return {name: torch.empty_like(each, dtype=torch.bfloat16) for name, each in floats.items()}
