"""What a person sees and can do while a cell waits: the notebook is run as a whole, as `Run All` does."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

BUSY = "() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status"


@pytest.fixture
def run_all(lab: Any, new_page: Any, end_runs: list[Any], wait_for: Any) -> Any:
    from .conftest import Scene

    def start(name: str, last: str) -> Scene:
        scene = Scene(lab, new_page(lab), name)
        end_runs.append(scene.workspace / "runs")
        cells = [cell.format(workspace=scene.workspace) for cell in scene.cells[:2]]
        scene.page.open(lab.notebook(f"{name}.ipynb", [*cells, last]))
        scene.page.page.evaluate("() => void window.jupyterapp.commands.execute('notebook:run-all-cells')")
        wait_for(lambda: scene.step() > 5, "five steps", 120)
        return scene

    return start


def test_the_panel_lives_and_steers_while_the_wait_magic_waits(run_all, wait_for):
    scene = run_all("waits", "%rlhf wait sft-1")
    wait_for(lambda: scene.rows() > 5, "the panel holds rows")
    assert scene.page.page.evaluate(BUSY) == "busy" and scene.page.count(2) is None
    scene.steer("0.0002")
    first = scene.rows()
    wait_for(lambda: scene.rows() > first, "rows go on")
    scene.page.page.wait_for_selector(".rlhf-panel canvas", timeout=60_000)
    assert scene.page.count(2) is None
    scene.page.page.locator('.rlhf-panel [data-op="stop"]').click()
    wait_for(lambda: "stopped" in scene.page.text(2), "the cell ends with the run", 60)


def test_the_panel_lives_while_a_cell_blocks(run_all, wait_for, lab):
    """Nothing that the page says is read; what it must know comes unasked."""
    until = lab.root / "until"
    waits = f"import os, time\nwhile not os.path.exists({str(until)!r}):\n    time.sleep(0.1)\nprint('slept')"
    scene = run_all("blocks", waits)
    wait_for(lambda: scene.rows() > 5, "the panel holds rows")
    first = scene.rows()
    wait_for(lambda: scene.rows() > first + 5, "rows go on")
    scene.page.page.wait_for_selector(".rlhf-panel canvas", timeout=60_000)
    assert scene.page.count(2) is None, "the cell blocks all the while"
    until.touch()
    wait_for(lambda: "slept" in scene.page.text(2), "the cell ends", 60)
    wait_for(scene.caught_up, "every point once when the kernel listens again")
    scene.steer("0.0002")
    assert scene.contiguous()
    scene.page.assert_quiet()
