"""A run, as a handle: it holds no truth, only the way to the run directory and a fold of what was read there."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from rlhf_nb import registry
from rlhf_nb.errors import (
    ComputeError,
    NotFoundError,
    RunFailedError,
    SpecError,
    StorageError,
    StoreLockedError,
    UnavailableError,
    WaitTimeoutError,
    did_you_mean,
    first_fault,
)
from rlhf_nb.protocol import control as controls
from rlhf_nb.protocol.events import (
    EFFECTIVE_ENOUGH,
    TERMINAL,
    AnyEvent,
    Coefficient,
    Previewed,
    RewardReplaced,
    Samples,
)
from rlhf_nb.protocol.fold import RunFold
from rlhf_nb.protocol.spec import CombinedReward, ModelReward, RunModel, RunSpec, describe, reward_parts

if TYPE_CHECKING:
    import pandas

    from rlhf_nb.compute.client import Client
    from rlhf_nb.data.dataset import Dataset
    from rlhf_nb.ui.panel import Panel
    from rlhf_nb.workspace import Workspace

POLL_S = 0.05
WAKE_S = 0.25
"""An interrupt of a cell that awaits a run is heard within this."""


@dataclass(frozen=True)
class Applied:
    """A coefficient as it came into force."""

    name: str
    step: int
    """The first optimizer step whose loss or update used the new value."""
    old: float
    new: float

    def __str__(self) -> str:
        return f"{self.name} {self.old:g} → {self.new:g} at step {self.step}"


Answer = Applied | RewardReplaced | Previewed | Samples | int


class Detached(KeyboardInterrupt, asyncio.CancelledError):
    """A wait was interrupted; the run goes on.

    It is both, because an interrupted cell that awaits is cancelled: a bare KeyboardInterrupt that leaves a task of the
    user's, as under `asyncio.gather`, would end the kernel's event loop and the kernel.
    """

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


class Pending:
    """Something asked of a live run that is not yet in force."""

    def __init__(self, run: Run, control: controls.AnyControl) -> None:
        self._run, self.control, self.id = run, control, control.id

    def wait(self, timeout: float | None = 60.0) -> Answer:
        """Wait until it is in force.

        Returns:
            `Applied` for a coefficient; for a reward, a preview or a sample its event (`reward_replaced`, `previewed`,
            `samples`); else the step at which it was read.

        Raises:
            UnavailableError: The run refused, with its reason.
            RunFailedError: The run ended first.
            WaitTimeoutError: Not in force after `timeout` seconds; it still may come.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            fold = self._run.fold
            if self.id in fold.refused:
                raise UnavailableError(f"{self._run.id}: {fold.refused[self.id]}")
            answer = self._answer(fold)
            if answer is not None:
                return answer
            if fold.is_terminal:
                raise RunFailedError(f"{self._run.id}: the run {fold.state} before {self.what} came into force")
            if deadline is not None and time.monotonic() > deadline:
                raise WaitTimeoutError(
                    f"{self._run.id}: {self.what} is not in force after {timeout:g} s; it still may come"
                )
            time.sleep(POLL_S)

    @property
    def what(self) -> str:
        control = self.control
        if isinstance(control, controls.SetReward):
            return f"reward {describe(control.reward)}"
        return f"{control.name}={control.value:g}" if isinstance(control, controls.SetCoefficient) else control.op

    def _answer(self, fold: RunFold) -> Answer | None:
        match self.control:
            case controls.SetCoefficient():
                for change in fold.changes:
                    if change.id == self.id:
                        return Applied(change.name, change.effective_step, change.old, change.new)
            case controls.SetReward():
                for replaced in fold.rewards:
                    if replaced.id == self.id:
                        return replaced
            case controls.Preview():
                return self._preview(fold)
            case controls.Sample():
                for samples in fold.samples:
                    if samples.request_id == self.id:
                        return samples
            case _:
                return fold.acknowledged.get(self.id)
        return None

    def _preview(self, fold: RunFold) -> Previewed | None:
        found = fold.previews.get(self.id)
        for one in found.predictions if found and len(found.predictions) == 1 else ():
            if one.effective < EFFECTIVE_ENOUGH:
                assert found is not None
                raise UnavailableError(
                    f"{self._run.id}: {found.name}={one.value:g} is too far from {found.now:g} to be predicted: "
                    f"{one.effective:.1f} of {found.samples} completions a prompt carry the answer, and "
                    f"{EFFECTIVE_ENOUGH:g} are needed; ask nearer, or with more samples"
                )
        return found

    def __repr__(self) -> str:
        return f"<asked of {self._run.id}: {self.what}>"


