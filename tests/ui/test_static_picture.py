"""The still picture: what a notebook shows with no kernel."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from rlhf_nb.protocol.events import Failed
from rlhf_nb.protocol.fold import RunFold
from rlhf_nb.ui.static_picture import draw
from rlhf_nb.ui.svg import bounds, thin, ticks

SVG = "{http://www.w3.org/2000/svg}"


def words(svg: str) -> str:
    return " | ".join(text.text or "" for text in ET.fromstring(svg).iter(f"{SVG}text"))


def test_it_names_axes_units_interventions_and_the_run(ppo, run):
    ppo(40)
    run.set("learning_rate", 3e-4, why="too slow")
    run.step(41, loss=0.2)
    said = words(draw(run.fold, "ppo-7", title="toy-sft → rm-2", content="0123456789ab"))
    for part in (
        "ppo-7 · toy-sft → rm-2",
        "√KL to the reference (√nats)",
        "proxy reward",
        "true reward",
        "optimizer step",
        "KL to reference (nats)",
        "◆ step 41: learning_rate 0.0001 → 0.0003 (alice), too slow",
        "run ppo-7 · spec 0123456789ab",
        "step 41 of 400",
    ):
        assert part in said, part


def test_hostile_text_stays_text(ppo, run):
    ppo(5)
    run.emit(Failed(reason="<script>alert(1)</script>", log_tail=[]))
    svg = draw(run.fold, "<b>", title="</svg><img src=x onerror=alert(1)>")
    tree = ET.fromstring(svg)
    assert {each.tag for each in tree.iter()} <= {
        f"{SVG}{tag}" for tag in ("svg", "title", "rect", "g", "text", "path", "circle")
    }


def test_a_run_with_nothing_measured_still_has_a_picture():
    assert "waiting" in words(draw(RunFold(), "sft-1"))


@pytest.mark.parametrize("values", [[], [3.0], [2.0, 2.0], [float("nan"), 1.0]])
def test_a_range_is_never_empty(values):
    low, high = bounds(values)
    assert low < high


def test_ticks_are_round_and_inside():
    assert ticks(0.0, 1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(-3.7 <= tick <= 12.1 for tick in ticks(-3.7, 12.1))


def test_a_spike_survives_thinning():
    points = [(float(step), 0.0) for step in range(10_000)]
    points[6_543] = (6_543.0, 9.0)
    kept = thin(points)
    assert (6_543.0, 9.0) in kept and len(kept) <= 800 and kept == sorted(kept)
