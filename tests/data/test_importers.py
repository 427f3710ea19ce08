"""Each format people have preference data in becomes rows, and says what it was."""

from __future__ import annotations

import csv
import gzip
import json

import pytest

from rlhf_nb.data.importers import known_formats, read_rows
from rlhf_nb.errors import DataError

USER = {"role": "user", "content": "hi"}
GOOD = {"role": "assistant", "content": "good"}
BAD = {"role": "assistant", "content": "bad"}
PAIR = {"prompt": "hi", "chosen": "good", "rejected": "bad"}
CHAT_PAIR = {"prompt": [USER], "chosen": "good", "rejected": "bad"}


@pytest.mark.parametrize(
    ("record", "kind", "row"),
    [
        (PAIR, "pairs", PAIR),
        ({**PAIR, "source": {"x": 1}}, "pairs", {**PAIR, "source": {"x": 1}}),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, "pairs", CHAT_PAIR),
        ({"prompt": "hi", "chosen": [GOOD], "rejected": [BAD]}, "pairs", CHAT_PAIR),
        (
            {"prompt": "hi", "chosen": [USER, GOOD], "rejected": [USER, BAD], "score": 1},
            "pairs",
            {**CHAT_PAIR, "score": 1},
        ),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, "pairs", CHAT_PAIR),
        (
            {"chosen": "Say hi. good", "rejected": "Say hi. bad"},
            "pairs",
            {**PAIR, "prompt": "Say hi.", "chosen": " good", "rejected": " bad"},
        ),
        (
            {"chosen": "\n\nHuman: hi\n\nAssistant: good", "rejected": "\n\nHuman: hi\n\nAssistant: bad"},
            "pairs",
            {"prompt": "\n\nHuman: hi\n\nAssistant:", "chosen": " good", "rejected": " bad"},
        ),
        (
            {
                "system": "be kind",
                "conversations": [{"from": "human", "value": "hi"}],
                "chosen": {"from": "gpt", "value": "good"},
                "rejected": {"from": "gpt", "value": "bad"},
            },
            "pairs",
            {**CHAT_PAIR, "prompt": [{"role": "system", "content": "be kind"}, USER]},
        ),
        (
            {"instruction": "say", "input": "hi", "chosen": "good", "rejected": "bad"},
            "pairs",
            {**PAIR, "prompt": "say\n\nhi"},
        ),
        (
            {
                "instruction": "hi",
                "input": "",
                "response1": "bad",
                "response2": "good",
                "annotator1": 2,
                "annotator2": 2,
                "annotator3": 1,
            },
            "pairs",
            {**PAIR, "annotator1": 2, "annotator2": 2, "annotator3": 1},
        ),
        (
            {"prompt": "hi", "completion_a": "bad", "completion_b": "good", "preference": "b-is-slightly-better"},
            "pairs",
            {**PAIR, "preference": "b-is-slightly-better"},
        ),
        ({"input": "hi", "output_1": "good", "output_2": "bad", "label": "1"}, "pairs", {**PAIR, "label": "1"}),
        (
            {"prompt": "hi", "completions": ["good", "bad"], "ranks": [0, 1]},
            "rankings",
            {"prompt": "hi", "completions": ["good", "bad"], "ranks": [0, 1]},
        ),
        (
            {
                "messages": [{"role": "prompter", "text": "hi"}],
                "responses": [
                    {"rank": 1, "text": "bad", "thumbs": {"-1": 2}},
                    {"rank": 0, "text": "good", "thumbs": {}},
                ],
            },
            "rankings",
            {
                "prompt": [USER],
                "completions": ["bad", "good"],
                "ranks": [1, 0],
                "details": [{"thumbs": {"-1": 2}}, {"thumbs": {}}],
            },
        ),
        (
            {"prompt": "hi", "completion": "good", "label": "True"},
            "thumbs",
            {"prompt": "hi", "completion": "good", "label": True},
        ),
        ({"messages": [USER, BAD], "label": 0}, "thumbs", {"prompt": [USER], "completion": "bad", "label": False}),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "good"}], "kto_tag": True},
            "thumbs",
            {"prompt": [USER], "completion": "good", "label": True},
        ),
        ({"prompt": "hi", "completion": "good"}, "demonstrations", {"prompt": "hi", "completion": "good"}),
        ({"prompt": "hi", "response": "good"}, "demonstrations", {"prompt": "hi", "completion": "good"}),
        (
            {"instruction": "hi", "input": None, "output": "good"},
            "demonstrations",
            {"prompt": "hi", "completion": "good"},
        ),
        (
            {"question": "hi", "answer": 42},
            "demonstrations",
            {"prompt": "hi", "completion": "42", "answer": 42},
        ),
        (
            {"problem": "hi", "solution": "good", "answer": "g", "level": 2},
            "demonstrations",
            {"prompt": "hi", "completion": "good", "answer": "g", "level": 2},
        ),
        ({"messages": [USER, GOOD]}, "demonstrations", {"prompt": [USER], "completion": "good"}),
        ({"prompt": [USER], "completion": [GOOD]}, "demonstrations", {"prompt": [USER], "completion": "good"}),
        ({"messages": [USER]}, "prompts", {"prompt": [USER]}),
        ({"prompt": "hi", "label": "safe"}, "prompts", {"prompt": "hi", "label": "safe"}),
    ],
)
def test_a_format_is_recognised(record, kind, row):
    result = read_rows([record])
    assert (result.kind, result.rows, result.dropped) == (kind, [row], {})
    assert (result.format, kind) in known_formats() and result.format in result.summary


