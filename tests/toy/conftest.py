"""`toy-sft`, as users have it, and what it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_nb.training import models
from rlhf_nb.training.context import Emitter


def _sample(directory: Path, prompts: list[str], seed: int = 0) -> list[str]:
    """One completion of each prompt at temperature 1, as text without special tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlhf_nb import toy

    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    torch.manual_seed(seed)
    with torch.inference_mode():
        ids = model.generate(**batch, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=toy.COMPLETION_TOKENS)
    return tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="session")
def toy_sft() -> Path:
    """Whoever needs it first, of all tests and of all sessions, trains it."""
    return models.toy_sft(Emitter(None))


@pytest.fixture(scope="session")
def sample() -> Callable[..., list[str]]:
    """(directory, prompts) to completions."""
    return _sample
