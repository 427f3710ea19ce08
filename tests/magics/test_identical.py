"""Through `%rlhf`, with a standby worker and the panel on, every number is the one a plain TRL script logs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from rlhf_nb.compute.rundir import RunDir
from rlhf_nb.protocol.fold import RunFold
from rlhf_nb.toy import demonstrations, pairs
from tests.servers import kernel_ports

pytestmark = [pytest.mark.slow]

PLAIN = Path(__file__).resolve().parents[1] / "training" / "plain_trl.py"
STEPS = 12
ROWS = {"sft": demonstrations(40), "reward": pairs(40), "dpo": pairs(40)}
KNOBS = {"max_steps": STEPS, "batch_size": 4, "learning_rate": 2e-3, "lr_scheduler": "cosine", "warmup_steps": 1}
KNOBS |= {"weight_decay": 0.1, "max_length": 200, "seed": 3}
NAMES = {
    "loss": "loss",
    "grad_norm": "optimizer/grad_norm",
    "learning_rate": "optimizer/learning_rate",
    "margin": "pairs/margin",
    "rewards/margins": "implicit_reward/margin",
}


def as_chat(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    return {key: [{"role": "user" if key == "prompt" else "assistant", "content": row[key]}] for key in row}


def test_standby_panel_and_untouched_control_leave_the_loss_traces_bit_identical(tmp_path, tiny_model):
    settings = {**KNOBS, "model": str(tiny_model), "output": str(tmp_path / "plain")}
    settings["rows"] = {method: [as_chat(row) for row in rows] for method, rows in ROWS.items()}
    plain = subprocess.Popen(  # beside the notebook: it saves the wait
        [sys.executable, PLAIN, json.dumps(settings)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    config = " ".join(f"{key}={value}" for key, value in KNOBS.items())
    cells = ['%load_ext rlhf_nb\n%rlhf attach local --launch "--num_cpu_threads_per_process 1"']
    cells += ["from rlhf_nb import workspace\nws = workspace.current()"]
    for method, rows in ROWS.items():
        start = "policy" if method == "dpo" else "base"
        (tmp_path / f"{method}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        cells.append(f"%rlhf import {method}.jsonl --as {method}-rows")
        cells.append("ws.client.wait_standby().standby")
        cells.append(f"run = %rlhf {method} --{start} {tiny_model} --data {method}-rows --set {config}\n")
        cells.append("%rlhf wait {run}")
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell(cell) for cell in cells]
    where = {"metadata": {"path": tmp_path}}
    client = NotebookClient(notebook, timeout=240, kernel_name="python3", resources=where, config=kernel_ports())
    with plain:
        try:
            client.execute()
            said, errors = plain.communicate(timeout=240)
        finally:
            plain.kill()
    assert plain.returncode == 0, errors
    theirs = json.loads(said.splitlines()[-1])
    shown = json.dumps(notebook.cells)
    assert shown.count("application/vnd.jupyter.widget-view+json") >= len(ROWS), "no panel was shown"
    for method in ROWS:
        run = RunDir(tmp_path / "rlhf-workspace" / "runs" / f"{method}-1")
        fold = RunFold()
        for event in run.events():
            fold.add(event)
        assert fold.started is not None and fold.started.warm, "the run did not start in the standby worker"
        compared = 0
        for theirs_name, name in NAMES.items():
            if theirs_name in theirs[method][0]:
                ours = [row.values[name] for row in fold.rows]
                assert ours == [log[theirs_name] for log in theirs[method]], f"{method}: {name}"
                compared += 1
        assert compared >= 3