def _hh(chosen, rejected, head="\n\nHuman: q\n\nAssistant:"):
    return {"chosen": head + chosen, "rejected": head + rejected}


def test_strange_transcripts_are_dropped_and_counted():
    records = [
        _hh(" good", " bad"),
        _hh(" same", " same"),
        _hh(" ", " x"),
        {
            "chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: b",
            "rejected": "\n\nHuman: q\n\nAssistant: c",
        },
        _hh(" a\n\nHuman: left open", " b"),
        {"chosen": "no turns", "rejected": "at all"},
        {"chosen": None, "rejected": "x"},
        _hh(" also", " kept"),
        _hh(" and", " this"),
        _hh(" and this", " one"),
    ]
    result = read_rows(records)
    assert len(result.rows) == 4
    assert result.dropped == {
        "identical chosen and rejected": 1,
        "empty chosen": 1,
        "the two transcripts part before the last turn": 1,
        "the last turn is not the Assistant's": 1,
        "no Assistant turn": 1,
        "no chosen": 1,
    }
    assert result.summary.startswith("4 pairs from HH transcripts; dropped 6: ")


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Q: x A: The cat", "Q: x A: That cat", "Q: x A:"),  # TRL would cut after "Th"
        ("Q: x\nyes", "Q: x\nno", "Q: x\n"),
        ("Q: x!", "Q: x?", "Q: x"),
        ("Q: 12 or 15", "Q: 12 or 17", "Q: 12 or"),
    ],
)
def test_an_implicit_prompt_ends_at_a_word(chosen, rejected, prompt):
    (row,) = read_rows([{"chosen": chosen, "rejected": rejected}]).rows
    assert row == {"prompt": prompt, "chosen": chosen[len(prompt) :], "rejected": rejected[len(prompt) :]}


def test_a_text_that_is_the_beginning_of_the_other_is_an_empty_completion():
    result = read_rows([{"chosen": "Q: x", "rejected": "Q: x and more"}, {"chosen": "P: a", "rejected": "P: b"}])
    assert result.dropped == {"empty chosen": 1}


