"""A frozen model that completes prompts: what jobs beside the trainers sample with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch

from rlhf_nb.training import models
from rlhf_nb.training.actor_critic import check_trunk_and_head, trunk_and_head
from rlhf_nb.training.rollout.transformers_backend import TransformersSampler
from rlhf_nb.training.rollout.vllm_engine import InProcess
from rlhf_nb.training.sampling import Completion, end_tokens


class Completer:
    """f(prompts as tokens, (B, max_new_tokens) uniforms, temperature=) → a completion of each."""

    def __init__(
        self, tokenizer: Any, sample: Callable[[Any, np.ndarray, float], list[tuple[list[int], bool]]]
    ) -> None:
        self.tokenizer, self._sample = tokenizer, sample

    def __call__(
        self, prompts: Sequence[Sequence[int]], uniforms_BT: np.ndarray, *, temperature: float
    ) -> list[Completion]:
        drawn = self._sample(prompts, uniforms_BT, temperature)
        decode = self.tokenizer.decode
        return [Completion(ids, decode(ids, skip_special_tokens=True).strip(), ended) for ids, ended in drawn]


def completer(
    path: str,
    *,
    backend: Literal["transformers", "vllm"] = "transformers",
    precision: Literal["fp32", "bf16"] = "fp32",
    device: torch.device,
    memory: float = 0.8,
    max_length: int | None = None,
) -> Completer:
    """The model of a directory.

    Args:
        memory: Share of the accelerator's memory, for vllm.
        max_length: Tokens of prompt and completion together, for vllm.

    Raises:
        SpecError: vLLM is asked for and cannot be imported.
    """
    tokenizer = models.load_tokenizer(path)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if backend == "vllm":
        return Completer(tokenizer, _vllm(path, tokenizer, str(dtype).removeprefix("torch."), memory, max_length))
    model = models.load_model(path, dtype=dtype).eval().requires_grad_(False).to(device)
    check_trunk_and_head(model)
    # Weights in bfloat16 need no autocast; the sampler takes the logits to float32.
    sampler = TransformersSampler(
        *trunk_and_head(model), end_tokens=end_tokens(model, tokenizer), pad_token=tokenizer.pad_token_id
    )

    def sample(prompts: Any, uniforms_BT: np.ndarray, temperature: float) -> list[tuple[list[int], bool]]:
        said = sampler.sample(prompts, uniforms_BT, temperature=temperature)
        lengths = said.mask_BT.sum(1).tolist()
        rows = zip(said.tokens_BT.tolist(), lengths, said.ended_B.tolist(), strict=True)
        return [(tokens[:length], ended) for tokens, length, ended in rows]

    return Completer(tokenizer, sample)


def _vllm(path: str, tokenizer: Any, dtype: str, memory: float, max_length: int | None) -> Any:
    from types import SimpleNamespace

    from transformers import AutoConfig, GenerationConfig

    try:
        stated = GenerationConfig.from_pretrained(path)
    except OSError:
        stated = GenerationConfig.from_model_config(AutoConfig.from_pretrained(path, trust_remote_code=False))
    ends = end_tokens(SimpleNamespace(generation_config=stated), tokenizer)
    engine = InProcess(path, ends=ends, dtype=dtype, max_length=max_length, memory=memory, adapter_rank=None)

    def sample(prompts: Any, uniforms_BT: np.ndarray, temperature: float) -> list[tuple[list[int], bool]]:
        # A row's chance is a generator seeded with its first uniform number, as in training.
        seeds = [int(first * (1 << 53)) for first in uniforms_BT[:, 0]]
        drawn = engine.sample(prompts, seeds, temperature=temperature, limit=uniforms_BT.shape[1])
        return [(one.tokens, one.tokens[-1] in ends) for one in drawn]

    return sample
