"""A chat model in this process, through transformers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf_nb.data.rows import Prompt
from rlhf_nb.errors import SpecError
from rlhf_nb.feedback.chat import Question, Reply

BATCH = 16
"""Questions answered at a time."""
COLD = 1e-6
"""The temperature that stands for 0: the likeliest token is then drawn whatever the lot."""


class LocalChat:
    """Answers of a saved model. The lots are keyed by seed and question: the same question draws the same again."""

    def __init__(self, model: Any, tokenizer: Any, *, name: str, limit: int | None, seed: int = 0) -> None:
        """
        Args:
            model: A causal model, in eval mode, where it is to compute.
            limit: Tokens of its context; None where it has none.
        """
        from rlhf_nb.training.actor_critic import check_trunk_and_head, trunk_and_head
        from rlhf_nb.training.rollout.transformers_backend import TransformersSampler
        from rlhf_nb.training.sampling import end_tokens

        if not getattr(tokenizer, "chat_template", None):
            raise SpecError(
                f"judge {name}: its tokenizer has no chat template; take a chat model, or judge with another"
            )
        self.model, self.tokenizer, self.name, self.seed = model, tokenizer, name, seed
        self.limit = limit or math.inf
        check_trunk_and_head(model)
        self.sampler = TransformersSampler(
            *trunk_and_head(model),
            end_tokens=end_tokens(model, tokenizer),
            pad_token=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )

    @classmethod
    def load(cls, path: str, *, name: str, device: str, seed: int = 0) -> LocalChat:
        import torch

        from rlhf_nb.training import models

        # Nothing is trained: half the memory and twice the speed where there is hardware for it.
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        model = models.load_model(path, dtype=dtype).to(device).eval()
        limit = models.context_length(path)
        return cls(model, models.load_tokenizer(path), name=name or Path(path).name, limit=limit, seed=seed)

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, Reply]]:
        from rlhf_nb.training.data import prompt_ids

        if not getattr(self.tokenizer, "chat_template", None):
            raise SpecError(
                f"judge {self.name}: its tokenizer has no chat template; take a chat model, or judge with another"
            )
        ids = [prompt_ids(question.messages, self.tokenizer) for question in questions]
        fitting = []
        for index, (question, row) in enumerate(zip(questions, ids, strict=True)):
            room = 1 if question.letters else question.max_tokens
            if len(row) + room > self.limit:
                yield index, Reply(failure="too_long", detail=f"{len(row)} tokens, and {self.limit} are its context")
            else:
                fitting.append(index)

        def kind(index: int) -> tuple[bool, float]:
            return bool(questions[index].letters), questions[index].temperature

        # Of like length together: a batch is padded to its longest.
        fitting.sort(key=lambda index: (*kind(index), len(ids[index])))
        for (letters, _), same in itertools.groupby(fitting, key=kind):
            answer = self._letters if letters else self._texts
            members = list(same)
            for batch in (members[at : at + BATCH] for at in range(0, len(members), BATCH)):
                yield from zip(batch, answer([questions[i] for i in batch], [ids[i] for i in batch]), strict=True)

    def _letters(self, questions: Sequence[Question], ids: Sequence[list[int]]) -> list[Reply]:
        """The letters' log-probabilities as the next token, and the likeliest token as the text."""
        import torch

        from rlhf_nb.maths.logprobs import position_ids
        from rlhf_nb.training.rollout.transformers_backend import pad_left

        tokens_BP, mask_BP = pad_left(ids, self.sampler.pad_token, next(self.model.parameters()).device)
        with torch.no_grad():
            out = self.model(input_ids=tokens_BP, attention_mask=mask_BP, position_ids=position_ids(mask_BP))
            logprobs_BV = out.logits[:, -1].float().log_softmax(-1)
        replies = []
        for question, logprobs_V in zip(questions, logprobs_BV, strict=True):
            found = {
                letter: float(logprobs_V[spelled].logsumexp(0))
                for letter in question.letters
                if (spelled := self._spellings(letter))
            }
            text = self.tokenizer.decode([int(logprobs_V.argmax())], skip_special_tokens=True)
            replies.append(Reply(text=text, logprobs=found))
        return replies

    def complete(self, prompts: Sequence[Prompt], uniforms_BT: Any, *, temperature: float) -> list[str]:
        """One completion of each prompt by itself, without a system's word; a longer prompt loses its beginning."""
        from rlhf_nb.training.data import prompt_ids

        room = None if self.limit == math.inf else int(self.limit) - uniforms_BT.shape[1]
        ids = [prompt_ids(prompt, self.tokenizer) for prompt in prompts]
        ids = [row if room is None else row[-room:] for row in ids]
        drawn = self.sampler.sample(ids, uniforms_BT, temperature=temperature)
        kept = (tokens_T[mask_T].tolist() for tokens_T, mask_T in zip(drawn.tokens_BT, drawn.mask_BT, strict=True))
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in kept]

    def _spellings(self, letter: str) -> list[int]:
        """Single tokens that say the letter, with a space before it or without."""
        made = (self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (letter, f" {letter}"))
        return sorted({row[0] for row in made if len(row) == 1})

    def _texts(self, questions: Sequence[Question], ids: Sequence[list[int]]) -> list[Reply]:
        import numpy as np

        from rlhf_nb.training.rollout.base import uniforms

        width = max(question.max_tokens for question in questions)
        lots_BT = np.concatenate([uniforms(self.seed, question.draw, [0], width) for question in questions])
        drawn = self.sampler.sample(ids, lots_BT, temperature=questions[0].temperature or COLD)
        replies = []
        for question, tokens_T, mask_T in zip(questions, drawn.tokens_BT.tolist(), drawn.mask_BT.tolist(), strict=True):
            said = [token for token, counts in zip(tokens_T, mask_T, strict=True) if counts][: question.max_tokens]
            replies.append(Reply(text=self.tokenizer.decode(said, skip_special_tokens=True).strip()))
        return replies

    def close(self) -> None:
        """It holds nothing but the model."""
