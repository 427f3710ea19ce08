"""Our one callback in transformers' Trainer: events out, control in, at the boundary between two optimizer steps.

The boundary is `on_log`, which runs after every step because `logging_steps=1`: the optimizer and its schedule have
stepped, the numbers of the step are there, and no batch of the next one has been drawn, which is where the Trainer
takes its own checkpoints. A checkpoint taken after a batch was drawn would resume with another random state.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from rlhf_nb.methods.base import LEARNING_RATE
from rlhf_nb.protocol.control import Sample
from rlhf_nb.protocol.events import CheckpointSaved
from rlhf_nb.training import checkpoints, distributed
from rlhf_nb.training.control import BoundCoefficient

if TYPE_CHECKING:
    from rlhf_nb.training.context import Context
    from rlhf_nb.training.sampling import Sampler

NAMES = {
    "loss": "loss",
    "grad_norm": "optimizer/grad_norm",
    "learning_rate": "optimizer/learning_rate",
    "epoch": "data/epoch",
    "entropy": "policy/entropy",
    "mean_token_accuracy": "policy/token_accuracy",
    "aux_loss": "loss/router",
}
"""The Trainer's names → ours. A method adds its own; a name in neither travels as it is, an empty one
leaves the number out."""


class Steering(TrainerCallback):
    def __init__(
        self,
        context: Context,
        trainer: Any,
        *,
        names: dict[str, str],
        live: list[BoundCoefficient],
        derive: Callable[[dict[str, float]], dict[str, float]],
        sampler: Sampler | None,
    ) -> None:
        self.context, self.trainer, self.sampler = context, trainer, sampler
        self.names, self.live, self.derive = {**NAMES, **names}, live, derive
        self._tokens = 0.0
        self._hooks_s = 0.0
        self._aside_s = 0.0
        """Wall seconds of this step that were no training: pauses, samples, checkpoints."""
        self._step_began = self._saving_since = time.perf_counter()

    # --- Trainer hooks ----------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with self._hook():
            loop = self.context.control
            loop.bind([learning_rate(self.trainer), *self.live])
            loop.on_idle, loop.around_pause = self._serve_while_paused, self._aside
            self._boundary(state.global_step + 1, control)
        self._step_began, self._aside_s = time.perf_counter(), 0.0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        # The Trainer also logs a summary at the end; only a step's log has a loss.
        if not logs or "loss" not in logs:
            return
        now = time.perf_counter()
        with self._hook():
            values = {
                name: value
                for theirs, value in logs.items()
                if isinstance(value, int | float) and (name := self.names.get(theirs, theirs))
            }
            if "num_tokens" in values:
                total = values.pop("num_tokens")
                values["data/tokens"], self._tokens = total - self._tokens, total
            values.update(self.derive(values))
            values["time/step_s"] = max(0.0, now - self._step_began - self._aside_s)
            values["time/hooks_s"], self._hooks_s = self._hooks_s, 0.0
            self._step_began, self._aside_s = now, 0.0
            self.context.emit.metric(state.global_step, values)
            every = self.context.method.sample_every
            if self.sampler is not None and every and state.global_step % every == 0:
                self._sample(state.global_step)
            every = self.context.method.checkpoint_every
            if every and state.global_step % every == 0:
                control.should_save = True
            if state.global_step < state.max_steps:
                self._boundary(state.global_step + 1, control)
        self._saving_since = time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._publish(state.global_step)
        self._aside_s += time.perf_counter() - self._saving_since

    # --- the boundary -----------------------------------------------------------------------------------------------

    def _boundary(self, step: int, control: Any) -> None:
        loop = self.context.control
        loop.boundary(step)
        if loop.checkpoint_requested:
            loop.checkpoint_requested.clear()
            # The Trainer saves right after its log; before the first step it would wait for one.
            if self.trainer.state.global_step:
                control.should_save = True
            else:
                self._checkpoint()
        self._answer()
        if loop.stopping:
            control.should_training_stop = True

    def _serve_while_paused(self) -> None:
        loop = self.context.control
        if loop.checkpoint_requested:
            loop.checkpoint_requested.clear()
            self._checkpoint()
        self._answer()

    def _checkpoint(self) -> None:
        with self._aside():
            self.trainer._save_checkpoint(self.trainer.model_wrapped, None)
            self._publish(self.trainer.state.global_step)

    def _publish(self, step: int) -> None:
        # Every rank writes its own random state into the directory: rename once all have.
        distributed.barrier()
        if self.context.is_main:
            run_dir = self.context.run_dir
            written = run_dir / "checkpoints" / checkpoints.SCRATCH / f"checkpoint-{step}"
            target = checkpoints.publish(run_dir, step, written)
            self.context.emit.event(CheckpointSaved(step=step, path=str(target.relative_to(run_dir))))
        distributed.barrier()

    # --- samples ----------------------------------------------------------------------------------------------------

    def _answer(self) -> None:
        requests: list[Sample] = list(self.context.control.sample_requests)
        self.context.control.sample_requests.clear()
        for request in requests:
            self._sample(self.trainer.state.global_step, request)

    def _sample(self, step: int, request: Sample | None = None) -> None:
        """Rank 0 samples; the others wait at the next step's first collective."""
        if not self.context.is_main or self.sampler is None:
            if request is not None and self.context.is_main:
                self.context.emit.notice("no_samples", "this run has no policy to sample from", "warning")
            return
        with self._aside():
            if request is not None:
                self.context.emit.samples(step, self.sampler.items([*request.prompts], seed=step), request.id)
            else:
                items = self.sampler.items(self.sampler.prompts, seed=step)
                self.context.emit.samples(step, items)
                if numbers := self.sampler.metrics(items):
                    self.context.emit.metric(step, numbers)

    # --- what the hooks themselves cost -----------------------------------------------------------------------------

    @contextmanager
    def _hook(self) -> Iterator[None]:
        began, aside = time.thread_time(), self._aside_cpu_s
        try:
            yield
        finally:
            self._hooks_s += time.thread_time() - began - (self._aside_cpu_s - aside)

    _aside_cpu_s = 0.0
    _aside_depth = 0

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Time that is neither training nor the cost of watching: a person asked for it."""
        wall, cpu = time.perf_counter(), time.thread_time()
        self._aside_depth += 1
        try:
            yield
        finally:
            self._aside_depth -= 1
            if self._aside_depth == 0:
                self._aside_s += time.perf_counter() - wall
                self._aside_cpu_s += time.thread_time() - cpu


def learning_rate(trainer: Any) -> BoundCoefficient:
    """The peak rate, in force at the very next step under any schedule.

    The schedule overwrites `param_groups["lr"]` after each step from its `base_lrs`; writing only the base would take
    effect one step late, writing only the group for one step.
    """

    def schedule() -> Any:
        return trainer.lr_scheduler

    def read() -> float:
        return float(schedule().base_lrs[0])

    def write(value: float) -> None:
        scheduler = schedule()
        scheduler.base_lrs = [value] * len(scheduler.base_lrs)
        for group, factor in zip(scheduler.optimizer.param_groups, scheduler.lr_lambdas, strict=True):
            group["initial_lr"] = value
            group["lr"] = value * factor(scheduler.last_epoch)
        scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]

    return BoundCoefficient(LEARNING_RATE, read, write)
