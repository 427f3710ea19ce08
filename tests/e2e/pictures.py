"""The README's pictures, taken of the real thing: `make screenshots`. more/ holds further states, in both themes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from rlhf_nb import toy
from rlhf_nb.compute.rundir import LineTail

from .conftest import colours

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1200)]

CELLS = (
    "%load_ext rlhf_nb\n%rlhf workspace {workspace}\n%rlhf attach local",
    "rm = %rlhf reward --base toy-sft --data toy-pairs --set max_steps=60 learning_rate=5e-4 batch_size=32",
    (
        "run = %rlhf ppo --policy toy-sft --prompts toy-prompts --reward {rm} --gold toy-true "
        "--set max_steps=160 learning_rate=3e-4 rollout_batch_size=64 batch_size=32 sample_every=20"
    ),
    "%rlhf label toy-pairs --n 40 --annotator mira",
)
PAINTED = 50
"""Distinct colours: text alone has a hundred or more, from its smoothed edges; an empty page has one."""


def calm(page: Any, theme: str = "JupyterLab Light") -> None:
    """Only the notebook: no file browser, no status bar."""
    page.page.evaluate(
        """async theme => { const c = window.jupyterapp.commands;
             await c.execute('apputils:change-theme', {theme});
             if (!window.jupyterapp.shell.leftCollapsed) window.jupyterapp.shell.collapseLeft();
             window.jupyterapp.shell.collapseRight() }""",
        theme,
    )


def take(page: Any, name: str, cell: int, folder: Path, pad: int = 8, height: float = 1300) -> None:
    """A cell and its output, down to `height` pixels."""
    page.page.evaluate(
        "i => window.jupyterapp.shell.currentWidget.content.widgets[i].node.scrollIntoView({block: 'start'})", cell
    )
    page.page.wait_for_timeout(1500)
    shown = page.page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Cell").nth(cell)
    box, source = shown.bounding_box(), shown.locator(".jp-Cell-inputWrapper").bounding_box()
    clip = {"x": max(0, box["x"] - pad), "y": max(0, box["y"] - pad)}
    clip |= {"width": box["width"] + 2 * pad, "height": min(box["height"] + 2 * pad, height)}
    picture = page.page.screenshot(clip=clip)
    # The source is painted also where the output is not.
    found = colours(picture, below=source["y"] + source["height"] - clip["y"])
    assert found > PAINTED, f"{name}: an output of {found} colours is empty"
    path = folder / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture)


def test_an_output_that_was_not_painted_is_no_picture(lab, new_page, tmp_path):
    page = new_page(lab, width=1180)
    page.open(lab.notebook("empty.ipynb", ["import math\nprint('\\n' * 9)", "print('painted')"]))
    page.run_cell(0)
    page.run_cell(1)
    with pytest.raises(AssertionError, match="empty: an output of"):
        take(page, "empty", 0, tmp_path)
    assert not list(tmp_path.iterdir())
    take(page, "painted", 1, tmp_path)
    assert (tmp_path / "painted.png").stat().st_size


def test_pictures(lab, new_page, end_runs, wait_for):
    folder = Path(os.environ.get("RLHF_NB_SCREENSHOTS", lab.root))
    workspace = lab.root / "project"
    end_runs.append(workspace / "runs")
    run = workspace / "runs" / "ppo-1"
    page = new_page(lab, width=1180, height=1400)
    page.open(lab.notebook("steer.ipynb", [c.format(workspace=workspace, rm="{rm}") for c in CELLS]))
    calm(page)
    page.run_cell(0)
    page.run_cell(1)
    page.run_cell(2)

    def kinds(kind: str) -> list[dict[str, Any]]:
        return [event for event in LineTail(run / "events.jsonl").read() if event["kind"] == kind]

    def step() -> int:
        return kinds("metric")[-1]["step"] if kinds("metric") else 0

    panel = page.page.locator(".rlhf-panel").last
    wait_for(lambda: step() >= 60, "sixty steps", 400)
    field = panel.locator('.rlhf-slider[data-name="kl_coef"] input[type=text]')
    field.fill("0.01")
    field.press("Enter")
    wait_for(lambda: step() >= 100, "a hundred steps", 400)
    panel.focus()
    page.page.keyboard.press("l")
    view = panel.locator(".rlhf-labeller")
    wait_for(lambda: "pair 1 of" in view.inner_text(), "the first blind pair")
    total = int(view.inner_text().split("pair 1 of ")[1].split()[0])
    for done in range(1, total + 1):
        prompt = view.locator(".rlhf-prompt").inner_text()
        a, b = (view.locator(".rlhf-side").nth(side).inner_text() for side in (0, 1))
        first, second = toy.true_reward([prompt, prompt], [a, b])
        page.page.keyboard.press("t" if first == second else "1" if first > second else "2")
        wait_for(lambda done=done: view.get_attribute("data-done") == str(done), f"{done} of {total} answered")
    page.page.keyboard.press("Escape")
    slider = panel.locator('.rlhf-slider[data-name="kl_coef"]')
    slider.locator(".rlhf-whatif").click()
    wait_for(lambda: "would settle" in slider.inner_text(), "the policy's answer")
    for _ in range(2):
        page.page.keyboard.press("PageUp")
    wait_for(lambda: step() >= 120, "a hundred and twenty steps", 400)
    take(page, "what-if", 2, folder)
    page.page.keyboard.press("Escape")
    wait_for(lambda: step() >= 130, "a hundred and thirty steps", 400)
    take(page, "tether", 2, folder)
    wait_for(lambda: kinds("finished"), "the run ends", 400)
    take(page, "more/finished", 2, folder)
    for tab in ("Curves", "Samples", "Log"):
        panel.locator(".rlhf-tab", has_text=tab).click()
        take(page, tab.lower() if tab != "Log" else "more/log", 2, folder, height=900 if tab == "Curves" else 1300)
    panel.locator(".rlhf-tab", has_text="Tether").click()
    calm(page, "JupyterLab Dark")
    take(page, "more/tether-dark", 2, folder)
    panel.locator(".rlhf-tab", has_text="Curves").click()
    take(page, "more/curves-dark", 2, folder)
    calm(page)
    page.run_cell(3)
    view = page.page.locator(".rlhf-labeller").last
    view.focus()
    for key in "12t1":
        before = view.get_attribute("data-done")
        page.page.keyboard.press(key)
        wait_for(lambda before=before: view.get_attribute("data-done") != before, "answered")
    take(page, "labeller", 3, folder)
    calm(page, "JupyterLab Dark")
    take(page, "more/labeller-dark", 3, folder)
    page.page.set_viewport_size({"width": 860, "height": 1400})
    calm(page)
    panel.locator(".rlhf-tab", has_text="Tether").click()
    take(page, "more/tether-narrow", 2, folder)
