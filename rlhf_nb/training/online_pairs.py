"""What orders the pairs of a trainer that samples two completions of each prompt: the run's reward, in TRL's words.

The trainer's rows carry a prompt and the number of the run's row, nothing else: columns of any kind stay with us, and
none is padded or turned into a tensor on its way to the reward.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import fmean
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_nb.data.rows import Prompt, Row
from rlhf_nb.errors import RlhfError
from rlhf_nb.protocol.events import RewardReplaced
from rlhf_nb.training import checkpoints, data, distributed
from rlhf_nb.training.control import BoundCoefficient
from rlhf_nb.training.prompt_order import prompts_that_fit
from rlhf_nb.training.scoring import Scoring

if TYPE_CHECKING:
    from rlhf_nb.methods.base import LiveCoefficient
    from rlhf_nb.methods.online_dpo import OnlineDPO
    from rlhf_nb.training.context import Context


def trainer_rows(context: Context, tokenizer: Any, max_length: int) -> list[Row]:
    """Rows of the trainer, `prompt` and `row`. Of a mixture: as many as the run will see, drawn in its shares."""
    fitting = prompts_that_fit(context, tokenizer, max_length)
    kept = fitting.kept
    if len(context.mixture) > 1:
        kept = [kept[index] for index in fitting.order(0, context.method.max_steps * context.method.batch_size)]
    shaped = data.for_trl((context.rows[index] for index in kept), "prompts", tokenizer)
    return [{"prompt": row["prompt"], "row": index} for row, index in zip(shaped, kept, strict=True)]


class PairScoring:
    """A reward function as TRL calls one: of 2B completions the first B are the prompts' first ones; 2B scores."""

    __name__ = "reward"

    def __init__(self, method: OnlineDPO, context: Context) -> None:
        self.method, self.context = method, context
        self.live: Any = SimpleNamespace(**method.start_values(context.spec))
        self.scoring: Scoring
        self._trainer: Any = None
        self._seen: list[dict[str, Any]] = []
        """What was scored since the last metrics, a dict a micro-batch."""
        self._at = (0, 0)
        self._known = {repr(row["prompt"]): row for row in context.rows}
        self._said: set[str] = set()

    def watch(self, trainer: Any) -> None:
        """Load the rewards onto the trainer's device, and put back those that replaced others before the checkpoint."""
        self._trainer = trainer
        method: Any = self.method
        device, tokenizer = trainer.accelerator.device, trainer.processing_class
        self.scoring = Scoring(method, self.context, self.live, device, tokenizer=tokenizer)
        context = self.context
        context.control.rewards = self.scoring
        if context.resume_from is not None:
            step = checkpoints.step_of(context.resume_from)
            for change in replaced_until(context, step):
                self.scoring.again(change)

    def bound(self, live: LiveCoefficient) -> BoundCoefficient:
        return BoundCoefficient(
            live,
            lambda: getattr(self.live, live.name),
            lambda value: setattr(self.live, live.name, value),
            live.unavailable_when(self.method) if live.unavailable_when else None,
        )

    # --- TRL's reward function ------------------------------------------------------------------------------------

    def __call__(
        self, *, completions: list[Any], completion_ids: list[list[int]], row: list[int], **_: Any
    ) -> list[float]:
        began = time.perf_counter()
        rows = [self.context.rows[index] for index in row]
        texts = [(one if isinstance(one, str) else one[-1]["content"]).strip() for one in completions]
        first = self.context.rank * len(texts)
        number, at = self._number(), range(first, first + len(texts))
        said = self.scoring.rollout(number, rows, texts, at)
        scores_BM = torch.tensor(said, dtype=torch.float64)
        score_B = self.scoring.combined(scores_BM)
        took = time.perf_counter() - began
        golds = self.scoring.rollout_golds(number, rows, texts, at)
        lengths, ended = zip(*(self._extent(ids) for ids in completion_ids), strict=True)
        self._seen.append(
            {
                "scores": scores_BM.tolist(),
                "score": score_B.tolist(),
                "gold": golds,
                "length": lengths,
                "ended": ended,
                "penalty": self._trainer.args.missing_eos_penalty,
                "seconds": took,
            }
        )
        return score_B.tolist()

    def _number(self) -> int:
        """Of this micro-batch in the run, the same again after a restart."""
        step, parts = self._trainer.state.global_step, self.method.gradient_accumulation
        self._at = (step, self._at[1] + 1 if self._at[0] == step and self._seen else 0)
        return step * parts + self._at[1]

    def _extent(self, ids: Sequence[int]) -> tuple[int, bool]:
        """Tokens up to and with the first end token, and whether there is one."""
        ends = set(self._trainer.eos_token_ids)
        at = next((i for i, token in enumerate(ids) if token in ends), None)
        return (len(ids), False) if at is None else (at + 1, True)

    # --- what it saw ----------------------------------------------------------------------------------------------

    def metrics(self, kl: float, beta: float) -> dict[str, float]:
        """Of the step that was just taken, over all ranks. Every rank calls it."""
        parts = [one for rank in distributed.gather_objects(self._seen) for one in rank]
        seconds = sum(one["seconds"] for one in self._seen)
        self._seen = []
        score_B = torch.tensor([value for one in parts for value in one["score"]], dtype=torch.float64)
        cut_B = ~torch.tensor([value for one in parts for value in one["ended"]])
        lengths = [value for one in parts for value in one["length"]]
        penalised_B = score_B - parts[0]["penalty"] * cut_B
        values = {
            "reward/score": score_B.mean().item(),
            "reward/std": score_B.std().item(),
            "reward/mean": penalised_B.mean().item() - beta * kl,
            "completion/length_mean": fmean(lengths),
            "completion/truncated_fraction": cut_B.double().mean().item(),
            "pairs/tied": tied_share(parts),
            "time/score_s": seconds,
        }
        golds = [one["gold"] for one in parts]
        if golds[0] is not None:
            values["reward/gold"] = fmean(value for gold in golds for value in gold)
        if len(self.scoring.names) > 1:
            scores_BM = torch.tensor([row for one in parts for row in one["scores"]], dtype=torch.float64)
            means = scores_BM.mean(0).tolist()
            values |= {f"reward_part/{name}": mean for name, mean in zip(self.scoring.names, means, strict=True)}
            values["reward/disagreement"] = scores_BM.std(1, correction=0).mean().item()
        self._odd(values, score_B)
        return values

    def _odd(self, values: dict[str, float], score_B: Tensor) -> None:
        if values["completion/truncated_fraction"] == 1.0:
            self._once(
                "all_truncated",
                f"every completion of a step was cut at max_new_tokens={self.method.max_new_tokens}; raise it, or give "
                f"missing_eos_penalty",
            )
        if (score_B == score_B[0]).all():
            self._once(
                "reward_constant",
                f"every completion of a step got the score {score_B[0].item():g}: the first of each two is taken as "
                f"chosen, which teaches nothing; try the reward on a few completions",
            )

    def _once(self, code: str, text: str) -> None:
        if code not in self._said:
            self._said.add(code)
            self.context.emit.notice(code, text, "warning")

    # --- completions that are only looked at ----------------------------------------------------------------------

    def look(self, prompts: list[Prompt], texts: list[str]) -> list[float | None]:
        def score(rows: list[Row], said: list[str]) -> list[float]:
            scores_BM = torch.tensor(self.scoring.scores(rows, said), dtype=torch.float64)
            return self.scoring.combined(scores_BM).tolist()

        return self._looked(score, prompts, texts)

    @property
    def look_at_gold(self) -> Callable[[list[Prompt], list[str]], list[float | None]] | None:
        if self.scoring.gold is None:
            return None
        return lambda prompts, texts: self._looked(self.scoring.golds, prompts, texts)

    def _looked(self, score: Callable[..., Any], prompts: list[Prompt], texts: list[str]) -> list[float | None]:
        """A person may ask about any prompt: one without the columns that a reward reads gets no score."""
        rows = [self._known.get(repr(prompt)) for prompt in prompts]
        found: list[float | None] = [None] * len(prompts)
        for of_run in (True, False):
            at = [i for i, row in enumerate(rows) if (row is not None) is of_run]
            if not at:
                continue
            try:
                said = score([rows[i] or {"prompt": prompts[i]} for i in at], [texts[i] for i in at])
            except RlhfError:
                if of_run:
                    raise
                continue
            for i, value in zip(at, said, strict=True):
                found[i] = value
        return found


def tied_share(parts: list[dict[str, Any]]) -> float:
    """Share of pairs whose two penalised scores are the same."""
    tied, pairs = 0, 0
    for one in parts:
        scores = [s - one["penalty"] * (not ended) for s, ended in zip(one["score"], one["ended"], strict=True)]
        half = len(scores) // 2
        tied += sum(first == second for first, second in zip(scores[:half], scores[half:], strict=True))
        pairs += half
    return tied / pairs


def replaced_until(context: Context, step: int) -> list[RewardReplaced]:
    """Rewards that took another's place at or before an optimizer step, each once, in their order.

    From the run's own log: a trainer of TRL's keeps none of it in its checkpoint.
    """
    from rlhf_nb.compute.rundir import RunDir

    found: dict[str, RewardReplaced] = {}
    for event in RunDir(context.run_dir).events():
        if isinstance(event, RewardReplaced) and event.effective_step <= step:
            found.setdefault(event.id, event)
    return sorted(found.values(), key=lambda change: (change.effective_step, change.seq))