def test_texts_without_a_common_beginning_are_dropped():
    result = read_rows([{"chosen": "P: a", "rejected": "P: b"}, {"chosen": "Think", "rejected": "This"}])
    assert result.dropped == {"no common prompt": 1}


def test_a_wanted_kind_is_made_of_the_one_found():
    thumbs = read_rows([PAIR, {**PAIR, "rejected": "worse"}], kind="thumbs")
    assert [row["label"] for row in thumbs.rows] == [True, False, False]
    assert thumbs.dropped == {"repeated thumb": 1}
    assert thumbs.summary == "3 thumbs from prompt, chosen and rejected (pairs); dropped 1: repeated thumb (1)"
    assert read_rows([PAIR, PAIR], kind="prompts").rows == [{"prompt": "hi"}]
    assert read_rows([PAIR], kind="demonstrations").rows == [{"prompt": "hi", "completion": "good"}]


def test_demonstrations_of_thumbs_are_the_good_ones():
    records = [{"messages": [USER, GOOD], "label": True}, {"messages": [USER, BAD], "label": False}]
    assert read_rows(records, kind="demonstrations").rows == [{"prompt": [USER], "completion": "good"}]


def test_a_kind_that_cannot_be_made_is_refused():
    with pytest.raises(DataError, match="demonstrations cannot become pairs: it can become prompts"):
        read_rows([{"prompt": "p", "completion": "c"}], kind="pairs")
    with pytest.raises(DataError, match=r'kind=.pair. is not a kind of rows; did you mean "pairs"\?'):
        read_rows([PAIR], kind="pair")


def test_one_strange_first_record_does_not_decide_the_format():
    records = [{"chosen": None, "rejected": None}, *[_hh(" good", " bad")] * 3]
    result = read_rows(records)
    assert result.format == "HH transcripts" and len(result.rows) == 3


def test_a_record_of_another_shape_is_counted():
    assert read_rows([PAIR, PAIR, {"text": "x"}]).dropped == {"columns differ from the first row's": 1}


# Containers


def _write(path, name, records):
    target = path / name
    plain = name.removesuffix(".gz")
    if plain.endswith((".jsonl", ".ndjson")):
        data = "".join(json.dumps(r) + "\n" for r in records).encode()
    elif plain.endswith(".json"):
        data = json.dumps(records).encode()
    elif plain.endswith((".csv", ".tsv")):
        with open(path / "plain", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(records[0]), delimiter="\t" if plain.endswith("tsv") else ",")
            writer.writeheader()
            writer.writerows(records)
        data = (path / "plain").read_bytes()
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path / "plain")
        data = (path / "plain").read_bytes()
    target.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return target


TRICKY = [{"prompt": 'a "b", c\u2028d\nline;', "chosen": "ü\r\n🙂", "rejected": "r\tr"}, PAIR]


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("suffix", ["jsonl", "ndjson", "json", "csv", "tsv", "parquet"])
def test_every_container_gives_the_same_rows(tmp_path, suffix, gz):
    path = _write(tmp_path, f"x.{suffix}{gz}", TRICKY)
    assert read_rows(path).rows == TRICKY
    assert read_rows(str(path)).source == str(path)


def test_gzip_is_known_by_its_bytes_not_its_name(tmp_path):
    path = _write(tmp_path, "x.jsonl.gz", TRICKY)
    path.rename(tmp_path / "x.jsonl")
    assert read_rows(tmp_path / "x.jsonl").rows == TRICKY


def test_json_may_be_wrapped_or_be_lines(tmp_path):
    (tmp_path / "wrapped.json").write_text(json.dumps({"version": 1, "data": [PAIR]}))
    (tmp_path / "lines.json").write_text(json.dumps(PAIR) + "\n" + json.dumps(PAIR))
    assert read_rows(tmp_path / "wrapped.json").rows == [PAIR]
    assert read_rows(tmp_path / "lines.json").rows == [PAIR, PAIR]


