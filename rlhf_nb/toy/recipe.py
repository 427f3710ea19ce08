"""Where the toy base model lies, and how `toy-sft` is trained from it."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

SFT_DATA = "toy-demonstrations"
SFT_RECIPE = MappingProxyType(
    {
        "max_steps": 100,
        "learning_rate": 1e-3,
        "batch_size": 32,
        "lr_scheduler": "cosine",
        "warmup_steps": 10,
        "seed": 0,
    }
)
"""`toy-sft` is `toy` after supervised fine-tuning on `SFT_DATA` with these knobs of the method `sft`: full parameters,
float32, loss on the completions only, rows as chats through the chat template."""

COMPLETION_TOKENS = 64
"""Room for a completion when sampling: 99.9 % of what the town's writers say fits."""


def model_path() -> Path:
    """The directory of the shipped base model `toy`, in Hugging Face format."""
    return Path(__file__).parent / "model"
