"""What every benchmark shares: order of the repeats, medians with their spread, and where it ran.

Other jobs may share the machine. So what is compared is run in turns (A B, B A, A B, …), and figures are medians with
quartiles, never means of a few or best of many. Each script prints a table for people; with `--json` its last line of
stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PACKAGES = (
    "rlhf-nb", "torch", "transformers", "trl", "jupyterlab", "ipykernel", "anywidget", "bokeh", "pandas",
)  # fmt: skip


# --- figures ----------------------------------------------------------------------------------------------------------


def percentile(values: Sequence[float], share: float) -> float:
    """Linear between order statistics, `share` in [0, 1]; the same as numpy's default.

    Raises:
        ValueError: No values.
    """
    if not values:
        raise ValueError("no values to take a percentile of")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def summary(values: Sequence[float]) -> dict[str, float]:
    """median, q1, q3, p95, min, max, n."""
    return {
        "median": statistics.median(values),
        "q1": percentile(values, 0.25),
        "q3": percentile(values, 0.75),
        "p95": percentile(values, 0.95),
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    """Summary of the ratios of the pairs that ran one after the other, and the ratio of the medians."""
    found = summary([a / b for a, b in zip(numerators, denominators, strict=True)])
    return found | {"of_medians": statistics.median(numerators) / statistics.median(denominators)}


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Least squares."""
    return statistics.linear_regression(x, y).slope


def text(found: dict[str, float], unit: str = "s", scale: float = 1.0, digits: int = 3) -> str:
    """`0.123 s [0.110, 0.140] n=9`: median, quartiles, number."""
    middle, low, high = (f"{found[key] * scale:.{digits}f}" for key in ("median", "q1", "q3"))
    return f"{middle}{' ' + unit if unit else ''} [{low}, {high}] n={found['n']}"


def interleave(repeats: int, arms: dict[str, Callable[[], Any]], calm_s: float = 0.0) -> dict[str, list[Any]]:
    """Run every arm `repeats` times in turns, each round in the reverse order of the one before.

    Args:
        calm_s: Before each, wait up to so many seconds for `calm`.
    """
    results: dict[str, list[Any]] = {name: [] for name in arms}
    for turn in range(repeats):
        for name in list(arms) if turn % 2 == 0 else list(reversed(arms)):
            calm(calm_s)
            results[name].append(arms[name]())
            say(f"  {turn + 1}/{repeats} {name}: {_short(results[name][-1])}")
    return results


def calm(patience_s: float, busy: float = 0.6) -> bool:
    """Wait until others leave some of the machine: True once less than `busy` of all cores were used for a second."""
    import psutil

    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        if psutil.cpu_percent(1.0) < 100 * busy:
            return True
    return patience_s == 0


def _short(result: Any) -> str:
    return f"{result:.3f}" if isinstance(result, float) else str(result)[:160]


# --- where it ran -----------------------------------------------------------------------------------------------------


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def machine() -> str:
    """`Intel(R) Xeon(R) …, 2 cores, 23 GiB, Linux 6.1, load 1.52, CPU pressure 12 %, 2026-11-05`.

    Load and pressure (the share of the last minute in which something waited for a core) tell of other jobs.
    """
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    system = f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}"
    cores = len(os.sched_getaffinity(0))
    parts = [model, f"{cores} cores", f"{memory:.0f} GiB", system, f"load {os.getloadavg()[0]:.2f}"]
    with contextlib.suppress(OSError, IndexError):
        pressure = Path("/proc/pressure/cpu").read_text().split("avg60=")[1].split()[0]
        parts.append(f"CPU pressure {float(pressure):.0f} %")
    return ", ".join([*parts, str(date.today())])


# --- a script's frame -------------------------------------------------------------------------------------------------


def parser(doc: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="few repeats, under a minute on an idle machine")
    made.add_argument("--json", action="store_true", help="the last line of stdout is one JSON object")
    made.add_argument(
        "--calm", type=float, default=0.0, metavar="SECONDS",
        help="wait up to so long, before each repeat, for a second in which others use little of the machine",
    )  # fmt: skip
    made.add_argument("--repeats", type=int, default=None, help="how often each arm runs")
    return made


def say(line: str) -> None:
    """Progress, beside the figures."""
    print(line, file=sys.stderr, flush=True)


def report(name: str, args: argparse.Namespace, lines: list[str], met: dict[str, bool], **figures: Any) -> None:
    """Print the table; with `--json` also the object, last."""
    where = machine()
    print(f"\n{name}")
    print(f"  {where} (at its end)")
    for line in lines:
        print(f"  {line}")
    for what, held in met.items():
        print(f"  {'met   ' if held else 'MISSED'} {what}")
    if args.json:
        print(json.dumps({"benchmark": name, "machine": where, "versions": versions(), "met": met, **figures}))
    sys.stdout.flush()


