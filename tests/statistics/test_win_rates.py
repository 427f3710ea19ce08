"""Win rates and accuracy: ties count one half, and the null is beside."""

from __future__ import annotations

import pytest

from rlhf_nb.errors import ShapeError
from rlhf_nb.statistics.accuracy import pick_the_longer, preference_accuracy, preference_hits
from rlhf_nb.statistics.intervals import wilson
from rlhf_nb.statistics.win_rates import win_rate


def test_a_tie_counts_one_half():
    assert win_rate(3, 1, 2).value == 4 / 6
    assert win_rate(0, 0, 5).value == 0.5


def test_swapping_the_sides_mirrors_the_win_rate_and_its_interval():
    one, other = win_rate(7, 2, 3), win_rate(2, 7, 3)
    assert one.value == pytest.approx(1 - other.value)
    assert one.interval.low == pytest.approx(1 - other.interval.high)


def test_without_ties_the_interval_is_wilsons():
    assert win_rate(4, 2).interval == wilson(4, 6)


def test_no_comparisons_and_negative_counts_are_refused():
    with pytest.raises(ShapeError, match="0 comparisons"):
        win_rate(0, 0)
    with pytest.raises(ShapeError, match="cannot be negative"):
        win_rate(3, -1)


def test_accuracy_is_the_share_scored_higher():
    estimate = preference_accuracy([2.0, 1.0, 0.0, 5.0], [1.0, 2.0, 0.0, -1.0])
    assert (estimate.value, estimate.n) == (2.5 / 4, 4)
    assert list(preference_hits([2.0, 1.0, 0.0], [1.0, 2.0, 0.0])) == [1, 0, 0.5]


def test_scores_that_are_not_finite_or_not_paired_are_refused():
    with pytest.raises(ShapeError, match="pair 1 has a score that is not finite"):
        preference_accuracy([1.0, float("nan")], [0.0, 0.0])
    for chosen, rejected in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(ShapeError, match="1 of each is needed"):
            preference_accuracy(chosen, rejected)


def test_the_null_picks_the_longer_text():
    estimate = pick_the_longer(["long one", "ab", "same"], ["short", "abc", "four"])
    assert (estimate.value, estimate.n) == (0.5, 3)


def test_in_the_hh_harmless_pairs_people_preferred_the_shorter(shared_data):
    from rlhf_nb.data.importers import read_rows

    rows = read_rows(shared_data / "prefs" / "hh_harmless_0000_1499.jsonl.gz").rows
    estimate = pick_the_longer([row["chosen"] for row in rows], [row["rejected"] for row in rows])
    longer = sum(len(row["chosen"]) > len(row["rejected"]) for row in rows)
    equal = sum(len(row["chosen"]) == len(row["rejected"]) for row in rows)
    assert estimate.value == (longer + equal / 2) / 1495
    assert estimate.interval.high < 0.5
