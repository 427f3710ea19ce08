"""Reward models from rankings, weights and margins: what the trainer computes against the formulas and plain TRL."""

from __future__ import annotations

import json

import pytest
import torch

from rlhf_nb.compute.rundir import EventWriter
from rlhf_nb.data.conversions import rankings_to_pairs
from rlhf_nb.data.importers import read_rows
from rlhf_nb.errors import DataError, SpecError
from rlhf_nb.maths.preference import bradley_terry_loss
from rlhf_nb.maths.rankings import plackett_luce_loss
from rlhf_nb.protocol.control import SetCoefficient
from rlhf_nb.rewards.model import RewardModelScorer
from rlhf_nb.toy import pairs, rankings
from rlhf_nb.training.data import conversation_ids
from rlhf_nb.training.models import load_tokenizer

from .conftest import asking

CONFIG = {"max_steps": 1, "batch_size": 4, "learning_rate": 0.0, "max_length": 300, "optimizer": "sgd"}


@pytest.fixture
def still(job, tiny_model_maker):
    """A job on a model without dropout, so that numbers can be done again."""
    job.model = tiny_model_maker("still", dropout=0.0)
    return job


def scores_of(place, rows) -> list[torch.Tensor]:
    """What the run's model says of each row's completions."""
    scorer = RewardModelScorer.load(str(place.model))
    texts = [row.get("completions") or [row["chosen"], row["rejected"]] for row in rows]
    return [
        torch.tensor(scorer.score([row["prompt"]] * len(each), each)) for row, each in zip(rows, texts, strict=True)
    ]


def weights_of(place) -> torch.Tensor:
    from safetensors.torch import load_file

    return torch.cat([value.flatten() for _, value in sorted(load_file(place.model / "model.safetensors").items())])


def notice(place, code: str) -> str:
    (found,) = [e.text for e in place.events() if e.kind == "notice" and e.code == code]
    return found


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_the_loss_of_rankings_is_the_mean_over_pairs_then_over_prompts(still, trace):
    given = ([0, 1, 2, 3], [1, 1, 0, 2], [3, 0, 1, 2], [0, 1, 1, 1])
    rows = [dict(row, ranks=ranks) for row, ranks in zip(rankings(4), given, strict=True)]
    place = still("reward", rows, config=CONFIG, kind="rankings")
    per_prompt = []
    for row, scores in zip(rows, scores_of(place, rows), strict=True):
        pair = [(i, j) for i in range(4) for j in range(i + 1, 4)]
        each = [
            bradley_terry_loss(scores[[i]], scores[[j]]) if row["ranks"][i] < row["ranks"][j]
            else bradley_terry_loss(scores[[j]], scores[[i]]) if row["ranks"][i] > row["ranks"][j]
            else (bradley_terry_loss(scores[[i]], scores[[j]]) + bradley_terry_loss(scores[[j]], scores[[i]])) / 2
            for i, j in pair
        ]  # fmt: skip
        per_prompt.append(torch.cat(each).mean())
    assert trace(place, "loss")[1] == pytest.approx(torch.stack(per_prompt).mean().item(), rel=1e-5)
    assert notice(place, "comparisons") == (
        "24 comparisons of 16 completions to 4 prompts, each completion scored once"
    )


def test_the_plackett_luce_loss_is_the_likelihood_of_the_whole_ranking(still, trace):
    rows = rankings(4)
    place = still("reward", rows, config={**CONFIG, "loss_type": "plackett_luce"}, kind="rankings")
    each = [plackett_luce_loss(s, row["ranks"]) for row, s in zip(rows, scores_of(place, rows), strict=True)]
    assert trace(place, "loss")[1] == pytest.approx(torch.stack(each).mean().item(), rel=1e-5)


def test_what_is_logged_of_a_step_is_over_its_strict_pairs_and_all_its_scores(still, trace):
    rows = [dict(row, ranks=[0, 1, 1, 2]) for row in rankings(4)]
    place = still("reward", rows, config={**CONFIG, "gradient_accumulation": 2}, kind="rankings")
    scores = scores_of(place, rows)
    strict = torch.stack([s[i] - s[j] for s in scores for i, j in ((0, 1), (0, 2), (0, 3), (1, 3), (2, 3))])
    every = torch.cat(scores)
    tokenizer = load_tokenizer(str(still.model))
    tokens = [len(conversation_ids(row["prompt"], text, tokenizer)) for row in rows for text in row["completions"]]
    expected = {
        "data/tokens": torch.tensor(float(sum(tokens))),
        "pairs/accuracy": (strict > 0).float().mean(), "pairs/margin": strict.mean(), "score/mean": every.mean(),
        "score/std": every.std(correction=0), "score/min": every.min(), "score/max": every.max(),
    }  # fmt: skip
    assert {name: trace(place, name)[1] for name in expected} == {
        name: pytest.approx(value.item(), rel=1e-4, abs=1e-6) for name, value in expected.items()
    }


