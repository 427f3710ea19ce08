"""The labelling view in a cell: traits and message handlers; the answers are in the workspace's database."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anywidget
import traitlets
from pydantic import ValidationError

from rlhf_nb.labelling.session import LabelSession
from rlhf_nb.protocol import widget as messages
from rlhf_nb.ui import assets
from rlhf_nb.ui.desk import LabelDesk


class Labeller(anywidget.AnyWidget):
    """Pairs of a queue, one after another, answered by key or click."""

    queue = traitlets.Unicode().tag(sync=True)

    def __init__(self, session: LabelSession, **options: Any) -> None:
        self.session = session
        self._esm, self._css = assets.bundle("labeller.js"), assets.bundle("labeller.css")
        # A locked database makes an answer wait; it waits here, in order, and not on the kernel's thread.
        self._answers = ThreadPoolExecutor(1, thread_name_prefix=f"label-{session.queue}")
        self._desk = LabelDesk(session, self._say, title=session.queue.removesuffix("-labels"), summary=self._summary)
        super().__init__(queue=session.queue, **options)
        self.on_msg(self._on_message)

    def close(self) -> None:
        self._answers.shutdown(wait=False)
        super().close()

    def _summary(self) -> str:
        choices = self.session.progress.choices
        decided = choices.get("a", 0) + choices.get("b", 0)
        parts = [f"{decided} decided", f"{choices.get('tie', 0)} ties", f"{choices.get('skip', 0)} skipped"]
        return f"{', '.join(parts)}; as data: --data {self.session.queue}"

    def _say(self, message: messages.Message) -> None:
        self.send(message.model_dump(mode="json"))

    def _on_message(self, _: Any, content: dict[str, Any], buffers: list[bytes]) -> None:
        try:
            message = messages.parse_view_message(content)
        except ValidationError:
            return
        self._answers.submit(self._desk.take, message)
