"""What completions are worth to a run: every part of its reward, the weights between them, and the gold beside."""

from __future__ import annotations

import hashlib
import json
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rlhf_nb.compute.rundir import LineTail, append_line
from rlhf_nb.errors import RewardError, RlhfError
from rlhf_nb.maths.rewards import combine
from rlhf_nb.protocol.control import SetReward
from rlhf_nb.protocol.events import RewardReplaced
from rlhf_nb.protocol.spec import FunctionReward, ModelReward, NamedReward, describe, reward_parts
from rlhf_nb.rewards.functions import RewardFunction, on_rows
from rlhf_nb.rewards.resolve import load, scorer
from rlhf_nb.training import distributed

if TYPE_CHECKING:
    from rlhf_nb.methods.online import OnlineMethod
    from rlhf_nb.training.context import Context

OneReward = NamedReward | ModelReward | FunctionReward


@dataclass
class Part:
    name: str
    """As the run began with it; it keeps the name when it is replaced."""
    reference: OneReward
    function: RewardFunction
    shift: float = 0.0


class Scoring:
    """Scores this rank's completions. Texts go in, never tokens: no tokenizer need be shared."""

    def __init__(
        self, method: OnlineMethod, context: Context, live: Any, device: Any, backbone: tuple[str, Any] | None = None
    ) -> None:
        self.method, self.context, self.live, self.device, self.backbone = method, context, live, device, backbone
        self.parts = [
            Part(part.name, part.reward, self._load(part.reward)) for part in reward_parts(context.spec.reward)
        ]
        self.gold = scorer(context, "gold", device=device)
        self.journal = Journal(context.run_dir / f"rewards-{context.rank}.jsonl", read=context.attempt > 1)
        self._last: tuple[list[dict[str, Any]], list[str], list[list[float]]] | None = None

    def _load(self, reference: OneReward) -> RewardFunction:
        return load(self.context, reference, device=self.device, backbone=self.backbone)

    @property
    def names(self) -> list[str]:
        return [part.name for part in self.parts]

    def rollout(
        self, number: int, rows: Sequence[dict[str, Any]], texts: list[str], at: Sequence[int]
    ) -> list[list[float]]:
        """(B, M) scores of a rollout's completions by each part. What a function said is kept for a restart.

        Args:
            at: Each completion's number in the rollout.
        """
        columns = []
        for part in self.parts:
            if isinstance(part.reference, ModelReward):
                scores = self._call(part, rows, texts)
            else:
                keys = [
                    self.journal.key(part.reference, number, row["prompt"], text, place)
                    for row, text, place in zip(rows, texts, at, strict=True)
                ]
                known = self.journal.get(keys)
                scores = known if known is not None else self._call(part, rows, texts)
                if known is None:
                    self.journal.put(keys, scores)
            columns.append([score + part.shift for score in scores])
        scores_BM = [list(row) for row in zip(*columns, strict=True)]
        self._last = (list(rows), texts, scores_BM)
        return scores_BM

    def scores(self, rows: Sequence[dict[str, Any]], texts: list[str]) -> list[list[float]]:
        """(B, M) of completions that are only looked at or compared with: nothing is remembered."""
        columns = [[score + part.shift for score in self._call(part, rows, texts)] for part in self.parts]
        return [list(row) for row in zip(*columns, strict=True)]

    def golds(self, rows: Sequence[dict[str, Any]], texts: list[str]) -> list[float] | None:
        return on_rows(self.gold, rows, texts) if self.gold is not None else None

    def combined(self, scores_BM: Tensor) -> Tensor:
        """(…,) the one score of each completion, at the weights of now; `scores_BM` is (…, M)."""
        if scores_BM.shape[-1] == 1:
            return scores_BM[..., 0]
        weights_M = scores_BM.new_tensor([getattr(self.live, f"reward_weight/{name}") for name in self.names])
        flat_BM = scores_BM.reshape(-1, len(self.parts))
        by, std_coef = self.method.combine_rewards, self.live.reward_std_coef
        return combine(flat_BM, weights_M, by, std_coef=std_coef).reshape(scores_BM.shape[:-1])

    def _call(self, part: Part, rows: Sequence[dict[str, Any]], texts: list[str]) -> list[float]:
        with limited(self.method.reward_timeout, f"reward {describe(part.reference)}"):
            return on_rows(part.function, rows, texts)

    # --- another reward in flight -----------------------------------------------------------------------------------

    def refusal(self, control: SetReward) -> str | None:
        if control.part not in self.names:
            return f'no part of the reward is called "{control.part}"; it has: {", ".join(self.names)}'
        return None

    def replace(self, control: SetReward, step: int) -> RewardReplaced:
        """Put another reward in a part's place; its scores are shifted to the old one's mean over the last rollout.

        Raises:
            RlhfError: It cannot be loaded or does not score; the part stays as it was.
        """
        index = self.names.index(control.part)
        old = self.parts[index]
        sums, failure, new, scores = [0.0, 0.0, 0.0], None, old, list[float]()
        try:
            new = Part(old.name, control.reward, self._load(control.reward))
            if self._last is not None:
                rows, texts, before_BM = self._last
                scores = self._call(new, rows, texts)
                sums = [sum(row[index] for row in before_BM), sum(scores), float(len(scores))]
        except RlhfError as error:
            failure = str(error)
        # Every rank answers: one on which it failed must not leave the others waiting.
        answers = distributed.gather_objects((sums, failure))
        if failures := [said for _, said in answers if said is not None]:
            raise RewardError(failures[0])
        before, after, n = (sum(each) for each in zip(*(said for said, _ in answers), strict=True))
        new.shift = (before - after) / n if n else 0.0
        if self._last is not None:
            # Another part that is replaced now is anchored to it, too.
            rows, texts, before_BM = self._last
            there = [
                [*row[:index], score + new.shift, *row[index + 1 :]]
                for row, score in zip(before_BM, scores, strict=True)
            ]
            self._last = (rows, texts, there)
        self.parts[index] = new
        return RewardReplaced(
            id=control.id,
            part=old.name,
            old=describe(old.reference),
            new=control.reward,
            shift=new.shift,
            effective_step=step,
            who=control.who,
            why=control.why,
        )

    def again(self, change: RewardReplaced) -> None:
        """Make a recorded change again, with the shift that it had then."""
        function = self._load(change.new)
        self.parts[self.names.index(change.part)] = Part(change.part, change.new, function, change.shift)
        self._last = None

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def state(self) -> list[dict[str, Any]]:
        """Parts that are no longer those of the spec."""
        began = [part.reward for part in reward_parts(self.context.spec.reward)]
        return [
            {"part": part.name, "new": part.reference.model_dump(mode="json"), "shift": part.shift}
            for part, first in zip(self.parts, began, strict=True)
            # The first one, come back, is anchored to those between.
            if part.reference != first or part.shift
        ]

    def load_state(self, state: list[dict[str, Any]]) -> None:
        for one in state:
            self.again(RewardReplaced(id="", old="", effective_step=0, **one))


