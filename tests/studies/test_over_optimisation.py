"""The study of over-optimisation: planted results are read back, what failed stays in, what is committed is whole."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET

import pytest

from rlhf_nb.maths.best_of_n import kl_bound
from rlhf_nb.studies import over_optimisation as study
from rlhf_nb.ui.over_optimisation import BEST_OF_N as BEST_OF_N_LOOK
from rlhf_nb.ui.over_optimisation import COLOURS, MARKERS, OverOptimisation
from rlhf_nb.ui.svg import dot

A, B = 0.1, 0.09
FURTHEST = {0.0001: 5.0, 0.01: 4.0, 0.05: 2.5, 0.2: 1.5}
LOOSE, BEST_OF_N = study.Setting(0.0001), study.Setting(None)


def planted(seed: int) -> dict:
    """True reward 0.7 + d(A − B·log d) for PPO and 0.6 + d(A − B·d) for best-of-n; the proxy rises by d of its std."""

    def rollouts(furthest: float) -> dict:
        points = study.PPO["max_steps"] // 4 // study.ROLLOUTS_A_POINT
        d = [furthest * (1 + point) / points for point in range(points) for _ in range(study.ROLLOUTS_A_POINT)]
        return {
            "kl": [x * x for x in d],
            "true": [0.7 + x * (A - B * math.log(x)) for x in d],
            "proxy": [1 + 2 * x for x in d],
            "length": [20.0] * len(d),
        }

    best = []
    for n in study.BEST_OF:
        d = math.sqrt(kl_bound(n))
        best.append({"n": n, "kl_bound": kl_bound(n), "true": 0.6 + d * (A - B * d), "proxy": 3 + 2 * d})
    return {
        "seed": seed,
        "proxy": {"accuracy": 0.7 + seed / 100, "longer_accuracy": 0.6, "n": 400},
        "start": {"proxy": 1.0, "proxy_std": 2.0, "true": 0.7, "true_std": 0.2},
        "best_of": best,
        "ppo": [
            {"kl_coef": kl_coef, "state": "finished", "reason": "", "rollouts": rollouts(furthest)}
            for kl_coef, furthest in FURTHEST.items()
        ],
    }


@pytest.fixture
def results() -> dict:
    made_with = {"commit": "0123456789abcdef", "began": "2026-01-01 00:00 UTC", "machine": "abacus"}
    return {"made_with": made_with, "seeds": [planted(seed) for seed in range(3)]}


@pytest.mark.parametrize("setting", study.settings(), ids=lambda setting: setting.name)
def test_planted_laws_come_back(results, setting):
    found = study.fits(results, setting, "true").fit
    assert (found.a, found.b) == pytest.approx((A, B))
    proxy = study.fits(results, setting, "proxy").fit
    assert (proxy.a, proxy.b) == pytest.approx((1, 0), abs=1e-9), "in standard deviations of toy-sft's scores"


def test_a_point_is_the_root_of_a_mean_kl_and_less_the_start(results):
    run = results["seeds"][0]["ppo"][0]
    run["rollouts"] = {
        "kl": [0, 1, 2, 3, 14, 99],
        "true": [0.7, 0.7, 0.7, 0.7, 1.2, 99],
        "proxy": [1] * 6,
        "length": [9] * 6,
    }
    assert study.curve(results["seeds"][0], LOOSE, "true") == ([2.0], [pytest.approx(0.1)]), "a part of a point is none"


def test_best_of_n_is_told_against_its_own_prompts(results):
    distance, true = study.curve(results["seeds"][0], BEST_OF_N, "true")
    assert (distance[0], true[0]) == (0, 0) and distance[-1] == pytest.approx(math.sqrt(math.log(64) - 63 / 64))
    assert true[-1] == pytest.approx(distance[-1] * (A - B * distance[-1])), "0.6 at n=1, not the 0.7 of all prompts"


def test_a_kl_that_chance_took_below_zero_is_left_out_of_the_fit(results):
    rollouts = results["seeds"][0]["ppo"][0]["rollouts"]
    rollouts["kl"][: study.ROLLOUTS_A_POINT] = [-0.5] * study.ROLLOUTS_A_POINT
    whole = study.fits(results, LOOSE, "true").fit
    assert math.isnan(study.curve(results["seeds"][0], LOOSE, "true")[0][0])
    assert (whole.a, whole.n) == (pytest.approx(A), 3 * 10 - 1)


def test_a_run_that_failed_stays_in_with_what_it_had(results):
    run = results["seeds"][1]["ppo"][0]
    run |= {"state": "failed", "reason": "loss is not finite"}
    for values in run["rollouts"].values():
        del values[12:]
    (row,) = [row for row in study.ends_table(results) if row["at the end of"] == LOOSE.name]
    assert (row["failed"], row["seeds"]) == (1, 3)
    assert study.fits(results, LOOSE, "true").fit.n == 10 + 2 + 10


def test_tables_and_picture_name_every_setting_with_units_and_peaks(results):
    ends, fits = study.ends_table(results), study.fits_table(results)
    assert len(ends) == 5 and len(fits) == 10 and "√KL (√nats)" in repr(ends)
    (loose,) = [row for row in fits if row["setting"] == LOOSE.name and row["reward"] == "true"]
    assert loose["d* (√nats)"].startswith(f"{math.exp(A / B - 1):.3g} [")
    (proxy,) = [row for row in fits if row["setting"] == LOOSE.name and row["reward"] == "proxy"]
    assert proxy["R(d*)"] == "" and ("none" in proxy["d* (√nats)"] or "> 5" in proxy["d* (√nats)"])
    said = " | ".join(text.text or "" for text in ET.fromstring(OverOptimisation(results).svg).iter() if text.text)
    for part in (
        *(setting.name for setting in study.settings()),
        "√KL to toy-sft (√nats)",
        "0123456789",
        "upper bound",
    ):
        assert part in said, part


def test_two_settings_differ_by_colour_and_by_shape():
    colours, markers = [*COLOURS, BEST_OF_N_LOOK[0]], [*MARKERS, BEST_OF_N_LOOK[1]]
    assert len(study.settings()) == 5 == len(set(colours))
    assert len({dot(marker, 10, 10, 3, "") for marker in markers}) == 5


def test_a_peak_beyond_the_data_is_neither_drawn_nor_told_as_one(results):
    near = study.Setting(0.2)
    with_it = OverOptimisation(results).svg
    for of_seed in results["seeds"]:
        rollouts = of_seed["ppo"][study.KL_COEFS.index(0.2)]["rollouts"]
        for name, values in rollouts.items():
            rollouts[name] = values[: 5 * study.ROLLOUTS_A_POINT]
    found = study.fits(results, near, "true").fit
    assert found.peak.distance > found.furthest
    (row,) = [row for row in study.fits_table(results) if row["setting"] == near.name and row["reward"] == "true"]
    assert row["d* (√nats)"].startswith("> ") and row["R(d*)"] == ""
    big = re.compile(r'r="5.5"')  # kl_coef 0.2 is the circle
    assert len(big.findall(with_it)) == 1 and not big.search(OverOptimisation(results).svg)


def test_the_committed_results_are_whole_and_of_the_frozen_settings():
    results = study.load()
    assert results["settings"] == json.loads(json.dumps(study.SETTINGS))
    assert results["made_with"]["uncommitted"] == ""
    assert [of_seed["seed"] for of_seed in results["seeds"]] == list(study.SEEDS)
    for of_seed in results["seeds"]:
        assert [run["kl_coef"] for run in of_seed["ppo"]] == list(study.KL_COEFS)
        assert [row["n"] for row in of_seed["best_of"]] == list(study.BEST_OF)
        for run in of_seed["ppo"]:
            rollouts = study.PPO["max_steps"] // 4
            assert run["state"] != "finished" or {len(values) for values in run["rollouts"].values()} == {rollouts}
