"""The still picture: what a notebook shows with no kernel."""

from __future__ import annotations

import threading
import time
import xml.etree.ElementTree as ET

import pytest

from rlhf_nb.protocol.events import Failed, Finished
from rlhf_nb.protocol.fold import RunFold
from rlhf_nb.ui import static_picture
from rlhf_nb.ui.static_picture import draw, follow
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


@pytest.fixture
def outputs(monkeypatch):
    """Display ids in the order in which something was sent to them."""
    sent: list[tuple[str, str]] = []
    for name in ("display", "update_display"):
        monkeypatch.setattr(f"IPython.display.{name}", lambda _, display_id, name=name: sent.append((name, display_id)))
    monkeypatch.setattr(static_picture, "content_hash", lambda spec: "")
    monkeypatch.setattr(static_picture, "EVERY_S", 0.02)
    return sent


def keepers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "picture-ppo-7"]


def until(true) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_picture_is_sent_again_only_when_it_has_changed_and_once_for_all_its_outputs(ppo, run, outputs):
    ppo(3)
    for _ in range(3):
        follow(run)
    assert [name for name, _ in outputs] == ["display"] * 3 and len({each for _, each in outputs}) == 1
    assert len(keepers()) == 1
    time.sleep(0.2)
    assert len(outputs) == 3
    run.step(4, loss=0.1)
    until(lambda: len(outputs) == 4)
    assert outputs[3] == ("update_display", outputs[0][1])
    run.emit(Finished(step=4))
    until(lambda: not keepers())
    assert len(outputs) == 5


def test_a_picture_comes_to_its_end_with_the_run_also_where_nothing_is_heard(ppo, run, outputs):
    ppo(3)
    follow(run)
    until(lambda: run.callbacks)
    run.callbacks.clear()
    run.emit(Failed(reason="killed"))
    until(lambda: not keepers())
    assert [name for name, _ in outputs] == ["display", "update_display"]
    follow(run)
    assert not keepers() and outputs[-1][0] == "display"


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
