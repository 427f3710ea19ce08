"""What a judge did over many pairs, in numbers: labels, ties, flips with the order, and what came to nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from rlhf_nb.feedback.chat import Failure
from rlhf_nb.feedback.judge import Outcome
from rlhf_nb.statistics.intervals import Estimate, wilson

COUNTS = ("pairs", "decided", "ties", "flips", "to_first", "to_second", "labelled", "agreed_halves")


@dataclass(frozen=True)
class Tally:
    """Counts over pairs, each asked in both orders. Tallies of parts add up to the tally of the whole."""

    pairs: int = 0
    decided: int = 0
    """Both orders prefer the same completion."""
    ties: int = 0
    """Both orders say that neither is better."""
    flips: int = 0
    """The orders disagree; the label is a tie."""
    to_first: int = 0
    """Flips in which each order preferred what it showed first."""
    to_second: int = 0
    labelled: int = 0
    """Pairs with a verdict that somebody had labelled before."""
    agreed_halves: int = 0
    """Twice the sum over those of 1 for the same verdict and one half for a tie."""
    failures: dict[str, int] = field(default_factory=dict)
    """Pairs without a verdict in one order or both, by the cause that was met first."""

    @property
    def answered(self) -> int:
        return self.decided + self.ties + self.flips

    @property
    def agreement(self) -> Estimate | None:
        """With the labels that were there before, a tie counting one half; Wilson."""
        return _share(self.agreed_halves / 2, self.labelled)

    @property
    def flip_rate(self) -> Estimate | None:
        """Share of the answered pairs whose orders disagree; Wilson."""
        return _share(self.flips, self.answered)

    @property
    def first_share(self) -> Estimate | None:
        """Of the flips that favour a place, the share that favour the first; 0.5 is no liking for either. Wilson."""
        return _share(self.to_first, self.to_first + self.to_second)

    def __str__(self) -> str:
        parts = [f"{self.decided} of {self.pairs} pairs decided"]
        parts += [f"{self.flips} flipped with the order"] if self.flips else []
        parts += [f"{self.ties} tied"] if self.ties else []
        parts += [f"{count} {cause.replace('_', ' ')}" for cause, count in self.failures.items()]
        return ", ".join(parts)

    def to_counts(self) -> dict[str, int]:
        """As flat counts that add up; zeros are left out."""
        plain = {name: getattr(self, name) for name in COUNTS}
        return {name: n for name, n in {**plain, **self.failures}.items() if n}

    @classmethod
    def from_counts(cls, counts: Mapping[str, int]) -> Tally:
        plain = {name: counts.get(name, 0) for name in COUNTS}
        causes = [cause for cause in get_args(Failure) if cause]
        return cls(**plain, failures={cause: counts[cause] for cause in sorted(causes) if counts.get(cause)})

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON, the shares with their intervals."""
        shares = {name: getattr(self, name) for name in ("agreement", "flip_rate", "first_share")}
        plain = {
            name: {"value": share.value, "interval": [share.interval.low, share.interval.high], "n": share.n}
            for name, share in shares.items()
            if share is not None
        }
        return {**{name: getattr(self, name) for name in COUNTS}, "failures": self.failures, **plain}


def _share(successes: float, n: int) -> Estimate | None:
    return Estimate(successes / n, wilson(successes, n), n) if n else None


def tally(outcomes: Sequence[Outcome], better: Sequence[str | None] | None = None) -> Tally:
    """Count outcomes.

    Args:
        better: For each pair "a" or "b", which was labelled better before, or None where nothing says so.
    """
    flipped = [each for each in outcomes if each.flipped]
    places = Counter((each.orders[0].choice, each.orders[1].choice) for each in flipped)
    halves = [
        1 if each.choice == "tie" else 2 * (each.choice == label)
        for each, label in zip(outcomes, better or [None] * len(outcomes), strict=True)
        if each.choice and label is not None
    ]
    return Tally(
        pairs=len(outcomes),
        decided=sum(each.choice in ("a", "b") for each in outcomes),
        ties=sum(each.choice == "tie" and not each.flipped for each in outcomes),
        flips=len(flipped),
        to_first=places["first", "first"],
        to_second=places["second", "second"],
        labelled=len(halves),
        agreed_halves=sum(halves),
        failures=dict(sorted(Counter(str(each.failure) for each in outcomes if not each.choice).items())),
    )
