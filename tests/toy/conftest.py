"""`toy-sft`, trained once a session by its recipe with plain TRL."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TRAIN = """
import sys

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from rlhf_nb import toy

recipe = dict(toy.SFT_RECIPE)
rows = toy.dataset(recipe.pop("data"))[1]
args = SFTConfig(
    output_dir=sys.argv[1],
    completion_only_loss=True,
    max_length=512,
    bf16=False,
    gradient_checkpointing=False,
    use_cpu=True,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    **recipe,
)
chats = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }
    for row in rows
]
trainer = SFTTrainer(model=str(toy.model_path()), args=args, train_dataset=Dataset.from_list(chats))
trainer.train()
trainer.save_model(sys.argv[1])
"""


def train_toy_sft(directory: Path) -> Path:
    """In a process of its own, so that no other test's torch settings or random state play a part."""
    done = subprocess.run([sys.executable, "-c", TRAIN, str(directory)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return directory


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
def toy_sft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_toy_sft(tmp_path_factory.mktemp("toy-sft"))


@pytest.fixture(scope="session")
def sample() -> Callable[..., list[str]]:
    """(directory, prompts) to completions."""
    return _sample
