"""Bokeh figures as JSON items. Colours are left to the view, which knows the theme; data come later as frames."""

from __future__ import annotations

import re
from typing import Any

from rlhf_nb.protocol.glossary import GLOSSARY, entry
from rlhf_nb.protocol.widget import Figure

TETHER = "tether"
TETHER_SERIES = {
    "kl": ["kl/policy_reference"],
    "proxy": ["reward/score", "reward/mean"],
    "gold": ["reward/gold", "gold/mean"],
}
"""What the tether view draws; of each, the first that the run has."""

_FIRST = ("reward", "reward_part", "gold", "kl", "loss", "pairs", "implicit_reward", "policy", "completion")
_LAST = ("optimizer", "data", "time")
_KNOWN = {name: position for position, name in enumerate(GLOSSARY)}


def order(metric: str) -> tuple[int, int, str]:
    """Small multiples stand by area, in the order a person asks about them; the clock comes last."""
    area = metric.partition("/")[0]
    if area in _LAST:
        place = len(_FIRST) + 1 + _LAST.index(area)
    else:
        place = _FIRST.index(area) if area in _FIRST else len(_FIRST)
    return place, _KNOWN.get(metric, len(_KNOWN)), metric


_BETTER = {"up": "higher is better", "down": "lower is better", "watch": ""}


def slug(metric: str) -> str:
    return re.sub(r"\W+", "-", metric)


def _figure(height: int, x_label: str, y_label: str, **options: Any) -> Any:
    from bokeh.models import BoxZoomTool, PanTool, Range1d
    from bokeh.plotting import figure

    # No wheel zoom: it would steal the notebook's scrolling.
    plot = figure(
        height=height,
        sizing_mode="stretch_width",
        toolbar_location=None,
        tools=[],
        x_axis_label=x_label,
        y_axis_label=y_label,
        x_range=Range1d(0, 10),
        y_range=Range1d(0, 1),
        min_border_left=4,
        min_border_right=10,
        output_backend="canvas",
        name="plot",
        **options,
    )
    zoom, pan = BoxZoomTool(dimensions="width"), PanTool(dimensions="width")
    plot.add_tools(zoom, pan)
    plot.toolbar.active_drag = zoom
    return plot


def _source(name: str, *columns: str) -> Any:
    from bokeh.models import ColumnDataSource

    return ColumnDataSource({column: [] for column in columns}, name=name)


def _hover(plot: Any, renderer: Any, tooltips: list[tuple[str, str]]) -> None:
    from bokeh.models import HoverTool

    plot.add_tools(HoverTool(renderers=[renderer], tooltips=tooltips, point_policy="snap_to_data"))


def _changes(plot: Any, glyph: str, **options: Any) -> None:
    source = _source("changes", "x", "y", "name", "move", "who", "why")
    renderer = getattr(plot, glyph)(x="x", source=source, name="changes", **options)
    _hover(plot, renderer, [("moved", "@name @move"), ("at step", "@x{0}"), ("by", "@who"), ("why", "@why")])


def curve(metric: str) -> Figure:
    """One metric over optimizer steps: raw faint, smoothed on top, a rule wherever a coefficient was moved."""
    from bokeh.embed import json_item

    known = entry(metric)
    plot = _figure(152, "optimizer step", known.unit)
    plot.xaxis.ticker.desired_num_ticks = 4
    plot.line("x", "y", source=_source("raw", "x", "y"), name="raw", line_width=1, line_alpha=0.3)
    plot.line("x", "y", source=_source("smooth", "x", "y"), name="smooth", line_width=2)
    plot.scatter("x", "y", source=_source("last", "x", "y"), name="last", size=5)
    _changes(plot, "vspan", line_width=1.5, line_dash=[3, 3])
    glossary = " · ".join(part for part in (metric, known.formula, known.estimator, _BETTER[known.direction]) if part)
    return Figure(
        id=slug(metric), metric=metric, label=known.label, glossary=glossary, unit=known.unit, item=json_item(plot)
    )


def tether() -> Figure:
    """Reward against the distance from the reference: proxy, true reward and human win rate."""
    from bokeh.embed import json_item
    from bokeh.models import LinearAxis, Range1d, Whisker

    plot = _figure(330, "√KL to the reference (√nats)", "reward")
    path = _source("path", "x", "y")
    plot.line("x", "y", source=path, name="path", line_width=1.5, line_alpha=0.5)
    proxy = plot.scatter("x", "y", source=_source("proxy", "x", "y", "step"), name="proxy", size=7)
    _hover(plot, proxy, [("proxy reward", "@y{0.000}"), ("√KL", "@x{0.00} √nats"), ("step", "@step{0}")])
    plot.line(
        "x",
        "y",
        source=_source("gold_path", "x", "y"),
        name="gold_path",
        line_width=1.5,
        line_alpha=0.5,
        line_dash=[5, 3],
    )
    gold = plot.scatter(
        "x", "y", source=_source("gold", "x", "y", "step"), name="gold", size=8, fill_alpha=0.0, line_width=1.8
    )
    _hover(plot, gold, [("true reward", "@y{0.000}"), ("√KL", "@x{0.00} √nats"), ("step", "@step{0}")])

    plot.extra_y_ranges = {"win": Range1d(0, 1)}
    axis = LinearAxis(
        y_range_name="win", axis_label="human win rate over the reference", name="win_axis", visible=False
    )
    axis.ticker.desired_num_ticks = 5
    plot.add_layout(axis, "right")
    human_source = _source("human", "x", "y", "low", "high", "n", "step")
    human = plot.scatter(
        "x",
        "y",
        source=human_source,
        name="human",
        marker="square",
        size=9,
        fill_alpha=0.0,
        line_width=1.8,
        y_range_name="win",
    )
    whisker = Whisker(source=human_source, base="x", lower="low", upper="high", name="whisker", y_range_name="win")
    whisker.upper_head.size = whisker.lower_head.size = 8
    plot.add_layout(whisker)
    _hover(
        plot, human,
        [("human win rate", "@y{0.00} (@low{0.00} to @high{0.00})"), ("labels", "@n"), ("step", "@step{0}")],
    )  # fmt: skip

    source = _source("changes", "x", "y", "step", "name", "move", "who", "why")
    moved = plot.scatter("x", "y", source=source, name="changes", marker="diamond", size=15, line_width=1.5)
    _hover(plot, moved, [("moved", "@name @move"), ("at step", "@step{0}"), ("by", "@who"), ("why", "@why")])
    return Figure(id=TETHER, label="tether", unit="√nats", series=TETHER_SERIES, item=json_item(plot))
