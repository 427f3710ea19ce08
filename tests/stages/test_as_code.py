"""The cell that a spec writes for itself submits the same spec again."""

from __future__ import annotations

import runpy

import rlhf_nb as rl
from rlhf_nb import registry
from rlhf_nb.methods.sft import SFT
from rlhf_nb.protocol.spec import FunctionReward, HubModel, ModelReward, NamedReward, PathModel
from rlhf_nb.toy import pairs


def short(prompts, completions, **columns):
    """Shorter is better."""
    return [-float(len(text)) for text in completions]


def again(ws, run, tmp_path):
    """Run the cell of a run, and compare what it submits: all but the number, the time and who asked."""
    path = tmp_path / f"{run.id}.py"
    path.write_text(run.spec.as_code())
    before = ws.run_ids()
    runpy.run_path(str(path), {"ws": ws})
    (new,) = set(ws.run_ids()) - set(before)
    loose = {"run_id", "created"}
    assert ws.spec(new).model_dump(exclude=loose) == run.spec.model_dump(exclude=loose)
    return path.read_text()


def test_what_differs_from_the_defaults_is_all_that_is_said(ws):
    run = ws.train(rl.SFT(max_steps=3), base="toy", data="toy-demonstrations")
    assert run.spec.as_code() == (
        "import rlhf_nb as rl\n\nws.train(\n    rl.SFT(max_steps=3),\n    policy='toy',\n"
        "    data='toy-demonstrations',\n    launch='',\n)\n"
    )


def test_every_way_to_name_a_model_rows_and_a_reward_comes_back_as_it_was(ws, tmp_path):
    sft = ws.train(rl.SFT(), base="toy", data="toy-demonstrations", title="a start", launch="--num_processes 2")
    again(ws, sft, tmp_path)
    ws.add_data(pairs(4), name="mine", kind="pairs")
    rm = ws.train(rl.RewardModel(members=2), base=sft, data="mine", adapter=rl.LoRA(r=3, target_modules=["q_proj"]))
    # Under the same name there are other rows by now.
    ws.add_data(pairs(6, seed=9), name="mine", kind="pairs")
    assert "content_hash" in again(ws, rm, tmp_path)
    worst = ModelReward(model=rm.model, over="min")
    source = "N = 2.0\ndef two(prompts, completions):\n    return [N] * len(completions)\n"
    two = FunctionReward(name="two", source=source)
    for reward in (rm, worst, two, [rm, "toy-true"], 'toy-true=2, regex(pattern="^yes")=1'):
        shares = {"mine": 1, "toy-prompts": 2}
        run = ws.train(rl.PPO(kl_coef=0.5), policy=sft, prompts=shares, reward=reward, gold="toy-true")
        again(ws, run, tmp_path)
    told = again(ws, ws.train(rl.RLOO(), policy=sft, prompts="toy-prompts", reward=short), tmp_path)
    assert '"""Shorter is better."""' in told and "reward=short," in told


def test_a_method_of_a_plugin_is_found_by_its_name(ws, monkeypatch):
    class Mine(SFT):
        name = "mine"

    monkeypatch.setattr(registry.methods, "get", lambda name: Mine if name == "mine" else SFT)
    spec = ws.train(rl.SFT(), base="toy", data="toy-demonstrations").spec.model_copy(update={"method": "mine"})
    assert (
        "from rlhf_nb import registry\n" in spec.as_code() and "    registry.methods.get('mine')(),\n" in spec.as_code()
    )


def test_models_of_elsewhere_and_jobs_that_train_nothing(ws, tmp_path, tiny_model):
    for policy, said in (
        # A directory may be on the compute host alone: as a text it would be looked for here.
        (PathModel(path=str(tiny_model)), f"policy=PathModel(kind='path', path='{tiny_model}'),"),
        (HubModel(repo_id="owner/name", revision="v1"), "policy='owner/name@v1',"),
    ):
        run = ws.train(rl.DPO(loss_type=["sigmoid", "sft"]), policy=policy, data="toy-pairs")
        assert said in again(ws, run, tmp_path)
    drawn = ws.generate("toy-sft", prompts="toy-prompts", n=2, reward=NamedReward(name="toy-true"))
    assert "submit(ws, RunSpec(" in again(ws, drawn, tmp_path)
