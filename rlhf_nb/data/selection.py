"""From scored completions to rows that train: the best of n, the best against the worst, all that are good enough."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from rlhf_nb.data.conversions import about_completions
from rlhf_nb.data.rows import Row, fault
from rlhf_nb.errors import DataError

Keep = Literal["all", "best", "best_and_worst", "threshold", "top_fraction"]
MADE: dict[Keep, str] = {
    "all": "completions",
    "best": "demonstrations",
    "best_and_worst": "pairs",
    "threshold": "demonstrations",
    "top_fraction": "demonstrations",
}
"""Kind of rows that each way of keeping gives."""
ALL_EQUAL = "prompts whose completions all score the same"


def select(
    rows: Iterable[Mapping[str, Any]],
    keep: Keep,
    *,
    threshold: float | None = None,
    fraction: float | None = None,
    drop_ties: bool = True,
) -> tuple[list[Row], dict[str, int]]:
    """Rows of another kind from `completions` with `scores`, and how many of what was left out.

    Args:
        keep: best, of each prompt the completion that scores highest, the first of several: best-of-n and, for
            training on, rejection sampling (RAFT, Dong et al. 2023, arXiv:2304.06767). best_and_worst, of each prompt
            the two ends as a pair. threshold, every completion that scores at least that (ReST, Gulcehre et al. 2023,
            arXiv:2308.08998). top_fraction, that share of all completions of all prompts, the highest first.
        fraction: Of top_fraction, above 0 and at most 1; rounded up to whole completions.
        drop_ties: Leave out prompts whose completions, two or more, all score the same: among them there is no best.
            Without it `best` is best-of-n as a policy (`maths.best_of_n`).

    Returns:
        The rows, in the order of the prompts, each with its score or scores; and reason → count.

    Raises:
        DataError: Completions without scores, or `threshold` or `fraction` missing or out of range.
    """
    scored = [dict(row) for row in rows]
    for index, row in enumerate(scored):
        if not isinstance(row.get("scores"), list) or fault("completions", row):
            raise DataError(
                f"row {index}: keep={keep} needs completions with their scores; sample them with a reward: "
                f"ws.generate(..., reward=...)"
            )
    if keep == "all":
        return scored, {}
    if keep == "threshold":
        if threshold is None or not math.isfinite(threshold):
            raise DataError(f"threshold={threshold!r}: keep=threshold needs the lowest score that is good enough")
        return _demonstrations(
            scored, lambda _, score: score >= threshold, f"completions that score below {threshold:g}"
        )
    if keep == "top_fraction":
        if fraction is None or not 0 < fraction <= 1:
            raise DataError(f"fraction={fraction!r}: keep=top_fraction needs a share above 0 and at most 1")
        kept = _top(scored, fraction)
        return _demonstrations(scored, lambda at, _: at in kept, f"completions below the top {fraction:g}")
    return _ends(scored, keep, drop_ties)


def _ends(rows: list[Row], keep: Keep, drop_ties: bool) -> tuple[list[Row], dict[str, int]]:
    made: list[Row] = []
    dropped: Counter[str] = Counter()
    for row in rows:
        texts, scores = row["completions"], row["scores"]
        high, low = max(scores), min(scores)
        if high == low and ((drop_ties and len(scores) > 1) or keep == "best_and_worst"):
            dropped[ALL_EQUAL] += 1
            continue
        best, worst = texts[scores.index(high)], texts[scores.index(low)]
        if keep == "best":
            one = {**_rest(row), "completion": best, "score": high}
        else:
            one = {**_rest(row), "chosen": best, "rejected": worst, "chosen_score": high, "rejected_score": low}
        if reason := fault(MADE[keep], one):
            dropped[reason] += 1
        else:
            made.append(one)
    return made, dict(dropped)


def _demonstrations(rows: list[Row], wanted: Any, otherwise: str) -> tuple[list[Row], dict[str, int]]:
    made: list[Row] = []
    dropped: Counter[str] = Counter()
    for number, row in enumerate(rows):
        said: set[str] = set()
        for index, (text, score) in enumerate(zip(row["completions"], row["scores"], strict=True)):
            one = {**_rest(row), "completion": text, "score": score}
            if not wanted((number, index), score):
                dropped[otherwise] += 1
            elif text in said:
                dropped["repeated completion"] += 1
            elif reason := fault("demonstrations", one):
                dropped[reason] += 1
            else:
                made.append(one)
                said.add(text)
    return made, dict(dropped)


def _top(rows: list[Row], fraction: float) -> set[tuple[int, int]]:
    scored = [(score, (number, index)) for number, row in enumerate(rows) for index, score in enumerate(row["scores"])]
    # Sorted by score alone, so that of equal ones the first stay.
    ranked = sorted(scored, key=lambda one: -one[0])
    # 0.07 * 100 is a little more than 7.
    return {at for _, at in ranked[: max(1, math.ceil(fraction * len(scored) - 1e-9))]}


def _rest(row: Row) -> Row:
    return {column: value for column, value in row.items() if not about_completions(column)}
