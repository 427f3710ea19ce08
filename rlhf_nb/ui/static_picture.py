"""The picture of a run that needs no kernel: it stays in the notebook, on GitHub and in a paper's appendix."""

from __future__ import annotations

import hashlib
import math
import threading
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from rlhf_nb.protocol.events import TERMINAL
from rlhf_nb.protocol.fold import RunFold
from rlhf_nb.protocol.glossary import entry
from rlhf_nb.protocol.spec import RunSpec
from rlhf_nb.ui.figures import TETHER_SERIES, order
from rlhf_nb.ui.svg import BLUE, INK, QUIET, Line, Plot, Rule, document, text

if TYPE_CHECKING:
    from rlhf_nb.run import Run

EVERY_S = 10.0
WIDTH, PLOT_HEIGHT, HEAD = 760, 230, 30
MOST_PLOTS = 4
BESIDE_THE_TETHER = ("kl/policy_reference", "completion/length_mean", "policy/entropy")
"""The rewards stand in the tether already."""
MEMORY = 0.85
TOLD_CHANGES = 4
DOTS = 40

Points = tuple[list[float], list[float]]


class StaticPicture:
    """The picture of a run as it is now. Displays as SVG; `.svg` is its text."""

    def __init__(self, run: Run) -> None:
        self.svg = draw(run.fold, run.id, title=run.spec.title, content=content_hash(run.spec))
        self._text = repr(run)

    def save(self, path: str | Path) -> Path:
        path = Path(path)
        path.write_text(self.svg, encoding="utf-8")
        return path

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return {"image/svg+xml": self.svg, "text/plain": self._text}


_kept: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
"""Runs whose picture is kept current, and the display id that all its outputs share."""
_keeping = threading.Lock()


def follow(run: Run) -> None:
    """Display the picture in an output of its own. Every output of it is kept current until the run ends."""
    from IPython.display import display

    with _keeping:
        picture, kept = StaticPicture(run), _kept.get(run)
        name = kept or uuid.uuid4().hex
        display(picture, display_id=name)
        if kept is None and not run.fold.is_terminal:
            _kept[run] = name
            threading.Thread(target=_keep, args=(run, name, picture.svg), name=f"picture-{run.id}", daemon=True).start()


def _keep(run: Run, name: str, shown: str) -> None:
    from IPython.display import update_display

    wake = threading.Event()

    def heard(events: list[Any]) -> None:
        if any(event.kind in TERMINAL for event in events):
            wake.set()

    subscription = None
    try:
        subscription = run.subscribe(heard, since=run.fold.last_seq)
        over = False
        while not over:
            wake.wait(EVERY_S)
            wake.clear()
            # Asked of the run itself: an event that ends it is not heard where its subscription went with its compute.
            over = run.fold.is_terminal
            picture = StaticPicture(run)
            if picture.svg != shown:
                # Every update makes the notebook one that has changes to be saved.
                shown = picture.svg
                update_display(picture, display_id=name)
    except Exception:  # noqa: BLE001 - detached or disk gone: the last picture stays, the panel says why
        pass
    finally:
        with _keeping:
            _kept.pop(run, None)
        if subscription is not None:
            subscription.close()


def content_hash(spec: RunSpec) -> str:
    """Of everything that decided what the run computed."""
    return hashlib.sha256(spec.model_dump_json().encode()).hexdigest()[:12]


