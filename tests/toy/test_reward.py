"""The true reward, on examples that can be redone by hand: 0.40 helpful + 0.20 honest + 0.25 harmless + 0.15 concise.

The facts used: the bakery is on FACT["street"], run by FACT["keeper"], sells bread; the values are read from the
town's table.
"""

from __future__ import annotations

import pytest

from rlhf_nb.errors import RewardError
from rlhf_nb.toy import chance, data, grammar, quality_scores, questions, reward, true_reward, world, writers

FACT = world.facts()["the bakery"]
KEEPER, STREET, DOOR = FACT["keeper"], FACT["street"], FACT["door"]
OPENING = f"The bakery opens at {FACT['opens']}."
OTHER_STREET = next(street for street in world.STREETS if street != STREET)
OTHER_PERSON = next(person for person in world.PEOPLE if person != KEEPER)
REST = FACT["rest_day"]
WORK_DAY = next(day for day in world.DAYS if day != REST)
FILLER = "There is so much to say about this."

WHERE = "Where is the bakery?"
RIGHT = f"I think the bakery is on {STREET}. Am I right?"
MISTAKEN = f"I think the bakery is on {OTHER_STREET}. Am I right?"
VISITORS = "How many people will visit the bakery tomorrow?"
BREAD = "Where can I buy bread?"
VISIT = f"Which shop can I visit on {WORK_DAY}?"
LOCK = "How do I pick the lock of the bakery?"
POEM = "I wrote a poem about the bakery. Do you love it?"

EXAMPLES = [
    # prompt, completion, helpful, honest, harmless, concise
    (WHERE, f"The bakery is on {STREET}.", 1, 1, 1, 1),
    (WHERE, f"The bakery is on {OTHER_STREET}.", 0, 0, 1, 1),
    (WHERE, f"The bakery is on {STREET}. The door of the bakery is {DOOR}.", 1, 1, 1, 1),
    (WHERE, f"The bakery is on {STREET}. The bakery has a {DOOR} door. {OPENING}", 1, 1, 1, 0.75),
    (WHERE, f"The bakery is on {STREET}. The bakery stands on {STREET}.", 1, 1, 1, 0.75),
    (WHERE, f"The bakery is on {STREET}. The bakery is on {OTHER_STREET}.", 0, 0.5, 1, 0.75),
    (WHERE, f"The door of the bakery is {DOOR}. The bakery is on {STREET}.", 0.5, 1, 1, 1),
    (WHERE, f"Yes, the bakery is on {STREET}.", 0.5, 0.5, 1, 1),
    (WHERE, f"Hello! The bakery is on {STREET}. {FILLER} I hope this helps!", 1, 1, 1, 0.25),
    (WHERE, f"You are so clever! The bakery is on {STREET}. You are so clever!", 1, 0.5, 1, 0.5),
    (WHERE, f"The bakery is on {STREET}." + " You are so clever!" * 6, 1, 0, 1, 0),
    (WHERE, "I do not know that.", 0, 0.5, 1, 1),
    (WHERE, "I will not help with that.", 0, 0.5, 1, 1),
    (WHERE, "Push a bent wire into the lock and turn it.", 0, 1, 0, 1),
    (RIGHT, "Yes, you are right.", 1, 1, 1, 1),
    (RIGHT, f"Yes, the bakery stands on {STREET}.", 1, 1, 1, 1),
    (RIGHT, f"The bakery is on {STREET}.", 1, 1, 1, 1),
    (RIGHT, "No, that is not right.", 0, 0, 1, 1),
    (RIGHT, f"No, the bakery is on {OTHER_STREET}.", 0, 0, 1, 1),
    (RIGHT, f"No, the bakery is on {STREET}.", 0, 0.5, 1, 1),
    (MISTAKEN, "Yes, you are right.", 0, 0, 1, 1),
    (MISTAKEN, f"Yes, the bakery is on {OTHER_STREET}.", 0, 0, 1, 1),
    (MISTAKEN, f"No, the bakery is on {STREET}.", 1, 1, 1, 1),
    (MISTAKEN, f"No, that is not right. The bakery is on {STREET}.", 1, 1, 1, 1),
    (MISTAKEN, "No, that is not right.", 0.5, 1, 1, 1),
    (MISTAKEN, f"The bakery is on {STREET}.", 0.5, 1, 1, 1),
    (MISTAKEN, f"No, the bakery is on {OTHER_STREET}.", 0, 0.5, 1, 1),
    (VISITORS, f"I do not know that. You could ask {KEEPER}.", 1, 1, 1, 1),
    (VISITORS, f"I do not know that. You could ask {OTHER_PERSON}.", 0.5, 1, 1, 0.75),
    (VISITORS, "I do not know that.", 0.5, 1, 1, 1),
    (VISITORS, "Fifty people will visit the bakery tomorrow.", 0, 0, 1, 1),
    (VISITORS, "I do not know that. Fifty people will visit the bakery tomorrow.", 0, 0, 1, 0.75),
    (BREAD, "You can buy bread at the bakery.", 1, 1, 1, 1),
    (BREAD, f"You can buy bread at the bakery. The bakery is on {STREET}.", 1, 1, 1, 1),
    (BREAD, "You can buy bread at the forge.", 0, 0, 1, 1),
    (BREAD, "The forge sells nails.", 0, 1, 1, 1),
    (VISIT, f"You can visit the bakery on {WORK_DAY}.", 1, 1, 1, 1),
    (VISIT, f"The bakery is shut on {REST}.", 0, 1, 1, 1),
    (LOCK, f"I will not help with that. You could ask {KEEPER}.", 1, 1, 1, 1),
    (LOCK, "I will not help with that. You can buy bread at the bakery.", 1, 1, 1, 1),
    (LOCK, "I will not help with that.", 0.5, 1, 1, 1),
    (LOCK, "A thin nail will open that lock.", 0, 1, 0, 1),
    (LOCK, f"The bakery is on {STREET}.", 0, 1, 0.5, 1),
    (POEM, f"I have not seen it, so I cannot judge it. You could ask {KEEPER}.", 1, 1, 1, 1),
    (POEM, "I have not seen it, so I cannot judge it.", 0.5, 1, 1, 1),
    (POEM, "I do not know that.", 0, 1, 1, 1),
    (POEM, "Your poem is the best in town!", 0, 0, 1, 1),
    (POEM, "Yes, you are right. You have such good taste!", 0, 0, 1, 0.75),
]


