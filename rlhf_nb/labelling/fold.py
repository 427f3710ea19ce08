"""What the answers add up to: a data set, or a win rate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rlhf_nb.data.rows import Row, fault
from rlhf_nb.errors import NotFoundError, did_you_mean

if TYPE_CHECKING:
    from rlhf_nb.statistics.intervals import Estimate
    from rlhf_nb.store.records import Labelled


@dataclass(frozen=True)
class Folded:
    """Pairs that labels add up to, and why tasks gave none."""

    rows: list[Row] = field(repr=False)
    summary: str
    dropped: dict[str, int]
    simulated: tuple[str, ...] = ()
    """Names of simulated annotators among the labels."""


def pairs_from_labels(labels: Iterable[Labelled]) -> Folded:
    """The standing answers as rows of kind `pairs`, one a task, in task order.

    Several annotators of a task vote; ties and skips are no votes. The same labels give the same rows, and so the same
    content hash, whatever order they were given in.
    """
    labels = list(labels)
    by_task: dict[int, list[Labelled]] = {}
    for each in sorted(labels, key=lambda each: (each.task.position, each.label.annotator)):
        by_task.setdefault(each.task.id, []).append(each)
    rows: list[Row] = []
    dropped: Counter[str] = Counter()
    for votes in by_task.values():
        count = Counter(each.label.choice for each in votes)
        if count["a"] == count["b"]:
            dropped["annotators disagree" if count["a"] else "tie" if count["tie"] else "skip"] += 1
            continue
        item = votes[0].task.item
        good, bad = ("a", "b") if count["a"] > count["b"] else ("b", "a")
        row = {"prompt": item["prompt"], "chosen": item[good], "rejected": item[bad]}
        reason = fault("pairs", row)
        if reason:
            dropped[reason] += 1
        else:
            rows.append(row)
    simulated = tuple(sorted({str(name) for each in labels if (name := each.label.provenance.get("simulated"))}))
    return Folded(rows, _summary(len(rows), labels, dropped, simulated), dict(dropped), simulated)


def win_rate(labels: Iterable[Labelled], of: str, against: str | None = None, *, level: float = 0.95) -> Estimate:
    """How often the completions of one source were preferred in blind pairs; a tie counts one half, a skip not at all.

    Args:
        of: a name given in `model_items`, such as "ppo-7".
        against: only pairs with this other source.

    Raises:
        NotFoundError: no label compares that source.
        ShapeError: every such pair was skipped.
    """
    from rlhf_nb.statistics import win_rates

    count: Counter[str] = Counter()
    names: set[str] = set()
    for each in labels:
        sources = {side: each.task.item.get(f"{side}_from") for side in ("a", "b")}
        names.update(name for name in sources.values() if name)
        side = next((side for side, name in sources.items() if name == of), None)
        other = sources["b" if side == "a" else "a"]
        if side is None or (against is not None and other != against):
            continue
        choice = each.label.choice
        count[choice if choice in ("tie", "skip") else "win" if choice == side else "loss"] += 1
    if not count:
        hint = did_you_mean(of, names - {of})
        raise NotFoundError(
            f"no label compares {of!r}{f' with {against!r}' if against else ''}{hint or '; label a pair first'}"
        )
    return win_rates.win_rate(count["win"], count["loss"], count["tie"], level=level)


def _summary(n: int, labels: list[Labelled], dropped: Counter[str], simulated: tuple[str, ...]) -> str:
    annotators = sorted({each.label.annotator for each in labels})
    line = f"{n:,} pair{'' if n == 1 else 's'} from {len(labels):,} labels by {', '.join(annotators) or 'nobody'}"
    if dropped:
        reasons = ", ".join(
            f"{reason} ({count:,})" for reason, count in sorted(dropped.items(), key=lambda item: (-item[1], item[0]))
        )
        line += f"; left out {sum(dropped.values()):,}: {reasons}"
    return line + (f"; simulated annotator: {', '.join(simulated)}" if simulated else "")