def test_rankings_of_two_train_as_trl_trains_pairs(still, trace):
    rows = pairs(12)
    two = [{"prompt": r["prompt"], "completions": [r["rejected"], r["chosen"]], "ranks": [1, 0]} for r in rows]
    config = {**CONFIG, "max_steps": 6, "learning_rate": 1e-2, "optimizer": "adamw", "center_rewards_coefficient": 0.1}
    trl = still("reward", rows, name="trl", config=config)
    ours = still("reward", two, name="ours", config=config, kind="rankings")
    for name in ("loss", "pairs/margin", "pairs/accuracy", "score/mean", "score/max", "optimizer/grad_norm"):
        assert list(trace(ours, name).values()) == pytest.approx(list(trace(trl, name).values()), rel=2e-4, abs=1e-6)
    # They are steps, not six looks at one model.
    assert abs(trace(ours, "score/mean")[6] - trace(ours, "score/mean")[1]) > 1e-2


def test_one_batch_of_rankings_is_eight_of_one(still):
    sizes = (2, 3, 4, 2, 3, 4, 2, 3)
    rows = [
        dict(row, completions=row["completions"][:K], ranks=row["ranks"][:K])
        for row, K in zip(rankings(8), sizes, strict=True)
    ]
    config = {**CONFIG, "batch_size": 8, "learning_rate": 0.5, "center_rewards_coefficient": 0.1}
    whole = still("reward", rows, name="whole", config=config, kind="rankings")
    parts = still("reward", rows, name="parts", config={**config, "gradient_accumulation": 8}, kind="rankings")
    torch.testing.assert_close(weights_of(whole), weights_of(parts), rtol=1e-4, atol=1e-6)


# --- margins and weights ----------------------------------------------------------------------------------------------


def test_a_margin_is_asked_for_and_live_centring_pulls_from_its_step_on(still, trace, monkeypatch):
    rows = [{**row, "margin": 0.5 * i} for i, row in enumerate(pairs(4))]
    del rows[0]["margin"]
    place = still.prepare("reward", rows, config={**CONFIG, "max_steps": 3})
    control = SetCoefficient(name="center_rewards_coefficient", value=0.5)
    monkeypatch.setattr(EventWriter, "write", asking(place, control))
    still.run(place)
    chosen, rejected = (torch.stack([s[side] for s in scores_of(place, rows)]) for side in (0, 1))
    margins = torch.tensor([0.0, 0.5, 1.0, 1.5])
    fit = bradley_terry_loss(chosen, rejected, margins_B=margins).mean().item()
    centred = 0.5 * (chosen + rejected).square().mean().item()
    # Asked for after step 1; the rate is 0, so that only the coefficient can move the loss.
    assert list(trace(place, "loss").values()) == pytest.approx([fit, fit + centred, fit + centred], rel=1e-5)
    (change,) = [e for e in place.events() if e.kind == "coefficient_changed"]
    assert (change.name, change.old, change.new, change.effective_step) == ("center_rewards_coefficient", 0.0, 0.5, 2)
    assert centred > 1e-4 * fit


@pytest.mark.parametrize("kind", ["pairs", "rankings"])
def test_a_row_of_weight_two_is_the_row_twice_and_of_weight_zero_no_row(still, trace, kind):
    rows = pairs(3) if kind == "pairs" else rankings(3)
    weighted = [{**rows[0], "weight": 2}, rows[1], {**rows[2], "weight": 0}]
    config = {**CONFIG, "learning_rate": 0.5}
    # Whole batches, so that the order of the rows does not matter.
    ours = still("reward", weighted, name="weighted", config={**config, "batch_size": 2}, kind=kind)
    twice = [rows[0], rows[0], rows[1]]
    theirs = still("reward", twice, name="twice", config={**config, "batch_size": 3}, kind=kind)
    assert trace(ours, "loss")[1] == pytest.approx(trace(theirs, "loss")[1], rel=1e-5)
    torch.testing.assert_close(weights_of(ours), weights_of(theirs), rtol=1e-4, atol=1e-6)
    assert f"1 {kind} of weight 0" in notice(ours, "rows_dropped")


def test_an_annotator_weighs_as_given(still, trace):
    rows = [
        {**row, "annotator": name, "weight": 3.0} for row, name in zip(pairs(3), ("ida", "leo", "tom"), strict=True)
    ]
    config = {**CONFIG, "batch_size": 2, "annotator_weights": {"ida": 1.0, "leo": 0.5, "tom": 0.0}}
    place = still("reward", rows, config=config)
    one, two, _ = (bradley_terry_loss(s[[0]], s[[1]]).item() for s in scores_of(place, rows))
    assert trace(place, "loss")[1] == pytest.approx((one + 0.5 * two) / 1.5, rel=1e-5)


