"""A real JupyterLab and a headless browser, for tests of what a person sees."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat

CHROMIUM = os.environ.get("RLHF_NB_CHROMIUM", "/usr/bin/chromium")


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Lab:
    root: Path
    port: int
    token: str
    process: subprocess.Popen

    def notebook(self, name: str, *cells: str) -> str:
        document = nbformat.v4.new_notebook(
            metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        )
        document.cells = [nbformat.v4.new_code_cell(cell) for cell in cells]
        nbformat.write(document, self.root / name)
        return name

    def url(self, name: str, *, reset: bool = True) -> str:
        return f"http://127.0.0.1:{self.port}/lab/tree/{name}?{'reset&' if reset else ''}token={self.token}"


@contextlib.contextmanager
def lab(folder: Path, *, settings: dict[str, Any] | None = None) -> Iterator[Lab]:
    """JupyterLab on a free port, with folders of its own; ended with the block."""
    import json

    root, token, port = folder / "root", secrets.token_hex(8), free_port()
    root.mkdir(parents=True, exist_ok=True)
    overrides = folder / "data" / "lab" / "settings" / "overrides.json"
    environment = os.environ | {
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTER_DATA_DIR": str(folder / "data"),
        "JUPYTER_RUNTIME_DIR": str(folder / "run"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    arguments = []
    if settings:
        overrides.parent.mkdir(parents=True)
        overrides.write_text(json.dumps(settings))
        arguments.append(f"--LabApp.app_settings_dir={overrides.parent}")
    log = (folder / "lab.log").open("w")
    process = subprocess.Popen(
        [
            sys.executable, "-m", "jupyterlab", "--allow-root", "--no-browser", "--ip=127.0.0.1", f"--port={port}",
            "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={root}",
            "--LabApp.expose_app_in_browser=True", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
            *arguments,
        ],
        stdout=log, stderr=log, env=environment,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api/status?token={token}", timeout=1)
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError((folder / "lab.log").read_text()[-3000:]) from None
                time.sleep(0.2)
        yield Lab(root, port, token, process)
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.close()


@dataclass
class Seen:
    """What a page said and asked for."""

    console: list[str] = field(default_factory=list)
    left_the_machine: list[str] = field(default_factory=list)


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        try:
            yield browser
        finally:
            browser.close()


def page(browser: Any, *, width: int = 1300, height: int = 900, context: Any = None) -> tuple[Any, Seen]:
    """A page that cannot leave this machine, and what it tried."""
    context = context or browser.new_context(viewport={"width": width, "height": height})
    new, seen = context.new_page(), Seen()
    new.on("console", lambda message: seen.console.append(f"[{message.type}] {message.text[:300]}"))
    new.on("pageerror", lambda error: seen.console.append(f"[pageerror] {str(error)[:600]}"))

    def gate(route: Any) -> None:
        url = route.request.url
        if "127.0.0.1" in url or url.startswith(("data:", "blob:")):
            route.continue_()
        else:
            seen.left_the_machine.append(url)
            route.abort()

    new.route("**/*", gate)
    return new, seen


IDLE = "window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"


def open_notebook(view: Any, url: str) -> None:
    view.goto(url)
    view.wait_for_selector(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook .jp-Cell", timeout=90_000)
    view.wait_for_function(IDLE, timeout=90_000)


def run_all(view: Any) -> None:
    view.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")


def save(view: Any) -> None:
    view.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
