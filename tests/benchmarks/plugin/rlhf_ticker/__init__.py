"""A method that trains nothing and writes metrics at a given rate, through everything a real run goes through.

Found through its dist-info on PYTHONPATH, as an installed plugin would be.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from rlhf_nb.methods.base import LEARNING_RATE, Method


class Ticker(Method):
    name: ClassVar[str] = "ticker"
    title: ClassVar[str] = "Ticker"
    rows: ClassVar[str] = "demonstrations"
    live: ClassVar = (LEARNING_RATE,)

    rate: float = Field(10.0, gt=0)
    """Metric events a second, from when there is a file `go` in the run's directory; before it 5 a second."""

    def build_trainer(self, context: Any) -> TickerTrainer:
        return TickerTrainer(self, context)


class TickerTrainer:
    def __init__(self, method: Ticker, context: Any) -> None:
        self.method, self.context, self.step, self.learning_rate = method, context, 0, method.learning_rate

    def train(self) -> None:
        from rlhf_nb.training.control import BoundCoefficient

        method, context = self.method, self.context
        bound = BoundCoefficient(
            LEARNING_RATE, lambda: self.learning_rate, lambda value: setattr(self, "learning_rate", value)
        )
        context.control.bind([bound])
        chance, ticking = random.Random(0), False
        began, first, rate = time.perf_counter(), 0, 5.0
        while self.step < method.max_steps:
            context.control.boundary(self.step + 1)
            if context.control.stopping:
                break
            if not ticking and (context.run_dir / "go").exists():
                ticking, began, first, rate = True, time.perf_counter(), self.step, method.rate
            self.step += 1
            # By the clock, not by sleeping a fixed time: a late event must not lower the rate of those after it.
            time.sleep(max(0.0, began + (self.step - first) / rate - time.perf_counter()))
            done = self.step / method.max_steps
            context.emit.metric(
                self.step,
                {
                    # The caption of its curve then names the step that was drawn.
                    "loss": self.step,
                    "policy/entropy": 2 - done + 0.2 * chance.random(),
                    "policy/token_accuracy": 0.5 + 0.4 * done + 0.05 * chance.random(),
                    "data/tokens": 500 + 50 * chance.random(),
                    "data/epoch": done,
                    "optimizer/learning_rate": self.learning_rate,
                    "optimizer/grad_norm": 1 + chance.random(),
                    "time/step_s": 1 / rate,
                    "time/hooks_s": 2e-4 + 1e-4 * chance.random(),
                },
            )

    def save_model(self, directory: str) -> None:
        Path(directory).mkdir(parents=True, exist_ok=True)
        (Path(directory) / "config.json").write_text(json.dumps({"step": self.step}))
