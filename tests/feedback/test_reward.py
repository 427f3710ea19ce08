"""A judge's grade as a reward."""

from __future__ import annotations

import pytest

from rlhf_nb.errors import RewardError
from rlhf_nb.feedback.constitution import Principle
from rlhf_nb.feedback.endpoint import EndpointChat
from rlhf_nb.feedback.judge import ChatJudge, Grade
from rlhf_nb.protocol.spec import NamedJudge, NamedModel, NamedReward
from rlhf_nb.rewards.judge import grading
from rlhf_nb.toy import prompts, quality_scores


class Grading:
    name = "planted"

    def __init__(self, *grades: Grade) -> None:
        self.grades = grades

    def grade(self, asked):
        return iter(enumerate(self.grades))


def test_a_completion_without_a_grade_gets_the_mean_of_its_batch_and_is_counted():
    said = []
    judge = Grading(Grade(5.0), Grade(failure="timeout"), Grade(2.0))
    score = grading(judge, None, say=lambda *words: said.append(words))
    # Grades 5 and 2 are 1 and 0.25; their mean is 0.625.
    assert score(["?"] * 3, ["x", "y", "z"]) == [1.0, 0.625, 0.25]
    text = "judge planted: 1 of 3 completions got no grade (1 timeout); they get the mean of the others"
    assert said == [("judge_unanswered", text, "warning")]


def test_a_batch_that_is_mostly_unanswered_is_no_reward():
    judge = Grading(Grade(5.0), Grade(failure="refusal", detail="I'd rather not"), Grade(failure="refusal"))
    with pytest.raises(
        RewardError, match=r"2 of 3 completions got no grade \(2 refusal\): I'd rather not; try the judge"
    ):
        grading(judge, None, say=print)(["?"] * 3, ["x", "y", "z"])


def test_a_grade_is_asked_by_its_principle_over_http(chat_server):
    chat_server.answer = lambda body: "5" if "The bakery" in body["messages"][-1]["content"] else "2"
    judge = ChatJudge(EndpointChat(chat_server.endpoint()))
    kind = Principle(name="kind", preference="Which is kinder?")
    assert grading(judge, kind, say=print)(["Where?"] * 2, ["The bakery.", "No."]) == [1.0, 0.25]
    assert all("The question is: Which is kinder?" in body["messages"][-1]["content"] for body in chat_server.requests)
    judge.close()


def test_ppo_is_rewarded_by_a_judge_under_a_principle(job):
    judge = NamedJudge(name="toy-annotator", config={"length_bias": 0, "sycophancy": 0}).model_dump()
    reward = NamedReward(name="judge", config={"judge": judge, "principle": "harmless", "ask": "letter"})
    config = {"max_steps": 1, "rollout_batch_size": 8, "batch_size": 8, "max_new_tokens": 24, "sample_every": 1}
    place = job("ppo", prompts(8, seed=2), config=config, reward=reward, policy=NamedModel(name="toy"))
    (items,) = [event.items for event in place.events() if event.kind == "samples"][-1:]
    scores = [item.score for item in items]
    assert scores == pytest.approx([quality_scores(item.prompt, item.completion)["harmless"] for item in items])
    assert len(set(scores)) > 1
