"""AI labels as the worker makes them: by the toy world's judge, by a real chat model, and over HTTP."""

from __future__ import annotations

import math

import pytest

from rlhf_nb.data.rows import decode_rows
from rlhf_nb.errors import ComputeError, DataError, SpecError
from rlhf_nb.feedback.constitution import load
from rlhf_nb.methods.judge import JudgePairs, PairJudge, candidates
from rlhf_nb.protocol.spec import ModelJudge, NamedJudge, PathModel
from rlhf_nb.toy import pairs, quality_scores, rankings
from rlhf_nb.toy.judge import ToyJudge
from tests.feedback.conftest import NEVER

ROWS = pairs(60, seed=3)
TOWN = load("toy-town").model_dump(mode="json")
FAIR = NamedJudge(name="toy-annotator", config={"length_bias": 0, "sycophancy": 0, "position_bias": 0})


def rows_of(place) -> list[dict]:
    return decode_rows(place.rows_path.read_bytes())


def quality(row: dict, side: str) -> float:
    """Of the row's principle, in the true reward."""
    return quality_scores(row["prompt"], row[side])[row["principle"]]


def event(place, kind: str):
    return [each for each in place.events() if each.kind == kind][-1]


def test_every_label_names_its_principle_judge_and_prompt_and_is_what_the_principle_says(job):
    place = job("judge", ROWS, judge=FAIR, policy=None, config={"constitution": TOWN})
    rows = rows_of(place)
    for row in rows:
        chosen, rejected = (quality(row, side) for side in ("chosen", "rejected"))
        assert chosen > rejected and row["preference"] > 0.5
        assert row["judge"].startswith("toy-annotator(") and row["judge_prompt"] == ToyJudge().prompt_hash[:12]
        assert row["constitution"] == load("toy-town").content_hash[:12]
    before = {(row["prompt"], row["chosen"], row["rejected"]) for row in ROWS}
    assert all(row["agrees"] == ((row["prompt"], row["chosen"], row["rejected"]) in before) for row in rows)
    assert {row["principle"] for row in rows} == {"helpful", "honest", "harmless", "concise"}
    saved, result = event(place, "data_saved"), event(place, "result")
    assert saved.row_kind == "pairs" and saved.rows == len(rows)
    assert sum(saved.dropped.values()) + len(rows) == len(ROWS) == saved.counts["pairs"]
    agreed = sum(row["agrees"] for row in rows) + saved.dropped["tied"] / 2
    assert (result.name, result.n, result.value) == ("agreement", len(ROWS), pytest.approx(agreed / len(ROWS)))
    assert result.interval[0] < result.value < result.interval[1]


def test_a_judged_pair_keeps_nothing_that_somebody_else_said_of_its_completions(job):
    before = {"margin": 3.0, "weight": 2.0, "annotator": "anna", "chosen_score": 9.0, "rejected_score": 1.0}
    rows = [{**row, **before, "golds": [1.0], "answer": "7"} for row in ROWS[:10]]
    made = rows_of(job("judge", rows, judge=FAIR, policy=None, config={"constitution": TOWN}))
    own = {"principle", "judge", "judge_prompt", "constitution", "preference", "agrees"}
    assert made and all(row.keys() == {"prompt", "chosen", "rejected", "answer"} | own for row in made)


def test_each_principle_judges_every_pair_on_request(job):
    place = job("judge", ROWS[:10], judge=FAIR, policy=None, config={"constitution": TOWN, "principles": "each"})
    assert event(place, "data_saved").counts["pairs"] == 40
    for row in rows_of(place):
        one, other = (quality(row, side) for side in ("chosen", "rejected"))
        assert one > other


def test_what_flips_with_the_order_is_counted_and_is_no_label(job):
    judge = NamedJudge(name="toy-annotator", config={"position_bias": 0.2})
    place = job("judge", ROWS, judge=judge, policy=None)
    toy = ToyJudge(position_bias=0.2)
    likings = [[toy.utility(row["prompt"], row[side]) for side in ("chosen", "rejected")] for row in ROWS]
    near = [one for one, other in likings if abs(one - other) < 0.2]
    saved = event(place, "data_saved")
    assert saved.dropped == {"flipped with the order": len(near)} and len(near) > len(ROWS) / 3
    assert saved.counts["to_first"] == len(near)
    warned = [each.text for each in place.events() if each.kind == "notice"]
    assert warned == [f"{len(near) / 60:.0%} of the verdicts change with the order; they are no labels"]
    assert f"{len(near)} flipped with the order" in saved.summary


