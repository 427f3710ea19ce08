"""A paused run waits at the boundary, serves what is asked of it meanwhile, and goes on."""

from __future__ import annotations

import threading
import time

from rlhf_nb.compute.rundir import append_line
from rlhf_nb.protocol.control import Pause, Resume, Sample, SaveCheckpoint, SetCoefficient
from rlhf_nb.toy import demonstrations

PAUSED_S = 0.5


def test_a_paused_run_serves_checkpoints_and_samples_and_keeps_the_pause_out_of_step_times(job, trace):
    config = {"max_steps": 3, "batch_size": 2, "sample_every": 0, "sample_tokens": 4, "max_length": 200}
    place = job.prepare("sft", demonstrations(6), config=config)
    append_line(place.control_path, Pause().model_dump())
    failures: list[str] = []

    def seen(kind: str) -> None:
        deadline = time.monotonic() + 60
        while not any(e.kind == kind for e in place.events()):
            if time.monotonic() > deadline:
                failures.append(kind)
                return
            time.sleep(0.01)

    def person() -> None:
        seen("paused")
        append_line(place.control_path, SaveCheckpoint().model_dump())
        append_line(place.control_path, Sample(prompts=["Who?"]).model_dump())
        seen("checkpoint_saved")
        seen("samples")
        append_line(place.control_path, SetCoefficient(name="learning_rate", value=0.01).model_dump())
        time.sleep(PAUSED_S)
        append_line(place.control_path, Resume().model_dump())

    hand = threading.Thread(target=person)
    hand.start()
    try:
        job.run(place)
    finally:
        hand.join()
    assert not failures
    events = place.events()
    kinds = [e.kind for e in events]
    assert kinds.index("paused") < kinds.index("checkpoint_saved") < kinds.index("resumed") < kinds.index("metric")
    at = {kind: events[kinds.index(kind)] for kind in ("paused", "resumed", "coefficient_changed", "metric")}
    assert (at["paused"].step, at["resumed"].step) == (0, 0)
    # Set during the pause: in force at the first step after it, not when it was read.
    assert at["coefficient_changed"].effective_step == 1
    assert trace(place, "optimizer/learning_rate")[1] == 0.01
    assert at["resumed"].t - at["paused"].t > PAUSED_S
    assert at["metric"].values["time/step_s"] < at["metric"].t - at["resumed"].t + 0.01
    assert events[-1].outcome == "finished"
