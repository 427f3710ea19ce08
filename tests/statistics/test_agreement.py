"""Agreement beyond chance, against published values."""

from __future__ import annotations

import gzip
import json
import math

import pytest

from rlhf_nb.errors import ShapeError
from rlhf_nb.statistics.agreement import (
    category_counts,
    cohen_kappa,
    fleiss_kappa,
    free_marginal_kappa,
    krippendorff_alpha,
    percent_agreement,
)


@pytest.fixture(scope="module")
def vectors(shared_data):
    return {
        each["name"]: each for each in json.loads((shared_data / "answer_keys" / "kappa_vectors_dev.json").read_text())
    }


def test_fleiss_matches_the_published_table(vectors):
    assert fleiss_kappa(vectors["Fleiss kappa, Wikipedia 10 items x 14 raters"]["counts"]) == pytest.approx(
        0.21, abs=0.005
    )


def test_fixed_and_free_marginals_match_statsmodels(vectors):
    case = vectors["Fleiss tiny"]
    assert fleiss_kappa(case["counts"]) == pytest.approx(case["expected_fixed_marginal"], abs=1e-6)
    assert free_marginal_kappa(case["counts"]) == pytest.approx(case["expected_free_marginal"], abs=1e-6)


@pytest.mark.parametrize("level", ["nominal", "ordinal", "interval"])
def test_krippendorff_matches_the_published_example(vectors, level):
    case = vectors["Krippendorff alpha, Wikipedia example"]
    assert krippendorff_alpha(case["raters"], level) == pytest.approx(case["expected"][level], abs=5e-4)
    if level in case["exact"]:
        assert krippendorff_alpha(case["raters"], level) == pytest.approx(case["exact"][level], abs=1e-6)


@pytest.mark.parametrize("model", ["gpt4", "llama2orig"])
def test_xstest_matches_what_its_authors_published(shared_data, model):
    key = json.loads((shared_data / "answer_keys" / "xstest_agreement_dev.json").read_text())[model]
    path = shared_data / "agreement" / "xstest_2annotators_gpt4_llama2orig.jsonl.gz"
    rows = [row for row in map(json.loads, gzip.open(path, "rt")) if row["model"] == model]
    one, other = [row["annotation_1"] for row in rows], [row["annotation_2"] for row in rows]
    recomputed = key["recomputed_here"]
    kappa = fleiss_kappa(category_counts(list(zip(one, other, strict=True))))
    assert round(100 * percent_agreement(one, other), 1) == key["published"]["agreement_pct"]
    assert round(kappa, 2) == key["published"]["fleiss_kappa"]
    assert kappa == pytest.approx(recomputed["fleiss_kappa"], abs=1e-6)
    assert cohen_kappa(one, other) == pytest.approx(recomputed["cohen_kappa"], abs=1e-6)
    names = sorted(set(one + other))
    numbers = [[names.index(label) for label in labels] for labels in (one, other)]
    assert krippendorff_alpha(numbers) == pytest.approx(recomputed["krippendorff_alpha_nominal"], abs=1e-6)


def test_cohen_worked_example():
    # 20 agree on yes, 15 on no, of 50: observed 0.7; yes 25 and 30, no 25 and 20: expected 0.5 -> 0.4
    one = ["y"] * 25 + ["n"] * 25
    other = ["y"] * 20 + ["n"] * 5 + ["y"] * 10 + ["n"] * 15
    assert cohen_kappa(one, other) == pytest.approx(0.4)


def test_full_agreement_is_one_and_full_disagreement_of_two_is_minus_one():
    assert cohen_kappa("abab", "abab") == fleiss_kappa([[2, 0], [0, 2]]) == krippendorff_alpha([[1, 2], [1, 2]]) == 1.0
    assert cohen_kappa("abab", "baba") == fleiss_kappa([[1, 1], [1, 1]]) == -1.0


def test_one_category_throughout_has_no_kappa():
    assert math.isnan(cohen_kappa("aaa", "aaa"))
    assert math.isnan(fleiss_kappa([[2, 0], [2, 0]]))
    assert math.isnan(krippendorff_alpha([[1, 1], [1, 1]]))


def test_what_has_no_agreement_is_refused():
    for one, other in (("ab", "a"), ("", "")):
        with pytest.raises(ShapeError, match="labels: agreement needs the same items"):
            cohen_kappa(one, other)
    for counts in ([[2, 0], [1, 0]], [[1, 0]], [], [2, 3]):
        with pytest.raises(ShapeError):
            fleiss_kappa(counts)
    with pytest.raises(ShapeError, match="no item has labels from two annotators"):
        krippendorff_alpha([[1, None], [None, 2]])
    with pytest.raises(ShapeError, match="level='ratio'"):
        krippendorff_alpha([[1, 2], [1, 2]], "ratio")
