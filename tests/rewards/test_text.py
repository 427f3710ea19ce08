from __future__ import annotations

import time

import pytest

from rlhf_nb.rewards.text import fenced, last_number


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("x = 1", "x = 1"),
        ("So:\n```python\nx = 1\n```\nand\n``` py \nx = 2\n\n```\n", "x = 2\n\n"),
        ("```\nx = 1\n```\n```json\n{}\n```", "x = 1\n"),
        ("```python\nx = 1\n", "```python\nx = 1\n"),
    ],
)
def test_the_last_closed_fence_of_the_language_counts(text, code):
    assert fenced(text, "python", "py") == code


def test_hostile_text_takes_linear_time():
    began = time.monotonic()
    for text in ("```a\n" * 200_000, "1," * 500_000, "####" + " " * 500_000 + "x", "1" * 1_000_000):
        fenced(text)
        last_number(text)
    assert time.monotonic() - began < 10


def test_numbers_have_commas_signs_and_exponents():
    assert [last_number(t) for t in ("a 1,234.5 b", "-2", "1e3", "x", ".5")] == [1234.5, -2.0, 1000.0, None, 0.5]
