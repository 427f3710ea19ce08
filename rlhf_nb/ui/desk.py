"""The kernel half of the labelling view, used by the labeller and by the panel: a session in, messages out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rlhf_nb.data.rows import prompt_text
from rlhf_nb.errors import RlhfError
from rlhf_nb.labelling.session import RUBRIC, LabelSession
from rlhf_nb.protocol import widget as messages

_CHOICES = {"a": "1", "b": "2", "tie": "tie", "skip": "skip"}


class LabelDesk:
    """Answers `label_start`, `label_submitted` and `label_undone`. An answer is committed before it is acknowledged."""

    def __init__(
        self,
        session: LabelSession,
        say: Callable[[messages.Message], None],
        *,
        title: str,
        summary: Callable[[], str] = lambda: "",
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            summary: The line shown when the queue is done.
            changed: Called after each answer that was kept or taken back.
        """
        self.session, self._say, self.title = session, say, title
        self._summary, self._changed = summary, changed

    def queue(self) -> messages.LabelQueue:
        """Where the annotator stands, read from the database."""
        progress, shown = self.session.progress, self.session.current
        seconds = [each.label.seconds for each in self.session.labels if each.label.seconds is not None]
        return messages.LabelQueue(
            title=self.title,
            annotator=self.session.annotator,
            done=progress.done,
            total=progress.total,
            seconds_per_label=sum(seconds) / len(seconds) if seconds else None,
            can_undo=progress.done > 0,
            task=None
            if shown is None
            else messages.PairShown(
                task_id=shown.task_id, prompt=prompt_text(shown.prompt), a=shown.first, b=shown.second
            ),
            summary=self._summary() if shown is None else "",
        )

    def take(self, message: Any) -> bool:
        """Handle a labelling message; False for any other."""
        match message:
            case messages.LabelStart():
                self._say(self.queue())
            case messages.LabelSubmitted():
                self._keep(message.client_id, lambda: self._submit(message))
            case messages.LabelUndone():
                self._keep(message.client_id, lambda: self.session.undo(message.client_id))
            case _:
                return False
        return True

    def _submit(self, message: messages.LabelSubmitted) -> None:
        self.session.submit(
            message.client_id,
            _CHOICES[message.choice],
            task_id=message.task_id,
            seconds=message.ms / 1000,
            rubric={criterion: True for criterion in message.rubric if criterion in RUBRIC},
        )

    def _keep(self, client_id: str, act: Callable[[], Any]) -> None:
        try:
            act()
            queue = self.queue()
        except RlhfError as error:
            self._say(messages.LabelFailed(client_id=client_id, text=str(error)))
            return
        self._changed()
        self._say(messages.LabelSaved(client_id=client_id, queue=queue))
