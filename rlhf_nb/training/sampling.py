"""Completions while training: what the policy says now, beside what the reference says to the same prompt."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rlhf_nb.data.rows import Prompt, iter_prompts, prompt_text
from rlhf_nb.methods.base import GradientMethod
from rlhf_nb.protocol.events import SampleItem
from rlhf_nb.rewards.resolve import scorer
from rlhf_nb.training import data, models
from rlhf_nb.training.rng import undisturbed

if TYPE_CHECKING:
    from rlhf_nb.training.context import Context

PROMPTS = 8
"""Prompts of a periodic sample: the same ones throughout a run, so that before and after can be compared."""
COPY_LIMIT_BYTES = 2 << 30
"""Largest model that is read a second time for a moment to show what it said before training."""


@dataclass
class Completion:
    ids: list[int]
    text: str
    ended: bool
    """It ends with an end token, not because it reached the limit."""


class Sampler:
    """Samples from the trained policy without disturbing the training."""

    def __init__(
        self,
        policy: Any,
        tokenizer: Any,
        prompts: list[Prompt],
        *,
        max_new_tokens: int,
        max_length: int,
        reference: Callable[[], AbstractContextManager[Any]] | None = None,
        score: Callable[..., Sequence[float | None]] | None = None,
        gold: Callable[..., Sequence[float | None]] | None = None,
    ) -> None:
        """
        Args:
            reference: Opens the reference model; None where there is none.
            score: f(prompts, completions) for `score`, `gold` for the one that is only looked at.
        """
        self.policy, self.tokenizer, self.prompts = policy, tokenizer, prompts
        self.max_new_tokens, self.max_length = max_new_tokens, max_length
        self.reference, self.score, self.gold = reference, score, gold
        self._said: dict[str, Completion] = {}
        """What the reference said; it does not change, so each prompt is asked once."""

    @classmethod
    def of(
        cls,
        context: Context,
        trainer: Any,
        base: str,
        *,
        score: Callable[..., Sequence[float | None]] | None = None,
        gold: Callable[..., Sequence[float | None]] | None = None,
    ) -> Sampler:
        """For a causal model in one of transformers' trainers, trained from the directory `base`.

        Args:
            score, gold: In place of the spec's reward and gold, of a trainer that has loaded them already.
        """
        method = context.method
        assert isinstance(method, GradientMethod)
        device = trainer.accelerator.device
        rows = context.held_out or context.rows
        prompts = [prompt for _, prompt in zip(range(PROMPTS), iter_prompts(rows), strict=False)]
        return cls(
            trainer.model,
            trainer.processing_class,
            prompts,
            max_new_tokens=method.sample_tokens,
            max_length=models.context_length(base) or method.max_length,
            reference=_reference(trainer, base),
            score=score or (scorer(context, "reward", device=device) if context.is_main else None),
            gold=gold or (scorer(context, "gold", device=device) if context.is_main and score is None else None),
        )

    def items(self, prompts: list[Prompt], seed: int) -> list[SampleItem]:
        """One completion of each prompt by the policy and, where there is a reference, by the reference."""
        with undisturbed(self.policy):
            now = self._generate(self.policy, prompts, seed)
            before: list[Completion | None] = [None] * len(prompts)
            kl: list[float | None] = [None] * len(prompts)
            if self.reference is not None:
                with self.reference() as reference:
                    if reference is not None:
                        before = list(self._before(reference, prompts, seed))
                        kl = list(self._kl(reference, prompts, now))
            scores, before_scores = self._scores(self.score, prompts, now, before)
            golds, before_golds = self._scores(self.gold, prompts, now, before)
        return [
            SampleItem(
                prompt=prompt_text(prompt),
                completion=completion.text,
                reference_completion=said.text if said else None,
                score=scores[i],
                reference_score=before_scores[i],
                gold=golds[i],
                reference_gold=before_golds[i],
                length=len(completion.ids),
                kl=kl[i],
            )
            for i, (prompt, completion, said) in enumerate(zip(prompts, now, before, strict=True))
        ]

    def metrics(self, items: list[SampleItem]) -> dict[str, float]:
        """Means over the sample, for the charts."""
        named: dict[str, list[Any]] = {
            "kl/policy_reference": [item.kl for item in items],
            "reward/score": [item.score for item in items],
            "reward/gold": [item.gold for item in items],
            "completion/length_mean": [item.length for item in items],
        }
        there = {name: [float(v) for v in values if v is not None] for name, values in named.items()}
        return {name: fmean(values) for name, values in there.items() if values}

    def _before(self, reference: Any, prompts: list[Prompt], seed: int) -> Iterator[Completion]:
        keys = [repr(prompt) for prompt in prompts]
        unasked = [prompt for key, prompt in zip(keys, prompts, strict=True) if key not in self._said]
        if unasked:
            self._said.update(zip(map(repr, unasked), self._generate(reference, unasked, seed), strict=True))
        return (self._said[key] for key in keys)

    def _generate(self, model: Any, prompts: list[Prompt], seed: int) -> list[Completion]:
        return generate(
            model, self.tokenizer, prompts, max_new_tokens=self.max_new_tokens, max_length=self.max_length, seed=seed
        )

    def _kl(self, reference: Any, prompts: list[Prompt], completions: list[Completion]) -> Iterator[float]:
        ids = [data.prompt_ids(prompt, self.tokenizer)[-self._prompt_room :] for prompt in prompts]
        said = [completion.ids for completion in completions]
        # The reference of an adapter is the policy with it switched off, so the policy must be read outside.
        theirs = sequence_logprobs(reference, ids, said)
        with self._as_policy(reference):
            ours = sequence_logprobs(self.policy, ids, said)
        return (p - q for p, q in zip(ours, theirs, strict=True))

    @property
    def _prompt_room(self) -> int:
        return max(1, self.max_length - self.max_new_tokens)

    @contextmanager
    def _as_policy(self, reference: Any) -> Iterator[None]:
        if reference is not self.policy:
            yield
            return
        self.policy.enable_adapter_layers()
        try:
            yield
        finally:
            self.policy.disable_adapter_layers()

    def _scores(
        self,
        f: Callable[..., Sequence[float | None]] | None,
        prompts: list[Prompt],
        now: list[Completion],
        before: list[Completion | None],
    ) -> tuple[list[float | None], list[float | None]]:
        nothing: list[float | None] = [None] * len(prompts)
        if f is None or not prompts:
            return nothing, nothing
        scores: list[float | None] = list(f(prompts, [completion.text for completion in now]))
        if any(said is None for said in before):
            return scores, nothing
        return scores, list(f(prompts, [said.text for said in before if said is not None]))


def _reference(trainer: Any, base: str) -> Callable[[], AbstractContextManager[Any]] | None:
    """How to reach the model as it was before training: its adapter off, the trainer's reference, or read again."""

    @contextmanager
    def adapter_off() -> Iterator[Any]:
        model = trainer.model
        was = [(module, module.training) for module in model.modules()]
        model.disable_adapter_layers()
        try:
            yield model
        finally:
            model.enable_adapter_layers()
            for module, training in was:
                module.training = training

    @contextmanager
    def frozen() -> Iterator[Any]:
        with undisturbed(trainer.ref_model):
            yield trainer.accelerator.unwrap_model(trainer.ref_model)

    @contextmanager
    def read_again() -> Iterator[Any]:
        yield models.load_model(base, type(trainer.model)).to(trainer.accelerator.device)

    if hasattr(trainer.model, "peft_config"):
        return adapter_off
    if getattr(trainer, "ref_model", None) is not None:
        return frozen
    size = sum(parameter.numel() * parameter.element_size() for parameter in trainer.model.parameters())
    return read_again if size <= COPY_LIMIT_BYTES else None


