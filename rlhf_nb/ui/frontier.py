"""Several runs against each other: what they won, of a reward that was only watched, over how far they went for it."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import TYPE_CHECKING, Any

from rlhf_nb.errors import SpecError
from rlhf_nb.ui.svg import Line, Plot, document

if TYPE_CHECKING:
    from rlhf_nb.run import Run

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's, told apart by all kinds of colour vision."""
MARKERS = ("circle", "square", "triangle", "diamond", "down")
WIDTH, HEIGHT = 620, 340
KL, GOLD = "kl/policy_reference", "reward/gold"


class Frontier:
    """True reward against √KL to where each run started, a dot each time it was sampled. SVG; `.svg` is its text."""

    def __init__(self, runs: Mapping[str, Run]) -> None:
        """
        Args:
            runs: By the name they get in the legend. Each was given `gold=`, and sampled with `sample_every`.

        Raises:
            SpecError: More runs than can be told apart, or one in which both were never measured together.
        """
        if len(runs) > len(COLOURS):
            raise SpecError(f"{len(runs)} runs in one picture; {len(COLOURS)} can be told apart")
        self.points = {name: points(run) for name, run in runs.items()}
        for name, found in self.points.items():
            if not found:
                raise SpecError(f"{name}: no step has both {KL} and {GOLD}; give gold= and sample_every when it starts")
        self.svg = self._draw()

    def _draw(self) -> str:
        lines = [
            Line(
                [x for x, _ in found],
                [y for _, y in found],
                label=name,
                colour=COLOURS[i],
                dots="filled",
                marker=MARKERS[i % len(MARKERS)],
            )
            for i, (name, found) in enumerate(self.points.items())
        ]
        title = "true reward against the distance from the start"
        plot = Plot(title, "√KL to the start (√nats)", "true reward", lines)
        return document(WIDTH, HEIGHT, title, [plot.draw(6, 6, WIDTH - 12, HEIGHT - 12)])

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        told = "; ".join(f"{name} {found[-1][1]:.3f} at √KL {found[-1][0]:.2f}" for name, found in self.points.items())
        return {"image/svg+xml": self.svg, "text/plain": f"true reward at the end: {told}"}


def points(run: Run) -> list[tuple[float, float]]:
    """(√KL, true reward) at each step that was sampled. A sampled KL below 0 is told as 0."""
    rows = [row for row in run.fold.table() if row.get(KL) is not None and row.get(GOLD) is not None]
    return [(sqrt(max(0.0, row[KL])), row[GOLD]) for row in rows]
