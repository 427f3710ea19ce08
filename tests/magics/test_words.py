"""What `%rlhf` understands, refuses and prints without any compute attached."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

import rlhf_nb as rl
from rlhf_nb import workspace
from rlhf_nb.errors import (
    AttachError,
    DataError,
    NotFoundError,
    RlhfError,
    RunIdTakenError,
    SpecError,
    StorageError,
    UnavailableError,
)
from rlhf_nb.protocol.events import Coefficient, Metric, Started


def test_a_bare_magic_says_what_is_attached_and_which_workspace(shell):
    text = repr(shell.run("%rlhf"))
    assert "nothing is attached; %rlhf attach local" in text and "rlhf-workspace" in text


def test_a_semicolon_at_the_end_belongs_to_the_notebook(shell):
    """It hides the result of a cell; within a quoted word it is a character."""
    with pytest.raises(NotFoundError, match='run "sft-9" does not exist'):
        shell.run("%rlhf wait sft-9; ")
    with pytest.raises(NotFoundError, match='run "a;" does not exist'):
        shell.run("%rlhf wait 'a;'")


def test_a_misspelt_verb_suggests_the_nearest(shell):
    with pytest.raises(SpecError, match='"lable" is no verb of %rlhf; did you mean "label"'):
        shell.run("%rlhf lable hh")


@pytest.mark.parametrize(
    ("line", "error", "says"),
    [
        ("%rlhf sft --basse toy", SpecError, 'did you mean "--base"'),
        ("%rlhf sft", SpecError, "no model to train; give --base"),
        ("%rlhf sft --base toy", SpecError, "no rows to train on; give --data"),
        ("%rlhf sft --base toyy --data toy-demonstrations", NotFoundError, 'base|policy "toyy" does not exist'),
        ("%rlhf dpo --policy toy-sfx --data toy-pairs", NotFoundError, 'did you mean "toy-sft"'),
        ("%rlhf sft --base toy --data toy-demonstrationz", NotFoundError, 'did you mean "toy-demonstrations"'),
        ("%rlhf sft --base toy --data toy-pairs", DataError, "holds pairs, and sft trains on demonstrations"),
        ("%rlhf sft --base toy --data toy-demonstrations --set max_step=3", SpecError, 'did you mean "max_steps"'),
        ("%rlhf sft --base toy --data toy-demonstrations --set max_steps=-1", SpecError, "max_steps=-1"),
        ("%rlhf sft --base toy --data toy-demonstrations --set max_steps", SpecError, "write key=value"),
        ("%rlhf sft --base toy --data toy-demonstrations", AttachError, "%rlhf attach local"),
        ("%rlhf ppo --policy toy-sft --prompts toy-prompts", SpecError, "no reward; give --reward"),
        ("%rlhf ppo --policy toy-sft --prompts toy-prompts --reward toy-tru", NotFoundError, 'did you mean "toy-true"'),
        (
            "%rlhf ppo --policy toy-sft --prompts toy-prompts --reward toy-true --set kl_coef=-1",
            SpecError,
            "kl_coef=-1",
        ),
        ("%rlhf generate --policy toy", SpecError, "the following arguments are required: --prompts"),
        ("%rlhf generate --policy toy --prompts toy-prompts --keep best", SpecError, "keep=best goes by a score"),
        ("%rlhf generate --policy toy --prompts toy-prompts --n 0", SpecError, "n=0"),
        ("%rlhf generate --policy toy --prompts toy-prompts --set seed=1", AttachError, "%rlhf attach local"),
        ("%rlhf reward --base toy --data toy-rankings", AttachError, "%rlhf attach local"),
        ("%rlhf reward --base toy --data toy-pairs --set members=0", SpecError, "members=0"),
        (
            """%rlhf reward --base toy --data toy-pairs --set 'annotator_weights={"ida": -1}'""",
            SpecError,
            "annotator_weights.ida=-1",
        ),
        ('%rlhf sft --base toy --data "toy-pairs as demonstrations"', AttachError, "%rlhf attach local"),
        (
            '%rlhf sft --base toy --data "toy-pairs as thumbs"',
            DataError,
            r"sft trains on demonstrations \(prompt, comp",
        ),
        ("%rlhf refit reward-9", SpecError, "the following arguments are required: --scored, --labels"),
        ("%rlhf refit reward-9 --scored x --labels y", NotFoundError, 'run "reward-9" does not exist'),
        ("%rlhf attach server", SpecError, "needs a URL"),
        ("%rlhf watch ppo-9", NotFoundError, 'run "ppo-9" does not exist'),
        ("%rlhf watch", NotFoundError, "no run yet"),
        ('%rlhf sample sft-1 "unclosed', SpecError, "close the quote"),
        ("%rlhf import nowhere.jsonl --as x", RlhfError, "nowhere.jsonl"),
        ("%rlhf lineage ppo-9", NotFoundError, 'lineage: model "ppo-9" does not exist'),
        ("%rlhf export toy", SpecError, "no directory and no repository"),
        ("%rlhf export toy --push polite", SpecError, "write OWNER/NAME"),
        ("%rlhf export toy out", AttachError, "%rlhf attach local"),
        ("%rlhf label nothing", NotFoundError, 'data "nothing" does not exist'),
        ("%%rlhf sft\nmax_steps = = 3", SpecError, "not TOML"),
        ("%%rlhf sft\nbase = 'toy'\ndata = 'toy-demonstrations'\nmax_step = 3", SpecError, 'did you mean "max_steps"'),
        ("%%rlhf sft\nbase = 'toy'\ndata = 'a'\nprompts = 'b'", SpecError, "data and prompts name the same rows"),
        ("%%rlhf sft\ntitle = 3", SpecError, "title=3 is no text"),
        ("%%rlhf sft\nlaunch = ['--cpu']", SpecError, r"launch=\['--cpu'\] is no text"),
        ('%rlhf attach local --launch "--num_processes two"', SpecError, "--num_processes 'two' is no number of ranks"),
        (
            "%rlhf sft --base toy --data toy-demonstrations --launch=--num_processes=0",
            SpecError,
            "--num_processes '0' is no number of ranks",
        ),
        ("%rlhf generate --policy toy --prompts toy-prompts --set reward=x", SpecError, "reward has its own place"),
        ("%rlhf refit reward-9 --scored x --labels y --set scored=z", SpecError, "scored has its own place"),
        ("%rlhf judge toy-pairs --judge toy-annotator --set principle=x", SpecError, "principle has its own place"),
        (
            "%rlhf constitutional --policy toy --prompts toy-prompts --constitution toy-town --set half=preferences",
            SpecError,
            "half has its own place",
        ),
        (
            "%rlhf iterate --policy toy --prompts toy-prompts --sampling n=8",
            SpecError,
            "--sampling n=...: n has its own",
        ),
        ("%rlhf iterate --policy toy-sft --prompts toy-prompts --reward toy-true --n 0", SpecError, "n=0"),
        ("%rlhf iterate --policy toy-sft --prompts toy-prompts --name 'number 3'", SpecError, "give another"),
        ("%rlhf quickstart /proc/x", StorageError, "/proc/x: no directory can be made there"),
        ("%%rlhf sft\nadapter = 'none'", SpecError, "adapter='none' is no adapter; write \"lora\", false, or"),
        ("%%rlhf sft\nadapter = 8", SpecError, "adapter=8 is no adapter"),
        ("%%rlhf sft\n[adapter]\nrank = 8", SpecError, '"rank" is no knob of an adapter.*known: r, alpha'),
        ("%%rlhf sft\n[adapter]\nr = 0", SpecError, "adapter.r=0: should be greater than 0"),
        ("%%rlhf watch\nx", SpecError, "takes no cell"),
        ("%rlhf reward-function brief", SpecError, "is a cell magic"),
        ("%%rlhf reward-function brief\n1 +", SpecError, "line 1"),
        ("%%rlhf reward-function brief\ndef f(x): return 1", SpecError, "must begin with"),
        (
            "%%rlhf reward-function brief\ndef f(prompts, completions, **c): return [K]",
            SpecError,
            "K is defined outside",
        ),
    ],
)
def test_a_bad_line_is_one_line_with_the_value_and_the_way_out(shell, line, error, says):
    with pytest.raises(error, match=says) as caught:
        shell.run(line)
    assert "\n" not in str(caught.value)


@pytest.fixture
def submitting(shell):
    """What stands for the compute takes every spec and control; nothing is trained."""
    ws = workspace.current()
    ws._client = Mock(alive=True, info=SimpleNamespace(name="local", runs_root="/runs", host="gpu-1"))
    yield ws
    ws._client = None


@pytest.mark.parametrize(
    ("line", "cell", "rank"),
    [
        ("", "", None),
        ("", "adapter = false", None),
        ("", "adapter = true", 16),
        ("", 'adapter = "lora"', 16),
        ("--adapter lora", "adapter = false", 16),
        ("--adapter lora", "[adapter]\nr = 8", 8),
        ("", "[adapter]\nr = 8", 8),
    ],
)
def test_an_adapter_in_a_cell_is_trained_as_it_is_written(shell, submitting, monkeypatch, line, cell, rank):
    monkeypatch.setattr("rlhf_nb.magics.magic._show", lambda run: run)
    run = shell.run(f"%%rlhf sft {line}\nbase = 'toy'\ndata = 'toy-demonstrations'\n{cell}")
    assert (run.spec.adapter and run.spec.adapter.r) == rank


@pytest.mark.parametrize(("second", "says"), [("beta=x", "beta='x' is no number"), ("betta=1", '"betta" is not live')])
def test_of_a_line_that_is_refused_nothing_is_set(shell, submitting, second, says):
    submitting.train(rl.DPO(), base="toy", data="toy-pairs")
    live = Coefficient(name="learning_rate", low=0, high=1, value=1e-4)
    started = Started(seq=1, world_size=1, coefficients=[live, live.model_copy(update={"name": "beta"})])
    submitting._client.events.side_effect = lambda run_id, since: [started] if since < 1 else []
    with pytest.raises(SpecError, match=says):
        shell.run(f"%rlhf set dpo-1 learning_rate=0.5 {second}")
    submitting._client.control.assert_not_called()


def test_what_is_set_on_a_run_that_waits_is_checked_as_on_one_that_trains(shell, submitting):
    submitting.train(rl.PPO(kl_coef=0.0), policy="toy-sft", data="toy-prompts", reward="toy-true")
    submitting._client.events.side_effect, submitting._client.state.return_value = lambda run_id, since: [], "waiting"
    for line, says in (
        ("lerning_rate=5", 'did you mean "learning_rate"'),
        ("learning_rate=9e9", "outside its range 1e-08 to 0.1"),
        ("kl_coef=-5", "outside its range 0 to 10"),
    ):
        with pytest.raises(SpecError, match=says):
            shell.run(f"%rlhf set ppo-1 {line}")
    for verb in ("preview ppo-1 kl_coef=0.1", "sample ppo-1 hello"):
        with pytest.raises(UnavailableError, match="ppo-1 waits and has no policy yet"):
            shell.run(f"%rlhf {verb}")
    submitting._client.control.assert_not_called()
    # What a run starts with is always within its range: who raised a tether from 0 can cut it again.
    said = repr(shell.run("%rlhf set ppo-1 kl_coef=0 learning_rate=1e-5")).splitlines()
    then = "asked; in force when the run runs"
    assert said == [f"kl_coef=0 {then}", f"learning_rate=1e-05 {then}"]
    assert submitting._client.control.call_count == 2


def test_metrics_are_a_table_that_can_be_sorted_grouped_and_merged_by_step(shell, submitting):
    run = submitting.train(rl.SFT(), base="toy", data="toy-demonstrations")
    rows = [Metric(seq=step, step=step, values={"loss": 1 / step}) for step in (1, 2)]
    submitting._client.events.side_effect = lambda run_id, since: [row for row in rows if row.seq > since]
    table = run.metrics()
    assert list(table.index) == list(table["step"]) == [1, 2]
    assert list(table.sort_values("step", ascending=False).reset_index(drop=True)["loss"]) == [0.5, 1.0]
    assert table.groupby("step").mean().merge(table, on="step")["loss_x"].tolist() == [1.0, 0.5]


@pytest.mark.parametrize("asked", ["--prompts 0", "--samples 1", "--samples 5000"])
def test_how_much_a_preview_may_sample_is_one_line(shell, submitting, asked):
    submitting.train(rl.PPO(), policy="toy-sft", data="toy-prompts", reward="toy-true")
    submitting._client.events.side_effect, submitting._client.state.return_value = lambda run_id, since: [], "running"
    name, value = asked.strip("-").split()
    with pytest.raises(SpecError, match=f"ppo-1: preview {name}={value}: should be") as caught:
        shell.run(f"%rlhf preview ppo-1 kl_coef=0.1 {asked}")
    assert "\n" not in str(caught.value)


def test_a_number_that_another_workspace_took_on_a_shared_compute_is_passed_over(shell, submitting):
    taken = RunIdTakenError("another run is called so")
    submitting._client.submit.side_effect = [taken, taken, None]
    run = submitting.train(rl.SFT(), base="toy", data="toy-demonstrations")
    assert run.id == "sft-3" and submitting.run_ids() == ["sft-3"]


def test_what_is_detached_by_hand_stays_so_until_something_is_attached(shell, submitting, monkeypatch):
    submitting.train(rl.SFT(), base="toy", data="toy-demonstrations")
    submitting._client.release.return_value = []
    again = Mock(side_effect=AttachError("no kernel"))
    monkeypatch.setattr(submitting, "_attach", again)
    shell.run("%rlhf detach")
    shell.run("%rlhf runs")
    with pytest.raises(AttachError, match="%rlhf attach local"):
        shell.run("%rlhf stop sft-1")
    again.assert_not_called()
    # A process that only lost its handle, as after a kernel restart, looks for it.
    with pytest.raises(AttachError), workspace.Workspace("rlhf-workspace") as other:
        monkeypatch.setattr(other, "_attach", again)
        _ = other.client
    again.assert_called_once()


def test_the_cell_shows_one_line_and_no_traceback(shell, capsys):
    shell.shell.run_cell("%rlhf lable hh", store_history=False)
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "Traceback" not in out and "SpecError" in out


def test_a_refused_line_takes_no_run_number(shell):
    with pytest.raises(AttachError):
        shell.run("%rlhf sft --base toy --data toy-demonstrations")
    assert len(shell.run("%rlhf runs")) == 0


def test_a_reward_function_of_a_cell_is_kept_and_listed(shell):
    source = "def f(prompts, completions, **columns):\n    return [-len(c) for c in completions]"
    shell.run(f"%%rlhf reward-function brief\n{source}")
    assert any(row["model"] == "brief" for row in shell.run("%rlhf models"))
    workspace.use(workspace.Workspace("rlhf-workspace"))
    assert "brief" in workspace.current().reward_functions


def test_names_that_always_resolve_are_listed(shell):
    models = {row["model"] for row in shell.run("%rlhf models")}
    data = {row["data"] for row in shell.run("%rlhf data")}
    assert {"toy", "toy-sft", "toy-true"} <= models
    assert {"toy-demonstrations", "toy-pairs", "toy-rankings", "toy-thumbs", "toy-prompts"} <= data


def test_quickstart_copies_the_notebooks_and_leaves_what_is_there(shell, tmp_path):
    first = shell.run("%rlhf quickstart")
    assert (tmp_path / "00_quickstart.ipynb").exists()
    (tmp_path / "00_quickstart.ipynb").write_text("mine")
    again = shell.run("%rlhf quickstart")
    assert [row[""] for row in first][0] == "copied" and [row[""] for row in again][0] == "left as it is"
    assert (tmp_path / "00_quickstart.ipynb").read_text() == "mine"


def test_help_lists_every_verb(shell):
    from rlhf_nb.magics import parser

    text = shell.shell.object_inspect("%rlhf")["docstring"]
    missing = [verb for verb in parser.verbs() if f"%rlhf {verb}" not in text]
    assert not missing


def test_variables_expand_and_results_can_be_assigned(shell):
    shell.run("name = 'toy-pairs'\ntable = %rlhf data")
    assert len(shell.shell.user_ns["table"]) >= 5
    with pytest.raises(DataError, match="toy-pairs"):
        shell.run("%rlhf sft --base toy --data {name}")


def test_unloading_takes_the_magic_away_and_closes_the_workspace(shell):
    shell.run("%rlhf")
    shell.run("%unload_ext rlhf_nb")
    assert shell.shell.find_line_magic("rlhf") is None and workspace.opened() is None
    shell.run("%load_ext rlhf_nb")
    assert shell.run("%rlhf") is not None


def test_loading_the_extension_imports_nothing_heavy():
    code = (
        "import sys\nfrom IPython.core.interactiveshell import InteractiveShell\n"
        "s = InteractiveShell.instance(); s.run_line_magic('load_ext', 'rlhf_nb')\n"
        "heavy = {'torch', 'transformers', 'trl', 'pandas', 'bokeh', 'sqlalchemy', 'alembic', 'datasets', 'numpy'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", done.stdout


def test_using_the_notebook_side_never_imports_torch(tmp_path: Path):
    code = (
        "import sys\nimport rlhf_nb as rl\nws = rl.Workspace('w')\n"
        "ws.datasets(); ws.models(); ws.runs(); ws.status(); ws.dataset('toy-pairs').rows\n"
        "[getattr(rl, name) for name in rl.__all__]\n"
        "print(sorted({'torch', 'transformers', 'trl', 'peft', 'accelerate'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]", done.stdout
