"""The live panel of a run: traits and message handlers. What it knows is in `follow.py`, its plots in `figures.py`."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anywidget
import traitlets
from pydantic import ValidationError

from rlhf_nb.errors import RlhfError
from rlhf_nb.protocol import widget as messages
from rlhf_nb.protocol.events import EFFECTIVE_ENOUGH, TERMINAL, AnyEvent, Previewed
from rlhf_nb.ui import assets, figures
from rlhf_nb.ui.desk import LabelDesk
from rlhf_nb.ui.follow import Follower, preview_cell, set_cell
from rlhf_nb.ui.frames import frames

BATCH_S = 0.05
"""At most 20 sends a second, however many events arrive."""
QUIET_S = 3.0
"""After so long without events the run is asked directly: a subscription dies with its agent, in silence."""
UNASKED_S = 1.0
"""A page that asked for the state and then said no hello cannot reach the kernel: it gets everything unasked."""
PAIRS = 6
"""Blind pairs drawn at a press of L."""
GONE_S = 30.0
"""A page is no longer counted when another was heard this much later."""


class Panel(anywidget.AnyWidget):
    """Header, tether, curves, samples, log and sliders of one run.

    Args:
        run: a `Run`, or anything with its `id`, `subscribe`, `events` and, to steer, `set`, `pause` … `log_tail`.
        store: the workspace's store, where labels given in the panel are kept. None: no labelling.
    """

    run_id = traitlets.Unicode().tag(sync=True)

    def __init__(self, run: Any, store: Any = None, **options: Any) -> None:
        self._run, self._store = run, store
        spec = getattr(run, "spec", None)
        self._follower = Follower(run.id, title=getattr(spec, "title", ""), method=getattr(spec, "method", ""))
        self._sending = threading.RLock()
        self._wake, self._closed = threading.Event(), threading.Event()
        self._commands = ThreadPoolExecutor(1, thread_name_prefix=f"panel-{run.id}-ask")
        self._figures: dict[str, messages.Figure] = {}
        self._sent_rows, self._sent_generation = 0, 0
        self._pages: dict[str, float] = {}
        self._last_status: dict[str, Any] = {}
        self._last_controls: messages.Controls | None = None
        self._samples_sent = 0
        self._unasked_at: float | None = None
        self._deaf = False
        """No hello was read, and rows are sent all the same."""
        self._heard_at = 0.0
        self._asked_at = time.monotonic()
        self._run_state = "waiting"
        self._trouble = ""
        self._mine: dict[str, str] = {}
        """By coefficient, the control that was asked for last in this panel: its refusal is news here."""
        self._previews: dict[str, str] = {}
        """Previews asked for here and not answered yet: id to coefficient."""
        self._desk: LabelDesk | None = None
        self._human_read = False
        self._esm, self._css = assets.bundle("panel.js"), assets.bundle("panel.css")
        super().__init__(run_id=run.id, **options)
        # The cell after this one may block the kernel before any page's hello is read.
        self._unasked_at = time.monotonic() + UNASKED_S
        self.on_msg(self._on_message)
        self._subscription = run.subscribe(self._on_events, since=0)
        self._sender = threading.Thread(target=self._send_loop, name=f"panel-{run.id}", daemon=True)
        self._sender.start()

    @property
    def closed(self) -> bool:
        return self._closed.is_set()

    def close(self) -> None:
        """End the panel's threads and its views. The run goes on."""
        if not self._closed.is_set():
            self._closed.set()
            self._wake.set()
            self._subscription.close()
            self._commands.shutdown(wait=False)
        super().close()

    # -- from the run --------------------------------------------------------------------------------------------------

    def _on_events(self, events: list[AnyEvent]) -> None:
        self._heard_at = time.monotonic()
        self._trouble = ""
        fresh = self._follower.take(events)
        for event in fresh:
            if isinstance(event, Previewed):
                self._foresee(event)
            if event.kind == "control_refused" and (name := self._previews.pop(event.id, "")):
                self._unforeseen(name, f"refused: {event.reason}")
            elif event.kind == "control_refused" and event.id in self._mine.values():
                self._say(messages.Said(level="error", text=f"refused: {event.reason}"))
        if fresh:
            self._wake.set()

    def _send_loop(self) -> None:
        while not self._closed.is_set():
            self._wake.wait(0.5)
            self._wake.clear()
            if self._closed.is_set():
                return
            self._ask_the_run()
            try:
                self._flush()
            except Exception as error:  # noqa: BLE001 - one message that cannot be sent must not end the stream
                self.log.warning("panel of %s: %s", self._run.id, error)
            self._closed.wait(BATCH_S)

    def _ask_the_run(self) -> None:
        """Where events do not come: the state before the first one, and a run whose agent was replaced."""
        now = time.monotonic()
        state = self._follower.fold.state
        patience = 0.5 if state == "waiting" else QUIET_S
        if state in TERMINAL or now - max(self._heard_at, self._asked_at) < patience:
            return
        self._asked_at = now
        try:
            if state == "waiting":
                self._run_state = getattr(self._run, "state", "waiting")
            since = self._follower.fold.last_seq
            if self._follower.take(self._run.events(since=since)) and state != "waiting":
                # It should have come unasked: the agent that sent it is no more, another took its place.
                self._subscription.close()
                self._subscription = self._run.subscribe(self._on_events, since=self._follower.fold.last_seq)
            self._trouble = ""
        except Exception as error:  # noqa: BLE001 - whatever it is, the header says it
            self._trouble = f"cannot reach the run: {error}"

    # -- to the views --------------------------------------------------------------------------------------------------

    def _say(self, message: messages.Message, *buffers: bytes) -> None:
        self.send(message.model_dump(mode="json"), list(buffers))

    def _flush(self) -> None:
        """Send what changed since the last time."""
        with self._sending:
            if self._unasked_at is not None and time.monotonic() >= self._unasked_at:
                # Once more a little later: a page that was still making its view has heard nothing.
                self._unasked_at = None if self._deaf else time.monotonic() + 3 * UNASKED_S
                self._deaf = True
                self._send_asset()
                self._snapshot(0)
                return
            if not self._pages and not self._deaf:
                # No page holds the panel yet; its hello will ask.
                return
            self._send_status()
            self._send_controls()
            if self._follower.fold.generation != self._sent_generation:
                self._sent_rows = 0
            self._sent_generation, self._sent_rows = self._send_rows(self._sent_rows)
            newest = self._follower.newest_samples()
            if newest is not None and newest.seq > self._samples_sent:
                self._samples_sent = newest.seq
                self._say(messages.ShownSamples(step=newest.step, items=newest.items))

    def _snapshot(self, have: int, *, known_figures: int = 0) -> None:
        """Everything a page lacks that has `have` rows of this generation."""
        with self._sending:
            self._send_status(always=True)
            self._send_controls(always=True)
            self._draw_figures()
            if known_figures < len(self._figures):
                self._say_figures()
            # Every page hears it: the stream goes on behind it.
            self._sent_generation, self._sent_rows = self._send_rows(have)
            newest = self._follower.newest_samples()
            if newest is not None:
                self._say(messages.ShownSamples(step=newest.step, items=newest.items))

    def _send_status(self, *, always: bool = False) -> None:
        status = self._follower.status(self._run_state, watching=self._watching(), trouble=self._trouble)
        content = status.model_dump(mode="json")
        # The clocks alone are no news: a paused run sends nothing.
        news = {key: value for key, value in content.items() if key not in ("now", "seconds")}
        if always or news != self._last_status:
            self._last_status = news
            self.send(content)

    def _send_controls(self, *, always: bool = False) -> None:
        controls = self._follower.controls()
        controls.can_label = controls.can_label and self._store is not None
        if self._store is not None and not self._human_read:
            self._human_read = True
            self._later(self._read_labels)
        if always or controls != self._last_controls:
            self._last_controls = controls
            self._say(controls)

    def _say_figures(self) -> None:
        """All of them, in reading order: a metric that came late takes its place among the others."""
        drawn = sorted(self._figures.values(), key=lambda figure: figures.order(figure.metric or ""))
        self._say(messages.Figures(figures=drawn))

    def _draw_figures(self) -> bool:
        """Draw the figure of every metric that has none; True where there was one."""
        started = self._follower.fold.started
        before = len(self._figures)
        if started is not None and started.has_reference and figures.TETHER not in self._figures:
            self._figures[figures.TETHER] = figures.tether()
        for metric in sorted(self._follower.metrics, key=figures.order):
            if metric not in self._figures:
                self._figures[metric] = figures.curve(metric)
        return len(self._figures) > before

    def _send_rows(self, first: int) -> tuple[int, int]:
        generation, rows, metrics = self._follower.rows(first)
        if rows and self._draw_figures():
            self._say_figures()
        for frame, buffer in frames(rows, metrics, first=first, generation=generation):
            self._say(frame, buffer)
        return generation, first + len(rows)

    def _send_asset(self) -> None:
        version, script = assets.bokeh_script()
        self._say(messages.Asset(name="bokeh", version=version), script)

    def _watching(self) -> int:
        latest = max(self._pages.values(), default=0.0)
        return sum(latest - heard < GONE_S for heard in self._pages.values())

    def send_state(self, key: Any = None) -> None:
        """The traits; and, where a page asked for all of them, the rows a little later unless it says hello."""
        super().send_state(key)
        if key is None:
            self._deaf = False
            self._unasked_at = time.monotonic() + UNASKED_S
            self._wake.set()

    # -- from the views ------------------------------------------------------------------------------------------------

    def _on_message(self, _: Any, content: dict[str, Any], buffers: list[bytes]) -> None:
        try:
            message = messages.parse_view_message(content)
        except ValidationError as error:
            self._say(messages.Said(level="error", text=f"the view said something unknown: {error.errors()[0]['msg']}"))
            return
        match message:
            case messages.Hello():
                self._pages[message.page] = time.monotonic()
                self._unasked_at, self._deaf = None, False
                fresh = message.generation == self._follower.fold.generation
                self._snapshot(message.have if fresh else 0, known_figures=message.figures)
            case messages.Alive():
                self._pages[message.page] = time.monotonic()
            case messages.Bye():
                self._pages.pop(message.page, None)
            case messages.WantAsset():
                self._send_asset()
            case messages.WantSamples():
                samples = self._follower.newest_samples(message.step)
                if samples is not None:
                    self._say(messages.ShownSamples(step=samples.step, items=samples.items))
            case messages.WantLog():
                self._later(self._send_log, message.lines)
            case messages.SetAsked():
                self._later(self._set, message)
            case messages.PreviewAsked():
                self._later(self._preview, message)
            case messages.Command():
                self._later(self._command, message.op)
            case messages.LabelStart() | messages.LabelSubmitted() | messages.LabelUndone():
                self._later(self._label, message)

    def _later(self, function: Any, *arguments: Any) -> None:
        """Asking the run may wait for the network: it happens in order, off the kernel's thread."""

        def guarded() -> None:
            try:
                function(*arguments)
            except Exception as error:  # noqa: BLE001 - a person pressed something and must hear why nothing happened
                self._say(messages.Said(level="error", text=_why(error)))
            self._wake.set()

        self._commands.submit(guarded)

    def _set(self, message: messages.SetAsked) -> None:
        # That this one supersedes it is no news to whoever moves the slider, and may be heard before `set` returns.
        earlier = self._mine.pop(message.name, "")
        try:
            pending = self._run.set(message.name, message.value, why=message.why)
        except Exception:
            if earlier:
                self._mine[message.name] = earlier
            # The handle goes back to the value in effect.
            with self._sending:
                self._send_controls(always=True)
            raise
        self._mine[message.name] = pending.id
        self._follower.ask(message.name, pending.id, message.value)
        if (refused := self._follower.fold.refused.get(pending.id)) is not None:
            # The run was faster than this call.
            self._say(messages.Said(level="error", text=f"refused: {refused}"))
            return
        cell = set_cell(self._run.id, message.name, message.value)
        self._say(messages.Said(text=f"asked: {message.name} = {message.value:.4g}", cell=cell))

    def _preview(self, message: messages.PreviewAsked) -> None:
        try:
            pending = self._run.preview(message.name, message.values[0], values=message.values)
        except Exception as error:  # noqa: BLE001 - whatever it is, the slider no longer waits for an answer
            self._unforeseen(message.name, _why(error))
            return
        self._previews[pending.id] = message.name
        fold = self._follower.fold
        if (found := fold.previews.get(pending.id)) is not None:
            # The run was faster than this call.
            self._foresee(found)
        elif (refused := fold.refused.get(pending.id)) is not None:
            if self._previews.pop(pending.id, ""):
                self._unforeseen(message.name, f"refused: {refused}")
            return
        now = fold.coefficients[message.name].value if message.name in fold.coefficients else message.values[0]
        # What is in force may be no value that can be foreseen: 0 is a tether cut.
        nearest = min(max(now, min(message.values)), max(message.values))
        cell = preview_cell(self._run.id, message.name, nearest)
        self._say(messages.Said(text=f"asked: where another {message.name} would lead", cell=cell))

    def _foresee(self, found: Previewed) -> None:
        if self._previews.pop(found.id, ""):
            shown = found.model_dump(include=set(messages.Foreseen.model_fields) - {"kind", "enough"})
            self._say(messages.Foreseen(**shown, enough=EFFECTIVE_ENOUGH))

    def _unforeseen(self, name: str, reason: str) -> None:
        self._say(messages.Said(level="error", text=reason, unforeseen=name))

    def _command(self, op: str) -> None:
        getattr(self._run, op)()
        words = {"pause": "pause", "resume": "resume", "stop": "stop", "checkpoint": "checkpoint"}[op]
        self._say(messages.Said(text=f"asked: {words}", cell=f"%rlhf {op} {self._run.id}"))

    # -- label what you watch ------------------------------------------------------------------------------------------

    def _label(self, message: Any) -> None:
        """Six blind pairs of the newest samples, the policy against the reference, kept as labels of this run."""
        if isinstance(message, messages.LabelStart):
            self._desk = self._draw_pairs() or self._desk
        if self._desk is not None:
            self._desk.take(message)

    def _draw_pairs(self) -> LabelDesk | None:
        from rlhf_nb.labelling.items import model_items
        from rlhf_nb.labelling.session import LabelSession

        samples = self._follower.drawn_samples()
        if samples is None or self._store is None:
            return None
        items = [item for item in samples.items if item.reference_completion is not None]
        # The same draw for everybody who labels this step, and another at the next.
        chance = random.Random(f"{self._run.id} {samples.step}")
        pairs = model_items(
            [item.prompt for item in items],
            [item.completion for item in items],
            [item.reference_completion or "" for item in items],
            (self._run.id, "reference"),
        )
        chance.shuffle(pairs)
        if not pairs:
            self._say(
                messages.Said(level="error", text="policy and reference say the same everywhere; nothing to choose")
            )
            return None
        queue = f"{self._run.id}@{samples.step}"
        session = LabelSession(self._store, queue, pairs[:PAIRS], source=self._run.id)
        return LabelDesk(
            session,
            self._say,
            title=f"{self._run.id} at step {samples.step}",
            summary=lambda: self._win_rate_line(queue),
            changed=lambda: self._read_labels(queue),
        )

    def _read_labels(self, only: str | None = None) -> None:
        """Win rates of this run's labelled steps, for the tether view."""
        from rlhf_nb.errors import NotFoundError, ShapeError
        from rlhf_nb.labelling.fold import win_rate

        assert self._store is not None
        queues = [only] if only else [q for q in self._store.queues() if q.startswith(f"{self._run.id}@")]
        for queue in queues:
            step = int(queue.rpartition("@")[2])
            try:
                rate = win_rate(self._store.labels(queue), self._run.id)
            except (NotFoundError, ShapeError):
                self._follower.human.pop(step, None)
                continue
            self._follower.human[step] = messages.HumanPoint(
                step=step, win_rate=rate.value, low=rate.interval.low, high=rate.interval.high, n=rate.n
            )
        self._wake.set()

    def _win_rate_line(self, queue: str) -> str:
        point = self._follower.human.get(int(queue.rpartition("@")[2]))
        if point is None:
            return "No pair was decided."
        return f"You preferred {self._run.id} in {point.win_rate:.0%} [{point.low:.0%}, {point.high:.0%}] of {point.n}."

    def _send_log(self, lines: int) -> None:
        self._say(messages.LogLines(lines=self._run.log_tail(lines)))


def _why(error: Exception) -> str:
    return str(error) if isinstance(error, RlhfError) else f"{type(error).__name__}: {error}"
