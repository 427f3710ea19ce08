"""One annotator working through a queue of pairs.

    session = LabelSession(store, "hh", items, annotator="mira")
    shown = session.current            # prompt, first, second: which is which is nobody's business
    session.submit(client_id, "1", task_id=shown.task_id, seconds=4.2)
    session.undo(another_client_id)

Nothing is kept in memory that the database does not have: a new session of the same queue and annotator goes on where
the last one stopped.
"""

from __future__ import annotations

import hashlib
import math
import os
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_nb import __version__
from rlhf_nb.errors import DataError, NotFoundError, did_you_mean
from rlhf_nb.labelling.items import check_items

if TYPE_CHECKING:
    from rlhf_nb.store import Store
    from rlhf_nb.store.records import Labelled, Progress, Task

RUBRIC = ("helpful", "honest", "harmless", "concise")
AUTOLABEL = "RLHF_NB_AUTOLABEL"
"""Environment variable: the name of a simulated annotator that answers in headless runs."""

_CHOICES = {
    "1": "first",
    "a": "first",
    "2": "second",
    "b": "second",
    "tie": "tie",
    "t": "tie",
    "skip": "skip",
    "s": "skip",
}


@dataclass(frozen=True)
class Shown:
    """A task as an annotator sees it: the sides in their random order, their sources left out."""

    task_id: int
    position: int
    total: int
    prompt: Any
    first: str
    second: str


@dataclass(frozen=True)
class Ack:
    """The answer is in the database."""

    label_id: int
    task_id: int
    client_id: str
    saved: bool = True


class LabelSession:
    """The state is the database's; the methods may be called from any thread, and again after an error."""

    def __init__(
        self,
        store: Store,
        queue: str,
        items: Iterable[Mapping[str, Any]] | None = None,
        *,
        annotator: str | None = None,
        seed: int = 0,
        source: str = "",
    ) -> None:
        """Enter the items and find the first unanswered one.

        Args:
            items: put in the queue; those that are there keep their place. None to go on with a queue that exists.
            annotator: the user's name when not given.
            seed: of the side order. A queue keeps the first seed it was given: an answer on its way when the kernel
                restarts must still mean the side that was shown.
            source: the data set or run the items come from.

        Raises:
            NotFoundError: no items given, and no such queue.
            DataError: an item that is not a pair.
        """
        from rlhf_nb.store.database import default_who

        self.store, self.queue = store, queue
        self.annotator = annotator or default_who()
        if items is not None:
            store.create_tasks(queue, check_items(items), mode="pair", source=source)
        self.seed = int(store.keep_first(f"label seed {queue}", str(seed)))
        self._session_id = uuid.uuid4().hex[:12]
        store.next_task(queue, self.annotator)  # says so now when there is no such queue

    @property
    def current(self) -> Shown | None:
        """The first task without a standing answer; None when the queue is done."""
        task = self.store.next_task(self.queue, self.annotator)
        return None if task is None else self.shown(task)

    @property
    def progress(self) -> Progress:
        """Answered, total, and how often each choice was made (`a`, `b`, `tie`, `skip`)."""
        return self.store.label_progress(self.queue, self.annotator)

    @property
    def labels(self) -> list[Labelled]:
        """This annotator's standing answers."""
        return self.store.labels(self.queue, annotator=self.annotator)

    def shown(self, task: Task) -> Shown:
        """A task with its sides in this annotator's order."""
        first, second = self.order(task)
        return Shown(
            task_id=task.id,
            position=task.position,
            total=self.progress.total,
            prompt=task.item["prompt"],
            first=task.item[first],
            second=task.item[second],
        )

    def order(self, task: Task) -> tuple[str, str]:
        """("a", "b") or ("b", "a"): the same for a task and annotator each time, and half of each over many."""
        key = f"{self.seed}|{self.queue}|{task.position}|{self.annotator}"
        return ("b", "a") if hashlib.sha256(key.encode("utf-8")).digest()[0] & 1 else ("a", "b")

    def submit(
        self,
        client_id: str,
        choice: str,
        *,
        task_id: int | None = None,
        seconds: float | None = None,
        rubric: Mapping[str, Any] | None = None,
        simulated: str | None = None,
    ) -> Ack:
        """Keep an answer. It is committed when this returns; sent again with the same `client_id`, it is the same one.

        Args:
            choice: "1" or "2" for the first or second side *as shown* ("A" and "B" mean the same), "tie" or "skip".
            task_id: the task that was shown; the current one when not given.
            seconds: from showing to answering.
            rubric: criterion to "1", "2" or "tie" (sides as shown), or to any other note.
            simulated: the name of a simulated annotator, for the provenance.

        Raises:
            DataError: a choice, criterion or time that does not exist.
            NotFoundError: the queue is done, or has no such task.
            StoreLockedError, StorageError: nothing was kept; send it again with the same `client_id`.
        """
        task = self._task(task_id)
        order = dict(zip(("first", "second"), self.order(task), strict=True))
        said = _CHOICES.get(str(choice).strip().lower())
        if said is None:
            raise DataError(f"choice={choice!r} is not an answer; use 1, 2, tie or skip")
        if seconds is not None and not (isinstance(seconds, int | float) and math.isfinite(seconds) and seconds >= 0):
            raise DataError(
                f"seconds={seconds!r} is not a time; give seconds from showing to answering, or leave it out"
            )
        label = self.store.submit_label(
            task.id,
            client_id,
            order.get(said, said),
            annotator=self.annotator,
            seconds=seconds,
            rubric=_rubric(rubric or {}, order),
            side={"first": order["first"], "second": order["second"], "chosen": said},
            provenance=self._provenance(task, simulated),
        )
        return Ack(label.id, task.id, client_id)

    def undo(self, client_id: str) -> Ack | None:
        """Take back the newest standing answer; its task is current again, unless an earlier one is open.

        Returns:
            None when there is no answer to take back.

        Raises:
            StoreLockedError, StorageError: nothing was changed; send it again with the same `client_id`.
        """
        log = [row for row in self.store.label_log(self.queue) if row.annotator == self.annotator]
        resent = next((row for row in log if row.client_id == client_id), None)
        if resent is not None:
            return Ack(resent.id, resent.task_id, client_id)
        standing = [each.label for each in self.labels]
        if not standing:
            return None
        newest = max(standing, key=lambda label: label.id)
        task = self.store.task(newest.task_id)
        row = self.store.undo_label(
            task.id, client_id, annotator=self.annotator, provenance=self._provenance(task, None)
        )
        return Ack(row.id, task.id, client_id)

    def _task(self, task_id: int | None) -> Task:
        if task_id is None:
            task = self.store.next_task(self.queue, self.annotator)
            if task is None:
                raise NotFoundError(
                    f"queue {self.queue!r} has no unanswered task for {self.annotator}; undo one, or add items"
                )
            return task
        task = self.store.task(task_id)
        if task.queue != self.queue:
            raise NotFoundError(
                f"task {task_id} belongs to queue {task.queue!r}, not to {self.queue!r}; run the label cell again"
            )
        return task

    def _provenance(self, task: Task, simulated: str | None) -> dict[str, Any]:
        known = {
            "tool": f"rlhf_nb {__version__}",
            "mode": task.mode,
            "session": self._session_id,
            "seed": self.seed,
            "source": task.source,
        }
        return {**known, "simulated": simulated} if simulated else known