def draw(fold: RunFold, run_id: str, *, title: str = "", content: str = "") -> str:
    table = fold.table()
    metrics = sorted({name for row in table for name in row} - {"step", "rollout"}, key=order)
    plots = _plots(fold, table, metrics)
    columns = 1 if len(plots) == 1 else 2
    lines = math.ceil(len(plots) / columns)
    told = [
        f"◆ step {change.effective_step}: {change.name} {change.old:.3g} → {change.new:.3g}"
        + (f" ({change.who})" if change.who else "")
        + (f", {change.why}" if change.why else "")
        for change in fold.changes
    ]
    if len(told) > TOLD_CHANGES:
        told = [*told[: TOLD_CHANGES - 1], f"◆ and {len(told) - TOLD_CHANGES + 1} more"]
    height = HEAD + max(lines, 0) * PLOT_HEIGHT + 15 * len(told) + 30
    parts = [text(12, 20, f"{run_id} · {title}" if title else run_id, size=14, weight=600)]
    parts.append(text(WIDTH - 12, 20, _state(fold), anchor="end", colour=QUIET))
    width = (WIDTH - 12) / columns
    for number, plot in enumerate(plots):
        parts.append(
            plot.draw(6 + number % columns * width, HEAD + number // columns * PLOT_HEIGHT, width, PLOT_HEIGHT)
        )
    y = HEAD + lines * PLOT_HEIGHT + 14.0
    for line in told:
        parts.append(text(12, y, line))
        y += 15
    parts.append(text(12, height - 10, _footer(fold, run_id, content), size=10, colour=QUIET))
    return document(WIDTH, height, f"run {run_id}", parts)


def _plots(fold: RunFold, table: list[dict[str, Any]], metrics: list[str]) -> list[Plot]:
    kl, proxy, gold = (next((name for name in names if name in metrics), None) for names in TETHER_SERIES.values())
    plots = []
    if kl and proxy:
        plots.append(_tether(fold, table, kl, proxy, gold))
        metrics = [metric for metric in BESIDE_THE_TETHER if metric in metrics]
    rules = [Rule(change.effective_step) for change in fold.changes]
    for metric in metrics:
        if len(plots) == MOST_PLOTS:
            break
        x, y = _series(table, metric)
        if not x or metric.startswith(("time/", "data/")):
            continue
        known = entry(metric)
        unit = f"{known.label} ({known.unit})" if known.unit else known.label
        lines = [Line(x, y, faint=True), Line(x, smoothed(y))] if len(x) > 3 else [Line(x, y)]
        plots.append(Plot(known.label, "optimizer step", unit, lines, rules))
    return plots


def _tether(fold: RunFold, table: list[dict[str, Any]], kl: str, proxy: str, gold: str | None) -> Plot:
    def against_kl(metric: str) -> Points:
        rows = [(row[kl], row[metric]) for row in table if kl in row and metric in row]
        rows = [(a, b) for a, b in rows if math.isfinite(a + b)]
        size = max(1, math.ceil(len(rows) / DOTS))
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        x = [math.sqrt(max(0.0, sum(a for a, _ in part) / len(part))) for part in parts]
        return x, [sum(b for _, b in part) / len(part) for part in parts]

    lines = [Line(*against_kl(proxy), label="proxy reward", dots="filled", colour=BLUE)]
    if gold:
        lines.append(Line(*against_kl(gold), label="true reward", dots="hollow", colour=INK, dashed=True))
    moved = []
    for change in fold.changes:
        row = next((row for row in table if row["step"] >= change.effective_step and kl in row and proxy in row), None)
        if row is not None:
            moved.append(Rule(math.sqrt(max(0.0, row[kl])), row[proxy]))
    title = "reward against distance from the reference"
    return Plot(title, "√KL to the reference (√nats)", "reward (score)", lines, moved)


def _series(table: list[dict[str, Any]], metric: str) -> Points:
    points = [(row["step"], row[metric]) for row in table if metric in row and math.isfinite(row[metric])]
    return [x for x, _ in points], [y for _, y in points]


def smoothed(values: list[float]) -> list[float]:
    """An exponential mean without the bias towards zero at its start, as the panel draws it."""
    out, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = MEMORY * mean + (1 - MEMORY) * value, MEMORY * weight + 1 - MEMORY
        out.append(mean / weight)
    return out


def _state(fold: RunFold) -> str:
    steps = f"step {fold.step}" + (f" of {fold.max_steps}" if fold.max_steps else "")
    reason = f": {fold.failure.reason}" if fold.failure else ""
    line = f"{fold.state}{reason} · {steps}"
    return line if len(line) < 90 else f"{line[:88]}…"


def _footer(fold: RunFold, run_id: str, content: str) -> str:
    parts = [f"run {run_id}"]
    if content:
        parts.append(f"spec {content}")
    if fold.model is not None and fold.model.content_hash:
        parts.append(f"model {fold.model.content_hash[:12]}")
    if fold.started is not None:
        ranks = fold.started.world_size
        parts += [fold.started.device, f"{ranks} rank{'' if ranks == 1 else 's'}"]
    if fold.started_at is not None:
        parts.append(datetime.fromtimestamp(fold.started_at, UTC).strftime("%Y-%m-%d %H:%M UTC"))
    return " · ".join(part for part in parts if part)
