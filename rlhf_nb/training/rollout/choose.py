"""Which sampler a run's rollouts come from. The choice is the spec's: never a silent fallback."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from rlhf_nb.training.actor_critic import trunk_and_head
from rlhf_nb.training.rollout.base import Sampler
from rlhf_nb.training.rollout.vllm_backend import VLLMSampler
from rlhf_nb.training.rollout.vllm_engine import Engine, InProcess, Server
from rlhf_nb.training.rollout.vllm_nccl import NCCLTransfer
from rlhf_nb.training.sampling import end_tokens

if TYPE_CHECKING:
    from rlhf_nb.training.online import OnlineTrainer


def sampler_for(trainer: OnlineTrainer, path: str, max_length: int) -> Sampler:
    """
    Args:
        path: Directory of the policy's start; of its base under LoRA.
        max_length: Tokens of prompt and completion together.
    """
    method, context, policy = trainer.method, trainer.context, trainer.module.policy
    if method.rollout_backend == "transformers":
        shared = trainer.module.value_head if trainer.module.critic is None else None
        return trainer.make_sampler(*trunk_and_head(policy), shared, graphs=method.cuda_graphs)
    ends = end_tokens(policy, trainer.tokenizer)
    adapter = context.spec.adapter
    context.emit.stage("starting vLLM" if method.rollout_backend == "vllm" else f"reaching vLLM at {method.vllm_url}")
    engine: Engine
    if method.rollout_backend == "vllm":
        engine = InProcess(
            path,
            ends=ends,
            dtype="bfloat16" if method.precision == "bf16" else "float32",
            max_length=max_length,
            memory=method.vllm_memory,
            adapter_rank=adapter.r if adapter is not None else None,
        )
    else:
        name = f"rlhf-nb-{context.spec.run_id}" if adapter is not None else None
        engine = Server(method.vllm_url, ends=ends, adapter=name, owner=context.is_main)
        if method.vllm_transfer == "nccl" and context.is_main:
            engine.transfer = NCCLTransfer(engine, trainer.device)

    @torch.no_grad()
    def logprobs(prompt: Sequence[int], completion: Sequence[int], temperature: float) -> list[float]:
        tokens_BL = torch.tensor([[*prompt, *completion]], device=trainer.device)
        seen_BL = torch.ones_like(tokens_BL, dtype=torch.bool)
        said, _, _ = trainer.module(
            tokens_BL,
            seen_BL,
            seen_BL[:, len(prompt) :],
            temperature=temperature,
            with_values=False,
            with_entropy=False,
        )
        return said[0].tolist()

    return VLLMSampler(
        engine,
        policy,
        end_tokens=ends,
        pad_token=trainer.tokenizer.pad_token_id,
        device=trainer.device,
        scratch=context.run_dir / "sampler",
        probe=trainer.prompt_ids[0],
        logprobs=logprobs,
        tolerance=trainer.doctor.tolerance,
    )
