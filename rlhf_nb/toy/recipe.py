"""Where the toy base model lies, and how `toy-sft` is trained from it."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

SFT_RECIPE = MappingProxyType(
    {
        "data": "toy-demonstrations",
        "max_steps": 100,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 32,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 10,
        "seed": 0,
    }
)
"""`toy-sft` is `toy` after supervised fine-tuning with these settings, named as transformers' arguments but for `data`:
full parameters, float32, loss on the completions only, rows as chats through the chat template."""

COMPLETION_TOKENS = 64
"""Room for a completion when sampling: 99.9 % of what the town's writers say fits."""


def model_path() -> Path:
    """The directory of the shipped base model `toy`, in Hugging Face format."""
    return Path(__file__).parent / "model"