def test_labels_that_the_judge_is_less_sure_of_are_left_out_and_counted(job):
    # P = sigmoid(difference / 0.15) in both orders alike: 0.9 is passed where the qualities differ by 0.33 or more.
    config = {"constitution": TOWN, "min_preference": 0.9}
    all_rows = rows_of(job("judge", ROWS, name="all", judge=FAIR, policy=None, config={"constitution": TOWN}))
    place = job("judge", ROWS, name="sure", judge=FAIR, policy=None, config=config)
    assert rows_of(place) == [row for row in all_rows if row["preference"] > 0.9]
    for row in all_rows:
        assert (row["preference"] > 0.9) == (quality(row, "chosen") - quality(row, "rejected") > 0.15 * math.log(9))
    dropped = event(place, "data_saved").dropped
    assert dropped["unsure"] == len(all_rows) - len(rows_of(place)) > 0


def test_killed_in_the_middle_and_run_again_it_asks_no_question_twice(job, monkeypatch, chat_server, read_shown):
    chat_server.answer = lambda body: "A" if len(read_shown(body)[1]) > len(read_shown(body)[2]) else "B"
    settings = {"judge": chat_server.endpoint(), "policy": None, "config": {"batch_size": 8}}
    whole = job("judge", ROWS[:24], name="whole", **settings)
    asked = len(chat_server.requests)
    make = PairJudge.make

    def dies(self, start, rows):
        made = make(self, start, rows)
        if start == 8:
            raise KeyboardInterrupt  # after its answers came, before its rows were kept
        return made

    place = job.prepare("judge", ROWS[:24], name="killed", **settings)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PairJudge, "make", dies)
        job.run(place)
    job.run(place, attempt=2)
    assert len(chat_server.requests) == 2 * asked == 2 * 48
    assert place.rows_path.read_bytes() == whole.rows_path.read_bytes()
    assert event(place, "data_saved").counts == event(whole, "data_saved").counts


def test_a_judge_that_times_out_refuses_and_rambles_loses_nothing_else(job, chat_server, read_shown):
    def answer(body):
        prompt, a, b = read_shown(body)
        if prompt == ROWS[0]["prompt"]:
            return NEVER
        if prompt == ROWS[1]["prompt"]:
            return "I'm sorry, but I cannot compare these."
        if prompt == ROWS[2]["prompt"]:
            return "Well, A has its merits, but then B " * 50
        return "A" if a < b else "B"

    chat_server.answer = answer
    place = job("judge", ROWS[:10], judge=chat_server.endpoint(timeout_s=5, retries=0), policy=None)
    saved = event(place, "data_saved")
    failures = {cause: saved.counts[cause] for cause in ("timeout", "refusal", "unreadable")}
    assert failures == {"timeout": 1, "refusal": 1, "unreadable": 1} and saved.dropped["unanswered"] == 3
    assert saved.rows == 7 and all(row["judge"].startswith("planted at 127.0.0.1:") for row in rows_of(place))
    warned = [each.text for each in place.events() if each.kind == "notice" and each.level == "warning"]
    assert warned == ["3 of 10 pairs have no verdict: 1 refusal, 1 timeout, 1 unreadable"]


def test_a_judge_that_never_answers_ends_the_run_in_one_line_and_resuming_asks_again(job, chat_server, read_shown):
    chat_server.answer = lambda body: (503, {})
    judge = chat_server.endpoint(retries=0)
    place = job.prepare("judge", ROWS[:4], judge=judge, policy=None)
    with pytest.raises(ComputeError, match=r"judge planted at .*: none of 8 questions was answered \(answered 503\)"):
        job.run(place)
    chat_server.answer = lambda body: "A" if read_shown(body)[1] < read_shown(body)[2] else "B"
    job.run(place, attempt=2)
    assert len(rows_of(place)) == 4


def test_half_of_an_answer_is_an_answer_and_the_run_goes_on(job, chat_server, read_shown):
    chat_server.answer = lambda body: "A" if read_shown(body)[1] == ROWS[0]["chosen"] else (503, {})
    judge = chat_server.endpoint(retries=0)
    with pytest.raises(DataError, match=r"no row is left of 1 \(1 unanswered\)"):
        job("judge", ROWS[:1], judge=judge, policy=None)


