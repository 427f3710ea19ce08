"""Completions of a model, as rows.

Rows     prompt.
Models   the policy, frozen; the reward's, where one is given.
Result   n completions of every prompt, each drawn from the policy's own distribution at the temperature, with their
         lengths in tokens, whether they ended by themselves, and their scores.

Chance is keyed by (seed, which of the n, prompt, position): a larger n keeps the completions that a smaller one drew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from rlhf_nb.errors import SpecError
from rlhf_nb.methods.base import LiveCoefficient, Method, Trainer
from rlhf_nb.protocol.spec import describe

if TYPE_CHECKING:
    from rlhf_nb.data.rows import Row
    from rlhf_nb.protocol.spec import RunSpec
    from rlhf_nb.training.context import Context
    from rlhf_nb.training.row_job import Made

STREAM = 1 << 62
"""Far above the numbers of rollouts and of samples that are looked at: no training run draws this chance."""


class Generate(Method):
    """Draw completions of prompts, and keep them as a data set."""

    name: ClassVar[str] = "generate"
    title: ClassVar[str] = "Completions"
    rows: ClassVar[str] = "prompts"
    trains: ClassVar[bool] = False
    makes: ClassVar[str] = "completions"
    live: ClassVar[tuple[LiveCoefficient, ...]] = ()

    n: int = Field(4, gt=0)
    """Completions of each prompt."""
    temperature: float = Field(1.0, gt=0)
    """Logits are divided by it. 1 is the policy itself."""
    max_new_tokens: int = Field(64, gt=0)
    """A completion is cut here."""
    batch_size: int = Field(64, gt=0)
    """Completions drawn at once."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """What weights and activations are held in."""
    rollout_backend: Literal["transformers", "vllm"] = "transformers"
    """vllm: an engine in the job's process, for one process."""
    vllm_memory: float = Field(0.8, gt=0, lt=1)
    """Of rollout_backend=vllm: the share of the accelerator's memory that it takes."""

    def check(self, spec: RunSpec) -> None:
        if self.rollout_backend == "vllm" and spec.launch.num_processes > 1:
            raise SpecError(
                f"generate: rollout_backend=vllm holds its engine in one process and there are "
                f"{spec.launch.num_processes}; use --num_processes 1, or rollout_backend=transformers"
            )

    def build_trainer(self, context: Context) -> Trainer:
        from rlhf_nb.training.row_job import RowJob

        return RowJob(Generator(self, context), context)


class Generator:
    def __init__(self, method: Generate, context: Context) -> None:
        import torch

        from rlhf_nb.training import models
        from rlhf_nb.training.completer import completer
        from rlhf_nb.training.row_job import weighted_scores

        self.method, self.context = method, context
        self.chunk = max(1, method.batch_size // method.n)
        path = context.model_path(context.spec.policy)
        device = torch.device("cpu") if context.use_cpu else torch.device("cuda", torch.cuda.current_device())
        length = models.context_length(path)
        if length is not None and method.max_new_tokens >= length:
            raise SpecError(
                f"generate: max_new_tokens={method.max_new_tokens} leaves no room for a prompt in the model's context "
                f"of {length} tokens; use fewer"
            )
        self.room = None if length is None else length - method.max_new_tokens
        self.complete = completer(
            path,
            backend=method.rollout_backend,
            precision=method.precision,
            device=device,
            memory=method.vllm_memory,
            max_length=length,
        )
        self.score = weighted_scores(context, device=device)

    def make(self, start: int, rows: Sequence[Row]) -> Made:
        import numpy as np

        from rlhf_nb.training import data
        from rlhf_nb.training.rollout.base import uniforms
        from rlhf_nb.training.row_job import Made

        method, tokenizer = self.method, self.complete.tokenizer
        whole = [data.prompt_ids(row["prompt"], tokenizer) for row in rows]
        ids = [one[-self.room :] if self.room is not None else one for one in whole]
        numbers = range(start, start + len(rows))
        drawn = [uniforms(method.seed, STREAM + k, numbers, method.max_new_tokens) for k in range(method.n)]
        noise_BT = np.stack(drawn, 1).reshape(-1, method.max_new_tokens)
        said = self.complete([one for one in ids for _ in range(method.n)], noise_BT, temperature=method.temperature)
        texts = [one.text for one in said]
        each = [row for row in rows for _ in range(method.n)]
        scores = self.score(each, texts) if self.score is not None else None
        made: list[dict[str, Any]] = []
        for index, row in enumerate(rows):
            of = slice(index * method.n, (index + 1) * method.n)
            one = {**row, "completions": texts[of]}
            one["completion_lengths"] = [len(completion.ids) for completion in said[of]]
            one["completion_ended"] = [completion.ended for completion in said[of]]
            made.append(one if scores is None else {**one, "scores": scores[of]})
        counts = {
            "cut at max_new_tokens": sum(not one.ended for one in said),
            "prompts cut at the model's context": sum(a != b for a, b in zip(whole, ids, strict=True)),
        }
        return Made(made, counts={name: n for name, n in counts.items() if n})

    def finish(self, made: Made) -> Made:
        return made

    def summary(self, made: Made) -> str:
        method, spec = self.method, self.context.spec
        n = len(made.rows)
        told = f"{n * method.n:,} completions of {n:,} prompt{'s' * (n != 1)} by {describe(spec.policy)}"
        settings = f"temperature {method.temperature:g}, seed {method.seed}"
        return f"{told}, {settings}" + (f", scored by {describe(spec.reward)}" if spec.reward is not None else "")
