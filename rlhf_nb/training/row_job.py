"""A job whose result is a data set: it makes rows from rows, chunk by chunk, and goes on where it was killed.

A method that makes rows gives a `RowMaker` to a `RowJob` and returns that from `build_trainer`. What a chunk became is
on disk before the next one is begun; the whole is written once, to `data/rows.jsonl`, and then said in `data_saved`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from rlhf_nb.compute.rundir import LineTail, RunDir, append_line, storage_errors
from rlhf_nb.data.rows import Row, canonical_json, encode_rows, fault
from rlhf_nb.errors import DataError
from rlhf_nb.protocol.events import DataSaved
from rlhf_nb.training import distributed

if TYPE_CHECKING:
    from rlhf_nb.training.context import Context


@dataclass(frozen=True)
class Made:
    """Rows, and what was counted while they were made."""

    rows: list[Row]
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Reason → how many rows could not be made."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Anything else: ties, position flips, refusals."""


class RowMaker(Protocol):
    """What makes the rows. The same chunk must give the same rows: chance is keyed by the rows' numbers."""

    chunk: int
    """Input rows that are made into something together, and made again together after a death."""

    def make(self, start: int, rows: Sequence[Row]) -> Made:
        """What input rows `start`, `start + 1` … become. Called once a chunk, on one of the ranks."""
        ...

    def finish(self, made: Made) -> Made:
        """All that was made, in the order of the input, as it is to be kept. Called once, on rank 0."""
        ...

    def summary(self, made: Made) -> str:
        """One line: what the rows are and what made them."""
        ...


class RowJob:
    """Makes every row of the run's data, spread over the ranks, and saves them.

    Stopped by its user it saves what there is. `run.resume()` makes the rest.
    """

    step = 0

    def __init__(self, maker: RowMaker, context: Context) -> None:
        self.maker, self.context = maker, context
        self.place = RunDir(context.run_dir)
        self.journal = _Journal(self.place.data, context.rank)

    def train(self) -> None:
        """Make, save and emit `data_saved`.

        Raises:
            DataError: Nothing is left to save, or the maker gave a row that is none of its kind.
        """
        context, rows = self.context, self.context.rows
        context.control.bind([])
        starts = range(0, len(rows), self.maker.chunk)
        for first in range(0, len(starts), context.world_size):
            context.control.boundary(1)
            if context.control.stopping:
                break
            if first + context.rank < len(starts):
                start = starts[first + context.rank]
                self._make(start, rows[start : start + self.maker.chunk])
        distributed.barrier()
        if context.is_main:
            self._save([self.journal.read_all().get(key) for key in self._keys(starts)])

    def _make(self, start: int, rows: list[Row]) -> None:
        key = _key(start, rows)
        if key in self.journal.known:
            return
        self.context.emit.stage(f"rows {start + 1} to {start + len(rows)} of {len(self.context.rows)}")
        self.journal.put(key, self.maker.make(start, rows))

    def _keys(self, starts: range) -> list[str]:
        return [_key(start, self.context.rows[start : start + self.maker.chunk]) for start in starts]

    def _save(self, chunks: list[Made | None]) -> None:
        context, method = self.context, self.context.method
        there = [chunk for chunk in chunks if chunk is not None]
        if not there:
            context.emit.notice("no_rows", "stopped before any row was made", "warning")
            return
        if len(there) < len(chunks):
            done, asked = len(there) * self.maker.chunk, len(context.rows)
            context.emit.notice("stopped_early", f"stopped after about {done} of {asked} rows; these are saved")
        made = self.maker.finish(_together(there))
        if not made.rows:
            raise DataError(f"{method.name}: no row is left of {len(context.rows)} ({_reasons(made.dropped)})")
        for index, row in enumerate(made.rows):
            if reason := fault(method.made_kind, row):
                raise DataError(f"{method.name}: row {index} of what was made has a fault: {reason}")
        encoded = encode_rows(made.rows)
        _write(self.place.rows_path, encoded)
        context.emit.event(
            DataSaved(
                path=str(self.place.rows_path.relative_to(self.place.path)),
                row_kind=method.made_kind,
                rows=len(made.rows),
                content_hash=hashlib.sha256(encoded).hexdigest(),
                summary=self.maker.summary(made),
                dropped=dict(made.dropped),
                counts=dict(made.counts),
            )
        )

    def save_model(self, directory: str) -> None:
        raise TypeError(f"{self.context.method.name} saves rows, no model")


class _Journal:
    """What chunks became, a line each, one file a rank. A line that a death tore is a chunk that is made again."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.path = folder, folder / f"made-{rank}.jsonl"
        with storage_errors(folder):
            folder.mkdir(exist_ok=True)
            _cut_torn_line(self.path)
        self.known = self.read_all()

    def read_all(self) -> dict[str, Made]:
        """Every rank's, by key."""
        found: dict[str, Made] = {}
        for path in sorted(self.folder.glob("made-*.jsonl")):
            for line in LineTail(path).read_raw():
                with suppress(ValueError, KeyError):
                    said = json.loads(line)
                    found[said["key"]] = Made(said["rows"], said["dropped"], said["counts"])
        return found

    def put(self, key: str, made: Made) -> None:
        line = {"key": key, "rows": made.rows, "dropped": dict(made.dropped), "counts": dict(made.counts)}
        append_line(self.path, line)
        self.known[key] = made


def _key(start: int, rows: Sequence[Row]) -> str:
    return hashlib.sha256(canonical_json([start, list(rows)]).encode()).hexdigest()[:24]


def _together(chunks: Sequence[Made]) -> Made:
    dropped: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for chunk in chunks:
        dropped.update(chunk.dropped)
        counts.update(chunk.counts)
    return Made([row for chunk in chunks for row in chunk.rows], dict(dropped), dict(counts))


def _reasons(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in dropped.items()) or "nothing was made"


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    with open(path, "rb+") as handle:
        handle.truncate(handle.read().rfind(b"\n") + 1)


def _write(path: Path, content: bytes) -> None:
    with storage_errors(path):
        scratch = path.with_name(f".{path.name}.tmp")
        with open(scratch, "wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(scratch, path)


def weighted_scores(
    context: Context, role: Literal["reward", "gold"] = "reward", *, device: Any = None
) -> Callable[[Sequence[Row], Sequence[str]], list[float]] | None:
    """f(rows, completions) → one score each by the spec's reward, the weighted sum of its parts; None without one."""
    from rlhf_nb.protocol.spec import reward_parts
    from rlhf_nb.rewards.functions import on_rows
    from rlhf_nb.rewards.resolve import load

    named = reward_parts(getattr(context.spec, role))
    parts = [(part.weight, load(context, part.reward, device=device)) for part in named]
    if not parts:
        return None

    def score(rows: Sequence[Row], completions: Sequence[str]) -> list[float]:
        columns = [[weight * one for one in on_rows(f, rows, completions)] for weight, f in parts]
        return [sum(each) for each in zip(*columns, strict=True)]

    return score
