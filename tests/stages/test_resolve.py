"""What is named in a cell becomes a reference that can travel."""

from __future__ import annotations

import re

import pytest

import rlhf_nb as rl
from rlhf_nb import registry
from rlhf_nb.data.conversions import SERVES
from rlhf_nb.data.rows import KINDS
from rlhf_nb.errors import DataError, NotFoundError, SpecError
from rlhf_nb.methods.reward_model import RewardModel
from rlhf_nb.protocol.spec import ModelReward, NamedData, RunModel, RunSpec
from rlhf_nb.stages.resolve import resolve_data, resolve_reward, reward_from_source


@pytest.fixture
def ws(tmp_path):
    with rl.Workspace(tmp_path / "w") as workspace:
        yield workspace


def test_pairs_serve_as_thumbs_and_rankings_as_pairs(ws):
    pairs = ws.add_data([{"prompt": "p", "chosen": "a", "rejected": "b"}], name="mine", kind="pairs")
    thumbs = resolve_data(ws, pairs, verb="kto", rows="thumbs")
    assert (thumbs.row_kind, thumbs.n, thumbs.name) == ("thumbs", 2, "mine as thumbs")
    assert ws.store.get_rows(thumbs.content_hash) == [
        {"prompt": "p", "completion": "a", "label": True},
        {"prompt": "p", "completion": "b", "label": False},
    ]
    assert resolve_data(ws, "toy-rankings", verb="dpo", rows="pairs").row_kind == "pairs"


def test_a_method_that_takes_both_gets_rankings_as_they_are(ws):
    kinds = {"rows": RewardModel.rows, "also": RewardModel.also}
    assert resolve_data(ws, "toy-rankings", verb="reward", **kinds) == NamedData(name="toy-rankings")
    assert resolve_data(ws, "toy-pairs", verb="reward", **kinds) == NamedData(name="toy-pairs")


def test_demonstrations_out_of_pairs_are_asked_for_and_not_assumed(ws):
    with pytest.raises(DataError, match="holds pairs, and sft trains on demonstrations"):
        resolve_data(ws, "toy-pairs", verb="sft", rows="demonstrations")