def autolabel(
    session: LabelSession, chooser: Callable[[Any, str, str], str], *, name: str | None = None, limit: int | None = None
) -> int:
    """Let a simulated annotator answer, through the same door as a person; the provenance says that it did.

    Args:
        chooser: (prompt, a, b) to "a", "b" or "tie", the sides as shown.
        name: of the simulated annotator; from RLHF_NB_AUTOLABEL when not given.
        limit: answer at most so many.

    Returns:
        How many tasks were answered.
    """
    name = name or os.environ.get(AUTOLABEL) or getattr(chooser, "__name__", "simulated")
    answered = 0
    while (limit is None or answered < limit) and (shown := session.current) is not None:
        said = chooser(shown.prompt, shown.first, shown.second)
        if said not in ("a", "b", "tie"):
            raise DataError(f'annotator {name} answered {said!r}; an answer is "a", "b" or "tie"')
        session.submit(uuid.uuid4().hex, said, task_id=shown.task_id, simulated=name)
        answered += 1
    return answered


def _rubric(rubric: Mapping[str, Any], order: Mapping[str, str]) -> dict[str, Any]:
    """Sides in a rubric are un-randomised like the choice itself."""
    for criterion in rubric:
        if criterion not in RUBRIC:
            hint = did_you_mean(str(criterion), RUBRIC)
            raise DataError(f"rubric criterion {criterion!r} does not exist{hint or ';'} criteria: {', '.join(RUBRIC)}")
    sides = {"1": order["first"], "2": order["second"]}
    return {
        criterion: sides.get(value, value) if isinstance(value, str) else value for criterion, value in rubric.items()
    }
