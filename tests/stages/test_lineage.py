"""From a model back to the rows, labels and files it came from. The compute is not asked for any of it."""

from __future__ import annotations

import json

import pytest

import rlhf_nb as rl
from rlhf_nb.errors import NotFoundError
from rlhf_nb.labelling.session import autolabel
from rlhf_nb.protocol.spec import BlobData, RunData
from rlhf_nb.stages.export import card
from rlhf_nb.stages.label import chooser
from rlhf_nb.stages.lineage import lineage
from rlhf_nb.toy import pairs


def chain(ws, tmp_path):
    """sft → dpo on labels → ppo towards a reward model, prompts from a file."""
    # As somebody else judged them: the annotator asked below turns every pair round.
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in pairs(12)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in swapped))
    mine = ws.import_data(tmp_path / "mine.jsonl", name="mine")
    session = ws.label("mine", annotator="ana")
    autolabel(session, chooser("toy-annotator"), name="toy-annotator")
    train, _ = mine.split(0.25)
    sft = ws.train(rl.SFT(max_steps=3), base="toy", data="toy-demonstrations")
    rm = ws.train(rl.RewardModel(), base=sft, data=train)
    dpo = ws.train(rl.DPO(beta=0.3), policy=sft, data="mine-labels")
    return ws.train(rl.PPO(), policy=dpo, reward={rm: 1, "toy-true": 0.5}, prompts=mine, adapter=rl.LoRA(r=2))


def test_every_run_row_and_label_above_a_model_is_in_its_lineage(ws, tmp_path):
    ppo = chain(ws, tmp_path)
    tree = ws.lineage(ppo)
    assert [(node.relation, node.name, node.kind) for node in tree.parents] == [
        ("policy", "dpo-1", "run"),
        ("reward", "reward-1", "run"),
        ("reward ×0.5", "toy-true", "reward"),
        ("data", "mine", "data"),
    ]
    assert tree.what.startswith("ppo (adapter r=2) · waiting")
    assert tree.find("dpo-1").what.startswith("dpo (beta=0.3) ·")
    labels = tree.find("mine-labels").parents[0]
    assert (labels.kind, len(labels.labels)) == ("labels", 12)
    assert labels.what == "12 standing labels by ana (12); simulated: toy-annotator"
    assert {each.label.annotator for each in labels.labels} == {"ana"}
    # The queue says which data set was asked about, down to the file.
    (asked,) = labels.parents
    assert asked.name == "mine" and asked.rows == ws.dataset("mine").rows
    assert str(tmp_path / "mine.jsonl") in asked.what
    # What the policy learnt from are the rows that the labels made.
    rows = tree.find("mine-labels").rows
    assert rows == ws.dataset("mine-labels").rows and rows != asked.rows


def test_a_part_of_a_data_set_says_of_which_and_how(ws, tmp_path):
    ppo = chain(ws, tmp_path)
    part = ws.lineage(ppo).find("mine-train")
    assert "train part of mine, test=0.25, seed=0" in part.what
    assert [node.name for node in part.parents] == ["mine"]
    assert len(part.rows) == 9
    prompts = ws.lineage(ppo).parents[-1]
    assert [(node.relation, node.name) for node in prompts.parents] == [("made from", "mine")]
    assert "from pairs" in prompts.what or prompts.what.startswith("12 pairs")


def test_a_card_goes_out_with_the_lineage_and_without_people_or_directories(ws, tmp_path):
    ppo = chain(ws, tmp_path)
    text = card(lineage(ws, ppo, public=True), ppo.spec, form="merged", base="", name="ppo-1")
    assert "policy sft-1" in text and "mine.jsonl" in text and "12 standing labels by 1 annotator" in text
    assert "ana" not in text and ws.who not in text and str(tmp_path) not in text
    private = str(ws.lineage(ppo))
    assert "ana" in private and ws.who in private and str(tmp_path) in private


