"""What completions are worth to a run: every part of its reward, the weights between them, and the gold beside."""

from __future__ import annotations

import hashlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_nb.compute.rundir import LineTail, append_line
from rlhf_nb.errors import RewardError, RlhfError
from rlhf_nb.maths.rewards import combine
from rlhf_nb.protocol.control import SetReward
from rlhf_nb.protocol.events import RewardReplaced
from rlhf_nb.protocol.spec import FunctionReward, ModelReward, NamedReward, describe, reward_parts
from rlhf_nb.rewards.functions import RewardFunction, on_rows
from rlhf_nb.rewards.resolve import load, scorer
from rlhf_nb.training import distributed, rng
from rlhf_nb.training.rng import undisturbed

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
        self,
        method: OnlineMethod,
        context: Context,
        live: Any,
        device: Any,
        *,
        tokenizer: Any = None,
        backbone: tuple[str, Any] | None = None,
    ) -> None:
        """
        Args:
            tokenizer: The policy's.
            backbone: See `rewards.resolve.load`.
        """
        self.method, self.context, self.live, self.device = method, context, live, device
        self.tokenizer, self.backbone = tokenizer, backbone
        self.parts = [
            Part(part.name, part.reward, self._load(part.reward)) for part in reward_parts(context.spec.reward)
        ]
        self.gold = scorer(context, "gold", device=device)
        self.journal = Journal(context.run_dir / f"rewards-{context.rank}.jsonl", read=context.attempt > 1)
        self.last: Sequence[Any] | None = None
        """Rows, texts and (B, M) scores of the last rollout: what a reward that is put in is anchored to. A score is
        None where the part that stands now was not asked."""

    def _load(self, reference: OneReward) -> RewardFunction:
        found = load(
            self.context, reference, device=self.device, backbone=self.backbone, precision=self.method.precision
        )
        words = getattr(getattr(found, "members", [found])[0], "tokenizer", None)
        if words is not None and self.tokenizer is not None and words.get_vocab() != self.tokenizer.get_vocab():
            self.context.emit.notice(
                "reward_tokenizer",
                f"{describe(reference)} has another tokenizer than the policy: completions reach it as text and are "
                f"tokenised again",
            )
        return found

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
        scores_BM = self._kept("", number, rows, texts, at)
        self.last = (list(rows), texts, scores_BM)
        return scores_BM

    def compared(
        self, number: int, rows: Sequence[dict[str, Any]], texts: list[str], at: Sequence[int]
    ) -> list[list[float]]:
        """(N, M) scores of what a rollout's completions are compared with."""
        return self._kept("compared", number, rows, texts, at)

    def scores(self, rows: Sequence[dict[str, Any]], texts: list[str]) -> list[list[float]]:
        """(B, M) of completions that are only looked at: nothing is remembered, and no chance is used up."""
        with undisturbed():
            columns = [[score + part.shift for score in self._call(part, rows, texts)] for part in self.parts]
        return [list(row) for row in zip(*columns, strict=True)]

    def rollout_golds(
        self, number: int, rows: Sequence[dict[str, Any]], texts: list[str], at: Sequence[int]
    ) -> list[float] | None:
        """(B,) gold of a rollout's completions; None without a gold."""
        gold = reward_parts(self.context.spec.gold)
        if not gold:
            return None
        return self._once(gold[0].reward, "gold", number, rows, texts, at, lambda: self.golds(rows, texts) or [])

    def golds(self, rows: Sequence[dict[str, Any]], texts: list[str]) -> list[float] | None:
        """(B,) gold. It is only plotted: training goes on as it would without one."""
        if self.gold is None:
            return None
        what = f"gold {describe(reward_parts(self.context.spec.gold)[0].reward)}"
        with undisturbed(), limited(self.method.reward_timeout, what):
            return on_rows(self.gold, rows, texts)

    def _kept(
        self, what: str, number: int, rows: Sequence[dict[str, Any]], texts: list[str], at: Sequence[int]
    ) -> list[list[float]]:
        columns = []
        for part in self.parts:
            scores = self._once(part.reference, what, number, rows, texts, at, partial(self._call, part, rows, texts))
            columns.append([score + part.shift for score in scores])
        return [list(row) for row in zip(*columns, strict=True)]

    def _once(
        self,
        reference: OneReward,
        what: str,
        number: int,
        rows: Sequence[dict[str, Any]],
        texts: list[str],
        at: Sequence[int],
        call: Callable[[], list[float]],
    ) -> list[float]:
        """What a reward says, or said before a restart; a model's scores are worth no line."""
        if isinstance(reference, ModelReward):
            return call()
        keys = [
            self.journal.key(reference, what, number, row["prompt"], text, place)
            for row, text, place in zip(rows, texts, at, strict=True)
        ]
        known = self.journal.get(keys)
        if known is not None:
            return known
        before = rng.generators()
        scores = call()
        drew = {name: state for name, state in rng.generators().items() if state != before[name]}
        self.journal.put(number, keys, scores, drew)
        return scores

    def combined(self, scores_BM: Tensor) -> Tensor:
        """(…,) the one score of each completion, at the weights of now; `scores_BM` is (…, M)."""
        if scores_BM.shape[-1] == 1:
            return scores_BM[..., 0]
        weights_M = scores_BM.new_tensor([getattr(self.live, f"reward_weight/{name}") for name in self.names])
        flat_BM = scores_BM.reshape(-1, len(self.parts))
        by, std_coef = self.method.combine_rewards, self.live.reward_std_coef
        return combine(flat_BM, weights_M, by, std_coef=std_coef).reshape(scores_BM.shape[:-1])

    def standing(self) -> str:
        """What scores are made of now: the same text, the same score."""
        moved = {name: value for name, value in vars(self.live).items() if name.startswith("reward_")}
        return json.dumps([self.state(), moved], sort_keys=True)

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
            if self.last is not None:
                scores = self._looked(new)
                before = [row[index] for row in self.last[2]]
                if None not in before:
                    sums = [sum(before), sum(scores), float(len(scores))]
        except RlhfError as error:
            failure = str(error)
        except Exception as error:  # noqa: BLE001 - torn weights, a full device; the run has a reward that works
            said = (str(error).splitlines() or [""])[0]
            failure = f"{describe(control.reward)} cannot be put in: {type(error).__name__}: {said}"
        if failure is not None:
            new, scores = old, []
            # Here nothing holds what the attempt had taken.
            torch.cuda.empty_cache()
        # Every rank answers: one on which it failed must not leave the others waiting.
        answers = distributed.gather_objects((sums, failure))
        if failures := [said for _, said in answers if said is not None]:
            raise RewardError(failures[0])
        old_sum, new_sum, n = (sum(each) for each in zip(*(said for said, _ in answers), strict=True))
        new.shift = (old_sum - new_sum) / n if n else 0.0
        if not n:
            self.context.emit.notice(
                "reward_not_anchored",
                f"{describe(new.reference)} is put in before anything was scored here: there is no mean to carry over, "
                f"so its scores stand as they are",
            )
        self._stands(index, new, [score + new.shift for score in scores])
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
        new = Part(change.part, change.new, self._load(change.new), change.shift)
        self._stands(self.names.index(change.part), new, [None] * (len(self.last[2]) if self.last is not None else 0))

    def _looked(self, part: Part) -> list[float]:
        assert self.last is not None
        rows, texts, _ = self.last
        with undisturbed():
            return self._call(part, rows, texts)

    def _stands(self, index: int, new: Part, scores: Sequence[float | None]) -> None:
        """From now on it is the part."""
        self.parts[index] = new
        if self.last is not None:
            rows, texts, before_BM = self.last
            pairs = zip(before_BM, scores, strict=True)
            self.last = (rows, texts, [[*row[:index], score, *row[index + 1 :]] for row, score in pairs])

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

    before, began = signal.signal(signal.SIGALRM, late), time.monotonic()
    # Again every second: a bare `except` around the slow line may swallow the first.
    left, every = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:
            # There is one timer: whoever else had set it hears it late rather than never.
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - began), 1e-3), every)


