"""Completions as rows: which chance draws them, what is kept, and what a death in the middle changes (nothing)."""

from __future__ import annotations

from itertools import combinations
from math import log
from statistics import mean

import pytest

from rlhf_nb.compute.rundir import append_line
from rlhf_nb.data.rows import content_hash, decode_rows
from rlhf_nb.errors import DataError, SpecError
from rlhf_nb.methods.generate import STREAM, Generate, Generator
from rlhf_nb.protocol.control import Stop
from rlhf_nb.protocol.spec import CombinedReward, FunctionReward, RewardPart, RunData, RunSpec
from rlhf_nb.training.data import load_rows

PROMPTS = [{"prompt": f"Where is house {i}?", "answer": f"{i}"} for i in range(5)]
CONFIG = {"n": 3, "max_new_tokens": 6, "batch_size": 6, "temperature": 0.8, "seed": 7}
"""Two prompts a chunk: three chunks, the last of one."""


def rows_of(place):
    return decode_rows(place.rows_path.read_bytes())


def saved(place):
    (event,) = [event for event in place.events() if event.kind == "data_saved"]
    return event


def test_every_prompt_keeps_its_columns_and_gets_n_completions(job):
    place = job("generate", PROMPTS, config=CONFIG)
    rows = rows_of(place)
    assert [(row["prompt"], row["answer"]) for row in rows] == [(p["prompt"], p["answer"]) for p in PROMPTS]
    assert all(len(row["completions"]) == 3 and "scores" not in row for row in rows)
    event = saved(place)
    assert (event.row_kind, event.rows, event.content_hash) == ("completions", 5, content_hash(rows))
    assert event.summary == "5 rows, 3 completions a prompt by tiny, temperature 0.8, seed 7"
    cut = sum(not ended for row in rows for ended in row["completion_ended"])
    assert event.counts.get("cut at max_new_tokens", 0) == cut > 0
    assert all((length == 6) or ended for row in rows for length, ended in
               zip(row["completion_lengths"], row["completion_ended"], strict=True))  # fmt: skip
    assert (place.events()[-1].kind, place.events()[-1].outcome) == ("training_ended", "finished")
    assert not place.model.exists()


def test_a_completion_is_the_inverse_of_the_models_distribution_at_its_own_uniform_numbers(job, tiny_model):
    import torch

    from rlhf_nb.training import data, models
    from rlhf_nb.training.rollout.base import uniforms

    rows = rows_of(job("generate", PROMPTS, config=CONFIG))
    model, tokenizer = models.load_model(str(tiny_model)).eval(), models.load_tokenizer(str(tiny_model))
    for prompt, k in ((4, 0), (2, 1), (3, 2)):
        ids = data.prompt_ids(PROMPTS[prompt]["prompt"], tokenizer)
        said: list[int] = []
        for chance in uniforms(7, STREAM + k, [prompt], 6)[0]:
            with torch.no_grad():
                logits = model(torch.tensor([ids + said])).logits[0, -1].double() / 0.8
            said.append(int((logits.softmax(0).cumsum(0) <= chance).sum()))
            if said[-1] == tokenizer.eos_token_id:
                break
        assert rows[prompt]["completions"][k] == tokenizer.decode(said, skip_special_tokens=True).strip()
        assert rows[prompt]["completion_lengths"][k] == len(said)


def test_a_larger_n_keeps_what_a_smaller_one_drew(job):
    few = rows_of(job("generate", PROMPTS, name="few", config={**CONFIG, "n": 1}))
    many = rows_of(job("generate", PROMPTS, name="many", config=CONFIG))
    other = rows_of(job("generate", PROMPTS, name="other", config={**CONFIG, "n": 1, "seed": 8}))
    assert [row["completions"] for row in few] == [row["completions"][:1] for row in many]
    assert [row["completions"] for row in few] != [row["completions"] for row in other]
    assert len({tuple(row["completions"]) for row in many}) == 5


@pytest.mark.parametrize("torn", [False, True])
def test_killed_between_two_chunks_it_goes_on_there_and_gives_the_same_rows(job, monkeypatch, torn):
    whole = job("generate", PROMPTS, name="whole", config=CONFIG)
    make, asked = Generator.make, []

    def dies(self, start, rows):
        if start == 4:
            raise KeyboardInterrupt
        return make(self, start, rows)

    place = job.prepare("generate", PROMPTS, name="killed", config=CONFIG)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Generator, "make", dies)
        job.run(place)
    assert not place.rows_path.exists()
    journal = place.data / "made-0.jsonl"
    if torn:
        journal.write_bytes(journal.read_bytes()[:-20])
    monkeypatch.setattr(Generator, "make", lambda self, start, rows: asked.append(start) or make(self, start, rows))
    job.run(place, attempt=2)
    assert asked == ([2, 4] if torn else [4])
    assert place.rows_path.read_bytes() == whole.rows_path.read_bytes()
    assert saved(place).counts == saved(whole).counts


def test_stopped_it_saves_the_rows_it_has_and_resumed_it_makes_the_rest(job, monkeypatch):
    whole = job("generate", PROMPTS, name="whole", config=CONFIG)
    place = job.prepare("generate", PROMPTS, name="stopped", config=CONFIG)
    make = Generator.make

    def stops(self, start, rows):
        append_line(place.control_path, Stop().model_dump(mode="json"))
        return make(self, start, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Generator, "make", stops)
        job.run(place)
    assert rows_of(place) == rows_of(whole)[:2]
    assert saved(place).rows == 2
    assert [event.outcome for event in place.events() if event.kind == "training_ended"] == ["stopped"]
    job.run(place, attempt=2)
    assert place.rows_path.read_bytes() == whole.rows_path.read_bytes()


