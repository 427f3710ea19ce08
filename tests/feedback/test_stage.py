"""AI labels as a notebook asks for them: refusals at once, and once through the real worker."""

from __future__ import annotations

import pytest

import rlhf_nb as rl
from rlhf_nb.errors import NotFoundError, SpecError
from rlhf_nb.feedback.constitution import load
from rlhf_nb.magics import magic, parser
from rlhf_nb.protocol.spec import Endpoint, ModelJudge, NamedJudge, NamedModel, RunModel, describe, parents_of
from rlhf_nb.stages.judge import resolve_judge, reward_options
from rlhf_nb.stages.resolve import resolve_reward
from rlhf_nb.toy import pairs

ONE_THREAD = "--num_cpu_threads_per_process 1"
JUDGE = "judge toy-pairs --judge"
MEND = "constitutional --policy toy --prompts toy-prompts --constitution toy-town"
TOY = NamedJudge(name="toy-annotator")


@pytest.fixture
def ws(tmp_path):
    with rl.Workspace(tmp_path / "w") as opened:
        yield opened


def typed(ws, line: str):
    verb, *words = parser.split(line)
    return magic._CALLS[verb](ws, parser.parser(verb).parse_args(words))


@pytest.mark.parametrize(
    ("line", "error", "said"),
    [
        (f"{JUDGE} toy-anotator", NotFoundError, r'judge "toy-anotator" does not exist.*did you mean "toy-annotator"'),
        (f"{JUDGE} toy-annotator(bias=1)", SpecError, "no knob bias"),
        (f"{JUDGE} toy-annotator(0.1)", SpecError, "knobs are written as in Python"),
        (f"{JUDGE} http://localhost:8000/v1", SpecError, "an address needs the model's name there"),
        (f"{JUDGE} m --url http://u:hunter2@host/v1", SpecError, "holds no user, password or query"),
        (f"{JUDGE} m --token-env hf_hunter2", SpecError, "it goes with --url"),
        (f"{JUDGE} m --url https://judge/v1 --token-env hf_hunter2", SpecError, "in capitals"),
        (f"{JUDGE} toy-annotator --constitution toy-twon", NotFoundError, 'did you mean "toy-town"'),
        (f"{JUDGE} toy-annotator --principle honesty", NotFoundError, 'no principle "honesty"; did you mean "honest"'),
        (f"{JUDGE} toy-annotator --set ask=aloud", SpecError, "ask='aloud'"),
        ("judge toy-prompts --judge toy-annotator", rl.DataError, 'data "toy-prompts" holds prompts'),
        (f"{MEND} --half sideways", SpecError, "invalid choice"),
        (f"{MEND} --url http://h/v1", SpecError, "--judge NAME"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_line_before_anything_starts(ws, line, error, said):
    with pytest.raises(error, match=said) as refused:
        typed(ws, line)
    assert "\n" not in str(refused.value) and "hunter2" not in str(refused.value)
    assert not ws.run_ids()


def test_a_judge_is_a_model_an_address_or_a_known_name(ws):
    assert resolve_judge(ws, "toy-sft", verb="judge") == ModelJudge(model=NamedModel(name="toy-sft"))
    named = resolve_judge(ws, "toy-annotator(position_bias=0.2, noise=1)", verb="judge")
    assert named == NamedJudge(name="toy-annotator", config={"position_bias": 0.2, "noise": 1.0})
    there = Endpoint(url="https://judge/v1", model="m", token_env="KEY")
    assert resolve_judge(ws, there, verb="judge") == there


def test_principles_that_a_named_judge_does_not_know_are_refused(ws):
    by = {"name": "mine", "principles": [{"name": "kind", "preference": "Which is kinder?"}]}
    with pytest.raises(SpecError, match=r'knows the principles helpful, .*"kind" is none of them'):
        ws.judge("toy-pairs", judge="toy-annotator", constitution=by)


def test_a_judge_as_a_reward_is_written_with_its_options(ws):
    reward = resolve_reward(ws, 'judge(model="toy-annotator", principle="honest"),toy-true=0.5', verb="ppo")
    first = reward.parts[0].reward
    assert first.config == {"judge": TOY.model_dump(), "principle": "honest", "ask": "letter"}


def test_one_judge_under_two_principles_is_two_rewards_with_weights_of_their_own(ws):
    asked = [f'judge(model="toy-annotator", principle="{name}")' for name in ("honest", "harmless")]
    reward = resolve_reward(ws, f"{asked[0]}=2,{asked[1]}", verb="ppo")
    assert [(part.name, part.weight) for part in reward.parts] == [("judge-honest", 2.0), ("judge-harmless", 1.0)]
    words = resolve_reward(ws, 'judge(url="http://localhost/v1", model="m", principle="Which is kinder?")', verb="ppo")
    assert describe(words) == "judge-which-is-kinder"
    with pytest.raises(SpecError, match="judge-honest is named twice"):
        resolve_reward(ws, f"{asked[0]},{asked[0]}", verb="ppo")


def test_a_run_whose_reward_is_another_runs_judgement_waits_for_it(ws):
    judge = ModelJudge(model=RunModel(run_id="sft-1")).model_dump(mode="json")
    reward = resolve_reward(ws, resolve_reward(ws, 'judge(model="toy-annotator")', verb="ppo"), verb="ppo")
    assert parents_of(reward) == ()
    waiting = reward.model_copy(update={"config": {**reward.config, "judge": judge}})
    assert parents_of(resolve_reward(ws, waiting, verb="ppo")) == ("sft-1",)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "reward judge: no model"),
        ({"model": "toy-annotator", "token_env": "KEY"}, "go with url="),
        ({"model": "toy-annotator", "principle": "kind"}, '"kind" is none of them'),
        ({"model": "m", "url": "https://judge?key=hunter2"}, "holds no user, password or query"),
        ({"model": "m", "url": "https://judge/v1", "token_env": "hf_hunter2"}, "in capitals"),
        ({"judge": Endpoint(url="https://j/v1", model="m", token_env="hf_hunter2").model_dump()}, "in capitals"),
        ({"model": "toy-annotator", "ask": "aloud"}, "letter or reasons"),
    ],
)
def test_a_reward_whose_judge_cannot_be_asked_is_refused(ws, config, said):
    with pytest.raises(SpecError, match=said) as refused:
        reward_options(ws, config)
    assert "hunter2" not in str(refused.value)


