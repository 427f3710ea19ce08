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
from rlhf_nb.errors import AttachError, DataError, NotFoundError, RlhfError, SpecError
from rlhf_nb.protocol.events import Coefficient, Started


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