class Run:
    """One run, in any state, from any process. `ws.run("ppo-7")` gives the same handle again."""

    def __init__(self, workspace: Workspace, run_id: str) -> None:
        self.workspace, self.id = workspace, run_id
        self._fold = RunFold()
        self._lock = threading.Lock()
        self._spec: RunSpec | None = None
        self._shown = False
        self._panel: Panel | None = None
        self._unindexed: list[AnyEvent] = []
        """Read, and not in the workspace's index yet."""

    @property
    def spec(self) -> RunSpec:
        if self._spec is None:
            self._spec = self.workspace.spec(self.id)
        return self._spec

    @contextlib.contextmanager
    def _there(self) -> Iterator[Client]:
        """The attached compute.

        Raises:
            ElsewhereError: The run is not on it.
        """
        client = self.workspace.client
        try:
            yield client
        except NotFoundError:
            raise self.workspace.elsewhere(self.id) from None

    @property
    def fold(self) -> RunFold:
        """Everything read so far, brought up to date.

        Raises:
            ElsewhereError: The run is not on the attached compute.
        """
        # Not the other way round: while one thread reaches for a lost compute the others hear at once that it is lost.
        with self._there() as client, self._lock:
            fresh = client.events(self.id, since=self._fold.last_seq)
            for event in fresh:
                self._fold.add(event)
            self._unindexed.extend(fresh)
        with self._lock:
            if self._unindexed:
                self._index()
            return self._fold

    def _index(self) -> None:
        """The run directory is the truth of a run: a database that cannot be written now is filled later."""
        try:
            self.workspace.index(self, self._fold, self._unindexed)
        except (StorageError, StoreLockedError) as error:
            warnings.warn(f"{self.id} goes on, and its index waits: {error}", stacklevel=4)
        else:
            self._unindexed = []

    @property
    def state(self) -> str:
        """waiting | starting | running | paused | finished | stopped | failed"""
        fold = self.fold
        with self._there():
            return self.workspace.state_of(self.id, fold)

    @property
    def model(self) -> RunModel:
        """The model this run saves, by run id: usable before it exists."""
        return RunModel(run_id=self.id)

    @property
    def data(self) -> Dataset:
        """The rows this run made, brought here once. A run that has not finished is itself what `data=` takes.

        Raises:
            SpecError: It makes no rows.
            UnavailableError: It has saved none yet.
        """
        from rlhf_nb.stages.generate import made_rows

        return made_rows(self.workspace, self)

    def events(self, since: int = 0) -> list[AnyEvent]:
        """Every event after `since`, in the order of `seq`."""
        with self._there() as client:
            return client.events(self.id, since=since)

    def subscribe(self, callback: Callable[[list[AnyEvent]], None], since: int = 0) -> Any:
        """Events after `since`, then each new batch, from a background thread. `.close()` the result to end it."""
        with self._there() as client:
            return client.subscribe(self.id, since, callback)

    def metrics(self) -> pandas.DataFrame:
        """One row an optimizer step."""
        import pandas

        table = self.fold.table()
        if not table:
            return pandas.DataFrame({"step": []})
        # A name that is both the index's and a column's cannot be sorted, grouped or merged by.
        return pandas.DataFrame(table).set_index("step", drop=False).rename_axis(None)

    def log_tail(self, lines: int = 20) -> list[str]:
        with self._there() as client:
            return client.log_tail(self.id, lines)

    def set(self, name: str, value: Any, why: str = "") -> Pending:
        """Ask for a new value of a live coefficient, or for another reward.

        Args:
            name: A live coefficient; `reward`, or `reward/NAME` for one part of a combined reward.
            value: A number; for a reward, what `reward=` takes. From the next rollout on its scores are shifted so
                that their mean over the last rollout's completions is what the old one gave.

        Raises:
            SpecError: No such live coefficient, or a value outside its range.
            UnavailableError: The value was frozen when the run started.
        """
        return self._ask(self.check_set(name, value, why))

    def check_set(self, name: str, value: Any, why: str = "") -> controls.SetCoefficient | controls.SetReward:
        """What `set` sends; nothing is sent. It raises as `set` does."""
        if name.partition("/")[0] == "reward":
            return self._other_reward(name.partition("/")[2], value, why)
        if not isinstance(value, int | float):
            raise SpecError(f"{self.id}: {name}={value!r} is no number")
        known = self.fold.coefficients or self._live_at_start()
        if name not in known:
            hint = f"{did_you_mean(name, known)}  live: {', '.join(known)}" if known else "; nothing is"
            raise SpecError(f'{self.id}: "{name}" is not live in this run{hint}')
        live = known[name]
        if live.unavailable_reason:
            raise UnavailableError(f"{self.id}: {name}: {live.unavailable_reason}")
        if not live.low <= value <= live.high:
            raise SpecError(f"{self.id}: {name}={value:g} is outside its range {live.low:g} to {live.high:g}")
        return controls.SetCoefficient(name=name, value=value, why=why)

    def _live_at_start(self) -> dict[str, Coefficient]:
        """What a run that waits or starts will say is live."""
        method = registry.methods.get(self.spec.method).create(**self.spec.config)
        values = method.start_values(self.spec)
        return {live.name: live.describe(values[live.name], method) for live in method.live_in(self.spec)}

    def _other_reward(self, part: str, value: Any, why: str) -> controls.SetReward:
        from rlhf_nb.stages.resolve import resolve_reward

        names = [one.name for one in reward_parts(self.spec.reward)]
        if not names:
            raise SpecError(f"{self.id}: it optimises no reward, so there is none to replace")
        if part not in names and (part or len(names) > 1):
            said = f'no part of its reward is called "{part}"' if part else "its reward has several parts"
            raise SpecError(f"{self.id}: {said}; set reward/NAME, NAME one of {', '.join(names)}")
        new = resolve_reward(self.workspace, value, verb=self.id)
        if isinstance(new, CombinedReward):
            raise SpecError(f"{self.id}: reward={value!r}: one reward takes the place of one")
        if isinstance(new, ModelReward) and isinstance(new.model, RunModel):
            state = self.workspace.run(new.model.run_id).state
            if state not in ("finished", "stopped"):
                raise SpecError(f"{self.id}: {new.model.run_id} is {state} and has saved no model yet; wait for it")
        return controls.SetReward(part=part or names[0], reward=new, why=why)

    def pause(self) -> Pending:
        return self._ask(controls.Pause())

    def stop(self) -> Pending:
        """End after the current step. The model is saved, and runs that wait for it go on."""
        return self._ask(controls.Stop())

    def checkpoint(self) -> Pending:
        return self._ask(controls.SaveCheckpoint())

    def sample(self, *prompts: str) -> Pending:
        """Completions of the policy as it is now, at the next step."""
        if not prompts:
            raise SpecError(f'{self.id}: sample needs a prompt: run.sample("Where is the bakery?")')
        return self._ask(controls.Sample(prompts=list(prompts)))

    def preview(
        self, name: str, value: float, *, values: Sequence[float] = (), prompts: int = 8, samples: int = 16
    ) -> Pending:
        """Where the run would settle if a coefficient were moved: nothing is changed by asking.

        The policy completes `prompts` prompts `samples` times; the completions, reweighted by exp(r/β)·π_ref/π, are
        those of the optimum at β. `.wait()` gives the `previewed` event.

        Args:
            values: Several at once instead of `value`; those too far away are then answered too, with how little of
                the sample carries them.

        Raises:
            SpecError: Not the run's tether (`kl_coef` of ppo, `beta` of rloo), or a value that is not above 0.
            UnavailableError (from `.wait()`): Too far from what the policy says now to be predicted.
        """
        method = registry.methods.get(self.spec.method)
        tethers = [live.name for live in method.live if live.can_preview]
        if name not in tethers:
            which = f"{' and '.join(tethers)} can" if tethers else f"nothing in {method.name} can"
            raise SpecError(f'{self.id}: "{name}" cannot be previewed; {which}')
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise SpecError(f"{self.id}: {name}={value!r}: a preview needs a tether, a number above 0")
        wanted = [float(one) for one in values] or [float(value)]
        try:
            asked = controls.Preview(name=name, values=wanted, prompts=prompts, samples=samples)
        except ValidationError as error:
            field, given, said = first_fault(error)
            raise SpecError(f"{self.id}: preview {field}={given!r}: {said}") from None
        return self._ask(asked)

    def resume(self) -> Pending | Run:
        """Continue a paused run; restart a failed or stopped one from its last checkpoint."""
        if self.state in ("failed", "stopped"):
            self.workspace.client.resume(self.id)
            self.workspace.audit("resume", self.id, {})
            return self
        return self._ask(controls.Resume())

    def _ask(self, control: controls.AnyControl) -> Pending:
        state = self.state
        if state in TERMINAL:
            way_out = "" if state == "finished" else f"; %rlhf resume {self.id} restarts it from its last checkpoint"
            raise ComputeError(f"{self.id} has {state}: {control.op} has nothing to act on{way_out}")
        control = control.model_copy(update={"who": self.workspace.who})
        self.workspace.client.control(self.id, control)
        return Pending(self, control)

    def wait(self, timeout: float | None = None, *, step: int | None = None) -> Run:
        """Wait for the end, or until optimizer step `step` has been taken. Interrupting it detaches; the run goes on.

        It blocks, and in a notebook a cell that blocks keeps sliders waiting; `await run` does not.

        Raises:
            RunFailedError: The run failed, or paused by itself; the message says why.
            WaitTimeoutError: Not over after `timeout` seconds.
        """
        try:
            self._until_over(timeout, threading.Event(), step)
        except KeyboardInterrupt:
            raise self._detached() from None
        return self

    async def wait_async(self, timeout: float | None = None, *, step: int | None = None) -> str:
        """As `wait`, awaited: the kernel goes on hearing its widgets meanwhile. Gives the state it is in then."""
        given_up = threading.Event()
        waiting = asyncio.create_task(asyncio.to_thread(self._until_over, timeout, given_up, step))
        try:
            while not waiting.done():
                # The kernel cancels an interrupted cell when its loop next wakes by itself (ipython/ipykernel#881).
                await asyncio.wait([waiting], timeout=WAKE_S)
            return waiting.result()
        except asyncio.CancelledError:
            # What an interrupt of the kernel does to a cell that awaits.
            raise self._detached() from None
        finally:
            given_up.set()
            waiting.cancel()

    def __await__(self) -> Generator[Any, None, str]:
        """`await run` waits for the end, and gives the state it ended in."""
        return self.wait_async().__await__()

    def _detached(self) -> Detached:
        return Detached(f"detached from {self.id}; it goes on. %rlhf stop {self.id} would end it")

    def _until_over(self, timeout: float | None, given_up: threading.Event, step: int | None = None) -> str:
        deadline = None if timeout is None else time.monotonic() + timeout
        over = threading.Event()

        def heard(events: Sequence[AnyEvent]) -> None:
            if any(e.kind in TERMINAL or (step is not None and (getattr(e, "step", 0) or 0) >= step) for e in events):
                over.set()

        subscription = self.subscribe(heard, since=self.fold.last_seq)
        try:
            while True:
                state = self.state
                if state == "failed":
                    fold = self.fold
                    raise RunFailedError(f"{self.id} failed: {fold.failure.reason if fold.failure else 'see its log'}")
                if state in TERMINAL or given_up.is_set() or (step is not None and self.fold.step >= step):
                    return state
                if state == "paused" and self._fold.held:
                    raise RunFailedError(f"{self.id} is paused: {self._fold.held}")
                if deadline is not None and time.monotonic() > deadline:
                    raise WaitTimeoutError(
                        f"{self.id} is {state} after {timeout:g} s; it goes on, wait again with run.wait()"
                    )
                # A subscription wakes this at once; the time-out also catches an agent that was replaced meanwhile.
                over.wait(1.0 if deadline is None else min(1.0, max(0.01, deadline - time.monotonic())))
                over.clear()
        finally:
            subscription.close()

    def panel(self) -> Any:
        """The live panel of this run, a widget. Every display is a view of the same one, until it is closed."""
        from rlhf_nb.ui.panel import Panel

        if self._panel is None or self._panel.closed:
            self._panel = Panel(self, store=self.workspace.store)
        return self._panel

    def report(self) -> Any:
        """A static picture of the run, for a paper's appendix or a cell without a kernel."""
        from rlhf_nb.ui.static_picture import StaticPicture

        return StaticPicture(self)

    def _ipython_display_(self) -> None:
        # The magic has already shown the panel of the run it returns.
        if self._shown:
            self._shown = False
            return
        from rlhf_nb.ui import show

        show(self)

    def shown_once(self) -> None:
        """The panel was shown already: let the next display of this handle pass."""
        self._shown = True

    def __str__(self) -> str:
        # `--reward {rm}` in a magic expands to the id.
        return self.id

    def __repr__(self) -> str:
        try:
            fold, state = self._fold, self.state
        except Exception:  # noqa: BLE001 - a repr must not raise where nothing is attached
            return f"<Run {self.id}>"
        of = f" {fold.step}/{fold.max_steps}" if fold.max_steps else ""
        return f"<Run {self.id} · {self.spec.title} · {state}{of}>"
