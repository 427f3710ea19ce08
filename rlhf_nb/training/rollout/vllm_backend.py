"""Rollouts with vLLM: the policy's weights go over after every update, and what it then says is checked.

A server that samples from other weights than the trainer's gives a run that looks alive and learns nonsense, so every
transfer ends with a probe: the log-probabilities of a few tokens must be the trainer's.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_nb.compute.rundir import storage_errors
from rlhf_nb.errors import ComputeError
from rlhf_nb.training import sharding
from rlhf_nb.training.rollout.base import Completions
from rlhf_nb.training.rollout.vllm_engine import Drawn, Engine

PROBE_TOKENS, PROBE_TEMPERATURE = 8, 0.7
"""Not at 1: there raw log-probabilities are those at the temperature too."""
FAR = 10.0
"""Times the rounding of its precision by which a probe may differ: beyond it the weights are other weights."""


class VLLMSampler:
    def __init__(
        self,
        engine: Engine,
        policy: Any,
        *,
        end_tokens: Collection[int],
        pad_token: int,
        device: torch.device,
        scratch: Path,
        probe: Sequence[int],
        logprobs: Callable[[Sequence[int], Sequence[int], float], list[float]],
        tolerance: float,
    ) -> None:
        """
        Args:
            policy: The trained model, or the trained adapter on it.
            scratch: Directory through which weights go over.
            probe: A prompt's tokens.
            logprobs: f(prompt, completion, temperature): the trainer's log-probabilities of the completion's tokens.
            tolerance: Nats a token by which trainer and sampler may differ through rounding.
        """
        self.engine, self.policy, self.device, self.scratch = engine, policy, device, scratch
        self.end_tokens, self.pad_token = sorted(end_tokens), pad_token
        self.probe, self.logprobs, self.tolerance = list(probe), logprobs, tolerance
        self.is_adapter = hasattr(policy, "peft_config")
        self.version: int | None = None

    def sample(self, prompts: Sequence[Sequence[int]], uniforms_BT: np.ndarray, *, temperature: float) -> Completions:
        """As every backend, but the chance of a row is a generator seeded with its first uniform number."""
        seeds = [int(first * (1 << 53)) for first in uniforms_BT[:, 0]]
        drawn = self.engine.sample(prompts, seeds, temperature=temperature, limit=uniforms_BT.shape[1])
        return self._padded(drawn)

    def refresh(self, version: int) -> None:
        """Take over the policy's weights of now, unless those of this version are there already.

        Raises:
            ComputeError: The engine samples from something else afterwards.
        """
        if version == self.version:
            return
        if self.is_adapter or not self.engine.take_weights(self.policy):
            self._through_a_directory()
        self._check()
        self.version = version

    def _through_a_directory(self) -> None:
        with storage_errors(self.scratch):
            shutil.rmtree(self.scratch, ignore_errors=True)
            self.scratch.mkdir(parents=True)
            # Safetensors, by default and for adapters too.
            self.policy.save_pretrained(str(self.scratch), state_dict=sharding.weights_now(self.policy))
        if self.is_adapter:
            self.engine.load_adapter(self.scratch)
        else:
            self.engine.load_weights(self.scratch)

    def _check(self) -> None:
        drawn = self.engine.sample([self.probe], [0], temperature=PROBE_TEMPERATURE, limit=PROBE_TOKENS)[0]

        def apart_at(temperature: float) -> float:
            ours = self.logprobs(self.probe, drawn.tokens, temperature)
            return float(np.abs(np.subtract(ours, drawn.logprobs)).mean())

        apart, most = apart_at(PROBE_TEMPERATURE), FAR * self.tolerance
        if not apart <= most and apart_at(1.0) <= most:
            raise ComputeError(
                "vLLM gives log-probabilities at temperature 1 whatever it samples at; start the server with "
                "--logprobs-mode processed_logprobs"
            )
        if not apart <= most:
            way_out = (
                "an adapter stands on what the server was started with: start the server with the model that this run "
                "starts from"
                if self.is_adapter
                else "on a CPU tied embeddings stay behind: train an adapter, or use rollout_backend=transformers"
            )
            raise ComputeError(
                f"after taking over the weights vLLM's log-probabilities differ from the trainer's by {apart:.3g} nats "
                f"a token (rounding is {self.tolerance:g}); {way_out}"
            )

    def _padded(self, drawn: list[Drawn]) -> Completions:
        B, T = len(drawn), max(len(one.tokens) for one in drawn)
        tokens_BT = torch.full((B, T), self.pad_token)
        logprobs_BT, mask_BT = torch.zeros(B, T), torch.zeros(B, T, dtype=torch.bool)
        for row, one in enumerate(drawn):
            n = len(one.tokens)
            tokens_BT[row, :n], logprobs_BT[row, :n] = torch.tensor(one.tokens), torch.tensor(one.logprobs)
            mask_BT[row, :n] = True
        ended_B = torch.tensor([one.tokens[-1] in self.end_tokens for one in drawn])
        return Completions(*(each.to(self.device) for each in (tokens_BT, mask_BT, logprobs_BT, ended_B)))

    def close(self) -> None:
        self.engine.close()
        shutil.rmtree(self.scratch, ignore_errors=True)