@contextmanager
def limited(seconds: float, what: str) -> Iterator[None]:
    """Raise RewardError inside a call that takes longer. Only the main thread of a process can be interrupted so."""
    if threading.current_thread() is not threading.main_thread() or not seconds:
        yield
        return

    def late(*_: Any) -> None:
        raise RewardError(f"{what}: no answer within reward_timeout={seconds:g} s; make it faster or raise the limit")

    before = signal.signal(signal.SIGALRM, late)
    # Again every second: a bare `except` around the slow line may swallow the first.
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Journal:
    """What reward functions said of a run's completions. A restart that samples the same again asks nobody twice."""

    def __init__(self, path: Path, *, read: bool) -> None:
        self.path = path
        self._known: dict[str, float] = {}
        for line in LineTail(path).read_raw() if read else ():
            # A line that a death tore is a call that is made again.
            with suppress(ValueError, KeyError):
                self._known.update(json.loads(line)["scores"])

    @staticmethod
    def key(reference: OneReward, rollout: int, prompt: Any, completion: str, at: int) -> str:
        """The same completion may come twice in a rollout, and a reward may draw lots: each row has its own."""
        what = [reference.model_dump(mode="json"), rollout, at, prompt, completion]
        return hashlib.sha256(json.dumps(what, ensure_ascii=False).encode()).hexdigest()[:24]

    def get(self, keys: list[str]) -> list[float] | None:
        """All of them or none: a reward may look at its whole batch."""
        return [self._known[key] for key in keys] if all(key in self._known for key in keys) else None

    def put(self, keys: list[str], scores: list[float]) -> None:
        append_line(self.path, {"scores": dict(zip(keys, scores, strict=True))})