SOME = {
    "demonstrations": [{"prompt": "p", "completion": "a"}, {"prompt": "p", "completion": "b"}],
    "pairs": [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "a", "rejected": "c"}],
    "rankings": [
        {"prompt": "p", "completions": ["a", "b", "c", "d"], "ranks": [0, 1, 1, 2]},
        {"prompt": "p", "completions": ["a", "b"], "ranks": [1, 1]},
    ],
    "thumbs": [
        {"prompt": "p", "completion": "a", "label": True},
        {"prompt": "p", "completion": "b", "label": False},
        {"prompt": "p", "completion": "c", "label": False},
    ],
    "prompts": [{"prompt": "p"}],
    "completions": [
        {"prompt": "p", "completions": ["a", "b", "a", ""], "scores": [1.0, 2.0, 1.0, 0.0]},
        {"prompt": "q", "completions": ["c", "d"], "scores": [1.0, 1.0]},
        {"prompt": "r", "completions": ["e"]},
    ],
}
LEFT_OUT = {
    ("demonstrations", "prompts"): "1 prompt from 2 demonstrations of mine; dropped 1: repeated prompt (1)",
    ("pairs", "thumbs"): "3 thumbs from 2 pairs of mine; dropped 1: repeated thumb (1)",
    ("pairs", "demonstrations"): "2 demonstrations from 2 pairs of mine",
    ("pairs", "rankings"): "2 rankings from 2 pairs of mine",
    ("pairs", "prompts"): "1 prompt from 2 pairs of mine; dropped 1: repeated prompt (1)",
    ("rankings", "pairs"): "5 pairs from 2 rankings of mine; dropped 2: equal ranks (2)",
    ("rankings", "thumbs"): "2 thumbs from 2 rankings of mine; dropped 3: neither best nor worst (2), "
    "every completion has the same rank (1)",
    ("rankings", "demonstrations"): "1 demonstration from 2 rankings of mine; dropped 1: several tie for the best (1)",
    ("rankings", "prompts"): "1 prompt from 2 rankings of mine; dropped 1: repeated prompt (1)",
    ("thumbs", "pairs"): "1 pair from 3 thumbs of mine; dropped 1: thumb without its opposite for the same prompt (1)",
    ("thumbs", "demonstrations"): "1 demonstration from 3 thumbs of mine; dropped 2: thumb down (2)",
    (
        "completions",
        "rankings",
    ): "2 rankings from 3 completions of mine; dropped 3: empty completion (1), no scores (1), repeated completion (1)",
    ("completions", "pairs"): "1 pair from 3 completions of mine; dropped 4: empty completion (1), equal ranks (1), "
    "no scores (1), repeated completion (1)",
    ("completions", "demonstrations"): "1 demonstration from 3 completions of mine; dropped 4: empty completion (1), "
    "no scores (1), repeated completion (1), several tie for the best (1)",
    ("completions", "prompts"): "3 prompts from 3 completions of mine",
    ("thumbs", "prompts"): "1 prompt from 3 thumbs of mine; dropped 2: repeated prompt (2)",
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_rows_serves_every_method_or_is_converted_on_request_or_is_refused_with_what_is_needed(ws, kind):
    ws.add_data(SOME[kind], name="mine", kind=kind)
    for method in registry.methods.names():
        cls = registry.methods.get(method)
        if not cls.rows:  # It reads no rows.
            continue
        kinds = {"rows": cls.rows, "also": cls.also}
        ways = [to for to in (cls.rows, *cls.also) if (kind, to) in LEFT_OUT]
        if kind in (cls.rows, *cls.also):
            assert resolve_data(ws, "mine", verb=method, **kinds).converted == ""
        elif cls.rows == "prompts" or (kind, cls.rows) in SERVES:
            assert resolve_data(ws, "mine", verb=method, **kinds).converted == LEFT_OUT[kind, cls.rows]
        else:
            with pytest.raises(DataError) as caught:
                resolve_data(ws, "mine", verb=method, **kinds)
            said = str(caught.value)
            assert f'{method}: data "mine" holds {kind}, and {method} trains on {cls.rows} (prompt, ' in said
            assert ("nothing like it can be made of" in said) == (not ways) and "\n" not in said
            assert all(f'"mine as {to}" takes ' in said for to in ways)
        for to in ways:
            reference = resolve_data(ws, f"mine as {to}", verb=method, **kinds)
            made, expected = ws.store.get_rows(reference.content_hash), LEFT_OUT[kind, to]
            assert (method, reference.row_kind, reference.converted) == (method, to, expected)
            assert reference.n == len(made) == int(expected.split()[0])


def test_a_reference_is_converted_by_its_rows_whatever_its_name_means_by_now(ws):
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    before = resolve_data(ws, ws.add_data([row], name="mine", kind="pairs"), verb="dpo", rows="pairs")
    ws.add_data([row, {**row, "prompt": "q"}], name="mine", kind="pairs")
    thumbs = resolve_data(ws, before, verb="kto", rows="thumbs")
    assert thumbs.converted == "2 thumbs from 1 pair of mine"


def test_a_conversion_that_leaves_nothing_or_does_not_exist_is_refused(ws):
    ws.add_data([SOME["rankings"][1]], name="tied", kind="rankings")
    with pytest.raises(DataError, match=r'dpo: no pairs can be made of the 1 ranking of "tied": equal ranks \(1\)'):
        resolve_data(ws, "tied", verb="dpo", rows="pairs")
    with pytest.raises(DataError, match=r'data "toy-pairs as thumbs": sft trains on demonstrations \(prompt, comp'):
        resolve_data(ws, "toy-pairs as thumbs", verb="sft", rows="demonstrations")
    with pytest.raises(NotFoundError, match='"toy-pair" does not exist; did you mean "toy-pairs"'):
        resolve_data(ws, "toy-pair as demonstrations", verb="sft", rows="demonstrations")


def test_rewards_are_named_as_a_list_as_a_dict_and_as_text(ws):
    ws.reward_function("flat", "def flat(prompts, completions, **columns):\n    return [0.0 for _ in completions]")
    for value in (["toy-true", "flat"], {"toy-true": 1, "flat": 1.0}, "toy-true, flat", "toy-true=1,flat=1"):
        combined = resolve_reward(ws, value, verb="ppo")
        assert [(part.name, part.weight) for part in combined.parts] == [("toy-true", 1.0), ("flat", 1.0)]
    assert resolve_reward(ws, ["flat"], verb="ppo") == resolve_reward(ws, "flat", verb="ppo")


def test_demonstrations_as_prompts_bring_their_answers_along(ws, tmp_path):
    (tmp_path / "sums.jsonl").write_text('{"question": "1+1?", "answer": "so 2\\n#### 2"}\n')
    data = ws.import_data(tmp_path / "sums.jsonl", name="sums")
    kept = resolve_data(ws, data, verb="ppo", rows="prompts")
    assert ws.store.get_rows(kept.content_hash) == [{"prompt": "1+1?", "answer": "so 2\n#### 2"}]


def test_prompts_are_mixed_by_their_shares(ws):
    mine = ws.add_data([{"prompt": "p", "chosen": "a", "rejected": "b"}], name="mine", kind="pairs")
    mixed = resolve_data(ws, {"toy-prompts": 3, mine.name: 1}, verb="ppo", rows="prompts")
    assert [(part.weight, part.data.name) for part in mixed.parts] == [(3.0, "toy-prompts"), (1.0, "mine")]
    for bad, says in (({"toy-prompts": 0, "mine": 1}, "a share is a number above 0"), ({"mine": 1}, "needs no share")):
        with pytest.raises(SpecError, match=says):
            resolve_data(ws, bad, verb="ppo", rows="prompts")
    with pytest.raises(SpecError, match="only prompts are drawn in shares"):
        resolve_data(ws, {"toy-pairs": 1, "mine": 1}, verb="dpo", rows="pairs")


def test_a_reward_is_written_with_its_options(ws):
    def read(text):
        return resolve_reward(ws, text, verb="ppo")

    assert read("math-answer").config == {"timeout": 3}
    assert read('regex(pattern="^(yes|no), =x\\\\)$", match="full")').config == {
        "pattern": r"^(yes|no), =x\)$",
        "match": "full",
        "timeout": 1.0,
    }
    several = read('json-schema(schema={"type": "object"})=0.5, numeric, toy-true=2')
    assert [(part.name, part.weight) for part in several.parts] == [
        ("json-schema", 0.5),
        ("numeric", 1.0),
        ("toy-true", 2.0),
    ]
    assert several.parts[0].reward.config["schema"] == {"type": "object"}
    for bad, says in (
        ("regex(pattern=open)", "options are written as in Python"),
        ('regex("x")', "options are written as in Python"),
        ('regex(pattern="x', "options are written as in Python"),
        ('regex(pattern="x") toy-true, flat', "'toy-true' after regex"),
        ("regexp(pattern='x')", 'did you mean "regex"'),
    ):
        with pytest.raises((SpecError, NotFoundError), match=re.escape(says)) as caught:
            read(bad)
        assert "\n" not in str(caught.value)


def test_words_longer_than_a_path_can_be_are_no_path(ws):
    words = "Which answer is kinder, and says what it knows? " * 120
    schema = {"type": "object", "properties": {f"field-{i}": {"type": "string"} for i in range(200)}}
    reward = resolve_reward(ws, f"json-schema(schema={schema!r})", verb="ppo")
    assert (reward.name, reward.config["schema"]) == ("json-schema", schema)
    judge = resolve_reward(
        ws, f'judge(model="toy-annotator", principle="honest"),regex(pattern={"9" * 300!r})', verb="x"
    )
    assert [part.name for part in judge.parts] == ["judge-honest", "regex"]
    graded = resolve_reward(ws, f'judge(model="toy", principle={words!r})', verb="ppo")
    assert graded.config["principle"] == words
    for odd in (words, "~nobody-of-that-name/model", "a\0b"):
        with pytest.raises(NotFoundError, match="does not exist in this workspace"):
            resolve_reward(ws, odd.replace(",", ""), verb="ppo")


def test_what_a_source_defines_anywhere_outside_its_functions_is_defined():
    source = (
        "try:\n    import regex as re\nexcept ImportError:\n    import re\n"
        "if True:\n    SCALE = 2\nfor LIMIT in (3, 4):\n    pass\nwith open('x') as HANDLE:\n    pass\n"
        "class Kept:\n    pass\n\ndef helper(x):\n    return Kept, HANDLE\n\n"
        "def f(prompts, completions, **columns):\n"
        "    return [{number} * len(re.findall('a', c)) + SCALE * LIMIT + len(helper(c)) for c in completions]"
    )
    assert reward_from_source(source.format(number=1), "mine").name == "mine"
    with pytest.raises(SpecError, match="reward mine: MISSING is defined outside the function"):
        reward_from_source(source.format(number="MISSING"), "mine")


def test_an_ensembles_members_become_one_reward_as_its_options_say(ws):
    for run_id, members in (("reward-1", 3), ("reward-2", 1)):
        config = RewardModel(members=members).model_dump(mode="json")
        ws.run_index.remember(RunSpec(run_id=run_id, workspace_id="w", method="reward", config=config, created=0.0))
    model = RunModel(run_id="reward-1")
    assert resolve_reward(ws, "reward-1", verb="ppo") == ModelReward(model=model)
    worst = resolve_reward(ws, 'reward-1(over="min"), toy-true=0.5', verb="ppo").parts[0].reward
    assert worst == ModelReward(model=model, over="min")
    careful = 'reward-1(over="mean_minus_std", std_coef=2)'
    assert resolve_reward(ws, careful, verb="ppo") == ModelReward(model=model, over="mean_minus_std", std_coef=2)
    for bad, says in (
        ('reward-1(over="worst")', "reward reward-1: over='worst': should be 'mean', 'min' or 'mean_minus_std'"),
        ('reward-1(overr="min")', 'no option overr; did you mean "over"?'),
        ('reward-1(over="mean_minus_std", std_coef=-1)', "std_coef=-1: should be greater than or equal to 0"),
        ('reward-2(over="min")', "it is one model; leave them out, or train with --set members=5"),
    ):
        with pytest.raises(SpecError, match=re.escape(says)):
            resolve_reward(ws, bad, verb="ppo")


def test_one_check_with_other_options_is_another_reward(ws):
    both = resolve_reward(ws, "regex(pattern='^yes')=1,toy-true=2,regex(pattern='no$')=0.5", verb="grpo")
    assert [(part.name, part.weight) for part in both.parts] == [("regex", 1.0), ("toy-true", 2.0), ("regex-2", 0.5)]
    assert both.parts[2].reward.config["pattern"] == "no$"
    # They come back as they are from a spec.
    assert type(both).model_validate_json(both.model_dump_json()) == both
    with pytest.raises(SpecError, match="reward regex is named twice; name it once, with the sum of the weights"):
        resolve_reward(ws, "regex(pattern='^yes'),regex(pattern='^yes')", verb="grpo")
