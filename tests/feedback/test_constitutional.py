"""Both halves of Constitutional AI as the worker makes them."""

from __future__ import annotations

import pytest

from rlhf_nb.data.rows import decode_rows
from rlhf_nb.errors import SpecError
from rlhf_nb.feedback.constitution import draw, load
from rlhf_nb.methods.constitutional import STREAM, ConstitutionalAI, Reviser
from rlhf_nb.protocol.spec import NamedJudge, NamedModel
from rlhf_nb.toy import prompts, quality_scores
from rlhf_nb.toy.reviser import revise

TOWN = load("toy-town")
PROMPTS = [{**row, "number": n} for n, row in enumerate(prompts(12, seed=4))]
TOY = {"policy": NamedModel(name="toy"), "judge": NamedJudge(name="toy-annotator")}
CONFIG = {"constitution": TOWN.model_dump(mode="json"), "max_new_tokens": 32, "batch_size": 4, "seed": 5}


def rows_of(place) -> list[dict]:
    return decode_rows(place.rows_path.read_bytes())


def saved(place):
    return [each for each in place.events() if each.kind == "data_saved"][-1]


@pytest.fixture(scope="module")
def revised(tmp_path_factory, job_class):
    return job_class(tmp_path_factory.mktemp("revised"), None)("constitutional", PROMPTS, config=CONFIG, **TOY)


def test_a_draft_is_revised_under_the_principle_that_its_prompt_draws(revised):
    rows = rows_of(revised)
    assert [row["number"] for row in rows] == list(range(12)), "other columns stay"
    for row in rows:
        principle = draw(TOWN.principles, 5, 0, row["prompt"]).name
        assert row["principles"] == [principle]
        assert (row["critiques"][0], row["completion"]) == revise(row["prompt"], row["draft"], principle)
        assert row["judge"] == "toy-annotator" and row["constitution"] == TOWN.content_hash[:12]
        one, other = (quality_scores(row["prompt"], row[side])[principle] for side in ("completion", "draft"))
        assert one >= other
    changed = sum(row["completion"] != row["draft"] for row in rows)
    event = saved(revised)
    assert event.row_kind == "demonstrations" and event.counts == {
        "revised": changed,
        "left as they were": 12 - changed,
    }
    assert (
        event.summary == f"12 drafts of toy, {changed} revised by toy-annotator under toy-town {TOWN.content_hash[:12]}"
    )
    assert 0 < changed < 12


def test_the_drafts_are_the_policys_own_at_their_own_uniform_numbers(revised):
    import torch

    from rlhf_nb.training import data, models
    from rlhf_nb.training.rollout.base import uniforms

    path = str(models.toy_path())
    model, tokenizer = models.load_model(path).eval(), models.load_tokenizer(path)
    for number in (0, 7):
        row = rows_of(revised)[number]
        ids, said = data.prompt_ids(row["prompt"], tokenizer), []
        for chance in uniforms(5, STREAM, [number], 32)[0]:
            with torch.no_grad():
                probability_V = model(torch.tensor([ids + said])).logits[0, -1].double().softmax(0)
            said.append(int((probability_V.cumsum(0) <= chance).sum()))
            if said[-1] == tokenizer.eos_token_id:
                break
        assert row["draft"] == tokenizer.decode(said, skip_special_tokens=True).strip()


def test_rounds_revise_revisions_each_under_a_principle_of_its_own(job):
    rows = rows_of(job("constitutional", PROMPTS[:4], config={**CONFIG, "rounds": 3}, **TOY))
    for row in rows:
        text = row["draft"]
        for number, (name, critique) in enumerate(zip(row["principles"], row["critiques"], strict=True)):
            assert name == draw(TOWN.principles, 5, number, row["prompt"]).name
            said, text = revise(row["prompt"], text, name)
            assert said == critique
        assert len(row["principles"]) == 3 and row["completion"] == text


