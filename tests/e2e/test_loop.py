"""A person at a real JupyterLab: start a run, move its slider, reload the page, lose the worker."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import playwright.sync_api
import psutil
import pytest

from .conftest import colours, give_way

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

LOAD = "%load_ext rlhf_nb\n%rlhf workspace {workspace}\n%rlhf attach local {flags}"
SFT = (
    "run = %rlhf sft --base toy --data toy-demonstrations "
    "--set max_steps=4000 batch_size=4 learning_rate=1e-4 sample_every=0 lr_scheduler=constant"
)


def events(run: Path) -> list[dict[str, Any]]:
    path = run / "events.jsonl"
    return (
        [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        if path.exists()
        else []
    )


def of(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in events(run) if event["kind"] == kind]


def last_step(run: Path) -> int:
    steps = [event["step"] for event in of(run, "metric")]
    return steps[-1] if steps else 0


def shown(page: Any, selector: str) -> str:
    return page.page.locator(selector).first.inner_text()


def painted(page: Any, selector: str) -> int:
    """Distinct colours in the pixels of an element: what was really drawn, not what the DOM claims."""
    try:
        shot = page.page.locator(selector).first.screenshot(timeout=20_000)
    except playwright.sync_api.Error:
        return 0  # a slow machine has not settled the element yet; whoever waits looks again
    return colours(shot)


@pytest.fixture(params=[1, 2], ids=["one-rank", "two-ranks"])
def ranks(request: pytest.FixtureRequest) -> int:
    return request.param


def test_slider_reload_and_a_killed_worker(lab, new_page, end_runs, wait_for, ranks):
    folder = lab.root / f"slice-{ranks}"
    end_runs.append(folder / "runs")
    run = folder / "runs" / "sft-1"
    flags = '--launch "--num_processes 2"' if ranks == 2 else ""
    page = new_page(lab)
    page.open(lab.notebook(f"slice-{ranks}.ipynb", [LOAD.format(workspace=folder, flags=flags), SFT]))
    assert "attached local" in page.run_cell(0)
    page.run_cell(1, wait=False)

    # It starts, on as many ranks as were asked for, and the curve is painted.
    wait_for(lambda: last_step(run) >= 3, "three steps", 180)
    assert of(run, "started")[0]["world_size"] == ranks
    give_way(run)
    page.page.wait_for_selector(".rlhf-curve canvas", timeout=60_000)
    wait_for(lambda: painted(page, ".rlhf-curve") > 8, "the loss curve has pixels")

    # The slider, by the keyboard: a notch up is asked for, then in effect, then in the events.
    slider = page.page.locator('.rlhf-slider[data-name="learning_rate"] input[type=range]')
    slider.focus()
    page.page.keyboard.press("ArrowRight")
    changed = wait_for(lambda: of(run, "coefficient_changed"), "the learning rate changed")[0]
    assert changed["name"] == "learning_rate" and changed["old"] == pytest.approx(1e-4) and changed["new"] > 1e-4
    wait_for(lambda: last_step(run) >= changed["effective_step"], "the step of the change")
    at = [e for e in of(run, "metric") if e["step"] >= changed["effective_step"]][0]
    assert at["step"] == changed["effective_step"]
    assert at["values"]["optimizer/learning_rate"] == pytest.approx(changed["new"], rel=1e-6)
    before = [e for e in of(run, "metric") if e["step"] == changed["effective_step"] - 1][0]
    assert before["values"]["optimizer/learning_rate"] == pytest.approx(changed["old"], rel=1e-6)
    wait_for(lambda: "in effect" in shown(page, '.rlhf-slider[data-name="learning_rate"]'), "the slider says in effect")
    assert page.page.evaluate("() => document.activeElement?.matches('.rlhf-slider input[type=range]')"), (
        "focus was lost"
    )

    # The page is reloaded in mid-stream: everything is there again, each step once, and it still moves.
    page.save()
    page.reload()
    page.page.wait_for_selector(".rlhf-curve canvas", timeout=60_000)
    wait_for(lambda: painted(page, ".rlhf-curve") > 8, "the curve is painted again")
    seen = last_step(run)
    wait_for(lambda: last_step(run) > seen + 5, "the run goes on")
    field = page.page.locator('.rlhf-slider[data-name="learning_rate"] input[type=text]')
    field.fill("0.00005")
    field.press("Enter")
    wait_for(lambda: len(of(run, "coefficient_changed")) == 2, "the slider works after the reload")
    assert of(run, "coefficient_changed")[1]["new"] == pytest.approx(5e-5)

    # The worker is killed. The header says how it died; nothing says that it runs.
    victim = json.loads((run / "ranks" / f"{ranks - 1}.json").read_text())
    os.kill(victim["pid"], signal.SIGKILL)
    wait_for(lambda: of(run, "failed"), "the supervisor tells the end", 60)
    failed = of(run, "failed")[0]
    assert failed["signal"] == "SIGKILL" and failed["rank"] == ranks - 1
    assert (run / "exit.json").exists()
    wait_for(lambda: "SIGKILL" in shown(page, ".rlhf-state"), "the header says how it died")
    assert not any(psutil.pid_exists(p) for p in of(run, "started")[0]["rank_pids"])
    assert [e["seq"] for e in events(run)] == list(range(1, len(events(run)) + 1))
    page.screenshot(f"slice-{ranks}")
    page.assert_quiet()
