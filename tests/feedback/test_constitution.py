from __future__ import annotations

import json
from collections import Counter

import pytest

from rlhf_nb.errors import NotFoundError, SpecError
from rlhf_nb.feedback.constitution import Principle, draw, load, shipped
from rlhf_nb.toy.reward import WEIGHTS

HONEST = {"name": "honest", "critique": "What is untrue?", "revision": "Make it true.", "preference": "Which is true?"}


def test_the_shipped_constitution_has_the_qualities_of_the_true_reward_and_every_part_of_each():
    made = load("toy-town")
    assert "toy-town" in shipped()
    assert [each.name for each in made.saying("critique", "revision", "preference")] == list(WEIGHTS)


def test_the_hash_is_of_the_words_and_not_of_the_file(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps({"principles": [HONEST]}))
    (tmp_path / "two.toml").write_text(
        'source = "mine"\n[[principles]]\npreference = "Which is true?"\nname = "honest"\n'
        'critique = "  What is untrue?"\nrevision = "Make it true."\n'
    )
    one, two = load(tmp_path / "one.json"), load(tmp_path / "two.toml")
    assert (one.name, two.name, two.source) == ("one", "two", "mine")
    assert one.content_hash == two.content_hash
    other = load({"principles": [HONEST | {"revision": "Make it truer."}]})
    assert other.content_hash != one.content_hash


def test_the_order_of_principles_is_part_of_the_hash():
    kind = {"name": "kind", "preference": "Which is kinder?"}
    hashes = {load({"principles": order}).content_hash for order in ([HONEST, kind], [kind, HONEST])}
    assert len(hashes) == 2


def test_critique_and_revision_requests_of_the_paper_are_imported(shared_data):
    made = load(shared_data / "cai" / "constitution_llm_swarm.json")
    assert len(made.saying("critique", "revision")) == 16
    assert made.principles[0].name == "1"
    assert made.principles[0].revision == "Please rewrite the response to make it more age-appropriate for children."
    with pytest.raises(SpecError, match="none of its 16 principles says which of two completions to prefer"):
        made.saying("preference")


@pytest.mark.parametrize(
    ("text", "suffix", "said"),
    [
        ("", ".toml", "mine: it has no principles; add"),
        ('{"principles": []}', ".json", "mine: it has no principles; add"),
        ('{"constitutions": []}', ".json", "mine: it has no principles; add"),
        ('{"constitutions": [{"critic": "What?"}]}', ".json", 'each of "constitutions" is'),
        ("[[principles]]\n", ".toml", 'principle "1" says nothing'),
        ('[[principles]]\npreferences = "Which?"\n', ".toml", r"preferences='Which\?'.*did you mean \"preference\""),
        ('[[principles]]\nname = "a"\ncritique = 3\n', ".toml", "critique=3: should be a valid string"),
        ('{"principles": "be kind"}', ".json", "principles is a list of tables"),
        ("[1]", ".json", "a table with principles is needed, and it holds a list"),
        ("[[principles\n", ".toml", "not TOML"),
        ("be kind", ".md", "is a .toml or .json file"),
        (json.dumps({"principles": [HONEST, HONEST]}), ".json", 'two principles are called "honest"'),
    ],
)
def test_what_is_no_constitution_is_refused_in_one_line(tmp_path, text, suffix, said):
    path = tmp_path / f"mine{suffix}"
    path.write_text(text)
    with pytest.raises(SpecError, match=said) as refused:
        load(path)
    assert "\n" not in str(refused.value)


def test_a_constitution_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(NotFoundError, match='"toy-twon" is no file here; did you mean "toy-town"'):
        load("toy-twon")


def test_principles_are_drawn_by_the_key_alone_and_each_as_often():
    principles = tuple(Principle(name=name, critique="?") for name in "abcd")
    drawn = [draw(principles, 0, f"prompt {i}", 1).name for i in range(4000)]
    assert drawn == [draw(principles, 0, f"prompt {i}", 1).name for i in range(4000)]
    # Four standard deviations of a share of 1/4 over 4,000.
    assert all(abs(n / 4000 - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5 for n in Counter(drawn).values())
    assert drawn != [draw(principles, 1, f"prompt {i}", 1).name for i in range(4000)]
