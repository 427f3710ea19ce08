"""A queue on a real workspace."""

from __future__ import annotations

import pytest

from rlhf_nb.labelling.items import model_items
from rlhf_nb.labelling.session import LabelSession
from rlhf_nb.store import Store

N = 60
ITEMS = model_items(
    [f"question {i}" for i in range(N)],
    [f"good {i}" for i in range(N)],
    [f"bad {i}" for i in range(N)],
    ("ppo-1", "toy-sft"),
)


@pytest.fixture
def store(tmp_path):
    with Store.open(tmp_path / "workspace", lock_timeout_s=0.3) as opened:
        yield opened


@pytest.fixture
def session(store):
    return LabelSession(store, "ppo-1 against toy-sft", ITEMS, annotator="mira")


@pytest.fixture
def good():
    """Chooses the side as shown, "1" or "2", that holds the good completion."""
    return lambda shown: "1" if shown.first.startswith("good") else "2"
