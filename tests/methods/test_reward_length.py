"""Labels that reward length: what the length term explains is not learnt as quality."""

from __future__ import annotations

import math
import random

import pytest
import torch

from rlhf_nb.maths.rankings import length_correlation
from rlhf_nb.rewards.model import RewardModelScorer
from rlhf_nb.training.ranking_loss import LengthTerm

BIAS = 2.0
"""Nats by which an annotator of the planted world prefers what is four words longer; quality is worth 2."""


def text(good: bool, words: int) -> str:
    return "so " * words + ("yes" if good else "no!")


EVERY = [(good, words) for good in (False, True) for words in range(1, 11)]


def biased_pairs(n: int) -> list[dict]:
    rng = random.Random(0)
    rows = []
    while len(rows) < n:
        a, b = rng.sample(EVERY, 2)
        odds = 2.0 * (a[0] - b[0]) + BIAS * (a[1] - b[1]) / 4
        better, worse = (a, b) if rng.random() < 1 / (1 + math.exp(-odds)) else (b, a)
        rows.append({"prompt": "Is it?", "chosen": text(*better), "rejected": text(*worse)})
    return rows


def measured(place) -> tuple[float, float]:
    """Correlation of score and length, and accuracy on true quality, over all there is to say."""
    scores = RewardModelScorer.load(str(place.model)).score(["Is it?"] * len(EVERY), [text(*each) for each in EVERY])
    lengths = torch.tensor([float(words) for _, words in EVERY])
    one_prompt = torch.zeros(len(EVERY), dtype=torch.long)
    bad, good = scores[:10], scores[10:]
    hits = [g > b for g in good for b in bad]
    return length_correlation(torch.tensor(scores), lengths, one_prompt, 1).item(), sum(hits) / len(hits)


def test_the_length_term_takes_the_length_and_leaves_the_quality(job, tiny_model_maker, trace):
    job.model = tiny_model_maker("still", dropout=0.0)
    config = {"max_steps": 50, "batch_size": 32, "learning_rate": 3e-3, "max_length": 100}
    rows = biased_pairs(400)
    biased, accuracy = measured(job("reward", rows, name="biased", config=config))
    place = job("reward", rows, name="fair", config={**config, "length_debias": 1.0})
    fair, fair_accuracy = measured(place)
    assert biased > 0.6 and abs(fair) < 0.3
    assert accuracy < 0.9 and fair_accuracy > 0.95
    # BIAS / 4 nats a word, times the standard deviation of half the difference of two lengths: √(2 · 8.25) / 2 words.
    assert trace(place, "length/term")[50] == pytest.approx(BIAS / 4 * math.sqrt(16.5) / 2, rel=0.3)


def test_the_first_loss_is_the_likelihood_and_the_squared_slope(job, tiny_model_maker, trace):
    job.model = tiny_model_maker("still", dropout=0.0)
    rows = biased_pairs(4)
    weight = 1e6  # a new head's scores hardly differ
    config = {"max_steps": 1, "batch_size": 4, "learning_rate": 0.0, "max_length": 100, "length_debias": weight}
    place = job("reward", rows, config=config)
    scorer = RewardModelScorer.load(str(place.model))
    texts = ([row[side] for row in rows] for side in ("chosen", "rejected"))
    chosen, rejected = (torch.tensor(scorer.score(["Is it?"] * 4, each)) for each in texts)
    # One byte a token: half the difference in characters is a completion's distance from its pair's mean.
    half = torch.tensor([(len(row["chosen"]) - len(row["rejected"])) / 2 for row in rows])
    half = half / half.square().mean().sqrt()
    slope = ((chosen - rejected) / 2 * half).sum() / half.square().sum()
    fit = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
    assert trace(place, "loss")[1] == pytest.approx((fit + weight * slope**2).item(), rel=1e-3)
    assert weight * slope**2 > 0.01 * fit


def test_with_scores_that_stay_the_length_term_is_the_maximum_likelihood():
    # 30 of 40 prefer the longer one, ±1 standard deviation: log odds γ·2 = log 3.
    term = LengthTerm(2)
    won, lost = torch.tensor([30.0, 10.0]), torch.tensor([10.0, 30.0])

    def loss(term_M: torch.Tensor) -> torch.Tensor:
        logsigmoid = torch.nn.functional.logsigmoid
        return -(won * logsigmoid(2 * term_M) + lost * logsigmoid(-2 * term_M)) / 40

    for _ in range(200):
        term.add(term.derivatives(loss, torch.zeros(1, dtype=torch.float64)))
        term.step()
    assert term.value_M == pytest.approx([math.log(3) / 2, -math.log(3) / 2], abs=1e-6)


def test_micro_batches_count_once_their_step_is_over():
    whole, parts = LengthTerm(1), LengthTerm(1)
    halves = [torch.tensor([[0.3], [0.2]]), torch.tensor([[0.1], [0.6]])]
    whole.add((halves[0] + halves[1]) / 2)
    whole.step()
    parts.add(halves[0])
    assert parts.value_M == [0.0]
    parts.add(halves[1])
    parts.step()
    assert parts.value_M == pytest.approx(whole.value_M)
    assert parts.value_M == pytest.approx([-0.5])
    for _ in range(50):
        parts.add(torch.tensor([[-1.0], [1e-3]]))
        parts.step()
    assert parts.value_M == [10.0], "what length alone separates has no finite term"
