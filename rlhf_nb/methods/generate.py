"""Completions of a model, as rows; best-of-n and rejection sampling.

Paper    RAFT, Dong et al. 2023, arXiv:2304.06767 (keep=best); ReST, Gulcehre et al. 2023, arXiv:2308.08998 (threshold).
Rows     prompt.
Models   the policy, frozen; the reward's, where one is given.
Result   n completions of every prompt, each drawn from the policy's own distribution at the temperature, with their
         lengths in tokens, whether they ended by themselves, and their scores; or what `keep` makes of them. With a
         reward also the mean score of the best of 1, 2, 4 … n, and of the gold reward beside it.

Chance is keyed by (seed, which of the n, prompt, position): a larger n keeps the completions that a smaller one drew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from rlhf_nb.data.selection import MADE, Keep, select
from rlhf_nb.errors import SpecError
from rlhf_nb.methods.base import LiveCoefficient, Method, Trainer
from rlhf_nb.protocol.events import Result
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
    keep: Keep = "all"
    """best: of each prompt the one that scores highest, as demonstrations. best_and_worst: the two ends, as pairs.
    threshold, top_fraction: all that are good enough, as demonstrations."""
    threshold: float | None = None
    """Of keep=threshold: the lowest score that is kept."""
    fraction: float | None = Field(None, gt=0, le=1)
    """Of keep=top_fraction: the share of all completions that is kept."""
    drop_ties: bool = True
    """Leave out prompts whose completions all score the same. Without it keep=best is best-of-n as a policy."""
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

    @property
    def made_kind(self) -> str:
        return MADE[self.keep]

    def check(self, spec: RunSpec) -> None:
        if self.keep != "all" and spec.reward is None:
            raise SpecError(f"generate: keep={self.keep} goes by a score; give --reward")
        for knob, keep in (("threshold", "threshold"), ("fraction", "top_fraction")):
            if (getattr(self, knob) is None) == (self.keep == keep):
                raise SpecError(f"generate: keep={self.keep} and {knob}={getattr(self, knob)}: {knob} goes with {keep}")
        if self.n < 2 and self.keep in ("best", "best_and_worst"):
            raise SpecError(f"generate: keep={self.keep} of n={self.n}: give n=2 or more")
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
        self.gold = weighted_scores(context, "gold", device=device)

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
        judged = {
            column: score(each, texts)
            for column, score in (("scores", self.score), ("golds", self.gold))
            if score is not None
        }
        made: list[dict[str, Any]] = []
        for index, row in enumerate(rows):
            of = slice(index * method.n, (index + 1) * method.n)
            one = {**row, "completions": texts[of]}
            one["completion_lengths"] = [len(completion.ids) for completion in said[of]]
            one["completion_ended"] = [completion.ended for completion in said[of]]
            made.append(one | {column: values[of] for column, values in judged.items()})
        counts = {
            "cut at max_new_tokens": sum(not one.ended for one in said),
            "prompts cut at the model's context": sum(a != b for a, b in zip(whole, ids, strict=True)),
        }
        return Made(made, counts={name: n for name, n in counts.items() if n})

    def finish(self, made: Made) -> Made:
        from rlhf_nb.training.row_job import Made

        method = self.method
        if self.score is not None:
            for result in best_of(made.rows):
                self.context.emit.event(result)
        if method.keep == "all":
            return made
        rows, dropped = select(
            made.rows,
            method.keep,
            threshold=method.threshold,
            fraction=method.fraction,
            drop_ties=method.drop_ties,
        )
        return Made(rows, {**made.dropped, **dropped}, made.counts)

    def summary(self, made: Made) -> str:
        method, spec = self.method, self.context.spec
        n = len(made.rows)
        told = f"{n:,} rows, {method.n} completions a prompt by {describe(spec.policy)}"
        settings = f"temperature {method.temperature:g}, seed {method.seed}"
        scored = f", scored by {describe(spec.reward)}" if spec.reward is not None else ""
        kept = "" if method.keep == "all" else f", keep={method.keep}"
        return f"{told}, {settings}{scored}{kept}"


def best_of(rows: Sequence[Row]) -> list[Result]:
    """What best-of-n would score for n = 1, 2, 4 … and all, told from the same completions without bias.

    Each a mean over prompts with Student's 95 % interval; in `detail` n, the gold mean, and the most nats that
    best-of-n can be away from the policy.
    """
    import torch

    from rlhf_nb.maths.best_of_n import best_of_n_mean, kl_bound
    from rlhf_nb.statistics.intervals import mean

    scores_PN = torch.tensor([row["scores"] for row in rows], dtype=torch.float64)
    golds = [row.get("golds") for row in rows]
    golds_PN = torch.tensor(golds, dtype=torch.float64) if all(golds) else None
    N = scores_PN.shape[1]
    results = []
    for n in sorted({*(1 << k for k in range(N.bit_length()) if 1 << k <= N), N}):
        kept_P = best_of_n_mean(scores_PN, scores_PN, n)
        estimate = mean(kept_P.tolist()) if len(rows) > 1 else None
        detail: dict[str, Any] = {"best_of": n, "kl_bound": kl_bound(n)}
        if golds_PN is not None:
            detail["gold"] = float(best_of_n_mean(scores_PN, golds_PN, n).mean())
        interval = (estimate.interval.low, estimate.interval.high) if estimate is not None else None
        results.append(
            Result(name="best_of_n", value=float(kept_P.mean()), interval=interval, n=len(rows), detail=detail)
        )
    return results
