"""What a run and its panel survive: a second tab, a second view, a kernel restart, dead agents and supervisors."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture
def scene(new_scene: Any, lab: Any) -> Any:
    return new_scene(lab)


def test_a_second_tab_and_a_second_view_show_every_point_once(scene, lab, new_page, wait_for):
    scene.page.save()
    second = new_page(lab)
    second.open(f"{scene.name}.ipynb", reset=False)
    wait_for(lambda: scene.caught_up(second), "the second tab caught up")
    scene.page.page.evaluate(
        """() => { const n = window.jupyterapp.shell.currentWidget.content; n.activeCellIndex = 1;
                   window.jupyterapp.commands.execute('notebook:create-output-view') }"""
    )
    wait_for(lambda: scene.page.page.locator(".rlhf-panel").count() >= 2, "Create New View for Output shows a panel")
    wait_for(lambda: scene.caught_up() and scene.caught_up(which=1), "both views hold the rows")
    # What one tab moves, the other shows.
    scene.steer("0.00021", second)
    wait_for(lambda: "2.1e-4" in scene.panel().inner_text(), "the first tab shows what the second one set")
    second.assert_quiet()
    scene.page.assert_quiet()


def test_a_restarted_kernel_is_said_and_watch_restores(scene, wait_for):
    scene.page.restart_kernel()
    wait_for(lambda: "kernel" in scene.panel().inner_text().lower(), "the view says that its kernel is gone")
    scene.goes_on("a kernel restart")
    scene.page.run_cell(0)
    panels = scene.page.page.locator(".rlhf-panel")
    # Run again, the cell shows another view of the panel it has just thrown away.
    for _ in range(2):
        scene.page.run_cell(2)
        wait_for(lambda: panels.count() == 2 and scene.caught_up(which=1), "watch restores")
    scene.steer("0.00021", which=1)
    assert scene.contiguous()


def test_a_fresh_kernel_finds_the_run_without_attaching(scene, wait_for):
    scene.page.restart_kernel()
    scene.page.page.evaluate(
        """ws => { const n = window.jupyterapp.shell.currentWidget.content;
                   n.widgets[0].model.sharedModel.setSource('%load_ext rlhf_nb\\n%rlhf workspace ' + ws) }""",
        str(scene.workspace),
    )
    scene.page.run_cell(0)
    status = scene.page.run_cell(3)
    assert "sft-1" in status and "running" in status
    scene.page.run_cell(2)
    last = scene.page.page.locator(".rlhf-panel").count() - 1
    wait_for(lambda: scene.caught_up(which=last), "watch restores")
    scene.steer("0.0002", which=last)


def test_the_agent_may_die_and_the_panel_comes_back(scene, wait_for):
    agent = scene.page.page.evaluate(
        """async () => { const k = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
             const code = 'from rlhf_nb import workspace as _w; _p = _w.current().attached.agent_pid';
             const f = k.requestExecute({code, user_expressions: {pid: '_p'}});
             const r = await f.done; return Number(r.content.user_expressions.pid.data['text/plain']) }"""
    )
    os.kill(agent, signal.SIGKILL)
    scene.goes_on("the death of the agent")
    wait_for(scene.caught_up, "the panel follows the run through a new agent")
    assert not psutil.pid_exists(agent) or psutil.Process(agent).status() == psutil.STATUS_ZOMBIE
    scene.steer("0.0002")
    assert scene.contiguous()


def test_the_supervisor_may_die_and_another_adopts_the_run(scene, wait_for):
    watcher = json.loads((scene.run / "supervisor.json").read_text())
    os.kill(watcher["pid"], signal.SIGKILL)
    scene.goes_on("the death of the supervisor")

    def adopted() -> bool:
        now = json.loads((scene.run / "supervisor.json").read_text())
        return now["pid"] != watcher["pid"] and psutil.pid_exists(now["pid"])

    wait_for(adopted, "another supervisor")
    scene.panel().locator('[data-op="stop"]').click()
    wait_for(lambda: scene.kinds("stopped") or scene.kinds("failed"), "the run ends")
    assert scene.kinds("stopped") and (scene.run / "model" / "model.safetensors").exists()
    wait_for(lambda: "stopped" in scene.panel().locator(".rlhf-header").inner_text(), "the header says stopped")
    assert scene.contiguous()
