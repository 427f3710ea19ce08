from __future__ import annotations

import socket
import time

import pytest

from rlhf_nb.errors import RewardError
from rlhf_nb.rewards.functions import from_reference, named


def score(name: str, completions: list[str], config: dict | None = None, **columns) -> list[float]:
    return from_reference(named(name, config or {}))(["?"] * len(completions), completions, **columns)


def test_a_pattern_is_searched_or_must_cover_all():
    texts = ["answer: 42", " 42 \n", "none"]
    assert score("regex", texts, {"pattern": r"\d+"}) == [1.0, 1.0, 0.0]
    assert score("regex", texts, {"pattern": r"\d+", "match": "full"}) == [0.0, 1.0, 0.0]


def test_each_row_may_have_its_own_pattern():
    assert score("regex", ["cat", "cat"], regex=["^c", "^d"]) == [1.0, 0.0]


def test_a_pattern_that_takes_for_ever_scores_nothing():
    began = time.monotonic()
    assert score("regex", ["a" * 60 + "b"], {"pattern": r"^(a|aa|a?a)+$", "timeout": 0.2}) == [0.0]
    assert time.monotonic() - began < 5


def test_a_pattern_that_is_none_is_one_line():
    with pytest.raises(RewardError, match=r"^reward regex: pattern='\(': missing \).*; correct it$"):
        score("regex", ["x"], {"pattern": "("})
    with pytest.raises(RewardError, match=r"^reward regex: the rows have no column regex; .*pattern=\"...\"\)$"):
        score("regex", ["x"])


SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ('{"age": 3}', 1),
        ('Here it is:\n```json\n{"age": 3}\n```\n', 1),
        ('{"age": "3"}', 0),
        ("{}", 0),
        ("age: 3", 0),
        ("[" * 100_000, 0),
        ('{"age": ' + "9" * 10_000 + "}", 0),
        ('{"age": 3, "x": NaN}', 0),
    ],
)
def test_json_is_held_against_its_schema(completion, right):
    assert score("json-schema", [completion], {"schema": SCHEMA}) == [float(right)]
    assert score("json-schema", [completion], json_schema=[SCHEMA]) == [float(right)]


def test_a_schema_that_is_none_and_one_that_lies_elsewhere_are_one_line():
    with pytest.raises(RewardError, match=r"^reward json-schema: schema '.*': 'nothing' is not valid.*; correct it$"):
        score("json-schema", ["{}"], {"schema": {"type": "nothing"}})
    with pytest.raises(RewardError, match=r"^reward json-schema: schema '\{' is not JSON"):
        score("json-schema", ["{}"], json_schema=["{"])
    with pytest.raises(RewardError, match=r"^reward json-schema: the rows have no column json_schema; "):
        score("json-schema", ["{}"])
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        where = f"http://127.0.0.1:{server.getsockname()[1]}/schema"
        with pytest.raises(
            RewardError, match=r"^reward json-schema: \$ref .* is not in the schema; write it out there$"
        ):
            score("json-schema", ["{}"], {"schema": {"$ref": where}})
        with pytest.raises(TimeoutError):
            server.accept()
