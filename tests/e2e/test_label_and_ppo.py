"""Label by keyboard, steer PPO by its slider, judge what it says now: the acts the product is for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

LOAD = "%load_ext rlhf_nb\n%rlhf workspace {workspace}"
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


def lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def test_pairs_are_labelled_by_keyboard_and_survive_a_kernel_restart(lab, new_page, wait_for):
    from rlhf_nb.store import Store

    folder = lab.root / "labels"
    rows = [{"prompt": f"Question {i}", "chosen": f"{HOSTILE} good {i}", "rejected": f"bad {i}"} for i in range(5)]
    make = f"from rlhf_nb import workspace\n_ = workspace.current().add_data({rows!r}, name='mine', kind='pairs')"
    page = new_page(lab)
    page.open(lab.notebook("labels.ipynb", [LOAD.format(workspace=folder), make, "%rlhf label mine --annotator mira"]))
    for cell in range(3):
        page.run_cell(cell)
    view = page.page.locator(".rlhf-labeller")
    view.wait_for(timeout=30_000)
    wait_for(lambda: "pair 1 of 5" in view.inner_text(), "the first pair")
    shown: list[tuple[str, str]] = []

    def press(key: str, done: int) -> None:
        sides = view.locator(".rlhf-side")
        shown.append((sides.nth(0).inner_text(), sides.nth(1).inner_text()))
        page.page.keyboard.press(key)
        wait_for(lambda: view.get_attribute("data-done") == str(done), f"{done} answers after {key}")
        wait_for(lambda: "saved" in view.inner_text() or "taken back" in view.inner_text(), "saved")
        inside = "() => document.querySelector('.rlhf-labeller').contains(document.activeElement)"
        assert page.page.evaluate(inside), f"focus was lost after {key}"

    view.focus()
    press("1", 1)
    press("2", 2)
    press("t", 3)
    press("u", 2)
    press("s", 3)
    with Store.open(folder) as store:
        standing = store.labels("mine-labels")
        assert [each.label.choice for each in standing][2] == "skip"
        for each, (first, second), key in zip(standing, shown, ("1", "2"), strict=False):
            chosen = first if key == "1" else second
            side = "a" if "good" in chosen else "b"
            assert each.label.choice == side, "the side was not un-randomised"
        assert all(each.label.annotator == "mira" for each in standing)
        assert len(store.label_log("mine-labels")) == 5, "undo appends, nothing is edited"
    assert page.page.title() != "owned" and page.page.locator(".rlhf-side img").count() == 0

    # JupyterLab's own single keys stay away: `d d` would delete the cell, `1` make it a heading.
    for key in "ddxa":
        page.page.keyboard.press(key)
    kinds = "() => window.jupyterapp.shell.currentWidget.content.widgets.map(c => c.model.type)"
    assert page.page.evaluate(kinds) == ["code"] * 3

    page.screenshot("labeller")
    page.restart_kernel()
    wait_for(lambda: "kernel is gone" in view.first.inner_text(), "the view says that its kernel is gone")
    page.run_cell(0)
    page.run_cell(2)
    again = page.page.locator(".rlhf-labeller").last
    wait_for(lambda: "pair 4 of 5" in again.inner_text(), "labelling goes on at the fourth pair")
    page.assert_quiet()


def test_ppo_is_steered_by_its_slider_and_judged_blind(lab, new_page, end_runs, wait_for):
    from rlhf_nb.store import Store

    folder = lab.root / "steer"
    end_runs.append(folder / "runs")
    run = folder / "runs" / "ppo-1"
    ppo = (
        "run = %rlhf ppo --policy toy --prompts toy-prompts --reward toy-true --gold toy-true "
        "--set max_steps=5000 learning_rate=1e-4 rollout_batch_size=16 batch_size=8 sample_every=4"
    )
    page = new_page(lab)
    load = LOAD.format(workspace=folder) + "\n%rlhf attach local --no-standby"
    page.open(lab.notebook("steer.ipynb", [load, ppo]))
    page.run_cell(0)
    page.run_cell(1)

    def kinds(kind: str) -> list[dict[str, Any]]:
        return [event for event in lines(run / "events.jsonl") if event["kind"] == kind]

    wait_for(lambda: len(kinds("metric")) > 12, "rollouts and steps", 240)
    selected = page.page.locator('.rlhf-tab[aria-selected="true"]')
    wait_for(lambda: selected.inner_text() == "Tether", "the tether is the first tab of a run with a reference")
    page.page.wait_for_selector(".rlhf-panel canvas", timeout=60_000)

    # A real drag of the handle: down, along the track, up.
    track = page.page.locator('.rlhf-slider[data-name="kl_coef"] input[type=range]')
    box = track.bounding_box()
    at = float(track.input_value()) / float(track.get_attribute("max"))
    x, y = box["x"] + 8 + at * (box["width"] - 16), box["y"] + box["height"] / 2
    page.page.mouse.move(x, y)
    page.page.mouse.down()
    page.page.mouse.move(x + 40, y, steps=6)
    page.page.mouse.up()
    changed = wait_for(lambda: [c for c in kinds("coefficient_changed") if c["name"] == "kl_coef"], "kl_coef changed")[
        -1
    ]
    assert changed["new"] > changed["old"]
    wait_for(lambda: kinds("metric")[-1]["step"] > changed["effective_step"] + 4, "steps after the change")
    rollouts = [m["step"] for m in kinds("metric") if m.get("rollout") is not None]
    assert changed["effective_step"] in rollouts, "a coefficient of the reward counts from the first step of a rollout"

    # What if: the same handle, and the run stays as it is until the value is applied.
    slider = page.page.locator('.rlhf-slider[data-name="kl_coef"]')
    slider.locator(".rlhf-whatif").click()
    words = slider.locator(".rlhf-slidertext")
    wait_for(lambda: "would settle at reward" in words.inner_text(), "the policy's answer", 60)
    moved = len([c for c in kinds("coefficient_changed") if c["name"] == "kl_coef"])
    page.page.keyboard.press("ArrowLeft")
    page.page.keyboard.press("ArrowLeft")
    thought = words.inner_text()
    wait_for(lambda: kinds("metric")[-1]["step"] > kinds("previewed")[-1]["step"] + 6, "steps beside the thought")
    assert len([c for c in kinds("coefficient_changed") if c["name"] == "kl_coef"]) == moved
    page.screenshot("what-if")
    page.page.keyboard.press("Enter")
    applied = wait_for(
        lambda: [c for c in kinds("coefficient_changed") if c["name"] == "kl_coef"][moved:], f"applied after: {thought}"
    )[-1]
    assert applied["new"] < applied["old"]

    # L draws blind pairs; the answers become a win rate beside the proxy.
    wait_for(lambda: kinds("samples"), "samples")
    page.page.locator(".rlhf-panel").focus()
    page.page.keyboard.press("l")
    view = page.page.locator(".rlhf-panel .rlhf-labeller")
    view.wait_for(timeout=30_000)
    wait_for(lambda: "pair 1 of" in view.inner_text(), "the first blind pair")
    total = int(view.inner_text().split("pair 1 of ")[1].split()[0])
    assert 1 <= total <= 6
    for done in range(1, total + 1):
        page.page.keyboard.press("1")
        wait_for(lambda done=done: view.get_attribute("data-done") == str(done), f"{done} of {total} answered")
    assert "%" in view.inner_text()
    page.screenshot("blind")
    page.page.keyboard.press("Escape")
    wait_for(lambda: view.count() == 0, "back to the run")
    with Store.open(folder) as store:
        queues = [queue for queue in store.queues() if queue.startswith("ppo-1@")]
        assert queues and len(store.labels(queues[0])) == total
    page.page.locator('.rlhf-panel [data-op="stop"]').click()
    wait_for(lambda: kinds("stopped"), "the run stops and saves its model", 60)
    assert (run / "model" / "model.safetensors").exists()
    page.screenshot("tether")
    page.assert_quiet()
