"""Bad input as it is typed: one line in the cell, and what was there stays sound."""

from __future__ import annotations

import gzip
import json

import pytest

from rlhf_nb import workspace
from rlhf_nb.errors import AttachError, DataError, RlhfError

PAIR = {"prompt": "why?", "chosen": "because", "rejected": "no"}


def lines(*rows: object) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.jsonl", b"", "empty"),
        ("cut.jsonl.gz", gzip.compress(lines(*[PAIR] * 500), mtime=0)[:-20], "cut.jsonl.gz"),
        ("columns.jsonl", lines({"foo": "a", "bar": "b"}), "foo"),
        ("same.jsonl", lines({**PAIR, "rejected": "because"}), "identical"),
        ("latin.csv", "prompt,chosen,rejected\ncafé,à,b\n".encode("latin-1"), "UTF-8"),
        ("broken.jsonl", lines(PAIR) + b'{"prompt": "x', "line 2"),
    ],
)
def test_a_bad_file_is_one_line_in_the_cell_and_leaves_no_dataset(shell, tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RlhfError, match=says) as caught:
        shell.run(f"%rlhf import {name} --as bad")
    assert "\n" not in str(caught.value) and name in str(caught.value)
    assert all(each.name != "bad" for each in workspace.current().store.datasets())


def test_one_row_is_imported_and_its_split_is_refused_in_words(shell, tmp_path):
    (tmp_path / "one.jsonl").write_bytes(lines(PAIR))
    shell.run("one = %rlhf import one.jsonl --as one")
    with pytest.raises(DataError) as caught:
        shell.run("from rlhf_nb import workspace\nworkspace.current().dataset('one').split(test=0.5)")
    assert "1" in str(caught.value) and "\n" not in str(caught.value)


def test_a_saved_data_set_needs_no_split_said_and_of_several_gives_train(shell, tmp_path):
    import datasets

    one, other = datasets.Dataset.from_list([PAIR]), datasets.Dataset.from_list([PAIR, {**PAIR, "prompt": "who?"}])
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": one, "train": other}).save_to_disk(tmp_path / "two")
    assert len(shell.run("%rlhf import one --as one")) == 1
    assert len(shell.run("%rlhf import two --as two")) == 2
    assert len(shell.run("%rlhf import two --as test --split test")) == 1
    ws = workspace.current()
    assert ws.import_data(tmp_path / "one", name="in-python").rows == [PAIR]


def test_a_second_attach_is_refused_the_first_stays_and_replace_replaces_it(shell):
    shell.run("%rlhf attach local --no-standby")
    ws = workspace.current()
    first = ws.attached.agent_pid
    with pytest.raises(AttachError, match=r"attached already and stays.*--replace") as caught:
        shell.run("%rlhf attach local --no-standby")
    assert "\n" not in str(caught.value) and ws.attached.agent_pid == first and ws.client.alive
    shell.run("%rlhf attach local --no-standby --replace")
    assert ws.attached.agent_pid != first and ws.client.alive