@pytest.mark.parametrize(
    ("column", "value"),
    [("weight", -1), ("weight", "much"), ("weight", float("inf")), ("margin", True), ("margin", -0.5)],
)
def test_a_weight_or_margin_that_is_no_number_is_refused_with_its_row(still, column, value):
    from rlhf_nb.training.rankings import margin, weight

    row = {**pairs(1)[0], column: value}
    with pytest.raises(DataError, match=rf"row 3: {column}=.*; a {column} is a finite number ≥ 0"):
        margin(row, "row 3") if column == "margin" else weight(row, {}, "row 3")


def test_a_weight_for_nobody_is_refused(still):
    rows = [{**row, "annotator": "ida"} for row in pairs(3)]
    with pytest.raises(SpecError, match='annotator_weights: no row is by "idaa"; did you mean "ida"'):
        still("reward", rows, config={**CONFIG, "annotator_weights": {"idaa": 2.0}})
    with pytest.raises(SpecError, match='no row is by "ida"  no row names its annotator'):
        still("reward", pairs(3), name="b", config={**CONFIG, "annotator_weights": {"ida": 2.0}})
    with pytest.raises(SpecError, match="plackett_luce has no margins"):
        rows = [{**row, "margin": 1.0} for row in pairs(3)]
        still("reward", rows, name="c", config={**CONFIG, "loss_type": "plackett_luce"})


# --- what is left out -------------------------------------------------------------------------------------------------


def test_prompts_without_a_strict_comparison_and_what_is_too_long_are_dropped_and_counted(still):
    a, b, c, d = rankings(4)
    rows = [
        dict(a, ranks=[1, 1, 1, 1]),
        dict(b, completions=["Same.", "Same. ", "Other."], ranks=[0, 1, 1]),
        dict(c, completions=["Same.", "Same. "], ranks=[0, 1]),
        dict(d, completions=["Short.", "long " * 80, "Fine."], ranks=[0, 1, 2]),
        dict(d, completions=["Short.", "long " * 80], ranks=[0, 1]),
    ]
    place = still("reward", rows, config={**CONFIG, "batch_size": 1}, kind="rankings")
    assert notice(place, "rows_dropped") == (
        "of 5 rankings, left out: 2 rankings without a strict comparison, 2 completions that do not fit, "
        "1 rankings that do not fit"
    )
    # b: Same against Other, and Other with the second Same, a tie that is no copy; d: Short against Fine.
    assert notice(place, "comparisons").startswith("3 comparisons of 5 completions to 2 prompts")
    with pytest.raises(DataError, match="none of the 1 rankings can be trained on"):
        still("reward", rows[:1], name="none", config=CONFIG, kind="rankings")


def test_a_copy_with_the_same_rank_leaves_its_ranking_and_with_another_rank_stays(tiny_model):
    from rlhf_nb.training.rankings import prepare

    tokenizer = load_tokenizer(str(tiny_model))
    ranked = {"prompt": "p", "completions": ["A", "A ", "B", "A"], "ranks": [0, 0, 1, 2]}
    ((item,), dropped) = prepare([ranked], "rankings", tokenizer, max_length=300)
    assert dropped == {"repeated completions": 1}
    assert [len(item.ids), item.ranks, item.comparisons] == [3, [0.0, 1.0, 2.0], [(0, 1, 1.0), (1, 2, 1.0)]]
    ((twice,), _) = prepare(
        [{**ranked, "completions": ["A", "A", "B"], "ranks": [0, 0, 1]}], "rankings", tokenizer, max_length=300
    )
    ((single,), _) = prepare(
        [{**ranked, "completions": ["A", "B"], "ranks": [0, 1]}], "rankings", tokenizer, max_length=300
    )
    assert twice == single


def test_oasst_rankings_are_imported_and_fitted_better_than_chance(still, shared_data, trace):
    found = read_rows(shared_data / "prefs/oasst_rankings_trees0_59.jsonl.gz")
    assert (found.kind, len(found.rows)) == ("rankings", 122)
    strict, dropped = rankings_to_pairs(found.rows)
    assert len(strict) + sum(dropped.values()) == 446
    # The 30 shortest, so that a byte-level tokenizer gets by.
    short = sorted(found.rows, key=lambda row: sum(map(len, row["completions"])) + len(json.dumps(row["prompt"])))[:30]
    config = {**CONFIG, "max_steps": 12, "max_length": 500, "learning_rate": 3e-2, "optimizer": "adamw"}
    place = still("reward", short, config=config, kind="rankings")
    assert sum(list(trace(place, "pairs/accuracy").values())[-4:]) / 4 > 0.6


def test_what_a_conversion_left_out_is_said_at_the_start_of_the_run(still):
    place = still.prepare("reward", pairs(4), config=CONFIG)
    spec = place.spec()
    said = "4 pairs from 2 rankings of mine; dropped 2: equal ranks (2)"
    data = spec.data.model_copy(update={"converted": said})
    place.spec_path.write_text(spec.model_copy(update={"data": data}).model_dump_json())
    assert notice(still.run(place), "rows_converted") == said
