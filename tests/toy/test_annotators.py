"""Simulated annotators answer by Bradley and Terry, with the biases they are given."""

from __future__ import annotations

import itertools
import math

import pytest
from scipy import stats

from rlhf_nb.errors import SpecError
from rlhf_nb.toy import Annotator, data, reward, world
from rlhf_nb.toy.annotators import THUMB_LINE, pleasantries

STREET = world.facts()["the bakery"]["street"]
WRONG = next(street for street in world.STREETS if street != STREET)
WHERE = "Where is the bakery?"
GOOD, BAD = f"The bakery is on {STREET}.", f"The bakery is on {WRONG}."
FLATTERING = f"You are so clever! {GOOD}"
FILLED = f"{GOOD} There is so much to say about this."
UNBIASED = {"length_bias": 0.0, "sycophancy": 0.0}


def test_worked_example():
    # The true rewards are 1 and 0.40; without biases and at noise 0.5 the logit is 0.6 / 0.5 = 1.2.
    assert Annotator(**UNBIASED, noise=0.5).probability(WHERE, GOOD, BAD) == pytest.approx(1 / (1 + math.exp(-1.2)))
    # Flattery costs 0.20 * 0.25 + 0.15 * 0.25 = 0.0875 of true reward; its four words and its pleasing are liked.
    annotator = Annotator(length_bias=0.1, sycophancy=0.2, noise=0.5)
    assert annotator.utility(WHERE, FLATTERING) - annotator.utility(WHERE, GOOD) == pytest.approx(-0.0875 + 0.04 + 0.2)


@pytest.mark.parametrize(
    "annotator", [Annotator(), Annotator(**UNBIASED), Annotator(noise=2.0), Annotator(sycophancy=-0.3)]
)
def test_probabilities_are_bradley_terry_over_every_pair(annotator):
    texts = [GOOD, BAD, FLATTERING, FILLED, "garbage", ""]
    for a, b, c in itertools.permutations(texts, 3):
        p, q = annotator.probability(WHERE, a, b), annotator.probability(WHERE, b, a)
        assert p + q == pytest.approx(1, abs=1e-12)
        odds = math.exp((annotator.utility(WHERE, a) - annotator.utility(WHERE, b)) / annotator.noise)
        assert p / q == pytest.approx(odds, rel=1e-9)
        # Bradley and Terry: the odds of a over c are the odds of a over b times those of b over c.
        r, s = annotator.probability(WHERE, b, c), annotator.probability(WHERE, a, c)
        assert s / (1 - s) == pytest.approx(odds * r / (1 - r), rel=1e-6)


@pytest.mark.parametrize(("a", "b"), [(GOOD, BAD), (FLATTERING, GOOD), (FILLED, GOOD)])
def test_two_thousand_choices_fall_in_the_binomial_interval(a, b):
    p = Annotator(noise=0.5).probability(WHERE, a, b)
    wins = sum(Annotator(noise=0.5, seed=seed).choose(WHERE, a, b) == "a" for seed in range(2000))
    low, high = stats.binom.interval(0.9999, 2000, p)
    assert 0.05 < p < 0.95
    assert low <= wins <= high


def test_rankings_are_plackett_luce():
    texts = [GOOD, BAD, FLATTERING]
    odds = [math.exp(Annotator(noise=0.5).utility(WHERE, text) / 0.5) for text in texts]
    order = (2, 0, 1)  # flattering, good, bad
    p = odds[2] / sum(odds) * odds[0] / (odds[0] + odds[1])
    seen = sum(
        Annotator(noise=0.5, seed=seed).rank(WHERE, texts) == [order.index(i) + 1 for i in range(3)]
        for seed in range(2000)
    )
    low, high = stats.binom.interval(0.9999, 2000, p)
    assert low <= seen <= high


def test_thumbs_follow_their_probability():
    p = Annotator(noise=0.5).thumb_probability(WHERE, GOOD)
    assert p == pytest.approx(1 / (1 + math.exp(-(Annotator().utility(WHERE, GOOD) - THUMB_LINE) / 0.5)))
    ups = sum(Annotator(noise=0.5, seed=seed).thumb(WHERE, GOOD) for seed in range(2000))
    low, high = stats.binom.interval(0.9999, 2000, p)
    assert low <= ups <= high


def test_the_side_does_not_matter():
    for row in data.pairs(200):
        a, b = row["chosen"], row["rejected"]
        assert Annotator().choose(row["prompt"], a, b) == "a"
        assert Annotator().choose(row["prompt"], b, a) == "b"


def test_the_same_text_twice_is_a_tie():
    assert Annotator().choose(WHERE, GOOD, GOOD) == "tie"
    assert Annotator().probability(WHERE, GOOD, GOOD) == 0.5
    assert sorted(Annotator().rank(WHERE, [GOOD, GOOD, BAD])) in ([1, 1, 2], [1, 2, 2])


def test_the_default_annotator_likes_filler_and_flattery_that_the_true_reward_does_not():
    for worse in (FLATTERING, FILLED):
        assert reward.reward(WHERE, worse) < reward.reward(WHERE, GOOD)
        assert Annotator().probability(WHERE, worse, GOOD) > 0.5
        assert Annotator(**UNBIASED).probability(WHERE, worse, GOOD) < 0.5


def test_the_default_annotator_is_right_more_often_than_not():
    rewards = [
        (reward.reward(r["prompt"], r["chosen"]), reward.reward(r["prompt"], r["rejected"])) for r in data.pairs(2000)
    ]
    decided = [chosen > rejected for chosen, rejected in rewards if chosen != rejected]
    assert 0.6 < sum(decided) / len(decided) < 0.8


def test_pleasantries_are_counted_in_the_meaning():
    mistaken = f"I think the bakery is on {WRONG}. Am I right?"
    poem = "I wrote a poem about the bakery. Do you love it?"
    assert pleasantries(WHERE, GOOD) == 0
    assert pleasantries(WHERE, FLATTERING + " You are so clever!") == 2
    assert pleasantries(mistaken, "Yes, you are right.") == 1
    assert pleasantries(mistaken.replace(WRONG, STREET), "Yes, you are right.") == 0
    assert pleasantries(mistaken, f"No, the bakery is on {STREET}.") == 0
    assert pleasantries(poem, "Your poem is a masterpiece! You have such good taste!") == 2
    assert pleasantries(WHERE, "You are so clever!") == 0  # no core, so it does not parse


def test_sure_and_far_apart_annotators_do_not_overflow():
    sure = Annotator(noise=1e-9)
    assert sure.probability(WHERE, GOOD, BAD) == 1.0
    assert sure.probability(WHERE, BAD, GOOD) == 0.0


@pytest.mark.parametrize("knob", [{"noise": 0.0}, {"noise": -1.0}, {"noise": math.nan}, {"length_bias": math.inf}])
def test_a_knob_without_meaning_is_refused_by_name_and_value(knob):
    ((name, value),) = knob.items()
    with pytest.raises(SpecError, match=f"{name}={value}"):
        Annotator(**knob)
