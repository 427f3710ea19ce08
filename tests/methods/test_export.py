"""Exported models: loaded by plain transformers and PEFT, pushed to a stand-in of the hub, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_nb.compute.rundir import RunDir
from rlhf_nb.errors import ComputeError, SpecError
from rlhf_nb.methods.export import Export
from rlhf_nb.protocol.spec import HubModel, LoRA, PathModel, RunModel, RunSpec
from rlhf_nb.stages.export import card
from rlhf_nb.stages.lineage import Node
from rlhf_nb.toy import demonstrations, pairs

CONFIG = {"max_steps": 1, "batch_size": 2, "sample_every": 0, "learning_rate": 1e-2, "max_length": 200}
IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture
def lora(job):
    return job("sft", demonstrations(4), name="sft-1", config=CONFIG, adapter=LoRA(r=4))


def export(job, policy, name="export", **config):
    place = RunDir(job.root / name)
    config = Export.create(**config).model_dump(mode="json")
    place.create(RunSpec(run_id=name, workspace_id="w", method="export", config=config, policy=policy, created=0.0))
    job.run(place)
    (result,) = [event for event in place.events() if event.kind == "result"]
    return result


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_the_whole_model_is_loaded_by_plain_transformers(job, lora, tmp_path):
    result = export(job, RunModel(run_id="sft-1"), directory=str(tmp_path / "out"), card="# polite")
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(result.detail["files"])
    assert not any("adapter" in name for name in result.detail["files"])
    assert result.value == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    merged = AutoModelForCausalLM.from_pretrained(lora.model)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(merged))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert (tmp_path / "out" / "README.md").read_text() == "# polite"


def test_the_adapter_alone_is_loaded_by_peft_on_its_base_and_names_it(job, lora, tmp_path):
    policy = RunModel(run_id="sft-1")
    export(job, policy, directory=str(tmp_path / "out"), form="adapter", base="someone/tiny@v1")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("someone/tiny", "v1")
    assert json.loads((tmp_path / "out" / "base.json").read_text())["name"] == "someone/tiny@v1"
    base = AutoModelForCausalLM.from_pretrained(job.model)
    alone = PeftModel.from_pretrained(base, tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(lora.model)
    torch.testing.assert_close(logits(alone), logits(merged))
    # A bare adapter is exported whole as well: merged into the base that it names.
    bare = PathModel(path=str(lora.model / "adapter"))
    export(job, bare, name="export-2", directory=str(tmp_path / "whole"))
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "whole")), logits(merged))


def test_the_base_comes_back_when_the_adapter_is_taken_off(job, lora, tmp_path):
    export(job, RunModel(run_id="sft-1"), directory=str(tmp_path / "out"), form="base")
    off, base = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "out", job.model))
    torch.testing.assert_close(logits(off), logits(base), rtol=0, atol=1e-5)
    merged = AutoModelForCausalLM.from_pretrained(lora.model)
    assert (logits(off) - logits(merged)).abs().max() > 1e-3


def test_what_is_there_already_stays_and_a_model_without_an_adapter_has_none(job, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(SpecError, match=r"export: .*/out holds something already"):
        export(job, PathModel(path=str(job.model)), directory=str(tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    with pytest.raises(SpecError, match=r"export: tiny was trained in all its weights and has no adapter"):
        export(job, PathModel(path=str(job.model)), name="export-2", directory=str(tmp_path / "b"), form="adapter")
    assert not (tmp_path / "b").exists()


def test_an_ensemble_is_refused_before_anything_is_written(job, tmp_path):
    config = {"max_steps": 1, "batch_size": 2, "max_length": 200, "members": 2}
    job("reward", pairs(4), name="rm", config=config)
    with pytest.raises(SpecError, match="is an ensemble of 2 reward models, which only scores"):
        export(job, RunModel(run_id="rm"), directory=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_push_that_failed_is_taken_up_again_where_it_stopped(job, lora, tmp_path, monkeypatch):
    from rlhf_nb.training import export as files

    asked = []

    def fails_once(directory, repo_id, *, token, private):
        asked.append((directory, repo_id, token, private))
        if len(asked) == 1:
            raise ComputeError("export: the hub is away")
        return "https://hub/me/polite/commit/1"

    monkeypatch.setattr(files, "push", fails_once)
    monkeypatch.setattr(files, "token", lambda: "hf_secret123")
    with pytest.raises(ComputeError, match="the hub is away"):
        export(job, RunModel(run_id="sft-1"), directory=str(tmp_path / "out"), push="me/polite")
    place = job.run(RunDir(job.root / "export"), attempt=2)
    (result,) = [event for event in place.events() if event.kind == "result"]
    assert result.detail["url"] == "https://hub/me/polite/commit/1"
    assert asked == [(tmp_path / "out", "me/polite", "hf_secret123", True)] * 2
    assert not any(b"hf_secret123" in path.read_bytes() for path in place.path.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({}, "no directory and no repository"),
        ({"push": "polite"}, "push='polite' is no repository; write OWNER/NAME"),
        ({"push": "me/polite", "form": "adapter"}, "the adapter's base is not on the hub"),
    ],
)
def test_an_export_that_nobody_could_use_is_refused_before_the_start(knobs, says):
    spec = RunSpec(run_id="e", workspace_id="w", method="export", config={}, created=0.0)
    with pytest.raises(SpecError, match=says):
        Export.create(**knobs).check(spec)


def test_a_card_names_the_base_and_fences_whatever_the_lineage_says():
    spec = RunSpec(run_id="sft-1", workspace_id="w", method="sft", config={}, created=0.0)
    policy = HubModel(repo_id="someone/tiny")
    node = Node("sft-1", "run", what="data named ```` and --- \n# not a heading", parents=(Node("x", "data"),))
    text = card(node, spec.model_copy(update={"policy": policy}), form="adapter", base="someone/tiny@v1", name="sft-1")
    assert text.startswith("---\nlibrary_name: peft\nbase_model: someone/tiny\ntags:\n- rlhf_nb\n- sft\n---\n")
    body = text.split("\n---\n", 1)[1]
    opened, closed = [at for at, line in enumerate(body.splitlines()) if line == "`````"]
    assert opened < body.splitlines().index("# not a heading") < closed


PUSH = """
import sys
from pathlib import Path
from rlhf_nb.errors import RlhfError
from rlhf_nb.training.export import push, token
try:
    print(push(Path(sys.argv[1]), "me/polite", token=token(), private=True))