def test_a_byte_order_mark_and_blank_lines_do_not_matter(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf\n" + json.dumps(PAIR).encode() + b"\n\n")
    assert read_rows(tmp_path / "x.jsonl").rows == [PAIR]


def test_messages_in_a_csv_cell_are_messages_and_pandas_row_numbers_are_left_out(tmp_path):
    path = _write(tmp_path, "x.csv", [{"": 0, "prompt": json.dumps([USER]), "chosen": "[not json", "rejected": "bad"}])
    assert read_rows(path).rows == [{"prompt": [USER], "chosen": "[not json", "rejected": "bad"}]


def test_a_semicolon_separates_where_the_header_says_so(tmp_path):
    (tmp_path / "x.csv").write_text("prompt;chosen;rejected\nhi, you;good;bad\n")
    assert read_rows(tmp_path / "x.csv").rows == [{**PAIR, "prompt": "hi, you"}]


def test_half_of_a_character_in_a_json_escape_is_replaced(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"prompt": "a\\ud83d", "chosen": "c", "rejected": "r"}\n')
    (row,) = read_rows(tmp_path / "x.jsonl").rows
    assert row["prompt"].encode() and row["prompt"][0] == "a" and "\ud83d" not in row["prompt"]


def test_rows_in_memory_lose_nan_and_numpy_types():
    import pandas

    frame = pandas.DataFrame([{**PAIR, "score": 0.5, "note": None}, {**PAIR, "score": float("nan"), "note": "x"}])
    rows = read_rows(frame).rows
    assert [row["score"] for row in rows] == [0.5, None]
    assert read_rows(frame).source == "rows in memory"


def judged(*verdicts):
    sides = {"prompt": "hi", "completion_a": "good", "completion_b": "bad"}
    return [{**sides, "preference": verdict} for verdict in verdicts]


def test_a_verdict_may_be_a_number_read_with_a_gap_in_its_column():
    found = read_rows(judged(1.0, 2.0, "2", 0.0, None))
    assert [row["chosen"] for row in found.rows] == ["good", "bad", "bad"]
    assert found.dropped == {"a tie": 1, "preference is neither side": 1}


@pytest.mark.parametrize("verdicts", [(0, 1, 1), ("0", "1.0"), (0.0, 1.0, None), (0,), (-1, 0, 1), (0, 1, "tie")])
def test_sides_counted_from_zero_are_refused_and_never_reversed(verdicts):
    with pytest.raises(DataError, match=r"preference holds 0.* and never 2.*write a or b there") as refused:
        read_rows(judged(*verdicts))
    assert "\n" not in str(refused.value)
    labels = [{"input": "hi", "output_1": "a", "output_2": "b", "label": verdict} for verdict in verdicts]
    with pytest.raises(DataError, match="label holds 0"):
        read_rows(labels)


@pytest.mark.parametrize("verdicts", [(0, 1, 2), (0, "a"), (1, 1)])
def test_a_zero_is_a_tie_where_another_verdict_says_how_they_count(verdicts):
    found = read_rows(judged(*verdicts))
    assert found.rows[0]["chosen"] == "good" and "preference is neither side" not in found.dropped


def test_a_saved_datasets_folder_is_read_and_asks_for_a_split(tmp_path):
    import datasets

    saved = datasets.Dataset.from_list([PAIR])
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": saved, "dev": saved}).save_to_disk(tmp_path / "two")
    assert read_rows(tmp_path / "one").rows == [PAIR]
    assert read_rows(tmp_path / "two", split="dev").rows == [PAIR]
    with pytest.raises(DataError, match=r"choose a split of .*two; it has test, dev"):
        read_rows(tmp_path / "two")
    with pytest.raises(DataError, match=r'split=.dve. is not in .*two; it has test, dev; did you mean "dev"\?'):
        read_rows(tmp_path / "two", split="dve")
    assert read_rows(saved).rows == [PAIR]
