"""A chain of methods in one sitting, each stage submitted before the last one has finished."""

from __future__ import annotations

import pytest

import rlhf_nb as rl
from rlhf_nb.toy import demonstrations, pairs, prompts

FEW = {"max_steps": 1, "batch_size": 2, "sample_every": 0, "max_length": 200}
STAGES = {
    # Only the first one learns: what comes out at the end shows what every later stage began with.
    "sft": (rl.SFT(**{**FEW, "learning_rate": 1e-2}), {"data": ("demonstrations", demonstrations(4))}),
    "dpo": (rl.DPO(**{**FEW, "learning_rate": 0.0}), {"data": ("pairs", pairs(4))}),
    "grpo": (
        rl.GRPO(**{**FEW, "learning_rate": 0.0, "max_new_tokens": 4, "rollout_batch_size": 2, "group_size": 2}),
        {"prompts": ("prompts", prompts(4)), "reward": "toy-true"},
    ),
    "ppo": (
        rl.PPO(**{**FEW, "learning_rate": 0.0, "max_new_tokens": 4, "rollout_batch_size": 2, "num_ppo_epochs": 1}),
        {"prompts": ("prompts", prompts(4)), "reward": "toy-true"},
    ),
}


@pytest.mark.slow
def test_each_stage_takes_the_last_ones_saved_model_and_the_lineage_names_them_all(tmp_path, tiny_model):
    from safetensors.torch import load_file

    with rl.Workspace(tmp_path / "w") as ws:
        ws.attach("local", launch="--num_cpu_threads_per_process 1")
        model, runs = str(tiny_model), []
        for name, (method, given) in STAGES.items():
            told = {
                key: ws.add_data(value[1], name=f"{name}-rows", kind=value[0]) if isinstance(value, tuple) else value
                for key, value in given.items()
            }
            runs.append(ws.train(method, policy=model, **told))
            model = runs[-1]
        assert [run.spec.parents for run in runs] == [(), *((run.id,) for run in runs[:-1])]
        model.wait(240)
        weights = [load_file(ws.runs_root / run.id / "model" / "model.safetensors") for run in runs]
        base = load_file(tiny_model / "model.safetensors")
        first = weights[0]
        assert any((first[name] != base[name]).any() for name in base)
        for later in weights[1:]:
            assert later.keys() == first.keys() and all((later[name] == first[name]).all() for name in first)
        for run in runs:
            run.fold  # reads it to its end, and so into the index
        above = [node for node in ws.lineage(model).walk() if node.kind == "run"]
        assert [node.name for node in above] == [f"{name}-1" for name in reversed(STAGES)]
        assert all("finished" in node.what and len(node.content_hash) == 64 for node in above)
        assert {node.name for node in ws.lineage(model).walk() if node.kind == "data"} >= {
            f"{name}-rows" for name in STAGES
        }
        out = ws.export(model, tmp_path / "exported", timeout=240)
        assert load_file(tmp_path / "exported" / "model.safetensors").keys() == first.keys()
        assert set(out.files) == {path.name for path in (tmp_path / "exported").iterdir()}
        text = (tmp_path / "exported" / "README.md").read_text()
        assert all(f"{name}-rows" in text and f"policy {name}-1" in text for name in list(STAGES)[:-1])
        # A card goes out into the world: no name of a person, no directory of this machine.
        assert ws.who not in text and str(tmp_path) not in text and str(tiny_model.parent) not in text
        assert ws.who in str(ws.lineage(model))
