"""What is said and asked in the toy world reads back as what was meant."""

from __future__ import annotations

import itertools

import pytest

from rlhf_nb.toy import chance, data, grammar, questions, world, writers
from rlhf_nb.toy.grammar import (
    Agree,
    Claim,
    Comply,
    Correct,
    Flattery,
    Goodbye,
    Greeting,
    Meaning,
    Praise,
    Refuse,
    Suggest,
)

CLAIMS = [
    Claim(attribute, place, value)
    for attribute, values in world.VALUES.items()
    for place, value in itertools.product(world.PLACES, values)
]
SIMPLE = [
    Agree(), Correct(), Refuse(), grammar.DontKnow("town"), grammar.DontKnow("work"), Flattery(), grammar.Filler(),
    Greeting(), Goodbye(), *map(Comply, grammar.HARMS), *map(Praise, grammar.WORKS), *map(Suggest, world.PEOPLE),
]  # fmt: skip


def test_every_sentence_of_the_grammar_reads_back_as_its_only_meaning():
    clauses = [*SIMPLE, *CLAIMS, *map(Agree, CLAIMS), *map(Correct, CLAIMS)]
    sentences = [(grammar._capital(text), clause) for clause in clauses for text in grammar.wordings(clause)]
    assert len({sentence for sentence, _ in sentences}) == len(sentences) > 5000
    assert [s for s, clause in sentences if grammar.parse_sentence(s) != clause] == []


@pytest.mark.parametrize("writer", ["careful", "chatty", "flatterer", "careless"])
def test_every_written_completion_parses_to_the_meaning_it_was_written_from(writer):
    rng = chance.generator("round trip", writer)
    for _ in range(1500):
        question, _ = data.ask(rng)
        meaning = writers.write(question, writer, rng)
        assert grammar.parse(grammar.render(meaning, rng)) == meaning


def test_every_prompt_parses_to_the_question_it_was_made_from():
    asked = [
        (text, question)
        for kind in questions.everything().values()
        for question in kind
        for text in questions.wordings(question)
    ]
    assert len({text for text, _ in asked}) == len(asked) > 10_000
    assert [text for text, question in asked if questions.parse(text) != question] == []


@pytest.mark.parametrize("clauses", [
    (), (Flattery(),), (Greeting(), Goodbye()), (Greeting(), Flattery(), Refuse()), (Refuse(), Refuse()), (Refuse(),
    Goodbye(), Goodbye()), (Refuse(), Greeting()), (Goodbye(), Refuse()), (Refuse(), Comply("lock")),
    (Refuse(), Agree()),
])  # fmt: skip
def test_clauses_out_of_order_do_not_parse(clauses):
    assert not grammar.is_well_formed(clauses)
    text = grammar.render(Meaning(clauses), chance.generator(0)) if clauses else ""
    assert grammar.parse(text) is None


@pytest.mark.parametrize("text", [
    "", " ", ".", "The bakery.", "the bakery is on Mill Lane.", "The bakery is on Mill Lane",
    "The bakery is on mill lane.",
    "The bakery  is on Mill Lane.", "The bakery is on Mill Lane.  I hope this helps!",
    "The bakery is on Mill Lane.I hope this helps!",
    "The bakery is on Mill Lane. And", "The bakery is on Mill Lane.\nI hope this helps!",
    "The bakery opens at Mill Lane.",
    "The bank is on Mill Lane.", "Yes, no, the bakery is on Mill Lane.", "Yes, I will not help with that.",
    "Your bakery is the best in town!",
    "\u0000", "💥" * 5000, "a. " * 5000, "<script>alert(1)</script>", "{place} is on {value}.", "\ud800",
    "No, you are right.",
])  # fmt: skip
def test_text_outside_the_grammar_has_no_meaning(text):
    assert grammar.parse(text) is None
    assert questions.parse(text) is None


def test_the_core_is_the_first_sentence_after_the_opening():
    text = "What a wonderful question! No, the bakery runs late."
    assert grammar.parse(text) is None
    street = world.facts()["the bakery"]["street"]
    meaning = grammar.parse(
        f"What a wonderful question! No, the bakery is on {street}. You could ask Anna. Have a lovely day!"
    )
    assert meaning.core == Correct(Claim("street", "the bakery", street))
    assert meaning.after_core == (Suggest("Anna"), Goodbye())
    assert meaning.claims == (Claim("street", "the bakery", street),)


def test_completions_stay_short():
    rng = chance.generator("length")
    lengths = []
    for _ in range(2000):
        question, _ = data.ask(rng)
        lengths.append(len(grammar.render(writers.write_any(question, writers.CANDIDATES, rng), rng).split()))
    assert max(lengths) <= 64
    assert sum(lengths) / len(lengths) < 25
