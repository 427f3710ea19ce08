"""Real public files import with the counts they are known to have."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_nb.data.importers import read_rows

ROOT = Path(__file__).resolve().parents[2]


def test_hh_harmless_gives_1495_pairs_of_1500(shared_data):
    path = shared_data / "prefs" / "hh_harmless_0000_1499.jsonl.gz"
    result = read_rows(path)
    assert (result.kind, result.format, len(result.rows)) == ("pairs", "HH transcripts", 1495)
    assert result.dropped == {"empty chosen": 4, "the two transcripts part before the last turn": 1}
    originals = {(each["chosen"], each["rejected"]) for each in map(json.loads, gzip.open(path, "rt"))}
    assert all((row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]) in originals for row in result.rows)
    assert all(row["prompt"].endswith("\n\nAssistant:") for row in result.rows)


def test_importing_hh_needs_no_data_library(shared_data):
    code = (
        "import sys; from rlhf_nb.data.importers import read_rows; read_rows(sys.argv[1]); "
        "print(sorted({'pandas', 'pyarrow', 'datasets', 'numpy', 'sqlalchemy'} & set(sys.modules)))"
    )
    path = shared_data / "prefs" / "hh_harmless_0000_1499.jsonl.gz"
    found = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


def test_open_assistant_rankings_give_the_446_pairs_of_their_manifest(shared_data):
    result = read_rows(shared_data / "prefs" / "oasst_rankings_trees0_59.jsonl.gz", kind="pairs")
    assert (result.kind, len(result.rows)) == ("pairs", 446)


@pytest.mark.parametrize(
    ("name", "kind", "n", "dropped"),
    [
        ("prefs/short_polite_pairs_0_899.jsonl", "pairs", 894, {"identical chosen and rejected": 6}),
        ("prefs/llamafactory_dpo_300.jsonl.gz", "pairs", 300, {}),
        ("prefs/llamafactory_kto_thumbs.jsonl.gz", "thumbs", 300, {}),
        ("prefs/oasst_rankings_trees0_59.jsonl.gz", "rankings", 122, {}),
        ("sft/short_instructions_1100.jsonl", "demonstrations", 1100, {}),
        ("sft/dolly_151.jsonl.gz", "demonstrations", 151, {}),
        ("sft/selfinstruct_seed_175.jsonl", "demonstrations", 175, {}),
        (
            "agreement/pandalm_3annotators_first200.jsonl",
            "pairs",
            162,
            {"the annotators' majority is a tie": 29, "chosen is not text": 6, "empty rejected": 3},
        ),
        (
            "agreement/tulu_annotations_chatgpt_vs_65B.jsonl.gz",
            "pairs",
            270,
            {"a tie": 134, "identical chosen and rejected": 1},
        ),
        ("eval/llmbar_natural_100.jsonl", "pairs", 100, {}),
        ("eval/xstest_prompts_450.jsonl", "prompts", 450, {}),
    ],
)
def test_a_public_file_imports(shared_data, name, kind, n, dropped):
    result = read_rows(shared_data / name)
    assert (result.kind, len(result.rows), result.dropped) == (kind, n, dropped)


def test_the_thumbs_file_has_as_many_up_as_down(shared_data):
    rows = read_rows(shared_data / "prefs" / "llamafactory_kto_thumbs.jsonl.gz").rows
    assert sum(row["label"] for row in rows) == 150
