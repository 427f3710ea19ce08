"""Two real processes on a CPU, joined by gloo: one run, one log, the same coefficients on both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_nb.compute.rundir import append_line
from rlhf_nb.protocol.control import Sample, SaveCheckpoint, SetCoefficient
from rlhf_nb.protocol.spec import FunctionReward, Launch
from rlhf_nb.toy import demonstrations
from rlhf_nb.training import checkpoints

RANK = """
import os, sys
from pathlib import Path
from rlhf_nb.compute import worker
from rlhf_nb.training import distributed, job
root, name, attempt = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
resume_from = Path(sys.argv[4]) if len(sys.argv) > 4 else None
job.run(root / name, blobs=root, runs_root=root, rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]),
        warm=False, attempt=attempt, resume_from=resume_from)
distributed.stop()
# As the worker does: torch's threads do not survive that the interpreter takes itself apart.
worker.leave_in_order()
"""
FLAGS = "--multi_gpu --num_processes 2 --main_process_port 0"
CONFIG = {
    "max_steps": 4, "batch_size": 4, "sample_every": 2, "sample_tokens": 4, "learning_rate": 1e-3,
    "checkpoint_every": 2, "max_length": 400, "lr_scheduler": "constant",
}  # fmt: skip


def launch(root: Path, name: str, attempt: int = 1, *more: str) -> subprocess.CompletedProcess[str]:
    script = root / "rank.py"
    script.write_text(RANK)
    return subprocess.run(
        [Path(sys.executable).parent / "accelerate", "launch", *FLAGS.split(), script, root, name, str(attempt), *more],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.slow
def test_two_ranks_are_one_run(job, trace, tiny_model_maker):
    job.model = tiny_model_maker("still", dropout=0.0)
    rows = demonstrations(8)
    place = job.prepare("sft", rows, name="two", config=CONFIG, launch=Launch.parse(FLAGS))
    controls = [SetCoefficient(name="learning_rate", value=1e-2), SaveCheckpoint(), Sample(prompts=["Who?"])]
    for control in controls:
        append_line(place.control_path, control.model_dump())
    done = launch(job.root, "two")
    assert done.returncode == 0, done.stderr
    events = place.events()
    assert events[0].world_size == 2
    assert len(set(events[0].rank_pids)) == 2
    assert [e.seq for e in events] == list(range(1, len(events) + 1))
    assert events[-1].outcome == "finished"
    assert [e.step for e in events if e.kind == "checkpoint_saved"] == [0, 2, 4]
    ranks = {path.name for path in checkpoints.directory(place.path, 2).glob("rng_state*")}
    assert ranks == {"rng_state_0.pth", "rng_state_1.pth"}
    assert [e.request_id for e in events if e.kind == "samples"] == [controls[2].id, None, None]

    # A rank that had kept the old rate would have pulled the loss away from that of one process with the new one.
    alone = job("sft", rows, name="one", config={**CONFIG, "learning_rate": 1e-2})
    assert trace(place, "loss") == pytest.approx(trace(alone, "loss"), rel=1e-4)

    before = trace(place, "loss")
    done = launch(job.root, "two", 2, str(checkpoints.directory(place.path, 2)))
    assert done.returncode == 0, done.stderr
    assert trace(place, "loss") == pytest.approx(before, rel=1e-6)


def test_another_world_than_was_asked_for_fails_at_the_start(job):
    from rlhf_nb.errors import ComputeError

    place = job.prepare("sft", demonstrations(2), config=CONFIG, launch=Launch.parse(FLAGS))
    with pytest.raises(ComputeError, match="launch: 2 ranks were asked for and the process group has 1"):
        job.run(place)
    assert [e.kind for e in place.events()] == ["started"]
    assert place.events()[0].world_size == 1


@pytest.mark.slow
def test_online_dpo_on_two_ranks_counts_both(job, trace, tiny_model_maker):
    """Six prompts a step, three a rank: only the mean over both is 2.5."""
    job.model = tiny_model_maker("still", dropout=0.0)
    rows = [{"prompt": f"Number {i}?", "wanted": float(i)} for i in range(6)]
    source = "def wanted(prompts, completions, *, wanted):\n    return [w for w in wanted]"
    config = {**CONFIG, "max_steps": 3, "batch_size": 6, "max_new_tokens": 6, "sample_every": 0}
    place = job.prepare(
        "online-dpo", rows, name="two", config=config, launch=Launch.parse(FLAGS),
        reward=FunctionReward(name="wanted", source=source),
    )  # fmt: skip
    append_line(place.control_path, SetCoefficient(name="beta", value=0.5).model_dump())
    done = launch(job.root, "two")
    assert done.returncode == 0, done.stderr
    assert list(trace(place, "reward/score").values()) == [pytest.approx(2.5)] * 3
    (change,) = [e for e in place.events() if e.kind == "coefficient_changed"]
    assert (change.name, change.effective_step) == ("beta", 1)
    ratio = trace(place, "log_ratio/margin")
    assert trace(place, "implicit_reward/margin") == pytest.approx(
        {step: 0.5 * ratio[step] for step in ratio}, rel=1e-5
    )
    assert trace(place, "kl/policy_reference")[3] != 0.0
