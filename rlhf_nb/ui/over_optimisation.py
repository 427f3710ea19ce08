"""The study of over-optimisation as a picture: proxy and true reward against √KL, with the fits and their peaks."""

from __future__ import annotations

from typing import Any

import numpy as np

from rlhf_nb.studies import over_optimisation as study
from rlhf_nb.ui.svg import INK, QUIET, Line, Plot, document, text

WIDTH, HEIGHT, HEAD, FOOT = 860, 350, 30, 44
COLOURS = ("#d55e00", "#e69f00", "#009e73", "#0072b2")
"""Okabe and Ito's, told apart by all kinds of colour vision."""
MARKERS = ("diamond", "triangle", "square", "circle")
BEST_OF_N = (INK, "down")
PANELS: tuple[tuple[study.Reward, str, str], ...] = (
    ("proxy", "proxy reward: what is optimised", "proxy less toy-sft's (std of toy-sft)"),
    ("true", "true reward: what was wanted", "true reward less toy-sft's (0 to 1)"),
)


class OverOptimisation:
    """The picture of a study's results. Displays as SVG, on a ground of its own in a dark theme; `.svg` is its text."""

    def __init__(self, results: dict[str, Any]) -> None:
        self.svg = draw(results)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return {"image/svg+xml": self.svg, "text/plain": "proxy and true reward against √KL, PPO and best-of-n"}


def draw(results: dict[str, Any]) -> str:
    parts = [text(12, 20, "Over-optimisation on the toy world", size=14, weight=600)]
    for number, (reward, title, y_label) in enumerate(PANELS):
        width = (WIDTH - 12) / 2
        parts.append(_panel(results, reward, title, y_label).draw(6 + number * width, HEAD, width, HEIGHT))
    seeds, made = len(results["seeds"]), results["made_with"]
    parts.append(
        text(
            12,
            HEAD + HEIGHT + 16,
            f"Small: {seeds} seeds. Lines: R = d(a − b·log d) for PPO, dashed R = d(a − b·d) for best-of-n, "
            "fitted to all seeds. Large hollow: fitted peak d*, where it is among the data.",
            size=10,
            colour=QUIET,
        )
    )
    footer = (
        f"best-of-n at the upper bound of its KL · commit {made['commit'][:10]} · {made['began']} · {made['machine']}"
    )
    parts.append(text(12, HEAD + HEIGHT + 32, footer, size=10, colour=QUIET))
    return document(WIDTH, HEAD + HEIGHT + FOOT, "proxy and true reward against the distance from toy-sft", parts)


def _panel(results: dict[str, Any], reward: study.Reward, title: str, y_label: str) -> Plot:
    points, fits, peaks = [], [], []
    for setting, colour, marker in zip(
        study.settings(), [*COLOURS, BEST_OF_N[0]], [*MARKERS, BEST_OF_N[1]], strict=True
    ):
        look: dict[str, Any] = {"colour": colour, "marker": marker}
        for of_seed in results["seeds"]:
            x, y = study.curve(of_seed, setting, reward)
            points.append(Line(x, y, dots="filled", size=2, faint=True, joined=False, **look))
        fit = study.fits(results, setting, reward).fit
        grid = np.linspace(0, fit.furthest, 100)
        dashed = setting.kl_coef is None
        fits.append(
            Line(
                grid.tolist(),
                fit.reward(grid).tolist(),
                label=setting.name if reward == "proxy" else "",
                dots="",
                dashed=dashed,
                **look,
            )
        )
        if fit.peak is not None and fit.peak_within:
            peaks.append(Line([fit.peak.distance], [fit.peak.reward], dots="hollow", size=5.5, joined=False, **look))
    return Plot(title, "√KL to toy-sft (√nats)", y_label, [*points, *fits, *peaks])
