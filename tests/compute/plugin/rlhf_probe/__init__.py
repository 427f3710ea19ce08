"""A method that takes steps and, when told to, dies in a given way: the compute tests' real worker with a tiny load.

Found through its dist-info on PYTHONPATH, as an installed plugin would be.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from rlhf_nb.errors import DataError
from rlhf_nb.methods.base import LEARNING_RATE, Method


class Probe(Method):
    name: ClassVar[str] = "probe"
    title: ClassVar[str] = "Probe"
    rows: ClassVar[str] = "demonstrations"
    live: ClassVar = (LEARNING_RATE,)

    max_steps: int = Field(20, gt=0)
    step_s: float = 0.02
    """Seconds a step sleeps."""
    parameters: int = 64
    die: Literal["", "error", "our_error", "exit", "segv", "memory", "leave", "hang"] = ""
    die_at: int = 3
    die_rank: int = 0
    checkpoint_every: int = 0
    burst: int = 0
    """Metrics to write at once before the first step."""

    def build_trainer(self, context: Any) -> ProbeTrainer:
        return ProbeTrainer(self, context)


class ProbeTrainer:
    def __init__(self, method: Probe, context: Any) -> None:
        import torch

        self.method, self.context = method, context
        torch.manual_seed(method.seed)
        self.model = torch.nn.Sequential(torch.nn.Linear(8, method.parameters), torch.nn.Linear(method.parameters, 8))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=method.learning_rate)
        self.step = 0

    def train(self) -> None:
        import torch

        from rlhf_nb.protocol.events import CheckpointSaved
        from rlhf_nb.training.control import BoundCoefficient

        method, context = self.method, self.context
        group = self.optimizer.param_groups[0]
        context.control.bind(
            [BoundCoefficient(LEARNING_RATE, lambda: group["lr"], lambda value: group.__setitem__("lr", value))]
        )
        if context.resume_from is not None:
            self.step = json.loads((context.resume_from / "state.json").read_text())["step"]
        for n in range(method.burst):
            context.emit.metric(0, {"loss/total": 1.0 / (n + 1), "reward/mean": float(n), "kl/policy_reference": 0.5})
        while self.step < method.max_steps:
            context.control.boundary(self.step + 1)
            if context.control.stopping:
                break
            self.step += 1
            x = torch.randn(4, 8)
            loss = (self.model(x) - x).pow(2).mean()
            self.optimizer.zero_grad()
            loss.backward()
            if context.world_size > 1:
                for parameter in self.model.parameters():
                    torch.distributed.all_reduce(parameter.grad)
            self.optimizer.step()
            time.sleep(method.step_s)
            context.emit.metric(self.step, {"loss/total": float(loss.detach()), "learning_rate": group["lr"]})
            if method.checkpoint_every and self.step % method.checkpoint_every == 0 and context.is_main:
                where = context.run_dir / "checkpoints" / f"step-{self.step}"
                where.mkdir(parents=True, exist_ok=True)
                (where / "state.json").write_text(json.dumps({"step": self.step}))
                context.emit.event(CheckpointSaved(step=self.step, path=f"checkpoints/step-{self.step}"))
            if method.die and context.attempt == 1 and self.step == method.die_at and context.rank == method.die_rank:
                self._die()

    def _die(self) -> None:
        match self.method.die:
            case "error":
                raise ValueError("the probe was told to fail\nand said more")
            case "our_error":
                raise DataError("rows: none fits max_length=4; raise max_length")
            case "exit":
                sys.exit(3)
            case "segv":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "memory":
                raise MemoryError
            case "leave":
                os._exit(0)
            case "hang":
                time.sleep(3600)

    def save_model(self, directory: str) -> None:
        if self.context.is_main:
            Path(directory).mkdir(parents=True, exist_ok=True)
            (Path(directory) / "config.json").write_text(json.dumps({"step": self.step}))
