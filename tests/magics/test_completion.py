"""Completion, asked of a real kernel: what a person sees after the tab key."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.servers import jupyter_kernel


@pytest.fixture(scope="module")
def kernel(tmp_path_factory) -> Iterator:
    with jupyter_kernel(cwd=str(tmp_path_factory.mktemp("complete"))) as (_, client):
        client.execute_interactive("%load_ext rlhf_nb\n_ = %rlhf", timeout=60)
        yield client


@pytest.mark.parametrize(
    ("typed", "offers"),
    [
        ("%rlhf att", "attach"),
        ("%rlhf ", "ppo"),
        ("%rlhf attach ", "local"),
        ("%rlhf ppo --pol", "--policy"),
        ("%rlhf ppo --policy toy", "toy-sft"),
        ("%rlhf dpo --policy toy-sft --data toy-p", "toy-pairs"),
        ("%rlhf ppo --reward toy", "toy-true"),
        ("%rlhf ppo --set kl", "kl_coef="),
        ("run = %rlhf ppo --policy toy-s", "toy-sft"),
        ("%%rlhf reward", "reward-function"),
    ],
)
def test_the_tab_key_offers(kernel, typed, offers):
    reply = kernel.complete(typed, len(typed), reply=True, timeout=30)["content"]
    assert offers in [match.strip() for match in reply["matches"]], reply["matches"]
