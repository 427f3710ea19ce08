"""Rows: one canonical encoding, and what makes a row usable."""

from __future__ import annotations

import hashlib

import pytest

from rlhf_nb.data.rows import canonical_json, content_hash, decode_rows, encode_rows, fault, prompt_text, to_trl
from rlhf_nb.errors import DataError

MESSAGES = [{"role": "user", "content": "hi"}]


def test_the_encoding_is_sorted_compact_utf8_lines():
    assert encode_rows([{"b": 1, "a": "ü"}, {"c": [None, True]}]) == '{"a":"ü","b":1}\n{"c":[null,true]}\n'.encode()


def test_the_content_hash_is_sha256_of_the_encoding():
    rows = [{"prompt": "p", "chosen": "c", "rejected": "r"}]
    expected = hashlib.sha256(b'{"chosen":"c","prompt":"p","rejected":"r"}\n').hexdigest()
    assert content_hash(rows) == expected


def test_the_order_of_columns_does_not_count_and_that_of_rows_does():
    one, two = {"a": 1, "b": 2}, {"b": 2, "a": 1}
    assert content_hash([one]) == content_hash([two])
    assert content_hash([one, {"a": 3}]) != content_hash([{"a": 3}, one])


def test_line_separators_inside_a_string_do_not_end_a_row():
    rows = [{"prompt": "a\u2028b\u0085c\r\nd"}]
    assert decode_rows(encode_rows(rows)) == rows


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, "\ud83d"])
def test_what_has_no_canonical_form_is_refused_with_its_row(value):
    with pytest.raises(DataError, match="row 1: "):
        encode_rows([{"prompt": "p"}, {"prompt": value}])


def test_an_integer_and_a_float_are_not_the_same_text():
    assert canonical_json(1) != canonical_json(1.0)


@pytest.mark.parametrize(
    ("kind", "row", "reason"),
    [
        ("pairs", {"prompt": "p", "chosen": "c", "rejected": "r"}, None),
        ("pairs", {"prompt": MESSAGES, "chosen": "c", "rejected": "r"}, None),
        ("pairs", {"prompt": "p", "chosen": "c"}, "no rejected"),
        ("pairs", {"prompt": "p", "chosen": "c", "rejected": " c\n"}, "identical chosen and rejected"),
        ("pairs", {"prompt": "p", "chosen": " ", "rejected": "r"}, "empty chosen"),
        ("pairs", {"prompt": "p", "chosen": 3, "rejected": "r"}, "chosen is not text"),
        ("prompts", {"prompt": " \n"}, "empty prompt"),
        ("prompts", {"prompt": []}, "empty prompt"),
        ("prompts", {"prompt": [{"role": "user"}]}, "prompt is neither text nor messages"),
        ("thumbs", {"prompt": "p", "completion": "c", "label": False}, None),
        ("thumbs", {"prompt": "p", "completion": "c", "label": 1}, "label is not true or false"),
        ("rankings", {"prompt": "p", "completions": ["a", "b"], "ranks": [0, 1]}, None),
        (
            "rankings",
            {"prompt": "p", "completions": ["a", "b"], "ranks": [0]},
            "ranks and completions differ in length",
        ),
        ("rankings", {"prompt": "p", "completions": ["a"], "ranks": [0]}, "fewer than 2 completions"),
        (
            "rankings",
            {"prompt": "p", "completions": ["a", None], "ranks": [0, 1]},
            "completions is not a list of texts",
        ),
    ],
)
def test_a_row_is_usable_or_says_why_not(kind, row, reason):
    assert fault(kind, row) == reason


def test_trl_gets_messages_on_both_sides_or_on_neither():
    assert to_trl({"prompt": "p", "chosen": "c", "rejected": "r"}) == {"prompt": "p", "chosen": "c", "rejected": "r"}
    row = to_trl({"prompt": MESSAGES, "completion": " c", "label": True})
    assert row == {"prompt": MESSAGES, "completion": [{"role": "assistant", "content": "c"}], "label": True}


def test_a_prompt_reads_as_plain_text():
    assert prompt_text("p") == "p"
    assert prompt_text(MESSAGES) == "hi"
    assert prompt_text([{"role": "system", "content": "s"}, *MESSAGES]) == "system: s\n\nuser: hi"
