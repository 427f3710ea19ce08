"""Each instruction of IFEval's vocabulary, followed and not; and the public prompts, whose arguments all fit."""

from __future__ import annotations

import gzip
import json

import pytest

from rlhf_nb.errors import RewardError
from rlhf_nb.rewards.functions import from_reference, named
from rlhf_nb.rewards.ifeval import CHECKS, sentences

ENGLISH = "This is a perfectly ordinary English sentence about the weather"
GERMAN = "Dies ist ein ganz gewöhnlicher deutscher Satz über das Wetter"
CASES = [
    ("keywords:existence", {"keywords": ["moon", "sea"]}, "The Moon over the sea", "The moon"),
    ("keywords:frequency", {"keyword": "war", "frequency": 2, "relation": "at least"}, "war and War", "war"),
    ("keywords:forbidden_words", {"forbidden_words": ["rock"]}, "rocket", "a Rock."),
    (
        "keywords:letter_frequency",
        {"letter": "!", "let_frequency": 2, "let_relation": "less than"},
        "one!",
        "two!!",
    ),
    ("language:response_language", {"language": "de"}, GERMAN, ENGLISH),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": "less than"},
        "A cat. A dog.",
        "A. b! c? d.",
    ),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "one two three", "one two"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "one\n***\ntwo\n***", "one\n***\n***\ntwo"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "weekend"},
        'one\n\n"Weekend, at last',
        "weekend\n\none",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] of [place]", "[name]"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye.\nP. P. S hello", "Bye. P.S. hello"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\np.s. hello", "Bye. PS hello"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* one\n- two", "* one\n**bold**\n"),
    ("detectable_format:constrained_response", {}, "Well. My answer is maybe.", "My answer is perhaps."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*one* **two**", "*one* ** **"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        "SECTION 1\na\nSECTION 2\nb",
        "SECTION 1\na",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a: 1}"),
    ("detectable_format:title", {}, "<<A title>>\ntext", "<< >>"),
    ("combination:two_responses", {}, "one\n******\ntwo", "one\n******\none"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi."}, "say hi. Hi!", "Hi! Say hi."),
    ("startend:end_checker", {"end_phrase": "Is that all?"}, 'So. Is that all?"', "Is that all? No."),
    ("startend:quotation", {}, '"quoted"', '"quoted'),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "less than"},
        "one LOUD word",
        "TWO LOUD words",
    ),
    ("change_case:english_capital", {}, ENGLISH.upper(), ENGLISH),
    ("change_case:english_lowercase", {}, ENGLISH.lower(), GERMAN.lower()),
    ("punctuation:no_comma", {}, "one two", "one, two"),
]


def score(completions, names, kwargs, **config):
    reward = from_reference(named("ifeval", config))
    return reward(["?"] * len(completions), completions, instruction_id_list=names, kwargs=kwargs)


@pytest.mark.parametrize(("name", "given", "followed", "not_followed"), CASES)
def test_an_instruction_is_followed_or_not(name, given, followed, not_followed):
    assert score([followed, not_followed, "  "], [[name]] * 3, [[given]] * 3) == [1.0, 0.0, 0.0]


def test_every_instruction_has_a_case():
    assert {name for name, *_ in CASES} == set(CHECKS) and len(CHECKS) == 25


def test_all_must_be_followed_or_the_share_counts():
    names = [["punctuation:no_comma", "startend:quotation"]]
    # Rows of one table have every argument, None where it is not theirs.
    kwargs = [[{"num_words": None}, None]]
    assert score(["no comma"], names, kwargs) == [0.0]
    assert score(["no comma"], names, kwargs, score="share") == [0.5]
    assert score(['"no comma"'], names, kwargs) == [1.0]


def test_the_public_prompts_are_all_known_and_their_arguments_fit(shared_data):
    with gzip.open(shared_data / "verify" / "ifeval_prompts_540.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    assert len(rows) == 540
    names, kwargs = [row["instruction_id_list"] for row in rows], [row["kwargs"] for row in rows]
    assert {name for row in names for name in row} == set(CHECKS)
    said = score([ENGLISH] * 540, names, kwargs, score="share")
    assert all(0 <= one <= 1 for one in said) and len(set(said)) > 2
    assert score([""] * 540, names, kwargs) == [0.0] * 540


def test_what_cannot_be_checked_is_named_in_one_line():
    with pytest.raises(RewardError) as caught:
        score(["x"], [["punctuation:no_commas", "format:emoji"]], [[{}, {}]])
    assert str(caught.value) == "reward ifeval: no check for format:emoji, punctuation:no_commas  leave those rows out"
    with pytest.raises(
        RewardError, match=r"length_constraints:number_words with \{'num_words': 3\}: .*'relation'.*kwargs$"
    ):
        score(["x"], [["length_constraints:number_words"]], [[{"num_words": 3}]])
    with pytest.raises(RewardError, match=r"relation 'more than' is neither"):
        score(["x"], [["keywords:frequency"]], [[{"keyword": "x", "frequency": 1, "relation": "more than"}]])
    with pytest.raises(RewardError, match="1 instructions and 2 kwargs in a row"):
        score(["x"], [["punctuation:no_comma"]], [[{}, {}]])


@pytest.mark.parametrize(
    ("text", "n"),
    [
        ("One. Two! Three?", 3),
        ("Dr. Smith met J. Doe.", 1),
        ("3.14 is pi", 1),
        ('He said "no." Then left.', 2),
        ("", 0),
    ],
)
def test_sentences_are_counted(text, n):
    assert sentences(text) == n