@contextlib.contextmanager
def scratch(threads: int = 1) -> Iterator[Path]:
    """A short folder as working directory, nobody's Jupyter settings, no network; processes of runs in it are ended.

    Args:
        threads: OMP_NUM_THREADS of everything that trains. With as many threads as cores, a step on a machine that
            others use waits for whichever thread they hold up, and what is measured is them.
    """
    folder = Path(tempfile.mkdtemp(prefix="rlhf-bench-"))
    kept = dict(os.environ)
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    for variable in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "RLHF_NB_RUNS"):
        os.environ[variable] = str(folder / variable.lower())
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield folder
    finally:
        end_runs(folder)
        os.chdir(before)
        os.environ.clear()
        os.environ.update(kept)
        shutil.rmtree(folder, ignore_errors=True)


def end_runs(folder: Path) -> None:
    """End every process that a run directory below `folder` names."""
    import psutil

    for path in [*folder.rglob("supervisor.json"), *folder.rglob("owner.json"), *folder.rglob("ranks/*.json")]:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, psutil.Error):
            found = json.loads(path.read_text())
            process = psutil.Process(int(found["pid"]))
            if abs(process.create_time() - float(found["created"])) < 0.05:
                for one in [*process.children(recursive=True), process]:
                    with contextlib.suppress(psutil.Error):
                        one.kill()


def child(script: str, *arguments: str, timeout: float = 900) -> dict[str, Any]:
    """Run one of our scripts in a fresh interpreter; the JSON object on its last line.

    Raises:
        RuntimeError: It failed; the message is the end of what it said.
    """
    command = [sys.executable, str(HERE / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(arguments)[:200]}:\n{done.stderr[-3000:]}")
    # A notebook's shell may print after it, at its exit.
    found = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not found:
        raise RuntimeError(f"{script} {' '.join(arguments)[:200]}: no object in {done.stdout[-1000:]!r}")
    return json.loads(found[-1])


def plain_trl(folder: Path, method: str, timeout: float = 900, **settings: Any) -> dict[str, Any]:
    """A plain TRL script on the toy model with a run's settings; see plain_trl.py. `started` is its process's start."""
    from rlhf_nb.toy import dataset, model_path

    rows = folder / f"{method}.jsonl"
    if not rows.exists():
        named = {"sft": "toy-demonstrations", "kto": "toy-thumbs", "online-dpo": "toy-prompts"}
        _, content = dataset(named.get(method, "toy-pairs"))
        rows.write_text("".join(json.dumps(as_messages(row)) + "\n" for row in content))
    asked = {
        "method": method,
        "rows": str(rows),
        "model": str(model_path()),
        "output": str(folder / "plain"),
        **settings,
    }
    started = time.time()
    return child("plain_trl.py", json.dumps(asked), timeout=timeout) | {"started": started}


def as_messages(row: dict[str, Any]) -> dict[str, Any]:
    """A row as chat messages, as the toy model's template wants them and as a run shapes them too."""
    return {
        key: [{"role": "user" if key == "prompt" else "assistant", "content": said}] if isinstance(said, str) else said
        for key, said in row.items()
    }


# --- the product, as a notebook uses it -------------------------------------------------------------------------------


@contextlib.contextmanager
def shell() -> Iterator[Callable[[str], Any]]:
    """An InteractiveShell; call it with a cell. An error of the cell is raised."""
    import atexit

    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    from rlhf_nb import workspace

    made = InteractiveShell.instance(config=Config(HistoryManager={"enabled": False}))
    atexit.unregister(made.atexit_operations)

    def run(cell: str) -> Any:
        result = made.run_cell(cell, store_history=False)
        if not result.success:
            raise result.error_before_exec or result.error_in_exec
        return result.result

    try:
        yield run
    finally:
        workspace.use(None)
        InteractiveShell.clear_instance()


def until(true: Callable[[], Any], seconds: float, what: str) -> Any:
    """The first truthy value.

    Raises:
        TimeoutError: Not after `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not (value := true()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not after {seconds:g} s: {what}")
        time.sleep(0.02)
    return value


class Watch:
    """Every event of a run with the time at which this process got it."""

    def __init__(self, run: Any) -> None:
        self.seen: list[tuple[float, Any]] = []
        self._subscription = run.subscribe(self._take)

    def _take(self, events: list[Any]) -> None:
        now = time.time()
        self.seen += [(now, event) for event in events]

    def first(self, kind: str, seconds: float = 180.0, **fields: Any) -> tuple[float, Any]:
        """(arrival, event) of the first event of a kind with these fields.

        Raises:
            RuntimeError: The run ended first.
        """
        place = 0

        def look() -> tuple[float, Any] | None:
            nonlocal place
            seen = self.seen
            while place < len(seen):
                arrived, event = seen[place]
                place += 1
                if event.kind == kind and all(getattr(event, name) == value for name, value in fields.items()):
                    return arrived, event
                if event.kind in ("finished", "stopped", "failed"):
                    raise RuntimeError(f"the run {event.kind} before {kind} {fields}: {event}")
            return None

        return until(look, seconds, f"{kind} {fields}")

    def of(self, kind: str) -> list[Any]:
        return [event for _, event in self.seen if event.kind == kind]

    def close(self) -> None:
        self._subscription.close()
