"""What a run and its panel survive: a second tab, a second view, a kernel restart, dead agents and supervisors."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

LOAD = "%load_ext rlhf_nb\n%rlhf workspace {workspace}\n%rlhf attach local"
SFT = (
    "%rlhf sft --base toy --data toy-demonstrations "
    "--set max_steps=20000 batch_size=2 learning_rate=1e-4 sample_every=0 lr_scheduler=constant"
)


def lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


class Scene:
    """A notebook with a run that goes on, in a tab."""

    def __init__(self, lab: Any, page: Any, name: str, wait_for: Any) -> None:
        self.lab, self.page, self.name, self.wait_for = lab, page, name, wait_for
        self.workspace = lab.root / name
        self.run = self.workspace / "runs" / "sft-1"

    def start(self) -> Scene:
        cells = [LOAD.format(workspace=self.workspace), SFT, "%rlhf watch sft-1", "%rlhf"]
        self.page.open(self.lab.notebook(f"{self.name}.ipynb", cells))
        self.page.run_cell(0)
        self.page.run_cell(1)
        self.wait_for(lambda: self.step() > 5, "five steps", 120)
        self.wait_for(lambda: self.rows(self.page) > 5, "the panel holds rows")
        return self

    def kinds(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in lines(self.run / "events.jsonl") if event["kind"] == kind]

    def step(self) -> int:
        metrics = self.kinds("metric")
        return metrics[-1]["step"] if metrics else 0

    def rows(self, page: Any, panel: int = 0) -> int:
        panels = page.page.locator(".rlhf-panel")
        return int(panels.nth(panel).get_attribute("data-rows") or 0) if panels.count() > panel else 0

    def caught_up(self, page: Any, panel: int = 0) -> bool:
        """The view holds as many rows as there are metric events, each once, and gets more."""
        before = len(self.kinds("metric"))
        held = self.rows(page, panel)
        return before <= held + 20 and held <= len(self.kinds("metric"))

    def header(self, page: Any, panel: int = 0) -> str:
        return page.page.locator(".rlhf-panel").nth(panel).locator(".rlhf-header").inner_text()

    def contiguous(self) -> bool:
        seqs = [event["seq"] for event in lines(self.run / "events.jsonl")]
        return seqs == list(range(1, len(seqs) + 1))

    def goes_on(self, what: str) -> None:
        seen = self.step()
        self.wait_for(lambda: self.step() > seen + 5, f"the run goes on after {what}")


@pytest.fixture
def scene(request: pytest.FixtureRequest, lab: Any, new_page: Any, end_runs: list[Path], wait_for: Any) -> Scene:
    name = request.node.name.replace("test_", "")[:24]
    made = Scene(lab, new_page(lab), name, wait_for)
    end_runs.append(made.workspace / "runs")
    return made.start()


def test_a_second_tab_and_a_second_view_show_every_point_once(scene, lab, new_page, wait_for):
    scene.page.save()
    second = new_page(lab)
    second.open(f"{scene.name}.ipynb", reset=False)
    wait_for(lambda: scene.rows(second) > 5, "the second tab holds rows")
    wait_for(lambda: scene.caught_up(second), "the second tab caught up")
    scene.page.page.evaluate(
        """() => { const n = window.jupyterapp.shell.currentWidget.content; n.activeCellIndex = 1;
                   window.jupyterapp.commands.execute('notebook:create-output-view') }"""
    )
    wait_for(lambda: scene.page.page.locator(".rlhf-panel").count() >= 2, "Create New View for Output shows a panel")
    wait_for(lambda: scene.caught_up(scene.page, 0) and scene.caught_up(scene.page, 1), "both views hold the rows")
    second.assert_quiet()
    scene.page.assert_quiet()


def test_a_restarted_kernel_is_said_and_watch_restores(scene, wait_for):
    scene.page.restart_kernel()
    panel = scene.page.page.locator(".rlhf-panel").first
    wait_for(lambda: "kernel" in panel.inner_text().lower(), "the view says that its kernel is gone")
    scene.goes_on("a kernel restart")
    scene.page.run_cell(0)
    scene.page.run_cell(2)
    wait_for(
        lambda: scene.caught_up(scene.page, scene.page.page.locator(".rlhf-panel").count() - 1), "watch restores", 60
    )
    assert scene.contiguous()


def test_a_fresh_kernel_finds_the_run_by_itself(scene, wait_for):
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
    wait_for(
        lambda: scene.caught_up(scene.page, scene.page.page.locator(".rlhf-panel").count() - 1), "watch restores", 60
    )


def test_the_agent_may_die_and_the_panel_comes_back(scene, wait_for):
    kernel = scene.page.page.evaluate(
        """async () => { const k = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
             const code = 'from rlhf_nb import workspace as _w; _p = _w.current().attached.agent_pid';
             const f = k.requestExecute({code, user_expressions: {pid: '_p'}});
             const r = await f.done; return Number(r.content.user_expressions.pid.data['text/plain']) }"""
    )
    os.kill(kernel, signal.SIGKILL)
    scene.goes_on("the death of the agent")
    wait_for(lambda: scene.caught_up(scene.page), "the panel follows the run through a new agent", 90)
    field = scene.page.page.locator('.rlhf-slider[data-name="learning_rate"] input[type=text]').first
    field.fill("0.0002")
    field.press("Enter")
    wait_for(lambda: scene.kinds("coefficient_changed"), "the slider steers again")


def test_the_supervisor_may_die_and_another_adopts_the_run(scene, wait_for):
    watcher = json.loads((scene.run / "supervisor.json").read_text())
    os.kill(watcher["pid"], signal.SIGKILL)
    scene.goes_on("the death of the supervisor")

    def adopted() -> bool:
        now = json.loads((scene.run / "supervisor.json").read_text())
        return now["pid"] != watcher["pid"] and psutil.pid_exists(now["pid"])

    wait_for(adopted, "another supervisor")
    scene.page.page.locator('.rlhf-panel [data-op="stop"]').first.click()
    wait_for(lambda: scene.kinds("stopped") or scene.kinds("failed"), "the run ends", 60)
    assert scene.kinds("stopped") and (scene.run / "model" / "model.safetensors").exists()
    wait_for(lambda: "stopped" in scene.header(scene.page), "the header says stopped")
    assert scene.contiguous()
