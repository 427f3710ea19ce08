"""A reward model as a reward function: a saved sequence classifier with one output, and its own tokenizer."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_nb.data.rows import Prompt
from rlhf_nb.errors import SpecError
from rlhf_nb.rewards.functions import finite
from rlhf_nb.training import data, models

if TYPE_CHECKING:
    from rlhf_nb.training.context import Emitter

BATCH = 16


class RewardModelScorer:
    """Scores texts, never another model's tokens: policy and reward model need not share a tokenizer."""

    def __init__(
        self, model: Any, tokenizer: Any, *, name: str, max_length: int | None, batch_size: int = BATCH
    ) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.max_length, self.batch_size = max_length, batch_size
        self.bf16 = False
        self.emit: Emitter | None = None
        """Is told, once, that conversations are longer than what the model reads."""

    @classmethod
    def load(
        cls,
        path: str,
        *,
        device: Any = None,
        emit: Emitter | None = None,
        batch_size: int = BATCH,
        dtype: Any = None,
        tokenizer: str | None = None,
    ) -> RewardModelScorer:
        """From the directory a reward-model run saved, or any sequence classifier with one label.

        Args:
            tokenizer: Another directory, where the tokenizer does not lie beside the model.

        Raises:
            SpecError: It has two labels, or it is no sequence classifier.
        """
        from transformers import AutoModelForSequenceClassification

        check_head(path)
        words = models.load_tokenizer(tokenizer or path, emit)
        kwargs = {"dtype": dtype} if dtype is not None else {}
        model = models.load_model(path, AutoModelForSequenceClassification, num_labels=1, **kwargs)
        model.config.get_text_config().pad_token_id = _pad_token_id(model.config.get_text_config(), words)
        model.eval().requires_grad_(False)
        if device is not None:
            model.to(device)
        return cls(model, words, name=Path(path).name, max_length=models.context_length(path), batch_size=batch_size)

    @classmethod
    def load_on(cls, path: str, base: str, trunk: Any, *, device: Any = None) -> RewardModelScorer | None:
        """On another model's weights: where the directory keeps an adapter that was trained on `base`; else None."""
        adapter = str(Path(path) / "adapter")
        if not trained_on(adapter, base):
            return None
        check_head(path)
        return on_trunk(path, adapter, trunk, device=device)

    def compute_in_bf16(self) -> None:
        """From now on, in half the memory. Its head stays in float32: a score in bfloat16 has two or three digits."""
        from rlhf_nb.training.precision import OwnPrecision, halve_frozen

        self.bf16 = True
        whole = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        for name, child in list(whole.named_children()):
            if name != whole.base_model_prefix and next(child.parameters(), None) is not None:
                setattr(whole, name, OwnPrecision(child))
        halve_frozen(whole)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        """One finite score for each completion, in order.

        Raises:
            RewardError: A score that is not finite, with its index.
        """
        import torch

        device = next(self.model.parameters()).device
        pairs = zip(prompts, completions, strict=True)
        ids = self._that_fit([data.conversation_ids(*pair, self.tokenizer) for pair in pairs])
        scores = [math.nan] * len(ids)
        # Rows of like length together: the pads cost as much as the tokens.
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        for start in range(0, len(order), self.batch_size):
            indices = order[start : start + self.batch_size]
            width = max(len(ids[index]) for index in indices)
            pad = self.model.config.get_text_config().pad_token_id
            input_ids = torch.tensor([ids[i] + [pad] * (width - len(ids[i])) for i in indices], device=device)
            mask = torch.tensor([[1] * len(ids[i]) + [0] * (width - len(ids[i])) for i in indices], device=device)
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                logits = self.model(input_ids=input_ids, attention_mask=mask).logits
            for index, value in zip(indices, logits[:, 0].float().tolist(), strict=True):
                scores[index] = value
        return finite(scores, len(ids), self.name)

    def _that_fit(self, ids: list[list[int]]) -> list[list[int]]:
        """Conversations without their beginnings, where they are too long: what is scored stands at the end."""
        longest = self.max_length
        if longest is None or all(len(each) <= longest for each in ids):
            return ids
        if self.emit is not None:
            cut = sum(len(each) > longest for each in ids)
            self.emit.notice(
                "reward_model_cut",
                f"reward model {self.name} reads {longest} tokens, and {cut} of {len(ids)} conversations are longer: "
                f"it does not see their beginnings; give shorter prompts or a reward model with a longer context",
                "warning",
            )
            self.emit = None
        return [each[-longest:] for each in ids]

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Any) -> list[float]:
        return self.score(prompts, completions)


def trained_on(adapter: str, base: str) -> bool:
    """Whether a directory holds an adapter of the model in another one."""
    settings = Path(adapter) / "adapter_config.json"
    if not settings.exists():
        return False
    named = json.loads(settings.read_text(encoding="utf-8")).get("base_model_name_or_path")
    return Path(named or "").resolve() == Path(base).resolve()


def on_trunk(path: str, adapter: str, trunk: Any, *, device: Any = None, batch_size: int = BATCH) -> RewardModelScorer:
    """A reward model that stands on a trunk's own weights, with its adapter and head on top.

    Args:
        path: Its configuration and tokenizer.
        adapter: Its adapter and head.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from rlhf_nb.training.actor_critic import same_weights

    tokenizer = models.load_tokenizer(path)
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    setattr(model, model.base_model_prefix, same_weights(trunk))
    head = next(name for name, child in model.named_children() if name != model.base_model_prefix)
    getattr(model, head).to_empty(device="cpu")
    model = PeftModel.from_pretrained(model, adapter)
    model.config.get_text_config().pad_token_id = _pad_token_id(config.get_text_config(), tokenizer)
    model.eval().requires_grad_(False)
    if device is not None:
        model.to(device)
    longest = models.context_length(path)
    return RewardModelScorer(model, tokenizer, name=Path(path).name, max_length=longest, batch_size=batch_size)


def _pad_token_id(config: Any, tokenizer: Any) -> int:
    """The id after which transformers' classifiers look for the last token, and so which token is scored.

    What the model was trained with counts: padded with its end token, it is scored one token before the end. Where that
    is not recorded, any id but the end token's scores the end.
    """
    if config.pad_token_id is not None:
        return int(config.pad_token_id)
    if tokenizer.pad_token_id != tokenizer.eos_token_id:
        return int(tokenizer.pad_token_id)
    return 0 if tokenizer.eos_token_id != 0 else 1


def check_head(path: str) -> None:
    """Refuse what is no reward model, before its weights are read.

    Raises:
        SpecError: A classifier with two or more labels, or a model without a score head.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    architectures = config.architectures or []
    name = Path(path).name
    if not any(
        "SequenceClassification" in architecture or "RewardModel" in architecture for architecture in architectures
    ):
        what = architectures[0] if architectures else "no architecture"
        raise SpecError(f'reward model "{name}" is {what}, which has no score head; train one with %rlhf reward')
    if config.num_labels != 1:
        raise SpecError(
            f'reward model "{name}" has num_labels={config.num_labels}; a reward is one number, so it needs '
            f"num_labels=1; train one with %rlhf reward"
        )