except RlhfError as error:
    print(f"{type(error).__name__}: {error}")
"""


@pytest.fixture
def pushed(tmp_path):
    """Pushes a directory from a process of its own, which alone reads where the hub is and its token."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
    from hub import Hub

    hubs = []

    def run(directory: Path, *, refuses: int = 0, token: str = "hf_secret123"):
        hubs.append(Hub(refuses=refuses))
        env = {**os.environ, "HF_ENDPOINT": hubs[-1].url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        env |= {"HF_HOME": str(tmp_path / "hf"), "no_proxy": "127.0.0.1"} | ({"HF_TOKEN": token} if token else {})
        command = [sys.executable, "-c", PUSH, str(directory)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        return hubs[-1], done

    yield run
    for hub in hubs:
        hub.close()
    sys.path.pop(0)


def test_what_is_pushed_is_the_directory_and_the_token_is_said_nowhere(pushed, job, tmp_path):
    from rlhf_nb.training import export as files

    files.write(files.Source(job.model, None), tmp_path / "out", form="merged", card="# polite")
    hub, done = pushed(tmp_path / "out")
    assert done.stdout.strip() == f"{hub.url}/me/polite/commit/0123456789abcdef0123456789abcdef01234567", done.stderr
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert hub.created == [{"name": "polite", "organization": "me", "visibility": "private"}]
    assert hub.tokens == {"Bearer hf_secret123"}
    assert "hf_secret123" not in done.stdout + done.stderr + "".join(hub.asked)


def test_a_hub_that_refuses_and_a_missing_token_are_one_line_and_the_directory_stays(pushed, job, tmp_path):
    from rlhf_nb.training import export as files

    files.write(files.Source(job.model, None), tmp_path / "out", form="merged")
    _, done = pushed(tmp_path / "out", refuses=403)
    assert done.stdout.startswith("ComputeError: export: me/polite could not be pushed (")
    assert done.stdout.rstrip().endswith(f"the directory {tmp_path / 'out'} is whole")
    assert done.stdout.count("\n") == 1 and "hf_secret123" not in done.stdout + done.stderr
    hub, done = pushed(tmp_path / "out", token="")
    assert done.stdout.startswith("SpecError: export: push needs a token on the compute host: set HF_TOKEN there")
    assert not hub.asked