def generate(
    model: Any,
    tokenizer: Any,
    prompts: list[Prompt],
    *,
    max_new_tokens: int,
    max_length: int,
    seed: int,
    temperature: float = 1.0,
) -> list[Completion]:
    """Sample one completion a prompt. Call it inside `undisturbed`: it seeds torch and switches to eval mode."""
    import torch

    device = next(model.parameters()).device
    room = max(1, max_length - max_new_tokens)
    ids = [data.prompt_ids(prompt, tokenizer)[-room:] for prompt in prompts]
    width = max(map(len, ids))
    input_ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in ids], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=device)
    ends = end_tokens(model, tokenizer)
    model.eval()
    torch.manual_seed(seed)
    with torch.no_grad(), _every_token_as_likely_as_it_is(model):
        out = model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            eos_token_id=sorted(ends) or None,
            pad_token_id=tokenizer.pad_token_id,
        )
    completions = []
    for row in out[:, width:].tolist():
        end = next((i for i, token in enumerate(row) if token in ends), None)
        kept = row if end is None else row[: end + 1]
        completions.append(Completion(kept, tokenizer.decode(kept, skip_special_tokens=True).strip(), end is not None))
    return completions


@contextmanager
def _every_token_as_likely_as_it_is(model: Any) -> Iterator[None]:
    """Sets the model's own generation config aside: what it penalises or forbids, transformers takes from there
    whatever a call says."""
    from transformers import GenerationConfig

    held = model.get_base_model() if hasattr(model, "get_base_model") else model
    stated, held.generation_config = held.generation_config, GenerationConfig()
    try:
        yield
    finally:
        held.generation_config = stated


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end a completion: the tokenizer's and, for chat models that end a turn otherwise, the model's."""
    stated = getattr(model.generation_config, "eos_token_id", None)
    stated = stated if isinstance(stated, list) else [stated]
    return {int(token) for token in [*stated, tokenizer.eos_token_id] if token is not None}


def sequence_logprobs(model: Any, prompts: list[list[int]], completions: list[list[int]]) -> list[float]:
    """log p(completion | prompt) in nats, summed over tokens. Call it inside `undisturbed`: it sets eval mode."""
    import torch

    from rlhf_nb.maths.logprobs import position_ids, token_logprobs

    device = next(model.parameters()).device
    held = model.get_base_model() if hasattr(model, "get_base_model") else model
    model.eval()
    P, T = max(map(len, prompts)), max(map(len, completions))
    pairs = list(zip(prompts, completions, strict=True))
    input_ids = torch.tensor([[0] * (P - len(p)) + p + c + [0] * (T - len(c)) for p, c in pairs], device=device)
    mask = torch.tensor(
        [[0] * (P - len(p)) + [1] * (len(p) + len(c)) + [0] * (T - len(c)) for p, c in pairs], device=device
    )
    # Logits of the prompts, a vocabulary wide, would be thrown away.
    knows = "logits_to_keep" in inspect.signature(type(held).forward).parameters
    kept = {"logits_to_keep": T + 1} if knows else {}
    with torch.no_grad():
        logits = model(input_ids=input_ids, attention_mask=mask, position_ids=position_ids(mask), **kept).logits
        logprobs_BT = token_logprobs(logits[:, -T - 1 : -1].float(), input_ids[:, P:])
    return logprobs_BT.masked_fill(mask[:, P:] == 0, 0.0).sum(1).tolist()
