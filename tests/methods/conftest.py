"""PPO on a random model, as the worker runs it, and ways to read what it wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_nb.compute.rundir import EventWriter, append_line
from rlhf_nb.data.rows import content_hash, encode_rows
from rlhf_nb.protocol.fold import RunFold
from rlhf_nb.protocol.spec import BlobData, FunctionReward

ROWS = [{"prompt": p} for p in ("Who?", "Where is it?", "When do they open?", "Is it far?", "Why?", "How?")]


def function(name: str, value: str) -> FunctionReward:
    """A reward that is `value`, an expression in `text`, for each completion."""
    source = f"def {name}(prompts, completions):\n    return [{value} for text in completions]"
    return FunctionReward(name=name, source=source)


# Of what a random model says, half the characters or so are letters: a reward that differs between completions.
LETTERS = function("letters", "sum(c.isascii() and c.isalpha() for c in text) / 4")
VOWELS = function("vowels", "10 + sum(c in 'aeiou' for c in text)")
DRAWS = FunctionReward(
    name="draws",
    source="def draws(prompts, completions):\n    import random\n    import numpy\n    import torch\n"
    "    noise = random.gauss(0, 1) + numpy.random.normal() + torch.randn(()).item()\n"
    "    return [sum(c.isalpha() for c in text) + noise for text in completions]",
)
"""It draws lots, from each of the generators."""


def pretraining(job: Any, n: int = 6) -> BlobData:
    """Rows to keep up, where the job finds them."""
    rows = [{"prompt": f"Say {i}.", "completion": "It is far."} for i in range(n)]
    (job.root / f"{content_hash(rows)}.jsonl").write_bytes(encode_rows(rows))
    return BlobData(content_hash=content_hash(rows), row_kind="demonstrations", n=n, name="kept")


@pytest.fixture
def ppo(request, job, tiny_model_maker, monkeypatch) -> Callable[..., Any]:
    """Runs PPO with the test file's CONFIG; knobs and parts of the spec by name.

    `controls` wait in the control file before the first step; `after_step_1` is asked once that step is logged.
    """
    job.model = tiny_model_maker("still", dropout=0.0)
    spec_names = {"adapter", "gold", "pretraining", "launch"}

    def start(name: str = "run", *, rows=ROWS, reward=LETTERS, prepare=False, controls=(), after_step_1=None, **knobs):
        spec = {name: knobs.pop(name) for name in spec_names & knobs.keys()}
        config = {**request.module.CONFIG, **knobs}
        place = job.prepare("ppo", rows, name=name, config=config, reward=reward, **spec)
        for control in controls:
            append_line(place.control_path, control.model_dump(mode="json"))
        with monkeypatch.context() as patch:
            if after_step_1 is not None:
                patch.setattr(EventWriter, "write", asking(place, after_step_1))
            return place if prepare else job.run(place)

    start.job = job  # type: ignore[attr-defined]
    return start


def asking(place: Any, control: Any) -> Any:
    """A writer of events during which a person asks for something, or for a list of things, once step 1 is logged."""
    write = EventWriter.write

    def written(self: EventWriter, event: Any) -> Any:
        if event.kind == "metric" and event.step == 1 and "loss" in event.values:
            for each in control if isinstance(control, list) else [control]:
                append_line(place.control_path, each.model_dump(mode="json"))
        return write(self, event)

    return written


def fold(place) -> RunFold:
    folded = RunFold()
    for event in place.events():
        folded.add(event)
    return folded


def rollouts(place) -> list[dict[str, float]]:
    """Rows of metrics that a rollout opens."""
    return [row for row in fold(place).table() if "reward/mean" in row]


def killed(*places, each: int, seed: int = 7) -> list[dict[str, Any]]:
    """Run prepared jobs to their end through deaths by SIGKILL, at least `each` of them in each phase a job has."""
    done = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).with_name("killer.py")),
            str(each),
            str(seed),
            *[str(place.path) for place in places],
        ],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"deaths"')]
    assert len(said) == len(places)
    for one in said:
        assert one["status"] == 0
        assert all(times >= each for times in one["hit"].values()), one
    return said


def same_to_the_bit(place, whole) -> None:
    """A run that died is one that never did: its metrics and samples, also those of attempts that were superseded, and
    its weights."""

    def numbers(rows) -> list[dict[str, float]]:
        return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]

    assert numbers(fold(place).table()) == numbers(fold(whole).table()) != []
    once: dict[tuple, dict[str, float]] = {}
    for event in place.events():
        if event.kind == "metric":
            (said_now,) = numbers([event.values])
            if said_now:
                assert once.setdefault((event.step, event.rollout, *said_now), said_now) == said_now
    shown = {event.step: event.items for event in whole.events() if event.kind == "samples"}
    for event in place.events():
        if event.kind == "samples":
            assert event.items == shown[event.step]
    assert [event.seq for event in place.events()] == list(range(1, len(place.events()) + 1))
    a, b = (load_file(each.model / "model.safetensors") for each in (place, whole))
    assert all(torch.equal(a[name], b[name]) for name in a)