@pytest.mark.slow
def test_labels_are_data_of_the_next_run_and_a_model_is_traced_to_its_constitution(tmp_path):
    with rl.Workspace(tmp_path / "w") as ws:
        ws.attach("local", standby=False, launch=ONE_THREAD)
        hash12 = load("toy-town").content_hash[:12]
        by = (f"constitution:toy-town@{hash12}", "constitution")
        ws.add_data(pairs(20, seed=8), name="mine", kind="pairs")
        judged = typed(ws, "judge mine --judge toy-annotator --constitution toy-town")
        # They are what the next verb takes, and a model is traced through them to the constitution.
        fitted = ws.train(rl.RewardModel(max_steps=1, batch_size=2), base="toy", data=judged)
        labels = judged.wait(120).data
        assert (labels.kind, labels.name, judged.spec.title) == ("pairs", "judge-1", "mine → toy-annotator")
        assert {row["constitution"] for row in labels} == {hash12}
        assert (judged.fold.result.name, judged.fold.result.n) == ("agreement", 20)
        assert judged.spec.config["constitution"] == load("toy-town").model_dump(mode="json")
        edges = {(edge.parent, edge.relation) for edge in ws.store.lineage(judged.id)}
        assert edges == {("mine", "data"), by, ("judge:toy-annotator", "judge")}
        assert fitted.wait(120).fold.model is not None
        assert by in {(edge.parent, edge.relation) for edge in ws.store.lineage(fitted.id)}


def test_judges_constitutions_and_halves_are_completed(ws, monkeypatch):
    from rlhf_nb import workspace
    from rlhf_nb.magics.completion import candidates

    monkeypatch.setattr(workspace, "_current", ws)
    assert "toy-annotator" in candidates(["judge", "toy-pairs", "--judge"])
    assert "toy-town" in candidates(["judge", "toy-pairs", "--constitution"])
    assert candidates(["constitutional", "--half"]) == ["revisions", "preferences"]
    assert "toy-pairs" in candidates(["judge"])
