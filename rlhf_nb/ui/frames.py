"""Metric rows as binary frames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from rlhf_nb.protocol.fold import MetricRow
from rlhf_nb.protocol.widget import Frame

ROWS_PER_FRAME = 4096
"""A snapshot goes out in pieces of about a megabyte, so that a view paints the first before it holds the last."""
LEADING = ("step", "rollout", "t")


def frames(
    rows: Sequence[MetricRow], metrics: Sequence[str], *, first: int, generation: int
) -> Iterator[tuple[Frame, bytes]]:
    """Frames for `rows`, the first of which has the number `first` in its generation.

    Returns:
        Each header with its buffer: (columns, n) float64, NaN where a row has no such metric.
    """
    for start in range(0, len(rows), ROWS_PER_FRAME):
        part = rows[start : start + ROWS_PER_FRAME]
        present = {metric for row in part for metric in row.values}
        columns = [metric for metric in metrics if metric in present]
        values = np.full((len(LEADING) + len(columns), len(part)), np.nan)
        index = {metric: len(LEADING) + position for position, metric in enumerate(columns)}
        for n, row in enumerate(part):
            values[0, n], values[2, n] = row.step, row.t
            if row.rollout is not None:
                values[1, n] = row.rollout
            for metric, value in row.values.items():
                if metric in index:
                    values[index[metric], n] = value
        header = Frame(generation=generation, first=first + start, n=len(part), columns=[*LEADING, *columns])
        yield header, values.tobytes()