def test_completions_are_scored_by_the_weighted_sum_of_the_rewards(job):
    length = FunctionReward(
        name="length", source="def f(prompts, completions, answer):\n    return [len(c) for c in completions]"
    )
    number = FunctionReward(
        name="number", source="def f(prompts, completions, answer):\n    return [float(a) for a in answer]"
    )
    parts = (RewardPart(reward=length, weight=-0.5), RewardPart(reward=number, weight=2.0))
    place = job("generate", PROMPTS, config=CONFIG, reward=CombinedReward(parts=parts))
    for index, row in enumerate(rows_of(place)):
        assert row["scores"] == pytest.approx([2 * index - 0.5 * len(text) for text in row["completions"]])
    assert saved(place).summary.endswith("scored by length + number")


LENGTH = FunctionReward(
    name="length", source="def f(prompts, completions, **c):\n    return [len(x) for x in completions]"
)
VOWELS = FunctionReward(
    name="vowels",
    source="def f(prompts, completions, **c):\n    return [sum(x in 'aeiou' for x in y) for y in completions]",
)


def test_the_results_are_the_mean_of_the_maximum_over_every_subset(job):
    place = job("generate", PROMPTS, config=CONFIG, reward=LENGTH, gold=VOWELS)
    rows = rows_of(place)
    assert all(len(row["golds"]) == 3 for row in rows)
    results = {event.detail["best_of"]: event for event in place.events() if event.kind == "result"}
    assert list(results) == [1, 2, 3]
    for n, result in results.items():
        of = [[max(subset) for subset in combinations(row["scores"], n)] for row in rows]
        assert result.value == pytest.approx(mean(map(mean, of)), rel=1e-12)
        assert result.interval[0] <= result.value <= result.interval[1]
        assert result.detail["kl_bound"] == pytest.approx(log(n) - (n - 1) / n)
    assert results[1].detail["gold"] == pytest.approx(mean(map(mean, (row["golds"] for row in rows))))


@pytest.mark.parametrize(("keep", "kind"), [("best", "demonstrations"), ("best_and_worst", "pairs")])
def test_what_is_kept_are_the_ends_of_what_was_drawn(job, keep, kind):
    drawn = rows_of(job("generate", PROMPTS, name="all", config=CONFIG, reward=LENGTH))
    place = job("generate", PROMPTS, name=keep, config={**CONFIG, "keep": keep}, reward=LENGTH)
    kept = {row["prompt"]: row for row in rows_of(place)}
    event = saved(place)
    assert (event.row_kind, event.rows) == (kind, len(kept))
    assert len(kept) + sum(event.dropped.values()) == len(PROMPTS)
    for row in drawn:
        if (one := kept.get(row["prompt"])) is None:
            continue
        assert one.get("completion", one.get("chosen")) == max(row["completions"], key=len)
        assert keep == "best" or one["rejected"] == min(row["completions"], key=len)
        assert one["answer"] == row["answer"]
    assert event.summary.endswith(f"scored by length, keep={keep}")


def test_nothing_left_to_keep_is_said_with_the_reasons(job):
    flat = FunctionReward(
        name="flat", source="def f(prompts, completions, **c):\n    return [0.0 for _ in completions]"
    )
    with pytest.raises(DataError, match="no row is left of 5 \\(5 prompts whose completions all score the same\\)"):
        job("generate", PROMPTS, config={**CONFIG, "keep": "best"}, reward=flat)


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"keep": "threshold"}, "keep=threshold and threshold=None"),
        ({"threshold": 1.0}, "keep=all and threshold=1.0: threshold goes with threshold"),
        ({"keep": "best", "n": 1}, "keep=best of n=1: give n=2 or more"),
        ({"keep": "top_fraction"}, "keep=top_fraction and fraction=None"),
    ],
)
def test_keeping_that_makes_no_sense_is_refused_before_the_start(knobs, says):
    method = Generate.create(**knobs)
    spec = RunSpec(run_id="r", workspace_id="w", method="generate", config={}, created=0.0, reward=LENGTH)
    with pytest.raises(SpecError, match=says):
        method.check(spec)
    with pytest.raises(SpecError, match="keep=best goes by a score; give --reward"):
        Generate.create(keep="best").check(spec.model_copy(update={"reward": None}))


def test_rows_a_run_made_are_the_next_runs_rows_or_its_prompts(job):
    place = job("generate", PROMPTS, name="generate-1", config=CONFIG)
    reference = RunData(run_id="generate-1", row_kind="completions")
    assert load_rows(reference, job.root, "completions", runs_root=job.root) == rows_of(place)
    assert load_rows(reference, job.root, "prompts", runs_root=job.root) == PROMPTS
    with pytest.raises(DataError, match='"generate-1" holds completions, and this method trains on pairs'):
        load_rows(reference, job.root, "pairs", runs_root=job.root)
    with pytest.raises(DataError, match="run generate-2 has no rows at"):
        load_rows(reference.model_copy(update={"run_id": "generate-2"}), job.root, "prompts", runs_root=job.root)


def test_no_room_for_a_prompt_is_refused_and_a_long_prompt_is_cut_and_counted(job):
    with pytest.raises(SpecError, match="max_new_tokens=600 leaves no room"):
        job("generate", PROMPTS, name="a", config={**CONFIG, "max_new_tokens": 600})
    rows = [{"prompt": "why " * 300}, PROMPTS[0]]
    place = job("generate", rows, name="b", config=CONFIG)
    assert saved(place).counts["prompts cut at the model's context"] == 1
