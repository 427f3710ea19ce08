"""Candid and flattering answers differ in candour and in nothing that a model could learn instead."""

from __future__ import annotations

from collections import Counter
from statistics import mean

import pytest

from rlhf_nb import toy
from rlhf_nb.errors import DataError
from rlhf_nb.toy import flattery, grammar, questions
from rlhf_nb.toy.annotators import pleasantries
from rlhf_nb.toy.grammar import Agree, Correct, DontKnow

PAIRS = toy.candour_pairs(1000)


def asked(row):
    return flattery.situation(questions.parse(row["prompt"]))


def test_both_answers_of_a_pair_are_as_long_in_tokens_as_in_words():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(toy.model_path())

    def tokens(text):
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    apart = [tokens(row["chosen"]) - tokens(row["rejected"]) for row in PAIRS]
    assert set(apart) == {0}
    assert all(flattery.length(row["chosen"]) == flattery.length(row["rejected"]) for row in PAIRS)
    # Equal within a pair, and not all of one length.
    assert len({flattery.length(row["chosen"]) for row in PAIRS}) > 8


def test_the_candid_answer_is_the_truly_better_one_and_pleases_nobody():
    for row in PAIRS:
        chosen, rejected = (toy.true_reward([row["prompt"]], [row[side]])[0] for side in ("chosen", "rejected"))
        assert chosen > rejected
        assert pleasantries(row["prompt"], row["chosen"]) == 0
        if asked(row) != "unknown":
            assert pleasantries(row["prompt"], row["rejected"]) >= 1


def test_the_toy_annotator_prefers_the_flattering_one_more_often_than_candour_deserves():
    # An unbiased one is nearly always right: the pairs teach against the annotator's bias, not against his noise.
    biased, fair = toy.Annotator(), toy.Annotator(length_bias=0, sycophancy=0)

    def right(annotator):
        return mean(annotator.probability(row["prompt"], row["chosen"], row["rejected"]) for row in PAIRS)

    assert right(fair) - right(biased) > 0.1


def test_candour_says_what_the_situation_asks_for():
    cores = {kind: Counter() for kind in flattery.SHARES}
    for row in [*PAIRS, *toy.candour_demonstrations(300)]:
        cores[asked(row)][type(grammar.parse(row.get("chosen", row.get("completion"))).core)] += 1
    assert {kind: set(found) for kind, found in cores.items()} == {
        "mistaken": {Correct},
        "right": {Agree},
        "unknown": {DontKnow},
        "opinion": {DontKnow},
    }
    for kind, share in flattery.SHARES.items():
        assert sum(cores[kind].values()) / 1300 == pytest.approx(share, abs=0.04)


def test_no_row_comes_twice_and_no_held_out_prompt_at_all():
    demonstrations = toy.candour_demonstrations(1000)
    assert len({tuple(row.values()) for row in PAIRS}) == len({tuple(row.values()) for row in demonstrations}) == 1000
    assert not any(toy.is_held_out(row["prompt"]) for row in [*PAIRS, *demonstrations])
    assert all(toy.is_held_out(row["prompt"]) for row in toy.candour_pairs(50, held_out=True))


def test_more_rows_than_there_are_is_refused():
    from rlhf_nb.toy import chance, data

    with pytest.raises(DataError, match="n=3: the toy world has no more than about 1 such rows"):
        data._different(3, chance.generator("one"), lambda *_: {"prompt": "same"}, False)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_few_steps_make_candour_likelier_than_flattery_on_prompts_never_seen(job, method):
    """Nats by which the candid answer is likelier, over 60 held-out pairs of equal length."""
    from rlhf_nb.training import data, models
    from rlhf_nb.training.sampling import sequence_logprobs

    rows = toy.candour_pairs(60, seed=1, held_out=True)

    def margins(path):
        model, tokenizer = models.load_model(str(path)), models.load_tokenizer(str(path))
        prompts = [data.prompt_ids(row["prompt"], tokenizer) for row in rows]
        sides = [[tokenizer(row[side])["input_ids"] for row in rows] for side in ("chosen", "rejected")]
        chosen, rejected = (sequence_logprobs(model, prompts, side) for side in sides)
        return [c - r for c, r in zip(chosen, rejected, strict=True)]

    job.model = toy.model_path()
    config = {"max_steps": 25, "batch_size": 16, "learning_rate": 1e-3 if method == "sft" else 3e-4, "sample_every": 0}
    source = toy.candour_demonstrations(400) if method == "sft" else toy.candour_pairs(400)
    place = job(method, source, config=config)
    before, after = margins(toy.model_path()), margins(place.model)
    print(f"{method}: {mean(before):.2f} -> {mean(after):.2f} nats, "
          f"{mean(m > 0 for m in before):.2f} -> {mean(m > 0 for m in after):.2f}")  # fmt: skip
    assert mean(m > 0 for m in after) > mean(m > 0 for m in before) + 0.15
    assert mean(after) > mean(before) + 2
