"""Every chapter runs from top to bottom, as "Run All" does; the quickstart in Binder's environment (test_binder)."""

from __future__ import annotations

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from rlhf_nb.studies import methods
from rlhf_nb.studies import over_optimisation as study
from tests.servers import kernel_ports

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Execute a chapter in an empty folder; the text of each code cell's outputs, by the cell's first line."""
    monkeypatch.setenv("RLHF_NB_AUTOLABEL", "toy-annotator")
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "a chapter is committed without outputs"
    # How long a busy machine takes to start a kernel, or to hand on what a cell printed, says nothing of the chapter.
    patience = {"timeout": 900, "iopub_timeout": 120, "startup_timeout": 300}
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, kernel_name="python3", resources=resources, config=kernel_ports(), **patience)
    client.execute()
    texts = {}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            said = [o.get("text") or o.get("data", {}).get("text/plain", "") for o in cell.outputs]
            texts[cell.source.splitlines()[0]] = "\n".join(said)
    return texts


def test_real_preferences_run_on_hh_harmless(tmp_path, monkeypatch, shared_data):
    monkeypatch.setenv("RLHF_NB_DATA", str(shared_data))
    said = "\n".join(run("01_real_preferences.ipynb", tmp_path, monkeypatch).values())
    assert "1,495 pairs" in said and "dropped 5" in said, "the import counts what it left out, and says why"
    accuracy = re.search(r"held-out accuracy (0\.\d+) \[(0\.\d+), (0\.\d+)\], n=299; pick the shorter (0\.\d+)", said)
    assert accuracy, said
    value, low, high, shorter = map(float, accuracy.groups())
    assert low < value < high and shorter == pytest.approx(0.559, abs=0.001), "the null depends on the pairs alone"
    assert "log_ratio/margin" in said and "after:" in said


def test_the_tether_is_steered_and_the_committed_study_drawn(tmp_path, monkeypatch):
    texts = run("02_ppo_and_the_tether.ipynb", tmp_path, monkeypatch)
    assert "kl_coef" in texts['run.set("kl_coef", 0.1, why="a shorter tether").wait(timeout=300)']
    (preview,) = (text for text in texts.values() if "it would settle at" in text)
    assert preview.count("of 16 completions a prompt") == 4
    ends, fits = texts["study.ends_table(results)"], texts["study.fits_table(results)"]
    for setting in study.settings():
        assert setting.name in fits and (setting.kl_coef is None or setting.name in ends)
    assert "best of 64" in ends and "95 %" in fits


def test_preferences_without_rl_tell_what_beta_holds(tmp_path, monkeypatch):
    texts = run("03_preferences_without_rl.ipynb", tmp_path, monkeypatch)
    (units,) = (text for text in texts.values() if "implicit_reward/margin" in text)
    # Whatever the margin, its unit is the β in force: 0.05 for two steps, then 1.
    assert [line.split()[-1] for line in units.splitlines()[-5:]] == ["0.05", "0.05", "1.00", "1.00", "1.00"]
    (table,) = (text for text in texts.values() if "√KL, last sample" in text)
    assert all(name in table for name in ("DPO, β=1", "KTO", "ORPO", "SimPO"))
    assert texts["from rlhf_nb.ui.frontier import Frontier"].count("at √KL") == 5
    every = texts["from rlhf_nb.studies import methods as study"]
    assert all(arm in every for arm in methods.load()["arms"])


def test_sums_are_learnt_from_being_checked(tmp_path, monkeypatch):
    texts = run("04_verifiable_rewards.ipynb", tmp_path, monkeypatch)
    said = "\n".join(texts.values())
    assert "'8, no, 7': 1.0" in said and "'7 or 8': 0.0" in said
    assert texts["from rlhf_nb.rewards.unit_tests import unit_tests"].strip() == "[1.0, 0.0, 0.0, 0.0]"
    shares = re.findall(r"(grpo|dapo)-1: (\d\.\d+) right in the first ten rollouts, (\d\.\d+) in the last ten", said)
    assert {name for name, _, _ in shares} == {"grpo", "dapo"}
    assert all(float(last) > float(first) for _, first, last in shares), shares
    assert int(re.search(r"dapo-1: (\d+) groups sampled again", said)[1]) > 0
    assert "What is 2 + 3?" in said and "at the start" in said


def test_ai_feedback_finds_where_the_judge_goes_wrong_and_mends_drafts(tmp_path, monkeypatch):
    said = "\n".join(run("05_ai_feedback.ipynb", tmp_path, monkeypatch).values())
    assert "1,661 pairs by toy-annotator under toy-town" in said and "339 flipped with the order" in said
    # The judge draws no lots: what it gets right of the toy world's pairs is the same everywhere.
    for row in ("the judge .* 0.543", "the labeller .* 0.671", "the principle tells them apart .* 0.825"):
        assert re.search(row, said), said
    assert re.search(r"likes what comes first .* 1.000", said) and "  revision:" in said
    gained = re.search(r"difference +(-?0\.\d+) \[(-?0\.\d+), (-?0\.\d+)\]", said)
    assert gained and float(gained[2]) > 0, said


def test_a_chain_of_four_stages_is_traced_back_to_its_labels(tmp_path, monkeypatch):
    texts = run("06_a_chain.ipynb", tmp_path, monkeypatch)
    tree = texts["tree = ws.lineage(ppo)"]
    for name in ("ppo-1", "grpo-1", "dpo-1", "sft-1", "reward-1", "labels-of-may", "toy-demonstrations"):
        assert name in tree, tree
    assert "'chosen'" in texts['labels = tree.find("labels-of-may")']
    assert list(tmp_path.rglob("for-a-colleague/model.safetensors"))


def test_chapters_are_numbered_and_end_with_something_to_change():
    names = sorted(path.name for path in NOTEBOOKS.glob("*.ipynb"))
    assert names[0] == "00_quickstart.ipynb" and os.fspath(NOTEBOOKS)
    for name in names:
        last = nbformat.read(NOTEBOOKS / name, as_version=4).cells[-1]
        assert last.cell_type == "markdown" and "change something" in last.source
