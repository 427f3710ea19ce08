"""A real JupyterLab and a real browser: start, open a notebook, run cells, look at what was painted."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from urllib.request import Request, urlopen

import nbformat
import psutil
import pytest
from PIL import Image

from rlhf_nb.compute.rundir import LineTail
from tests.servers import jupyter_server

TOKEN = "e2e"


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 90.0, every: float = 0.1) -> Any:
    """The first true answer of `condition`; fails with `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds:g} s: {what}")
        time.sleep(every)


def colours(png: bytes, below: float = 0) -> int:
    """Distinct colours of a picture, under its first `below` pixels."""
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    part = picture.crop((0, min(round(below), picture.height), picture.width, picture.height))
    return len(part.getcolors(1 << 24) or [])


@dataclass
class Lab:
    """A running server and the folder it serves."""

    url: str
    root: Path
    process: subprocess.Popen[bytes]
    log: Path

    def notebook(self, name: str, cells: list[str], *, kernel: str = "python3") -> str:
        notebook = nbformat.v4.new_notebook(
            metadata={"kernelspec": {"name": kernel, "display_name": kernel, "language": "python"}}
        )
        notebook.cells = [nbformat.v4.new_code_cell(cell) for cell in cells]
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, self.root / name)
        return name

    def end_kernels(self) -> None:
        """With each notebook's kernel go its agent and its idle standby, which hold half a gigabyte."""
        for session in json.loads(self._ask("GET", "api/sessions")):
            self._ask("DELETE", f"api/sessions/{session['id']}")

    def _ask(self, method: str, path: str) -> bytes:
        asked = Request(f"{self.url}/{path}", method=method, headers={"Authorization": f"token {TOKEN}"})
        with urlopen(asked, timeout=60) as answer:
            return answer.read()


@contextlib.contextmanager
def start_lab(root: Path, *, app: str = "lab", settings: dict[str, Any] | None = None, python: str = sys.executable):
    """JupyterLab (or Notebook 7) on a free port, with its own configuration, ended with everything it started."""
    home = root / ".jupyter"
    config = home / "config"
    # JupyterLab asks a new user about its news in a box that covers what the tests look at.
    quiet = {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False}}
    for plugin, values in {**quiet, **(settings or {})}.items():
        extension, _, name = plugin.partition(":")
        path = config / "lab" / "user-settings" / extension / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    env = dict(
        os.environ,
        JUPYTER_CONFIG_DIR=str(config),
        JUPYTER_DATA_DIR=str(home / "data"),
        JUPYTER_RUNTIME_DIR=str(home / "run"),
        IPYTHONDIR=str(home / "ipython"),
    )
    log = root / "server.log"
    command = [python, "-m", "jupyterlab" if app == "lab" else "notebook", f"--ServerApp.root_dir={root}"]
    if app == "lab":
        command += ["--LabApp.expose_app_in_browser=True", "--LabApp.news_url=None"]
        command += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    else:
        command += ["--JupyterNotebookApp.expose_app_in_browser=True"]
    with jupyter_server(command, token=TOKEN, log=log, env=env, cwd=root) as (url, process):
        yield Lab(url, root, process, log)


@dataclass
class Page:
    """One browser tab. Collects what a healthy product never shows: console errors, requests that leave the machine."""

    page: Any
    lab: Lab
    errors: list[str] = field(default_factory=list)
    left_the_machine: list[str] = field(default_factory=list)

    def listen(self) -> None:
        self.page.on("console", lambda m: self._console(m))
        self.page.on("pageerror", lambda error: self.errors.append(f"pageerror: {error}"))

        def route(request: Any) -> None:
            address = request.request.url
            if address.startswith((self.lab.url, "data:", "blob:")):
                request.continue_()
            else:
                self.left_the_machine.append(address)
                request.abort()

        self.page.route("**/*", route)

    def _console(self, message: Any) -> None:
        # Chromium logs every 4xx answer as an error; JupyterLab asks for files that need not exist.
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.errors.append(message.text[:500])

    def open(self, name: str, *, reset: bool = True) -> Page:
        self.page.goto(f"{self.lab.url}/lab/tree/{name}?{'reset&' if reset else ''}token={TOKEN}")
        return self.wait_idle()

    def reload(self) -> Page:
        self.page.reload()
        return self.wait_idle()

    def wait_idle(self, seconds: float = 90) -> Page:
        self.page.wait_for_selector(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook .jp-Cell", timeout=90_000)
        self.page.wait_for_function(
            "window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'",
            timeout=seconds * 1000,
        )
        return self

    def command(self, name: str, **arguments: Any) -> Any:
        return self.page.evaluate("([n, a]) => window.jupyterapp.commands.execute(n, a)", [name, arguments])

    def run_all(self) -> None:
        self.page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")

    def run_cell(self, index: int, *, wait: bool = True, seconds: float = 120) -> str:
        """Run one cell, by position; its output's text."""
        # A restarted kernel counts from 1 again: only an empty count tells a fresh run from an old one.
        self.page.evaluate(
            """i => { const n = window.jupyterapp.shell.currentWidget.content; n.deselectAll(); n.activeCellIndex = i;
                      n.widgets[i].model.clearExecution();
                      window.jupyterapp.commands.execute('notebook:run-cell') }""",
            index,
        )
        if wait:
            wait_for(lambda: self.count(index) is not None, f"cell {index} ran: {self.text(index)}", seconds)
            self.wait_idle(seconds)
        return self.text(index)

    def count(self, index: int) -> int | None:
        return self.page.evaluate(
            "i => window.jupyterapp.shell.currentWidget.content.widgets[i].model.executionCount", index
        )

    def text(self, index: int) -> str:
        return self.page.evaluate(
            """i => [...window.jupyterapp.shell.currentWidget.content.widgets[i].node
                     .querySelectorAll('.jp-OutputArea-output')].map(o => o.innerText).join('\\n')""",
            index,
        )

    def save(self) -> None:
        self.page.evaluate("async () => { await window.jupyterapp.commands.execute('docmanager:save') }")

    def restart_kernel(self) -> None:
        self.page.evaluate(
            "async () => { await window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart() }"
        )
        self.wait_idle()

    def screenshot(self, name: str) -> Path:
        folder = Path(os.environ.get("RLHF_NB_SCREENSHOTS", self.lab.root))
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.png"
        self.page.screenshot(path=str(path))
        return path

    def assert_quiet(self, *, allowed: tuple[str, ...] = ()) -> None:
        """No console error and no request that left the machine."""
        errors = [line for line in self.errors if not any(part in line for part in allowed)]
        assert not errors, errors
        assert not self.left_the_machine, self.left_the_machine


@pytest.fixture(name="start_lab", scope="session")
def _start_lab() -> Callable[..., Any]:
    return start_lab


@pytest.fixture(name="wait_for", scope="session")
def _wait_for() -> Callable[..., Any]:
    return wait_for


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        reason = "no chromium; on Debian: apt-get install chromium"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=executable,
            args=[
                *("--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--no-first-run", "--disable-sync"),
                *("--disable-background-networking", "--disable-component-update", "--disable-quic"),
            ],
        )
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """One server for all tests that do not need settings of their own."""
    with start_lab(tmp_path_factory.mktemp("lab")) as running:
        yield running


@pytest.fixture
def new_page(browser: Any) -> Iterator[Callable[..., Page]]:
    contexts, labs = [], {}

    def make(lab: Lab, *, width: int = 1300, height: int = 900) -> Page:
        context = browser.new_context(viewport={"width": width, "height": height})
        contexts.append(context)
        labs[lab.url] = lab
        page = Page(context.new_page(), lab)
        page.listen()
        return page

    yield make
    for context in contexts:
        context.close()
    for lab in labs.values():
        # One that the test itself started has ended with it.
        if lab.process.poll() is None:
            lab.end_kernels()


@pytest.fixture
def end_runs() -> Iterator[list[Path]]:
    """Run folders to end after the test: every supervisor, launcher and rank that is still there."""
    roots: list[Path] = []
    yield roots
    for root in roots:
        # The supervisor first, or it would write the end of each rank that is taken from it.
        for path in [*root.glob("*/supervisor.json"), *root.glob("*/ranks/*.json")]:
            with contextlib.suppress(OSError, ValueError, KeyError, psutil.Error):
                found = json.loads(path.read_text())
                process = psutil.Process(int(found["pid"]))
                if abs(process.create_time() - float(found["created"])) < 0.05:
                    for each in [process, *process.children(recursive=True)]:
                        with contextlib.suppress(psutil.NoSuchProcess):
                            each.kill()


def give_way(run: Path) -> None:
    """A run trains as fast as it can, to the end of the test: what waits for the browser comes first."""
    for path in run.glob("ranks/*.json"):
        psutil.Process(int(json.loads(path.read_text())["pid"])).nice(10)


@dataclass
class Scene:
    """A notebook with a supervised run that goes on and on, and what its files and its panels say."""

    lab: Lab
    page: Page
    name: str
    cells: ClassVar[tuple[str, ...]] = (
        "%load_ext rlhf_nb\n%rlhf workspace {workspace}\n%rlhf attach local",
        (
            "%rlhf sft --base toy --data toy-demonstrations "
            "--set max_steps=20000 batch_size=2 learning_rate=1e-4 sample_every=0 lr_scheduler=constant"
        ),
        "%rlhf watch sft-1",
        "%rlhf",
    )

    @property
    def workspace(self) -> Path:
        return self.lab.root / self.name

    @property
    def run(self) -> Path:
        return self.workspace / "runs" / "sft-1"

    def start(self, **metadata: Any) -> Scene:
        cells = [cell.format(workspace=self.workspace) for cell in self.cells]
        self.page.open(self.lab.notebook(f"{self.name}.ipynb", cells, **metadata))
        assert "attached local" in self.page.run_cell(0)
        self.page.run_cell(1)
        wait_for(lambda: self.step() > 5, "five steps", 120)
        give_way(self.run)
        wait_for(lambda: self.rows() > 5, "the panel holds rows")
        return self

    def kinds(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events() if event["kind"] == kind]

    def events(self) -> list[dict[str, Any]]:
        return LineTail(self.run / "events.jsonl").read()

    def step(self) -> int:
        metrics = self.kinds("metric")
        return metrics[-1]["step"] if metrics else 0

    def panel(self, page: Page | None = None, which: int = 0) -> Any:
        return (page or self.page).page.locator(".rlhf-panel").nth(which)

    def rows(self, page: Page | None = None, which: int = 0) -> int:
        panel = self.panel(page, which)
        return int(panel.get_attribute("data-rows") or 0) if panel.count() else 0

    def caught_up(self, page: Page | None = None, which: int = 0) -> bool:
        """The view holds a row for each step that was logged, none twice, and keeps up."""
        before = len(self.kinds("metric"))
        held = self.rows(page, which)
        return before <= held + 40 and 0 < held <= len(self.kinds("metric"))

    def steer(self, value: str, page: Page | None = None, which: int = 0) -> dict[str, Any]:
        """Type a learning rate into the panel; the event that says where it came into force."""
        before = len(self.kinds("coefficient_changed"))
        field = self.panel(page, which).locator('.rlhf-slider[data-name="learning_rate"] input[type=text]')
        field.fill(value)
        field.press("Enter")
        wait_for(lambda: len(self.kinds("coefficient_changed")) > before, "the slider steers")
        changed = self.kinds("coefficient_changed")[-1]
        assert changed["new"] == pytest.approx(float(value))
        return changed

    def contiguous(self) -> bool:
        seqs = [event["seq"] for event in self.events()]
        return seqs == list(range(1, len(seqs) + 1))

    def goes_on(self, after: str) -> None:
        seen = self.step()
        wait_for(lambda: self.step() > seen + 5, f"the run goes on after {after}")


@pytest.fixture
def new_scene(request: pytest.FixtureRequest, new_page: Any, end_runs: list[Path]) -> Callable[..., Scene]:
    def make(lab: Lab, **metadata: Any) -> Scene:
        name = re.sub(r"\W+", "-", request.node.name.removeprefix("test_"))[:32]
        scene = Scene(lab, new_page(lab), name)
        end_runs.append(scene.workspace / "runs")
        return scene.start(**metadata)

    return make
