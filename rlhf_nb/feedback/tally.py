"""What a judge did over many pairs, in numbers: labels, ties, flips with the order, and what came to nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_nb.feedback.judge import Outcome
from rlhf_nb.statistics.intervals import Estimate, wilson


@dataclass(frozen=True)
class Tally:
    """Counts over pairs, each asked in both orders."""

    n: int
    decided: int
    """Both orders prefer the same completion."""
    ties: int
    """Both orders say that neither is better."""
    flips: int
    """The orders disagree; the label is a tie."""
    to_first: int
    """Flips in which each order preferred what it showed first."""
    to_second: int
    failures: dict[str, int] = field(default_factory=dict)
    """Pairs without a verdict in one order or both, by the cause that was met first."""
    agreement: Estimate | None = None
    """With labels that were there before, a tie counting one half, over the pairs that have a verdict; Wilson."""
    mean_preference: float | None = None
    """Mean over the decided of P(the preferred is better), where the backend gives probabilities."""

    @property
    def answered(self) -> int:
        return self.decided + self.ties + self.flips

    @property
    def flip_rate(self) -> Estimate | None:
        """Share of the answered pairs whose orders disagree; Wilson."""
        n = self.answered
        return Estimate(self.flips / n, wilson(self.flips, n), n) if n else None

    @property
    def first_share(self) -> Estimate | None:
        """Of the flips that favour a place, the share that favour the first; 0.5 is no liking for either. Wilson."""
        n = self.to_first + self.to_second
        return Estimate(self.to_first / n, wilson(self.to_first, n), n) if n else None

    def __str__(self) -> str:
        parts = [f"{self.decided} of {self.n} pairs decided"]
        parts += [f"{self.flips} flipped with the order"] if self.flips else []
        parts += [f"{self.ties} tied"] if self.ties else []
        parts += [f"{count} {cause.replace('_', ' ')}" for cause, count in self.failures.items()]
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        estimates = {"flip_rate": self.flip_rate, "first_share": self.first_share, "agreement": self.agreement}
        plain = {
            name: {"value": e.value, "interval": [e.interval.low, e.interval.high], "n": e.n}
            for name, e in estimates.items()
            if e is not None
        }
        counts = {name: getattr(self, name) for name in ("n", "decided", "ties", "flips", "to_first", "to_second")}
        return {**counts, "failures": self.failures, "mean_preference": self.mean_preference, **plain}


def tally(outcomes: Sequence[Outcome], better: Sequence[str | None] | None = None) -> Tally:
    """Count outcomes.

    Args:
        better: For each pair "a" or "b", which was labelled better before, or None where nothing says so.
    """
    decided = [each for each in outcomes if each.choice in ("a", "b")]
    flipped = [each for each in outcomes if each.flipped]
    places = Counter((each.orders[0].choice, each.orders[1].choice) for each in flipped)
    failures = Counter(each.failure for each in outcomes if not each.choice)
    hits = [
        0.5 if each.choice == "tie" else float(each.choice == label)
        for each, label in zip(outcomes, better or [None] * len(outcomes), strict=True)
        if each.choice and label is not None
    ]
    sure = [p if each.choice == "a" else 1 - p for each in decided if (p := each.a_probability) is not None]
    return Tally(
        n=len(outcomes),
        decided=len(decided),
        ties=sum(each.choice == "tie" and not each.flipped for each in outcomes),
        flips=len(flipped),
        to_first=places["first", "first"],
        to_second=places["second", "second"],
        failures=dict(sorted(failures.items())),
        agreement=Estimate(sum(hits) / len(hits), wilson(sum(hits), len(hits)), len(hits)) if hits else None,
        mean_preference=sum(sure) / len(sure) if sure else None,
    )
