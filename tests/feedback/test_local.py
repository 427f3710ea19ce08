"""A chat model in this process: a real one, small and untrained."""

from __future__ import annotations

import pytest

from rlhf_nb.errors import SpecError
from rlhf_nb.feedback.chat import Question
from rlhf_nb.feedback.judge import ChatJudge, Comparison, all_of, compare_both
from rlhf_nb.feedback.local import LocalChat
from rlhf_nb.feedback.tally import tally


def questions(**settings) -> list[Question]:
    return [Question([{"role": "user", "content": "Who? " * n}], **settings) for n in (1, 9, 3)]


@pytest.fixture(scope="module")
def chat(save_model, tmp_path_factory) -> LocalChat:
    path = save_model(tmp_path_factory.mktemp("models") / "still", dropout=0.0)
    return LocalChat.load(str(path), name="tiny", device="cpu")


def ask(chat, asked):
    return all_of(chat.ask(asked), len(asked))


def test_letters_have_the_log_probabilities_that_the_model_gives_them_alone(chat):
    import torch

    together = ask(chat, questions(letters=("A", "B")))
    for question, reply in zip(questions(), together, strict=True):
        ids = chat.tokenizer.apply_chat_template(question.messages, add_generation_prompt=True, return_tensors="pt")
        with torch.no_grad():
            logprobs_V = chat.model(**ids).logits[0, -1].log_softmax(-1)
        for letter in ("A", "B"):
            (token,) = chat.tokenizer(letter, add_special_tokens=False)["input_ids"]
            assert reply.logprobs[letter] == pytest.approx(float(logprobs_V[token]), abs=1e-5)
        assert reply.text == chat.tokenizer.decode([int(logprobs_V.argmax())], skip_special_tokens=True)


def test_at_temperature_0_it_says_what_plain_transformers_says(chat):
    import torch

    for question, reply in zip(questions(), ask(chat, questions(max_tokens=12)), strict=True):
        ids = chat.tokenizer.apply_chat_template(question.messages, add_generation_prompt=True, return_tensors="pt")
        with torch.no_grad():
            out = chat.model.generate(**ids, max_new_tokens=12, do_sample=False)
        plain = chat.tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert reply.text == plain.strip()


def test_the_same_lots_draw_the_same_answer_in_any_company_and_other_lots_another(chat):
    one, two, three = questions(max_tokens=16, temperature=1.0)
    alone = ask(chat, [three])[0].text
    assert ask(chat, [one, two, three])[2].text == alone
    others = [Question(three.messages, max_tokens=16, temperature=1.0, draw=draw) for draw in (1, 2)]
    assert len({reply.text for reply in ask(chat, [three, *others])}) == 3


def test_kinds_of_questions_may_come_together(chat):
    mixed = [questions(letters=("A", "B"))[0], questions(max_tokens=4)[1], questions(max_tokens=4, temperature=1.0)[2]]
    replies = ask(chat, mixed)
    assert replies[0].logprobs and replies[1].logprobs is None and replies[2].logprobs is None
    assert replies[1].text == ask(chat, [mixed[1]])[0].text


def test_a_question_that_does_not_fit_is_said_and_never_cut(chat):
    long = Question([{"role": "user", "content": "x" * 600}], ("A", "B"))
    replies = ask(chat, [long, *questions(letters=("A", "B"))])
    assert replies[0].failure == "too_long" and replies[0].detail.endswith("and 512 are its context")
    assert not any(reply.failure for reply in replies[1:])


def test_an_untrained_model_spreads_its_probability_and_gives_no_verdict(chat):
    # Its prompt of some 1,000 bytes does not fit in 512 tokens of one byte each: the context is taken to be longer.
    chat.limit = 4096
    found = tally(compare_both(ChatJudge(chat), [Comparison("Who?", "Ann.", "Ben.")]))
    chat.limit = 512
    assert found.failures == {"unreadable": 1} and found.decided == 0


def test_a_model_without_a_chat_template_is_no_judge_and_completes_all_the_same(chat, monkeypatch):
    import numpy as np

    chance_BT = np.full((1, 4), 0.5)
    monkeypatch.setattr(chat.tokenizer, "chat_template", None)
    assert len(chat.complete(["Who?"], chance_BT, temperature=1.0)) == 1
    with pytest.raises(SpecError, match="judge tiny: its tokenizer has no chat template"):
        ask(chat, questions())
