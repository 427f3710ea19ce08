"""Bad input: one line that names the field, the value and the way out; nothing half imported."""

from __future__ import annotations

import gzip
import json
import pickle

import pytest

from rlhf_nb.data.importers import read_rows
from rlhf_nb.errors import DataError, NotFoundError, UnavailableError

PAIR = {"prompt": "hi", "chosen": "good", "rejected": "bad"}
LINE = json.dumps(PAIR) + "\n"


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("x.jsonl", b"", r"x.jsonl is empty \(0 bytes\); export it again"),
        ("x.jsonl", b"\n \n", r"x.jsonl has 0 rows; nothing to import"),
        ("x.jsonl.gz", gzip.compress(b"", mtime=0), r"x.jsonl.gz is empty once unpacked"),
        ("x.json", b"[]", r"x.json has 0 rows"),
        ("x.csv", b"prompt,chosen,rejected\n", r"x.csv has a header and 0 rows"),
        ("x.jsonl.gz", gzip.compress(LINE.encode() * 99, mtime=0)[:-20], r"x.jsonl.gz is cut off.*download it again"),
        (
            "x.jsonl.gz",
            gzip.compress(LINE.encode() * 99, mtime=0)[:40] + b"\0" * 40,
            r"x.jsonl.gz is (damaged|cut off|a damaged).*download",
        ),
        ("x.jsonl.gz", LINE.encode(), r"x.jsonl.gz is named .gz but is not gzip"),
        (
            "x.jsonl",
            LINE.encode() + b'{"prompt": "caf\xe9"}\n',
            r"x.jsonl line 2: byte 0xe9 is not UTF-8.*iconv -f LATIN1 -t UTF-8 x.jsonl",
        ),
        ("x.csv", b"prompt,chosen\ncaf\xe9,x\n", r"x.csv line 2: byte 0xe9 is not UTF-8"),
        ("x.jsonl", LINE.encode("utf-16"), r"x.jsonl is UTF-16; convert it: iconv -f UTF-16"),
        ("x.jsonl", LINE.encode() + b'{"prompt": "cut', r"x.jsonl line 2 is not JSON .*repair or remove that line"),
        ("x.jsonl", b"[" * 100_000, r"x.jsonl line 1 is not JSON"),
        ("x.jsonl", b'"text"\n', r"x.jsonl line 1 is a text; every line must be an object"),
        ("x.json", b'{"prompt": ', r"x.json is not JSON"),
        ("x.json", b"[1, 2]", r"x.json holds a list; a list of objects is needed"),
        ("x.json", b"3", r"x.json holds a number"),
        ("x.csv", b"prompt,chosen,rejected\na,b,c,d\n", r"x.csv line 2: more cells than the header has \(3\)"),
        ("x.csv", b'prompt,chosen,rejected\n"a,b,c\n', r"x.csv line 2 is not CSV"),
        ("x.parquet", b"PAR1 no", r"x.parquet is not a sound Parquet file"),
        ("x.txt", b"hello", r"x.txt: file type '.txt' is not known; known: .jsonl,"),
        ("x", b"hello", r"x: file type 'without extension' is not known"),
        ("x.pkl", pickle.dumps([PAIR]), r"file type '.pkl' is not known"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=words) as caught:
        read_rows(tmp_path / name)
    assert "\n" not in str(caught.value) and str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(
    ("records", "words"),
    [
        (
            [{"promt": "p", "chosen_text": "c"}],
            r"columns 'promt', 'chosen_text' are of no known format; .*did you mean \"prompt\" by 'promt'\?",
        ),
        (
            [{"x": 1}],
            r"columns 'x' are of no known format; pairs need prompt, chosen, rejected or .*rename the columns",
        ),
        (
            [{**PAIR, "rejected": "good"}] * 3,
            r"none of 3 rows is usable as pairs: identical chosen and rejected \(3\); nothing was",
        ),
        ([{**PAIR, "image": b"\x89PNG"}], r"column 'image' holds bytes, which a row cannot keep"),
        ([], r"0 rows given"),
        ([PAIR, "text"], r"row 1 is a str; every row must be a dict"),
        (3, r"cannot import a int; give a path"),
    ],
)
def test_bad_rows_are_one_line(records, words):
    with pytest.raises(DataError, match=words) as caught:
        read_rows(records)
    assert "\n" not in str(caught.value)


def test_identical_sides_are_dropped_and_counted():
    result = read_rows([PAIR, {**PAIR, "rejected": "good "}, PAIR])
    assert len(result.rows) == 2
    assert result.summary == "2 pairs from prompt, chosen and rejected; dropped 1: identical chosen and rejected (1)"


def test_one_row_is_enough_to_import():
    assert read_rows([PAIR]).summary == "1 pair from prompt, chosen and rejected"


def test_a_missing_file_names_its_nearest_neighbour(tmp_path):
    (tmp_path / "preferences.jsonl").write_text(LINE)
    with pytest.raises(NotFoundError, match=r'no file .*preference.jsonl; did you mean "preferences.jsonl"\?'):
        read_rows(tmp_path / "preference.jsonl")
    with pytest.raises(NotFoundError, match=r"no file .*zzz.csv; check the path, or give a hub id"):
        read_rows(tmp_path / "zzz.csv")
    with pytest.raises(NotFoundError, match=r"its folder .*nowhere does not exist"):
        read_rows(tmp_path / "nowhere" / "x.jsonl")


def test_a_relative_path_to_a_missing_file_is_not_taken_for_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(NotFoundError, match="no file"):
        read_rows("data/hh")
    with pytest.raises(NotFoundError, match="its folder nowhere does not exist"):
        read_rows("nowhere/hh.jsonl")


def test_a_folder_without_a_data_set_names_its_files(tmp_path):
    (tmp_path / "train.jsonl").write_text(LINE)
    with pytest.raises(DataError, match=r"is a folder, but no saved data set; name one of its files: train.jsonl"):
        read_rows(tmp_path)


def test_a_damaged_saved_folder_is_one_line(tmp_path):
    (tmp_path / "state.json").write_text("{")
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be loaded as a saved data set") as caught:
        read_rows(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_hub_id_without_a_network_is_one_line_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UnavailableError, match="Anthropic/hh-rlhf is not a file here, and the Hugging Face hub cannot be reached"
    ) as caught:
        read_rows("Anthropic/hh-rlhf/harmless-base")
    assert "download the file and give its path" in str(caught.value) and "\n" not in str(caught.value)