class Journal:
    """What reward functions said of a run's completions. A restart that samples the same again asks nobody twice."""

    def __init__(self, path: Path, *, read: bool) -> None:
        self.path = path
        self._known: dict[str, float] = {}
        self._chance: dict[str, tuple[int, dict[str, Any]]] = {}
        for line in LineTail(path).read_raw() if read else ():
            # A line that a death tore is a call that is made again.
            with suppress(ValueError, KeyError):
                said = json.loads(line)
                self._known.update(said["scores"])
                if "generators" in said:
                    self._chance[next(iter(said["scores"]))] = (said["rollout"], said["generators"])

    @staticmethod
    def key(reference: OneReward, what: str, rollout: int, prompt: Any, completion: str, at: int) -> str:
        """The same completion may come twice in a rollout, and a reward may draw lots: each row has its own."""
        named = [reference.model_dump(mode="json"), what, rollout, at, prompt, completion]
        return hashlib.sha256(json.dumps(named, ensure_ascii=False).encode()).hexdigest()[:24]

    def get(self, keys: list[str]) -> list[float] | None:
        """All of them or none: a reward may look at its whole batch. Chance is then as the reward had left it."""
        if not all(key in self._known for key in keys):
            return None
        if keys and keys[0] in self._chance:
            rng.put_back(self._chance[keys[0]][1])
        return [self._known[key] for key in keys]

    def forget(self, rollouts: int) -> None:
        """The run goes on after so many: the chance of those is needed no more, and each takes kilobytes."""
        self._chance = {key: (number, state) for key, (number, state) in self._chance.items() if number >= rollouts}

    def put(self, rollout: int, keys: list[str], scores: list[float], drew: dict[str, Any]) -> None:
        """
        Args:
            drew: Generators that the call drew from, as it left them.
        """
        chance = {"rollout": rollout, "generators": drew} if drew else {}
        append_line(self.path, {"scores": dict(zip(keys, scores, strict=True)), **chance})
