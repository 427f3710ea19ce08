"""Runs jobs to their end through many deaths by SIGKILL, each at a seeded moment of a chosen phase.

Every attempt is a fork of this process, which has imported everything and started no thread: a death costs a second
and not ten. What a death hits, the dying process itself writes into memory that outlives it. Prints one JSON object a
job.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from rlhf_nb.compute.rundir import RunDir
from rlhf_nb.training import checkpoints, job

PHASES = ("between", "rollout", "scoring", "update", "checkpoint")
now = mmap.mmap(-1, 1)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def watch(armed: str, call: int, share: float) -> None:
    """Note which phase the process is in, and let it die in the `call`th of the armed one, after a share of it."""
    from rlhf_nb.training import online, scoring, trainer
    from rlhf_nb.training.rollout.transformers_backend import TransformersSampler

    seen = 0

    def wrapped(phase: str, genuine: Any) -> Any:
        def run(*arguments: Any, **named: Any) -> Any:
            nonlocal seen
            before, now[0] = now[0], PHASES.index(phase)
            if phase == armed:
                seen += 1
                if seen == call and share == 0.0:
                    die()
                if seen == call:
                    threading.Timer(share * lasts.get(phase, 0.01), die).start()
            began = time.perf_counter()
            result = genuine(*arguments, **named)
            lasts[phase] = time.perf_counter() - began
            if phase == armed and seen == call and phase == "scoring":
                die()
            now[0] = before
            return result

        return run

    def train(steered: Any) -> None:
        """A trainer of TRL's or transformers': wrapped as it stands, whatever its class overrides."""
        within = steered.trainer
        within.training_step = wrapped("update", within.training_step)
        within._save_checkpoint = wrapped("checkpoint", within._save_checkpoint)
        if hasattr(within, "_generate"):
            within._generate = wrapped("rollout", within._generate)
        trains(steered)

    lasts: dict[str, float] = {}
    trains, trainer.SteeredTrainer.train = trainer.SteeredTrainer.train, train  # type: ignore[method-assign]
    TransformersSampler.sample = wrapped("rollout", TransformersSampler.sample)  # type: ignore[method-assign]
    scoring.Scoring.rollout = wrapped("scoring", scoring.Scoring.rollout)  # type: ignore[method-assign]
    online.OnlineTrainer.update = wrapped("update", online.OnlineTrainer.update)  # type: ignore[method-assign]
    online.save_checkpoint = wrapped("checkpoint", online.save_checkpoint)


def attempt(place: Path, number: int, resume_from: Path | None, **armed: Any) -> int:
    """The wait status of a process that made one attempt."""
    now[0] = 0
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    try:
        if armed:
            watch(**armed)
        root = place.parent
        job.run(
            place, blobs=root, runs_root=root, rank=0, world_size=1, warm=False, attempt=number, resume_from=resume_from
        )
    except BaseException:  # noqa: BLE001 - a fork must never go on as its parent
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def through(place: Path, each: int, chance: random.Random) -> dict[str, Any]:
    """Let a job die until every phase that it has was hit `each` times, then let it end."""
    spec = RunDir(place).spec()
    samples = spec.reward is not None
    phases = PHASES[1:] if samples else ("update", "checkpoint")
    hit = dict.fromkeys(PHASES, 0)
    number = 1
    while any(hit[phase] < each for phase in phases):
        if number > 30 * each:
            sys.exit(f"{spec.method}: the deaths hit {hit}: some phase cannot be met")
        wanted = min(phases, key=lambda phase: (hit[phase], chance.random()))
        # Short phases are met at their first call, long ones somewhere within.
        share = chance.choice([0.0, chance.random()])
        status = attempt(place, number, checkpoints.latest(place), armed=wanted, call=chance.randint(1, 2), share=share)
        if not os.WIFSIGNALED(status):
            sys.exit(f"{spec.method}: attempt {number} ended with status {status} before a death in {wanted}: {hit}")
        hit[PHASES[now[0]]] += 1
        number += 1
    status = attempt(place, number, checkpoints.latest(place))
    return {"deaths": number - 1, "hit": {phase: hit[phase] for phase in phases}, "status": status}


def main() -> None:
    each, seed = int(sys.argv[1]), int(sys.argv[2])
    job.preload()
    chance = random.Random(seed)
    for place in sys.argv[3:]:
        print(json.dumps(through(Path(place), each, chance)), flush=True)


if __name__ == "__main__":
    main()
