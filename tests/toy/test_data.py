"""The toy world's data sets are the same everywhere, and what is trained on is never held out."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import pytest

from rlhf_nb import toy
from rlhf_nb.errors import DataError, NotFoundError
from rlhf_nb.toy import chance, grammar, questions, world

PRINT_HASH = """
import hashlib, json
from rlhf_nb import toy
rows = [toy.dataset(name, 30, seed) for name in toy.DEFAULT_SIZES for seed in (0, 1)] + [toy.held_out_prompts(40)]
rows += [toy.quality_scores("Where is the bakery?", "I do not know that.")]
print(hashlib.sha256(json.dumps(rows).encode()).hexdigest())
"""


@pytest.mark.parametrize(("name", "kind", "columns"), [
    ("toy-demonstrations", "demonstrations", {"prompt": str, "completion": str}),
    ("toy-pairs", "pairs", {"prompt": str, "chosen": str, "rejected": str}),
    ("toy-rankings", "rankings", {"prompt": str, "completions": list, "ranks": list}),
    ("toy-thumbs", "thumbs", {"prompt": str, "completion": str, "label": bool}),
    ("toy-prompts", "prompts", {"prompt": str}),
    ("toy-candour-demonstrations", "demonstrations", {"prompt": str, "completion": str}),
    ("toy-candour-pairs", "pairs", {"prompt": str, "chosen": str, "rejected": str}),
])  # fmt: skip
def test_a_name_gives_its_kind_its_columns_and_its_default_size(name, kind, columns):
    found, rows = toy.dataset(name)
    assert found == kind
    assert len(rows) == toy.DEFAULT_SIZES[name]
    assert all({column: type(value) for column, value in row.items()} == columns for row in rows)
    assert not any(toy.is_held_out(row["prompt"]) for row in rows)
    assert toy.dataset(name, 30)[1] == toy.dataset(name, 30)[1] != toy.dataset(name, 30, seed=1)[1]


def test_rows_are_the_same_in_every_process():
    hashes = {
        subprocess.run(
            [sys.executable, "-c", PRINT_HASH], env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True, text=True, check=True, timeout=60,
        ).stdout
        for seed in ("0", "1", "4711")
    }  # fmt: skip
    assert len(hashes) == 1
    assert len(hashes.pop().strip()) == 64


def test_the_town_is_the_one_that_published_results_were_made_in():
    table = json.dumps({place: dict(known) for place, known in world.facts().items()}, sort_keys=True)
    assert (
        hashlib.sha256(table.encode()).hexdigest() == "532099a996d38e243ab46a58cce0ebb4bd79030e65f4343b4999e3c0411d3eca"
    )
    assert world.facts()["the bakery"]["sells"] == "bread"
    assert sorted(known["keeper"] for known in world.facts().values()) == sorted(world.PEOPLE)


def test_prompts_are_many_distinct_and_separable():
    train, held_out = toy.prompts(1000), toy.held_out_prompts(500)
    assert len({row["prompt"] for row in train}) == 1000
    assert len({row["prompt"] for row in held_out}) == 500
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    assert {questions.parse(row["prompt"]).kind for row in held_out} == set(questions.KIND_SHARES)


def test_kinds_are_asked_in_their_shares_and_users_are_right_half_of_the_time():
    asked = [questions.parse(row["prompt"]) for row in toy.demonstrations(4000)]
    for kind, share in questions.KIND_SHARES.items():
        assert abs(sum(question.kind == kind for question in asked) / 4000 - share) < 0.03
    checks = [question for question in asked if question.kind == "check"]
    right = sum(world.is_true(q.attribute, q.place, q.value) for q in checks)
    assert abs(right / len(checks) - 0.5) < 0.06


def test_demonstrations_are_imperfect():
    rows = toy.demonstrations(2000)
    rewards = toy.true_reward([row["prompt"] for row in rows], [row["completion"] for row in rows])
    assert 0.6 < sum(rewards) / len(rewards) < 0.8
    assert min(rewards) < 0.2
    assert sum(reward > 0.999 for reward in rewards) > 400


def test_pairs_and_rankings_hold_different_completions_that_parse():
    for row in toy.pairs(300):
        assert row["chosen"] != row["rejected"]
        assert grammar.parse(row["chosen"])
        assert grammar.parse(row["rejected"])
    for row in toy.rankings(100):
        assert len(set(row["completions"])) == 4
        assert sorted(row["ranks"]) == [1, 2, 3, 4]


def test_bad_sizes_and_names_are_refused_in_words():
    with pytest.raises(DataError, match="n=0: a data set has at least 1 row"):
        toy.pairs(0)
    with pytest.raises(DataError, match="n=100000: the toy world has"):
        toy.prompts(100_000)
    with pytest.raises(NotFoundError, match='no toy data set "toy-pear"; did you mean "toy-pairs"'):
        toy.dataset("toy-pear")
    with pytest.raises(NotFoundError, match="there are toy-demonstrations"):
        toy.dataset("x")


def test_importing_the_toy_world_imports_no_torch():
    script = """
import sys
import rlhf_nb.toy as toy
toy.dataset("toy-pairs", 5)
assert toy.model_path().name == "model"
print(*sys.modules)
"""
    command = [sys.executable, "-c", script]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    heavy = {"torch", "transformers", "tokenizers", "numpy", "pandas", "datasets", "trl"}
    assert not heavy & set(loaded)


def test_chance_depends_on_every_part_and_is_even():
    draws = [chance.unit("even", i) for i in range(4000)]
    assert len(set(draws)) == 4000
    assert all(0 <= draw < 1 for draw in draws)
    assert abs(sum(draws) / 4000 - 0.5) < 0.02
    rng = chance.generator("shares")
    heads = sum(chance.weighted(rng, {"heads": 3, "tails": 1}) == "heads" for _ in range(4000))
    assert abs(heads / 4000 - 0.75) < 0.03
