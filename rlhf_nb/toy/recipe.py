"""Where the toy base model lies, and how `toy-sft` is trained from it."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

SFT_RECIPE = MappingProxyType({
    "data": "toy-demonstrations",
    "max_steps": 150,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 32,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 10,
    "seed": 0,
})  # fmt: skip
"""`toy-sft` is `toy` after supervised fine-tuning with these settings, on completions only, through the chat
template."""


def model_path() -> Path:
    """The directory of the shipped base model `toy`, in Hugging Face format."""
    return Path(__file__).parent / "model"
