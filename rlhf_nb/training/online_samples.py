"""Completions to look at: what the policy says now beside what the reference said to the same prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rlhf_nb.data.rows import is_prompt, prompt_text
from rlhf_nb.errors import RewardError
from rlhf_nb.maths.masked import masked_sum
from rlhf_nb.protocol.control import Sample
from rlhf_nb.protocol.events import SampleItem
from rlhf_nb.training import data
from rlhf_nb.training.rollout.base import Completions, Sampler, uniforms
from rlhf_nb.training.rollout.transformers_backend import pad_left

if TYPE_CHECKING:
    from rlhf_nb.training.online import OnlineTrainer

FIXED, FRESH = 4, 4
"""Prompts of a periodic sample: the same ones throughout, to compare before and after, and others each time."""
POLICY_STREAM, REFERENCE_STREAM = 1 << 60, 1 << 61
"""Far above any rollout's number: looking at samples never draws a number that training draws."""


Worth = tuple[float | None, float | None]
"""Score and gold."""


@dataclass(frozen=True)
class _Said:
    text: str
    length: int
    score: float | None
    gold: float | None


class SampleTable:
    """Sampled, never greedy: what is labelled should be what the policy does. Rank 0 samples, the others wait for
    it."""

    def __init__(self, trainer: OnlineTrainer) -> None:
        self.trainer = trainer
        rows = trainer.context.held_out or trainer.rows
        self.rows: list[dict[str, Any]] = list({repr(row["prompt"]): row for row in rows}.values())
        order = np.random.default_rng([trainer.method.seed, 2]).permutation(len(self.rows)).tolist()
        self.fixed, self.others = order[:FIXED], order[FIXED:]
        self._reference_said: dict[tuple[str, float], tuple[str, int]] = {}
        """Text and tokens, by prompt and temperature."""
        self._reference_worth: dict[tuple[str, float], Worth] = {}
        self._worth_by = ""
        """The rewards that said so: others have to say it anew."""

    def periodic(self) -> None:
        trainer = self.trainer
        if not trainer.context.is_main:
            return
        chance = np.random.default_rng([trainer.method.seed, trainer.step, 3])
        fresh = chance.choice(self.others, min(FRESH, len(self.others)), replace=False).tolist()
        trainer.emit.samples(trainer.step, self.items([self.rows[index] for index in [*self.fixed, *fresh]]))

    def answer(self, request: Sample) -> None:
        """What a person asked for; a reward that cannot judge a bare prompt leaves the scores empty."""
        trainer = self.trainer
        if trainer.context.is_main:
            rows = [{"prompt": prompt} for prompt in request.prompts if is_prompt(prompt)]
            trainer.emit.samples(trainer.step, self.items(rows) if rows else [], request_id=request.id)

    def items(self, rows: Sequence[dict[str, Any]]) -> list[SampleItem]:
        trainer = self.trainer
        prompts = [row["prompt"] for row in rows]
        ids = [data.prompt_ids(prompt, trainer.tokenizer)[-trainer.prompt_room :] for prompt in prompts]
        temperature = trainer.temperature
        trainer.sampler.refresh(trainer.step)
        completions = self._sample(trainer.sampler, ids, POLICY_STREAM + trainer.step, range(len(ids)), temperature)
        said = self._texts(completions)
        worth = self._worth(rows, [text for text, _ in said])
        now = [_Said(*one, *each) for one, each in zip(said, worth, strict=True)]
        before: Sequence[_Said | None] = [None] * len(rows)
        kl: Sequence[float | None] = [None] * len(rows)
        if trainer.method.has_reference:
            before = self._before(rows, ids, temperature)
            kl = self._kl(ids, completions, temperature)
        return [
            SampleItem(
                prompt=prompt_text(prompt),
                completion=said.text,
                reference_completion=old.text if old else None,
                score=said.score,
                reference_score=old.score if old else None,
                gold=said.gold,
                reference_gold=old.gold if old else None,
                length=said.length,
                kl=nats,
            )
            for prompt, said, old, nats in zip(prompts, now, before, kl, strict=True)
        ]

    def _sample(
        self, sampler: Sampler, ids: list[list[int]], stream: int, keys: Sequence[int], temperature: float
    ) -> Completions:
        method = self.trainer.method
        return sampler.sample(ids, uniforms(method.seed, stream, keys, method.max_new_tokens), temperature=temperature)

    def _texts(self, completions: Completions) -> list[tuple[str, int]]:
        texts = self.trainer.texts(completions.tokens_BT, completions.mask_BT)
        return list(zip(texts, completions.mask_BT.sum(1).tolist(), strict=True))

    def _worth(self, rows: Sequence[dict[str, Any]], texts: list[str]) -> list[Worth]:
        trainer = self.trainer
        scores: Sequence[float | None]
        golds: Sequence[float | None] | None
        try:
            parts = trainer.scoring.scores(rows, texts)
            scores = trainer.scoring.combined(torch.tensor(parts, dtype=torch.float64)).tolist()
            golds = trainer.scoring.golds(rows, texts)
        except RewardError as error:
            # Only looked at here: the same fault in a rollout ends the run.
            trainer.emit.notice(
                "samples_not_scored", f"samples at step {trainer.step} have no score: {error}", "warning"
            )
            scores, golds = [None] * len(texts), None
        return [(score, golds[i] if golds else None) for i, score in enumerate(scores)]

    def _before(self, rows: Sequence[dict[str, Any]], ids: list[list[int]], temperature: float) -> list[_Said]:
        """A reference that does not change is asked once for each prompt."""
        trainer = self.trainer
        moves = trainer.method.reference == "ema"
        if moves:
            self._reference_said.clear()
        if moves or self._worth_by != trainer.scoring.standing():
            self._reference_worth.clear()
            self._worth_by = trainer.scoring.standing()
        keys = [(repr(row["prompt"]), temperature) for row in rows]
        new = [i for i, key in enumerate(keys) if key not in self._reference_said]
        if new:
            # Its chance is the prompt's: whatever else was asked for before, it says the same.
            chance = [int.from_bytes(hashlib.sha256(keys[i][0].encode()).digest()[:7], "big") for i in new]
            with trainer.reference.open() as (trunk, head):
                sampler = trainer.make_sampler(trunk, head)
                completions = self._sample(sampler, [ids[i] for i in new], REFERENCE_STREAM, chance, temperature)
            said = self._texts(completions)
            self._reference_said.update({keys[i]: one for i, one in zip(new, said, strict=True)})
        unweighed = [i for i, key in enumerate(keys) if key not in self._reference_worth]
        if unweighed:
            worth = self._worth([rows[i] for i in unweighed], [self._reference_said[keys[i]][0] for i in unweighed])
            self._reference_worth.update({keys[i]: one for i, one in zip(unweighed, worth, strict=True)})
        return [_Said(*self._reference_said[key], *self._reference_worth[key]) for key in keys]

    def state(self) -> dict[str, Any]:
        """For a checkpoint: what the reference said, since in another batch a tie may fall otherwise."""
        said = [[*key, *one, *self._reference_worth.get(key, ())] for key, one in self._reference_said.items()]
        return {"reference_said": said, "worth_by": self._worth_by}

    def load_state(self, state: dict[str, Any]) -> None:
        said = state.get("reference_said", [])
        self._reference_said = {(prompt, at): (text, length) for prompt, at, text, length, *_ in said}
        self._reference_worth = {(prompt, at): (w[0], w[1]) for prompt, at, _, _, *w in said if w}
        self._worth_by = state.get("worth_by", "")

    def _kl(self, ids: list[list[int]], completions: Completions, temperature: float) -> list[float]:
        trainer = self.trainer
        tokens_BP, seen_BP = pad_left(ids, trainer.tokenizer.pad_token_id, trainer.device)
        tokens_BL: Tensor = torch.cat([tokens_BP, completions.tokens_BT], 1)
        seen_BL = torch.cat([seen_BP, completions.mask_BT], 1)
        theirs_BT = trainer.reference.logprobs(tokens_BL, seen_BL, completions.mask_BT, temperature=temperature)
        assert theirs_BT is not None
        return masked_sum(completions.behavior_logprobs_BT - theirs_BT, completions.mask_BT, 1).tolist()
