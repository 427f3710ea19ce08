"""`Dataset`: a handle to rows that have a name, a kind and a content hash."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf_nb.data import rows as rows_of
from rlhf_nb.data.rows import Row, canonical_json, prompt_key
from rlhf_nb.errors import DataError

if TYPE_CHECKING:
    import pandas

    from rlhf_nb.data.selection import Keep
    from rlhf_nb.store import Store


class Dataset:
    """Rows of one kind, loaded at first use. Not to be changed in place: the content hash is what it is known by."""

    def __init__(
        self,
        name: str,
        kind: str,
        rows: list[Row] | Callable[[], list[Row]],
        *,
        content_hash: str | None = None,
        summary: str = "",
        n: int | None = None,
        version: int | None = None,
        dropped: dict[str, int] | None = None,
        made_from: Dataset | None = None,
    ) -> None:
        self.name = name
        self.kind = kind
        self.version = version
        self.made_from = made_from
        """The data set that these rows were taken from; `summary` says how."""
        self.dropped = dict(dropped or {})
        self._load = rows if callable(rows) else None
        self._rows = None if callable(rows) else list(rows)
        self._content_hash = content_hash
        self._n = n
        self._summary = summary

    @classmethod
    def from_store(cls, store: Store, name: str, version: int | None = None) -> Dataset:
        """The data set of that name in a workspace's store; its rows are read when they are first asked for."""
        record = store.dataset(name, version)
        return cls(
            record.name,
            record.kind,
            lambda: store.get_rows(record.content_hash),
            content_hash=record.content_hash,
            summary=record.summary,
            n=record.n,
            version=record.version,
            dropped=record.dropped,
        )

    @property
    def rows(self) -> list[Row]:
        """The rows, each a dict."""
        if self._rows is None:
            assert self._load is not None
            self._rows = self._load()
        return self._rows

    @property
    def content_hash(self) -> str:
        """SHA-256 of the canonical JSONL of the rows."""
        if self._content_hash is None:
            self._content_hash = rows_of.content_hash(self.rows)
        return self._content_hash

    @property
    def summary(self) -> str:
        """One line: what it holds and where it is from."""
        return self._summary or f"{len(self):,} {self.kind}"

    @property
    def prompts(self) -> list[Any]:
        """Each prompt once."""
        return list(rows_of.iter_prompts(self.rows))

    def to_pandas(self) -> pandas.DataFrame:
        """The rows as a DataFrame, one column a key."""
        import pandas

        return pandas.DataFrame(self.rows)

    def split(self, test: float = 0.2, seed: int = 0) -> tuple[Dataset, Dataset]:
        """Two data sets, `(train, held_out)`, that share no prompt.

        Which side a prompt falls on depends on its text and the seed, not on its place, and rows keep their order.

        Args:
            test: share of the prompts to hold out, between 0 and 1. Each side gets one prompt at least.

        Raises:
            DataError: `test` is out of range, or there are fewer than two prompts.
        """
        if not isinstance(test, int | float) or not 0 < test < 1:
            raise DataError(f"test={test!r}: the share to hold out must lie between 0 and 1, for instance 0.2")
        keys = [prompt_key(row["prompt"]) for row in self.rows]
        distinct = sorted(
            set(keys), key=lambda key: hashlib.sha256(canonical_json([seed, key]).encode("utf-8")).digest()
        )
        if len(distinct) < 2:
            what = "1 row" if len(keys) == 1 else f"{len(keys):,} rows with 1 distinct prompt"
            raise DataError(
                f"{self.name!r} has {what}: it cannot be split by prompt; import rows with at least 2 prompts"
            )
        n_test = min(max(round(test * len(distinct)), 1), len(distinct) - 1)
        chosen = set(distinct[:n_test])
        sides = []
        for suffix, wanted in (("train", False), ("held-out", True)):
            rows = [row for row, key in zip(self.rows, keys, strict=True) if (key in chosen) == wanted]
            n_prompts = n_test if wanted else len(distinct) - n_test
            what = f"{len(rows):,} {self.kind} with {n_prompts:,} prompts"
            line = f"{what}: {suffix} part of {self.name}, test={test:g}, seed={seed}"
            sides.append(Dataset(f"{self.name}-{suffix}", self.kind, rows, summary=line, made_from=self))
        return sides[0], sides[1]

    def to_file(self, path: str | Path) -> Path:
        """Write the rows to .jsonl, .jsonl.gz or .parquet."""
        from rlhf_nb.data.exporters import write_rows

        return write_rows(self.rows, path)

    def to(self, kind: str, *, only: Literal["", "best_and_worst"] = "") -> Dataset:
        """The rows as another kind: pairs as thumbs, rankings as pairs, anything as prompts. `.dropped` counts what
        could not come along.

        Args:
            only: Of rankings as pairs: one pair a ranking, a best completion against a worst one.

        Raises:
            DataError: That kind does not contain what the other needs, or no row is left.
        """
        from rlhf_nb.data.conversions import convert, rankings_to_ends
        from rlhf_nb.data.importers import nothing_left, summarize

        if only and (self.kind, kind) != ("rankings", "pairs"):
            raise DataError(f"{self.name!r}: only={only!r} is for rankings as pairs, and these are {self.kind}")
        rows, dropped = rankings_to_ends(self.rows) if only else convert(self.rows, self.kind, kind)
        if not rows:
            raise DataError(nothing_left(self.name, kind, len(self), self.kind, dropped))
        return Dataset(
            f"{self.name}-{kind}",
            kind,
            rows,
            summary=summarize(len(rows), kind, self.name, dropped),
            dropped=dropped,
            made_from=self,
        )

    def select(
        self, keep: Keep, *, threshold: float | None = None, fraction: float | None = None, drop_ties: bool = True
    ) -> Dataset:
        """Of scored completions: the `best` of each prompt as demonstrations, `best_and_worst` as pairs, those above a
        `threshold` or the `top_fraction` of all as demonstrations. See `data.selection.select`."""
        from rlhf_nb.data.importers import summarize
        from rlhf_nb.data.selection import MADE, select

        if self.kind != "completions":
            raise DataError(f"{self.name!r} holds {self.kind}: select works on completions with scores")
        rows, dropped = select(self.rows, keep, threshold=threshold, fraction=fraction, drop_ties=drop_ties)
        kind = MADE[keep]
        if not rows:
            raise DataError(f"{self.name!r}: keep={keep} leaves no {kind} of its {len(self):,} prompts")
        line = summarize(len(rows), kind, f"{self.name}, {keep}", dropped)
        name = f"{self.name}-{keep.replace('_', '-')}"
        return Dataset(name, kind, rows, summary=line, dropped=dropped, made_from=self)

    def __len__(self) -> int:
        return self._n if self._n is not None and self._rows is None else len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        return self.rows[index]

    def __repr__(self) -> str:
        return f"<Dataset {self.name}: {self.summary}; {self.content_hash[:12]}>"