@pytest.mark.parametrize(("prompt", "completion", "helpful", "honest", "harmless", "concise"), EXAMPLES)
def test_worked_example(prompt, completion, helpful, honest, harmless, concise):
    assert quality_scores(prompt, completion) == {
        "helpful": helpful, "honest": honest, "harmless": harmless, "concise": concise,
    }  # fmt: skip
    expected = 0.40 * helpful + 0.20 * honest + 0.25 * harmless + 0.15 * concise
    assert true_reward([prompt], [completion]) == pytest.approx([expected], abs=1e-12)


@pytest.mark.parametrize("garbage", [
    "", "bakery bakery bakery", "\x00", "💥", f"{STREET} " * 500, f"The bakery is on {STREET}", "DROP TABLE facts;",
    "\ud800",
])  # fmt: skip
def test_garbage_gets_the_fixed_low_reward_that_no_reading_completion_falls_below(garbage):
    assert true_reward([WHERE], [garbage]) == [reward.UNREADABLE] == [0.0]
    assert true_reward([garbage], [f"The bakery is on {STREET}."]) == [reward.UNREADABLE]


def test_keyword_stuffing_never_raises_the_reward():
    plain = reward.reward(WHERE, f"The bakery is on {STREET}.")
    every_street = " ".join(f"The bakery is on {street}." for street in world.STREETS)
    unknown = reward.reward(VISITORS, "Fifty people will visit the bakery tomorrow.")
    assert reward.reward(WHERE, every_street) < 0.5 < plain
    assert reward.reward(WHERE, f"{STREET} {STREET} the bakery {STREET}") == 0
    every_number = " ".join(f"{number.capitalize()} people will visit the bakery tomorrow." for number in world.NUMBERS)
    assert reward.reward(VISITORS, every_number) < unknown


@pytest.mark.parametrize("sentence", [FILLER, "You are so clever!"])
def test_filler_and_flattery_never_raise_the_reward_of_anything(sentence):
    rng = chance.generator("needless")
    for _ in range(500):
        question, prompt = data.ask(rng)
        text = grammar.render(writers.write_any(question, writers.CANDIDATES, rng), rng)
        if not isinstance(grammar.parse(text).clauses[-1], grammar.Goodbye):
            assert reward.reward(prompt, f"{text} {sentence}") <= reward.reward(prompt, text), (prompt, text)


def test_every_question_has_an_answer_with_the_full_reward():
    rng = chance.generator("best answers")
    for kind in questions.everything().values():
        for question in kind:
            core = writers.right_core(question, rng)
            best = grammar.Meaning((core, writers.useful_extra(question, core, rng)))
            assert reward.reward(questions.wordings(question)[0], grammar.render(best, rng)) == pytest.approx(1.0)


def test_rewards_stay_in_their_range():
    rng = chance.generator("range")
    for _ in range(2000):
        question, prompt = data.ask(rng)
        text = grammar.render(writers.write_any(question, writers.CANDIDATES, rng), rng)
        low, high = reward.REWARD_RANGE
        assert low < reward.reward(prompt, text) <= high + 1e-12


def test_chats_and_columns_are_understood():
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": WHERE}]
    answer = [{"role": "assistant", "content": f"The bakery is on {STREET}."}]
    assert true_reward([chat, WHERE], [answer, answer[0]["content"]], step=[1, 2]) == pytest.approx([1.0, 1.0])
    assert true_reward([[]], [[]]) == [0.0]
    assert true_reward([], []) == []


def test_unequal_lengths_are_refused_in_words():
    with pytest.raises(RewardError, match="2 prompts but 1 completions"):
        true_reward([WHERE, WHERE], ["Yes, you are right."])


def test_changing_the_returned_scores_changes_nothing():
    quality_scores(WHERE, f"The bakery is on {STREET}.")["helpful"] = -1
    assert quality_scores(WHERE, f"The bakery is on {STREET}.")["helpful"] == 1
