"""Watching changes nothing: with control untouched, every number is the one a plain TRL script logs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_nb.protocol.spec import FunctionReward
from rlhf_nb.toy import demonstrations, pairs, prompts, thumbs
from rlhf_nb.training.data import shuffled

KNOBS = {
    "max_steps": 6, "batch_size": 4, "learning_rate": 2e-3, "lr_scheduler": "cosine", "warmup_steps": 1,
    "weight_decay": 0.1, "max_length": 200, "seed": 3,
}  # fmt: skip
ROWS = {
    "sft": demonstrations(20),
    "reward": pairs(20),
    "dpo": pairs(20),
    "kto": thumbs(24),
    "orpo": pairs(20),
    "simpo": pairs(20),
    "online-dpo": prompts(20),
}
VOWELS = FunctionReward(
    name="vowels",
    source="def vowels(prompts, completions):\n"
    "    return [float(sum(c in 'aeiou' for c in text)) for text in completions]",
)
ONLINE = {"online-dpo": {"max_new_tokens": 8}}
SAMPLING = {"sample_every": 2, "sample_tokens": 8}
NAMES = {
    "loss": "loss",
    "grad_norm": "optimizer/grad_norm",
    "learning_rate": "optimizer/learning_rate",
    "margin": "pairs/margin",
    "rewards/margins": "implicit_reward/margin",
    "rewards/chosen": "implicit_reward/chosen",
    "entropy": "policy/entropy",
}


@pytest.fixture(scope="module")
def plain(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    settings = {**KNOBS, "model": str(tiny_model), "rows": as_chat(), "output": str(tmp_path_factory.mktemp("plain"))}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "plain_trl.py"), json.dumps(settings)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def as_chat() -> dict[str, list[dict]]:
    def messages(role: str, text: str) -> list[dict]:
        return [{"role": role, "content": text}]

    def row(row: dict) -> dict:
        return {
            k: messages("user" if k == "prompt" else "assistant", v) if isinstance(v, str) else v
            for k, v in row.items()
        }

    # TRL's KTO reads in order; ours shuffles once before.
    given = {**ROWS, "kto": shuffled(ROWS["kto"], KNOBS["seed"])}
    return {method: [row(r) for r in rows] for method, rows in given.items()}


OURS = """
import json, sys
from pathlib import Path
from rlhf_nb.training import job
root = Path(sys.argv[1])
for name in sys.argv[2:]:
    job.run(root / name, blobs=root, runs_root=root, rank=0, world_size=1, warm=False, attempt=1, resume_from=None)
"""


@pytest.fixture(scope="module")
def ours(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, job_class: type) -> dict[str, object]:
    jobs = job_class(tmp_path_factory.mktemp("ours"), tiny_model)
    # A gold reward that draws random numbers: what is only looked at must not reach the training either.
    gold = FunctionReward(
        name="dice",
        source="import random\n"
        "def dice(prompts, completions, **columns):\n    return [random.random() for _ in prompts]",
    )
    places = {
        method: jobs.prepare(
            method,
            rows,
            name=method,
            config={
                **KNOBS,
                **ONLINE.get(method, {}),
                **(SAMPLING if method != "reward" else {}),
                "checkpoint_every": 3,
            },
            gold=gold,
            reward=VOWELS if method == "online-dpo" else None,
        )
        for method, rows in ROWS.items()
    }
    done = subprocess.run(
        [sys.executable, "-c", OURS, str(jobs.root), *places],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return places


@pytest.mark.parametrize("method", ROWS)
def test_untouched_control_leaves_every_logged_number_bit_identical(method, plain, ours, trace):
    events = ours[method].events()
    assert len([e for e in events if e.kind == "checkpoint_saved"]) == 2
    assert method == "reward" or len([e for e in events if e.kind == "samples"]) == 3
    compared = 0
    for theirs, name in NAMES.items():
        if theirs in plain[method][0]:
            assert [log[theirs] for log in plain[method]] == list(trace(ours[method], name).values()), name
            compared += 1
    assert compared >= 4
    # Not the loss: TRL rounds online DPO's to four digits.
    assert len({log["grad_norm"] for log in plain[method]}) == KNOBS["max_steps"]
