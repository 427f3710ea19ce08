"""Rows by content hash, and named data sets."""

from __future__ import annotations

import pytest

from rlhf_nb.data.rows import content_hash
from rlhf_nb.errors import DataError, NotFoundError, StoreError
from rlhf_nb.store import datasets as module

PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}


def test_rows_come_back_as_they_went_in(store):
    rows = [
        {
            "prompt": "näive \u2028 \x00 🙂",
            "chosen": "c\n\n",
            "rejected": "",
            "extra": {"b": [1, None, True, 0.5], "a": "x"},
        },
        {"prompt": [{"role": "user", "content": "hi"}], "chosen": "c", "rejected": "r"},
    ]
    key = store.put_rows(rows)
    assert key == content_hash(rows)
    assert store.get_rows(key) == rows


def test_rows_larger_than_one_part_come_back(store, monkeypatch):
    monkeypatch.setattr(module, "PART_BYTES", 100)
    rows = [{"prompt": content_hash([{"i": i}])} for i in range(50)]
    assert store.get_rows(store.put_rows(rows)) == rows


def test_the_same_rows_are_kept_once(store):
    assert store.put_rows([PAIR]) == store.put_rows([{"rejected": "r", "chosen": "c", "prompt": "p"}])
    with store._read() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM blobs").scalar() == 1


def test_damaged_rows_are_refused_not_returned(store):
    key = store.put_rows([PAIR])
    with store._engine.begin() as connection:
        connection.execute(module.blob_parts.update().values(data=b"not zlib"))
    with pytest.raises(StoreError, match=f"{key[:12]}… in .* are damaged"):
        store.get_rows(key)


def test_unknown_rows_are_said_to_be_missing(store):
    with pytest.raises(NotFoundError, match="no rows with content hash deadbeef"):
        store.get_rows("deadbeef")


def test_a_dataset_is_found_by_name(store):
    record = store.add_dataset("hh", "pairs", [PAIR], source="hh.jsonl", summary="1 pair", dropped={"empty chosen": 2})
    assert store.dataset("hh") == record
    assert (record.version, record.n, record.dropped) == (1, 1, {"empty chosen": 2})
    assert record.node == "data:hh@1"


def test_the_same_rows_again_are_the_same_version_and_others_a_new_one(store):
    first = store.add_dataset("hh", "pairs", [PAIR])
    assert store.add_dataset("hh", "pairs", [PAIR]) == first
    second = store.add_dataset("hh", "pairs", [PAIR, PAIR])
    assert second.version == 2
    assert store.dataset("hh") == second
    assert store.dataset("hh", version=1) == first
    assert store.datasets() == [second]


def test_an_unknown_name_suggests_the_nearest(store):
    store.add_dataset("helpful", "pairs", [PAIR])
    with pytest.raises(NotFoundError, match=r"no data set 'helpfull' in this workspace; did you mean \"helpful\"\?"):
        store.dataset("helpfull")
    with pytest.raises(NotFoundError, match="no data set 'helpful' version 7"):
        store.dataset("helpful", version=7)


def test_no_rows_and_unknown_kinds_are_refused(store):
    with pytest.raises(DataError, match="'hh' has 0 rows"):
        store.add_dataset("hh", "pairs", [])
    with pytest.raises(DataError, match=r"kind='pair' is not a kind of rows; did you mean \"pairs\"\?"):
        store.add_dataset("hh", "pair", [PAIR])
    assert store.datasets() == []