def test_a_card_names_a_judge_and_not_where_it_is_nor_who_labelled_nor_the_server(ws, tmp_path):
    judges = tmp_path / "secret" / "critic"
    judges.mkdir(parents=True)
    (judges / "config.json").write_text("{}")
    rm = ws.train(rl.RewardModel(annotator_weights={"ana": 0.5}), base="toy", data="toy-pairs")
    address = 'judge(url="https://inside.example/v1", model="big", token_env="OUR_TOKEN")'
    ppo = ws.train(
        rl.PPO(rollout_backend="vllm_server", vllm_url="http://127.0.0.1:8123"),
        policy="toy-sft",
        reward={rm: 1, f'judge(model="{judges}")': 1, address: 1},
        prompts="toy-prompts",
    )
    shown, private = (str(lineage(ws, ppo, public=public)) for public in (True, False))
    for inside in ("secret", "inside.example", "OUR_TOKEN", "ana", "8123"):
        assert inside not in shown, inside
    assert "judge='critic'" in shown and "judge='big'" in shown
    assert "annotator_weights={'ana': 0.5}" in private and "vllm_url=http://127.0.0.1:8123" in private


def test_the_tree_unfolds_what_it_shows_twice_only_once(ws, tmp_path):
    text = str(ws.lineage(chain(ws, tmp_path)))
    lines = text.splitlines()
    assert lines[0].startswith("ppo-1 · ppo")
    shown = [line for line in lines if "policy sft-1" in line]
    assert len(shown) == 2 and shown[1].endswith("(above)")
    assert sum("toy-demonstrations" in line for line in lines) == 1
    assert lines[1].startswith("├─ policy dpo-1")
    assert lines[-1].startswith("   └─ made from mine")
    assert "<pre>" in ws.lineage("ppo-1")._repr_html_()


def test_rows_made_by_a_run_lead_to_its_model_and_prompts(ws, tmp_path):
    sft = ws.train(rl.SFT(), base="toy", data="toy-demonstrations")
    made = ws.generate(sft, prompts="toy-prompts", reward="toy-true", keep="best")
    again = ws.train(rl.SFT(), base=sft, data=made)
    assert again.spec.data == RunData(run_id="generate-1", row_kind="demonstrations")
    node = ws.lineage(again).find("generate-1")
    assert [(each.relation, each.name) for each in node.parents] == [
        ("policy", "sft-1"),
        ("reward", "toy-true"),
        ("data", "toy-prompts"),
    ]
    assert "keep=best" in node.what


def test_a_judge_and_its_constitution_are_named(ws):
    judged = ws.judge("toy-pairs", judge="toy-annotator", constitution="toy-town")
    tuned = ws.train(rl.DPO(), policy="toy", data=judged)
    node = ws.lineage(tuned).find("judge-1")
    assert [(each.relation, each.name) for each in node.parents] == [("judge", "toy-annotator"), ("data", "toy-pairs")]
    assert "constitution=toy-town" in node.what and len(node.what) < 200


def test_models_that_no_run_made_and_data_that_nobody_trained_on_have_a_lineage_too(ws, tmp_path):
    assert [node.name for node in ws.lineage("toy-sft").parents] == ["toy", "toy-demonstrations"]
    assert ws.lineage("someone/model").what == "from the hub, revision newest"
    mine = ws.add_data(pairs(10), name="mine", kind="pairs")
    half = mine.split(0.5)[0].to("thumbs")
    assert [node.name for node in ws.lineage(half).walk()] == ["mine-train-thumbs", "mine-train", "mine"]
    assert ws.lineage("mine").rows == mine.rows
    with pytest.raises(NotFoundError, match='lineage: model "ppo-7" does not exist'):
        ws.lineage("ppo-7")
    with pytest.raises(NotFoundError, match='"sft-9" is not in the lineage of toy'):
        ws.lineage("toy").find("sft-9")


def test_rows_named_alike_are_told_apart_by_their_hash(ws):
    ws.train(
        rl.SFT(), base="toy", data=ws.add_data([{"prompt": "p", "completion": "a"}], name="x", kind="demonstrations")
    )
    ws.train(
        rl.SFT(), base="toy", data=ws.add_data([{"prompt": "p", "completion": "b"}], name="x", kind="demonstrations")
    )
    for run, said in (("sft-1", "a"), ("sft-2", "b")):
        assert isinstance(ws.spec(run).data, BlobData)
        assert [row["completion"] for row in ws.lineage(run).find("x").rows] == [said]
