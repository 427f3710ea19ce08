"""Rounds of sample → label → train: through the real worker, killed in the middle, and with people who label."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import Mock

import pytest

import rlhf_nb as rl
from rlhf_nb.errors import AttachError, NotFoundError, RlhfError, RunFailedError, SpecError, UnavailableError
from rlhf_nb.feedback.constitution import load
from rlhf_nb.labelling.items import pair_items
from rlhf_nb.protocol.spec import RunModel
from rlhf_nb.stages.iterate import Round, take_turns

PROMPTS = [{"prompt": f"Where is house {i}?"} for i in range(6)]
DPO = rl.DPO(max_steps=2, batch_size=2, learning_rate=1e-3, sample_every=0, max_length=100)
SETTINGS = {"n": 3, "max_new_tokens": 6, "launch": "--num_cpu_threads_per_process 1"}


def deadly(trap) -> str:
    """A reward that kills its process, once, as nothing in it can prevent."""
    return (
        "def letters(prompts, completions, **columns):\n    import os, signal\n"
        f"    if os.path.exists({str(trap)!r}):\n"
        f"        os.remove({str(trap)!r})\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return [float(sum(map(str.isalpha, text))) for text in completions]"
    )


@pytest.mark.slow
def test_a_killed_round_goes_on_where_it_was_and_no_other_is_done_again(tmp_path, tiny_model):
    trap = tmp_path / "trap"
    with rl.Workspace(tmp_path / "w") as ws:
        ws.attach("local", standby=False)
        ws.add_data(PROMPTS, name="mine", kind="prompts")
        ws.reward_function("letters", deadly(trap))
        asked = {"policy": str(tiny_model), "prompts": "mine", "rounds": 2, "reward": "letters", "name": "climb"}
        it = ws.iterate(DPO, **asked, **SETTINGS)
        assert [run.id for run in it.runs] == ["generate-1", "dpo-1", "generate-2", "dpo-2"], "all submitted at once"
        assert it.model == RunModel(run_id="dpo-2")
        assert it.rounds[1].rows.spec.policy == it.rounds[1].policy.spec.policy == RunModel(run_id="dpo-1")
        it.rounds[0].rows.wait(120)
        trap.touch()
        with pytest.raises(RunFailedError):
            it.wait(240)
        assert not trap.exists() and it.rounds[0].policy.wait(120).state == "finished"
        first = (tmp_path / "w" / "runs" / "dpo-1" / "model" / "model.safetensors").read_bytes()
        # A handle that knows the name alone, as another process has it.
        it = ws.iteration("climb")
        assert it.state == "failed"
        it.resume().wait(240)
        assert it.state == "finished" and [run.id for run in it.runs] == ["generate-1", "dpo-1", "generate-2", "dpo-2"]
        assert (tmp_path / "w" / "runs" / "dpo-1" / "model" / "model.safetensors").read_bytes() == first
        # The same call is the same iteration; another one under its name is refused.
        assert [run.id for run in ws.iterate(DPO, **asked, **SETTINGS).runs] == [run.id for run in it.runs]
        with pytest.raises(SpecError, match=r'"climb" exists with other settings \(prompts\)'):
            ws.iterate(DPO, **{**asked, "rounds": 3}, **SETTINGS)
        made = [each.rows.data for each in it.rounds]
        assert [data.kind for data in made] == ["pairs", "pairs"] and made[0].rows != made[1].rows
        letters = [sum(map(str.isalpha, text)) for row in made[1] for text in (row["chosen"], row["rejected"])]
        assert all(chosen > rejected for chosen, rejected in zip(letters[::2], letters[1::2], strict=True))
        above = {(edge.child, edge.parent, edge.relation) for edge in ws.store.lineage("dpo-2")}
        assert above == {
            ("dpo-2", "dpo-1", "model"), ("dpo-2", "generate-2", "data"), ("generate-2", "dpo-1", "model"),
            ("generate-2", "mine", "data"), ("dpo-1", "generate-1", "data"), ("generate-1", "mine", "data"),
        }  # fmt: skip
        assert [row["score before"] is not None for row in it.table()] == [True, True]


@pytest.mark.slow
def test_a_round_waits_for_people_and_trains_on_what_they_said(tmp_path, tiny_model):
    with rl.Workspace(tmp_path / "w") as ws:
        ws.attach("local", standby=False)
        ws.add_data(PROMPTS, name="mine", kind="prompts")
        launch = {"launch": SETTINGS["launch"], "max_new_tokens": 6}
        it = ws.iterate(DPO, policy=str(tiny_model), prompts="mine", rounds=1, name="asked", **launch).wait(120)
        assert it.state == "labelling" and [run.id for run in it.runs] == ["generate-1"]
        session = it.label(annotator="mira")
        total = session.progress.total
        assert 0 < total <= len(PROMPTS)
        liked = []
        while (shown := session.current) is not None:
            if len(liked) == total - 1:
                assert ws.iteration("asked").advance().state == "labelling", "one answer is still missing"
            # The one that sorts first: a rule that anybody can redo.
            first = shown.first <= shown.second
            liked.append(shown.first if first else shown.second)
            session.submit(f"answer-{len(liked)}", "1" if first else "2", task_id=shown.task_id, seconds=1.0)
        it.advance()
        assert [run.id for run in it.runs] == ["generate-1", "dpo-1"]
        assert it.wait(120).state == "finished"
        assert sorted(row["chosen"] for row in ws.dataset("generate-1-labels")) == sorted(liked)
        above = {(edge.child, edge.parent) for edge in ws.store.lineage("dpo-1")}
        assert above == {
            ("dpo-1", "generate-1-labels"), ("generate-1-labels", "generate-1"), ("generate-1", "mine"),
        }  # fmt: skip
        with pytest.raises(UnavailableError, match="no round waits for labels; it is finished"):
            it.label()


@pytest.mark.parametrize(
    ("method", "settings", "says"),
    [
        (rl.KTO(), {}, "kto trains on thumbs, and a round makes pairs; give dpo"),
        (rl.DPO(), {"rounds": 0}, "rounds=0: give 1 or more"),
        (rl.DPO(), {"n": 1}, "n=1 completions of a prompt make no pair"),
        (rl.DPO(), {"keep": "best"}, "keep is not yours to set"),
        (rl.DPO(), {"temperatur": 1}, 'did you mean "temperature"'),
        (rl.DPO(label_smoothing=0.1), {}, "label_smoothing=0.1 is not read by loss_type=sigmoid"),
        (rl.DPO(), {"prompts_per_round": 0}, "prompts_per_round=0: give 1 or more"),
        (rl.DPO(), {"reward": "toy-true", "judge": "toy-annotator"}, "reward and judge both order the completions"),
        (rl.DPO(), {"principle": "Which is kinder?"}, "a constitution or a principle is a judge's"),
        (rl.DPO(), {"prompts": {"toy-prompts": 1, "toy-pairs": 1}}, "shares mean nothing"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_sampled(tmp_path, method, settings, says):
    with rl.Workspace(tmp_path / "w") as ws:
        with pytest.raises(SpecError, match=says):
            ws.iterate(method, **{"policy": "toy", "prompts": "toy-prompts", **settings})
        with pytest.raises(NotFoundError, match=r'iteration "climb" does not exist.*known: none'):
            ws.iteration("climb")


def test_an_iteration_cut_short_before_its_first_run_keeps_its_name(tmp_path, monkeypatch):
    asked = {"policy": "toy", "prompts": "toy-prompts", "rounds": 2, "name": "climb"}
    with rl.Workspace(tmp_path / "w") as ws:
        with pytest.raises(AttachError):
            ws.iterate(DPO, **asked)
        ws._client = Mock(alive=True, info=SimpleNamespace(name="local", runs_root="/runs", host="gpu-1"))
        with monkeypatch.context() as cut, pytest.raises(KeyboardInterrupt):
            cut.setattr("rlhf_nb.stages.iterate.Iteration.advance", Mock(side_effect=KeyboardInterrupt))
            ws.iterate(DPO, **asked)
        ws._client = None
        assert ws.iteration("climb").plan.name == "climb"
        with pytest.raises(NotFoundError, match=r'did you mean "climb".*known: climb$'):
            ws.iteration("climbs")


ASKED = {"policy": "toy", "prompts": "toy-prompts", "rounds": 2, "judge": "toy-annotator", "name": "climb"}


@pytest.mark.parametrize(
    ("by", "error", "says"),
    [
        ({"constitution": "toy-twon"}, NotFoundError, 'did you mean "toy-town"'),
        ({"principle": "honesty"}, NotFoundError, 'no principle "honesty"; did you mean "honest"'),
        ({"constitution": {"principles": [{"name": "new", "preference": "Which?"}]}}, RlhfError, "new"),
        ({"constitution": {"principles": [{"name": "honest", "critique": "What?"}]}}, SpecError, "none of its 1"),
    ],
)
def test_a_wrong_principle_is_refused_before_the_name_is_taken_or_a_round_begun(ws, by, error, says):
    with pytest.raises(error, match=says):
        ws.iterate(DPO, **ASKED, **by)
    assert not ws.run_ids()
    assert len(ws.iterate(DPO, **ASKED, principle="honest").runs) == 6


def test_every_round_is_judged_by_the_constitution_as_it_was_at_the_start(ws, tmp_path):
    path = tmp_path / "mine.toml"
    words = '[[principles]]\nname = "honest"\npreference = "Which is true?"\n'
    path.write_text(words)
    it = ws.iterate(DPO, **ASKED, constitution=path)
    assert [run.spec.config["constitution"]["name"] for run in it.runs[1::3]] == ["mine", "mine"]
    assert ws.iterate(DPO, **ASKED, constitution=load(path)).runs == it.runs, "the same settings go on"
    path.write_text(words.replace("true", "kind"))
    (found,) = ws.iteration("climb").advance().plan.constitution.principles
    assert found.preference == "Which is true?"
    with pytest.raises(SpecError, match=r'"climb" exists with other settings \(constitution\)'):
        ws.iterate(DPO, **ASKED, constitution=path)


@pytest.mark.parametrize("part", ["rows", "labels"])
def test_a_stopped_job_whose_rows_are_saved_does_not_stop_the_iteration(ws, monkeypatch, part):
    it = ws.iterate(DPO, **ASKED)
    saved, over = SimpleNamespace(model=None, data=object()), SimpleNamespace(model=object(), data=None)
    runs = {name: SimpleNamespace(state="finished", fold=over) for name in ("rows", "labels", "policy")}
    runs[part] = SimpleNamespace(state="stopped", fold=saved)
    monkeypatch.setattr(type(it), "rounds", [Round(1, **runs)])
    assert it.state == "finished"
    saved.data = None
    assert it.state == "stopped", "nothing was saved, so nothing goes on"


def test_prompts_take_turns_and_none_comes_twice_before_all_did():
    rows = [{"prompt": str(i)} for i in range(10)]
    turns = take_turns(rows, 4, 3, seed=0)
    said = [row["prompt"] for turn in turns for row in turn]
    assert sorted(said[:10]) == sorted(row["prompt"] for row in rows) and said[10:] == said[:2]
    assert said != [row["prompt"] for row in rows][:10] + said[10:]
    assert turns == take_turns(rows, 4, 3, seed=0) != take_turns(rows, 4, 3, seed=1)
    assert take_turns(rows[:2], 2, 5, seed=0)[0] == take_turns(rows[:2], 2, 5, seed=0)[1]


def test_completions_of_a_prompt_are_compared_two_by_two_and_never_with_themselves():
    row = {"prompt": "p", "completions": ["a", "b", "a "]}
    items = pair_items([row], "completions")
    assert [(item["a"], item["b"]) for item in items] == [("a", "b"), ("b", "a ")]
