"""A run as a still picture, in SVG of our own: what the notebook shows with no kernel, on GitHub and in nbconvert."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from rlhf_nb.protocol.events import TERMINAL
from rlhf_nb.protocol.fold import RunFold
from rlhf_nb.protocol.glossary import entry
from rlhf_nb.ui.figures import TETHER_SERIES, order

if TYPE_CHECKING:
    from rlhf_nb.run import Run

EVERY_S = 10.0
WIDTH, HEIGHT, GAP = 340, 200, 16
_PROXY, _GOLD, _MOVE = "#1565c0", "#b45309", "#6a1b9a"
Point = tuple[float, float]


class StaticPicture:
    """The picture of a run as it is now. Displays as SVG; `.svg` is its text."""

    def __init__(self, run: Run) -> None:
        self.svg = draw(run.id, run.spec.title, run.spec.method, run.fold)
        self._text = repr(run)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"image/svg+xml": self.svg, "text/plain": self._text}


def follow(run: Run) -> None:
    """Display the picture in an output of its own and keep it current until the run ends."""
    from IPython.display import display

    handle = display(StaticPicture(run), display_id=True)
    stop, wake = threading.Event(), threading.Event()

    def heard(events: list[Any]) -> None:
        if any(event.kind in TERMINAL for event in events):
            stop.set()
            wake.set()

    subscription = run.subscribe(heard, since=run.fold.last_seq)
    if run.fold.is_terminal:
        subscription.close()
        return

    def keep() -> None:
        while not stop.is_set():
            wake.wait(EVERY_S)
            try:
                handle.update(StaticPicture(run))
            except Exception:  # noqa: BLE001 - detached or disk gone: the last picture stays, the panel says why
                break
        subscription.close()

    threading.Thread(target=keep, name=f"picture-{run.id}", daemon=True).start()


def draw(run_id: str, title: str, method: str, fold: RunFold) -> str:
    """SVG text: the tether where there is one, then the leading curves; interventions marked; id and hash below."""
    table = fold.table()
    plots = []
    tether = _tether(fold, table)
    if tether:
        plots.append(tether)
    names = sorted({name for row in fold.rows for name in row.values}, key=order)
    wanted = [n for n in names if not n.startswith(("time/", "data/"))][: 4 - len(plots)]
    plots += [_curve(name, table, fold) for name in wanted]
    if not plots:
        plots = [_empty("nothing measured yet")]
    columns = 2 if len(plots) > 1 else 1
    rows = -(-len(plots) // columns)
    width = columns * WIDTH + (columns + 1) * GAP
    height = rows * (HEIGHT + GAP) + 64
    places = [(GAP + (i % columns) * (WIDTH + GAP), 40 + (i // columns) * (HEIGHT + GAP)) for i in range(len(plots))]
    body = "".join(f'<g transform="translate({x},{y})">{p}</g>' for (x, y), p in zip(places, plots, strict=True))
    of = f"/{fold.max_steps}" if fold.max_steps else ""
    died = f": {fold.failure.reason}" if fold.failure else ""
    head = escape(f"{run_id} · {title} · {fold.state}{died} · step {fold.step}{of}"[:110])
    model = fold.model.content_hash[:16] if fold.model and fold.model.content_hash else "not saved"
    foot = escape(f"{run_id} · {method} · attempt {fold.attempt} · {len(fold.changes)} interventions · model {model}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'role="img" aria-label="{head}" font-family="system-ui, sans-serif" font-size="11">'
        f'<rect width="100%" height="100%" fill="#fff"/>'
        f'<text x="{GAP}" y="22" font-size="13" fill="#222">{head}</text>{body}'
        f'<text x="{GAP}" y="{height - 8}" fill="#616161">{foot}</text></svg>'
    )


def _pick(table: list[dict[str, Any]], names: list[str]) -> str | None:
    return next((name for name in names if any(name in row for row in table)), None)


def _tether(fold: RunFold, table: list[dict[str, Any]]) -> str:
    kl, proxy = _pick(table, TETHER_SERIES["kl"]), _pick(table, TETHER_SERIES["proxy"])
    gold = _pick(table, TETHER_SERIES["gold"])
    if not (fold.started and fold.started.has_reference and kl and proxy):
        return ""

    def points(name: str | None) -> list[Point]:
        return [
            (math.sqrt(max(0.0, row[kl])), row[name])
            for row in table
            if name in row and kl in row and math.isfinite(row[kl]) and math.isfinite(row[name])
        ]

    at = {row["step"]: math.sqrt(max(0.0, row[kl])) for row in table if kl in row and math.isfinite(row[kl])}
    moved = [
        (at[s], c.name)
        for c in fold.changes
        if (s := min(at, key=lambda k: abs(k - c.effective_step), default=-1)) in at
    ]
    series = [(points(proxy), _PROXY, True, "proxy"), (points(gold) if gold else [], _GOLD, False, "true")]
    return _plot("reward against distance", "√KL to the reference (√nats)", "score", series, moved)


def _curve(name: str, table: list[dict[str, Any]], fold: RunFold) -> str:
    meaning = entry(name)
    points = [(float(r["step"]), r[name]) for r in table if name in r and math.isfinite(r[name])]
    moved = [(float(change.effective_step), change.name) for change in fold.changes]
    return _plot(meaning.label, "optimizer step", meaning.unit, [(points, _PROXY, None, "")], moved)


def _empty(text: str) -> str:
    return f'<text x="{WIDTH / 2}" y="{HEIGHT / 2}" text-anchor="middle" fill="#616161">{escape(text)}</text>'


def _plot(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[tuple[list[Point], str, bool | None, str]],
    moved: list[tuple[float, str]],
) -> str:
    """One plot. A series is (points, colour, filled dots | hollow dots | None for a line, legend)."""
    every = [point for points, *_ in series for point in points]
    if not every:
        return _empty(f"{title}: no points yet")
    left, right, top, bottom = 44, WIDTH - 8, 20, HEIGHT - 34
    x0, x1 = min(x for x, _ in every), max(x for x, _ in every)
    y0, y1 = min(y for _, y in every), max(y for _, y in every)
    x1, pad = (x1 if x1 > x0 else x0 + 1), (y1 - y0) * 0.06 or abs(y0) * 0.1 or 1.0
    y0, y1 = y0 - pad, y1 + pad

    def px(x: float) -> float:
        return left + (x - x0) / (x1 - x0) * (right - left)

    def py(y: float) -> float:
        return bottom - (y - y0) / (y1 - y0) * (bottom - top)

    parts = [f'<text x="{left}" y="12" fill="#222">{escape(title)}</text>']
    for i in range(4):
        y = y0 + (y1 - y0) * (i + 0.5) / 4
        parts.append(f'<path d="M{left} {py(y):.1f}H{right}" stroke="#e6e6e6"/>')
        parts.append(f'<text x="{left - 4}" y="{py(y) + 4:.1f}" text-anchor="end" fill="#616161">{y:.3g}</text>')
        x = x0 + (x1 - x0) * i / 3
        anchor = "start" if i == 0 else "end" if i == 3 else "middle"
        parts.append(f'<text x="{px(x):.1f}" y="{bottom + 14}" text-anchor="{anchor}" fill="#616161">{x:.3g}</text>')
    parts.append(
        f'<text x="{(left + right) / 2}" y="{HEIGHT - 4}" text-anchor="middle" fill="#616161">{escape(x_label)}</text>'
    )
    if y_label:
        parts.append(f'<text x="{right}" y="12" text-anchor="end" fill="#616161">{escape(y_label)}</text>')
    for x, name in moved:
        if x0 <= x <= x1:
            rule = f'<path d="M{px(x):.1f} {top}V{bottom}" stroke="{_MOVE}" stroke-dasharray="3 3">'
            parts.append(f"{rule}<title>{escape(name)}</title></path>")
    legend = left + 4
    for points, colour, filled, name in series:
        thin = points[:: max(1, len(points) // 400)]
        if filled is None:
            path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in thin)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
            continue
        fill = colour if filled else "#fff"
        parts += [
            f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="2.5" fill="{fill}" stroke="{colour}"/>' for x, y in thin
        ]
        if points:
            parts.append(f'<circle cx="{legend + 4}" cy="{top + 6}" r="3" fill="{fill}" stroke="{colour}"/>')
            parts.append(f'<text x="{legend + 12}" y="{top + 10}" fill="#222">{escape(name)}</text>')
            legend += 60
    return "".join(parts)