def test_killed_between_two_chunks_it_goes_on_and_gives_the_same_rows(job, monkeypatch, revised):
    make, asked = Reviser.make, []

    def dies(self, start, rows):
        if start == 4:
            raise KeyboardInterrupt
        return make(self, start, rows)

    place = job.prepare("constitutional", PROMPTS, config=CONFIG, **TOY)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Reviser, "make", dies)
        job.run(place)
    monkeypatch.setattr(Reviser, "make", lambda self, start, rows: asked.append(start) or make(self, start, rows))
    job.run(place, attempt=2)
    assert asked == [4, 8] and place.rows_path.read_bytes() == revised.rows_path.read_bytes()


def test_two_drafts_are_compared_under_a_principle(job):
    fair = NamedJudge(name="toy-annotator", config={"length_bias": 0, "sycophancy": 0, "position_bias": 0})
    place = job("constitutional", PROMPTS, config={**CONFIG, "half": "preferences"}, **{**TOY, "judge": fair})
    rows, event = rows_of(place), saved(place)
    for row in rows:
        assert row["principle"] == draw(TOWN.principles, 5, row["prompt"]).name
        one, other = (quality_scores(row["prompt"], row[side])[row["principle"]] for side in ("chosen", "rejected"))
        assert one > other
    assert event.row_kind == "pairs" and len(rows) + sum(event.dropped.values()) == 12 and rows
    (result,) = [each for each in place.events() if each.kind == "result"]
    assert (result.name, result.n) == ("decided", event.counts["pairs"])


def test_a_model_can_be_its_own_critic_through_its_own_chat(job, tiny_model_maker):
    path = tiny_model_maker("still", dropout=0.0, max_position_embeddings=2048)
    job.model = path
    place = job("constitutional", PROMPTS[:3], config={**CONFIG, "max_new_tokens": 6, "judge_tokens": 8})
    from rlhf_nb.feedback.chat import Question
    from rlhf_nb.feedback.local import LocalChat
    from rlhf_nb.feedback.templates import critique, revision

    chat = LocalChat.load(str(path), name="still", device="cpu", seed=5)
    row = rows_of(place)[0]
    principle = draw(TOWN.principles, 5, 0, row["prompt"])
    messages = critique(row["prompt"], row["draft"], principle.critique)
    ((_, said),) = chat.ask([Question(messages, (), 8)])
    assert row["critiques"] == [said.text]
    ((_, again),) = chat.ask([Question(revision(messages, said.text, principle.revision), (), 8)])
    assert row["completion"] == again.text.strip() and row["judge"] == "still"


def test_critiques_and_revisions_over_http_lose_only_what_was_refused(job, chat_server):
    chat_server.answer = lambda body: (
        {"message": {"content": None, "refusal": "no"}}
        if body["messages"][0]["content"] == PROMPTS[1]["prompt"]
        else "It flatters." if len(body["messages"]) == 3 else "Plainly."
    )  # fmt: skip
    place = job("constitutional", PROMPTS[:4], config=CONFIG, policy=TOY["policy"], judge=chat_server.endpoint())
    rows = rows_of(place)
    assert saved(place).dropped == {"refusal": 1} and [row["number"] for row in rows] == [0, 2, 3]
    assert all(row["completion"] == "Plainly." and row["critiques"] == ["It flatters."] for row in rows)
    second = next(body for body in chat_server.requests if len(body["messages"]) == 5)
    assert [message["role"] for message in second["messages"]] == ["user", "assistant"] * 2 + ["user"]
    assert second["messages"][3]["content"] == "It flatters."


def test_a_half_needs_principles_that_say_what_it_asks(shared_data):
    swarm = load(shared_data / "cai" / "constitution_llm_swarm.json").model_dump(mode="json")
    assert len(ConstitutionalAI.create(constitution=swarm).usable()) == 16
    with pytest.raises(SpecError, match="none of its 16 principles says which of two completions to prefer"):
        ConstitutionalAI.create(constitution=swarm, half="preferences").usable()
    prefers = {"name": "p", "principles": [{"name": "kind", "preference": "Which is kinder?"}]}
    with pytest.raises(SpecError, match=r"says what to criticise \(critique=\) and how to revise \(revision=\)"):
        ConstitutionalAI.create(constitution=prefers).usable()
    with pytest.raises(SpecError, match="constitution"):
        ConstitutionalAI.create()