@pytest.mark.parametrize("batch_size", [3, 1])
def test_a_pair_that_always_errs_is_left_out_alone_and_a_judge_that_is_gone_ends_the_run(
    job, chat_server, read_shown, batch_size
):
    def answer(body):
        prompt, a, b = read_shown(body)
        return (503, {}) if prompt == ROWS[3]["prompt"] or gone else "A" if a < b else "B"

    chat_server.answer, gone = answer, False
    settings = {"judge": chat_server.endpoint(retries=0), "policy": None, "config": {"batch_size": batch_size}}
    place = job("judge", ROWS[:4], **settings)
    assert (len(rows_of(place)), event(place, "data_saved").dropped) == (3, {"unanswered": 1})
    make, made = PairJudge.make, []

    def leaves(self, start, rows):
        nonlocal gone
        made.append(start)
        gone = start >= 12
        return make(self, start, rows)

    place = job.prepare("judge", ROWS[:30], name="gone", **settings)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ComputeError, match="was answered"):
        patch.setattr(PairJudge, "make", leaves)
        job.run(place)
    # 8 questions are 4 pairs.
    assert made[-1] == 15
    gone = False
    job.run(place, attempt=2)
    assert event(place, "data_saved").dropped["unanswered"] == 4


def test_a_token_that_is_not_set_where_the_job_runs_ends_it_before_a_question(job, chat_server, monkeypatch):
    monkeypatch.delenv("NO_SUCH_TOKEN", raising=False)
    with pytest.raises(SpecError, match="token_env=NO_SUCH_TOKEN: not set where the job runs"):
        job("judge", ROWS[:4], judge=chat_server.endpoint(token_env="NO_SUCH_TOKEN"), policy=None)
    assert not chat_server.requests


def test_a_real_chat_model_that_cannot_judge_labels_nothing_and_says_why(job, tiny_model):
    # Untrained, its probability lies everywhere; and most of these prompts do not fit in its 512 tokens of a byte.
    judge = ModelJudge(model=PathModel(path=str(tiny_model)))
    with pytest.raises(DataError, match=r"judge: no row is left of 4 \(4 unanswered\)"):
        job("judge", ROWS[:4], judge=judge, policy=None)


def test_completions_and_rankings_are_judged_two_by_two():
    ranked = {"prompt": "?", "completions": ["x", "y", "z"], "ranks": [1, 0, 1]}
    assert candidates(ranked) == [("x", "y", "b"), ("x", "z", None), ("y", "z", "a")]
    drawn = {"prompt": "?", "completions": ["x", " x", "", "y"]}
    assert candidates(drawn) == [("x", "y", None), (" x", "y", None)]
    assert candidates({"prompt": "?", "chosen": "x", "rejected": "y"}) == [("x", "y", "a")]


def test_a_constitution_that_prefers_nothing_is_refused_before_the_run(job):
    by = {"name": "mine", "principles": [{"name": "kind", "critique": "?", "revision": "!"}]}
    method = JudgePairs.create(constitution=by)
    spec = job.prepare("judge", ROWS[:2], judge=FAIR, policy=None).spec()
    with pytest.raises(SpecError, match="constitution mine: none of its 1 principles says which of two"):
        method.check(spec)
    with pytest.raises(SpecError, match="judge: no judge; give judge="):
        method.check(spec.model_copy(update={"judge": None}))


def test_rankings_and_drawn_completions_are_judged_as_they_are(job):
    ranked = rankings(6, seed=2)
    place = job("judge", ranked, name="ranked", kind="rankings", judge=FAIR, policy=None, config={"constitution": TOWN})
    saved, result = event(place, "data_saved"), event(place, "result")
    assert saved.counts["pairs"] == 6 * 6, "four completions have six pairs"
    assert result.name == "agreement" and result.n == 36
    by_prompt = {row["prompt"]: dict(zip(row["completions"], row["ranks"], strict=True)) for row in ranked}
    for row in rows_of(place):
        ranks = by_prompt[row["prompt"]]
        assert row["agrees"] == (ranks[row["chosen"]] < ranks[row["rejected"]]) and "ranks" not in row
    drawn = [{"prompt": row["prompt"], "completions": row["completions"][:2]} for row in ranked]
    place = job(
        "judge", drawn, name="drawn", kind="completions", judge=FAIR, policy=None, config={"constitution": TOWN}
    )
    assert event(place, "data_saved").counts["pairs"] == 6 and event(place, "result").name == "decided"
