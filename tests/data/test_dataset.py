"""The data-set handle: lazy rows, a split by prompt, export and conversion."""

from __future__ import annotations

import pytest

from rlhf_nb.data.dataset import Dataset
from rlhf_nb.data.importers import read_rows
from rlhf_nb.data.rows import content_hash, prompt_key
from rlhf_nb.errors import DataError, StorageError
from rlhf_nb.store import Store

ROWS = [{"prompt": f"p{i % 40}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(100)]


def test_rows_are_read_when_first_asked_for(tmp_path):
    with Store.open(tmp_path) as store:
        record = store.add_dataset("hh", "pairs", ROWS, summary="100 pairs")
        data = Dataset.from_store(store, "hh")
        assert len(data) == 100 and data.content_hash == record.content_hash
        assert data._rows is None
        assert data.rows == ROWS == list(data)
    assert repr(data) == f"<Dataset hh: 100 pairs; {content_hash(ROWS)[:12]}>"
    assert data[0] == ROWS[0]


@pytest.mark.parametrize("seed", range(5))
def test_a_split_shares_no_prompt_and_loses_no_row(seed):
    train, held_out = Dataset("hh", "pairs", ROWS).split(test=0.2, seed=seed)
    prompts = [{prompt_key(row["prompt"]) for row in side.rows} for side in (train, held_out)]
    assert prompts[0].isdisjoint(prompts[1])
    assert len(prompts[1]) == 8  # 0.2 of 40 prompts
    assert sorted(map(str, train.rows + held_out.rows)) == sorted(map(str, ROWS))
    assert [row for row in ROWS if row in train.rows] == train.rows


def test_white_space_around_a_prompt_does_not_carry_it_across():
    rows = [{"prompt": p, "completion": "c"} for p in ("a", "a ", "\na", "b", "b\n")]
    train, held_out = Dataset("d", "demonstrations", rows).split(test=0.5)
    assert {row["prompt"].strip() for row in train.rows} != {row["prompt"].strip() for row in held_out.rows}
    assert {len(train), len(held_out)} == {2, 3}


def test_the_same_seed_splits_alike_and_another_differently():
    data = Dataset("hh", "pairs", ROWS)
    assert data.split(seed=1)[1].content_hash == data.split(seed=1)[1].content_hash
    assert data.split(seed=1)[1].content_hash != data.split(seed=2)[1].content_hash


def test_the_place_of_a_row_does_not_move_its_prompt_across():
    data, turned = Dataset("hh", "pairs", ROWS), Dataset("hh", "pairs", ROWS[::-1])
    assert {row["prompt"] for row in data.split()[1]} == {row["prompt"] for row in turned.split()[1]}


def test_messages_can_be_split_too():
    rows = [{"prompt": [{"role": "user", "content": str(i)}]} for i in range(10)]
    train, held_out = Dataset("p", "prompts", rows).split(test=0.3)
    assert (len(train), len(held_out)) == (7, 3)


@pytest.mark.parametrize(
    ("rows", "what"), [(ROWS[:1], "1 row"), ([ROWS[0], ROWS[40]], "2 rows with 1 distinct prompt")]
)
def test_what_cannot_be_split_says_why(rows, what):
    with pytest.raises(DataError, match=f"'hh' has {what}: it cannot be split by prompt; import rows with at least 2"):
        Dataset("hh", "pairs", rows).split()


@pytest.mark.parametrize("test", [0, 1, -0.1, 1.5, "half"])
def test_a_share_outside_0_to_1_is_refused(test):
    with pytest.raises(DataError, match=r"test=.*: the share to hold out must lie between 0 and 1"):
        Dataset("hh", "pairs", ROWS).split(test=test)


def test_each_side_of_a_split_gets_a_prompt_at_least():
    assert [len(side) for side in Dataset("hh", "pairs", ROWS[:2]).split(test=0.01)] == [1, 1]
    assert [len(side) for side in Dataset("hh", "pairs", ROWS[:2]).split(test=0.99)] == [1, 1]


def test_a_frame_has_a_row_a_row():
    frame = Dataset("hh", "pairs", ROWS).to_pandas()
    assert list(frame.columns) == ["prompt", "chosen", "rejected"] and len(frame) == 100


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz", "out.parquet"])
def test_what_is_exported_imports_again(tmp_path, name):
    rows = [{**ROWS[0], "extra": {"a": [1, 2]}}, {**ROWS[1], "extra": None}]
    path = Dataset("hh", "pairs", rows).to_file(tmp_path / name)
    assert read_rows(path).rows == rows
    assert [each.name for each in tmp_path.iterdir()] == [name]


def test_mixed_prompts_survive_parquet_as_text(tmp_path):
    rows = [{"prompt": "p"}, {"prompt": [{"role": "user", "content": "q"}]}]
    assert len(read_rows(Dataset("p", "prompts", rows).to_file(tmp_path / "x.parquet")).rows) == 2


def test_export_says_what_it_cannot_do(tmp_path):
    with pytest.raises(DataError, match=r"cannot export to '.xlsx'; use .jsonl"):
        Dataset("hh", "pairs", ROWS).to_file(tmp_path / "x.xlsx")
    with pytest.raises(StorageError, match=r"cannot write .*x.jsonl: No such file or directory"):
        Dataset("hh", "pairs", ROWS).to_file(tmp_path / "nowhere" / "x.jsonl")


def test_a_failed_export_leaves_the_old_file(tmp_path, monkeypatch):
    path = Dataset("hh", "pairs", ROWS[:1]).to_file(tmp_path / "x.jsonl")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(StorageError, match=r"No space left on device"):
        Dataset("hh", "pairs", ROWS).to_file(path)
    assert len(read_rows(path).rows) == 1 and [each.name for each in tmp_path.iterdir()] == ["x.jsonl"]


def test_a_handle_becomes_another_kind():
    prompts = Dataset("hh", "pairs", ROWS).to("prompts")
    assert (prompts.kind, len(prompts)) == ("prompts", 40)
    assert prompts.summary == "40 prompts from hh; dropped 60: repeated prompt (60)"
    assert prompts.rows == [{"prompt": prompt} for prompt in Dataset("hh", "pairs", ROWS).prompts]
